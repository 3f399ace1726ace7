"""Who may see what: one policy for a role or a credential, the same by every way that an answer can
take."""

import asyncio
import contextlib

import httpx
import numpy as np
import pytest

import flserving
from edge_cloud import SIZES, X, publish, state
from flserving import ModelServer, Registry, ServingConfig
from flserving.api.auth import Role, Tokens
from flserving.api.client import Client
from flserving.edge import EdgeModelServer
from flserving.edge.hybrid import HybridServer
from flserving.errors import ConfigError, ForbiddenError, InvalidInputError
from flserving.models.masking import OUTPUTS, OutputPolicy
from flserving.registry.experiment import Experiment
from grpc_door import Caller, request
from rest_door import bearer, binary, outputs_of, text
from serving_models import PATIENCE_S

pytestmark = pytest.mark.timeout(120)
SEEN = {
    "infer": "label",
    "c-1": "label",
    "admin": "full",
    "auditor": "full",
    "c-2": "top-2",
    "c-3": "rounded-2",
}
"""Token -> what it is shown, where the server says that the role infer sees labels."""
INFER = "/v2/models/m/infer"
MLP = {"architecture": "mlp", "parameters": {"sizes": SIZES}}


def tokens():
    known = Tokens()
    known.add("read", Role.READ)
    known.add("infer")
    known.add("admin", Role.ADMIN)
    known.add("auditor", outputs="full")
    known.add("c-1", client="c-1")
    known.add("c-2", client="c-2", outputs="top-2")
    known.add("c-3", client="c-3", outputs="rounded-2")
    return known


@contextlib.contextmanager
def served(root, *, split=False, **settings):
    """(server, endpoint) of a classifier of three classes, of which the role infer sees labels;
    ``split``: two versions share its callers."""
    settings = {
        "warmup_samples": 1,
        "timeout_ms": PATIENCE_S * 1e3,
        "outputs": "infer=label",
        **settings,
    }
    with Registry(root) as registry:
        publish(registry, 1)
        if split:
            publish(registry, 2, alias=None)
            running = Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)})
            registry.start_experiment("m", running, who="test", why="to see")
        with (
            ModelServer(ServingConfig(**settings), registry) as server,
            flserving.serve(server, tokens=tokens(), artifacts=True) as endpoint,
        ):
            yield server, endpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with served(tmp_path_factory.mktemp("registry")) as (server, endpoint):
        yield server, endpoint


def by_json(endpoint, token):
    return outputs_of(httpx.post(endpoint.url + INFER, content=text(X), headers=bearer(token)))[1]


def by_bytes(endpoint, token):
    sent = binary(X, parameters={"binary_data_output": True})
    answer = httpx.post(
        endpoint.url + INFER, content=sent["content"], headers=sent["headers"] | bearer(token)
    )
    return outputs_of(answer)[1]


def by_grpc(endpoint, token):
    with Caller(endpoint.grpc_url, token) as caller:
        return caller.infer(X, model="m")


def by_client(endpoint, token):
    with Client(endpoint.url, token) as client:
        answer = client.predict(X, model="m", arrays=True)
    assert answer.get("outputs") == (None if SEEN[token] == "full" else SEEN[token]), (
        "a masked answer says so"
    )
    return {name: answer[name] for name in OUTPUTS if name in answer}


WAYS = (by_json, by_bytes, by_grpc, by_client)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("token", SEEN)
def test_each_credential_sees_the_same_by_every_way(world, token, way):
    server, endpoint = world
    full = {name: np.array(server.predict(X)[name], np.float32) for name in OUTPUTS}
    wanted = OutputPolicy.parse(SEEN[token]).shown(full, True)
    del wanted["outputs"]
    got = way(endpoint, token)
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, atol=1e-6)


