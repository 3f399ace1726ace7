"""The tutorial's own flow, word for word, and the contract of its names (MISSION.md's table)."""

import json
import re

import numpy as np
import pytest
import torch

from flserving import (
    InferenceEngine,
    ModelServer,
    ServingConfig,
    create_serving_pipeline,
    demo_serving,
    models,
)
from flserving.errors import NotFoundError, ServerClosedError

ANSWER = {
    "predictions",
    "confidences",
    "probabilities",
    "latency_ms",
    "model_version",
    "model_type",
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build("tutorial_mlp")


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((5, 32), dtype=np.float32)


def assert_answer(answer, rows, version="v1.0"):
    """The contract of an answer: exactly these keys, plain Python values, one entry a row."""
    assert answer.keys() == ANSWER
    assert json.loads(json.dumps(answer)) == answer, "plain lists and numbers"
    assert (
        len(answer["predictions"])
        == len(answer["confidences"])
        == len(answer["probabilities"])
        == rows
    )
    for label, confidence, probabilities in zip(
        answer["predictions"], answer["confidences"], answer["probabilities"], strict=True
    ):
        assert type(label) is int and type(confidence) is float and len(probabilities) == 10
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert confidence == max(probabilities) == probabilities[label]
    assert answer["latency_ms"] > 0
    assert (answer["model_version"], answer["model_type"]) == (version, "global")


def test_the_flow(model, x):
    server = create_serving_pipeline(model)
    server.engines["v1.0"].warmup(x)
    assert_answer(server.predict(x), 5)
    assert_answer(server.predict(x[0]), 1)
    health, stats = server.health_check(), server.get_all_stats()
    assert health["status"] == "healthy" and health["ready"] is True and health["problems"] == {}
    assert health["models"] == {"local": {"versions": ["v1.0"], "aliases": {"default": "v1.0"}}}
    assert (health["default_model"], health["in_memory"]) == ("local", ["local/v1.0"]) and health[
        "uptime_s"
    ] > 0
    assert (
        stats["server"]["requests"] == stats["server"]["succeeded"] == 2
        and stats["server"]["rows"] == 6
    )
    assert stats["server"]["executions"] == 2, "the warm-up is not in the statistics"
    assert stats["engines"]["local/v1.0"]["rows"] == 6
    assert stats.keys() == {
        "server",
        "queue",
        "model_cache",
        "prediction_cache",
        "engines",
        "fleet",
        "v1.0",
    }
    for answer, rows in zip(
        server.engines["v1.0"].batch_predict([x[0], x[1:4]]), (1, 3), strict=True
    ):
        assert_answer(answer, rows)
    json.dumps([health, stats])  # both can be shown and sent as they are
    server.close()


def test_the_callers_module_is_left_alone(model, x):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with create_serving_pipeline(model) as server:
        first = server.predict(x)["probabilities"]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1  # the client goes on training
        assert server.predict(x)["probabilities"] == first
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name] + 1) for name, tensor in model.state_dict().items())


def test_feature_statistics_are_applied(model, x):
    mean, std = x.mean(0) + 1, x.std(0) + 0.5
    with (
        create_serving_pipeline(model, {"mean": mean, "std": std}) as scaled,
        create_serving_pipeline(model) as plain,
    ):
        wanted = plain.predict((x - mean) / std)["probabilities"]
        np.testing.assert_allclose(scaled.predict(x)["probabilities"], wanted, atol=1e-6)


def test_options_and_settings_reach_the_server(model, x):
    config = ServingConfig(max_batch_size=2)
    with create_serving_pipeline(model, config=config, threshold=0.99) as server:
        assert server.config is config
        assert server.predict(x)["predictions"] == [-1] * 5, (
            "nothing of random weights is that sure"
        )


def test_a_server_without_arguments(model, x):
    with ModelServer() as server:
        assert server.config == ServingConfig() and server.health_check()["status"] == "unavailable"
        with pytest.raises(NotFoundError, match="call load_model or serve first"):
            server.predict(x)
        engine = server.load_model("v1", model)
        assert isinstance(engine, InferenceEngine) and engine.version == "v1"
        torch.manual_seed(1)
        server.load_model("v2", models.build("tutorial_mlp"))
        assert_answer(server.predict(x), 5, "v1")
        assert_answer(server.predict(x, "v2"), 5, "v2")
        server.set_default("v2")
        assert_answer(server.predict(x), 5, "v2")
        assert_answer(server.predict(x, version="v1"), 5, "v1")
        assert server.health_check()["models"]["local"]["aliases"] == {"default": "v2"}


@pytest.mark.parametrize("unknown", [{"version": "v9"}, {"model": "other"}])
def test_an_unknown_version_is_an_error_and_never_an_answer(model, x, unknown):
    with create_serving_pipeline(model) as server:
        for call in (server.predict, server.batch_predict):
            with pytest.raises(NotFoundError) as raised:
                call([x[0]], **unknown)
            assert (raised.value.http_status, raised.value.grpc_code) == (404, "NOT_FOUND")
        with pytest.raises(NotFoundError):
            server.set_default("v9")
        with pytest.raises(NotFoundError):
            server.engines["v9"]


def test_batch_predict_gives_every_request_its_own_answer(model, x):
    with create_serving_pipeline(model) as server:
        answers = server.batch_predict([x[0], x[1:4], x[4].tolist()])
        for answer, rows in zip(answers, (1, 3, 1), strict=True):
            assert_answer(answer, rows)
        together = [p for answer in answers for p in answer["probabilities"]]
        np.testing.assert_allclose(together, server.predict(x)["probabilities"], atol=1e-6)
        assert server.get_all_stats()["server"]["requests"] == 2, "as one request"


def test_the_demonstration_serves_a_hundred_requests(capsys):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    server, results = demo_serving()
    with server:
        assert len(results) == server.get_all_stats()["v1.0"]["request_count"] == 100
        for answer in results:
            assert_answer(answer, 1)
        said = capsys.readouterr().out
        assert "100 requests with version v1.0" in said and "healthy" in said
        mean_ms = float(re.search(r"mean latency: ([\d.]+) ms", said)[1])
        assert mean_ms == pytest.approx(
            np.mean([answer["latency_ms"] for answer in results]), abs=1e-3
        )
    again, few = demo_serving(requests=4)
    again.close()
    assert [answer["predictions"] for answer in few] == [
        answer["predictions"] for answer in results[:4]
    ]
    assert torch.equal(torch.random.get_rng_state(), state), "nobody's random numbers change"


def test_a_pipeline_that_cannot_start_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="Module"):
        create_serving_pipeline("a path")
    assert not list(tmp_path.iterdir())
    server = create_serving_pipeline(models.build("tutorial_mlp"))
    server.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ServerClosedError):
        server.predict(np.zeros(32, np.float32))
