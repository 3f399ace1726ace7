"""The agent of a device: it gets what the cloud released, whole or not at all, and believes nobody
else."""

import contextlib
import os
import random
import runpy
import tempfile
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from edge_cloud import CLIENTS, SIZES, Between, X, cloud, heads, publish, state
from edge_proxy import Liar, instead
from flserving import ModelServer, Registry, ServingConfig
from flserving.api.client import Client
from flserving.edge import EdgeModelServer, delta
from flserving.edge.hybrid import HybridServer
from flserving.edge.release import Seen, Signer, Statement, check, verify
from flserving.edge.sync import Memory, SyncAgent, SyncSettings
from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    DeadlineExceededError,
    FlservingError,
    ForbiddenError,
    InvalidModelError,
    ModelTooLargeError,
    NotFoundError,
    ServerClosedError,
    StaleModelError,
    TooLargeError,
    UnauthorizedError,
)
from flserving.models import weights
from flserving.registry.experiment import Experiment
from serving_models import PATIENCE_S

BIG = [64, 2048, 3]  # half a megabyte of weights: many reads of a socket


@contextlib.contextmanager
def device(root, url, token="infer", *, model=None, client=None, form="exact", **settings):
    who = {"model": model, "client": client, "form": form, "settings": SyncSettings(**settings)}
    with (
        Registry(root) as registry,
        EdgeModelServer(config=ServingConfig(warmup_samples=1), registry=registry) as edge,
        contextlib.closing(SyncAgent(url, token, registry, edge=edge, **who)) as agent,
    ):
        yield registry, agent


def runs(registry, number, form="exact"):
    """Whether the device's default is round ``number``, with these very weights."""
    artifact = registry.read("m", registry.resolve("m"))
    wanted = state(number, artifact.manifest.parameters["sizes"])
    return weights.digest(artifact.tensors) == weights.digest(
        delta.quantised(wanted) if form == "int8" else wanted
    )


def answers(registry):
    with ModelServer(registry=registry) as server:
        return server.predict(X)["probabilities"]


@pytest.fixture
def served(tmp_path):
    with cloud(tmp_path / "cloud", 1) as (registry, endpoint):
        yield registry, endpoint


@pytest.fixture
def liar(served):
    with Liar(served[1].url) as liar:
        yield liar


@pytest.mark.parametrize("form", delta.FORMS)
def test_a_device_follows_its_cloud(served, tmp_path, form):
    released, endpoint = served
    with device(tmp_path / "edge", endpoint.url, form=form) as (registry, agent):
        first = agent.pull()
        assert (first.changed, first.round, first.version, first.local) == (True, 1, 1, 1) and runs(
            registry, 1, form
        )
        assert ("weights" in first.nbytes) == (form == "exact")
        for number in (2, 3):
            publish(released, number)
            pulled = agent.pull()
            assert (pulled.changed, pulled.round, pulled.local) == (True, number, number)
            assert runs(registry, number, form) and "weights" not in pulled.nbytes
            assert pulled.nbytes["delta"] < first.nbytes.get("weights", first.nbytes.get("delta"))
        again = agent.pull()
        assert not again.changed and again.nbytes.keys() == {"release"}
        if form == "exact":
            assert answers(registry) == answers(released)
        else:
            assert np.allclose(answers(registry), answers(released), atol=0.05)
        mine, theirs = registry.manifest("m", 3), released.manifest("m", 3)
        kept = ("architecture", "parameters", "signature", "preprocessing", "metrics", "note")
        assert all(getattr(mine, name) == getattr(theirs, name) for name in kept)
        assert mine.lineage.extra["cloud_version"] == 3 and (mine.digests == theirs.digests) == (
            form == "exact"
        )


def test_the_state_survives_a_restart_without_the_cloud(served, tmp_path):
    with device(tmp_path / "edge", served[1].url) as (_, agent):
        agent.pull()
    with device(tmp_path / "edge", "http://127.0.0.1:9") as (registry, agent):
        with pytest.raises(ServerClosedError, match="no answer"):
            agent.pull()
        assert runs(registry, 1) and agent.memory.facts.model == "m"
    with device(tmp_path / "edge", served[1].url) as (_, agent):
        assert not agent.pull().changed


