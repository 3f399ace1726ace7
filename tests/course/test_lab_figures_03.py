"""Notebook 03's experiments on the real cache against oracles, and its pictures by what they show."""

import threading

import cachetools
import numpy as np
import pandas as pd
import pytest

from flserving.errors import ConfigError
from flserving.lab import caching, figures_03
from flserving.lab.arrivals import Zipf
from flserving.serving.cache import ModelCache
from serving_models import PATIENCE_S


@pytest.mark.parametrize("seed", range(5))
def test_replay_hits_where_cachetools_hits(seed):
    rng = np.random.default_rng(seed)
    trace, size = Zipf(12, 0.8).draw(rng, 300).tolist(), int(rng.integers(1, 8))
    oracle, expected = cachetools.LRUCache(size), []
    for key in trace:
        expected.append(key in oracle)
        oracle[key] = oracle.get(key, 0)
    assert caching.replay(ModelCache(size), trace).tolist() == expected


def test_replay_of_nothing_is_an_empty_array_of_bools():
    hits = caching.replay(ModelCache(2), [])
    assert hits.shape == (0,) and hits.dtype == np.bool_


def test_record_tells_the_story_step_by_step():
    assert caching.record(ModelCache(2), "ABACB") == [
        ("A", False, ("A",)),
        ("B", False, ("A", "B")),
        ("A", True, ("B", "A")),
        ("C", False, ("A", "C")),
        ("B", False, ("C", "B")),
    ]


def test_hit_rates_at_the_ends_are_exact():
    rates = caching.hit_rates(1, 1.0, sizes=(1, 20), requests=20_000, seed=1)
    assert rates.sizes.tolist() == [1, 20]
    assert rates.measured[0] == pytest.approx((rates.popularity**2).sum(), abs=0.02)  # a hit is a repetition
    assert rates.measured[1] == 1 and rates.closed[-1] == pytest.approx(1)  # everything fits
    assert rates.measured_items == pytest.approx(rates.popularity, abs=0.06)  # version i follows itself


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_hit_rates_agree_with_the_closed_form(skew):
    rates = caching.hit_rates(7, skew, sizes=(5, 10), requests=6000, seed=1)
    assert rates.sizes.tolist() == [5, 7, 10]
    assert rates.measured == pytest.approx(rates.closed[[4, 6, 9]], abs=0.03)
    asked = rates.popularity * 6000 > 200  # enough requests to tell
    assert rates.measured_items[asked] == pytest.approx(rates.closed_items[asked], abs=0.1)
    assert (np.diff(rates.closed) > 0).all()


@pytest.mark.parametrize("size", [0, 21])
def test_hit_rates_refuse_a_size_that_makes_no_sense(size):
    with pytest.raises(ConfigError, match=r"for 20 versions: use sizes in \[1, 20\]"):
        caching.hit_rates(size, 1.0)


def test_rolling_is_the_mean_over_runs_of_the_last_requests():
    hits = np.array([[1, 0, 0, 1], [1, 1, 0, 1]], np.bool_)
    assert caching.rolling(hits, window=2) == pytest.approx([0.75, 0.25, 0.5])


def test_a_stampede_loads_once_each_and_a_single_flight_once():
    callers, cache, models = 8, ModelCache(2), {}
    everybody_missed, everybody_came = threading.Barrier(callers), threading.Semaphore(0)

    def from_dict(load):
        return models.get("m") or models.setdefault("m", load())

    def slow_load():
        everybody_missed.wait(PATIENCE_S)
        return caching.Weightless()

    run = caching.stampede(from_dict, slow_load, callers)
    assert run.loaded.all() and run.start_ms.min() == 0 and (run.end_ms >= run.start_ms).all()

    def from_cache(load):
        everybody_came.release()
        with cache.lease("m", load):
            pass

    def load_when_all_are_there():
        for _ in range(callers):
            assert everybody_came.acquire(timeout=PATIENCE_S)
        return caching.Weightless()

    run = caching.stampede(from_cache, load_when_all_are_there, callers)
    assert run.loaded.sum() == cache.stats()["loads"] == 1
    assert (np.diff(run.end_ms) >= 0).all()  # in the order of the answers


def test_a_stampede_raises_what_a_load_raises():
    def broken():
        raise ConfigError("the file is gone")

    with pytest.raises(ConfigError, match="the file is gone"):
        caching.stampede(lambda load: load(), broken, callers=2)


# ------------------------------------------------------------------------------------------------- pictures


