"""The house style, and ``explore``: sliders over a pure model and a pure drawing."""

import base64
import itertools
import math
import re
import subprocess
import sys

import ipywidgets as widgets
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from flserving.errors import ConfigError
from flserving.lab import style
from flserving.lab.widgets.explore import Explorer, corners, explore

PNG = b"\x89PNG\r\n\x1a\n"


def line(slope, log=False):
    return {"y": [slope * x for x in range(5)], "log": log}


def draw(numbers):
    fig, (ax,) = style.figure()
    ax.plot(numbers["y"])
    ax.set(
        xlabel="wait (ms)",
        ylabel=style.label("rate_per_s"),
        yscale="symlog" if numbers["log"] else "linear",
    )
    return fig


def shown(box):
    """The PNG in the explorer's HTML."""
    return base64.b64decode(
        re.search(r'src="data:image/png;base64,([^"]+)"', box.picture.value)[1], validate=True
    )


def size_px(data):
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


# -------------------------------------------------------------------------------------------- style


def test_figure_has_the_house_size_and_colours_and_leaves_settings_alone():
    before = dict(matplotlib.rcParams)
    fig, (ax,) = style.figure()
    (first,) = ax.plot([1, 2])
    assert size_px(style.png(fig)) == (800, 320)
    assert fig._repr_png_()[0].startswith(PNG)
    assert not ax.spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before
    assert first.get_color() == style.COLOURS[0]


def test_figure_hands_its_axes_out_row_by_row():
    fig, axes = style.figure(rows=2, cols=3, height_in=4, sharex=True)
    assert axes == fig.axes and len(axes) == 6


def test_no_two_colours_are_close_for_a_colour_blind_reader():
    # Deuteranopia and protanopia merge red and green: distance in lightness and blue-yellow must
    # stay.
    def seen(colour):
        red, green, blue = matplotlib.colors.to_rgb(colour)
        lightness = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
        return lightness ** (1 / 3), blue - (red + green) / 2

    seen_colours = [seen(colour) for colour in style.COLOURS]
    assert len(seen_colours) == 7
    for i, one in enumerate(seen_colours):
        assert all(math.dist(one, other) > 0.08 for other in seen_colours[:i])


def test_use_style_sets_the_defaults_of_the_kernel():
    with matplotlib.rc_context():
        style.use_style()
        assert matplotlib.rcParams["axes.grid"] is True
        assert matplotlib.rcParams["figure.figsize"] == [style.WIDTH_IN, 3.2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rate_per_s", "rate (per s)"), ("wait_ms", "wait (ms)"), ("cache_bytes", "cache (bytes)"), ("skew", "skew"),
        ("timeout_s", "timeout (s)"), ("hit_rate", "hit rate"), ("num_clients", "number of clients"),
        ("classes", "classes"), ("share_percent", "share (%)"),
    ],
)  # fmt: skip
def test_label_names_the_unit(name, text):
    assert style.label(name) == text


