"""Figures and tables of notebook 02: stages of a request, assumed times, six settings, percentiles, typed errors."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from flserving.errors import FlservingError
from flserving.lab.arrivals import Floats
from flserving.lab.style import COLOURS, figure, styled
from flserving.monitoring.metrics import STAGES

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

STAGE_COLOURS = dict(zip(STAGES, COLOURS, strict=True))
Stages = Mapping[str, Sequence[float] | Floats]
"""Stage -> its time in ms in each of N requests, the same requests in every stage."""


def timeline_figure(stages: Stages) -> Figure:
    """One request as a waterfall, and the latencies of all of them.

    Args:
        stages: At least one request. Shown is the one of median latency: its stages belong together, which medians
            of each stage would not.
    """
    times = np.array(list(stages.values()), np.float64)  # [stages, N], ms
    total_ms = times.sum(axis=0)
    typical = int(np.argsort(total_ms, kind="stable")[len(total_ms) // 2])
    fig, (above, below) = figure(rows=2, height_in=4.2, height_ratios=(4.6, 1))
    with styled():
        colours = [STAGE_COLOURS.get(name, COLOURS[6]) for name in stages]
        waterfall(above, list(stages), times[:, typical], colours, lambda took: f"{took:.3g} ms")
        above.set_xlabel("time since the request arrived (ms)")
        above.set_title(f"One request: {total_ms[typical]:.3g} ms from its arrival to its answer")
        below.plot(total_ms, np.zeros_like(total_ms), "o", color=COLOURS[6], alpha=0.4, markeredgewidth=0)
        below.plot(total_ms[typical], 0, "o", color=COLOURS[1], ms=9)
        _milliseconds(below, f"latency of all {len(total_ms)} requests (ms, logarithmic); orange: the one above")
        below.set(yticks=[], xlim=(total_ms.min() / 1.6, total_ms.max() * 1.6))
    return fig


def waterfall(
    ax: Axes, names: Sequence[str], times: Floats, colours: Sequence[str], told: Callable[[float], str]
) -> None:
    """Bars one after the other, each with its time as ``told`` and its share of the total."""
    ends, total = times.cumsum(), max(float(times.sum()), 1e-9)
    ax.barh(list(names), times, left=ends - times, color=list(colours), height=0.65)
    for place, (end, took, fill) in enumerate(zip(ends, times, colours, strict=True)):
        text = f"{told(took)}, {took / total:.0%}" if took else "not entered"
        x, dx, align = (end, 5, "left") if end <= 0.72 * total else (end - took, -5, "right")
        colour = "#222222"
        if align == "right" and x < 0.25 * total:  # a bar across nearly everything: inside
            dark = sum(to_rgb(fill)) < 1.5
            x, dx, align, colour = end - took / 2, 0, "center", "white" if dark else "#222222"
        ax.annotate(text, (x, place), (dx, 0), textcoords="offset points", ha=align, va="center", fontsize=9.5,
                    color=colour)  # fmt: skip
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, total * 1.01)


def assumption_figure(series: Mapping[str, Mapping[str, float]]) -> Figure:
    """Times of the same stages from several sources: ``series[source][stage]`` in ms, > 0; the first one is hollow."""
    fig, (ax,) = figure(height_in=2.6)
    with styled():
        for number, (source, times_ms) in enumerate(series.items()):
            face = "white" if number == 0 else COLOURS[number - 1]
            edge = COLOURS[6] if number == 0 else COLOURS[number - 1]
            heights = np.arange(len(times_ms)) + 0.16 * (number - (len(series) - 1) / 2)  # equal times stay apart
            ax.plot(list(times_ms.values()), heights, "o", ms=10, label=source, markerfacecolor=face,
                    markeredgecolor=edge, markeredgewidth=2)  # fmt: skip
            ax.set_yticks(range(len(times_ms)), list(times_ms))
        _milliseconds(ax, "time per request (ms, logarithmic)")
        ax.invert_yaxis()
        ax.margins(y=0.25)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        ax.set_title("Assumed and measured")
    return fig


class Panel(NamedTuple):
    """What one setting does: a table whose index is the setting's values (in ``of``) and whose columns are drawn."""

    table: "pd.DataFrame"
    of: str
    unit: str
    log: bool = False


def settings_figure(panels: Sequence[Panel]) -> Figure:
    """One small picture per setting, at most six: what was measured at each of its values."""
    fig, axes = figure(rows=2, cols=3, height_in=5.6)
    with styled():
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        for ax, panel in zip(axes, panels, strict=False):
            for column in panel.table.columns:
                ax.plot([str(value) for value in panel.table.index], panel.table[column], "o-", label=column)
            ax.set_title(str(panel.table.index.name), fontsize=11)
            ax.set(xlabel=panel.of, ylabel=panel.unit)
            if panel.log:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
            else:
                ax.set_ylim(bottom=0)
            if len(panel.table.columns) > 1:
                if not panel.log:  # room for the legend above the lines
                    ticks, top = ax.get_yticks(), panel.table.to_numpy().max()
                    ax.set_yticks([tick for tick in ticks if tick <= 1.1 * top])
                    ax.set_ylim(top=1.45 * top)
                ax.legend(loc="best" if panel.log else "upper left", fontsize=8, handlelength=1.2, edgecolor="none")
    return fig


