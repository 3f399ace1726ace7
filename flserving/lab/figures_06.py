"""Figures of notebook 06: one request over the network, breakdowns side by side, Amdahl's law, load generators, and the
fitted model's waterfall. Pure functions of numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flserving.lab.arrivals import Floats
from flserving.lab.breakdown import PARTS, SPANS
from flserving.lab.figures_02 import waterfall
from flserving.lab.report import LoadReport
from flserving.lab.style import COLOURS, PLAIN, figure, styled
from flserving.lab.way_model import WayModel, amdahl

if TYPE_CHECKING:
    import pandas as pd

PART_COLOURS = {
    "client": "#bbbbbb",
    "wire": COLOURS[6],
    "parse": COLOURS[0],
    "queue": COLOURS[2],
    "preprocess": COLOURS[3],
    "infer": COLOURS[4],
    "postprocess": COLOURS[5],
    "serialise": COLOURS[1],
    "outside": COLOURS[6],
}
_SPAN_COLOURS = {span: PART_COLOURS[part] for part, of in PARTS.items() for span in of}
_LONG_US = 20_000  # from here on in milliseconds
_MOST_DOTS = 600  # of one generator: more make no other picture


def timeline_figure(spans: "pd.DataFrame") -> Figure:
    """One request as a waterfall of its spans, and the totals of all of them.

    Args:
        spans: One row per request, the columns ``SPANS`` in microseconds. Shown is the one of median total.
    """
    times = spans[list(SPANS)].to_numpy(float)  # [N, spans]
    total_us = times.sum(axis=1)
    typical = int(np.argsort(total_us, kind="stable")[len(total_us) // 2])
    entered = [place for place, span in enumerate(SPANS) if span != "cache" or times[:, place].any()]
    fig, (above, below) = figure(rows=2, height_in=5.0, height_ratios=(6.4, 1))
    with styled():
        names = [SPANS[place] for place in entered]
        _waterfall(above, names, times[typical, entered], [_SPAN_COLOURS[name] for name in names])
        if times[typical, SPANS.index("wire out")] > 0:
            top, bottom = names.index("parse") - 0.5, names.index("serialise") + 0.5
            above.axhspan(top, bottom, color="#0072B2", alpha=0.06, linewidth=0, zorder=0)
            above.text(1.008, (top + bottom) / 2, "at the server", transform=above.get_yaxis_transform(), rotation=270,
                       ha="left", va="center", fontsize=9.5, color="#555555")  # fmt: skip
        above.set_title(f"One request: {_micro(total_us[typical])} from the call to the answer")
        below.plot(total_us, np.zeros_like(total_us), "o", color=COLOURS[6], alpha=0.4, markeredgewidth=0)
        below.plot(total_us[typical], 0, "o", color=COLOURS[1], ms=9)
        below.set(yticks=[], xlim=(0, total_us.max() * 1.05),
                  xlabel=f"total of each of {len(total_us)} requests (µs); orange: the one above")  # fmt: skip
    return fig


def _waterfall(ax: Axes, names: Sequence[str], times_us: Floats, colours: Sequence[str]) -> None:
    unit, scale = ("ms", 1e3) if times_us.sum() >= _LONG_US else ("µs", 1.0)
    waterfall(ax, names, times_us, colours, _micro)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    ax.set_xlabel(f"time since the call ({unit})")


def stack_figure(bars: "Mapping[str, pd.Series[float]]", *, unit: str, shares: bool = False, title: str = "") -> Figure:
    """Breakdowns as stacked bars, one a row.

    Args:
        bars: Name of the bar -> its parts in ``unit``.
        shares: Stretch every bar to 100 %, so that the shares can be compared; the totals stay written beside them.
    """
    fig, (ax,) = figure(height_in=1.5 + 0.36 * len(bars))
    with styled():
        for place, times in enumerate(bars.values()):
            total, left = float(times.sum()), 0.0
            scale = 100 / total if shares else 1.0
            for part, took in times.items():
                ax.barh(place, took * scale, left=left, height=0.7, color=PART_COLOURS[str(part)],
                        label=str(part) if place == 0 else None)  # fmt: skip
                left += took * scale
            ax.annotate(f"{total:,.3g} {unit}" if total < 1000 else f"{total:,.0f} {unit}", (left, place), (5, 0),
                        textcoords="offset points", va="center", fontsize=9.5)  # fmt: skip
        ax.set_yticks(range(len(bars)), list(bars))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.13)
        ax.set(xlabel="share of the time (%)" if shares else f"time of a request ({unit})", title=title)
        if shares:
            ax.set_xticks(range(0, 101, 20))
        fig.legend(loc="outside lower center", ncols=9, fontsize=9, handlelength=1.0, columnspacing=1.2)
    return fig


def amdahl_figure(shares: Mapping[str, float], at: float = 4) -> Figure:
    """Amdahl's law: how much faster the whole gets if one share of it gets faster; a dot at ``at`` times."""
    fig, (ax,) = figure(height_in=3.2)
    faster = np.geomspace(1, 100, 200)
    with styled():
        for number, (name, share) in enumerate(shares.items()):
            colour = COLOURS[number]
            ax.plot(faster, amdahl(share, faster), color=colour, label=f"{name}: {share:.0%}")
            ax.plot(at, amdahl(share, at), "o", color=colour)
            ax.axhline(amdahl(share, np.inf), color=colour, linestyle=":", linewidth=1)
        ax.axvline(at, color="#555555", linewidth=1, linestyle="--")
        ax.set(
            xscale="log", xlabel="how many times faster inference gets", ylim=(0.8, None),
            ylabel="how many times faster\nthe request gets", title="Amdahl's law; dotted: infinitely fast",
        )  # fmt: skip
        ax.set_xticks([1, 2, at, 10, 30, 100])
        ax.xaxis.set_major_formatter(PLAIN)
        ax.minorticks_off()
        ax.legend(title="share of inference", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def generators_figure(runs: "Mapping[str, tuple[Floats, Floats]]") -> Figure:
    """What load generators saw of the same server: ``runs[name]`` = when (s) and latency (ms) of each request."""
    fig, axes = figure(cols=len(runs), height_in=3.4, sharey=True)
    with styled():
        for ax, colour, (name, (at_s, latency_ms)) in zip(axes, COLOURS, runs.items(), strict=False):
            shown = slice(None, None, max(1, len(at_s) // _MOST_DOTS))
            slow = latency_ms >= np.percentile(latency_ms, 99)
            ax.plot(at_s[shown], latency_ms[shown], ".", color=colour, alpha=0.35, ms=5)
            ax.plot(at_s[slow], latency_ms[slow], ".", color=colour, ms=6)  # never thinned out: they are the point
            p50, p99 = np.percentile(latency_ms, [50, 99])
            ax.axhline(p99, color="#222222", linestyle="--", linewidth=1)
            ax.set_title(f"{name}\np50 {p50:.2g} ms, p99 {p99:.3g} ms", fontsize=10.5)
            ax.set(xlabel="time in the run (s)", yscale="log")
            ax.yaxis.set_major_formatter(PLAIN)
        axes[0].set_ylabel("latency (ms, logarithmic)")
    return fig


def seen(report: LoadReport, *, omits: bool = False) -> tuple[Floats, Floats]:
    """When and how slow (ms) the answered requests were; ``omits``: from the sending on, not from the plan."""
    if omits:
        return report.start_s[report.ok], report.service_ms
    return report.arrival_s[report.ok], report.latency_ms


class Prediction(NamedTuple):
    """What the model says at one position of the sliders; ``curve``: the total in us at each of ``loads``."""

    times_us: Mapping[str, float]
    loads: Floats
    curve_us: Floats
    load: float
    per_s: float


def predicted(model: WayModel, way: str, rows: int, features: int, batch: int, load_percent: int) -> Prediction:
    """The way of a request by the fitted model, for the sliders."""
    load, loads = load_percent / 100, np.linspace(0, 0.96, 97)
    totals = [sum(model(way, rows, features, batch, at).values()) for at in loads]
    per_s = load * batch / model.busy_us(way, rows, features, batch) * 1e6
    return Prediction(model(way, rows, features, batch, load), loads, np.array(totals), load, per_s)


def prediction_figure(numbers: Prediction) -> Figure:
    """The parts as a waterfall, and where on the curve of load this is."""
    total_us = sum(numbers.times_us.values())
    fig, (left, right) = figure(cols=2, height_in=3.7, width_ratios=(2.1, 1))
    with styled():
        _waterfall(left, list(numbers.times_us), np.array(list(numbers.times_us.values())),
                   [PART_COLOURS[part] for part in numbers.times_us])  # fmt: skip
        left.set_title(f"{_micro(total_us)} on average, at {numbers.per_s:,.0f} requests per s")
        right.plot(100 * numbers.loads, numbers.curve_us / 1e3, color=COLOURS[6])
        right.plot(100 * numbers.load, total_us / 1e3, "o", color=COLOURS[1], ms=9)
        right.set(yscale="log", xlabel="load (%)", ylabel="mean latency (ms)", title="at other loads",
                  ylim=(0.03, 3000), xlim=(0, 100))  # fmt: skip
        right.yaxis.set_major_formatter(PLAIN)
        right.minorticks_off()
    return fig


def _micro(us: float) -> str:
    return f"{us / 1e3:,.0f} ms" if us >= _LONG_US else f"{us:,.0f} µs" if us >= 9.5 else f"{us:.1f} µs"
