"""A small vocabulary for figures: each word draws one thing on an axes. Text beside marks, units,
targets, legends.

Names of things stand on y, from the top down; what is written stands beside its mark, so that no
colour is needed to read it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator
from numpy.typing import ArrayLike

from flserving.lab.queueing.arrivals import Floats
from flserving.lab.style import COLOURS

if TYPE_CHECKING:
    import pandas as pd

Text = Callable[[float], str]
Point = tuple[float, float]
Style = dict[str, Any]

INK = "#222222"
GREY = "#555555"
LIGHT = "#bbbbbb"
DASHES = ("-", "--", ":", "-.")
SMALL = 10
"""Points: the smallest text of a figure."""

_TIMES = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600}
_SIZES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_DAY_S = 86_400


# ------------------------------------------------------------------------------------------ numbers


def number_text(value: float) -> str:
    """0.5, 20, 1,000: three digits or all before the point, and no powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def time_text(seconds: float) -> str:
    """0.0432 -> "43.2 ms", 259.2 -> "4.32 min", 129600 -> "36 h", infinity -> "never"."""
    if seconds == 0:
        return "0 s"
    if np.isinf(seconds):
        return "never"
    if seconds >= 2 * _DAY_S:
        return f"{number_text(seconds / _DAY_S)} days"
    return _with_unit(round(seconds, 12), _TIMES)


def ms_text(ms: float) -> str:
    """0.0432 -> "43.2 µs"."""
    return time_text(ms / 1e3)


def nbytes_text(nbytes: float) -> str:
    """3136165 -> "3.14 MB"."""
    return _with_unit(nbytes, _SIZES)


def _with_unit(value: float, units: Mapping[str, float]) -> str:
    """In the largest of ascending ``units`` that leaves 1 or more, else in the smallest."""
    chosen = next(iter(units))
    for unit, size in units.items():
        if value >= size:
            chosen = unit
    return f"{number_text(value / units[chosen])} {chosen}"


def ticks(axis: Axis, text: Text = number_text, at: Sequence[float] = ()) -> None:
    """The axis says its values with ``text``: at ``at``, or else where there is room. Call it when
    all is drawn."""
    low, high = sorted(axis.get_view_interval())
    if at:
        axis.set_major_locator(FixedLocator([value for value in at if low <= value <= high]))
    elif axis.get_scale() == "log":
        axis.set_major_locator(_log_locator(np.log10(high / low)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(FixedLocator([]))


def _log_locator(decades: float) -> LogLocator:
    steps = [1]
    if decades < 1.2:
        steps = [1, 2, 3, 5]
    elif decades < 2.5:
        steps = [1, 3]
    return LogLocator(base=1000 if decades > 7 else 10, subs=steps, numticks=12)


# ---------------------------------------------------------------------------------- text and guides


def note(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    *,
    dx: float = 6,
    dy: float = 0,
    **style: Any,
) -> None:
    """A word beside a point of the data: ``dx`` and ``dy`` points away, 6 to the right where
    nothing is said."""
    usual = Style(
        fontsize=SMALL,
        va="center",
        color=INK,
        in_layout=False,
    )
    ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", **usual | style)


def target(
    ax: Axes,
    name: str = "target",
    *,
    x: float | None = None,
    y: float | None = None,
    **style: Any,
) -> None:
    """A dashed grey line at ``x`` or at ``y``, with its name in the legend."""
    usual = Style(
        color=GREY,
        linestyle="--",
        linewidth=1,
        label=name,
    )
    if x is not None:
        ax.axvline(x, **usual | style)
    if y is not None:
        ax.axhline(y, **usual | style)


def legend(fig: Figure, *axes: Axes, **style: Any) -> None:
    """One legend below the figure, of ``axes`` or of all; what has the same name in several stands
    there once."""
    known: dict[str, Any] = {}
    for ax in axes or fig.axes:
        handles, names = ax.get_legend_handles_labels()
        known |= dict(zip(names, handles, strict=True))
    usual = Style(
        loc="outside lower center",
        ncols=4,
        handlelength=1.6,
        columnspacing=1.4,
    )
    fig.legend(known.values(), known, **usual | style)


# -------------------------------------------------------------------------------------------- marks


def lines(ax: Axes, x: ArrayLike, curves: Mapping[str, ArrayLike], **style: Any) -> list[Line2D]:
    """A named line for each of ``curves``, in colours and in dashes."""
    drawn = []
    for (name, y), colour, dashes in zip(curves.items(), COLOURS, DASHES * 2, strict=False):
        drawn += ax.plot(x, y, label=name, **{"color": colour, "ls": dashes} | style)
    return drawn


def rows(ax: Axes, names: Sequence[object]) -> None:
    """The places 0, 1, ... on y get names, the first at the top."""
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def bars(
    ax: Axes,
    values: Mapping[Any, float],
    text: Text = number_text,
    **style: Any,
) -> None:
    """A bar for each of ``values``, with its value written beside it."""
    lengths = _rows(ax, values)
    drawn = ax.barh(range(len(lengths)), lengths, height=0.65, **style)
    ax.bar_label(drawn, fmt=text, padding=4, fontsize=SMALL, color=INK)
    ax.set_xlim(0, 1.35 * max(*lengths, 1e-9))


def _rows(ax: Axes, values: Mapping[Any, float]) -> Floats:
    """A row for each of a dictionary or of a series; its values, float64."""
    named = dict(values)
    rows(ax, list(named))
    return np.array(list(named.values()), float)


def dots(ax: Axes, groups: Mapping[str, ArrayLike], **style: Any) -> None:
    """The values of each group as dots on its line; equal ones stay visible."""
    rows(ax, list(groups))
    usual = Style(
        color=COLOURS[0],
        alpha=0.4,
        markeredgewidth=0,
    )
    for place, values in enumerate(groups.values()):
        ordered = np.sort(np.atleast_1d(values))
        spread = [-0.16, 0, 0.16] if len(ordered) > 1 else [0]
        ax.plot(ordered, place + np.resize(spread, len(ordered)), "o", **usual | style)


def waterfall(
    ax: Axes,
    times: Mapping[str, float],
    text: Text = number_text,
    colours: Sequence[str] = COLOURS * 3,
) -> None:
    """Bars one after the other, each with its time as ``text`` and its share of the total."""
    took = _rows(ax, times)
    total = max(took.sum(), 1e-9)
    ends = took.cumsum()
    starts = ends - took
    ax.barh(range(len(took)), took, left=starts, color=colours[: len(took)], height=0.65)
    for place, (one, start, end) in enumerate(zip(took, starts, ends, strict=True)):
        words = f"{text(one)}, {one / total:.0%}" if one else "not entered"
        if end <= 0.7 * total:
            note(ax, end, place, words)
        elif start >= 0.3 * total:
            note(ax, start, place, words, dx=-6, ha="right")
        else:  # a bar across nearly everything: inside
            note(ax, (start + end) / 2, place, words, dx=0, ha="center", color=ink(colours[place]))
    ax.set_xlim(0, total * 1.01)


def heat(
    ax: Axes,
    shares: "pd.DataFrame",
    text: Text = "{:.0%}".format,
    color: str = COLOURS[0],
) -> None:
    """A table in colour: the larger a share, the stronger; 0 and what is missing are paper, without
    a number."""
    rows(ax, list(shares.index))
    for (row, column), share in np.ndenumerate(shares.to_numpy(float)):
        strength = float(np.clip(np.nan_to_num(share), 0, 1))
        depth = 0.04 + 0.76 * strength
        fill = tuple(1 - depth * (1 - part) for part in to_rgb(color))
        patch = Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, facecolor=fill, linewidth=0)
        ax.add_patch(patch)
        if strength > 0:
            _centred(ax, column, row, text(share), color=ink(fill))
    columns = list(shares.columns)
    ax.set(xlim=(-0.5, len(columns) - 0.5), frame_on=False)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="left", rotation_mode="anchor")
    ax.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=SMALL)
    ax.grid(visible=False)


