"""Speed of the stack in one process, as ratios against what one would write by hand.

    python tests/benchmarks/in_process.py            # about a minute; MEASURED.md's first table
    python tests/benchmarks/in_process.py --quick    # seconds; too short to quote

Both sides of a ratio are timed in turns within one run, so that other load on the machine hits
both; a row shows the median ratio over the turns, and the range of the middle half of them. One
intra-op thread throughout.
"""

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from flserving import ModelServer, Registry, ServingConfig, create_serving_pipeline, models
from flserving.serving.loader import RegistrySource, load_engine

SMALL = ("tutorial_mlp", {})
LARGE = ("mlp", {"sizes": [784, 512, 512, 10]})


@dataclass(frozen=True)
class Row:
    """One line of the table: ``ours`` and ``theirs`` in ``unit``, ``ratios`` one per turn."""

    what: str
    ours: float
    theirs: float
    unit: str
    ratios: tuple[float, ...]
    target: str

    def markdown(self) -> str:
        low, middle, high = np.percentile(self.ratios, [25, 50, 75])
        measured = f"{self.ours:,.1f} | {self.theirs:,.1f} {self.unit}"
        return f"| {self.what} | {measured} | **{middle:.2f}** ({low:.2f} to {high:.2f}) | {self.target} |"


def median_us(call: Callable[[], object], times: int) -> float:
    """Median duration of ``call`` in microseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def one_row(turns: int, times: int, architecture: str, parameters: dict, name: str) -> Row:
    """p50 of ``predict`` against the bare forward: numpy in, softmax, lists out."""
    model = models.build(architecture, parameters).eval().requires_grad_(False)
    x = np.random.default_rng(0).standard_normal(
        (1, models.signature(architecture, parameters)[0][0]), dtype=np.float32
    )

    def bare() -> tuple[list, list, list]:
        with torch.inference_mode():
            probabilities = torch.softmax(model(torch.from_numpy(x)), 1)
            confidences, predictions = probabilities.max(1)
        return predictions.tolist(), confidences.tolist(), probabilities.tolist()

    with create_serving_pipeline(model) as server:
        for call in (bare, lambda: server.predict(x)):
            median_us(call, times)
        pairs = [
            (median_us(lambda: server.predict(x), times), median_us(bare, times))
            for _ in range(turns)
        ]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(
        f"one-row `predict`, p50, {name}",
        ours,
        theirs,
        "us bare forward",
        tuple(a / b for a, b in pairs),
        "<= 1.5",
    )


def asynchronous(
    server: ModelServer, x: np.ndarray, callers: int, each: int
) -> tuple[float, float]:
    """(CPU microseconds, wall microseconds) per request with ``callers`` coroutines, each sending
    ``each`` in a row."""

    async def caller() -> None:
        for _ in range(each):
            await server.apredict(x)

    async def all_of_them() -> None:
        await asyncio.gather(*(caller() for _ in range(callers)))

    cpu, wall = time.process_time(), time.perf_counter()
    asyncio.run(all_of_them())
    n = callers * each
    return (time.process_time() - cpu) / n * 1e6, (time.perf_counter() - wall) / n * 1e6


def small_async(turns: int, each: int) -> Row:
    """CPU of a request from 64 concurrent coroutines, everything included, against a batch of 64
    run by hand."""
    x = np.random.default_rng(0).standard_normal((1, 32), dtype=np.float32)
    model = models.build(*SMALL).eval().requires_grad_(False)
    batch = np.repeat(x, 32, axis=0)

    def bare() -> None:
        with torch.inference_mode():
            torch.softmax(model(torch.from_numpy(batch)), 1).tolist()

    with create_serving_pipeline(model) as server:
        asynchronous(server, x, 64, each)
        pairs = [
            (asynchronous(server, x, 64, each)[0], median_us(bare, 200) / 32) for _ in range(turns)
        ]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    what = "CPU a request, 64 async callers, small"
    return Row(
        what,
        ours,
        theirs,
        "us a row in a bare batch of 32",
        tuple(a / b for a, b in pairs),
        "<= 20 us CPU",
    )


def large_async(turns: int, each: int) -> Row:
    """Throughput of 64 concurrent coroutines on the large model, batching against no batching."""
    x = np.random.default_rng(0).standard_normal((1, 784), dtype=np.float32)
    model = models.build(*LARGE)
    with (
        create_serving_pipeline(model) as batching,
        create_serving_pipeline(model, config=ServingConfig(max_batch_size=1)) as single,
    ):
        for server in (batching, single):
            asynchronous(server, x, 64, 2)
        pairs = [
            (
                1e6 / asynchronous(batching, x, 64, each)[1],
                1e6 / asynchronous(single, x, 64, each)[1],
            )
            for _ in range(turns)
        ]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    what = "throughput, 64 async callers, large"
    return Row(
        what, ours, theirs, "req/s with `max_batch_size=1`", tuple(a / b for a, b in pairs), ">= 5"
    )


def cold_load(
    turns: int, architecture: str, parameters: dict, name: str, warmup_samples: int = 0
) -> Row:
    """A version from the registry's disk to an engine, against safetensors' load plus build, which
    verify nothing."""
    with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry:
        registry.publish(
            "m",
            models.build(architecture, parameters),
            architecture=architecture,
            parameters=parameters,
        )
        file = next(Path(folder).rglob("*.safetensors"))
        source, config = RegistrySource(registry, "m"), ServingConfig(warmup_samples=warmup_samples)

        def ours() -> None:
            load_engine(source, "1", config)

        def theirs() -> None:
            model = models.build(architecture, parameters)
            model.load_state_dict(safetensors.torch.load_file(file))
            model.eval()

        for call in (ours, theirs):
            median_us(call, 5)
        pairs = [(median_us(ours, 10), median_us(theirs, 10)) for _ in range(turns)]
    mine, their = (statistics.median(side) for side in zip(*pairs, strict=True))
    warm = f", {warmup_samples} + 1 warm-up forwards" if warmup_samples else ""
    return Row(
        f"cold load, {name}{warm}",
        mine,
        their,
        "us load_file + build",
        tuple(a / b for a, b in pairs),
        "<= 1.5",
    )


def publish(turns: int) -> Row:
    """Rate of publishing a 10 MB model against writing and fsyncing 10 MB to the same disk."""
    sizes = [1024, 1024, 1024, 512, 10]
    model = models.build("mlp", {"sizes": sizes})
    data = os.urandom(sum(p.nbytes for p in model.parameters()))

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry:
        pairs = []
        for turn in range(turns + 1):
            mine = median_us(
                lambda: registry.publish(
                    "m", model, architecture="mlp", parameters={"sizes": sizes}
                ),
                3,
            )
            # new files, as a publish makes: to write over a deleted file's pages again is several
            # times faster
            their = median_us(lambda: write(Path(folder) / f"plain-{time.perf_counter_ns()}"), 3)
            if turn:  # the first turn warms up
                pairs.append((len(data) / mine, len(data) / their))
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    what = f"publish of a {len(data) / 1e6:.0f} MB model"
    return Row(
        what, ours, theirs, "MB/s plain write + fsync", tuple(a / b for a, b in pairs), ">= 0.5"
    )


def ceiling(turns: int, times: int) -> Row:
    """What batching can give at most for the large model: the bare forward's rows a second, 32 at
    once or singly."""
    model = models.build(*LARGE).eval().requires_grad_(False)
    x = torch.randn(32, 784)

    def forward(rows: torch.Tensor) -> None:
        with torch.inference_mode():
            model(rows)

    pairs = [
        (
            32e6 / median_us(lambda: forward(x), times),
            1e6 / median_us(lambda: forward(x[:1]), times),
        )
        for _ in range(turns)
    ]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    what = "ceiling of the row above: bare forward, 32 at once"
    return Row(what, ours, theirs, "rows/s one by one", tuple(a / b for a, b in pairs), "-")


def rows(quick: bool = False) -> list[Row]:
    """Every row of the table; ``quick`` only shows that each one runs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    turns, times = (2, 20) if quick else (15, 400)
    return [
        one_row(turns, times, *SMALL, name="small"),
        one_row(turns, times, *LARGE, name="large"),
        small_async(turns, 5 if quick else 200),
        large_async(turns, 2 if quick else 20),
        ceiling(turns, times // 4),
        cold_load(turns, *SMALL, name="small"),
        cold_load(turns, *LARGE, name="large"),
        cold_load(turns, *LARGE, name="large", warmup_samples=10),
        publish(turns),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of a minute; too short to quote"
    )
    quick = parser.parse_args().quick
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one intra-op thread"
    )
    print("small = MLP 32-64-10, large = MLP 784-512-512-10, float32\n")
    print(
        "| what | flserving | against | ratio (middle half) | target |\n| --- | --- | --- | --- | --- |"
    )
    for row in rows(quick):
        print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
