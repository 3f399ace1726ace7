"""The safetensors image: safetensors itself is the oracle, in both directions."""

import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flserving.errors import CorruptArtifactError, InvalidModelError
from flserving.models import weights

DTYPES = [getattr(torch, name) for name in weights.PLAIN]

shapes = st.lists(st.integers(1, 7), max_size=4)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors = {}
    for name in draw(st.lists(names, min_size=1, max_size=8, unique=True)):
        shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
        raw = draw(
            st.binary(
                min_size=math.prod(shape) * dtype.itemsize,
                max_size=math.prod(shape) * dtype.itemsize,
            )
        )
        tensors[name] = torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)
    return tensors


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit: NaNs included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(weights.as_bytes(a)) == bytes(weights.as_bytes(b))
    )


def packed(tensors: Any) -> bytes:
    return weights.pack(weights.frozen(tensors))


def unpacked(image: bytes) -> dict[str, Tensor]:
    return weights.as_tensors(weights.unpack(image, "x"))


def file_with(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(tensor_sets())
def test_comes_back_bit_by_bit(tensors: dict[str, Tensor]) -> None:
    back = unpacked(packed(tensors))
    assert back.keys() == tensors.keys() and all(
        same(back[name], tensors[name]) for name in tensors
    )


@given(tensor_sets())
def test_safetensors_reads_what_pack_wrote(tensors: dict[str, Tensor]) -> None:
    back = safetensors.torch.load(packed(tensors))
    assert back.keys() == tensors.keys() and all(
        same(back[name], tensors[name]) for name in tensors
    )


@given(tensor_sets())
def test_unpack_reads_what_safetensors_wrote(tensors: dict[str, Tensor]) -> None:
    back = unpacked(safetensors.torch.save(tensors))
    assert back.keys() == tensors.keys() and all(
        same(back[name], tensors[name]) for name in tensors
    )


@given(tensor_sets(), st.randoms())
def test_order_does_not_matter(tensors: dict[str, Tensor], rng: Any) -> None:
    order = list(tensors)
    rng.shuffle(order)
    shuffled = {name: tensors[name] for name in order}
    assert packed(tensors) == packed(shuffled)
    assert weights.digest(tensors) == weights.digest(shuffled)


@given(tensor_sets())
def test_every_tensor_is_aligned(tensors: dict[str, Tensor]) -> None:
    for tensor in unpacked(packed(tensors)).values():
        assert tensor.data_ptr() % weights.ALIGNMENT == 0


def test_an_image_of_earlier_versions_is_read() -> None:
    """They put long tensors first, and spaces behind the header so that values began at a multiple
    of 64 bytes."""
    tensors = {"b": torch.arange(16.0), "a": torch.tensor([1, 2, 3], dtype=torch.int8)}
    header = {
        "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        "a": {"dtype": "I8", "shape": [3], "data_offsets": [64, 67]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    back = unpacked(file_with(text, bytes(weights.as_bytes(tensors["b"])) + b"\1\2\3"))
    assert back.keys() == tensors.keys() and all(
        same(back[name], tensors[name]) for name in tensors
    )


@pytest.mark.parametrize("sizes", [(64, 10), (64, 33), (784, 512)])
def test_a_served_layer_answers_bit_for_bit_like_the_trained_one(sizes: tuple[int, int]) -> None:
    layer, row = torch.nn.Linear(*sizes), torch.randn(1, sizes[0])
    back = unpacked(packed({"odd": torch.zeros(3), **layer.state_dict()}))
    assert torch.equal(torch.nn.functional.linear(row, back["weight"], back["bias"]), layer(row))


def test_pack_takes_a_copy_and_any_layout() -> None:
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(base.clone())
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "scalar": torch.tensor(2.0),
        "parameter": parameter,
    }
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.device("meta"):  # a caller's default device must not matter
        copies = weights.frozen(tensors)
    base.zero_()
    back = unpacked(weights.pack(copies))
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    assert not any(tensor.requires_grad for tensor in back.values())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no weights"),
        ({"__metadata__": torch.zeros(1)}, "rename"),
        ({3: torch.zeros(1)}, "rename"),
        ({"w": [1.0, 2.0]}, "w is a list"),
        ({"w": np.zeros(2, ">f4")}, ">f4"),
        ({"w": np.zeros(2, bool)}, "bool"),
        ({"w": np.zeros((2, 0), np.float32)}, "not empty"),
        ({"w": torch.zeros(2, device="meta")}, "on meta"),
        ({"w": torch.zeros(0)}, "not empty"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"w": torch.zeros(2, dtype=torch.bool)}, "bool"),
        ({"w": torch.eye(2).to_sparse()}, "sparse"),
        ({"w" * (1 << 20): torch.zeros(1)}, "bytes, the most is"),
    ],
)
def test_pack_refuses(tensors: Any, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        packed(tensors)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\x01",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (weights.MAX_HEADER_NBYTES + 1).to_bytes(8, "little")
        + bytes(weights.MAX_HEADER_NBYTES + 1),
        file_with(b"{"),
        file_with(b"\xff\xfe"),
        file_with(b"[" * 10_000),
        file_with(b'{"a": ' * 10_000),
        file_with([]),
        file_with({}),
        file_with({}, bytes(8)),
        file_with({"w": ONE}, bytes(7)),
        file_with({"w": ONE}, bytes(9)),
        file_with({"w": ONE | {"dtype": "BOOL"}}, bytes(8)),
        file_with({"w": ONE | {"dtype": "pickle"}}, bytes(8)),
        file_with({"w": ONE | {"shape": [-1, -2]}}, bytes(8)),
        file_with({"w": ONE | {"shape": [1 << 63, 0]}}, bytes(8)),
        file_with({"w": ONE | {"shape": [2.0]}}, bytes(8)),
        file_with({"w": ONE | {"shape": [1 << 40, 1 << 40]}}, bytes(8)),
        file_with({"w": ONE | {"shape": [0], "data_offsets": [0, 0]}}),
        file_with({"w": ONE | {"data_offsets": [-8, 0]}}, bytes(8)),
        file_with({"w": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
        file_with({"w": ONE | {"data_offsets": [0, 1 << 70]}}, bytes(8)),
        file_with({"w": ONE, "v": ONE}, bytes(8)),  # overlap
        file_with({"w": ONE, "v": ONE | {"data_offsets": [12, 20]}}, bytes(20)),  # gap
        file_with({"w": ONE | {"data_offsets": [4, 12]}}, bytes(12)),  # gap at the start
    ],
)
def test_unpack_refuses_a_hostile_header(image: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match=r"file\.safetensors cannot be read.*restore"):
        weights.unpack(image, "file.safetensors")


@given(st.binary(max_size=200))
def test_unpack_never_fails_otherwise(data: bytes) -> None:
    for candidate in (data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(CorruptArtifactError):
            weights.unpack(candidate, "x")


@given(tensor_sets(), tensor_sets())
def test_digests_differ_where_the_tensors_do(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    equal = a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    assert (weights.digest(a) == weights.digest(b)) == equal


def test_digest_frames_names_shapes_and_dtypes() -> None:
    """Sets whose concatenated bytes agree, or nearly, are told apart."""
    zeros = torch.zeros
    sets = [
        {"a": zeros(4), "b": zeros(4)},
        {"ab": zeros(4), "": zeros(4)},
        {"a": zeros(8)},
        {"a": zeros(2, 4)},
        {"a": zeros(4, 2)},
        {"a": zeros(8, dtype=torch.int32)},
        {"a": zeros(4, dtype=torch.float64)},
        {"aF32[8]": zeros(8)},
        {},
    ]
    assert len({weights.digest(tensors) for tensors in sets}) == len(sets)


def test_digest_is_this_very_one() -> None:
    """Published digests are compared across machines and years: the encoding must not drift."""
    import hashlib
    import struct

    encoding = (
        b"5:head.F32[1, 2]" + struct.pack("<2f", 1.0, -2.5) + b"1:nI64[]" + struct.pack("<q", 7)
    )
    tensors = {"n": torch.tensor(7), "head.": torch.tensor([[1.0, -2.5]])}
    assert weights.digest(tensors) == hashlib.sha256(encoding).hexdigest()


def test_split() -> None:
    tensors = {
        name: torch.zeros(1)
        for name in ("body.0.weight", "head.weight", "head.bias", "header.weight", "x.head.y")
    }
    body, head = weights.split(tensors)
    assert sorted(head) == ["head.bias", "head.weight"] and sorted(body) == [
        "body.0.weight",
        "header.weight",
        "x.head.y",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 12_345, 99_999])
def test_finds_the_one_bad_value(value: float, dtype: torch.dtype, position: int) -> None:
    tensor = torch.randn(100_000).to(dtype)
    assert weights.first_non_finite({"a": torch.zeros(1), "b": tensor}) is None
    tensor[position] = value
    assert weights.first_non_finite({"a": torch.zeros(1), "b": tensor}) == "b"


def test_infinities_that_cancel_are_found_and_a_sum_that_overflows_is_not_one() -> None:
    assert weights.first_non_finite({"w": torch.tensor([float("inf"), -float("inf")])}) == "w"
    assert (
        weights.first_non_finite({"w": torch.full((10,), torch.finfo(torch.float32).max)}) is None
    )
    assert weights.first_non_finite({"n": torch.full((10,), torch.iinfo(torch.int64).max)}) is None
