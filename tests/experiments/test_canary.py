"""A canary that harms is hardly ever promoted, and one that does not is hardly ever rolled back.

Simulated error rates of the verdict itself, looked at again and again, with as many clients as
there may be.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving.experiments.canary import Arms, findings, judge
from flserving.experiments.statistics import exceeds, log_evidence
from flserving.registry.experiment import Policy

MEAN = 0.9
CLIENTS = [25, 75, 150, 500]  # of each arm


class Ended(NamedTuple):
    promoted: float  # share of the canaries
    rolled_back: float
    rewards: np.ndarray  # of a client of the canary, in the mean, when it was promoted


def ended(
    runs,
    clients,
    *,
    ruined_to=None,
    share=1.0,
    spread=None,
    gain=0.0,
    horizon=120,
    seed=0,
    policy=None,
):
    """Canaries whose clients give rewards at random, one in the mean between two looks.

    Args:
        ruined_to: Mean reward of one client of the canary. ``gain``: of all of them, above the
            control's.
        share: How many clients the canary has for each of the control.
        spread: Clients differ: their means are Beta-distributed with a mean of 0.9 and a variance
            of 0.09 / (spread + 1); None: they do not.
    """
    draws, policy = np.random.default_rng(seed), policy or Policy()
    of_arm, rates = (clients, round(share * clients)), []
    for count, more in zip(of_arm, (0.0, gain), strict=True):
        alike = np.full((runs, count), MEAN)
        differing = (
            alike
            if spread is None
            else draws.beta(MEAN * spread, (1 - MEAN) * spread, (runs, count))
        )
        rates.append(np.clip(differing + more, 0, 1))
    if ruined_to is not None:
        rates[1][:, 0] = ruined_to
    n, total = ([np.zeros((runs, count)) for count in of_arm] for _ in range(2))
    open_, promoted, rolled_back, took = np.arange(runs), 0, 0, []
    for _ in range(horizon):
        for arm in range(2):
            came = draws.poisson(1.0, (len(open_), of_arm[arm]))
            n[arm][open_] += came
            total[arm][open_] += draws.binomial(came, rates[arm][open_])
        found = findings(policy, Arms(n[0][open_], total[0][open_], n[1][open_], total[1][open_]))
        took.extend(n[1][open_][found.promoted].mean(axis=1))
        promoted, rolled_back = (
            promoted + found.promoted.sum(),
            rolled_back + found.rolled_back.sum(),
        )
        open_ = open_[~(found.promoted | found.rolled_back)]
        if not len(open_):
            break
    return Ended(promoted / runs, rolled_back / runs, np.array(took))


def at_most(share, runs):
    """Where a simulated share may lie whose true one is ``share``: 3 standard errors above."""
    return share + 3 * math.sqrt(share * (1 - share) / runs)


@pytest.mark.parametrize("ruined_to", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("clients", CLIENTS)
def test_a_canary_that_ruins_one_client_is_not_promoted(clients, ruined_to):
    """A rule that promotes by the mean alone promotes half of them with 75 clients, nearly all with
    500."""
    runs = 60 if clients == 500 else 150
    found = ended(runs, clients, ruined_to=ruined_to)
    assert found.promoted <= 0.05, found
    assert ruined_to == 0.5 or found.rolled_back >= 0.9, "it is rolled back, not only waited for"


@pytest.mark.parametrize("clients", CLIENTS)
def test_a_canary_that_is_no_other_is_promoted_and_not_rolled_back(clients):
    runs = 100 if clients == 500 else 200
    found = ended(runs, clients)
    assert found.rolled_back <= 0.05 and found.promoted >= 0.95, found
    assert np.median(found.rewards) < 70 and np.quantile(found.rewards, 0.9) < 100, (
        "what a client's proof costs"
    )


@pytest.mark.parametrize("clients", [25, 75, 150])
def test_clients_that_differ_by_themselves_roll_no_canary_back(clients):
    found = ended(150, clients, spread=20)
    assert found.rolled_back <= 0.05, found
    assert found.promoted > {25: 0.3, 75: 0.7, 150: 0.8}[clients], (
        "the mean of few clients that differ is not known"
    )
    assert ended(150, clients, spread=20, ruined_to=0.2).promoted <= 0.05


def test_a_small_arm_is_judged_as_well():
    """A tenth of 750 clients."""
    assert ended(100, 750, share=0.1, ruined_to=0.2).promoted <= 0.05
    good = ended(100, 750, share=0.1)
    assert good.rolled_back <= 0.05 and good.promoted >= 0.95


@pytest.mark.parametrize("gain", [-0.05, -0.2])
def test_a_canary_that_loses_in_the_mean_is_not_promoted(gain):
    found = ended(200, 75, gain=gain)
    assert found.promoted <= at_most(0.025, 200) and found.rolled_back >= 0.9, found


@pytest.mark.slow
@pytest.mark.parametrize("spread", [None, 20], ids=["alike", "differing"])
@pytest.mark.parametrize("clients", CLIENTS)
def test_the_stated_error_rates_hold_in_many_runs(clients, spread):
    runs = 300 if clients == 500 else 1_000
    for ruined_to in (0.0, 0.2, 0.5)[: 3 if spread is None else 2]:
        assert ended(runs, clients, ruined_to=ruined_to, spread=spread, seed=1).promoted <= at_most(
            0.045, runs
        )
    assert ended(runs, clients, spread=spread, seed=2).rolled_back <= at_most(0.0475, runs)


def test_one_canary_is_judged_as_many_are():
    draws, policy, seen = np.random.default_rng(1), Policy(), set()
    for run in range(200):
        each, gain = draws.integers(1, 80), draws.choice([0.0, 0.0, -0.3])
        n = draws.integers(each, 2 * each + 1, (2, 40)).astype(float)
        rates = np.full((2, 40), MEAN)
        rates[1] += gain
        rates[1, 0] -= draws.choice([0.0, 0.0, 0.5])
        total = draws.binomial(n.astype(int), rates).astype(float)
        control, canary = (
            {f"c-{i}": (int(n[a, i]), total[a, i]) for i in range(40)} for a in range(2)
        )
        found = findings(policy, Arms(n[:1], total[:1], n[1:], total[1:]))
        wanted = "promote" if found.promoted[0] else "rollback" if found.rolled_back[0] else "wait"
        assert judge(policy, control, canary).decision == wanted, run
        seen.add(wanted)
    assert seen == {"promote", "rollback", "wait"}


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_less_is_shown_of_a_higher_limit(n, mean, one, other):
    """So a proof against a limit that moves is one against the lowest that it ever had."""
    low, high = sorted((one, other))
    evidence = log_evidence(np.full(2, float(n)), np.full(2, n * mean), np.array([low, high]))
    assert evidence[1] <= max(evidence[0], 0.0) + 1e-9
    assert evidence[0] <= 1e-9 or mean > low, "a mean at the limit or below shows nothing"
    assert exceeds(n, n * mean, low, 0.05) == bool(evidence[0] >= math.log(20))


def test_no_difference_has_no_sign():
    """A sum of rounded rewards is a hair less than the other: what is said of it is +0, not -0."""
    control = {f"user-{i}": (100, 90.0) for i in range(60)}
    canary = {f"user-{i}": (1, 0.9 - 1e-9) for i in range(60)}
    policy = Policy(effect=0.05, min_clients=10)
    assert ": +0.0000 +- " in judge(policy, control, canary).why
