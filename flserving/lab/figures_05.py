"""Figures and tables of notebook 05: bytes on the wire, a message byte by byte, retry storms, a drawn digit."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator
from torch import Tensor, nn

from flserving.errors import FlservingError
from flserving.lab.storm import Storm
from flserving.lab.style import COLOURS, figure, styled
from flserving.lab.wire import WIRE_TYPES, wire_fields

if TYPE_CHECKING:
    import pandas as pd

TARGET_MS = 50
_TIMES = ((1e3, "s"), (1, "ms"), (1e-3, "µs"), (1e-6, "ns"))
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_BYTES_PER_LINE = 20


def nbytes_text(nbytes: float) -> str:
    """3136165 -> "3.14 MB"."""
    scale, unit = next((scale, unit) for scale, unit in _UNITS if nbytes >= scale or scale == 1)
    return f"{nbytes / scale:.3g} {unit}"


def ms_text(ms: float) -> str:
    """0.0002 -> "200 ns"."""
    scale, unit = next((scale, unit) for scale, unit in _TIMES if ms >= scale or scale == 1e-6)
    return f"{ms / scale:.3g} {unit}" if ms / scale < 1000 else f"{ms / scale:,.0f} {unit}"


def sizes_figure(sizes: Mapping[str, Mapping[int, Mapping[str, int]]]) -> Figure:
    """Bytes of a body (logarithmic) for each form: ``sizes[panel][rows][form]``, one panel beside the other."""
    fig, axes = figure(cols=len(sizes), height_in=3.6, sharey=True)
    with styled():
        for ax, (title, by_rows) in zip(axes, sizes.items(), strict=True):
            forms = list(next(iter(by_rows.values())))
            width = 0.8 / len(forms)
            for number, form in enumerate(forms):
                places = np.arange(len(by_rows)) + (number - (len(forms) - 1) / 2) * width
                heights = [nbytes[form] for nbytes in by_rows.values()]
                ax.bar(places, heights, width * 0.92, color=COLOURS[number], label=form)
            ax.set_xticks(range(len(by_rows)), [f"{rows:,}" for rows in by_rows])
            ax.set(title=title, xlabel="rows in the request", yscale="log")
            ax.grid(axis="x", visible=False)
            _byte_axis(ax, "y")
        axes[0].set_ylabel("size of the body")
        handles, names = axes[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside upper center", ncols=len(names))
    return fig


def transfer_figure(table: "pd.DataFrame") -> Figure:
    """``wire.transfer``: bytes on the left, milliseconds on the line on the right, both logarithmic."""
    fig, (left, right) = figure(cols=2, height_in=2.8, sharey=True)
    with styled():
        colours = COLOURS[: len(table)]
        for ax, column in ((left, "bytes"), (right, "ms")):
            ax.barh(table.index, table[column], color=colours, height=0.62)
            ax.set_xscale("log")
            ax.grid(axis="y", visible=False)
            for place, value in enumerate(table[column]):
                text = nbytes_text(value) if column == "bytes" else ms_text(value)
                ax.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=9.5)
        left.set(xlim=(10, 1e9), xlabel="size of the body", title="What is sent")
        _byte_axis(left, "x", subs=2)
        right.set(
            xlim=(1e-5, 1e7), xlabel=f"time on the line (dashed: {TARGET_MS} ms)", title="How long the line is busy"
        )
        right.xaxis.set_major_locator(LogLocator(base=1000, numticks=9))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: ms_text(value)))
        right.axvline(TARGET_MS, color="#555555", ls="--", lw=1)
        left.invert_yaxis()
    return fig


def message_figure(message: Any) -> Figure:
    """A short protobuf message byte by byte: dark the keys and lengths, light the content, a colour per field."""
    raw, fields = message.SerializeToString(), wire_fields(message)
    lines = -(-len(raw) // _BYTES_PER_LINE)
    fig, (ax,) = figure(height_in=0.35 + 1.12 * lines)
    with styled():
        for number, field in enumerate(fields):
            colour, nested = COLOURS[number % len(COLOURS)], any(f.path.startswith(f"{field.path}.") for f in fields)
            for at in range(field.start, field.content if nested else field.end):
                x, y = at % _BYTES_PER_LINE, -(at // _BYTES_PER_LINE)
                share = 0.75 if at < field.content else 0.22
                shade = tuple(1 - share * (1 - part) for part in to_rgb(colour))
                ax.add_patch(Rectangle((x, y), 0.94, 0.56, facecolor=shade, edgecolor="none"))
                dark = share > 0.5 and sum(to_rgb(colour)) < 1.9
                ink = "white" if dark else "#222222"
                ax.text(x + 0.47, y + 0.38, f"{raw[at]:02x}", ha="center", va="center", fontsize=9.5, color=ink,
                        family="monospace")  # fmt: skip
                if (
                    at >= field.content
                    and 32 < raw[at] < 127
                    and field.wire_type == "LEN"
                    and _is_text(message, field.path)
                ):
                    ax.text(x + 0.47, y + 0.14, chr(raw[at]), ha="center", va="center", fontsize=9, color="#555555")
            x, y = field.start % _BYTES_PER_LINE, -(field.start // _BYTES_PER_LINE)
            short = field.path.rpartition(".")[2]
            ax.text(x + 0.03, y + 0.6, f"{field.number} {short}", fontsize=8.5, va="bottom", color="#222222")
        ax.set(xlim=(-0.05, _BYTES_PER_LINE), ylim=(-lines + 0.98, 0.95))
        ax.set_axis_off()
        ax.set_title(f"{len(raw)} bytes: a ModelInferRequest")
    return fig


def message_table(message: Any) -> "pd.DataFrame":
    """The fields of a message, numbers below 16: the key as hex and in bits, what it says, length of the content."""
    import pandas as pd

    raw = message.SerializeToString()
    rows = []
    for field in wire_fields(message):
        key = raw[field.start]
        assert key >> 3 == field.number and WIRE_TYPES[key & 7] == field.wire_type
        rows.append(
            {
                "field": field.path,
                "key": f"{key:02x}",
                "in bits": f"{key >> 3:05b} {key & 7:03b}",
                "number": field.number,
                "wire type": f"{key & 7} {field.wire_type}",
                "length (bytes)": field.end - field.content,
            }
        )
    return pd.DataFrame(rows).set_index("field")


def storm_figure(storms: Mapping[str, Storm], stands_still_s: tuple[float, float]) -> Figure:
    """Tries per second at the server, and of the calls of each second the share that was answered in the end."""
    fig, (above, below) = figure(rows=2, height_in=4.8, sharex=True)
    with styled():
        for number, (name, storm) in enumerate(storms.items()):
            middle = np.arange(storm.seconds) + 0.5
            style: dict[str, Any] = {
                "color": COLOURS[number],
                "label": name,
                "lw": 2,
                "ls": ("-", "-", "--", ":")[number % 4],
            }
            above.plot(middle, storm.tries_per_s(), **style)
            below.plot(middle, 100 * storm.answered_share(), **style)
        for ax in (above, below):
            ax.axvspan(*stands_still_s, color="#dddddd", zorder=0)
        above.set(ylabel="tries (per s)", title="Grey: the server stands still")
        above.set_ylim(bottom=0)
        below.set(ylabel="calls answered (%)", xlabel="time (s)", ylim=(-4, 104))
        handles, names = above.get_legend_handles_labels()
        fig.legend(handles, names, loc="outside lower center", ncols=2)
    return fig


def digit_figure(pixels: Sequence[float], probabilities: Sequence[float], version: str) -> Figure:
    """An image of 8 x 8 pixels (0 to 16) and what a version says to it."""
    fig, (left, right) = figure(cols=2, height_in=2.9, width_ratios=(1, 2))
    with styled():
        left.imshow(np.reshape(pixels, (8, 8)), cmap="gray_r", vmin=0, vmax=16)
        left.set(xticks=[], yticks=[], title="sent")
        best = int(np.argmax(probabilities))
        right.barh(range(10), np.asarray(probabilities) * 100, color=COLOURS[0], height=0.7)
        right.set_yticks(range(10))
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.set(xlim=(0, 100), xlabel="probability (%)", ylabel="digit", title=f"version {version} says {best}")
    return fig


def outcome(call: Callable[[], object]) -> str:
    """ "answered", or the class of the error that the call raised."""
    try:
        call()
    except FlservingError as error:
        return type(error).__name__
    return "answered"


def at_once(call: Callable[[], object], callers: int = 8) -> "pd.DataFrame":
    """``call()`` by so many threads at the same time: the ``outcome`` of each, and after how many ms."""
    import pandas as pd

    def timed(_: int) -> tuple[str, float]:
        began_s = time.perf_counter()
        return outcome(call), (time.perf_counter() - began_s) * 1e3

    with ThreadPoolExecutor(callers) as threads:
        return pd.DataFrame(list(threads.map(timed, range(callers))), columns=["end", "ms"])


class Slow(nn.Linear):
    """A model of 4 features that takes ``seconds_per_row``, and counts the rows that it ``worked`` on."""

    def __init__(self, seconds_per_row: float) -> None:
        super().__init__(4, 3)
        self.seconds_per_row, self.worked = seconds_per_row, 0

    def __deepcopy__(self, _: object) -> Self:  # the server's copy counts here
        return self

    def forward(self, rows: Tensor) -> Tensor:
        time.sleep(self.seconds_per_row * len(rows))
        self.worked += len(rows)
        return super().forward(rows)


def shortened(body: bytes | str, longest: int = 60) -> str:
    """A JSON body, indented, with long lists of numbers cut: for reading."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list) and value and not isinstance(value[0], dict):
            text = json.dumps([round(item, 3) if isinstance(item, float) else item for item in value])
            return text if len(text) <= longest else f"{text[: longest - 5]} ...]"
        return [cut(item) for item in value] if isinstance(value, list) else value

    return json.dumps(cut(json.loads(body)), indent=2).replace('"[', "[").replace(']"', "]")


def _is_text(message: Any, path: str) -> bool:
    kind = message.DESCRIPTOR
    for name in path.split("."):
        field = kind.fields_by_name[name]
        kind = field.message_type
    return bool(field.type == field.TYPE_STRING)


def _byte_axis(ax: Axes, which: str, subs: int = 1) -> None:
    axis = ax.yaxis if which == "y" else ax.xaxis
    axis.set_major_locator(LogLocator(base=10.0**subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: nbytes_text(value)))
    ax.minorticks_off()
