"""Figures of notebook 11 and the arithmetic of ``lab.slo``: closed forms, Prometheus itself as the oracle, extremes."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from flserving import create_serving_pipeline, models, monitoring
from flserving.errors import ConfigError
from flserving.lab import figures_11 as figures
from flserving.lab.explore import corners
from flserving.lab.slo import (
    DAYS,
    FAST,
    PAIRS,
    SLO,
    SLOW,
    Incident,
    Slo,
    WindowPair,
    burn_rates,
    firing,
    histogram_quantile,
    increases,
)
from flserving.monitoring.prometheus import exposition

LOADED = {"load_per_s": (10, 2000, 10), "failure_percent": (0.0, 10.0, 0.1), "lasts_hours": (0.25, 24.0, 0.25)}
SPREAD = {"median_ms": (1, 60, 1), "spread": (0.1, 1.5, 0.1), "percentile": (50.0, 99.5, 0.5)}


def promtool(tmp_path, series, checks, rules=""):
    """Have Prometheus' own engine evaluate expressions; ``checks``: (expression, when in minutes, value)."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: Debian has it in the package prometheus")
    (tmp_path / "rules.yml").write_text(rules or "groups: []")
    lines = ["rule_files: [rules.yml]", "evaluation_interval: 1m", "tests:", "- interval: 1m", "  input_series:"]
    lines += [f"  - {{series: '{name}', values: '{values}'}}" for name, values in series.items()]
    lines += ["  promql_expr_test:"]
    for expression, minutes, value in checks:
        lines += [f"  - expr: '{expression}'", f"    eval_time: {minutes}m"]
        lines += [f"    exp_samples: [{{labels: '{{}}', value: {value!r}}}]"]
    (tmp_path / "test.yml").write_text("\n".join(lines))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- lab.slo


def test_the_budget_of_three_nines_is_43_minutes_a_month():
    assert SLO.down_s / 60 == pytest.approx(43.2)
    assert SLO.failures(1000) == pytest.approx(1000 * 30 * 86_400 / 1000)
    with pytest.raises(ConfigError, match="use a share in"):
        Slo(target=1.0)


def test_the_window_pairs_are_those_of_the_workbook():
    assert [round(pair.spent(), 3) for pair in PAIRS] == [0.02, 0.05, 0.1, 0.1]
    assert FAST.fires_after_s(1000) == pytest.approx(51.84)  # a total outage
    assert FAST.fires_after_s(14.4) == math.inf and FAST.fires_after_s(0) == math.inf
    assert DAYS.fires_after_s(2) == pytest.approx(1.5 * 86_400)


