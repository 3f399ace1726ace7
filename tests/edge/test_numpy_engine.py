"""The engine without torch: torch's answers are the oracle, and a process that refuses torch is the
proof."""

import re
import sys
from contextlib import closing

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_edge_process import device
from torch import nn

from budget import examples
from edge_cloud import X, cloud, publish, state
from flserving import EdgeModelServer, ModelServer, Registry, ServingConfig, models
from flserving.edge import delta
from flserving.edge.sync import SyncAgent
from flserving.errors import ConfigError, InvalidModelError, NotSupportedError
from flserving.models import weights
from flserving.models.plain import Blueprint
from flserving.registry.heads import LAYOUTS, HeadSet
from flserving.serving.loader import RegistrySource, load_engine
from serving_models import wait_until

NUMPY = ServingConfig(engine="numpy", warmup_samples=1)
TORCH = ServingConfig(warmup_samples=1)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def normalised():
    module = nn.Sequential(
        nn.BatchNorm1d(8), nn.Linear(8, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU(), nn.Dropout(0.3),
        nn.Identity(), nn.Linear(32, 5, bias=False),
    )  # fmt: skip
    for _ in range(20):  # statistics as a training leaves them
        module(torch.randn(64, 8) * 3 + 1)
    return module.eval()


MODELS = {
    "a linear model": ("mlp", {"sizes": [8, 3]}, lambda: models.mlp([8, 3])),
    "the tutorial's": ("tutorial_mlp", {}, models.tutorial_mlp),
    "the digits'": ("digits_mlp", {}, models.digits_mlp),
    "three wide layers": (
        "mlp",
        {"sizes": [784, 512, 512, 10]},
        lambda: models.mlp([784, 512, 512, 10]),
    ),
    "normalised": (None, None, normalised),
}


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def put(registry, kind, **options):
    architecture, parameters, make = MODELS[kind]
    registry.publish(
        "m", make(), architecture=architecture, parameters=parameters, alias="default", **options
    )
    return registry.manifest("m", 1).signature.input_shape[0]


def engines(registry):
    return [
        load_engine(RegistrySource(registry, "m", engine=it.engine), "1", it)
        for it in (NUMPY, TORCH)
    ]


# The same answers


@pytest.mark.parametrize("kind", MODELS)
def test_a_hundred_thousand_rows_are_answered_as_torch_answers_them(registry, kind):
    """Probabilities to 1e-5; classes too, where no second class is as near as that."""
    width = put(registry, kind)
    ours, theirs = engines(registry)
    rng = np.random.default_rng(0)
    for _ in range(10):
        rows = rng.standard_normal((10_000, width), dtype=np.float32) * rng.choice([0.1, 1, 5])
        got, wanted = (
            engine.execute([rows.astype(np.float32)])[0].arrays() for engine in (ours, theirs)
        )
        for name in ("probabilities", "confidences"):
            np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5)
            assert got[name].dtype == np.float32
        first, second = np.sort(wanted["probabilities"])[:, :-3:-1].T
        clear = first - second > 2e-5
        assert clear.mean() > 0.9 and (got["predictions"] == wanted["predictions"])[clear].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_personal_heads_answer_as_on_torch(registry, layout):
    shape = {"head": (25, 3), "additive": (25, 3), "adapter": (4, 3)}[layout]
    numbers = np.random.default_rng(1).standard_normal((2, *shape), dtype=np.float32)
    publish_with = {"architecture": "mlp", "parameters": {"sizes": [8, 24, 3]}, "alias": "default"}
    registry.publish(
        "m", models.mlp([8, 24, 3]), heads=HeadSet(layout, ["c-1", "c-2"], numbers), **publish_with
    )
    rows = np.random.default_rng(2).standard_normal((200, 8), dtype=np.float32)
    clients = ["c-1", "c-2", "nobody", "c-1"] * 50
    with ModelServer(NUMPY, registry) as ours, ModelServer(TORCH, registry) as theirs:
        got, wanted = (
            server.predict(rows, client=clients, arrays=True) for server in (ours, theirs)
        )
        assert got["head"] == wanted["head"] and got["head"][:3] == ["own", "own", "unknown"]
        np.testing.assert_allclose(got["probabilities"], wanted["probabilities"], rtol=0, atol=1e-5)
        alone = [
            ours.predict(row, client=client)["probabilities"][0]
            for row, client in zip(rows, clients, strict=True)
        ]
        np.testing.assert_allclose(
            alone, got["probabilities"], rtol=0, atol=1e-6, err_msg="a row in other company"
        )


