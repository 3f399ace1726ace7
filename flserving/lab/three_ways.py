"""One stream of requests, answered centrally, on the devices, and by both, over any link, in virtual time.

What both models say to each request is measured beforehand with real servers, once; only time, network and choice of
path are played here, so a slider may ask for any network. Imports no pandas at import time.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flserving.edge.breaker import CircuitBreaker
from flserving.lab.arrivals import Floats
from flserving.lab.capacity import plan
from flserving.lab.fleet import Fleet
from flserving.lab.network import Link
from flserving.serving.config import ServingConfig

if TYPE_CHECKING:
    import pandas as pd

Way = Literal["central", "edge", "hybrid"]
WAYS: tuple[Way, ...] = ("central", "edge", "hybrid")
PATHS = ("local", "cache", "cloud", "degraded", "failed")
SPAN_S = 60.0
"""How long a stream lasts."""
_FAILURES, _PAUSE_S = 3, 5.0  # of a device's circuit breaker


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a request takes: seconds on the device and on the server (without the network), bytes on the wire."""

    local_s: float
    cloud_s: float
    request_nbytes: int
    response_nbytes: int


def stream(pool: "pd.DataFrame", requests: int, *, repeats: float = 0.2, seed: int = 0) -> "pd.DataFrame":
    """Requests of one minute, drawn from a pool.

    Args:
        pool: One line per row that may be asked, with the columns ``device``, ``confidence`` (of the device's answer),
            ``local_right``, ``cloud_right``.
        repeats: Share of the requests that ask an earlier one's row again.

    Returns:
        The lines in order of time, with ``at_s`` and ``row``: requests of the same number ask the same device for the
        same row. (A line of the pool that is drawn twice is another row of the kind.)
    """
    rng = np.random.default_rng(seed)
    lines, row = rng.permutation(np.resize(rng.permutation(len(pool)), requests)), np.arange(requests)
    for place in np.flatnonzero(rng.random(requests) < repeats)[1:]:
        earlier = rng.integers(place)
        lines[place], row[place] = lines[earlier], row[earlier]
    asked = pool.iloc[lines].reset_index(drop=True)
    return asked.assign(row=row, at_s=np.sort(rng.uniform(0, SPAN_S, requests)))


def play(asked: "pd.DataFrame", way: Way, link: Link, costs: Costs, *, threshold: float = 0.9,
         deadline_s: float = 1.0) -> "pd.DataFrame":  # fmt: skip
    """How the stream is answered.

    ``hybrid`` is the policy ``local_first`` with every device fresh and its owner's consent: the device answers alone
    if its confidence reaches ``threshold``, else its cache of cloud answers, else the cloud, else the device after all
    (``degraded``). A device's circuit breaker opens after three failures in a row, for 5 s.

    Args:
        asked: See :func:`stream`. ``link``: between every device and the cloud; it draws.
        deadline_s: How long an answer of the cloud is waited for.

    Returns:
        One line per request: ``at_s``, ``path`` (an entry of ``PATHS``), ``latency_s`` (``inf``: no answer),
        ``right``, ``sent`` (went to the cloud).

    Cost: 2 ms for 2,000 requests, the hybrid 5 ms.
    """
    at_s = asked["at_s"].to_numpy()
    local, latency_s = np.full(len(at_s), "local", object), np.full(len(at_s), costs.local_s)
    sent, right = np.zeros(len(at_s), bool), asked["local_right"].to_numpy().copy()
    if way == "central":
        took_s = link.exchanges_s(costs.request_nbytes, costs.response_nbytes, at_s, costs.cloud_s)
        late = took_s > deadline_s
        latency_s = np.where(late, np.inf, took_s)
        local, sent, right = np.where(late, "failed", "cloud"), ~sent, asked["cloud_right"].to_numpy() & ~late
    elif way == "hybrid":
        unsure = np.flatnonzero(asked["confidence"].to_numpy() < threshold)
        leaves_s = at_s[unsure] + costs.local_s
        took_s = link.exchanges_s(costs.request_nbytes, costs.response_nbytes, leaves_s, costs.cloud_s)
        paths, waits_s = _asked(asked.iloc[unsure], leaves_s, took_s, deadline_s)
        local[unsure], latency_s[unsure] = paths, costs.local_s + waits_s
        sent[unsure] = (paths == "cloud") | (waits_s > 0)
        by_cloud = unsure[(paths == "cloud") | (paths == "cache")]
        right[by_cloud] = asked["cloud_right"].to_numpy()[by_cloud]
    return asked[["at_s"]].assign(path=local, latency_s=latency_s, right=right, sent=sent)


