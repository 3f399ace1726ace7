"""A client is forgotten: its heads, its feedback and its name leave every file; nobody else loses
anything."""

import errno
import json
import os
import shutil
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch

import registry_crash
from byte_search import forms, search
from edge_cloud import SIZES, X, state
from flserving import ModelServer, Registry, ServingConfig
from flserving.api import cli
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    NotFoundError,
    OverloadedError,
)
from flserving.experiments.feedback import FeedbackStore
from flserving.registry import storage
from flserving.registry.experiment import Experiment
from flserving.registry.forget import kept_key, naming, without_names
from flserving.registry.heads import HeadSet
from flserving.registry.manifest import for_devices
from serving_models import PATIENCE_S, wait_until

pytestmark = pytest.mark.timeout(300)

CLIENT = "zoë-7731"
OTHERS = ("other-1", "other-2")


def heads_of(round, clients=(CLIENT, *OTHERS)):
    rng = np.random.default_rng(round)
    return HeadSet(
        "head",
        clients,
        rng.standard_normal((len(clients), SIZES[1] + 1, SIZES[2]), dtype=np.float32),
    )


def publish(registry, round, clients=(CLIENT, *OTHERS), **more):
    given = {
        "architecture": "mlp",
        "parameters": {"sizes": SIZES},
        "lineage": {"round": round, "num_clients": len(clients), "clients": clients,
                    "sample_counts": [10 + n for n in range(len(clients))]},
        "heads": heads_of(round, clients),
        "alias": "default",
    }  # fmt: skip
    return registry.publish("m", state(round), **given | more)


@pytest.fixture
def registry(tmp_path):
    """Three rounds; the client is also named in a note, a fact, a metric, a log of moves and one of
    experiments."""
    with Registry(tmp_path / "registry") as registry:
        publish(registry, 1, note=f"{CLIENT} rejected: its update holds NaN")
        facts = {"slowest": f"client {CLIENT}", f"loss of {CLIENT}": 0.5, "seed": 3}
        lineage = {"round": 2, "num_clients": 3, "sample_counts": [5, 6, 7], "extra": facts}
        publish(registry, 2, lineage=lineage, metrics={"accuracy": 0.5, f"accuracy/{CLIENT}": 0.25})
        publish(registry, 3, who=f"device of {CLIENT}", why="its own wish")
        registry.start_experiment(
            "m", Experiment.of("e", {"a": (3, 0.5), "b": (2, 0.5)}), who="ada", why=f"for {CLIENT}"
        )
        yield registry


def rewarded(registry, *clients):
    """A feedback store with a reward and a failure of each client; closed again."""
    store = FeedbackStore(registry.root)
    for client in clients:
        store.add(store.read(store.receipt("run", "a", client), client), 1.0)
    store.count("run", {("a", client): 1 for client in clients})
    store.close()


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def record(round):
    return heads_of(round).weights[0].tobytes()


# What leaves


def test_no_file_tells_of_the_client(registry, tmp_path):
    rewarded(registry, CLIENT, "other-1")
    root = tmp_path / "registry"
    before = search(root, CLIENT, head=record(1))
    names = {"UTF-8", "key_of, first column", "key_of, second column", "head"}
    assert names <= {form for _, form in before}, "the search sees what is there"
    assert {"models/m/1/manifest.json", "models/m/1/heads.bin", "registry.sqlite3-wal"} <= {
        file for file, _ in before
    }
    registry.forget(CLIENT)
    assert search(root, CLIENT, **{f"head {n}": record(n) for n in (1, 2, 3)}) == set()
    registry.close()
    assert search(root, CLIENT) == set(), "nor once SQLite has put its log away"


