"""A client is forgotten in the cloud: its device forgets it with the next pull, and no other device
notices."""

import contextlib

import httpx
import msgspec
import numpy as np
import pytest
import torch

from byte_search import search
from edge_cloud import SIZES, X, cloud, state
from flserving import Registry
from flserving.api.auth import Role, Tokens
from flserving.edge import EdgeModelServer
from flserving.edge.release import Signer, Statement, verify
from flserving.edge.sync import Memory, SyncAgent
from flserving.errors import FlservingError
from flserving.registry.heads import HeadSet

pytestmark = pytest.mark.timeout(120)

CLIENT = "tablet-7731"
OTHER = "phone-0042"


def publish(registry, round, clients=(CLIENT, OTHER)):
    rng = np.random.default_rng(round)
    weights = rng.standard_normal((len(clients), SIZES[1] + 1, SIZES[2]), dtype=np.float32)
    return registry.publish(
        "m", state(round), architecture="mlp", parameters={"sizes": SIZES}, heads=HeadSet("head", clients, weights),
        lineage={"round": round, "clients": clients, "sample_counts": (10, 20)[: len(clients)]},
        note=f"{CLIENT} rejected: not this time", alias="default",
    )  # fmt: skip


@pytest.fixture
def released(tmp_path):
    """(registry, endpoint) of a cloud with one round."""
    tokens = Tokens()
    for client in (CLIENT, OTHER):
        tokens.add(f"token-of-{client[:5]}", Role.INFER, client)
    with Registry(tmp_path / "cloud") as registry:
        publish(registry, 1)
    with cloud(tmp_path / "cloud", tokens=tokens) as (registry, endpoint):
        yield registry, endpoint


@contextlib.contextmanager
def device(root, endpoint, client=CLIENT, token_of=None):
    with (
        Registry(root) as registry,
        EdgeModelServer(registry=registry, model="m", client=client) as edge,
        contextlib.closing(
            SyncAgent(
                endpoint.url,
                f"token-of-{(token_of or client)[:5]}",
                registry,
                edge=edge,
                client=client,
            )
        ) as agent,
    ):
        yield edge, agent


def test_the_device_forgets_with_its_next_pull(released, tmp_path):
    """Its own head goes too, the one that it trained itself: the file of a head is named by its
    client."""
    registry, endpoint = released
    with device(tmp_path / "edge", endpoint) as (edge, agent):
        agent.pull()
        own = edge.predict(X)
        edge.update_local(
            {"head.weight": torch.ones(SIZES[2], SIZES[1]), "head.bias": torch.zeros(SIZES[2])}
        )
        assert own["head"] == edge.predict(X)["head"] == "own"
        assert {form for _, form in search(tmp_path / "edge", CLIENT)} >= {"key_of, first column"}
        registry.forget(CLIENT)
        pulled = agent.pull()
        assert not pulled.changed and pulled.nbytes.keys() == {"release"}
        answer = edge.predict(X)
        assert (
            answer["head"] == "none"
            and answer["probabilities"] == edge.predict(X, False)["probabilities"]
        )
        assert search(tmp_path / "edge", CLIENT) == search(tmp_path / "cloud", CLIENT) == set()
        token = edge.registry.change_token()
        agent.pull()
        assert edge.registry.change_token() == token and edge.predict(X)["head"] == "none", (
            "it stays forgotten"
        )
    assert search(tmp_path / "edge", CLIENT) == set(), "nor in what is left after its end"


def test_a_later_training_brings_the_device_a_head_again(released, tmp_path):
    registry, endpoint = released
    with device(tmp_path / "edge", endpoint) as (edge, agent):
        agent.pull()
        registry.forget(CLIENT)
        publish(registry, 2, (OTHER,))
        agent.pull()
        assert (edge.predict(X)["round"], edge.predict(X)["head"]) == (2, "none")
        assert search(tmp_path / "edge", CLIENT) == set()
        publish(registry, 3)
        agent.pull()
        agent.pull()
        assert (edge.predict(X)["round"], edge.predict(X)["head"]) == (3, "own")
        registry.forget(CLIENT)
        agent.pull()
        assert edge.predict(X)["head"] == "none" and search(tmp_path / "edge", CLIENT) == set()


