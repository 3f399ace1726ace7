"""The protocol's operations, without a wire: what REST and gRPC both say."""

import asyncio

import numpy as np
import pytest
import torch

from flserving import ModelServer, Registry, ServingConfig, models
from flserving.api.auth import Identity, Role
from flserving.api.dataplane import V2, Call
from flserving.errors import (
    FlservingError,
    ForbiddenError,
    InvalidInputError,
    ModelUnloadedError,
    NotFoundError,
    NotSupportedError,
)

X = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
ANYBODY = Identity(Role.INFER)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        for seed, alias in ((0, "default"), (1, "canary")):
            torch.manual_seed(seed)
            registry.publish(
                "digits", models.build("digits_mlp"), architecture="digits_mlp", alias=alias
            )
        yield registry


@pytest.fixture
def v2(registry):
    with ModelServer(
        ServingConfig(warmup_samples=1, prediction_cache_bytes=1 << 16), registry
    ) as server:
        yield V2(server, admin=True)


def call(parameters=None, *, version=None, outputs=None, client=None, inputs=None, model="digits"):
    inputs = {"features": X} if inputs is None else inputs
    return Call(model, version, inputs, outputs, parameters or {}, Identity(Role.INFER, client))


def infer(v2, *args, **options):
    return asyncio.run(v2.infer(call(*args, **options)))


def test_an_answer_is_the_servers_own(v2):
    answer, direct = infer(v2), v2.server.predict(X)
    assert (answer.model, answer.version) == ("digits", "1")
    assert {name: array.tolist() for name, array in answer.outputs.items()} == {
        name: direct[name] for name in ("predictions", "confidences", "probabilities")
    }
    assert (
        answer.parameters["model_type"] == "global" and type(answer.parameters["latency_us"]) is int
    )


def test_what_an_answer_holds_is_what_the_metadata_say(v2):
    v2.server.load_model("r", torch.nn.Linear(64, 1), output_type="regression")
    v2.server.load_model("rk", torch.nn.Linear(64, 2), output_type="regression")
    for model, version in (("digits", None), ("local", "r"), ("local", "rk")):
        described = {t["name"]: t for t in v2.model_metadata(ANYBODY, model, version)["outputs"]}
        outputs = infer(v2, model=model, version=version).outputs
        assert described.keys() == outputs.keys()
        for name, array in outputs.items():
            kind = {"FP32": np.float32, "INT64": np.int64}[described[name]["datatype"]]
            assert array.dtype == kind and array.shape == (3, *described[name]["shape"][1:]), name
    assert v2.model_metadata(ANYBODY, "digits")["versions"] == ["1", "2"]
    config = v2.model_config(ANYBODY, "digits")
    assert [t["dims"] for t in config["input"] + config["output"]] == [[64], [], [], [10]]
    assert config["max_batch_size"] == v2.server.config.max_batch_size


def test_parameters_that_are_understood(v2):
    assert infer(v2, {"alias": "canary"}).version == "2"
    assert infer(v2, version="2", outputs=["predictions"]).outputs.keys() == {"predictions"}
    stages = infer(
        v2, {"stages": True, "timeout": 5_000_000, "unknown": "kept to yourself", "priority": 0}
    ).parameters
    assert {"stage_queue_us", "stage_infer_us", "stage_respond_us"} < stages.keys()
    assert {type(value) for value in stages.values()} == {str, int}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": {}}, InvalidInputError, "inputs are none"),
        ({"inputs": {"x": X}}, InvalidInputError, "inputs are 'x': send one, 'features'"),
        ({"inputs": {"features": X, "more": X}}, InvalidInputError, "'features', 'more'"),
        ({"outputs": ["logits"]}, InvalidInputError, "no output 'logits': there are predictions"),
        ({"parameters": {"alias": "nobody"}}, NotFoundError, "nobody"),
        (
            {"parameters": {"alias": "canary"}, "version": "1"},
            InvalidInputError,
            "no version in the path",
        ),
        ({"parameters": {"alias": 3}}, InvalidInputError, "alias is 3"),
        ({"parameters": {"timeout": 1.5}}, InvalidInputError, "timeout is 1.5"),
        ({"parameters": {"timeout": True}}, InvalidInputError, "timeout is True"),
        ({"parameters": {"timeout": -1}}, InvalidInputError, "timeout_ms is -0.001"),
        ({"parameters": {"stages": "yes"}}, InvalidInputError, "stages is 'yes'"),
        ({"parameters": {"priority": 1}}, NotSupportedError, "priority is 1"),
        ({"parameters": {"sequence_id": 7}}, NotSupportedError, "sequence_id"),
        ({"parameters": {"classification": 3}}, NotSupportedError, "classification"),
        ({"parameters": {"personal": True}}, ForbiddenError, "credential of a client"),
        ({"model": "nothing"}, NotFoundError, "no model 'nothing'"),
        ({"version": "9"}, NotFoundError, "no version or alias '9'"),
    ],
)
def test_what_cannot_be_answered_is_told_by_its_type(v2, options, error, message):
    with pytest.raises(error, match=message):
        infer(v2, **options)