def test_a_store_of_feedback_forgets_its_pseudonym_too(registry):
    rewarded(registry, CLIENT, "other-1")
    assert registry.forget(CLIENT).rewards == 2
    store = FeedbackStore(registry.root)
    with sqlite3.connect(f"{registry.root}/feedback.sqlite3") as database:
        for table in ("rewards", "failures"):
            assert database.execute(f"SELECT client FROM {table}").fetchall() == [
                (store.pseudonym("other-1"),)
            ]
    assert search(registry.root, CLIENT, pseudonym=store.pseudonym(CLIENT)) == set()
    store.close()


def test_a_client_with_feedback_alone_can_be_forgotten(registry):
    rewarded(registry, "visitor")
    found = registry.forget("visitor")
    assert (found.rewards, found.heads, found.learned, found.documents) == (2, {}, {}, 0)


def test_it_says_what_the_shared_body_has_learned(registry):
    found = registry.forget(CLIENT)
    assert (
        found.heads == {"m": [1, 2, 3]}
        and found.learned == {"m": [1, 2, 3]}
        and found.unknown == {}
    )
    assert found.documents == 5, "three manifests, a move, an experiment"
    assert found.left == []
    assert "It took part in rounds: m 1, 2, 3. These and all rounds after them hold that" in str(
        found
    )


def test_rounds_of_which_nobody_noted_who_took_part_are_named(registry):
    publish(
        registry,
        4,
        lineage={"round": 4, "num_clients": 3, "sample_counts": [1, 2, 3]},
        heads=None,
        alias=None,
    )
    publish(registry, 5, heads=None, alias=None)
    found = registry.forget(CLIENT)
    assert (
        found.unknown == {"m": [4]}
        and found.learned == {"m": [1, 2, 3, 5]}
        and found.heads == {"m": [1, 2, 3]}
    )
    assert "nobody noted who took part in rounds: m 4" in str(found)


def test_documents_lose_the_client_and_nothing_else(registry):
    before = [registry.manifest("m", number) for number in (1, 2, 3)]
    registry.forget(CLIENT)
    one, two, three = (registry.manifest("m", number) for number in (1, 2, 3))
    assert one.note == "… rejected: its update holds NaN"
    assert (one.lineage.clients, one.lineage.sample_counts, one.lineage.forgotten) == (
        OTHERS,
        (11, 12),
        1,
    )
    assert one.lineage.num_clients == 3, "that many took part"
    assert two.metrics == {"accuracy": 0.5} and two.lineage.extra == {
        "slowest": "client …",
        "seed": 3,
    }
    assert two.lineage.sample_counts is None, "nobody can tell which of them is the client's"
    assert [(m.digests, m.created_at, m.weights_nbytes) for m in before] == [
        (m.digests, m.created_at, m.weights_nbytes) for m in (one, two, three)
    ]
    assert [row["why"] for row in registry.experiment_log("m")] == ["for …"]
    assert registry.history("m")["who"].tolist() == ["publish", "publish", "device of …"]


def test_the_others_keep_their_heads_bit_for_bit(registry):
    registry.forget(CLIENT)
    for round in (1, 2, 3):
        artifact = registry.read("m", round)
        assert artifact.heads.find(CLIENT) == -1 and artifact.manifest.heads.num_heads == 2
        for place, client in enumerate(OTHERS, 1):
            assert np.array_equal(
                artifact.heads.take(client).weights[0], heads_of(round).weights[place]
            )
        assert all(
            torch.equal(artifact.tensors[name], values) for name, values in state(round).items()
        )
    assert sorted(os.listdir(f"{registry.root}/models/m/1")) == [
        "heads.bin",
        "manifest.json",
        "weights.safetensors",
    ]


def test_the_last_head_takes_the_file_along(registry):
    for client in (*OTHERS, CLIENT):
        registry.forget(client)
    assert registry.manifest("m", 1).heads is None and registry.read("m", 1).heads is None
    assert sorted(os.listdir(f"{registry.root}/models/m/1")) == [
        "manifest.json",
        "weights.safetensors",
    ]


