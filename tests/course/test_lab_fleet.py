"""The fleet: equal to what is known exactly, near what the real server does, and a plan whose sums can be redone."""

import contextlib
import itertools
import math
import time

import numpy as np
import pytest

import flserving
from bystander import Bystander, prove
from flserving.api.client import Client
from flserving.errors import ConfigError
from flserving.lab.arrivals import Poisson, arrival_times_s
from flserving.lab.capacity import SLICE, Prices, plan, sustainable_per_s
from flserving.lab.fleet import PATHS, Fleet, simulate_fleet
from flserving.lab.load import closed_loop, open_loop
from flserving.lab.network import Link
from flserving.lab.proxy import Proxy
from flserving.lab.simulate import simulate_batching
from flserving.lab.theory import md1_wait_s
from flserving.serving.config import ServingConfig
from serving_models import Tagged, row, serving

FAILED, LOCAL, CLOUD, DEGRADED = range(4)


def fleet(service_s=lambda n: 0.005 + 0.001 * n, link=None, **settings):
    """A fleet without a network, in which nobody gives up."""
    device = {"request_nbytes": 4_000, "response_nbytes": 500, "device_s": 0.003, "local_share": 0.75}
    config = {"max_batch_size": 8, "num_workers": 1, "max_wait_time_ms": 20, "timeout_ms": 3_600_000}
    config |= {name: settings.pop(name) for name in list(settings) if name in ServingConfig.__slots__}
    device |= {"deadline_s": 1_000} | settings
    return Fleet(service_s=service_s, link=link or Link(), config=ServingConfig(**config), **device)


# --------------------------------------------------------------------------------- equal to what is known