def _asked(
    unsure: "pd.DataFrame", leaves_s: Floats, took_s: Floats, deadline_s: float
) -> tuple[np.ndarray[Any, np.dtype[np.object_]], Floats]:
    """Path of each request that its device is not sure of, and how long it waits for the cloud."""
    now_s = 0.0
    cached_s: dict[tuple[int, int], float] = {}  # from when on a device's cache holds the answer
    breakers = {device: CircuitBreaker(_FAILURES, _PAUSE_S, lambda: now_s) for device in set(unsure["device"])}
    paths, waits_s = np.full(len(unsure), "cloud", object), np.zeros(len(unsure))
    for place, (device, row) in enumerate(zip(unsure["device"], unsure["row"], strict=True)):
        now_s = leaves_s[place]
        if cached_s.get((device, row), math.inf) <= now_s:
            paths[place] = "cache"
        elif not breakers[device].allow():
            paths[place] = "degraded"
        elif took_s[place] <= deadline_s:
            waits_s[place] = took_s[place]
            cached_s[device, row] = now_s + took_s[place]
            breakers[device].record(True)
        else:
            paths[place], waits_s[place] = "degraded", deadline_s
            now_s += deadline_s
            breakers[device].record(False)
    return paths, waits_s


def summary(played: "pd.DataFrame") -> dict[str, float]:
    """What matters of a run, in percent of all requests and in ms; a latency is infinite where so many got nothing."""
    paths, latency_ms = played["path"], played["latency_s"] * 1e3
    return {
        "answered (%)": 100 * float((paths != "failed").mean()),
        "right (%)": 100 * float(played["right"].mean()),
        "left the device (%)": 100 * float(played["sent"].mean()),
        "p50 (ms)": float(np.percentile(latency_ms, 50, method="higher")),
        "p95 (ms)": float(np.percentile(latency_ms, 95, method="higher")),
    }


def at_every_threshold(asked: "pd.DataFrame", thresholds: "list[float] | Floats", costs: Costs, seed: int = 0,
                       **link: Any) -> "pd.DataFrame":  # fmt: skip
    """:func:`summary` of the hybrid by threshold; every run sees the same draws of ``Link(**link)``."""
    import pandas as pd

    runs = [
        summary(play(asked, "hybrid", Link(seed=seed, **link), costs, threshold=float(threshold)))
        for threshold in thresholds
    ]
    return pd.DataFrame(runs, index=pd.Index([float(t) for t in thresholds], name="threshold"))


def play_all(asked: "pd.DataFrame", costs: Costs, threshold: float, **link: Any) -> "dict[Way, pd.DataFrame]":
    """:func:`play` for every way, each over its own ``Link(**link)`` with the same draws."""
    return {way: play(asked, way, Link(seed=1, **link), costs, threshold=threshold) for way in WAYS}


def minute(asked: "pd.DataFrame", costs: Costs, rtt_ms: int, loss_percent: float, outage_percent: int,
           threshold: float) -> "dict[Way, pd.DataFrame]":  # fmt: skip
    """The stream over a mobile network of 1 and 4 MB/s, whose p99 is three times its ``rtt_ms``, with an outage."""
    away_s = SPAN_S * outage_percent / 100
    link = {"rtt_ms": rtt_ms, "rtt_p99_ms": 3 * rtt_ms, "up_bytes_s": 1e6, "down_bytes_s": 4e6}
    outages = [(15.0, 15.0 + away_s)] if away_s else []
    return play_all(asked, costs, threshold, loss=loss_percent / 100, outages=outages, **link)


def fleet_plan(million_devices: int, requests_a_day: int, leave_percent: int, update_kb: int, *, rate_per_s: float,
               costs: Costs, **day: Any) -> "pd.DataFrame":  # fmt: skip
    """:func:`capacity.plan` for devices on a mobile network and server processes that answer ``rate_per_s`` each, one
    request at a time.

    Args:
        leave_percent: What of a hybrid's requests goes to the cloud. ``update_kb``: what a device pulls, once a day.
        day: Further arguments of the plan.
    """
    fleet = Fleet(
        service_s=lambda size: size / rate_per_s,
        link=Link(rtt_ms=50, rtt_p99_ms=150),
        request_nbytes=costs.request_nbytes,
        response_nbytes=costs.response_nbytes,
        device_s=costs.local_s,
        local_share=1 - leave_percent / 100,
        deadline_s=1.0,
        config=ServingConfig(max_batch_size=1, num_workers=1),
    )
    return plan(fleet, clients=1_000_000 * million_devices, requests_per_client_day=requests_a_day,
                update_nbytes=1e3 * update_kb, updates_per_day=1, requests=2000, **day)  # fmt: skip
