"""Notebook 09: the roofline's arithmetic, the message without onnx, the instruments, and every figure drawn."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch.utils.flop_counter import FlopCounterMode

from flserving import Registry, models
from flserving.errors import NotSupportedError
from flserving.lab import figures_09 as figures
from flserving.lab import roofline
from flserving.lab.checks import optimization as check
from flserving.lab.sweep import CLAIMS

MACHINE = roofline.Machine(1e10, (1_000, 1_000_000), (4e9, 1e9))
TECHNIQUES = ["onnx", "quantised, static", "pruned", "pruned, structured", "distilled"]


def test_work_is_counted_as_torch_counts_it():
    model = models.build("mlp", {"sizes": [64, 96, 96, 10]})
    weights = [it for it in model.parameters() if it.ndim == 2]
    operations, nbytes = roofline.work(96, 7)
    assert nbytes == sum(it.nbytes for it in weights) and roofline.work(96, 7, 8)[1] * 4 == nbytes
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(7, 64))
    assert operations == counter.get_total_flops()


def test_the_roofline_is_dispatch_and_the_slower_of_both():
    assert MACHINE.read_s(1_000) == pytest.approx(1_000 / 4e9)
    assert MACHINE.read_s(1_000_000) == MACHINE.read_s(2_000_000) / 2 == pytest.approx(1e-3)  # beyond: as the largest
    operations, nbytes = roofline.work(512)
    one, many = (roofline.roofline_us(MACHINE, 512, batch, 20.0) for batch in (1, 1000))
    assert one == pytest.approx(20 + 1e6 * MACHINE.read_s(nbytes))  # bytes decide
    assert many == pytest.approx(20 + 1e6 * 1000 * operations / 1e10)  # operations decide
    assert roofline.roofline_us(MACHINE, 512, 1, 20.0, bits=8) < one


def test_a_machine_is_measured():
    found = roofline.machine((32, 64), repeats=2)
    assert found.nbytes == (4096, 16384) and min(found.flop_s, *found.bytes_s) > 1e6


def test_a_notebook_without_onnx_ends_with_a_message_and_no_traceback(monkeypatch, capsys):
    figures.need_onnx()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotSupportedError, match=r"onnxruntime is not installed[^.]*\.\nRun   %pip install") as told:
        figures.need_onnx()
    shell = InteractiveShell()
    shell.showtraceback((type(told.value), told.value, told.tb))
    out = capsys.readouterr().out
    assert "then run this cell again" in out and "Traceback" not in out and "need_onnx" not in out


def test_the_tutorials_claims_are_those_of_the_sweep():
    for technique, (low, points) in CLAIMS.items():
        assert figures.claimed(f"{technique}, somehow")[::2] == (low, -points)


def test_the_instruments_answer_and_measure(tmp_path):
    with Registry(tmp_path) as registry:
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = models.build("mlp", {"sizes": [64, 8, 10]})
            registry.publish("digits", model, architecture="mlp", parameters={"sizes": [64, 8, 10]})
        answers, measure = figures.instruments(registry, "digits", batch=3, turns=4, each=5)
        rows = np.random.default_rng(0).standard_normal((50, 64), dtype=np.float32)
        with torch.inference_mode():
            np.testing.assert_array_equal(answers(2, rows), model(torch.from_numpy(rows)).argmax(dim=1).numpy())
        us = measure([1, 2])
    assert list(us) == [1, 2] and all(it.shape == (4, 5) and (it > 0).all() for it in us.values())


def test_the_exercises_worlds_tell_the_mistakes_apart():
    worlds = check.worlds()
    assert [world.serve for world in worlds] == [True, False, False, False, True]
    assert worlds[1].faster < 1 and worlds[2].points < -1.5 and worlds[3].points > 0 > -1.5 > worlds[3].worst_points
    for world in worlds:
        assert world.faster not in check._times(world).values()
        assert not np.isclose(np.abs([world.points, world.worst_points]), world.budget).any()


def test_every_figure_can_be_drawn():
    report = pd.DataFrame({"optimisation": ["", *TECHNIQUES], "points": 0.1, "worst_points": -2.0})
    report[["file_kb", "compressed_kb", "peak_mb"]] = 1200.0, 1000.0, 11.0
    for batch in (1, 32):
        report[[f"b{batch}_low", f"b{batch}_times", f"b{batch}_high"]] = 0.9, 1.0, 1.2
    told = [figures.report_figure(report), figures.report_figure(report, dict.fromkeys(figures.TUTORIAL, (2, -1)))]
    assert [ax.get_xlabel().split("\n")[0] for ax in told[0].axes] == [
        "times faster",
        "size (MB)",
        "change in accuracy",
    ]
    assert [it.get_text() for it in told[0].axes[0].get_yticklabels()][:2] == ["0 ", "1 onnx"]
    legends = [{text.get_text() for text in drawn.legends[0].get_texts()} for drawn in told]
    assert legends[1] - legends[0] == {"the tutorial", "your guess"}
    assert figures.report_figure(report.set_index(pd.Index(["original", *TECHNIQUES]))).axes[0].get_yticklabels()
    swept = pd.DataFrame(
        {"width": w, "technique": t, "batch": b, "p50_us": w * b, "low": 0.9, "times": w / 32, "high": w}
        for w in (32, 2048) for b in (1, 64) for t in ("original", *TECHNIQUES)
    )  # fmt: skip
    assert len(figures.speedup_figure((swept, 32, 1)).axes) == 2
    drawn = figures.speedup_figure((swept, 2048, 64))
    assert [ax.get_title("left") for ax in drawn.axes] == ["batches of 64 rows", "2,048 wide"]
    assert len(figures.roofline_figure(swept, MACHINE, 20.0).axes) == 2
    sizes = {"percent": [0, 90], "file_kb": [9.0, 9.0], "compressed_kb": [8.0, 1.0]}
    table = pd.DataFrame({**sizes, "accuracy": [0.9, 0.5], "worst_client": [0.8, 0.0]})
    assert len(figures.sparsity_figure((table, 0)).axes) == 2
    drawn = figures.sparsity_figure((table, 90))
    assert drawn.axes[0].get_title("left") == "9 kB, 1 compressed"
