"""What a load run measured: one row per request, and the numbers that one quotes from it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Floats, Ints

if TYPE_CHECKING:
    import pandas as pd

UNSENT = "Unsent"


@dataclass(frozen=True, eq=False)
class LoadReport:
    """Requests in the order of their arrival; times in seconds since the run began.

    Args:
        arrival_s: When the request was *meant* to be sent, float64 [N]; latency counts from here.
        start_s: When it was sent, float64 [N]; NaN if it never was.
        end_s: When its answer or error came, float64 [N]; when the run gave up on it if it was
            never sent.
        item: What it asked for, int64 [N].
        error: Reason of a failure, ``""`` for an answer, str [N]. A ``FlservingError`` gives its
            ``reason``, another exception its class name, a request that could not be sent in time
            ``"Unsent"``.
        messages: The first full message of each reason.
    """

    arrival_s: Floats
    start_s: Floats
    end_s: Floats
    item: Ints
    error: npt.NDArray[np.str_]
    messages: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Which requests were answered, bool [N]."""
        return np.asarray(self.error == "", np.bool_)

    @property
    def latency_ms(self) -> Floats:
        """Milliseconds from the intended arrival to the answer, of the answered requests only."""
        return (self.end_s - self.arrival_s)[self.ok] * 1e3

    @property
    def service_ms(self) -> Floats:
        """Milliseconds from the sending to the answer: what a generator with coordinated omission
        would report."""
        return (self.end_s - self.start_s)[self.ok] * 1e3

    @property
    def late_ms(self) -> Floats:
        """How much later than intended the generator sent each request; large: give it more
        threads."""
        return (self.start_s - self.arrival_s)[~np.isnan(self.start_s)] * 1e3

    @property
    def failures(self) -> dict[str, int]:
        """Failed requests by reason, most frequent first."""
        return dict(Counter(self.error[~self.ok].tolist()).most_common())

    @property
    def availability(self) -> float:
        """Share of requests that were answered; NaN if there was none."""
        return float(self.ok.mean()) if len(self) else float("nan")

    @property
    def seconds(self) -> float:
        """Length of the run, to the last answer."""
        return float(self.end_s.max()) if len(self) else 0.0

    @property
    def rate_per_s(self) -> float:
        """Answers per second over the whole run."""
        return float(self.ok.sum() / self.seconds) if self.seconds > 0 else 0.0

    def percentile_ms(self, q: float) -> float:
        """Latency in ms that ``q`` percent of the answers do not exceed (linear interpolation); NaN
        without answers."""
        if not 0 <= q <= 100:
            raise ConfigError(f"percentile {q!r} does not exist: ask for 0 to 100, e.g. 99")
        return float(np.percentile(self.latency_ms, q)) if self.ok.any() else float("nan")

    def summary(self) -> "pd.Series[float]":
        """The numbers to quote, by name: counts, answers per second, latency percentiles, lateness
        of the generator."""
        import pandas as pd

        numbers: dict[str, float] = {
            "requests": len(self),
            "answered": int(self.ok.sum()),
            "failed": int((~self.ok).sum()),
            "rate_per_s": self.rate_per_s,
            **{f"p{q}_ms": self.percentile_ms(q) for q in (50, 95, 99)},
            "max_ms": self.percentile_ms(100),
            "late_p99_ms": float(np.percentile(self.late_ms, 99))
            if len(self.late_ms)
            else float("nan"),
        }
        return pd.Series(numbers, name="load", dtype=float)

    def to_frame(self) -> "pd.DataFrame":
        """One row per request: arrival_s, start_s, end_s, item, ok, error, latency_ms."""
        import pandas as pd

        return pd.DataFrame(
            {
                "arrival_s": self.arrival_s,
                "start_s": self.start_s,
                "end_s": self.end_s,
                "item": self.item,
                "ok": self.ok,
                "error": self.error,
                "latency_ms": (self.end_s - self.arrival_s) * 1e3,
            }
        )

    def __repr__(self) -> str:
        failed = "".join(f", {count} {reason}" for reason, count in self.failures.items())
        return (
            f"LoadReport({int(self.ok.sum())} of {len(self)} answered{failed}; {self.rate_per_s:.1f} per s; "
            f"p50 {self.percentile_ms(50):.2f} ms, p99 {self.percentile_ms(99):.2f} ms)"
        )