def test_leftovers_of_dead_writers_are_searched_too(registry, tmp_path):
    """A publisher died between its last write and its commit, another one in staging, two hours
    ago."""
    root = tmp_path / "registry"
    shutil.copytree(root / "models/m/1", root / "models/m/4")
    shutil.copytree(root / "models/m/1", root / "models/n/1")
    shutil.copytree(root / "models/m/1", root / "staging/dead")
    os.utime(root / "staging/dead", (time.time() - 7200,) * 2)
    registry.forget(CLIENT)
    assert search(root, CLIENT) == set() and registry.version_numbers("m") == [1, 2, 3]


def test_the_log_knows_that_somebody_was_forgotten_and_not_who(registry):
    token = registry.change_token()
    registry.forget(CLIENT)
    (entry,) = registry.forget_log()
    assert registry.change_token() == token + 1
    assert len(entry["pseudonym"]) == 32 and entry["report"]["learned"] == {"m": [1, 2, 3]}
    assert bytes.fromhex(entry["pseudonym"]) not in {
        one for some in forms(CLIENT).values() for one in some
    }


@pytest.mark.parametrize(
    ("client", "text", "said"),
    [
        ("c-1", "c-1 rejected: no; c-10 rejected: no", "… rejected: no; c-10 rejected: no"),
        ("c-1", "accuracy_c-1, xc-1, C-1", "accuracy_…, xc-1, C-1"),
        ("5", "5 rejected: no; 15 rejected: round 5", "… rejected: no; 15 rejected: round 5"),
        ("5", "round 5 of client 5, client-55 and client_5", "round 5 of client …, client-55 and client_…"),
        ("5", "client_5_lost, client 5_x", "client_…_lost, client …_x"),
        ("mean", "the mean of client mean fell", "the mean of client … fell"),
        ("a.*", "a.* and abc", "… and abc"),
    ],
)  # fmt: skip
def test_a_name_is_a_word_and_a_number_a_name_only_where_the_text_says_so(client, text, said):
    assert without_names(text, naming(client)) == said


def test_a_client_whose_name_is_a_part_of_anothers_takes_nothing_of_it_along(registry):
    note = "ward rejected: no; ward-2 rejected: no; south.ward.ward: late; ward-3"
    metrics = {"loss/ward-2": 1, "loss/ward": 1}
    publish(
        registry, 4, ("ward", "ward-2", "south.ward.ward"), note=note, metrics=metrics, alias=None
    )
    registry.forget("ward")
    manifest = registry.manifest("m", 4)
    assert manifest.note == "… rejected: no; ward-2 rejected: no; south.ward.ward: late; …-3", (
        "nobody is ward-3"
    )
    assert manifest.metrics == {"loss/ward-2": 1}


def test_a_client_named_like_a_word_of_the_documents_takes_no_facts_along(registry):
    """Devices would fetch every version again, and rounds would be gone."""
    clients = ("client", "accuracy", "fedavg", "extra", "round", "Mean", "other")
    lineage = {
        "round": 4,
        "strategy": "fedavg",
        "clients": clients,
        "extra": {"seed": 1, "of client": 2},
    }
    metrics = {"global_accuracy": 0.5, "mean_client_accuracy": 0.5, "worst_client_accuracy": 0.25}
    publish(registry, 4, clients, lineage=lineage, metrics=metrics, alias=None)
    before = registry.manifest("m", 4)
    fetched = for_devices(before)
    for place, client in enumerate(clients[:-1], 1):
        registry.forget(client)
        after = registry.manifest("m", 4)
        assert for_devices(after) == fetched and after.lineage.clients == clients[place:]
        assert after.lineage.extra == before.lineage.extra


def test_an_id_that_is_listed_twice_goes_twice(registry):
    lineage = {"round": 4, "num_clients": 3, "clients": ("a", "a", "b"), "sample_counts": (1, 2, 3)}
    publish(registry, 4, lineage=lineage, alias=None)
    registry.forget("a")
    lineage = registry.manifest("m", 4).lineage
    assert (lineage.clients, lineage.sample_counts, lineage.forgotten) == (("b",), (3,), 2)