@pytest.mark.parametrize("kind", ["the digits'", "three wide layers", "normalised"])
def test_a_row_alone_is_answered_as_in_a_batch(registry, kind):
    width = put(registry, kind, preprocessing=None)
    engine = engines(registry)[0]
    rows = np.random.default_rng(0).standard_normal((64, width), dtype=np.float32)
    before = rows.copy()
    together = engine.execute([rows])[0].arrays()["probabilities"]
    alone = np.concatenate(
        [engine.execute([row[None]])[0].arrays()["probabilities"] for row in rows]
    )
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)
    assert np.array_equal(rows, before), "the caller's rows are not written to"


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (1e6, 0.1), (-3e-5, 1e-6)])
def test_rows_far_from_zero_are_normalised_as_torch_does(mean, std):
    """A height above the sea, a time: what is rounded differently there is a large part of the
    outcome."""
    layer = nn.BatchNorm1d(8).eval()
    layer.running_mean.normal_().mul_(std).add_(mean)
    layer.running_var.uniform_().mul_(std**2)
    layer.weight.data.uniform_(-2, 2)
    layer.bias.data.normal_()
    rows = (torch.randn(1000, 8) * std + mean).float()
    plan = Blueprint("sequential", {"layers": [{"layer": "BatchNorm1d", "num_features": 8}]})
    got = plan.restore({f"0.{name}": tensor for name, tensor in layer.state_dict().items()})(
        rows.numpy()
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, layer(rows).detach(), rtol=0, atol=1e-5)


def test_statistics_regression_and_outputs_that_are_not_finite(registry):
    module = nn.Sequential(nn.Linear(3, 2))
    statistics = {"mean": [1.0, 2.0, 3.0], "std": [2.0, 0.0, 1e-10]}
    registry.publish("m", module, preprocessing=statistics, output_type="regression")
    rows = np.array([[1, 2, 3], [4, 5, 3.0000001]], np.float32)
    ours, theirs = engines(registry)
    np.testing.assert_allclose(
        ours.predict(rows)["predictions"], theirs.predict(rows)["predictions"], rtol=1e-5
    )
    for engine in (ours, theirs):
        with pytest.raises(
            Exception, match="output is not finite: check its weights and the input's scale"
        ):
            engine.predict([[0, 0, 3e38]])


# The same tensors

LAYERS = st.one_of(
    st.builds(lambda bias: ("Linear", {"bias": bias}), st.booleans()),
    st.builds(
        lambda affine, eps: ("BatchNorm1d", {"affine": affine, "eps": eps}),
        st.booleans(),
        st.floats(1e-7, 0.1),
    ),
    st.sampled_from([("ReLU", {}), ("Identity", {}), ("Dropout", {"p": 0.25})]),
)


