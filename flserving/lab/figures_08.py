"""Figures of notebook 08: heads of one's own, whom they help, whose they are, and what they cost (measured here). The
figures are pure functions of numbers."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from flserving.lab.arrivals import Floats
from flserving.lab.style import COLOURS, PLAIN, figure, styled
from flserving.lab.who_gains import GLOBAL

if TYPE_CHECKING:
    import pandas as pd

BLUE, VERMILION, GREEN = COLOURS[:3]
INK, GREY = "#333333", "#cccccc"
CHANCE = 10  # percent: ten classes
BATCHES, HEADS = (1, 4, 16, 64, 256), (1, 100, 10_000, 100_000)
LOOP, GATHERED, SHARED = "loop over nn.Linear", "one gathered product", "one head for all"
WAYS = {LOOP: VERMILION, GATHERED: BLUE, SHARED: GREY}
_INPUTS, _CLASSES = 64, 10  # of the measured heads


def clients_figure(panels: Mapping[str, Mapping[str, Floats]]) -> Figure:
    """A dot per client on the line of its method, one panel beside the other.

    Args:
        panels: Title -> method -> accuracy of each client, in [0, 1]. The same methods in every panel.
    """
    names = list(next(iter(panels.values())))
    fig, axes = figure(cols=len(panels), height_in=1.5 + 0.42 * len(names), sharex=True, sharey=True)
    with styled():
        for ax, (title, methods) in zip(axes, panels.items(), strict=True):
            for place, right in enumerate(methods.values()):
                percent = np.sort(right) * 100
                height = place + 0.16 * (np.arange(len(percent)) % 3 - 1)  # equal ones stay visible
                colour = "#888888" if names[place] == GLOBAL else BLUE
                ax.plot(percent, height, "o", color=colour, alpha=0.4, markeredgewidth=0, label="a client")
                ax.plot(percent.mean(), place, "|", color=INK, ms=20, mew=2.5, label="mean")
                ax.plot(percent[0], height[0], "o", mfc="none", mec=VERMILION, ms=10, mew=2, label="worst client")
            ax.axvline(CHANCE, color=INK, linestyle=":", linewidth=1.2, label="chance")
            ax.set(title=title, xlabel="accuracy (%)", xlim=(-4, 104), ylim=(len(names) - 0.5, -0.5))
            ax.set_yticks(range(len(names)), names)
            ax.grid(axis="y", visible=False)
        handles, labels = axes[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        fig.legend(unique.values(), unique, loc="outside lower center", ncols=4)
    return fig


def who_gains_figure(table: "pd.DataFrame") -> Figure:
    """Left: mean and worst client of each method. Right: the clients that a method serves better than the global model.

    Args:
        table: Of ``who_gains.looked_up``.
    """
    fig, (left, right) = figure(cols=2, height_in=3.4, sharey=True)
    with styled():
        place = np.arange(len(table))
        mean, worst = table["mean"] * 100, table["worst"] * 100
        left.hlines(place, worst, mean, color=GREY, linewidth=4)
        left.plot(worst, place, "o", mfc="white", mec=VERMILION, ms=8, mew=2, label="worst client")
        left.plot(mean, place, "o", color=BLUE, ms=9, label="mean")
        for at, value in zip(place, mean, strict=True):
            left.annotate(f"{value:.0f}", (value, at), (8, 0), textcoords="offset points", va="center", fontsize=9.5)
        left.axvline(mean.iloc[0], color="#888888", linestyle="--", linewidth=1)
        left.set(xlabel="accuracy (%)", xlim=(-3, 108), ylim=(len(table) - 0.5, -0.5))
        left.set_yticks(place, [str(name) for name in table.index])
        gain, lose = table["gain"][1:] * 100, table["lose"][1:] * 100
        right.barh(place[1:], lose, color=VERMILION, height=0.6, label="worse")
        right.barh(place[1:], 100 - gain - lose, left=lose, color=GREY, height=0.6, label="the same")
        right.barh(place[1:], gain, left=100 - gain, color=GREEN, height=0.6, label="better")
        right.text(50, 0, "compared with the shared model:", ha="center", va="center", fontsize=10, color=INK)
        right.set(xlabel="clients that it serves (%)", xlim=(0, 100))
        for ax in (left, right):
            ax.grid(axis="y", visible=False)
        fig.legend(loc="outside lower center", ncols=5, fontsize=9.5, columnspacing=1.4)
    return fig


def gain_figure(panels: "Mapping[str, pd.DataFrame]") -> Figure:
    """Each client's gain from a head of its own over its training samples; a panel each.

    Args:
        panels: Title -> one row per client, ``samples`` and ``gain`` (own minus global accuracy).
    """
    fig, axes = figure(cols=len(panels), height_in=3.0, sharex=True, sharey=True)
    with styled():
        for ax, (title, table) in zip(axes, panels.items(), strict=True):
            points = table["gain"].to_numpy(float) * 100
            colours = [GREEN if gain > 0 else VERMILION if gain < 0 else "#888888" for gain in points]
            ax.axhline(0, color=INK, linewidth=1)
            ax.scatter(table["samples"], points, c=colours, s=45, alpha=0.75)
            better, worse = int((points > 0).sum()), int((points < 0).sum())
            ax.set(xscale="log", title=f"{title}\n{better} gain, {worse} lose", xlabel="its training samples")
            ax.set_xticks((10, 20, 50, 100, 200))
            ax.xaxis.set_major_formatter(PLAIN)
            ax.minorticks_off()
        axes[0].set_ylabel("gain (percentage points)")
    return fig


def matrix_figure(matrices: Mapping[str, Floats]) -> Figure:
    """Heat maps side by side: whose data (down) with whose head (across); the diagonal is a client's own head."""
    fig, axes = figure(cols=len(matrices), height_in=3.3, sharey=True)
    with styled():
        for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
            picture = ax.imshow(matrix * 100, vmin=0, vmax=100, cmap="viridis")
            ax.set(title=title, xlabel="whose head")
            ax.set_xticks(range(0, len(matrix), 5))
            ax.set_yticks(range(0, len(matrix), 5))
            ax.grid(visible=False)
        axes[0].set_ylabel("whose samples")
        fig.colorbar(picture, ax=axes, label="accuracy (%)", shrink=0.8)
    return fig