def texts(ax):
    return [text.get_text() for text in ax.texts]


def labelled(figure, *, units=("(", "number", "version", "caller")):
    """Every axis that has a label says what it counts."""
    labels = [text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text]
    assert labels and all(any(unit in text for unit in (*units, "requests")) for text in labels), labels
    return labels


def test_latency_figure_names_both_medians():
    figure = figures_03.latency_figure(np.array([0.1, 0.2, 0.3]), np.array([4.0, 5.0, 6.0]))
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "hit: median 0.2 ms",
        "cold load: median 5 ms",
    ]
    assert sum(patch.get_height() for patch in ax.patches) >= 5  # all but the cut tail
    labelled(figure)


def test_strip_figure_shows_places_evictions_and_misses():
    figure = figures_03.strip_figure(caching.record(ModelCache(2), "ABAC"), capacity=2)
    (ax,) = figure.axes
    assert texts(ax) == ["A", "A\nmiss", "A", "B", "B\nmiss", "B", "A", "A\nhit", "B", "A", "C", "C\nmiss"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["evicted", "coldest", "hottest", "asked for"]


def test_strip_figure_of_one_place():
    (ax,) = figures_03.strip_figure(caching.record(ModelCache(1), "AB"), capacity=1).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["evicted", "the one place", "asked for"]


def test_hit_rate_figure_draws_the_numbers():
    rates = caching.hit_rates(5, 1.0, requests=500)
    figure = figures_03.hit_rate_figure(rates)
    left, right = figure.axes
    assert left.lines[0].get_ydata() == pytest.approx(rates.closed * 100)
    assert left.lines[2].get_xydata()[0] == pytest.approx([5, rates.measured[3] * 100])
    assert right.get_title(loc="left") == "cache size 5, skew 1.0"
    labelled(figure)
    full = figures_03.hit_rate_figure(caching.hit_rates(20, 0.0, requests=500))
    assert full.axes[0].get_title(loc="left").startswith("closed 100.0%")


def test_error_figure_shows_measured_minus_closed():
    rates = [caching.hit_rates(1, skew, sizes=(2,), requests=400) for skew in (0.5, 1.0)]
    figure = figures_03.error_figure(rates, requests=400)
    shown = figure.axes[0].containers[1][0].get_ydata()
    assert shown == pytest.approx((rates[1].measured - rates[1].closed[:2]) * 100)
    labelled(figure)


def test_scan_figure_starts_when_the_window_is_full():
    lines = {"through": np.full(91, 0.4), "own": np.full(91, 0.5)}
    figure = figures_03.scan_figure(lines, 10, scan_at=50, closed=0.5, survives=20)
    through = figure.axes[0].lines[0]
    assert through.get_xdata()[[0, -1]].tolist() == [10, 100] and through.get_ydata()[0] == pytest.approx(40)
    labelled(figure)


def test_memory_figure_stacks_up_to_what_is_held():
    held = pd.DataFrame({"version 1": [0.2, 0.2], "version 2": [0.0, 0.5]}, index=[1, 2])
    figure = figures_03.memory_figure(held, budget_mb=1.0)
    tops = [bar.get_y() + bar.get_height() for bar in figure.axes[0].patches]
    assert tops == pytest.approx([0.2, 0.2, 0.2, 0.7])
    labelled(figure)


def test_cost_figure_has_a_panel_per_model():
    median = pd.DataFrame({"small": {"no cache": 40.0, "hit": 8.0}, "large": {"no cache": 160.0, "hit": 9.0}})
    figure = figures_03.cost_figure(median)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["small", "large"]
    assert texts(figure.axes[1]) == ["160", "9"]
    labelled(figure)


def test_stale_figure_marks_the_wrong_answers():
    figure = figures_03.stale_figure(np.zeros((2, 64)), np.array([3, 4]), np.array([8, 4]), np.array([3, 4]))
    wrong, right = (ax.title for ax in figure.axes)
    assert (wrong.get_text(), right.get_text()) == ("naive: 8", "naive: 4")
    assert (wrong.get_color(), right.get_color()) == (figures_03.VERMILION, figures_03.INK)


def test_stampede_figure_counts_the_loads():
    run = caching.Stampede(np.zeros(3), np.array([1.0, 2.0, 3.0]), np.array([True, False, False]))
    figure = figures_03.stampede_figure({"a": run, "b": run})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a: 1 of 3 load", "b: 1 of 3 load"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1, 2, 3]
    labelled(figure)
