"""Notebook 06: the stopwatch on a real server, and the arithmetic on what it saw."""

import numpy as np
import pandas as pd
import pytest
from torch import nn

from flserving import ModelServer, ServingConfig
from flserving.api import serve
from flserving.errors import ConfigError
from flserving.lab.checks.api import breakdown as check
from flserving.lab.measuring import breakdown
from flserving.lab.measuring.breakdown import PARTS, SPANS, WAYS


@pytest.fixture(scope="module")
def table():
    """Four requests by each way, of 1 row and of 40."""
    network = nn.Sequential(breakdown.Stamp(), nn.Linear(8, 3))
    rows = np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32)
    with ModelServer(ServingConfig(max_batch_size=64)) as server:
        server.load_model("v8", network, num_features=8)
        with serve(server) as endpoint, breakdown.Stopwatch(server, endpoint) as stopwatch:
            with pytest.raises(ConfigError, match="no way 'fax' into a server"):
                stopwatch.ask("fax", rows, "v8")
            return stopwatch.table([(rows[:1], "v8"), (rows, "v8")], repeats=4)


def test_every_part_of_the_way_is_timed(table):
    assert (
        len(table) == 4 * 2 * len(WAYS)
        and set(table["way"]) == set(WAYS)
        and set(table["rows"]) == {1, 40}
    )
    over = table[table["way"] != "in process"]
    entered = [span for span in SPANS if span != "cache"]  # the prediction cache is off
    assert (over.groupby(["way", "rows"])[entered].median() > 0).all(axis=None), over
    inside = table[table["way"] == "in process"]
    assert (inside[["wire out", "wire back", "parse", "serialise", "decode"]] == 0).all(axis=None)
    assert (inside[["encode", "validate", "preprocess", "infer", "respond"]] > 0).all(axis=None)


def test_the_parts_hold_every_span_once(table):
    assert sorted(span for of in PARTS.values() for span in of) == sorted(SPANS)
    assert np.allclose(breakdown.parts(table).sum(axis=1), table[list(SPANS)].sum(axis=1))


def test_an_endpoint_without_grpc_is_refused():
    with ModelServer() as server:
        server.load_model("v8", nn.Linear(8, 3), num_features=8)
        with (
            serve(server, grpc_port=None) as endpoint,
            pytest.raises(ConfigError, match="no gRPC door"),
        ):
            breakdown.Stopwatch(server, endpoint)


def test_the_mean_between_two_percentiles_adds_up_to_the_total_of_those_requests():
    rng = np.random.default_rng(1)
    times = pd.DataFrame(rng.exponential(size=(1000, 3)), columns=["a", "b", "c"])
    total = times.sum(axis=1)
    low, high = np.percentile(total, [40, 60])
    assert breakdown.between(times, 40, 60).sum() == pytest.approx(
        total[(total >= low) & (total <= high)].mean()
    )
    assert breakdown.between(times, 0, 100).sum() == pytest.approx(total.mean())


def test_what_a_client_cannot_see_is_outside():
    calls = [
        {"total": 10.0, "validate": 1.0, "queue": 2.0, "infer": 3.0, "respond": 0.5, "began_s": 7.0}
    ]
    (times,) = breakdown.from_outside(calls).to_dict("records")
    assert times["outside"] == pytest.approx(3.5) and sum(times.values()) == pytest.approx(10)
    assert (times["parse"], times["queue"], times["serialise"], times["postprocess"]) == (
        1,
        2,
        0.5,
        0,
    )


def test_the_data_of_the_check_tell_all_mistakes_apart():
    times_ms = np.diff(check._marks()) * 1e3
    total_ms = times_ms.sum(axis=1)
    for method in ("linear", "lower", "higher", "nearest", "inverted_cdf"):
        assert np.percentile(total_ms, 99, method=method) == pytest.approx(
            np.percentile(total_ms, 99)
        )
    assert times_ms.mean(axis=0).argmax() == 2 and np.percentile(times_ms, 99, axis=0).argmax() == 1
    assert times_ms.sum() > 5 * np.ptp(check._marks()) * 1e3 and (times_ms >= -1e-9).all()
