"""``flserving registry``: what the commands show, move and remove is what the registry itself
says."""

import getpass
import json
import os
import time

import pytest

from flserving import Registry
from flserving.api import cli
from serving_processes import two_versions


@pytest.fixture
def root(tmp_path):
    return two_versions(tmp_path / "registry")


@pytest.fixture
def command(root, capsys):
    """Run a command; its answer in JSON, or, where it fails, what it says."""

    def command(*arguments):
        code = cli.main(["registry", *map(str, arguments), "--registry", str(root), "--json"])
        shown = capsys.readouterr()
        return json.loads(shown.out) if code == 0 else shown.err

    return command


def test_list_shows_models_and_versions(root, command):
    assert command("list") == [{"model": "digits", "versions": 2, "aliases": {"default": 1}}]
    first, second = command("list", "digits")
    assert (first["version"], first["aliases"], second["version"], second["aliases"]) == (
        1,
        ["default"],
        2,
        [],
    )
    with Registry(root) as registry:
        assert first["weights_nbytes"] == registry.manifest("digits", 1).weights_nbytes


def test_a_version_that_cannot_be_read_keeps_its_row(root, command):
    (root / "models/digits/1/manifest.json").write_text("{}")
    first, second = command("list", "digits")
    assert "is not what was published" in first["problem"] and "problem" not in second


def test_show_gives_the_manifest(root, command):
    shown = command("show", "digits")
    manifest = json.loads((root / "models/digits/1/manifest.json").read_text())
    assert shown == {"aliases": ["default"], **manifest}
    assert command("show", "digits", 2)["version"] == 2


def test_promote_and_rollback_move_the_alias_and_log_who_and_why(root, command):
    assert command("promote", "digits", 2, "--why", "fairer", "--who", "ada")["before"] == 1
    assert command("rollback", "digits", "--why", "too slow") == {
        "model": "digits", "alias": "default", "before": 2, "version": 1
    }  # fmt: skip
    with Registry(root) as registry:
        log = registry.history("digits")
    assert list(log["who"]) == ["publish", "ada", getpass.getuser()]
    assert list(log["why"])[1:] == ["fairer", "too slow"]


def test_promote_is_a_compare_and_set(root, command):
    """Who has looked at an old state must not overwrite what somebody else decided since."""
    said = command("promote", "digits", 2, "--why", "late", "--if-at", 2)
    assert said == "flserving: alias 'default' of 'digits' points at 1, not at 2: look again\n"
    assert (
        command("promote", "digits", "default", "--alias", "canary", "--why", "try", "--if-at", 0)[
            "before"
        ]
        is None
    )
    assert command("list")[0]["aliases"] == {"canary": 1, "default": 1}


def test_promote_does_not_undo_a_move_that_comes_meanwhile(root, command, monkeypatch):
    move = Registry.set_alias

    def late(registry, *given, **said):
        move(registry, "digits", "default", 2, who="somebody", why="first")
        return move(registry, *given, **said)

    monkeypatch.setattr(Registry, "set_alias", late)
    assert "points at 2, not at 1: look again" in command("promote", "digits", 1, "--why", "second")


def test_a_move_without_a_reason_is_refused(root, capsys):
    with pytest.raises(SystemExit):
        cli.main(["registry", "promote", "digits", "2", "--registry", str(root)])
    assert "the following arguments are required: --why" in capsys.readouterr().err


def test_compare_tells_what_differs(root, command):
    rows = {(row["kind"], row["item"]): row for row in command("compare", "digits", "default", 2)}
    assert not rows["digest", "weights"]["equal"] and rows["digest", "preprocessing"]["equal"]
    assert rows["digest", "weights"]["difference"] is None, "NaN is not JSON"
    assert all(row["difference"] > 0 for (kind, _), row in rows.items() if kind == "tensor")


@pytest.fixture
def leftovers(root):
    """What writers left who died: in staging, in the place of the next version, beside a manifest.
    And a publish that runs."""
    left = {
        "staging/dead/weights.safetensors": 5,
        "models/digits/3/weights.safetensors": 7,
        f"models/digits/2/{'a' * 64}": 3,
    }
    for path, size in {**left, "staging/alive/weights.safetensors": 9}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x" * size)
    os.utime(root / "staging/dead", (time.time() - 7200,) * 2)
    return {"staging/dead": 5, "models/digits/3": 7, f"models/digits/2/{'a' * 64}": 3}


def test_gc_removes_what_dead_writers_left_and_a_dry_run_only_lists_it(root, command, leftovers):
    before = sorted(root.rglob("*"))
    listed = command("gc", "--dry-run")
    assert {row["path"]: row["nbytes"] for row in listed} == leftovers and not any(
        row["removed"] for row in listed
    )
    assert sorted(path for path in root.rglob("*") if "sqlite" not in path.name) == [
        path for path in before if "sqlite" not in path.name
    ]
    assert {row["path"] for row in command("gc") if row["removed"]} == {*leftovers}
    assert not any((root / path).exists() for path in leftovers)
    assert (root / "staging/alive").is_dir() and command("gc") == []
    with Registry(root) as registry:
        assert registry.read("digits", 2).manifest.version == 2


def test_text_is_a_table_and_shows_no_control_characters(root, capsys):
    with Registry(root) as registry:
        registry.publish(
            "digits",
            registry.read("digits", 1).tensors,
            architecture="digits_mlp",
            note="a\x1b[31m",
        )
    assert cli.main(["registry", "list", "digits", "--registry", str(root)]) == 0
    header, first, *_, last = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["version", "aliases"] and first.split()[:2] == ["1", "default"]
    assert last.endswith("a?[31m")
    assert cli.main(["registry", "show", "digits", "--registry", str(root)]) == 0
    assert "architecture    digits_mlp" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("list", "nobody"), ("show", "digits", "7"), ("rollback", "digits", "--why", "x")]
)
def test_what_is_not_there_is_said(root, command, arguments):
    assert command(*arguments).startswith("flserving: ")
