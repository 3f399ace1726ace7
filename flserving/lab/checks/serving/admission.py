"""Check of the exercise "admission control" (notebook 02): a bound on the rows inside, for many
threads."""

import time
from collections.abc import Callable
from typing import Any

from flserving.errors import OverloadedError
from flserving.lab.checks.asking import ask, together
from flserving.lab.checks.parts import Part, judge

MakeAdmission = Callable[[int], Any]

_PLACES = 4
_CALLERS = 8
# after which a request counts as stuck: a busy machine may look away for a second
_PATIENCE_S = 2.0
_PAUSE_S = 0.01
_IN = "entered"
_OUT = "was refused"
_STUCK = "is stuck"


class _Slow(int):
    """A number of rows that takes its time to be counted: another thread gets between reading and
    writing."""

    def __add__(self, other: int) -> int:
        time.sleep(_PAUSE_S)
        return int(self) + other

    __radd__ = __add__

    def __rsub__(self, other: int) -> int:
        time.sleep(_PAUSE_S)
        return other - int(self)


def check_admission(admission_class: MakeAdmission) -> None:
    """Check ``admission_class(max_rows)`` with ``enter(rows)``, for ``with``: places for the time
    of a block.

    What does not fit raises OverloadedError at once, and takes no place. A request of more than
    ``max_rows`` enters when it is alone. Many threads enter and leave at the same time.

    Raises:
        AssertionError: Says who was inside, and what happened to the next one.
    """
    judge(
        "admission",
        admission_class,
        Part(
            "refuses what does not fit",
            _refuses,
            (
                "Before the block: compare the rows that are inside and the new ones with all places.",
                "If `self.rows + rows > self.max_rows`, raise OverloadedError; else `self.rows += rows`, then `yield`.",
                "The lock is for the counting only: `yield` stands outside of `with self.lock:`.",
            ),
        ),
        Part(
            "gives back what was taken",
            _gives_back,
            (
                "After the block its rows leave. Whoever was refused took no place, and has none to give back.",
                "Raise before `self.rows += rows`; `self.rows -= rows` stands after `yield`.",
            ),
        ),
        Part(
            "gives it back after an error",
            _after_an_error,
            (
                "When the block raises, the error comes out of `yield`, and the lines after it do not run.",
                "`try:` around `yield`, and `self.rows -= rows` in `finally:`; catch nothing.",
            ),
        ),
        Part(
            "lets a large request in when it is alone",
            _large,
            (
                "Nobody is inside when `self.rows` is 0; then nothing is compared.",
                "`if self.rows and self.rows + rows > self.max_rows:` is when to refuse.",
            ),
        ),
        Part(
            "counts right with many threads",
            _many_threads,
            (
                "Between reading `self.rows` and writing it, another thread can read the same number.",
                "One `with self.lock:` around the comparison and `self.rows += rows`, another one around "
                "`self.rows -= rows`.",
            ),
        ),
    )


def _made(admission_class: MakeAdmission) -> Any:
    return ask(f"Admission({_PLACES})", admission_class, _PLACES)


def _end(admission: Any, rows: int) -> str:
    """How a request ends that does nothing inside; a thread makes it, because it may be stuck."""

    def call(_: int) -> str:
        with admission.enter(rows):
            return _IN

    end = next(iter(together(call, 1, _PATIENCE_S)), _STUCK)
    if isinstance(end, NotImplementedError | AssertionError):
        raise end
    if isinstance(end, BaseException):
        return (
            _OUT if isinstance(end, OverloadedError) else f"ended with {type(end).__name__}: {end}"
        )
    return str(end)


def _inside(admission: Any, held: int, *others: int) -> list[str]:
    """How other requests end, one after the other, while a block of ``held`` rows runs."""
    ends = list[str]()
    with admission.enter(held):
        for rows in others:
            stuck = _STUCK in ends  # then so are the others: wait once
            ends.append(_STUCK if stuck else _end(admission, rows))
    return ends


