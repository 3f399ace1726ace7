"""Figures of notebook 11: counters, quantiles from buckets, the error budget, an incident. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from flserving.lab.arrivals import Floats
from flserving.lab.slo import FAST, SLO, SLOW, Incident, WindowPair, burn_rates, firing, histogram_quantile, increases
from flserving.lab.style import COLOURS, figure, styled
from flserving.monitoring.metrics import BOUNDS_S

TARGET_S = 0.05
BUCKETS_S: dict[str, tuple[float, ...]] = {
    "flserving": BOUNDS_S,
    "library default": tuple(Histogram.DEFAULT_BUCKETS[:-1]),  # without the infinite one
    "powers of ten": (0.001, 0.01, 0.1, 1, 10),
    "up to 50 ms": (0.005, 0.01, 0.025, 0.05),
    "milliseconds by mistake": (1, 5, 10, 50, 100, 500),
}

Series = tuple[str, frozenset[tuple[str, str]]]  # name and labels
Scrape = dict[Series, float]


def parsed(text: bytes) -> Scrape:
    """An exposition as the real client library reads it: (name, labels) -> value."""
    families = text_string_to_metric_families(text.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def total(scrape: Scrape, name: str, **labels: str) -> float:
    """The sum over all series of this name with these labels; 0 if there is none."""
    return sum(value for (n, given), value in scrape.items() if n == name and labels.items() <= given)


def buckets(scrape: Scrape, name: str, **labels: str) -> dict[float, float]:
    """A histogram's buckets: upper bound -> how many took at most that long."""
    bounds = {float(value) for n, given in scrape if n == name for key, value in given if key == "le"}
    found = {float(dict(given)["le"]): (n, given) for n, given in scrape if n == name}
    return {
        bound: total(scrape, name, **labels, le=dict(found[bound][1])["le"]) for bound in sorted(bounds)
    }  # fmt: skip


def valid_requests(scrapes: Sequence[Scrape]) -> tuple[Floats, Floats]:
    """How many requests counted for the promise, and how many of them failed, at each scrape, float64 [N] each."""
    name = "flserving_outcomes_total"
    ok, failed = (np.array([total(s, name, outcome=outcome) for s in scrapes]) for outcome in ("ok", "server_error"))
    return ok + failed, failed


def pages(times_s: Floats, asked: Floats, failed: Floats) -> dict[str, tuple[float, float]]:
    """When the two pages were on, by name: the first and the last scrape. One that never fired is left out."""
    found = {pair.name: times_s[firing(times_s, asked, failed, pair)] for pair in (FAST, SLOW)}
    return {name: (float(on_s[0]), float(on_s[-1])) for name, on_s in found.items() if on_s.size}


def rate_figure(times_s: Floats, values: Floats) -> Figure:
    """A counter at every scrape, and its rate with and without knowing that a fall is a restart."""
    fig, (left, right) = figure(cols=2, height_in=3.0)
    naive, rate = np.diff(values) / np.diff(times_s), increases(values) / np.diff(times_s)
    with styled():
        left.plot(times_s, values, "o-", markersize=4)
        left.set(title="what is scraped", xlabel="time (s)", ylabel="counter (requests)", ylim=(0, None))
        right.axhline(0, color="#999999", linewidth=1)
        right.plot(times_s[1:], naive, "x--", color=COLOURS[1], label="difference quotient")
        right.plot(times_s[1:], rate, "o-", color=COLOURS[0], markersize=4, label="a fall is a restart")
        right.set(title="what it says", xlabel="time (s)", ylabel="rate (requests per s)")
        right.legend(fontsize=8, loc="lower left")
    return fig


