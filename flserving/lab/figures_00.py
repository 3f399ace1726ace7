"""Figures of notebook 00: the stack (also the README's picture), one answer, who abstains at a threshold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from flserving.lab.arrivals import Floats, Ints
from flserving.lab.style import COLOURS, figure, styled
from flserving.models.processing import ABSTAIN

_BLUE, _ORANGE, _GREEN, _GREY = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[6]
_WIDTH, _STEP, _HEIGHT = 17.0, 20.75, 11.5  # of a box, from box to box, of a box; in hundredths of the picture's width
_TOP, _LOW = 28.0, 6.5  # lower edges of the two rows of boxes


def stack_figure() -> Figure:
    """The stack: how a version gets into memory, and how a request gets its answer. Dashed: later in the course."""
    fig, (ax,) = figure(height_in=4.2)
    ax.set(xlim=(-1.2, 101.2), ylim=(-5.5, 44.5))
    ax.axis("off")
    versions = {
        "Federated rounds": "clients train,\nthe server averages",
        "Registry": "versions, lineage,\naliases, log of moves",
        "Loader": "verify, build,\ncheck, warm up",
        "Model cache": "LRU, bounded by\ncount and by bytes",
    }
    request = {
        "Preprocessor": "check the features,\nstandardise them",
        "Batch queue": "decide who\nruns together",
        "Inference engine": "one forward pass\nfor the whole batch",
        "Postprocessor": "softmax; say nothing\nif unsure",
    }
    with styled():
        _band(ax, _TOP - 1.3, 17.3, _BLUE, "How a version gets into memory")
        _band(ax, -5, _TOP + 2.7, _ORANGE, "How a request gets its answer")
        for column, (name, told) in enumerate(versions.items()):
            _box(ax, column * _STEP, _TOP, name, told, _BLUE)
            if column:
                arrow(ax, (column * _STEP - _STEP + _WIDTH, _TOP + 6), (column * _STEP, _TOP + 6), _BLUE)
        for column, (name, told) in enumerate(request.items(), start=1):
            _box(ax, column * _STEP, _LOW, name, told, _ORANGE)
            arrow(ax, (column * _STEP - _STEP + _WIDTH, _LOW + 5.7), (column * _STEP, _LOW + 5.7), _ORANGE)
        for place, name in enumerate(("notebook", "REST: web, mobile", "gRPC: devices")):  # three doors, one path
            y = _LOW + 8.7 - 5 * place
            _box(ax, 0, y, name, "", _ORANGE, width=15.5, height=4, later=place > 0)
            ax.plot([15.5, _WIDTH, _WIDTH], [y + 2, y + 2, _LOW + 5.7], color=_ORANGE, lw=1.8)
        engine = 3 * _STEP + _WIDTH / 2
        arrow(ax, (engine, _TOP), (engine, _LOW + _HEIGHT), _BLUE)
        ax.text(engine + 1, 22.8, "pinned while in use", fontsize=8.5, color=_BLUE, va="center")
        ax.plot([engine + _STEP] * 2 + [_WIDTH / 2], [_LOW, 0, 0], color=_ORANGE, lw=1.8, solid_joinstyle="round")
        arrow(ax, (_WIDTH / 2, 0), (_WIDTH / 2, _LOW - 1), _ORANGE)
        ax.text(52, -1, "answer: predictions, confidences, probabilities, latency_ms, model_version, model_type",
                fontsize=8.5, color=_ORANGE, ha="center", va="top")  # fmt: skip
        ax.text(4 * _STEP, _TOP + 6, "solid: works now\ndashed: later\nin the course", fontsize=8.5, color=_GREY,
                va="center")  # fmt: skip
    return fig


def answer_figure(image: Floats, answer: Mapping[str, Any], label: int) -> Figure:
    """A digit beside the probabilities that were served for it.

    Args:
        image: Grey levels 0 to 16, [64] or [8, 8].
        answer: What ``server.predict`` said about this one row.
        label: The digit that it really is.
    """
    fig, (left, right) = figure(cols=2, height_in=2.7, width_ratios=(1, 2.6))
    with styled():
        left.imshow(np.asarray(image).reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
        left.set(xticks=[], yticks=[], title=f"somebody wrote a {label}")
        left.grid(visible=False)
        probabilities, said = answer["probabilities"][0], answer["predictions"][0]
        chosen = _GREEN if said == label else _ORANGE
        colours = [chosen if k == said else "#b9cfe0" for k in range(len(probabilities))]
        bars = right.bar(range(len(probabilities)), probabilities, color=colours)
        right.bar_label(bars, [f"{p:.2f}" if p >= 0.005 else "" for p in probabilities], fontsize=9, padding=2)
        right.set(xticks=range(len(probabilities)), ylim=(0, 1.12), xlabel="class", ylabel="probability served")
        right.set_title(f"version {answer['model_version']} says {'nothing' if said == ABSTAIN else said}")
        right.grid(axis="x", visible=False)
    return fig


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What was served for N >= 40 digits at one threshold.

    ``images`` float32 [N, 64] in grey levels 0 to 16, ``labels`` int64 [N], ``predictions`` int64 [N] (``ABSTAIN``
    where the server says nothing), ``confidences`` float32 [N], ``classes`` int64 [N]: the most probable class, served
    or not.
    """

    threshold: float
    images: Floats
    labels: Ints
    predictions: Ints
    confidences: Floats
    classes: Ints


