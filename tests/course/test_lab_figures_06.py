"""Notebook 06: the stopwatch on a real server, the model fitted to it, and that each figure can be drawn."""

import numpy as np
import pandas as pd
import pytest
from torch import nn

from flserving import ModelServer, ServingConfig
from flserving.api import serve
from flserving.errors import ConfigError
from flserving.lab import breakdown
from flserving.lab import figures_06 as figures
from flserving.lab.breakdown import PARTS, SPANS, WAYS
from flserving.lab.checks import breakdown as check
from flserving.lab.report import LoadReport
from flserving.lab.theory import md1_wait_s
from flserving.lab.way_model import WayModel, amdahl


@pytest.fixture(scope="module")
def table():
    """Four requests by each way, of 1 row and of 40."""
    network = nn.Sequential(breakdown.Stamp(), nn.Linear(8, 3))
    rows = np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32)
    with ModelServer(ServingConfig(max_batch_size=64)) as server:
        server.load_model("v8", network, num_features=8)
        with serve(server) as endpoint, breakdown.Stopwatch(server, endpoint) as stopwatch:
            with pytest.raises(ConfigError, match="no way 'fax' into a server"):
                stopwatch.ask("fax", rows, "v8")
            return stopwatch.table([(rows[:1], "v8"), (rows, "v8")], repeats=4)


# -------------------------------------------------------------------------------------------- the stopwatch


def test_every_part_of_the_way_is_timed(table):
    assert len(table) == 4 * 2 * len(WAYS) and set(table["way"]) == set(WAYS) and set(table["rows"]) == {1, 40}
    over = table[table["way"] != "in process"]
    entered = [span for span in SPANS if span != "cache"]  # the prediction cache is off
    assert (over.groupby(["way", "rows"])[entered].median() > 0).all(axis=None), over
    inside = table[table["way"] == "in process"]
    assert (inside[["wire out", "wire back", "parse", "serialise", "decode"]] == 0).all(axis=None)
    assert (inside[["encode", "validate", "preprocess", "infer", "respond"]] > 0).all(axis=None)


def test_the_parts_hold_every_span_once(table):
    assert sorted(span for of in PARTS.values() for span in of) == sorted(SPANS)
    assert np.allclose(breakdown.parts(table).sum(axis=1), table[list(SPANS)].sum(axis=1))


def test_an_endpoint_without_grpc_is_refused():
    with ModelServer() as server:
        server.load_model("v8", nn.Linear(8, 3), num_features=8)
        with serve(server, grpc_port=None) as endpoint, pytest.raises(ConfigError, match="no gRPC door"):
            breakdown.Stopwatch(server, endpoint)


def test_the_mean_between_two_percentiles_adds_up_to_the_total_of_those_requests():
    rng = np.random.default_rng(1)
    times = pd.DataFrame(rng.exponential(size=(1000, 3)), columns=["a", "b", "c"])
    total = times.sum(axis=1)
    low, high = np.percentile(total, [40, 60])
    assert breakdown.between(times, 40, 60).sum() == pytest.approx(total[(total >= low) & (total <= high)].mean())
    assert breakdown.between(times, 0, 100).sum() == pytest.approx(total.mean())


def test_what_a_client_cannot_see_is_outside():
    calls = [{"total": 10.0, "validate": 1.0, "queue": 2.0, "infer": 3.0, "respond": 0.5, "began_s": 7.0}]
    (times,) = breakdown.from_outside(calls).to_dict("records")
    assert times["outside"] == pytest.approx(3.5) and sum(times.values()) == pytest.approx(10)
    assert (times["parse"], times["queue"], times["serialise"], times["postprocess"]) == (1, 2, 0.5, 0)


# ------------------------------------------------------------------------------------------------ the model


def line(way="REST", fixed=100.0, row=2.0, number=0.1):
    return WayModel({way: np.array([[fixed, row, number]] * len(PARTS))})


def test_the_terms_of_a_way_are_found_again():
    frames = [(rows, features, 50 + 3 * rows + 0.25 * rows * features) for rows in (1, 8, 64) for features in (4, 32)]
    measured = pd.DataFrame(
        {"way": "gRPC", "rows": rows, "features": features} | dict.fromkeys(SPANS, 0.0) | {"encode": us, "queue": 9.0}
        for rows, features, us in frames
    )
    model = WayModel.fitted(measured)
    assert model.terms["gRPC"][0] == pytest.approx([50, 3, 0.25])
    times = model("gRPC", 10, 16)
    assert times["client"] == pytest.approx(50 + 30 + 40) and times["queue"] == pytest.approx(9) and times["infer"] == 0


def test_a_time_is_never_negative(table):
    model = WayModel.fitted(table)
    assert set(model.terms) == set(WAYS) and all((terms >= 0).all() for terms in model.terms.values())


