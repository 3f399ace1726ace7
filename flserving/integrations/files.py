"""Model files of other tools -> named tensors. Which format a file has is read off its first bytes,
not off its name.

Every size that a file claims is compared with what the file can hold before memory is taken for it.
"""

import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from flserving.errors import InvalidModelError, NotSupportedError
from flserving.extras import need
from flserving.models import Parameters
from flserving.models.onnx import OnnxModel
from flserving.registry.manifest import sha256
from flserving.registry.storage import user_path

MOST_NBYTES = 2 << 30  # of a file, and of what it unfolds to: as of a version (see Registry)
_RATIO = 32  # weights do not compress much; deflate reaches 1,000 on zeros
_MOST_MEMBERS = 10_000  # of an archive
_STATE = "where it was made, save its numbers alone: torch.save(model.state_dict(), 'model.pt')"
# Flower's examples: round-3-weights.npz
_ROUND = re.compile(r"round[-_ ]?(\d{1,9})(?!\d)", re.IGNORECASE)
_NUMBERED = re.compile(r"arr_(\d+)")  # what np.savez calls arrays that it was given without names


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """What a file holds.

    Args:
        tensors: By name; by place ("0", "1", ...) where the file has no names.
        named: Whether it has.
        tool: Who wrote it, where the file tells. ``round``: the federated round, likewise.
        architecture: Name and parameters, where the file tells: of an ONNX graph.
    """

    tensors: Mapping[str, Tensor]
    format: str
    named: bool = True
    tool: str | None = None
    round: int | None = None
    architecture: tuple[str, Parameters] | None = None
    name: str = ""
    sha256: str = ""


def read_file(path: str | os.PathLike[str], most_nbytes: int = MOST_NBYTES) -> ModelFile:
    """Read a model that another tool saved: .npz, PyTorch's state dict, safetensors, or ONNX.

    Args:
        most_nbytes: Of the file, and of its tensors together.

    Raises:
        InvalidModelError: Not such a file, a truncated or an overlarge one, or one that holds more
            than numbers.
        NotSupportedError: onnx is not installed.

    Cost: one read and one sha256 of the file, and a copy of what it holds.
    """
    name = os.path.basename(os.fspath(path)).encode(errors="replace").decode()
    data = _bytes(path, name, most_nbytes)
    try:
        found = _reader(data)(data, most_nbytes)
    except (InvalidModelError, NotSupportedError) as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:  # of a damaged file: what its format's library happens to meet
        raise InvalidModelError(
            f"{name} is damaged or cut off ({type(error).__name__}: {error!s:.200}): copy it again"
        ) from error
    numbered = _ROUND.search(name)
    number = found.round
    if number is None and numbered is not None:
        number = int(numbered[1])
    return replace(found, name=name, sha256=sha256(data), round=number)


def _bytes(path: str | os.PathLike[str], name: str, most_nbytes: int) -> bytes:
    place = user_path(path)
    if not os.path.isfile(place):  # a folder; a pipe, whose reader would wait
        raise InvalidModelError(f"{name or path} is not a file: give the path of a saved model")
    try:
        with open(place, "rb") as file:
            data = file.read(most_nbytes + 1)
    except OSError as error:
        raise InvalidModelError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > most_nbytes:
        raise InvalidModelError(
            f"{name} has more than {most_nbytes:,} bytes, the most that a version may have"
        )
    return data


def _reader(data: bytes) -> Callable[[bytes, int], ModelFile]:
    """By the format's first bytes. ONNX has none of its own: protobuf's field 1, the version, opens
    it."""
    if data.startswith(b"PK"):
        return _archive
    if data.startswith(b"\x93NUMPY"):
        return lambda data, most_nbytes: _arrays({"arr_0": data})
    if data.startswith(b"\x80"):
        raise InvalidModelError(
            f"it is a pickle, which may run code when it is opened, and was not opened; {_STATE}"
        )
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        return lambda data, most_nbytes: ModelFile(
            tensors=safetensors.torch.load(data), format="safetensors"
        )
    if data.startswith(b"\x08"):
        return _graph
    raise InvalidModelError(
        "it is none of .npz, PyTorch's .pt, safetensors and ONNX, or it is cut off"
    )


