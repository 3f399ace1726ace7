"""The manifest: strict in both directions, and readable by people."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving.errors import CorruptArtifactError, InvalidModelError
from flserving.registry import manifest
from flserving.registry.manifest import Digests, Lineage, Manifest, Preprocessing, Signature

DIGEST = "0123456789abcdef" * 4


def example(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "digits",
        "version": 3,
        "architecture": "mlp",
        "parameters": {"sizes": [64, 64, 10]},
        "signature": Signature((64,), (10,)),
        "preprocessing": Preprocessing((0.0, 1.5), (1.0, 2.0)),
        "lineage": Lineage(
            round=2, parent_version=1, num_clients=2, sample_counts=(10, 20), strategy="fedavg"
        ),
        "metrics": {"global_accuracy": 0.9},
        "digests": Digests(DIGEST, DIGEST, None, DIGEST),
        "weights_nbytes": 100,
        "created_at": "2026-01-02T03:04:05.000006+00:00",
        "note": "",
    }
    return Manifest(**fields | changes)


finite = st.floats(allow_nan=False, allow_infinity=False)
labels = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)


@given(
    metrics=st.dictionaries(labels, finite, max_size=5),
    note=st.text(st.characters(codec="utf-8"), max_size=200),
    counts=st.none() | st.lists(st.integers(0, 2**53), max_size=5),
    statistics=st.none() | st.lists(st.tuples(finite, finite), max_size=5),
    extra=st.dictionaries(
        labels, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | labels, max_size=3
    ),
)
def test_comes_back_as_it_went(
    metrics: Any, note: str, counts: Any, statistics: Any, extra: Any
) -> None:
    lineage = counts and Lineage(num_clients=len(counts), sample_counts=tuple(counts), extra=extra)
    mean, std = zip(*statistics, strict=True) if statistics else ((), ())
    wanted = example(
        metrics=metrics, note=note, lineage=lineage or None, preprocessing=Preprocessing(mean, std)
    )
    assert manifest.decode(manifest.encode(wanted), "x") == wanted


def test_is_plain_readable_json() -> None:
    data = manifest.encode(example())
    assert json.loads(data)["metrics"] == {"global_accuracy": 0.9} and data.count(b"\n") > 20


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"metrics": {"": 1.0}},
        {"metrics": {"x" * 65: 1.0}},
        {"version": 0},
        {"version": 1 << 63},
        {"name": "Digits"},
        {"note": "x" * 10_001},
        {"note": 3},
        {"parameters": {"p": float("nan")}},
        {"parameters": {"p": (1, 2)}},
        {"parameters": {"p": object()}},
        {"weights_nbytes": 0},
        {"digests": Digests("f" * 63, DIGEST, None, DIGEST)},
        {"digests": Digests(DIGEST.upper(), DIGEST, None, DIGEST)},
        {"signature": Signature((0,), (10,))},
        {"signature": Signature((64,), (10,), output_type="ranking")},  # type: ignore[arg-type]
        {"preprocessing": Preprocessing((float("nan"),), (1.0,))},
        {"lineage": Lineage(round=-1)},
        {"lineage": Lineage(extra={"x": [1]})},  # type: ignore[dict-item]
        {"lineage": Lineage(extra={"x": float("inf")})},
        {"created_at": "yesterday"},
        {"created_at": "2026-01-02T03:04:05+02:00"},
        {"parameters": {"p": "x" * manifest.MAX_MANIFEST_NBYTES}},
    ],
)
def test_encode_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidModelError, match=r"[dD]igits"):
        manifest.encode(example(**changes))


def test_sample_counts_belong_to_clients() -> None:
    with pytest.raises(ValueError, match="3 entries for 2 clients"):
        Lineage(num_clients=2, sample_counts=(1, 2, 3))


def test_a_manifest_cannot_be_reassigned() -> None:
    with pytest.raises(AttributeError):
        example().version = 4  # type: ignore[misc]


def altered(**changes: Any) -> bytes:
    return json.dumps(json.loads(manifest.encode(example())) | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        altered(surprise=1),
        altered(version="3"),
        altered(version=3.5),
        altered(version=True),
        altered(metrics={"m": "0.5"}),
        altered(metrics={"m": None}),
        altered(digests={}),
        altered(name="../up"),
        altered(signature={"input_shape": [64], "output_shape": [10], "dtype": "float64"}),
        altered(lineage={"num_clients": 1, "sample_counts": [1, 2]}),
        altered().replace(b"0.9", b"NaN"),
        altered().replace(b"0.9", b"1e999"),
    ],
)
def test_decode_refuses(data: bytes) -> None:
    with pytest.raises(
        CorruptArtifactError, match=r"m/1/manifest\.json is not a manifest .*restore"
    ):
        manifest.decode(data, "m/1/manifest.json")


def test_a_newer_format_is_called_by_its_name() -> None:
    with pytest.raises(
        CorruptArtifactError,
        match=r"not a manifest of format 1 .*install the flserving that wrote it",
    ):
        manifest.decode(altered(format=2, surprise="of the future"), "x")


@pytest.mark.parametrize(
    "name", ["a", "0", "digits", "digits-v1.0_b", "a" * 64, "3.14", "a-", "a_"]
)
def test_good_names(name: str) -> None:
    assert manifest.check_name("model name", name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "ü",
        "a" * 65,
        "..",
        ".",
        "a..b",
        "../a",
        "a/b",
        "a\\b",
        "-a",
        "_a",
        ".a",
        "a.",
        "a b",
        "a\n",
        "a\0",
        "١",
        "%2e",
        None,
        3,
        b"a",
    ],
)
def test_bad_names(name: Any) -> None:
    with pytest.raises(InvalidModelError, match=r"model name .*: use 1 to 64 lower-case letters"):
        manifest.check_name("model name", name)


def test_unknown_lineage_facts_are_refused_not_dropped() -> None:
    with pytest.raises(msgspec.ValidationError, match="rounds"):
        msgspec.convert({"rounds": 3}, Lineage)