def percentiles_figure(stages: Stages) -> Figure:
    """Latencies in order with p50 and p99, and for the mean, p50 and p99 what adding up the stages' own would give."""
    times = np.array(list(stages.values()), np.float64)
    total_ms = times.sum(axis=0)
    fig, (left, right) = figure(cols=2, height_in=3.6)
    with styled():
        left.plot(np.sort(total_ms), 100 * np.arange(1, len(total_ms) + 1) / len(total_ms), color=COLOURS[6])
        for q, y, side, dx, colour in ((50, 32, "left", 6, COLOURS[0]), (99, 12, "right", -6, COLOURS[1])):
            at_ms = float(np.percentile(total_ms, q))
            left.plot([at_ms, at_ms], [0, q], color=colour, ls="--", lw=1.5)
            left.plot(at_ms, q, "o", color=colour)
            left.annotate(f"p{q}\n{at_ms:.3g} ms", (at_ms, y), (dx, 0), textcoords="offset points", color=colour,
                          ha=side, va="center", fontsize=10, fontweight="bold")  # fmt: skip
        _milliseconds(left, "latency (ms, logarithmic)")
        left.set(ylabel="requests within this time (%)", ylim=(0, 103), title="p50 and p99")
        _sums(right, times, total_ms, list(stages))
    return fig


def _sums(ax: Axes, times: Floats, total_ms: Floats, names: list[str]) -> None:
    measures: dict[str, Callable[..., Any]] = {"mean": np.mean, "p50": np.median, "p99": partial(np.percentile, q=99)}
    for place, measure in enumerate(measures.values()):
        true_ms, bottom = float(measure(total_ms, axis=0)), 0.0
        for name, part_ms in zip(names, np.asarray(measure(times, axis=1)), strict=True):
            if not times[names.index(name)].any():
                continue  # a stage that no request entered
            share = float(part_ms) / true_ms
            ax.bar(place - 0.2, share, 0.36, bottom=bottom, color=STAGE_COLOURS.get(name, COLOURS[6]),
                   label=name if place == 0 else None)  # fmt: skip
            bottom += share
        ax.bar(place + 0.2, 1.0, 0.36, color="#bbbbbb", label="a request's total" if place == 0 else None)
        ax.text(place - 0.2, bottom + 0.02, f"{bottom:.0%}", ha="center", fontsize=9.5)
    ax.set_xticks(range(len(measures)), list(measures))
    ax.axhline(1, color="#555555", lw=1, ls=":")
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="sum of the stages' own,\nrelative to that of the total", title="Do they add up?")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _milliseconds(ax: Axes, label: str) -> None:
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    decades = np.log10(high / low)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if decades < 1.2 else (1, 3) if decades < 3 else (1,)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


def fresh_process_ms(sizes: Sequence[int], requests: int = 50) -> list[float]:
    """Latencies in ms of the first one-row requests to an ``mlp`` in a new Python process that has run nothing yet.

    Cost: one start of Python and one import of torch, 2 to 6 s.
    """
    code = (
        "import sys, json, numpy as np\n"
        "from flserving import InferenceEngine, models\n"
        "sizes, requests = json.loads(sys.argv[1])\n"
        "engine, row = InferenceEngine(models.build('mlp', {'sizes': sizes})), np.zeros(sizes[0], np.float32)\n"
        "print(json.dumps([engine.predict(row)['latency_ms'] for _ in range(requests)]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps([list(sizes), requests])]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [float(ms) for ms in json.loads(result.stdout)]


def provoke(cases: Mapping[str, Callable[[], object]]) -> "pd.DataFrame":
    """Call each of ``cases`` and tell what came of it: one row per case with error, HTTP status, gRPC code, message.

    Only a ``FlservingError`` is caught: anything else is a bug, and shows as one.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for case, call in cases.items():
        try:
            call()
        except FlservingError as error:
            found = (type(error).__name__, error.http_status, error.grpc_code, str(error))
        else:
            found = ("answered", 200, "OK", "")
        rows.append(dict(zip(("what was asked", "error", "HTTP", "gRPC", "message"), (case, *found), strict=True)))
    return pd.DataFrame(rows).set_index("what was asked")


def left(table: "pd.DataFrame") -> "Styler":
    """The table with its text to the left and in full, as long messages want it."""
    cells = table.style.format(escape="html").set_properties(None, **{"text-align": "left"})
    return cells.set_table_styles([{"selector": "th", "props": "text-align: left"}])
