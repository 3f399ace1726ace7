"""The load generator: exact latencies in virtual time, nothing omitted, failures by reason."""

import asyncio
import collections
import itertools
import threading

import numpy as np
import pytest

from flserving.errors import ConfigError, OverloadedError
from flserving.lab.measuring.ledger import Ledger
from flserving.lab.measuring.load import closed_loop, closed_loop_async, open_loop, open_loop_async
from flserving.lab.measuring.report import LoadReport
from flserving.lab.queueing.arrivals import Poisson, Zipf, arrival_times_s
from virtual_loop import VirtualLoop


class VirtualTime:
    """A clock that only ``sleep`` moves: for one thread."""

    def __init__(self):
        self.now_s = 1000.0  # not zero: nothing may depend on where a clock starts

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        self.now_s += seconds


def run_virtual(make):
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(make(loop.time))


class Every:
    """One arrival every ``gap_s``."""

    def __init__(self, gap_s):
        self.gap_s, self.rate_per_s = gap_s, 1 / gap_s

    def gaps_s(self, rng):
        while True:
            yield self.gap_s


def lindley_latency_s(arrival_s, service_s):
    """Sojourn times of a first-come first-served queue with one server: Lindley's recursion,
    1952."""
    free_s, latency_s = 0.0, []
    for now_s, work_s in zip(arrival_s, service_s, strict=True):
        free_s = max(free_s, now_s) + work_s
        latency_s.append(free_s - now_s)
    return np.array(latency_s)


# ----------------------------------------------------------------------------- coordinated omission


def test_one_stall_is_felt_by_every_request_that_should_have_been_sent():
    time, sent = VirtualTime(), itertools.count()

    def call(item):
        time.sleep(10.0 if next(sent) == 100 else 0.001)

    report = open_loop(
        call, Every(0.01), requests=2000, threads=1, progress=False, clock=time, sleep=time.sleep
    )
    # the omitting view: one slow request in 2,000, p99 untouched
    assert (report.service_ms > 100).sum() == 1
    assert np.percentile(report.service_ms, 99) == pytest.approx(1, abs=0.01)
    # 10 s of backlog drained at 900 per s
    assert (report.latency_ms > 100).sum() == pytest.approx(1100, abs=5)
    assert report.percentile_ms(100) == pytest.approx(10_000, abs=1)
    assert report.percentile_ms(50) > 100


def test_latency_equals_lindleys_recursion_with_one_thread():
    time = VirtualTime()
    service_s = np.random.default_rng(7).exponential(0.008, size=3000)
    work = iter(service_s.tolist())
    report = open_loop(lambda item: time.sleep(next(work)), Poisson(100), requests=3000, threads=1, progress=False,
                       clock=time, sleep=time.sleep, seed=11)  # fmt: skip
    assert report.latency_ms / 1e3 == pytest.approx(
        lindley_latency_s(report.arrival_s, service_s), abs=1e-6
    )
    assert (report.late_ms >= -1e-6).all()


def test_async_latency_equals_lindleys_recursion_at_a_server_that_takes_one_at_a_time():
    async def main(clock):
        server = asyncio.Lock()

        async def call(item):
            async with server:
                await asyncio.sleep(0.008)

        return await open_loop_async(
            call, Poisson(100), seconds=20, progress=False, clock=clock, seed=3
        )

    report = run_virtual(main)
    assert len(report) == pytest.approx(2000, rel=0.1) and report.arrival_s[-1] < 20
    expected_s = lindley_latency_s(report.arrival_s, [0.008] * len(report))
    assert report.latency_ms / 1e3 == pytest.approx(expected_s, abs=1e-6)
    assert report.late_ms == pytest.approx(np.zeros(len(report)), abs=1e-6)


def test_arrivals_do_not_depend_on_how_slow_the_server_is():
    def run(service_s):
        time = VirtualTime()
        return open_loop(lambda item: time.sleep(service_s), Poisson(50), requests=200, threads=1, progress=False,
                         clock=time, sleep=time.sleep, seed=4, popularity=Zipf(9))  # fmt: skip

    fast, slow = run(1e-6), run(0.5)
    assert (fast.arrival_s == slow.arrival_s).all() and (fast.item == slow.item).all()
    seeds = np.random.SeedSequence(4).spawn(2)
    assert (
        fast.arrival_s
        == arrival_times_s(Poisson(50), np.random.default_rng(seeds[0]), requests=200)
    ).all()


