"""Weights as bytes: named tensors <-> one safetensors image in memory, and digests of the tensors
themselves.

A tensor is torch's or a NumPy array, with the same bytes and digest. What is made here are arrays;
:func:`as_tensors` gives their memory to torch, which is not imported before it or one of its
tensors is met.

The format is safetensors, written and read by its own library. What is checked here beside it: that
every tensor is one that a model may have, that the header is short, and that values begin where
torch would put them.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from flserving.errors import ConfigError, CorruptArtifactError, InvalidModelError

# bytes: what torch's own allocator gives. BLAS adds up in another order where rows begin elsewhere.
ALIGNMENT = 64
MAX_HEADER_NBYTES = 1 << 20
HEAD_PREFIX = "head."

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = NDArray[Any]
AnyTensor: TypeAlias = "Tensor | Array"
Tensors: TypeAlias = Mapping[str, AnyTensor]
"""By name, as in a state dict."""

_BF16 = np.dtype("V2")  # NumPy has no bfloat16: two bytes that it does not read
_CODES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "V2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
}
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(code) for name, code in _CODES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PLAIN = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
"""What weights may be, by the names that torch and NumPy have for it."""


def as_array(tensor: AnyTensor) -> Array:
    """The memory of a CPU tensor as an array; bfloat16 as two bytes each (V2)."""
    if isinstance(tensor, np.ndarray):
        return tensor
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BF16)
    return tensor.numpy()


def as_tensor(array: AnyTensor) -> "Tensor":
    """The memory of an array as torch's tensor."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    if array.dtype == _BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_tensors(arrays: Tensors) -> "dict[str, Tensor]":
    """:func:`as_tensor` of each."""
    return {name: as_tensor(array) for name, array in arrays.items()}


def as_float32(tensor: AnyTensor) -> NDArray[np.float32]:
    """Its numbers, in float32."""
    array = as_array(tensor)
    if array.dtype == _BF16:  # the upper half of a float32
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def as_bytes(tensor: AnyTensor) -> memoryview:
    """The memory of a contiguous CPU tensor, flat, without a copy."""
    return as_array(tensor).reshape(-1).view(np.uint8).data


def frozen(tensors: Tensors) -> dict[str, Array]:
    """Copies of named tensors, contiguous arrays; the originals may change afterwards.

    Raises:
        InvalidModelError: There are none, or one has a name or a kind that the format cannot hold.
    """
    if not tensors:
        raise InvalidModelError(
            "there are no weights: give a module or a state dict with at least one tensor"
        )
    return {name: _checked(name, tensor) for name, tensor in tensors.items()}


def pack(tensors: Tensors) -> bytes:
    """Named tensors, contiguous as :func:`frozen` gives them -> one safetensors image.

    Equal tensors give equal images, whatever the order of the mapping.

    Raises:
        InvalidModelError: Too long a header.
    """
    arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
    if any(array.dtype == _BF16 for array in arrays.values()):
        from safetensors.torch import save as save_tensors

        image = save_tensors(as_tensors(arrays))
    else:
        image = save(arrays)
    nbytes = _header_nbytes(image)
    if nbytes > MAX_HEADER_NBYTES:
        raise InvalidModelError(
            f"the tensors' names take {nbytes:,} bytes, the most is {MAX_HEADER_NBYTES:,}"
        )
    return image


def _checked(name: object, tensor: Any) -> Array:
    if not isinstance(name, str) or name == "__metadata__":  # safetensors keeps that key for itself
        raise InvalidModelError(f"a tensor is named {name!r}: rename it")
    if not isinstance(tensor, np.ndarray) and not hasattr(tensor, "is_meta"):
        raise InvalidModelError(
            f"{name} is a {type(tensor).__name__}: weights must be torch tensors or NumPy arrays"
        )
    layout = str(getattr(tensor, "layout", "torch.strided"))
    plain = str(tensor.dtype).removeprefix("torch.") in PLAIN and 0 not in tensor.shape
    if layout != "torch.strided" or str(tensor.device) == "meta" or not plain:
        raise InvalidModelError(
            f"{name} is a {layout} {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}: "
            f"weights must be dense, real, not empty, and of one of the types {', '.join(PLAIN)}"
        )
    if not isinstance(tensor, np.ndarray):
        tensor = as_array(tensor.cpu())
    return np.array(tensor, order="C")


