"""Checks of the exercises "publish" and "promote" (notebook 01): the power fails at every call, in
every way it can."""

from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256

from flserving.errors import NotFoundError
from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.lab.releases.disk import Disk, FragileDisk, PowerCut

Publish = Callable[[Disk, bytes], int]
Promote = Callable[[Disk, int], object]

_DATA = {number: f"the weights of round {number}, ".encode() * 3 for number in range(1, 13)}
_MOST_CALLS = 100


def check_publish(publish: Publish) -> None:
    """Check ``publish(disk, data) -> version``.

    Right is: the next number; a file of that name with the SHA-256 of ``data`` (64 hex digits) and
    ``data``; whatever call the power fails at, the file is whole or not there; once ``publish`` has
    returned, it is there for good.

    Raises:
        AssertionError: Says at which call the power failed, and what was on the disk then.
    """
    judge(
        "publish",
        publish,
        Part(
            "takes the next number",
            _numbers,
            (
                "The versions are the files whose names are numbers; compare them as numbers.",
                "`numbers = [int(name) for name in disk.names() if name.isdecimal()]`, and max takes a `default=`.",
                "`version = max(numbers, default=0) + 1`, and at the end `return version`.",
            ),
        ),
        Part(
            "puts the digest in front of the data",
            _content,
            (
                "`sha256(data).hexdigest()` is a text of 64 hex digits; a file holds bytes.",
                "Write `sha256(data).hexdigest().encode() + data`.",
            ),
        ),
        Part(
            "whole or not there, whenever the power fails",
            _whole_or_not_there,
            (
                "A file that is being written is half there for a moment: who may see it under its number then?",
                "Write another name and sync it; only then give it its number, in one step.",
                '`disk.write("staged", ...)`, `disk.sync("staged")`, `disk.rename("staged", str(version))`.',
            ),
        ),
        Part(
            "works again after a power cut",
            _publishes_again,
            (
                "A dead publisher leaves a file behind. It is nobody's: overwrite it.",
                "Count only names that are numbers, and do not ask whether the staged file exists.",
            ),
        ),
        Part(
            "there for good once publish has returned",
            _there_for_good,
            (
                "A rename changes the folder, and the folder reaches the disk later than the file.",
                "After the rename and before `return`: `disk.sync_names()`.",
            ),
        ),
    )


def check_promote(promote: Promote) -> None:
    """Check ``promote(disk, version)``.

    Right is: the file ``default`` holds the number of the version, as text; whatever call the power
    fails at, it holds the old number or the new one; once ``promote`` has returned, the new one.
    NotFoundError: no such version.

    Raises:
        AssertionError: Says at which call the power failed, and what was on the disk then.
    """
    judge(
        "promote",
        promote,
        Part(
            "default holds the number",
            _moves_the_alias,
            (
                "The alias is a file `default` that holds the number as text; the version's own file stays.",
                'Write `str(version).encode()` to "default.new", then rename that file to "default".',
            ),
        ),
        Part(
            "refuses a version that is not there",
            _refuses_the_unknown,
            (
                "Look at disk.names() before you write anything.",
                "`if str(version) not in disk.names(): raise NotFoundError(...)`, in the first line.",
            ),
        ),
        Part(
            "old or new, whenever the power fails",
            _old_or_new,
            (
                "Between a write and its sync the disk may hold nothing of it: never write to `default` itself.",
                "A rename takes the place of the old file in one step: do not move the old one away first.",
                'Write "default.new", `disk.sync("default.new")`, then `disk.rename("default.new", "default")`.',
            ),
        ),
        Part(
            "the new one for good once promote has returned",
            _promoted_for_good,
            ("A rename is safe when the names are.", "End with `disk.sync_names()`."),
        ),
    )


def _started(publish: Publish, before: Mapping[str, bytes]) -> tuple[str, bytes]:
    """The name and the content of what publish writes when nothing goes wrong."""
    disk = FragileDisk(before)
    name = str(ask("publish(disk, data)", publish, disk, _DATA[3]))
    assert name in disk.names(), (
        f"publish returned {name}, and there is no file of that name: {disk.names()}"
    )
    return name, disk.read(name)


