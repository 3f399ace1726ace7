"""Bad input through every door, and statistics that add up whatever came in."""

import asyncio
import math
import random

import numpy as np
import pytest
import torch

from flserving.errors import (
    ConfigError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    NotFoundError,
)
from flserving.monitoring.telemetry import STAGES
from serving_models import POISON, Constant, Gated, Poison, Probe, Threads, row, serving

pytestmark = pytest.mark.timeout(60)

NAN, INF = float("nan"), float("inf")


class Hostile:
    """An object whose conversion to an array fails in a way of its own."""

    def __array__(self, dtype=None, copy=None):
        raise ZeroDivisionError("no array")


BAD_FEATURES = {
    "one feature too few": ([[1.0]], "1 features, the model takes 2"),
    "one feature too many": (np.ones((3, 3)), "3 features, the model takes 2"),
    "three dimensions": (np.ones((2, 2, 2)), r"shape \(2, 2, 2\)"),
    "no dimension": (np.float32(1), r"shape \(\)"),
    "a number": (5, r"shape \(\)"),
    "no rows": (np.ones((0, 2)), r"shape \(0, 2\)"),
    "no features": (np.ones((2, 0)), r"shape \(2, 0\)"),
    "an empty list": ([], r"shape"),
    "ragged rows": ([[1.0, 2.0], [3.0]], "table of numbers"),
    "NaN": ([[1.0, 2.0], [1.0, NAN]], "row 1, feature 1 is nan"),
    "infinity": ([[INF, 2.0]], "row 0, feature 0 is inf"),
    "minus infinity": (np.array([[1, -np.inf]], np.float16), "row 0, feature 1 is -inf"),
    "beyond float32": ([[1e39, 0.0]], "finite in float32"),
    "an integer beyond all": ([[10**400, 0]], "dtype object|table of numbers"),
    "None": (None, "dtype object"),
    "objects": (np.array([[1, "a"]], object), "dtype object"),
    "strings": ([["1", "2"]], "dtype <U1"),
    "bytes": (b"\x00\x01", "dtype"),
    "complex numbers": ([[1j, 2]], "dtype complex"),
    "dates": (np.array([["2020-01-01", "2020-01-02"]], "datetime64[D]"), "dtype datetime64"),
    "a dictionary": ({"x": [1, 2]}, "dtype object"),
    "a set": ({1.0, 2.0}, "dtype object"),
    "a masked array": (np.ma.masked_array([[1.0, 2.0]], [[True, False]]), "masked"),
    "a structured array": (np.zeros(2, [("a", "f4"), ("b", "f4")]), "dtype"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "."),
    "a tensor without data": (torch.empty(1, 2, device="meta"), "."),
    "a hostile object": (Hostile(), "no array"),
    "too many rows": (np.ones((101, 2)), "101 rows, the limit is 100: .*max_request_rows"),
}
BAD_REQUESTS = {
    "an unknown version": ({"version": "v9"}, NotFoundError, r"'v9': it has versions v1\.0"),
    "an unknown number": ({"version": 9}, NotFoundError, "'9'"),
    "a list as version": ({"version": ["v1.0"]}, NotFoundError, "no version"),
    "a path as version": ({"version": "../v1.0"}, NotFoundError, "no version"),
    "an unknown model": ({"model": "digits"}, NotFoundError, "no model 'digits': served are local"),
    "a list as model": ({"model": ["local"]}, NotFoundError, "no model"),
    "no time": ({"timeout_ms": 0}, InvalidInputError, r"timeout_ms is 0: .*\(0, 3600000\]"),
    "negative time": ({"timeout_ms": -5}, InvalidInputError, "timeout_ms is -5"),
    "endless time": ({"timeout_ms": INF}, InvalidInputError, "timeout_ms is inf"),
    "more than an hour": ({"timeout_ms": 3_600_001}, InvalidInputError, "timeout_ms is 3600001"),
    "time that is no number": ({"timeout_ms": NAN}, InvalidInputError, "timeout_ms is nan"),
    "time as text": ({"timeout_ms": "50"}, InvalidInputError, "timeout_ms is '50'"),
    "time as truth": ({"timeout_ms": True}, InvalidInputError, "timeout_ms is True"),
}
DOORS = {
    "sync": lambda server, features, **kwargs: server.predict(features, **kwargs),
    "async": lambda server, features, **kwargs: asyncio.run(server.apredict(features, **kwargs)),
    "batch": lambda server, features, **kwargs: server.batch_predict([row(1), features], **kwargs),
}


