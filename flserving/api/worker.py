"""One worker process: a server and its doors, until SIGTERM or until its supervisor is gone (a pipe of which it held
the other end has closed: parents cannot be asked for on every system).

Workers tell each other their totals through one file each, so that ``/metrics`` of any of them shows the sum. What it
shows of the others is at most ``EXCHANGE_S`` old; what has been shown never goes down, also when a worker is killed.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from flserving.api.endpoint import DRAIN_S, Endpoint
from flserving.api.options import ApiOptions
from flserving.errors import ConfigError, FlservingError
from flserving.models.own_code import import_modules
from flserving.monitoring.metrics import merged
from flserving.monitoring.prometheus import totals
from flserving.monitoring.telemetry import OTHER
from flserving.registry import Registry
from flserving.registry.index import FILE_NAME
from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer

EXCHANGE_S = 1.0
STOPPING = (signal.SIGTERM, signal.SIGINT)
BUSY_TIMEOUT_S = 5.0  # how long a locked registry keeps a worker waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every worker serves. ``model`` None: every model of the registry. ``imports``: modules that each worker runs
    first, for their architectures."""

    registry: str
    model: str | None = None
    config: ServingConfig = field(default_factory=ServingConfig)
    options: ApiOptions = field(default_factory=ApiOptions)
    imports: tuple[str, ...] = ()
    folder: str = ""  # for the totals
    drain_s: float = DRAIN_S
    notice_s: float = 0.0


class Totals:
    """The totals of this worker, and of those that filled its place before it, in a file; and those of the others."""

    def __init__(self, folder: str, place: int, server: ModelServer) -> None:
        self._path, self._server = Path(folder) / f"{place}.json", server
        self._before = _read(self._path, gone=True)
        server.telemetry.elsewhere = _named(self._beside())
        held = server._held() | server.telemetry.elsewhere
        for counts in self._before.keys() & {"versions", "failures"}:
            for name in self._before[counts].keys() - held:
                if name and not name.endswith(f"/{OTHER}"):
                    del self._before[counts][name]
        self._lock = threading.Lock()  # a scrape writes too: the newer sums must be written last

    def others(self) -> list[Mapping[str, Any]]:
        """All but this server's own. Writes first: what is shown now must not be lost when this worker is killed."""
        with contextlib.suppress(OSError):  # a full disk must not hide the server from its operators
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
            fresh.write_text(json.dumps(merged([self._before, totals(self._server)])), encoding="ascii")
            os.replace(fresh, self._path)

    def _beside(self) -> list[dict[str, Any]]:
        paths = sorted(self._path.parent.glob("[0-9]*.json"))
        return [_read(path) for path in paths if path != self._path]


def _named(others: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Versions that other workers hold."""
    return frozenset(name for other in others for name in other.get("named", ()))


def _read(path: Path, gone: bool = False) -> dict[str, Any]:
    """One file; of a worker that is gone only what never falls, not what it held at that moment (``now``)."""
    try:
        age_s, found = time.time() - path.stat().st_mtime, dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    return found | {"now": {}, "named": {}} if gone or age_s > 3 * EXCHANGE_S else found


def work(plan: Plan, place: int, pipe: Connection, lifeline: Connection, inherited: Connection | None = None) -> None:
    """Run a worker; tell the pipe (url, grpc_url) when it answers, or in words why it cannot; then None about once a
    second, while its event loop turns.

    Args:
        lifeline: Readable once the supervisor is gone. ``inherited``: a forked child's copy of the other end.
    """
    if inherited is not None:
        inherited.close()
    signal.set_wakeup_fd(-1)  # the supervisor's, if forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the supervisor decides
    signal.signal(signal.SIGTERM, _end)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # held back since before the fork
    try:
        _serve(plan, place, pipe, lifeline)
    except (FlservingError, OSError) as error:
        with pipe:
            if not pipe.closed:
                pipe.send(str(error))
        raise SystemExit(1) from None


def _serve(plan: Plan, place: int, pipe: Connection, lifeline: Connection) -> None:
    import_modules(plan.imports)
    if not (Path(plan.registry).expanduser() / FILE_NAME).is_file():
        raise ConfigError(f"no registry in {plan.registry!r}: name the folder that versions were published to")
    with (
        Registry(plan.registry, busy_timeout_s=BUSY_TIMEOUT_S) as registry,
        ModelServer(plan.config, registry, plan.model) as server,
    ):
        if not registry.models():
            raise ConfigError(f"the registry in {plan.registry!r} is empty: publish a version first")
        exchange = Totals(plan.folder, place, server)
        endpoint = Endpoint(server, plan.options, reuse_port=hasattr(os, "fork"), others=exchange.others)
        orphaned = False
        try:
            gc.collect()
            gc.freeze()  # what torch and the rest brought along stays: to look at it in each full collection took 90 ms
            pipe.send((endpoint.url, endpoint.grpc_url))
            beats = -1
            while not orphaned:  # else nobody would stop us
                if beats != endpoint.beats:
                    beats = endpoint.beats
                    with contextlib.suppress(OSError):  # the supervisor is gone: the lifeline tells
                        pipe.send(None)
                with contextlib.suppress(OSError):  # a full disk makes the others' sums older, and stops nobody
                    exchange.write()
                orphaned = bool(wait([lifeline], EXCHANGE_S))
        finally:
            endpoint.close(plan.drain_s, plan.notice_s)
            with contextlib.suppress(OSError):
                exchange.write()
            if orphaned:
                shutil.rmtree(plan.folder, ignore_errors=True)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise SystemExit(0)
