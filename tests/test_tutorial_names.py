"""Every line that a reader of the tutorial types works, or is refused by a sentence that says what
to type instead.

The names are the tutorial's interface (MISSION: "names that the user will look for"); the lines are
ours.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flserving
from flserving.errors import ConfigError, InvalidInputError, InvalidModelError, NotFoundError

# A line of Python, or a line and what its value must be.
LINES = """
from flserving import ServingConfig, ModelCache, Preprocessor, Postprocessor, InferenceEngine
from flserving import ModelServer, EdgeModelServer, PersonalizedServer, create_serving_pipeline, demo_serving
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
config = ServingConfig()
(config.max_batch_size, config.max_wait_time_ms, config.cache_size) -> (32, 100, 5)
(config.warmup_samples, config.num_workers, config.timeout_ms) -> (10, 4, 5000)
cache = ModelCache()
cache.max_size -> 5
cache.put("v1.0", model)
cache.get("v1.0") is model -> True
cache.get("v9") -> None
cache.put("v1.1", model)
cache.clear()
cache.get("v1.0") -> None
plain = Preprocessor(normalize=False)
plain(x).shape -> (1, 32)
scaled = Preprocessor(normalize=True, mean=np.zeros(32), std=np.ones(32))
torch.equal(scaled(x), plain(x)) -> True
anywhere = Preprocessor(mean=0, std=1)
torch.equal(anywhere(x), plain(x)) -> True
shifted = Preprocessor(mean=1.0, std=2.0)
torch.allclose(shifted(x), (plain(x) - 1) / 2) -> True
post = Postprocessor(output_type="classification", threshold=0.5)
result = Postprocessor()(torch.zeros(2, 10))
set(result) -> {"predictions", "confidences", "probabilities"}
result["predictions"] -> [0, 0]
len(result["probabilities"][0]) -> 10
dict(result).keys() == set(result) -> True
set(Postprocessor("regression")(torch.zeros(2, 1))) -> {"predictions"}
engine = InferenceEngine(model, plain, Postprocessor(), config)
engine.config is config -> True
engine.warmup(x)
engine.get_stats()["request_count"] -> 0
engine.get_stats()["avg_latency_ms"] -> 0
answer = engine.predict(x)
answer["latency_ms"] > 0 -> True
answer["predictions"] == [int(np.argmax(answer["probabilities"][0]))] -> True
len(engine.batch_predict([x, x, x])) -> 3
engine.get_stats()["request_count"] -> 4
engine.get_stats()["avg_latency_ms"] > 0 -> True
InferenceEngine(model, config=config).predict(x)["predictions"] == answer["predictions"] -> True
server = keep(ModelServer(config))
server.config is config -> True
server.default_version -> None
server.load_model("v1.0", model, plain, Postprocessor())
server.load_model("v1.1", model, preprocessor=scaled, postprocessor=Postprocessor(threshold=0.5))
server.load_model(version_id="v1.2", model=model)
server.cache.get(("local", "v1.0")) is not None -> True
server.default_version -> "v1.0"
server.set_default("v1.1")
server.default_version -> "v1.1"
server.set_default(version_id="v1.0")
server.predict(x)["model_version"] -> "v1.0"
server.predict(x, "v1.1")["model_version"] -> "v1.1"
server.predict(x, version_id="v1.2")["model_version"] -> "v1.2"
server.predict(features=x, version_id=None)["model_version"] -> "v1.0"
server.health_check()["status"] -> "healthy"
server.health_check()["default_version"] -> "v1.0"
set(server.health_check()["loaded_models"]) -> {"v1.0", "v1.1", "v1.2"}
server.get_all_stats()["v1.0"]["request_count"] -> 2
server.get_all_stats()["v1.0"]["avg_latency_ms"] > 0 -> True
set(server.engines) -> {"v1.0", "v1.1", "v1.2"}
server.engines["v1.0"].predict(x)["model_type"] -> "global"
local = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
edge = keep(EdgeModelServer(model, local))
edge.predict(x)["model_type"] -> "personal"
edge.predict(x, use_personalized=False)["model_type"] -> "global"
edge.predict(x, use_personalized=False)["predictions"] == answer["predictions"] -> True
edge.update_global(local.state_dict())
edge.predict(x)["probabilities"] == edge.predict(x, False)["probabilities"] -> True
edge.update_local(model.state_dict())
edge.predict(x)["predictions"] == answer["predictions"] -> True
keep(EdgeModelServer(model, config=config)).predict(x)["model_type"] -> "global"
pipeline = keep(create_serving_pipeline(model, feature_stats={"mean": np.zeros(32), "std": np.ones(32)}))
pipeline.engines["v1.0"].warmup(x)
pipeline.predict(x)["model_version"] -> "v1.0"
keep(create_serving_pipeline(model, {"mean": 0, "std": 1})).predict(x)["predictions"] == answer["predictions"] -> True
shown, results = demo_serving()
keep(shown).health_check()["status"] -> "healthy"
len(results) -> 100
"""


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def test_every_line_of_the_tutorial_works(stack: contextlib.ExitStack) -> None:
    names: dict[str, Any] = {"np": np, "nn": nn, "torch": torch, "keep": stack.enter_context}
    torch.manual_seed(0)
    typed = [line for line in LINES.splitlines() if line]
    assert len(typed) >= 76
    for line in typed:
        code, _, wanted = line.partition(" -> ")
        if wanted:
            assert eval(code, names) == eval(wanted, names), line
        else:
            exec(code, names)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: flserving.PersonalizedServer(m, 10), ConfigError, r"registry=registry.*|heads="),
        (lambda m: flserving.PersonalizedServer(global_model=m, num_clients=10), ConfigError, "PersonalizedServer\\("),
        (lambda m: flserving.PersonalizedServer(m), ConfigError, "heads are trained, never random"),
        (lambda m: flserving.ModelServer(m), ConfigError, "pass a ServingConfig"),
        (lambda m: flserving.EdgeModelServer(flserving.ServingConfig()), ConfigError, "config= by its name"),
        (lambda m: flserving.EdgeModelServer(nn.LSTM(4, 4)), InvalidModelError, "models.register"),
        (lambda m: flserving.EdgeModelServer(m, nn.Sequential(nn.Linear(4, 2), nn.Conv1d(1, 1, 1))), InvalidModelError,
         "Conv1d is not on the list"),
        (lambda m: flserving.Preprocessor(mean=0), ConfigError, "std is missing"),
        (lambda m: flserving.Preprocessor(mean=[0, 0], std=[1]), ConfigError, "std has 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(call: Any, error: type[Exception], says: str) -> None:
    """A typed error with the way out, never a bare TypeError, AttributeError or KeyError."""
    with pytest.raises(error, match=says):
        call(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)))


def test_names_of_one_thing_are_not_given_twice(stack: contextlib.ExitStack) -> None:
    module = nn.Linear(4, 2)
    server = stack.enter_context(flserving.ModelServer())
    before = flserving.Preprocessor(num_features=4)
    after = flserving.Postprocessor()
    for options in (
        {"preprocessor": before, "feature_stats": {"mean": 0, "std": 1}},
        {"preprocessor": before, "num_features": 4},
        {"preprocessor": {"mean": 0, "std": 1}, "feature_stats": {"mean": 0, "std": 1}},
        {"postprocessor": after, "threshold": 0.5},
        {"postprocessor": after, "output_type": "regression"},
        {"preprocessor": 3},
        {"postprocessor": 3},
    ):
        with pytest.raises(ConfigError):
            server.load_model("v1.0", module, **options)
    server.load_model("v1.0", module)
    with pytest.raises(InvalidInputError, match="two names of one thing"):
        server.predict(np.zeros(4), version="v1.0", version_id="v1.0")
    with pytest.raises(NotFoundError):
        server.predict(np.zeros(4), version_id="v9")


async def test_coroutines_take_both_names_too(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(flserving.create_serving_pipeline(nn.Linear(4, 2)))
    answer = await server.apredict(np.zeros(4), version_id="v1.0")
    assert answer["model_version"] == "v1.0"


def test_a_client_is_named_by_text(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(flserving.PersonalizedServer())
    server.load_model("v1.0", nn.Linear(4, 2))
    with pytest.raises(InvalidInputError, match="ids are text"):
        server.predict(client_id=0, features=np.zeros(4))


def test_a_sequential_comes_back_as_it_was(tmp_path: Any) -> None:
    """Published without an architecture's name, rebuilt from its description: the same answers."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8),
        nn.LeakyReLU(0.2), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    rows = torch.randn(5, 6)
    wanted = torch.softmax(module(rows), 1).detach().numpy()
    with flserving.Registry(tmp_path) as registry:
        manifest = registry.publish("plain", module, alias="default")
        assert manifest.architecture == "sequential"
        with flserving.ModelServer(registry=registry) as server:
            np.testing.assert_allclose(server.predict(rows)["probabilities"], wanted, atol=1e-6)
        for wrong in (
            nn.Linear(4, 2),
            nn.Sequential(nn.ReLU()),
            nn.Sequential(nn.Linear(4, 4), nn.Softmax(0)),
        ):
            with pytest.raises(InvalidModelError, match=r"not on the list|how it is built"):
                registry.publish("plain", wrong)
        with pytest.raises(InvalidModelError, match="give architecture="):
            registry.publish("plain", module.state_dict())
        for layers in (
            [{"layer": "LSTM"}],
            [{"layer": "Linear", "in_features": -1, "out_features": 2}],
            [],
            3,
            [3],
        ):
            with pytest.raises(InvalidModelError):
                registry.publish(
                    "plain", module, architecture="sequential", parameters={"layers": layers}
                )


def test_a_local_model_survives_a_restart_of_its_device(tmp_path: Any) -> None:
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(4, 3))
    own = nn.Sequential(nn.Linear(4, 3))
    row = np.ones(4, np.float32)
    with flserving.Registry(tmp_path) as registry:
        with flserving.EdgeModelServer(shared, own, registry=registry) as edge:
            wanted = edge.predict(row)
            assert wanted["age_s"] is not None and wanted["path"] == "local"
        with flserving.EdgeModelServer(registry=registry) as edge:
            again = edge.predict(row)
            assert (again["model_type"], again["probabilities"]) == (
                "personal",
                wanted["probabilities"],
            )
            assert (
                edge.predict(row, use_personalized=False)["probabilities"]
                != wanted["probabilities"]
            )
