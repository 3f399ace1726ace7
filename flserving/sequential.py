"""Tests that may be looked at after every reward: confidence sequences, their sample size, and what peeking costs.

``Rewards`` of one arm are kept by client, because clients are what is assigned to arms: two answers to one client are
not two independent trials. So an arm's mean has the variance of a ratio of client sums (the delta method; Cochran,
Sampling Techniques, 1977, ch. 6), not that of its rewards. Imports nothing from the package.
"""

import functools
import math
from collections.abc import Mapping
from statistics import NormalDist

Rewards = Mapping[str, tuple[int, float]]
"""client -> (how many rewards, their sum); a reward is in [0, 1]."""

_Z = NormalDist()
_GRID = [(i + 0.5) / 32 for i in range(32)]


def mean_of(rewards: Rewards) -> tuple[float, float]:
    """The mean reward and the variance of that mean; NaN and infinity with fewer than two clients."""
    m, n = len(rewards), sum(count for count, _ in rewards.values())
    if m < 2:
        return math.nan, math.inf
    mean = sum(total for _, total in rewards.values()) / n
    spread = sum((total - mean * count) ** 2 for count, total in rewards.values())
    # clients that all say the same leave no spread, which is no certainty: at least that of two successes and two
    # failures that were not seen (Agresti and Coull, The American Statistician 52, 1998)
    return mean, max(spread, 2.0) / n**2 * m / (m - 1)


def half_width(variance: float, alpha: float, effect: float) -> float:
    """Half of an interval around an estimated difference that holds the true one at *every* look, save with ``alpha``.

    The mixture sequential probability ratio test with a normal mixture of standard deviation ``effect``, inverted:
    narrowest for differences of that size. Source: H. Robbins, Ann. Math. Stat. 41, 1970; Johari, Koomen, Pekelis and
    Walsh, Always Valid Inference, Operations Research 70, 2022. Exact for normal means with independent increments of
    information, otherwise asymptotic.
    """
    if not math.isfinite(variance):
        return math.inf
    x = effect**2 / variance
    return math.sqrt(variance * (1 + 1 / x) * (2 * math.log(1 / alpha) + math.log1p(x)))


@functools.cache
def information(effect: float, alpha: float, power: float) -> float:
    """1 / variance of the difference at which a true ``effect`` has been found with ``power``, or later never matters.

    That is the most the test may take: a look there alone has the power, and the looks before it only add to it. It
    is about twice :func:`fixed_information`, the price of looking; where there is an effect it mostly ends before.
    """
    z = _Z.inv_cdf(power)
    below = math.sqrt(1e-2)
    above = math.sqrt(1e6)
    for _ in range(60):  # bisection: 60 halvings leave less than a float can hold
        root = (below + above) / 2
        if root - half_width(1.0, alpha, root) < z:
            below = root
        else:
            above = root
    return (root / effect) ** 2


def fixed_information(effect: float, alpha: float, power: float) -> float:
    """The same of a two-sided z-test that looks once, at the end."""
    return ((_Z.inv_cdf(1 - alpha / 2) + _Z.inv_cdf(power)) / effect) ** 2


def sample_size(information: float, mean: float, share: float = 0.5) -> int:
    """Rewards of both arms together that give so much information.

    Args:
        mean: The expected mean reward, of rewards that are 0 or 1.
        share: Of the clients, in the smaller arm.
    """
    return math.ceil(information * mean * (1 - mean) * (1 / share + 1 / (1 - share)))


def p_value(difference: float, variance: float) -> float:
    """Of the two-sided z-test. Valid for one look at a size fixed before; here to show what peeking does to it."""
    return 2 * _Z.cdf(-abs(difference) / math.sqrt(variance)) if math.isfinite(variance) else 1.0


def exceeds(n: int, total: float, limit: float, alpha: float) -> bool:
    """Whether ``n`` trials in [0, 1] that add up to ``total`` show a mean above ``limit``: wrong with ``alpha`` at
    most, however often it is asked.

    A mixture of likelihood ratios against ``limit``, at 32 rates above it: a non-negative supermartingale for any
    trials whose mean is at most ``limit``. Source: J. Ville, 1939; Waudby-Smith and Ramdas, JRSS B 86, 2024.
    """
    if limit <= 0:
        return total > 0
    if limit >= 1:
        return False
    rates = (limit + (1 - limit) * place for place in _GRID)
    logs = [total * math.log(p / limit) + (n - total) * math.log((1 - p) / (1 - limit)) for p in rates]
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs) / len(logs)) >= math.log(1 / alpha)
