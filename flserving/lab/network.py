"""The network between a device and a server: round trips, bandwidth, loss and outages, in virtual time.

A :class:`Link` answers how long a message takes; it neither sleeps nor sends. ``lab/proxy.py`` makes a real connection
as slow as a link says, ``lab/fleet.py`` puts a million of them in front of servers.

The model, for one message of n bytes on a warm connection (handshake and slow start are over; add an exchange of
nothing for each round trip that a new connection costs: one for TCP, one more for TLS 1.3):

- half a round trip, constant or lognormal, the same draw for both halves of an exchange;
- n bytes over the bandwidth. Under loss p, what goes beyond the first three segments goes no faster than
  (MSS / RTT) sqrt(3 / 2p): Mathis et al., "The macroscopic behavior of the TCP congestion avoidance algorithm",
  ACM CCR 27(3), 1997. There, duplicate acknowledgements repair a loss while data flow on;
- three segments or fewer draw too few duplicates (RFC 5681, section 3.2), so that a loss among them costs a timeout:
  max(floor, SRTT + 4 RTTVAR), doubled each time it is lost again, up to 60 s (RFC 6298, sections 2 and 5);
- an outage stops everything under way; it goes on where it was when the outage ends.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flserving.errors import ConfigError

Floats = npt.NDArray[np.float64]

SEGMENT_NBYTES = 1460
"""TCP payload of one Ethernet frame: 1,500 bytes without the headers of IPv4 and TCP."""
_P99 = 2.3263478740408408  # standard normal quantile
_MIN_RTO_S, _MAX_RTO_S = 0.2, 60.0  # as in Linux; RFC 6298 asks for 1 s at least


class Link:
    """One path to a server.

    Args:
        rtt_ms: Round trip without load; the median when ``rtt_p99_ms`` is given.
        rtt_p99_ms: Makes the round trip lognormal with this 99th percentile; None keeps it constant.
        up_bytes_s, down_bytes_s: Bandwidth from the device, and towards it; may be ``inf``.
        loss: Chance that a segment is lost, independent of all others, in [0, 0.5).
        outages: Intervals (start_s, end_s) in which nothing passes, ascending and apart; an end may be ``inf``.
        seed: Seed of all draws. Threads may share a link: numpy's generator locks.

    Raises:
        ConfigError: A setting out of range.
    """

    def __init__(
        self,
        *,
        rtt_ms: float = 0.0,
        rtt_p99_ms: float | None = None,
        up_bytes_s: float = math.inf,
        down_bytes_s: float = math.inf,
        loss: float = 0.0,
        outages: Sequence[tuple[float, float]] = (),
        seed: int = 0,
    ) -> None:
        if not 0 <= rtt_ms < math.inf:
            raise ConfigError(f"rtt_ms is {rtt_ms!r}: it must be finite, at least 0")
        if rtt_p99_ms is not None and not 0 < rtt_ms <= rtt_p99_ms < math.inf:
            raise ConfigError(f"rtt_p99_ms is {rtt_p99_ms!r}: it must be finite, at least the median {rtt_ms!r} > 0")
        if not up_bytes_s > 0 or not down_bytes_s > 0:
            raise ConfigError(f"up_bytes_s {up_bytes_s!r} and down_bytes_s {down_bytes_s!r} must be above 0")
        if not 0 <= loss < 0.5:
            raise ConfigError(f"loss is {loss!r}: it must lie in [0, 0.5), e.g. 0.01")
        edges = [edge for outage in outages for edge in outage]
        finite = all(map(math.isfinite, edges[:-1])) and all(len(outage) == 2 for outage in outages)
        if not finite or any(not a < b for a, b in itertools.pairwise(edges)):
            raise ConfigError(f"outages are {list(outages)!r}: they must be (start_s, end_s), ascending and apart")
        self.rtt_s, self.loss = rtt_ms / 1e3, loss
        self._sigma = 0.0 if rtt_p99_ms is None else math.log(rtt_p99_ms / rtt_ms) / _P99
        self.mean_rtt_s = self.rtt_s * math.exp(self._sigma**2 / 2)
        deviation_s = 2 * self.mean_rtt_s * math.erf(self._sigma / math.sqrt(8))  # E|RTT - mean| of the lognormal
        self.rto_s = max(_MIN_RTO_S, self.mean_rtt_s + 4 * deviation_s)
        mathis = SEGMENT_NBYTES / self.mean_rtt_s * math.sqrt(1.5 / loss) if loss and rtt_ms else math.inf
        self._rates = {up: (rate, min(rate, mathis)) for up, rate in ((True, up_bytes_s), (False, down_bytes_s))}
        steps = np.minimum(self.rto_s * 2.0 ** np.arange(63), _MAX_RTO_S)
        self._waits_s = np.concatenate([[0.0], np.cumsum(steps)])  # after so many losses of the same message
        self._starts = np.array(edges[::2], np.float64)
        self._ends = np.array(edges[1::2], np.float64)
        self._out_s = np.concatenate([[0.0], np.cumsum(self._ends - self._starts)])  # in the first so many outages
        self._uptime = self._starts - self._out_s[:-1]  # time up before each outage
        self._rng = np.random.default_rng(seed)

    # Many at once, or one

    def transfers_s(self, nbytes: npt.ArrayLike, now_s: npt.ArrayLike = 0.0, *, up: bool = True) -> Floats:
        """Seconds until a message sent at ``now_s`` is there, ``inf`` if it never is: float64.

        Arguments broadcast. 100,000 in some 20 ms.
        """
        size, now = np.broadcast_arrays(np.asarray(nbytes, np.float64), np.asarray(now_s, np.float64))
        return np.asarray(self.finish_s(now, self.line_s(size, up=up) + self.delay_s(size)) - now)

    def exchanges_s(
        self,
        request_nbytes: npt.ArrayLike,
        response_nbytes: npt.ArrayLike,
        now_s: npt.ArrayLike = 0.0,
        server_s: npt.ArrayLike = 0.0,
    ) -> Floats:
        """Seconds from sending a request at ``now_s`` to its answer, of which the server takes ``server_s``: float64.

        Arguments broadcast.
        """
        given = (np.asarray(a, np.float64) for a in (request_nbytes, response_nbytes, now_s, server_s))
        request, response, now, server = np.broadcast_arrays(*given)
        half_s = self.rtts_s(now.shape) / 2
        there = self.finish_s(now, self.line_s(request, up=True) + self.delay_s(request, half_s)) + server
        done = self.finish_s(there, self.line_s(response, up=False) + self.delay_s(response, half_s))
        return np.asarray(done - now)

    # What both are made of; the proxy uses these too

    def rtts_s(self, shape: tuple[int, ...] = ()) -> Floats:
        """Round trips, float64 of that shape."""
        return np.asarray(self.rtt_s * np.exp(self._sigma * self._rng.standard_normal(shape)))

    def line_s(self, nbytes: npt.ArrayLike, *, up: bool) -> Floats:
        """How long a message keeps the line busy, float64."""
        rate, bulk_rate = self._rates[up]
        size = np.asarray(nbytes, np.float64)
        first = np.minimum(size, 3 * SEGMENT_NBYTES)
        return np.asarray(first / rate + (size - first) / bulk_rate)

    def delay_s(self, nbytes: npt.ArrayLike, half_rtt_s: npt.ArrayLike | None = None) -> Floats:
        """Half a round trip (drawn unless given) and the timeouts of a message, float64; keeps no line busy."""
        size = np.asarray(nbytes, np.float64)
        half_s = np.asarray(self.rtts_s(size.shape) / 2 if half_rtt_s is None else half_rtt_s, np.float64)
        if not self.loss:
            return half_s
        losses = self._rng.geometric(1 - self._lost(size), size.shape) - 1
        return np.asarray(half_s + self._waits_s[np.minimum(losses, len(self._waits_s) - 1)])

    def finish_s(self, start_s: npt.ArrayLike, work_s: npt.ArrayLike) -> Floats:
        """When work begun at ``start_s`` is done, float64: its own time, and that of the outages it meets."""
        start, work = np.broadcast_arrays(np.asarray(start_s, np.float64), np.asarray(work_s, np.float64))
        if not self._starts.size:
            return np.asarray(start + work)
        begun = np.searchsorted(self._starts, start, side="right")
        last = np.maximum(begun - 1, 0)
        inside = (begun > 0) & ((start < self._ends[last]) | np.isinf(self._ends[last]))
        before_s = self._out_s[np.where(inside, last, begun)]  # of the outages that are over
        done = np.where(inside, self._uptime[last], start - before_s) + work
        met = np.maximum(begun, np.searchsorted(self._uptime, done, side="left"))
        return np.asarray(done + self._out_s[met])

    # Closed forms, outages left out

    def mean_transfer_s(self, nbytes: float, *, up: bool = True) -> float:
        """Expected seconds of a message."""
        steps = np.diff(self._waits_s)
        timeouts_s = float((self._lost(nbytes) ** np.arange(1, len(steps) + 1) * steps).sum()) if self.loss else 0.0
        return self.mean_rtt_s / 2 + float(self.line_s(nbytes, up=up)) + timeouts_s

    def mean_exchange_s(self, request_nbytes: float, response_nbytes: float) -> float:
        """Expected seconds of a request and its answer, without the server."""
        return self.mean_transfer_s(request_nbytes, up=True) + self.mean_transfer_s(response_nbytes, up=False)

    def _lost(self, nbytes: npt.ArrayLike) -> Floats:
        """Chance that a message waits for a timeout: one of its first three segments is lost."""
        segments = np.clip(np.ceil(np.asarray(nbytes, np.float64) / SEGMENT_NBYTES), 1, 3)
        return np.asarray(-np.expm1(segments * math.log1p(-self.loss)))
