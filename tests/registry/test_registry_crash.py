"""A publisher may die at any instant: what is visible afterwards is whole, and nothing else is left
for long."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import budget
import registry_crash
from flserving.errors import FlservingError
from flserving.models import weights
from flserving.registry import Registry, storage
from flserving.registry.index import Index

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def test_kill_at_random_instants(tmp_path: Path) -> None:
    result = registry_crash.start("random", tmp_path / "registry", 120, budget.seed())
    assert result["kills"] == 120
    assert result["interrupted"] >= 5, f"the kills hit hardly any publish: {result}"
    assert result["versions"] >= 5, f"hardly any publish came through: {result}"


def test_kill_at_lines_of_the_protocol(tmp_path: Path) -> None:
    result = registry_crash.start("lines", tmp_path, 11)
    assert result["lines"] > 200 and result["before"] > 10, result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_every_line_of_the_protocol(tmp_path: Path) -> None:
    result = registry_crash.start("lines", tmp_path, 1)
    assert result["before"] + result["after"] == result["lines"] - 1 and result["after"] > 5, result


def test_the_disk_has_everything_before_the_version_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 loses no written page, a power cut does: so the order of the waits is a test of its
    own."""
    events: list[str] = []
    staged = ["?"]
    fsync, rename, mkdir = os.fsync, os.rename, os.mkdir

    def recording_fsync(fd: int) -> None:
        target = Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path)
        events.append(f"sync {target}".replace(staged[0], "<token>"))
        fsync(fd)

    def recording_rename(source: str, target: str) -> None:
        events.append("rename")
        rename(source, target)

    def recording_mkdir(path: str) -> None:
        staged[0] = Path(path).name if "staging" in path else staged[0]
        mkdir(path)

    def recording_sql(sql: str) -> None:
        for event in ("COMMIT", "INSERT INTO versions"):
            if sql.startswith(event):
                events.append(event)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("tells file descriptors apart by /proc")
    with Registry(tmp_path) as registry:
        assert registry._writer is not None
        registry._writer.set_trace_callback(recording_sql)
        monkeypatch.setattr(os, "mkdir", recording_mkdir)
        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(os, "rename", recording_rename)
        registry_crash.publish_next(registry)
    assert events == [
        "sync staging/<token>/weights.safetensors",
        "sync staging/<token>/manifest.json",
        "sync staging/<token>",
        "sync models",  # the new folder of the name
        "rename",
        "sync models/m",
        "INSERT INTO versions",
        "COMMIT",
    ]


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
def test_a_full_disk_is_an_error_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with Registry(tmp_path) as registry:
        registry_crash.publish_next(registry)
        real, calls = getattr(os, call), 0
        for failing in range(1, 10):
            calls = 0

            def full(*args: Any, failing: int = failing) -> Any:
                nonlocal calls
                calls += 1
                if calls == failing:
                    raise OSError(28, "No space left on device")
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, full)
                if failing_publish := _fails(registry):
                    assert (
                        "No space left on device" in failing_publish
                        and "free space" in failing_publish
                    )
                    assert registry.version_numbers("m") == [1] and not os.listdir(
                        tmp_path / "staging"
                    )
            if calls < failing:
                break
        assert failing > 1, f"publish never called os.{call}"
        assert registry.version_numbers("m") == [1, 2]  # the last round did not fail
    assert registry_crash.check(tmp_path, 0) == 2


def _fails(registry: Registry) -> str | None:
    try:
        registry_crash.publish_next(registry)
    except FlservingError as error:
        return str(error)
    return None


def test_a_failed_commit_leaves_no_version_and_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry(tmp_path) as registry:
        with monkeypatch.context() as patch:
            patch.setattr(Registry, "_point", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                registry_crash.publish_next(registry)
        assert registry.version_numbers("m") == [] and registry.models() == []
        # in place, but without a row it does not exist
        assert (tmp_path / "models" / "m" / "1").is_dir()
        registry_crash.publish_next(registry)
    assert registry_crash.check(tmp_path, 0) == 1


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_publish_replaces_whatever_has_taken_its_place(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("mine")
    with Registry(tmp_path / "registry") as registry:
        place = tmp_path / "registry" / "models" / "m" / "1"
        place.parent.mkdir()
        place.write_text("") if kind == "file" else place.symlink_to(precious)
        registry_crash.publish_next(registry)
    assert registry_crash.check(tmp_path / "registry", 0) == 1
    assert (precious / "data").read_text() == "mine"


def test_what_a_dead_publisher_left_goes_after_its_time_and_what_a_living_one_writes_stays(
    tmp_path: Path,
) -> None:
    with Registry(tmp_path) as registry:
        with storage.staging(registry._staging) as living:
            dead = Path(registry._staging, "dead")
            dead.mkdir()
            (dead / "weights.safetensors").write_bytes(b"half")
            registry_crash.publish_next(registry)
            assert dead.is_dir(), "it may be a publish that runs"
            long_ago = time.time() - storage.LEFT_AFTER_S - 1
            os.utime(dead, (long_ago, long_ago))
            registry_crash.publish_next(registry)
            assert os.listdir(registry._staging) == [Path(living).name]
        assert os.listdir(registry._staging) == [] and registry.version_numbers("m") == [1, 2]


def test_nobody_who_moves_an_alias_waits_for_a_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Registry(tmp_path, busy_timeout_s=0) as registry,
        Registry(tmp_path, busy_timeout_s=0) as other,
    ):
        registry_crash.publish_next(registry)
        write_file = storage.write_file

        def moved_meanwhile(path: str, data: bytes) -> None:
            if path.endswith("weights.safetensors"):
                other.set_alias("m", "default", 1, who="test", why="while somebody publishes")
            write_file(path, data)

        monkeypatch.setattr(storage, "write_file", moved_meanwhile)
        registry_crash.publish_next(registry)
        assert registry.aliases("m") == {"default": 1, "latest": 2}


def test_a_snapshot_is_published_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked, hashed and written is one copy: a module that changes meanwhile cannot tear
    it."""
    state, expected = registry_crash.tensors_of(1), registry_crash.tensors_of(1)
    body, head = weights.split(expected)
    with Registry(tmp_path) as registry:
        stage = storage.staging

        def train_meanwhile(folder: str) -> Any:
            for tensor in state.values():
                tensor.fill_(float("nan"))
            return stage(folder)

        # after the checks, before hashing and writing
        monkeypatch.setattr(storage, "staging", train_meanwhile)
        registry.publish("m", state, architecture="mlp", parameters={"sizes": registry_crash.SIZES})
        artifact = registry.read("m", 1)
    assert all(bool(tensor.isnan().all()) for tensor in state.values())
    assert all(torch.equal(artifact.tensors[name], expected[name]) for name in expected)
    assert artifact.manifest.digests.body == weights.digest(body)
    assert artifact.manifest.digests.head == weights.digest(head)


def test_an_index_that_cannot_be_opened_leaks_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, opened = Index._connect, []

    def second_fails(self: Index) -> Any:
        if opened:
            raise KeyboardInterrupt
        opened.append(connect(self))
        return opened[0]

    monkeypatch.setattr(Index, "_connect", second_fails)
    with pytest.raises(KeyboardInterrupt):
        Registry(tmp_path)
    with pytest.raises(Exception, match="closed database"):
        opened[0].execute("SELECT 1")
