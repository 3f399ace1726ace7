"""The sequential test: its error rates under peeking by simulation, its stated sample size, and
what peeking costs."""

import math

import numpy as np
import pytest
from scipy import stats

from flserving.experiments import judge
from flserving.experiments.statistics import (
    exceeds,
    fixed_information,
    half_width,
    information,
    mean_of,
    sample_size,
)
from flserving.registry.experiment import Policy

ALPHA, EFFECT, POWER = 0.05, 0.05, 0.8


def paths(runs, looks, each, gain, seed, mean=0.9):
    """Estimated differences [runs, looks] of two arms, ``each`` rewards an arm more at every look,
    and variances."""
    draws = np.random.default_rng(seed)
    n = each * np.arange(1, looks + 1)
    old = draws.binomial(each, mean, (runs, looks)).cumsum(axis=1) / n
    new = draws.binomial(each, mean + gain, (runs, looks)).cumsum(axis=1) / n
    return new - old, (old * (1 - old) + new * (1 - new)) / n


def half_widths(variances):
    x = EFFECT**2 / variances
    ours = np.sqrt(variances * (1 + 1 / x) * (2 * math.log(1 / ALPHA) + np.log1p(x)))
    assert ours[0, 0] == pytest.approx(half_width(variances[0, 0], ALPHA, EFFECT))
    return ours


def test_peeking_breaks_the_z_test_and_not_the_confidence_sequence():
    """No difference, 100 looks: the fixed-horizon test says at some look that there is one far too
    often."""
    differences, variances = paths(2_000, 100, 100, 0.0, seed=1)
    z = np.abs(differences) / np.sqrt(variances)
    last, peeked = (
        (z[:, -1] > stats.norm.isf(ALPHA / 2)).mean(),
        (z > stats.norm.isf(ALPHA / 2)).any(axis=1).mean(),
    )
    always = (np.abs(differences) > half_widths(variances)).any(axis=1).mean()
    assert last < 0.07 and peeked > 0.30, "one look is fine, 100 are not"
    assert always < ALPHA + 4 * math.sqrt(ALPHA / 2_000)


def test_the_stated_sample_has_the_stated_power():
    needed = information(EFFECT, ALPHA, POWER)
    looks = 40
    each = math.ceil(sample_size(needed, 0.9 - EFFECT / 2) / 2 / looks)
    differences, variances = paths(2_000, looks, each, -EFFECT, seed=2)
    found = differences + half_widths(variances) < 0
    assert found.any(axis=1).mean() > POWER - 0.03
    spent = np.where(found.any(axis=1), found.argmax(axis=1) + 1, looks) / looks
    assert spent.mean() < 0.8, "where there is an effect it mostly ends before"
    assert 1.5 < needed / fixed_information(EFFECT, ALPHA, POWER) < 2.5, "the price of looking"


def test_the_fixed_sample_size_is_that_of_the_text_books():
    from statsmodels.stats.power import NormalIndPower

    p = 0.3
    ours = sample_size(fixed_information(0.05, 0.05, 0.8), p)
    theirs = NormalIndPower().solve_power(0.05 / math.sqrt(p * (1 - p)), power=0.8, alpha=0.05)
    assert ours / 2 == pytest.approx(theirs, rel=1e-3)
    assert sample_size(100.0, p, share=0.1) > sample_size(100.0, p)


def test_the_variance_is_that_of_clients_not_of_rewards():
    """Clients differ: the variance of the mean over many draws of clients is what one draw
    estimates."""
    draws, means, variances, naive = np.random.default_rng(3), [], [], []
    for _ in range(400):
        rates = draws.beta(8, 2, 50)
        rewards = {f"c-{i}": (40, float(draws.binomial(40, rate))) for i, rate in enumerate(rates)}
        mean, variance = mean_of(rewards)
        means.append(mean)
        variances.append(variance)
        naive.append(mean * (1 - mean) / 2_000)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.25)
    assert np.mean(naive) < 0.3 * np.var(means), "rewards counted as independent promise too much"
    assert (
        mean_of({}) == mean_of({"a": (5, 5.0)}) == (pytest.approx(math.nan, nan_ok=True), math.inf)
    )
    assert mean_of({str(i): (1, 1.0) for i in range(60)})[1] > 2 / 60**2, (
        "all alike is not certainty"
    )


def canaries(runs, gain, seed, clients=40, looks=12, each=25, spread=20):
    """Verdicts on canaries whose clients have rates of their own, judged after every ``each``
    rewards a client."""
    draws, policy, verdicts = np.random.default_rng(seed), Policy(worst_margin=0.5), []
    for _ in range(runs):
        arms = []
        for shift in (0.0, gain):
            rates = np.clip(draws.beta(0.9 * spread, 0.1 * spread, clients) + shift, 0, 1)
            arms.append(draws.binomial(each, rates[:, None], (clients, looks)).cumsum(axis=1))
        verdict = "wait"
        for look in range(looks):
            n = each * (look + 1)
            control, canary = (
                {str(i): (n, float(s)) for i, s in enumerate(arm[:, look])} for arm in arms
            )
            if (verdict := judge(policy, control, canary).decision) != "wait":
                break
        verdicts.append(verdict)
    return verdicts


def test_a_canary_that_loses_is_not_promoted_and_one_that_loses_nothing_is_not_thrown_out():
    """Type-I errors of the verdict itself, with clients that differ and a look after every client's
    25 rewards."""
    bad = canaries(300, -EFFECT, seed=4)
    assert bad.count("promote") / 300 < ALPHA / 2 + 4 * math.sqrt(ALPHA / 2 / 300)
    good = canaries(300, 0.0, seed=5)
    assert good.count("rollback") / 300 < ALPHA + 4 * math.sqrt(ALPHA / 300)
    awful = canaries(50, -0.3, seed=6)
    assert awful.count("rollback") == 50


def test_rates_that_are_kept_are_rarely_said_to_be_exceeded_however_often_one_asks():
    draws, limit = np.random.default_rng(7), 0.05
    totals = (draws.random((500, 400)) < limit).cumsum(axis=1)
    said = sum(
        any(exceeds(n, float(row[n - 1]), limit, ALPHA) for n in range(10, 401, 10))
        for row in totals
    )
    assert said / 500 < ALPHA + 4 * math.sqrt(ALPHA / 500)
    assert exceeds(100, 20.0, limit, ALPHA) and not exceeds(100, 7.0, limit, ALPHA)
    assert (
        exceeds(1, 1.0, 0.0, ALPHA)
        and not exceeds(10, 10.0, 1.0, ALPHA)
        and not exceeds(0, 0.0, limit, ALPHA)
    )
    assert not exceeds(2, 2.0, 0.5, 1e-3), "two failures show little"
