"""Figures of notebook 10: which check stops which attack, who is in which arm, what peeking does, how long a test
takes, a rollout under load, a bandit. Pure functions of numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from flserving.federated.gate import CHECKS
from flserving.lab.style import COLOURS, PLAIN, figure, styled
from flserving.lab.trials import FIXED, MOST, TYPICAL, Learned, Looks, Plan

if TYPE_CHECKING:
    import pandas as pd

BLUE, VERMILION, GREEN = COLOURS[:3]
INK, GREY = "#333333", "#bbbbbb"
LINES = {FIXED: (INK, "--"), MOST: (BLUE, "-"), TYPICAL: (GREEN, "-")}
_BOX = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}


def arms_figure(arms: Mapping[str, Sequence[bool]]) -> Figure:
    """Who gets the new version, a line for each state of the split and a tick for each client.

    Args:
        arms: Title of the line -> whether each client is in the new arm; the same clients in every line.
    """
    fig, (ax,) = figure(height_in=0.9 + 0.42 * len(arms))
    with styled():
        states = [np.asarray(each, bool) for each in arms.values()]
        for place, (new, before) in enumerate(zip(states, [states[0], *states], strict=False)):
            for who, colour, label in (
                (new & before, BLUE, "gets the new version"), (new & ~before, GREEN, "came to it just now"),
                (before & ~new, VERMILION, "was sent back to the old one"),
            ):  # fmt: skip
                ticks = np.flatnonzero(who)
                ax.plot(
                    ticks, [place] * len(ticks), "|", color=colour, ms=16, mew=1.6, label=label if place == 0 else ""
                )
        ax.set_yticks(range(len(arms)), list(arms))
        ax.set(xlabel="client (number)", xlim=(-2, len(states[0]) + 1), ylim=(len(arms) - 0.4, -0.6))
        ax.grid(axis="y", visible=False)
        fig.legend(loc="outside lower center", ncols=3, fontsize=9.5)
    return fig


def attack_figure(table: "pd.DataFrame") -> Figure:
    """Attack x check, in percent of the rounds. Blue: refused there; vermilion: nothing stopped it, or it did harm.

    Args:
        table: Of ``attacks.attack_table``. The check of the form is left out: no attack changes it.
    """
    checks = [name for name in CHECKS if name != "form"]
    names = ["left out of the mean", *checks, "STOPPED", "points lost if not", "dot read as 0"]
    shares = table[["left out", *checks, "stopped", "missed, worst", "trigger"]].to_numpy(float)
    fig, (ax,) = figure(height_in=1.5 + 0.27 * len(table))
    with styled():
        (high, wide), last = shares.shape, len(names) - 3  # the columns that are no checks
        for row, column in np.ndindex(high, wide):
            share, own = shares[row, column], column < last
            alarm = 1 - share if column == last and row else share  # the first row is the clean one
            colour, strength = (BLUE, share) if own else (VERMILION, np.nan_to_num(alarm))
            ax.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, facecolor=colour, linewidth=0,
                                   alpha=max(0.75 * min(strength, 1.0), 0.03)))  # fmt: skip
            if share > 0 or (not own and np.isfinite(share)):
                text = f"{100 * np.fmax(share, 0):.{int(column == last + 1)}f}"
                ax.text(column, row, text, ha="center", va="center", fontsize=9.5, color=INK)
        ax.set(xlim=(-0.6, wide - 0.4), ylim=(high - 0.5, -0.5))
        ax.set_yticks(range(high), list(table.index))
        ax.set_xticks(range(wide), names, rotation=38, ha="left", rotation_mode="anchor")
        ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False, labelsize=9.5)
        for place in (0.5, last - 0.5, last + 0.5):
            ax.axvline(place, color=INK, linewidth=0.8)
        ax.axhline(0.5, color=INK, linewidth=0.8)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    return fig


def peeking_figure(same: Looks, alpha: float = 0.05, shown: int = 4) -> Figure:
    """Tests of two equal versions. Left: p-values of a few of them. Right: share that found a "difference"."""
    fig, (left, right) = figure(cols=2, height_in=3.4)
    with styled():
        deceived = np.flatnonzero((same.p_values[:, 4:] < alpha).any(axis=1) & (same.p_values[:, -1] > alpha))
        others = np.flatnonzero((same.p_values > alpha).all(axis=1))
        for number in others[: shown - 2]:
            left.plot(same.rewards, same.p_values[number], color=GREY, linewidth=1.2)
        for number in deceived[:2]:
            left.plot(same.rewards, same.p_values[number], color=VERMILION, linewidth=1.2)
        left.axhline(alpha, color=INK, linestyle=":")
        title = f"four tests, and p = {alpha:g}"
        left.set(xlabel="rewards so far", ylabel="p-value at this look", ylim=(0, 1), title=title)
        right.plot(same.rewards, same.often, color=VERMILION, label="z-test, stop at p < 0.05")
        right.plot(same.rewards, same.once, color=INK, linestyle="--", label="z-test, this look only")
        right.plot(same.rewards, same.always, color=BLUE, label="sequential test")
        right.axhline(alpha, color=INK, linestyle=":")
        right.set(xlabel="rewards so far", ylabel="false alarms so far", ylim=(0, 1.55 * float(same.often[-1])),
                  title=f"{len(same.p_values):,} tests")  # fmt: skip
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.legend(loc="upper left", fontsize=9)
        for ax in (left, right):
            ax.xaxis.set_major_formatter(PLAIN)
    return fig


def plan_figure(plan: Plan) -> Figure:
    """Left: days to decide over the effect that is looked for. Right: what is lost meanwhile, over the split."""
    effect, share = plan.picked
    fig, (left, right) = figure(cols=2, height_in=3.7)
    with styled():
        for name, (colour, line) in LINES.items():
            days = np.exp(np.interp(np.log(effect), np.log(plan.effects), np.log(plan.days[name])))
            left.plot(plan.effects, plan.days[name], color=colour, linestyle=line, label=f"{name}: {_days(days)}")
            left.plot(effect, days, "o", color=colour)
        left.axvline(effect, ymax=0.7, color=INK, linestyle=":", linewidth=1)
        left.set(
            xscale="log", yscale="log", xlabel="effect to find (percentage points)", ylabel="time to decide (days)"
        )
        left.set_xticks((0.5, 1, 2, 5, 10))
        left.legend(loc="upper right", fontsize=8.5, title=f"to find {effect:g} points", title_fontsize=8.5, **_BOX)
        low, high = left.get_ylim()
        left.set_ylim(low, high * 40)
        for (name, lost), colour in zip(plan.lost.items(), (BLUE, VERMILION), strict=True):
            now = np.exp(np.interp(np.log(share), np.log(plan.shares), np.log(lost)))
            right.plot(plan.shares, lost, color=colour, label=f"{name}: {now:,.0f}")
            right.plot(share, now, "o", color=colour)
        right.axvline(share, ymax=0.7, color=INK, linestyle=":", linewidth=1)
        right.set(xscale="log", yscale="log", xlabel="users who get the new version (%)", ylabel="right answers lost")
        right.set_xticks((1, 2, 5, 10, 20, 50))
        top = max(float(lost.max()) for lost in plan.lost.values())
        right.set_ylim(1, top * 30)
        right.legend(
            loc="upper right", fontsize=8.5, title="lost until half of the tests end", title_fontsize=8.5, **_BOX
        )
        for ax in (left, right):
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(PLAIN)
            ax.minorticks_off()
    return fig


def _days(days: float) -> str:
    units = {"days": 86_400, "h": 3600, "min": 60, "s": 1}
    unit = next((unit for unit, seconds in units.items() if days * 86_400 >= seconds), "s")
    count = days * 86_400 / units[unit]
    return f"{count:,.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"


def live_figure(answers: "pd.DataFrame", events: tuple[float, float], new: int, end: str, bins: int = 40) -> Figure:
    """A rollout under load, over time. Top: right answers, of all users and of the new version's. Bottom: the new
    version's share of the answers.

    Args:
        answers: Of ``trials.Users.keep_asking``; ``events``: when the experiment began and ended.
        new: The version on trial; ``end``: a word for the second event.
    """
    fig, (top, bottom) = figure(rows=2, height_in=4.0, sharex=True)
    with styled():
        at_s, of_new = answers["at_s"].to_numpy(), answers["version"].to_numpy() == new
        edges = np.linspace(0, float(at_s.max()), bins + 1)
        place = np.clip(np.digitize(at_s, edges) - 1, 0, bins - 1)
        middle, right = (edges[1:] + edges[:-1]) / 2, answers["right"].to_numpy(float)
        for mask, colour, label in ((np.ones(len(right), bool), INK, "all users"), (of_new, VERMILION, "new version")):
            few = 4 if colour == VERMILION else 1  # bins in one: it gives few answers
            count, good, sums = (
                np.bincount(place[mask] // few, weights, -(-bins // few))
                for weights in (None, right[mask], middle[place[mask]])
            )
            seen = count >= 5
            top.plot(sums[seen] / count[seen], 100 * good[seen] / count[seen], ".-", color=colour, label=label,
                     linewidth=1.2)  # fmt: skip
        counts = np.bincount(place, minlength=bins)
        some = counts > 0  # a busy machine may answer nobody for a while
        share = np.bincount(place[of_new], minlength=bins)[some] / counts[some]
        bottom.step(middle[some], 100 * share, where="mid", color=BLUE)
        for ax in (top, bottom):
            for when, name, side in zip(events, ("canary starts", end), ("left", "right"), strict=True):
                ax.axvline(when, color=INK, linestyle=":", linewidth=1.2)
                if ax is bottom:
                    away = (4 if side == "left" else -4, 0)
                    ax.annotate(name, (when, 80), away, textcoords="offset points", fontsize=9.5, va="center", ha=side)
            ax.set_ylim(-5, 105)
        top.set_ylabel("right (%)")
        top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9.5)
        bottom.set(xlabel="time (s)", ylabel="new version\nanswers (%)")
    return fig


def bandit_figure(seen: Learned) -> Figure:
    """Left: what the bandit believes of each arm. Right: right answers lost so far, beside an even split."""
    fig, (left, right) = figure(cols=2, height_in=3.5)
    with styled():
        from scipy.stats import beta

        rates = np.linspace(0.3, 1, 701)
        count = len(seen.chosen)
        for place, (arm, (n, total)) in enumerate(seen.known.items()):
            density = beta.pdf(rates, 1 + total, 1 + n - total)
            share = n / count if count else 0.0
            left.fill_between(rates * 100, density / max(density.max(), 1e-9), color=COLOURS[place], alpha=0.35,
                              label=f"{arm}: {share:.0%} of the requests")  # fmt: skip
            left.axvline(seen.rates[place] * 100, ymax=0.66, color=COLOURS[place], linestyle=":", linewidth=1.5)
        left.set(xlabel="right answers (%)", ylabel="belief (peak = 1)", xlim=(30, 100), ylim=(0, 1.55))
        left.set_yticks((0, 0.5, 1))
        left.set_title(f"after {count:,} requests")
        left.legend(loc="upper left", fontsize=9)
        at = np.arange(1, count + 1)
        even = at * (seen.rates[0] - float(np.mean(seen.rates)))
        for lost, colour, name in ((even, INK, "even split"), (seen.lost, BLUE, "bandit")):
            label = f"{name}: {lost[-1] if count else 0:,.0f}"
            right.plot(at, lost, color=colour, linestyle="--" if name == "even split" else "-", label=label)
        right.set(xlabel="requests", ylabel="right answers lost", ylim=(0, max(5.0, 1.05 * float(even[-1:].sum()))))
        right.set_xlim(0, max(count, 100))
        right.xaxis.set_major_formatter(PLAIN)
        right.legend(loc="upper left", fontsize=9)
    return fig