def _content(publish: Publish) -> None:
    for number in (1, 2):  # the name says nothing about the content
        data = _DATA[3]
        _, stored = _started(publish, _stored(*range(1, number)))
        assert stored != data, (
            "the file holds the data alone: put their SHA-256 in front, or nobody notices when the disk flips a bit"
        )
        assert stored != sha256(data).digest() + data, (
            "the digest is 32 raw bytes: write it as 64 hex digits (hexdigest)"
        )
        assert stored != data + sha256(data).hexdigest().encode(), (
            "the digest stands behind the data: put it in front"
        )
        assert stored[64:] == data, (
            f"after 64 digits of the digest the file holds {stored[64:90]!r}: data must follow"
        )
        assert stored[:64] == sha256(data).hexdigest().encode(), (
            f"the file begins with {stored[:12]!r}: that is not the SHA-256 of the data"
        )


def _whole_or_not_there(publish: Publish) -> None:
    before = _stored(1, 2) | {"default": b"2"}
    name, whole = _started(publish, before)
    for disk, told in _every_cut(
        before, "publish(disk, data)", lambda disk: publish(disk, _DATA[3])
    ):
        for files in disk.after_a_cut():
            _older(files, before, told)
            found = files.get(name)
            assert found is None or found == whole, (
                f"{told}, and version {name} was there with {len(found)} of its {len(whole)} bytes: write and sync "
                "another name first, then rename it to the number"
            )


def _publishes_again(publish: Publish) -> None:
    before = _stored(1, 2) | {"default": b"2"}
    for disk, told in _every_cut(
        before, "publish(disk, data)", lambda disk: publish(disk, _DATA[3])
    ):
        for files in disk.after_a_cut():
            again = FragileDisk(files)
            number = ask(f"publish(disk, data), after {told},", publish, again, _DATA[4])
            taken = [name for name in files if name.isdecimal()]
            assert str(number) not in taken and str(number) in again.names(), (
                f"{told}, and the next publish took number {number!r}: what a dead publisher left must not disturb it"
            )
            assert again.read(str(number)).count(_DATA[4]) == 1, (
                f"{told}, and the next version was not written whole"
            )


def _there_for_good(publish: Publish) -> None:
    before = _stored(1, 2) | {"default": b"2"}
    name, whole = _started(publish, before)
    disk = FragileDisk(before)
    publish(disk, _DATA[3])
    for files in disk.after_a_cut():
        assert files.get(name) == whole, (
            f"publish returned, then the power failed, and version {name} was gone: a new name is safe only after "
            "disk.sync_names()"
        )


def _moves_the_alias(promote: Promote) -> None:
    before = _stored(1, 2) | {"default": b"1"}
    disk = FragileDisk(before)
    ask("promote(disk, 2)", promote, disk, 2)
    _points(dict(_files(disk)), "2", "promote(disk, 2) returned", before)
    fresh = FragileDisk(_stored(1, 2))
    ask("promote(disk, 2) without an alias", promote, fresh, 2)
    _points(dict(_files(fresh)), "2", "promote(disk, 2) returned", {})


def _old_or_new(promote: Promote) -> None:
    before = _stored(1, 2) | {"default": b"1"}
    for disk, told in _every_cut(before, "promote(disk, 2)", lambda disk: promote(disk, 2)):
        for files in disk.after_a_cut():
            _older(files, _stored(1, 2), told)
            found = files.get("default")
            assert found is not None, (
                f"{told}, and there was no default any more: nobody is answered until it is back"
            )
            assert found in (b"1", b"2"), (
                f"{told}, and default held {found!r}: write the number to another file, sync that, and rename it to "
                "default in one step"
            )
            again = FragileDisk(files)
            ask("promote(disk, 2)", promote, again, 2)
            assert again.read("default") == b"2", (
                f"{told}, and the next promote did not come through"
            )


def _promoted_for_good(promote: Promote) -> None:
    disk = FragileDisk(_stored(1, 2) | {"default": b"1"})
    ask("promote(disk, 2)", promote, disk, 2)
    for files in disk.after_a_cut():
        assert files.get("default") == b"2", (
            "promote returned, then the power failed, and default was the old version: a rename is safe only after "
            "disk.sync_names()"
        )