def test_the_own_head_comes_along_and_only_that(tmp_path):
    with cloud(tmp_path / "cloud", 1, with_heads=True) as (_, endpoint):
        for form in delta.FORMS:
            options = {"token": "c-2", "client": "c-2", "form": form}
            with device(tmp_path / form, endpoint.url, **options) as (registry, agent):
                assert agent.pull().nbytes["head"] < 2000
                store = registry.read("m", 1).heads
                assert store.num_heads == 1 and store.find("c-1") == -1
                wanted = heads(1).weights[CLIENTS.index("c-2")]
                assert np.array_equal(store.gather(np.array([store.find("c-2")]))[0], wanted), (
                    "not stale"
                )
        with device(tmp_path / "nobody", endpoint.url, "infer", client="c-1") as (registry, agent):
            agent.pull()
            assert runs(registry, 1) and registry.read("m", 1).heads is None, (
                "a token without a client gets no head"
            )
        with device(tmp_path / "other", endpoint.url, "c-1", client="c-2") as (registry, agent):
            with pytest.raises(ForbiddenError, match="this device is 'c-2'"):
                agent.pull()
            assert registry.models() == []


def test_new_heads_of_the_same_body_cost_little(tmp_path):
    with (
        cloud(tmp_path / "cloud", 2, with_heads=True) as (released, endpoint),
        device(tmp_path / "edge", endpoint.url, "c-1", client="c-1") as (registry, agent),
    ):
        agent.pull()
        released.publish("m", state(2), architecture="mlp", parameters={"sizes": SIZES}, heads=heads(9),
                         lineage={"round": 2}, alias="default")  # fmt: skip
        pulled = agent.pull()
        assert pulled.changed and pulled.nbytes["delta"] < 200, "no tensor changed"
        store = registry.read("m", pulled.local).heads
        assert np.array_equal(store.gather(np.array([store.find("c-1")]))[0], heads(9).weights[0])


def test_an_edge_server_is_updated_whole_and_says_how_fresh_it_is(tmp_path):
    with (
        cloud(tmp_path / "cloud", 1, with_heads=True) as (released, endpoint),
        Registry(tmp_path / "edge") as registry,
        EdgeModelServer(registry=registry, client="c-1") as edge,
    ):
        agent = SyncAgent(endpoint.url, "c-1", registry, edge=edge, client="c-1")
        with contextlib.closing(agent):
            assert not edge.ready
            agent.pull()
            answer = edge.predict(X)
            assert (answer["round"], answer["path"], answer["head"]) == (
                1,
                "local",
                "own",
            ) and answer["age_s"] < 60
            publish(released, 2, with_heads=True)
            agent.pull()
            assert edge.predict(X)["round"] == 2 and edge.predict(X)["head"] == "own"
            released.rollback("m", who="test", why="worse")
            assert agent.pull().nbytes.keys() == {"release"}, "it is here already"
            assert edge.predict(X)["round"] == 1


def test_an_agent_takes_a_hybrid_for_its_device(tmp_path):
    with (
        cloud(tmp_path / "cloud", 1) as (_, endpoint),
        Registry(tmp_path / "edge") as registry,
        EdgeModelServer(registry=registry, refuse_s=3600) as edge,
        Client(endpoint.url, "infer") as client,
        HybridServer(edge, client, consent=True, threshold=2.0) as hybrid,
        contextlib.closing(SyncAgent(endpoint.url, "infer", registry, edge=hybrid)) as agent,
    ):
        agent.pull()  # the name of the model comes with it
        assert edge.model == hybrid.model == "m" and edge.predict(X)["round"] == 1
        answer = hybrid.predict(X)
        assert (answer["path"], answer["round"]) == ("cloud", 1)


# Cuts


