"""The network between a device and a server: round trips, bandwidth, loss and outages, in virtual
time.

A :class:`Link` answers how long a message takes; it neither sleeps nor sends. ``proxy.py`` makes a
real connection as slow as a link says.

The model, for one message of n bytes on a warm connection (handshake and slow start are over; add
an exchange of nothing for each round trip that a new connection costs: one for TCP, one more for
TLS 1.3):

- half a round trip, constant or lognormal, the same draw for both halves of an exchange;
- n bytes over the bandwidth. Under loss p, what goes beyond the first three segments goes no faster
  than (MSS / RTT) sqrt(3 / 2p): Mathis et al., "The macroscopic behavior of the TCP congestion
  avoidance algorithm", ACM CCR 27(3), 1997. There, duplicate acknowledgements repair a loss while
  data flow on;
- three segments or fewer draw too few duplicates (RFC 5681, section 3.2), so that a loss among them
  costs a timeout: max(floor, SRTT + 4 RTTVAR), doubled each time it is lost again, up to 60 s (RFC
  6298, sections 2 and 5);
- an outage stops everything under way; it goes on where it was when the outage ends.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Floats

SEGMENT_NBYTES = 1460
"""TCP payload of one Ethernet frame: 1,500 bytes without the headers of IPv4 and TCP."""
_P99 = 2.3263478740408408  # standard normal quantile
_MIN_RTO_S = 0.2  # as in Linux; RFC 6298 asks for 1 s at least
_MAX_RTO_S = 60.0


class Link:
    """One path to a server.

    Args:
        rtt_ms: Round trip without load; the median when ``rtt_p99_ms`` is given.
        rtt_p99_ms: Makes the round trip lognormal with this 99th percentile; None keeps it
            constant.
        up_bytes_s, down_bytes_s: Bandwidth from the device, and towards it; may be ``inf``.
        loss: Chance that a segment is lost, independent of all others, in [0, 0.5).
        outages: Intervals (start_s, end_s) in which nothing passes, ascending and apart; an end may
            be ``inf``.
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
            raise ConfigError(
                f"rtt_p99_ms is {rtt_p99_ms!r}: it must be finite, at least the median {rtt_ms!r} > 0"
            )
        if not up_bytes_s > 0 or not down_bytes_s > 0:
            raise ConfigError(
                f"up_bytes_s {up_bytes_s!r} and down_bytes_s {down_bytes_s!r} must be above 0"
            )
        if not 0 <= loss < 0.5:
            raise ConfigError(f"loss is {loss!r}: it must lie in [0, 0.5), e.g. 0.01")
        edges = list(itertools.chain(*outages))
        ascending = all(a < b for a, b in itertools.pairwise([-math.inf, *edges]))
        if not ascending or any(len(outage) != 2 for outage in outages):
            raise ConfigError(
                f"outages are {list(outages)!r}: they must be (start_s, end_s), ascending and apart"
            )
        self.loss = loss
        self._rng = np.random.default_rng(seed)

        self.rtt_s = rtt_ms / 1e3
        self._sigma = 0.0
        if rtt_p99_ms is not None:
            self._sigma = math.log(rtt_p99_ms / rtt_ms) / _P99
        self.mean_rtt_s = self.rtt_s * math.exp(self._sigma**2 / 2)

        self._rates = {True: up_bytes_s, False: down_bytes_s}
        self._mathis_rate = math.inf
        if loss and rtt_ms:
            per_rtt = SEGMENT_NBYTES * math.sqrt(1.5 / loss)
            self._mathis_rate = per_rtt / self.mean_rtt_s

        # E|RTT - mean| of the lognormal, in means
        spread = 2 * math.erf(self._sigma / math.sqrt(8))
        deviation_s = spread * self.mean_rtt_s
        self.rto_s = max(_MIN_RTO_S, self.mean_rtt_s + 4 * deviation_s)
        doubled_s = self.rto_s * 2.0 ** np.arange(63)
        self._timeouts_s = np.minimum(doubled_s, _MAX_RTO_S)
        self._waits_s = _sums(self._timeouts_s)  # after so many losses of the same message

        self._starts = np.array(edges[::2], np.float64)
        self._ends = np.array(edges[1::2], np.float64)
        self._out_s = _sums(self._ends - self._starts)  # in the first so many outages
        self._uptime = self._starts - self._out_s[:-1]  # time up before each outage

    # Many at once, or one

    def transfers_s(
        self,
        nbytes: ArrayLike,
        now_s: ArrayLike = 0.0,
        *,
        up: bool = True,
    ) -> Floats:
        """Seconds until a message sent at ``now_s`` is there, ``inf`` if it never is: float64.

        Arguments broadcast. 100,000 in some 20 ms.
        """
        size, now = _broadcast(nbytes, now_s)
        half_s = self.rtts_s(now.shape) / 2
        return self._arrives_s(size, now, half_s, up=up) - now

    def exchanges_s(
        self,
        request_nbytes: ArrayLike,
        response_nbytes: ArrayLike,
        now_s: ArrayLike = 0.0,
        server_s: ArrayLike = 0.0,
    ) -> Floats:
        """Seconds from sending a request at ``now_s`` to its answer, of which the server takes
        ``server_s``: float64.

        Arguments broadcast.
        """
        request, response, now, server = _broadcast(
            request_nbytes,
            response_nbytes,
            now_s,
            server_s,
        )
        half_s = self.rtts_s(now.shape) / 2
        there_s = self._arrives_s(request, now, half_s, up=True)
        return self._arrives_s(response, there_s + server, half_s, up=False) - now

    def _arrives_s(
        self,
        nbytes: Floats,
        now_s: Floats,
        half_rtt_s: Floats,
        *,
        up: bool,
    ) -> Floats:
        line_s = self.line_s(nbytes, up=up)
        delay_s = self.delay_s(nbytes, half_rtt_s)
        return self.finish_s(now_s, line_s + delay_s)

    # What both are made of; the proxy uses these too

    def rtts_s(self, shape: tuple[int, ...] = ()) -> Floats:
        """Round trips, float64 of that shape."""
        skew = np.exp(self._sigma * self._rng.standard_normal(shape))
        return np.asarray(self.rtt_s * skew)

    def line_s(self, nbytes: ArrayLike, *, up: bool) -> Floats:
        """How long a message keeps the line busy, float64."""
        rate = self._rates[up]
        size = np.asarray(nbytes, np.float64)
        first = np.minimum(size, 3 * SEGMENT_NBYTES)
        rest_s = (size - first) / min(rate, self._mathis_rate)
        return first / rate + rest_s

    def delay_s(
        self,
        nbytes: ArrayLike,
        half_rtt_s: ArrayLike | None = None,
    ) -> Floats:
        """Half a round trip (drawn unless given) and the timeouts of a message, float64; keeps no
        line busy."""
        shape = np.shape(nbytes)
        if half_rtt_s is None:
            half_rtt_s = self.rtts_s(shape) / 2
        half_s = np.asarray(half_rtt_s, np.float64)
        if not self.loss:
            return half_s
        tries = self._rng.geometric(1 - self._lost(nbytes), shape)
        losses = np.minimum(tries - 1, len(self._timeouts_s))
        return half_s + self._waits_s[losses]

    def finish_s(self, start_s: ArrayLike, work_s: ArrayLike) -> Floats:
        """When work begun at ``start_s`` is done, float64: its own time, and that of the outages it
        meets."""
        start, work = _broadcast(start_s, work_s)
        if not self._starts.size:
            return start + work
        begun = np.searchsorted(self._starts, start, side="right")
        last = np.maximum(begun - 1, 0)
        end = self._ends[last]
        inside = (begun > 0) & ((start < end) | np.isinf(end))
        over_s = self._out_s[np.where(inside, last, begun)]  # of the outages that are over
        begin = np.where(inside, self._uptime[last], start - over_s)
        done = begin + work
        met = np.searchsorted(self._uptime, done, side="left")
        return done + self._out_s[np.maximum(begun, met)]

    # Closed forms, outages left out

    def mean_transfer_s(self, nbytes: float, *, up: bool = True) -> float:
        """Expected seconds of a message."""
        in_a_row = np.arange(1, len(self._timeouts_s) + 1)
        chances = self._lost(nbytes) ** in_a_row
        timeouts_s = (chances * self._timeouts_s).sum()
        line_s = self.line_s(nbytes, up=up)
        return self.mean_rtt_s / 2 + float(line_s + timeouts_s)

    def mean_exchange_s(self, request_nbytes: float, response_nbytes: float) -> float:
        """Expected seconds of a request and its answer, without the server."""
        there_s = self.mean_transfer_s(request_nbytes, up=True)
        back_s = self.mean_transfer_s(response_nbytes, up=False)
        return there_s + back_s

    def _lost(self, nbytes: ArrayLike) -> Floats:
        """Chance that a message waits for a timeout: one of its first three segments is lost."""
        segments = np.ceil(np.divide(nbytes, SEGMENT_NBYTES))
        first = np.clip(segments, 1, 3)
        return np.asarray(-np.expm1(first * math.log1p(-self.loss)))


def _sums(values: Floats) -> Floats:
    """Of the first 0, 1, ... values."""
    return np.concatenate([[0.0], values.cumsum()])


def _broadcast(*values: ArrayLike) -> tuple[Floats, ...]:
    arrays = [np.asarray(value, np.float64) for value in values]
    return np.broadcast_arrays(*arrays)
