"""Formulas of the notebooks as pictures in HTML, drawn by matplotlib: no script, no font, no
network is needed."""

from html import escape

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from flserving.errors import ConfigError

_COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}  # of SVG
_FONT = FontProperties(math_fontfamily="cm")
_UNITS = 100  # of the drawing, in an em


def formula(tex: str) -> str:
    r"""``\frac{1}{n}`` as an ``<svg>`` in the colour and the size of the text around it; its name
    is the TeX source.

    ConfigError: matplotlib cannot read it.
    """
    source = " ".join(tex.split())
    try:
        path = TextPath((0, 0), f"${source}$", size=_UNITS, prop=_FONT)
    except ValueError as error:
        raise ConfigError(
            f"the formula ${source}$ cannot be drawn: {str(error).splitlines()[-1]}"
        ) from None
    steps = []
    for point, code in path.iter_segments(simplify=False):
        numbers = " ".join(
            f"{value * sign:.0f}" for value, sign in zip(point, (1, -1) * 3, strict=False)
        )
        steps.append("Z" if code == Path.CLOSEPOLY else f"{_COMMANDS[code]}{numbers}")
    left, low, right, high = (round(edge) for edge in path.get_extents().extents)
    place = f"width: {(right - left) / _UNITS}em; height: {(high - low) / _UNITS}em; vertical-align: {low / _UNITS}em"
    return (
        f'<svg role="img" aria-label="{escape(source)}" viewBox="{left} {-high} {right - left} {high - low}" '
        f'style="{place}"><path fill="currentColor" d="{"".join(steps)}"/></svg>'
    )
