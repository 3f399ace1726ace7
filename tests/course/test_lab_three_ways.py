"""Three architectures on the same requests, in virtual time and for real."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from flserving import ModelServer, models
from flserving.api import serve
from flserving.api.auth import Tokens
from flserving.edge import EdgeModelServer
from flserving.edge.breaker import CircuitBreaker
from flserving.edge.hybrid import HybridServer
from flserving.errors import OverloadedError, ServerClosedError
from flserving.federated.data import Client
from flserving.lab.checks.edge import threshold as check
from flserving.lab.network import real_ways, three_ways
from flserving.lab.network.link import Link
from flserving.lab.network.three_ways import SPAN_S, WAYS, Costs, play, summary

COSTS = Costs(local_s=0.001, cloud_s=0.002, request_nbytes=1000, response_nbytes=500)


def pool(rows=200):
    rng = np.random.default_rng(7)
    confidence, own = rng.uniform(0.2, 1, rows), rng.random(rows) < 0.8
    return pd.DataFrame(
        {
            "device": rng.integers(4, size=rows),
            "own": own,
            "confidence": confidence,
            "local_right": rng.random(rows) < confidence,
            "cloud_right": rng.random(rows) < 0.95,
        }
    )


@pytest.fixture(scope="module")
def asked():
    return three_ways.stream(pool(), 500, seed=1)


# ---------------------------------------------------------------------------------- in virtual time


def test_a_stream_is_a_minute_of_the_pool_with_repeats():
    asked = three_ways.stream(pool(), 2000, repeats=0.3, seed=2)
    assert (
        asked["at_s"].is_monotonic_increasing
        and 0 <= asked["at_s"].min() <= asked["at_s"].max() <= SPAN_S
    )
    assert 1 - asked["row"].nunique() / 2000 == pytest.approx(0.3, abs=0.03)
    same = asked.groupby("row")
    assert (same["confidence"].nunique() == 1).all() and (same["device"].nunique() == 1).all()
    assert (asked["row"] <= asked.index).all()
    assert asked["confidence"].mean() == pytest.approx(pool()["confidence"].mean(), abs=0.05)


def test_the_edge_answers_all_at_its_own_pace(asked):
    played = play(asked, "edge", Link(outages=[(0, np.inf)]), COSTS)
    assert set(played["path"]) == {"local"} and not played["sent"].any()
    assert (played["latency_s"] == COSTS.local_s).all() and (
        played["right"] == asked["local_right"]
    ).all()


def test_the_centre_takes_a_round_trip_and_fails_without_one(asked):
    link = {"rtt_ms": 40, "up_bytes_s": 1e5, "down_bytes_s": 1e5}
    played = play(asked, "central", Link(**link), COSTS)
    assert set(played["path"]) == {"cloud"} and (played["right"] == asked["cloud_right"]).all()
    assert played["latency_s"].to_numpy() == pytest.approx(0.04 + 1500 / 1e5 + 0.002)
    cut = play(asked, "central", Link(**link, outages=[(20, 50)]), COSTS, deadline_s=1.0)
    inside = asked["at_s"].between(20, 48.9)
    assert (cut["path"][inside] == "failed").all() and not cut["right"][inside].any()
    assert np.isinf(cut["latency_s"][inside]).all()
    assert (cut["path"][(asked["at_s"] < 19) | (asked["at_s"] > 50)] == "cloud").all()


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.1])
def test_the_hybrid_takes_the_path_that_the_policy_says(asked, threshold):
    played = play(asked, "hybrid", Link(rtt_ms=10), COSTS, threshold=threshold)
    unsure = asked["confidence"] < threshold
    assert (played["path"] == "local").equals(~unsure)
    assert (played["right"] == asked["local_right"].where(~unsure, asked["cloud_right"])).all()
    first = ~asked["row"].duplicated()
    assert (played["path"][unsure & first] == "cloud").all() and played["sent"].sum() == (
        unsure & first
    ).sum()
    assert (played["path"][unsure & ~first] == "cache").mean() > 0.9 or not unsure.any()
    np.testing.assert_allclose(played["latency_s"][played["path"] == "cloud"], 0.013)
    assert (played["latency_s"][played["path"] != "cloud"] == 0.001).all()


def test_without_a_cloud_the_hybrid_degrades_and_its_breaker_saves_the_waiting(asked):
    cut = Link(rtt_ms=10, outages=[(0, np.inf)])
    played = play(asked, "hybrid", cut, COSTS, threshold=1.1, deadline_s=0.5)
    assert set(played["path"]) == {"degraded"} and (played["right"] == asked["local_right"]).all()
    waited = played["latency_s"] > 0.4
    devices = asked["device"].nunique()
    # three failures, then one probe each 5 s
    assert devices * 3 <= waited.sum() <= devices * (3 + SPAN_S / 5)
    assert (played["latency_s"][~waited] == COSTS.local_s).all() and (
        played["sent"] == waited
    ).all()


def test_the_real_hybrid_takes_the_paths_that_were_played():
    """The same requests through HybridServer on a virtual clock, with a cloud that is away from 20
    s to 40 s."""
    rng, now, cut_s, deadline_s = np.random.default_rng(4), [0.0], (20.0, 40.0), 1.0
    row = rng.integers(30, size=60)
    table = rng.standard_normal((30, 4), dtype=np.float32)

    class Cloud:
        def predict(self, rows, **options):
            if cut_s[0] <= now[0] < cut_s[1] - deadline_s:
                now[0] += deadline_s
                raise ServerClosedError("away")
            return {
                "predictions": np.zeros(1),
                "confidences": np.ones(1, np.float32),
                "model_version": "1",
            }

    clock = lambda: now[0]  # noqa: E731
    with EdgeModelServer(clock=clock, wall=clock) as edge:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = models.build("mlp", {"sizes": [4, 3]})
        edge.update_global(model, architecture="mlp", parameters={"sizes": [4, 3]})
        confidence = np.array([edge.predict(table[number])["confidences"][0] for number in row])
        threshold = float(np.median(confidence))
        asked = pd.DataFrame({"device": 0, "row": row, "at_s": np.arange(60) * 1.1, "confidence": confidence,
                              "local_right": True, "cloud_right": False})  # fmt: skip
        costs = Costs(local_s=0.0, cloud_s=0.0, request_nbytes=0, response_nbytes=0)
        played = play(
            asked,
            "hybrid",
            Link(outages=[cut_s]),
            costs,
            threshold=threshold,
            deadline_s=deadline_s,
        )
        breaker = CircuitBreaker(3, 5.0, clock)
        with HybridServer(
            edge, Cloud(), consent=True, threshold=threshold, breaker=breaker
        ) as hybrid:
            real = []
            for number, at_s in zip(row, asked["at_s"], strict=True):
                now[0] = at_s
                real.append(hybrid.predict(table[number])["path"])
    assert real == list(played["path"]) and set(real) == {"local", "cache", "cloud", "degraded"}


def test_the_summary_counts_all_requests():
    played = pd.DataFrame(
        {
            "path": ["local"] * 8 + ["cloud", "failed"],
            "latency_s": [0.001] * 8 + [0.2, np.inf],
            "right": [True] * 7 + [False, True, False],
            "sent": [False] * 8 + [True, True],
        }
    )
    told = summary(played)
    assert told == {
        "answered (%)": 90, "right (%)": 80, "left the device (%)": 20, "p50 (ms)": 1.0, "p95 (ms)": np.inf,
    }  # fmt: skip


def test_a_higher_threshold_sends_more(asked):
    table = three_ways.at_every_threshold(asked, [0, 0.5, 0.9, 1.01], COSTS, rtt_ms=30)
    assert (
        table["left the device (%)"].is_monotonic_increasing
        and table["left the device (%)"].iloc[0] == 0
    )
    assert table["right (%)"].iloc[-1] == pytest.approx(100 * asked["cloud_right"].mean())


@pytest.mark.parametrize(("outage_percent", "failed"), [(0, False), (50, True)])
def test_the_minute_of_the_sliders_has_the_outage_that_they_say(asked, outage_percent, failed):
    runs = three_ways.minute(asked, COSTS, 20, 0.0, outage_percent, 0.9)
    assert tuple(runs) == WAYS and ("failed" in set(runs["central"]["path"])) == failed
    if failed:
        assert (runs["central"]["path"] == "failed").mean() == pytest.approx(0.5, abs=0.08)


# ----------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def endpoint():
    with ModelServer() as server:
        server.load_model("v1", nn.Linear(4, 3), num_features=4)
        with serve(server, grpc_port=None, tokens=Tokens.open(), hosts=("127.0.0.1",)) as endpoint:
            yield endpoint


def test_a_request_through_the_proxy_takes_what_the_link_says(endpoint):
    row = np.ones((1, 4), np.float32)
    with real_ways.far_away(endpoint, "any", Link(rtt_ms=50)) as far:
        took_ms, up, down = real_ways.timed(far, row, far[1].models()[0]["name"], requests=3)
    assert 50 < took_ms < 20_000 and 300 < up < 2000 and 200 < down < 2000


def test_every_device_is_asked_for_its_owners_rows_and_those_of_guests():
    rng = np.random.default_rng(0)
    clients = [
        Client(f"c{n}", *(part for size in (4, 8) for part in (rng.random((size, 2), np.float32), np.full(size, n))))
        for n in range(3)
    ]  # fmt: skip
    own = {client.id: n for n, client in enumerate(clients)}

    def answer(label, rows):
        return {"predictions": np.full(len(rows), label), "confidences": np.full(len(rows), 0.5)}

    pool = real_ways.ask_all(clients, lambda name, rows: answer(own[name], rows), lambda rows: answer(0, rows),
                             guests=0.2)  # fmt: skip
    assert len(pool) == 3 * (8 + 2) and (pool["own"] == pool["local_right"]).all()
    assert (pool.groupby("device")["own"].sum() == 8).all()
    assert pool[pool["device"] == 0]["cloud_right"].sum() == 8


def test_watching_keeps_the_time_and_notes_failures_and_events():
    now, done = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    def sometimes(row):
        now[0] += 0.01
        if done:
            raise OverloadedError("away")
        return {"path": "local", "round": row}

    seen = real_ways.watch({"a": sometimes, "b": lambda row: {"predictions": [1]}}, range(5), 0.1,
                           {3: lambda: done.append(3)}, lambda: now[0], sleep)  # fmt: skip
    assert list(seen["a"]["path"]) == ["local"] * 3 + ["failed"] * 2 and set(seen["b"]["path"]) == {
        "cloud"
    }
    assert list(seen["a"]["at_s"]) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert list(seen["b"]["latency_s"]) == [0] * 5 and list(seen["a"]["round"][:3]) == [0, 1, 2]


def watched():
    at_s = np.linspace(0, 6, 60)
    away = (at_s > 2) & (at_s < 4)
    paths = {"central": np.where(away, "failed", "cloud"), "edge": "local",
             "hybrid": np.where(np.arange(60) % 4 > 0, "local", np.where(away, "degraded", "cloud"))}  # fmt: skip
    return {way: pd.DataFrame({"at_s": at_s, "path": path}) for way, path in paths.items()}


def test_three_nines_leave_43_minutes_a_month():
    table = real_ways.in_a_month(watched())
    assert list(table["central keeps 99.9 %"]) == [True, True, False, False]
    assert table.loc["1 day", "central"] == pytest.approx(100 * (1 - 1 / 30), abs=1e-3)
    assert table.loc["1 day", "hybrid, degraded"] == pytest.approx(100 * 0.25 / 30, rel=0.1)


# ------------------------------------------------------------------------------ the exercise's data


def test_the_data_of_the_check_tell_all_mistakes_apart():
    right = [world.chosen() for world in check.worlds()]
    chosen = [tuple(choices) for choices in check._by_mistake(check.worlds).values()]
    assert tuple(right) not in chosen and None in right
    assert len({*chosen}) == len(chosen) == len(check.MISTAKES)
    right = [world.chosen() for world in check.worlds_without_budget()]
    chosen = [tuple(choices) for choices in check._by_mistake(check.worlds_without_budget).values()]
    wrong = [choices for choices in chosen if choices != tuple(right)]
    assert len({*wrong}) == len(wrong) > 5 and None in right
    for world in check.worlds():
        values = world.latency_ms(0.9)
        for method in ("linear", "lower", "higher", "nearest", "inverted_cdf"):
            assert np.percentile(values, 95, method=method) == np.percentile(values, 95)