@pytest.mark.full
def test_pyplot_is_never_imported():
    code = (
        "import sys; from flserving.lab import style; from flserving.lab.widgets.explore import explore;"
        "explore(lambda a: a, lambda n: style.figure()[0], a=(1, 3, 1));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------ explore


def test_controls_become_widgets_with_labels_and_middle_starts():
    box = explore(
        lambda rate_per_s, skew, policy, log: {"y": [rate_per_s], "log": log}, draw,
        rate_per_s=(10, 50, 10), skew=(0.6, 1.8, 0.1), policy=["lru", "fifo"], log=True,
    )  # fmt: skip
    kinds = {name: type(control) for name, control in box.controls.items()}
    assert kinds == {"rate_per_s": widgets.IntSlider, "skew": widgets.FloatSlider, "policy": widgets.Dropdown,
                     "log": widgets.Checkbox}  # fmt: skip
    assert box.values == {"rate_per_s": 30, "skew": 1.2, "policy": "lru", "log": True}
    assert box.controls["rate_per_s"].description == "rate (per s)"
    assert all(box.controls[name].continuous_update for name in ("rate_per_s", "skew"))
    assert box.children[-1] is box.picture and size_px(shown(box)) == (800, 320)


def test_the_picture_says_in_words_what_it_shows_now():
    """A screen reader must not read of the values that the sliders showed before."""
    box = explore(line, draw, slope=(1, 9, 1), log=False)
    assert (
        'alt="Figure. x axis wait (ms): ' in box.picture.value
        and "logarithmic" not in box.picture.value
    )
    box.controls["slope"].value = 9
    assert "rate (per s): -1.8 to 37.8" in box.picture.value


def test_moving_a_slider_redraws_the_picture():
    box = explore(line, draw, slope=(1, 9, 1), log=False)
    first = box.picture.value
    box.controls["slope"].value = 9
    second = box.picture.value
    box.controls["log"].value = True
    assert first != second != box.picture.value


def test_the_model_gets_the_number_that_the_slider_shows():
    seen = []
    box = explore(
        lambda skew: seen.append(skew) or line(skew),
        draw,
        skew=(0.05, 0.95, 0.1),
        start={"skew": 0.25},
    )
    box.controls["skew"].value = 0.1 + 0.2 + 0.05
    assert seen == [0.25, 0.35]
    assert box.controls["skew"].readout_format == ".2f"


def test_numpy_numbers_and_any_control_name_are_welcome():
    seen = []
    box = explore(
        lambda model, draw: seen.append((model, draw)) or line(model), draw,
        model=(np.int64(1), np.int64(9), 1), draw=(np.float64(0.5), np.float64(1.5), 0.5), start={"model": np.int64(3)},
    )  # fmt: skip
    assert seen == [(3, 1.0)] and isinstance(box.controls["model"], widgets.IntSlider)


def test_start_and_labels_are_used():
    box = explore(
        line,
        draw,
        slope=(1, 9, 1),
        log=False,
        start={"slope": 2, "log": True},
        labels={"slope": "Slope"},
    )
    assert box.values == {"slope": 2, "log": True} and box.controls["slope"].description == "Slope"


def test_an_error_in_the_callback_is_shown_raised_and_cleared_by_the_next_good_value():
    box = explore(lambda slope: line(1 / slope), draw, slope=(0, 4, 1), start={"slope": 2})
    good = box.picture.value
    with pytest.raises(ZeroDivisionError) as caught:
        box.controls["slope"].value = 0
    assert "slope=0" in "".join(caught.value.__notes__)
    assert 'role="alert"' in box.problem.value and "ZeroDivisionError" in box.problem.value
    assert "not of these values" in box.problem.value and box.picture.value == good
    box.controls["slope"].value = 4
    assert box.problem.value == "" and box.picture.value != good


def test_error_text_is_escaped():
    def model(slope):
        raise RuntimeError("<img src=x>") if slope == 3 else ConfigError("start")

    with pytest.raises(ConfigError, match="start"):  # the first picture must be right
        explore(model, draw, slope=(1, 3, 1))
    box = explore(lambda slope: line(slope) if slope < 3 else model(slope), draw, slope=(1, 3, 1))
    with pytest.raises(RuntimeError):
        box.controls["slope"].value = 3
    assert "<img" not in box.problem.value and "&lt;img" in box.problem.value


@pytest.mark.parametrize(
    ("changed", "stays"),
    [
        ({"ylabel": "other"}, True),
        ({"ylim": (0, 1e6)}, False),  # the label would stand outside of the figure
        ({"title": "another"}, True),
        ({"title": "two\nlines"}, False),
        ({"height_in": 4}, False),
        ({"cols": 2}, False),
        ({"entries": 2}, True),
        ({"entries": 7}, False),  # four rows in the legend below: it would stand over the label
    ],
)
def test_a_step_keeps_the_places_of_the_axes_while_the_texts_fit(changed, stays):
    drawn = []

    def panels(cols=1, height_in=3.2, entries=1, **changes):
        fig, axes = style.figure(cols=cols, height_in=height_in)
        for ax in axes:
            for entry in range(entries):
                ax.plot([0, 1], label=f"line {entry}")
            ax.set(title="one line", xlabel="time (s)", ylabel="rate (per s)")
            ax.set(**changes)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        drawn.append(fig)
        return fig

    box = explore(lambda other: changed if other else {}, lambda it: panels(**it), other=False)
    box.controls["other"].value = True
    first, second = ([ax.get_position().bounds for ax in fig.axes] for fig in drawn)
    assert (second == first) is stays
    if not stays:
        with style.styled():
            assert shown(box) == style.png(panels(**changed))


def test_a_step_between_panels_is_laid_out_anew_where_a_label_would_reach_the_next_one():
    drawn = []

    def two(top):
        fig, axes = style.figure(cols=2)
        for ax in axes:
            ax.set(ylim=(0, top), ylabel="rate (per s)")
        drawn.append(fig)
        return fig

    box = explore(lambda top: top, two, top=[1, 10**7])
    box.controls["top"].value = 10**7
    first, second = ([ax.get_position().bounds for ax in fig.axes] for fig in drawn)
    assert second != first
    with style.styled():
        assert shown(box) == style.png(two(10**7))


def test_draw_must_return_a_figure():
    with pytest.raises(
        ConfigError, match="draw returned NoneType: it must return the matplotlib Figure"
    ):
        explore(line, lambda numbers: None, slope=(1, 9, 1))


def test_a_foreign_figure_is_rendered_as_well():
    box = explore(line, lambda numbers: Figure(figsize=(2, 1), dpi=50), slope=(1, 9, 1))
    assert size_px(shown(box)) == (100, 50)


def test_static_switch_runs_every_corner_and_shows_nothing(monkeypatch):
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    seen = []

    def model(**values):
        seen.append(tuple(values.values()))
        return line(1)

    assert explore(model, draw, a=(1, 9, 2), b=(0.5, 1.5, 0.5), policy=["x"], log=False) is None
    assert sorted(seen) == sorted(
        (a, b, policy, log)
        for a in (1, 9)
        for b in (0.5, 1.5)
        for policy in "x"
        for log in (False, True)
    )
    with pytest.raises(ZeroDivisionError) as caught:  # the slider end that nobody dragged to
        explore(lambda a: line(1 / (a - 9)), draw, a=(1, 9, 2))
    assert "a=9" in "".join(caught.value.__notes__)


def test_of_a_large_box_any_two_controls_are_drawn_at_all_their_ends(monkeypatch):
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    controls = {
        "way": ["rest", "grpc", "none", "both"],
        "a": (1, 9, 1),
        "b": (0.5, 1.5, 0.5),
        "c": (2, 3, 1),
        "log": False,
    }
    computed, drawn = [], []

    def drawing(values):
        drawn.append(values)
        return draw(line(1))

    explore(lambda **values: computed.append(values) or values, drawing, **controls)
    assert len(computed) == 64 and len(drawn) <= 10
    for one, two in itertools.combinations(controls, 2):
        assert {(v[one], v[two]) for v in drawn} == {(v[one], v[two]) for v in computed}
    explore(
        lambda b: computed.append(b) or {},
        lambda numbers: drawn.append(1) or draw(line(1)),
        b=(1, 2, 1),
    )
    assert drawn[-2:] == [1, 1], "a single slider is drawn at both its ends"

    def fails(values):
        return draw(line(1 / (values["a"] - 9) if values["log"] else 1))

    with pytest.raises(ZeroDivisionError) as caught:  # only where two controls meet
        explore(lambda **values: values, fails, **controls)
    assert "a=9" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("value", ["0", ""])
def test_static_switch_off(monkeypatch, value):
    monkeypatch.setenv("FLSERVING_STATIC", value)
    assert isinstance(explore(line, draw, slope=(1, 9, 1)), Explorer)


def test_corners_need_no_widget():
    assert list(corners(a=(0, 5, 1))) == [{"a": 0}, {"a": 5}]
    assert list(corners(a=(0, 5, 1), b=[7, 8, 9]))[2:4] == [{"a": 0, "b": 9}, {"a": 5, "b": 7}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one control"),
        ({"slope": (9, 1, 1)}, "low < high"),
        ({"slope": (1, 9, 0)}, "0 < step"),
        ({"slope": (1, 9, 20)}, "step <= high - low"),
        ({"slope": (1, 9)}, "use \\(low, high, step\\)"),
        ({"slope": (1, math.nan, 1)}, "use \\(low, high, step\\)"),
        ({"slope": "high"}, "use \\(low, high, step\\)"),
        ({"slope": []}, "empty list"),
        (
            {"slope": (1, 9, 1), "start": {"slope": 10}},
            "slope is 10: it must be an integer in \\[1, 9\\]",
        ),
        ({"slope": (1, 9, 1), "start": {"slope": 2.5}}, "must be an integer"),
        ({"slope": (0.1, 0.9, 0.1), "start": {"slope": math.inf}}, "must be a number"),
        ({"slope": [1, 2], "start": {"slope": 3}}, "choose one of \\[1, 2\\]"),
        ({"slope": (1, 9, 1), "start": {"slop": 3}}, "start names \\['slop'\\]"),
        ({"slope": (1, 9, 1), "labels": {"slop": "s"}}, "labels names \\['slop'\\]"),
        ({"slop": (1, 9, 1)}, "the model cannot be called with \\['slop'\\]"),
    ],
)
def test_a_control_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        explore(line, draw, **arguments)
