"""Rows of any shape: Flower's CIFAR-10 quickstart model through every door."""

import contextlib

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from torch import nn
from torch.nn import functional

import flserving
from flserving import ModelServer, Registry, ServingConfig, models
from flserving.api.auth import Tokens
from flserving.api.client import Client
from flserving.edge import EdgeModelServer
from flserving.errors import ConfigError, InvalidInputError, InvalidModelError
from flserving.federated import train
from flserving.federated.data import Client as Samples
from flserving.models.processing import Preprocessor
from flserving.optimize import methods
from flserving.registry.heads import HeadSet

NET, SPLIT = "test-images-cifar", "test-images-split"
SHAPE = (3, 32, 32)
CHANNELS = {"mean": np.array([[[0.1]], [[0.2]], [[0.3]]]), "std": np.full((3, 1, 1), 0.5)}
X = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
FORMS = {
    "rows": lambda x: x,
    "flat rows": lambda x: x.reshape(len(x), -1),
    "nested lists": lambda x: x.tolist(),
    "a tensor": torch.from_numpy,
    "channels last in memory": np.asfortranarray,
}


@models.register(NET, input_shape=SHAPE, output_shape=(10,))
class Net(nn.Module):
    """The model of Flower's quickstart for PyTorch: two convolutions, three linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


@models.register(SPLIT, input_shape=(1, 4, 4), output_shape=(2,))
def split_net():
    """Small, with a body and a head."""
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten())
    return models.SplitModel(body, nn.Linear(12, 2))


def made(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build(name)


def probabilities(module, x):
    values = (x - CHANNELS["mean"].astype(np.float32)) / np.float32(0.5)
    with torch.inference_mode():
        return module(torch.from_numpy(values)).softmax(1).numpy()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with Registry(tmp_path_factory.mktemp("images")) as registry:
        registry.publish(
            "cifar", made(NET), architecture=NET, preprocessing=CHANNELS, alias="default"
        )
        yield registry


@pytest.fixture(scope="module")
def server(registry):
    config = ServingConfig(
        warmup_samples=1, prediction_cache_bytes=1 << 20, max_batch_size=4, timeout_ms=20_000
    )
    with ModelServer(config, registry) as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server):
    with flserving.serve(server, tokens=Tokens.open()) as endpoint:
        yield endpoint


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_gets_the_modules_own_answer(server, form):
    wanted = probabilities(made(NET), X)
    answer = server.predict(FORMS[form](X), arrays=True)
    np.testing.assert_allclose(answer["probabilities"], wanted, atol=1e-5)
    one = server.predict(FORMS[form](X[:1])[0], arrays=True)
    np.testing.assert_allclose(one["probabilities"], wanted[:1], atol=1e-5)


def test_requests_of_different_forms_share_a_batch_and_the_cache(server):
    wanted = probabilities(made(NET), X)
    answers = server.batch_predict([X[0], X[1:3].reshape(2, -1), X[3:].tolist()])
    assert [len(answer["predictions"]) for answer in answers] == [1, 2, 2]
    np.testing.assert_allclose(
        np.concatenate([a["probabilities"] for a in answers]), wanted, atol=1e-5
    )
    hits = server.prediction_cache.hits
    server.predict(X.reshape(5, -1))
    server.predict(X)
    assert server.prediction_cache.hits > hits, "the same rows, whatever their form"


@pytest.mark.parametrize(
    "shape",
    [(3, 32), (32, 32), (5, 32, 32), (2, 2, 3, 32, 32), (3, 32, 32, 1), (5, 3071), (0, 3, 32, 32)],
)
def test_other_shapes_are_refused_and_the_right_one_is_named(server, shape):
    with pytest.raises(InvalidInputError, match=r"\[3, 32, 32\]|the model takes 3072"):
        server.predict(np.zeros(shape, np.float32))


def test_nan_and_infinity_inside_an_image_are_refused(server):
    bad = X.copy()
    bad[2, 1, 5, 7] = np.nan
    with pytest.raises(InvalidInputError, match="row 2, feature 1191 is nan"):
        server.predict(bad)


def test_tritonclient_sends_images_over_rest_and_grpc(endpoint):
    wanted = probabilities(made(NET), X)
    for kind, address in (
        (triton_http, endpoint.url.removeprefix("http://")),
        (triton_grpc, endpoint.grpc_url),
    ):
        client = kind.InferenceServerClient(address.removeprefix("grpc://"))
        for x in (X, X.reshape(5, -1)):
            tensor = kind.InferInput("features", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            found = client.infer("cifar", [tensor]).as_numpy("probabilities")
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        if kind is triton_http:
            assert client.get_model_metadata("cifar")["inputs"][0]["shape"] == [-1, *SHAPE]
            assert client.get_model_config("cifar")["input"][0]["dims"] == list(SHAPE)
        else:
            assert list(client.get_model_metadata("cifar").inputs[0].shape) == [-1, *SHAPE]
        client.close()
        client.close = lambda: None  # its __del__ closes again


def test_json_with_nested_and_with_flat_data(endpoint):
    wanted = probabilities(made(NET), X[:2])
    for data in (X[:2].tolist(), X[:2].ravel().tolist()):
        tensor = {"name": "features", "shape": [2, *SHAPE], "datatype": "FP32", "data": data}
        reply = httpx.post(f"{endpoint.url}/v2/models/cifar/infer", json={"inputs": [tensor]})
        outputs = {it["name"]: it["data"] for it in reply.json()["outputs"]}
        np.testing.assert_allclose(np.reshape(outputs["probabilities"], (2, 10)), wanted, atol=1e-5)


def test_our_own_client_sends_them_as_they_are(endpoint):
    wanted = probabilities(made(NET), X)
    grpc = endpoint.grpc_url if "://" in endpoint.grpc_url else f"grpc://{endpoint.grpc_url}"
    for url in (endpoint.url, grpc):
        with Client(url) as client:
            for x in (X, X.tolist(), X.reshape(5, -1)):
                np.testing.assert_allclose(
                    client.predict(x, model="cifar")["probabilities"], wanted, atol=1e-5
                )
            assert len(client.predict(X[0], model="cifar")["predictions"]) == 1


@pytest.mark.full
def test_exports_and_int8_take_images(tmp_path):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    with Registry(tmp_path) as registry:
        registry.publish(
            "cifar", made(NET), architecture=NET, preprocessing=CHANNELS, alias="default"
        )
        wanted = probabilities(made(NET), X)
        with contextlib.closing(ModelServer(registry=registry)) as server:
            for make, most in ((methods.to_onnx, 1e-5), (methods.quantise, 0.02)):
                version = make(registry, "cifar", samples=X).version
                manifest = registry.manifest("cifar", version)
                assert manifest.signature.input_shape == SHAPE and manifest.parameters[
                    "inputs"
                ] == [*SHAPE]
                found = server.predict(X, version=version, arrays=True)["probabilities"]
                assert np.abs(found - wanted).max() < most
            version = methods.quantise(registry, "cifar", 1, "static", X).version
            assert (
                np.abs(
                    server.predict(X, version=version, arrays=True)["probabilities"] - wanted
                ).max()
                < 0.05
            )


def test_personal_heads_and_a_device_take_images(tmp_path):
    x = np.random.default_rng(1).random((4, 1, 4, 4), dtype=np.float32)
    module = made(SPLIT)
    own = {"head.weight": torch.zeros(2, 12), "head.bias": torch.tensor([0.0, 5.0])}
    with Registry(tmp_path) as registry, contextlib.closing(ModelServer()) as server:
        registry.publish(
            "m", module, architecture=SPLIT, heads=HeadSet.from_states({"a": own}), alias="default"
        )
        server.serve(registry, "m")
        for rows in (x, x.reshape(4, 16)):
            answer = server.predict(rows, client="a")
            assert (answer["head"], answer["predictions"]) == ("own", [1] * 4)
    with EdgeModelServer(client="a") as edge:
        edge.update_global(module, architecture=SPLIT, head=own)
        assert edge.predict(x)["predictions"] == [1] * 4 and edge.predict(x[0])["head"] == "own"


def test_load_model_takes_a_module_of_images():
    with ModelServer() as server:
        with pytest.raises(InvalidModelError, match="input_shape"):
            server.load_model("v1", made(NET))
        server.load_model("v1", made(NET), feature_stats=CHANNELS, input_shape=SHAPE)
        answer = server.predict(X, arrays=True)
        np.testing.assert_allclose(answer["probabilities"], probabilities(made(NET), X), atol=1e-5)
        assert server.signature(("local", "v1")).input_shape == SHAPE


def test_a_federation_trains_images_from_flat_rows():
    source = np.random.default_rng(0)
    flat = source.random((24, 16), dtype=np.float32)
    labels = (flat.mean(axis=1) > 0.5).astype(np.int64)
    clients = [Samples(name, flat[:16], labels[:16], flat[16:], labels[16:]) for name in "ab"]
    run = train(rounds=1, clients=clients, architecture=SPLIT, progress=False)
    assert len(run.final.sample_counts) == 2


@pytest.mark.parametrize("shape", [SHAPE, (4,), (1, 64), (64, 1), (1, 1, 1), (2, 3, 4, 5)])
def test_no_request_can_be_read_in_two_ways(shape):
    """A row, rows, and both flat, lead to the same numbers in the same order."""
    size = int(np.prod(shape))
    rows = np.arange(2 * size, dtype=np.float32).reshape(2, *shape)
    check = Preprocessor(input_shape=shape)
    for form in (rows, rows.reshape(2, size)):
        assert check.validate(form).tolist() == rows.reshape(2, size).tolist()
    for form in (rows[0], rows[0].reshape(size), rows[:1]):
        assert check.validate(form).tolist() == rows[:1].reshape(1, size).tolist()
    assert tuple(check(rows).shape) == rows.shape


def test_shapes_that_are_none_are_refused():
    for shape in ((0,), (3, -1), (3.0, 2), "ab", 5):
        with pytest.raises(ConfigError, match="input_shape"):
            Preprocessor(input_shape=shape)
    with pytest.raises(ConfigError, match="num_features is 5"):
        Preprocessor(input_shape=(2, 2), num_features=5)
