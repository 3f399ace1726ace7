"""The benchmark scripts run and say what README says; their numbers are not judged here, only their
sums."""

import runpy
from pathlib import Path

import numpy as np

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_every_row_can_be_measured():
    rows = runpy.run_path(str(BENCHMARKS / "in_process.py"))["rows"](quick=True)
    assert len(rows) == len({row.what for row in rows}) == 9
    for row in rows:
        assert len(row.ratios) == 2 and all(
            np.isfinite(ratio) and ratio > 0 for ratio in row.ratios
        ), row
        assert min(row.ratios) <= np.median(row.ratios) <= max(row.ratios)
        assert f"**{np.median(row.ratios):.2f}**" in row.markdown()
    slowest_turn = next(row for row in rows if "`predict`" in row.what and "small" in row.what)
    assert 0.5 < slowest_turn.ratios[0] < 50, (
        "predict cannot be faster than half of the bare forward, nor 50 x slower"
    )


def test_the_shadows_price_can_be_measured():
    script = runpy.run_path(str(BENCHMARKS / "shadow.py"))
    for row in script["rows"](quick=True):
        assert {len(blocks) for blocks in row.us.values()} == {2} and 0 < row.copied <= 1, row
        assert all(0 < p50 <= p99 for blocks in row.us.values() for p50, p99 in blocks)
        assert row.ratios(script["OFF"], 0) == row.ratios(script["OFF"], 1) == [1, 1]
        assert f"**{np.median(row.ratios(script['ON'], 1)):.2f}**" in row.markdown()


def test_the_attack_on_each_policy_can_be_measured():
    script = runpy.run_path(str(BENCHMARKS / "membership.py"))
    table = script["table"](quick=True)
    assert table.to_numpy().min() >= 0 and table.to_numpy().max() <= 100
    shown = script["markdown"](table)
    for name, row in table.iterrows():
        assert f"| {name} | {' | '.join(f'{value:.0f}' for value in row)} |" in shown
    assert {"full", "top-1", "rounded-1", "label", "new rows labelled right"} <= {*table.index}


def test_a_devices_start_can_be_measured():
    rows = runpy.run_path(str(BENCHMARKS / "edge_start.py"))["rows"](quick=True)
    torchs, numpys = rows
    assert (torchs.engine, numpys.engine) == ("torch", "numpy")
    assert numpys.mbytes[0] < 0.5 * torchs.mbytes[0] and numpys.cpu_s[0] < torchs.cpu_s[0]
    assert f"**{numpys.seconds[0]:.2f}**" in numpys.markdown()
