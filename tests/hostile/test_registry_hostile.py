"""Bytes on disk that are not what was published: every one is found, named, and answered by a typed
error."""

import errno
import json
import os
import pickle
import random
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from flserving import models
from flserving.errors import ConfigError, CorruptArtifactError, FlservingError, ModelTooLargeError
from flserving.models import weights
from flserving.registry import Registry, storage
from flserving.registry.manifest import MAX_MANIFEST_NBYTES, sha256

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """One good version "m" 1, and a good version "other" 1 that every attack must leave
    readable."""
    with Registry(tmp_path / "registry") as opened:
        for name in ("m", "other"):
            module = models.build("mlp", {"sizes": [4, 8, 3]})
            opened.publish(
                name,
                module,
                architecture="mlp",
                parameters={"sizes": [4, 8, 3]},
                metrics={"accuracy": 0.5},
            )
        yield opened
        opened.read("other", 1)


def folder(registry: Registry) -> Path:
    return Path(registry.root) / "models" / "m" / "1"


def refused(registry: Registry, file: str, message: str = "") -> None:
    """Reading fails, says which file and what to do, and not where on the disk it lies."""
    with pytest.raises(
        CorruptArtifactError, match=rf"^m/1/{file} .*{message}.*restore it from a backup"
    ) as caught:
        registry.read("m", 1)
    assert registry.root not in str(caught.value)
    with Registry(registry.root) as fresh, pytest.raises(CorruptArtifactError):
        fresh.read("m", 1)


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
def test_any_flipped_byte_is_found(registry: Registry, file: str) -> None:
    path = folder(registry) / file
    good = path.read_bytes()
    rng = random.Random(1)
    positions = {*range(0, len(good), 7), *range(16), len(good) - 1}
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CorruptArtifactError, match=f"m/1/{file}"):
            registry.read("m", 1)
    assert len(positions) > 90
    path.write_bytes(good)
    registry.read("m", 1)


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
def test_any_truncation_or_extension_is_found(registry: Registry, file: str) -> None:
    path = folder(registry) / file
    good = path.read_bytes()
    for percent in range(100):
        path.write_bytes(good[: len(good) * percent // 100])
        with pytest.raises(CorruptArtifactError, match=f"m/1/{file}"):
            registry.read("m", 1)
    for more in (b"\0", b" ", b"\n", good):
        path.write_bytes(good + more)
        refused(registry, file)


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
def test_a_missing_file(registry: Registry, file: str) -> None:
    (folder(registry) / file).unlink()
    refused(registry, file, "No such file")


def test_a_missing_folder(registry: Registry) -> None:
    folder(registry).rename(folder(registry).with_name("9"))
    with pytest.raises(
        CorruptArtifactError, match=r"m/1/manifest\.json cannot be opened .No such file"
    ):
        registry.read("m", 1)


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
def test_a_symbolic_link_is_refused_even_to_the_right_bytes(registry: Registry, file: str) -> None:
    path = folder(registry) / file
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")
    refused(registry, file, "cannot be opened")


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_regular_file_is_refused_and_does_not_hang(
    registry: Registry, file: str, make: Callable[[Path], None]
) -> None:
    path = folder(registry) / file
    path.unlink()
    make(path)
    assert not stat.S_ISREG(path.stat().st_mode)
    refused(registry, file)


def enthrone(registry: Registry, file: str, data: bytes, **manifest_changes: Any) -> None:
    """The strongest attacker: puts bytes in place and makes every digest, the index's too, agree
    with them."""
    place = folder(registry)
    manifest = json.loads((place / MANIFEST).read_bytes())
    (place / file).write_bytes(data)
    if file == WEIGHTS:
        manifest["weights_nbytes"] = len(data)
        manifest["digests"]["weights"] = sha256(data)
        (place / MANIFEST).write_text(json.dumps(manifest | manifest_changes))
    outsider = sqlite3.connect(f"{registry.root}/registry.sqlite3")
    digest = sha256((place / MANIFEST).read_bytes())
    outsider.execute("UPDATE versions SET manifest_sha256 = ? WHERE name = 'm'", (digest,))
    outsider.commit()
    outsider.close()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB"],))


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "kind",
    [
        "pickle",
        "torch.save",
        "pickle in the header",
        "claims terabytes",
        "deep",
        "empty header",
        "text",
    ],
)
def test_disguised_and_huge_weights_are_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save({"w": torch.zeros(3), "bomb": Bomb()}, tmp_path / "torch.save")
    data = {
        "pickle": pickle.dumps(Bomb()),
        "torch.save": (tmp_path / "torch.save").read_bytes(),
        "pickle in the header": header(pickle.dumps(Bomb())),
        "claims terabytes": (1 << 44).to_bytes(8, "little") + b"{}",
        "deep": header(b"[" * 1_000_000),
        "empty header": header(b""),
        "text": b"import os; os.system('true')",
    }[kind]
    enthrone(registry, WEIGHTS, data)
    refused(registry, WEIGHTS, "cannot be read")
    assert not (tmp_path / "exploded").exists()


def test_a_header_over_its_limit_is_refused_before_it_is_parsed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = b'"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = b"{" + entry + b" " * weights.MAX_HEADER_NBYTES + b"}"
    enthrone(registry, WEIGHTS, header(text, bytes(4)))
    monkeypatch.setattr(safetensors.torch, "load", None)
    refused(registry, WEIGHTS, "its header claims")


def test_a_foreign_but_sound_safetensors_file_is_read(registry: Registry) -> None:
    """The counterpart of the refusals above: with agreeing digests the reader itself has no
    prejudice."""
    tensors = {"head.weight": torch.randn(3, 8), "odd": torch.randn(5)}
    enthrone(registry, WEIGHTS, safetensors.torch.save(tensors))
    back = registry.read("m", 1).tensors
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"{}", b"[" * 100_000, pickle.dumps({}), b"\xff" * 100],
    ids=lambda data: str(data[:8]),
)
def test_a_manifest_that_is_none(registry: Registry, data: bytes) -> None:
    enthrone(registry, MANIFEST, data)
    refused(registry, MANIFEST)