def loop_over_heads(features: Tensor, heads: Sequence[nn.Module]) -> Tensor:
    """A head per row, one after the other: features [N, D], heads [N] -> logits [N, C]."""
    return torch.cat([head(row[None]) for row, head in zip(features, heads, strict=True)])


def gathered(features: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """The same as one product: weights [K, D + 1, C] with the bias as last row, slots int64 [N] -> logits [N, C]."""
    own = weights.index_select(0, slots)
    return torch.baddbmm(own[:, -1:], features[:, None], own[:, :-1])[:, 0]


def measure_heads(batches: Sequence[int] = BATCHES, heads: Sequence[int] = HEADS, repeats: int = 40) -> "pd.DataFrame":
    """Best microseconds of a batch's heads, body left out, by number of heads and rows; the ways take turns.

    Every row's head is drawn at random from all of them, anew each time. The loop takes only a fifth of the turns.
    Index: (heads, rows); columns: ``WAYS``. Cost: about 2 s, and 2.6 kB a head while it runs.
    """
    import pandas as pd

    rng, found = np.random.default_rng(0), {}
    pool, shared = torch.zeros(max(heads), _INPUTS + 1, _CLASSES).normal_(), nn.Linear(_INPUTS, _CLASSES)
    with torch.inference_mode():
        for count, rows in itertools.product(heads, batches):
            features, weights = torch.randn(rows, _INPUTS), pool[:count]
            best = dict.fromkeys(WAYS, np.inf)
            for turn in range(repeats):
                slots = torch.from_numpy(rng.integers(0, count, rows))
                ways: dict[str, Callable[[], Tensor]] = {
                    GATHERED: partial(gathered, features, weights, slots),
                    SHARED: partial(shared, features),
                }
                if turn % 5 == 0:
                    modules = [_linear(weights[slot]) for slot in slots.tolist()]
                    ways[LOOP] = partial(loop_over_heads, features, modules)
                for name, way in ways.items():
                    began = time.perf_counter()
                    way()
                    best[name] = min(best[name], 1e6 * (time.perf_counter() - began))
            found[count, rows] = best
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["heads", "rows"])


def _linear(matrix: Tensor) -> nn.Linear:
    """The module with the weights of a record [D + 1, C]."""
    head = nn.Linear(_INPUTS, _CLASSES, device="meta")
    head.weight, head.bias = nn.Parameter(matrix[:-1].T.contiguous(), False), nn.Parameter(matrix[-1], False)
    return head


def cost_figure(picked: "tuple[pd.DataFrame, int, int]") -> Figure:
    """What a batch costs, head by head and at once.

    Args:
        picked: The table of ``measure_heads``, a number of heads and a number of rows in it.
    """
    table, heads, rows = picked
    fig, (left, right) = figure(cols=2, height_in=3.4)
    with styled():
        of_heads = table.loc[heads]
        for name, colour in WAYS.items():
            left.plot(of_heads.index, of_heads[name] / of_heads.index, "o-", color=colour, label=name)
        left.axvline(rows, color=INK, linestyle=":", linewidth=1)
        left.set(xscale="log", yscale="log", xlabel="rows in the batch", ylabel="time per row (µs)")
        left.set_ylim(table.div(table.index.get_level_values("rows"), axis=0).min().min() / 2, 200)
        left.set_xticks(list(of_heads.index))
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(PLAIN)
        left.minorticks_off()
        megabytes = heads * (_INPUTS + 1) * _CLASSES * 4 / 1e6
        left.set_title(f"{heads:,} head{'s' * (heads > 1)}, {round(megabytes, 1 if megabytes > 0.1 else 4):,g} MB")
        taken = of_heads.loc[rows, list(WAYS)]
        right.barh(list(WAYS), taken, color=list(WAYS.values()), height=0.6)
        for place, name in enumerate(WAYS):
            right.annotate(f"{taken[name]:,.0f} µs, {taken[name] / taken[SHARED]:.3g}x", (taken[name], place), (4, 0),
                           textcoords="offset points", va="center", fontsize=9.5)  # fmt: skip
        right.set(
            xscale="log",
            xlabel="time of the whole batch (µs)",
            title="a lone row" if rows == 1 else f"{rows} rows, clients at random",
        )
        right.set_xlim(1, table.to_numpy().max() * 12)
        right.xaxis.set_major_formatter(PLAIN)
        right.minorticks_off()
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9.5)
    return fig
