"""Several processes on one port, each with a server of its own: started, replaced when they die, stopped together.

The kernel deals connections out to the processes (SO_REUSEPORT). On Linux workers are forked from a process that has
loaded torch but run nothing: a replacement answers in a fraction of a second.
"""

import contextlib
import multiprocessing
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from flserving.api.endpoint import DRAIN_S
from flserving.api.sockets import listen
from flserving.api.worker import STOPPING, Plan, work
from flserving.errors import ConfigError, FlservingError
from flserving.registry.storage import own_folder

START_S = 60.0
"""How long a worker may take from its start to its first answer."""
HUNG_S = 15.0
"""A worker that answers, but has not been heard of for so long, is replaced."""
_KILL_S = 2.0  # beyond the grace time, before a worker that does not end is killed
_STABLE_S = 2.0  # a worker that answered for so long is replaced at once, others after a growing pause
_LONGEST_PAUSE_S = 30.0
_CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(slots=True)
class _Slot:
    """One place for a worker, and who fills it now."""

    number: int
    process: Any = None
    pipe: Connection | None = None
    ready_s: float | None = None  # since when it answers
    heard_s: float = 0.0  # when it started, or was last heard of
    killed: bool = False  # as it hung
    failures: int = 0  # in a row
    due_s: float = field(default=0.0)  # when to start the next one


