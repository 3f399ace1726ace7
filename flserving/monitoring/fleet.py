"""What the devices of a fleet run: the last report of each, shown as how many run which round, and
how old that is.

A device reports as it asks for its release. One that is cut off stays in the picture for a week,
and its model's age grows; so the skew of a fleet is seen where its devices cannot be reached.
"""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flserving import forks

AGES_S = (60, 300, 900, 3_600, 21_600, 86_400)  # bounds of the histogram of ages; then the rest
EXPIRES_S = 7 * 86_400.0
MOST_DEVICES = 10_000  # with a credential of their own; of more, the last to report
MOST_SHARED = 1_000  # who share one, and so could be anybody's invention
MOST_ROUNDS = 20  # of a model, those that most devices run; the rest is "other"
NONE = "none"
OTHER = "other"
_MOST = 2**53


class Report(NamedTuple):
    """What one device said. Times are seconds since 1970; ``since_s`` is when its model was known
    to be current, None where it cannot tell. A device without a model has version 0."""

    at_s: float
    model: str
    version: int
    round: int
    since_s: float | None

    def line(self) -> str:
        """As text, of which the later one is the greater."""
        since = "" if self.since_s is None else f"{self.since_s:.3f}"
        return f"{self.at_s:017.3f} {self.version} {self.round} {since} {self.model}"

    @classmethod
    def read(cls, line: str) -> "Report":
        at, version, number, since, model = line.split(" ", 4)
        since_s = None
        if since:
            since_s = float(since)
        return cls(float(at), model, int(version), int(number), since_s)


class Fleet:
    """The last report of each device. Thread-safe.

    Args:
        wall: Seconds since 1970.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        forks.fresh_locks_in_child(self, "_lock")
        self._own: OrderedDict[str, Report] = OrderedDict()  # oldest first
        self._shared: OrderedDict[str, Report] = OrderedDict()

    def report(
        self, device: str, shared: bool, model: str, version: int, round: int, age_s: float | None
    ) -> None:
        """Keep what a device says.

        Args:
            device: A pseudonym. ``shared``: its credential is not its own.
            version: What runs there, the cloud's number; 0: nothing. ``round``: that of the
                version.
            age_s: How long ago it was known to be current.
        """
        now_s = self._wall()
        since_s = None
        numbers: list[float] = [version, round]
        if age_s is not None:
            since_s = now_s - age_s
            numbers.append(age_s)
        if not all(0 <= number < _MOST for number in numbers):  # NaN neither
            return
        reports = self._own
        most = MOST_DEVICES
        if shared:
            reports = self._shared
            most = MOST_SHARED
        with self._lock:
            reports[device] = Report(now_s, model, version, round, since_s)
            reports.move_to_end(device)
            if len(reports) > most:
                reports.popitem(last=False)

    def lines(self) -> dict[str, str]:
        """The reports by device, for ``metrics.merged``: of several processes' the latest is
        kept."""
        now_s = self._wall()
        with self._lock:
            reports = [*self._own.items(), *self._shared.items()]
        return {
            f"last_{device}": report.line()
            for device, report in reports
            if now_s - report.at_s < EXPIRES_S
        }

    def skew(self, lines: Mapping[str, str] | None = None) -> "dict[str, Skew]":
        """By model, what is reported; ``lines``: of all processes, this one's when not given."""
        now_s = self._wall()
        rounds: dict[str, Counter[str]] = {}
        ages: dict[str, list[float]] = {}
        if lines is None:
            lines = self.lines()
        for line in lines.values():
            report = Report.read(line)
            if now_s - report.at_s >= EXPIRES_S:
                continue
            of_model = ages.setdefault(report.model, [])
            number = NONE
            if report.version:
                number = str(report.round)
                age_s = math.inf
                if report.since_s is not None:
                    age_s = max(0.0, now_s - report.since_s)
                of_model.append(age_s)
            rounds.setdefault(report.model, Counter())[number] += 1
        return {model: Skew.of(counts, ages[model]) for model, counts in sorted(rounds.items())}


class Skew(NamedTuple):
    """How far the devices of one model are apart.

    Args:
        devices: How many are known. ``rounds``: how many run which; "none" and "other" beside the
            numbers.
        ages: How many models are at most as old as each of ``AGES_S``, but older than the one
            before; then the rest.
        oldest_s: The age of the oldest; infinite where a device cannot tell it.
        total_s: All finite ages together.
    """

    devices: int
    rounds: dict[str, int]
    ages: list[int]
    oldest_s: float
    total_s: float

    @classmethod
    def of(cls, rounds: Counter[str], ages: list[float]) -> "Skew":
        shown = dict(rounds.most_common(MOST_ROUNDS))
        rest = rounds.total() - sum(shown.values())
        if rest:
            shown[OTHER] = rest
        counts = [0] * (len(AGES_S) + 1)
        for age_s in ages:
            counts[sum(age_s > bound for bound in AGES_S)] += 1
        total_s = sum(age_s for age_s in ages if age_s < math.inf)
        return cls(rounds.total(), shown, counts, max(ages, default=0.0), total_s)

    def summary(self) -> dict[str, object]:
        """For ``get_all_stats``: plain numbers, which JSON can hold."""
        ages = {f"<= {bound}": count for bound, count in zip(AGES_S, self.ages, strict=False)}
        oldest_s = None if self.oldest_s == math.inf else self.oldest_s
        ages |= {f"> {AGES_S[-1]}": self.ages[-1]}
        return {"devices": self.devices, "rounds": self.rounds, "age_s": ages, "oldest_s": oldest_s}