def _numbers(publish: Publish) -> None:
    disk = FragileDisk()
    for number in range(1, 13):
        before = _files(disk)
        got = ask(f"publish(disk, data), the {number}. time", publish, disk, _DATA[number])
        told = (
            f"with the versions 1 to {number - 1} on the disk, publish"
            if number > 1
            else "on an empty disk, publish"
        )
        assert got is not None, f"{told} returned None: return the number of the version"
        assert type(got) is int, f"{told} returned {got!r}: return the number, an int"
        changed = [
            name
            for name, data in before.items()
            if name.isdecimal() and _files(disk).get(name) != data
        ]
        assert not changed, (
            f"{told} overwrote version {changed[0]}: versions never change; compare numbers, not text ('9' > '10')"
        )
        assert got == number, f"{told} returned {got}: the next number is {number}"
        assert str(got) in disk.names(), (
            f"{told} returned {got}, and there is no file {str(got)!r}: {disk.names()}"
        )
    for extra, why in (("staged", "a file that is no version"), ("default", "the alias")):
        disk = FragileDisk(_stored(1, 2) | {extra: b"2"})
        got = ask("publish(disk, data)", publish, disk, _DATA[3])
        assert got == 3, (
            f"with 1, 2 and {extra!r} on the disk publish returned {got}: {why} is not counted"
        )
    disk = FragileDisk(_stored(1, 5))
    got = ask("publish(disk, data)", publish, disk, _DATA[6])
    assert got == 6, (
        f"with the versions 1 and 5 on the disk publish returned {got}: one more than the largest is 6"
    )


def _every_cut(
    before: Mapping[str, bytes], call: str, work: Callable[[FragileDisk], object]
) -> Iterator[tuple[FragileDisk, str]]:
    for cut_at in range(1, _MOST_CALLS):
        disk = FragileDisk(before, cut_at)
        try:
            ask(call, work, disk)
        except PowerCut as cut:
            yield disk, f"the power failed in {cut}, call {cut_at} of {call}"
        else:
            return
    raise AssertionError(f"{call} changed the disk {_MOST_CALLS} times: it needs four calls")


def _older(files: Mapping[str, bytes], before: Mapping[str, bytes], told: str) -> None:
    for name, data in before.items():
        assert files.get(name) == data, (
            f"{told}, and {name!r} held {files.get(name, b'nothing')[:12]!r}: publish must not touch what is there"
        )


def _points(
    files: Mapping[str, bytes], wanted: str, told: str, before: Mapping[str, bytes]
) -> None:
    assert "default" in files, f"{told}, and there is no file 'default': {sorted(files)}"
    found = files["default"]
    assert found != before.get("default"), f"{told}, and default is still {found!r}"
    assert found == wanted.encode(), (
        f"{told}, and default holds {found[:20]!r}: write the number as text, {wanted!r}"
    )
    assert {name: files.get(name) for name in ("1", "2")} == _stored(1, 2), (
        f"{told}, and a version is gone or changed"
    )


def _refuses_the_unknown(promote: Promote) -> None:
    before = _stored(1, 2) | {"default": b"1"}
    disk = FragileDisk(before)
    try:
        promote(disk, 9)
    except NotFoundError:
        pass
    except Exception as error:
        raise AssertionError(
            f"promote(disk, 9) raised {type(error).__name__}, there is no version 9: raise NotFoundError, and callers "
            "get a 404 that says so"
        ) from error
    else:
        raise AssertionError(
            "promote(disk, 9) returned, there is no version 9: every request would fail; refuse it"
        )
    assert _files(disk) == before, (
        "promote(disk, 9) raised and yet changed the disk: look before you write"
    )


def _stored(*numbers: int) -> dict[str, bytes]:
    return {str(number): _of(_DATA[number]) for number in numbers}


def _of(data: bytes) -> bytes:
    return sha256(data).hexdigest().encode() + data


def _files(disk: FragileDisk) -> dict[str, bytes]:
    return {name: disk.read(name) for name in disk.names()}
