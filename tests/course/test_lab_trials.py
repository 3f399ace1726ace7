"""Notebook 10: the plan of a test, and users of a real server."""

import numpy as np
import pytest

from experiment_models import published, server_of
from flserving.experiments import statistics
from flserving.lab.checks.experiments import rollout
from flserving.lab.releases import trials
from flserving.registry.experiment import Arm, Experiment

LOG = {"who": "test", "why": "to see"}


def test_the_plan_follows_the_laws():
    plan, finer = trials.plan(2, 10_000, 10), trials.plan(2, 20_000, 10)
    for name, days in plan.days.items():
        assert (np.diff(days) < 0).all()
        assert days[0] / days[-1] == pytest.approx(400, rel=0.05), "ten times... the effect squared"
        np.testing.assert_allclose(days, 2 * finer.days[name])
    assert (plan.days[trials.FIXED] < plan.days[trials.TYPICAL]).all()
    assert (plan.days[trials.TYPICAL] < plan.days[trials.MOST]).all()
    alike, broken = plan.lost.values()
    assert alike[-1] / alike[0] == pytest.approx(2, rel=0.15), (
        "an even split loses twice what a tiny one does"
    )
    assert 1.2 < broken[-1] / broken[0] < 2 and (broken < alike).all()


def test_a_gap_is_noticed_where_the_width_falls_below_it():
    information = trials.noticed(0.5, 0.02)
    assert statistics.half_width(1 / information, 0.05, 0.02) == pytest.approx(0.5, rel=0.01)


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
            registry.start_experiment(
                "m", Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)}), **LOG
            )

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
