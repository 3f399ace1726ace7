"""Two caches: which models stay in memory, and which predictions need no model."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from flserving import forks
from flserving.errors import (
    DeadlineExceededError,
    ModelTooLargeError,
    OverloadedError,
    check_number,
)
from flserving.models.weights import nbytes_of

Clock = Callable[[], float]
V = TypeVar("V", bound=Any)  # has nbytes


class Lease:
    """A held model, and how many use it now."""

    __slots__ = ("nbytes", "pins", "value")

    def __init__(self, value: Any, nbytes: int) -> None:
        self.value = value
        self.nbytes = nbytes
        self.pins = 0


class ModelCache:
    """Least-recently-used models, bounded by count and by bytes, never above either.

    A model in use is *pinned* (:meth:`lease`) and stays in memory; of the others the coldest goes.
    Who needs room while everything is pinned waits for it, until the deadline. Concurrent misses of
    one key load once. A load has its room before it reads a byte, so loads under way count like
    models that are here, and what can never fit is refused unread. A load that fails gives its room
    back and is not remembered.

    Args:
        max_size: Most models held. ``max_bytes``: most bytes held; None means no byte budget.

    Thread-safe; a hit costs one short lock (about 0.5 us).

    Example::

        cache = ModelCache(max_size=2)
        with cache.lease("v1", load=lambda: load_engine(source, "v1", config)) as engine:
            engine.predict(rows)
    """

    def __init__(
        self, max_size: int = 5, max_bytes: int | None = None, clock: Clock = time.monotonic
    ) -> None:
        check_number("max_size", max_size, 1, math.inf, whole=True)
        if max_bytes is not None:
            check_number("max_bytes", max_bytes, 1, math.inf, whole=True)
        self.max_size = max_size
        self.max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[Hashable, Lease] = OrderedDict()  # coldest first
        self._leaving: set[Lease] = set()  # dropped while in use: counted until released
        self._arriving: set[Lease] = set()  # the room of loads under way
        self._loading: dict[Hashable, Future[None]] = {}
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        forks.in_child(self, ModelCache._begin_anew)
        self.nbytes = self.hits = self.misses = self.evictions = self.loads = self.failed_loads = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def items(self) -> list[tuple[Any, Any]]:
        """(key, model), coldest first; not a use."""
        with self._lock:
            return [(key, entry.value) for key, entry in self._entries.items()]

    def get(self, key: Hashable) -> Any | None:
        """The model under ``key``, now the most recently used; None on a miss."""
        with self._lock:
            entry = self._hit(key)
            return entry and entry.value

    def put(self, key: Hashable, value: Any, timeout_s: float = 0) -> None:
        """Hold ``value``, evicting the coldest until it fits; waits ``timeout_s`` for room. Raises
        as :meth:`load`."""
        with self._lock:
            place = Lease(None, 0)
            self._reserve(key, place, nbytes_of(value), self._clock() + timeout_s)
            self._arrive(key, place, value)

    def clear(self, keys: Iterable[Hashable] | None = None) -> None:
        """Drop the models under ``keys``, all of them when not given; one in use goes when it is
        released."""
        with self._lock:
            for key in self._entries.keys() & (self._entries if keys is None else keys):
                self._drop(key)

    @contextmanager
    def lease(
        self,
        key: Hashable,
        load: Callable[[], Any],
        timeout_s: float = 60,
        size: Callable[[], int] | None = None,
    ) -> Iterator[Any]:
        """Pin the model under ``key`` for the ``with`` block, loading it on a miss (see
        :meth:`load`)."""
        entry = self.acquire(key) or self.load(key, load, timeout_s, size)
        try:
            yield entry.value
        finally:
            self.release(entry)

    def acquire(self, key: Hashable) -> Lease | None:
        """Pin and return the entry under ``key``; None on a miss. Every entry must go back to
        :meth:`release`."""
        with self._lock:
            entry = self._hit(key)
            if entry is not None:
                entry.pins += 1
            return entry

    def release(self, entry: Lease) -> None:
        """Unpin an entry."""
        with self._lock:
            entry.pins -= 1
            if not entry.pins:
                if entry in self._leaving:
                    self._leaving.remove(entry)
                    self.nbytes -= entry.nbytes
                self._released.notify_all()

    def load(
        self,
        key: Hashable,
        load: Callable[[], Any],
        timeout_s: float = 60,
        size: Callable[[], int] | None = None,
    ) -> Lease:
        """After a miss: run ``load`` once however many callers wait for ``key``; return its entry,
        pinned.

        Args:
            size: Tells the model's bytes before they are read, so that the room for them is free by
                then. None: a place is reserved, and the bytes are counted once they are here.

        Raises:
            DeadlineExceededError: Another caller's load took longer than ``timeout_s``.
            OverloadedError: No room in time.
            ModelTooLargeError: It exceeds the byte budget.
            What ``load`` raises: to everyone who waited for it.
        """
        deadline = self._clock() + timeout_s
        entry = self._join(key, timeout_s, deadline)
        if entry is not None:
            return entry
        mine = self._loading[key]
        place = Lease(None, 0)
        try:
            nbytes = 0 if size is None else size()
            with self._lock:
                self._reserve(key, place, nbytes, deadline)
            value = load()
            with self._lock:
                self._reserve(key, place, nbytes_of(value), deadline)  # what is here is what counts
                self._arrive(key, place, value)
                place.pins += 1
                self.loads += 1
                del self._loading[key]
            mine.set_result(None)
            return place
        except BaseException as error:
            with self._lock:
                self._give_back(place)
                self.failed_loads += 1
                del self._loading[key]
            interrupted = OverloadedError(f"the load of {key!r} was interrupted: try again")
            mine.set_exception(error if isinstance(error, Exception) else interrupted)
            raise
        finally:
            del mine  # as in _join

    def _join(self, key: Hashable, timeout_s: float, deadline: float) -> Lease | None:
        """Pin the entry that another caller has loaded or is loading; None where nobody does: the
        load is ours now."""
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None:
                    entry.pins += 1
                    return entry
                flight = self._loading.get(key)
                if flight is None:
                    self._loading[key] = Future()
                    return None
            try:
                flight.result(max(0.0, deadline - self._clock()))
            except TimeoutError as error:
                # the load itself ran into a deadline: it is the leader's, not ours
                if flight.done():
                    continue
                raise DeadlineExceededError(
                    f"loading {key!r} took longer than {timeout_s * 1e3:.0f} ms: try again, or raise timeout_ms"
                ) from error
            finally:
                # an error's frames must not hold what holds the error: that circle would keep
                # models alive
                del flight

    def stats(self) -> dict[str, int]:
        with self._lock:
            names = ("max_size", "hits", "misses", "evictions", "loads", "failed_loads", "nbytes")
            return {"size": len(self), "max_bytes": self.max_bytes or 0} | {
                name: getattr(self, name) for name in names
            }

    def _begin_anew(self) -> None:
        """In a forked child: keep the models; nobody uses them, and nobody loads any."""
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._entries = OrderedDict(
            (key, Lease(entry.value, entry.nbytes)) for key, entry in self._entries.items()
        )
        self._leaving = set()
        self._arriving = set()
        self._loading = {}
        self.nbytes = sum(entry.nbytes for entry in self._entries.values())

    # The rest runs under the lock.
    def _hit(self, key: Hashable) -> Lease | None:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def _reserve(self, key: Hashable, place: Lease, nbytes: int, deadline: float) -> None:
        """Give ``place`` so many bytes, as soon as they are free; a new one gets itself, too."""
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise ModelTooLargeError(
                f"{key!r} needs {nbytes:,} B of {self.max_bytes:,} B in all: raise cache_bytes"
            )
        while not self._make_room(key, place, nbytes):
            left_s = deadline - self._clock()
            if left_s <= 0:
                used = f"{self.nbytes:,} B in memory, too many of them in use"
                raise OverloadedError(
                    f"no room for {key!r}: {used}: raise cache_size or cache_bytes"
                )
            self._released.wait(left_s)
        self._arriving.add(place)
        self.nbytes += nbytes - place.nbytes
        place.nbytes = nbytes

    def _arrive(self, key: Hashable, place: Lease, value: Any) -> None:
        """What was to come is here; it takes the place of what ``key`` held."""
        if key in self._entries:
            self._drop(key)
        self._arriving.remove(place)
        place.value = value
        self._entries[key] = place
        self._released.notify_all()

    def _give_back(self, place: Lease) -> None:
        """What was to come does not."""
        if place in self._arriving:
            self._arriving.remove(place)
            self.nbytes -= place.nbytes
            self._released.notify_all()

    def _make_room(self, key: Hashable, place: Lease, nbytes: int) -> bool:
        """Drop what ``key`` holds now, and the coldest until ``nbytes`` fit; if they cannot, drop
        nothing."""
        size = len(self._entries) + len(self._leaving) + len(self._arriving | {place})
        held = self.nbytes + nbytes - place.nbytes
        leave = set[Hashable]()
        # a stable sort: then coldest first
        for candidate in sorted(self._entries, key=lambda k: k != key):
            if self._fits(size, held):
                break
            entry = self._entries[candidate]
            if not entry.pins:
                leave.add(candidate)
                size -= 1
                held -= entry.nbytes
        if not self._fits(size, held):
            return False
        for candidate in (leave | {key}) & self._entries.keys():
            self.evictions += candidate != key
            self._drop(candidate)
        return True

    def _fits(self, size: int, nbytes: int) -> bool:
        return size <= self.max_size and (self.max_bytes is None or nbytes <= self.max_bytes)

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key)
        if entry.pins:
            self._leaving.add(entry)
        else:
            self.nbytes -= entry.nbytes


class _Shelf:
    """The keys of one owner, coldest first, and the bytes under them."""

    __slots__ = ("keys", "nbytes", "owner")

    def __init__(self, owner: Hashable) -> None:
        self.owner = owner
        self.keys: OrderedDict[Hashable, None] = OrderedDict()
        self.nbytes = 0


class PredictionCache(Generic[V]):
    """Predictions by what determines them, least recently used first out, bounded in bytes, with an
    age limit.

    Correct by construction: the *key* holds everything that the answer depends on (model,
    preprocessing, head, output policy, client scope, and a 256-bit digest of the input bytes), so a
    promotion changes the key and needs no invalidation. Only the input is hashed; the rest is
    compared in clear.

    Concurrent misses of one key are computed once: :meth:`begin` makes one caller the *leader*, who
    must call :meth:`finish`; the others wait on its future. Source: single flight (Go's x/sync;
    Clipper, NSDI 2017, section 4.2).

    What must go is the coldest entry of an *owner* with more than its share: the budget through the
    number of owners. So one caller's thousand inputs push out its own, and nobody else's; where
    there is one owner, it is least recently used. Source: the shares of fair queueing (see
    ``batching``), on memory.

    Args:
        max_bytes: Byte budget, overhead included. ``ttl_s``: age at which an entry is forgotten; 0
            means never.
    """

    # key, digest, node and objects around one entry: 750 to 900 measured with tracemalloc
    OVERHEAD = 1024

    def __init__(self, max_bytes: int, ttl_s: float = 0, clock: Clock = time.monotonic) -> None:
        check_number("max_bytes", max_bytes, 1, math.inf, whole=True)
        check_number("ttl_s", ttl_s, 0, math.inf)
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[Hashable, tuple[V, float, int, _Shelf]] = {}
        # by owner, in the order in which they are asked
        self._shelves: OrderedDict[Hashable, _Shelf] = OrderedDict()
        self._flights: dict[Hashable, Future[V]] = {}
        self._lock = threading.Lock()
        forks.in_child(self, PredictionCache._begin_anew)
        self.nbytes = self.hits = self.misses = self.shared = self.evictions = self.expirations = 0

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, key: Hashable) -> tuple[V | None, Future[V] | None, bool]:
        """(value, None, False) on a hit; (None, future, leads) on a miss: who leads computes, and
        calls `finish`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                value, born_s, _, shelf = entry
                if not self.ttl_s or self._clock() - born_s < self.ttl_s:
                    shelf.keys.move_to_end(key)
                    self.hits += 1
                    return value, None, False
                self._forget(key)
                self.expirations += 1
            flight = self._flights.get(key)
            if flight is not None:
                self.shared += 1
                return None, flight, False
            self.misses += 1
            flight = self._flights[key] = Future()
            return None, flight, True

    def finish(
        self,
        key: Hashable,
        flight: Future[V],
        value: V | None = None,
        error: Exception | None = None,
        owner: Hashable = None,
    ) -> None:
        """The leader's duty: keep ``value`` (if it fits the budget) as ``owner``'s, or pass on
        ``error``, and wake who waits."""
        with self._lock:
            self._flights.pop(key, None)
            if value is not None and (nbytes := value.nbytes + self.OVERHEAD) <= self.max_bytes:
                shelf = self._shelves.get(owner) or _Shelf(owner)
                fits = True
                while fits and self.nbytes + nbytes > self.max_bytes:
                    fits = self._evict(shelf, nbytes)
                if fits:
                    self._shelves[owner] = shelf
                    self._entries[key] = (value, self._clock(), nbytes, shelf)
                    shelf.keys[key] = None
                    shelf.nbytes += nbytes
                    self.nbytes += nbytes
        if error is not None:
            flight.set_exception(error)
        elif value is not None:
            flight.set_result(value)

    def _begin_anew(self) -> None:
        """In a forked child, which has no leader of any flight."""
        self._lock = threading.Lock()
        self._flights = {}
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._shelves.clear()
            self.nbytes = 0

    def _evict(self, mine: _Shelf, nbytes: int) -> bool:
        """Forget the coldest of ``mine``, to which so many bytes come, or of another one with more
        than its share. False where nobody has: what comes is more than a share itself."""
        share = self.max_bytes / (len(self._shelves) + (mine.owner not in self._shelves))
        shelf = mine
        if not mine.keys or mine.nbytes + nbytes <= share:
            for _ in range(len(self._shelves)):
                shelf = next(iter(self._shelves.values()))
                if shelf.nbytes > share:
                    break
                self._shelves.move_to_end(shelf.owner)
            else:
                return False
        self._forget(next(iter(shelf.keys)))
        self.evictions += 1
        return True

    def _forget(self, key: Hashable) -> None:
        _, _, nbytes, shelf = self._entries.pop(key)
        self.nbytes -= nbytes
        shelf.nbytes -= nbytes
        del shelf.keys[key]
        if not shelf.keys:
            self._shelves.pop(shelf.owner, None)

    def stats(self) -> dict[str, int]:
        with self._lock:
            names = ("hits", "misses", "shared", "evictions", "expirations", "nbytes", "max_bytes")
            return {"size": len(self._entries)} | {name: getattr(self, name) for name in names}
