"""Checks of the exercises "a stopwatch on the client's side" and "what an offer gives" (notebook
06)."""

from collections.abc import Callable, Mapping
from typing import Any

from flserving.lab.checks.asking import ask, equal
from flserving.lab.checks.parts import Part, judge

NAMES = ("connect", "send", "wait", "receive")
_TAKES_S = {"connect": 1 / 32, "send": 1 / 512, "wait": 1 / 16, "receive": 1 / 128}
_CALL = ("/v2/models/digits/infer", b'{"inputs": []}', {"Authorization": "Bearer x"})
_ANSWER = b'{"outputs": []}'


def check_timed_call(timed_call: Callable[..., Any]) -> None:
    """Check ``timed_call(connection, path, body, headers, clock) -> (answer, ms)``.

    ``connection`` is a :class:`http.client.HTTPConnection`, ``clock()`` gives seconds. Right is:
    one POST; ``answer`` the body that came back; ``ms`` a dict with the milliseconds of ``connect``
    (none where the connection is open), ``send``, ``wait`` and ``receive``.

    Raises:
        CheckError: Says which part was given the time of another.
    """
    judge(
        "timed-call",
        timed_call,
        Part(
            "asks, and returns the answer",
            _asks,
            (
                "Four calls, in this order: connect(), request(...), getresponse(), and read() of what that returned.",
                '`connection.request("POST", path, body, headers)`, `response = connection.getresponse()`',
            ),
        ),
        Part(
            "gives each part its own time",
            _splits,
            (
                "Read the clock five times: before the first step, and after each of the four.",
                "A part is the difference of two readings, and 1000 times that are milliseconds.",
            ),
        ),
        Part(
            "leaves an open connection open",
            _keeps_open,
            (
                "`connection.sock` is None until it is open.",
                "`if connection.sock is None: connection.connect()`",
            ),
        ),
    )


def check_gains(gains: Callable[..., Any]) -> None:
    """Check ``gains(parts_us, offers) -> {name: how many times faster the whole gets}``, the best
    offer first.

    ``parts_us`` maps parts to microseconds, ``offers`` names to ``{part: how many times faster}``;
    infinity is allowed.

    Raises:
        CheckError: Recognises the usual mistakes by the number that they give.
    """
    judge(
        "amdahl",
        gains,
        Part(
            "one part gets faster",
            _one_part,
            (
                "Add up the new time: a part of the offer takes its time divided by times faster, any other as before.",
                "The gain is the old total divided by the new one.",
                "`offer.get(part, 1)` is how many times faster a part gets, 1 where the offer does not name it.",
            ),
        ),
        Part(
            "several parts, slower ones too",
            _several_parts,
            (
                "One new total for the whole offer; gains of single parts can neither be added nor multiplied.",
            ),
        ),
        Part(
            "the best offer first",
            _best_first,
            (
                "`sorted(found.items(), key=lambda item: item[1], reverse=True)`, and a dict of that.",
            ),
        ),
    )


# ------------------------------------------------------------------------------------ the stopwatch


class _Response:
    def __init__(self, connection: "_Connection") -> None:
        self.status = 200
        self._connection = connection

    def read(self) -> bytes:
        self._connection.take("receive")
        return _ANSWER


class _Connection:
    """What ``http.client.HTTPConnection`` does, in virtual time."""

    def __init__(self) -> None:
        self.now_s = 5000.0
        self.sock: object | None = None
        self.done: list[str] = []
        self.asked: tuple[Any, ...] = ()

    def clock(self) -> float:
        return self.now_s

    def take(self, step: str) -> None:
        self.done.append(step)
        self.now_s += _TAKES_S[step]

    def connect(self) -> None:
        self.take("connect")
        self.sock = object()

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if self.sock is None:  # as the real one does
            self.connect()
        assert self.done[-1] != "wait", (
            "the next request was sent before the answer to the last was read: read() it"
        )
        self.take("send")
        self.asked = (method, url, body, headers)

    def getresponse(self) -> _Response:
        assert self.done and self.done[-1] == "send", (
            "getresponse() was called before request(...): ask first"
        )
        self.take("wait")
        return _Response(self)

    def close(self) -> None:
        self.sock = None


def _run(timed_call: Callable[..., Any], connection: _Connection) -> dict[str, Any]:
    path, body, headers = _CALL
    got = ask(
        "timed_call(connection, path, body, headers, clock)",
        timed_call,
        connection,
        path,
        body,
        headers,
        connection.clock,
    )
    assert isinstance(got, tuple) and len(got) == 2, (
        f"timed_call returned {got!r}: return two things, answer and ms"
    )
    answer, times_ms = got
    assert answer == _ANSWER, f"the answer is {answer!r}: the bytes that read() gave"
    assert isinstance(times_ms, dict) and list(times_ms) == list(NAMES), (
        f"ms is {times_ms!r}: a dict with the keys {', '.join(NAMES)}, in this order"
    )
    return times_ms


def _asks(timed_call: Callable[..., Any]) -> None:
    connection = _Connection()
    _run(timed_call, connection)
    assert connection.asked == ("POST", *_CALL), (
        f"request(...) got {connection.asked!r:.120}: it is 'POST', the path, the body and the headers"
    )
    steps = connection.done
    assert steps.count("send") == 1, (
        f"one call sent {steps.count('send')} requests: the server does the work twice"
    )
    assert steps.count("connect") == 1, f"one call connected {steps.count('connect')} times"