def test_a_batch_pays_for_all_of_its_rows_and_the_rest_of_the_way_for_its_own():
    alone, shared = line()("REST", 2, 10), line()("REST", 2, 10, batch=5)
    assert {part for part in PARTS if shared[part] > alone[part]} == set(breakdown.EXECUTION)
    assert shared["infer"] == pytest.approx(100 + 2 * 10 + 0.1 * 100)


def test_load_makes_the_queue_longer_as_the_formula_says():
    model, way = line(), ("REST", 2, 10, 3)
    busy_us = model.busy_us(*way)
    assert busy_us == pytest.approx(3 * (100 + 12 + 6) + 3 * 2.5 * (100 + 4 + 2))
    idle, busy = model(*way), model(*way, load=0.8)
    assert busy["queue"] - idle["queue"] == pytest.approx(1e6 * md1_wait_s(0.8e6 / busy_us, busy_us / 1e6))
    assert all(busy[part] == idle[part] for part in PARTS if part != "queue")


@pytest.mark.parametrize(("share", "times", "gain"), [(0.5, 2, 4 / 3), (0.75, 3, 2), (0, 100, 1), (0.9, np.inf, 10)])
def test_amdahl(share, times, gain):
    assert amdahl(share, times) == pytest.approx(gain)


# ---------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("way", WAYS)
def test_the_timeline_shows_the_median_request(table, way):
    requests = table[(table["way"] == way) & (table["rows"] == 40)].head(3)
    above = figures.timeline_figure(requests).axes[0]
    total_us = requests[list(SPANS)].sum(axis=1).median()
    widths = [bar.get_width() for bar in above.patches[: len(SPANS) - 1]]
    assert sum(widths) == pytest.approx(total_us) and above.get_xlabel() == "time since the call (µs)"
    assert above.get_title("left").startswith(f"One request: {total_us:,.0f} µs")


@pytest.mark.parametrize("shares", [False, True])
def test_stacks_reach_their_total(shares):
    bars = {"a": pd.Series({"wire": 30.0, "infer": 10.0}), "b": pd.Series({"wire": 2000.0, "infer": 0.0})}
    ax = figures.stack_figure(bars, unit="µs", shares=shares, title="two").axes[0]
    ends = [max(p.get_x() + p.get_width() for p in ax.patches if round(p.get_y() + 0.35) == row) for row in (0, 1)]
    assert ends == pytest.approx([100, 100] if shares else [40, 2000])
    assert [text.get_text() for text in ax.texts] == ["40 µs", "2,000 µs"]


def test_the_curves_of_amdahl_end_at_their_limit():
    ax = figures.amdahl_figure({"half": 0.5, "all but a tenth": 0.9}, at=4).axes[0]
    assert max(ax.lines[0].get_ydata()) < 2 < max(ax.lines[3].get_ydata()) < 10


def test_a_generator_is_drawn_from_what_it_counts():
    error = np.array(["", "", "Overloaded"])
    report = LoadReport(np.array([0.0, 0.1, 0.2]), np.array([0.0, 0.5, 0.5]), np.array([0.5, 0.6, 0.6]),
                        np.zeros(3, np.int64), error)  # fmt: skip
    assert [list(np.round(part, 6)) for part in figures.seen(report)] == [[0, 0.1], [500, 500]]
    assert [list(np.round(part, 6)) for part in figures.seen(report, omits=True)] == [[0, 0.5], [500, 100]]
    drawn = figures.generators_figure({"plan": figures.seen(report), "sent": figures.seen(report, omits=True)})
    assert ["p99 500 ms" in ax.get_title("left") for ax in drawn.axes] == [True, False]


@pytest.mark.parametrize(("batch", "percent"), [(1, 0), (32, 95)])
def test_the_prediction_is_drawn_at_both_ends(batch, percent):
    numbers = figures.predicted(line(), "REST", 128, 512, batch, percent)
    assert numbers.per_s == pytest.approx(percent / 100 * batch * 1e6 / line().busy_us("REST", 128, 512, batch))
    assert numbers.curve_us[round(100 * numbers.load)] == pytest.approx(sum(numbers.times_us.values()))
    left, right = figures.prediction_figure(numbers).axes
    assert left.get_xlabel().startswith("time since the call") and right.get_ylabel() == "mean latency (ms)"


def test_the_data_of_the_check_tell_all_mistakes_apart():
    times_ms = np.diff(check._marks()) * 1e3
    total_ms = times_ms.sum(axis=1)
    for method in ("linear", "lower", "higher", "nearest", "inverted_cdf"):
        assert np.percentile(total_ms, 99, method=method) == pytest.approx(np.percentile(total_ms, 99))
    assert times_ms.mean(axis=0).argmax() == 2 and np.percentile(times_ms, 99, axis=0).argmax() == 1
    assert times_ms.sum() > 5 * np.ptp(check._marks()) * 1e3 and (times_ms >= -1e-9).all()