def test_counts_of_more_or_fewer_clients_are_refused_at_publish(registry):
    with pytest.raises(InvalidModelError, match="sample_counts has 1 entries for 2 clients"):
        publish(registry, 4, lineage={"round": 4, "clients": ("a", "b"), "sample_counts": (1,)})


def test_where_a_name_must_stay_is_said(registry):
    registry.publish(
        "zoe",
        state(1),
        architecture="mlp",
        parameters={"sizes": SIZES},
        heads=heads_of(1, ("zoe", "x")),
    )
    assert registry.forget("zoe").left == ["model zoe", "the manifest of zoe/1"]


# Who comes again


def test_a_second_time_says_the_same_and_changes_nothing(registry, tmp_path):
    first = registry.forget(CLIENT)
    token = registry.change_token()
    assert (
        registry.forget(CLIENT) == first
        and registry.change_token() == token
        and len(registry.forget_log()) == 1
    )


def test_a_later_training_may_bring_new_heads_and_they_can_be_forgotten_again(registry):
    registry.forget(CLIENT)
    publish(registry, 7, alias=None)
    assert np.array_equal(registry.read("m", 4).heads.take(CLIENT).weights, heads_of(7).weights[:1])
    assert [registry.read("m", number).heads.find(CLIENT) for number in (1, 2, 3)] == [-1] * 3
    assert registry.forget(CLIENT).heads == {"m": [4]} and len(registry.forget_log()) == 2


def test_a_receipt_of_before_counts_no_more(tmp_path):
    with Registry(tmp_path) as registry, ModelServer(registry=registry) as server:
        publish(registry, 1)
        publish(registry, 2, alias=None)
        registry.start_experiment(
            "m", Experiment.of("e", {"a": (1, 0.5), "b": (2, 0.5)}), who="ada", why="test"
        )
        server.refresh()
        before = server.predict(X[0], client=CLIENT)["receipt"]
        server.experiments.feedback(
            "m", server.predict(X[0], client=CLIENT)["receipt"], 1.0, CLIENT
        )
        registry.forget(CLIENT)
        server.refresh()
        with pytest.raises(ConflictError, match="forgotten after that answer"):
            server.experiments.feedback("m", before, 1.0, CLIENT)
        server.experiments.feedback(
            "m", server.predict(X[0], client=CLIENT)["receipt"], 1.0, CLIENT
        )


# What goes wrong


def test_an_unknown_client_changes_nothing(registry):
    token = registry.change_token()
    with pytest.raises(NotFoundError, match="nothing here is of client 'nobody'"):
        registry.forget("nobody")
    assert registry.change_token() == token and registry.forget_log() == []


@pytest.mark.parametrize("client", ["", "x" * 257, 7, None])
def test_what_is_no_id_is_refused(registry, client):
    with pytest.raises(InvalidInputError, match="1 to 256 characters"):
        registry.forget(client)


def test_a_locked_registry_says_so(registry, tmp_path):
    with Registry(tmp_path / "registry", busy_timeout_s=0.05) as other:
        with registry._transaction(), pytest.raises(OverloadedError, match="try again"):
            other.forget(CLIENT)
        assert other.forget(CLIENT).heads == {"m": [1, 2, 3]}


def test_a_read_only_registry_says_so(registry, monkeypatch):
    monkeypatch.setattr(storage, "why_unwritable", lambda folder: "Permission denied")
    with Registry(registry.root) as reader, pytest.raises(FlservingError, match="read-only"):
        reader.forget(CLIENT)
    assert registry.read("m", 1).heads.find(CLIENT) >= 0


