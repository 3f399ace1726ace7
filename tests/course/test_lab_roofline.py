"""Notebook 09: the roofline's arithmetic, the message without onnx, and the worlds of its last
exercise."""

import sys

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch.utils.flop_counter import FlopCounterMode

from flserving import models
from flserving.lab.checks.optimize import optimization as check
from flserving.lab.measuring import roofline
from flserving.lab.measuring.optimization import need_onnx
from flserving.lab.workbook.sentences import SentenceError

MACHINE = roofline.Machine(1e10, (1_000, 1_000_000), (4e9, 1e9))


def test_work_is_counted_as_torch_counts_it():
    model = models.build("mlp", {"sizes": [64, 96, 96, 10]})
    weights = [it for it in model.parameters() if it.ndim == 2]
    operations, nbytes = roofline.work(96, 7)
    assert nbytes == sum(it.nbytes for it in weights) and roofline.work(96, 7, 8)[1] * 4 == nbytes
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(7, 64))
    assert operations == counter.get_total_flops()


def test_reading_takes_as_long_as_measured_of_that_size():
    assert MACHINE.read_s(1_000) == pytest.approx(1_000 / 4e9)
    # beyond: as the largest
    assert MACHINE.read_s(1_000_000) == MACHINE.read_s(2_000_000) / 2 == pytest.approx(1e-3)


def test_a_machine_is_measured():
    found = roofline.machine((32, 64), repeats=2)
    assert found.nbytes == (4096, 16384) and min(found.flop_s, *found.bytes_s) > 1e6


def test_a_notebook_without_onnx_ends_with_a_message_and_no_traceback(monkeypatch, capsys):
    need_onnx()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        SentenceError, match=r"onnxruntime is not installed[^.]*\.\nRun   %pip install"
    ) as told:
        need_onnx()
    shell = InteractiveShell()
    shell.showtraceback((type(told.value), told.value, told.tb))
    out = " ".join(capsys.readouterr().out.split())  # it is wrapped to the width of the screen
    assert "then run this cell again" in out and "Traceback" not in out and "need_onnx" not in out


def test_the_exercises_worlds_tell_the_mistakes_apart():
    worlds = check.worlds()
    assert [world.serve for world in worlds] == [True, False, False, False, True]
    assert (
        worlds[1].faster < 1
        and worlds[2].points < -1.5
        and worlds[3].points > 0 > -1.5 > worlds[3].worst_points
    )
    for world in worlds:
        assert world.faster not in check._times(world).values()
        assert not np.isclose(np.abs([world.points, world.worst_points]), world.budget).any()