@pytest.mark.parametrize("failed", [0.02, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("pair", [FAST, SLOW], ids=lambda pair: pair.name)
def test_the_closed_form_of_an_alert_is_what_counters_say(pair, failed):
    """Counters of 10 requests a second, scraped every 10 s: the alert is on at the scrapes between the two times."""
    times_s = np.arange(0.0, 24 * 3600, 10)
    begin_s = 8 * 3600.0
    case = Incident(10, failed, 5 * 3600)
    asked = 10 * times_s
    lost = 10 * failed * np.clip(times_s - begin_s, 0, case.lasts_s)
    on = times_s[firing(times_s, asked, lost, pair)] - begin_s
    alert = case.alert_s(pair)
    assert alert is not None
    assert on[0] == pytest.approx(alert[0], abs=10.1) and on[-1] == pytest.approx(alert[1], abs=10.1)
    assert len(on) == round((on[-1] - on[0]) / 10) + 1  # without a gap
    for window_s in (pair.long_s, pair.short_s):
        seen = burn_rates(times_s, asked, lost, window_s)
        np.testing.assert_allclose(seen[2880:], case.seen(times_s - begin_s, window_s)[2880:], atol=1e-6)


@given(st.floats(0, 1), st.floats(60, 1e6))
def test_what_is_left_of_the_budget_never_grows(failed, lasts_s):
    case = Incident(100, failed, lasts_s)
    left = case.left(np.linspace(0, 2e6, 50))
    assert left[0] == 1 and (np.diff(left) <= 0).all()
    if failed and (empty_s := case.slo.period_s / case.burn_rate) < lasts_s:
        assert case.left(empty_s) == pytest.approx(0, abs=1e-9)
    for pair in PAIRS:
        if (alert := case.alert_s(pair)) is not None:
            assert 1 - case.left(alert[0]) == pytest.approx(pair.spent())
            assert alert[0] < lasts_s < alert[1]


def test_the_shipped_alert_comes_when_the_formula_says(tmp_path):
    """flserving/monitoring/alerts.yml, evaluated by Prometheus over counters of one request a second."""
    case = Incident(1, 0.05, 40 * 60)  # from 8:00 on, as in the notebook
    fires, clears = (8 * 60 + seconds / 60 for seconds in case.alert_s(FAST))
    assert case.alert_s(SLOW) is None
    rules = Path(monitoring.__file__).with_name("alerts.yml").read_text(encoding="utf-8")
    series = {
        'flserving_outcomes_total{job="flserving",outcome="ok"}': "0+60x480 28857+57x39 31140+60x200",
        'flserving_outcomes_total{job="flserving",outcome="server_error"}': "0x480 3+3x39 120x200",
    }
    on = 'count(ALERTS{alertname="FlservingErrorBudgetBurnsFast"}) or vector(0)'
    checks = [
        (on, round(fires) - 2, 0),
        (on, round(fires) + 2, 1),
        (on, round(clears) - 2, 1),
        (on, round(clears) + 2, 0),
    ]
    promtool(tmp_path, series, checks, rules)


def test_a_restart_is_no_negative_growth(tmp_path):
    values = np.array([0, 60, 120, 30, 90.0])
    assert increases(values).tolist() == [60, 60, 30, 60]
    promtool(tmp_path, {"a": "0 60 120 30 90"}, [("increase(a[241s])", 4, 210.0)])


def test_a_window_with_no_request_burns_nothing():
    times_s = np.array([0.0, 60, 120])
    assert burn_rates(times_s, np.zeros(3), np.zeros(3), 60).tolist() == [0, 0, 0]
    assert not firing(times_s, np.zeros(3), np.zeros(3), WindowPair("any", 60, 30, 1)).any()


def test_quantiles_are_those_of_prometheus(tmp_path):
    series, checks = {}, []
    rng = np.random.default_rng(11)
    for case in range(12):
        bounds = [*np.unique(rng.integers(1, 100, rng.integers(1, 8))).tolist(), math.inf]
        counts = np.cumsum(rng.integers(0, 40, len(bounds))) + 1
        for bound, count in zip(bounds, counts, strict=True):
            series[f'case{case}_bucket{{le="{bound}"}}'.replace("inf", "+Inf")] = str(count)
        buckets = dict(zip(map(float, bounds), counts, strict=True))
        for q in (0.01, 0.5, 0.9, 0.99, 1.0):
            checks.append((f"histogram_quantile({q}, case{case}_bucket)", 0, histogram_quantile(q, buckets)))
    promtool(tmp_path, series, checks)


@examples(50)
@given(st.lists(st.floats(1e-6, 9), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_exact_one(seconds, q):
    bounds = np.array([*figures.BOUNDS_S, math.inf])
    taken = np.array(seconds)
    buckets = {bound: float((taken <= bound).sum()) for bound in bounds.tolist()}
    got, exact = histogram_quantile(q, buckets), np.quantile(taken, q, method="inverted_cdf")
    place = np.searchsorted(bounds, exact)
    assert got <= bounds[place] * (1 + 1e-9)
    assert got >= (bounds[place - 1] if place else 0) * (1 - 1e-9)


def test_a_histogram_without_samples_has_no_quantile():
    assert math.isnan(histogram_quantile(0.5, {1.0: 0, math.inf: 0}))
    with pytest.raises(ConfigError, match="use q in"):
        histogram_quantile(50, {1.0: 1, math.inf: 1})
    with pytest.raises(ConfigError, match="buckets up to infinity"):
        histogram_quantile(0.5, {1.0: 1, 2.0: 1})


# ------------------------------------------------------------------------------------------------- figures_11


def test_a_real_servers_scrape_is_read():
    with create_serving_pipeline(models.build("tutorial_mlp")) as server:
        for _ in range(7):
            server.predict(np.ones(32))
        with pytest.raises(ValueError):
            server.predict([1, 2, 3])
        scrape = figures.parsed(exposition(server)[0])
        assert figures.total(scrape, "flserving_outcomes_total", outcome="ok") == 7
        assert figures.total(scrape, "flserving_outcomes_total") == 8
        assert figures.total(scrape, "no_such_name") == 0
        buckets = figures.buckets(scrape, "flserving_request_seconds_bucket")
        assert list(buckets)[:-1] == sorted(figures.BOUNDS_S) and buckets[math.inf] == 7
        assert 0 < histogram_quantile(0.5, buckets) < 10


def test_the_target_is_a_bound_of_the_servers_buckets():
    assert figures.TARGET_S in figures.BUCKETS_S["flserving"]
    case = figures.quantile_case("flserving", 20, 0.5, 99)
    assert case.cumulative[figures.TARGET_S] == pytest.approx(case.share(np.array([0.05]))[0])


@pytest.mark.parametrize("buckets", figures.BUCKETS_S)
def test_the_estimate_lies_in_the_exact_quantiles_bucket(buckets):
    for values in corners(**SPREAD):
        case = figures.quantile_case(buckets, **values)
        bounds = np.array([0.0, *case.bounds_s])
        place = np.searchsorted(bounds, case.exact_s)
        if place == len(bounds):  # beyond the last bound: all that can be said is "more than that"
            assert case.estimate_s == bounds[-1]
        else:
            assert bounds[place - 1] <= case.estimate_s <= bounds[place]
        share = case.share(np.array([case.exact_s]))[0]
        assert share == pytest.approx(case.percentile / 100)
        figures.quantile_figure(case)


def test_the_budget_is_drawn_at_every_corner():
    for values in corners(**LOADED):
        case = figures.incident(**values)
        assert case.burn_rate == pytest.approx(values["failure_percent"] * 10)
        fig = figures.budget_figure(case)
    assert [ax.get_xlabel() for ax in fig.axes] == ["since it began (h)"] * 2
    assert "does not fire" not in fig.axes[1].get_legend().get_texts()[0].get_text()
    calm = figures.budget_figure(figures.incident(100, 0.1, 10))
    assert "does not fire" in calm.axes[1].get_legend().get_texts()[0].get_text()


def test_counters_and_an_incident_are_drawn():
    times_s = np.arange(0.0, 3600, 15)
    fig = figures.rate_figure(times_s[:6], np.array([0, 10, 20, 5, 15, 25.0]))
    assert [ax.get_ylabel() for ax in fig.axes] == ["counter (requests)", "rate (requests per s)"]
    fig = figures.incident_figure(
        times_s, 10 * times_s, times_s / 10, {"fails": (600, 1200)}, {"fast page": (900, 1500)}, (0, 1800)
    )
    assert [ax.get_ylabel() for ax in fig.axes] == ["burn rate", "budget left (%)"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(40, "40 s"), (259.2, "4.32 min"), (7199, "2 h"), (9000, "2.5 h"), (259_200, "3 days"), (math.inf, "never")],
)
def test_durations_are_told_in_a_readable_unit(seconds, told):
    assert figures.duration(seconds) == told
