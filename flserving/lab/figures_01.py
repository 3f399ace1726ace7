"""Figures of notebook 01: a federated round, who holds what, accuracy by round and by client, who answered when."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from flserving.federated.data import Features
from flserving.lab.arrivals import Ints
from flserving.lab.figures_00 import arrow
from flserving.lab.rollout import Answered
from flserving.lab.style import COLOURS, figure, styled

if TYPE_CHECKING:
    import pandas as pd

_BLUE, _ORANGE, _GREY = COLOURS[0], COLOURS[1], "#bbbbbb"
_METRICS = {"mean_client": _BLUE, "global": COLOURS[6], "worst_client": _ORANGE}


def round_figure() -> Figure:
    """One federated round: the server sends weights, clients train where their data are, the server averages."""
    fig, (ax,) = figure(height_in=3.5)
    ax.set(xlim=(0, 100), ylim=(0, 44))
    ax.axis("off")
    with styled():
        _box(ax, 31, 31, 38, 12, _BLUE, "Server", "averages the weights it gets;\nnever sees a sample")
        for number, (x, held) in enumerate(((4, "3, 8, 9"), (37, "0, 4"), (70, "1, 2, 6, 7"))):
            _box(ax, x, 1, 26, 13, _ORANGE, f"Client {number + 1}", f"trains on its own digits:\nhere {held}")
            top, side = x + 13, 50 + (x - 37) * 0.4
            arrow(ax, (side - 1.6, 31), (top - 1.6, 14), _BLUE)
            arrow(ax, (top + 1.6, 14), (side + 1.6, 31), _ORANGE)
        ax.text(21, 25, "1  the global weights", color=_BLUE, ha="right", fontsize=10)
        ax.text(79, 25, "3  each client's weights", color=_ORANGE, fontsize=10)
        ax.text(1.5, 17.3, "2  local training", color=_ORANGE, fontsize=10)
        ax.text(71.5, 37, "4  the mean, weighted by\n    samples: a new version", color=_BLUE, va="center", fontsize=10)
    return fig


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, name: str, text: str) -> None:
    shape = "round,pad=0,rounding_size=1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc="white", ec=colour, lw=1.6))
    ax.text(x + width / 2, y + height - 1.3, name, ha="center", va="top", weight="bold", color=colour)
    ax.text(x + width / 2, y + (height - 3.5) / 2, text, ha="center", va="center", fontsize=9.5)


def digits_figure(images: Features, labels: Ints) -> Figure:
    """One image of each class in a row. ``images``: grey levels 0 to 16, [N, 64]; ``labels``: [N], each class once."""
    fig, axes = figure(cols=10, height_in=1.15)
    with styled():
        for digit, ax in enumerate(axes):
            ax.imshow(images[np.flatnonzero(labels == digit)[0]].reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
            ax.set(xticks=[], yticks=[])
            ax.set_title(str(digit), loc="center")
            ax.grid(visible=False)
    return fig


def partitions_figure(counts: Mapping[float, Ints]) -> Figure:
    """Who holds what at several alphas, side by side: ``counts[alpha]`` as ``class_counts`` gives it."""
    fig, axes = figure(cols=len(counts), height_in=3.3, sharey=True)
    with styled():
        for ax, (alpha, held) in zip(axes, counts.items(), strict=True):
            _bubbles(ax, held, 260)
            ax.set_title(f"alpha = {alpha:g}")
        axes[0].set_ylabel("class (digit)")
    return fig


def partition_figure(shown: tuple[float, Ints]) -> Figure:
    """One partition, ``(alpha, counts)``: samples of each client above, samples of each class below."""
    (alpha, held), (fig, (top, ax)) = shown, figure(rows=2, height_in=5.2, sharex=True)
    with styled():
        top.bar(range(len(held)), held.sum(axis=1), color=_BLUE)
        top.set(ylabel="samples (number)")
        classes = (held > 0).sum(axis=1)
        samples, known = (_span(numbers) for numbers in (held.sum(axis=1), classes))
        top.set_title(f"alpha = {alpha:g}: a client holds {samples} samples of {known} classes")
        _bubbles(ax, held, 340)
        ax.set_ylabel("class (digit)")
    return fig


def _span(numbers: Ints) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _bubbles(ax: Axes, held: Ints, largest: float) -> None:
    client, digit = np.nonzero(held)
    area = np.maximum(largest * held[client, digit] / 180, 2)  # a class has 180 samples; a single one stays visible
    ax.scatter(client, digit, s=area, color=_BLUE, lw=0)
    ax.set(xlim=(-0.8, len(held) - 0.2), ylim=(-0.9, 9.9), yticks=range(10), xlabel="client (number)")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def rounds_figure(frame: "pd.DataFrame") -> Figure:
    """Accuracy by round from ``Run.to_frame``: all samples, mean client, worst client; rejected updates marked."""
    fig, (ax,) = figure(height_in=3.4)
    with styled():
        for name, colour in _METRICS.items():
            ax.plot(frame.index, frame[f"{name}_accuracy"] * 100, "o--" if name == "global" else "o-", color=colour)
        for number in frame.index[frame["rejected"] > 0]:
            ax.axvline(number, color=_GREY, ls="--", zorder=0, lw=1.5)
            ax.text(number + 0.08, 3, f"{frame['rejected'][number]} rejected", fontsize=9.5, color="#555555")
        ax.set(xlabel="round = version (number)", ylabel="accuracy, held out (%)", ylim=(0, 102), xticks=frame.index)
        ax.legend(["mean client", "global (all samples)", "worst client"], loc="lower right")
    return fig


def clients_figure(shown: Mapping[str, "pd.Series[float]"]) -> Figure:
    """Accuracy of each client: ``{title: accuracy by client id}``. Of two, the first is a grey mark, the last bars."""
    names, last = list(shown), list(shown.values())[-1]
    fig, (ax,) = figure(height_in=3.4)
    with styled():
        x, percent = np.arange(len(last)), last.to_numpy() * 100
        ax.bar(x, percent, color=[_ORANGE if i == percent.argmin() else "#8db8d8" for i in x], label=names[-1])
        for name in names[:-1]:
            ax.plot(x, shown[name][last.index] * 100, "_", ms=14, mew=2.5, color="#333333", label=name)
        ax.axhline(percent.mean(), color=_BLUE, ls="--", lw=1.5, label=f"mean of {names[-1]}")
        ax.set(xlabel="client (number)", ylabel="accuracy, held out (%)", ylim=(0, 104), xticks=x)
        ax.set_title(f"{names[-1]}: mean {percent.mean():.1f} %, worst {percent.min():.1f} % "
                     f"(client {percent.argmin()})")  # fmt: skip
        ax.grid(axis="x", visible=False)
        if len(names) > 1:
            ax.set(ylim=(0, 122), yticks=range(0, 101, 20))  # room for the legend
            ax.legend(loc="upper center", ncols=3)
    return fig


def answers_figure(answered: Sequence[Answered], moves: Mapping[str, float]) -> Figure:
    """Which version answered each request, over ms; ``moves``: what was done, and when it returned (s)."""
    fig, (ax,) = figure(height_in=2.8)
    with styled():
        at_ms, version = [a.at_s * 1e3 for a in answered], [a.version for a in answered]
        ax.plot(at_ms, version, "o", ms=4, color=_BLUE, alpha=0.5)
        low, high = min(version), max(version)
        for name, at_s in moves.items():
            ax.axvline(at_s * 1e3, color=_ORANGE, ls="--", lw=1.5)
            ax.text(at_s * 1e3, high + 0.75, f" {name}", color=_ORANGE, fontsize=10, va="center")
        ax.set(xlabel="request sent (ms from the first)", ylabel="version that answered", ylim=(low - 0.6, high + 1.1))
        ax.set_yticks(range(low, high + 1))
    return fig