@pytest.fixture(scope="module")
def watched():
    probe = Probe()
    with serving(Gated(probe), max_request_rows=100) as server:
        yield server, probe


def refused(watched, door, error, message, features=None, **kwargs):
    """The request is refused by type, is counted, has not reached the model, and the server goes
    on."""
    server, probe = watched
    probe.shut()
    probe.release()
    before = server.get_all_stats()["server"]
    with pytest.raises(error, match=message) as raised:
        DOORS[door](server, row(1) if features is None else features[0], **kwargs)
    assert isinstance(raised.value, FlservingError) and raised.value.http_status in (400, 404)
    assert len(str(raised.value)) < 500
    assert probe.calls == 0
    after = server.get_all_stats()["server"]
    reason = raised.value.reason
    assert after["failed"] == before["failed"] + 1
    assert after["failed_by_reason"][reason] == before["failed_by_reason"].get(reason, 0) + 1
    assert server.predict(row(2))["predictions"] == [[2, 2]]
    assert sum(entry.pins for entry in server.model_cache._entries.values()) == 0


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features_are_refused(watched, name, door):
    features, message = BAD_FEATURES[name]
    if door == "batch" and name == "too many rows":
        message = "102 rows, the limit is 100"
    refused(watched, door, InvalidInputError, message, features=(features,))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused(watched, name, door):
    arguments, error, message = BAD_REQUESTS[name]
    refused(watched, door, error, message, **arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [([], "the batch is empty"), (5, "batch is a int"), (None, "batch is a NoneType")],
)
def test_bad_batches_are_refused(watched, batch, message):
    server, _ = watched
    before = server.get_all_stats()["server"]["failed_by_reason"].get("InvalidInput", 0)
    with pytest.raises(InvalidInputError, match=message):
        server.batch_predict(batch)
    assert server.get_all_stats()["server"]["failed_by_reason"]["InvalidInput"] == before + 1


def test_every_good_form_of_a_row_is_taken(watched):
    server, _ = watched
    good = [
        [3, 4], [[3, 4]], (3.0, 4.0), [np.float32(3), np.int64(4)],
        np.array([3, 4], np.int8), np.array([[3, 4]], np.float64), np.array([3, 4], ">f4"),
        np.array([[3.0, 0, 4, 0]], np.float32)[:, ::2], np.array([[3], [4]], np.float32).T,
        torch.tensor([3, 4]), torch.tensor([[3.0, 4]], requires_grad=True), torch.tensor([3, 4], dtype=torch.bfloat16),
    ]  # fmt: skip
    locked = np.array([[3, 4]], np.float32)
    locked.setflags(write=False)
    for features in [*good, locked]:
        assert server.predict(features)["predictions"] == [[3, 4]]
        assert server.batch_predict(iter([features, features]))[1]["predictions"] == [[3, 4]]
    assert server.predict([True, False])["predictions"] == [[1, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("v2", "a path"), InvalidModelError, "model is a str"),
        (("../v2", Constant(1)), InvalidModelError, "version id"),
        (("", Constant(1)), InvalidModelError, "version id"),
        ((2, Constant(1)), InvalidModelError, "version id"),
        (("v2", Constant(1), {"mean": [0, 0]}), ConfigError, "std is missing"),
        (
            ("v2", Constant(1), {"mean": [0, 0], "sd": [1, 1]}),
            ConfigError,
            "feature_stats has sd: it takes mean",
        ),
        (("v2", Constant(1), {"mean": [0, 0], "std": [1, -1]}), ConfigError, "not negative"),
    ],
)
def test_bad_models_are_refused_and_change_nothing(watched, arguments, error, message):
    server, _ = watched
    with pytest.raises(error, match=message):
        server.load_model(*arguments, output_type="regression")
    assert server.health_check()["models"]["local"] == {
        "versions": ["v1.0"],
        "aliases": {"default": "v1.0"},
    }
    assert server.predict(row(1))["predictions"] == [[1, 1]]


