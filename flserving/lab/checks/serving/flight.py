"""Check of the exercise "single flight" (notebook 03): many threads ask for one missing key, and it
is loaded once."""

import threading
import time
from collections.abc import Callable
from typing import Any

from flserving.lab.checks.asking import ask, together
from flserving.lab.checks.parts import Part, judge

_CALLERS = 8
_TOGETHER_S = 0.25  # how long a load waits for the whole crowd
_PATIENCE_S = 1.0  # after which a call counts as stuck


class _Store:
    """A cache of any size, which notices two threads in it at once."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.gets = self.inside = self.most_inside = 0

    def get(self, key: str) -> Any:
        self.gets += 1
        self._stay()
        return self.values.get(key)

    def put(self, key: str, value: Any) -> None:
        self._stay()
        self.values[key] = value

    def _stay(self) -> None:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(1e-3)  # another thread gets its turn
        self.inside -= 1


def check_single_flight(flight_class: Callable[[Any], Any]) -> None:
    """Check ``flight_class(cache)`` with ``get(key, load) -> value``, which many threads call at
    once.

    The cache has ``get(key)``, None on a miss, and ``put(key, value)``; it is for one thread at a
    time. A missing key is loaded once, however many ask; what the load raises goes to all who wait,
    and is not kept.

    Raises:
        AssertionError: Says which threads did what. A thread that is stuck is left behind.
    """
    judge(
        "single-flight",
        flight_class,
        Part(
            "asks the cache, then loads",
            _asks_the_cache_then_loads,
            (
                "In this order: `self.cache.get(key)`, and what is not None is the answer; `load()`; `self.cache.put`.",
                "When the load is over, its flight goes: `del self.flights[key]`. From then on the cache answers.",
                "A Lock is no RLock: inside `with self.lock`, nothing may enter `with self.lock` again.",
            ),
        ),
        Part(
            "loads once for a crowd",
            _loads_once_for_a_crowd,
            (
                "Whoever finds no flight puts a Future into self.flights and loads; the others wait for its result.",
                "Look for a flight and start one under the same `with self.lock`; wait without it.",
                "Under the lock `leads = key not in self.flights`, and if so `self.flights[key] = Future()`. After it, "
                "`if not leads: return flight.result()`; the leader ends with `flight.set_result(value)`.",
            ),
        ),
        Part(
            "lets one thread at a time into the cache",
            _one_thread_in_the_cache,
            (
                "Every call of self.cache stands under `with self.lock`: the get, and the put as well.",
            ),
        ),
        Part(
            "holds up no other key",
            _holds_up_no_other_key,
            (
                "The lock is for the dict and the cache, which take microseconds: call load, and wait, without it.",
            ),
        ),
        Part(
            "passes an error on, and forgets it",
            _passes_an_error_on,
            (
                "What is to happen if load() raises? Those who wait must learn of it, and the next caller tries again.",
                "`except BaseException as error:` take the flight out of self.flights under the lock, "
                "`flight.set_exception(error)`, and `raise`.",
            ),
        ),
    )


def _asks_the_cache_then_loads(flight_class: Callable[[Any], Any]) -> None:
    flight, store = _made(flight_class)
    loads = list[str]()

    def get(key: str, value: str, when: str = "") -> Any:
        def load() -> str:
            loads.append(key)
            return value

        return _alone(f"get({key!r}, load){when}", lambda: flight.get(key, load))

    got = get("a", "model a")
    assert got == "model a", (
        f"get('a', load) returned {got!r}, the load returned 'model a': return what was loaded"
    )
    assert len(loads) == 1, (
        f"one caller, and load was called {len(loads)} times: call it once and keep its result"
    )
    assert store.values.get("a") == "model a", (
        "after get('a', load) the cache does not hold 'a': put it there, or every request loads the model again"
    )
    assert get("a", "another", " again") == "model a" and len(loads) == 1, (
        "'a' is in the cache, and get('a', load) loaded it again: ask the cache first; a hit loads nothing"
    )
    store.values["b"] = 0
    got = get("b", "another")
    assert got == 0 and len(loads) == 1, (
        f"the cache holds 0 for 'b', and get returned {got!r}: only None is a miss, compare with `is None`"
    )
    store.values.clear()
    got = get("a", "newer a", " after its eviction")
    assert got == "newer a", (
        f"the cache has evicted 'a', and get('a', load) still returned {got!r}: a flight that is over must go, "
        "or your object keeps every model that was ever loaded, outside the budget of the cache"
    )


def _loads_once_for_a_crowd(flight_class: Callable[[Any], Any]) -> None:
    flight, store = _made(flight_class)
    answers, loads = _crowd(flight, store, object)
    assert loads == 1, (
        f"{_CALLERS} threads asked for one missing key at the same time, and {loads} of them loaded it: "
        f"{loads} times the work, and {loads} models in memory at once"
    )
    stuck = _CALLERS - len(answers)
    assert not stuck, (
        f"{stuck} of {_CALLERS} threads still wait, {_PATIENCE_S:g} s after the load: nobody gave them the result "
        "(flight.set_result), so these requests hang for ever"
    )
    wrong = [answer for answer in answers if type(answer) is not object or answer is not answers[0]]
    assert not wrong, (
        f"one model was loaded, and a thread got {wrong[0]!r}: all must get the object that was loaded"
    )


def _one_thread_in_the_cache(flight_class: Callable[[Any], Any]) -> None:
    flight, store = _made(flight_class)
    together(lambda number: flight.get(f"key {number}", lambda: number), _CALLERS, _PATIENCE_S)
    assert store.most_inside == 1, (
        f"{store.most_inside} threads were in the cache at the same time: an LRU moves its keys about, and two threads "
        "that do so lose entries or crash; the lock is there for it"
    )


def _holds_up_no_other_key(flight_class: Callable[[Any], Any]) -> None:
    flight, store = _made(flight_class)
    store.values["warm"] = "model w"
    began = threading.Event()
    go_on = threading.Event()

    def slow() -> None:
        began.set()
        go_on.wait(2 * _PATIENCE_S)

    threading.Thread(
        target=together, args=(lambda _: flight.get("a", slow), 1, _PATIENCE_S), daemon=True
    ).start()
    assert began.wait(_PATIENCE_S), "get('a', load) never called load"
    why = "waited while 'a' was loading: the lock is held during a load, so one cold model stops the whole server"
    for key in "warm", "b":
        ends = together(lambda _, key=key: flight.get(key, object), 1, _PATIENCE_S)  # type: ignore[misc]
        assert ends, f"get({key!r}, load) {why}"
    go_on.set()


def _passes_an_error_on(flight_class: Callable[[Any], Any]) -> None:
    flight, store = _made(flight_class)

    def fail() -> None:
        raise OSError("the disk does not answer")

    answers, loads = _crowd(flight, store, fail)
    stuck = _CALLERS - len(answers)
    assert not stuck, (
        f"the load raised, and {stuck} of {_CALLERS} threads still wait: they must get the error "
        "(flight.set_exception), or these requests hang for ever"
    )
    wrong = [answer for answer in answers if not isinstance(answer, OSError)]
    assert not wrong, (
        f"the load raised OSError, and {len(wrong)} of {_CALLERS} threads got {wrong[0]!r}: an error is not an answer, "
        "and all who waited must see it"
    )
    assert loads < _CALLERS, (
        f"each of the {_CALLERS} threads tried the broken load for itself: one tries for all"
    )
    try:
        got = _alone(
            "get('a', load) after a load that failed", lambda: flight.get("a", lambda: "model a")
        )
    except OSError:
        raise AssertionError(
            "a load failed once, and the next get raised the same error without a new try: a disk that hung for a "
            "moment would break this model until the server is restarted; forget the flight when its load fails"
        ) from None
    assert got == "model a", (
        f"after a load that failed, get('a', load) returned {got!r}: it must load again"
    )


def _made(flight_class: Callable[[Any], Any]) -> tuple[Any, _Store]:
    store = _Store()
    return ask("SingleFlight(cache)", flight_class, store), store


def _crowd(flight: Any, store: _Store, load: Callable[[], Any]) -> tuple[list[Any], int]:
    """What the threads of a crowd got, values or errors, and how often the key was loaded."""
    loads = list[int]()

    def held() -> Any:
        loads.append(1)
        ends_s = time.monotonic() + _TOGETHER_S
        while store.gets < _CALLERS and time.monotonic() < ends_s:
            time.sleep(1e-3)
        time.sleep(0.02)  # from the cache to the flight
        return load()

    return together(lambda _: flight.get("a", held), _CALLERS, _PATIENCE_S), len(loads)


def _alone(what: str, call: Callable[[], Any]) -> Any:
    """What one call returns or raises; a thread makes it, because it may be stuck."""
    ends = together(lambda _: call(), 1, _PATIENCE_S)
    assert ends, (
        f"{what} does not return: it waits for a lock or a flight of its own, and so would a server"
    )
    if isinstance(ends[0], BaseException):
        raise ends[0]
    return ends[0]
