"""Check of the exercise "write the router" (notebook 10): sticky, weighted, and calm when the
weights change."""

import builtins
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from unittest import mock

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Route = Callable[[str, Mapping[str, float], bytes], str]
KEY = bytes(range(16))
OTHER = bytes(range(100, 116))
CLIENTS = [
    *(f"user-{i}" for i in range(4000)),
    *(f"{i * 7919:08d}@example.org" for i in range(3000)),
    *(f"zoë {i:x}" for i in range(1000)),
]
FIVE_SIGMA = 5.0
MOST_MOVES = 1.25  # times as many clients as must; one draw per version needs about 1.1 at most


def check_router(route: Route) -> None:
    """Check ``route(client, weights, key)``.

    Right is: one of the versions, the same one for a client always and in every process, each
    version with its share of the clients within five standard deviations, another split for another
    key; and when the weights change, hardly more clients than must get another version.

    Raises:
        AssertionError: Says what users or the test would suffer from the mistake.
    """
    judge(
        "router",
        route,
        Part(
            "returns one of the versions",
            _answers,
            ("Return a key of weights, and leave weights as it was.",),
        ),
        Part(
            "sticky in every process",
            _sticky_everywhere,
            (
                "Nothing but the client, the key and the version may go into the number that decides.",
                "hashlib.blake2b(text.encode(), digest_size=8, key=key).digest() is the same in every process.",
            ),
        ),
        Part(
            "weighted",
            _shares,
            (
                "Let each version draw its own number u for the client; which score of u and w wins with chance w?",
                "The version with the largest u ** (1 / weight) wins; u lies above 0 and below 1.",
            ),
        ),
        Part(
            "calm when the weights change",
            _calm,
            (
                "With borders in a row, one border that moves moves all behind it.",
                "Hash version and client together: each version's number then stays, whatever the others weigh.",
            ),
        ),
        Part("keyed", _keys, ("blake2b takes key=key.",)),
    )


def _ask(route: Route, client: str, weights: Mapping[str, float], key: bytes = KEY) -> str:
    given = dict(weights)
    got: str = ask(f"route({client!r}, {given}, key)", route, client, given, key)
    assert given == weights, (
        "route changed the dict of weights that it was given: the next client gets other shares"
    )
    try:
        known = got in weights
    except TypeError:  # cannot be hashed
        known = False
    assert known, (
        f"route({client!r}, {weights}, key) returned {got!r}: return one of the versions {', '.join(weights)}"
    )
    return got


def _all(
    route: Route, weights: Mapping[str, float], key: bytes = KEY, clients: int = len(CLIENTS)
) -> list[str]:
    return [_ask(route, client, weights, key) for client in CLIENTS[:clients]]


def _answers(route: Route) -> None:
    for weights in ({"1": 1.0}, {"1": 0.5, "2": 0.5}, {"1": 0.5, "2": 0.3, "3": 0.2}):
        for client in ("anna", "", "zoë"):
            _ask(route, client, weights)


def _sticky(route: Route) -> None:
    weights = {"1": 0.5, "2": 0.5}
    state = _dice()
    first, again = (_all(route, weights, clients=200) for _ in range(2))
    changed = [client for client, a, b in zip(CLIENTS, first, again, strict=False) if a != b]
    assert not changed, (
        f"{len(changed)} of 200 clients got another version when they came back, {changed[0]!r} for example: the "
        "version must follow from the client's name, not from chance or from who asked before"
    )
    assert state == _dice(), (
        "route drew from the random numbers of the whole process, or seeded them: another process has others, and "
        "everybody else's follow from yours now; make the number from the client's name alone"
    )


def _sticky_everywhere(route: Route) -> None:
    _sticky(route)
    _every_process(route)


def _dice() -> object:
    return random.getstate(), str(np.random.get_state())