def test_a_manifest_over_its_limit_is_refused_before_it_is_read(registry: Registry) -> None:
    enthrone(registry, MANIFEST, b" " * (MAX_MANIFEST_NBYTES + 1))
    with pytest.raises(CorruptArtifactError, match=r"m/1/manifest\.json has 4,194,305 bytes"):
        registry.read("m", 1)
    # a file of holes: who read it would run out of memory
    os.truncate(folder(registry) / MANIFEST, 1 << 42)
    with pytest.raises(
        CorruptArtifactError, match=r"m/1/manifest\.json has 4,398,046,511,104 bytes"
    ):
        registry.read("m", 1)


def test_a_manifest_that_claims_terabytes_takes_no_memory(registry: Registry) -> None:
    enthrone(registry, WEIGHTS, b"x", weights_nbytes=1 << 45)
    with pytest.raises(ModelTooLargeError, match="max_artifact_bytes"):
        registry.read("m", 1)


def test_weights_of_another_version_do_not_pass(registry: Registry) -> None:
    module = models.build("mlp", {"sizes": [4, 8, 3]})
    registry.publish("m", module, architecture="mlp", parameters={"sizes": [4, 8, 3]})
    one, two = folder(registry), folder(registry).with_name("2")
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)
    refused(registry, MANIFEST, "sha256 differs")
    (two / MANIFEST).write_bytes((one / MANIFEST).read_bytes())
    with pytest.raises(CorruptArtifactError, match=r"m/2/weights\.safetensors"):
        registry.read("m", 2)


