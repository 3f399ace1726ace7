"""The link: its closed forms, by hand and by simulation; outages as a clock that stands still; bad
settings."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving.errors import ConfigError
from flserving.lab.network.link import SEGMENT_NBYTES, Link

MB = 1e6


# ------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize("request_nbytes", [0, 784, 100_000])
@pytest.mark.parametrize("response_nbytes", [40, 2_600_000])
@pytest.mark.parametrize("rtt_ms", [0, 5, 120])
def test_without_loss_an_exchange_is_a_round_trip_and_the_bytes_over_the_bandwidth(
    rtt_ms, request_nbytes, response_nbytes
):
    link = Link(rtt_ms=rtt_ms, up_bytes_s=0.5 * MB, down_bytes_s=4 * MB)
    expected_s = rtt_ms / 1e3 + request_nbytes / 0.5e6 + response_nbytes / 4e6
    assert link.exchanges_s(request_nbytes, response_nbytes) == pytest.approx(expected_s)
    assert link.mean_exchange_s(request_nbytes, response_nbytes) == pytest.approx(expected_s)
    one_ways_s = link.transfers_s(request_nbytes) + link.transfers_s(response_nbytes, up=False)
    assert one_ways_s == pytest.approx(expected_s)


def test_a_lost_small_message_costs_timeouts_that_double():
    """One segment, loss p, timeout T: T p / (1 - 2p) expected, since the k-th loss in a row costs
    2^(k-1) T."""
    link = Link(loss=0.2, seed=3)
    assert link.rto_s == 0.2
    # 60 s cap: a little less
    assert link.mean_transfer_s(100) == pytest.approx(0.2 * 0.2 / (1 - 2 * 0.2), rel=0.05)
    waits = link.transfers_s(np.full(100_000, 100.0))
    steps = np.array([0, 0.2, 0.6, 1.4, 3.0])
    shares = [np.isclose(waits, step).mean() for step in steps]
    np.testing.assert_allclose(shares, [0.8 * 0.2**k for k in range(5)], atol=0.005)
    assert np.isclose(waits, steps[:, None]).any(0).mean() > 0.999


@pytest.mark.parametrize("loss", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("nbytes", [100, 3_000, 500_000])
@pytest.mark.parametrize("rtt_p99_ms", [None, 300])
def test_the_mean_of_many_draws_is_the_closed_form(rtt_p99_ms, nbytes, loss):
    link = Link(
        rtt_ms=80, rtt_p99_ms=rtt_p99_ms, up_bytes_s=2 * MB, down_bytes_s=2 * MB, loss=loss, seed=7
    )
    drawn_s = link.exchanges_s(nbytes, np.full(200_000, 1_000))
    assert drawn_s.mean() == pytest.approx(link.mean_exchange_s(nbytes, 1_000), rel=0.05)


def test_a_long_transfer_under_loss_runs_at_mathis_throughput():
    link = Link(rtt_ms=100, down_bytes_s=100 * MB, loss=0.01)
    throughput = 50 * MB / link.mean_transfer_s(50 * MB, up=False)
    assert throughput == pytest.approx(
        SEGMENT_NBYTES / 0.1 * math.sqrt(3 / 2) / math.sqrt(0.01), rel=0.05
    )
    # the line, not the loss, is what binds
    narrow = Link(rtt_ms=100, down_bytes_s=10_000, loss=0.01)
    assert 1 * MB / narrow.mean_transfer_s(1 * MB, up=False) == pytest.approx(10_000, rel=0.05)


def test_the_skewed_round_trip_has_the_stated_quantiles():
    rtt = Link(rtt_ms=40, rtt_p99_ms=200, seed=1).rtts_s((400_000,))
    assert np.median(rtt) == pytest.approx(0.040, rel=0.01)
    assert np.quantile(rtt, 0.99) == pytest.approx(0.200, rel=0.03)
    assert rtt.mean() == pytest.approx(Link(rtt_ms=40, rtt_p99_ms=200).mean_rtt_s, rel=0.01)


def test_the_timeout_follows_the_spread_of_the_round_trip():
    steady, skewed = Link(rtt_ms=150, loss=0.1), Link(rtt_ms=150, rtt_p99_ms=900, loss=0.1, seed=2)
    rtt = skewed.rtts_s((400_000,))
    assert steady.rto_s == 0.2
    assert skewed.rto_s == pytest.approx(rtt.mean() + 4 * np.abs(rtt - rtt.mean()).mean(), rel=0.02)


# ------------------------------------------------------------------------------------------ outages


@pytest.mark.parametrize(
    ("now_s", "took_s"),
    [
        (0, 2),  # long before
        (8, 2),  # ends as the outage starts
        (9, 2 + 10),  # caught on the way
        (10, 10 + 2),  # starts with it
        (19, 1 + 2),
        (20, 2),  # starts as it ends
        (29, 2 + 5),
        (34, 1 + 2),
        (98, 2),
        (99, math.inf),
        (100, math.inf),
        (1e9, math.inf),
    ],
)
def test_an_outage_stops_what_is_under_way(now_s, took_s):
    link = Link(rtt_ms=1_000, up_bytes_s=1_000, outages=[(10, 20), (30, 35), (100, math.inf)])
    assert link.exchanges_s(1_000, 0, now_s) == pytest.approx(took_s)


def test_two_outages_may_hit_the_same_exchange_and_the_server_works_on_in_between():
    link = Link(rtt_ms=2_000, outages=[(10, 20), (21, 22), (40, 50)])
    assert link.exchanges_s(0, 0, 9.5) == pytest.approx(2 + 10 + 1)
    assert link.exchanges_s(0, 0, 38, server_s=5) == pytest.approx(1 + 5 + (50 - 44) + 1)


@given(
    edges=st.lists(st.integers(0, 60), max_size=8, unique=True).map(sorted),
    starts=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    work=st.integers(0, 30),
)
def test_work_meets_outages_as_a_clock_that_ticks_says(edges, starts, work):
    outages = list(zip(edges[::2], edges[1::2], strict=False))
    out = {second for start, end in outages for second in range(start, end)}

    def ticked(now):
        while now in out:
            now += 1
        left = work
        while left:
            left -= now not in out
            now += 1
        return now

    got = Link(outages=outages).finish_s(starts, work)
    assert got.tolist() == [ticked(start) for start in starts]


# ------------------------------------------------------------------------- seeds, arrays, bad input


def test_the_same_seed_draws_the_same_and_another_does_not():
    def make(seed):
        link = Link(rtt_ms=20, rtt_p99_ms=90, loss=0.05, seed=seed)
        return link.exchanges_s(np.full(50, 9_000), 900)

    np.testing.assert_array_equal(make(4), make(4))
    assert (make(4) != make(5)).any()


def test_arrays_broadcast_and_equal_one_by_one():
    link = Link(rtt_ms=10, up_bytes_s=1 * MB, down_bytes_s=2 * MB, outages=[(1, 2)])
    sizes, now_s = np.array([[10], [20_000], [500_000]]), np.array([0.0, 0.7, 1.5, 3])
    together = link.exchanges_s(sizes, 300, now_s)
    assert together.shape == (3, 4)
    one_by_one = [[link.exchanges_s(n, 300, t) for t in now_s] for n in sizes[:, 0]]
    np.testing.assert_allclose(together, one_by_one)


def test_a_hundred_thousand_exchanges_take_no_time():
    """20 ms on a quiet machine; one by one it would be 3 s and more."""
    link = Link(
        rtt_ms=80,
        rtt_p99_ms=300,
        loss=0.01,
        up_bytes_s=MB,
        down_bytes_s=MB,
        outages=[(5, 9), (20, 40)],
    )
    started = time.process_time()
    assert np.isfinite(
        link.exchanges_s(np.full(100_000, 5_000), 2_000, np.linspace(0, 60, 100_000))
    ).all()
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rtt_ms": -1}, "rtt_ms is -1"),
        ({"rtt_ms": math.nan}, "rtt_ms is nan"),
        ({"rtt_ms": 50, "rtt_p99_ms": 20}, "rtt_p99_ms is 20"),
        ({"rtt_p99_ms": 20}, "rtt_p99_ms is 20"),
        ({"up_bytes_s": 0}, "up_bytes_s 0"),
        ({"down_bytes_s": math.nan}, "down_bytes_s nan"),
        ({"loss": 0.5}, "loss is 0.5"),
        ({"loss": -0.1}, "loss is -0.1"),
        ({"outages": [(2, 1)]}, "outages"),
        ({"outages": [(0, 2), (1, 3)]}, "outages"),
        ({"outages": [(0, math.inf), (1, 3)]}, "outages"),
        ({"outages": [(math.nan, 3)]}, "outages"),
        ({"outages": [(1, math.nan)]}, "outages"),
        ({"outages": [(1,)]}, "outages"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_the_value(settings, says):
    with pytest.raises(ConfigError, match=says):
        Link(**settings)