@examples(60)
@given(st.lists(st.tuples(LAYERS, st.integers(1, 9)), max_size=6), st.integers(1, 9))
def test_any_chain_of_these_layers_has_the_tensors_and_the_outputs_of_torchs_module(chosen, width):
    layers = [{"layer": "Linear", "in_features": width, "out_features": width, "bias": True}]
    for (kind, arguments), out in chosen:
        if kind == "Linear":
            layers.append({"layer": kind, "in_features": width, "out_features": out} | arguments)
            width = out
        elif kind == "BatchNorm1d":
            layers.append({"layer": kind, "num_features": width} | arguments)
        else:
            layers.append({"layer": kind} | arguments)
    plan, torchs = (
        models.blueprint(it, "sequential", {"layers": layers}) for it in ("numpy", "torch")
    )
    assert list(map(weights.kind, plan.like.values())) == list(
        map(weights.kind, torchs.like.values())
    )
    assert list(plan.like) == list(torchs.like) and plan.shapes == torchs.shapes
    module = models.build("sequential", {"layers": layers}).eval()
    for buffer in module.buffers():
        if buffer.ndim:
            buffer.uniform_(0.5, 2)
    rows = torch.randn(5, plan.shapes[0][0])
    got = plan.restore(module.state_dict())(rows.numpy().copy())
    torch.testing.assert_close(torch.from_numpy(got), module(rows).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", delta.FORMS)
def test_deltas_of_arrays_are_those_of_tensors_bit_for_bit(form):
    before, after = state(1), state(2)
    arrays = [
        {name: tensor.numpy() for name, tensor in tensors.items()} for tensors in (before, after)
    ]
    made = delta.encode(after, before, form)
    assert delta.encode(*arrays[::-1], form) == made
    start = delta.quantised(arrays[0]) if form == "int8" else arrays[0]
    got = delta.apply(
        made, start, models.blueprint("numpy", "mlp", {"sizes": [8, 24, 3]}).like, form
    )
    assert weights.digest(got) == weights.digest(
        delta.quantised(after) if form == "int8" else after
    )
    assert all(isinstance(it, np.ndarray) for it in got.values())
    assert weights.pack(arrays[1]) == weights.pack(after) and weights.digest(
        arrays[1]
    ) == weights.digest(after)


# What NumPy cannot run


def linear(**other):
    return {"layer": "Linear", "in_features": 8, "out_features": 3} | other


REFUSED = {
    "a convolution": ("digits_cnn", {}, NotSupportedError, "'digits_cnn' needs torch.*runs mlp, tutorial_mlp.*Linear"),
    "a graph": ("onnx", {"inputs": 8, "outputs": 3, "nbytes": 99}, NotSupportedError, "'onnx' needs torch"),
    "of another's": ("wide_mlp", {}, NotSupportedError, "'wide_mlp' needs torch.*engine torch"),
    "a layer": ("sequential", {"layers": [linear(), {"layer": "GELU"}]}, NotSupportedError, "layer 'GELU' needs torch"),
    "no layers": ("sequential", {"layers": []}, InvalidModelError, "has layers of widths"),
    "no list": ("sequential", {"layers": 3}, InvalidModelError, "does not accept"),
    "no name": ("sequential", {"layers": [{}]}, InvalidModelError, "does not accept"),
    "an argument": ("sequential", {"layers": [linear(pickle=1)]}, InvalidModelError, "does not accept"),
    "a gap": ("sequential", {"layers": [linear(), linear()]}, InvalidModelError, r"widths \[8, 3, 8, 3\]"),
    "a width": ("sequential", {"layers": [linear(out_features=-3)]}, InvalidModelError, "widths|accept"),
    "a huge one": ("sequential", {"layers": [linear(out_features=1 << 40)]}, InvalidModelError, "widths"),
    "too many": ("sequential", {"layers": [linear(), *[{"layer": "ReLU"}] * 99]}, InvalidModelError, "widths"),
    "text": ("sequential", {"layers": [linear(in_features="8")]}, InvalidModelError, "widths|accept"),
    "eps": (
        "sequential",
        {"layers": [linear(), {"layer": "BatchNorm1d", "num_features": 3, "eps": "x"}]}, InvalidModelError, "accept",
    ),
    "no statistics": (
        "sequential",
        {"layers": [linear(), {"layer": "BatchNorm1d", "num_features": 3, "track_running_stats": False}]},
        InvalidModelError, "lets rows see each other",
    ),
    "sizes": ("mlp", {"sizes": [8]}, InvalidModelError, "sizes of an mlp"),
    "a name": ("mlp", {"width": 8}, InvalidModelError, "does not accept"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_numpy_cannot_run_is_refused_with_what_it_can(what):
    architecture, parameters, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        Blueprint(architecture, parameters)


@pytest.mark.parametrize(
    "tensors", [{}, {"head.weight": np.zeros((3, 8), np.float32)}, {"head.weight": np.zeros(3)}]
)
def test_weights_that_do_not_fit_are_refused(tensors):
    with pytest.raises(RuntimeError):
        Blueprint("mlp", {"sizes": [8, 3]}).restore(tensors)


def gelu():
    return nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 3))


def test_a_version_that_numpy_cannot_run_is_refused_at_the_pull_and_nothing_is_swapped(tmp_path):
    """Before its weights are downloaded; the model before serves on."""
    with (
        cloud(tmp_path / "cloud", 1, with_heads=True) as (released, endpoint),
        Registry(tmp_path / "edge") as registry,
        EdgeModelServer(config=NUMPY, registry=registry, model="m", client="c-1") as edge,
        closing(SyncAgent(endpoint.url, "c-1", registry, edge=edge, client="c-1")) as agent,
    ):
        agent.pull()
        before = edge.predict(X)
        assert (before["round"], before["head"]) == (1, "own")
        released.publish("m", gelu(), alias="default", lineage={"round": 2})
        with pytest.raises(
            NotSupportedError, match=r"'GELU' needs torch\. NumPy runs mlp.*engine torch"
        ):
            agent.pull()
        assert set(agent._cloud.nbytes) == {"release", "manifest"}, (
            "neither weights nor a delta were asked for"
        )
        assert registry.version_numbers("m") == [1]
        assert edge.predict(X)["probabilities"] == before["probabilities"]
        publish(released, 3, with_heads=True)
        assert agent.pull().round == edge.predict(X)["round"] == 3


def test_a_device_that_holds_what_numpy_cannot_run_does_not_start(tmp_path):
    with Registry(tmp_path) as registry:
        with EdgeModelServer(gelu(), registry=registry):
            pass
        with pytest.raises(NotSupportedError, match=r"'GELU' needs torch.*engine torch"):
            EdgeModelServer(config=NUMPY, registry=registry)
        with EdgeModelServer(registry=registry) as edge:
            assert edge.predict(X)["predictions"]


def test_modules_are_for_torch(registry):
    with (
        ModelServer(NUMPY) as server,
        pytest.raises(NotSupportedError, match="load_model takes modules of torch"),
    ):
        server.load_model("v1", gelu())
    with pytest.raises(ConfigError, match="engine is 'jax': choose one of torch, numpy"):
        ServingConfig(engine="jax")


@pytest.mark.parametrize("layout", ["head", "additive"])
def test_a_device_takes_a_head_and_a_model_of_its_own(tmp_path, layout):
    own = {"head.weight": np.ones((3, 24), np.float32), "head.bias": np.arange(3, dtype=np.float32)}
    arrays = {name: tensor.numpy() for name, tensor in state(1).items()}
    with (
        Registry(tmp_path) as registry,
        EdgeModelServer(config=NUMPY, registry=registry, client="c-1") as edge,
    ):
        edge.update_global(arrays, architecture="mlp", parameters={"sizes": [8, 24, 3]}, round=1)
        edge.update_local(own, layout=layout)
        assert edge.predict(X)["head"] == "own"
        edge.update_local({name: 2 * array for name, array in arrays.items()})
        assert edge.predict(X)["model_type"] == "personal"
        bad = arrays | {"head.bias": np.full(3, np.nan, np.float32)}
        with pytest.raises(InvalidModelError, match=r"head\.bias holds NaN"):
            edge.update_global(bad, round=2)
        with pytest.raises(
            InvalidModelError,
            match=r"do not fit 'mlp'.*head.bias is float32\[2\], not float32\[3\]",
        ):
            edge.update_global(arrays | {"head.bias": np.zeros(2, np.float32)}, round=2)


# A process without torch

NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "rich"):
            raise ImportError(f"this process must not import {name}")
