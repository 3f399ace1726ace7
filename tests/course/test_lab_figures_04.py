"""Figures of notebook 04: the numbers behind them, and that each can be drawn at its extremes."""

import numpy as np
import pandas as pd
import pytest

from flserving import create_serving_pipeline, models
from flserving.lab import figures_04 as figures


def test_the_line_through_batch_times_is_found_again():
    seconds = pd.Series({n: 50e-6 + 3e-6 * n for n in (1, 2, 4, 8, 16, 32)})
    cost = figures.fit_cost(seconds)
    assert cost.fixed_s == pytest.approx(50e-6) and cost.row_s == pytest.approx(3e-6)
    assert cost(10) == pytest.approx(80e-6)


def test_a_cost_is_never_negative():
    falling = pd.Series({1: 5e-6, 2: 4e-6, 4: 3e-6})
    assert figures.fit_cost(falling).row_s == 0


def test_batches_of_a_real_engine_are_measured():
    with create_serving_pipeline(models.build("tutorial_mlp")) as server:
        engine = server.engines["v1.0"]
        before = engine.get_stats()["executions"]
        seconds = figures.measure_batches(engine, (1, 4), repeats=3)
        assert list(seconds.index) == [1, 4] and (seconds > 0).all()
        assert engine.get_stats()["executions"] == before + 6


@pytest.mark.parametrize("policy", ["work_conserving", "hold_until_full"])
def test_every_figure_can_be_drawn(policy):
    trace = figures.simulated(300, 8, 40, policy, service_s=lambda n: 0.004, requests=80)
    drawn = figures.explorer_figure(trace)
    assert drawn.axes[0].get_xlabel() == "time (ms)" and drawn.axes[1].get_xlabel() == "latency (ms)"
    assert len(figures.timeline_figure({"a": trace, "b": trace}, window_ms=100).axes) == 2
    assert (
        figures.load_figure({"simulated": (np.array([1.0, 2.0]), np.array([3.0, 4.0]))}).axes[0].get_yscale() == "log"
    )
    costs = {"small": pd.Series({1: 1e-5, 32: 4e-5})}
    assert [ax.get_ylabel() for ax in figures.cost_figure(costs).axes] == ["time (µs)", "time per row (µs)"]


def test_only_the_hold_keeps_a_request_from_an_idle_worker():
    lone = figures.simulated(2, 8, 40, "work_conserving", service_s=lambda n: 0.004, requests=50)
    held = figures.simulated(2, 8, 40, "hold_until_full", service_s=lambda n: 0.004, requests=50)
    assert np.median(lone.wait_s) == pytest.approx(0, abs=1e-9)
    assert np.median(held.wait_s) == pytest.approx(0.040)
