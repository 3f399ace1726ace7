"""What personal heads cost: batches of all-different clients against the same batches with one
shared head.

    python tests/benchmarks/heads.py           # about two minutes and 2.7 GB of disk
    python tests/benchmarks/heads.py --quick   # seconds; too short to quote, only 20,000 heads

Digits' model (64-64-10), one intra-op thread. All sides of a ratio take turns within one run, so
that other load on the machine hits all; a ratio is the median over the turns, in brackets the
middle half of them. Durations are the thread's CPU time, but for the cold reads, which are mostly
waiting. Clients are drawn without replacement from heads that together exceed the processor's
caches, so every head comes from memory.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flserving import Registry, models
from flserving.models import SplitModel
from flserving.registry.heads import HeadSet
from flserving.serving.config import ServingConfig
from flserving.serving.loader import RegistrySource, load_engine

BATCHES = (1, 16, 64, 256)
INPUTS, OUTPUTS = 64, 10
NBYTES = (INPUTS + 1) * OUTPUTS * 4
TARGETS = {16: "2.2", 64: "2.2", 256: "3.0"}


def in_turns(
    calls: Mapping[str, Callable[[], object]], times: int, turns: int
) -> dict[str, np.ndarray]:
    """Microseconds of CPU a call, [turns], by name."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            began = time.thread_time()
            for _ in range(times):
                call()
            taken[name].append((time.thread_time() - began) / times * 1e6)
    return {name: np.array(values) for name, values in taken.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> str:
    low, middle, high = np.percentile(a / b, [25, 50, 75])
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


def endless(batches: list) -> Callable[[], object]:
    """The next one, round and round."""
    place = -1

    def following() -> object:
        nonlocal place
        place = (place + 1) % len(batches)
        return batches[place]

    return following


def published(folder: Path, num_heads: int) -> tuple[Registry, np.ndarray, SplitModel, float]:
    """A registry with one version of that many random heads, the heads themselves, the model, the
    seconds it took."""
    heads = np.lib.format.open_memmap(
        folder / "heads.npy", "w+", np.float32, (num_heads, INPUTS + 1, OUTPUTS)
    )
    rng = np.random.default_rng(0)
    for start in range(0, num_heads, 50_000):
        heads[start : start + 50_000] = rng.standard_normal(
            heads[start : start + 50_000].shape, np.float32
        )
    registry, model = (
        Registry(folder / "registry", max_artifact_bytes=4 << 30),
        models.build("digits_mlp"),
    )
    began = time.perf_counter()
    chosen = HeadSet("head", [f"client-{number}" for number in range(num_heads)], heads)
    registry.publish("m", model, architecture="digits_mlp", heads=chosen)
    return registry, heads, model.eval().requires_grad_(False), time.perf_counter() - began


def hot(registry: Registry, heads: np.ndarray, model: SplitModel, turns: int) -> None:
    """Every head is in memory: engine against engine, product against product, and the loop over
    ``nn.Linear``."""
    config = ServingConfig(max_batch_size=256, head_cache_bytes=1 << 40)
    engine = load_engine(RegistrySource(registry, "m"), "1", config)
    personal, count = engine.personal, len(heads)
    slots = np.random.default_rng(1).permutation(count)
    for start in range(0, count, 4096):
        personal.store.gather(slots[start : start + 4096])
    linears = []
    for matrix in heads[:4096]:
        linear = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
        (
            linear.weight.copy_(torch.from_numpy(matrix[:-1].T)),
            linear.bias.copy_(torch.from_numpy(matrix[-1])),
        )
        linears.append(linear)
    print(
        "| rows, all of different clients | engine, one head | engine, own heads | ratio | target | bare model | ratio "
        "| loop over nn.Linear / own heads |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for rows in BATCHES:
        x = np.random.default_rng(rows).standard_normal((rows, INPUTS), np.float32)
        values = torch.from_numpy(x)
        batch = endless(list(slots[: count // rows * rows].reshape(-1, rows)))
        some = endless([linears[i : i + rows] for i in range(0, 4096, rows)])

        @torch.inference_mode()
        def loop(values: torch.Tensor = values, some: Callable = some) -> torch.Tensor:
            features = model.body(values)
            return torch.cat(
                [linear(row[None]) for linear, row in zip(some(), features, strict=True)]
            )

        with torch.inference_mode():
            taken = in_turns(
                {
                    "shared": lambda x=x: engine.execute([x]),
                    "own": lambda x=x, batch=batch: personal.execute([(x, batch())]),
                    "bare shared": lambda v=values: engine._infer(v),
                    "bare own": lambda v=values, batch=batch: personal._infer(v, batch()),
                    "loop": loop,
                },
                max(10, 4000 // rows),
                turns,
            )
        per_row = {name: np.median(values) / rows for name, values in taken.items()}
        print(
            f"| {rows} | {per_row['shared']:.2f} us a row | {per_row['own']:.2f} us "
            f"| {ratio(taken['own'], taken['shared'])} | {TARGETS.get(rows, '')} "
            f"| {per_row['bare shared']:.2f}, {per_row['bare own']:.2f} us "
            f"| {ratio(taken['bare own'], taken['bare shared'])} | {ratio(taken['loop'], taken['bare own'])} |"
        )
    flat, there = torch.randn(50_000_000), torch.empty(50_000_000)
    batch = endless(
        [torch.from_numpy(part) for part in slots[: count // 256 * 256].reshape(-1, 256)]
    )
    taken = in_turns(
        {
            "copy": lambda: there.copy_(flat),
            "gather": lambda: [
                personal.store._rows.take(batch().numpy(), axis=0) for _ in range(100)
            ],
            "own": lambda: [personal._infer(values, batch().numpy()) for _ in range(100)],
            "shared": lambda: [engine._infer(values) for _ in range(100)],
        },
        1,
        turns,
    )
    copy, gather = (
        0.2 / np.median(taken["copy"]) * 1e6,
        NBYTES * 25_600 / np.median(taken["gather"]) / 1e3,
    )
    whole = NBYTES * 25_600 / np.median(taken["own"] - taken["shared"]) / 1e3
    print(
        f"\nHeads are read at {whole:.1f} GB/s by gather and product together, {gather:.1f} GB/s by the gather alone; "
        f"torch copies one long array at {copy:.1f} GB/s.\n"
    )


def million(registry: Registry, folder: Path, count: int, turns: int) -> None:
    """Heads in a file, for which there is no room in memory: page cache warm, and cold."""
    config = ServingConfig(max_batch_size=256, head_cache_bytes=count * NBYTES // 10)
    began = time.perf_counter()
    engine = load_engine(RegistrySource(registry, "m"), "1", config)
    opened_s = time.perf_counter() - began
    personal, rng = engine.personal, np.random.default_rng(2)
    file = folder / "registry" / "models" / "m" / "1" / "heads.bin"
    print(f"{count:,} heads: loaded in {opened_s:.2f} s, {file.stat().st_size / 1e9:.2f} GB on disk, "
          f"at most {personal.store.nbytes / 1e6:.0f} MB in memory.\n")  # fmt: skip
    print(
        "| rows | warm, engine, us a row | bare model | cold, us a row |\n| --- | --- | --- | --- |"
    )
    for rows in BATCHES:
        with open(file, "rb") as content:  # into the page cache
            while content.read(1 << 24):
                pass
        x = rng.standard_normal((rows, INPUTS), np.float32)
        values = torch.from_numpy(x)
        slots = iter(rng.integers(count, size=(10_000_000 // rows, rows)))
        with torch.inference_mode():
            warm = in_turns(
                {
                    "engine": lambda x=x, s=slots: personal.execute([(x, next(s))]),
                    "bare": lambda v=values, s=slots: personal._infer(v, next(s)),
                },
                max(10, 10_000 // rows),
                turns,
            )
        cold = []
        for _ in range(max(4, min(200, 1000 // rows))):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(personal.store._file._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            batch = next(slots)
            began = time.perf_counter()
            personal.execute([(x, batch)])
            cold.append((time.perf_counter() - began) * 1e6)
        sides = [
            np.percentile(np.array(side) / rows, [50, 25, 75])
            for side in (warm["engine"], warm["bare"], cold)
        ]
        print(
            f"| {rows} | "
            + " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*side) for side in sides)
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few turns, few heads")
    parser.add_argument("--folder", help="where the files go (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    turns, few, many = (5, 20_000, 20_000) if options.quick else (25, 100_000, 1_000_000)
    for count, part in ((few, hot), (many, None)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            registry, heads, model, seconds = published(Path(folder), count)
            with registry:
                if part is not None:
                    part(registry, heads, model, turns)
                else:
                    print(f"Published {count:,} heads in {seconds:.1f} s.")
                    million(registry, Path(folder), count, turns)


if __name__ == "__main__":
    main()
