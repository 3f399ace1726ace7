"""Experiments: who gets which arm, how they begin and end, shadows, and canaries that decide by
themselves."""

import itertools
import math
import shutil
import sqlite3
import threading
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment_models import LOUD, ROW, named, publish, published, server_of
from flserving import Registry
from flserving.errors import (
    ConfigError,
    ConflictError,
    CorruptArtifactError,
    ForbiddenError,
    InvalidInputError,
    InvalidModelError,
    ModelExecutionError,
    NotFoundError,
    OverloadedError,
)
from flserving.experiments import Verdict, controller, judge
from flserving.experiments.shadow import Shadow
from flserving.registry.experiment import Arm, Experiment, Policy
from flserving.serving.router import Router
from serving_models import PATIENCE_S, Threads, wait_until

pytestmark = pytest.mark.timeout(120)
LOG = {"who": "test", "why": "to see"}
AB = Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)})


@pytest.fixture
def registry(tmp_path):
    with published(tmp_path) as registry:
        yield registry


@pytest.fixture
def server(registry):
    with server_of(registry) as server:
        yield server


# The split


def keyed(weights, key="ab" * 16):
    arms = {name: Arm(place + 1, weight) for place, (name, weight) in enumerate(weights.items())}
    return Experiment(id="x", arms=arms, key=key)


def arms_of(experiment, clients=20_000):
    return [experiment.arm_of(f"client-{i}") for i in range(clients)]


