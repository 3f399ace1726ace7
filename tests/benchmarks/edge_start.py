"""How soon a device answers after its start, and how much memory it takes: NumPy's engine beside
torch's.

    python tests/benchmarks/edge_start.py            # a minute; prints MEASURED.md's table
    python tests/benchmarks/edge_start.py --quick    # one start each; too few to quote

A device is a process, `flserving edge`, whose folder holds a version with its client's head. The
time runs from its start to its first personal answer over REST; the processor's share of it tells
more on a busy machine. Memory is resident, read after 200 answers. The engines take turns.
"""

import argparse
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

import flserving
from flserving import ModelServer, Registry, models
from flserving.api.auth import Role, Tokens
from flserving.api.client import Client
from flserving.edge import EdgeModelServer
from flserving.edge.sync import SyncAgent
from flserving.errors import FlservingError
from flserving.registry.heads import HeadSet

ENGINES = ("torch", "numpy")
SIZES = [64, 64, 10]
TOKEN = "c-1-secret"


@dataclass(frozen=True)
class Row:
    """Of each start: seconds to the first answer, processor seconds until then, resident MB."""

    engine: str
    seconds: tuple[float, ...]
    cpu_s: tuple[float, ...]
    mbytes: tuple[float, ...]

    def markdown(self) -> str:
        times = f"**{statistics.median(self.seconds):.2f}** ({min(self.seconds):.2f} to {max(self.seconds):.2f})"
        cpu_s, mbytes = statistics.median(self.cpu_s), statistics.median(self.mbytes)
        return f"| {self.engine} | {times} | {cpu_s:.2f} | **{mbytes:.0f}** |"


def fill(folder: str, cloud: Registry) -> None:
    """What a device has after its first pull."""
    numbers = np.random.default_rng(0).standard_normal(
        (1, SIZES[1] + 1, SIZES[2]), dtype=np.float32
    )
    cloud.publish(
        "m", models.mlp(SIZES), architecture="mlp", parameters={"sizes": SIZES}, alias="default",
        preprocessing={"mean": [0.5] * SIZES[0], "std": [2.0] * SIZES[0]}, heads=HeadSet("head", ["c-1"], numbers),
    )  # fmt: skip
    tokens = Tokens()
    tokens.add(TOKEN, Role.INFER, "c-1")
    with (
        ModelServer(registry=cloud) as server,
        flserving.serve(server, tokens=tokens, grpc_port=None, artifacts=True) as endpoint,
        Registry(folder) as registry,
        EdgeModelServer(registry=registry, model="m", client="c-1") as edge,
        contextlib.closing(
            SyncAgent(endpoint.url, TOKEN, registry, edge=edge, client="c-1")
        ) as agent,
    ):
        agent.pull()


def start(folder: str, engine: str) -> tuple[float, float, float]:
    """(seconds to the first answer, processor seconds, resident MB) of one device, whose cloud is
    away."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        cloud = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    command = [sys.executable, "-m", "flserving", "edge", "--cloud", cloud, "--client", "c-1", "--directory", folder,
               "--engine", engine]  # fmt: skip
    row = np.zeros((1, SIZES[0]), np.float32)
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "FLSERVING_TOKEN": TOKEN},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            url = re.search(r"http\S+", process.stdout.readline())
            assert url is not None, "the device does not start: run its command to see why"
            with Client(url.group(), TOKEN) as client:
                while True:
                    with contextlib.suppress(FlservingError):
                        answer = client.predict(row)
                        break
                seconds = time.perf_counter() - began
                spent = psutil.Process(process.pid).cpu_times()
                assert answer["head"] == "own"
                for _ in range(200):
                    client.predict(row)
            return (
                seconds,
                spent.user + spent.system,
                psutil.Process(process.pid).memory_info().rss / 1e6,
            )
        finally:
            process.kill()


def rows(quick: bool = False) -> list[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary, "device"))
        with Registry(Path(temporary, "cloud")) as cloud:
            fill(folder, cloud)
        seen: dict[str, list[tuple[float, float, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(1 if quick else 9):
            for engine in ENGINES:
                seen[engine].append(start(folder, engine))
    return [
        Row(engine, *(tuple(side) for side in zip(*seen[engine], strict=True)))
        for engine in ENGINES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one start each; too few to quote")
    print(
        "| engine | start to first answer, s (range) | processor, s | resident, MB |\n| --- | --- | --- | --- |"
    )
    for row in rows(parser.parse_args().quick):
        print(row.markdown())


if __name__ == "__main__":
    main()
