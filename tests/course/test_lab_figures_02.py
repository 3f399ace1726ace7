"""Figures and tables of notebook 02 against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from flserving import errors
from flserving.lab import figures_02
from flserving.lab.style import png
from flserving.monitoring.telemetry import STAGES

STAGES_MS = {name: [0.0] * 3 for name in STAGES} | {"queue": [1.0, 5.0, 2.0], "infer": [4.0, 1.0, 7.0]}


def labels(ax):
    return [text.get_text() for text in ax.texts]


def test_the_timeline_shows_the_request_of_median_latency():
    fig = figures_02.timeline_figure(STAGES_MS)  # totals 5, 6, 9 ms: the second one
    above, below = fig.axes
    assert above.get_title(loc="left") == "One request: 6 ms from its arrival to its answer"
    widths = dict(zip(STAGES, (bar.get_width() for bar in above.patches), strict=True))
    starts = dict(zip(STAGES, (bar.get_x() for bar in above.patches), strict=True))
    assert (widths["queue"], widths["infer"], starts["queue"], starts["infer"]) == (5, 1, 0, 5)
    assert labels(above) == [
        "5 ms, 83%" if name == "queue" else "1 ms, 17%" if name == "infer" else "not entered" for name in STAGES
    ]
    assert sorted(below.lines[0].get_xdata()) == [5, 6, 9] and list(below.lines[1].get_xdata()) == [6]


def test_the_timeline_of_a_single_request():
    fig = figures_02.timeline_figure({"infer": [3.0]})
    assert fig.axes[0].get_title(loc="left").startswith("One request: 3 ms")
    assert len(png(fig)) > 1000


@pytest.mark.parametrize(("stage", "colour"), [("validate", "white"), ("infer", "#222222")])
def test_the_time_of_a_stage_that_fills_the_timeline_stands_inside_its_bar(stage, colour):
    fig = figures_02.timeline_figure({name: [9.0 if name == stage else 0.1] for name in STAGES})
    (inside,) = [text for text in fig.axes[0].texts if text.get_text().startswith("9 ms")]
    assert (inside.get_ha(), inside.get_color()) == ("center", colour)


def test_assumed_times_are_hollow_and_all_are_drawn():
    fig = figures_02.assumption_figure({"assumed": {"infer": 10.0, "respond": 2.0}, "here": {"infer": 0.01}})
    assumed, here = fig.axes[0].lines
    assert list(assumed.get_xdata()) == [10, 2] and list(here.get_xdata()) == [0.01]
    assert assumed.get_markerfacecolor() == "white" != here.get_markerfacecolor()


def test_settings_are_named_by_their_tables_and_empty_places_are_hidden():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}, index=pd.Index([8, 16], name="max_batch_size"))
    fig = figures_02.settings_figure(
        [figures_02.Panel(table, "rows", "ms"), figures_02.Panel(table[["a"]], "rows", "per s", log=True)]
    )
    first, second, *rest = fig.axes
    assert first.get_title(loc="left") == "max_batch_size" and first.get_ylabel() == "ms"
    assert [list(line.get_ydata()) for line in first.lines] == [[1, 2], [3, 4]]
    assert second.get_yscale() == "log" and second.get_legend() is None
    assert len(rest) == 4 and not any(ax.get_visible() for ax in rest)


def test_only_means_add_up():
    rng = np.random.default_rng(0)
    stages = {name: rng.exponential(size=2000) for name in ("queue", "infer")} | {"cache": np.zeros(2000)}
    fig = figures_02.percentiles_figure(stages)
    total = stages["queue"] + stages["infer"]
    mean, p50, p99 = labels(fig.axes[1])
    assert mean == "100%"
    for told, q in ((p50, 50), (p99, 99)):
        parts = sum(np.percentile(stages[name], q) for name in ("queue", "infer"))
        assert told == f"{parts / np.percentile(total, q):.0%}" != "100%"
    legend = [text.get_text() for text in fig.axes[1].get_legend().get_texts()]
    assert legend == ["queue", "infer", "a request's total"], "a stage that nobody entered is left out"
    dots = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    at_ms = [np.percentile(total, 50), np.percentile(total, 99)]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx(at_ms)
    assert labels(fig.axes[0]) == [f"p50\n{at_ms[0]:.3g} ms", f"p99\n{at_ms[1]:.3g} ms"]


def test_provoked_errors_become_a_table():
    def fail():
        raise errors.OverloadedError("9 rows wait already")

    table = figures_02.provoke({"too much": fail, "fine": lambda: 1})
    assert table.loc["too much"].tolist() == ["OverloadedError", 429, "RESOURCE_EXHAUSTED", "9 rows wait already"]
    assert table.loc["fine"].tolist() == ["answered", 200, "OK", ""]
    with pytest.raises(ZeroDivisionError):
        figures_02.provoke({"a bug": lambda: 1 / 0})


def test_a_table_to_the_left_shows_every_character():
    html = figures_02.left(pd.DataFrame({"message": ["dtype <U5: " + 200 * "x"]})).to_html()
    assert "dtype &lt;U5: " + 200 * "x" in html and html.count("text-align: left") == 2, "head and body"


def test_a_new_process_answers():
    times_ms = figures_02.fresh_process_ms([4, 3, 2], requests=3)
    assert len(times_ms) == 3 and all(ms > 0 for ms in times_ms)