def unpack(image: bytes, source: str) -> dict[str, Array]:
    """Image -> named arrays, each with memory of its own. ``source`` names the file in messages.

    Raises:
        CorruptArtifactError: Not a safetensors image of plain tensors.

    Cost: one copy of the data.
    """
    if _header_nbytes(image) > MAX_HEADER_NBYTES:
        raise _corrupt(source, f"its header claims {_header_nbytes(image):,} bytes")
    try:
        parts: list[tuple[str, Any]] = deserialize(image)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise _corrupt(source, f"it is no safetensors file: {error}") from None
    if not parts:
        raise _corrupt(source, "it holds no tensor")
    arrays = {}
    for name, part in parts:
        dtype = _DTYPES.get(str(part["dtype"]))
        if dtype is None or 0 in part["shape"]:
            raise _corrupt(source, f"{name!r} is {part['dtype']}{part['shape']}")
        arrays[name] = _aligned(np.frombuffer(part["data"], dtype)).reshape(part["shape"])
    return arrays


def _aligned(array: Array) -> Array:
    """The array, or a copy of it that begins at a multiple of ``ALIGNMENT``."""
    if array.__array_interface__["data"][0] % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.__array_interface__["data"][0] % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def cast(tensors: "Mapping[str, Tensor]", wanted: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """``tensors`` in the types that ``wanted`` has under the same names. Whole numbers are rounded
    to; what has none (NaN, complex numbers) stays as it is."""
    found = dict(tensors)
    for name in found.keys() & wanted.keys():
        tensor = found[name]
        kind = wanted[name].dtype
        if tensor.dtype == kind or tensor.is_complex():
            continue
        if kind.is_floating_point:
            found[name] = tensor.to(kind)
        elif tensor.isfinite().all():
            found[name] = tensor.double().round().to(kind)
    return found


def _header_nbytes(image: bytes) -> int:
    return int.from_bytes(image[:8], "little")


def _corrupt(source: str, why: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{source} cannot be read, {why}: restore it from a backup, or publish again"
    )


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(body, head): the head is every tensor under the submodule ``head``."""
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD_PREFIX)}
    head = {name: tensor for name, tensor in tensors.items() if name not in body}
    return body, head


def part_digests(tensors: Tensors) -> tuple[str, str | None]:
    """:func:`digest` of the body and, where there is one, of the head."""
    body, head = split(tensors)
    of_head = None
    if head:
        of_head = digest(head)
    return digest(body), of_head


def digest(tensors: Tensors) -> str:
    """sha256 of a set of tensors, independent of their order: names, dtypes, shapes and values,
    each framed.

    The name goes with its length, and the shape tells the length of the values, so no two sets
    share one encoding.

    Cost: about 0.6 ms per MB with SHA-NI; releases the GIL.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = as_array(tensors[name])
        encoded = name.encode()
        sha.update(b"%d:%s" % (len(encoded), encoded))
        sha.update(kind(array).encode())
        sha.update(as_bytes(array))
    return sha.hexdigest()


def nbytes_of(value: Any) -> int:
    """Bytes that ``value`` holds: its own ``nbytes``, or the sum over a torch module's parameters
    and buffers."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if hasattr(value, "parameters") and hasattr(value, "buffers"):
        return sum(tensor.nbytes for tensor in (*value.parameters(), *value.buffers()))
    raise ConfigError(
        f"cannot tell the size of a {type(value).__name__}: give it an nbytes attribute"
    )


def kind(tensor: AnyTensor) -> str:
    """Type and shape, such as ``F32[10, 64]``."""
    array = as_array(tensor)
    return f"{_NAMES.get(array.dtype, array.dtype)}{list(array.shape)}"


def kinds(tensors: Tensors) -> dict[str, str]:
    """:func:`kind` of each."""
    return {name: kind(tensor) for name, tensor in tensors.items()}


def described(array: Array) -> str:
    """:func:`kind` for people: ``float32[10, 64]``."""
    name = "bfloat16" if array.dtype == _BF16 else array.dtype.name
    return f"{name}{list(array.shape)}"


def first_non_finite(tensors: Tensors) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None if all is finite.

    Cost: a product with itself (15 us per MB of float32). A NaN or infinity always shows in it;
    only a finite overflow needs a second look.
    """
    for name, tensor in tensors.items():
        array = as_array(tensor)
        if array.dtype == _BF16:
            array = as_float32(array)
        if array.dtype.kind != "f" or math.isfinite(np.vdot(array, array)):
            continue
        if not np.isfinite(array).all():
            return name
    return None