def _refuses(admission_class: MakeAdmission) -> None:
    end = _end(_made(admission_class), 1)
    assert end == _IN, f"all {_PLACES} places are free, and a request of 1 row {end}: it must enter"
    (end,) = _inside(_made(admission_class), 2, 1)
    assert end != _STUCK, (
        f"2 of {_PLACES} places are taken, and a request of 1 row {end}: hold no lock while a block runs, or requests "
        "go one by one"
    )
    (end,) = _inside(_made(admission_class), _PLACES, 1)
    assert end != _IN, (
        f"a request of {_PLACES} rows has all places, and 1 row entered: count rows, not requests"
    )
    (end,) = _inside(_made(admission_class), 3, 2)
    told = f"3 of {_PLACES} places are taken, and a request of 2 rows {end}"
    assert end != _STUCK, f"{told}: refuse at once, wait for nobody"
    assert end != _IN, f"{told}: let in only what fits, 5 rows are inside"
    assert end == _OUT, f"{told}: raise OverloadedError, which REST answers with 429"
    (end,) = _inside(_made(admission_class), 3, 1)
    assert end == _IN, (
        f"3 of {_PLACES} places are taken, and a request of 1 row {end}: exactly full is not too full"
    )


def _gives_back(admission_class: MakeAdmission) -> None:
    admission = _made(admission_class)
    _inside(admission, 3)
    end = _end(admission, 2)
    assert end == _IN, (
        f"a block of 3 rows is over, and a request of 2 rows {end}: the places must be free again, or after some "
        "requests nobody ever enters"
    )
    end = _end(admission, _PLACES)
    assert end == _IN, (
        f"all have left, and a request of {_PLACES} rows {end}: give back as many places as were taken"
    )
    _, again, small, last = _inside(_made(admission_class), 2, 3, 3, 1, 3)
    assert again != _IN, (
        "a request of 3 rows was refused, tried again, and entered although nobody had left: a refused request gives "
        "places back that it never took"
    )
    assert small == _IN, (
        f"a request of 3 rows was refused, and then one of 1 row, which fits, {small}: a refused request must take "
        "no place"
    )
    assert last != _IN, (
        "2 rows are inside, one more came and left, and 3 rows entered: whoever leaves gives back its own places only"
    )


def _after_an_error(admission_class: MakeAdmission) -> None:
    admission = _made(admission_class)
    problem = ValueError("a row with 63 features")
    try:
        with admission.enter(3):
            raise problem
    except Exception as error:
        assert error is problem, (
            f"the block raised ValueError, the caller got {type(error).__name__}: {error}"
        )
    else:
        raise AssertionError(
            "the block raised ValueError, and enter swallowed it: the caller would take it for done"
        )
    end = _end(admission, _PLACES)
    assert end == _IN, (
        f"a block of 3 rows raised, and then a request of {_PLACES} rows {end}: some bad requests, and the server "
        "refuses everybody for ever"
    )


def _large(admission_class: MakeAdmission) -> None:
    end = _end(_made(admission_class), _PLACES + 1)
    assert end == _IN, (
        f"nobody is inside, and a request of {_PLACES + 1} rows for {_PLACES} places {end}: it would be refused for "
        "ever, however often it tries again"
    )
    (end,) = _inside(_made(admission_class), 1, _PLACES + 1)
    assert end != _IN, (
        f"1 row is inside, and a request of {_PLACES + 1} rows entered: it may only when it is alone"
    )
    (end,) = _inside(_made(admission_class), _PLACES + 1, 1)
    assert end != _IN, (
        f"a request of {_PLACES + 1} rows is inside, and one of 1 row entered: no place is free"
    )


def _many_threads(admission_class: MakeAdmission) -> None:
    admission = _made(admission_class)
    told = list[str]()
    inside = list[int]()
    crowds = list[int]()

    def call(number: int) -> None:
        try:
            with admission.enter(_Slow(1)):
                told.append(_IN)
                inside.append(number)
                crowds.append(len(inside))
                ends_s = time.monotonic() + _PATIENCE_S / 4
                while len(told) < _CALLERS and time.monotonic() < ends_s:
                    time.sleep(1e-3)
                inside.pop()
        except OverloadedError:
            told.append(_OUT)

    ends = together(call, _CALLERS, _PATIENCE_S)
    assert len(ends) == _CALLERS, (
        f"{_CALLERS - len(ends)} of {_CALLERS} threads never came out of enter(1)"
    )
    assert max(crowds, default=0) <= _PLACES, (
        f"{_CALLERS} threads asked for one of {_PLACES} places at the same time, and {max(crowds)} were inside: they "
        "read the same count; compare and take inside one `with self.lock`"
    )
    entered = told.count(_IN)
    assert entered >= _PLACES, (
        f"{_CALLERS} threads asked for one of {_PLACES} places each, and only {entered} entered"
    )
    end = _end(admission, _PLACES)
    assert end == _IN, (
        f"{entered} threads left at the same time, and then a request of {_PLACES} rows {end}: places were lost, "
        "give them back inside `with self.lock`, too"
    )
