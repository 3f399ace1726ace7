"""The bandit: it finds the best arm with little regret, follows sums, and in a server learns from
feedback."""

import contextlib
import random
from collections import Counter

import pytest

from experiment_models import LOUD, ROW, publish, published, server_of
from flserving.errors import ModelExecutionError
from flserving.experiments.bandit import Thompson
from flserving.registry.experiment import Experiment
from serving_models import wait_until

MEANS = {"a": 0.5, "b": 0.6, "c": 0.8}


def played(seed, rounds=2_000, batch=1):
    """The sums of each arm after so many rewards; ``batch`` rewards come late, all at once."""
    bandit, draws, sums = (
        Thompson(MEANS, seed),
        random.Random(1000 + seed),
        dict.fromkeys(MEANS, (0, 0.0)),
    )
    for turn in range(rounds):
        arm = bandit.choose()
        sums[arm] = sums[arm][0] + 1, sums[arm][1] + (draws.random() < MEANS[arm])
        if turn % batch == 0:
            bandit.learn(sums)
    return bandit, sums


def shares(bandit, draws=2_000):
    """How often each arm is chosen, which is the probability that it is the best one."""
    chosen = Counter(bandit.choose() for _ in range(draws))
    return {arm: chosen[arm] / draws for arm in bandit.known}


@pytest.mark.parametrize("batch", [1, 50])
def test_it_finds_the_best_arm_with_far_less_regret_than_an_even_split(batch):
    regrets = []
    for seed in range(10):
        bandit, sums = played(seed, batch=batch)
        assert shares(bandit)["c"] > 0.5
        regrets.append(sum(n * (0.8 - MEANS[arm]) for arm, (n, _) in sums.items()))
    even = 2_000 * (0.8 - sum(MEANS.values()) / 3)
    assert sum(regrets) / 10 < 0.25 * even


def test_before_any_reward_all_arms_are_alike_and_an_unknown_arm_is_not_learned():
    bandit = Thompson("ab", seed=0)
    assert all(abs(share - 0.5) < 0.05 for share in shares(bandit, 4_000).values())
    bandit.learn({"a": (10, 10.0), "z": (1000, 1000.0)})
    assert bandit.known.keys() == {"a", "b"} and shares(bandit)["a"] > 0.8


def test_in_a_server_it_learns_from_feedback(tmp_path):
    with published(tmp_path) as registry, server_of(registry) as server:
        experiment = Experiment.of("bandit", {"bad": (2, 0.5), "good": (3, 0.5)}, rule="bandit")
        running = registry.start_experiment("m", experiment, who="test", why="to see")
        for i in range(40):
            answer = server.predict(ROW, client=f"c-{i}")
            server.experiments.feedback(
                "m", answer["receipt"], float(answer["arm"] == "good"), f"c-{i}"
            )
        wait_until(
            lambda: (
                sum(n for n, _ in server.experiments._bandits[running.run].known.values()) == 40
            ),
            "learning",
        )
        arms = [server.predict(ROW, client="c-1")["arm"] for _ in range(200)]
        assert arms.count("good") > 150
        report = server.experiments.report("m")["arms"]
        assert report["good"]["mean"] == 1 and report["bad"]["mean"] in (0, None)


def test_an_arm_that_fails_is_learned_without_any_feedback(tmp_path):
    with published(tmp_path) as registry, server_of(registry) as server:
        publish(registry, 4, fragile=True)
        experiment = Experiment.of("bandit", {"bad": (4, 0.5), "good": (3, 0.5)}, rule="bandit")
        registry.start_experiment("m", experiment, who="test", why="to see")
        for _ in range(80):
            with contextlib.suppress(ModelExecutionError):
                server.predict(LOUD, client="c-1")
        server.experiments.look()
        arms = [server.predict(ROW, client="c-1")["arm"] for _ in range(200)]
        assert (
            arms.count("good") > 150 and server.experiments.report("m")["arms"]["bad"]["failed"] > 5
        )


class Last:
    """A rule of one's own: the arm that was named last, until another one has more rewards."""

    def __init__(self, arms):
        self.arm = list(arms)[-1]

    def learn(self, known):
        self.arm = max(known, key=lambda arm: (known[arm][1], arm))

    def choose(self):
        return self.arm


def test_a_server_takes_another_rule_for_either_kind(tmp_path):
    with published(tmp_path) as registry, server_of(registry) as server:
        server.experiments.bandit = Last
        server.experiments.arm_of = lambda experiment, client: max(
            experiment.arms, key=lambda arm: (client[0], arm)
        )
        for rule in ("bandit", "sticky"):
            experiment = Experiment.of(rule, {"a": (2, 0.5), "b": (3, 0.5)}, rule=rule)
            registry.start_experiment("m", experiment, who="test", why="to see")
            answers = [server.predict(ROW, client=f"c-{i}") for i in range(20)]
            assert {(answer["arm"], answer["model_version"]) for answer in answers} == {("b", "3")}
            registry.conclude_experiment("m", who="test", why="seen")
