"""What a figure shows, in words: the text alternative that a screen reader reads. It follows from the figure itself."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

MAX_CHARS = 900
_MOST_VALUES = 10  # that are read out one by one


def described(fig: Figure) -> str:
    """Each panel with its title and axes, and what is drawn in it under a name; at most ``MAX_CHARS``."""
    panels = [ax for ax in fig.axes if ax.get_visible()]
    several = len(panels) > 1
    sentences = [f"Figure with {len(panels)} panels", fig.get_suptitle()] if several else [fig.get_suptitle()]
    for number, ax in enumerate(panels, start=1):
        sentences += _panel(ax, f"Panel {number}" if several else "Figure")
    words = " ".join(" ".join(text.split()).rstrip(".") + "." for text in sentences if text)
    return words if len(words) <= MAX_CHARS else words[: MAX_CHARS - 2].rpartition(" ")[0] + " …"


def _panel(ax: Axes, what: str) -> Iterator[str]:
    titles = [ax.get_title(where) for where in ("left", "center", "right")]
    axes = [_axis(ax, name) for name in "xy"]
    drawn = [*_lines(ax), *_bars(ax), *_others(ax)]
    yield ": ".join(part for part in (what, ", ".join(filter(None, titles))) if part)
    yield "; ".join(filter(None, axes))
    yield "; ".join(drawn)


def _ticks(ax: Axes, name: str) -> list[str]:
    """The labels of an axis where they are words; of axes that share it only one may show them."""
    shared = getattr(ax, f"get_shared_{name}_axes")().get_siblings(ax)
    labels = [tick.get_text() for each in shared for tick in getattr(each, f"{name}axis").get_ticklabels()]
    words = [text for text in dict.fromkeys(labels) if text and not text.startswith("$")]
    return words if any(character.isalpha() for word in words for character in word) else []


def _axis(ax: Axes, name: str) -> str:
    axis = getattr(ax, f"{name}axis")
    words, title = _ticks(ax, name), axis.get_label_text()
    if not (ax.axison and axis.get_visible() and (words or title)):
        return ""
    low, high = sorted(axis.get_view_interval())
    scale = " on a logarithmic scale" if axis.get_scale() == "log" else ""
    span = ", ".join(words) or f"{_number(low)} to {_number(high)}"
    return f"{f'{name} axis {title}'.rstrip()}: {span}{scale}"


def _lines(ax: Axes) -> Iterator[str]:
    which = 0 if _ticks(ax, "y") else 1  # where the places on y have names, the numbers are on x
    errors = {group.lines[0]: group for group in ax.containers if isinstance(group, ErrorbarContainer)}
    for line in ax.lines:
        values = np.asarray(line.get_data(orig=False)[which], float)
        values = values[np.isfinite(values)]
        name = _named(errors.get(line, line))
        if name:
            yield f"{name} {_told(values)}"


def _bars(ax: Axes) -> Iterator[str]:
    for group in ax.containers:
        if isinstance(group, BarContainer):
            sideways = group.orientation == "horizontal"
            values = np.array([bar.get_width() if sideways else bar.get_height() for bar in group])
            yield f"{_named(group) or 'bars'} {_told(values)}"


def _told(values: Any) -> str:
    if len(values) <= _MOST_VALUES:
        return ", ".join(map(_number, values))
    return f"from {_number(values[0])} to {_number(values[-1])}, {len(values)} values"


def _others(ax: Axes) -> Iterator[str]:
    for part in chain(ax.collections, ax.images):
        yield from filter(None, [_named(part)])
    for text in ax.texts:
        yield from filter(None, [" ".join(text.get_text().split())])


def _named(artist: Any) -> str:
    """The label that a legend shows; matplotlib's own begin with an underscore."""
    name = str(artist.get_label() or "")
    return "" if name.startswith("_") else name


def _number(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
