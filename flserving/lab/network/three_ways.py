"""One stream of requests, answered centrally, on the devices, and by both, over any link, in
virtual time.

What both models say to each request is measured beforehand with real servers, once; only time,
network and choice of path are played here, so a slider may ask for any network. Imports no pandas
at import time.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flserving.edge.breaker import CircuitBreaker
from flserving.lab.network.link import Link
from flserving.lab.queueing.arrivals import Floats

if TYPE_CHECKING:
    import pandas as pd

Way = Literal["central", "edge", "hybrid"]
WAYS: tuple[Way, ...] = ("central", "edge", "hybrid")
PATHS = ("local", "cache", "cloud", "degraded", "failed")
SPAN_S = 60.0
"""How long a stream lasts."""
_FAILURES = 3  # in a row, that open a device's circuit breaker
_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a request takes: seconds on the device and on the server (without the network), bytes on
    the wire."""

    local_s: float
    cloud_s: float
    request_nbytes: int
    response_nbytes: int


def stream(
    pool: "pd.DataFrame",
    requests: int,
    *,
    repeats: float = 0.2,
    seed: int = 0,
) -> "pd.DataFrame":
    """Requests of one minute, drawn from a pool.

    Args:
        pool: One line per row that may be asked, with the columns ``device``, ``confidence`` (of
            the device's answer), ``local_right``, ``cloud_right``.
        repeats: Share of the requests that ask an earlier one's row again.

    Returns:
        The lines in order of time, with ``at_s`` and ``row``: requests of the same number ask the
        same device for the same row. (A line of the pool that is drawn twice is another row of the
        kind.)
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(pool))
    lines = rng.permutation(np.resize(shuffled, requests))
    row = np.arange(requests)
    repeated = rng.random(requests) < repeats
    for place in np.flatnonzero(repeated)[1:]:
        earlier = rng.integers(place)
        lines[place] = lines[earlier]
        row[place] = row[earlier]
    at_s = np.sort(rng.uniform(0, SPAN_S, requests))
    asked = pool.iloc[lines].reset_index(drop=True)
    return asked.assign(row=row, at_s=at_s)


def play(
    asked: "pd.DataFrame",
    way: Way,
    link: Link,
    costs: Costs,
    *,
    threshold: float = 0.9,
    deadline_s: float = 1.0,
) -> "pd.DataFrame":
    """How the stream is answered.

    ``hybrid`` is the policy ``local_first`` with every device fresh and its owner's consent: the
    device answers alone if its confidence reaches ``threshold``, else its cache of cloud answers,
    else the cloud, else the device after all (``degraded``). A device's circuit breaker opens after
    three failures in a row, for 5 s.

    Args:
        asked: See :func:`stream`. ``link``: between every device and the cloud; it draws.
        deadline_s: How long an answer of the cloud is waited for.

    Returns:
        One line per request: ``at_s``, ``path`` (an entry of ``PATHS``), ``latency_s`` (``inf``: no
        answer), ``right``, ``sent`` (went to the cloud).

    Cost: 2 ms for 2,000 requests, the hybrid 5 ms.
    """
    at_s = np.array(asked["at_s"])
    path = np.full(len(at_s), "local", object)
    latency_s = np.full(len(at_s), costs.local_s)
    right = np.array(asked["local_right"])
    cloud_right = np.array(asked["cloud_right"])
    sent = np.full(len(at_s), way == "central")
    if way == "central":
        took_s = _cloud_s(link, costs, at_s)
        late = took_s > deadline_s
        path = np.where(late, "failed", "cloud")
        latency_s = np.where(late, np.inf, took_s)
        right = cloud_right & ~late
    elif way == "hybrid":
        unsure = np.flatnonzero(asked["confidence"] < threshold)
        leaves_s = at_s[unsure] + costs.local_s
        took_s = _cloud_s(link, costs, leaves_s)
        paths, waits_s = _asked(asked.iloc[unsure], leaves_s, took_s, deadline_s)
        path[unsure] = paths
        latency_s[unsure] += waits_s
        sent[unsure] = (paths == "cloud") | (waits_s > 0)
        by_cloud = np.isin(path, ["cloud", "cache"])
        right[by_cloud] = cloud_right[by_cloud]
    return asked[["at_s"]].assign(path=path, latency_s=latency_s, right=right, sent=sent)


def _cloud_s(link: Link, costs: Costs, at_s: Floats) -> Floats:
    return link.exchanges_s(costs.request_nbytes, costs.response_nbytes, at_s, costs.cloud_s)


def _asked(
    unsure: "pd.DataFrame",
    leaves_s: Floats,
    took_s: Floats,
    deadline_s: float,
) -> tuple[NDArray[np.object_], Floats]:
    """Path of each request that its device is not sure of, and how long it waits for the cloud."""
    now_s = 0.0
    cached_s: dict[tuple[int, int], float] = {}  # from when on a device's cache holds the answer
    breakers = {
        device: CircuitBreaker(_FAILURES, _PAUSE_S, lambda: now_s)
        for device in set(unsure["device"])
    }
    paths = np.full(len(unsure), "cloud", object)
    waits_s = np.zeros(len(unsure))
    questions = zip(unsure["device"], unsure["row"], strict=True)
    for place, (device, row) in enumerate(questions):
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
            paths[place] = "degraded"
            waits_s[place] = deadline_s
            now_s += deadline_s
            breakers[device].record(False)
    return paths, waits_s


def summary(played: "pd.DataFrame") -> dict[str, float]:
    """What matters of a run, in percent of all requests and in ms; a latency is infinite where so
    many got nothing."""
    latency_ms = 1e3 * played["latency_s"]
    answered = played["path"] != "failed"
    return {
        "answered (%)": 100 * float(answered.mean()),
        "right (%)": 100 * float(played["right"].mean()),
        "left the device (%)": 100 * float(played["sent"].mean()),
        "p50 (ms)": float(np.percentile(latency_ms, 50, method="higher")),
        "p95 (ms)": float(np.percentile(latency_ms, 95, method="higher")),
    }


def at_every_threshold(
    asked: "pd.DataFrame",
    thresholds: Iterable[float],
    costs: Costs,
    seed: int = 0,
    **link: Any,
) -> "pd.DataFrame":
    """:func:`summary` of the hybrid by threshold; every run sees the same draws of
    ``Link(**link)``."""
    import pandas as pd

    runs = {}
    for threshold in thresholds:
        drawn = Link(seed=seed, **link)
        played = play(asked, "hybrid", drawn, costs, threshold=threshold)
        runs[float(threshold)] = summary(played)
    return pd.DataFrame.from_dict(runs, orient="index").rename_axis("threshold")


def play_all(
    asked: "pd.DataFrame",
    costs: Costs,
    threshold: float,
    **link: Any,
) -> "dict[Way, pd.DataFrame]":
    """:func:`play` for every way, each over its own ``Link(**link)`` with the same draws."""
    return {way: play(asked, way, Link(seed=1, **link), costs, threshold=threshold) for way in WAYS}


def minute(
    asked: "pd.DataFrame",
    costs: Costs,
    rtt_ms: int,
    loss_percent: float,
    outage_percent: int,
    threshold: float,
) -> "dict[Way, pd.DataFrame]":
    """The stream over a mobile network of 1 and 4 MB/s, whose p99 is three times its ``rtt_ms``,
    with an outage."""
    away_s = SPAN_S * outage_percent / 100
    return play_all(
        asked,
        costs,
        threshold,
        rtt_ms=rtt_ms,
        rtt_p99_ms=3 * rtt_ms,
        up_bytes_s=1e6,
        down_bytes_s=4e6,
        loss=loss_percent / 100,
        outages=[(15.0, 15.0 + away_s)] if away_s else [],
    )
