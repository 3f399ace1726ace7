"""What a million clients need: servers for a latency target, bytes a day, cost, for the three architectures.

Measure what a server takes for a batch, simulate a few servers at the busiest hour, multiply. Every price and size is
a parameter with its unit; nothing is assumed about a provider.
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, get_args

from flserving.errors import ConfigError
from flserving.lab.arrivals import Poisson
from flserving.lab.fleet import DAY_S, Architecture, Fleet, simulate_fleet

if TYPE_CHECKING:
    import pandas as pd

GB = 1e9
SLICE = 4
"""Servers that are simulated in place of many."""
HEADROOM = 0.1
"""Share of what full batches allow that is never used: queues near it take longer to build up than a run lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """In any one currency: an hour of a server; a GB (1e9 bytes) out of the data centre; a GB into it."""

    server_hour: float
    egress_gb: float
    ingress_gb: float

    def __post_init__(self) -> None:
        for price in fields(self):
            if not 0 <= getattr(self, price.name) < math.inf:
                raise ConfigError(f"{price.name} is {getattr(self, price.name)!r}: a finite price of at least 0")


def sustainable_per_s(fleet: Fleet, p99_s: float, requests: int = 20_000) -> float:
    """Highest rate of requests to the cloud at which ``SLICE`` servers keep the 99th percentile of its answers.

    Nine bisections over the same draws, between nothing and what full batches allow: exact to 0.2 % of that.

    Args:
        fleet, requests: As in ``simulate_fleet``.
        p99_s: The target, network included.

    Raises:
        ConfigError: Not even a single request at a time makes it: the network or one execution is too slow.

    Cost: ten simulations; 2 to 4 s for 20,000 requests.
    """
    size = fleet.config.max_batch_size
    capacity_per_s = SLICE * fleet.config.num_workers * size / max(fleet.service_s(size), 1e-9)
    low, high = 0.0, (1 - HEADROOM) * capacity_per_s
    if not (alone_s := _p99_s(fleet, 1e-3 * high, SLICE, requests)) <= p99_s:
        raise ConfigError(
            f"the 99th percentile without load is {alone_s:.3g} s, the target is {p99_s:g} s: no number of servers "
            "helps; look at the link, service_s(1) and deadline_s"
        )
    for _ in range(9):
        middle = (low + high) / 2
        enough = _p99_s(fleet, middle, SLICE, requests) <= p99_s
        low, high = (middle, high) if enough else (low, middle)
    return low


def plan(
    fleet: Fleet,
    *,
    clients: int,
    requests_per_client_day: float,
    peak_to_mean: float,
    p99_s: float,
    update_nbytes: float,
    updates_per_day: float,
    server_egress_bytes_s: float,
    cloud_away: float,
    prices: Prices,
    requests: int = 20_000,
) -> "pd.DataFrame":
    """Servers, latency, traffic and cost of a day, one row an architecture.

    Servers are bought for the busiest hour and paid all day. Enough of them that the cloud's own answers keep
    ``p99_s``; for models sent to devices, evenly over the day, enough that each sends at most ``server_egress_bytes_s``
    bytes a second.

    Args:
        fleet: Devices, link and one server. An outage in its link would be one of the busiest hour: see ``cloud_away``.
        clients, requests_per_client_day: Whose product is the day's requests.
        peak_to_mean: Rate of the busiest hour over the day's mean, at least 1.
        p99_s: Target for what the cloud answers, network included.
        update_nbytes: What a device pulls per update: the whole model, or a delta.
        updates_per_day: Rounds published a day. Devices of ``central`` pull nothing.
        cloud_away: Share of the day in which the cloud cannot be reached, e.g. 0.001.
        prices: What servers and traffic cost.
        requests: Of each simulation.

    Returns:
        Indexed by architecture: ``peak_per_s`` (requests that reach the cloud), ``servers``, ``utilisation``,
        ``p50_ms``, ``p99_ms`` (of all requests, at the busiest hour), ``availability`` and ``degraded`` (shares),
        ``up_gb``, ``down_gb``, ``updates_gb`` a day, ``cost_per_day``, ``cost_per_million`` (requests).

    Raises:
        ConfigError: A number out of range, or a target that no number of servers meets.
    """
    import pandas as pd

    numbers = {"clients": clients, "requests_per_client_day": requests_per_client_day, "p99_s": p99_s}
    for name, value in {**numbers, "server_egress_bytes_s": server_egress_bytes_s, "requests": requests}.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value!r}: it must be a finite number above 0")
    if not 1 <= peak_to_mean < math.inf or not 0 <= cloud_away <= 1:
        raise ConfigError(f"peak_to_mean {peak_to_mean!r} must be at least 1, cloud_away {cloud_away!r} in [0, 1]")
    if not 0 <= update_nbytes * updates_per_day < math.inf:
        raise ConfigError(f"update_nbytes {update_nbytes!r} and updates_per_day {updates_per_day!r}: at least 0")
    per_day = clients * requests_per_client_day
    peak_per_s = per_day / DAY_S * peak_to_mean
    per_server = sustainable_per_s(fleet, p99_s, requests) / SLICE
    rows = {}
    for architecture, goes_up in zip(get_args(Architecture), (1.0, 0.0, 1 - fleet.local_share), strict=True):
        updates_nbytes = clients * update_nbytes * updates_per_day * (architecture != "central")
        to_cloud = peak_per_s * goes_up
        servers = max(math.ceil(to_cloud / per_server), math.ceil(updates_nbytes / DAY_S / server_egress_bytes_s))
        while to_cloud and servers < SLICE and _p99_s(fleet, to_cloud, servers, requests) > p99_s:
            servers += 1  # so few share the load less well than the slice did
        few = min(max(servers, 1), SLICE)
        arrivals = Poisson(peak_per_s * few / max(servers, 1))
        run = simulate_fleet(fleet, architecture, arrivals, servers=few, requests=requests)
        lost = cloud_away * run.shares["cloud"]  # failed where the cloud is all there is, degraded in a hybrid
        up_gb, down_gb = (goes_up * per_day * nbytes / GB for nbytes in (fleet.request_nbytes, fleet.response_nbytes))
        cost = servers * 24 * prices.server_hour + up_gb * prices.ingress_gb
        cost += (down_gb + updates_nbytes / GB) * prices.egress_gb
        rows[architecture] = {
            "peak_per_s": to_cloud,
            "servers": servers,
            "utilisation": run.utilisation,
            "p50_ms": run.quantile_s(0.5) * 1e3,
            "p99_ms": run.quantile_s(0.99) * 1e3,
            "availability": run.availability - lost * (architecture == "central"),
            "degraded": run.shares["degraded"] + lost * (architecture == "hybrid"),
            "up_gb": up_gb,
            "down_gb": down_gb,
            "updates_gb": updates_nbytes / GB,
            "cost_per_day": cost,
            "cost_per_million": cost / per_day * 1e6,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("architecture")
    return table.astype({"servers": int})


def _p99_s(fleet: Fleet, rate_per_s: float, servers: int, requests: int) -> float:
    run = simulate_fleet(fleet, "central", Poisson(rate_per_s), servers=servers, requests=requests)
    return run.quantile_s(0.99)
