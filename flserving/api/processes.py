"""Several processes on one port, each with a server of its own: started, replaced when they die,
stopped together.

The kernel deals connections out to the processes (SO_REUSEPORT). On Linux workers are forked from a
process that has loaded torch but run nothing: a replacement answers in a fraction of a second.

:class:`Supervisor` runs in the parent, :func:`work` in each worker. A worker writes to a pipe:
first its addresses, or in words why it has none; then None about once a second, as long as its
event loop runs. A second pipe shows a worker that the supervisor is gone: nobody writes to it, and
it ends when the supervisor does.
"""

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from flserving.api.endpoint import DRAIN_S, Endpoint
from flserving.api.options import ApiOptions
from flserving.api.sockets import listen
from flserving.api.totals import EXCHANGE_S, Totals
from flserving.errors import ConfigError, FlservingError
from flserving.models.own_code import import_modules
from flserving.monitoring.observability import Observability
from flserving.registry import Registry
from flserving.registry.index import FILE_NAME
from flserving.registry.storage import own_folder
from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer

START_S = 60.0
"""How long a worker may take from its start to its first answer."""
HUNG_S = 15.0
"""A worker that answers, but has not been heard of for so long, is replaced."""
STOPPING = (signal.SIGTERM, signal.SIGINT)
BUSY_TIMEOUT_S = 5.0  # how long a worker waits for a locked registry
_KILL_S = 2.0  # beyond the grace time, before a worker that does not end is killed
# a worker that answered for so long is replaced at once, others after a growing pause
_STABLE_S = 2.0
_LONGEST_PAUSE_S = 30.0
_FORKS = sys.platform == "linux"
_CONTEXT: Any = multiprocessing.get_context("fork" if _FORKS else "spawn")

Addresses = tuple[str, str | None]
"""REST's URL, and gRPC's "host:port" or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every worker serves. ``model`` None: every model of the registry. ``imports``: modules
    that each worker runs first, for their architectures."""

    registry: str
    model: str | None = None
    config: ServingConfig = field(default_factory=ServingConfig)
    options: ApiOptions = field(default_factory=ApiOptions)
    imports: tuple[str, ...] = ()
    observability: Observability = field(default_factory=Observability)
    folder: str = ""  # for the totals
    drain_s: float = DRAIN_S
    notice_s: float = 0.0


@dataclass(slots=True)
class _Slot:
    """One place for a worker, and the process that fills it now."""

    number: int
    process: Any = None
    pipe: Connection | None = None
    ready_s: float | None = None  # since when it answers
    heard_s: float = 0.0  # when it started, or last wrote to its pipe
    killed: bool = False  # as it hung
    failures: int = 0  # in a row
    due_s: float = 0.0  # when to start the next one

    @property
    def patience_s(self) -> float:
        """How long its worker may stay silent."""
        return START_S if self.ready_s is None else HUNG_S


