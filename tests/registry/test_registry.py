"""The registry's contract: versions, aliases, the log, tables; from threads and from processes."""

import itertools
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import registry_crash
from budget import examples
from flserving import models
from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    ModelTooLargeError,
    NotFoundError,
    OverloadedError,
    ServerClosedError,
)
from flserving.models.processing import Preprocessor
from flserving.registry import Experiment, Registry
from flserving.registry.manifest import Lineage
from serving_models import PATIENCE_S

BY = {"who": "ana", "why": "test"}


def tiny(seed: int = 0) -> dict[str, Any]:
    """Keyword arguments and weights of a valid publish."""
    torch.manual_seed(seed)
    return {
        "model": models.build("mlp", {"sizes": [4, 8, 3]}),
        "architecture": "mlp",
        "parameters": {"sizes": [4, 8, 3]},
    }


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def three(registry: Registry) -> Registry:
    for seed in range(3):
        registry.publish("m", **tiny(seed))
    return registry


# Publish and read


@pytest.mark.parametrize("architecture", ["tutorial_mlp", "digits_mlp", "digits_cnn"])
def test_what_was_published_is_what_is_read(registry: Registry, architecture: str) -> None:
    module = models.build(architecture)
    inputs = models.signature(architecture)[0][0]
    mean, std = np.linspace(0, 1, inputs), np.linspace(0, 2, inputs)
    lineage = {
        "round": 7,
        "num_clients": 2,
        "sample_counts": [30, 40],
        "strategy": "fedavg",
        "extra": {"alpha": 0.1},
    }
    published = registry.publish(
        "digits",
        module,
        architecture=architecture,
        preprocessing={"mean": mean, "std": std},
        lineage=lineage,
        metrics={"global_accuracy": np.float32(0.5)},
        note="first",
    )
    artifact = registry.read("digits", 1)
    assert artifact.manifest == published == registry.manifest("digits", 1)
    assert (published.name, published.version, published.note) == ("digits", 1, "first")
    assert (published.signature.input_shape, published.signature.output_shape) == models.signature(
        architecture
    )
    assert published.lineage is not None and published.lineage.sample_counts == (30, 40)
    assert published.metrics == {"global_accuracy": 0.5}
    assert published.digests.preprocessing == Preprocessor(mean=mean, std=std).digest
    assert published.digests.head is not None
    rebuilt = models.build(architecture)
    rebuilt.load_state_dict(artifact.tensors, strict=True)
    rows = torch.randn(5, inputs)
    assert torch.equal(rebuilt(rows), module(rows))


def test_lineage_takes_the_numbers_that_training_has(registry: Registry) -> None:
    """Lists, NumPy's and torch's numbers, a struct or a mapping: what is stored is plain."""
    given = {
        "round": np.int64(2),
        "num_clients": 2,
        "sample_counts": np.array([3, 4]),
        "extra": {"alpha": np.float64(0.1)},
    }
    plain = Lineage(round=2, num_clients=2, sample_counts=(3, 4), extra={"alpha": 0.1})
    metrics = {"accuracy": torch.tensor(0.5), "loss": np.float32(0.25), "steps": 3}
    for lineage in (given, Lineage(**given)):  # type: ignore[arg-type]
        published = registry.publish("m", **tiny(), lineage=lineage, metrics=metrics)
        assert published.lineage == registry.manifest("m", published.version).lineage == plain
        assert published.metrics == {"accuracy": 0.5, "loss": 0.25, "steps": 3.0}


def test_weights_digest_is_what_sha256sum_prints(three: Registry) -> None:
    import hashlib

    file = Path(three.root) / "models" / "m" / "2" / "weights.safetensors"
    published = three.manifest("m", 2)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == published.digests.weights
    assert file.stat().st_size == published.weights_nbytes


def test_versions_count_from_one_for_each_name(registry: Registry) -> None:
    assert [registry.publish(name, **tiny()).version for name in "aabaab"] == [1, 2, 1, 3, 4, 2]
    assert registry.models() == ["a", "b"]
    assert registry.version_numbers("a") == [1, 2, 3, 4] and registry.version_numbers("c") == []


def test_body_and_head_have_digests_of_their_own(registry: Registry) -> None:
    content = tiny()
    first = registry.publish("m", **content)
    with torch.no_grad():
        content["model"].head.weight.add_(1)
    second = registry.publish("m", **content)
    assert first.digests.body == second.digests.body
    assert (
        first.digests.head != second.digests.head
        and first.digests.weights != second.digests.weights
    )