@pytest.mark.parametrize(
    "weights",
    [{"a": 0.5, "b": 0.5}, {"a": 0.99, "b": 0.01}, {"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 1.0}],
    ids=str,
)
def test_the_split_is_as_weighed_within_binomial_bounds(weights):
    arms = arms_of(keyed(weights))
    for name, weight in weights.items():
        bound = 5 * math.sqrt(weight * (1 - weight) * len(arms))
        assert abs(arms.count(name) - weight * len(arms)) <= bound


def test_the_same_client_gets_the_same_arm_wherever_it_is_read():
    experiment = keyed({"a": 0.3, "b": 0.7})
    again = msgspec.json.decode(msgspec.json.encode(experiment), type=Experiment)
    assert arms_of(experiment, 500) == arms_of(again, 500)
    other = arms_of(keyed({"a": 0.3, "b": 0.7}, key="cd" * 16), 5000)
    both = sum(a == b == "a" for a, b in zip(arms_of(experiment, 5000), other, strict=True))
    assert abs(both - 0.09 * 5000) < 5 * math.sqrt(0.09 * 0.91 * 5000), (
        "the arms of two runs are independent"
    )
    assert experiment.arm_of("\udc80 \x00 é") in "ab"


def moves_of(old, new, clients=20_000):
    arms = zip(arms_of(keyed(old), clients), arms_of(keyed(new), clients), strict=True)
    return {(before, after) for before, after in arms if before != after}


def test_only_as_many_clients_as_must_change_their_arm():
    assert moves_of({"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}) == {("a", "b")}
    two, three = {"a": 0.6, "b": 0.4}, {"c": 0.2, "a": 0.48, "b": 0.32}
    assert moves_of(two, three) == {("a", "c"), ("b", "c")} and moves_of(three, two) == {
        ("c", "a"),
        ("c", "b"),
    }
    assert moves_of(two, {"b": 0.4, "a": 0.6}) == set(), (
        "the order in which arms are named is nothing"
    )


WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 20), min_size=1)


@given(WEIGHTS, WEIGHTS)
def test_a_client_changes_its_arm_only_for_one_whose_weight_grew_against_its_own(old, new):
    shares = [
        {name: weight / sum(given.values()) for name, weight in given.items()}
        for given in (old, new)
    ]
    for before, after in moves_of(*shares, clients=200):
        assert new[after] * old[before] > new.get(before, 0) * old.get(after, 0), (before, after)


# The registry


@pytest.mark.parametrize(
    ("experiment", "error", "message"),
    [
        (
            Experiment.of("x", {"a": (1, 0.5), "b": (2, 0.6)}),
            ConfigError,
            "sum to 1.1: they must sum to one",
        ),
        (Experiment.of("x", {"a": (1, 1.0), "b": (2, 0.0)}), ConfigError, "arm 'b' is empty"),
        (
            Experiment.of("x", {"a": (1, 2.0), "b": (2, -1.0)}),
            ConfigError,
            "arm 'a' is empty, its weight is 2.0",
        ),
        (Experiment.of("x", {"a": (1, math.nan)}), ConfigError, "empty"),
        (Experiment(id="x"), ConfigError, "has 0 arms"),
        (Experiment.of("x", {f"a{i}": (1, 1 / 9) for i in range(9)}), ConfigError, "has 9 arms"),
        (
            Experiment.of("x", {"a": (1, 0.5), "b": (9, 0.5)}),
            NotFoundError,
            "no version or alias '9'",
        ),
        (Experiment(id="x", shadow=9), NotFoundError, "no version or alias '9'"),
        (Experiment.of("no name", {"a": (1, 1.0)}), InvalidModelError, "experiment"),
        (Experiment.of("x", {"../a": (1, 1.0)}), InvalidModelError, "arm"),
        (Experiment.canary("x", 2, 3), ConfigError, "no arm of 'x' has version 1"),
        (Experiment.canary("x", 1, 1), ConfigError, "two sticky arms"),
        (Experiment.canary("x", 1, 2, policy=Policy(effect=0)), ConfigError, "effect is 0"),
        (Experiment.canary("x", 1, 2, policy=Policy(ruin=1)), ConfigError, "ruin is 1"),
        (
            Experiment.canary("x", 1, 2, policy=Policy(checked_share=0)),
            ConfigError,
            "checked_share is 0",
        ),
        (
            Experiment.canary("x", 1, 2, policy=Policy(checked_share=1.1)),
            ConfigError,
            "checked_share is 1.1",
        ),
        (
            Experiment.canary("x", 1, 2, policy=Policy(min_clients=1)),
            ConfigError,
            "min_clients is 1",
        ),
        (
            Experiment.canary("x", 1, 2, policy=Policy(min_clients=2.5)),
            ConfigError,
            "is none: Expected `int`",
        ),
        (
            Experiment.canary("x", 1, 2, policy=Policy(alpha="5 %")),
            ConfigError,
            r"got `str` - at `\$.policy.alpha`",
        ),
        (Experiment.canary("x", 1, 2, policy=Policy(most_s=0)), ConfigError, "most_s is 0"),
        (
            Experiment.canary("x", 1, 2, policy=Policy(most_s=math.inf)),
            ConfigError,
            "most_s is inf",
        ),
        (
            Experiment.of("x", {"a": (1, "half"), "b": (2, 0.5)}),
            ConfigError,
            "is none: Expected `float`, got `str`",
        ),
        (
            Experiment.of("x", {"a": (1, 1.0)}, rule="random"),
            ConfigError,
            "is none: Invalid enum value 'random'",
        ),
        (Experiment(id="x", arms={"a": (1, 1.0)}), ConfigError, "is none: Expected `object`"),
        (Experiment(id="x", shadow="2"), ConfigError, "is none: Expected `int | null`"),
        (Experiment(id=7, shadow=2), ConfigError, "experiment 7 is none"),
        (
            Experiment.of("x", {"a": (np.int64(1), 1.0)}),
            ConfigError,
            "is none: Encoding objects of type numpy.int64",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_cannot_be_run_is_refused_and_changes_nothing(registry, experiment, error, message):
    before = registry.change_token()
    with pytest.raises(error, match=message):
        registry.start_experiment("m", experiment, **LOG)
    assert (
        registry.change_token() == before
        and registry.experiments("m") == {}
        and registry.experiment_log("m") == []
    )


def test_an_alias_is_in_one_experiment_and_stays_where_it_is(registry):
    running = registry.start_experiment("m", AB, **LOG)
    token, aliases = registry.change_token(), registry.aliases("m")
    for refused, message in [
        (
            lambda: registry.start_experiment("m", Experiment.of("other", {"a": (1, 1.0)}), **LOG),
            "in experiment 'ab'",
        ),
        (
            lambda: registry.start_experiment("m", Experiment.of("ab", {"a": (3, 1.0)}), **LOG),
            "with other arms",
        ),
        (lambda: registry.set_alias("m", "default", 2, **LOG), "conclude_experiment ends it"),
        (lambda: registry.rollback("m", **LOG), "no earlier one|conclude_experiment ends it"),
        (lambda: registry.remove_alias("m", "default", **LOG), "conclude_experiment ends it"),
        (lambda: publish(registry, 4, alias="default"), "conclude_experiment ends it"),
        (
            lambda: registry.conclude_experiment("m", run="another", **LOG),
            "another experiment has begun",
        ),
        (lambda: registry.conclude_experiment("m", version=9, **LOG), "no version or alias '9'"),
        (lambda: registry.start_experiment("m", AB, "nowhere", **LOG), "no alias 'nowhere'"),
        (lambda: registry.conclude_experiment("m", "nowhere", **LOG), "is in no experiment"),
    ]:
        with pytest.raises((ConflictError, NotFoundError), match=message):
            refused()
    assert (registry.change_token(), registry.aliases("m")) == (token, aliases)
    assert registry.experiments("m") == {"default": running}
    assert publish(registry, 4).version == 4, "the refused publish left no gap"


def test_it_begins_goes_on_with_other_weights_and_ends_with_a_move_all_in_the_log(registry):
    first = registry.start_experiment("m", AB, **LOG)
    assert (
        registry.start_experiment("m", AB, **LOG) == first
        and len(registry.experiment_log("m")) == 1
    )
    second = registry.start_experiment(
        "m", Experiment.of("ab", {"a": (1, 0.1), "b": (2, 0.9)}), **LOG
    )
    assert (second.run, second.key) == (first.run, first.key) and second != first
    before = registry.change_token()
    assert registry.conclude_experiment("m", version=2, **LOG) == second
    assert registry.change_token() == before + 2 and registry.aliases("m") == {"default": 2}
    assert [entry["experiment"] for entry in registry.experiment_log("m")] == [first, second, None]
    assert registry.start_experiment("m", AB, **LOG).run != first.run


def test_a_registry_from_before_experiments_gets_them(tmp_path):
    published(tmp_path, 2).close()
    with sqlite3.connect(tmp_path / "registry.sqlite3") as old:
        old.executescript("DROP TABLE experiments; PRAGMA user_version = 1;")
    old.close()
    with Registry(tmp_path) as registry:
        assert registry.start_experiment("m", AB, **LOG) == registry.experiments("m")["default"]


# In a server


def test_an_answer_names_its_arm_and_who_is_nobody_gets_the_alias(registry, server):
    server.predict(ROW)
    running = registry.start_experiment("m", AB, **LOG)
    for i in range(50):
        answer = server.predict(ROW, client=f"c-{i}")
        arm = running.arm_of(f"c-{i}")
        assert (answer["arm"], answer["model_version"]) == (arm, str(running.arms[arm].version))
        assert answer["predictions"] == [running.arms[arm].version]
    for options in ({}, {"client": ["c-1"]}, {"client": "c-1", "version": 1}):
        answer = server.predict(ROW, **options)
        assert answer["model_version"] == "1" and not {"arm", "receipt"} & answer.keys()
    report = server.experiments.report("m")
    assert sum(arm["answers"] for arm in report["arms"].values()) == 50 and report["id"] == "ab"
    registry.conclude_experiment("m", version=3, **LOG)
    assert (
        server.predict(ROW, client="c-1")["predictions"] == [3]
        and server.experiments.report("m") == {}
    )


def test_an_id_that_is_no_unicode_text_gives_feedback_too(registry, server):
    server.predict(ROW)
    running = registry.start_experiment("m", AB, **LOG)
    answer = server.predict(ROW, client="\udc80")
    server.experiments.feedback("m", answer["receipt"], 0.5, "\udc80")
    name = server.experiments.pseudonym("m", "\udc80")
    assert server.experiments._store(registry).rewards(running.run) == {
        answer["arm"]: {name: (1, 0.5)}
    }
    with pytest.raises(ForbiddenError):
        server.experiments.feedback(
            "m", server.predict(ROW, client="\udc80")["receipt"], 0.5, "\udc81"
        )


def test_every_process_follows_what_one_of_them_starts(tmp_path, registry, server):
    with Registry(tmp_path) as other:
        running = other.start_experiment("m", Experiment.of("x", {"a": (3, 1.0)}), **LOG)
        wait_until(
            lambda: server.predict(ROW, client="c")["predictions"] == [3],
            "the experiment of another process",
        )
        assert server._router.routes.experiments == {("m", "default"): running}
        other.conclude_experiment("m", **LOG)
        wait_until(lambda: server.predict(ROW, client="c")["predictions"] == [1], "its end")


def test_an_arm_that_cannot_be_loaded_does_not_begin(tmp_path, registry, server):
    weights = tmp_path / "models" / "m" / "2" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    registry.start_experiment("m", AB, **LOG)
    assert {server.predict(ROW, client=f"c-{i}")["model_version"] for i in range(20)} == {"1"}
    assert "ab does not run" in server.health_check()["problems"]["m/default experiment"]
    registry.conclude_experiment("m", **LOG)
    server.refresh()
    assert "m/default experiment" not in server.health_check()["problems"]


def test_a_client_changes_its_arm_only_when_its_experiment_changes(registry, server):
    names = [f"c-{i}" for i in range(200)]

    def arms():
        return {name: server.predict(ROW, client=name)["arm"] for name in names}

    registry.start_experiment("m", AB, **LOG)
    first = arms()
    bound = 5 * math.sqrt(0.25 * len(names))
    assert abs(list(first.values()).count("b") - len(names) / 2) < bound
    for change in (
        lambda: publish(registry, 4),
        lambda: registry.set_alias("m", "other", 3, **LOG),
        lambda: registry.start_experiment(
            "m", Experiment.of("elsewhere", {"a": (2, 0.1), "b": (3, 0.9)}), "other", **LOG
        ),
        lambda: registry.start_experiment(
            "m", Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)}, shadow=3), **LOG
        ),
    ):
        change()
        assert arms() == first
    registry.start_experiment("m", Experiment.of("ab", {"a": (1, 0.2), "b": (2, 0.8)}), **LOG)
    moved = {
        (old, new) for old, new in zip(first.values(), arms().values(), strict=True) if old != new
    }
    assert moved == {("a", "b")}


def test_under_load_every_answer_belongs_to_one_configuration(registry, server):
    """Arms carry the name of their configuration, so an arm with another's version would show."""
    plans = [
        {"p": (1, 0.5), "q": (2, 0.5)},
        {"r": (2, 0.2), "s": (3, 0.8)},
        {"t": (3, 0.5), "u": (1, 0.5)},
    ]
    allowed = {(arm, version) for plan in plans for arm, (version, _) in plan.items()} | {(None, 1)}
    done, threads = threading.Event(), Threads()

    def ask(number):
        seen = set()
        for turn in itertools.count():
            if done.is_set():
                return seen
            answer = server.predict(ROW, client=f"c-{number}-{turn % 7}")
            assert answer["predictions"] == [int(answer["model_version"])]
            seen.add((answer.get("arm"), int(answer["model_version"])))

    for number in range(8):
        threads.start(ask, number)
    try:
        for turn in range(12):
            registry.start_experiment("m", Experiment.of(f"x-{turn}", plans[turn % 3]), **LOG)
            server.predict(ROW)
            registry.conclude_experiment("m", **LOG)
    finally:
        done.set()
    seen = set().union(*threads.results())
    assert seen <= allowed and len(seen) > 3, seen


# Shadows


def test_a_shadow_changes_no_answer_whatever_it_does(registry, server):
    alone = server.predict(ROW, client="c")["predictions"]
    registry.start_experiment("m", Experiment(id="s", shadow=2), **LOG)
    for turn in range(1, 6):
        answer = server.predict(ROW, client="c")
        assert answer["predictions"] == alone and "arm" not in answer
        wait_until(
            lambda turn=turn: server.experiments.report("m")["shadow"]["ran"] == turn,
            "the copy's run",
        )
    shadow = server.experiments.report("m")["shadow"]
    assert (shadow["rows"], shadow["agreeing"], shadow["failed"]) == (5, 0, 0) and shadow[
        "seconds"
    ] > 0
    registry.conclude_experiment("m", **LOG)
    publish(registry, 1)  # answers as version 1 does
    registry.start_experiment("m", Experiment(id="same", shadow=4), **LOG)
    server.predict(np.zeros((3, 4), np.float32))
    wait_until(
        lambda: server.experiments.report("m")["shadow"]["agreeing"] == 3, "three rows that agree"
    )
    assert server.get_all_stats()["server"]["requests"] == 7, "copies are no requests"


def test_a_shadow_is_bounded_drops_when_busy_and_survives_its_own_errors():
    gate, busy, calls = threading.Event(), threading.Event(), []

    def run(key, rows, client):
        calls.append(client)
        gate.wait(PATIENCE_S)
        if client == "bad":
            raise RuntimeError("the shadow's own")
        return rows[:, 0]

    shadow, key, rows = (
        Shadow(run, busy.is_set, capacity=2),
        ("m", "2"),
        np.ones((1, 2), np.float32),
    )
    try:
        shadow.offer(key, rows, "bad", rows[:, 0])
        wait_until(lambda: calls == ["bad"], "the first copy")
        for client in ("b", "c", "d", "e"):
            shadow.offer(key, rows, client, rows[:, 0])
        rows[:] = 7  # what a caller does to its array afterwards is its own affair
        assert shadow.stats(key)["dropped"] == 2
        gate.set()
        wait_until(lambda: shadow.stats(key)["ran"] == 2, "the copies that waited")
        stats = shadow.stats(key)
        assert (stats["failed"], stats["agreeing"], calls) == (1, 2, ["bad", "b", "c"])
        shadow.offer(key, np.ones((1 << 18, 2), np.float32), "large", rows[:, 0])
        assert shadow.stats(key)["dropped"] == 3
        busy.set()
        shadow.offer(key, rows, "f", rows[:, 0])
        wait_until(lambda: shadow.stats(key)["dropped"] == 4, "the copy that found callers waiting")
    finally:
        gate.set()
        shadow.close()
    shadow.offer(key, rows, "late", rows[:, 0])
    assert shadow.stats(key)["dropped"] == 4 and "late" not in calls


# Canaries


def test_a_policy_from_before_there_were_fields_is_read_with_their_defaults(registry):
    """Old registries load; and what they decide is as safe as it would be today."""
    old = Experiment.canary("x", 1, 2, policy=Policy(effect=0.1, power=0.8))
    content = msgspec.to_builtins(msgspec.structs.replace(old, run="1f", key="ab"))
    del content["policy"]["ruin"], content["policy"]["checked_share"]
    with registry._change("m", "default", **LOG) as entry:
        registry._log_experiment(entry, msgspec.json.encode(content).decode())
    assert registry.experiments("m")["default"].policy == Policy(
        effect=0.1, power=0.8, ruin=0.2, checked_share=0.98
    )


def rewards(mean, clients=60, each=100, **special):
    return {f"c-{i}": (each, each * mean) for i in range(clients)} | special


@pytest.mark.parametrize(
    ("control", "canary", "more", "decision", "message"),
    [
        (rewards(0.9), rewards(0.9), (), "promote", "against 0.9000"),
        (rewards(0.9), rewards(0.7), (), "rollback", "-0.2000"),
        (rewards(0.9), rewards(0.9, 10), (), "wait", "10 and 60 clients"),
        (
            rewards(0.9),
            rewards(0.9, 10),
            (0, 0, 604_801),
            "rollback",
            "no verdict within 604800 s: 10 and 60 clients",
        ),
        (rewards(0.9), rewards(0.9), (0, 0, 604_801), "promote", "against 0.9000"),
        (rewards(0.9), rewards(0.9, each=1), (), "wait", "mean reward"),
        (
            rewards(0.9),
            rewards(0.9, bad=(100, 20.0)),
            (),
            "rollback",
            "'bad' gets 0.200, the control's worst 0.900",
        ),
        (
            rewards(0.9),
            rewards(0.9, unlucky=(100, 78.0)),
            (),
            "wait",
            "worst client 0.780, the control's 0.900",
        ),
        (
            rewards(0.9),
            rewards(0.9, unlucky=(100, 78.0)),
            (0, 0, 604_801),
            "rollback",
            "no verdict within 604800 s",
        ),
        (
            rewards(0.9),
            rewards(0.9, 98, few=(5, 5.0), more=(5, 5.0)),
            (),
            "promote",
            "against 0.9000",
        ),
        (
            rewards(0.9),
            rewards(0.9, 90, few=(5, 5.0), more=(5, 5.0)),
            (),
            "wait",
            "90 of 92 clients gave 20 rewards: 98%",
        ),
        (
            rewards(0.9, each=19),
            rewards(0.9),
            (),
            "wait",
            "60 of 60 clients gave 20 rewards: 98% of these and 20 of the",
        ),
        (
            rewards(0.9, each=500),
            rewards(0.9, ill=(25, 17.0)),
            (),
            "wait",
            "worst client 0.680, the control's 0.900",
        ),
        (rewards(0.9, 19), rewards(0.9), (), "wait", "60 and 19 clients"),
        ({}, {}, (1000, 0), "wait", "0 and 0 clients"),
        ({}, {}, (1000, 100), "rollback", "100 of 1000 requests failed in the model"),
    ],
    ids=[
        "equal",
        "worse",
        "few-clients",
        "late",
        "late-but-proven",
        "few-rewards",
        "bad-client",
        "unlucky-client",
        "unlucky-client-late",
        "few-unchecked",
        "too-many-unchecked",
        "control-unchecked",
        "not-spared",
        "few-clients-of-the-control",
        "no-feedback",
        "failing",
    ],
)
def test_what_the_evidence_says(control, canary, more, decision, message):
    verdict = judge(Policy(), control, canary, *more)
    assert verdict.decision == decision and message in verdict.why, verdict


@pytest.mark.parametrize(("mean", "version"), [(0.9, 2), (0.8, 1)], ids=["promoted", "rolled-back"])
def test_a_canary_ends_by_itself(registry, server, monkeypatch, mean, version):
    monkeypatch.setattr(controller, "JUDGE_S", 0)
    running = registry.start_experiment("m", Experiment.canary("round-2", 1, 2, share=0.5), **LOG)
    assert {server.predict(ROW, client=f"c-{i}")["arm"] for i in range(30)} == {"control", "canary"}
    store, draws = server.experiments._store(registry), np.random.default_rng(0)
    with store._writing() as database:
        for i in range(200):
            arm = running.arm_of(f"c-{i}")
            total = float(draws.binomial(200, mean if arm == "canary" else 0.9))
            row = (running.run, arm, store.pseudonym(f"c-{i}"), total)
            database.execute("INSERT INTO rewards VALUES (?, ?, ?, 200, ?)", row)
    wait_until(lambda: registry.experiments("m") == {}, "the verdict")
    assert registry.aliases("m") == {"default": version}
    wait_until(
        lambda: "arm" not in server.predict(ROW, client="c-1"), "the server to follow its own clerk"
    )
    assert server.predict(ROW, client="c-1")["predictions"] == [version]
    last = registry.experiment_log("m")[-1]
    assert last["who"] == "round-2" and last["why"].startswith(
        "promote" if version == 2 else "rollback"
    )


def test_a_canary_that_fails_is_rolled_back_by_what_all_processes_saw(
    tmp_path, registry, server, monkeypatch
):
    """No feedback at all; two clients' failures in one process show nothing yet, a third's in
    another one does."""
    monkeypatch.setattr(Router, "WATCH_S", 3600)
    monkeypatch.setattr(controller, "JUDGE_S", 3600)
    publish(registry, 4, fragile=True)
    with Registry(tmp_path) as there, server_of(there) as other:
        running = registry.start_experiment("m", Experiment.canary("x", 1, 4, share=0.5), **LOG)
        other.refresh()
        old, new = named(running, "control"), named(running, "canary")
        others = [
            name for name in (f"d-{i}" for i in range(40)) if running.arm_of(name) == "canary"
        ]
        for asked, clients in ((server, [new, *[others[0]] * 20]), (other, [others[1]])):
            assert asked.predict(ROW, client=old)["predictions"] == [1]
            asks = [{"client": client} for client in clients]
            # who names the version is no part of the experiment
            for options in (*asks, {"version": 4}):
                with pytest.raises(ModelExecutionError):
                    asked.predict(LOUD, **options)
            with pytest.raises(InvalidInputError):
                asked.predict(LOUD[:, :2], client=new)
            verdict = asked.experiments.decide("m")
            assert verdict.decision == ("wait" if asked is server else "rollback"), verdict
        assert "2 of 2 requests failed in the model" in verdict.why
        assert registry.experiments("m") == {} and registry.aliases("m") == {"default": 1}
        for asked in (server, other):
            asked.refresh()
            assert asked.predict(LOUD, client=new)["predictions"] == [1]
            with pytest.raises(NotFoundError, match="no canary with a policy"):
                asked.experiments.decide("m")
        registry.start_experiment("m", AB, **LOG)
        with pytest.raises(ConflictError, match="another experiment has begun"):
            registry.conclude_experiment("m", run=running.run, **LOG)


def test_a_version_that_is_gone_is_not_promoted_and_no_route_changes(
    tmp_path, registry, server, monkeypatch
):
    monkeypatch.setattr(Router, "WATCH_S", 3600)
    registry.start_experiment("m", Experiment.canary("x", 1, 2, share=0.5), **LOG)
    server.predict(ROW, client="c")
    shutil.rmtree(tmp_path / "models" / "m" / "2")
    token, routes = registry.change_token(), server._router.routes
    for version, error in ((2, CorruptArtifactError), (9, NotFoundError)):
        with pytest.raises(error):
            registry.conclude_experiment("m", version=version, **LOG)
    server.refresh()
    assert registry.change_token() == token and server._router.routes is routes
    assert {server.predict(ROW, client=f"c-{i}")["predictions"][0] for i in range(30)} == {1, 2}, (
        "from memory"
    )
    monkeypatch.setattr(controller, "judge", lambda *_, **settings: Verdict("promote", "it wins"))
    verdict = server.experiments.decide("m")
    assert (
        verdict.decision == "rollback"
        and "it wins, but m/2/manifest.json cannot be opened" in verdict.why
    )
    assert registry.experiment_log("m")[-1]["why"].startswith(
        "rollback: it wins, but m/2/manifest.json cannot be opened"
    )
    assert registry.experiments("m") == {} and registry.aliases("m") == {"default": 1}
    assert server.predict(ROW, client="c")["predictions"] == [1]
    with pytest.raises(NotFoundError):
        registry.set_alias("m", "default", 9, **LOG)
    registry.set_alias("m", "default", 2, **LOG)  # the files are read where they are needed
    with Registry(tmp_path) as there, server_of(there) as restarted:
        with pytest.raises(NotFoundError, match="version 2 does not answer: m/2/manifest"):
            restarted.predict(ROW)
        assert restarted.predict(ROW, version=1)["predictions"] == [1]


def test_a_verdict_that_cannot_be_reached_is_a_problem_until_it_is_or_the_canary_is_over(
    registry, server, monkeypatch
):
    monkeypatch.setattr(Router, "WATCH_S", 3600)
    monkeypatch.setattr(controller, "JUDGE_S", 0)
    registry.start_experiment("m", Experiment.canary("x", 1, 2), **LOG)
    server.refresh()
    monkeypatch.setattr(server.experiments._store(registry), "outcomes", lambda run: 1 / 0)
    server.experiments.look()
    monkeypatch.setattr(controller, "JUDGE_S", 3600)
    for _ in range(2):  # nothing is judged in these looks
        server.experiments.look()
        assert "ZeroDivisionError" in server.health_check()["problems"]["m/default verdict"]
    registry.conclude_experiment("m", **LOG)
    server.refresh()
    server.experiments.look()
    assert server.health_check()["problems"] == {}


def test_a_canary_without_a_verdict_is_rolled_back_after_its_time(tmp_path, monkeypatch):
    """Counted from its first start, by the registry's clock: other weights and a restart change
    nothing about it."""
    monkeypatch.setattr(Router, "WATCH_S", 3600)
    now = [datetime(2026, 1, 1, tzinfo=UTC)]

    def pass_s(seconds):
        now[0] += timedelta(seconds=seconds)

    published(tmp_path).close()
    policy = Policy(most_s=100)
    for share in (0.1, 0.2):
        with Registry(tmp_path, now=lambda: now[0]) as registry, server_of(registry) as server:
            assert registry.experiment_age_s("m") == {0.1: 0, 0.2: 60}[share]
            registry.start_experiment("m", Experiment.canary("idle", 1, 2, share, policy), **LOG)
            server.refresh()
            server.predict(ROW, client="c")
            pass_s(60 if share == 0.1 else 40)
            assert server.experiments.decide("m").decision == "wait"
    with Registry(tmp_path, now=lambda: now[0]) as registry, server_of(registry) as server:
        pass_s(1)
        assert server.experiments.decide("m").decision == "rollback"
        last = registry.experiment_log("m")[-1]
        assert (
            last["why"]
            == "rollback: no verdict within 100 s: 0 and 0 clients gave rewards: 20 decide"
        )
        assert registry.experiments("m") == {} and registry.aliases("m") == {"default": 1}
        registry.start_experiment("m", Experiment.canary("idle", 1, 2, policy=policy), **LOG)
        assert registry.experiment_age_s("m") == 0, "another run of the same id"
        assert registry.experiment_age_s("m", "nowhere") == 0


def test_what_the_store_could_not_take_is_counted_later(registry, server, monkeypatch):
    monkeypatch.setattr(controller, "JUDGE_S", 3600)
    running = registry.start_experiment("m", AB, **LOG)
    store, arm = server.experiments._store(registry), running.arm_of("c")
    assert server.predict(ROW, client="c")["arm"] == arm
    with monkeypatch.context() as patch:
        patch.setattr(store, "count", lambda *_: (_ for _ in ()).throw(OverloadedError("busy")))
        with pytest.raises(OverloadedError):
            server.experiments.report("m")
    assert store.outcomes(running.run) == {}
    server.predict(ROW, client="c")
    assert server.experiments.report("m")["arms"][arm]["answers"] == 2
    assert server.experiments.report("m")["arms"][arm]["answers"] == 2, (
        "reported twice, counted once"
    )