@dataclass(frozen=True)
class QuantileCase:
    """Lognormal latencies in buckets: the true quantile, and what the buckets make of it."""

    bounds_s: tuple[float, ...]
    median_ms: float
    spread: float
    percentile: float

    def share(self, seconds: Floats) -> Floats:
        """Share of requests that take at most so long, float64 [N]."""
        from scipy.stats import lognorm

        return np.asarray(lognorm.cdf(seconds, self.spread, scale=self.median_ms / 1e3), np.float64)

    @property
    def cumulative(self) -> dict[float, float]:
        shares = self.share(np.array(self.bounds_s))
        return {**dict(zip(self.bounds_s, shares.tolist(), strict=True)), math.inf: 1.0}

    @property
    def exact_s(self) -> float:
        from scipy.stats import lognorm

        return float(lognorm.ppf(self.percentile / 100, self.spread, scale=self.median_ms / 1e3))

    @property
    def estimate_s(self) -> float:
        return histogram_quantile(self.percentile / 100, self.cumulative)


def quantile_case(buckets: str, median_ms: float, spread: float, percentile: float) -> QuantileCase:
    """The case for one of ``BUCKETS_S``; ``spread`` is the standard deviation of the latency's logarithm."""
    return QuantileCase(BUCKETS_S[buckets], median_ms, spread, percentile)


def quantile_figure(case: QuantileCase) -> Figure:
    """The true distribution, the straight lines that buckets assume, and the same percentile read from both."""
    fig, (ax,) = figure(height_in=3.6)
    exact_ms, estimate_ms = case.exact_s * 1e3, case.estimate_s * 1e3
    right_ms = max(80.0, 1.15 * exact_ms, min(1.15 * estimate_ms, 4 * exact_ms))
    ms = np.linspace(0, right_ms, 400)
    corners = np.array([0.0, *case.bounds_s])
    with styled():
        ax.plot(ms, 100 * case.share(ms / 1e3), color=COLOURS[0], label="the requests themselves")
        shares = np.concatenate([[0.0], 100 * case.share(corners[1:])])
        ax.plot(
            corners * 1e3,
            shares,
            "o-",
            color=COLOURS[1],
            markersize=4,
            linewidth=1,
            label="straight lines between buckets",
        )
        ax.axhline(case.percentile, color="#999999", linewidth=1)
        ax.axvline(TARGET_S * 1e3, color="#555555", linestyle="--", linewidth=1, label="target 50 ms")
        ax.plot([exact_ms], [case.percentile], "D", color=COLOURS[0], markersize=8)
        ax.plot([estimate_ms], [case.percentile], "D", color=COLOURS[1], markersize=8)
        error = estimate_ms / exact_ms - 1
        ax.set_title(f"p{case.percentile:g}: exact {exact_ms:.1f} ms, from buckets {estimate_ms:.1f} ms ({error:+.0%})")
        ax.set(xlabel="latency (ms)", ylabel="requests that are faster (%)", xlim=(0, right_ms), ylim=(0, 103))
        ax.legend(loc="center right", fontsize=8)
    return fig


def incident(load_per_s: float, failure_percent: float, lasts_hours: float) -> Incident:
    """What the sliders say, as numbers of ``slo``."""
    return Incident(load_per_s, failure_percent / 100, lasts_hours * 3600)


def budget_figure(case: Incident) -> Figure:
    """Burn rate as the windows of both pages see it, and what is left of the budget; bars where a page is on."""
    fig, (left, right) = figure(cols=2, height_in=4.0)
    t_s = np.linspace(0, max(1.25 * case.lasts_s, case.lasts_s + 2700.0), 600)
    hours, kept = t_s / 3600, float(case.left(case.lasts_s))
    lost, allowed = case.failed * case.rate_per_s * case.lasts_s, case.slo.failures(case.rate_per_s)
    with styled():
        for place, (pair, colour) in enumerate(((FAST, COLOURS[1]), (SLOW, COLOURS[0]))):
            for window_s, dots in ((pair.long_s, "-"), (pair.short_s, ":")):
                left.plot(hours, case.seen(t_s, window_s), dots, color=colour, label=f"over {duration(window_s)}")
            left.axhline(pair.burn_rate, color=colour, linestyle="--", linewidth=0.8)
            _alert_bar(right, case, pair, colour, 0.24 - 0.08 * place)
        left.set_title(f"{case.failed:.1%} of the requests fail:\nburn rate {case.burn_rate:.3g}", fontsize=11)
        left.set(xlabel="since it began (h)", ylabel="burn rate")
        left.set(xlim=(0, hours[-1]), ylim=(0, max(20.0, 1.3 * case.burn_rate)))
        left.legend(fontsize=8, loc="upper center", ncols=2)
        right.plot(hours, 100 * case.left(t_s), color="#333333")
        right.axhline(0, color="#999999", linewidth=1)
        told = f"{kept:.1%} of the month's budget left" if kept >= 0 else f"month's budget overdrawn by {-kept:.0%}"
        right.set_title(f"{told}\n{lost:,.0f} of {allowed:,.0f} failures", fontsize=11)
        right.set(xlabel="since it began (h)", ylabel="error budget left (%)")
        right.set(xlim=(0, hours[-1]), ylim=(min(-5.0, 105 * kept), 104))
        right.legend(fontsize=8, loc="lower left")
    return fig


