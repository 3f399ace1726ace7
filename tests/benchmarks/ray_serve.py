"""Ray Serve in front of model servers: does it start, how much does it answer, do clients find
their heads again?

    .ray/bin/python tests/benchmarks/ray_serve.py            # prints the table: five minutes
    .ray/bin/python tests/benchmarks/ray_serve.py --quick    # five minutes, too short to quote

Heads read from the file are counted where they are read, in each replica; predictions by the
servers' own counters, which ``/metrics`` adds up. Callers are threads of this process, each with
one connection.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from flserving import Registry, models
from flserving.api.auth import Tokens
from flserving.api.options import ApiOptions
from flserving.api.processes import Plan
from flserving.integrations import ray
from flserving.registry.headfile import HeadFile
from flserving.registry.heads import HeadSet
from flserving.serving.config import ServingConfig

CLIENTS, ROWS, THREADS = 400, 4, 16
COUNTS = "HEADS_READ"
BODY = '{"inputs":[{"name":"features","datatype":"FP32","shape":[1,64],"data":%s}],"parameters":{"personal":true}}'


class Counting(ray.Replica):
    """A replica that writes one byte for each head that it reads from the file."""

    def __init__(self, plan: Plan) -> None:
        load, path = HeadFile.load, Path(os.environ[COUNTS], str(os.getpid()))

        def counted(file, slots):
            with path.open("ab") as seen:
                seen.write(b"." * len(slots))
            return load(file, slots)

        HeadFile.load = counted
        super().__init__(plan)


def show(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def publish(folder: Path) -> None:
    """Two versions with heads of all clients; the alias leads to the first."""
    rng = np.random.default_rng(0)
    names = [f"c-{number}" for number in range(CLIENTS)]
    with Registry(folder) as registry:
        for _ in range(2):
            heads = HeadSet("head", names, rng.standard_normal((CLIENTS, 65, 10), np.float32))
            registry.publish(
                "m", models.build("digits_mlp"), architecture="digits_mlp", heads=heads
            )
        registry.set_alias("m", "default", 1, who="benchmark", why="to measure")


@contextmanager
def served(folder: Path, replicas: int, affinity: bool = True, **config):
    tokens = Tokens()
    for number in range(CLIENTS):
        tokens.add(f"t-{number}", client=f"c-{number}")
    plan = Plan(
        registry=str(folder), config=ServingConfig(**config), options=ApiOptions(tokens=tokens)
    )
    scale = ray.Scale(min_replicas=replicas, max_replicas=replicas, affinity=affinity)
    for path in Path(os.environ[COUNTS]).iterdir():
        path.unlink()
    with ray.running(plan, scale) as url:
        yield url


class Caller:
    """Asks as one client after another, and remembers every status and version."""

    def __init__(self, url: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        self.statuses: list[int] = []
        self.versions: set[str] = set()
        self.ms: list[float] = []

    def ask(self) -> None:
        client = self._rng.randrange(CLIENTS)
        row = (
            np.random.default_rng([client, self._rng.randrange(ROWS)])
            .standard_normal(64)
            .round(4)
            .tolist()
        )
        headers = {"Authorization": f"Bearer t-{client}", "Content-Type": "application/json"}
        began_s = time.perf_counter()
        self._connection.request("POST", "/v2/models/m/infer", BODY % json.dumps(row), headers)
        response = self._connection.getresponse()
        content = response.read()
        self.ms.append((time.perf_counter() - began_s) * 1e3)
        self.statuses.append(response.status)
        self.versions.add(json.loads(content).get("model_version", ""))


def load(
    url: str, requests: int = 0, until: threading.Event | None = None
) -> tuple[list[Caller], float]:
    """All callers at once, ``requests`` in all or until the event; and the seconds that it took."""
    callers = [Caller(url, seed) for seed in range(THREADS)]

    def ask(caller: Caller) -> None:
        while len(caller.ms) < requests // THREADS or (until is not None and not until.is_set()):
            caller.ask()

    began_s = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(ask, callers))
    return callers, time.perf_counter() - began_s


@contextmanager
def without_ray(folder: Path):
    """``flserving serve`` with one worker, the same credentials."""
    entries = [{"token": f"t-{number}", "client": f"c-{number}"} for number in range(CLIENTS)]
    tokens = folder / "tokens.json"
    tokens.touch(0o600)
    tokens.write_text(json.dumps(entries))
    command = [
        sys.executable,
        "-m",
        "flserving",
        "serve",
        "--registry",
        str(folder),
        "--port",
        "0",
        "--no-grpc",
    ]
    with subprocess.Popen(
        [*command, "--token-file", str(tokens)], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process.stdout.readline().split()[1]
        process.terminate()


def throughput(folder: Path, replicas: int, requests: int) -> None:
    with served(folder, replicas) if replicas else without_ray(folder) as url:
        load(url, requests // 4)
        callers, seconds = load(url, requests)
    ms = np.concatenate([caller.ms for caller in callers])
    p50, p99 = np.percentile(ms, [50, 99])
    failed = sum(status != 200 for caller in callers for status in caller.statuses)
    spread = f"p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    name = (
        f"throughput, replicas: {replicas}"
        if replicas
        else "throughput of flserving serve, one worker, without Ray"
    )
    show(name, f"{len(ms) / seconds:,.0f} requests/s", spread, f"{failed} failed")


def hit_rates(folder: Path, affinity: bool, requests: int) -> None:
    with served(folder, 2, affinity, prediction_cache_bytes=1200 << 10) as url:
        callers, _ = load(url, requests)
        time.sleep(2.5)  # until each replica has written its totals
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/metrics", headers={"Authorization": "Bearer t-0"})
        text = connection.getresponse().read().decode()
    asked = sum(len(caller.ms) for caller in callers)
    read = sum(path.stat().st_size for path in Path(os.environ[COUNTS]).iterdir())
    hits, misses = (
        float(re.search(rf"^flserving_prediction_cache_{it}_total (\S+)$", text, re.M)[1])
        for it in ("hits", "misses")
    )
    name = "with affinity" if affinity else "without"
    ran = asked - int(hits)
    show(
        f"heads, {name}",
        f"{1 - read / ran:.1%} in memory",
        f"{read} reads of {CLIENTS} heads",
        f"{ran} executions",
    )
    show(
        f"predictions, {name}",
        f"{hits / (hits + misses):.1%} in memory",
        f"{hits:.0f} hits",
        f"{asked} requests",
    )


def promotion(folder: Path, times: int) -> None:
    stop = threading.Event()
    with served(folder, 2) as url, Registry(folder) as registry, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, url, until=stop)
        for number in range(times):
            time.sleep(1.5)
            registry.set_alias("m", "default", 2 - number % 2, who="benchmark", why="to measure")
        time.sleep(1.5)
        stop.set()
        callers, _ = loading.result()
    statuses = [status for caller in callers for status in caller.statuses]
    failed = sum(status != 200 for status in statuses)
    versions = sorted(set.union(*(caller.versions for caller in callers)))
    answered = f"versions {', '.join(versions)} answered"
    show(
        f"{times} promotions under load", f"{failed} failed", answered, f"{len(statuses)} requests"
    )


def starts(times: int) -> None:
    """Ray alone, from nothing to the first process of ours that runs on it, each time as in
    ``running``."""
    import ray as the_ray  # not before: whoever asks for --help may have none

    seconds, tries, init = [], 0, the_ray.init

    def counted(*given, **named):
        nonlocal tries
        tries += 1
        return init(*given, **named)

    the_ray.init = counted
    for _ in range(times):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            began_s = time.perf_counter()
            ray._start_ray(folder)
            assert the_ray.get(the_ray.remote(lambda: os.getpid()).remote()) != os.getpid()
            seconds.append(time.perf_counter() - began_s)
            the_ray.shutdown()
    spread = f"median {np.median(seconds):.0f} s, longest {max(seconds):.0f} s"
    show("starts of Ray", f"{len(seconds)} of {times}", spread, f"{tries} tries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five minutes; too short to quote")
    quick = parser.parse_args().quick
    ray.Replica = Counting
    requests, times = (640, 1) if quick else (4800, 20)
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, Ray {version('ray')}"
    )
    print(
        f"{versions}, {os.cpu_count()} cores; {THREADS} callers, {CLIENTS} clients, MLP 64-64-10 with own heads"
    )
    print(f"load averages {os.getloadavg()} before\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as counts:
        os.environ[COUNTS] = counts
        publish(Path(folder))
        for replicas in (0, 1, 2):
            throughput(Path(folder), replicas, requests // 2)
        for affinity in (True, False):
            hit_rates(Path(folder), affinity, requests)
        promotion(Path(folder), 2 if quick else 6)
    starts(times)
    print(f"\nload averages {os.getloadavg()} after")


if __name__ == "__main__":
    main()