def _every_process(route: Route) -> None:
    """Whether it calls the built-in hash(): of a str it differs between processes
    (PYTHONHASHSEED)."""
    called = []
    here = threading.current_thread()
    true_hash = builtins.hash

    def spy(value: object, /) -> int:
        if threading.current_thread() is here:
            called.append(value)
        return true_hash(value)

    with mock.patch("builtins.hash", spy):
        _all(route, {"1": 0.5, "2": 0.5}, clients=50)
    assert not called, (
        f"you call hash({called[0]!r:.40}): Python salts the hash of a str anew in every process, so two servers, or "
        "one after a restart, send the same client to different versions; take hashlib.blake2b"
    )


def _shares(route: Route) -> None:
    seen = {}
    for weights in (
        {"1": 0.5, "2": 0.5},
        {"1": 0.95, "2": 0.05},
        {"1": 0.2, "2": 0.3, "3": 0.5},
        {"7": 1.0},
    ):
        counts = Counter(_all(route, weights))
        n = len(CLIENTS)
        seen[str(weights)] = counts
        assert len(counts) > 1 or len(weights) == 1, (
            f"weights {weights}: all {n:,} clients got version {next(iter(counts))}; the smaller weights get nobody"
        )
        for version, weight in weights.items():
            got = counts[version] / n
            bound = FIVE_SIGMA * math.sqrt(weight * (1 - weight) / n)
            assert abs(got - weight) <= bound, (
                f"weights {weights}: version {version} got {got:.1%} of {n:,} clients; by chance {weight - bound:.1%} "
                f"to {weight + bound:.1%} would do" + _why(weights, counts)
            )


def _why(weights: Mapping[str, float], counts: Mapping[str, int]) -> str:
    even = all(abs(counts[version] / len(CLIENTS) - 1 / len(weights)) < 0.03 for version in weights)
    return (
        ": you split evenly, whatever the weights are"
        if even and len(set(weights.values())) > 1
        else ""
    )


def _any_order(route: Route) -> None:
    weights = {"1": 0.5, "2": 0.3, "3": 0.2}
    turned = dict(reversed(weights.items()))
    moved = _moved(_all(route, weights, clients=1000), _all(route, turned, clients=1000))
    assert not moved, (
        f"the same weights in another order, and {moved:.0%} of the clients got another version: another server may "
        "read its configuration in another order; what a version draws must not depend on its place in the dict"
    )


def _keys(route: Route) -> None:
    weights = {"1": 0.8, "2": 0.2}
    first = _all(route, weights)
    second = _all(route, weights, OTHER)
    assert first != second, (
        "another key, and every client got the same version: the same people would try every new version; put the key "
        "into the hash"
    )
    both = sum(a == b == "2" for a, b in zip(first, second, strict=True)) / len(CLIENTS)
    bound = FIVE_SIGMA * math.sqrt(0.04 * 0.96 / len(CLIENTS))
    assert abs(both - 0.04) <= bound, (
        f"of two experiments with 20 % each, {both:.1%} of the clients are in the new arm of both; independent keys "
        f"give {0.04 - bound:.1%} to {0.04 + bound:.1%}: the two splits depend on each other"
    )


def _calm(route: Route) -> None:
    _any_order(route)
    _moves(route)


def _moves(route: Route) -> None:
    for old, new in (
        ({"1": 0.9, "2": 0.1}, {"1": 0.7, "2": 0.3}),
        ({"1": 0.5, "2": 0.5}, {"1": 0.4, "2": 0.4, "3": 0.2}),
        ({"1": 0.4, "2": 0.3, "3": 0.3}, {"1": 0.2, "2": 0.3, "3": 0.5}),
    ):
        before = _all(route, old)
        after = _all(route, new)
        must = sum(max(0.0, old.get(version, 0.0) - weight) for version, weight in new.items())
        moved = _moved(before, after)
        bound = MOST_MOVES * must + FIVE_SIGMA * math.sqrt(must * (1 - must) / len(CLIENTS))
        assert moved <= bound, (
            f"weights {old} became {new}: {must:.0%} of the clients must get another version, and {moved:.0%} did; a "
            "user who goes back and forth sees two versions. Let each version draw its own number for the client"
        )


def _moved(before: list[str], after: list[str]) -> float:
    return sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
