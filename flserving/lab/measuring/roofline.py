"""What a network takes at best, by hand: dispatch, bytes and operations (Williams et al., CACM
2009)."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


class Machine(NamedTuple):
    """What this machine can do on one thread: multiply-adds counted as two operations, and bytes
    read by the size."""

    flop_s: float
    nbytes: tuple[int, ...]
    bytes_s: tuple[float, ...]

    def read_s(self, nbytes: float) -> float:
        """Seconds to read weights of so many bytes, as fast as a matrix of that size was read."""
        speed = np.interp(np.log(nbytes), np.log(self.nbytes), self.bytes_s)
        return float(nbytes / speed)


def machine(
    sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096), repeats: int = 15
) -> Machine:
    """Measure it: a product of square matrices, and of each size one of a matrix with one row. The
    best of repeats.

    Cost: about 1 s and 70 MB.
    """
    square = torch.randn(768, 768)
    reads = []
    with torch.inference_mode():
        flop_s = 2 * 768**3 / _best_s(lambda: square @ square, repeats)
        for size in sizes:
            matrix = torch.randn(size, size)
            row = torch.randn(size)
            empty_s = _best_s(lambda: row[:1] * 1, repeats)  # noqa: B023  # what any call costs is not reading
            taken_s = _best_s(lambda: matrix @ row, repeats)  # noqa: B023
            reads.append(4 * size**2 / max(taken_s - empty_s, taken_s / 2))
    return Machine(flop_s, tuple(4 * size**2 for size in sizes), tuple(reads))


def _best_s(call: Callable[[], object], repeats: int) -> float:
    best = np.inf
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return float(best)


def work(width: int, batch: int = 1, bits: int = 32) -> tuple[int, int]:
    """(operations, bytes of weights) of an mlp 64-w-w-10 for a batch: each weight is read once and
    used once a row."""
    weights = 64 * width + width * width + width * 10
    return 2 * weights * batch, weights * bits // 8
