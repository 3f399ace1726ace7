"""The arithmetic of ``measuring.slo``, which notebook 11 uses: closed forms, and Prometheus itself
as the oracle."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import lognorm

from budget import examples
from flserving import monitoring
from flserving.errors import ConfigError
from flserving.lab.measuring.slo import (
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
from flserving.lab.widgets.explore import corners
from flserving.monitoring.metrics import BOUNDS_S
from wrong_solutions import SOLUTIONS


def promtool(tmp_path, series, checks, rules=""):
    """Have Prometheus' own engine evaluate expressions; ``checks``: (expression, when in minutes,
    value)."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: Debian has it in the package prometheus")
    (tmp_path / "rules.yml").write_text(rules or "groups: []")
    lines = [
        "rule_files: [rules.yml]",
        "evaluation_interval: 1m",
        "tests:",
        "- interval: 1m",
        "  input_series:",
    ]
    lines += [f"  - {{series: '{name}', values: '{values}'}}" for name, values in series.items()]
    lines += ["  promql_expr_test:"]
    for expression, minutes, value in checks:
        lines += [f"  - expr: '{expression}'", f"    eval_time: {minutes}m"]
        lines += [f"    exp_samples: [{{labels: '{{}}', value: {value!r}}}]"]
    (tmp_path / "test.yml").write_text("\n".join(lines))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def solution(grade_id, name):
    """What the exercise cell of the notebook defines."""
    names = {}
    exec(SOLUTIONS[grade_id], names)
    return names[name]


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
    """Counters of 10 requests a second, scraped every 10 s: the alert is on at the scrapes between
    the two times."""
    times_s = np.arange(0.0, 24 * 3600, 10)
    begin_s = 8 * 3600.0
    case = Incident(10, failed, 5 * 3600)
    asked = 10 * times_s
    lost = 10 * failed * np.clip(times_s - begin_s, 0, case.lasts_s)
    on = times_s[firing(times_s, asked, lost, pair)] - begin_s
    alert = case.alert_s(pair)
    assert alert is not None
    assert on[0] == pytest.approx(alert[0], abs=10.1) and on[-1] == pytest.approx(
        alert[1], abs=10.1
    )
    assert len(on) == round((on[-1] - on[0]) / 10) + 1  # without a gap
    for window_s in (pair.long_s, pair.short_s):
        seen = burn_rates(times_s, asked, lost, window_s)
        np.testing.assert_allclose(
            seen[2880:], case.seen(times_s - begin_s, window_s)[2880:], atol=1e-6
        )


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
    """flserving/monitoring/alerts.yml, evaluated by Prometheus over counters of one request a
    second."""
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
    alert = solution("burn-rate-alert", "BurnRateAlert")()
    minutes = range(720)
    lost = [min(max(minute - 480, 0), 40) * 3 for minute in minutes]
    on = [minute for minute in minutes if alert.scraped(60 * minute, 60 * minute, lost[minute])]
    assert on == list(range(on[0], on[-1] + 1)), "without a gap"
    assert abs(on[0] - fires) <= 2 and abs(on[-1] - clears) <= 2, "the exercise's alert, too"


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
            answer = histogram_quantile(q, buckets)
            assert solution("quantile", "quantile")(q, buckets) == pytest.approx(answer)
            checks.append((f"histogram_quantile({q}, case{case}_bucket)", 0, answer))
    promtool(tmp_path, series, checks)


@examples(50)
@given(st.lists(st.floats(1e-6, 9), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_exact_one(seconds, q):
    bounds = np.array([*BOUNDS_S, math.inf])
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


def test_the_target_of_50_ms_is_a_bound_of_the_servers_buckets():
    """So the share within it is exact, and no estimate."""
    assert 0.05 in BOUNDS_S


@pytest.mark.parametrize(
    "bounds_s",
    [BOUNDS_S, (0.001, 0.01, 0.1, 1, 10), (0.005, 0.01, 0.025, 0.05), (1, 5, 10, 50, 100, 500)],
)
def test_the_estimate_lies_in_the_bucket_of_a_distributions_quantile(bounds_s):
    for values in corners(
        median_ms=(1, 60, 1), spread=(0.1, 1.5, 0.1), percentile=(50.0, 99.5, 0.5)
    ):
        latency_s, q = (
            lognorm(values["spread"], scale=values["median_ms"] / 1e3),
            values["percentile"] / 100,
        )
        shares = dict(zip(bounds_s, latency_s.cdf(bounds_s), strict=True))
        estimate_s, ends_s = histogram_quantile(q, shares | {math.inf: 1.0}), (0.0, *bounds_s)
        place = np.searchsorted(ends_s, latency_s.ppf(q))
        if place == len(ends_s):  # beyond the last bound: all that can be said is "more than that"
            assert estimate_s == ends_s[-1]
        else:
            assert ends_s[place - 1] <= estimate_s <= ends_s[place]