def test_a_model_without_a_head(registry: Registry) -> None:
    name = "test-registry-headless"
    models.register(name, input_shape=(2,), output_shape=(1,))(_headless)
    assert (
        registry.publish("m", _headless(), architecture=name, output_type="regression").digests.head
        is None
    )
    assert registry.read("m", 1).manifest.signature.output_type == "regression"


def _headless() -> torch.nn.Module:
    return torch.nn.Linear(2, 1)


def test_a_state_dict_in_any_order_gives_the_same_file(registry: Registry) -> None:
    content = tiny()
    state = content.pop("model").state_dict()
    a = registry.publish("m", state, **content)
    b = registry.publish("m", dict(reversed(state.items())), **content)
    assert a.digests == b.digests


def test_read_gives_fresh_tensors(three: Registry) -> None:
    first, second = three.read("m", 1), three.read("m", 1)
    for tensor in first.tensors.values():
        tensor.fill_(math.nan)
    assert all(tensor.isfinite().all() for tensor in second.tensors.values())
    assert all(tensor.isfinite().all() for tensor in three.read("m", 1).tensors.values())


def test_a_second_registry_on_the_same_folder_sees_everything(three: Registry) -> None:
    three.set_alias("m", "default", 2, **BY)
    with Registry(three.root) as other:
        assert other.read("m", 3).manifest == three.manifest("m", 3)
        assert other.aliases("m") == {"default": 2}
        assert other.history("m").equals(three.history("m"))


def changed(**changes: Any) -> dict[str, Any]:
    return tiny() | changes


def with_tensor(name: str, tensor: Any) -> dict[str, Any]:
    content = tiny()
    state = content["model"].state_dict()
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    return content | {"model": state}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (changed(architecture="nowhere"), NotFoundError, "no architecture 'nowhere'"),
        (changed(parameters={"sizes": "huge"}), InvalidModelError, "sizes of an mlp"),
        (
            changed(parameters={"sizes": [4, 9, 3]}),
            InvalidModelError,
            r"body.0.bias is float32\[8\], not .*\[9\]",
        ),
        (changed(parameters={"sizes": [4, 8, 8, 3]}), InvalidModelError, "body.2.bias is missing"),
        (changed(model=[1, 2]), InvalidModelError, "model is a list"),
        (changed(model=None), InvalidModelError, "model is a NoneType"),
        (changed(model={}), InvalidModelError, "no weights"),
        (changed(model={"a": 1}), InvalidModelError, "a is a int"),
        (with_tensor("head.bias", None), InvalidModelError, "head.bias is missing"),
        (with_tensor("head.bias", torch.zeros(4)), InvalidModelError, "head.bias is"),
        (
            with_tensor("head.bias", torch.zeros(3, dtype=torch.float64)),
            InvalidModelError,
            "float64",
        ),
        (with_tensor("extra", torch.zeros(1)), InvalidModelError, "extra is unexpected"),
        (
            with_tensor("head.bias", torch.tensor([0, math.nan, 0])),
            InvalidModelError,
            "head.bias holds NaN",
        ),
        (
            with_tensor("head.bias", torch.tensor([0, -math.inf, 0])),
            InvalidModelError,
            "head.bias holds NaN or inf",
        ),
        (changed(metrics={"loss": math.nan}), InvalidModelError, "manifest of 'm'"),
        (changed(metrics={"loss": "low"}), InvalidModelError, "could not convert"),
        (changed(metrics=[1]), InvalidModelError, "metrics"),
        (changed(metrics={"loss": 10**400}), InvalidModelError, "too large"),
        (changed(metrics={"\ud800": 1.0}), InvalidModelError, "manifest of 'm'"),
        (changed(note="\ud800"), InvalidModelError, "manifest of 'm'"),
        (changed(lineage={"extra": {"alpha": math.nan}}), InvalidModelError, "manifest of 'm'"),
        (changed(lineage={"extra": {"alpha": object()}}), InvalidModelError, "lineage"),
        (changed(lineage={"rounds": 1}), InvalidModelError, "rounds"),
        (changed(lineage={"round": -1}), InvalidModelError, "manifest of 'm'|lineage"),
        (
            changed(lineage={"num_clients": 2, "sample_counts": [1]}),
            InvalidModelError,
            "1 entries for 2 clients",
        ),
        (
            changed(lineage={"parent_version": 1}),
            InvalidModelError,
            "parent version 1: 'm' has only 0",
        ),
        (changed(lineage=[1]), InvalidModelError, "lineage"),
        (changed(output_type="ranking"), InvalidModelError, "ranking"),
        (changed(note="x" * 10_001), InvalidModelError, "manifest of 'm'"),
        (changed(preprocessing={"mean": [0.0] * 4}), InvalidModelError, "give 'mean' and 'std'"),
        (
            changed(preprocessing={"mean": [0.0] * 3, "std": [1.0] * 3}),
            ConfigError,
            "3 features, the model takes 4",
        ),
        (
            changed(preprocessing={"mean": [0.0] * 4, "std": [-1.0] * 4}),
            ConfigError,
            "not negative",
        ),
        (changed(preprocessing={"mean": [math.nan] * 4, "std": [1.0] * 4}), ConfigError, "finite"),
        (changed(alias="7"), InvalidModelError, "looks like a version number"),
        (changed(alias="a/b"), InvalidModelError, "alias 'a/b'"),
        (changed(alias="a", who=""), InvalidModelError, "who is ''"),
    ],
)
def test_publish_refuses_and_leaves_nothing(
    registry: Registry, content: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        registry.publish("m", **content)
    assert registry.models() == [] and registry.change_token() == 0 and registry.local_changes == 0
    assert not any(files for _, _, files in os.walk(Path(registry.root) / "models"))
    assert os.listdir(Path(registry.root) / "staging") == []


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "A", "a b", "a" * 65, None, 7])
def test_no_verb_takes_a_bad_name(registry: Registry, name: Any) -> None:
    verbs = [
        lambda: registry.publish(name, **tiny()),
        lambda: registry.read(name, 1),
        lambda: registry.manifest(name, 1),
        lambda: registry.versions(name),
        lambda: registry.version_numbers(name),
        lambda: registry.resolve(name, 1),
        lambda: registry.aliases(name),
        lambda: registry.set_alias(name, "a", 1, **BY),
        lambda: registry.rollback(name, "a", **BY),
        lambda: registry.remove_alias(name, "a", **BY),
        lambda: registry.history(name),
        lambda: registry.compare(name, 1, 1),
    ]
    for verb in verbs:
        with pytest.raises(InvalidModelError, match="model name"):
            verb()
    assert registry.change_token() == 0 and os.listdir(Path(registry.root) / "models") == []