def _alert_bar(ax: Axes, case: Incident, pair: WindowPair, colour: str, height: float) -> None:
    alert = case.alert_s(pair)
    on_s, off_s = alert or (0.0, 0.0)
    told = f"{pair.name} after {duration(on_s)}" if alert else f"{pair.name}: does not fire"
    extent = [(on_s / 3600, (off_s - on_s) / 3600)]
    ax.broken_barh(extent, (height, 0.06), color=colour, transform=ax.get_xaxis_transform(), label=told)


def duration(seconds: float) -> str:
    """Seconds in a readable unit: 4.32 min, 1.5 h, 3 days."""
    if math.isinf(seconds):
        return "never"
    for unit, size, least in (("days", 86_400, 172_800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def incident_figure(
    times_s: Floats,
    asked: Floats,
    failed: Floats,
    causes: Mapping[str, Sequence[float]],
    on: Mapping[str, Sequence[float]],
    zoom_s: Sequence[float],
) -> Figure:
    """Burn rate of scraped counters over four windows, from ``zoom_s[0]`` to ``zoom_s[1]``, and the budget all along.

    ``causes`` (shaded) and ``on`` (pages, as bars): name -> (from, to) in seconds.
    """
    fig, (top, bottom) = figure(rows=2, height_in=5.2)
    hours = times_s / 3600
    with styled():
        for pair, colour in ((FAST, COLOURS[1]), (SLOW, COLOURS[0])):
            for window_s, dots in ((pair.long_s, "-"), (pair.short_s, ":")):
                seen = burn_rates(times_s, asked, failed, window_s)
                top.plot(hours, seen, dots, color=colour, linewidth=1.5, label=f"over {duration(window_s)}")
            top.axhline(pair.burn_rate, color=colour, linestyle="--", linewidth=0.8)
            if pair.name in on:
                begin_s, end_s = on[pair.name]
                extent = [(begin_s / 3600, (end_s - begin_s) / 3600)]
                top.broken_barh(extent, (0.9, 0.06), color=colour, transform=top.get_xaxis_transform(), label=pair.name)
        top.set(ylabel="burn rate", xlim=[t_s / 3600 for t_s in zoom_s], title="burn rate, around the incident")
        top.set_ylim(0, 1.15 * top.get_ylim()[1])
        rate_per_s = (asked[-1] - asked[0]) / (times_s[-1] - times_s[0])
        bottom.plot(hours, 100 * (1 - failed / SLO.failures(rate_per_s)), color="#333333")
        bottom.set(xlabel="time (h)", ylabel="budget left (%)", title="error budget of 30 days, all hours")
        for (name, (begin_s, end_s)), colour in zip(causes.items(), (COLOURS[2], "#999999"), strict=False):
            for ax in (top, bottom):
                ax.axvspan(begin_s / 3600, end_s / 3600, color=colour, alpha=0.25, label=name if ax is bottom else None)
        top.legend(fontsize=8, loc="upper right")
        bottom.legend(fontsize=8, loc="lower left")
    return fig