sys.meta_path.insert(0, NoTorch())
"""
"""A device has what flserving needs. rich is not: httpx loads it for its own command where others
brought it."""


@pytest.mark.parametrize("form", delta.FORMS)
def test_the_command_serves_pulls_and_personalises_without_torch_in_90_mb(tmp_path, form):
    """``flserving edge --engine numpy`` where an import of torch fails: first weights, then a delta
    to them."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_TORCH)
    path = ":".join([str(tmp_path / "hook"), *filter(None, sys.path)])
    options = ("--engine", "numpy", "--form", form)
    with (
        cloud(tmp_path / "cloud", 1, with_heads=True) as (released, endpoint),
        device(tmp_path / "edge", endpoint.url, *options, PYTHONPATH=path) as (running, client),
    ):
        wait_until(lambda: running.round(client) == 1)
        publish(released, 2, with_heads=True)
        wait_until(lambda: running.round(client) == 2)
        answer = client.predict(X)
        assert (answer["path"], answer["head"], answer["model_type"]) == (
            "local",
            "own",
            "personal",
        )
        with ModelServer(TORCH, released) as server:
            wanted = server.predict(X, client="c-1")["probabilities"]
        np.testing.assert_allclose(
            answer["probabilities"], wanted, atol=1e-5 if form == "exact" else 0.1
        )
        assert psutil.Process(running.process.pid).memory_info().rss < 90e6
        released.publish("m", gelu(), alias="default", lineage={"round": 3})
        line = re.compile(r"flserving: no update \(the layer 'GELU' needs torch\. NumPy runs mlp")
        said = iter(running.process.stderr.readline, "")
        assert any(line.match(text) for text in said)
        assert running.round(client) == 2, "the model before serves on"
        assert running.end() == 0