class Supervisor:
    """Runs ``workers`` processes that answer on the options' ports, until a signal stops it.

    Args:
        say: Gets one line for each event that an operator should know of.

    Raises:
        ConfigError, ConflictError: The options cannot be served by so many processes, or a port is
            in use.
    """

    def __init__(
        self,
        plan: Plan,
        workers: int = 1,
        *,
        drain_s: float = DRAIN_S,
        notice_s: float = 0.5,
        say: Callable[[str], object] = print,
    ) -> None:
        if not 1 <= workers <= 256:
            raise ConfigError(f"workers is {workers}: it must lie in [1, 256]")
        for name, seconds in (("grace-s", drain_s), ("notice-s", notice_s)):
            if not 0 <= seconds <= 3600:
                raise ConfigError(f"{name} is {seconds}: it must lie in [0, 3600] seconds")
        if plan.options.admin and workers > 1:
            raise ConfigError(
                f"admin with {workers} workers: a load would reach one of them only; take one worker"
            )
        if workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
            raise ConfigError(f"{workers} workers cannot share a port on this system: take one")
        self._say = say
        self._slots = [_Slot(number) for number in range(workers)]
        self._grace_s = drain_s + notice_s + _KILL_S
        self._ports: list[socket.socket] = []
        self._lifeline, self._lifeline_end = _CONTEXT.Pipe(duplex=False)
        folder, self._remove_folder = own_folder(self, "flserving-run-")
        try:
            options = plan.options
            options = replace(options, port=self._reserve(options.host, options.port))
            if options.grpc_port is not None:
                options = replace(options, grpc_port=self._reserve(options.host, options.grpc_port))
        except BaseException:
            self._close()
            raise
        self._plan = replace(
            plan, options=options, folder=folder, drain_s=drain_s, notice_s=notice_s
        )

    def run(self, announce: Callable[[str, str | None], object]) -> int:
        """Serve until SIGTERM or SIGINT, then let admitted requests finish. ``announce`` gets the
        two addresses once every worker answers.

        Returns:
            0, or 1 if a worker had to be killed at the end.

        Raises:
            FlservingError: A worker of the first generation could not start; the message is its
                own.
        """
        try:
            with _signals() as signals:
                # they share its memory, and need not wait for it
                if _FORKS and self._plan.config.engine == "torch":
                    import flserving.models.modules  # noqa: F401
                try:
                    for slot in self._slots:
                        self._start(slot)
                    addresses = self._first_addresses(signals)
                    if addresses is not None:
                        announce(*addresses)
                        while not self._watch(signals):
                            pass
                finally:
                    killed = self._stop(signals)
            return 1 if killed else 0
        finally:
            self._close()

    def _first_addresses(self, signals: socket.socket) -> Addresses | None:
        """Wait until all workers answer; their addresses, or None if a signal came to stop."""
        addresses: Addresses | None = None
        end_s = time.monotonic() + START_S
        while starting := [slot for slot in self._slots if slot.ready_s is None]:
            pipes = [slot.pipe for slot in starting if slot.pipe is not None]
            found = wait([*pipes, signals], timeout=max(0.0, end_s - time.monotonic()))
            if signals in found:
                return None
            if not found:
                raise FlservingError(
                    f"{len(starting)} of {len(self._slots)} workers did not start in {START_S:.0f} s"
                )
            for slot in starting:
                if slot.pipe in found:
                    addresses = self._receive(slot) or addresses
        return addresses

    def _watch(self, signals: socket.socket) -> bool:
        """Wait for the next event and deal with it; True when a signal came to stop."""
        now_s = time.monotonic()
        for slot in self._slots:
            if slot.process is None and slot.due_s <= now_s:
                self._start(slot)
        alive = [slot for slot in self._slots if slot.process is not None]
        deadlines_s = [slot.due_s for slot in self._slots if slot.process is None]
        deadlines_s += [slot.heard_s + slot.patience_s for slot in alive if not slot.killed]
        events: list[Any] = [slot.process.sentinel for slot in alive]
        events += [slot.pipe for slot in alive if slot.pipe is not None]
        timeout_s = min(deadlines_s, default=now_s + _LONGEST_PAUSE_S) - now_s
        found = wait([*events, signals], timeout=max(0.0, timeout_s))
        for slot in alive:
            if slot.pipe in found:
                try:
                    self._receive(slot)
                except FlservingError as error:
                    self._say(f"worker {slot.number} could not start: {error}")
            if slot.process.sentinel in found:
                self._plan_next(slot)
            else:
                self._kill_if_hung(slot)
        return signals in found

    def _start(self, slot: _Slot) -> None:
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        inherited = self._lifeline_end if _FORKS else None
        slot.process = _CONTEXT.Process(
            target=work,
            args=(self._plan, slot.number, theirs, self._lifeline, inherited),
            name=f"flserving-{slot.number}",
        )
        if slot.pipe is not None:
            slot.pipe.close()
        slot.pipe = ours
        slot.ready_s = None
        slot.heard_s = time.monotonic()
        slot.killed = False
        # until a child has handlers of its own, its signals would be written to our socket
        with _signals_blocked():
            slot.process.start()
        theirs.close()

    def _receive(self, slot: _Slot) -> Addresses | None:
        """Read what a worker wrote: its addresses when it begins to answer, else None.

        Raises:
            FlservingError: It could not start.
        """
        assert slot.pipe is not None
        slot.heard_s = time.monotonic()
        try:
            message = slot.pipe.recv()
        except (EOFError, ConnectionResetError):
            message = f"worker {slot.number} ended before it could say why"
            slot.pipe.close()
            slot.pipe = None
        if isinstance(message, tuple):
            slot.ready_s = slot.heard_s
            return message
        if isinstance(message, str) and slot.ready_s is None:
            raise FlservingError(message)
        return None

    def _kill_if_hung(self, slot: _Slot) -> None:
        """A worker that was silent for too long is killed, and replaced like one that died."""
        patience_s = slot.patience_s
        if slot.killed or time.monotonic() - slot.heard_s < patience_s:
            return
        problem = "did not start" if slot.ready_s is None else "has not answered"
        self._say(
            f"worker {slot.number} (pid {slot.process.pid}) {problem} for {patience_s:g} s: it is killed"
        )
        slot.killed = True
        slot.process.kill()

    def _plan_next(self, slot: _Slot) -> None:
        """A worker ended that should not have: report it and plan the next one."""
        now_s = time.monotonic()
        process = slot.process
        process.join()
        stable = slot.ready_s is not None and now_s - slot.ready_s >= _STABLE_S
        slot.failures = 1 if stable else slot.failures + 1
        pause_s = 0.0
        if slot.failures > 1:
            pause_s = min(_LONGEST_PAUSE_S, 0.25 * 2.0 ** min(slot.failures, 16))
        code = process.exitcode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._say(
            f"worker {slot.number} (pid {process.pid}) ended {how}: starting another in {pause_s:.1f} s"
        )
        process.close()
        slot.process = None
        slot.due_s = now_s + pause_s

    def _stop(self, signals: socket.socket) -> bool:
        """Ask every worker to drain; kill those that do not end in time, or all at a second
        signal."""
        alive = [slot.process for slot in self._slots if slot.process is not None]
        for process in alive:
            process.terminate()
        with contextlib.suppress(BlockingIOError):
            signals.recv(4096)  # the first signal
        end_s = time.monotonic() + self._grace_s
        killed = False
        while alive:
            events = [signals, *(process.sentinel for process in alive)]
            found = wait(events, timeout=max(0.0, end_s - time.monotonic()))
            if signals in found or not found:
                killed = True
                for process in alive:
                    process.kill()
            for process in alive:
                if process.sentinel in found or killed:
                    process.join()
            alive = [process for process in alive if process.is_alive()]
        return killed

    def _reserve(self, host: str, port: int) -> int:
        """Bind a port for all workers. A probe that shares it with nobody finds out whether it is
        free."""
        if not hasattr(socket, "SO_REUSEPORT"):
            with listen(host, port) as probe:
                return int(probe.getsockname()[1])
        if port:
            listen(host, port).close()
        self._ports.append(listen(host, port, reuse_port=True, backlog=0))
        return int(self._ports[-1].getsockname()[1])

    def _close(self) -> None:
        for opened in (*self._ports, self._lifeline, self._lifeline_end):
            opened.close()
        self._remove_folder()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the end of the block; a child that starts in it lets them in
    itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where a child is no copy of its parent
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _signals(numbers: Iterable[signal.Signals] = STOPPING) -> Iterator[socket.socket]:
    """A socket that becomes readable at one of the signals, so that none interrupts anything half
    done."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield ours
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()


def work(
    plan: Plan,
    place: int,
    pipe: Connection,
    lifeline: Connection,
    inherited: Connection | None = None,
) -> None:
    """Run a worker until SIGTERM, or until its supervisor is gone.

    Args:
        pipe: To the supervisor: addresses or a problem, then heartbeats.
        lifeline: Readable once the supervisor is gone: parents cannot be asked for on every system.
        inherited: A forked child's copy of the lifeline's other end.
    """
    if inherited is not None:
        inherited.close()
    signal.set_wakeup_fd(-1)  # the supervisor's, if forked
    # Ctrl-C reaches the whole group: the supervisor decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # blocked since before the fork
    plan.observability.configure()
    try:
        _serve(plan, place, pipe, lifeline)
    except (FlservingError, OSError) as error:
        with pipe:
            if not pipe.closed:
                pipe.send(str(error))
        raise SystemExit(1) from None


@contextlib.contextmanager
def serving(plan: Plan) -> Iterator[ModelServer]:
    """The server of a plan, over its registry.

    Raises:
        ConfigError: No registry there, an empty one, or modules that cannot be imported.
        NotFoundError: No such model.
    """
    import_modules(plan.imports)
    if not (Path(plan.registry).expanduser() / FILE_NAME).is_file():
        raise ConfigError(
            f"no registry in {plan.registry!r}: name the folder that versions were published to"
        )
    with (
        Registry(plan.registry, busy_timeout_s=BUSY_TIMEOUT_S) as registry,
        ModelServer(plan.config, registry, plan.model) as server,
    ):
        if not registry.models():
            raise ConfigError(
                f"the registry in {plan.registry!r} is empty: publish a version first"
            )
        yield server


def _serve(plan: Plan, place: int, pipe: Connection, lifeline: Connection) -> None:
    with serving(plan) as server, _signals((signal.SIGTERM,)) as signals:
        totals = Totals(plan.folder, place, server)
        end_spans = plan.observability.observe(server)
        endpoint = Endpoint(
            server, plan.options, reuse_port=hasattr(os, "fork"), others=totals.others
        )
        orphaned = False
        ready: list[object] = []
        try:
            gc.collect()
            # what torch and the rest brought along stays: to look at it in each full collection
            # took 90 ms
            gc.freeze()
            pipe.send((endpoint.url, endpoint.grpc_url))
            beats = -1
            while not ready:
                if beats != endpoint.beats:
                    beats = endpoint.beats
                    # the supervisor is gone, as the lifeline will show
                    with contextlib.suppress(OSError):
                        pipe.send(None)
                # a full disk makes the others' sums older, and stops nobody
                with contextlib.suppress(OSError):
                    totals.write()
                ready = list(wait([lifeline, signals], EXCHANGE_S))
            orphaned = lifeline in ready  # nobody else would stop us, nor remove the folder
        finally:
            endpoint.close(plan.drain_s, plan.notice_s)
            end_spans()
            with contextlib.suppress(OSError):
                totals.write()
            if orphaned:
                shutil.rmtree(plan.folder, ignore_errors=True)


def _leave(number: int, frame: FrameType | None) -> None:
    """End a worker that still loads: nothing waits for it. An exception may come where it is
    swallowed, as in the callback of a weak reference.
    """
    os._exit(0)