def test_size_limit(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        nbytes = registry.publish("m", **tiny()).weights_nbytes
    with Registry(tmp_path, max_artifact_bytes=nbytes) as registry:
        registry.publish("m", **tiny())
        registry.read("m", 1)
    with Registry(tmp_path, max_artifact_bytes=nbytes - 1) as registry:
        with pytest.raises(InvalidModelError, match=f"{nbytes} bytes: raise max_artifact_bytes"):
            registry.publish("m", **tiny())
        with pytest.raises(
            ModelTooLargeError, match=f"{nbytes} bytes, max_artifact_bytes is {nbytes - 1}"
        ):
            registry.read("m", 1)
        assert registry.manifest("m", 1).weights_nbytes == nbytes


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_artifact_bytes": value} for value in (0, 1.5, True, "1")),
        *({"busy_timeout_s": value} for value in (-1, 3601, math.nan, True, "1", None)),
    ],
)
def test_absurd_settings(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Registry(tmp_path / "r", **settings)


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", "nul\0", None, 3):
        with pytest.raises(ConfigError, match="cannot hold a registry"):
            Registry(root)  # type: ignore[arg-type]


# Resolving


def test_resolve(three: Registry) -> None:
    three.set_alias("m", "default", 2, **BY)
    three.set_alias("m", "v1.0", 1, **BY)
    for ref, version in (
        (None, 2),
        ("default", 2),
        ("v1.0", 1),
        (3, 3),
        ("3", 3),
        (np.int64(3), 3),
    ):
        resolved = three.resolve("m", ref)  # type: ignore[arg-type]
        assert resolved == version and type(resolved) is int


@pytest.mark.parametrize(
    "ref",
    [
        0,
        -1,
        4,
        "4",
        "0",
        1 << 63,
        1 << 200,
        "9" * 30,
        "9" * 5000,
        "canary",
        "",
        "../x",
        "¹",
        "a" * 10_000,
    ],
)
def test_resolve_finds_nothing(three: Registry, ref: Any) -> None:
    with pytest.raises(NotFoundError, match="'m' has no version") as caught:
        three.resolve("m", ref)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("ref", [True, 1.0, b"1", [1], object()])
def test_resolve_takes_numbers_and_names_only(three: Registry, ref: Any) -> None:
    with pytest.raises(InvalidInputError, match="give a"):
        three.resolve("m", ref)
    with pytest.raises(InvalidInputError, match="give an integer"):
        three.read("m", ref)


def test_messages_name_what_there_is(three: Registry) -> None:
    three.set_alias("m", "canary", 1, **BY)
    with pytest.raises(NotFoundError, match="no model 'n'; known: m"):
        three.resolve("n")
    with pytest.raises(NotFoundError, match="'default': it has versions 1 to 3, aliases canary"):
        three.resolve("m")
    with pytest.raises(NotFoundError, match="versions start at 1"):
        three.read("m", 0)
    for call in (three.versions, three.history):
        with pytest.raises(NotFoundError, match="no model 'n'"):
            call("n")


def test_messages_stay_short(registry: Registry) -> None:
    for n in range(12):
        registry.publish("m", **tiny(), alias=f"alias-{n:02}")
    with pytest.raises(NotFoundError, match=r"alias-09 and 2 more$"):
        registry.resolve("m", "nowhere")


# Aliases and their log


def test_moves_and_rollbacks(three: Registry) -> None:
    assert three.set_alias("m", "default", 1, **BY) is None
    assert three.set_alias("m", "default", 2, **BY) == 1
    assert three.set_alias("m", "default", 3, **BY) == 2
    assert three.rollback("m", **BY) == 2 == three.resolve("m")
    assert three.rollback("m", **BY) == 1 == three.resolve("m")  # further back, not forth
    with pytest.raises(NotFoundError, match="points at version 1 and has no earlier one"):
        three.rollback("m", **BY)
    three.set_alias("m", "default", 3, **BY)
    assert three.rollback("m", **BY) == 1


def test_remove_and_bring_back(three: Registry) -> None:
    three.set_alias("m", "canary", 1, **BY)
    three.set_alias("m", "canary", 2, **BY)
    assert three.remove_alias("m", "canary", **BY) == 2
    assert three.aliases("m") == {}
    with pytest.raises(NotFoundError):
        three.resolve("m", "canary")
    with pytest.raises(NotFoundError, match="nothing to remove"):
        three.remove_alias("m", "canary", **BY)
    assert three.rollback("m", "canary", **BY) == 2
    assert three.rollback("m", "canary", **BY) == 1
    three.remove_alias("m", "canary", **BY)
    three.set_alias("m", "canary", 3, **BY)  # a fresh start
    with pytest.raises(NotFoundError, match="no earlier one"):
        three.rollback("m", "canary", **BY)


def test_aliases_refuse(three: Registry) -> None:
    for version in (0, 4, -1):
        with pytest.raises(NotFoundError):
            three.set_alias("m", "default", version, **BY)
    for verb in (three.rollback, three.remove_alias):
        with pytest.raises(NotFoundError, match="has no alias 'default'"):
            verb("m", "default", **BY)
    with pytest.raises(NotFoundError, match="no model 'n'"):
        three.set_alias("n", "default", 1, **BY)
    with pytest.raises(InvalidInputError):
        three.set_alias("m", "default", "1", **BY)  # type: ignore[arg-type]
    for alias in ("1", "007", "A", "", "a..b", "a/b", None):
        with pytest.raises(InvalidModelError, match="alias"):
            three.set_alias("m", alias, 1, **BY)  # type: ignore[arg-type]
    for by in (
        {"who": "", "why": "x"},
        {"who": "x", "why": " "},
        {"who": "x" * 201, "why": "x"},
        {"who": 1, "why": "x"},
        {"who": "\ud800", "why": "x"},
        {"who": "x", "why": "two\nlines"},
    ):
        with pytest.raises(InvalidModelError, match="the log needs"):
            three.set_alias("m", "default", 1, **by)  # type: ignore[arg-type]
    assert three.aliases("m") == {} and three.history("m").empty


def test_publish_moves_an_alias_in_the_same_step(three: Registry) -> None:
    before = three.change_token()
    three.publish("m", **tiny(), alias="champion", who="gate", why="better")
    three.publish("m", **tiny(), alias="champion")
    assert three.aliases("m") == {"champion": 5} and three.change_token() == before + 4
    log = three.history("m", "champion")
    assert log["who"].tolist() == ["gate", "publish"] and log["why"].tolist() == [
        "better",
        "published version 5",
    ]


def test_a_move_to_the_same_place_is_no_move(three: Registry) -> None:
    three.set_alias("m", "default", 1, **BY)
    three.set_alias("m", "default", 2, **BY)
    token = three.change_token()
    assert three.set_alias("m", "default", 2, **BY) == 2
    assert three.change_token() == token and len(three.history("m")) == 2
    assert three.rollback("m", **BY) == 1


def test_history_tells_who_when_and_why(tmp_path: Path) -> None:
    clock = (datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=n) for n in itertools.count())
    with Registry(tmp_path, now=lambda: next(clock)) as registry:
        for seed in range(2):
            registry.publish("m", **tiny(seed))
        registry.set_alias("m", "default", 1, who="ana", why="first")
        registry.set_alias("m", "canary", 2, who="ben", why="try")
        registry.set_alias("m", "default", 2, who="ana", why="good")
        registry.rollback("m", who="eve", why="bad")
        registry.remove_alias("m", "canary", who="ben", why="done")
        log = registry.history("m")
        assert list(log.columns) == ["when", "alias", "action", "from", "to", "who", "why"]
        missing = pd.NA
        expected = pd.DataFrame(
            {
                "alias": ["default", "canary", "default", "default", "canary"],
                "action": ["set", "set", "set", "rollback", "remove"],
                "from": pd.array([missing, missing, 1, 2, 2], dtype="Int64"),
                "to": pd.array([1, 2, 2, 1, missing], dtype="Int64"),
                "who": ["ana", "ben", "ana", "eve", "ben"],
                "why": ["first", "try", "good", "bad", "done"],
            }
        )
        pd.testing.assert_frame_equal(log.drop(columns="when"), expected, check_dtype=False)
        assert (
            log["when"].is_monotonic_increasing
            and log["when"].diff().dropna().eq(pd.Timedelta(seconds=1)).all()
        )
        assert log["when"].dt.tz is not None
        assert registry.history("m", "canary")["action"].tolist() == ["set", "remove"]
        assert registry.history("m", "nobody").empty
        with pytest.raises(InvalidModelError, match="alias"):
            registry.history("m", "No Body")