def test_every_request_is_counted_once_whatever_stops_it(v2):
    infer(v2)
    for options in (
        {"inputs": {"x": X}},
        {"outputs": ["logits"]},
        {"parameters": {"timeout": 1.5}},
        {"version": "9"},
    ):
        with pytest.raises(FlservingError):
            infer(v2, **options)
    seen = v2.server.get_all_stats()["server"]
    assert (seen["requests"], seen["failed_by_reason"]) == (5, {"InvalidInput": 3, "NotFound": 1})


@pytest.mark.parametrize("name", ["alias", "timeout", "priority", "stages", "personal"])
def test_what_a_caller_sent_is_not_sent_back_at_length(v2, name):
    options = {"version": "1"} if name == "alias" else {}
    with pytest.raises(FlservingError, match=f"^{name} is 'xxx") as error:
        infer(v2, {name: "x" * 1_000_000}, **options)
    assert len(str(error.value)) < 200


def test_readiness_looks_at_one_route_however_many_models_there_are(v2, monkeypatch):
    monkeypatch.setattr(v2.server, "health_check", None)
    assert v2.ready()
    monkeypatch.undo()
    assert v2.server.ready == v2.server.health_check()["ready"]


def test_statistics_are_those_of_all_processes_behind_the_address(v2):
    infer(v2)
    alone = v2.statistics("digits")["model_stats"][0]
    v2.others = lambda: [v2.server.telemetry.totals(), {}]
    both = v2.statistics("digits")["model_stats"][0]
    assert both["inference_count"] == 2 * alone["inference_count"] == 6
    assert both["inference_stats"]["success"]["ns"] == pytest.approx(
        2 * alone["inference_stats"]["success"]["ns"], abs=2
    )
    assert both["last_inference"] == alone["last_inference"]


def test_a_clients_cached_answers_are_its_own(v2):
    for client in ("a", "a", "b", None, None):
        infer(v2, {"personal": client is not None}, client=client)
    assert (v2.server.prediction_cache.hits, v2.server.prediction_cache.misses) == (2, 3)


def test_statistics_count_what_was_sent(v2):
    for _ in range(3):
        infer(v2)
    with pytest.raises(InvalidInputError):
        infer(v2, inputs={"features": X[:, :5]}, version="2")
    served, failed = v2.statistics("digits")["model_stats"]
    assert (served["version"], served["inference_stats"]["success"]["count"]) == ("1", 3)
    # the others were cached
    assert served["inference_count"] == 3 and served["execution_count"] == 1
    assert (
        served["inference_stats"]["cache_miss"]["count"],
        served["inference_stats"]["cache_hit"]["count"],
    ) == (1, 2)
    assert [batch["batch_size"] for batch in served["batch_stats"]] == [3]
    assert failed["version"] == "2" and failed["inference_stats"]["fail"]["count"] == 1
    assert failed["inference_stats"]["fail"]["ns"] > 0
    assert v2.statistics("digits", "2")["model_stats"] == [failed]
    assert v2.statistics()["model_stats"] == [served, failed]
    with pytest.raises(NotFoundError):
        v2.statistics("nothing")


def test_a_version_that_nobody_asked_has_statistics_of_zeros(v2):
    (zeros,) = v2.statistics("digits", "2")["model_stats"]
    assert zeros["inference_count"] == zeros["last_inference"] == 0 and not zeros["batch_stats"]
    assert all(duration == {"count": 0, "ns": 0} for duration in zeros["inference_stats"].values())


def test_the_index_shows_what_can_answer_and_why_not(v2):
    assert [(row["name"], row["version"], row["state"]) for row in v2.index()] == [
        ("digits", "1", "READY"),
        ("digits", "2", "READY"),
    ]
    asyncio.run(v2.unload("digits"))
    assert {(row["state"], row["reason"]) for row in v2.index()} == {("UNAVAILABLE", "unloaded")}
    assert v2.index(ready=True) == [] and not v2.ready()
    with pytest.raises(ModelUnloadedError):
        v2.model_ready("digits")
    asyncio.run(v2.load("digits"))
    assert v2.ready() and v2.model_ready("digits") and v2.model_ready("digits", "canary")
    v2.draining = True
    assert not v2.ready() and not v2.model_ready("digits")


@pytest.mark.parametrize("act", ["load", "unload"])
def test_loading_over_the_network_is_off_unless_asked_for(v2, act):
    with pytest.raises(ForbiddenError, match="admin=True"):
        asyncio.run(getattr(V2(v2.server), act)("digits"))
    assert v2.ready()


def test_a_version_that_cannot_be_loaded_is_not_ready_and_says_why(tmp_path):
    with Registry(tmp_path) as registry:
        for alias in ("default", "next"):
            registry.publish(
                "m", models.build("digits_mlp"), architecture="digits_mlp", alias=alias
            )
        weights = tmp_path / "models" / "m" / "2" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with ModelServer(registry=registry) as server:
            v2 = V2(server)
            with pytest.raises(FlservingError):
                infer(v2, model="m", version="2")
            assert v2.model_ready("m", "1") and not v2.model_ready("m", "2")
            assert [row["state"] for row in v2.index()] == ["READY", "UNAVAILABLE"] and v2.index()[
                1
            ]["reason"]
            assert [row["version"] for row in v2.index(ready=True)] == ["1"]
