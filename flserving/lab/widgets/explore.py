"""Sliders over a pure model and a pure drawing.

``model(**values) -> numbers`` and ``draw(numbers) -> Figure`` know nothing of widgets, so a test
calls them directly and a static figure cell shows the same picture where no kernel runs.
"""

import base64
import html
import inspect
import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, TypeVar

import ipywidgets as widgets
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from flserving.errors import ConfigError
from flserving.lab import style

Control = tuple[float, float, float] | list[Any] | bool
Result = TypeVar("Result")


class Explorer(widgets.VBox):  # type: ignore[misc]
    """Controls above a picture. ``values`` is what the controls show, ``picture`` the figure of
    them."""

    def __init__(
        self, render: Callable[[dict[str, Any]], str], controls: dict[str, widgets.Widget]
    ) -> None:
        self._render = render
        self.controls = controls
        self.picture = widgets.HTML(  # widgets.Image has no text alternative
            layout=widgets.Layout(max_width="100%", margin="0", align_self="flex-start")
        )
        self.problem = widgets.HTML()
        self._redraw()
        for control in controls.values():
            control.observe(self._redraw, names="value")
        super().__init__([*controls.values(), self.problem, self.picture])

    @property
    def values(self) -> dict[str, Any]:
        """What the controls show now, by control name; floats rounded to the slider's step."""
        return {name: _read(control) for name, control in self.controls.items()}

    def _redraw(self, _change: object = None) -> None:
        try:
            self.picture.value = self._render(self.values)
        except Exception as error:
            # A front end drops what a callback raises into a log that nobody reads: show it above
            # the stale picture, and raise it too, so that a test or a cell that moves the slider
            # from Python fails.
            trace = html.escape("".join(traceback.format_exception(error)))
            self.problem.value = (
                f'<div role="alert" style="border-left:4px solid #D55E00;padding:4px 8px">'
                f"<b>{type(error).__name__}</b>: {html.escape(str(error))}<br>The picture below is not of these values."
                f"<details><summary>Traceback</summary><pre>{trace}</pre></details></div>"
            )
            raise
        self.problem.value = ""


def explore(
    model: Callable[..., Any],
    draw: Callable[[Any], Figure],
    /,
    *,
    start: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    **controls: Control,
) -> Explorer | None:
    """Show ``draw(model(**values))`` under one control per value; end the cell with this call.

    Args:
        model: Called with one keyword per control; returns whatever ``draw`` takes.
        draw: Takes the model's result.
        start: First values; others start at the middle of a slider, the first entry of a list.
        labels: Text of a control instead of the one made from its name (``rate_per_s`` -> "rate
            (per s)").
        **controls: ``(low, high, step)`` of ints or floats is a slider, a list a drop-down, a bool
            a checkbox.

    Returns:
        The widget; None with the environment variable FLSERVING_STATIC=1, where every corner of the
        control box (both ends of each slider, every entry, both ticks) is computed, so many of them
        are drawn that any two controls meet at all their ends, and nothing is shown.

    Raises:
        ConfigError: A control or start value makes no sense, or ``model`` does not take these
            names. Exception: Whatever ``model`` or ``draw`` raises, with a note that says at which
            values.

    Cost: one model call, one drawing (about 60 ms) and a 20 kB PNG per step.
    """
    start = dict(start or {})
    labels = dict(labels or {})
    for given, what in ((start, "start"), (labels, "labels")):
        unknown = sorted(given.keys() - controls.keys())
        if unknown:
            raise ConfigError(
                f"{what} names {unknown}, which is not a control: use {sorted(controls)}"
            )
    if not controls:
        raise ConfigError(
            "explore needs at least one control, got none: pass name=(low, high, step)"
        )
    texts = {name: labels.get(name, style.label(name)) for name in controls}
    widest = max(map(len, texts.values()))
    look = {
        "style": {"description_width": f"{widest}ch"},  # one column of labels, one of controls
        "layout": widgets.Layout(width="min(100%, 520px)"),
    }
    made = {}
    for name, control in controls.items():
        named = {"description": texts[name], **look}
        made[name] = _widget(name, control, start.get(name), named)
    try:
        inspect.signature(model).bind(**controls)
    except TypeError as error:
        raise ConfigError(f"the model cannot be called with {sorted(controls)}: {error}") from None
    render = _renderer(model, draw)
    if not style.is_static():
        return Explorer(render, made)
    box = list(corners(**controls))
    drawn = covering(box)
    for values in box:
        if values in drawn:
            render(values)
        else:
            _at(values, model)
    return None


def corners(**controls: Control) -> Iterator[dict[str, Any]]:
    """Every combination of the ends: low and high of a slider, each entry of a list, both ticks of
    a checkbox."""
    ends: list[Sequence[Any]] = []
    for control in controls.values():
        if isinstance(control, bool):
            ends.append((False, True))
        elif isinstance(control, tuple):
            ends.append(control[:2])
        else:
            ends.append(control)
    for combination in itertools.product(*ends):
        yield dict(zip(controls, combination, strict=True))


