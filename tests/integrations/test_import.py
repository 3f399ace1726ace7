"""What other tools saved becomes a version that answers as the tool's model did; bad files leave
nothing behind.

The checkpoints of Flower and NVFLARE were written by these tools: see
tests/support/foreign_checkpoints.py.
"""

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import foreign_checkpoints
from flserving import ModelServer, Registry, models
from flserving.api import cli
from flserving.errors import ConfigError, FlservingError, InvalidModelError, NotFoundError
from flserving.integrations import files
from flserving.integrations.importing import read_model
from flserving.models import architectures

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SIZES = foreign_checkpoints.SIZES


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def state():
    torch.manual_seed(3)
    return models.build("mlp", {"sizes": SIZES}).state_dict()


@pytest.fixture
def own(monkeypatch):
    """Registers architectures that are gone after the test."""
    monkeypatch.setattr(architectures, "_known", dict(architectures._known))
    return models.register


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "round-3-weights.npz",
            (3, None, "NumPy arrays", "4 tensors cast from float64 to float32"),
        ),
        (
            "final_model.pt",
            (None, None, "PyTorch state dict", "4 tensors cast from float64 to float32"),
        ),
        ("FL_global_model.pt", (7, "NVFLARE", "PyTorch state dict", None)),
    ],
)
def test_checkpoints_of_other_tools_answer_as_there(tmp_path, capsys, name, facts):
    """flwr 1.41.0 and nvflare 2.9.0 wrote them; the answers beside them are torch's, from before
    they were saved."""
    path = CHECKPOINTS / name
    target = ["--registry", str(tmp_path / "r"), "--model", "m"]
    assert (
        cli.main(
            [
                "import",
                str(path),
                *target,
                "--alias",
                "default",
                "--output-type",
                "regression",
                "--json",
            ]
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    number, tool, format, cast = facts
    lineage = answer["manifest"]["lineage"]
    assert (lineage["round"], lineage["extra"].get("tool")) == (number, tool)
    assert lineage["extra"]["file"] == name and lineage["extra"]["format"] == format
    assert lineage["extra"]["file_sha256"] == files.sha256(path.read_bytes())
    assert answer["manifest"]["architecture"] == "mlp" and answer["manifest"]["parameters"] == {
        "sizes": SIZES
    }
    assert answer["notes"][0].startswith("found by the ") and answer["notes"][1:] == (
        [cast] if cast else []
    )
    with Registry(tmp_path / "r") as registry, ModelServer(registry=registry, model="m") as server:
        got = server.predict(foreign_checkpoints.rows().numpy())["predictions"]
    np.testing.assert_allclose(got, np.load(f"{path}.answer.npy"), rtol=1e-6)


def test_safetensors_and_common_training_loops(tmp_path, registry, state):
    def same(path):
        model = read_model(path, "m", lineage={"round": 9, "extra": {"seed": 4}})
        manifest = model.publish(registry)
        tensors = registry.read("m", manifest.version).tensors
        assert manifest.lineage.round == 9 and manifest.lineage.extra["seed"] == 4
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items()) and len(
            tensors
        ) == len(state)

    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    same(tmp_path / "a.safetensors")
    np.savez(tmp_path / "named.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    same(tmp_path / "named.npz")
    np.savez_compressed(
        tmp_path / "big-endian.npz", *[tensor.numpy().astype(">f8") for tensor in state.values()]
    )
    same(tmp_path / "big-endian.npz")
    for content in (
        {"model": state},
        {"state_dict": state},
        {"epoch": 3, "model_state_dict": state},
        list(state.values()),
    ):
        torch.save(content, tmp_path / "b.pt")
        same(tmp_path / "b.pt")


def test_counters_that_were_averaged_are_rounded(tmp_path, registry, own):
    """Federated averages make float64 of BatchNorm's int64 counter."""

    @own("normed", input_shape=(4,), output_shape=(3,))
    def normed():
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    arrays = [tensor.double().numpy() for tensor in normed().state_dict().values()]
    arrays[-1] = np.float64(16.999999)
    np.savez(tmp_path / "a.npz", *arrays)
    model = read_model(tmp_path / "a.npz", "m")
    assert model.content.model["1.num_batches_tracked"].item() == 17
    assert "1 tensors cast from float64 to int64" in model.notes


def test_more_than_ten_arrays_go_by_number(tmp_path, registry):
    """A file's names sort arr_10 before arr_2."""
    sizes = [4, 4, 4, 4, 4, 4, 4, 3]
    state = models.build("mlp", {"sizes": sizes}).state_dict()
    np.savez(tmp_path / "a.npz", *[tensor.numpy() for tensor in state.values()])
    found = read_model(tmp_path / "a.npz", "m").content
    assert found.parameters == {"sizes": sizes}
    # which tells its tensors in no order
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert read_model(tmp_path / "a.safetensors", "m").content.parameters == {"sizes": sizes}
    assert all(torch.equal(found.model[name], tensor) for name, tensor in state.items())


def test_which_architecture(tmp_path, own):
    state = models.digits_mlp().state_dict()
    torch.save(state, tmp_path / "a.pt")
    assert read_model(tmp_path / "a.pt", "m").content.architecture == "digits_mlp"
    own("twin", input_shape=(64,), output_shape=(10,))(lambda: models.mlp([64, 64, 10]))
    with pytest.raises(InvalidModelError, match="fits digits_mlp and twin: choose one"):
        read_model(tmp_path / "a.pt", "m")
    assert read_model(tmp_path / "a.pt", "m", architecture="twin").notes == ()
    with pytest.raises(NotFoundError, match="no architecture 'resnet'"):
        read_model(tmp_path / "a.pt", "m", architecture="resnet")
    with pytest.raises(InvalidModelError, match="parameters"):
        read_model(tmp_path / "a.pt", "m", parameters={"sizes": [64, 64, 10]})


def test_a_plain_sequential_is_rebuilt_from_its_layers(tmp_path, registry):
    """Its state dict does not tell the activations, so a guess could serve wrong answers without a
    word."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    with pytest.raises(InvalidModelError, match="does not tell what lies between"):
        read_model(tmp_path / "a.pt", "m")
    architecture, parameters = models.describe(module)
    read_model(tmp_path / "a.pt", "m", architecture=architecture, parameters=parameters).publish(
        registry
    )
    artifact = registry.read("m", 1)
    rebuilt = models.build(artifact.manifest.architecture, artifact.manifest.parameters)
    rebuilt.load_state_dict(artifact.tensors)
    assert torch.equal(rebuilt(foreign_checkpoints.rows()), module(foreign_checkpoints.rows()))


class Net(nn.Module):  # as PFLlib saves models: the whole object
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)


class Bomb:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return open, (str(self.path), "w")


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are still such files
        torch.jit.save(torch.jit.trace(nn.Linear(4, 3), torch.zeros(1, 4)), buffer)
    return buffer.getvalue()


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def npy(array, **header):
    buffer = io.BytesIO()
    if header:
        form = {"descr": "<f4", "fortran_order": False} | header
        np.lib.format.write_array_header_1_0(buffer, form)
        return buffer.getvalue() + array.tobytes()
    np.save(buffer, array)
    return buffer.getvalue()


def onnx_graph(operator, **attributes):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    ends = [helper.make_tensor_value_info(name, 1, ["N", 3]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **attributes)], "g", ends[:1], ends[1:]
    )
    return helper.make_model(
        graph, producer_name="mine", opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )


def altered(state, **changes):
    return torch_bytes(
        {name: value for name, value in (state | changes).items() if value is not None}
    )


BAD = {  # what -> (how its bytes are made, a part of the message)
    "pickle": (lambda s, b: pickle.dumps([b]), "is a pickle.*was not opened.*state_dict"),
    "old torch": (lambda s, b: torch_bytes(s, _use_new_zipfile_serialization=False), "is a pickle"),
    "whole module": (lambda s, b: torch_bytes(Net()), "GLOBAL .*Net beside.*nothing of it was run.*state_dict"),
    "hostile pt": (lambda s, b: torch_bytes({"model": s, "x": b}), "GLOBAL .*beside tensors"),
    "torchscript": (lambda s, b: torchscript(), "TorchScript"),
    "cut pt": (lambda s, b: torch_bytes(s)[:-400], "damaged or cut off"),
    "flipped pt": (lambda s, b: torch_bytes(s).replace(s["head.weight"].numpy().tobytes(), bytes(96)), "damaged"),
    "cut npz": (lambda s, b: npz(a=npy(np.zeros(3)))[:-30], "damaged or cut off"),
    "cut safetensors": (lambda s, b: safetensors.torch.save(s)[:-10], "damaged or cut off"),
    "empty": (lambda s, b: b"", "none of .npz"),
    "text": (lambda s, b: b"weights", "none of .npz"),
    "bomb": (lambda s, b: npz(arr_0=bytes(64 << 20)), "unfold from .* to 67,108,864 bytes"),
    "objects": (lambda s, b: npz(arr_0=npy(np.array([b], dtype=object))), "Python objects.*not opened"),
    "huge claim": (lambda s, b: npz(arr_0=npy(np.zeros(1), shape=(1 << 50,))), "claims shape"),
    "negative": (lambda s, b: npz(arr_0=npy(np.zeros(0, "f4"), shape=(-1, 0))), "claims shape|negative|damaged"),
    "text array": (lambda s, b: npz(arr_0=npy(np.array(["a"]))), "weights are real numbers"),
    "huge view": (lambda s, b: altered(s, x=torch.zeros(1).expand(1 << 40)), "unfold to"),
    "no tensors": (lambda s, b: torch_bytes({"epoch": 3}), "'epoch' is a int"),
    "number as name": (lambda s, b: torch_bytes({3: torch.zeros(1)}), "entry '3' is a Tensor"),
    "number": (lambda s, b: torch_bytes(3), "holds a int"),
    "nothing": (lambda s, b: torch_bytes({}), "0 tensors"),
    "NaN": (lambda s, b: altered(s, **{"head.bias": torch.full((3,), torch.nan)}), "head.bias holds NaN"),
    "too large": (lambda s, b: altered(s, **{"head.bias": torch.ones(3).double() * 1e300}), "NaN or infinite"),
    "shape": (lambda s, b: altered(s, **{"head.bias": torch.zeros(4)}), "no registered architecture"),
    "operator": (lambda s, b: onnx_graph("Hardmax").SerializeToString(), "Hardmax.*not listed"),
    "cut onnx": (lambda s, b: onnx_graph("Relu").SerializeToString()[:-9], "onnx|ONNX|cut off"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_and_leave_nothing(tmp_path, capsys, state, what):
    """A typed error that names the file and says what to do; no version, no registry, no code
    run."""
    make, message = BAD[what]
    bomb = Bomb()
    bomb.path = tmp_path / "it ran"
    path = tmp_path / "file"
    path.write_bytes(make(state, bomb))
    with pytest.raises(FlservingError, match=f"(?s){message}"):
        read_model(path, "m")
    assert cli.main(["import", str(path), "--registry", str(tmp_path / "r"), "--model", "m"]) == 1
    out, err = capsys.readouterr()
    assert (
        not out
        and err.startswith("flserving: ")
        and ("file" in err or what in ("NaN", "too large"))
    )
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.bias": None}, "head.bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is unexpected"),
        ({"head.bias": torch.zeros(4)}, r"head.bias is .*float32\[4\], not .*float32\[3\]"),
        ({"head.bias": torch.zeros(3, dtype=torch.complex64)}, "head.bias is"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, registry, state, changes, message):
    (tmp_path / "a.pt").write_bytes(altered(state, **changes))
    with pytest.raises(InvalidModelError, match=message):
        read_model(tmp_path / "a.pt", "m", architecture="mlp", parameters={"sizes": SIZES})
    np.savez(tmp_path / "a.npz", *[tensor.numpy() for tensor in list(state.values())[:3]])
    with pytest.raises(InvalidModelError, match=r"has 3 arrays without names, 'mlp' has 4 tensors"):
        read_model(tmp_path / "a.npz", "m", architecture="mlp", parameters={"sizes": SIZES})
    assert registry.models() == []


def test_what_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")  # whose reader would wait for ever
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", "", "/dev/zero"):
        with pytest.raises(InvalidModelError, match="is not a file"):
            read_model(path, "m")
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(InvalidModelError, match="more than 99 bytes"):
        read_model(tmp_path / "a", "m", most_nbytes=99)
    assert cli.main(["import", "a", "--registry", "r", "--model", "m", "--parameters", "[1]"]) == 1
    assert "--parameters '[1]' is no JSON object" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="std"):
        read_model(
            CHECKPOINTS / "final_model.pt",
            "m",
            preprocessing={"mean": [0.0] * 4, "std": [-1.0] * 4},
        )


def test_an_onnx_graph_is_served_as_it_is(tmp_path, registry):
    pytest.importorskip("onnxruntime")
    data = onnx_graph("LeakyRelu", alpha=0.5).SerializeToString()
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(InvalidModelError, match="needs no architecture, 'mlp' was given"):
        read_model(tmp_path / "a.onnx", "m", architecture="mlp")
    manifest = read_model(tmp_path / "a.onnx", "m", output_type="regression").publish(
        registry, alias="default"
    )
    assert manifest.architecture == "onnx" and manifest.lineage.extra["tool"] == "mine"
    assert registry.read("m", 1).tensors["graph"].numpy().tobytes() == data
    with ModelServer(registry=registry, model="m") as server:
        assert server.predict([[-2.0, 0.0, 3.0]])["predictions"] == [[-1.0, 0.0, 3.0]]


def test_a_name_that_is_no_text_is_written_with_marks(tmp_path, registry, state):
    path = os.fsencode(tmp_path) + b"/round_12_\xff.pt"
    Path(os.fsdecode(path)).write_bytes(torch_bytes(state))
    manifest = read_model(os.fsdecode(path), "m").publish(registry)
    assert (manifest.lineage.extra["file"], manifest.round) == ("round_12_?.pt", 12)
