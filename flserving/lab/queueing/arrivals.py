"""When requests arrive and what they ask for: Poisson and bursty arrivals, Zipf popularity. Pure
and seeded."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Arrivals(Protocol):
    """An arrival process: its long-run rate, and the gaps between arrivals in seconds, without
    end."""

    @property
    def rate_per_s(self) -> float: ...

    def gaps_s(self, rng: np.random.Generator) -> Iterator[float]: ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent callers in large number: exponential gaps with mean ``1 / rate_per_s``."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _require_positive(self)

    def gaps_s(self, rng: np.random.Generator) -> Iterator[float]:
        while True:
            yield from rng.exponential(1 / self.rate_per_s, size=1024).tolist()


@dataclass(frozen=True, slots=True)
class Bursty:
    """Quiet and busy spells in turn: a two-state Markov-modulated Poisson process.

    Args:
        quiet_per_s, burst_per_s: Rate of arrivals in a quiet spell (0 makes on/off traffic) and in
            a burst.
        quiet_s, burst_s: Mean length of a spell in seconds; lengths are exponential.

    Source: Fischer and Meier-Hellstern, "The Markov-modulated Poisson process (MMPP) cookbook",
    Performance Evaluation 18 (1993).
    """

    quiet_per_s: float
    burst_per_s: float
    quiet_s: float
    burst_s: float

    def __post_init__(self) -> None:
        _require_positive(self, zero_allowed="quiet_per_s")
        if self.burst_per_s < self.quiet_per_s:
            raise ConfigError(
                f"burst_per_s is {self.burst_per_s:g}, below quiet_per_s {self.quiet_per_s:g}: swap the two"
            )

    @property
    def rate_per_s(self) -> float:
        arrivals_per_cycle = self.quiet_per_s * self.quiet_s + self.burst_per_s * self.burst_s
        return arrivals_per_cycle / (self.quiet_s + self.burst_s)

    def gaps_s(self, rng: np.random.Generator) -> Iterator[float]:
        rates = (self.quiet_per_s, self.burst_per_s)
        switch_per_s = (1 / self.quiet_s, 1 / self.burst_s)
        # start in the steady state
        state = int(rng.random() < self.burst_s / (self.quiet_s + self.burst_s))
        gap = 0.0
        # both clocks are memoryless: draw the next event of either kind, then which kind it was
        while True:
            total_per_s = rates[state] + switch_per_s[state]
            gap += rng.exponential(1 / total_per_s)
            if rng.random() * total_per_s < rates[state]:
                yield gap
                gap = 0.0
            else:
                state = 1 - state


@dataclass(frozen=True, slots=True)
class Zipf:
    """Popularity of ``items`` things: item k (from 0) is asked for in proportion to ``(k + 1) **
    -skew``.

    ``skew`` 0 is uniform; web and model traffic is commonly found between 0.6 and 1.2 (Breslau et
    al., "Web caching and Zipf-like distributions", INFOCOM 1999).
    """

    items: int
    skew: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.items, bool) or not isinstance(self.items, int) or self.items < 1:
            raise ConfigError(f"items is {self.items!r}: it must be an integer of at least 1")
        if not 0 <= self.skew < np.inf:
            raise ConfigError(f"skew is {self.skew!r}: it must be a finite number of at least 0")

    @property
    def probabilities(self) -> Floats:
        """Share of requests per item, float64 [items], descending, summing to 1."""
        weights: Floats = np.arange(1, self.items + 1, dtype=np.float64) ** -self.skew
        weights /= weights.sum()
        return weights

    def draw(self, rng: np.random.Generator, size: int) -> Ints:
        """``size`` independent item numbers, int64 [size], each in [0, items)."""
        edges = np.cumsum(self.probabilities)
        return np.searchsorted(edges[:-1], rng.random(size), side="right").astype(np.int64)


def arrival_times_s(
    arrivals: Arrivals,
    rng: np.random.Generator,
    *,
    requests: int | None = None,
    seconds: float | None = None,
) -> Floats:
    """Arrival times from 0 on, float64 [N], ascending: at most ``requests`` of them, all before
    ``seconds``."""
    require_bound(requests, seconds)
    times: list[float] = []
    now_s = 0.0
    for gap_s in arrivals.gaps_s(rng):
        now_s += gap_s
        if (seconds is not None and now_s >= seconds) or (
            requests is not None and len(times) >= requests
        ):
            break
        times.append(now_s)
    return np.array(times)


def require_bound(requests: int | None, seconds: float | None) -> None:
    """Refuse a load without an end: ``requests``, ``seconds`` or both must be given and
    positive."""
    if requests is None and seconds is None:
        raise ConfigError("the load has no end: give requests=, seconds= or both")
    if requests is not None and (
        isinstance(requests, bool) or not isinstance(requests, int) or requests < 1
    ):
        raise ConfigError(f"requests is {requests!r}: it must be an integer of at least 1")
    if seconds is not None and not 0 < seconds < np.inf:
        raise ConfigError(f"seconds is {seconds!r}: it must be a finite number above 0")


def _require_positive(settings: Poisson | Bursty, zero_allowed: str = "") -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if not (0 < value < np.inf or (value == 0 and field.name == zero_allowed)):
            least = "at least 0" if field.name == zero_allowed else "above 0"
            raise ConfigError(f"{field.name} is {value!r}: it must be a finite number {least}")
