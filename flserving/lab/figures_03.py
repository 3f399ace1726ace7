"""Pictures of notebook 03 (caching): pure functions from numbers to figures; the numbers come from ``lab.caching``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from flserving.lab import style
from flserving.lab.arrivals import Floats, Ints
from flserving.lab.caching import HitRates, Stampede, Step

if TYPE_CHECKING:
    import pandas as pd

BLUE, VERMILION, GREEN = style.COLOURS[:3]
INK, GREY = "#333333", "#bbbbbb"


def latency_figure(hit_ms: Floats, cold_ms: Floats) -> Figure:
    """Two histograms of milliseconds on one logarithmic axis, with their medians."""
    with style.styled():
        fig, (ax,) = style.figure()
        edges = np.geomspace(min(hit_ms.min(), cold_ms.min()), np.percentile(cold_ms, 99.5), 70).tolist()
        for values, name, colour in ((hit_ms, "hit", BLUE), (cold_ms, "cold load", VERMILION)):
            median = float(np.median(values))
            ax.hist(values, edges, color=colour, alpha=0.75, label=f"{name}: median {median:.3g} ms")
            ax.axvline(median, color=colour, ls="--", lw=1.5)
        ax.set(xscale="log", xlabel="latency (ms, logarithmic)", ylabel="requests")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.legend()
        return fig


def strip_figure(steps: Sequence[Step], capacity: int) -> Figure:
    """A cache as a strip: one column per request, its places from coldest (bottom) to hottest (top)."""
    with style.styled():
        fig, (ax,) = style.figure(height_in=1.5 + 0.42 * (capacity + 1))
        names = list(dict.fromkeys(key for key, _, _ in steps))
        before: tuple[str, ...] = ()
        for x, (asked, hit, held) in enumerate(steps, start=1):
            column = [(-1, key, GREY) for key in before if key not in held]
            column += [(place, key, style.COLOURS[names.index(key) % 6]) for place, key in enumerate(held)]
            for y, key, colour in column:
                ax.bar(x, 0.84, width=0.84, bottom=y - 0.42, color=colour)
                ink = "white" if colour in (BLUE, VERMILION, GREEN) else "black"
                ax.text(x, y, key, ha="center", va="center", color=ink)
            ax.text(x, capacity, f"{asked}\n{'hit' if hit else 'miss'}", ha="center", va="center",
                    weight="normal" if hit else "bold", color=INK if hit else VERMILION)  # fmt: skip
            before = held
        places = ["coldest", *[""] * (capacity - 2), "hottest"] if capacity > 1 else ["the one place"]
        ax.set_yticks(range(-1, capacity + 1), ["evicted", *places, "asked for"])
        ax.set(xlim=(0.4, len(steps) + 0.6), ylim=(-1.5, capacity + 0.6), xticks=range(1, len(steps) + 1))
        ax.set_xlabel("request number")
        ax.axhline(-0.5, color=INK, lw=1)
        ax.grid(visible=False)
        return fig


def hit_rate_figure(rates: HitRates) -> Figure:
    """Left: hit rate over cache size. Right: who finds its version in memory, at the chosen size."""
    with style.styled():
        fig, (left, right) = style.figure(cols=2, height_in=3.8)
        closed, measured = rates.closed[rates.cache_size - 1], rates.measured[rates.sizes == rates.cache_size][0]
        size = rank = np.arange(1, len(rates.closed) + 1)
        left.plot(size, rates.closed * 100, color=INK, label="hit rate, closed form (Che)")
        left.plot(rates.sizes, rates.measured * 100, "o", color=BLUE, label="hit rate, real cache")
        left.plot([rates.cache_size], [measured * 100], "o", ms=13, mfc="none", mec=VERMILION, mew=2)
        left.set(xlabel="cache size (versions)", ylabel="hit rate (%)", ylim=(0, 104), xlim=(0, len(size) + 0.5))
        left.set_title(f"closed {closed:.1%}, measured {measured:.1%}")
        right.bar(rank, rates.popularity * 100, color=GREY, label="share of the requests")
        right.plot(rank, rates.closed_items * 100, color=INK)
        right.plot(rank, rates.measured_items * 100, "o", ms=4, color=BLUE)
        right.set(xlabel="version, most popular first", ylabel="per version (%)", ylim=(0, 104))
        right.set_title(f"cache size {rates.cache_size}, skew {rates.skew:.1f}")
        fig.legend(loc="outside lower center", ncols=3)
        return fig


def error_figure(rates: Sequence[HitRates], requests: int) -> Figure:
    """Measured minus closed form over cache size, one colour per skew; bars are two standard errors of the measurement.

    ``requests``: how many were measured at each size; the error takes them as independent.
    """
    with style.styled():
        fig, (ax,) = style.figure()
        for number, one in enumerate(rates):
            error = one.measured - one.closed[one.sizes - 1]
            noise = 2 * np.sqrt(one.measured * (1 - one.measured) / requests)
            x = one.sizes + (number - (len(rates) - 1) / 2) * 0.12  # side by side, not on top of each other
            ax.errorbar(x, error * 100, noise * 100, fmt="o", capsize=3, label=f"skew {one.skew:g}")
        ax.axhline(0, color=INK, lw=1)
        ax.set(xlabel="cache size (versions)", ylabel="measured - closed form\n(percentage points)")
        ax.legend(ncols=len(rates))
        return fig


def scan_figure(rates: Mapping[str, Floats], window: int, *, scan_at: int, closed: float, survives: float) -> Figure:
    """Hit rate over time, with a pass over cold keys before request ``scan_at``; ``survives``: Che's T, in requests."""
    with style.styled():
        fig, (ax,) = style.figure()
        for (name, rate), colour in zip(rates.items(), (VERMILION, BLUE), strict=True):
            ax.plot(np.arange(len(rate)) + window, rate * 100, color=colour, label=name)
        ax.axhline(closed * 100, color=INK, ls="--", lw=1, label="closed form (Che)")
        ax.axvspan(scan_at, scan_at + survives, color=GREY, alpha=0.35, lw=0, label="T requests after the job")
        ax.set(xlabel="request number", ylabel=f"hit rate, last {window} requests (%)", ylim=(0, 100))
        ax.legend(ncols=2, loc="upper left")
        return fig