def abstention_figure(answers: Answers) -> Figure:
    """40 digits from the least to the most certain with what is served, and accuracy against the share answered."""
    fig, (left, right) = figure(cols=2, height_in=3.9, width_ratios=(1.2, 1))
    with styled():
        _mosaic(left, answers)
        _trade(right, answers)
    return fig


def _mosaic(ax: Axes, answers: Answers) -> None:
    order = np.argsort(answers.confidences, kind="stable")
    shown = order[np.rint((len(order) - 1) * np.linspace(0, 1, 40) ** 2).astype(int)]  # closer where it is uncertain
    paper = np.zeros((66, 80))  # one image is ten times faster to draw than forty
    for place, row in enumerate(shown):
        x, y = 10 * (place % 8) + 1, 13 * (place // 8) + 4
        said, silent = answers.predictions[row], answers.predictions[row] == ABSTAIN
        colour = _GREY if silent else _GREEN if said == answers.labels[row] else _ORANGE
        paper[y : y + 8, x : x + 8] = answers.images[row].reshape(8, 8) * (0.3 if silent else 1)
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 8, 8, fill=False, ec=colour, lw=1.5))
        ax.text(x + 3.5, y - 0.9, "?" if silent else str(said), fontsize=10, fontweight="bold", color=colour,
                ha="center", in_layout=False)  # fmt: skip
    ax.imshow(paper, cmap="gray_r", vmin=0, vmax=16)
    ax.axis("off")
    ax.set_title("From the least to the most certain", fontsize=11)


def _trade(ax: Axes, answers: Answers) -> None:
    order = np.argsort(-answers.confidences, kind="stable")
    count = np.arange(1, len(order) + 1)
    ax.plot(count / len(order), (answers.classes == answers.labels)[order].cumsum() / count, color=_BLUE)
    answered = answers.predictions != ABSTAIN
    told = f"threshold {answers.threshold:.2f}: {answered.mean():.0%} answered"
    if answered.any():
        accuracy = float((answers.predictions == answers.labels)[answered].mean())
        ax.plot(answered.mean(), accuracy, "o", ms=10, color=_ORANGE, clip_on=False, zorder=3)
        told += f"\n{accuracy:.1%} of the answers are right"
    ax.text(0.05, 0.06, told, transform=ax.transAxes, color=_ORANGE, fontweight="bold")
    ax.set(xlabel="share of digits answered", ylabel="accuracy of the answers", xlim=(0, 1.02), ylim=(0.48, 1.01))
    ax.set_title("Fewer answers, better answers", fontsize=11)


def _band(ax: Axes, y: float, height: float, colour: str, title: str) -> None:
    shape = "round,pad=0,rounding_size=1.5"
    ax.add_patch(FancyBboxPatch((-1, y), 102, height, boxstyle=shape, fc=colour, ec="none", alpha=0.07))
    ax.text(0.2, y + height - 1.1, title, fontsize=10, fontweight="bold", color=colour, va="top")


def _box(
    ax: Axes, x: float, y: float, name: str, told: str, colour: str, *, width: float = _WIDTH,
    height: float = _HEIGHT, later: bool = False,
) -> None:  # fmt: skip
    shape, edge = "round,pad=0,rounding_size=1", "--" if later else "-"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc="white", ec=colour, lw=1.5, ls=edge))
    middle = x + width / 2
    if not told:
        ax.text(middle, y + height / 2, name, fontsize=8, ha="center", va="center_baseline")
        return
    ax.text(middle, y + height - 1.5, name, fontsize=8.2, fontweight="bold", ha="center", va="top")
    ax.text(middle, y + (height - 3.2) / 2, told, fontsize=8, ha="center", va="center", color="#444444")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 1, "mutation_scale": 13}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)
