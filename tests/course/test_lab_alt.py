"""The words that stand for a figure where nobody sees it."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from IPython.core.pylabtools import select_figure_formats
from PIL import Image

from flserving.lab import alt, style


def test_a_panel_has_its_title_its_axes_and_what_is_drawn():
    fig, (ax,) = style.figure()
    ax.plot([1, 10, 100], [2.0, np.nan, 1234.5], label="measured")
    ax.plot([1, 100], [5, 5], ":")  # without a name: a guide for the eye
    ax.set(
        title="rows: 8",
        xlabel="width",
        ylabel="time (µs)",
        xscale="log",
        ylim=(0, 2000),
        xlim=(1, 100),
    )
    assert alt.described(fig) == (
        "Figure: rows: 8. x axis width: 1 to 100 on a logarithmic scale; y axis time (µs): 0 to 2,000. "
        "measured 2, 1,234."
    )


def test_panels_are_counted_bars_read_out_and_named_ticks_are_words():
    fig, (left, right) = style.figure(cols=2)
    left.bar(range(3), [0.5, 20, 3])
    left.set_axis_off()
    left.text(0, 1, "two\nlines")
    right.errorbar([3, 1], [0, 1], xerr=1, fmt="o", label="worst client")
    right.set_yticks([0, 1], ["onnx", "int8"])
    fig.suptitle("Versions")
    assert alt.described(fig) == (
        "Figure with 2 panels. Versions. Panel 1. bars 0.5, 20, 3; two lines. Panel 2. y axis: onnx, int8. "
        "worst client 3, 1."
    )


def test_panels_that_share_an_axis_share_its_words():
    fig, axes = style.figure(cols=2, sharey=True)
    for ax in axes:
        ax.plot([3, 1], [0, 1], "o", label="all rows")
    axes[0].set_yticks([0, 1], ["onnx", "int8"])
    assert (
        alt.described(fig).count("all rows 3, 1.")
        == alt.described(fig).count("y axis: onnx, int8.")
        == 2
    )


def test_many_values_are_summed_up_and_the_text_ends():
    fig, axes = style.figure(cols=20)
    for ax in axes:
        ax.plot(range(50), label="a rather long name of a line")
    text = alt.described(fig)
    assert "from 0 to 49, 50 values" in text and text.endswith(" …") and len(text) <= alt.MAX_CHARS


@pytest.mark.parametrize("own", ["", "Latency falls with the batch."])
def test_a_notebook_stores_it_with_the_picture(own):
    fig, (ax,) = style.figure()
    ax.set_title("an empty plot")
    fig.alt = own
    data, metadata = DisplayFormatter().format(fig)
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"] == {"alt": own or "Figure: an empty plot."}


@pytest.mark.parametrize("static", ["", "1"])
def test_a_page_that_lives_gets_it_as_html_and_a_stored_notebook_holds_the_picture_once(
    static, monkeypatch
):
    monkeypatch.setenv("FLSERVING_STATIC", static)
    fig, _ = style.figure()
    fig.alt = '"p99" < 5 ms & falling'
    data, _ = DisplayFormatter().format(fig)
    assert ("text/html" in data) == (static == "")
    if not static:
        source = base64.b64encode(data["image/png"]).decode()
        picture = BeautifulSoup(data["text/html"], "html.parser").img
        assert (picture["alt"], picture["src"]) == (fig.alt, f"data:image/png;base64,{source}")


def test_a_plot_of_pandas_does_not_change_how_the_figures_after_it_are_stored(monkeypatch):
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    monkeypatch.setattr(style, "get_ipython", lambda: shell)
    with style.styled():  # and not beyond this test
        style.use_style()
    select_figure_formats(shell, {"png"})  # what IPython does once something has imported pyplot
    fig, _ = style.figure(height_in=3)
    data, metadata = shell.display_formatter.format(fig)
    with Image.open(io.BytesIO(data["image/png"])) as picture:
        assert picture.size == (800, 300) and metadata["image/png"]["alt"]
