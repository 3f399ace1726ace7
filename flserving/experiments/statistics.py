"""Tests that may be looked at after every reward: confidence sequences, their sample size, and what
peeking costs.

``Rewards`` of one arm are kept by client, because clients are what is assigned to arms: two answers
to one client are not two independent trials. So an arm's mean has the variance of a ratio of client
sums (the delta method; Cochran, Sampling Techniques, 1977, ch. 6), not that of its rewards.
"""

import functools
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_Number = TypeVar("_Number", float, Floats)

Rewards = Mapping[str, tuple[int, float]]
"""client -> (how many rewards, their sum); a reward is in [0, 1]."""

_Z = NormalDist()
_GRID = (np.arange(32) + 0.5) / 32


def mean_of(rewards: Rewards) -> tuple[float, float]:
    """The mean reward and the variance of that mean; NaN and infinity with fewer than two
    clients."""
    if len(rewards) < 2:
        return math.nan, math.inf
    pairs = np.array(list(rewards.values()), np.float64)
    counts, totals = pairs.T
    mean, variance = ratio_of_sums(counts[None], totals[None])
    return float(mean[0]), float(variance[0])


def ratio_of_sums(counts: Floats, totals: Floats) -> tuple[Floats, Floats]:
    """:func:`mean_of` of many arms: rewards and their sums [arms, clients] -> means and their
    variances [arms]."""
    clients = (counts > 0).sum(axis=1)
    enough = clients >= 2
    rewards = np.maximum(counts.sum(axis=1), 1)
    mean = totals.sum(axis=1) / rewards
    residuals = totals - mean[:, None] * counts
    spread = (residuals**2).sum(axis=1)
    # clients that all give the same leave no spread, which is no certainty: at least that of two
    # successes and two failures that were not seen (Agresti and Coull, The American Statistician
    # 52, 1998)
    spread = np.maximum(spread, 2.0)
    variance = spread / rewards**2 * clients / np.maximum(clients - 1, 1)
    mean = np.where(enough, mean, np.nan)
    variance = np.where(enough, variance, np.inf)
    return mean, variance


def half_width(variance: _Number, alpha: float, effect: float) -> _Number:
    """Half of an interval around an estimated difference that holds the true one at *every* look,
    save with ``alpha``.

    The mixture sequential probability ratio test with a normal mixture of standard deviation
    ``effect``, inverted: narrowest for differences of that size. Source: H. Robbins, Ann. Math.
    Stat. 41, 1970; Johari, Koomen, Pekelis and Walsh, Always Valid Inference, Operations Research
    70, 2022. Exact for normal means with independent increments of information, otherwise
    asymptotic.
    """
    spread = variance + (variance / effect) ** 2
    evidence = 2 * math.log(1 / alpha) + np.log1p(effect**2 / variance)
    width: _Number = np.sqrt(spread * evidence)
    return width


@functools.cache
def information(effect: float, alpha: float, power: float) -> float:
    """1 / variance of the difference at which a true ``effect`` has been found with ``power``, or
    later never matters.

    That is the most the test may take: a look there alone has the power, and the looks before it
    only add to it. It is about twice :func:`fixed_information`, the price of looking; where there
    is an effect it mostly ends before.
    """
    z = _Z.inv_cdf(power)
    below = 0.1
    above = 1000.0
    for _ in range(60):  # bisection: 60 halvings leave less than a float can hold
        root = (below + above) / 2
        if root - half_width(1.0, alpha, root) < z:
            below = root
        else:
            above = root
    return (root / effect) ** 2


def fixed_information(effect: float, alpha: float, power: float) -> float:
    """The same of a two-sided z-test that looks once, at the end."""
    z = _Z.inv_cdf(1 - alpha / 2) + _Z.inv_cdf(power)
    return (z / effect) ** 2


def sample_size(information: float, mean: float, share: float = 0.5) -> int:
    """Rewards of both arms together that give so much information.

    Args:
        mean: The expected mean reward, of rewards that are 0 or 1.
        share: Of the clients, in the smaller arm.
    """
    variance = mean * (1 - mean)
    arms = 1 / share + 1 / (1 - share)
    return math.ceil(information * variance * arms)


def exceeds(n: int, total: float, limit: float, alpha: float) -> bool:
    """Whether ``n`` trials in [0, 1] that add up to ``total`` show a mean above ``limit``: wrong
    with ``alpha`` at most, however often it is asked."""
    if limit <= 0:
        return total > 0
    if limit >= 1:
        return False
    ns, totals, limits = np.array([[n], [total], [limit]])
    evidence = log_evidence(ns, totals, limits)
    return bool(evidence[0] >= math.log(1 / alpha))


def log_evidence(n: Floats, total: Floats, limit: Floats) -> Floats:
    """The logarithm of the evidence that ``n`` trials in [0, 1] which add up to ``total`` have a
    mean above ``limit``, in (0, 1): arrays [N]. It reaches log(1 / alpha), at any time, with
    probability ``alpha`` at most where they do not.

    A mixture of likelihood ratios against ``limit``, at 32 rates above it: a non-negative
    supermartingale for any trials whose mean is at most ``limit``, so a test by betting. Source: J.
    Ville, 1939; Waudby-Smith and Ramdas, JRSS B 86, 2024.
    """
    limit = limit[:, None]
    rates = limit + (1 - limit) * _GRID
    won = total[:, None]
    lost = n[:, None] - won
    of_won = np.log(rates / limit)
    of_lost = np.log((1 - rates) / (1 - limit))
    logs = won * of_won + lost * of_lost
    top = logs.max(axis=1, keepdims=True)
    mean = np.exp(logs - top).mean(axis=1)
    evidence: Floats = top[:, 0] + np.log(mean)
    return evidence
