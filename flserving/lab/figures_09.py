"""Figures of notebook 09: the tutorial's table beside what was measured, the roofline, widths, sparsity; and what the
exercise measures with. The figures are pure functions of numbers."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from flserving.errors import NotSupportedError
from flserving.extras import need
from flserving.lab.roofline import Machine, roofline_us, work
from flserving.lab.style import COLOURS, PLAIN, figure, styled
from flserving.registry import Registry
from flserving.serving.config import ServingConfig
from flserving.serving.engine import InferenceEngine
from flserving.serving.loader import RegistrySource, load_engine

if TYPE_CHECKING:
    import pandas as pd

BLUE, VERMILION, GREEN = COLOURS[:3]
INK, GREY = "#333333", "#cccccc"
TUTORIAL: Mapping[str, tuple[float, float, float]] = {  # times faster, from and to; accuracy in percentage points
    "onnx": (2, 2, 0),
    "quantised": (2, 4, -1),
    "pruned": (2, 3, -1),
    "distilled": (5, 10, -2),
}
Rows: TypeAlias = NDArray[np.float32]  # [N, D]
Classes: TypeAlias = NDArray[np.int64]  # [N]
Times: TypeAlias = NDArray[np.float64]  # microseconds [turns, calls]


class OnnxMissing(NotSupportedError):
    """Says in a notebook what to install, and nothing else: IPython shows these lines instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def need_onnx() -> None:
    """Stop a notebook with one message where a package of the extra onnx is missing. Raises OnnxMissing."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            need(package, "onnx")
        except NotSupportedError:
            raise OnnxMissing(
                f"This notebook needs the extra onnx: {package} is not installed.\n"
                'Run   %pip install "onnx>=1.18" "onnxruntime>=1.22" "onnxscript>=0.5"   in a cell of its own\n'
                '(or `python -m pip install -e ".[onnx]"` in the course\'s folder), then run this cell again.'
            ) from None


def claimed(technique: str) -> tuple[float, float, float]:
    """The tutorial's claim about ``quantised, static`` is that about ``quantised``."""
    return TUTORIAL[technique.split(",")[0]]


def roofline_figure(swept: "pd.DataFrame", machine: Machine, dispatch_us: float) -> Figure:
    """Time of the original by width, measured, over the three parts of the estimate; a panel per batch size."""
    original = swept[swept.technique == "original"]
    batches = sorted(original.batch.unique())
    fig, axes = figure(cols=len(batches), height_in=3.3, sharey=True)
    with styled():
        for ax, batch in zip(axes, batches, strict=True):
            part = original[original.batch == batch].sort_values("width")
            widths = np.unique(np.geomspace(part.width.min(), part.width.max(), 40).round().astype(int))
            done = [work(width, batch) for width in widths]
            ax.axhline(dispatch_us, color=GREY, linewidth=3, label="dispatch")
            ax.plot(widths, [1e6 * machine.read_s(n) for _, n in done], "--", color=GREEN, label="reading weights")
            ax.plot(widths, [1e6 * n / machine.flop_s for n, _ in done], ":", color=VERMILION, label="multiplying")
            estimate = [roofline_us(machine, int(width), batch, dispatch_us) for width in widths]
            ax.plot(widths, estimate, color=INK, linewidth=1.2, label="estimate")
            ax.plot(part.width, part.p50_us, "o", color=BLUE, ms=8, label="measured (median)")
            ax.set(xscale="log", yscale="log", xlabel="width of the hidden layers", title=_rows(batch))
            _plain(ax, part.width)
        axes[0].set(ylabel="time of a call (µs)", ylim=(1, 3 * original.p50_us.max()))
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9.5)
    return fig


