"""Check of the exercise "write the LRU cache" (notebook 03)."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.serving.cache import ModelCache

_MISS = "a get that misses must change nothing"


def check_lru(cache_class: Callable[[int], Any]) -> None:
    """Check ``cache_class(capacity)`` with ``get(key) -> value or None`` and ``put(key, value)``.

    Raises:
        AssertionError: With the shortest story that shows the mistake.
    """
    judge(
        "lru",
        cache_class,
        Part(
            "keeps and replaces",
            _keeps_and_replaces,
            (
                "A dict made in __init__ holds the values.",
                "`key in self.items` asks for the key, not for its value.",
            ),
        ),
        Part(
            "holds exactly its capacity",
            _holds_exactly_its_capacity,
            (
                "Only a put of a new key into a full cache evicts.",
                "In put: `if key not in self.items and len(self.items) == self.capacity:` evict one.",
            ),
        ),
        Part(
            "evicts the least recently used",
            _evicts_the_least_recently_used,
            (
                "A dict keeps its keys in the order in which they came: the first is the oldest.",
                "Take the key out and put it in again to make it the newest, in get and in put.",
                "`self.items[key] = self.items.pop(key)` makes it the newest, `next(iter(self.items))` is the oldest.",
            ),
        ),
        Part("agrees with LRU on random traces", _agrees_on_random_traces),
    )


def _after(cache_class: Callable[[int], Any], capacity: int, story: str) -> dict[str, Any]:
    """Play ``"a b get:a c"`` (a bare key is put with the value KEY1) and return what is still in
    the cache, by key."""
    cache, keys = ask(f"creating a cache of capacity {capacity}", cache_class, capacity), []
    for word in story.split():
        verb, _, key = word.rpartition(":")
        if verb == "get":
            ask(f"get({key!r}) after {story!r}", cache.get, key)
        else:
            value = f"{key}2" if verb == "again" else f"{key}1"
            ask(f"put({key!r}, {value!r}) in {story!r}", cache.put, key, value)
            keys.append(key)
    found = {
        key: ask(f"get({key!r}) after {story!r}", cache.get, key) for key in dict.fromkeys(keys)
    }
    return {key: value for key, value in found.items() if value is not None}


def _keeps_and_replaces(cache_class: Callable[[int], Any]) -> None:
    cache = ask("creating a cache of capacity 2", cache_class, 2)
    try:
        missing = cache.get("nobody")
    except LookupError as error:
        raise AssertionError(
            f"get of a missing key raised {type(error).__name__}: a miss is no error, return None"
        ) from error
    assert missing is None, f"get of a missing key returned {missing!r}: it must return None"
    ask("put('a', 'a1')", cache.put, "a", "a1")
    got = ask("get('a')", cache.get, "a")
    assert got == "a1", f"after put('a', 'a1'), get('a') returned {got!r}"
    ask("put('a', 'a2')", cache.put, "a", "a2")
    got = ask("get('a')", cache.get, "a")
    assert got == "a2", (
        f"after put('a', 'a1') and put('a', 'a2'), get('a') returned {got!r}: put must replace the value"
    )
    ask("put('zero', 0)", cache.put, "zero", 0)
    got = ask("get('zero')", cache.get, "zero")
    assert got == 0 and got is not None, (
        f"after put('zero', 0), get('zero') returned {got!r}: ask whether the key is there, not if its value is true"
    )
    other = ask("creating a second cache", cache_class, 2)
    assert ask("get on a second cache", other.get, "a") is None, (
        "a second cache already holds 'a': two caches share their storage; create it in __init__, not in the class body"
    )


def _holds_exactly_its_capacity(cache_class: Callable[[int], Any]) -> None:
    for capacity in (1, 2, 3):
        story = " ".join("abc"[:capacity])
        kept = _after(cache_class, capacity, story)
        assert len(kept) == capacity, (
            f"a cache of capacity {capacity} holds only {sorted(kept)} after putting {story.split()}: "
            "it evicts one too early; evict only when a new key finds the cache full"
        )
    kept = _after(cache_class, 2, "a b get:x")
    assert len(kept) == 2, f"after 'a', 'b' and a get of 'x', only {sorted(kept)} is left: {_MISS}"
    kept = _after(cache_class, 2, "a b c")
    assert len(kept) <= 2, (
        f"a cache of capacity 2 holds {len(kept)} values after three puts: it evicts one too late, or never"
    )
    assert "c" in kept, (
        "after 'a', 'b', 'c' into capacity 2, the new key 'c' is not there: evict an old one, store the new"
    )
    assert len(kept) == 2, (
        f"putting 'c' into the full cache ['a', 'b'] left only {sorted(kept)}: evict one, not all"
    )
    assert kept == {"b": "b1", "c": "c1"}, (
        "after 'a', 'b', 'c' into capacity 2, 'a' is still there and 'b' is gone: "
        "the most recently used was evicted, the least recently used must go"
    )
    for again, other in ("ab", "ba"):
        kept = _after(cache_class, 2, f"a b again:{again}")
        assert other in kept, (
            f"putting {again!r} again, into a full cache that holds it, threw out {other!r}: replacing needs no room"
        )


def _evicts_the_least_recently_used(cache_class: Callable[[int], Any]) -> None:
    kept = _after(cache_class, 2, "a b get:a c")
    assert "a" in kept, (
        "'a' was read just before 'c' came, and was evicted all the same: get must make its key the most recently used "
        "(without that the cache is first in, first out)"
    )
    kept = _after(cache_class, 2, "a b again:a c")
    assert "a" in kept, (
        "'a' was written again just before 'c' came, and was evicted all the same: "
        "put of a key that is there must make it the most recently used, too"
    )
    kept = _after(cache_class, 2, "a get:a get:a get:a b get:b c")
    assert "b" in kept, (
        "'a' was read three times long ago, 'b' once just now, and 'b' was evicted: "
        "that is least FREQUENTLY used; only the time of the last use counts"
    )
    kept = _after(cache_class, 2, "a b get:x c")
    assert set(kept) == {"b", "c"}, (
        f"after 'a', 'b', a miss on 'x' and 'c', capacity 2 holds {sorted(kept)}: {_MISS}"
    )


def _agrees_on_random_traces(cache_class: Callable[[int], Any]) -> None:
    for length in (6, 10, 20, 60):  # short traces first: the first that fails is a readable one
        for seed in range(60):
            rng = random.Random(1000 * length + seed)
            capacity = rng.randint(1, 4)
            cache = cache_class(capacity)
            right = ModelCache(capacity)
            done = list[str]()
            for number in range(length):
                key = rng.choice("abcdef")
                told = ", ".join(done) or "nothing"
                if rng.random() < 0.5:
                    ask(f"put({key!r}, ...) after {told}", cache.put, key, number)
                    right.put(key, np.int64(number))
                    done.append(f"put {key}")
                    continue
                wanted = right.get(key)
                got = ask(f"get({key!r}) after {told}", cache.get, key)
                assert got == wanted, (
                    f"capacity {capacity}: after {told}, get({key!r}) returned {got!r}, LRU gives {wanted!r}"
                )
                done.append(f"get {key}")
