"""The disks of the exercises: a folder and a dictionary behave alike, and a power cut keeps what
was synced."""

import pytest

from flserving.lab.releases.disk import Folder, FragileDisk, PowerCut


@pytest.fixture(params=["folder", "memory"])
def disk(request, tmp_path):
    return Folder(tmp_path) if request.param == "folder" else FragileDisk()


def test_both_disks_keep_files(disk):
    disk.write("new", b"one")
    disk.write("new", b"two")
    disk.sync("new")
    disk.write("old", b"three")
    disk.rename("new", "old")
    disk.sync_names()
    assert disk.names() == ["old"] and disk.read("old") == b"two"
    for call in (disk.read, disk.sync, lambda name: disk.rename(name, "old")):
        with pytest.raises(FileNotFoundError):
            call("new")


def after(*calls, files=None, cut_at=None):
    disk = FragileDisk(files, cut_at)
    try:
        for name, *arguments in calls:
            getattr(disk, name)(*arguments)
    except PowerCut:
        pass
    return [dict(state) for state in {tuple(state.items()) for state in disk.after_a_cut()}]


def test_what_was_synced_is_kept():
    assert after(("write", "a", b"1234"), ("sync", "a"), ("sync_names",)) == [{"a": b"1234"}]


def test_what_was_not_synced_is_kept_in_part():
    found = after(("write", "a", b"1234"), ("sync_names",))
    assert sorted(state["a"] for state in found) == [b"", b"12", b"1234"]
    found = after(("write", "a", b"5678"), files={"a": b"1234"})
    assert sorted(state["a"] for state in found) == [b"1234", b"56", b"5678"]


def test_a_name_that_was_not_synced_is_kept_or_not():
    found = after(("write", "a", b"12"), ("sync", "a"), ("rename", "a", "b"))
    assert {tuple(state) for state in found} == {(), ("a",), ("b",)}
    assert {data for state in found for data in state.values()} == {b"12"}
    found = after(("rename", "a", "b"), files={"a": b"1", "b": b"2"})
    assert sorted(map(sorted, found)) == [["a", "b"], ["b"]]


@pytest.mark.parametrize(
    ("cut_at", "names", "done"),
    [
        (1, {(), ("a",)}, ["write"]),
        (2, {(), ("a",)}, ["write", "sync"]),
        (4, {(), ("a",), ("b",)}, None),
    ],
)
def test_the_call_that_fails_has_not_happened(cut_at, names, done):
    calls = (("write", "a", b"12"), ("sync", "a"), ("rename", "a", "b"), ("sync_names",))
    assert {tuple(state) for state in after(*calls, cut_at=cut_at)} == names
    disk = FragileDisk(cut_at=cut_at)
    with pytest.raises(PowerCut):
        for name, *arguments in calls:
            getattr(disk, name)(*arguments)
    with pytest.raises(PowerCut):
        disk.write("after", b"")  # the power stays off
    if done is not None:
        assert [call.partition("(")[0] for call in disk.done[:-1]] == done
