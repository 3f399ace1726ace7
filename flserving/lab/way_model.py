"""A model of a request's time by its payload, its batch and the server's load, fitted to what a stopwatch measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from flserving.lab.arrivals import Floats
from flserving.lab.breakdown import EXECUTION, PARTS, parts
from flserving.lab.theory import md1_wait_s

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class WayModel:
    """Times of a request's parts: ``fixed + per row * rows + per number * rows * features``, of each way its own.

    Args:
        terms: Way -> microseconds [parts, 3], none negative.
    """

    terms: Mapping[str, Floats]

    @classmethod
    def fitted(cls, measured: "pd.DataFrame") -> "WayModel":
        """Fit to a table of :meth:`Stopwatch.table`: least squares on the medians, relative errors, none negative."""
        terms = {}
        for way, of_way in measured.groupby("way", sort=False):
            times = parts(of_way).groupby([of_way["rows"], of_way["features"]]).median()
            rows, features = (times.index.get_level_values(level).to_numpy(float) for level in (0, 1))
            shape = np.column_stack([np.ones_like(rows), rows, rows * features])
            weights = {part: 1 / np.maximum(times[part].to_numpy(), 1.0) for part in PARTS}  # the clock tells 1 us
            fits = [nnls(shape * w[:, None], times[part].to_numpy() * w)[0] for part, w in weights.items()]
            terms[str(way)] = np.array(fits)
        return cls(terms)

    def __call__(self, way: str, rows: int, features: int, batch: int = 1, load: float = 0.0) -> dict[str, float]:
        """Mean microseconds of each part.

        Args:
            batch: How many such requests share an execution: each waits for the rows of all of them.
            load: Utilisation in [0, 1) of the server's core (:meth:`busy_us`). The wait for it is that of M/D/1, with
                a batch as the customer; the wait for a batch to fill is left out.
        """
        alone, shared = self._times(way, rows, features), self._times(way, rows * batch, features)
        times = {part: shared[part] if part in EXECUTION else alone[part] for part in PARTS}
        busy_us = self.busy_us(way, rows, features, batch)
        wait_us = md1_wait_s(load / busy_us, busy_us) if load else 0.0  # any unit of time will do
        return times | {"queue": times["queue"] + wait_us}

    def busy_us(self, way: str, rows: int, features: int, batch: int = 1) -> float:
        """How long the server's core is busy with ``batch`` requests that share an execution: it does half of the wire
        (the client does the other half: an assumption), parses, runs the model, and serialises."""
        alone, shared = self._times(way, rows, features), self._times(way, rows * batch, features)
        return sum(shared[part] for part in EXECUTION) + batch * (
            alone["wire"] / 2 + alone["parse"] + alone["serialise"]
        )

    def _times(self, way: str, rows: int, features: int) -> dict[str, float]:
        times: list[float] = (self.terms[way] @ (1, rows, rows * features)).tolist()
        return dict(zip(PARTS, times, strict=True))


def amdahl(share: float | Floats, times_faster: float | Floats) -> Any:
    """How many times faster the whole gets if a ``share`` of its time gets ``times_faster``.

    Source: Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities", AFIPS
    spring joint computer conference, 1967.
    """
    return 1 / ((1 - share) + share / times_faster)
