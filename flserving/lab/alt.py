"""What a figure shows, in words: the text alternative that a screen reader reads. It follows from
the figure itself."""

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
    """Each panel with its title and axes, and what is drawn in it under a name; at most
    ``MAX_CHARS``."""
    panels = [ax for ax in fig.axes if ax.get_visible()]
    several = len(panels) > 1
    sentences = [fig.get_suptitle()]
    if several:
        sentences.insert(0, f"Figure with {len(panels)} panels")
    for number, ax in enumerate(panels, start=1):
        sentences += _panel(ax, f"Panel {number}" if several else "Figure")
    words = []
    for text in filter(None, sentences):
        one_line = " ".join(text.split())
        words.append(one_line.rstrip(".") + ".")
    said = " ".join(words)
    if len(said) <= MAX_CHARS:
        return said
    whole_words, _, _ = said[: MAX_CHARS - 2].rpartition(" ")
    return whole_words + " …"


def _panel(ax: Axes, what: str) -> Iterator[str]:
    titles = [ax.get_title(where) for where in ("left", "center", "right")]
    title = ", ".join(filter(None, titles))
    axes = [_axis(ax, name) for name in "xy"]
    drawn = [*_lines(ax), *_bars(ax), *_others(ax)]
    yield ": ".join(filter(None, [what, title]))
    yield "; ".join(filter(None, axes))
    yield "; ".join(drawn)


def _ticks(ax: Axes, name: str) -> list[str]:
    """The labels of an axis where they are words; of axes that share it only one may show them."""
    shared = getattr(ax, f"get_shared_{name}_axes")().get_siblings(ax)
    labels = []
    for each in shared:
        axis = getattr(each, f"{name}axis")
        labels += [tick.get_text() for tick in axis.get_ticklabels()]
    words = [text for text in dict.fromkeys(labels) if text and not text.startswith("$")]
    if not any(map(str.isalpha, "".join(words))):
        return []
    return words


def _axis(ax: Axes, name: str) -> str:
    axis = getattr(ax, f"{name}axis")
    words = _ticks(ax, name)
    title = axis.get_label_text()
    shown = ax.axison and axis.get_visible()
    if not shown or not (words or title):
        return ""
    low, high = sorted(axis.get_view_interval())
    span = ", ".join(words) or f"{_number(low)} to {_number(high)}"
    if axis.get_scale() == "log":
        span += " on a logarithmic scale"
    name = f"{name} axis {title}".rstrip()
    return f"{name}: {span}"


def _lines(ax: Axes) -> Iterator[str]:
    which = 0 if _ticks(ax, "y") else 1  # where the places on y have names, the numbers are on x
    errors = {
        group.lines[0]: group for group in ax.containers if isinstance(group, ErrorbarContainer)
    }
    for line in ax.lines:
        values = np.asarray(line.get_data(orig=False)[which], float)
        values = values[np.isfinite(values)]
        name = _named(errors.get(line, line))
        if name:
            yield f"{name} {_told(values)}"


def _bars(ax: Axes) -> Iterator[str]:
    for group in ax.containers:
        if isinstance(group, BarContainer):
            if group.orientation == "horizontal":
                values = [bar.get_width() for bar in group]
            else:
                values = [bar.get_height() for bar in group]
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
    if name.startswith("_"):
        return ""
    return name


def _number(value: float) -> str:
    if abs(value) < 1000:
        return f"{value:,.3g}"
    return f"{value:,.0f}"