APPEND_ONLY = """
CREATE TRIGGER {0}_no_update BEFORE UPDATE ON {0} BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END;
CREATE TRIGGER {0}_no_delete BEFORE DELETE ON {0} BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END;
CREATE TRIGGER {0}_no_replace BEFORE INSERT ON {0} WHEN EXISTS (SELECT 1 FROM {0} WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END;
"""


def test_a_registry_whose_index_has_triggers_goes_on(tmp_path: Path) -> None:
    """Indexes of earlier versions refuse to change a row. Every verb only adds rows, so they do not
    notice."""
    registry = Registry(tmp_path)
    registry.publish("m", **tiny(), alias="default")
    registry.close()
    with closing(sqlite3.connect(tmp_path / "registry.sqlite3")) as old:
        for table in ("versions", "moves", "experiments"):
            old.executescript(APPEND_ONLY.format(table))
    with Registry(tmp_path) as registry:
        assert registry.publish("m", **tiny(), alias="default").version == 2
        assert registry.rollback("m", **BY) == 1
        assert registry.remove_alias("m", "default", **BY) == 1
        registry.set_alias("m", "default", 2, **BY)
        registry.start_experiment("m", Experiment.canary("x", 2, 1), **BY)
        registry.conclude_experiment("m", version=1, **BY)
        assert registry.aliases("m") == {"default": 1} and len(registry.history("m")) == 6
        registry.read("m", 2)


