"""The totals of all worker processes: each writes its own to a file, and reads those of the others.

So ``/metrics`` of any worker shows the sum. What it shows of the others is at most ``EXCHANGE_S``
old; what has been shown never goes down, also when a worker is killed.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from flserving.monitoring.metrics import Sums, merged
from flserving.monitoring.prometheus import totals
from flserving.monitoring.telemetry import OTHER
from flserving.serving.server import ModelServer

EXCHANGE_S = 1.0
"""How often each worker writes its totals."""


class Totals:
    """The totals of this worker, and of those that filled its place before it, in a file; and those
    of the others."""

    def __init__(self, folder: str, place: int, server: ModelServer) -> None:
        self._path = Path(folder) / f"{place}.json"
        self._server = server
        self._before = _read(self._path, gone=True)
        server.telemetry.elsewhere = _named(self._beside())
        held = server._held() | server.telemetry.elsewhere
        for counts in self._before.keys() & {"versions", "failures"}:
            for name in self._before[counts].keys() - held:
                if name and not name.endswith(f"/{OTHER}"):
                    del self._before[counts][name]
        self._lock = threading.Lock()  # a scrape writes too: the newer sums must be written last

    def others(self) -> list[Sums]:
        """All but this server's own. Writes first: what is shown now must not be lost when this
        worker is killed."""
        # a full disk must not hide the server from its operators
        with contextlib.suppress(OSError):
            self.write()
        beside = self._beside()
        self._server.telemetry.elsewhere = _named(beside)
        return [self._before, *beside]

    def write(self) -> None:
        fresh = self._path.with_suffix(f".{os.getpid()}")
        telemetry = self._server.telemetry
        if telemetry.retiring():  # else it needs no look at the others
            telemetry.elsewhere = _named(self._beside())
        with self._lock:
            fresh.write_text(
                json.dumps(merged([self._before, totals(self._server)])), encoding="ascii"
            )
            os.replace(fresh, self._path)

    def _beside(self) -> list[Sums]:
        paths = sorted(self._path.parent.glob("[0-9]*.json"))
        return [_read(path) for path in paths if path != self._path]


def _named(others: Iterable[Sums]) -> frozenset[str]:
    """Versions that other workers hold."""
    return frozenset(name for other in others for name in other.get("named", ()))


def _read(path: Path, gone: bool = False) -> Sums:
    """One file; of a worker that is gone only what never falls, not what it held at that moment
    (``now``)."""
    try:
        age_s = time.time() - path.stat().st_mtime
        found = dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    if gone or age_s > 3 * EXCHANGE_S:
        found |= {"now": {}, "named": {}}
    return found
