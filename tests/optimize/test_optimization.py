"""Smaller versions: what they keep, what they answer, and which graphs never run."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from flserving import ModelServer, Registry, ServingConfig, models
from flserving.edge import EdgeModelServer
from flserving.errors import ConfigError, CorruptArtifactError, InvalidModelError, NotSupportedError
from flserving.federated import train
from flserving.federated.rounds import publish_rounds
from flserving.models import onnx as backends
from flserving.optimize import methods
from flserving.serving.engine import InferenceEngine
from flserving.serving.loader import RegistrySource, load_engine

SLOPPY = "test_optimization_sloppy"


@models.register(SLOPPY, input_shape=(64,), output_shape=(10,))
class Sloppy(nn.Module):
    """Its forward leaves torch: nothing that a graph can hold. And it has no linear layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x):
        return torch.from_numpy(np.sort(x.numpy(), axis=1))[:, :10] * self.scale


@pytest.fixture(scope="module")
def run():
    return train(rounds=5, num_clients=10, alpha=1.0, progress=False)


@pytest.fixture
def registry(tmp_path, run):
    with Registry(tmp_path) as registry:
        publish_rounds(registry, "digits")(run.final)
        yield registry


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run):
    """Version 2 is the export of version 1; then one a method of quantisation."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with Registry(tmp_path_factory.mktemp("exported")) as registry:
        publish_rounds(registry, "digits")(run.final)
        methods.to_onnx(registry, "digits", 1)
        for method in methods.METHODS:
            data = run.clients if method == "static" else None
            methods.quantise(registry, "digits", 2, method, data)
        yield registry


def rows_and_labels(run):
    clients = run.clients
    return np.concatenate([c.test_x for c in clients]), np.concatenate([c.test_y for c in clients])


def answers(registry, version, rows, key="predictions"):
    engine = load_engine(RegistrySource(registry, "digits"), str(version), ServingConfig())
    return np.array(engine.predict(rows)[key])


def test_an_export_answers_as_torch_does(exported, run):
    rows, _ = rows_and_labels(run)
    parent, export = (answers(exported, version, rows, "probabilities") for version in (1, 2))
    assert np.abs(parent - export).max() <= 1e-5
    manifest = exported.manifest("digits", 2)
    assert manifest.architecture == "onnx" and manifest.lineage.parent_version == 1
    assert (manifest.lineage.extra["optimisation"], manifest.lineage.round) == ("onnx", 5)
    assert manifest.preprocessing == exported.manifest("digits", 1).preprocessing


@pytest.mark.parametrize(
    ("version", "share", "size"), [(3, 0.98, 0.5), (4, 0.97, 0.6), (5, 0.95, 0.4)]
)
def test_few_bits_agree_with_the_parent(exported, run, version, share, size):
    """dynamic, static, int4: the stated shares of held-out digits get the parent's class, from a
    smaller file."""
    rows, _ = rows_and_labels(run)
    assert np.mean(answers(exported, 1, rows) == answers(exported, version, rows)) >= share
    manifests = [exported.manifest("digits", number) for number in (1, version)]
    assert manifests[1].weights_nbytes < size * manifests[0].weights_nbytes
    assert manifests[1].lineage.extra["optimisation"].startswith("quantised")


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_nobody_elses_row_changes_an_answer(exported, run, version):
    """Scaled over the batch, the large row would crush the others."""
    rows = rows_and_labels(run)[0][:8]
    loud = np.concatenate([rows, rows[:1] * 1e4])
    alone = np.concatenate([answers(exported, version, row, "probabilities") for row in rows])
    np.testing.assert_allclose(
        answers(exported, version, loud, "probabilities")[:8], alone, atol=1e-5
    )


def test_no_two_versions_share_an_identity_and_exports_are_reproducible(exported, registry):
    source = RegistrySource(exported, "digits")
    identities = {load_engine(source, str(n), ServingConfig()).identity for n in range(1, 6)}
    assert len(identities) == 5
    again = methods.to_onnx(registry, "digits", 1)
    assert again.digests.weights == exported.manifest("digits", 2).digests.weights
    graph = bytes(registry.read("digits", again.version).tensors["graph"].numpy())
    assert b".py" not in graph and b"flserving" not in graph, (
        "paths of the machine that exported it"
    )


def test_server_and_device_serve_them_unchanged(exported, run):
    row = rows_and_labels(run)[0][0]
    with ModelServer() as server:
        server.serve(exported, "digits")
        wanted = server.predict(row, version="1")["predictions"]
        for version in "2345":
            answer = server.predict(row, version=version)
            assert (answer["predictions"], answer["model_version"]) == (wanted, version)
    parts = RegistrySource(exported, "digits").parts("3")
    # works on a copy, with a session of its own
    engine = InferenceEngine(parts.module, parts.preprocessor)
    assert (
        engine.predict(row)["predictions"] == wanted
        and engine.model._session is not parts.module._session
    )
    artifact = exported.read("digits", 3)
    kept = ("architecture", "parameters", "preprocessing")
    with EdgeModelServer() as edge:
        edge.update_global(
            artifact.tensors, round=5, **{name: getattr(artifact.manifest, name) for name in kept}
        )
        assert edge.predict(row)["predictions"] == wanted


def test_a_convolution_is_exported_and_calibrated(registry, run):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    registry.publish("digits", models.build("digits_cnn"), architecture="digits_cnn")
    rows = rows_and_labels(run)[0] / 16
    made = methods.quantise(registry, "digits", 2, "static", rows)
    parent, small = (
        answers(registry, version, rows, "probabilities") for version in (2, made.version)
    )
    assert np.abs(parent - small).max() < 0.02, "untrained: classes would be decided by a hair"


def test_pruning_leaves_zeros_and_the_recovery_keeps_them(registry, run):
    for data in (None, run.clients):
        made = methods.prune(registry, "digits", 1, 0.8, data=data, epochs=2)
        tensors = registry.read("digits", made.version).tensors
        weights = torch.cat([t.flatten() for name, t in tensors.items() if name.endswith("weight")])
        assert (weights == 0).float().mean() == pytest.approx(0.8, abs=1e-3)
        assert made.architecture == "digits_mlp" and made.lineage.extra["optimisation_share"] == 0.8
    whole = registry.read("digits", 1).tensors
    pruned = registry.read("digits", 2).tensors
    kept = [abs(whole[n])[pruned[n] != 0].min() for n in whole if n.endswith("weight")]
    gone = [abs(whole[n])[pruned[n] == 0].max() for n in whole if n.endswith("weight")]
    assert min(kept) >= max(gone), "the smallest magnitudes of all layers together go"


def test_structured_pruning_gives_a_smaller_mlp_without_the_weakest_neurons(registry):
    state = {k: v.clone() for k, v in registry.read("digits", 1).tensors.items()}
    dead = [3, 17, 40]
    state["head.weight"][:, dead] = 0  # nobody listens to them: without them nothing changes
    registry.publish("digits", state, architecture="digits_mlp")
    made = methods.prune(registry, "digits", 2, 3 / 64, structured=True)
    assert (made.architecture, made.parameters) == ("mlp", {"sizes": [64, 61, 10]})
    rows = np.random.default_rng(0).standard_normal((50, 64), dtype=np.float32)
    parent, small = (
        answers(registry, version, rows, "probabilities") for version in (2, made.version)
    )
    np.testing.assert_allclose(parent, small, atol=1e-6)
    assert made.weights_nbytes < registry.manifest("digits", 2).weights_nbytes


@pytest.mark.parametrize("federated", [False, True])
def test_a_student_learns_from_its_teacher_alone(registry, run, federated):
    rows, _ = rows_and_labels(run)
    data = run.clients if federated else np.concatenate([c.train_x for c in run.clients])
    how = {"rounds": 8, "epochs": 5} if federated else {"epochs": 20}
    made = methods.distil(registry, "digits", data, 1, parameters={"sizes": [64, 16, 10]}, **how)
    assert np.mean(answers(registry, 1, rows) == answers(registry, made.version, rows)) > 0.85
    again = methods.distil(registry, "digits", data, 1, parameters={"sizes": [64, 16, 10]}, **how)
    assert again.digests.weights == made.digests.weights, "same seed, same student"
    assert again.lineage.extra["optimisation"] == "distilled"


def test_what_a_technique_cannot_do_is_told_and_publishes_nothing(registry, run):
    registry.publish("digits", Sloppy(), architecture=SLOPPY)
    registry.publish("digits", models.build("digits_cnn"), architecture="digits_cnn")
    registry.publish(
        "digits", models.build("digits_mlp"), architecture="digits_mlp", output_type="regression"
    )
    small = {"parameters": {"sizes": [64, 16, 10]}}
    for error, message, call in [
        (InvalidModelError, "no linear or conv", lambda: methods.prune(registry, "digits", 2)),
        (InvalidModelError, "no mlp", lambda: methods.prune(registry, "digits", 3, structured=True)),
        (InvalidModelError, "no classifier", lambda: methods.distil(registry, "digits", run.clients, 4, **small)),
        (InvalidModelError, "does not", lambda: methods.distil(
            registry, "digits", run.clients, 1, parameters={"sizes": [64, 16, 9]})),
        (ConfigError, "share", lambda: methods.prune(registry, "digits", 1, 1.0)),
        (ConfigError, "static", lambda: methods.quantise(registry, "digits", 1, "static")),
        (ConfigError, "method", lambda: methods.quantise(registry, "digits", 1, "int2")),
        (ConfigError, "labels", lambda: methods.distil(
            registry, "digits", run.clients[0].train_x, 1, label_share=0.5, **small)),
        (ConfigError, "temperature 0", lambda: methods.distil(
            registry, "digits", run.clients, 1, temperature=0, **small)),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert len(registry.version_numbers("digits")) == 4


def test_a_forward_that_asks_for_values_is_not_exported(registry):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    registry.publish("digits", Sloppy(), architecture=SLOPPY)
    with pytest.raises(InvalidModelError, match="cannot be exported"):
        methods.to_onnx(registry, "digits", 2)


def test_without_the_extra_the_way_out_is_named(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        NotSupportedError, match=r'onnx is not installed: pip install "flserving\[onnx\]"'
    ):
        methods.to_onnx(registry, "digits", 1)


def graph(onnx, nodes, weights=(), inputs=4, outputs=4, **model):
    make, rows = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    body = onnx.helper.make_graph(
        nodes,
        "g",
        [make("x", rows, ["n", inputs])],
        [make("y", rows, ["n", outputs])],
        list(weights),
    )
    return onnx.helper.make_model(
        body, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10, **model
    )


def hostile():
    """(name, what the message says, the file) of graphs that must not run."""
    onnx = pytest.importorskip("onnx")
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    eye = array(np.eye(4, dtype=np.float32), "w")
    outside = array(np.eye(4, dtype=np.float32), "w")
    onnx.external_data_helper.set_external_data(outside, "/etc/passwd")
    outside.ClearField("raw_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    holed = array(np.full((4, 4), np.nan, np.float32), "w")
    wide = array(np.array([1 << 30], np.int64), "w")
    column, flat = array(np.array([-1, 1], np.int64), "c"), array(np.array([1, -1], np.int64), "f")
    loop = onnx.helper.make_graph([node("Relu", ["x"], ["y"])], "b", [], [])
    squared = [
        node("Reshape", ["x", "c"], ["a"]),
        node("Reshape", ["x", "f"], ["b"]),
        node("MatMul", ["a", "b"], ["m"]),
    ]
    function = onnx.helper.make_function(
        "evil", "f", ["a"], ["b"], [node("Relu", ["a"], ["b"])], []
    )
    good = graph(onnx, [node("MatMul", ["x", "w"], ["y"])], [eye])
    yield "sound", None, good
    yield "not a graph", "not a sound ONNX graph", b"\x80\x04pickle"
    yield "empty", "not a sound ONNX graph", b"\0" * 64
    yield "cut short", "not a sound ONNX graph", good.SerializeToString()[:-7]
    yield (
        "a file beside it",
        "another file",
        graph(onnx, [node("MatMul", ["x", "w"], ["y"])], [outside]),
    )
    yield "not finite", "not finite", graph(onnx, [node("MatMul", ["x", "w"], ["y"])], [holed])
    yield (
        "unknown operator",
        "not listed",
        graph(onnx, [node("Shell", ["x"], ["y"], domain="evil")]),
    )
    yield "noise", "not listed", graph(onnx, [node("Dropout", ["x"], ["y"])])
    yield (
        "across rows",
        "not listed",
        graph(onnx, [node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])]),
    )
    yield "a graph inside", "attribute", graph(onnx, [node("Relu", ["x"], ["y"], body=loop)])
    yield (
        "functions",
        "has functions",
        graph(onnx, [node("Relu", ["x"], ["y"])], functions=[function]),
    )
    pad, total = node("Pad", ["x", "p"], ["big"]), node("ReduceSum", ["big"], ["s"], keepdims=1)
    most = array(np.array([0, 0, 0, 1 << 30], np.int64), "p")
    yield (
        "a bomb",
        "values for one row",
        graph(onnx, [pad, total, node("Add", ["x", "s"], ["y"])], [most]),
    )
    yield (
        "squares of the rows",
        "proportion",
        graph(
            onnx,
            [*squared, node("ReduceSum", ["m"], ["s"], keepdims=1), node("Add", ["x", "s"], ["y"])],
            [column, flat],
        ),
    )
    yield (
        "other widths",
        "must map float32",
        graph(onnx, [node("Relu", ["x"], ["y"])], inputs=5, outputs=5),
    )
    yield (
        "a product that does not fit",
        "not a sound",
        graph(onnx, [node("MatMul", ["x", "w"], ["y"])], [wide]),
    )


def test_hostile_graphs_are_refused_before_and_after_the_disk(tmp_path):
    pytest.importorskip("onnxruntime")
    with Registry(tmp_path) as registry:
        for name, message, content in hostile():
            data = content if isinstance(content, bytes) else content.SerializeToString()
            state = {"graph": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
            parameters = {"inputs": 4, "outputs": 4, "nbytes": len(data)}
            if message is None:
                registry.publish("g", state, architecture="onnx", parameters=parameters)
                continue
            with pytest.raises(InvalidModelError, match=message):
                registry.publish("g", state, architecture="onnx", parameters=parameters)
                pytest.fail(f"published: {name}")
            module = models.build("onnx", parameters)
            with pytest.raises(RuntimeError, match=message):
                module.load_state_dict(state, assign=True)
        assert registry.version_numbers("g") == [1]
        with pytest.raises(InvalidModelError, match=r"values: the most is"):
            models.build("onnx", {"inputs": 4, "outputs": 4, "nbytes": 1 << 40})


def test_a_graph_that_was_changed_on_disk_is_not_loaded(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    name, _, content = next(hostile())
    data = content.SerializeToString()
    state = {"graph": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
    with Registry(tmp_path) as registry:
        parameters = {"inputs": 4, "outputs": 4, "nbytes": len(data)}
        registry.publish(name, state, architecture="onnx", parameters=parameters)
        rows = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
        engine = load_engine(RegistrySource(registry, name), "1", ServingConfig(warmup_samples=0))
        assert (
            np.array(engine.predict(rows)["predictions"]).tolist() == rows.argmax(axis=1).tolist()
        )
        assert engine.nbytes == 2 * len(data)
        monkeypatch.setattr(backends, "_MOST_VALUES", 1)  # as if it had come past an older check
        with pytest.raises(CorruptArtifactError, match="values for one row"):
            load_engine(RegistrySource(registry, name), "1", ServingConfig(warmup_samples=0))


def norms(kind):
    """What federated learning puts in BatchNorm's place, and its neighbours: several a model, as
    what they have in common (scales of ones, before any training) is one constant in the exported
    graph."""
    image = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1)]
    flat = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)]
    layers = {
        "after convolutions": [
            *image, nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True),
            nn.SiLU(), nn.BatchNorm2d(8), nn.Hardswish(), *flat,
        ],
        "after linear layers": [
            nn.Linear(64, 32), nn.GroupNorm(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(),
            nn.Linear(32, 32), nn.RMSNorm(32), nn.PReLU(), nn.Linear(32, 10),
        ],
    }  # fmt: skip
    return nn.Sequential(*layers[kind])


NORMS = ["after convolutions", "after linear layers"]


@pytest.mark.parametrize("kind", NORMS)
def test_a_normalised_model_is_exported_quantised_and_served_with_equal_answers(
    tmp_path, kind, monkeypatch
):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))
    models.register("normed", input_shape=(64,), output_shape=(10,))(lambda: norms(kind))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = norms(kind)
    rows = np.random.default_rng(0).standard_normal((200, 64), dtype=np.float32)
    with Registry(tmp_path) as registry, ModelServer() as server:
        registry.publish("m", module, architecture="normed", alias="default")
        made = {"onnx": methods.to_onnx(registry, "m", 1).version}
        for method in methods.METHODS:
            data = rows if method == "static" else None
            made[method] = methods.quantise(registry, "m", 1, method, data).version
        server.serve(registry, "m")
        wanted = server.predict(rows, arrays=True)["probabilities"]
        for technique, most in {
            "onnx": 1e-5,
            "dynamic": 0.02,
            "static": 0.05,
            "int4": 0.15,
        }.items():
            found = server.predict(rows, version=made[technique], arrays=True)["probabilities"]
            assert np.abs(found - wanted).max() < most, technique
            alone = server.predict(rows[3], version=made[technique], arrays=True)["probabilities"]
            np.testing.assert_allclose(alone[0], found[3], atol=1e-4)


def test_static_int8_gives_what_the_graph_defines_on_any_processor(tmp_path, monkeypatch):
    """Where there is no VNNI, a sum of two products of int8 may saturate: 10 % of the answers were
    wrong on iris."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    sizes = {"sizes": [4, 32, 3]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.build("mlp", sizes)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(8).add_(0.5)  # large weights of one sign: what saturates
    rows = np.random.default_rng(0).standard_normal((150, 4), dtype=np.float32).clip(-2, 2)
    with Registry(tmp_path) as registry:
        registry.publish("m", module, architecture="mlp", parameters=sizes)
        made = methods.quantise(registry, "m", 1, "static", rows)
        graph = bytes(registry.read("m", made.version).tensors["graph"].numpy())
        engine = load_engine(
            RegistrySource(registry, "m"), str(made.version), ServingConfig(max_batch_size=256)
        )
        found = engine.predict(rows)
    logits = onnx.reference.ReferenceEvaluator(onnx.ModelProto.FromString(graph)).run(
        None, {"rows": rows}
    )[0]
    assert found["predictions"] == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(
        found["probabilities"], torch.from_numpy(logits).softmax(1), atol=1e-5
    )