@pytest.mark.parametrize("token", SEEN)
def test_the_arms_of_an_experiment_are_masked_too(tmp_path, token):
    with served(tmp_path, split=True) as (_, endpoint), Client(endpoint.url, token) as client:
        answer = client.predict(X, model="m")
        assert ("arm" in answer and "receipt" in answer) == token.startswith("c-")
        assert [name for name in OUTPUTS if name in answer] == [
            *OutputPolicy.parse(SEEN[token]).offered
        ]
        assert answer.get("outputs", "full") == SEEN[token]


# What a caller asks for


@pytest.mark.parametrize("hidden", OUTPUTS[1:])
def test_an_output_that_is_hidden_is_refused_by_every_way(world, hidden):
    endpoint = world[1]
    words = f"output '{hidden}' is not shown to this credential: ask for predictions"
    asked = {"outputs": [{"name": "predictions"}, {"name": hidden}]}
    answer = httpx.post(endpoint.url + INFER, content=text(X, **asked), headers=bearer("infer"))
    assert (answer.status_code, answer.json()["error"]) == (403, words)
    with Caller(endpoint.grpc_url, "infer") as caller:
        message = _request(*asked["outputs"])
        assert caller.refused("ModelInfer", message) == ("PERMISSION_DENIED", words)


def test_what_is_offered_can_be_narrowed_and_what_does_not_exist_is_another_error(world):
    endpoint = world[1]
    for token, wanted in (
        ("infer", ["predictions"]),
        ("c-2", ["confidences"]),
        ("admin", ["probabilities"]),
    ):
        named = [{"name": name} for name in wanted]
        answer = httpx.post(
            endpoint.url + INFER, content=text(X, outputs=named), headers=bearer(token)
        )
        assert list(outputs_of(answer)[1]) == wanted
    answer = httpx.post(
        endpoint.url + INFER, content=text(X, outputs=[{"name": "x"}]), headers=bearer("infer")
    )
    assert (answer.status_code, answer.headers["flserving-error"]) == (
        400,
        InvalidInputError("").reason,
    )


def test_a_parameter_cannot_widen_what_is_shown(world):
    """The names that a caller might try are the caller's own: they change nothing."""
    more = {"parameters": {"outputs": "full", "policy": "full", "role": "admin"}}
    answer = httpx.post(world[1].url + INFER, content=text(X, **more), headers=bearer("infer"))
    message, outputs = outputs_of(answer)
    assert list(outputs) == ["predictions"] and message["parameters"]["outputs"] == "label"


def test_in_this_process_an_answer_can_be_narrowed_and_not_widened(tmp_path):
    with served(tmp_path, outputs="top-2") as (server, _):
        own = server.predict(X)
        assert (
            own["outputs"] == "top-2"
            and (np.count_nonzero(own["probabilities"], axis=1) == 2).all()
        )
        assert asyncio.run(server.apredict(X, outputs="label")).keys().isdisjoint(OUTPUTS[1:])
        assert server.batch_predict([X, X[0]])[1]["outputs"] == "top-2"
        for wider in ("full", "top-3", "rounded-1"):
            with pytest.raises(
                ForbiddenError, match="'top-2', the most here: ask for that or less"
            ):
                server.predict(X, outputs=wider)
        with pytest.raises(ConfigError, match="no policy 'all'"):
            server.predict(X, outputs="all")
        assert server.get_all_stats()["server"]["failed_by_reason"] == {"Forbidden": 3, "Config": 1}


# What is said of it


@pytest.mark.parametrize(("token", "policy"), [*SEEN.items(), ("read", "label")])
def test_the_metadata_name_the_policy_and_the_outputs_of_who_asks(world, token, policy):
    endpoint = world[1]
    offered = [*OutputPolicy.parse(policy).offered]
    about, config = (
        httpx.get(f"{endpoint.url}/v2/models/m{path}", headers=bearer(token)).json()
        for path in ("", "/config")
    )
    assert about["parameters"] == {"outputs": policy}
    assert config["parameters"] == {"outputs": {"string_value": policy}}
    assert (
        [one["name"] for one in about["outputs"]]
        == [one["name"] for one in config["output"]]
        == offered
    )
    with Caller(endpoint.grpc_url, token) as caller:
        assert [one.name for one in caller.ask("ModelMetadata", name="m").outputs] == offered
        config = caller.ask("ModelConfig", name="m").config
        assert config.parameters["outputs"].string_value == policy
        assert [one.name for one in config.output] == offered