def test_an_alias_cannot_point_at_what_does_not_exist(three: Registry) -> None:
    outsider = sqlite3.connect(f"{three.root}/registry.sqlite3")
    try:
        outsider.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            outsider.execute(
                "INSERT INTO moves (name, alias, action, to_version, who, why, at) "
                "VALUES ('m', 'a', 'set', 9, 'x', 'x', 'x')"
            )
    finally:
        outsider.close()


class AliasMachine(RuleBasedStateMachine):
    """Aliases against a plain dict: alias -> the versions that a rollback would walk back through
    (None: removed)."""

    aliases = st.sampled_from(["default", "canary"])
    folders = itertools.count()
    base: Path

    @initialize()
    def open(self) -> None:
        self.registry = Registry(self.base / str(next(self.folders)))
        self.undo: dict[str, list[int | None]] = {}
        self.moves, self.published = 0, 0

    @rule()
    @precondition(lambda self: self.published < 4)
    def publish(self) -> None:
        self.published += 1
        assert self.registry.publish("m", **tiny()).version == self.published

    @rule(alias=aliases, version=st.integers(1, 4))
    def set_alias(self, alias: str, version: int) -> None:
        stack = self.undo.get(alias, [])
        if version > self.published:
            with pytest.raises(NotFoundError):
                self.registry.set_alias("m", alias, version, **BY)
            return
        before = stack[-1] if stack else None
        assert self.registry.set_alias("m", alias, version, **BY) == before
        if before != version:
            self.undo[alias] = [version] if before is None else [*stack, version]
            self.moves += 1

    @rule(alias=aliases)
    def rollback(self, alias: str) -> None:
        stack = self.undo.get(alias, [])
        if len(stack) < 2:
            with pytest.raises(NotFoundError):
                self.registry.rollback("m", alias, **BY)
            return
        stack.pop()
        assert self.registry.rollback("m", alias, **BY) == stack[-1]
        self.moves += 1

    @rule(alias=aliases)
    def remove(self, alias: str) -> None:
        stack = self.undo.get(alias, [])
        if not stack or stack[-1] is None:
            with pytest.raises(NotFoundError):
                self.registry.remove_alias("m", alias, **BY)
            return
        assert self.registry.remove_alias("m", alias, **BY) == stack[-1]
        stack.append(None)
        self.moves += 1

    @rule()
    def compare(self) -> None:
        pointing = {
            alias: stack[-1]
            for alias, stack in self.undo.items()
            if stack and stack[-1] is not None
        }
        assert self.registry.aliases("m") == pointing
        assert self.registry.change_token() == self.published + self.moves
        for alias in ("default", "canary"):
            if alias in pointing:
                assert self.registry.resolve("m", alias) == pointing[alias]

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            if self.published:
                log = self.registry.history("m")
                assert len(log) == self.moves
                for _, moves in log.groupby("alias"):  # every move starts where the last one ended
                    assert (
                        moves["from"].fillna(0).tolist()[1:] == moves["to"].fillna(0).tolist()[:-1]
                    )
            self.registry.close()


