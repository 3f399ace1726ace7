"""Deltas: the right tensors or a typed error, whatever bytes come; few bytes where little
changed."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given

from budget import examples
from edge_cloud import state
from flserving.edge import delta
from flserving.errors import ConflictError, CorruptArtifactError
from flserving.models import weights

ODD = {
    "double": torch.linspace(-1, 1, 7, dtype=torch.float64),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.float16),
    "brain": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "count": torch.tensor(2**62),
    "small": torch.tensor([-128, 127], dtype=torch.int8),
    "byte": torch.tensor([[0, 255]], dtype=torch.uint8),
    "cube": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) - 12,
    "zero": torch.zeros(3, 4),
    "tiny": torch.tensor([[1e-45, 0.0, -1e-45], [1e-40, 3e-41, 1e-45]]),
    "huge": torch.tensor([[3.4e38, -3.4e38, 1.0]]),
}


def as_form(tensors, form):
    return delta.quantised(tensors) if form == "int8" else tensors


def same(a, b):
    return weights.digest(a) == weights.digest(b)


@pytest.mark.parametrize("form", delta.FORMS)
@pytest.mark.parametrize("base", [None, 1, 3])
def test_the_target_comes_out(form, base):
    start = None if base is None else state(base)
    data = delta.encode(state(3), start, form)
    got = delta.apply(data, None if start is None else as_form(start, form), state(3), form)
    assert same(got, as_form(state(3), form))
    if base == 3:
        assert len(data) < 150, "nothing changed: nothing but a header travels"


@pytest.mark.parametrize("form", delta.FORMS)
def test_every_dtype_shape_and_magnitude(form):
    changed = {name: tensor.flip(0) if tensor.dim() else tensor - 1 for name, tensor in ODD.items()}
    for start, target in ((None, ODD), (ODD, changed), (changed, ODD)):
        data = delta.encode(target, start, form)
        base = None if start is None else as_form(start, form)
        assert same(delta.apply(data, base, target, form), as_form(target, form))


def test_only_changed_tensors_travel():
    base, target = state(1), dict(state(1))
    target["head.bias"] = target["head.bias"] + 1
    data = zstandard.ZstdDecompressor().decompress(delta.encode(target, base, "exact"), 1 << 20)
    length = int.from_bytes(data[:4], "little")
    assert msgspec.json.decode(data[4 : 4 + length])["changed"] == ["head.bias"]
    assert len(data) == 4 + length + target["head.bias"].nbytes


@examples(60)
@given(st.integers(0, 2**32 - 1), st.floats(-44, 38))
def test_quantised_is_near_and_a_projection(seed, magnitude):
    w = np.random.default_rng(seed).standard_normal((3, 17)) * 10.0**magnitude
    tensors = {"w": torch.from_numpy(np.clip(w, -3e38, 3e38).astype(np.float32))}
    once = delta.quantised(tensors)
    assert same(delta.quantised(once), once), (
        "a device could not tell its base's codes from its weights"
    )
    most = tensors["w"].abs().amax(dim=1, keepdim=True).double()
    spacing = most.float().mul(2**-22).clamp(min=2e-45).double()
    assert ((once["w"].double() - tensors["w"].double()).abs() <= most / 254 + spacing).all()
    assert torch.equal(once["w"].abs().amax(dim=1, keepdim=True).double(), most)


def test_int8_is_a_quarter_and_less_where_little_moved():
    tensors = {
        "w": torch.from_numpy(np.random.default_rng(0).standard_normal((64, 512), dtype=np.float32))
    }
    moved = {
        "w": tensors["w"]
        + 1e-3 * torch.from_numpy(np.random.default_rng(1).standard_normal((64, 512)))
    }
    moved = {"w": moved["w"].float()}
    nbytes = tensors["w"].nbytes
    assert len(delta.encode(moved, None, "int8")) < nbytes / 4
    assert len(delta.encode(moved, tensors, "int8")) < nbytes / 30
    assert len(delta.encode(moved, tensors, "exact")) < nbytes * 0.7


def test_other_tensors_are_a_conflict():
    with pytest.raises(ConflictError, match="other tensors"):
        delta.encode(state(1), state(1, [8, 25, 3]), "exact")


# Hostile bytes


def frame(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else msgspec.json.encode(header)
    return zstandard.compress(
        (len(text) if length is None else length).to_bytes(4, "little") + text + payload
    )


GOOD = {"form": "exact", "base": None, "changed": ["head.bias"]}
BIAS = b"\0" * 12
BOMB = zstandard.ZstdCompressor(level=1).compress(b"\0" * (64 << 20))
HOSTILE = {
    "empty": b"",
    "not zstd": b"delta",
    "no header": zstandard.compress(b""),
    "header longer than the rest": frame(GOOD, length=10_000),
    "header of 4 GiB": frame(GOOD, length=2**32 - 1),
    "not JSON": frame(b"[[["),
    "deep JSON": frame(b"[" * 100_000),
    "other fields": frame(GOOD | {"shape": [1]}),
    "other form": frame(GOOD | {"form": "int8"}, BIAS),
    "unknown form": frame(GOOD | {"form": "pickle"}, BIAS),
    "other base": frame(GOOD | {"base": "0" * 64}, BIAS),
    "unknown part": frame(GOOD | {"changed": ["../x"]}, BIAS),
    "part twice": frame(GOOD | {"changed": ["head.bias"] * 2}, BIAS * 2),
    "too short": frame(GOOD, BIAS[:-1]),
    "too long": frame(GOOD, BIAS + b"\0"),
    "bomb": BOMB,
    "bomb behind a sound start": frame(GOOD, BIAS + b"\0" * (64 << 20)),
    "window of 128 MiB": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27)
    ).compress(b"\0" * (1 << 24)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_deltas_are_refused(name):
    with pytest.raises(CorruptArtifactError, match="the delta cannot be applied"):
        delta.apply(HOSTILE[name], None, state(1), "exact")


def test_a_wrong_base_is_refused():
    data = delta.encode(state(3), state(2), "exact")
    for base in (None, state(1), state(2, [8, 25, 3])):
        with pytest.raises(CorruptArtifactError, match="the delta cannot be applied"):
            delta.apply(data, base, state(3), "exact")


@pytest.mark.parametrize("form", delta.FORMS)
def test_damage_anywhere_is_refused_or_changes_the_result(form):
    """The caller compares the result's digest with a signed one: so either is fine, and a crash is
    not."""
    base = as_form(state(1), form)
    good = delta.encode(state(2), state(1), form)
    rng, refused = np.random.default_rng(3), 0
    for _ in range(300):
        data = bytearray(good)
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        cut = bytes(data) if rng.random() < 0.7 else good[:at]
        try:
            got = delta.apply(cut, base, state(2), form)
        except CorruptArtifactError:
            refused += 1
        else:
            assert got.keys() == state(2).keys()
    assert refused > 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of Linux")
def test_a_bomb_takes_no_memory():
    code = (
        "import resource, sys, zstandard\n"
        "from flserving.edge import delta\n"
        "from flserving.errors import CorruptArtifactError\n"
        "from edge_cloud import state\n"
        "delta.apply(delta.encode(state(1), None, 'exact'), None, state(1), 'exact')\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    delta.apply(data, None, state(1), 'exact')\n"
        "except CorruptArtifactError:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    text = msgspec.json.encode(GOOD)
    head = len(text).to_bytes(4, "little") + text + BIAS
    bomb = zstandard.ZstdCompressor(level=1).compress(head + bytes(1 << 28))
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", code], input=bomb, capture_output=True, cwd=support, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 10, (
        "kilobytes: of a quarter of a gigabyte, hardly anything may be inflated"
    )