# Ways round it


@pytest.mark.parametrize("scope", ["caller", "shared"])
def test_what_is_cached_for_one_role_neither_shows_nor_hides_anything_to_another(tmp_path, scope):
    """Nor does the time that a hit saves: what admin asked is no hit for who sees labels."""
    settings = {"prediction_cache_bytes": 1 << 20, "prediction_cache_scope": scope}
    with served(tmp_path, **settings) as (server, endpoint):
        hits = []
        for token in ("admin", "infer", "c-1", "admin", "auditor", "infer"):
            got = by_json(endpoint, token)
            assert list(got) == [*OutputPolicy.parse(SEEN[token]).offered]
            hits.append(server.get_all_stats()["prediction_cache"]["hits"])
        assert hits == ([0, 0, 1, 2, 3, 4] if scope == "shared" else [0, 0, 0, 1, 1, 2])


@pytest.mark.parametrize(
    "path", ["release", "versions/1/manifest", "versions/1/weights", "versions/1/delta?base=0"]
)
def test_who_is_shown_less_than_all_cannot_download_what_tells_all(world, path):
    for token, policy in SEEN.items():
        answer = httpx.get(f"{world[1].url}/v2/repository/models/m/{path}", headers=bearer(token))
        assert answer.status_code == (200 if policy == "full" else 403), answer.text
        if policy != "full":
            assert (
                policy in answer.json()["error"] and '"outputs": "full"' in answer.json()["error"]
            )


@pytest.mark.parametrize("policy", ["full", "top-1", "label"])
def test_a_device_masks_what_it_answers(policy):
    with EdgeModelServer(config=ServingConfig(warmup_samples=1, outputs=policy)) as edge:
        edge.update_global(state(1), **MLP)
        answer = edge.predict(X)
        assert [name for name in OUTPUTS if name in answer] == [*OutputPolicy.parse(policy).offered]
        assert answer["path"] == "local" and edge.predict(X, outputs="label").keys().isdisjoint(
            OUTPUTS[1:]
        )
        if policy == "top-1":
            assert (np.count_nonzero(answer["probabilities"], axis=1) == 1).all()


class Cloud:
    """It answers class 1 with certainty."""

    def predict(self, features, **_):
        n = len(features)
        outputs = {"predictions": np.ones(n, np.int64), "confidences": np.ones(n, np.float32)}
        return outputs | {"model_version": "9", "model_type": "global"}


@pytest.mark.parametrize("arrays", [False, True])
def test_a_hybrid_decides_by_what_it_hides(arrays):
    """Its policy needs the confidence that no caller is shown: an unsure device still asks the
    cloud."""
    with EdgeModelServer(config=ServingConfig(warmup_samples=1, outputs="label")) as edge:
        edge.update_global(state(1), **MLP)
        for threshold, path in ((0.0, "local"), (1.0, "cloud"), (1.0, "cache")):
            with HybridServer(edge, Cloud(), consent=True, threshold=threshold) as hybrid:
                if path == "cache":
                    hybrid.predict(X)
                answer = hybrid.predict(X, arrays=arrays)
                assert (answer["path"], answer["outputs"]) == (path, "label")
                awaited = asyncio.run(hybrid.apredict(X, arrays=arrays))
                assert awaited.keys() == answer.keys() and awaited["outputs"] == "label"
                assert type(answer["predictions"]) is (np.ndarray if arrays else list)
                assert answer.keys().isdisjoint(OUTPUTS[1:])
                with pytest.raises(ForbiddenError):
                    hybrid.predict(X, outputs="full")


def _request(*outputs):
    message = request(X, model="m")
    for output in outputs:
        message.outputs.add(**output)
    return message