def digit(ax: Axes, image: ArrayLike, title: str = "") -> None:
    """A handwritten digit, 64 grey levels from 0 to 16."""
    ax.imshow(np.asarray(image).reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=LIGHT)  # where the picture ends, on white paper
    ax.set_title(title, loc="center")
    ax.grid(visible=False)


# ----------------------------------------------------------------------------------------- diagrams


def box(
    ax: Axes,
    corner: Point,
    size: Point,
    text: str,
    **style: Any,
) -> None:
    """A rounded box with its lower left ``corner``; the first line of ``text`` is its name, in
    bold."""
    width, height = size
    usual = Style(
        boxstyle="round,pad=0,rounding_size=1",
        fc="white",
        ec=COLOURS[0],
        lw=1.6,
    )
    ax.add_patch(FancyBboxPatch(corner, width, height, **usual | style))
    middle = corner[0] + width / 2
    bottom = corner[1]
    name, _, details = text.partition("\n")
    if details:
        _centred(ax, middle, bottom + height - 1.4, name, va="top", weight="bold")
        _centred(ax, middle, bottom + (height - 3.6) / 2, details)
    else:
        _centred(ax, middle, bottom + height / 2, name, va="center_baseline")


def arrow(ax: Axes, *points: Point, color: str = COLOURS[0]) -> None:
    """A line through ``points`` that ends in a head."""
    ax.plot(*zip(*points[:-1], strict=True), color=color, lw=1.8, solid_joinstyle="round")
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "lw": 1.8,
        "shrinkA": 0,
        "shrinkB": 1,
        "mutation_scale": 13,
    }
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def ink(fill: Any) -> str:
    """What can be read on a colour: white or dark, whichever has more contrast (WCAG 2.2)."""
    red, green, blue = (part**2.2 for part in to_rgb(fill))  # light, not the steps of a screen
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.213 else INK


def _centred(ax: Axes, x: float, y: float, text: str, **style: Any) -> None:
    usual = Style(
        ha="center",
        va="center",
        color=INK,
        fontsize=SMALL,
    )
    ax.text(x, y, text, **usual | style)
