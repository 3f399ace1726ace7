"""What an operator works out from scraped numbers: growth, quantiles from buckets, error budget, burn rate, alerts.

Pure functions; seconds, shares in [0, 1], counts. Source of the alerts: Google, *The Site Reliability Workbook* (2018),
chapter 5, "Alerting on SLOs", where a page needs a long window (is it worth waking somebody?) and a short one (is it
still going on?).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Floats

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Slo:
    """A promise: a share ``target`` of all requests in ``days`` days is answered."""

    target: float = 0.999
    days: float = 30

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 0 < self.days < math.inf):
            raise ConfigError(f"SLO of {self.target!r} over {self.days!r} days: use a share in (0, 1) and days above 0")

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
        """Seconds from a sudden, steady burn rate to the alert, all being well before; infinite if it never fires."""
        return self.long_s * self.burn_rate / burn_rate if burn_rate > self.burn_rate else math.inf

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
    """A share ``failed`` of ``rate_per_s`` requests fails for ``lasts_s``; nothing fails before or after."""

    rate_per_s: float
    failed: float
    lasts_s: float
    slo: Slo = SLO

    @property
    def burn_rate(self) -> float:
        """How many times faster than allowed the budget goes: 1 uses it up exactly by the end of the period."""
        return self.failed / self.slo.budget

    def left(self, t_s: float | Floats) -> Floats:
        """Share of the budget that is left ``t_s`` after its beginning; negative once the promise is broken."""
        return 1 - self.burn_rate * np.clip(t_s, 0, self.lasts_s) / self.slo.period_s

    def seen(self, t_s: Floats, window_s: float) -> Floats:
        """Burn rate over the last ``window_s`` at times ``t_s`` after its beginning."""
        inside_s = np.clip(t_s, 0, self.lasts_s) - np.clip(t_s - window_s, 0, self.lasts_s)
        return self.burn_rate * inside_s / window_s

    def alert_s(self, pair: WindowPair) -> tuple[float, float] | None:
        """When the pair fires and when it lets go, after the beginning; None if it never fires."""
        on_s = pair.fires_after_s(self.burn_rate)
        return (on_s, self.lasts_s + pair.clears_after_s(self.burn_rate)) if on_s < self.lasts_s else None


def increases(values: Floats) -> Floats:
    """Growth of a counter between scrapes, float64 [N - 1]; a fall is a restart from 0, so what stands is what grew."""
    steps = np.diff(values)
    return np.asarray(np.where(steps < 0, values[1:], steps), np.float64)


def burn_rates(times_s: Floats, total: Floats, failed: Floats, window_s: float, slo: Slo = SLO) -> Floats:
    """Burn rate at every scrape over the ``window_s`` before it, from two counters; 0 while nobody asks, float64 [N].

    A window that reaches back before the first scrape begins there. Prometheus' ``rate`` also extrapolates to the
    window's edges; both parts of the quotient alike, so the quotient stays.
    """
    begins = np.maximum(np.searchsorted(times_s, times_s - window_s - 1e-9), 0)
    grown = [np.concatenate([[0.0], np.cumsum(increases(values))]) for values in (total, failed)]
    asked, lost = (values - values[begins] for values in grown)
    return np.asarray(np.divide(lost, asked, out=np.zeros_like(asked), where=asked > 0) / slo.budget)


def firing(times_s: Floats, total: Floats, failed: Floats, pair: WindowPair, slo: Slo = SLO) -> npt.NDArray[np.bool_]:
    """At which scrapes both windows of the pair are above its burn rate, bool [N]."""
    long, short = (burn_rates(times_s, total, failed, w, slo) for w in (pair.long_s, pair.short_s))
    return np.asarray((long > pair.burn_rate) & (short > pair.burn_rate))


def histogram_quantile(q: float, cumulative: Mapping[float, float]) -> float:
    """What Prometheus' function of this name answers: linear inside the bucket that holds the rank ``q * count``.

    Args:
        q: Share in [0, 1].
        cumulative: Upper bound of a bucket -> how many took at most that long; the last bound is infinite.

    The first bucket begins at 0; a rank in the last one answers its lower end; NaN without samples.
    """
    bounds, counts = (np.array(part, float) for part in zip(*sorted(cumulative.items()), strict=True))
    if not (0 <= q <= 1 and math.isinf(bounds[-1]) and len(bounds) > 1):
        raise ConfigError(f"quantile {q!r} of buckets up to {bounds[-1]}: use q in [0, 1], buckets up to infinity")
    if not counts[-1]:
        return math.nan
    rank = q * counts[-1]
    place = int(np.searchsorted(counts, rank))
    if place == len(bounds) - 1:
        return float(bounds[-2])
    low, below = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0.0)
    inside = counts[place] - below
    return float(low + (bounds[place] - low) * ((rank - below) / inside if inside else 1.0))