def test_too_few_tasks_delay_the_sending_and_the_latency_says_so():
    async def main(clock):
        return await open_loop_async(lambda item: asyncio.sleep(1.0), Every(0.1), requests=40, tasks=5,
                                     progress=False, clock=clock)  # fmt: skip

    report = run_virtual(main)
    assert report.service_ms == pytest.approx(np.full(40, 1000.0))
    assert report.latency_ms.max() > 4000 and report.late_ms.max() == pytest.approx(
        report.latency_ms.max() - 1000
    )


def test_what_cannot_be_sent_is_reported_as_unsent_and_the_run_ends():
    time = VirtualTime()
    report = open_loop(lambda item: time.sleep(1.0), Every(0.125), seconds=5, threads=1, progress=False,
                       clock=time, sleep=time.sleep)  # fmt: skip
    assert len(report) == 39  # every arrival before 5 s is accounted for
    # five seconds and one of grace
    assert report.ok.sum() == 6 and report.failures == {"Unsent": 33}
    assert np.isnan(report.start_s[~report.ok]).all() and len(report.late_ms) == 6
    assert report.messages == {"Unsent": "no caller was free to send it in time"}
    assert report.seconds == pytest.approx(6.125)


# -------------------------------------------------------------------------------------- closed loop


def test_closed_loop_keeps_exactly_its_callers_busy():
    # breaks with a timeout if fewer than four callers are ever inside
    barrier = threading.Barrier(4)
    report = closed_loop(lambda item: barrier.wait(10), callers=4, requests=40, progress=False)
    assert len(report) == 40 and report.failures == {}
    assert report.arrival_s.tolist() == sorted(report.arrival_s)
    active = [((report.start_s <= t) & (report.end_s > t)).sum() for t in report.start_s]
    assert max(active) == 4


def test_closed_loop_ends_after_its_seconds_and_waits_for_the_calls_under_way():
    time = VirtualTime()
    report = closed_loop(
        lambda item: time.sleep(0.4), callers=1, seconds=1.0, progress=False, clock=time
    )
    assert report.start_s == pytest.approx([0, 0.4, 0.8]) and report.end_s[-1] == pytest.approx(1.2)
    assert report.rate_per_s == pytest.approx(2.5)
    both = closed_loop(
        lambda item: time.sleep(0.4), callers=1, requests=2, seconds=1.0, progress=False, clock=time
    )
    assert len(both) == 2


def test_async_closed_loop_obeys_littles_law():
    async def main(clock):
        return await closed_loop_async(lambda item: asyncio.sleep(0.02), callers=10, seconds=1.0, progress=False,
                                       clock=clock)  # fmt: skip

    report = run_virtual(main)
    assert report.rate_per_s * report.latency_ms.mean() / 1e3 == pytest.approx(10, rel=0.02)
    assert report.latency_ms == pytest.approx(np.full(len(report), 20))


def test_items_follow_the_popularity_and_reach_the_call():
    asked = []
    report = closed_loop(
        asked.append, callers=1, requests=9000, popularity=Zipf(5, 1.0), progress=False
    )
    assert report.item.tolist() == asked
    share = np.bincount(asked, minlength=5) / 9000
    assert share == pytest.approx(Zipf(5, 1.0).probabilities, abs=0.02)
    again = closed_loop(
        lambda item: None, callers=1, requests=9000, popularity=Zipf(5, 1.0), progress=False
    )
    other = closed_loop(
        lambda item: None, callers=1, requests=9000, popularity=Zipf(5, 1.0), progress=False, seed=1
    )
    assert (again.item == report.item).all() and (other.item != report.item).any()
    assert set(closed_loop(lambda item: None, callers=2, requests=5, progress=False).item) == {0}


# ----------------------------------------------------------------------------------------- failures


def test_failures_are_counted_by_reason_and_do_not_end_the_run():
    def call(item):
        if item == 1:
            raise OverloadedError("queue holds 9 rows: try later")
        if item == 2:
            raise KeyError("x")

    report = closed_loop(call, callers=3, requests=600, popularity=Zipf(3, 0), progress=False)
    counts = collections.Counter(report.item.tolist())
    assert report.failures == {"Overloaded": counts[1], "KeyError": counts[2]}
    assert report.messages["Overloaded"] == "OverloadedError: queue holds 9 rows: try later"
    assert report.ok.sum() == counts[0] == len(report.latency_ms)
    assert report.availability == pytest.approx(counts[0] / 600)
    assert "Overloaded" in repr(report) and "p99" in repr(report)


