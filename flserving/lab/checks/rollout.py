"""Check of the exercise "write the router" (notebook 10): sticky, weighted, and calm when the weights change."""

import builtins
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from unittest import mock

import numpy as np

from flserving.lab.checks.asking import ask

Route = Callable[[str, Mapping[str, float], bytes], str]
KEY, OTHER = bytes(range(16)), bytes(range(100, 116))
CLIENTS = [
    *(f"user-{i}" for i in range(4000)),
    *(f"{i * 7919:08d}@example.org" for i in range(3000)),
    *(f"zoë {i:x}" for i in range(1000)),
]
FIVE_SIGMA = 5.0
MOST_MOVES = 1.25  # times as many clients as must; one draw per version needs about 1.1 at most


def check_router(route: Route) -> None:
    """Check ``route(client, weights, key)``.

    Right is: one of the versions, the same one for a client always and in every process, each version with its share
    of the clients within five standard deviations, another split for another key; and when the weights change, hardly
    more clients than must get another version.

    Raises:
        AssertionError: Says what users or the test would suffer from the mistake.
    """
    for step in (_answers, _sticky, _every_process, _shares, _any_order, _keys, _moves):
        step(route)


def _ask(route: Route, client: str, weights: Mapping[str, float], key: bytes = KEY) -> str:
    given = dict(weights)
    got: str = ask(f"route({client!r}, {given}, key)", route, client, given, key)
    assert given == weights, "route changed the dict of weights that it was given: the next client gets other shares"
    try:
        known = got in weights
    except TypeError:  # cannot be hashed
        known = False
    assert known, f"route({client!r}, {weights}, key) returned {got!r}: return one of the versions {', '.join(weights)}"
    return got


def _all(route: Route, weights: Mapping[str, float], key: bytes = KEY, clients: int = len(CLIENTS)) -> list[str]:
    return [_ask(route, client, weights, key) for client in CLIENTS[:clients]]


def _answers(route: Route) -> None:
    for weights in ({"1": 1.0}, {"1": 0.5, "2": 0.5}, {"1": 0.5, "2": 0.3, "3": 0.2}):
        for client in ("anna", "", "zoë"):
            _ask(route, client, weights)


def _sticky(route: Route) -> None:
    weights, state = {"1": 0.5, "2": 0.5}, _dice()
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


def _dice() -> object:
    return random.getstate(), str(np.random.get_state())


def _every_process(route: Route) -> None:
    """Whether it calls the built-in hash(): of a str it differs between processes (PYTHONHASHSEED)."""
    called, here = [], threading.current_thread()
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
    for weights in ({"1": 0.5, "2": 0.5}, {"1": 0.95, "2": 0.05}, {"1": 0.2, "2": 0.3, "3": 0.5}, {"7": 1.0}):
        counts, n = Counter(_all(route, weights)), len(CLIENTS)
        seen[str(weights)] = counts
        assert len(counts) > 1 or len(weights) == 1, (
            f"weights {weights}: all {n:,} clients got version {next(iter(counts))}; the smaller weights get nobody"
        )
        for version, weight in weights.items():
            got, bound = counts[version] / n, FIVE_SIGMA * math.sqrt(weight * (1 - weight) / n)
            assert abs(got - weight) <= bound, (
                f"weights {weights}: version {version} got {got:.1%} of {n:,} clients; by chance {weight - bound:.1%} "
                f"to {weight + bound:.1%} would do" + _why(weights, counts)
            )


def _why(weights: Mapping[str, float], counts: Mapping[str, int]) -> str:
    even = all(abs(counts[version] / len(CLIENTS) - 1 / len(weights)) < 0.03 for version in weights)
    return ": you split evenly, whatever the weights are" if even and len(set(weights.values())) > 1 else ""


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
    first, second = _all(route, weights), _all(route, weights, OTHER)
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


def _moves(route: Route) -> None:
    for old, new in (
        ({"1": 0.9, "2": 0.1}, {"1": 0.7, "2": 0.3}),
        ({"1": 0.5, "2": 0.5}, {"1": 0.4, "2": 0.4, "3": 0.2}),
        ({"1": 0.4, "2": 0.3, "3": 0.3}, {"1": 0.2, "2": 0.3, "3": 0.5}),
    ):
        before, after = _all(route, old), _all(route, new)
        must = sum(max(0.0, old.get(version, 0.0) - weight) for version, weight in new.items())
        moved = _moved(before, after)
        bound = MOST_MOVES * must + FIVE_SIGMA * math.sqrt(must * (1 - must) / len(CLIENTS))
        assert moved <= bound, (
            f"weights {old} became {new}: {must:.0%} of the clients must get another version, and {moved:.0%} did; a "
            "user who goes back and forth sees two versions. Let each version draw its own number for the client"
        )


def _moved(before: list[str], after: list[str]) -> float:
    return sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