def _archive(data: bytes, most_nbytes: int) -> ModelFile:
    """A zip archive: NumPy's .npz, or PyTorch's .pt since 1.6."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        nbytes = sum(member.file_size for member in members)
        allowed = min(most_nbytes, _RATIO * len(data))
        if nbytes > allowed or len(members) > _MOST_MEMBERS:
            raise InvalidModelError(
                f"its {len(members):,} members unfold from {len(data):,} to {nbytes:,} bytes: the most is "
                f"{_MOST_MEMBERS:,} members and {allowed:,} bytes; save it without compression"
            )
        if all(member.filename.endswith(".npy") for member in members):
            return _arrays({member.filename[:-4]: archive.read(member) for member in members})
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise InvalidModelError(f"it is a TorchScript program, which is code; {_STATE}")
        damaged = archive.testzip()
    if damaged is not None:
        raise InvalidModelError(f"{damaged} in it is damaged: copy it again")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL \S+", str(error))
        if found is None:
            raise InvalidModelError(
                f"torch reads no tensors in it ({str(error).splitlines()[-1]:.200}); {_STATE}"
            ) from None
        raise InvalidModelError(
            f"it holds {found[0]} beside tensors: a whole module, or other Python objects, was pickled; nothing of it "
            f"was run; {_STATE}"
        ) from None
    return _state(content, most_nbytes)


def _state(content: object, most_nbytes: int) -> ModelFile:
    """A state dict, by itself or where NVFLARE's persistor and common training loops put it."""
    tool = number = None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        if content.keys() & {"train_conf", "meta_props"}:  # of PTModelPersistenceFormatManager
            tool = "NVFLARE"
        meta = content.get("meta_props")
        if isinstance(meta, Mapping):
            number = meta.get("current_round")
        content = content["model"]
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = isinstance(content, Mapping)
    if isinstance(content, list | tuple):
        content = _placed(content)
    if not isinstance(content, Mapping):
        raise InvalidModelError(f"it holds a {type(content).__name__}; {_STATE}")
    nbytes = 0
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise InvalidModelError(
                f"its entry {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor with a name; {_STATE}"
            )
        nbytes += tensor.numel() * tensor.element_size()
    if nbytes > most_nbytes:  # views of few numbers, spread over many
        raise InvalidModelError(
            f"its tensors unfold to {nbytes:,} bytes, the most is {most_nbytes:,}"
        )
    round = number if type(number) is int and number >= 0 else None
    return ModelFile(
        tensors=dict(content), format="PyTorch state dict", named=named, tool=tool, round=round
    )


def _placed(values: Iterable[Any]) -> dict[str, Any]:
    return {str(place): value for place, value in enumerate(values)}


def _arrays(members: Mapping[str, bytes]) -> ModelFile:
    """NumPy's arrays, by their names; those that ``np.savez(file, *arrays)`` has numbered, by their
    places."""
    tensors = {name: _tensor(name, member) for name, member in members.items()}
    numbers = [_NUMBERED.fullmatch(name) for name in tensors]
    if not all(numbers):
        return ModelFile(tensors=tensors, format="NumPy arrays")
    ordered = sorted(tensors, key=lambda name: int(name[4:]))
    return ModelFile(
        tensors=_placed(tensors[name] for name in ordered), format="NumPy arrays", named=False
    )


def _tensor(name: str, member: bytes) -> Tensor:
    """One .npy. Its header is compared with its bytes before an array is made."""
    stream = io.BytesIO(member)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise InvalidModelError(
            f"{name} holds Python objects, which are pickled and may run code: they were not opened; save each array "
            "by itself: np.savez(file, *arrays)"
        )
    if math.prod(shape) * dtype.itemsize != len(member) - stream.tell():
        raise InvalidModelError(
            f"{name} claims shape {shape} of {dtype} and has other bytes than that: save it again"
        )
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise InvalidModelError(
            f"{name} is an array of {dtype}: weights are real numbers of at most 64 bits"
        )
    array = np.lib.format.read_array(io.BytesIO(member), allow_pickle=False)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _graph(data: bytes, most_nbytes: int) -> ModelFile:
    """An ONNX graph with one input and one output, whose sizes it tells."""
    model = need("onnx", "onnx").ModelProto.FromString(data)
    inputs = _rows(model.graph.input)
    outputs = _rows(model.graph.output)
    if not inputs or not outputs or len(outputs) > 1:
        raise InvalidModelError("an ONNX graph must map one input [N, ...] to one output [N, C]")
    module = OnnxModel.of(data, inputs, outputs[0])
    tool = f"{model.producer_name} {model.producer_version}".strip()
    return ModelFile(
        tensors={"graph": module.graph},
        format="ONNX",
        tool=tool[:200] or None,
        architecture=("onnx", module.parameters_of),
    )


def _rows(values: Any) -> list[int]:
    """The shape of a row where a graph has one input, or output; else nothing."""
    if len(values) != 1:
        return []
    sizes = [size.dim_value for size in values[0].type.tensor_type.shape.dim]
    return sizes[1:]
