"""Where a request's time goes, from the caller's line of code and back: a stopwatch at each way
into one server.

Client and server share a process here, and so a clock: what lies between them can be told apart
into the way there and the way back.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from flserving.api.client.transports import (
    Call,
    GrpcCodec,
    GrpcTransport,
    Reply,
    RestCodec,
    RestTransport,
    Version,
)
from flserving.errors import ConfigError
from flserving.lab.queueing.arrivals import Floats
from flserving.models.processing import Floats as Rows
from flserving.monitoring.metrics import STAGES

if TYPE_CHECKING:
    import pandas as pd

    from flserving.api.endpoint import Endpoint
    from flserving.serving.server import ModelServer

WAYS = ("in process", "gRPC", "REST, binary", "REST, JSON")
SPANS = ("encode", "wire out", "parse", *STAGES, "serialise", "wire back", "decode")
"""The way of a request over the network, in order: what the client, the wire, the door and the
server do."""

PARTS: dict[str, tuple[str, ...]] = {
    "client": ("encode", "decode"),
    "wire": ("wire out", "wire back"),
    "parse": ("parse", "validate", "cache"),
    "queue": ("queue",),
    "preprocess": ("preprocess",),
    "infer": ("infer",),
    "postprocess": ("postprocess",),
    "serialise": ("respond", "serialise"),
}
"""The eight parts of a breakdown, and which spans each is made of."""


class Stamp(nn.Module):
    """A layer that changes nothing and notes when a batch came through (the last 1,000 times)."""

    # of the class: a server works on a copy of the module
    seen: ClassVar[deque[float]] = deque(maxlen=1000)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen.append(time.perf_counter())
        return rows


class _JsonCodec(RestCodec):
    """REST with the numbers as text, as curl sends them."""

    def infer(
        self, model: str, version: Version, rows: Rows, parameters: Mapping[str, Any]
    ) -> Call:
        tensor = {
            "name": "features",
            "shape": list(rows.shape),
            "datatype": "FP32",
            "data": rows.ravel().tolist(),
        }
        body = json.dumps({"inputs": [tensor], "parameters": dict(parameters)}).encode()
        headers = self._headers | {"content-type": "application/json"}
        return Call(self._path(model, version) + "/infer", body, headers)

    def read_infer(self, reply: Reply, arrays: bool) -> dict[str, Any]:
        parameters = json.loads(reply.body)["parameters"]
        stages_ms = {name: parameters[f"stage_{name}_us"] / 1e3 for name in STAGES}
        return {"stages_ms": stages_ms}


class Stopwatch:
    """Asks one server by four ways, one request at a time, and takes the time of each apart.

    Args:
        server: Its models begin with a :class:`Stamp`, and were loaded by ``load_model``.
        endpoint: Its doors; both must be open.

    The calls are those of :class:`~flserving.api.client.Client`, step by step. Use as a context
    manager.
    """

    def __init__(self, server: "ModelServer", endpoint: "Endpoint") -> None:
        if endpoint.grpc_url is None:
            raise ConfigError("the endpoint has no gRPC door: serve without grpc_port=None")
        headers = {name.lower(): value for name, value in endpoint.headers.items()}
        rest = RestTransport(endpoint.url, None)
        self._server = server
        self._doors: dict[str, tuple[str, RestCodec | GrpcCodec, RestTransport | GrpcTransport]] = {
            "gRPC": ("grpc", GrpcCodec(headers), GrpcTransport(endpoint.grpc_url, False, None)),
            "REST, binary": ("rest", RestCodec(headers), rest),
            "REST, JSON": ("rest", _JsonCodec(headers), rest),
        }

    def ask(self, way: str, rows: Rows, version: str = "v1.0") -> dict[str, float]:
        """One request of ``rows``, float32 [N, D]: its spans in microseconds, in the order of
        ``SPANS``."""
        if way not in WAYS:
            raise ConfigError(f"there is no way {way!r} into a server here: use one of {WAYS}")
        Stamp.seen.clear()
        if way == "in process":
            began_s = time.perf_counter()
            stages_ms = self._server.predict(rows, version, stages=True)["stages_ms"]
            taken_us = (time.perf_counter() - began_s) * 1e6
            inside_us = 1e3 * sum(stages_ms.values())
            return _spans(stages_ms, encode=taken_us - inside_us)
        protocol, codec, transport = self._doors[way]
        before = self._at_door(protocol)
        began_s = time.perf_counter()
        call = codec.infer("local", version, rows, {"stages": True})
        sent_s = time.perf_counter()
        reply = transport.send(call, 30.0)
        received_s = time.perf_counter()
        stages_ms = codec.read_infer(reply, arrays=False)["stages_ms"]
        ended_s = time.perf_counter()
        _, parse_s, serialise_s = self._at_door(protocol) - before
        # The stamp is where preprocessing ends: the server's first and last moment follow from its
        # stages.
        until_infer = STAGES[: STAGES.index("infer")]
        until_s = sum(stages_ms[name] for name in until_infer) / 1e3
        came_s = Stamp.seen[0] - until_s
        left_s = came_s + sum(stages_ms.values()) / 1e3
        wire_us = {
            "wire out": (came_s - parse_s - sent_s) * 1e6,
            "wire back": (received_s - left_s - serialise_s) * 1e6,
        }
        return _spans(
            stages_ms,
            encode=(sent_s - began_s) * 1e6,
            parse=parse_s * 1e6,
            serialise=serialise_s * 1e6,
            decode=(ended_s - received_s) * 1e6,
            **wire_us,
        )

    def table(
        self, payloads: Sequence[tuple[Rows, str]], repeats: int, ways: Sequence[str] = WAYS
    ) -> "pd.DataFrame":
        """Many requests, one row each: ``way``, ``rows``, ``features``, and the spans in
        microseconds.

        Args:
            payloads: Rows to send, and the version that answers them. All of them go ``repeats``
                times by every way, in random order: neither other load nor what a large request
                leaves behind (a slow moment, measurably) may always hit the same one.
        """
        import pandas as pd

        for rows, version in payloads:
            for way in ways:
                # not counted: the first one makes connections and buffers
                self.ask(way, rows, version)
        kinds = [(way, rows, version) for rows, version in payloads for way in ways]
        numbers = np.repeat(np.arange(len(kinds)), repeats)
        lines = []
        for number in np.random.default_rng(0).permutation(numbers):
            way, rows, version = kinds[number]
            line = {"way": way, "rows": len(rows), "features": rows.shape[1]}
            lines.append(line | self.ask(way, rows, version))
        return pd.DataFrame(lines)

    def close(self) -> None:
        """Let go of the connections. Idempotent."""
        for _, _, transport in self._doors.values():
            transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at_door(self, protocol: str) -> Floats:
        codec = self._server.telemetry.totals()["codec"]
        return np.array(codec.get(protocol, (0, 0, 0)), np.float64)


def _spans(stages_ms: Mapping[str, float], **around_us: float) -> dict[str, float]:
    times_us = {name: ms * 1e3 for name, ms in stages_ms.items()} | around_us
    return {name: max(0.0, times_us.get(name, 0.0)) for name in SPANS}


def parts(spans: "pd.DataFrame") -> "pd.DataFrame":
    """The spans of N requests summed to the eight ``PARTS``, one row per request."""
    import pandas as pd

    return pd.DataFrame({part: spans[list(of)].sum(axis=1) for part, of in PARTS.items()})


def between(times: "pd.DataFrame", low: float, high: float) -> "pd.Series[float]":
    """Mean of each column over the requests whose total lies from the ``low`` to the ``high``
    percentile.

    Means of the same requests add up to their mean total; percentiles of columns would not.
    """
    total = times.sum(axis=1)
    least, most = np.percentile(total, [low, high])
    chosen = times[(total >= least) & (total <= most)]
    means: pd.Series[float] = chosen.mean()
    return means


def from_outside(calls: "Sequence[Mapping[str, float]]") -> "pd.DataFrame":
    """What a client on another machine can know of N requests, in ms, one row each.

    Args:
        calls: Of each request ``total``, the milliseconds that its caller waited, and the server's
            stages.

    Returns:
        The parts that the server timed, and ``outside``: the rest, which is client, wire and doors.
    """
    import pandas as pd

    spans = pd.DataFrame(calls).reindex(columns=["total", *SPANS], fill_value=0.0)
    inside = parts(spans).drop(columns=["client", "wire"])
    inside.insert(0, "outside", spans["total"] - inside.sum(axis=1))
    return inside


@contextmanager
def counted_in_queue(server: "ModelServer", every_s: float = 0.005) -> Iterator[list[int]]:
    """Note how many rows wait in the server's queue, again and again, in a thread of its own, until
    the block ends."""
    seen = list[int]()
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(every_s):
            seen.append(server.get_all_stats()["queue"]["waiting_rows"])

    thread = threading.Thread(target=count, name="queue-counter", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
