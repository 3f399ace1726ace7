"""Hints put to the test, notebook 03's and one of 02: they grow, a mistake meets those of every
part, and they work."""

import re

import pytest

from flserving.lab.checks import parts
from flserving.lab.checks.serving import admission, characteristic, flight, lru, prediction_key
from wrong_solutions import CHECKS, SOLUTIONS, WRONG

MODULES = {
    "admission": admission,
    "lru": lru,
    "characteristic-time": characteristic,
    "prediction-key": prediction_key,
    "single-flight": flight,
}

BY_THE_HINTS = {
    "admission": """\
import threading
from contextlib import contextmanager

from flserving.errors import OverloadedError


class Admission:
    def __init__(self, max_rows):
        self.max_rows = max_rows
        self.rows = 0
        self.lock = threading.Lock()

    @contextmanager
    def enter(self, rows):
        with self.lock:
            if self.rows and self.rows + rows > self.max_rows:
                raise OverloadedError
            self.rows += rows
        try:
            yield
        finally:
            with self.lock:
                self.rows -= rows
""",
    "lru": """\
class LRU:
    def __init__(self, capacity):
        self.capacity = capacity
        self.items = {}

    def get(self, key):
        if not key in self.items:
            return None
        self.items[key] = self.items.pop(key)
        return self.items[key]

    def put(self, key, value):
        if key not in self.items and len(self.items) == self.capacity:
            del self.items[next(iter(self.items))]
        self.items[key] = value
        self.items[key] = self.items.pop(key)
""",
    "characteristic-time": """\
import math

import numpy as np


def characteristic_time(shares, cache_size):
    if cache_size >= len(shares): return math.inf
    low, high = 0.0, 0.0
    high = 1.0
    while (1 - np.exp(-shares * high)).sum() < cache_size:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if (1 - np.exp(-shares * middle)).sum() < cache_size:
            low = middle
        else:
            high = middle
    return high
""",
    "prediction-key": """\
import hashlib

import numpy as np


def prediction_key(model, version, rows, settings, client):
    rows = np.ascontiguousarray(rows)
    digest = hashlib.sha256(rows).hexdigest()
    return model, version, client, digest, rows.dtype.str, rows.shape, tuple(sorted(settings.items()))
""",
    "single-flight": """\
import threading
from concurrent.futures import Future


class SingleFlight:
    def __init__(self, cache):
        self.cache = cache
        self.flights = {}
        self.lock = threading.Lock()

    def get(self, key, load):
        with self.lock:
            if not (value := self.cache.get(key)) is None:
                return value
            leads = key not in self.flights
            if leads: self.flights[key] = Future()
            flight = self.flights[key]
        if not leads: return flight.result()
        try:
            value = load()
        except BaseException as error:
            with self.lock:
                del self.flights[key]
            flight.set_exception(error)
            raise
        with self.lock:
            self.cache.put(key, value)
            del self.flights[key]
        flight.set_result(value)
        return value
""",
}


def parts_of(grade_id, monkeypatch):
    """The parts of a check, as it hands them to ``judge``."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(
            MODULES[grade_id], "judge", lambda exercise, solution, *parts: found.extend(parts)
        )
        check = re.search(r"^check_\w+", CHECKS[grade_id], re.MULTILINE)[0]
        getattr(MODULES[grade_id], check)(None)
    return found


def tell(grade_id, source):
    namespace = {}
    exec(source, namespace)
    with pytest.raises(parts.CheckError) as caught:
        exec(CHECKS[grade_id], namespace)
    return caught.value


def first_not_done(error):
    return re.search(r"^ *not yet +(.*)$", error.marks, re.MULTILINE)[1]


@pytest.mark.parametrize("grade_id", MODULES)
def test_what_the_hints_spell_out_is_a_solution(grade_id, monkeypatch):
    namespace = {}
    exec(BY_THE_HINTS[grade_id], namespace)
    exec(CHECKS[grade_id], namespace)
    for part in parts_of(grade_id, monkeypatch):
        for code in re.findall(r"`([^`]+)`", " ".join(part.hints)):
            assert code in BY_THE_HINTS[grade_id] + SOLUTIONS[grade_id], (
                f"{part.name}: {code} is in no solution"
            )


@pytest.mark.parametrize("grade_id", MODULES)
def test_every_part_is_met_by_a_wrong_solution_and_its_hints_grow(grade_id, monkeypatch):
    """The last tries of a part show all its hints; two mistakes of one part share its count."""
    monkeypatch.setattr(parts, "_failed_tries", parts.Counter())
    sources = {}
    for one in WRONG[grade_id].values():
        if re.search(
            "does not return|wait for nobody|hold no lock", one.message
        ):  # these take seconds, and others meet the same part
            continue
        sources.setdefault(first_not_done(tell(grade_id, one.source)), one.source)
    for part in parts_of(grade_id, monkeypatch):
        assert part.name in sources, f"no wrong solution fails first at {part.name!r}"
        parts._failed_tries.clear()
        shown = [tell(grade_id, sources[part.name]).hints for _ in range(len(part.hints) + 2)]
        assert shown == [part.hints[:tries] for tries in range(len(part.hints) + 2)]
