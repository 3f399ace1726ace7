"""What a student's code may do in a check: run for some seconds, print some lines; a hang ends in a
sentence."""

import contextlib
import ctypes
import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

LIMIT_S = 20.0  # a check takes one second; a busy machine ten times as long
_Result = TypeVar("_Result")
_LINES = 20  # of print
_CHARACTERS = 2000


class TooLongError(BaseException):
    """Raised in code that does not end. Not an Exception: code that tries again after each error
    must end, too."""


@contextlib.contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """TooLongError where the block is after ``limit_s``, again each second until it ends; its
    threads get one, too.

    It needs the main thread and its alarm, as in a kernel on Linux and macOS; elsewhere nothing is
    limited.
    """
    began = set(threading.enumerate())
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_: Any) -> None:
        _stop(set(threading.enumerate()) - began)
        raise TooLongError

    handler = signal.signal(signal.SIGALRM, stop)
    earlier_s = signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *earlier_s)
        signal.signal(signal.SIGALRM, handler)


def _stop(threads: set[threading.Thread]) -> None:
    """Raise TooLongError in daemon threads. What still waits for a lock after half a second waits
    for ever: leave it.

    An error that no thread takes must not stay pending: CPython 3.11 looks for it at each call of
    every thread, and a call under ``sys.settrace`` then never begins. The flag goes when a thread
    takes such an error: this one does.
    """
    stopped = {thread.ident for thread in threads if thread.daemon and thread.ident is not None}
    for ident in stopped:
        _raise_in(ident, TooLongError)
    until_s = time.monotonic() + 0.5
    while (
        waiting := stopped & {thread.ident for thread in threading.enumerate()}
    ) and time.monotonic() < until_s:
        time.sleep(1e-3)
    for ident in waiting:
        _raise_in(ident, None)
    if waiting:
        with contextlib.suppress(TooLongError):
            _raise_in(threading.get_ident(), TooLongError)
            while True:
                pass


def _raise_in(ident: int, error: type[BaseException] | None) -> None:
    raised = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), raised)


def elsewhere(function: Callable[[], _Result]) -> _Result:
    """What a function returns or raises in a thread of its own: an event loop runs in a notebook's
    thread already.

    The thread is a daemon: one that never ends does not keep the kernel from ending.
    """
    ends: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            ends.append(function())
        except BaseException as error:
            errors.append(error)
        ended.set()

    # join, when it is interrupted, takes a thread that runs for one that has ended
    ended = threading.Event()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        ended.wait()
    except BaseException as error:
        if not isinstance(error, TooLongError):  # else the limit has stopped the thread
            _stop({thread})
        ended.wait(0.5)  # then its error says at which line of the student it was
        if not errors:
            raise
    if errors:
        raise errors[0]
    return ends[0]


class _Few(io.TextIOBase):
    """The beginning of what is printed goes on to ``out``; the rest is counted."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.lines = self.characters = self.left_out = 0

    def write(self, text: str) -> int:
        if self.lines < _LINES and self.characters < _CHARACTERS:
            self.out.write(text[:_CHARACTERS])
            self.lines += text.count("\n")
            self.characters += len(text)
        else:
            self.left_out += text.count("\n")
        return len(text)

    def flush(self) -> None:
        self.out.flush()


@contextlib.contextmanager
def few_lines() -> Iterator[None]:
    """A check calls the same code many times: of what it prints, show the beginning."""
    few = _Few(sys.stdout)
    with contextlib.redirect_stdout(few):
        yield
    if few.left_out:
        print(
            f"... and {few.left_out} more lines that your code printed, because the check calls it many times."
        )
