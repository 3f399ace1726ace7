"""What a forked child has to make anew: locks that another thread of its parent may hold, for ever,
and whatever waits for threads, of which it has only the one that forked."""

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_renewals: "weakref.WeakKeyDictionary[Any, Callable[[Any], object]]" = weakref.WeakKeyDictionary()


def in_child(thing: T, renew: Callable[[T], object]) -> None:
    """Call ``renew(thing)`` in every child that is forked while ``thing`` is alive. It must not
    hold ``thing``."""
    _renewals[thing] = renew


def fresh_locks_in_child(thing: object, *names: str) -> None:
    """Give ``thing`` a new lock under each of these names in every forked child."""
    in_child(thing, functools.partial(_fresh_locks, names=names))


def _fresh_locks(thing: object, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(thing, name, threading.Lock())


def _renew() -> None:
    for thing, renew in list(_renewals.items()):
        renew(thing)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_renew)