def report_figure(measured: "pd.DataFrame", guess: Mapping[str, tuple[float, float]] | None = None) -> Figure:
    """A report, a row per version: times faster, size on the disk and in memory, change in accuracy.

    Args:
        measured: What ``lab.optimization.report`` gave; its index may be names.
        guess: Adds the tutorial's claims (bands) and a reader's guess (diamonds): technique of the tutorial's table ->
            (times faster, change in accuracy in percentage points).
    """
    place = np.arange(len(measured))
    fig, (left, middle, right) = figure(cols=3, height_in=2.0 + 0.42 * len(measured), sharey=True)
    with styled():
        for at, technique in zip(place, measured.optimisation, strict=True):
            if guess is None or not technique:
                continue
            low, high, points = claimed(technique)
            mine, change = guess[technique.split(",")[0]]
            known: dict[str, Any] = {"height": 0.62, "color": GREY, "label": "the tutorial"}
            left.barh(at, high - low or 0.2, left=low - (low == high) * 0.1, **known)
            right.barh(at, points or 0.2, left=-0.1 if points == 0 else 0, **known)
            left.plot(mine, at, "D", mfc="white", mec=INK, ms=8, label="your guess")
            right.plot(change, at, "D", mfc="white", mec=INK, ms=8)
        for batch, colour, shift in ((1, BLUE, -0.14), (32, GREEN, 0.14)):
            times = measured[f"b{batch}_times"]
            spread = [times - measured[f"b{batch}_low"], measured[f"b{batch}_high"] - times]
            left.errorbar(
                times, place + shift, xerr=np.maximum(spread, 0), fmt="o", color=colour, ms=6, label=_rows(batch)
            )
        for values, marker, title in (
            (measured.file_kb / 1e3, "s", "file"), (measured.compressed_kb / 1e3, "|", "compressed"),
            (measured.peak_mb, "^", "memory at its peak"),
        ):  # fmt: skip
            middle.plot(values, place, marker, color=INK, mfc="white", ms=8, mew=1.6, label=title)
        for column, marker, title in (("points", "o", "all held-out rows"), ("worst_points", "x", "worst client")):
            right.plot(measured[column], place, marker, color=VERMILION, ms=7, mew=2, label=title)
        left.axvline(1, color=INK, linestyle=":", linewidth=1.2)
        right.axvline(0, color=INK, linestyle=":", linewidth=1.2)
        left.set(xscale="log", xlabel="times faster", ylim=(len(measured) - 0.5, -0.5))
        middle.set(xscale="log", xlabel="size (MB)")
        right.set(xlabel="change in accuracy\n(percentage points)")
        _plain_x(left, (0.5, 1, 2, 5, 10))
        _plain_x(middle, (0.01, 0.1, 1, 10, 100))
        left.set_yticks(
            place, [it if isinstance(it, str) else f"{it} {row.optimisation}" for it, row in measured.iterrows()]
        )
        for ax in (left, middle, right):
            ax.grid(axis="y", visible=False)
        pairs = [
            pair for ax in (left, middle, right) for pair in zip(*ax.get_legend_handles_labels()[::-1], strict=True)
        ]
        unique = dict(pairs)
        fig.legend(unique.values(), unique, loc="outside lower center", ncols=3, fontsize=9.5)
    return fig


def speedup_figure(picked: "tuple[pd.DataFrame, int, int]") -> Figure:
    """Times faster than plain torch: by width at one batch size on the left, every technique at one width on the right.

    Args:
        picked: The table of ``lab.sweep.sweep``, a width and a batch size in it.
    """
    swept, width, batch = picked
    table = swept[(swept.technique != "original") & (swept.batch == batch)]
    names = list(dict.fromkeys(table.technique))
    colours = dict(zip(names, [BLUE, GREY, GREEN, INK, VERMILION, *COLOURS[3:]], strict=False))
    fig, (left, right) = figure(cols=2, height_in=3.9)
    with styled():
        for name, part in table.groupby("technique", sort=False):
            left.plot(part.width, part.times, "o-", color=colours[str(name)], ms=5)
        left.axhline(1, color=INK, linestyle=":", linewidth=1.2)
        left.axvline(width, color=INK, linestyle=":", linewidth=1)
        left.set(
            xscale="log", yscale="log", xlabel="width of the hidden layers", ylabel="times faster", title=_rows(batch)
        )
        everything = swept[swept.technique != "original"]
        limits = max(0.2, everything.low.min() * 0.8), max(12, everything.high.max() * 1.3)
        left.set_ylim(limits)
        _plain(left, table.width.drop_duplicates())
        left.set_yticks([tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if limits[0] < tick < limits[1]])
        left.minorticks_off()
        bars = table[table.width == width].set_index("technique").loc[names]
        for at, (key, row) in enumerate(bars.iterrows()):
            name = str(key)
            low, high, _ = claimed(name)
            right.plot([low, high], [at + 0.36] * 2, "|-", color=INK, ms=7, label="the tutorial")
            right.barh(at, row.times - limits[0], left=limits[0], color=colours[name], height=0.5)
            right.plot([row.low, row.high], [at, at], color=INK, linewidth=1)
            right.annotate(f"{row.times:.3g}x", (max(row.high, row.times), at), (4, 0), textcoords="offset points",
                           va="center", fontsize=9.5)  # fmt: skip
        right.axvline(1, color=INK, linestyle=":", linewidth=1.2)
        right.set(xscale="log", xlabel="times faster", title=f"{width:,} wide")
        right.set_yticks(range(len(names)), names)
        _plain_x(right, (0.5, 1, 2, 5, 10, 50) if limits[1] < 300 else (1, 10, 100))
        right.set_xlim(limits[0], limits[1] * 3)
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
    return fig