def _splits(timed_call: Callable[..., Any]) -> None:
    got = _run(timed_call, _Connection())
    right = {name: 1e3 * seconds for name, seconds in _TAKES_S.items()}
    since = dict(zip(NAMES, (31.25, 33.203125, 95.703125, 103.515625), strict=True))
    mistakes: dict[str, Mapping[str, float]] = {
        "in seconds: a second has 1000 ms": _TAKES_S,
        "in microseconds: a second has 1000 ms": {name: 1e3 * ms for name, ms in right.items()},
        "negative: a part is its end minus its beginning": {
            name: -ms for name, ms in right.items()
        },
        "times since the beginning: each counts all earlier parts again; take differences": since,
    }
    for mistake, values in mistakes.items():
        assert not all(equal(got[name], values[name]) for name in NAMES), (
            f"the milliseconds are {mistake}"
        )
    hidden = equal(got["connect"], 0) and equal(got["send"], right["connect"] + right["send"])
    assert not hidden, (
        "send has the time of connect: request() opens the connection by itself; call connect() before it, or a far "
        "server looks like a slow network card"
    )
    assert not equal(got["wait"], right["wait"] + right["receive"]), (
        "wait has the time of receive: the answer's last byte is there after read(), its first one after getresponse()"
    )
    assert not equal(got["send"], right["send"] + right["wait"]), (
        "send has the time of wait: request(...) returns when the bytes are sent; read the clock before getresponse()"
    )
    for name in NAMES:
        assert equal(got[name], right[name]), (
            f"{name} took {right[name]:g} ms by the clock that timed_call was given, ms says {got[name]!r}"
        )


def _keeps_open(timed_call: Callable[..., Any]) -> None:
    connection = _Connection()
    _run(timed_call, connection)
    assert connection.sock is not None, (
        "timed_call closed the connection: it belongs to the caller, whose next request pays for a new one"
    )
    got = _run(timed_call, connection)
    assert connection.done.count("connect") == 1, (
        "the connection was open, and timed_call opened it again: each request pays a way there and back more, and the "
        "old socket is left behind"
    )
    assert equal(got["connect"], 0), (
        f"the connection was open, and connect says {got['connect']!r}: it took 0 ms"
    )
    assert equal(got["wait"], 62.5), (
        f"on an open connection wait says {got['wait']!r}, it took 62.5 ms"
    )


# ------------------------------------------------------------------------------ what an offer gives


_PARTS_US = {"client": 100.0, "wire": 300.0, "parse": 50.0, "infer": 50.0}


def _of(gains: Callable[..., Any], **offer: float) -> Any:
    given = dict(_PARTS_US)
    got = ask(f"gains(parts_us, {{'it': {offer}}})", gains, given, {"it": offer})
    assert given == _PARTS_US, "gains changed parts_us: the next offer starts from another request"
    assert isinstance(got, dict) and list(got) == ["it"], (
        f"gains returned {got!r}: a dict, name of the offer -> gain"
    )
    return got["it"]


def _recognised(got: Any, right: float, told: str, mistakes: Mapping[str, float]) -> None:
    for mistake, value in mistakes.items():
        assert not equal(got, value), f"{told} the gain is {float(got):.3g}, {mistake}"
    assert equal(got, right), (
        f"{told} the gain is {got!r}, it is old total over new total, {right:.4f}"
    )


def _one_part(gains: Callable[..., Any]) -> None:
    told = "infer has 50 of 500 us and gets 4 times faster:"
    mistakes = {
        "times faster itself: the other 450 us stay": 4,
        "new over old: turn it round": 462.5 / 500,
        "the share of the time that is saved: the gain is old over new": 37.5 / 500,
        "the saved microseconds: the gain is old over new": 37.5,
        "the new total: the gain is old over new": 462.5,
        "as if infer took no time at all: it takes a quarter": 500 / 450,
        "as if infer got 4 times slower: divide": 500 / 650,
        "that of infer alone: the parts that the offer does not name count too": 500 / 12.5,
    }
    _recognised(_of(gains, infer=4), 500 / 462.5, told, mistakes)
    got = _of(gains)
    assert equal(got, 1), f"an offer that changes nothing has the gain {got!r}: 1"
    got = _of(gains, infer=float("inf"))
    assert equal(got, 500 / 450), (
        f"infer gets infinitely fast and the gain is {got!r}: 500 us become 450"
    )


def _several_parts(gains: Callable[..., Any]) -> None:
    mistakes = {
        "the gains of the two parts multiplied: the second one shortens a request that is shorter already": (
            500 / 350 * 500 / 450
        ),
        "the gains of the two parts added up": 500 / 350 + 500 / 450,
        "that of one of the two parts": 500 / 350,
        "that of one of the two": 500 / 450,
    }
    _recognised(
        _of(gains, wire=2, client=2),
        500 / 300,
        "wire (300 us) and client (100 us) get 2 times faster:",
        mistakes,
    )
    told = "wire gets 1.5 times faster and client 5 times slower (0.2):"
    _recognised(
        _of(gains, wire=1.5, client=0.2),
        500 / 800,
        told,
        {"and may be below 1: that offer makes it slower": 1},
    )


def _best_first(gains: Callable[..., Any]) -> None:
    offers = {"a": {"infer": 2}, "b": {"wire": 2}, "c": {"client": 0.5}, "d": {"client": 4}}
    got = ask("gains(parts_us, four offers)", gains, dict(_PARTS_US), offers)
    assert isinstance(got, dict) and set(got) == set(offers), (
        f"gains of the offers a, b, c and d returned {got!r}"
    )
    order = list(got)
    assert order != ["c", "a", "d", "b"], (
        "the worst offer stands first: the best one is what somebody reads"
    )
    assert order != list("abcd"), (
        "the offers stand in the order in which they came: the best one first"
    )
    assert order == ["b", "d", "a", "c"], (
        f"the offers stand as {order}: by their gain, the largest first"
    )