def test_async_failures_and_requests_that_the_server_cancels():
    async def main(clock):
        async def call(item):
            if item == 0:
                raise asyncio.CancelledError
            raise ValueError("bad row")

        return await closed_loop_async(call, callers=4, requests=100, popularity=Zipf(2, 0), progress=False,
                                       clock=clock)  # fmt: skip

    report = run_virtual(main)
    assert (
        set(report.failures) == {"CancelledError", "ValueError"}
        and sum(report.failures.values()) == 100
    )
    assert np.isnan(report.percentile_ms(99)) and report.rate_per_s == 0


def test_cancelling_the_run_cancels_its_callers():
    async def main(clock):
        cancelled = []

        async def call(item):
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                cancelled.append(item)
                raise

        task = asyncio.create_task(
            closed_loop_async(call, callers=3, requests=9, progress=False, clock=clock)
        )
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(cancelled) == 3

    run_virtual(main)


def test_an_interrupted_cell_leaves_no_callers_behind(monkeypatch):
    release = threading.Event()

    def interrupt(self):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        closed_loop(lambda item: release.wait(10), callers=3, requests=10**9, progress=False)
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("load-"):
            thread.join(10)
            assert not thread.is_alive()


# ----------------------------------------------------------------------------- report and bad input


def report_of(latency_ms, failed=0):
    count = len(latency_ms)
    end_s = np.arange(count) + np.array(latency_ms) / 1e3
    error = np.array([""] * (count - failed) + ["Overloaded"] * failed)
    return LoadReport(
        np.arange(float(count)), np.arange(count) + 0.001, end_s, np.zeros(count, np.int64), error
    )


def test_percentiles_count_the_answers_only():
    report = report_of([*range(1, 102), 9000, 9000], failed=2)
    assert report.percentile_ms(50) == pytest.approx(51) and report.percentile_ms(
        99
    ) == pytest.approx(100)
    summary = report.summary()
    assert summary["requests"] == 103 and summary["answered"] == 101 and summary["failed"] == 2
    assert summary["max_ms"] == pytest.approx(101) and summary["late_p99_ms"] == pytest.approx(1)
    with pytest.raises(ConfigError, match="percentile 101 does not exist"):
        report.percentile_ms(101)


def test_frame_has_one_row_per_request():
    report = report_of([5, 7, 9], failed=1)
    frame = report.to_frame()
    assert list(frame) == ["arrival_s", "start_s", "end_s", "item", "ok", "error", "latency_ms"]
    assert frame["latency_ms"].tolist() == pytest.approx([5, 7, 9]) and frame["ok"].tolist() == [
        True,
        True,
        False,
    ]


def test_a_run_without_arrivals_is_an_empty_report():
    report = open_loop(lambda item: None, Poisson(1e-6), seconds=1e-3, progress=False)
    assert len(report) == 0 and report.failures == {} and np.isnan(report.availability)
    assert np.isnan(report.summary()["p99_ms"]) and report.to_frame().empty


def test_progress_bar_counts_to_the_end(capsys):
    closed_loop(lambda item: None, callers=2, requests=300)
    assert "300/300" in capsys.readouterr().err
    closed_loop(lambda item: None, callers=2, requests=300, progress=False)
    assert capsys.readouterr().err == ""


async def nothing(item):
    return None


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: closed_loop(print, callers=1), "no end"),
        (lambda: closed_loop(print, callers=0, requests=1), "number of threads is 0"),
        (lambda: closed_loop(print, callers=1001, requests=1), r"in \[1, 1000\]"),
        (lambda: open_loop(print, Poisson(1), requests=1, threads=1.5), "number of threads is 1.5"),
        (
            lambda: closed_loop(nothing, callers=1, requests=1),
            "call is async: use `await closed_loop_async",
        ),
        (
            lambda: closed_loop(lambda item: nothing(item), callers=2, requests=9, progress=False),
            "ends in _async",
        ),
        (
            lambda: asyncio.run(closed_loop_async(len, callers=10_001, requests=1)),
            "number of tasks is 10001",
        ),
        (
            lambda: asyncio.run(closed_loop_async(str, callers=2, requests=9, progress=False)),
            "returned str, not an",
        ),
    ],
)
def test_misuse_is_refused(run, message):
    with pytest.raises(ConfigError, match=message):
        run()