@pytest.mark.parametrize("version", ["v9", "", None, 1.5, "x" * 10_000])
def test_a_default_that_does_not_exist_is_refused(watched, version):
    server, _ = watched
    with pytest.raises(NotFoundError, match="no version or alias"):
        server.set_default(version)
    with pytest.raises(NotFoundError, match="no model 'digits'"):
        server.set_default("v1.0", "digits")
    assert server.predict(row(1))["model_version"] == "v1.0"


# Statistics


def assert_identities(stats):
    """What holds between the numbers of one snapshot, whatever happened."""
    counts = stats["server"]
    assert counts["succeeded"] + counts["failed"] == counts["requests"]
    assert sum(counts["failed_by_reason"].values()) == counts["failed"]
    assert (
        sum(counts["requests_by_version"].values())
        == counts["succeeded"]
        == counts["latency"]["count"]
    )
    assert counts["stages_total_ms"] == pytest.approx(counts["latency_total_ms"], rel=1e-9)
    inside = sum(counts["stages"][name]["mean_ms"] * counts["stages"][name]["count"] for name in STAGES
                 if counts["stages"][name]["count"])  # fmt: skip
    assert inside == pytest.approx(counts["stages_total_ms"], rel=1e-9)
    for summary in (counts["latency"], *counts["stages"].values()):
        if summary["count"]:
            assert (
                0
                <= summary["p50_ms"]
                <= summary["p95_ms"]
                <= summary["p99_ms"]
                <= summary["max_ms"]
            )
            assert summary["count"] <= counts["succeeded"]
    assert counts["executions"] == sum(engine["executions"] for engine in stats["engines"].values())
    executed_rows = counts["mean_batch_rows"] * counts["executions"]
    assert executed_rows == pytest.approx(
        sum(engine["rows"] for engine in stats["engines"].values())
    )


