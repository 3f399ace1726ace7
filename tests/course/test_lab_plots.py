"""The vocabulary of figures: what each word draws, against numbers worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from contrast import contrast
from flserving.lab import plots
from flserving.lab.style import COLOURS, figure, png


@pytest.fixture
def ax():
    return figure()[1][0]


def texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[
            (0, "0 s"),
            (2e-10, "0.2 ns"),
            (4.2e-6, "4.2 µs"),
            (0.0432, "43.2 ms"),
            (1, "1 s"),
            (59, "59 s"),
        ],
        *[
            (60, "1 min"),
            (259.2, "4.32 min"),
            (5400, "1.5 h"),
            (129_600, "36 h"),
            (172_800, "2 days"),
        ],
        *[(86_400 * 1234.0, "1,234 days"), (math.inf, "never")],
    ],
)
def test_a_time_has_the_unit_that_leaves_few_digits(seconds, text):
    assert plots.time_text(seconds) == text == plots.ms_text(seconds * 1e3)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (3_136_165, "3.14 MB"), (5e12, "5,000 GB")]
)
def test_a_size_has_the_unit_that_leaves_few_digits(nbytes, text):
    assert plots.nbytes_text(nbytes) == text


@pytest.mark.parametrize(
    ("top", "shown"),
    [
        (1e2, ["1 ms", "3 ms", "10 ms"]),
        (1e3, ["1 ms", "10 ms", "100 ms"]),
        (1e9, ["1 ms", "1 s", "17 min"]),
    ],
)
def test_a_logarithmic_axis_says_round_values_with_their_unit(ax, top, shown):
    ax.plot([1, top], [0, 1])
    ax.set(xscale="log", xlim=(1, top))
    plots.ticks(ax.xaxis, lambda ms: plots.ms_text(ms) if ms < 1e6 else f"{ms / 6e4:.0f} min")
    inside = [
        tick.get_text() for tick in ax.get_xticklabels() if 1 <= tick.get_position()[0] <= top
    ]
    assert inside[:3] == shown
    plots.ticks(ax.xaxis, at=[2, 20, 1e12])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "20"], (
        "what is outside is left out"
    )


def test_lines_differ_in_dashes_as_in_colours(ax):
    drawn = plots.lines(ax, [1, 2], {"p50": [1, 1], "p99": [5, 9]}, marker="o")
    assert [(line.get_label(), line.get_ydata().tolist()) for line in drawn] == [
        ("p50", [1, 1]),
        ("p99", [5, 9]),
    ]
    assert (
        len({line.get_linestyle() for line in drawn})
        == len({line.get_color() for line in drawn})
        == 2
    )


@pytest.mark.parametrize(
    "values", [{"edge": 2.0, "central": 0.0}, pd.Series({"edge": 2.0, "central": 0.0})]
)
def test_bars_stand_in_their_order_from_the_top_and_say_their_values(ax, values):
    plots.bars(ax, values, "{:.1f} ms".format)
    assert [bar.get_width() for bar in ax.patches] == [2, 0] and texts(ax) == ["2.0 ms", "0.0 ms"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "edge",
        "central",
    ] and ax.yaxis_inverted()


def test_dots_of_the_same_value_do_not_hide_each_other(ax):
    plots.dots(ax, {"alone": 3.0, "equal": [2, 1, 1]})
    alone, equal = ax.lines
    assert (alone.get_xdata().tolist(), alone.get_ydata().tolist()) == ([3], [0])
    assert equal.get_xdata().tolist() == [1, 1, 2] and len(set(equal.get_ydata())) == 3
    assert all(abs(y - 1) < 0.5 for y in equal.get_ydata()), "on their own line"


def test_a_waterfall_begins_each_bar_where_the_last_one_ends(ax):
    plots.waterfall(ax, {"queue": 5, "cache": 0, "infer": 1}, plots.ms_text)
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 5), (5, 0), (5, 1)]
    assert texts(ax) == ["5 ms, 83%", "not entered", "1 ms, 17%"]


@pytest.mark.parametrize(("colour", "inside"), [(COLOURS[0], "white"), (COLOURS[3], plots.INK)])
def test_the_time_of_a_bar_across_nearly_everything_stands_inside_it_and_can_be_read(
    ax, colour, inside
):
    plots.waterfall(
        ax, {"a": 0.1, "b": 9.0, "c": 0.1}, plots.ms_text, [COLOURS[1], colour, COLOURS[1]]
    )
    (text,) = [text for text in ax.texts if text.get_text().startswith("9 ms")]
    assert (text.get_ha(), text.get_color()) == ("center", inside)


def test_a_waterfall_of_nothing_is_drawn(ax):
    plots.waterfall(ax, {"a": 0.0})
    assert texts(ax) == ["not entered"] and png(ax.figure)


def test_heat_writes_what_is_there_and_is_stronger_where_it_is_more(ax):
    plots.heat(
        ax, pd.DataFrame({"norm": [0.0, 0.5], "vote": [np.nan, 1.0]}, index=["clean", "attack"])
    )
    assert texts(ax) == ["50%", "100%"]
    half, whole = (sum(ax.patches[place].get_facecolor()[:3]) for place in (2, 3))
    assert whole < half < 2.8 and [tick.get_text() for tick in ax.get_xticklabels()] == [
        "norm",
        "vote",
    ]


def test_a_legend_below_names_once_what_several_panels_show():
    fig, axes = figure(cols=2)
    for ax in axes:
        plots.target(ax, "target 50 ms", y=50)
        plots.lines(ax, [0, 1], {"p50": [1, 2]})
    plots.legend(fig)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["target 50 ms", "p50"]


def test_a_digit_is_drawn_on_its_own_scale_of_grey(ax):
    plots.digit(ax, np.full(64, 4), "a 4")
    assert (
        ax.images[0].get_array().shape == (8, 8)
        and ax.images[0].get_clim() == (0, 16)
        and ax.get_title() == "a 4"
    )


def test_a_diagram_is_made_of_boxes_and_arrows_that_end_where_they_should(ax):
    plots.box(ax, (0, 0), (20, 12), "Registry\nversions, lineage")
    plots.box(ax, (30, 0), (20, 6), "Loader", ls="--")
    plots.arrow(ax, (20, 6), (25, 6), (30, 3))
    assert texts(ax) == ["Registry", "versions, lineage", "Loader", ""]
    assert ax.texts[-1].xy == (30, 3) and list(ax.lines[0].get_xdata()) == [20, 25]


def test_nothing_is_written_smaller_than_ten_points(ax):
    plots.heat(ax, pd.DataFrame({"norm": [0.4]}, index=["attack"]))
    plots.bars(ax, {"edge": 2.0})
    plots.waterfall(ax, {"a": 5, "b": 1})
    plots.box(ax, (0, 0), (20, 12), "Registry\nversions, lineage")
    plots.legend(ax.figure, *plots.lines(ax, [0], {"p50": [1]})[:0])
    words = [
        *ax.texts,
        *ax.get_xticklabels(),
        *ax.get_yticklabels(),
        *ax.figure.legends[0].get_texts(),
    ]
    assert min(text.get_fontsize() for text in words) >= 10


@pytest.mark.parametrize("fill", [*COLOURS, plots.LIGHT, "#ffffff", "#000000"])
def test_what_is_written_on_a_colour_is_the_ink_of_more_contrast(fill):
    inks = {ink: contrast(fill, to_hex(ink)) for ink in ("white", plots.INK)}
    assert inks[plots.ink(fill)] == max(inks.values()) >= 4