def test_no_other_device_notices(released, tmp_path):
    registry, endpoint = released
    with device(tmp_path / "edge", endpoint, OTHER) as (edge, agent):
        agent.pull()
        assert search(tmp_path / "edge", CLIENT) == set(), "nobody else's facts come along"
        before = edge.predict(X)["probabilities"]
        registry.forget(CLIENT)
        pulled = agent.pull()
        assert not pulled.changed and pulled.nbytes.keys() == {"release"}
        assert edge.predict(X)["head"] == "own" and edge.predict(X)["probabilities"] == before


def test_a_device_with_another_clients_token_forgets_no_client_but_its_own(released, tmp_path):
    registry, endpoint = released
    publish(registry, 2, (CLIENT,))
    with device(tmp_path / "edge", endpoint, token_of=OTHER) as (edge, agent):
        agent.pull()
        edge.update_local(
            {"head.weight": torch.ones(SIZES[2], SIZES[1]), "head.bias": torch.zeros(SIZES[2])}
        )
        before = edge.predict(X)["probabilities"]
        registry.forget(OTHER)
        agent.pull()
        assert edge.predict(X)["head"] == "own" and edge.predict(X)["probabilities"] == before


def test_the_cloud_gives_its_head_to_nobody_any_more(released):
    registry, endpoint = released
    headers = {"authorization": f"Bearer token-of-{CLIENT[:5]}"}
    url = f"{endpoint.url}/v2/repository/models/m/versions/1/head"
    assert httpx.get(url, headers=headers).status_code == 200
    registry.forget(CLIENT)
    assert httpx.get(url, headers=headers).status_code == 404


def test_a_device_that_could_not_forget_does_so_with_the_pull_after(
    released, tmp_path, monkeypatch
):
    registry, endpoint = released
    with device(tmp_path / "edge", endpoint) as (edge, agent):
        agent.pull()
        registry.forget(CLIENT)
        with monkeypatch.context() as patched:
            patched.setattr(
                Registry,
                "_scrub",
                lambda self: (_ for _ in ()).throw(FlservingError("the disk is full")),
            )
            with pytest.raises(FlservingError, match="the disk is full"):
                agent.pull()
        agent.pull()
        assert edge.predict(X)["head"] == "none" and search(tmp_path / "edge", CLIENT) == set()


@pytest.mark.parametrize("file", ["manifest.json", "heads.bin"])
def test_a_damaged_version_on_the_device_stops_neither_its_forgetting_nor_its_pulls(
    released, tmp_path, file
):
    registry, endpoint = released
    with device(tmp_path / "edge", endpoint) as (edge, agent):
        agent.pull()
        publish(registry, 2)
        agent.pull()
        path = tmp_path / "edge/models/m/1" / file
        path.write_bytes(b"x" + path.read_bytes()[1:])
        registry.forget(CLIENT)
        publish(registry, 3, (OTHER,))
        for _ in range(2):
            agent.pull()
            assert (edge.predict(X)["round"], edge.predict(X)["head"]) == (3, "none")
        assert search(tmp_path / "edge", CLIENT) == set()


def test_only_who_asks_is_told_and_a_device_of_before_reads_its_statement(released):
    registry, _ = released
    registry.forget(CLIENT)
    signer = Signer(registry)
    assert "forgotten" not in signer.release("m").statement
    assert '"forgotten":1' in signer.release("m", client=CLIENT).statement
    assert CLIENT not in signer.release("m", client=CLIENT).statement
    assert "forgotten" not in signer.release("m", client=OTHER).statement


def test_a_device_that_knows_the_whole_manifest_takes_the_one_for_devices(released, tmp_path):
    """Its cloud was updated meanwhile: the same version, the same state of the registry, another
    manifest."""
    registry, endpoint = released
    with Registry(tmp_path / "edge") as local:
        Memory(local).note(
            model="m", serial=registry.change_token(), manifest_sha256="0" * 64, version=1, round=1
        )
    with device(tmp_path / "edge", endpoint) as (edge, agent):
        assert agent.pull().changed and edge.predict(X)["head"] == "own"
    statement, _ = verify(msgspec.json.encode(Signer(registry).release("m")), Statement, None)
    assert statement.serial == registry.change_token() + 1
