"""Notebook 10: tests without a difference, the plan of one, a bandit, users of a real server; and every figure."""

import itertools

import numpy as np
import pandas as pd
import pytest

from experiment_models import published, server_of
from flserving.experiments import statistics
from flserving.federated.gate import CHECKS
from flserving.lab import figures_10 as figures
from flserving.lab import trials
from flserving.lab.checks import rollout
from flserving.registry.experiment import Arm, Experiment

LOG = {"who": "test", "why": "to see"}


@pytest.fixture(scope="module")
def same():
    return trials.looked_at(tests=400, looks=50)


def test_peeking_deceives_the_z_test_and_not_the_sequential_one(same):
    assert same.often[-1] > 0.2 and (np.diff(same.often) >= 0).all() and (np.diff(same.always) >= 0).all()
    assert 0.01 < same.once[-1] < 0.11 and same.always[-1] < 0.06
    assert (same.once <= same.often).all() and same.once[0] == same.often[0]
    assert list(same.rewards[:2]) == [100, 200] and same.p_values.shape == (400, 50)


def test_the_formulas_keep_what_they_promise():
    """80 % power at the planned size, for both tests; the gap's own variances."""
    variance = (0.9 * 0.1 + 0.85 * 0.15) / 2
    for name, needed in (("once", statistics.fixed_information), ("always", statistics.information)):
        rewards = needed(0.05, 0.05, 0.8) * variance * 4
        worse = trials.looked_at(tests=800, looks=1 + int(rewards // 100), gap=0.05, seed=1)
        assert getattr(worse, name)[-1] > 0.72, name


def test_counting_requests_raises_false_alarms():
    by_request, by_client = trials.alarms_by_unit(tests=200)
    assert by_request > 0.3 and by_client < 0.15


def test_the_plan_follows_the_laws():
    plan, finer = trials.plan(2, 10_000, 10), trials.plan(2, 20_000, 10)
    for name, days in plan.days.items():
        assert (np.diff(days) < 0).all()
        assert days[0] / days[-1] == pytest.approx(400, rel=0.05), "ten times... the effect squared"
        np.testing.assert_allclose(days, 2 * finer.days[name])
    assert (plan.days[trials.FIXED] < plan.days[trials.TYPICAL]).all()
    assert (plan.days[trials.TYPICAL] < plan.days[trials.MOST]).all()
    alike, broken = plan.lost.values()
    assert alike[-1] / alike[0] == pytest.approx(2, rel=0.15), "an even split loses twice what a tiny one does"
    assert 1.2 < broken[-1] / broken[0] < 2 and (broken < alike).all()


def test_a_gap_is_noticed_where_the_width_falls_below_it():
    information = trials.noticed(0.5, 0.02)
    assert statistics.half_width(1 / information, 0.05, 0.02) == pytest.approx(0.5, rel=0.01)


def test_the_bandit_leaves_the_worse_arms_and_its_past_stays():
    early, late = trials.learning(200, 10), trials.learning(3000, 10)
    assert (late.chosen[:200] == early.chosen).all() and sum(n for n, _ in late.known.values()) == 3000
    assert np.median([trials.learning(3000, 10, day).lost[-1] for day in range(1, 8)]) < 150
    assert late.rates == pytest.approx((0.9, 0.8, 0.7))
    nothing = trials.learning(0, 10)
    assert nothing.known == dict.fromkeys(trials.ARMS, (0, 0.0)) and not len(nothing.lost)


def test_the_packages_own_router_does_what_the_exercise_asks():
    def route(client, weights, key):
        arms = {version: Arm(int(version), weight) for version, weight in sorted(weights.items())}
        return Experiment(id="x", arms=arms, key=key.hex()).arm_of(client)

    rollout.check_router(route)


def test_users_ask_through_a_change_and_give_feedback(tmp_path):
    with published(tmp_path) as registry, server_of(registry) as server:
        x, y = np.zeros((5, 4), np.float32), np.full(5, 2)
        users = trials.Users(server, "m", x, y, [f"u-{i}" for i in range(40)])

        def begin():
            registry.start_experiment("m", Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)}), **LOG)

        def over():
            arms = server.experiments.report("m").get("arms", {})
            return bool(arms) and all(arm["rewards"] >= 20 for arm in arms.values())

        answers, (start_s, end_s) = users.keep_asking(begin, over, around=30)
        report = server.experiments.report("m")["arms"]
        assert users.in_turn(5, 0)[1] <= {"1", "2"}
        users.y = None  # whatever goes wrong in a thread ends the run
        with pytest.raises(TypeError):
            users.keep_asking(begin, over)
    assert 0 < start_s <= end_s and (answers["right"] == (answers["version"] == 2)).all()
    assert len(answers) >= 60 and answers["at_s"].is_monotonic_increasing
    assert report["b"]["mean"] == 1 and report["a"]["mean"] == 0
    assert answers["arm"].notna().sum() == sum(arm["rewards"] for arm in report.values())


def test_every_figure_can_be_drawn(same):
    drawn = figures.arms_figure({"weight 10%": [True, False, False], "weight 50%": [True, True, False]})
    assert [tick.get_text() for tick in drawn.axes[0].get_yticklabels()] == ["weight 10%", "weight 50%"]
    assert [ax.get_xlabel() for ax in figures.peeking_figure(same).axes] == ["rewards so far"] * 2
    for effect, traffic, share in itertools.product((0.5, 10.0), (1_000, 1_000_000), (1, 50)):
        last = figures.plan_figure(trials.plan(effect, traffic, share))
    assert [ax.get_ylabel() for ax in last.axes] == ["time to decide (days)", "right answers lost"]
    for requests, gap in itertools.product((0, 50, 3000), (1, 20)):
        last = figures.bandit_figure(trials.learning(requests, gap))
    assert last.axes[0].get_title("left") == "after 3,000 requests"
    at_s = np.linspace(0, 2, 100)
    answers = pd.DataFrame({"at_s": at_s, "version": np.where(at_s > 1, 7, 5), "right": at_s < 1})
    drawn = figures.live_figure(answers, (0.5, 1.5), 7, "rolled back")
    assert [ax.get_ylabel() for ax in drawn.axes] == ["right (%)", "new version\nanswers (%)"]


def test_the_figure_of_attacks_tells_what_was_stopped_and_what_was_not():
    columns = ["left out", *CHECKS, "stopped", "missed, worst", "trigger"]
    table = pd.DataFrame(0.0, index=["clean", "loud", "quiet"], columns=columns)
    table.loc["loud", ["norm", "stopped", "missed, worst"]] = 1, 1, np.nan
    table.loc["quiet", ["missed, worst", "trigger"]] = 0.0123, 0.92
    ax = figures.attack_figure(table).axes[0]
    wide = len(ax.get_xticks())
    said = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in ax.texts}
    assert said[1, 3] == "100" and said[1, wide - 3] == "100" and (1, wide - 2) not in said
    assert [said[2, wide - back] for back in (3, 2, 1)] == ["0", "1.2", "92"] and (2, 3) not in said
    strong = {(round(p.get_y() + 0.44), round(p.get_x() + 0.46)) for p in ax.patches if p.get_alpha() > 0.5}
    assert strong == {(1, 3), (2, wide - 3), (2, wide - 1)}