@pytest.mark.parametrize("form", delta.FORMS)
def test_a_download_goes_on_where_it_was_cut(tmp_path, form):
    with cloud(tmp_path / "cloud") as (released, endpoint):
        publish(released, 1, sizes=BIG)
        endpoint.v2.server.serve(released, "m")
        total = released.manifest("m", 1).weights_nbytes // (1 if form == "exact" else 4)
        with (
            Between(endpoint.url, [total // 4, total // 4, total // 4]) as between,
            device(tmp_path / "edge", between.url, form=form) as (registry, agent),
        ):
            pulled = agent.pull()
            assert runs(registry, 1, form)
            kind = "weights" if form == "exact" else "delta"
            ranges = [
                line
                for data in between.requests
                for line in data.lower().splitlines()
                if b"range:" in line
            ]
            assert len(ranges) >= 2, "three cuts, each one after some bytes"
            size = (
                (tmp_path / "cloud" / "deltas" / "m-1-0-int8").stat().st_size
                if form == "int8"
                else total
            )
            assert pulled.nbytes[kind] == size, "no byte came twice"
            assert not list((tmp_path / "edge" / "sync").glob("*.part"))


def test_a_download_goes_on_after_a_restart(tmp_path):
    with cloud(tmp_path / "cloud") as (released, endpoint):
        publish(released, 1, sizes=BIG)
        endpoint.v2.server.serve(released, "m")
        total = released.manifest("m", 1).weights_nbytes
        clock = iter(range(0, 10**9, 1000))
        with device(
            tmp_path / "edge", endpoint.url, limit_s=2500, clock=lambda: float(next(clock))
        ) as (_, agent):
            with pytest.raises(DeadlineExceededError, match="took longer than 2500 s"):
                agent.pull()
            (part,) = (tmp_path / "edge" / "sync").glob("*.part")
            had = part.stat().st_size
            assert 0 < had < total
        with device(tmp_path / "edge", endpoint.url) as (registry, agent):
            assert agent.pull().nbytes["weights"] == total - had and runs(registry, 1)


def test_a_part_of_something_else_is_never_continued(served, tmp_path):
    with device(tmp_path / "edge", served[1].url) as (registry, agent):
        folder = tmp_path / "edge" / "sync"
        (folder / "old.part").write_bytes(b"x" * 100)
        agent.pull()
        assert runs(registry, 1) and not list(folder.glob("*.part"))


@pytest.mark.parametrize("junk", [100, 10**6], ids=["shorter", "longer"])
def test_a_spoilt_part_is_found_and_forgotten(served, tmp_path, junk):
    sha = Signer(served[0]).release("m").statement.split('"manifest_sha256":"')[1][:32]
    with device(tmp_path / "edge", served[1].url) as (registry, agent):
        (tmp_path / "edge" / "sync" / f"{sha}.part").write_bytes(b"x" * junk)
        with pytest.raises(CorruptArtifactError):
            agent.pull()
        assert registry.models() == []
        agent.pull()
        assert runs(registry, 1)


def test_a_cloud_that_says_nothing_is_given_up(served, tmp_path):
    with (
        Between(served[1].url, [0]) as between,
        device(tmp_path / "edge", between.url, timeout_s=PATIENCE_S) as (registry, agent),
    ):
        with pytest.raises(ServerClosedError):
            agent.pull()
        assert agent.pull().changed and runs(registry, 1)


# Whom it believes


def test_a_wrong_token_and_a_wrong_model_say_so(served, tmp_path):
    for token, error in (
        (None, UnauthorizedError),
        ("nobody", UnauthorizedError),
        ("read", ForbiddenError),
    ):
        with (
            device(tmp_path / str(token), served[1].url, token) as (_, agent),
            pytest.raises(error),
        ):
            agent.pull()
    with (
        device(tmp_path / "none", served[1].url, model="none") as (_, agent),
        pytest.raises(NotFoundError),
    ):
        agent.pull()


def test_another_cloud_is_refused(served, tmp_path):
    with (
        cloud(tmp_path / "other", 9) as (_, foreign),
        device(tmp_path / "edge", served[1].url) as (registry, agent),
    ):
        agent.pull()
        key = agent.memory.facts.key
        assert key == Signer(served[0]).public
        turned = SyncAgent(foreign.url, "infer", registry, edge=agent._edge)
        with contextlib.closing(turned), pytest.raises(ForbiddenError, match="this device trusts"):
            turned.pull()
        assert runs(registry, 1)
    with device(tmp_path / "pinned", served[1].url, key="0" * 64) as (registry, agent):
        with pytest.raises(ForbiddenError, match="this device trusts 000000"):
            agent.pull()
        assert registry.models() == []
    for changed in ({"settings": SyncSettings(key="0" * 64)}, {"model": "n"}):
        with (
            Registry(tmp_path / "edge") as registry,
            pytest.raises(ConfigError, match="use another one"),
        ):
            SyncAgent(served[1].url, "infer", registry, edge=None, **changed)


def recorded(url):
    """What the cloud said, with the nonce of the one who asked then."""
    import httpx

    path = "/v2/repository/models/m/release?nonce=" + "ab" * 16
    return httpx.get(url + path, headers={"authorization": "Bearer infer"}).content


def test_replays_are_refused_whatever_the_clock_says(served, liar, tmp_path):
    released, endpoint = served
    now_s = [1_900_000_000.0]
    old = recorded(endpoint.url)
    publish(released, 2)
    with device(tmp_path / "edge", liar.url, wall=lambda: now_s[0]) as (registry, agent):
        # the device's clock runs ahead of the cloud's
        with pytest.raises(ForbiddenError, match="expired"):
            agent.pull()
        for clock_s in (0.0, 1_000_000_000.0):
            now_s[0] = clock_s
            assert agent.pull().round == 2
            for replay in (old, recorded(endpoint.url)):
                liar.lies = {"release": instead(replay)}
                with pytest.raises(ForbiddenError, match="another question"):
                    agent.pull()
                assert runs(registry, 2)
            liar.lies = {}


def test_an_older_registry_of_the_cloud_is_refused(tmp_path):
    """The cloud's registry came back from a backup, key included: its serials went back."""
    with cloud(tmp_path / "cloud", 1, 2) as (released, endpoint):
        key = Signer(released).public
        with device(tmp_path / "edge", endpoint.url) as (_, agent):
            agent.pull()
    os.makedirs(tmp_path / "backup")
    os.rename(tmp_path / "cloud" / "release.key", tmp_path / "backup" / "release.key")
    with (
        cloud(tmp_path / "backup", 1) as (_, endpoint),
        device(tmp_path / "edge", endpoint.url) as (registry, agent),
    ):
        with pytest.raises(ForbiddenError, match="serial 3, 5 was seen"):
            agent.pull()
        assert agent.memory.facts.key == key and runs(registry, 2)


def test_a_downgrade_needs_a_signed_rollback(served, tmp_path):
    released, endpoint = served
    publish(released, 2)
    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        agent.pull()
        released.set_alias("m", "default", 1, who="test", why="a mistake")
        with pytest.raises(ForbiddenError, match="version 1, 2 ran here"):
            agent.pull()
        assert runs(registry, 2)
        released.rollback("m", who="test", why="undo")  # now 2 again
        assert not agent.pull().changed
        publish(released, 3)
        assert agent.pull().round == 3
        released.rollback("m", who="test", why="worse")
        assert agent.pull().round == 2 and runs(registry, 2)
        publish(released, 4)
        assert agent.pull().round == 4
        released.set_alias(
            "m", "default", 1, who="test", why="a mistake: that 3 was taken back once is no excuse"
        )
        with pytest.raises(ForbiddenError, match="version 1, 4 ran here"):
            agent.pull()
        assert runs(registry, 4)


def test_a_training_that_starts_anew_reaches_the_devices_and_can_be_taken_back(served, tmp_path):
    """Its rounds start at 1 again; it is the serial that only grows, and versions."""
    released, endpoint = served
    for number in (2, 3):
        publish(released, number)
    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        assert agent.pull().round == 3
        for number in (1, 2):
            publish(released, number)
            pulled = agent.pull()
            assert (pulled.changed, pulled.round, pulled.version) == (
                True,
                number,
                3 + number,
            ) and runs(registry, number)
        released.set_alias(
            "m", "default", 3, who="test", why="a mistake: its round is higher, but it ran before"
        )
        with pytest.raises(ForbiddenError, match="version 3, 5 ran here"):
            agent.pull()
        assert runs(registry, 2)
        released.rollback("m", who="test", why="undo")
        assert not agent.pull().changed
        released.rollback("m", who="test", why="the new training is worse")
        assert (agent.pull().version, runs(registry, 1)) == (4, True)
        released.rollback("m", who="test", why="all of it")
        assert (agent.pull().version, runs(registry, 3)) == (3, True)
        publish(released, 1)
        assert (agent.pull().version, runs(registry, 1)) == (6, True)


@examples(25)
@given(seed=st.integers(0, 2**32))
def test_no_replay_of_an_older_release_is_ever_followed(seed):
    """Over any history of a cloud: all that it signed before is refused once, and again after a
    restart."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, Registry(root) as released:
        signer = Signer(released)
        seen, old = Seen(), []
        for step in range(8):
            move = rng.choice(["next", "anew", "back"]) if step else "next"
            if move == "back" and len(released.version_numbers("m")) > 1:
                with contextlib.suppress(FlservingError):  # nothing is left to go back to
                    released.rollback("m", who="test", why="worse")
            else:
                publish(released, 1 if move == "anew" else rng.randint(1, 9))
            data = msgspec.json.encode(signer.release("m", "ab"))
            statement, _ = verify(data, Statement, signer.public)
            now_s = statement.issued_at
            check(statement, "m", "ab", seen, now_s)
            older = [one for one in old if one.serial < statement.serial]
            seen = Seen(
                serial=statement.serial, version=statement.version, round=statement.round,
                manifest_sha256=statement.manifest_sha256,
            )  # fmt: skip
            for replayed in older:
                with pytest.raises(ForbiddenError):
                    check(replayed, "m", "ab", seen, now_s)
            with pytest.raises(ForbiddenError, match="another question"):
                check(statement, "m", "cd", seen, now_s)
            old.append(statement)


def test_a_device_that_followed_rounds_goes_on_by_versions(served, tmp_path):
    """Its memory is of before versions were noted; what its model says of itself counts."""
    released, endpoint = served
    publish(released, 2)
    with device(tmp_path / "edge", endpoint.url) as (_, agent):
        agent.pull()
    memory = tmp_path / "edge" / "sync" / "state.json"
    facts = msgspec.json.decode(memory.read_bytes())
    del facts["version"]
    memory.write_bytes(msgspec.json.encode(facts))
    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        released.set_alias("m", "default", 1, who="test", why="a mistake")
        with pytest.raises(ForbiddenError, match="version 1, 2 ran here"):
            agent.pull()
        publish(released, 1)
        assert agent.pull().version == 3 and runs(registry, 1)


def test_a_device_of_before_versions_can_read_what_it_asks_for(served):
    """It asks without ``by``, and knows no field ``undone``."""
    statement = msgspec.json.decode(msgspec.json.decode(recorded(served[1].url))["statement"])
    assert statement.keys() == {
        *(
            "model",
            "version",
            "round",
            "serial",
            "manifest_sha256",
            "int8_sha256",
            "issued_at",
            "expires_at",
        ),
        *("rollback", "nonce"),
    }


# Lies


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))


def shorter(status, said, body):
    return status, said | {"content-length": str(len(body) - 1)}, body[:-1]


def broken_off(status, said, body):
    return status, said, body[:-1]


def flipped(status, said, body):
    return status, said, body[:-1] + bytes([body[-1] ^ 1])


def endless(status, said, body):
    return (
        200,
        {"transfer-encoding": "chunked"},
        (b"10000\r\n" + bytes(1 << 16) + b"\r\n" for _ in range(10_000)),
    )


def announced(nbytes):
    return lambda status, said, body: (200, {"content-length": str(nbytes)}, body)


def elsewhere(status, said, body):
    return 206, said | {"content-range": f"bytes 7-{len(body) + 6}/{len(body) + 7}"}, body


LIES = [
    ("release", shorter, CorruptArtifactError),
    ("release", flipped, CorruptArtifactError),
    ("release", endless, TooLargeError),
    ("release", instead(b"{}"), CorruptArtifactError),
    ("release", instead(b""), CorruptArtifactError),
    ("release", instead(b"[" * 60_000), CorruptArtifactError),
    ("manifest", shorter, CorruptArtifactError),
    ("manifest", flipped, CorruptArtifactError),
    ("manifest", endless, TooLargeError),
    ("manifest", broken_off, ServerClosedError),
    ("weights", shorter, CorruptArtifactError),
    ("weights", flipped, CorruptArtifactError),
    ("weights", endless, TooLargeError),
    ("weights", announced(10**12), TooLargeError),
    ("weights", announced(0), TooLargeError),
    ("weights", elsewhere, TooLargeError),
    ("weights", instead(b"x" * 100), CorruptArtifactError),
    ("weights", lambda *_: (416, {"content-length": "0"}, b""), TooLargeError),
    ("weights", lambda *_: (500, {"content-length": "5"}, b"<html"), FlservingError),
    (
        "weights",
        lambda *_: (302, {"content-length": "0", "location": "http://127.0.0.1:9/"}, b""),
        FlservingError,
    ),
]


def test_lies_are_refused_and_the_model_before_serves_on(served, liar, tmp_path):
    released, _ = served
    with device(tmp_path / "edge", liar.url) as (registry, agent):
        agent.pull()
        publish(released, 2, sizes=[8, 25, 3])  # no delta leads there: whole weights travel
        for number, (route, lie, error) in enumerate(LIES):
            liar.lies = {route: lie}
            with pytest.raises(error):
                pytest.fail(f"lie {number} about {route} was believed: {agent.pull()}")
            assert runs(registry, 1) and registry.version_numbers("m") == [1]
        liar.lies = {}
        assert agent.pull().round == 2 and runs(registry, 2)


def test_an_answer_that_drips_is_given_up(served, liar, tmp_path):
    """Never silent for long, and never at its end: each byte comes well within ``timeout_s``."""
    over = threading.Event()
    liar.lies = {"release": lambda *_: (200, {"content-length": "9000"}, drops(over))}
    with device(tmp_path / "edge", liar.url, timeout_s=PATIENCE_S, limit_s=1.0) as (
        registry,
        agent,
    ):
        try:
            with pytest.raises(DeadlineExceededError):
                agent.pull()
            assert registry.models() == []
        finally:
            over.set()


def drops(over):
    for _ in range(9000):
        if over.wait(0.02):
            return
        yield b" "


HOSTILE_DELTAS = {"bomb": instead(BOMB), "nothing": instead(b""), "text": instead(b"<html>"), "shorter": shorter,
                  "flipped": flipped, "endless": endless, "huge": announced(10**12)}  # fmt: skip


@pytest.mark.parametrize("form", delta.FORMS)
def test_hostile_deltas_do_no_harm(served, liar, tmp_path, form):
    """With exact weights there is another way: they come whole. int8 exists as a delta only."""
    released, _ = served
    with device(tmp_path / "edge", liar.url, form=form) as (registry, agent):
        agent.pull()
        for number, (name, lie) in enumerate(HOSTILE_DELTAS.items(), start=2):
            publish(released, number)
            liar.lies = {"delta": lie}
            if form == "exact":
                assert agent.pull().nbytes["weights"] and runs(registry, number), name
            else:
                with pytest.raises((CorruptArtifactError, TooLargeError)):
                    pytest.fail(f"{name} was believed: {agent.pull()}")
                assert (
                    runs(registry, number - 1, form)
                    and registry.version_numbers("m")[-1] == number - 1
                )
                liar.lies = {}
                agent.pull()
                assert runs(registry, number, form)


def test_a_signed_lie_about_sizes_is_refused(served, tmp_path, monkeypatch):
    """Even the cloud's own signature does not make a device take more memory than it allows."""
    released, endpoint = served
    publish(released, 2, sizes=[8, 200, 3])
    with device(tmp_path / "small", endpoint.url) as (registry, agent):
        registry.max_artifact_bytes = 2000
        with pytest.raises(ModelTooLargeError, match="this device takes 2,000"):
            agent.pull()
        assert registry.models() == []


def test_a_head_of_the_wrong_shape_does_no_harm(tmp_path):
    """A cloud may sign nonsense: the local registry checks what it publishes."""
    with (
        cloud(tmp_path / "cloud", 1, with_heads=True) as (released, endpoint),
        Liar(endpoint.url) as liar,
    ):
        signer = Signer(released)
        taken = released.read("m", 1).heads.take("c-1")
        taken.weights = np.ones((1, 4, 2), np.float32)
        liar.lies = {"head": instead(msgspec.json.encode(signer.head("m", 1, taken)))}
        with device(tmp_path / "edge", liar.url, "c-1", client="c-1") as (registry, agent):
            with pytest.raises(InvalidModelError):
                agent.pull()
            assert registry.models() == []


# The disk and the clock


@pytest.mark.parametrize("place", ["note", "part", "publish"])
def test_a_full_disk_is_an_error_and_the_model_before_serves_on(
    served, tmp_path, monkeypatch, place
):
    released, endpoint = served

    class Full:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def seek(self, at):
            self._file.seek(at)

        def write(self, data):
            self._file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    def full(*_):
        raise OSError(28, "No space left on device")

    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        agent.pull()
        publish(released, 2)
        with monkeypatch.context() as patch:
            if place == "note":
                patch.setattr("flserving.edge.sync.storage.write_file", full)
            elif place == "part":
                full_disk = lambda *given: Full(open(*given))  # noqa: E731, SIM115
                patch.setattr("flserving.edge.sync.open", full_disk, raising=False)
            else:
                patch.setattr("flserving.registry.storage.os.rename", full)
            with pytest.raises(FlservingError, match=r"No space left on device.*free"):
                agent.pull()
        assert runs(registry, 1) and registry.version_numbers("m") == [1]
        assert not list((tmp_path / "edge" / "sync").glob("*.part")) and not os.listdir(
            tmp_path / "edge" / "staging"
        )
        assert agent.pull().round == 2 and runs(registry, 2)


def test_a_clock_that_jumps_makes_nothing_look_fresh(served, tmp_path):
    """Ages by the wall clock, over restarts: a device that was off for a day, and whose clock says
    that it was not."""
    day_s, now_s = 86_400.0, [4_000_000_000.0]
    with Registry(tmp_path / "edge") as registry:
        memory = Memory(registry, wall=lambda: now_s[0])
        memory.note()
        now_s[0] += day_s
        memory.note()
    with Registry(tmp_path / "edge") as registry:
        now_s[0] -= 2 * day_s
        memory = Memory(registry, wall=lambda: now_s[0])
        assert memory.wall() == 4_000_000_000.0 + day_s, "it was that late already"
        publish(registry, 1)
        edge = EdgeModelServer(registry=registry, model="m", refuse_s=3600, wall=memory.wall)
        with edge, pytest.raises(StaleModelError):
            edge.predict(X)


def test_a_clock_that_jumped_ahead_recovers_with_the_next_pull(served, tmp_path):
    import time

    now_s = [time.time()]
    with device(tmp_path / "edge", served[1].url, wall=lambda: now_s[0]) as (_, agent):
        agent.pull()
        now_s[0] += 10**9
        with pytest.raises(ForbiddenError, match="check the clocks"):
            agent.pull()
        agent.memory.note()
        now_s[0] -= 10**9
        assert agent.memory.wall() > now_s[0] + 10**8
        agent.pull()
        assert agent.memory.wall() < now_s[0] + 60, (
            "the cloud's time was signed, and the clock agrees with it"
        )


def test_a_memory_that_cannot_be_read_says_so(tmp_path):
    with Registry(tmp_path) as registry:
        Memory(registry).note(model="m")
        (tmp_path / "sync" / "state.json").write_text('{"serial": "many"}')
        with pytest.raises(CorruptArtifactError, match="trust the cloud anew"):
            Memory(registry)
        (tmp_path / "sync" / "state.json").unlink()
        (tmp_path / "sync").rmdir()
        (tmp_path / "sync").write_text("")
        with pytest.raises(ConfigError, match="choose another directory"):
            Memory(registry)


def test_a_broken_version_of_the_device_is_replaced_by_whole_weights(served, tmp_path):
    released, endpoint = served
    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        agent.pull()
        (tmp_path / "edge" / "models" / "m" / "1" / "weights.safetensors").write_bytes(b"broken")
        publish(released, 2)
        assert agent.pull().nbytes["weights"] and runs(registry, 2)


@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
def test_what_rots_on_the_device_is_downloaded_again(served, tmp_path, file):
    released, endpoint = served
    versions = tmp_path / "edge" / "models" / "m"
    with device(tmp_path / "edge", endpoint.url) as (_, agent):
        agent.pull()
    (versions / "1" / file).write_bytes(b"broken")
    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        assert agent.pull().local == 2 and runs(registry, 1)
        publish(released, 2)
        assert agent.pull().local == 3
        (versions / "2" / file).write_bytes(b"broken")
        released.rollback("m", who="test", why="worse")
        assert agent.pull().local == 4 and runs(registry, 1)


def test_a_downgrade_is_refused_also_where_the_version_that_ran_is_broken(served, tmp_path):
    released, endpoint = served
    publish(released, 2)
    with device(tmp_path / "edge", endpoint.url) as (registry, agent):
        agent.pull()
        (tmp_path / "edge" / "models" / "m" / "1" / "manifest.json").write_bytes(b"broken")
        released.set_alias("m", "default", 1, who="test", why="a mistake")
        with pytest.raises(ForbiddenError, match="version 1, 2 ran here"):
            agent.pull()
        released.rollback("m", who="test", why="undo")
        assert agent.pull().changed and runs(registry, 2)


def test_the_disk_of_a_device_keeps_two_versions_and_what_cannot_be_had_again(tmp_path):
    def whole():
        return sorted(
            int(path.parent.name)
            for path in (tmp_path / "edge" / "models" / "m").glob("*/weights*")
        )

    with (
        cloud(tmp_path / "cloud", 1, with_heads=True) as (released, endpoint),
        device(tmp_path / "edge", endpoint.url, "c-1", client="c-1") as (registry, agent),
    ):
        for number in range(2, 6):
            agent.pull()
            publish(released, number)
        assert whole() == [3, 4]
        registry.set_alias("m", "mine", 3, who="test", why="to compare with")
        tensors = state(4)
        mine = agent._edge.update_local(
            {name: tensors[name] for name in ("head.weight", "head.bias")}
        ).version
        for number in range(6, 9):
            agent.pull()
            publish(released, number)
        assert whole() == [3, mine, mine + 2, mine + 3] and runs(registry, 7)
        released.rollback("m", who="test", why="worse")
        assert not agent.pull().changed
        released.rollback("m", who="test", why="worse")
        released.rollback("m", who="test", why="worse")
        assert agent.pull().nbytes["delta"], "what went is downloaded again"
        assert runs(registry, 5) and whole() == [3, mine, mine + 3, mine + 4]
        shadow = registry.start_experiment(
            "m", Experiment(id="s", shadow=mine + 3), "mine", who="test", why="to see"
        )
        for number in range(9, 12):
            publish(released, number)
            agent.pull()
        assert shadow.shadow in whole() and len(whole()) == 5, "what an experiment needs stays too"


def test_the_table_of_bytes():
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "edge_bytes.py"))
    rows = {row.way: row for row in script["rows"](quick=True)}
    assert (
        rows["delta int8"].payload
        < 0.3 * rows["full"].payload
        < rows["delta exact"].payload
        < rows["full"].payload
    )
    assert rows["head only"].payload < rows["full"].payload / 3
    assert abs(rows["delta int8"].accuracy - rows["full"].accuracy) < 0.02
    assert all(row.markdown(rows["full"]).count("|") == 8 for row in rows.values())


def test_a_bad_authority_is_a_message(tmp_path):
    with Registry(tmp_path) as registry, pytest.raises(ConfigError, match="PEM certificate"):
        SyncAgent(
            "https://127.0.0.1:9",
            None,
            registry,
            edge=None,
            settings=SyncSettings(ca=b"no certificate"),
        )
