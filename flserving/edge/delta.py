"""What changed between two sets of weights of one architecture, in few bytes.

A delta is one zstd frame: length of a header, the header (JSON), then for each changed part the
differences of the bit patterns, taken as integers modulo 2^n, zigzag-coded (small differences of
either sign become small numbers) and split into byte planes, so that the high bytes, mostly zero,
lie together (the byte shuffle of HDF5 and Blosc).

Neither shapes nor sizes come from the wire: the receiver knows them from the architecture of a
signed manifest, so a hostile delta can only be of the wrong length, which is found before the
memory for it is taken. What was made is then compared with a signed digest by the caller.

``exact`` gives the tensors bit for bit. ``int8`` gives :func:`quantised`, a pure function of the
version: each row of a float32 matrix is 127 steps of its largest magnitude (symmetric, per row:
Jacob et al., CVPR 2018, arXiv 1712.05877).
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from flserving.errors import ConflictError, CorruptArtifactError
from flserving.models.weights import (
    MAX_HEADER_NBYTES,
    AnyTensor,
    Array,
    Tensors,
    as_array,
    as_tensor,
    digest,
    kinds,
)

Form: TypeAlias = Literal["exact", "int8"]
FORMS: tuple[Form, ...] = ("exact", "int8")
_LEVEL = 9  # of zstd: above it the differences of floats shrink by less than 1 %
# bytes: what a hostile frame may make the receiver hold; level 9 asks for half of it
_MAX_WINDOW = 1 << 23


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    form: Form
    base: str | None  # digest of the tensors that it starts from; None: of zeros
    changed: list[str]


def zeros(like: Tensors) -> dict[str, AnyTensor]:
    """Arrays of the same names, shapes and dtypes, all zero: what a delta without a base starts
    from."""
    return {name: np.zeros_like(as_array(it), order="C") for name, it in like.items()}


def quantised(tensors: Tensors) -> dict[str, AnyTensor]:
    """The tensors as the form ``int8`` delivers them. Applied twice it changes nothing more.

    A row w with largest magnitude m becomes round(127 w / m) m / 127, computed in float64: at most
    m / 254 off. What is not a float32 tensor of two or more axes stays as it is.
    """
    return _joined(_parts(tensors, "int8"), tensors)


def encode(target: Tensors, base: Tensors | None, form: Form) -> bytes:
    """The delta from ``base`` (None: from zeros) to ``target``, both in the same ``form``.

    Raises:
        ConflictError: The two differ in names, shapes or dtypes.

    Cost: about 10 ms per MB of changed tensors, and two copies of them.
    """
    import zstandard

    if base is not None and kinds(target) != kinds(base):
        raise ConflictError("the two versions have other tensors: download the weights")
    ours = _parts(target, form)
    theirs = _parts(base or zeros(target), form)
    changed = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    start = None
    if base is not None:
        start = digest(_joined(theirs, base))
    header = msgspec.json.encode(_Header(form, start, changed))
    body = bytearray(len(header).to_bytes(4, "little"))
    body += header
    for name in changed:
        body += _shuffled(ours[name] - theirs[name])
    return zstandard.ZstdCompressor(level=_LEVEL).compress(body)


def apply(
    data: bytes | memoryview, base: Tensors | None, like: Tensors, form: Form
) -> dict[str, AnyTensor]:
    """The tensors that a delta leads to. Compare their digest with a signed one before they are
    used.

    Args:
        base: What the delta must start from; None: zeros.
        like: Names, shapes and dtypes of the result.

    Raises:
        CorruptArtifactError: Not a delta from this base to such tensors.

    Cost: about 5 ms per MB. Never takes more memory than three times the result and 8 MiB.
    """
    import zstandard

    start = base or zeros(like)
    if kinds(start) != kinds(like):
        raise _corrupt("it starts from other tensors than the version has")
    parts = _parts(start, form)
    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data)
    try:
        length = int.from_bytes(_exactly(reader, 4), "little")
        if not 0 < length <= MAX_HEADER_NBYTES:
            raise _corrupt(f"its header claims {length:,} bytes")
        header = msgspec.json.decode(_exactly(reader, length), type=_Header)
        expected = None
        if base is not None:
            expected = digest(base)
        if (header.form, header.base) != (form, expected):
            raise _corrupt(
                f"it is {header.form!r} from {str(header.base)[:12]}, not {form!r} from {str(expected)[:12]}"
            )
        changed = header.changed
        if changed != [name for name in parts if name in changed]:
            raise _corrupt("it names a part twice, out of order, or one that the version lacks")
        for name in changed:
            part = parts[name]
            parts[name] = part + _unshuffled(_exactly(reader, part.nbytes), part)
        if reader.read(1):
            raise _corrupt("it is longer than its parts")
    except (zstandard.ZstdError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(str(error)) from None
    return _joined(parts, start)


def _exactly(reader: Any, nbytes: int) -> bytes:
    data: bytes = reader.read(nbytes)
    if len(data) != nbytes:
        raise _corrupt(f"it ends {nbytes - len(data):,} bytes early")
    return data


def _parts(tensors: Mapping[str, AnyTensor], form: Form) -> dict[str, NDArray[Any]]:
    """Each tensor as integers, by its name: its bits, or its codes with the rows' magnitudes beside
    them."""
    parts = dict[str, NDArray[Any]]()
    for name in sorted(tensors):
        array = as_array(tensors[name])
        if form == "int8" and array.dtype == np.float32 and array.ndim >= 2:
            rows = array.reshape(len(array), -1)
            most = np.abs(rows).max(axis=1)
            scale = 127 / np.where(most > 0, most, 1).astype(np.float64)
            parts[name] = np.rint(rows * scale[:, None]).astype(np.int8)
            parts[f"{name} rows"] = most.view(np.int32)
        else:
            parts[name] = array.reshape(-1).view(f"i{array.itemsize}")
    return parts


def _joined(parts: Mapping[str, Array], like: Tensors) -> dict[str, AnyTensor]:
    tensors = {}
    for name, tensor in like.items():
        array = as_array(tensor)
        part = parts[name]
        magnitudes = parts.get(f"{name} rows")
        if magnitudes is None:
            values = part.copy().view(array.dtype)
        else:  # the row's largest comes out as it was: 127 m / 127
            most = magnitudes.view(np.float32).astype(np.float64)
            values = (part * most[:, None] / 127).astype(np.float32)
        values = values.reshape(array.shape)
        # torch's come back as torch's
        tensors[name] = values if tensor is array else as_tensor(values)
    return tensors


def _shuffled(difference: Array) -> bytes:
    flat = difference.reshape(-1)
    sign = flat >> (8 * flat.itemsize - 1)
    zigzag = (flat << 1) ^ sign
    planes = zigzag.view(np.uint8).reshape(-1, flat.itemsize).T
    return planes.tobytes()


def _unshuffled(data: bytes, like: Array) -> Array:
    planes = np.frombuffer(data, np.uint8).reshape(like.itemsize, -1)
    zigzag = np.ascontiguousarray(planes.T).view(f"u{like.itemsize}").reshape(-1)
    sign = np.negative(zigzag & 1)
    plain: Array = (zigzag >> 1) ^ sign
    return plain.view(like.dtype).reshape(like.shape)


def _corrupt(why: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"the delta cannot be applied, {why}: download the weights instead")
