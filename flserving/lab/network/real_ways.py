"""Three architectures asked for real: every row by both models, through a proxy, and cut off."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flserving.api.client import Client as ApiClient
from flserving.api.client.retries import Retries
from flserving.api.endpoint import Endpoint
from flserving.errors import FlservingError
from flserving.federated.data import Client
from flserving.lab.measuring.slo import SLO
from flserving.lab.network.link import Link
from flserving.lab.network.proxy import Proxy

if TYPE_CHECKING:
    import pandas as pd


def ask_all(
    clients: Sequence[Client],
    device: Callable[[str, NDArray[np.float32]], Mapping[str, Any]],
    cloud: Callable[[NDArray[np.float32]], Mapping[str, Any]],
    *,
    guests: float = 0.2,
    seed: int = 0,
) -> "pd.DataFrame":
    """Both models' answers to what every client's device may be asked: its own held-out rows, and
    those of guests.

    Args:
        device: Answers rows on the device of a client, ``cloud`` in the cloud; both as
            ``ModelServer.predict``.
        guests: Share of all rows that other clients wrote.

    Returns:
        One line per row: ``device`` (place in ``clients``), ``own``, ``confidence`` (of the
        device's answer), ``local_right``, ``cloud_right``.
    """
    import pandas as pd

    rng = np.random.default_rng(seed)
    frames = []
    for place, client in enumerate(clients):
        others = [other for other in clients if other is not client]
        x = np.concatenate([other.test_x for other in others])
        y = np.concatenate([other.test_y for other in others])
        count = round(len(client.test_y) * guests / (1 - guests))
        some = rng.choice(len(y), min(count, len(y)), replace=False)
        rows = np.concatenate([client.test_x, x[some]])
        labels = np.concatenate([client.test_y, y[some]])
        local = device(client.id, rows)
        far = cloud(rows)
        frames.append(
            pd.DataFrame(
                {
                    "device": place,
                    "own": np.arange(len(rows)) < len(client.test_y),
                    "confidence": np.asarray(local["confidences"]),
                    "local_right": np.asarray(local["predictions"]) == labels,
                    "cloud_right": np.asarray(far["predictions"]) == labels,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@contextlib.contextmanager
def far_away(
    endpoint: Endpoint, token: str, link: Link | None = None, timeout_ms: float = 2000
) -> Iterator[tuple[Proxy, ApiClient]]:
    """A proxy in front of a real endpoint, and a client that calls through it and never tries
    again.

    The endpoint must accept the proxy's address: ``serve(..., hosts=("127.0.0.1",))``.
    """
    port = int(endpoint.url.rsplit(":", 1)[1])
    once = Retries(attempts=1)
    with (
        Proxy(link or Link(), "127.0.0.1", port) as proxy,
        ApiClient(
            f"http://127.0.0.1:{proxy.port}", token, timeout_ms=timeout_ms, retries=once
        ) as client,
    ):
        yield proxy, client


def timed(
    far: tuple[Proxy, ApiClient], row: NDArray[np.float32], model: str, requests: int = 20
) -> tuple[float, int, int]:
    """Median milliseconds of a request on a warm connection; bytes of one request and of one answer
    on the wire."""
    proxy, client = far
    client.predict(row, model=model)  # connects
    up_before = proxy.up_nbytes
    down_before = proxy.down_nbytes
    took_s = []
    for _ in range(requests):
        began_s = time.perf_counter()
        client.predict(row, model=model)
        took_s.append(time.perf_counter() - began_s)
    up = proxy.up_nbytes - up_before
    down = proxy.down_nbytes - down_before
    return float(np.median(took_s)) * 1e3, up // requests, down // requests


def watch(
    asks: Mapping[str, Callable[[Any], Mapping[str, Any]]],
    rows: Sequence[Any],
    every_s: float,
    events: Mapping[int, Callable[[], object]],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> "dict[str, pd.DataFrame]":
    """Ask several ways for the same rows in real time, one row every ``every_s``, while something
    happens in between.

    Args:
        asks: Name -> what answers a row; a FlservingError is a failed request.
        events: Number of a row -> what is done just before it.

    Returns:
        Name -> ``at_s`` (since the start), ``path`` ("cloud" where the answer names none),
        ``latency_s``, ``round``.
    """
    import pandas as pd

    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in asks}
    started_s = clock()
    for number, row in enumerate(rows):
        left_s = started_s + number * every_s - clock()
        sleep(max(0.0, left_s))
        if number in events:
            events[number]()
        for name, ask in asks.items():
            asked_s = clock()
            try:
                answer = {"path": "cloud", **ask(row)}
            except FlservingError:
                answer = {"path": "failed"}
            latency_s = clock() - asked_s
            lines[name].append(
                {
                    "at_s": asked_s - started_s,
                    "path": answer["path"],
                    "round": answer.get("round"),
                    "latency_s": latency_s,
                }
            )
    return {name: pd.DataFrame(of) for name, of in lines.items()}


def in_a_month(watched: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame":
    """What share of all requests is answered if the cloud is away for so long in a month, in
    percent.

    Args:
        watched: Runs of ``central`` and ``hybrid``: what the hybrid asks the cloud for while that
            is there, it answers as degraded while it is not.
    """
    import pandas as pd

    there = watched["central"]["path"] != "failed"
    paths = watched["hybrid"]["path"][there.to_numpy()]
    asks = float((paths == "cloud").mean())
    spans_s = {
        "10 minutes": 600.0,
        "43 minutes": SLO.down_s,
        "4 hours": 14_400.0,
        "1 day": 86_400.0,
    }
    rows = {}
    for name, away_s in spans_s.items():
        share = away_s / SLO.period_s
        rows[name] = {
            "central": 100 * (1 - share),
            "edge": 100.0,
            "hybrid": 100.0,
            "hybrid, degraded": 100 * asks * share,
            "central keeps 99.9 %": 1 - share >= SLO.target - 1e-9,
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(3).rename_axis("cloud away for")
