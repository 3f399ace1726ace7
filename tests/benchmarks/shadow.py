"""What shadow traffic does to the latency of the requests that it copies, beside what chance does
to it.

    python tests/benchmarks/shadow.py            # about three minutes; prints the table
    python tests/benchmarks/shadow.py --quick    # seconds; too short to quote

Blocks with a shadow and two kinds of blocks without one take turns, in another order each time; a
ratio is that of two blocks of one turn. The last column compares blocks that do not differ: what is
no larger than that is noise.
"""

import argparse
import os
import platform
import random
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from flserving import ModelServer, Registry, models
from flserving.registry.experiment import Experiment

SIZES = {"small": [32, 64, 10], "large": [784, 512, 512, 10]}
ON, OFF, AGAIN = "with a shadow", "without", "without, again"
LOG = {"who": "benchmark", "why": "to measure"}


@dataclass
class Row:
    """One model under one load: p50 and p99 in microseconds of every block, by its kind."""

    what: str
    us: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {kind: [] for kind in (ON, OFF, AGAIN)}
    )
    copied: float = 0.0  # share of the requests whose copy ran

    def ratios(self, kind: str, place: int) -> list[float]:
        """Of p50 (place 0) or p99 (1), one a turn, against the blocks without."""
        return [a[place] / b[place] for a, b in zip(self.us[kind], self.us[OFF], strict=True)]

    def markdown(self) -> str:
        cells = []
        for place in (0, 1):
            shown = []
            for kind in (ON, AGAIN):
                low, middle, high = np.percentile(self.ratios(kind, place), [25, 50, 75])
                shown.append(f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
            cells += [f"{np.median([pair[place] for pair in self.us[OFF]]):,.0f}", *shown]
        return f"| {self.what} | {self.copied:.0%} | {' | '.join(cells)} |"


def block(server: ModelServer, x: np.ndarray, requests: int, pause_s: float) -> tuple[float, float]:
    """p50 and p99 of one caller, in microseconds."""
    taken = []
    for _ in range(requests):
        began = time.perf_counter()
        server.predict(x)
        taken.append(time.perf_counter() - began)
        if pause_s:
            time.sleep(pause_s)
    p50, p99 = np.percentile(taken, [50, 99]) * 1e6
    return float(p50), float(p99)


def measured(name: str, turns: int, requests: int, pause_s: float) -> Row:
    """A version and its shadow of the same size, asked by one caller who waits ``pause_s`` between
    two requests."""
    row = Row(f"{name}, {f'a request every {pause_s * 1e3:g} ms' if pause_s else 'back to back'}")
    order, ran, parameters = random.Random(0), 0.0, {"sizes": SIZES[name]}
    x = np.random.default_rng(0).standard_normal((1, SIZES[name][0]), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry:
        for _ in range(2):
            registry.publish(
                "m", models.build("mlp", parameters), architecture="mlp", parameters=parameters
            )
        registry.set_alias("m", "default", 1, **LOG)
        with ModelServer(registry=registry) as server:
            for _ in range(turns):
                for kind in order.sample([ON, OFF, AGAIN], 3):
                    if kind == ON:
                        registry.start_experiment("m", Experiment(id="s", shadow=2), **LOG)
                    server.refresh()
                    block(server, x, requests // 10, pause_s)
                    row.us[kind].append(block(server, x, requests, pause_s))
                    if kind == ON:
                        ran = server.experiments.report("m")["shadow"]["ran"]
                        registry.conclude_experiment("m", **LOG)
    row.copied = ran / (turns * (requests + requests // 10))
    return row


def rows(quick: bool = False) -> list[Row]:
    """Every row of the table; ``quick`` only shows that each one runs."""
    torch.manual_seed(0)
    turns, requests = (2, 40) if quick else (15, 600)
    return [measured(name, turns, requests, pause_s) for name in SIZES for pause_s in (2e-3, 0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; too short to quote"
    )
    quick = parser.parse_args().quick
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one intra-op thread"
    )
    print("small = MLP 32-64-10, large = MLP 784-512-512-10, float32\n")
    print(
        "| load | copies that ran | p50, us | with a shadow | chance | p99, us | with a shadow | chance |"
    )
    print("| --- " * 8 + "|")
    for row in rows(quick):
        print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
