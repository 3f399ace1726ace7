"""Personal heads that expire: from the stated time on the global head answers, in the cloud and on
devices."""

import contextlib
import json
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
import torch

from edge_cloud import CLIENTS, SIZES, X, heads, state, tokens
from edge_cloud import publish as publish_forever
from flserving import EdgeModelServer, ModelServer, Registry, ServingConfig, serve
from flserving.edge.sync import SyncAgent
from flserving.errors import InvalidModelError, NotFoundError
from flserving.registry import manifest
from flserving.registry.heads import HeadSet

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
EXPIRES = BEGAN + timedelta(days=30)
WHO = CLIENTS[0]


class Clock:
    def __init__(self):
        self.now = BEGAN

    def __call__(self):
        return self.now

    def wall(self):
        return self.now.timestamp()


@pytest.fixture
def clock():
    return Clock()


def publish(registry, number=1, expires_at=EXPIRES):
    made = heads(number)
    expiring = HeadSet(made.layout, made.clients, made.weights, expires_at=expires_at)
    return registry.publish(
        "m", state(number), architecture="mlp", parameters={"sizes": SIZES}, lineage={"round": number},
        preprocessing={"mean": [0.5] * SIZES[0], "std": [2.0] * SIZES[0]}, heads=expiring, alias="default",
    )  # fmt: skip


def answer_of(server, client=WHO):
    answer = server.predict(X, client=client)
    return answer["head"], answer["model_type"], answer["probabilities"]


@pytest.mark.parametrize("cached", [0, 1 << 20], ids=["no-cache", "cache"])
def test_an_expired_head_answers_no_more_and_the_answer_says_so(tmp_path, clock, cached):
    """Neither from memory nor from the cache of predictions; other versions' heads are not
    touched."""
    with (
        Registry(tmp_path, now=clock) as registry,
        ModelServer(ServingConfig(prediction_cache_bytes=cached), registry) as server,
    ):
        publish(registry, 1, expires_at=None)
        publish(registry, 2)
        server.serve(registry, "m")
        generic = server.predict(X)["probabilities"]
        clock.now = EXPIRES - timedelta(seconds=1)
        head, kind, own = answer_of(server)
        assert (head, kind) == ("own", "personal") and own != generic
        clock.now = EXPIRES
        for client in (WHO, [WHO, *CLIENTS, WHO, WHO]):
            answer = server.predict(X, client=client)
            assert (
                set(np.atleast_1d(answer["head"])) == {"expired"}
                and answer["model_type"] == "global"
            )
            assert np.allclose(answer["probabilities"], generic, atol=1e-6)
        assert server.predict(X, client="nobody")["head"] == "unknown"
        assert server.predict(X, "1", client=WHO)["head"] == "own"


def test_where_unknown_clients_are_refused_so_is_one_whose_head_is_expired(tmp_path, clock):
    with Registry(tmp_path, now=clock) as registry:
        publish(registry)
        with ModelServer(ServingConfig(unknown_client="refuse"), registry) as server:
            assert answer_of(server)[0] == "own"
            clock.now = EXPIRES
            with pytest.raises(NotFoundError, match="no personal head"):
                server.predict(X, client=WHO)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (EXPIRES, "2026-01-31T00:00:00+00:00"),
        ("2026-01-31T00:00:00+00:00", "2026-01-31T00:00:00+00:00"),
        ("2026-01-31T02:00:00Z", "2026-01-31T02:00:00+00:00"),
        (
            datetime(2026, 1, 31, 2, tzinfo=timezone(timedelta(hours=2))),
            "2026-01-31T00:00:00+00:00",
        ),
        (None, None),
    ],
)
def test_the_manifest_keeps_the_time_in_utc(tmp_path, given, kept):
    with Registry(tmp_path) as registry:
        assert publish(registry, expires_at=given).heads.expires_at == kept
        assert registry.manifest("m", 1).heads.expires_at == kept
        assert registry.read("m", 1).heads.take(WHO).expires_at == kept, (
            "it goes with a head that is published again"
        )


@pytest.mark.parametrize(
    "given", ["soon", "2026-01-31T00:00:00", datetime(2026, 1, 31), 86_400, ""], ids=repr
)
def test_what_is_no_time_is_refused(given):
    made = heads(1)
    with pytest.raises(InvalidModelError, match="expires_at is"):
        HeadSet(made.layout, made.clients, made.weights, expires_at=given)


def test_manifests_from_before_load_and_never_expire_and_are_written_as_ever(tmp_path, clock):
    with Registry(tmp_path, now=clock) as registry:
        publish_forever(registry, 1, with_heads=True)
        text = (tmp_path / "models" / "m" / "1" / "manifest.json").read_text()
        fields = {"layout", "num_heads", "inputs", "outputs", "nbytes", "index_sha256"}
        assert json.loads(text)["heads"].keys() == fields, (
            "an older flserving reads what does not expire"
        )
        assert manifest.decode(text.encode(), "it").heads.expires_at is None
        clock.now += timedelta(days=365_000)
        with ModelServer(registry=registry) as server:
            assert answer_of(server)[0] == "own"


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_a_device_honours_it_offline_and_after_updates(tmp_path, clock, form):
    """By the clock that tells its model's age, which never goes back; the registry's own is years
    behind here."""
    with contextlib.ExitStack() as stack:
        cloud = stack.enter_context(Registry(tmp_path / "cloud", now=clock))
        publish(cloud)
        server = stack.enter_context(ModelServer(registry=cloud))
        endpoint = stack.enter_context(
            serve(server, tokens=tokens(), grpc_port=None, artifacts=True)
        )
        registry = stack.enter_context(
            Registry(tmp_path / "edge", now=lambda: BEGAN - timedelta(days=3_000))
        )
        edge = stack.enter_context(EdgeModelServer(registry=registry, client=WHO, wall=clock.wall))
        agent = stack.enter_context(
            contextlib.closing(
                SyncAgent(endpoint.url, WHO, registry, edge=edge, client=WHO, form=form)
            )
        )
        agent.pull()
        assert edge.predict(X)["head"] == "own"
        body = registry.read("m", 1).tensors
        moved = {
            name: tensor + 1e-3 if name.startswith("head.") else tensor
            for name, tensor in body.items()
        }
        edge.update_global(moved)
        assert edge.predict(X)["head"] == "own", "kept, on the same body"
        clock.now = EXPIRES
        assert edge.predict(X)["head"] == "expired"
        assert torch.tensor(edge.predict(X)["probabilities"]).allclose(
            torch.tensor(edge.predict(X, use_personalized=False)["probabilities"]), atol=1e-6
        )
        publish(cloud, 2)
        pulled = agent.pull()
        assert "head" not in pulled.nbytes, "the cloud hands out no head whose time is over"
        assert edge.predict(X)["head"] == "expired", "the one that it had goes on being that"
        publish(cloud, 3, expires_at=EXPIRES + timedelta(days=1))
        agent.pull()
        assert edge.predict(X)["head"] == "own", "a new one was published"
