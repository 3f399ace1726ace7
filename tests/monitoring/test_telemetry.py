"""Telemetry: percentiles against numpy, and accounts that balance whatever the threads do."""

import itertools
import json
import math
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving.monitoring.metrics import BOUNDS_S, STAGES, Histogram, merged
from flserving.monitoring.telemetry import _PENDING, KEEP_S, Executions, Telemetry
from flserving.serving.engine import Execution, Prediction
from serving_models import PATIENCE_S


def histogram_of(seconds: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(np.asarray(seconds, np.float64))
    return histogram


def marks(start_s: float, *stages_s: float) -> tuple[float, ...]:
    """Marks of a request with these stage times, the rest zero."""
    padded = [*stages_s, *[0.0] * (len(STAGES) - len(stages_s))]
    return tuple(itertools.accumulate(padded, initial=start_s))


def ran(telemetry: Telemetry, version: str, rows: int, *stages_s: float) -> None:
    """One run of a model with these stage times, the rest zero."""
    engine, marks_s = SimpleNamespace(served_as=version), marks(5.0, *stages_s)[:4]
    telemetry.execution(engine, rows, [Prediction(Execution(None, marks_s), 0, rows)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("median_s", "sigma"), [(50e-6, 0.3), (2e-3, 1.0), (0.8, 2.0)])
def test_percentiles_of_lognormal_latencies_are_right_to_two_and_a_half_percent(
    seed, median_s, sigma
):
    samples = (
        np.random.default_rng(seed).lognormal(math.log(median_s), sigma, 20_000).clip(1e-6, 1e3)
    )
    histogram = histogram_of(samples)
    for q in (0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0):
        exact = np.quantile(samples, q, method="inverted_cdf")  # nearest rank
        assert histogram.percentile_s(q) == pytest.approx(exact, rel=0.025)
    assert histogram.percentile_s(1.0) <= histogram.highest_s == samples.max()


@given(st.lists(st.floats(1e-6, 900), min_size=1, max_size=200), st.floats(0, 1))
def test_any_percentile_of_any_samples_is_right_to_two_and_a_half_percent(seconds, q):
    rank = max(1, math.ceil(q * len(seconds)))
    assert histogram_of(np.array(seconds)).percentile_s(q) == pytest.approx(
        sorted(seconds)[rank - 1], rel=0.025
    )


@given(st.lists(st.lists(st.floats(0, 2000), max_size=20), max_size=6))
def test_recording_in_parts_is_recording_at_once(parts):
    whole, pieces = (
        histogram_of(np.array([s for part in parts for s in part], np.float64)),
        Histogram(),
    )
    for part in parts:
        pieces.add(np.array(part, np.float64))
    assert (whole.counts == pieces.counts).all() and (whole.count, whole.highest_s) == (
        pieces.count,
        pieces.highest_s,
    )
    assert whole.total_s == pytest.approx(pieces.total_s)


def test_durations_outside_the_buckets_are_counted_and_no_percentile_exceeds_the_maximum():
    histogram = histogram_of(np.array([0.0, 1e-9, 5e4]))
    assert (
        histogram.count == 3
        and histogram.highest_s == 5e4
        and histogram.total_s == pytest.approx(5e4)
    )
    assert histogram.percentile_s(0.5) <= 1.03e-6 and histogram.percentile_s(1.0) >= 1e3
    assert histogram_of(np.array([1.001e-3])).percentile_s(0.99) <= 1.001e-3


def test_nothing_recorded_is_none_not_zero():
    summary = Histogram().summary_ms()
    assert summary["count"] == 0 == summary["max_ms"]
    assert all(summary[name] is None for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms"))
    assert math.isnan(Histogram().percentile_s(0.5))


def test_a_summary_is_in_milliseconds():
    summary = histogram_of(np.full(100, 0.02)).summary_ms()
    assert summary == {
        "count": 100, "mean_ms": pytest.approx(20), "p50_ms": pytest.approx(20, rel=0.025),
        "p95_ms": pytest.approx(20, rel=0.025), "p99_ms": pytest.approx(20, rel=0.025), "max_ms": pytest.approx(20),
    }  # fmt: skip


@pytest.mark.parametrize(
    "count", [0, 1, _PENDING - 1, _PENDING, _PENDING + 1, 2 * _PENDING, 3 * _PENDING + 7]
)
def test_nothing_is_lost_or_doubled_where_pending_records_are_folded(count):
    telemetry, executions = Telemetry(), Executions()
    for i in range(count):
        telemetry.success("m/1", 3, marks(i, 0.001, 0.002))
        ran(telemetry, "m/1", 2, 0.001, 0.002, 0.003)
        telemetry.codec("rest", 0.25, 0.5)
        executions.add(2, 0.001)
    pending = (telemetry._pending, telemetry._pending_runs, executions._pending)
    assert max(map(len, pending)) < _PENDING, "memory is bounded"
    for _ in range(2):  # reading changes nothing
        seen, runs = telemetry.snapshot(), executions.summary()
        assert (seen["requests"], seen["succeeded"], seen["rows"]) == (count, count, 3 * count)
        assert (runs["executions"], runs["rows"], runs["execution"]["count"]) == (
            count,
            2 * count,
            count,
        )
        assert seen["latency_total_ms"] == pytest.approx(3 * count)
        assert (seen["executions"], seen["mean_batch_rows"]) == (count, 2 * bool(count))
        assert telemetry.totals()["codec"] == (
            {"rest": [count, 0.25 * count, 0.5 * count]} if count else {}
        )


class Meddler(list):
    """A list to which another thread adds a record in the middle of a fold."""

    def __getitem__(self, place):
        taken = super().__getitem__(place)
        self.append(self.late)
        return taken


def test_a_record_that_arrives_during_a_fold_waits_for_the_next():
    telemetry, executions = Telemetry(), Executions()
    telemetry._pending, executions._pending = Meddler(), Meddler()
    telemetry._pending.late, executions._pending.late = ("m/1", 1, marks(0.0, 0.001)), (1, 0.001, 1)
    telemetry.success("m/1", 1, marks(0.0, 0.001))
    executions.add(1, 0.001)
    assert [telemetry.snapshot()["requests"] for _ in range(3)] == [1, 2, 3]
    assert [executions.summary()["executions"] for _ in range(3)] == [1, 2, 3]


@given(
    st.lists(
        st.lists(st.floats(0, 5), min_size=len(STAGES), max_size=len(STAGES)),
        min_size=1,
        max_size=30,
    )
)
def test_the_stages_of_requests_add_up_to_their_latencies(requests):
    telemetry = Telemetry()
    for stages_s in requests:
        telemetry.success("m/1", 1, marks(1000.0, *stages_s))
    seen = telemetry.snapshot()
    expected_ms = sum(map(sum, requests)) * 1e3
    assert seen["stages_total_ms"] == pytest.approx(seen["latency_total_ms"], abs=1e-6)
    assert seen["latency_total_ms"] == pytest.approx(expected_ms, abs=1e-6)
    for place, name in enumerate(STAGES):
        taken_s = [stages_s[place] for stages_s in requests if stages_s[place] > 1e-9]
        assert seen["stages"][name]["count"] >= len(taken_s)
        assert seen["stages"][name]["max_ms"] == pytest.approx(
            max(taken_s, default=0) * 1e3, abs=1e-6
        )


def test_each_stage_gets_its_own_time_and_one_that_was_not_entered_none():
    telemetry = Telemetry()
    telemetry.success("m/1", 1, marks(7.0, 0.1, 0.0, 0.3, 0.4, 0.5, 0.6, 0.7))
    stages = telemetry.snapshot()["stages"]
    assert list(stages) == list(STAGES) == [
        "validate", "cache", "queue", "preprocess", "infer", "postprocess", "respond"
    ]  # fmt: skip
    assert stages["cache"]["count"] == 0
    assert [stages[name]["mean_ms"] for name in STAGES if name != "cache"] == pytest.approx(
        [100, 300, 400, 500, 600, 700]
    )


def test_counts_by_version_by_reason_and_the_mean_batch():
    telemetry = Telemetry()
    for version, rows in (("m/1", 1), ("m/2", 5), ("m/1", 2)):
        telemetry.success(version, rows, marks(0.0, 0.001))
    for reason in ("InvalidInput", "Overloaded", "InvalidInput"):
        telemetry.failure(reason)
    ran(telemetry, "m/1", 6, 0.0, 0.001)
    ran(telemetry, "m/2", 2, 0.0, 0.003)
    seen = telemetry.snapshot()
    assert (seen["requests"], seen["succeeded"], seen["failed"], seen["rows"]) == (6, 3, 3, 8)
    assert seen["requests_by_version"] == {"m/1": 2, "m/2": 1}
    assert seen["failed_by_reason"] == {"InvalidInput": 2, "Overloaded": 1}
    assert (seen["executions"], seen["mean_batch_rows"]) == (2, 4.0)
    seen["requests_by_version"]["m/1"] = 99
    seen["failed_by_reason"].clear()
    assert (
        telemetry.snapshot()["requests_by_version"]["m/1"] == 2
        and telemetry.snapshot()["failed"] == 3
    )


def test_an_unused_server_has_zeros():
    seen = Telemetry().snapshot()
    assert (seen["requests"], seen["succeeded"], seen["failed"], seen["executions"]) == (0, 0, 0, 0)
    assert (seen["mean_batch_rows"], seen["stages_total_ms"], seen["latency_total_ms"]) == (0, 0, 0)


@pytest.fixture
def restless():
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_accounts_balance_in_every_snapshot_under_eight_threads(restless):
    telemetry, barrier, done = Telemetry(), threading.Barrier(9), threading.Event()
    per_thread = 3000

    def work(seed: int) -> tuple[int, int, float]:
        rng, good, rows, busy_s = random.Random(seed), 0, 0, 0.0
        barrier.wait(PATIENCE_S)
        for _ in range(per_thread):
            if rng.random() < 0.1:
                telemetry.failure(rng.choice(["InvalidInput", "Overloaded"]))
                continue
            stages_s = [rng.random() * 1e-3 for _ in STAGES]
            telemetry.success(
                f"m/{rng.randrange(3)}", size := rng.randint(1, 8), marks(0.0, *stages_s)
            )
            ran(telemetry, "m/1", size, 0.0, stages_s[4])
            good, rows, busy_s = good + 1, rows + size, busy_s + sum(stages_s)
        return good, rows, busy_s

    def watch() -> int:
        barrier.wait(PATIENCE_S)
        looks, before = 0, 0
        while not done.is_set() or not looks:
            seen = telemetry.snapshot()
            assert (
                seen["succeeded"] + sum(seen["failed_by_reason"].values())
                == seen["requests"]
                >= before
            )
            assert (
                seen["latency"]["count"]
                == seen["succeeded"]
                == sum(seen["requests_by_version"].values())
            )
            assert seen["stages_total_ms"] == pytest.approx(seen["latency_total_ms"])
            looks, before = looks + 1, seen["requests"]
        return looks

    with ThreadPoolExecutor(9) as pool:
        watching = pool.submit(watch)
        outcomes = list(pool.map(work, range(8)))
        done.set()
        assert watching.result(20) > 0
    good, rows, busy_s = map(sum, zip(*outcomes, strict=True))
    seen = telemetry.snapshot()
    assert (seen["requests"], seen["succeeded"], seen["rows"]) == (8 * per_thread, good, rows)
    assert (seen["executions"], seen["mean_batch_rows"]) == (good, pytest.approx(rows / good))
    assert seen["latency_total_ms"] == pytest.approx(busy_s * 1e3)
    assert {name: stage["count"] for name, stage in seen["stages"].items()} == dict.fromkeys(
        STAGES, good
    )


# Totals: the sums behind the statistics, as other processes add them


bounds = st.sampled_from(BOUNDS_S)
just_beside = st.tuples(bounds, st.sampled_from([0.0, 100.0])).map(
    lambda pair: float(np.nextafter(*pair))
)


@given(st.lists(st.one_of(bounds, just_beside, st.floats(0, 20)), max_size=40))
def test_exact_buckets_count_what_is_at_most_their_bound(seconds):
    """As Prometheus defines ``le``: a duration of exactly 0.05 s is within 0.05 s."""
    telemetry = Telemetry()
    for latency_s in seconds:
        telemetry.success("m/1", 1, marks(0.0, latency_s))
    totals = telemetry.totals()
    account = totals["versions"]["m/1"] if seconds else {"at_most": [0] * (len(BOUNDS_S) + 1)}
    cumulated = list(itertools.accumulate(account["at_most"]))
    assert cumulated == [*(sum(s <= bound for s in seconds) for bound in BOUNDS_S), len(seconds)]
    stage = list(itertools.accumulate(totals["stages"]["validate"]["at_most"]))
    assert stage == [
        *(sum(0 < s <= bound for s in seconds) for bound in BOUNDS_S),
        sum(s > 0 for s in seconds),
    ]


def test_totals_hold_what_the_statistics_of_a_version_need():
    telemetry, before_ms = Telemetry(lambda: 100.0, largest_batch=8), int(time.time() * 1e3)
    # no prediction cache
    telemetry.success("m/1", 2, marks(90.0, 0.1, 0.0, 0.3, 0.4, 0.5, 0.6, 0.7))
    telemetry.success("m/2", 1, marks(95.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))  # a miss
    telemetry.success("m/2", 1, marks(99.0, 0.1, 0.25, 0.125, 0.0, 0.0, 0.0, 0.125))  # a hit
    telemetry.failure("Overloaded", "m/2", 0.5)
    telemetry.failure("Overloaded", "m/2", 0.25)
    telemetry.failure("NotFound", seconds=0.125)
    ran(telemetry, "m/1", 2, 0.25, 0.5, 0.125)
    ran(telemetry, "m/1", 2, 0.25, 0.5, 0.125)
    ran(telemetry, "m/1", 20, 1.0, 2.0, 4.0)  # 8 + 8 + 4
    telemetry.refusal("grpc", "Unauthorized")
    telemetry.refusal("grpc", "Unauthorized")
    totals, after_ms = json.loads(json.dumps(telemetry.totals())), int(time.time() * 1e3)
    one, two = totals["versions"]["m/1"], totals["versions"]["m/2"]
    assert (one["requests"], one["rows"], one["seconds"]) == (1, 2, pytest.approx(2.6))
    assert (two["requests"], two["rows"], two["seconds"]) == (2, 2, pytest.approx(3.4))
    assert one["cache"] == {"hit": [0, 0], "miss": [0, 0]}
    assert two["cache"] == {"hit": [1, 0.375], "miss": [1, pytest.approx(0.2)]}
    assert {name: stage[0] for name, stage in two["stages"].items()} == dict.fromkeys(
        ("validate", "cache", "queue", "respond"), 2
    ) | dict.fromkeys(("preprocess", "infer", "postprocess"), 1)
    assert two["stages"]["queue"] == [2, pytest.approx(0.425)] and two["stages"]["infer"] == [
        1,
        pytest.approx(0.5),
    ]
    assert one["batches"] == {
        "2": [2, 0.5, 1.0, 0.25],
        "4": [1, 0.2, 0.4, 0.8],
        "8": [2, *map(pytest.approx, (0.8, 1.6, 3.2))],
    }
    assert totals["failures"] == {"m/2": {"Overloaded": [2, 0.75]}, "": {"NotFound": [1, 0.125]}}
    assert totals["refusals"] == {"grpc": {"Unauthorized": 2}} and totals["codec"] == {}
    ended_ago_ms = {"m/1": 7400, "m/2": 400}
    for name, ago_ms in ended_ago_ms.items():
        last_ms = totals["versions"][name]["last_inference_ms"]
        assert before_ms - ago_ms - 2 <= last_ms <= after_ms - ago_ms + 2, (
            "the time of day at which the answer was there"
        )


outcomes = st.lists(
    st.tuples(
        st.sampled_from(["m/1", "m/2", "n/1"]),
        st.integers(1, 9),
        st.booleans(),
        st.sampled_from([0.25, 0.5, 1.0]),
    ),
    max_size=30,
)


@given(outcomes, st.integers(1, 4))
def test_totals_of_processes_add_up_to_those_of_one(requests, processes):
    """Quarters of seconds add up without rounding."""
    alone, several = Telemetry(), [Telemetry() for _ in range(processes)]
    for i, (version, rows, good, seconds) in enumerate(requests):
        for telemetry in (alone, several[i % processes]):
            if good:
                telemetry.success(version, rows, marks(0.0, 0.25, 0.0, 0.25, 0.25, seconds))
                ran(telemetry, version, rows, 0.25, seconds)
            else:
                telemetry.failure("InvalidInput", version, seconds)
                telemetry.refusal("rest", "Unauthorized")
            telemetry.codec("grpc", seconds, 0.25)
    one, sums = alone.totals(), merged([telemetry.totals() for telemetry in several])
    for account in (*one["versions"].values(), *sums["versions"].values()):
        del account["last_inference_ms"]
    # there are as many as processes hold them
    assert one.pop("named").keys() == sums.pop("named").keys()
    assert sums == one


def test_an_observer_is_told_of_every_request_and_of_none_when_there_is_none():
    telemetry, told = Telemetry(lambda: 50.0), []
    telemetry.success("m/1", 1, marks(0.0, 0.5))
    telemetry.observer = lambda *request: told.append(request)
    telemetry.success("m/1", 3, marks(1.0, 0.5))
    telemetry.failure("NotFound", seconds=0.5)
    telemetry.observer = None
    telemetry.failure("NotFound")
    assert told == [("m/1", 3, marks(1.0, 0.5), ""), ("", 0, (49.5, 50.0), "NotFound")]
    assert telemetry.snapshot()["requests"] == 4


class Fleet:
    """Processes behind one address, each with its held versions; ``asked`` counts, a scrape reads
    all of them."""

    def __init__(self, processes: int) -> None:
        self.now_s = 0.0
        self.held: list[set[str]] = [set() for _ in range(processes)]
        self.members = [
            Telemetry(lambda: self.now_s, held=lambda place=place: self.held[place])
            for place in range(processes)
        ]
        self.last: dict[str, float] = {}  # series -> value at its last scrape
        self.increase = 0.0  # what a monitor adds up: a lower value is a restart
        self.shown: set[str] = set()
        self._named: list[set[str]] = [set() for _ in range(processes)]

    def scrape(self) -> None:
        totals = []
        for place, member in enumerate(self.members):
            member.elsewhere = set().union(
                *(names for other, names in enumerate(self._named) if other != place)
            )
            totals.append(member.totals())
            self._named[place] = set(totals[-1]["named"])
        whole = merged(totals)
        self.shown = set(whole["named"])
        for name in self.shown & whole["versions"].keys():
            value = whole["versions"][name]["requests"]
            before = self.last.get(name, 0)
            self.increase += value - before if value >= before else value
            self.last[name] = value


@given(
    st.integers(1, 3),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 9)), max_size=60),
)
def test_a_monitor_counts_each_request_once_whatever_versions_come_and_go(
    processes, pause_s, steps
):
    """Prometheus adds up what each series grew by, and takes a fall for a restart: neither what is
    folded into ``other`` nor a version that leaves memory and comes back may be counted twice. Nor
    is anything lost, unless a version comes back after it was forgotten: such a restart may be too
    small to be seen, as that of any process."""
    fleet, asked = Fleet(processes), 0
    for place, version, count in steps:
        place %= processes
        name = f"m/{version}"
        # cold: gone again
        fleet.held[place] = {*sorted(fleet.held[place])[-1:], name} if count % 2 else set()
        for _ in range(count):
            fleet.members[place].success(name, 1, marks(fleet.now_s, 0.1))
        asked += count
        fleet.scrape()
        assert fleet.increase <= asked
        assert fleet.increase == asked or pause_s * len(steps) >= KEEP_S
        assert fleet.shown <= {"m/other"}.union(*fleet.held)
        fleet.now_s += pause_s


def test_memory_is_flat_over_ten_thousand_versions():
    held: set[str] = set()
    telemetry = Telemetry(itertools.count().__next__, held=lambda: held)
    for version in range(10_000):
        held = {f"m/{version}", "m/0"}
        telemetry.success(f"m/{version}", 1, marks(0.0, 0.001))
        telemetry.failure("NotFound", f"m/{version - 5}", 0.001)
        assert len(telemetry._totals) + len(telemetry._fresh) < 200
        if version % 100 == 0:
            telemetry.totals()
    totals, seen = telemetry.totals(), telemetry.snapshot()
    assert totals["named"].keys() <= {"m/9999", "m/0", "m/other"} and totals["answered"] == 10_000
    assert totals["failed"] == {"NotFound": 10_000} == seen["failed_by_reason"]
    assert sum(seen["requests_by_version"].values()) == seen["succeeded"] == seen["rows"] == 10_000
