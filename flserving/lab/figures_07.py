"""Figures of notebook 07: networks, three architectures on the same requests, thresholds, downloads, deltas, a cut, and
what a fleet needs. Pure functions of numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flserving.lab.network import Link
from flserving.lab.style import COLOURS, PLAIN, figure, styled
from flserving.lab.three_ways import PATHS, summary

if TYPE_CHECKING:
    import pandas as pd

TARGET_MS = 50
WAY_COLOURS = {"central": COLOURS[0], "edge": COLOURS[2], "hybrid": COLOURS[1]}
PATH_COLOURS = dict(zip(PATHS, (COLOURS[2], COLOURS[4], COLOURS[0], COLOURS[3], "#222222"), strict=True))
_TIMES = {0.001: "1 ms", 0.01: "10 ms", 0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h"}
_SIZES = {1e3: "1 kB", 1e4: "10 kB", 1e5: "100 kB", 1e6: "1 MB", 1e7: "10 MB", 1e8: "100 MB", 1e9: "1 GB"}


def links_figure(links: Mapping[str, Link], request_nbytes: int, response_nbytes: int) -> Figure:
    """Time of one exchange by network: the middle 98 % of many draws, their median, the mean by the closed form."""
    fig, (ax,) = figure(height_in=1.1 + 0.42 * len(links))
    sent = np.full(5000, request_nbytes)
    with styled():
        for place, link in enumerate(links.values()):
            low, middle, high = np.percentile(1e3 * link.exchanges_s(sent, response_nbytes), [1, 50, 99])
            mean_ms = 1e3 * link.mean_exchange_s(request_nbytes, response_nbytes)
            ax.plot([low, high], [place, place], color=COLOURS[5], linewidth=7, solid_capstyle="butt")
            ax.plot(middle, place, "o", color=COLOURS[0], label="" if place else "median")
            ax.plot(mean_ms, place, "|", color=COLOURS[1], ms=16, mew=2.5, label="" if place else "mean, by formula")
            ax.annotate(f"{middle:.3g} ms", (middle, place), (0, 9), textcoords="offset points", ha="center",
                        fontsize=9)  # fmt: skip
        ax.axvline(TARGET_MS, color="#555555", linestyle="--", linewidth=1, label=f"target {TARGET_MS} ms")
        ax.set_yticks(range(len(links)), list(links))
        ax.set(xscale="log", ylim=(len(links) - 0.5, -0.7), xlabel="request and answer over the network (ms)")
        ax.set_title("one exchange; the bar holds 98 % of them")
        ax.xaxis.set_major_formatter(PLAIN)
        ax.grid(axis="y", visible=False)
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def confidence_figure(pool: "pd.DataFrame") -> Figure:
    """How sure a device is: of the owner's digits and of a guest's, right and wrong ones stacked.

    Args:
        pool: Columns ``confidence``, ``local_right``, ``own``.
    """
    fig, axes = figure(cols=2, height_in=3.0)
    edges = np.linspace(0.2, 1, 17)
    with styled():
        for ax, own, title in zip(axes, (True, False), ("the owner writes", "a guest writes"), strict=True):
            part = pool[pool["own"] == own]
            right = part["local_right"].to_numpy(bool)
            sides = [part["confidence"][side].to_numpy() for side in (right, ~right)]
            ax.hist(sides, bins=edges.tolist(), stacked=True, color=[COLOURS[2], COLOURS[1]], label=["right", "wrong"])
            ax.set(title=f"{title}: {right.mean():.0%} right", xlabel="confidence of the device", ylabel="rows")
        axes[0].legend(loc="upper left")
    return fig


def ways_figure(runs: "Mapping[str, pd.DataFrame]") -> Figure:
    """The architectures on the same requests: latency, who answered, and how many answers are right.

    Args:
        runs: Way -> what :func:`three_ways.play` returned.
    """
    fig, (left, right) = figure(cols=2, height_in=3.9, width_ratios=(1.15, 1))
    with styled():
        for style, (way, played) in zip(("-", "-", "--"), runs.items(), strict=False):
            latency_ms = np.sort(played["latency_s"].to_numpy() * 1e3)
            share = np.linspace(0, 100, len(latency_ms))
            shown = np.isfinite(latency_ms)
            left.plot(latency_ms[shown], share[shown], style, color=WAY_COLOURS[way], label=way)
        left.axvline(TARGET_MS, color="#555555", linestyle=":", linewidth=1.5, label=f"target {TARGET_MS} ms")
        left.set(xscale="log", xlim=(0.03, 3000), ylim=(0, 103), xlabel="latency (ms)",
                 ylabel="requests answered by then (%)", title="how long it takes")  # fmt: skip
        left.xaxis.set_major_formatter(PLAIN)
        fig.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=9, handlelength=1.4,
                   columnspacing=1)  # fmt: skip
        _shares(right, {way: played["path"] for way, played in runs.items()})
        for place, played in enumerate(runs.values()):
            told = summary(played)
            text = f"{told['right (%)']:.1f} % right, p95 {_ms(told['p95 (ms)'])}"
            right.annotate(text, (0, place), (0, 19), textcoords="offset points", va="center", fontsize=9.5)
        right.set(xlabel="share of the requests (%)", title="who answers", ylim=(2.55, -0.75))
        fig.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=5, fontsize=9, handlelength=1,
                   columnspacing=1)  # fmt: skip
    return fig


def _shares(ax: Axes, paths: "Mapping[str, pd.Series[str]]") -> None:
    for place, taken in enumerate(paths.values()):
        left = 0.0
        for path in PATHS:
            share = 100 * float((taken == path).mean())
            ax.barh(place, share, left=left, height=0.45, color=PATH_COLOURS[path], label=path if not place else None)
            if share >= 9:
                ax.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", color="white", fontsize=9.5)
            left += share
    ax.set_yticks(range(len(paths)), list(paths))
    ax.set_xlim(0, 100)
    ax.grid(axis="y", visible=False)


def threshold_figure(table: "pd.DataFrame", runs: "Mapping[str, pd.DataFrame]", marked: Sequence[float]) -> Figure:
    """What the threshold trades: right answers and the p95 against the share that leaves the device.

    Args:
        table: See :func:`three_ways.at_every_threshold`. ``marked``: thresholds whose dots get their number.
        runs: Of the other two ways, as lines to compare with.
    """
    fig, axes = figure(cols=2, height_in=3.5)
    share = table["left the device (%)"]
    with styled():
        for ax, column in zip(axes, ("right (%)", "p95 (ms)"), strict=True):
            ax.plot(share, table[column], "o-", color=WAY_COLOURS["hybrid"], ms=4, label="hybrid")
            for threshold in marked:
                at = (share[threshold], table[column][threshold])
                ax.plot(*at, "o", color=WAY_COLOURS["hybrid"], ms=8)
                if at[1] > 1:  # on the axis they would hide each other
                    ax.annotate(f"{threshold:g}", at, (2, -15), textcoords="offset points", fontsize=9)
            for way in ("edge", "central"):
                value = summary(runs[way])[column]
                ax.axhline(value, color=WAY_COLOURS[way], linestyle="--", linewidth=1.5, label=way)
            ax.set(xlabel="requests that leave the device (%)", xlim=(-4, 104))
        axes[0].set(ylabel="right answers (%)", title="the number is the threshold")
        axes[1].set(ylabel="p95 of the latency (ms)", title="and what it costs")
        axes[0].legend(loc="lower right")
        axes[1].axhline(TARGET_MS, color="#555555", linestyle=":", linewidth=1.5)
        axes[1].annotate(f"target {TARGET_MS} ms", (103, TARGET_MS), (0, 3), textcoords="offset points", ha="right",
                         fontsize=9)  # fmt: skip
    return fig


def download_figure(links: Mapping[str, Link], models_nbytes: Mapping[str, float]) -> Figure:
    """Expected time of a download against its size by network, with the models on the axis."""
    fig, (ax,) = figure(height_in=3.7)
    nbytes = np.geomspace(min(models_nbytes.values()) / 2, max(models_nbytes.values()) * 2, 60)
    with styled():
        for colour, (name, link) in zip(COLOURS, links.items(), strict=False):
            took_s = [link.mean_exchange_s(200, size) for size in nbytes]
            ax.plot(nbytes, took_s, color=colour, label=name)
        for name, size in models_nbytes.items():
            ax.axvline(size, color="#999999", linewidth=1, linestyle=":")
            ax.annotate(name, (size, 1), (-3, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                        rotation=90, ha="right", va="top", fontsize=9, color="#444444")  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="size of the download", ylabel="expected time")
        ax.set_ylim(top=100 * ax.get_ylim()[1])  # room for the names
        ax.set_xticks([size for size in _SIZES if nbytes[0] < size < nbytes[-1]])
        ax.set_yticks([time for time in _TIMES if ax.get_ylim()[0] < time < ax.get_ylim()[1]])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _SIZES.get(value, "")))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _TIMES.get(round(value, 6), "")))
        ax.minorticks_off()
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def delta_figure(nbytes: "pd.DataFrame", right: "pd.DataFrame") -> Figure:
    """Left: bytes of each round by what travels. Right: right answers of each round, in percent, by form."""
    fig, axes = figure(cols=2, height_in=3.4)
    looks = dict(zip(nbytes.columns, zip(COLOURS, ("o-", "s-", "^--", "D-"), strict=False), strict=False))
    with styled():
        for ax, table in zip(axes, (nbytes, right), strict=True):
            for name, values in table.items():
                ax.plot(table.index, values, looks[str(name)][1], color=looks[str(name)][0], label=str(name), ms=5)
            ax.set(xlabel="round")
            ax.set_xticks(list(table.index))
        axes[0].set(title="what one device pulls", ylabel="kB", ylim=(0, None))
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e3:g}"))
        axes[1].set(title="what it costs", ylabel="right answers (%)")
        axes[1].yaxis.set_major_formatter(PLAIN)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def cut_figure(answers: "Mapping[str, pd.DataFrame]", cut_s: tuple[float, float]) -> Figure:
    """Every request of a run as a tick, by time, one line per architecture, coloured by path; the cut is shaded.

    Args:
        answers: Way -> columns ``at_s``, ``path``. ``cut_s``: from when to when the cloud was away.
    """
    fig, (ax,) = figure(height_in=2.9)
    with styled():
        for place, played in enumerate(answers.values()):
            for path in PATHS:
                at_s = played["at_s"][played["path"] == path]
                ax.vlines(at_s, place - 0.32, place + 0.32, color=PATH_COLOURS[path], linewidth=1.4,
                          label="" if place else path)  # fmt: skip
        ax.axvspan(*cut_s, color="#999999", alpha=0.25, linewidth=0, zorder=0)
        ax.annotate("the cloud is away", (sum(cut_s) / 2, 1), (0, 3), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", fontsize=9.5)  # fmt: skip
        shares = [float((played["path"] != "failed").mean()) for played in answers.values()]
        names = [f"{way}\n{share:.1%} answered" for way, share in zip(answers, shares, strict=True)]
        ax.set_yticks(range(len(answers)), names)
        ax.set(xlabel="time of the request (s)", ylim=(len(answers) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
        fig.legend(loc="outside lower center", ncols=5, fontsize=9.5, handlelength=1)
    return fig


def fleet_figure(table: "pd.DataFrame") -> Figure:
    """What the three architectures need: servers, traffic, cost. ``table``: what ``capacity.plan`` returned."""
    fig, axes = figure(cols=3, height_in=3.2, sharey=True)
    with styled():
        _bars(axes[0], table["servers"], "servers at the busiest hour", "{:,.0f}")
        _bars(axes[1], table[["up_gb", "down_gb", "updates_gb"]].sum(axis=1), "traffic (GB a day)", "{:,.0f}")
        _bars(axes[2], table["cost_per_million"], "cost per million requests (€)", "{:,.2f}")
        axes[0].invert_yaxis()
    return fig


def _bars(ax: Axes, values: "pd.Series[float]", label: str, shape: str) -> None:
    ax.barh(list(values.index), values, color=[WAY_COLOURS[str(way)] for way in values.index], height=0.6)
    for place, value in enumerate(values):
        ax.annotate(shape.format(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5)
    ax.set(xlabel=label, xlim=(0, max(float(values.max()) * 1.35, 1e-9)))
    ax.tick_params(axis="x", labelsize=9)
    ax.locator_params(axis="x", nbins=3)
    ax.xaxis.set_major_formatter(PLAIN)
    ax.grid(axis="y", visible=False)


def _ms(value: float) -> str:
    return "never" if np.isinf(value) else f"{value:,.0f} ms" if value >= 9.5 else f"{value:.1f} ms"