@pytest.mark.parametrize("policy", ["work_conserving", "hold_until_full"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("load", [0.3, 0.9])
def test_one_server_is_the_batching_simulation_to_the_last_bit_that_counts(policy, workers, load):
    some = fleet(num_workers=workers, batching=policy)
    run = simulate_fleet(some, "central", Poisson(load * workers * 8 / 0.013), requests=4_000)
    oracle = simulate_batching(
        run.arrival_s, some.service_s, max_batch_size=8, workers=workers, policy=policy, max_wait_s=0.02
    )
    np.testing.assert_allclose(run.latency_s, oracle.latency_s, atol=1e-9)
    assert run.batch_size.tolist() == oracle.batch_size.tolist()
    busy_s = (oracle.batch_end_s - oracle.batch_start_s).sum()
    assert run.utilisation == pytest.approx(busy_s / oracle.batch_end_s.max() / workers)


def erlang_c(rate_per_s, service_s, servers):
    """Chance that a request waits at ``servers`` servers with exponential service times (Erlang, 1917)."""
    load = rate_per_s * service_s
    top = load**servers / math.factorial(servers)
    return min(1, top / (top + max(0, 1 - load / servers) * sum(load**k / math.factorial(k) for k in range(servers))))


def test_without_batches_it_is_the_queue_of_the_textbooks():
    constant = fleet(lambda _: 0.01, max_batch_size=1)
    run = simulate_fleet(constant, "central", Poisson(70), requests=40_000)
    assert (run.latency_s - 0.01).mean() == pytest.approx(md1_wait_s(70, 0.01), rel=0.1)
    rng = np.random.default_rng(3)
    random = fleet(lambda _: rng.exponential(0.01), max_batch_size=1, num_workers=4)
    run = simulate_fleet(random, "central", Poisson(280), requests=40_000)
    assert run.latency_s.mean() - 0.01 == pytest.approx(erlang_c(280, 0.01, 4) * 0.01 / (4 - 2.8), rel=0.1)
    assert run.utilisation == pytest.approx(0.7, rel=0.05)


def test_without_load_a_request_takes_the_link_and_one_execution():
    link = Link(rtt_ms=80, rtt_p99_ms=240, up_bytes_s=1e6, down_bytes_s=1e5, loss=0.005)
    some = fleet(link=link)
    run = simulate_fleet(some, "central", Poisson(0.1), requests=20_000)
    expected_s = link.mean_exchange_s(4_000, 500) + 0.006
    assert run.latency_s.mean() == pytest.approx(expected_s, rel=0.05)


def test_per_server_many_behave_as_few_do():
    some = fleet()
    few, many = (
        simulate_fleet(some, "central", Poisson(450 * servers), servers=servers, requests=5_000 * servers)
        for servers in (SLICE, 4 * SLICE)
    )
    assert few.quantile_s(0.99) == pytest.approx(many.quantile_s(0.99), rel=0.1)
    assert few.utilisation == pytest.approx(many.utilisation, rel=0.03)
    assert few.batch_size.mean() == pytest.approx(many.batch_size.mean(), rel=0.05)


# ------------------------------------------------------------------------------------------- the real server


class Slow(Tagged):
    """Takes a known time without taking a core, so that it does not fight the generator for one."""

    def forward(self, x):
        time.sleep(0.015 + 0.002 * len(x))
        return super().forward(x)


def measured_s(call, repeats=5):
    times = [time.perf_counter()]
    for _ in range(repeats):
        call()
        times.append(time.perf_counter())
    return np.median(np.diff(times))


@pytest.mark.parametrize("over", ["in process", "rest through a proxy"])
def test_the_real_server_is_within_ten_percent(over):
    """150 requests at their intended times through the real batcher, and the same arrivals in virtual time.

    Service times are measured a moment before, through the whole server. The nearest of five rounds counts, and what
    four late wake-ups in turn add is forgiven: what else the machine does only ever makes the real side slower.
    """
    settings, sizes = {"max_batch_size": 8, "num_workers": 1}, (1, 4, 8)
    link = Link(rtt_ms=0 if over == "in process" else 60)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(Slow(), **settings))
        predict = server.predict
        if over != "in process":
            endpoint = stack.enter_context(flserving.serve(server, hosts=("127.0.0.1",)))  # any port: the proxy's
            proxy = stack.enter_context(Proxy(link, "127.0.0.1", int(endpoint.url.rsplit(":", 1)[1])))
            client = stack.enter_context(Client(f"http://127.0.0.1:{proxy.port}", endpoint.token))
            closed_loop(lambda _: client.predict(row(1)), callers=16, requests=48, progress=False)  # handshakes
            predict = client.predict

        def compare():
            seconds = [measured_s(lambda: server.predict(np.ones((n, 2), np.float32))) for n in sizes]  # noqa: B023
            with Bystander() as beside:
                real = open_loop(lambda _: predict(row(1)), Poisson(80), requests=150, progress=False, seed=4)
            assert real.failures == {}
            run = simulate_fleet(
                fleet(lambda n: float(np.interp(n, sizes, seconds)), link, **settings), "central", real.arrival_s
            )
            apart_s = real.latency_ms.mean() / 1e3 - run.latency_s.mean()
            allowed_s = 0.1 * run.latency_s.mean() + (4 * beside.late_s if apart_s > 0 else 0)
            rate = real.seconds / (run.arrival_s + run.latency_s).max()
            near = abs(apart_s) <= allowed_s and 0.9 < rate < 1.1
            return near, beside.late_s, {"apart_s": apart_s, "allowed_s": allowed_s, "ratio of rates": rate}

        prove(compare, tries=5)


# ------------------------------------------------------------------------------- architectures and outages


def test_at_the_edge_the_network_does_not_matter():
    run = simulate_fleet(fleet(link=Link(outages=[(0, math.inf)])), "edge", Poisson(1e4), requests=1_000)
    assert (run.latency_s == 0.003).all() and (run.path == LOCAL).all()
    assert (run.availability, run.utilisation) == (1, 0)


A_MINUTE = arrival_times_s(Poisson(300), np.random.default_rng(0), seconds=60)


def test_in_an_outage_the_centre_fails_exactly_those_who_cannot_wait_for_its_end():
    some = fleet(lambda n: 1e-6, link=Link(outages=[(10, 20)]), deadline_s=2)
    run = simulate_fleet(some, "central", A_MINUTE)
    unlucky = (run.arrival_s >= 10) & (run.arrival_s < 18)
    np.testing.assert_array_equal(run.path, np.where(unlucky, FAILED, CLOUD))
    assert run.availability == pytest.approx(1 - 8 / 60, abs=0.02)
    assert run.quantile_s(0.5) < 0.001 and run.quantile_s(0.99) == math.inf
    assert run.latency_s[np.isfinite(run.latency_s)].max() <= 2


def test_in_an_outage_a_hybrid_degrades_and_never_fails():
    some = fleet(lambda n: 1e-6, link=Link(rtt_ms=20, outages=[(10, 20)]), deadline_s=2)
    run = simulate_fleet(some, "hybrid", A_MINUTE)
    asked = run.path != LOCAL
    assert 1 - asked.mean() == pytest.approx(0.75, abs=0.02)
    lost = (run.arrival_s > 9.98) & (run.arrival_s < 17.98)
    sure = lost | (run.arrival_s < 9.9) | (run.arrival_s > 18.1)  # a round trip either side is a matter of ms
    np.testing.assert_array_equal(run.path[asked & sure], np.where(lost, DEGRADED, CLOUD)[asked & sure])
    assert run.availability == 1
    assert (run.latency_s[run.path == LOCAL] == 0.003).all() and (run.latency_s[run.path == DEGRADED] == 2).all()
    assert run.latency_s[run.path == CLOUD].min() == pytest.approx(0.003 + 0.020 + 1e-6)
    assert sum(run.shares.values()) == pytest.approx(1) and tuple(run.shares) == PATHS


@pytest.mark.parametrize("architecture", ["central", "hybrid"])
def test_an_overloaded_cloud_refuses_drops_and_stays_useful(architecture):
    """Three times what full batches can do, and a queue shorter than the deadline: nearly all of it is answered."""
    some = fleet(deadline_s=0.2, local_share=0.0, max_queue_rows=80)
    capacity_per_s = 8 / 0.013
    run = simulate_fleet(some, architecture, Poisson(3 * capacity_per_s), requests=20_000)
    answered = run.path == CLOUD
    assert run.latency_s[answered].max() <= 0.2
    assert answered.sum() / run.arrival_s.max() > 0.95 * capacity_per_s
    assert 0.99 < run.utilisation <= 1
    assert run.shares["degraded" if architecture == "hybrid" else "failed"] > 0.6
    long = simulate_fleet(fleet(deadline_s=0.2), architecture, Poisson(3 * capacity_per_s), requests=20_000)
    assert (long.path == CLOUD).sum() < answered.sum()  # whose turn comes as its deadline does is served in vain


def test_the_same_seeds_give_the_same_run():
    some = fleet(link=Link(rtt_ms=20, rtt_p99_ms=80, loss=0.01, seed=3))
    first, again, other = (simulate_fleet(some, "hybrid", Poisson(100), requests=500, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.latency_s, again.latency_s)
    assert not np.array_equal(first.arrival_s, other.arrival_s)


def test_nobody_there():
    run = simulate_fleet(fleet(), "central", np.array([]))
    assert (len(run.arrival_s), run.utilisation, math.isnan(run.quantile_s(0.5))) == (0, 0, True)


# -------------------------------------------------------------------------------------------------- the plan

PRICES = Prices(server_hour=0.5, egress_gb=0.08, ingress_gb=0.01)
DAY = {
    "clients": 1_000_000,
    "requests_per_client_day": 50,
    "peak_to_mean": 2.0,
    "p99_s": 0.2,
    "update_nbytes": 2.6e6,
    "updates_per_day": 1.0,
    "server_egress_bytes_s": 1e7,
    "cloud_away": 0.001,
    "prices": PRICES,
    "requests": 4_000,
}


def test_a_plan_for_a_million_clients_adds_up():
    some = fleet(link=Link(rtt_ms=40, rtt_p99_ms=100, up_bytes_s=1e6, down_bytes_s=1e6), deadline_s=1)
    table = plan(some, **DAY)
    assert list(table.index) == ["central", "edge", "hybrid"]
    peak_per_s = 50e6 / 86_400 * 2
    np.testing.assert_allclose(table.peak_per_s, [peak_per_s, 0, 0.25 * peak_per_s])
    np.testing.assert_allclose(table.up_gb, [200, 0, 50])
    np.testing.assert_allclose(table.down_gb, [25, 0, 6.25])
    np.testing.assert_allclose(table.updates_gb, [0, 2_600, 2_600])
    cost = table.servers * 24 * 0.5 + table.up_gb * 0.01 + (table.down_gb + table.updates_gb) * 0.08
    np.testing.assert_allclose(table.cost_per_day, cost)
    np.testing.assert_allclose(table.cost_per_million, cost / 50)
    assert table.servers.edge == math.ceil(2.6e12 / 86_400 / 1e7)  # 30 MB a second leave for the devices
    assert table.servers.central >= peak_per_s / (8 / 0.013)
    assert (table.p99_ms < 200).all() and table.p99_ms.edge == pytest.approx(3)
    np.testing.assert_allclose(table.availability, [0.999, 1, 1], atol=1e-4)
    assert table.degraded.hybrid == pytest.approx(0.25 * 0.001, rel=0.1)
    delta = plan(some, **DAY | {"update_nbytes": 1e5})
    assert delta.cost_per_day.edge < 0.1 * table.cost_per_day.edge
    ten = plan(some, **DAY | {"clients": 10_000_000})
    assert ten.servers.central == pytest.approx(10 * table.servers.central, rel=0.3)


@pytest.mark.parametrize("p99_s", [0.05, 0.2])
def test_the_servers_of_a_plan_keep_the_target_and_one_in_five_less_would_not(p99_s):
    some = fleet(link=Link(rtt_ms=20))
    rate = sustainable_per_s(some, p99_s, requests=6_000)
    p99 = lambda r: simulate_fleet(some, "central", Poisson(r), servers=SLICE, requests=16_000).quantile_s(0.99)  # noqa: E731
    assert p99(0.95 * rate) <= 1.05 * p99_s
    assert p99(1.25 * rate) > p99_s


def test_headroom_is_kept():
    assert sustainable_per_s(fleet(), 10, requests=1_000) <= 0.9 * SLICE * 8 / 0.013


def test_without_batching_simulation_and_erlang_name_about_the_same_number():
    """Erlang's service times are exponential, and its queue is common: errors of opposite sign, both small at 50 ms."""
    some = fleet(lambda n: 0.005 * n, max_batch_size=1, link=Link(rtt_ms=20))
    table = plan(some, **DAY | {"p99_s": 0.07, "clients": 200_000, "requests": 8_000, "updates_per_day": 0})
    rate, spare_s = table.peak_per_s.central, 0.07 - 0.02 - 0.005
    for enough in itertools.count(1):  # the least number with P(wait > t) = C exp(-t (servers - load) / service time)
        if erlang_c(rate, 0.005, enough) * math.exp(-spare_s * (enough - rate * 0.005) / 0.005) <= 0.01:
            break
    assert table.servers.central == pytest.approx(enough, abs=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"p99_s": 0.01}, "no number of servers"),
        ({"clients": 0}, "clients is 0"),
        ({"p99_s": math.nan}, "p99_s is nan"),
        ({"peak_to_mean": 0.5}, "peak_to_mean 0.5"),
        ({"cloud_away": 2}, "cloud_away 2"),
        ({"update_nbytes": -1}, "update_nbytes -1"),
    ],
    ids=str,
)
def test_a_plan_out_of_range_is_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        plan(fleet(link=Link(rtt_ms=40)), **DAY | {"requests": 200} | change)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fleet(local_share=1.5), "local_share is 1.5"),
        (lambda: fleet(device_s=math.nan), "device_s is nan"),
        (lambda: Prices(server_hour=-1, egress_gb=0, ingress_gb=0), "server_hour is -1"),
        (lambda: simulate_fleet(fleet(), "cloudy", Poisson(1)), "architecture is 'cloudy'"),
        (lambda: simulate_fleet(fleet(), "central", Poisson(1), servers=0), "servers is 0"),
        (lambda: simulate_fleet(fleet(lambda n: math.nan), "central", Poisson(1), requests=1), "service_s\\(1\\)"),
    ],
    ids=["share", "device", "price", "architecture", "servers", "service"],
)
def test_settings_out_of_range_are_refused_with_the_value(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
