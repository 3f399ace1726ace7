"""One look for every figure: the style sheet, ``figure(...)`` that follows it, labels that name
their unit.

Figures are made without pyplot, so a notebook that draws a thousand of them keeps none alive.
"""

import base64
import html
import io
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from IPython import get_ipython
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from flserving.lab.alt import described

_RC = matplotlib.rc_params_from_file(
    Path(__file__).with_name("flserving.mplstyle"), use_default_template=False
)

COLOURS: tuple[str, ...] = tuple(
    f"#{entry['color'].lstrip('#')}" for entry in _RC["axes.prop_cycle"]
)
STATIC_SWITCH = "FLSERVING_STATIC"
WIDTH_IN = 8.0  # fits a JupyterLab cell beside the file browser on a 1366 px screen

_UNITS = {
    "per_s": "per s",
    "ms": "ms",
    "us": "µs",
    "s": "s",
    "bytes": "bytes",
    "kb": "kB",
    "mb": "MB",
    "percent": "%",
    "rows": "rows",
}


class LabFigure(Figure):
    """A figure that shows itself at the end of a cell, with or without pyplot.

    ``alt`` is its text alternative; where it is empty, :func:`flserving.lab.alt.described` makes
    one. A notebook gets the PNG, whose metadata hold the alternative, and the same picture as HTML:
    JupyterLab reads no such metadata.
    """

    alt = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)  # registers itself as self.canvas

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        """The PNG that a notebook stores, and its metadata: 256 colours are enough for a plot, and
        a third of the bytes."""
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(png(self))) as picture:
            picture.convert("RGB").quantize(256).save(
                buffer, "png", optimize=True, dpi=(self.dpi, self.dpi)
            )
        return buffer.getvalue(), {"alt": alternative(self)}

    def _repr_html_(self) -> str | None:
        """None with FLSERVING_STATIC=1: stored notebooks hold each picture once, as GitHub and
        nbconvert show it."""
        if is_static():
            return None
        picture, metadata = self._repr_png_()
        return picture_tag(base64.b64encode(picture).decode(), metadata["alt"])


def is_static() -> bool:
    """Whether FLSERVING_STATIC says that there is no page to show widgets on: in tests and
    exports."""
    return os.environ.get(STATIC_SWITCH, "0") not in ("", "0")


def alternative(fig: Figure) -> str:
    """The text alternative of any figure."""
    return getattr(fig, "alt", "") or described(fig)


def picture_tag(picture: str, alt: str) -> str:
    """A PNG, given in base64, as an ``<img>`` that screen readers can name. Decoded at once: a
    change shows no gap."""
    source = picture.replace("\n", "")
    return (
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{source}" '
        'decoding="sync" style="max-width: 100%">'
    )


def styled() -> AbstractContextManager[None]:
    """Context in which everything drawn follows the house style; leaves the caller's settings
    alone."""
    return rc_context(dict(_RC))


def use_style() -> None:
    """Make the house style the default of this kernel, for plots that do not come from
    ``flserving.lab``."""
    matplotlib.rcParams.update(_RC)
    shell = get_ipython()
    # else IPython takes over at the first plot of pandas: another size, and no text alternative
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(LabFigure, LabFigure._repr_png_)


def figure(
    *, rows: int = 1, cols: int = 1, height_in: float = 3.2, **grid: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in the house style and its axes, row by row.

    Args:
        rows, cols: Grid of axes.
        height_in: Height in inches; the width is ``WIDTH_IN``.
        **grid: What else ``Figure.subplots`` takes: ``sharex``, ``width_ratios`` ...

    Cost: about 20 ms for the axes, and 40 ms more once it is rendered (two slow cores).
    """
    with styled():
        fig = LabFigure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = fig.subplots(rows, cols, squeeze=False, **grid)
    return fig, list(axes.flat)


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes at its own size, in pixels = inches x dpi."""
    buffer = io.BytesIO()
    canvas = fig.canvas if isinstance(fig.canvas, FigureCanvasAgg) else FigureCanvasAgg(fig)
    with styled():
        # a widget sends one at every step: the usual compression is a tenth of its time
        canvas.print_png(buffer, pil_kwargs={"compress_level": 1})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def label(name: str) -> str:
    """A readable axis or slider label from a name that carries its unit: ``rate_per_s`` -> ``rate
    (per s)``."""
    for suffix, unit in _UNITS.items():
        if name.endswith(f"_{suffix}"):
            return f"{label(name[: -len(suffix) - 1])} ({unit})"
    words = name.replace("_", " ").strip()
    return f"number of {words[4:]}" if words.startswith("num ") else words