def sparsity_figure(picked: "tuple[pd.DataFrame, int]") -> Figure:
    """Size and accuracy by the share that is taken away.

    Args:
        picked: One row per ``percent`` with ``file_kb``, ``compressed_kb``, ``accuracy`` and ``worst_client`` (0: the
            original), and a percentage in it.
    """
    table, percent = picked
    fig, (left, right) = figure(cols=2, height_in=3.2)
    here = table[table.percent == percent].iloc[0]
    with styled():
        for ax, lines, per in (
            (left, {"file_kb": (BLUE, "file"), "compressed_kb": (GREEN, "compressed (zstd)")}, 1),
            (right, {"accuracy": (BLUE, "all rows"), "worst_client": (VERMILION, "worst client")}, 100),
        ):  # fmt: skip
            for column, (colour, title) in lines.items():
                ax.plot(table.percent, table[column] * per, "o-", color=colour, ms=5, label=title)
                ax.plot(percent, here[column] * per, "o", color=colour, ms=11, mfc="white", mew=2)
            ax.axvline(percent, color=INK, linestyle=":", linewidth=1)
            ax.set(xlabel="taken away (%)", xlim=(-4, 104))
            ax.legend(loc="lower left", fontsize=9.5)
        left.set(
            ylabel="size (kB)", ylim=(0, None), title=f"{here.file_kb:,.0f} kB, {here.compressed_kb:,.0f} compressed"
        )
        right.set(ylabel="accuracy (%)", ylim=(0, 102))
        right.set_title(f"{100 * here.accuracy:.1f} %, worst client {100 * here.worst_client:.1f} %")
    return fig


def _rows(batch: int) -> str:
    return "one row at a time" if batch == 1 else f"batches of {batch} rows"


def _plain(ax: Axes, ticks: "pd.Series[int]") -> None:
    _plain_x(ax, tuple(ticks))
    ax.yaxis.set_major_formatter(PLAIN)


def _plain_x(ax: Axes, ticks: tuple[float, ...]) -> None:
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(PLAIN)
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def instruments(registry: Registry, name: str, batch: int = 1, turns: int = 20, each: int = 20) -> tuple[
    Callable[[int, Rows], Classes], Callable[[Sequence[int]], dict[int, Times]]
]:  # fmt: skip
    """For the exercise: ``answers(version, rows)``, and ``measure(versions)``, which times calls in turns."""
    engines: dict[int, InferenceEngine] = {}
    rng = np.random.default_rng(0)

    def engine(version: int) -> InferenceEngine:
        if version not in engines:
            engines[version] = load_engine(RegistrySource(registry, name), str(version), ServingConfig())
        return engines[version]

    def answers(version: int, rows: Rows) -> Classes:
        return np.array(engine(version).predict(rows)["predictions"])

    def measure(versions: Sequence[int]) -> dict[int, Times]:
        rows = rng.standard_normal((batch, engine(versions[0]).preprocessor.num_features or 1), dtype=np.float32)
        us = {it: np.empty((turns, each)) for it in versions}
        for turn in range(-2, turns):  # two to warm up, written over
            for it in rng.permutation(list(us)).tolist():
                for call in range(each):
                    began = time.perf_counter()
                    engine(it).execute([rows])
                    us[it][max(turn, 0), call] = 1e6 * (time.perf_counter() - began)
        return us

    return answers, measure
