"""The benchmark script runs and says what README's table says; its numbers are not judged here, only its sums."""

import runpy
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parent / "benchmarks" / "in_process.py"


def test_every_row_can_be_measured():
    rows = runpy.run_path(str(SCRIPT))["rows"](quick=True)
    assert len(rows) == len({row.what for row in rows}) == 9
    for row in rows:
        assert len(row.ratios) == 2 and all(np.isfinite(ratio) and ratio > 0 for ratio in row.ratios), row
        assert min(row.ratios) <= np.median(row.ratios) <= max(row.ratios)
        assert f"**{np.median(row.ratios):.2f}**" in row.markdown()
    slowest_turn = next(row for row in rows if "`predict`" in row.what and "small" in row.what)
    assert 0.5 < slowest_turn.ratios[0] < 50, "predict cannot be faster than half of the bare forward, nor 50 x slower"
