"""Figures of notebook 04: costs of a batch, batches on a timeline, latency against load. Pure functions of numbers."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from flserving.lab.arrivals import Floats, Poisson, arrival_times_s
from flserving.lab.report import LoadReport
from flserving.lab.simulate import BatchTrace, simulate_batching
from flserving.lab.style import COLOURS, PLAIN, figure, styled
from flserving.lab.theory import mg1_wait_s
from flserving.serving.config import BatchingPolicy
from flserving.serving.engine import InferenceEngine

if TYPE_CHECKING:
    import pandas as pd

TARGET_MS = 50  # the latency that the course is held to


class BatchCost(NamedTuple):
    """Seconds that a batch of n rows takes, as a straight line: ``fixed_s + row_s * n``."""

    fixed_s: float
    row_s: float

    def __call__(self, rows: int) -> float:
        return self.fixed_s + self.row_s * rows


def measure_batches(engine: InferenceEngine, sizes: Sequence[int], repeats: int = 60) -> "pd.Series[float]":
    """Median seconds of one execution by number of rows, the sizes taken in turns so that other load hits all alike."""
    import pandas as pd

    width = engine.preprocessor.num_features or 1
    rows = {n: np.random.default_rng(n).standard_normal((n, width), dtype=np.float32) for n in sizes}
    taken: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeats):
        for n in sizes:
            began = time.perf_counter()
            engine.execute([rows[n]])
            taken[n].append(time.perf_counter() - began)
    return pd.Series({n: float(np.median(times)) for n, times in taken.items()}, name="seconds")


def fit_cost(seconds: "pd.Series[float]") -> BatchCost:
    """The least-squares line through batch times, each weighted by 1 / time, so that small batches count too."""
    n, s = seconds.index.to_numpy(float), seconds.to_numpy()
    row_s, fixed_s = np.polyfit(n, s, 1, w=1 / s)
    return BatchCost(max(float(fixed_s), 0.0), max(float(row_s), 0.0))


def cost_figure(measured: Mapping[str, "pd.Series[float]"]) -> Figure:
    """Microseconds per batch and per row against the size of the batch, with the fitted line."""
    fig, (left, right) = figure(cols=2, height_in=3.4)
    with styled():
        for colour, (name, seconds) in zip(COLOURS, measured.items(), strict=False):
            cost, n = fit_cost(seconds), np.geomspace(1, max(seconds.index), 60)
            fitted_us = np.array([cost.fixed_s + cost.row_s * k for k in n]) * 1e6
            left.plot(seconds.index, seconds * 1e6, "o", color=colour, label=f"{name}, measured")
            left.plot(
                n, fitted_us, color=colour, linewidth=1, label=f"{cost.fixed_s * 1e6:.0f} + {cost.row_s * 1e6:.1f} n"
            )
            right.plot(seconds.index, seconds * 1e6 / seconds.index, "o-", color=colour, label=name)
        left.set(title="a whole batch", xlabel="rows in the batch", ylabel="time (µs)", xscale="log", yscale="log")
        right.set(
            title="one of its rows", xlabel="rows in the batch", ylabel="time per row (µs)", xscale="log", yscale="log"
        )
        for ax in (left, right):
            ax.set_xticks(list(next(iter(measured.values())).index))
            ax.xaxis.set_major_formatter(PLAIN)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(PLAIN)
            ax.minorticks_off()
        left.legend(fontsize=8)
    return fig


def simulated(
    rate_per_s: float,
    max_batch_size: int,
    max_wait_ms: float,
    policy: BatchingPolicy,
    *,
    service_s: Callable[[int], float],
    requests: int = 2000,
    workers: int = 1,
    seed: int = 4,
) -> BatchTrace:
    """Poisson arrivals through the batching policy, in virtual time."""
    arrivals = arrival_times_s(Poisson(rate_per_s), requests=requests, rng=np.random.default_rng(seed))
    return simulate_batching(
        arrivals, service_s, max_batch_size=max_batch_size, workers=workers, policy=policy, max_wait_s=max_wait_ms / 1e3
    )


def queue_row(report: LoadReport, served_s: Sequence[float]) -> dict[str, float]:
    """One open-loop run without batching beside its prediction: latencies in ms, means over all requests.

    Args:
        report: The run. ``served_s``: what the model took for each of its requests, in seconds.

    The formula is Pollaczek-Khinchine's with the mean and the variation of ``served_s``; the simulation has the same
    mean and no variation.
    """
    rate_per_s = len(report) / float(report.arrival_s[-1])
    s, cv = float(np.mean(served_s)), float(np.std(served_s) / np.mean(served_s))
    run = simulated(rate_per_s, 1, 0, "work_conserving", service_s=lambda _: s, requests=20_000)
    return {
        "utilisation": rate_per_s * s,
        "service (ms)": 1e3 * s,
        "its variation": cv,
        "formula (ms)": 1e3 * (s + mg1_wait_s(rate_per_s, s, cv)),
        "simulated (ms)": 1e3 * float(run.latency_s.mean()),
        "measured (ms)": float(report.latency_ms.mean()),
    }


def mean_latency_ms(rates_per_s: Floats, max_batch_size: int, service_s: Callable[[int], float]) -> Floats:
    """Mean latency in ms of a work-conserving server at each rate, by simulation of 3,000 requests."""
    runs = (
        simulated(rate, max_batch_size, 0, "work_conserving", service_s=service_s, requests=3000)
        for rate in rates_per_s
    )
    return np.array([run.latency_s.mean() * 1e3 for run in runs])


def timeline_figure(traces: Mapping[str, BatchTrace], window_ms: float) -> Figure:
    """Every request as a line from its arrival to its answer: grey while it waits, coloured while its batch runs."""
    fig, axes = figure(rows=len(traces), height_in=2.3 * len(traces), sharex=True)
    with styled():
        for ax, (name, trace) in zip(axes, traces.items(), strict=True):
            seen = int((trace.arrival_s * 1e3 <= window_ms).sum())
            _requests(ax, trace, seen)
            ax.set(title=name, ylabel="request", xlim=(0, window_ms), ylim=(seen + 0.5, -1.5))
        axes[-1].set_xlabel("time (ms)")
    return fig


def explorer_figure(trace: BatchTrace) -> Figure:
    """The first requests on their timeline, and the latency of all of them against the target."""
    fig, (left, right) = figure(cols=2, height_in=3.6)
    with styled():
        _requests(left, trace, 40)
        left.set(
            title=f"the first 40 requests, {trace.batch_size.mean():.1f} rows a batch",
            xlabel="time (ms)",
            ylabel="request",
            ylim=(41, -1.5),
        )
        latency_ms = np.sort(trace.latency_s) * 1e3
        right.plot(latency_ms, np.linspace(0, 100, len(latency_ms)))
        right.axvline(TARGET_MS, color=COLOURS[1], linestyle="--", label=f"target {TARGET_MS} ms")
        p50, p99 = np.percentile(latency_ms, [50, 99])
        right.set(title=f"p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        right.set(xlabel="latency (ms)", ylabel="requests that are faster (%)")
        right.set(xscale="log", xlim=(1, 10_000), ylim=(0, 102))
        right.xaxis.set_major_formatter(PLAIN)
        right.legend(loc="lower right")
    return fig


def _requests(ax: Axes, trace: BatchTrace, count: int) -> None:
    """The first requests, one a row: its wait, its batch (neighbours in two colours), a mark where it arrived."""
    batch, arrival_ms = trace.batch[:count], trace.arrival_s[:count] * 1e3
    start_ms, end_ms = (1e3 * times[batch] for times in (trace.batch_start_s, trace.batch_end_s))
    y = np.arange(len(batch))
    ax.hlines(y, arrival_ms, start_ms, color="#bbbbbb", linewidth=1.5)
    ax.hlines(y, start_ms, end_ms, color=[COLOURS[number % 2] for number in batch], linewidth=2.5)
    ax.plot(arrival_ms, y, "|", color="#555555", markersize=4)


def load_figure(curves: Mapping[str, tuple[Floats, Floats]]) -> Figure:
    """Latency in ms (logarithmic) against arrivals per second; ``curves``: name -> (rates, latencies)."""
    fig, (ax,) = figure(height_in=3.4)
    with styled():
        for name, (rate_per_s, latency_ms) in curves.items():
            dots = "o" if "measured" in name else "o-" if "simulat" in name else "-"
            ax.plot(rate_per_s, latency_ms, dots, label=name, markersize=5)
        ax.axhline(TARGET_MS, color="#555555", linestyle="--", linewidth=1, label=f"target {TARGET_MS} ms")
        ax.set(xlabel="arrivals (per s)", ylabel="latency (ms)", yscale="log")
        ax.yaxis.set_major_formatter(PLAIN)
        ax.legend()
    return fig
