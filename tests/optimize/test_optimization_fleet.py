"""Smaller versions away from home: to devices, over the network, where no runtime is installed, and
beside heads."""

import contextlib
import sys

import numpy as np
import pytest

from edge_cloud import CLIENTS, X, cloud, publish
from flserving import Registry, ServingConfig
from flserving.api.client import Client
from flserving.edge import EdgeModelServer, delta
from flserving.edge.sync import SyncAgent
from flserving.errors import InvalidModelError, NotSupportedError
from flserving.federated.data import Client as Holder
from flserving.lab.measuring import optimization as lab
from flserving.optimize import methods
from flserving.serving.loader import RegistrySource, load_engine
from flserving.serving.personalized import PersonalizedServer

MAKERS = {
    "prune": lambda registry, **options: methods.prune(
        registry, "m", 1, 0.5, structured=True, **options
    ),
    "onnx": lambda registry, **options: methods.to_onnx(registry, "m", 1, **options),
    "dynamic": lambda registry, **options: methods.quantise(registry, "m", 1, **options),
    "static": lambda registry, **options: methods.quantise(
        registry, "m", 1, "static", X, **options
    ),
    "distil": lambda registry, **options: methods.distil(
        registry, "m", X, 1, parameters={"sizes": [8, 4, 3]}, epochs=1, tolerance=1, **options
    ),
}


@pytest.fixture
def runtime():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@contextlib.contextmanager
def device(root, url, **options):
    with (
        Registry(root) as registry,
        EdgeModelServer(registry=registry) as edge,
        contextlib.closing(SyncAgent(url, "infer", registry, edge=edge, **options)) as agent,
    ):
        yield edge, agent


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("form", delta.FORMS)
def test_a_device_pulls_smaller_versions_and_answers_as_the_cloud_does(tmp_path, form):
    """From torch to ONNX, from graph to graph of another size, and back: no delta leads there, so
    all of it comes."""
    with (
        cloud(tmp_path / "cloud", 1) as (released, endpoint),
        Client(endpoint.url, "infer") as client,
        device(tmp_path / "edge", endpoint.url, form=form) as (edge, agent),
    ):
        agent.pull()
        for kind in ("onnx", "dynamic", "static", "prune"):
            made = MAKERS[kind](released, alias="default")
            assert agent.pull().version == made.version
            manifest = edge.registry.manifest("m", edge.registry.resolve("m"))
            assert manifest.architecture == ("mlp" if kind == "prune" else "onnx")
            assert "optimisation" in made.lineage.extra, (
                "what the cloud knows beyond that stays there"
            )
            assert manifest.lineage.extra.keys() == {
                "cloud_manifest",
                "cloud_version",
                "cloud_form",
            }
            mine, theirs = edge.predict(X)["probabilities"], client.predict(X)["probabilities"]
            # a graph is bytes: the form int8 leaves them alone
            if form == "exact" or kind != "prune":
                np.testing.assert_array_equal(np.float32(mine), np.float32(theirs))
            assert not agent.pull().changed


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_device_without_the_runtime_says_so_before_it_downloads_and_serves_on(
    tmp_path, monkeypatch, package
):
    with (
        cloud(tmp_path / "cloud", 1) as (released, endpoint),
        Client(endpoint.url, "infer") as client,
        device(tmp_path / "edge", endpoint.url) as (edge, agent),
    ):
        agent.pull()
        before = edge.predict(X)
        methods.to_onnx(released, "m", 1, alias="default")
        client.predict(X)  # the cloud has it loaded
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            for _ in range(2):
                with pytest.raises(
                    NotSupportedError, match=rf"{package} is not installed: pip install"
                ):
                    agent.pull()
                assert agent._cloud.nbytes.keys() == {"release", "manifest"}, (
                    "no weights on every attempt"
                )
            after = edge.predict(X)
            kept = ("probabilities", "model_version", "round")
            assert [after[key] for key in kept] == [before[key] for key in kept]
        assert agent.pull().version == 2, "installed: the next pull brings it"


@pytest.mark.usefixtures("runtime")
def test_rest_and_grpc_answer_with_them(tmp_path):
    with cloud(tmp_path / "cloud", 1, grpc_port=0) as (released, endpoint):
        made = MAKERS["static"](released, alias="default")
        engine = load_engine(RegistrySource(released, "m"), str(made.version), ServingConfig())
        wanted = engine.predict(X)["probabilities"]
        for url in (endpoint.url, f"grpc://{endpoint.grpc_url}"):
            with Client(url, "infer") as client:
                answer = client.predict(X)
            np.testing.assert_array_equal(np.float32(answer["probabilities"]), np.float32(wanted))
            assert answer["model_version"] == str(made.version)


@pytest.mark.parametrize("kind", MAKERS)
def test_heads_are_never_left_behind_in_silence(tmp_path, request, kind):
    if kind not in ("prune", "distil"):
        request.getfixturevalue("runtime")
    with Registry(tmp_path) as registry:
        publish(registry, 1, with_heads=True)
        with pytest.raises(
            InvalidModelError,
            match="has 2 personal heads, which fit no other body: pass heads=None",
        ):
            MAKERS[kind](registry)
        assert registry.version_numbers("m") == [1]
        made = MAKERS[kind](registry, heads=None, alias="default")
        assert made.heads is None and made.lineage.parent_version == 1
        with PersonalizedServer(registry=registry, model="m") as server:
            assert [server.predict("c-1", X, it)["head"] for it in (1, 2)] == ["own", "none"]


def test_the_report_judges_clients_as_they_are_answered(tmp_path):
    """Labels are what each client's own head says: what goes without heads loses, and the report
    tells."""
    rows = np.random.default_rng(1).standard_normal((200, 8), dtype=np.float32)
    with Registry(tmp_path) as registry:
        publish(registry, 1, with_heads=True)
        with PersonalizedServer(registry=registry, model="m") as server:
            said = {it: np.array(server.predict(it, rows)["predictions"]) for it in CLIENTS}
            generic = np.array(server.predict("stranger", rows)["predictions"])
        clients = [Holder(it, rows, labels, rows, labels) for it, labels in said.items()]
        clients.append(Holder("stranger", rows, generic, rows, generic))
        made = methods.prune(registry, "m", 1, 0.01, heads=None)
        frame = lab.report(registry, "m", [1, made.version], clients, memory=False, turns=2, each=2)
    assert frame.accuracy[1] == frame.worst_client[1] == 1
    worst = min((labels == generic).mean() for labels in said.values())
    assert frame.worst_client[2] == pytest.approx(worst, abs=0.05) and frame.worst_client[2] < 0.8
    lost = frame.accuracy[2] - 1
    assert frame.points[2] == pytest.approx(100 * lost, abs=0.1) and lost < -0.1
    assert 0 < frame.noise_points[2] < -frame.points[2], "more than chance"
