"""What an operator works out from scraped numbers: growth, quantiles from buckets, error budget,
burn rate, alerts.

Pure functions; seconds, shares in [0, 1], counts. Source of the alerts: Google, *The Site
Reliability Workbook* (2018), chapter 5, "Alerting on SLOs", where a page needs a long window (is it
worth waking somebody?) and a short one (is it still going on?).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Floats, Ints

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Slo:
    """A promise: a share ``target`` of all requests in ``days`` days is answered."""

    target: float = 0.999
    days: float = 30

    def __post_init__(self) -> None:
        if not 0 < self.target < 1 or not 0 < self.days < math.inf:
            raise ConfigError(
                f"SLO of {self.target!r} over {self.days!r} days: use a share in (0, 1) and days above 0"
            )

    @property
    def budget(self) -> float:
        """The share of requests that may fail."""
        return 1 - self.target

    @property
    def period_s(self) -> float:
        return self.days * DAY_S

    @property
    def down_s(self) -> float:
        """Seconds in which everything may fail, if nothing fails otherwise."""
        return self.budget * self.period_s

    def failures(self, rate_per_s: float) -> float:
        """Requests that may fail in the period at this load."""
        return self.budget * rate_per_s * self.period_s


SLO = Slo()  # the course's target: 99.9 % over 30 days


@dataclass(frozen=True, slots=True)
class WindowPair:
    """Fires while the burn rate over both windows is above ``burn_rate``."""

    name: str
    long_s: float
    short_s: float
    burn_rate: float

    def fires_after_s(self, burn_rate: float) -> float:
        """Seconds from a sudden, steady burn rate to the alert, all being well before; infinite if
        it never fires."""
        if burn_rate <= self.burn_rate:
            return math.inf
        return self.long_s * self.burn_rate / burn_rate

    def clears_after_s(self, burn_rate: float) -> float:
        """Seconds from the end of that to the end of the alert: the short window lets go first."""
        return self.short_s * (1 - self.burn_rate / burn_rate)

    def spent(self, slo: Slo = SLO) -> float:
        """Share of the budget that is gone when it fires, however fast it went."""
        return self.burn_rate * self.long_s / slo.period_s


FAST = WindowPair("fast page", 3600, 300, 14.4)
SLOW = WindowPair("slow page", 6 * 3600, 1800, 6)
DAY = WindowPair("ticket", DAY_S, 2 * 3600, 3)
DAYS = WindowPair("slow ticket", 3 * DAY_S, 6 * 3600, 1)
PAIRS = (FAST, SLOW, DAY, DAYS)


@dataclass(frozen=True, slots=True)
class Incident:
    """A share ``failed`` of ``rate_per_s`` requests fails for ``lasts_s``; nothing fails before or
    after."""

    rate_per_s: float
    failed: float
    lasts_s: float
    slo: Slo = SLO

    @property
    def burn_rate(self) -> float:
        """How many times faster than allowed the budget goes: 1 uses it up exactly by the end of
        the period."""
        return self.failed / self.slo.budget

    def left(self, t_s: float | Floats) -> Floats:
        """Share of the budget that is left ``t_s`` after its beginning; negative once the promise
        is broken."""
        failing_s = np.clip(t_s, 0, self.lasts_s)
        return 1 - self.burn_rate * failing_s / self.slo.period_s

    def seen(self, t_s: Floats, window_s: float) -> Floats:
        """Burn rate over the last ``window_s`` at times ``t_s`` after its beginning."""
        failing_s = np.clip(t_s, 0, self.lasts_s)
        before_s = np.clip(t_s - window_s, 0, self.lasts_s)
        inside_s = failing_s - before_s
        return self.burn_rate * inside_s / window_s

    def alert_s(self, pair: WindowPair) -> tuple[float, float] | None:
        """When the pair fires and when it lets go, after the beginning; None if it never fires."""
        on_s = pair.fires_after_s(self.burn_rate)
        if on_s >= self.lasts_s:
            return None
        off_s = self.lasts_s + pair.clears_after_s(self.burn_rate)
        return on_s, off_s


def increases(values: Floats) -> Floats:
    """Growth of a counter between scrapes, float64 [N - 1]; a fall is a restart from 0, so what
    stands is what grew."""
    steps = np.diff(values)
    grown = np.where(steps < 0, values[1:], steps)
    return np.asarray(grown, np.float64)


def burn_rates(
    times_s: Floats, total: Floats, failed: Floats, window_s: float, slo: Slo = SLO
) -> Floats:
    """Burn rate at every scrape over the ``window_s`` before it, from two counters; 0 while nobody
    asks, float64 [N].

    A window that reaches back before the first scrape begins there. Prometheus' ``rate`` also
    extrapolates to the window's edges; both parts of the quotient alike, so the quotient stays.
    """
    begins = np.searchsorted(times_s, times_s - window_s - 1e-9)
    asked = _grown(total, begins)
    lost = _grown(failed, begins)
    share = np.zeros_like(asked)
    np.divide(lost, asked, out=share, where=asked > 0)
    return share / slo.budget


def _grown(values: Floats, begins: Ints) -> Floats:
    """By how much a counter grew up to each scrape, from the scrape where its window begins."""
    since_first = np.cumsum(increases(values))
    since_first = np.concatenate([[0.0], since_first])
    return since_first - since_first[begins]


def firing(
    times_s: Floats, total: Floats, failed: Floats, pair: WindowPair, slo: Slo = SLO
) -> npt.NDArray[np.bool_]:
    """At which scrapes both windows of the pair are above its burn rate, bool [N]."""
    long = burn_rates(times_s, total, failed, pair.long_s, slo)
    short = burn_rates(times_s, total, failed, pair.short_s, slo)
    return np.minimum(long, short) > pair.burn_rate


def histogram_quantile(q: float, cumulative: Mapping[float, float]) -> float:
    """What Prometheus' function of this name answers: linear inside the bucket that holds the rank
    ``q * count``.

    Args:
        q: Share in [0, 1].
        cumulative: Upper bound of a bucket -> how many took at most that long; the last bound is
            infinite.

    The first bucket begins at 0; a rank in the last one answers its lower end; NaN without samples.
    """
    buckets = np.array(sorted(cumulative.items()), float)
    bounds, counts = buckets.T
    if not 0 <= q <= 1 or not math.isinf(bounds[-1]) or len(bounds) < 2:
        raise ConfigError(
            f"quantile {q!r} of buckets up to {bounds[-1]}: use q in [0, 1], buckets up to infinity"
        )
    if not counts[-1]:
        return math.nan
    rank = q * counts[-1]
    place = int(np.searchsorted(counts, rank))
    if place == len(bounds) - 1:
        return float(bounds[-2])
    low = 0.0
    below = 0.0
    if place:
        low = bounds[place - 1]
        below = counts[place - 1]
    inside = counts[place] - below
    share = 1.0
    if inside:
        share = (rank - below) / inside
    return float(low + (bounds[place] - low) * share)