def test_what_answers_too_differently_is_not_published_unless_that_is_tolerated(registry, run):
    with pytest.raises(
        InvalidModelError, match=r"1, pruned, answers \d+ sample rows otherwise .* by 0\.\d+, the"
    ):
        methods.prune(registry, "digits", 1, 0.97, samples=run.clients, alias="default")
    assert registry.version_numbers("digits") == [1] and registry.aliases("digits") == {}
    made = methods.prune(registry, "digits", 1, 0.97, samples=run.clients, tolerance=1.0)
    assert 0.25 < made.lineage.extra["optimisation_distance"] <= 1
    for tolerance in (-1, math.nan, "much", True):
        with pytest.raises(ConfigError, match="tolerance is"):
            methods.prune(registry, "digits", 1, 0.5, tolerance=tolerance)


def test_every_technique_compares_with_the_parent_before_anything_is_published(
    registry, run, monkeypatch
):
    """A tool that spoils what it makes: nothing of it reaches the registry."""
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    monkeypatch.setattr(methods, "_distance", lambda *_: 0.9)
    small = {"parameters": {"sizes": [64, 16, 10]}, "epochs": 1}
    for call in (
        lambda: methods.to_onnx(registry, "digits", 1),
        lambda: methods.quantise(registry, "digits", 1),
        lambda: methods.quantise(registry, "digits", 1, "static", run.clients),
        lambda: methods.prune(registry, "digits", 1, 0.1),
        lambda: methods.distil(registry, "digits", run.clients, 1, **small),
    ):
        with pytest.raises(
            InvalidModelError, match=r"by 0\.9, the tolerance is 0\.\d+ \(classification"
        ):
            call()
    assert registry.version_numbers("digits") == [1]


def test_a_regressions_distance_is_a_share_of_its_spread():
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    parent = nn.Linear(4, 2)
    shifted = nn.Linear(4, 2)
    shifted.load_state_dict(parent.state_dict())
    with torch.no_grad():
        shifted.bias.add_(0.5)
        spread = parent(rows).std(0, correction=0).square().mean().sqrt()
    assert methods._distance(parent, shifted, rows, "regression") == pytest.approx(
        0.5 / float(spread), rel=1e-5
    )
    assert methods._distance(parent, parent, rows, "regression") == 0
    assert methods._distance(parent, parent, rows, "classification") == 0