@pytest.mark.parametrize("call", range(1, 7))
def test_a_full_disk_changes_nothing_and_leaves_nothing(registry, tmp_path, monkeypatch, call):
    """The disk is full at the first file, the second, ...: three heads and three manifests are
    written."""
    whole = storage.write_parts
    calls = []

    def full(path, parts, mode=0o644):
        calls.append(path)
        if len(calls) == call:
            whole(path, [b"half"])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, parts, mode)

    kept_key(registry.root)  # is there
    before = contents(tmp_path / "registry" / "models")
    monkeypatch.setattr(storage, "write_parts", full)
    with pytest.raises(FlservingError, match=r"nothing was forgotten \(No space left"):
        registry.forget(CLIENT)
    assert contents(tmp_path / "registry" / "models") == before and registry.forget_log() == []
    monkeypatch.setattr(storage, "write_parts", whole)
    registry.forget(CLIENT)
    assert search(tmp_path / "registry", CLIENT) == set()


def test_what_cannot_be_cleaned_now_is_said_and_cleaned_the_next_time(registry, tmp_path):
    rewarded(registry, CLIENT)
    with sqlite3.connect(f"{registry.root}/registry.sqlite3", isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM moves").fetchall()  # its snapshot holds the log of before
        registry._writer.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(
            FlservingError, match=r"forgotten, but not all has left the disk yet .*forget again"
        ):
            registry.forget(CLIENT)
        assert search(registry.root, CLIENT) != set()
        reader.execute("COMMIT")
    found = registry.forget(CLIENT)
    assert (
        search(registry.root, CLIENT) == set()
        and found.learned == {"m": [1, 2, 3]}
        and found.rewards == 2
    )


@pytest.mark.parametrize("file", ["manifest.json", "heads.bin"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_version_that_cannot_be_read_is_named_and_the_others_forget(
    registry, tmp_path, file, lost
):
    """Nobody would ever be forgotten in a registry with a damaged version. Mended, it forgets the
    second time."""
    path = tmp_path / "registry/models/m/2" / file
    whole = path.read_bytes()
    if lost:
        path.unlink()
    else:
        path.write_bytes(b"x" + whole[1:])
    for heads in ([1, 3], [1, 3]):
        found = registry.forget(CLIENT)
        assert found.heads == {"m": heads} and len(found.unread) == 1
        assert f"nobody knows whose heads these have: m/2/{file} " in str(found)
        assert {file.split("/")[2] for file, _ in search(tmp_path / "registry", CLIENT)} == {"2"}
    path.write_bytes(whole)
    assert (
        registry.forget(CLIENT).heads == {"m": [2]}
        and search(tmp_path / "registry", CLIENT) == set()
    )


def test_who_is_nowhere_else_may_be_in_a_version_that_cannot_be_read(registry, tmp_path):
    path = tmp_path / "registry/models/m/2/heads.bin"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(
        CorruptArtifactError, match=r"nobody knows whose heads it has: m/2/heads\.bin"
    ):
        registry.forget("nobody")
    assert registry.forget_log() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_lines_of_the_protocol_it_has_happened_or_not_and_again_completes_it(tmp_path):
    result = registry_crash.start("forget", tmp_path, 13)
    assert result["before"] > 10 and result["after"] > 3, result


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_every_fourth_line(tmp_path):
    result = registry_crash.start("forget", tmp_path, 4)
    assert (
        result["before"] + result["after"] == (result["lines"] - 1) // 4 and result["after"] > 30
    ), result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_that_read_publish_and_forget_do_not_disturb_each_other(tmp_path):
    result = registry_crash.start("forget_together", tmp_path, 3, 12)
    assert result["reads"] > 50 and result["forgotten"] == 24, result


# Old registries


def as_layout_2(root):
    with sqlite3.connect(f"{root}/registry.sqlite3") as database:
        database.executescript("DROP TABLE forgotten; PRAGMA user_version = 2;")


def test_an_older_registry_is_read_as_it_is_and_can_forget_once_it_is_written(
    registry, monkeypatch
):
    token = registry.change_token()
    registry.close()
    as_layout_2(registry.root)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "why_unwritable", lambda folder: "Read-only file system")
        with Registry(registry.root) as reader:
            assert (
                reader.change_token() == token
                and reader.forgets() == 0
                and reader.forgotten(CLIENT)[0] == 0
            )
            assert reader.read("m", 1).heads.find(CLIENT) >= 0
    with Registry(registry.root) as again:
        assert again.forget(CLIENT).heads == {"m": [1, 2, 3]}


def test_devices_get_nothing_about_single_clients(registry):
    """What a device fetches is the same before and after a client is forgotten: metrics by its name
    never went out."""
    metrics = {"worst_client_accuracy": 0.25, "global_accuracy": 0.5}
    publish(registry, 4, metrics={f"accuracy/{CLIENT}": 0.25, **metrics}, alias=None)
    fetched = [for_devices(registry.manifest("m", number)) for number in (1, 2, 3, 4)]
    assert json.loads(fetched[3])["metrics"] == metrics
    for content in fetched:
        assert CLIENT not in content.decode()
        document = json.loads(content)
        assert document["lineage"].keys() == {"round", "parent_version", "num_clients", "strategy"}
        assert document["note"] == ""
        assert document["heads"]["num_heads"] == 1 and document["heads"]["index_sha256"] == "0" * 64
    registry.forget(CLIENT)
    assert [for_devices(registry.manifest("m", number)) for number in (1, 2, 3, 4)] == fetched


# Servers


def test_a_running_server_follows_and_fails_no_request(tmp_path):
    config = ServingConfig(prediction_cache_bytes=1 << 20)
    with Registry(tmp_path) as registry:
        publish(registry, 1)
        with Registry(tmp_path) as others, ModelServer(config, registry=others) as server:
            own = server.predict(X, client=CLIENT)
            kept = server.predict(X, client="other-1", arrays=True)["probabilities"]
            assert own["head"] == "own" and len(server.prediction_cache) == 2
            failures = []
            stop = threading.Event()

            def ask():
                while not stop.is_set():
                    try:
                        server.predict(X, client="other-1")
                    except Exception as error:
                        failures.append(error)

            asking = threading.Thread(target=ask)
            asking.start()
            try:
                registry.forget(CLIENT)
                wait_until(
                    lambda: server.predict(X, client=CLIENT)["head"] == "unknown",
                    "the server to follow",
                )
            finally:
                stop.set()
                asking.join(PATIENCE_S)
            assert failures == []
            unknown = server.predict(X, client=CLIENT)
            assert (
                unknown["probabilities"]
                == server.predict(X)["probabilities"]
                != own["probabilities"]
            )
            assert np.array_equal(
                server.predict(X, client="other-1", arrays=True)["probabilities"], kept
            )
            store = server.engines["1"].personal.store
            assert store.num_heads == 2 and store.find(CLIENT) < 0


def test_the_cache_of_predictions_is_emptied(tmp_path):
    config = ServingConfig(prediction_cache_bytes=1 << 20)
    with Registry(tmp_path) as registry, ModelServer(config, registry=registry) as server:
        publish(registry, 1)
        server.refresh()
        server.predict(X, client=CLIENT)
        assert len(server.prediction_cache) == 1
        registry.forget(CLIENT)
        server.refresh()
        assert len(server.prediction_cache) == 0


# The command


def test_the_command_forgets_and_says_what_stays(registry, capsys):
    assert cli.main(["registry", "forget", CLIENT, "--registry", registry.root]) == 0
    assert (
        "removed: 3 heads (m 1, 2, 3)" in (said := capsys.readouterr().out)
        and "not removed: what the shared" in said
    )
    assert cli.main(["registry", "forget", CLIENT, "--registry", registry.root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learned"] == {"m": [1, 2, 3]}


@pytest.mark.parametrize(("client", "folder", "said"), [
    ("nobody", "registry", "flserving: nothing here is of client 'nobody'"),
    (CLIENT, "elsewhere", "holds no registry"),
])  # fmt: skip
def test_the_command_says_what_it_cannot_do(registry, tmp_path, capsys, client, folder, said):
    assert cli.main(["registry", "forget", client, "--registry", str(tmp_path / folder)]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "elsewhere").exists()