def test_the_hook_of_the_test_above_refuses_torch(tmp_path):
    """With the engine torch the same command says so: the test above can fail."""
    import os
    import subprocess

    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    command = [sys.executable, "-m", "flserving", "edge", "--cloud", "http://127.0.0.1:9", "--client", "c-1",
               "--directory", str(tmp_path / "edge")]  # fmt: skip
    path = ":".join([str(tmp_path), *filter(None, sys.path)])
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}
    )
    assert ended.returncode == 1 and "must not import torch" in ended.stderr


THREADS_AT_EXIT = """
import atexit
@atexit.register
def tell():
    import threadpoolctl
    print([pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "openblas"])
"""


@pytest.mark.parametrize(
    ("wanted", "threads"), [(None, 1), ("2", 2)], ids=["by itself", "as the environment says"]
)
def test_a_device_multiplies_on_one_core(wanted, threads, tmp_path):
    """The device has other work to do; a variable that is set already is left alone."""
    import os
    import subprocess

    (tmp_path / "sitecustomize.py").write_text(THREADS_AT_EXIT)
    (tmp_path / "ca.pem").write_text("no certificate")
    command = [
        sys.executable,
        "-m",
        "flserving",
        "edge",
        "--cloud",
        "https://127.0.0.1:9",
        "--client",
        "c-1",
        "--engine",
        "numpy",
        "--directory",
        str(tmp_path / "edge"),
        "--ca",
        str(tmp_path / "ca.pem"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    environment["PYTHONPATH"] = ":".join([str(tmp_path), *filter(None, sys.path)])
    if wanted is not None:
        environment["OPENBLAS_NUM_THREADS"] = wanted
    environment.pop("OMP_NUM_THREADS", None)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "no PEM certificate" in ended.stderr, "it ends where it has loaded all but its cloud"
    assert ended.stdout.splitlines()[-1] == str([threads])
