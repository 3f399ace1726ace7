"""A fleet in virtual time: many devices, their links, and servers. ``lab/capacity.py`` asks it what a million need.

The servers follow :class:`~flserving.serving.batching.policy.BatchQueue`, the code that the real server runs, on
simpy's clock; the links are :class:`~flserving.lab.network.Link`. Three architectures answer the same requests:

- ``central``: every request crosses the link, waits for a batch, and comes back;
- ``edge``: the device answers, the link carries model updates only;
- ``hybrid``: the device tries; a share ``local_share`` ends there, the rest goes to the cloud, and what has not come
  back by the deadline is answered by the device's own, less sure, answer ("degraded").

Assumed: devices never queue, servers fail only through their queue limit, clients do not try again.
"""

import copy
import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError, OverloadedError
from flserving.lab.arrivals import Arrivals, Floats, Ints, arrival_times_s
from flserving.lab.network import Link
from flserving.serving.batching.policy import BatchQueue, QueuedRequest
from flserving.serving.config import ServingConfig

Architecture = Literal["central", "edge", "hybrid"]
PATHS = ("failed", "local", "cloud", "degraded")
"""How a request ended; ``FleetRun.path`` holds indices into this."""
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What the devices, the network and one server are like.

    Args:
        service_s: Seconds that a server takes for a batch of n rows, as measured (with several workers: all busy) or
            any function; it may draw at random and is called once per batch.
        link: Of every device; an outage hits all of them. Runs draw from a copy: the same link, the same run.
        request_nbytes, response_nbytes: On the wire, headers included.
        device_s: Seconds of a local answer.
        local_share: Share of the requests that a hybrid's device answers alone.
        deadline_s: When a caller gives up; the server drops what has passed it in the queue.
        config: Batching, workers, queue limit and timeout of a server.
    """

    service_s: Callable[[int], float]
    link: Link
    request_nbytes: float
    response_nbytes: float
    device_s: float
    local_share: float
    deadline_s: float
    config: ServingConfig = field(default_factory=ServingConfig)

    def __post_init__(self) -> None:
        for name in ("request_nbytes", "response_nbytes", "device_s", "deadline_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be a finite number of at least 0")
        if not 0 <= self.local_share <= 1:
            raise ConfigError(f"local_share is {self.local_share!r}: it must lie in [0, 1], e.g. 0.8")


@dataclass(frozen=True, eq=False)
class FleetRun:
    """N requests in order of arrival, B batches in order of their start.

    Args:
        arrival_s: float64 [N].
        latency_s: From arrival to answer, float64 [N]; ``inf`` for failed ones.
        path: Indices into ``PATHS``, int8 [N].
        batch_size: int64 [B].
        utilisation: Busy time of all workers over the time that they had.
    """

    arrival_s: Floats
    latency_s: Floats
    path: npt.NDArray[np.int8]
    batch_size: Ints
    utilisation: float

    @property
    def shares(self) -> dict[str, float]:
        """Share of the requests per path; they sum to 1."""
        return dict(zip(PATHS, (np.bincount(self.path, minlength=4) / max(1, len(self.path))).tolist(), strict=True))

    @property
    def availability(self) -> float:
        """Share of the requests that were answered by their deadline, degraded ones included."""
        return 1 - self.shares["failed"]

    def quantile_s(self, q: float) -> float:
        """Latency that a share ``q`` of all requests does not exceed: ``inf`` when more than the rest failed."""
        return float(np.quantile(self.latency_s, q, method="inverted_cdf")) if len(self.latency_s) else math.nan


def simulate_fleet(
    fleet: Fleet,
    architecture: Architecture,
    arrivals: Arrivals | Floats,
    *,
    servers: int = 1,
    requests: int = 20_000,
    seed: int = 0,
) -> FleetRun:
    """Send requests through one architecture.

    Args:
        fleet: See :class:`Fleet`.
        architecture: "central", "edge" or "hybrid".
        arrivals: Of all devices together: ``Poisson(rate_per_s)``, or the times themselves, ascending.
        servers: Machines. A request goes to the less busy of two drawn at random (Mitzenmacher, "The power of two
            choices in randomized load balancing", IEEE TPDS 12(10), 2001): per server, many behave as few do.
        requests: At most so many.
        seed: Of arrivals, choices and shares; the link has its own.

    Raises:
        ConfigError: A setting out of range, or a service time that is negative or not finite.

    Cost: some 20 us a request that reaches a server, 0.1 us of the others.
    """
    if architecture not in get_args(Architecture):
        raise ConfigError(f"architecture is {architecture!r}: choose one of {', '.join(get_args(Architecture))}")
    if isinstance(servers, bool) or not isinstance(servers, int) or servers < 1:
        raise ConfigError(f"servers is {servers!r}: it must be an integer of at least 1")
    rng, link = np.random.default_rng(seed), copy.deepcopy(fleet.link)
    if isinstance(arrivals, np.ndarray):
        arrival_s = arrivals[slice(requests)].astype(np.float64)
    else:
        arrival_s = arrival_times_s(arrivals, rng, requests=requests)
    count = len(arrival_s)
    tries_locally = architecture != "central"
    local = rng.random(count) < {"central": 0.0, "edge": 1.0, "hybrid": fleet.local_share}[architecture]
    path = np.where(local, PATHS.index("local"), PATHS.index("cloud")).astype(np.int8)
    latency_s = np.full(count, fleet.device_s, np.float64)

    away = np.flatnonzero(~local)
    gives_up_s = arrival_s[away] + fleet.deadline_s
    sent_s = arrival_s[away] + tries_locally * fleet.device_s
    half_s = link.rtts_s(sent_s.shape) / 2
    request, response = (np.full(len(away), nbytes) for nbytes in (fleet.request_nbytes, fleet.response_nbytes))
    reach_s = link.finish_s(sent_s, link.line_s(request, up=True) + link.delay_s(request, half_s))
    done_s, batches, busy_s = _serve(fleet, reach_s, gives_up_s, servers, rng)
    back_s = link.finish_s(done_s, link.line_s(response, up=False) + link.delay_s(response, half_s))
    in_time = back_s <= gives_up_s
    late = away[~in_time]
    latency_s[away] = back_s - arrival_s[away]
    latency_s[late] = fleet.deadline_s if tries_locally else math.inf
    path[late] = PATHS.index("degraded" if tries_locally else "failed")
    span_s = max([*arrival_s[-1:], *done_s[np.isfinite(done_s)]], default=0.0)
    return FleetRun(
        arrival_s=arrival_s,
        latency_s=latency_s,
        path=path,
        batch_size=np.array(batches, np.int64),
        utilisation=busy_s / (span_s * servers * fleet.config.num_workers) if span_s else 0.0,
    )


def _serve(
    fleet: Fleet, reach_s: Floats, gives_up_s: Floats, servers: int, rng: np.random.Generator
) -> tuple[Floats, list[int], float]:
    """When each request's batch ends (``inf``: refused, expired, or never here), the batches' sizes, the busy time."""
    import simpy

    config, env = fleet.config, simpy.Environment()
    wait_s = config.max_wait_time_ms / 1e3
    queues: list[BatchQueue[str]] = [
        BatchQueue(config.max_batch_size, wait_s, config.max_queue_rows, config.batching) for _ in range(servers)
    ]
    idle, under_way = [config.num_workers] * servers, [0] * servers
    done_s, batches, busy_s = np.full(len(reach_s), np.inf), list[int](), 0.0

    def start(server: int) -> None:
        nonlocal busy_s
        while idle[server] and (batch := queues[server].take(env.now)[0]):
            took_s = fleet.service_s(len(batch))
            if not 0 <= took_s < math.inf:
                raise ConfigError(f"service_s({len(batch)}) is {took_s!r}: it must be finite seconds, at least 0")
            idle[server] -= 1
            under_way[server] += len(batch)
            busy_s += took_s
            batches.append(len(batch))
            later(took_s, functools.partial(finish, server, batch))

    def finish(server: int, batch: list[QueuedRequest[str]]) -> None:
        done_s[[request.payload for request in batch]] = env.now
        idle[server] += 1
        under_way[server] -= len(batch)
        start(server)

    def later(delay_s: float, call: Callable[[], None]) -> None:
        env.timeout(delay_s).callbacks.append(lambda _: call())

    def arrive() -> Generator[simpy.Event, None, None]:
        choices = rng.integers(servers, size=(len(reach_s), 2)).tolist()
        for number in np.argsort(reach_s, kind="stable").tolist():
            if not reach_s[number] < gives_up_s[number]:
                continue  # the caller has gone before it is here
            yield env.timeout(max(0.0, reach_s[number] - env.now))
            server = min(choices[number], key=lambda s: queues[s].rows + under_way[s])
            deadline_s = min(gives_up_s[number], env.now + config.timeout_ms / 1e3)
            try:
                queues[server].push(QueuedRequest("", number, 1, env.now, deadline_s))
            except OverloadedError:
                continue
            start(server)
            if config.batching == "hold_until_full":
                later(wait_s, functools.partial(start, server))  # its turn by waiting alone

    env.process(arrive())
    env.run()
    return done_s, batches, busy_s
