"""What the gate says of a version: one row a check."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flserving.extras import of_extra

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a verdict: what was measured, against which limit (NaN: there is no number), and in words."""

    name: str
    passed: bool
    words: str
    value: float = math.nan
    limit: float = math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a version, compared with ``against``: the version the alias pointed at (None: nowhere)."""

    model: str
    version: int
    against: int | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that were not passed."""
        return tuple(check.name for check in self.checks if not check.passed)

    def __str__(self) -> str:
        told = "; ".join(f"{check.name}: {check.words}" for check in self.checks if check.passed == self.passed)
        return f"version {self.version} {'passed' if self.passed else 'refused'}: {told}"

    def to_frame(self) -> "pd.DataFrame":
        """One row a check: passed, value, limit, words."""
        with of_extra("course"):
            import pandas as pd

        rows = [(c.name, c.passed, c.value, c.limit, c.words) for c in self.checks]
        return pd.DataFrame(rows, columns=["check", "passed", "value", "limit", "words"]).set_index("check")