def memory_figure(held_mb: "pd.DataFrame", budget_mb: float) -> Figure:
    """Megabytes in memory after each request (rows, by what was asked for), stacked by version (columns)."""
    with style.styled():
        fig, (ax,) = style.figure()
        below = held_mb.cumsum(axis="columns") - held_mb
        for name, values in held_mb.items():
            ax.bar(range(len(held_mb)), values, 0.7, below[name], label=str(name))
        ax.set_xticks(range(len(held_mb)), [str(asked) for asked in held_mb.index])
        ax.axhline(budget_mb, color=INK, ls="--", lw=1.5, label="budget")
        ax.set(xlabel="version asked for, one request after the other", ylabel="held in memory (MB)")
        ax.set_ylim(0, 1.3 * budget_mb)
        ax.grid(axis="x", visible=False)
        ax.legend(ncols=1 + len(held_mb.columns), loc="upper center")
        return fig


def cost_figure(median_us: "pd.DataFrame") -> Figure:
    """Median latency in microseconds, a panel per model (columns), a bar per kind of traffic (rows)."""
    with style.styled():
        fig, axes = style.figure(cols=len(median_us.columns), height_in=2.4, sharey=True)
        for ax, (model, values) in zip(axes, median_us.items(), strict=True):
            bars = ax.barh(list(median_us.index), values, color=[GREY, BLUE, VERMILION])
            ax.bar_label(bars, fmt="{:.0f}", padding=4)
            ax.set(title=model, xlabel="median latency (µs)", xlim=(0, 1.2 * values.max()))
            ax.grid(axis="y", visible=False)
        axes[0].invert_yaxis()  # shared by all panels
        return fig


def stale_figure(images: Floats, truth: Ints, naive: Ints, fresh: Ints) -> Figure:
    """Digits [N, 64] with what the naive cache and the server say after the promotion, [N] each."""
    with style.styled():
        fig, axes = style.figure(cols=len(images), height_in=2.3)
        for ax, image, true, old, new in zip(axes, images, truth, naive, fresh, strict=True):
            ax.imshow(image.reshape(8, 8), cmap="gray_r")
            ax.set_title(f"naive: {old}", color=INK if old == true else VERMILION, loc="center")
            ax.set_xlabel(f"server: {new}\n(truth: {true})")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        return fig


def stampede_figure(runs: Mapping[str, Stampede]) -> Figure:
    """One panel per cache, one line per caller: it loads itself, or waits for somebody else's load."""
    with style.styled():
        fig, axes = style.figure(cols=len(runs), height_in=3.4, sharex=True, sharey=True)
        for ax, (name, run) in zip(axes, runs.items(), strict=True):
            for kind, colour, rows in (("loads", VERMILION, run.loaded), ("waits", BLUE, ~run.loaded)):
                lines = np.flatnonzero(rows)
                ax.barh(lines, (run.end_ms - run.start_ms)[lines], 0.7, run.start_ms[lines], color=colour, label=kind)
            ax.set(title=f"{name}: {run.loaded.sum()} of {len(run.loaded)} load", xlabel="time (ms)")
        axes[0].invert_yaxis()  # shared by all panels
        axes[-1].legend(loc="lower right")
        axes[0].set_ylabel("caller, first answered on top")
        return fig