def test_a_file_swapped_after_the_read_does_not_matter(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are read once: what was hashed is what is parsed (no time of check, time of use)."""
    expected = registry.read("m", 1).tensors
    read_file = storage.read_file

    def swap_after(root: str, relative: str, max_nbytes: int) -> bytes:
        image = read_file(root, relative, max_nbytes)
        # in place: a memory map would change now
        Path(root, relative).write_bytes(b"\0" * len(image))
        return image

    monkeypatch.setattr(storage, "read_file", swap_after)
    tensors = registry.read("m", 1).tensors
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_file_that_shrinks_while_it_is_read(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat, path = os.fstat, folder(registry) / WEIGHTS

    def shrink_after(fd: int) -> os.stat_result:
        status = fstat(fd)
        if status.st_ino == path.stat().st_ino:
            os.truncate(path, 100)
        return status

    monkeypatch.setattr(os, "fstat", shrink_after)
    with pytest.raises(CorruptArtifactError, match=r"ended .* bytes early"):
        registry.read("m", 1)


# The index


@pytest.mark.parametrize("damage", ["text", "zeros", "header", "missing table", "foreign", "newer"])
def test_a_damaged_index(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "registry.sqlite3"
    with Registry(tmp_path) as registry:
        registry.publish("m", models.build("tutorial_mlp"), architecture="tutorial_mlp")
    good = path.read_bytes()
    if damage == "text":
        path.write_bytes(b"not a database at all" * 1000)
    elif damage == "zeros":
        path.write_bytes(good[:100] + b"\0" * (len(good) - 100))
    elif damage == "header":
        path.write_bytes(b"\0" * 16 + good[16:])
    else:
        outsider = sqlite3.connect(path)
        statement = {
            "missing table": "DROP TABLE versions",
            "foreign": "ALTER TABLE versions RENAME COLUMN manifest_sha256 TO other",
            "newer": "PRAGMA user_version = 99",
        }[damage]
        outsider.execute(statement)
        outsider.commit()
        outsider.close()
    expected = ConfigError if damage == "newer" else CorruptArtifactError
    with pytest.raises(expected, match=r"registry\.sqlite3"), Registry(tmp_path) as registry:
        registry.read("m", 1)


def test_a_lost_index_does_not_cost_the_versions(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        registry.publish("m", models.build("tutorial_mlp"), architecture="tutorial_mlp")
    index, before = tmp_path / "registry.sqlite3", sorted((tmp_path / "models").rglob("*"))
    kept = index.read_bytes()
    index.unlink()
    with pytest.raises(
        CorruptArtifactError, match=r"registry\.sqlite3 is missing beside published versions"
    ):
        Registry(tmp_path)
    assert sorted((tmp_path / "models").rglob("*")) == before and not index.exists()
    index.write_bytes(kept)
    with Registry(tmp_path) as registry:
        registry.read("m", 1)


def test_an_old_index_does_not_cost_the_newer_versions(tmp_path: Path) -> None:
    index, content = tmp_path / "registry.sqlite3", {"architecture": "tutorial_mlp"}
    for _ in range(3):
        with Registry(tmp_path) as registry:
            if registry.version_numbers("m") == [1]:
                backup = index.read_bytes()
            registry.publish("m", models.build("tutorial_mlp"), **content)  # type: ignore[arg-type]
    index.write_bytes(backup)
    with Registry(tmp_path) as registry:
        assert registry.version_numbers("m") == [1]
        with pytest.raises(CorruptArtifactError, match="ends 'm' at version 1, the folder goes on"):
            registry.publish("m", models.build("tutorial_mlp"), **content)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path / "models" / "m")) == ["1", "2", "3"]


def test_random_damage_to_the_index_is_an_error_or_harmless(tmp_path: Path) -> None:
    """SQLite has no checksums: a flip may hide in unused space. It never becomes wrong weights, or
    an untyped error."""
    path = tmp_path / "registry.sqlite3"
    with Registry(tmp_path) as registry:
        registry.publish(
            "m", models.build("tutorial_mlp"), architecture="tutorial_mlp", alias="default"
        )
        expected = registry.read("m", 1).tensors
    good, rng, errors = path.read_bytes(), random.Random(5), 0
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 30, 300))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        for left in ("registry.sqlite3-wal", "registry.sqlite3-shm"):
            (tmp_path / left).unlink(missing_ok=True)
        try:
            with Registry(tmp_path) as registry:
                tensors = registry.read("m", registry.resolve("m")).tensors
        except FlservingError:
            errors += 1
        else:
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert errors > 10


def test_a_name_in_a_hostile_index_leads_nowhere(registry: Registry, tmp_path: Path) -> None:
    outsider = sqlite3.connect(f"{registry.root}/registry.sqlite3")
    outsider.execute(
        "INSERT INTO versions (name, version, manifest_sha256) VALUES ('../../up', 1, 'x')"
    )
    outsider.commit()
    outsider.close()
    assert "../../up" in registry.models()
    with pytest.raises(FlservingError, match=r"model name '\.\./\.\./up'"):
        registry.read("../../up", 1)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_folder_that_may_not_be_written(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(
        FlservingError, match=r"'m' was not published .Permission denied.: check .* permissions"
    ):
        registry.publish("m", models.build("tutorial_mlp"), architecture="tutorial_mlp")
    assert registry.read("m", 1).manifest.version == 1 and registry.version_numbers("m") == [1]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_a_file_that_cannot_be_opened_now_is_not_called_corrupt(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def denied(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        with pytest.raises(
            FlservingError, match=r"m/1/manifest\.json cannot be opened .*check limits"
        ) as caught:
            registry.read("m", 1)
    assert not isinstance(caught.value, CorruptArtifactError)