def covering(box: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Few corners of a box in which any two controls meet at all their ends: 8 of the 64 of five
    controls.

    Most faults of a drawing show with one or two extreme values (Kuhn, Wallace and Gallo, IEEE TSE
    2004). Greedy: the corner with the most pairs that were not seen yet (AETG, Cohen et al., IEEE
    TSE 1997).
    """
    left = [(values, _pairs(values)) for values in box]
    missing = set[Any]().union(*(pairs for _, pairs in left))
    chosen = []
    while missing:
        values, pairs = max(left, key=lambda corner: len(corner[1] & missing))
        chosen.append(values)
        missing -= pairs
    return chosen


def _pairs(values: Mapping[str, Any]) -> set[Any]:
    shown = [(name, repr(value)) for name, value in values.items()]  # a choice need not be hashable
    return set(itertools.combinations_with_replacement(shown, 2))


def _renderer(
    model: Callable[..., Any], draw: Callable[[Any], Figure]
) -> Callable[[dict[str, Any]], str]:
    layout = _Layout()

    def picture(**values: Any) -> str:
        with style.styled():
            drawn = draw(model(**values))
            if not isinstance(drawn, Figure):
                raise ConfigError(
                    f"draw returned {type(drawn).__name__}: it must return the matplotlib Figure"
                )
            image = base64.b64encode(layout.png(drawn))
            return style.picture_tag(image.decode(), style.alternative(drawn))

    return lambda values: _at(values, picture)


class _Layout:
    """Where the axes of a figure stand. To lay it out takes longer than to draw it, so the next
    picture keeps the places while its texts fit; and nothing jumps while a slider moves."""

    def __init__(self) -> None:
        self._places: list[Bbox] = []
        self._grid: object = None

    def png(self, fig: Figure) -> bytes:
        grid = [str(ax.get_subplotspec()) for ax in fig.axes], *fig.get_size_inches()
        engine = fig.get_layout_engine()
        if engine is not None and grid == self._grid:
            fig.set_layout_engine("none")
            for ax, place in zip(fig.axes, self._places, strict=True):
                ax.set_position(place)
                ax.set_in_layout(True)  # set_position takes it out of the layout
            image = style.png(fig)
            if _texts_fit(fig):
                return image
            fig.set_layout_engine(engine)
        image = style.png(fig)
        self._places = [ax.get_position(original=True) for ax in fig.axes]
        self._grid = grid if _texts_fit(fig) else None
        return image


def _texts_fit(fig: Figure) -> bool:
    """Whether titles, labels and notes are within the figure, and in no other axes nor in what
    stands between axes. Labels of ticks stand between the axes and their label."""
    between = [it.get_window_extent() for it in (*fig.legends, *fig.texts)]
    for ax in fig.axes:
        others = [it.bbox for it in fig.axes if not it.bbox.overlaps(ax.bbox)] + between
        at_ticks = {*ax.get_xticklabels(which="both"), *ax.get_yticklabels(which="both")}
        for text in ax.findobj(Text):
            if text in at_ticks or not text.get_visible() or not text.get_text():
                continue
            box = text.get_window_extent()
            inside = fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
            inside &= fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
            if not inside or any(map(box.overlaps, others)):
                return False
    return True


def _at(values: Mapping[str, Any], function: Callable[..., Result]) -> Result:
    """``function(**values)``; what it raises says at which values."""
    try:
        return function(**values)
    except Exception as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        error.add_note(f"explore: with {shown}")
        raise


def _widget(name: str, control: Control, start: Any, look: dict[str, Any]) -> widgets.Widget:
    if isinstance(control, bool):
        return widgets.Checkbox(value=_choice(name, start, [control, not control]), **look)
    if isinstance(control, list):
        if not control:
            raise ConfigError(f"control {name} is an empty list: give at least one choice")
        return widgets.Dropdown(options=control, value=_choice(name, start, control), **look)
    if not isinstance(control, tuple) or len(control) != 3 or not all(map(_is_number, control)):
        raise ConfigError(
            f"control {name} is {control!r}: use (low, high, step), a list of choices, or True/False"
        )
    whole = all(isinstance(part, Integral) for part in control)
    # numpy's numbers, too
    low, high, step = (int(part) if whole else float(part) for part in control)
    if low >= high or not 0 < step <= high - low:
        raise ConfigError(
            f"control {name} is {control!r}: it needs low < high and 0 < step <= high - low"
        )
    if start is None:
        start = low + step * int((high - low) / step / 2)
    kind = "an integer" if whole else "a number"
    fits = isinstance(start, Integral) or not whole
    if not fits or not _is_number(start) or not low <= start <= high:
        raise ConfigError(
            f"start value of {name} is {start!r}: it must be {kind} in [{low}, {high}]"
        )
    look = {"min": low, "max": high, "step": step, "value": start, **look}
    if whole:
        return widgets.IntSlider(**look)
    digits = _decimals(low, step)
    return widgets.FloatSlider(readout_format=f".{digits}f", **look)


def _choice(name: str, start: Any, choices: list[Any]) -> Any:
    if start is None:
        return choices[0]
    if start not in choices:
        raise ConfigError(f"start value of {name} is {start!r}: choose one of {choices}")
    return start


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _decimals(*parts: float) -> int:
    most = 0
    for part in parts:
        shortest = Decimal(repr(part)).normalize()
        most = max(most, -int(shortest.as_tuple().exponent))
    return min(6, most)


def _read(control: widgets.Widget) -> Any:
    # the browser sends 0.1 + 0.2 as 0.30000000000000004:
    # hand the model the number that the slider shows
    if isinstance(control, widgets.FloatSlider):
        return round(control.value, _decimals(control.min, control.step))
    return control.value
