"""A registry that cannot be written: it is read, served and followed, and says why it takes no
change."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from flserving import ModelServer, Registry, models
from flserving.errors import ConfigError, FlservingError, NotFoundError
from flserving.registry import storage
from flserving.registry.heads import HeadSet
from flserving.registry.index import FILE_NAME
from serving_models import wait_until

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="POSIX permissions"),
    pytest.mark.timeout(120),
]
ROW = [[0.0] * 64]


def publish(registry, alias="default"):
    torch.manual_seed(0)
    return registry.publish(
        "digits", models.build("digits_mlp"), architecture="digits_mlp", alias=alias
    ).version


@pytest.fixture
def root(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        publish(registry)
        publish(registry, alias="canary")
    return tmp_path / "registry"


@pytest.fixture
def refuse(root, monkeypatch):
    """Let the system refuse to make, write and remove what is below ``root``, as a read-only mount
    does."""
    really = os.open
    blocked = {"on": True}

    def opened(path, flags, mode=0o777, **more):
        if (
            blocked["on"]
            and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            and str(path).startswith(str(root))
        ):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return really(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", opened)
    return blocked


CHANGES = {
    "publish": publish,
    "set_alias": lambda registry: registry.set_alias(
        "digits", "default", 2, who="test", why="test"
    ),
    "rollback": lambda registry: registry.rollback("digits", who="test", why="test"),
    "remove_alias": lambda registry: registry.remove_alias(
        "digits", "canary", who="test", why="test"
    ),
}


def files(root):
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_it_is_read_and_served_and_refuses_changes_with_the_reason(root, refuse):
    before = files(root)
    with Registry(root) as registry, ModelServer(registry=registry) as server:
        assert registry.read_only == "Read-only file system"
        assert registry.aliases("digits") == {"canary": 2, "default": 1}
        assert (
            server.predict(ROW)["model_version"] == "1"
            and server.health_check()["status"] == "healthy"
        )
        for change in CHANGES.values():
            with pytest.raises(
                FlservingError, match=r"the registry is read-only \(Read-only file system\)"
            ) as raised:
                change(registry)
            assert "space" not in str(raised.value)
    assert files(root) == before, "nothing was left there"
    with pytest.raises(FlservingError, match="closed"):
        registry.models()


def test_where_it_can_be_written_again_it_is(root, refuse):
    with Registry(root) as registry:
        assert registry.read_only
    refuse["on"] = False
    with Registry(root) as registry:
        assert registry.read_only is None and publish(registry) == 3


@pytest.mark.full
def test_changes_by_others_are_followed(root, refuse):
    """A trainer on the host writes, a server in a container reads: whether the trainer keeps it
    open or not."""
    with Registry(root) as reader, ModelServer(registry=reader) as server:
        refuse["on"] = False
        for version in range(3, 9):
            with Registry(root) as writer:
                assert publish(writer) == version
                wait_until(
                    lambda version=version: server.predict(ROW)["model_version"] == str(version),
                    "the change",
                )
                writer.set_alias("digits", "default", 1, who="test", why="test")
                wait_until(lambda: server.predict(ROW)["model_version"] == "1", "the alias")
            assert reader.version_numbers("digits") == list(range(1, version + 1))
        assert server.health_check()["problems"] == {}


def test_what_is_read_beside_a_writer_is_always_whole(root, refuse):
    """Versions without gaps, and an alias that points at one of them, however the log comes and
    goes meanwhile."""
    with Registry(root) as reader:
        refuse["on"] = False
        done = threading.Event()

        def write():
            try:
                for _ in range(12):
                    with Registry(root) as writer:
                        publish(writer)
            finally:
                done.set()

        writing = threading.Thread(target=write)
        writing.start()
        seen = 0
        while not done.is_set():
            target = reader.resolve("digits")
            numbers = reader.version_numbers("digits")
            assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= max(seen, target)
            seen = len(numbers)
        writing.join()
        assert reader.resolve("digits") == 14


def test_a_writer_that_closes_while_its_files_are_looked_at_is_no_fault(root, refuse, monkeypatch):
    """SQLite takes its log and its shared memory away together, between any two looks."""
    log = Path(root, f"{FILE_NAME}-wal")
    exists = os.path.exists

    def exists_no_more(path):
        if str(path).endswith("-shm"):
            log.unlink(missing_ok=True)
        return exists(path)

    with Registry(root) as reader:
        assert reader.read_only
        log.write_bytes(b"a log that goes")
        monkeypatch.setattr(os.path, "exists", exists_no_more)
        assert reader.resolve("digits") == 1
        assert not log.exists()


@pytest.mark.full
def test_a_writer_that_was_killed_leaves_a_registry_that_can_be_read(root, refuse):
    refuse["on"] = False
    code = (
        "import os, sys, flserving; registry = flserving.Registry(sys.argv[1]);"
        "registry.set_alias('digits', 'default', 2, who='test', why='test'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=False, timeout=300)
    assert Path(root, f"{FILE_NAME}-wal").stat().st_size
    refuse["on"] = True
    with Registry(root) as registry:
        assert registry.read_only and registry.resolve("digits") == 2
    Path(root, f"{FILE_NAME}-shm").unlink()
    with pytest.raises(
        FlservingError, match="was not closed by who wrote it: open it once where it can be written"
    ):
        Registry(root)


def test_a_folder_without_a_registry_that_cannot_be_written_holds_none(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "makedirs", denied)
    with pytest.raises(ConfigError, match=r"cannot hold a registry .Read-only file system"):
        Registry(tmp_path / "new")


def test_another_user_serves_what_its_owner_lets_it_read(root):
    """With the permissions of a real system: no write bit is set, and who is root becomes another
    user meanwhile."""

    def served(folder):
        with Registry(folder) as registry, ModelServer(registry=registry) as server:
            assert server.predict(ROW)["model_version"] == "1"
            if registry.read_only:
                with pytest.raises(
                    FlservingError, match=r"the registry is read-only \(Permission denied\)"
                ):
                    CHANGES["set_alias"](registry)
            return registry.read_only

    assert served(root) is None  # now all is imported: the other user may not read where it lies
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        shared = Path(shutil.copytree(root, f"{open_to_all}/registry"))
        paths = [shared, *shared.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            assert served(shared) == "Permission denied"
        finally:
            os.seteuid(user)
            for path in paths:
                path.chmod(0o755)


# Who may read


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_private_files_are_their_owners_alone_under_any_umask(tmp_path, umask):
    """The heads of clients and the index (who moved what and why, the keys of experiments) are kept
    as keys are."""
    before = os.umask(umask)
    try:
        with Registry(tmp_path / "registry") as registry:
            sizes = {"sizes": [4, 3, 2]}
            heads = HeadSet("head", ["c-1"], np.ones((1, 4, 2), np.float32))
            registry.publish(
                "m", models.build("mlp", sizes), architecture="mlp", parameters=sizes, heads=heads
            )
            root = Path(registry.root)
            assert root.stat().st_mode & 0o777 == 0o700
            private = [*root.glob("*.sqlite3*"), *root.rglob("heads.bin")]
            assert len(private) == 4  # the index with its log and shared memory, the heads
            assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    finally:
        os.umask(before)


def test_a_registry_that_its_operator_shares_stays_as_it_is(root):
    root.chmod(0o750)
    index = root / FILE_NAME
    index.chmod(0o640)
    with Registry(root) as registry:
        publish(registry)
        assert (root.stat().st_mode & 0o777, index.stat().st_mode & 0o777) == (0o750, 0o640)


# Full and strange


def test_a_full_disk_is_not_called_busy(root, monkeypatch):
    """SQLite may say that the database is locked where a write failed for want of space."""
    with Registry(root, busy_timeout_s=0) as registry, Registry(root, busy_timeout_s=0) as other:
        with other._transaction():
            with pytest.raises(FlservingError, match="other processes keep writing"):
                CHANGES["set_alias"](registry)
            monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4096}))
            with pytest.raises(FlservingError, match="the disk is full") as raised:
                CHANGES["set_alias"](registry)
        assert (raised.value.http_status, raised.value.grpc_code) == (500, "INTERNAL")
        CHANGES["set_alias"](registry)


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Registry("~/models") as registry:
        publish(registry)
        assert registry.root == str(tmp_path / "models")
    assert not Path("~").exists()
    assert storage.user_path(Path("~/x")) == str(tmp_path / "x") and storage.user_path("a~") == "a~"
    with pytest.raises(NotFoundError), Registry(Path("~/models")) as registry:
        registry.resolve("nobody")