@pytest.mark.full
def test_statistics_of_a_mixed_run_add_up():
    """10,000 requests from threads and tasks: good ones, bad ones, poison, no time left; every one
    is counted once."""
    probe = Probe()
    server = serving(Poison(probe, "nan"), num_workers=2, max_batch_size=8)
    server.load_model("v2", Constant(2), output_type="regression", num_features=2)
    probe.shut()
    probe.release()
    kinds = {
        "good": (
            lambda rng: {"features": row(rng.random()).repeat(rng.randint(1, 5), axis=0)},
            None,
        ),
        "other": (lambda rng: {"features": row(1), "version": "v2"}, None),
        "large": (lambda rng: {"features": row(1).repeat(30, axis=0)}, None),
        "shape": (lambda rng: {"features": [1, 2, 3]}, "InvalidInput"),
        "nan": (lambda rng: {"features": [1, NAN]}, "InvalidInput"),
        "version": (lambda rng: {"features": row(1), "version": "nope"}, "NotFound"),
        "poison": (lambda rng: {"features": row(POISON)}, "ModelExecution"),
        "late": (lambda rng: {"features": row(1), "timeout_ms": 1e-6}, "DeadlineExceeded"),
    }
    sent, rows = dict.fromkeys(kinds, 0), []
    weights = [60, 15, 2, 5, 5, 2, 6, 5]

    def draw(rng):
        (kind,) = rng.choices(list(kinds), weights)
        make, reason = kinds[kind]
        return kind, make(rng), reason

    def check(kind, request, reason, outcome):
        got = outcome.reason if isinstance(outcome, FlservingError) else None
        assert got == reason, (kind, outcome)
        if got is None:
            rows.append(len(request["features"]))

    def thread(seed, share):
        rng = random.Random(seed)
        for _ in range(share):
            kind, request, reason = draw(rng)
            counted[seed][kind] += 1
            try:
                outcome = server.predict(**request)
            except FlservingError as error:
                outcome = error
            check(kind, request, reason, outcome)

    async def tasks(seed, share):
        async def task(rng):
            for _ in range(share // 20):
                kind, request, reason = draw(rng)
                counted[seed][kind] += 1
                try:
                    outcome = await server.apredict(**request)
                except FlservingError as error:
                    outcome = error
                check(kind, request, reason, outcome)

        await asyncio.gather(*(task(random.Random(seed + i)) for i in range(20)))

    seeds = dict.fromkeys(range(4), 1250) | {1000 * (loop + 1): 2500 for loop in range(2)}
    counted = {seed: dict.fromkeys(kinds, 0) for seed in seeds}
    callers = Threads()
    for seed, share in seeds.items():
        callers.start(thread, seed, share) if seed < 1000 else callers.start(
            lambda seed=seed, share=share: asyncio.run(tasks(seed, share))
        )
    # a snapshot at any moment is consistent
    while any(thread.is_alive() for thread in callers._threads):
        running = server.get_all_stats()["server"]
        assert running["requests"] == running["succeeded"] + running["failed"]
        assert running["stages_total_ms"] == pytest.approx(running["latency_total_ms"], rel=1e-9)
    callers.results()
    sent = {kind: sum(each[kind] for each in counted.values()) for kind in kinds}
    stats = server.get_all_stats()
    assert_identities(stats)
    counts = stats["server"]
    assert counts["requests"] == sum(sent.values()) == 10_000
    assert counts["succeeded"] == sent["good"] + sent["other"] + sent["large"] == len(rows)
    assert counts["rows"] == sum(rows)
    assert counts["requests_by_version"] == {
        "local/v1.0": sent["good"] + sent["large"],
        "local/v2": sent["other"],
    }
    assert counts["failed_by_reason"] == {
        "InvalidInput": sent["shape"] + sent["nan"],
        "NotFound": sent["version"],
        "ModelExecution": sent["poison"],
        "DeadlineExceeded": sent["late"],
    }
    assert counts["mean_batch_rows"] * counts["executions"] == pytest.approx(sum(rows)), (
        "all that ran was answered"
    )
    assert stats["queue"]["waiting_rows"] == stats["queue"]["running"] == 0
    assert server._batcher.queue.rows == 0
    server.close()


@pytest.mark.parametrize("door", ["sync", "async"])
@pytest.mark.parametrize("rows", [1, 100])
def test_the_stages_of_a_request_add_up_to_its_latency(watched, door, rows):
    server, _ = watched
    for _ in range(20):
        answer = DOORS[door](server, row(1).repeat(rows, axis=0), stages=True)
        assert tuple(answer["stages_ms"]) == STAGES
        assert min(answer["stages_ms"].values()) >= 0
        assert math.isclose(sum(answer["stages_ms"].values()), answer["latency_ms"], rel_tol=1e-9)
        assert answer["stages_ms"]["infer"] > 0
        compute = sum(
            answer["stages_ms"][name] for name in ("queue", "preprocess", "infer", "postprocess")
        )
        assert compute <= answer["latency_ms"]
    assert "stages_ms" not in DOORS[door](server, row(1))
    assert_identities(server.get_all_stats())


def test_a_warm_up_is_in_no_statistics(watched):
    server, _ = watched
    before = server.get_all_stats()
    server.engines["v1.0"].warmup(row(1))
    after = server.get_all_stats()
    assert after["server"]["executions"] == before["server"]["executions"]
    assert (
        after["engines"]["local/v1.0"]["executions"]
        == before["engines"]["local/v1.0"]["executions"]
    )
