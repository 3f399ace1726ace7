"""Every setting of a server is live: change it, and the server behaves otherwise. One test a
field."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest
from torch import nn

from flserving import ModelServer, PredictionCache, Registry, ServingConfig, models
from flserving.errors import (
    DeadlineExceededError,
    InvalidInputError,
    ModelTooLargeError,
    NotFoundError,
    OverloadedError,
)
from flserving.models.plain import NumpyModel
from flserving.registry.heads import HeadSet
from serving_models import Constant, Gated, Probe, Tagged, Threads, row, serving, wait_until

pytestmark = pytest.mark.timeout(60)


def test_every_field_has_its_test_here():
    tests = {
        name.removeprefix("test_").split("__")[0]
        for name in globals()
        if "__" in name[5:] and name[:5] == "test_"
    }
    assert tests == {field.name for field in dataclasses.fields(ServingConfig)}


def batches_of(requests, **settings):
    """Rows per execution when so many one-row requests arrive while the only worker is busy."""
    probe, callers = Probe(), Threads()
    with serving(Gated(probe), num_workers=1, **settings) as server:
        probe.shut()
        callers.start(server.predict, row(0))
        probe.wait_inside(1)
        for place in range(requests):
            callers.start(server.predict, row(1 + place))
            wait_until(lambda place=place: server._batcher.queue.rows == place + 1)
        probe.release()
        callers.results()
        return probe.batches[1:]


@pytest.mark.parametrize(("max_batch_size", "batches"), [(1, [1] * 6), (4, [4, 2]), (32, [6])])
def test_max_batch_size__bounds_every_execution(max_batch_size, batches):
    assert batches_of(6, max_batch_size=max_batch_size) == batches


@pytest.mark.parametrize("max_batch_size", [5, 100])
def test_max_batch_size__cuts_one_large_request_into_chunks(max_batch_size):
    probe = Probe()
    with serving(Gated(probe), max_batch_size=max_batch_size) as server:
        probe.shut()
        probe.release()
        x = np.arange(24, dtype=np.float32).reshape(12, 2)
        assert server.predict(x)["predictions"] == x.tolist()
        assert probe.batches == ([5, 5, 2] if max_batch_size == 5 else [12])


@pytest.mark.parametrize("max_wait_time_ms", [0, 80])
def test_max_wait_time_ms__is_the_longest_hold_for_a_fuller_batch(max_wait_time_ms):
    with serving(Tagged(), batching="hold_until_full", max_wait_time_ms=max_wait_time_ms) as server:
        began_s = time.perf_counter()
        server.predict(row(1))
        held_ms = (time.perf_counter() - began_s) * 1e3
    assert held_ms >= max_wait_time_ms
    assert max_wait_time_ms or held_ms < 5_000


@pytest.mark.parametrize(("max_wait_time_ms", "order"), [(0, [0, 1, 2, 3]), (60_000, [0, 2, 3, 1])])
def test_max_wait_time_ms__is_the_longest_time_to_be_passed_over(max_wait_time_ms, order):
    """A lone request of one model waits beside two of another: the fuller queue goes first, but not
    for too long."""
    probe, callers = Probe(), Threads()
    with serving(Gated(probe), "a", num_workers=1, max_wait_time_ms=max_wait_time_ms) as server:
        server.load_model("b", Gated(probe), output_type="regression", num_features=2)
        probe.shut()
        for first, version in enumerate("abaa"):
            callers.start(server.predict, row(first), version)
            if first == 0:
                probe.wait_inside(1)
            else:
                wait_until(lambda first=first: server._batcher.queue.rows == first)
        probe.release()
        callers.results()
        assert probe.seen == order


@pytest.mark.parametrize("cache_size", [1, 3])
def test_cache_size__bounds_the_versions_in_memory(cache_size):
    with serving(cache_size=cache_size) as server:
        for value in range(6):
            server.load_model(
                f"v{value}", Constant(value), output_type="regression", num_features=2
            )
        in_memory = [f"local/v{value}" for value in range(6)][-cache_size:]
        assert server.health_check()["in_memory"] == in_memory
        assert server.predict(row(0), "v0")["predictions"] == [0.0]
        assert server.health_check()["in_memory"] == [*in_memory[1:], "local/v0"]


@pytest.mark.parametrize("warmup_samples", [0, 1, 7])
def test_warmup_samples__is_how_often_a_load_runs_the_model(warmup_samples):
    probe = Probe()
    with serving(
        Gated(probe), warmup_samples=warmup_samples, max_batch_size=16, cache_size=1
    ) as server:
        server.load_model("other", Constant(1), output_type="regression", num_features=2)
        probe.shut()
        probe.release()
        with server.lease("v1.0") as engine:
            pass
        assert probe.batches == ([1] * warmup_samples + [16] if warmup_samples else [])
        assert (
            engine.get_stats()["warmup_executions"] == len(probe.batches)
            and engine.get_stats()["executions"] == 0
        )
        assert (engine.typical_s == float("inf")) == (not warmup_samples), (
            "what is not known is not run on a loop"
        )


@pytest.mark.parametrize("num_workers", [1, 3])
def test_num_workers__bounds_the_executions_at_once(num_workers):
    probe, callers = Probe(), Threads()
    with serving(Gated(probe), num_workers=num_workers, max_batch_size=1) as server:
        probe.shut()
        for first in range(6):
            callers.start(server.predict, row(first))
        probe.wait_inside(num_workers)
        wait_until(lambda: server._batcher.queue.rows == 6 - num_workers)
        probe.release()
        callers.results()
        assert probe.most_inside == num_workers


@pytest.mark.parametrize("timeout_ms", [40, 1e6])
def test_timeout_ms__is_the_deadline_of_who_names_none(timeout_ms):
    probe, callers = Probe(), Threads()
    with serving(Gated(probe), num_workers=1, timeout_ms=timeout_ms) as server:
        probe.shut()
        callers.start(server.predict, row(0), timeout_ms=1e6)
        probe.wait_inside(1)
        callers.start(server.predict, row(1))
        callers.start(lambda: asyncio.run(server.apredict(row(2))))
        if timeout_ms == 40:
            wait_until(lambda: server.get_all_stats()["server"]["failed"] == 2, "both deadlines")
        else:
            wait_until(lambda: server._batcher.queue.rows == 2)
        probe.release()
        outcomes = callers.outcomes()[1:]
    assert [isinstance(outcome, DeadlineExceededError) for outcome in outcomes] == [
        timeout_ms == 40
    ] * 2


@pytest.mark.parametrize(("batching", "runs"), [("work_conserving", 1), ("hold_until_full", 0)])
def test_batching__says_whether_an_idle_worker_waits_for_a_fuller_batch(batching, runs):
    probe, callers = Probe(), Threads()
    with serving(
        Gated(probe), batching=batching, max_batch_size=2, max_wait_time_ms=60_000
    ) as server:
        probe.shut()
        callers.start(server.predict, row(1))
        if runs:
            probe.wait_inside(1)
        else:
            wait_until(lambda: server._batcher.queue.rows == 1)
        assert probe.calls == runs
        probe.release()
        callers.start(server.predict, row(2))
        callers.results()
        assert probe.batches == ([1, 1] if runs else [2])


@pytest.mark.parametrize("max_queue_rows", [1, 4])
def test_max_queue_rows__bounds_who_waits(max_queue_rows):
    probe, callers = Probe(), Threads()
    with serving(Gated(probe), num_workers=1, max_queue_rows=max_queue_rows) as server:
        probe.shut()
        callers.start(server.predict, row(0))
        probe.wait_inside(1)
        for place in range(max_queue_rows):
            callers.start(server.predict, row(1))
            wait_until(lambda place=place: server._batcher.queue.rows == place + 1)
        with pytest.raises(OverloadedError, match=f"the limit is {max_queue_rows}"):
            server.predict(row(1))
        assert server.get_all_stats()["queue"]["max_queue_rows"] == max_queue_rows
        probe.release()
        callers.results()


@pytest.mark.parametrize("max_request_rows", [1, 7])
def test_max_request_rows__bounds_one_request(max_request_rows):
    with serving(Tagged(), max_request_rows=max_request_rows) as server:
        assert (
            len(server.predict(row(1).repeat(max_request_rows, axis=0))["predictions"])
            == max_request_rows
        )
        with pytest.raises(
            InvalidInputError, match=f"{max_request_rows + 1} rows, the limit is {max_request_rows}"
        ):
            server.predict(row(1).repeat(max_request_rows + 1, axis=0))


def test_cache_bytes__bounds_the_bytes_of_the_models_in_memory():
    model_nbytes = 4 * (64 * 2 + 2)
    with serving(cache_bytes=2 * model_nbytes + 1) as server:
        for value in range(4):
            server.load_model(f"v{value}", nn.Linear(64, 2))
        assert server.health_check()["in_memory"] == ["local/v2", "local/v3"]
        assert server.get_all_stats()["model_cache"]["nbytes"] == 2 * model_nbytes
    too_large = pytest.raises(ModelTooLargeError, match=f"needs {model_nbytes:,} B.*cache_bytes")
    with serving(cache_bytes=model_nbytes - 1) as server, too_large:
        server.load_model("v0", nn.Linear(64, 2))


@pytest.mark.parametrize("prediction_cache_bytes", [0, 2 * (PredictionCache.OVERHEAD + 8), 1 << 20])
def test_prediction_cache_bytes__bounds_the_answers_that_are_kept(prediction_cache_bytes):
    probe = Probe()
    with serving(Gated(probe), prediction_cache_bytes=prediction_cache_bytes) as server:
        probe.shut()
        probe.release()
        for first in [1, 2, 3] * 2:
            server.predict(row(first))
        assert probe.calls == {0: 6, 1 << 20: 3}.get(prediction_cache_bytes, 6), (
            "off; too small for three; ample"
        )
        kept = server.get_all_stats()["prediction_cache"]
        assert (kept and kept["size"]) == {0: None, 1 << 20: 3}.get(prediction_cache_bytes, 2)


@pytest.mark.parametrize(("prediction_cache_scope", "calls"), [("caller", 2), ("shared", 1)])
def test_prediction_cache_scope__says_who_may_find_a_kept_answer(prediction_cache_scope, calls):
    probe = Probe()
    settings = {"prediction_cache_bytes": 1 << 20, "prediction_cache_scope": prediction_cache_scope}
    with serving(Gated(probe), **settings) as server:
        probe.shut()
        probe.release()
        for caller in ("token a", "token b", "token a"):
            server.predict(row(1), caller=caller)
        assert probe.calls == calls


@pytest.mark.parametrize("prediction_cache_ttl_s", [0, 10])
def test_prediction_cache_ttl_s__is_the_age_at_which_an_answer_is_forgotten(prediction_cache_ttl_s):
    now_s = [1000.0]
    config = ServingConfig(
        prediction_cache_bytes=1 << 20, prediction_cache_ttl_s=prediction_cache_ttl_s
    )
    with ModelServer(config, clock=lambda: now_s[0]) as server:
        server.load_model("v1", Tagged(), output_type="regression", num_features=2)
        server.predict(row(1))
        for later_s, hits in [
            (9.9, 1),
            (10.0, 2 if prediction_cache_ttl_s == 0 else 1),
            (1e6, None),
        ]:
            now_s[0] = 1000.0 + later_s
            server.predict(row(1))
            if hits is not None:
                assert server.get_all_stats()["prediction_cache"]["hits"] == hits
        stats = server.get_all_stats()["prediction_cache"]
        assert (stats["hits"], stats["expirations"]) == (
            (3, 0) if prediction_cache_ttl_s == 0 else (1, 2)
        )


@pytest.mark.parametrize("unknown_client", ["global_head", "refuse"])
def test_unknown_client__says_what_a_client_without_a_head_gets(unknown_client):
    with serving(unknown_client=unknown_client) as server:
        server.load_model("v1", Tagged(), output_type="regression", num_features=2)
        if unknown_client == "global_head":
            assert server.predict(row(1), client="c")["model_type"] == "global"
        else:
            with pytest.raises(NotFoundError, match="no personal head"):
                server.predict(row(1), client="c")
        assert server.predict(row(1))["model_version"] == "v1", (
            "who names no client is not asked for a head"
        )


@pytest.mark.parametrize(
    ("outputs", "shown"), [("full", 3), ("infer=label", 3), ("top-1", 1), ("label", 0)]
)
def test_outputs__say_how_many_probabilities_an_answer_shows(outputs, shown):
    with ModelServer(ServingConfig(warmup_samples=1, outputs=outputs)) as server:
        server.load_model("v1", nn.Linear(2, 3))
        answer = server.predict(row(1))
        assert np.count_nonzero(answer.get("probabilities", ())) == shown


@pytest.mark.parametrize("engine", ["torch", "numpy"])
def test_engine__is_what_runs_a_version(engine, tmp_path):
    with Registry(tmp_path) as registry:
        registry.publish("m", models.tutorial_mlp(), architecture="tutorial_mlp", alias="default")
        with (
            ModelServer(ServingConfig(engine=engine), registry) as server,
            server.lease(None, "m") as loaded,
        ):
            assert isinstance(loaded.model, NumpyModel if engine == "numpy" else nn.Module)


@pytest.mark.parametrize("heads", [1, 16])
def test_head_cache_bytes__bounds_the_heads_in_memory(heads, tmp_path):
    per_head = 64  # a head of 2 inputs and 1 output, on its 64-byte boundary
    with Registry(tmp_path) as registry:
        weights = np.ones((8, 3, 1), np.float32)
        registry.publish(
            "m", models.build("mlp", {"sizes": [2, 2, 1]}), architecture="mlp", parameters={"sizes": [2, 2, 1]},
            output_type="regression", heads=HeadSet("head", list("abcdefgh"), weights), alias="default",
        )  # fmt: skip
        with ModelServer(ServingConfig(head_cache_bytes=heads * per_head), registry) as server:
            for client in "abcdefgh":
                server.predict([0.0, 0.0], client=client)
            with server.lease() as engine:
                assert (engine.personal.store._rows is not None) == (heads == 16), (
                    "all of them fit, or none is kept"
                )
