"""The books of one load run: hands out its requests, in order, to whichever caller is free, and
keeps their records."""

import math
import threading
from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm

from flserving.errors import ConfigError, FlservingError
from flserving.lab.measuring.report import UNSENT, LoadReport
from flserving.lab.queueing.arrivals import Arrivals, Zipf, arrival_times_s, require_bound

Clock = Callable[[], float]
DRAIN_S = 1.0  # an open loop gives up on what it could not send within this time after its end


class Ledger:
    """State of one run, shared by its callers: hands out the requests, keeps the records."""

    def __init__(
        self,
        requests: int | None,
        seconds: float | None,
        arrivals: Arrivals | None,
        popularity: Zipf | None,
        seed: int,
        progress: bool,
        clock: Clock,
    ) -> None:
        require_bound(requests, seconds)
        arrival_seed, item_seed = np.random.SeedSequence(seed).spawn(2)
        self._arrivals_s: list[float] | None = None
        if arrivals is not None:
            rng = np.random.default_rng(arrival_seed)
            self._arrivals_s = arrival_times_s(
                arrivals, rng, requests=requests, seconds=seconds
            ).tolist()
            requests = len(self._arrivals_s)
        self._requests = requests
        self._seconds = seconds
        self._clock = clock
        self._progress = progress
        self._popularity = popularity
        self._rng = np.random.default_rng(item_seed)
        self._items = [0]
        self._lock = threading.Lock()
        self._taken = 0
        self._stopped = False
        self._records: list[tuple[int, float, float, float, int, str]] = []
        self._messages: dict[str, str] = {}
        self._misuse: ConfigError | None = None

    def start(self) -> None:
        """Time starts to run: called when every caller stands ready."""
        self._bar = tqdm(total=self._requests, unit="request", disable=not self._progress)
        self._began_s = self._clock()

    def now_s(self) -> float:
        return self._clock() - self._began_s

    def take(self) -> tuple[int, float, int] | None:
        """The next request to send: its number, its arrival in seconds, its item. None: the run is
        over."""
        with self._lock:
            while not self._stopped and self._taken != self._requests:
                now_s = self.now_s()
                number = self._taken
                overdue_s = -math.inf
                if self._seconds is not None:
                    overdue_s = now_s - self._seconds
                if self._arrivals_s is None:
                    if overdue_s >= 0:
                        return None
                    self._taken += 1
                    return number, now_s, self._item(number)
                self._taken += 1
                arrival_s = self._arrivals_s[number]
                item = self._item(number)
                if overdue_s <= DRAIN_S:
                    return number, arrival_s, item
                self.record(
                    number,
                    arrival_s,
                    float("nan"),
                    item,
                    UNSENT,
                    "no caller was free to send it in time",
                )
            return None

    def _item(self, number: int) -> int:
        if self._popularity is None:
            return 0
        if number % 4096 == 0:  # drawing in blocks keeps the work per request small
            self._items = self._popularity.draw(self._rng, 4096).tolist()
        return self._items[number % 4096]

    def record(
        self,
        number: int,
        arrival_s: float,
        start_s: float,
        item: int,
        reason: str = "",
        message: str = "",
    ) -> None:
        self._records.append((number, arrival_s, start_s, self.now_s(), item, reason))
        if reason:
            self._messages.setdefault(reason, message)

    def fail(
        self, number: int, arrival_s: float, start_s: float, item: int, error: BaseException
    ) -> None:
        reason = error.reason if isinstance(error, FlservingError) else type(error).__name__
        self.record(number, arrival_s, start_s, item, reason, f"{type(error).__name__}: {error}")

    def abort(self, misuse: str) -> None:
        """End the run: ``call`` cannot be used like this."""
        self._misuse = ConfigError(misuse)
        self._stopped = True

    def show_progress(self) -> None:
        self._bar.update(len(self._records) - self._bar.n)

    def close(self) -> None:
        self._stopped = True
        self.show_progress()
        self._bar.close()

    def report(self) -> LoadReport:
        if self._misuse is not None:
            raise self._misuse
        columns = zip(*sorted(self._records), strict=True) if self._records else [()] * 6
        _, arrival_s, start_s, end_s, item, error = columns
        return LoadReport(
            arrival_s=np.array(arrival_s, np.float64),
            start_s=np.array(start_s, np.float64),
            end_s=np.array(end_s, np.float64),
            item=np.array(item, np.int64),
            error=np.array(error, np.str_),
            messages=self._messages,
        )