def test_aliases_behave_like_a_dict_with_undo(tmp_path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    AliasMachine.base = tmp_path
    run_state_machine_as_test(
        AliasMachine,
        settings=examples(25, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
    )


# Tables


def test_versions_table(registry: Registry) -> None:
    registry.publish(
        "m",
        **tiny(0),
        lineage={"round": 1, "strategy": "fedavg"},
        metrics={"global_accuracy": 0.5},
        note="a",
    )
    registry.publish(
        "m",
        **tiny(1),
        lineage={"round": 2, "parent_version": 1},
        metrics={"loss": 2.0},
        alias="default",
    )
    registry.publish("m", **tiny(2))
    registry.set_alias("m", "champion", 2, **BY)
    frame = registry.versions("m")
    assert frame.index.tolist() == [1, 2, 3] and frame.index.name == "version"
    assert frame["aliases"].tolist() == ["", "champion, default", ""]
    assert frame["round"].dropna().tolist() == [1, 2] and frame[
        "parent_version"
    ].dropna().tolist() == [1]
    assert frame.loc[1, "global_accuracy"] == 0.5 and frame["loss"].isna().tolist() == [
        True,
        False,
        True,
    ]
    assert frame["note"].tolist() == ["a", "", ""] and (frame["weights_nbytes"] > 0).all()
    assert frame["created_at"].is_monotonic_increasing and "problem" not in frame
    assert [registry.read("m", version).manifest.version for version in frame.index] == [1, 2, 3]


def test_a_broken_version_does_not_hide_the_others(three: Registry) -> None:
    (Path(three.root) / "models" / "m" / "2" / "manifest.json").write_text("{}")
    frame = three.versions("m")
    assert frame.index.tolist() == [1, 2, 3] and frame["problem"].notna().tolist() == [
        False,
        True,
        False,
    ]
    assert "m/2/manifest.json" in frame.loc[2, "problem"]


def test_compare(registry: Registry) -> None:
    content = tiny()
    registry.publish(
        "m", **content, metrics={"global_accuracy": 0.5, "old": 1.0}, lineage={"round": 1}
    )
    with torch.no_grad():
        content["model"].head.bias += torch.tensor([3.0, 0.0, 4.0])
    registry.publish(
        "m",
        **content,
        metrics={"global_accuracy": 0.75, "new": 1.0},
        lineage={"round": 2},
        alias="default",
    )
    frame = registry.compare("m", 1, "default")
    assert list(frame.columns) == ["a", "b", "equal", "difference"]
    assert frame.loc[("metric", "global_accuracy"), "difference"] == 0.25
    assert math.isnan(frame.loc[("metric", "old"), "b"]) and math.isnan(
        frame.loc[("metric", "new"), "a"]
    )
    assert frame.loc[("digest", "body"), "equal"] and not frame.loc[("digest", "head"), "equal"]
    assert frame.loc[("tensor", "head.bias"), "difference"] == pytest.approx(5.0, rel=1e-6)
    assert (
        frame.loc[("tensor", "head.weight"), "difference"] == 0
        and frame.loc[("tensor", "head.weight"), "equal"]
    )
    norm = float(registry.read("m", 1).tensors["head.weight"].norm())
    assert frame.loc[("tensor", "head.weight"), "a"] == pytest.approx(norm, rel=1e-6)
    assert registry.compare("m", 1, 1)["equal"].all()


def test_compare_of_different_shapes(registry: Registry) -> None:
    registry.publish("m", **tiny())
    registry.publish(
        "m",
        models.build("mlp", {"sizes": [4, 3]}),
        architecture="mlp",
        parameters={"sizes": [4, 3]},
    )
    frame = registry.compare("m", 1, 2)
    missing = frame.loc[("tensor", "body.0.weight")]
    assert not missing["equal"] and math.isnan(missing["b"]) and math.isnan(missing["difference"])
    assert math.isnan(frame.loc[("tensor", "head.weight"), "difference"])


# Changes


def test_the_change_token_moves_with_every_change_of_any_process(three: Registry) -> None:
    with Registry(three.root) as other:
        seen = [three.change_token()]
        for change in (
            lambda: other.publish("n", **tiny()),
            lambda: other.set_alias("m", "default", 1, **BY),
            lambda: other.set_alias("m", "default", 2, **BY),
            lambda: other.rollback("m", **BY),
            lambda: other.remove_alias("m", "default", **BY),
        ):
            change()
            assert three.change_token() == other.change_token() > seen[-1]
            seen.append(three.change_token())
        three.versions("m"), three.read("m", 1), three.history("m")
        assert three.change_token() == seen[-1]
        assert other.local_changes == 5 and three.local_changes == 3


# Life


def test_a_closed_registry_says_so(three: Registry) -> None:
    artifact = three.read("m", 1)
    three.close()
    three.close()
    for verb in (
        lambda: three.publish("m", **tiny()),
        lambda: three.read("m", 1),
        lambda: three.models(),
        lambda: three.change_token(),
        lambda: three.set_alias("m", "default", 1, **BY),
        lambda: three.rollback("m", **BY),
    ):
        with pytest.raises(ServerClosedError, match="registry is closed"):
            verb()
    assert os.listdir(Path(three.root) / "staging") == []
    assert all(tensor.isfinite().all() for tensor in artifact.tensors.values())


def test_thirty_openings_leave_no_file_open(tmp_path: Path) -> None:
    def cycle() -> None:
        with Registry(tmp_path) as registry:
            registry.publish("m", **tiny())
            registry.read("m", 1)

    cycle()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(30):
        cycle()
    assert not before or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_not_to_be_carried_over_a_fork(three: Registry) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            three.models()
        except ServerClosedError as error:
            os._exit(0 if "before a fork" in str(error) else 2)
        except BaseException:
            os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert three.models() == ["m"]


def test_a_writer_waits_no_longer_than_it_was_told(tmp_path: Path) -> None:
    with Registry(tmp_path, busy_timeout_s=0.05) as registry:
        registry.publish("m", **tiny())
        outsider = sqlite3.connect(tmp_path / "registry.sqlite3", isolation_level=None)
        outsider.execute("BEGIN IMMEDIATE")
        try:
            with pytest.raises(OverloadedError, match="try again"):
                registry.publish("m", **tiny())
            with pytest.raises(OverloadedError, match="busy_timeout_s"):
                registry.set_alias("m", "default", 1, **BY)
            assert registry.read("m", 1).manifest.version == 1  # readers do not wait for writers
            assert registry.change_token() == 1
        finally:
            outsider.execute("ROLLBACK")
            outsider.close()
        assert registry.publish("m", **tiny()).version == 2


def test_a_thread_waits_no_longer_either_and_readers_not_at_all(tmp_path: Path) -> None:
    with Registry(tmp_path, busy_timeout_s=0.05) as registry:
        registry.publish("m", **tiny())
        with registry._transaction(), ThreadPoolExecutor(1) as pool:
            writing = pool.submit(registry.set_alias, "m", "default", 1, **BY)
            assert isinstance(writing.exception(timeout=PATIENCE_S), OverloadedError)
            assert (
                pool.submit(registry.read, "m", 1).result(timeout=PATIENCE_S).manifest.version == 1
            )


# At once


def test_threads_share_one_registry(registry: Registry) -> None:
    registry.publish("m", **tiny(), alias="default")
    stop, seen = threading.Event(), []

    def watch() -> int:
        reads = 0
        while not stop.is_set():
            version = registry.resolve("m")
            artifact = registry.read("m", version)
            assert artifact.manifest.version == version
            seen.append(registry.change_token())
            reads += 1
        return reads

    def work(thread: int) -> None:
        for _ in range(5):
            version = registry.publish("m", **tiny(thread)).version
            registry.set_alias("m", "default", version, **BY)

    with ThreadPoolExecutor(6) as pool:
        watchers = [pool.submit(watch) for _ in range(2)]
        try:
            list(pool.map(work, range(4)))
        finally:
            stop.set()
        assert all(watcher.result() > 0 for watcher in watchers)
    assert registry.version_numbers("m") == list(range(1, 22))
    assert (
        registry.local_changes == 41
        and registry.change_token() == 22 + len(registry.history("m")) - 1
    )
    moves = registry.history("m")
    assert moves["from"].tolist()[1:] == moves["to"].tolist()[:-1]


@pytest.mark.full
def test_six_processes_may_open_a_new_registry_at_once(tmp_path: Path) -> None:
    """SQLite answers "busy" at once when several change a new file to WAL: 10 of 900 openings
    failed for it."""
    assert registry_crash.start("open", tmp_path, 6, 60) == {"turns": 60}


@pytest.mark.full
def test_four_processes_publish_and_move_aliases_at_once(tmp_path: Path) -> None:
    result = registry_crash.start("together", tmp_path / "registry", 4, 12)
    published = result["published"]
    assert result["heavy modules"] == []  # the tables alone need pandas
    everything = sorted(itertools.chain(*published))
    assert [version for version, _, _ in everything] == list(range(1, 49))  # no gap, none twice
    with Registry(tmp_path / "registry") as registry:
        for version, note, digest in everything:
            manifest = registry.read("m", version).manifest
            assert (manifest.note, manifest.digests.weights) == (note, digest)
        for worker, mine in enumerate(published):
            assert registry.resolve("m", f"worker-{worker}") == mine[-1][0]
        log = registry.history("m")
        assert log["when"].is_monotonic_increasing
        for _, moves in log.groupby("alias"):
            assert moves["from"].fillna(0).tolist()[1:] == moves["to"].fillna(0).tolist()[:-1]
        assert registry.change_token() == 48 + len(log)
        assert os.listdir(tmp_path / "registry" / "staging") == []


def test_what_python_finds_wrong_with_a_query_is_no_damage(tmp_path):
    """Nobody is sent to a backup for an error that has no code of SQLite's."""
    with Registry(tmp_path) as registry:
        with pytest.raises(FlservingError, match="cannot be used") as caught:
            registry._query("SELECT ?", 1, 2)
        assert not isinstance(caught.value, CorruptArtifactError)