class Supervisor:
    """Keeps ``workers`` processes answering on the options' ports until it is told to stop.

    Args:
        say: Is given one line for each thing that an operator should know.

    Raises:
        ConfigError, ConflictError: The options cannot be served by so many processes, or a port is in use.
    """

    def __init__(
        self, plan: Plan, workers: int = 1, *, drain_s: float = DRAIN_S, notice_s: float = 0.5,
        say: Callable[[str], object] = print,
    ) -> None:  # fmt: skip
        if not 1 <= workers <= 256:
            raise ConfigError(f"workers is {workers}: it must lie in [1, 256]")
        for name, seconds in (("grace-s", drain_s), ("notice-s", notice_s)):
            if not 0 <= seconds <= 3600:
                raise ConfigError(f"{name} is {seconds}: it must lie in [0, 3600] seconds")
        if plan.options.admin and workers > 1:
            raise ConfigError(f"admin with {workers} workers: a load would reach one of them only; take one worker")
        if workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
            raise ConfigError(f"{workers} workers cannot share a port on this system: take one")
        self._say, self._slots = say, [_Slot(number) for number in range(workers)]
        self._grace_s = drain_s + notice_s + _KILL_S
        self._ports: list[socket.socket] = []
        self._lifeline, self._alive = _CONTEXT.Pipe(duplex=False)  # nobody writes: workers see when our end closes
        folder, self._remove_folder = own_folder(self, "flserving-run-")
        try:
            options = plan.options
            options = replace(options, port=self._keep_port(options.host, options.port))
            if options.grpc_port is not None:
                options = replace(options, grpc_port=self._keep_port(options.host, options.grpc_port))
        except BaseException:
            self._close()
            raise
        self._plan = replace(plan, options=options, folder=folder, drain_s=drain_s, notice_s=notice_s)

    def run(self, announce: Callable[[str, str | None], object]) -> int:
        """Serve until SIGTERM or SIGINT, then let admitted requests finish. ``announce`` is told the two addresses
        once every worker answers.

        Returns:
            0, or 1 if a worker had to be killed at the end.

        Raises:
            FlservingError: A worker of the first generation could not start; the message is its own.
        """
        try:
            with _signals() as signals:
                for slot in self._slots:
                    self._start(slot)
                try:
                    urls = self._first_answers(signals)
                    if urls is not None:
                        announce(*urls)
                        while not self._look(signals):
                            pass
                finally:
                    killed = self._stop(signals)
            return 1 if killed else 0
        finally:
            self._close()

    def _first_answers(self, signals: socket.socket) -> tuple[str, str | None] | None:
        """Wait until all have started; their addresses, or None if the order came to stop."""
        urls: tuple[str, str | None] | None = None
        end_s = time.monotonic() + START_S
        while waiting := [slot for slot in self._slots if slot.ready_s is None]:
            pipes = [slot.pipe for slot in waiting if slot.pipe is not None]
            found = wait([*pipes, signals], timeout=max(0.0, end_s - time.monotonic()))
            if signals in found:
                return None
            if not found:
                raise FlservingError(f"{len(waiting)} of {len(self._slots)} workers did not start in {START_S:.0f} s")
            for slot in waiting:
                if slot.pipe in found:
                    urls = self._hear(slot, first=True) or urls
        return urls

    def _look(self, signals: socket.socket) -> bool:
        """Wait for something to happen and deal with it; True when the order came to stop."""
        now_s = time.monotonic()
        for slot in self._slots:
            if slot.process is None and slot.due_s <= now_s:
                self._start(slot)
        alive = [slot for slot in self._slots if slot.process is not None]
        due = [slot.due_s - now_s for slot in self._slots if slot.process is None]
        due += [slot.heard_s + _silence_s(slot) - now_s for slot in alive if not slot.killed]
        news: list[Any] = [slot.process.sentinel for slot in alive]
        news += [slot.pipe for slot in alive if slot.pipe is not None]
        found = wait([*news, signals], timeout=max(0.0, min(due, default=_LONGEST_PAUSE_S)))
        for slot in alive:
            if slot.pipe in found:
                self._hear(slot, first=False)
            if slot.process.sentinel in found:
                self._bury(slot)
            else:
                self._check(slot)
        return signals in found

    def _check(self, slot: _Slot) -> None:
        """Kill a worker that hangs; it is replaced like one that died."""
        silence_s = _silence_s(slot)
        if slot.killed or time.monotonic() - slot.heard_s < silence_s:
            return
        problem = "has not answered" if slot.ready_s is not None else "did not start"
        self._say(f"worker {slot.number} (pid {slot.process.pid}) {problem} for {silence_s:g} s: it is killed")
        slot.killed = True
        slot.process.kill()

    def _start(self, slot: _Slot) -> None:
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        inherited = self._alive if _CONTEXT.get_start_method() == "fork" else None
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
        with _held_back():  # until it has handlers of its own, what reaches a child would be written to our socket
            slot.process.start()
        theirs.close()

    def _hear(self, slot: _Slot, first: bool) -> tuple[str, str | None] | None:
        """What a worker says: first its addresses, or why it has none; then None, now and then, while it answers."""
        assert slot.pipe is not None
        slot.heard_s = time.monotonic()
        try:
            message = slot.pipe.recv()
        except (EOFError, ConnectionResetError):
            message = f"worker {slot.number} ended before it could say why"
            slot.pipe.close()
            slot.pipe = None
        if message is None or (slot.ready_s is not None and not isinstance(message, tuple)):
            return None
        if isinstance(message, tuple):
            slot.ready_s = slot.heard_s
            return message
        if first:
            raise FlservingError(message)
        self._say(f"worker {slot.number} could not start: {message}")
        return None

    def _bury(self, slot: _Slot) -> None:
        """A worker ended that should not have: say so and plan the next one."""
        now_s, process = time.monotonic(), slot.process
        process.join()
        stable = slot.ready_s is not None and now_s - slot.ready_s >= _STABLE_S
        slot.failures = 1 if stable else slot.failures + 1
        pause_s = 0.0 if slot.failures == 1 else min(_LONGEST_PAUSE_S, 0.25 * 2.0 ** min(slot.failures, 16))
        code = process.exitcode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._say(f"worker {slot.number} (pid {process.pid}) ended {how}: starting another in {pause_s:.1f} s")
        process.close()
        slot.process, slot.due_s = None, now_s + pause_s

    def _stop(self, signals: socket.socket) -> bool:
        """Ask every worker to drain; kill those that do not end in time, or all at a second signal."""
        alive = [slot.process for slot in self._slots if slot.process is not None]
        for process in alive:
            process.terminate()
        with contextlib.suppress(BlockingIOError):
            signals.recv(4096)  # the first signal
        end_s, killed = time.monotonic() + self._grace_s, False
        while alive:
            found = wait(
                [signals, *(process.sentinel for process in alive)], timeout=max(0.0, end_s - time.monotonic())
            )
            if signals in found or not found:
                killed = True
                for process in alive:
                    process.kill()
            for process in alive:
                if process.sentinel in found or killed:
                    process.join()
            alive = [process for process in alive if process.is_alive()]
        return killed

    def _keep_port(self, host: str, port: int) -> int:
        """Bind a port for all workers. A probe that shares it with nobody finds out whether it is free."""
        if not hasattr(socket, "SO_REUSEPORT"):
            with listen(host, port) as probe:
                return int(probe.getsockname()[1])
        if port:
            listen(host, port).close()
        self._ports.append(listen(host, port, reuse_port=True, backlog=0))
        return int(self._ports[-1].getsockname()[1])

    def _close(self) -> None:
        for kept in (*self._ports, self._lifeline, self._alive):
            kept.close()
        self._remove_folder()


def _silence_s(slot: _Slot) -> float:
    """How long a worker may stay silent."""
    return START_S if slot.ready_s is None else HUNG_S


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the end of the block; a child that starts in it lets them in itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where a child is no copy of its parent
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that becomes readable at SIGTERM or SIGINT, so that a signal never interrupts anything half done."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
    try:
        yield ours
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()
