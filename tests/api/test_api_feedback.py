"""Feedback over the network: the answer names its arm, and one genuine, own, timely reward an
answer counts."""

import base64
import json
import math
import os
import stat
import threading
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

import flserving
from experiment_models import ROW, published, server_of
from flserving.api.auth import Role, Tokens
from flserving.api.client import AsyncClient, Client
from flserving.api.client.retries import Refused
from flserving.api.grpc.codec import message
from flserving.errors import (
    ConflictError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    ServerClosedError,
    UnauthorizedError,
)
from flserving.experiments.feedback import FILE_NAME, FeedbackStore
from flserving.registry.experiment import Experiment
from flserving.registry.forget import KEY_FILE
from grpc_door import Caller, health, metadata, status
from serving_models import PATIENCE_S, Threads

pytestmark = pytest.mark.timeout(120)
LOG = {"who": "test", "why": "to see"}
AB = Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)})


class Clock:
    now_s = 1e9

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = FeedbackStore(str(tmp_path), receipt_s=60, most_per_client=5, clock=clock)
    yield store
    store.close()


# The store


def test_a_reward_counts_once_and_for_the_arm_of_its_answer(store):
    receipt = store.receipt("run", "a", "c-1")
    store.add(store.read(receipt, "c-1"), 0.5)
    with pytest.raises(ConflictError, match="feedback for this answer already"):
        store.add(store.read(receipt, "c-1"), 1)
    store.add(store.read(store.receipt("run", "b", "c-1"), "c-1"), 1)
    store.add(store.read(store.receipt("other", "b", "c-1"), "c-1"), 1)
    name = store.pseudonym("c-1").hex()
    assert store.rewards("run") == {"a": {name: (1, 0.5)}, "b": {name: (1, 1.0)}}
    assert store.sums("run") == {"a": (1, 0.5), "b": (1, 1.0)}


def test_no_changed_byte_no_other_client_and_no_other_key_is_believed(store, tmp_path_factory):
    receipt = store.receipt("run", "a", "c-1")
    raw = base64.urlsafe_b64decode(receipt)
    forged = [
        base64.urlsafe_b64encode(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]).decode()
        for i in range(len(raw))
    ]
    with_other_key = FeedbackStore(str(tmp_path_factory.mktemp("other")))
    forged += [
        with_other_key.receipt("run", "a", "c-1"),
        "",
        "x",
        "é",
        "A" * 100_000,
        receipt[:-4],
        receipt + "AAAA",
    ]
    with_other_key.close()
    texts = set()
    for one in forged:
        with pytest.raises(ForbiddenError) as refused:
            store.read(one, "c-1")
        texts.add(str(refused.value))
    with pytest.raises(ForbiddenError) as refused:
        store.read(receipt, "c-2")
    assert {str(refused.value)} == texts, "whose receipt it is stays unsaid"
    assert store.read(receipt, "c-1").arm == "a" and store.sums("run") == {}


def test_late_feedback_is_refused_and_its_mark_is_kept_exactly_as_long_as_needed(store, clock):
    receipt, late = store.receipt("run", "a", "c-1"), store.receipt("run", "a", "c-1")
    store.add(store.read(receipt, "c-1"), 1)
    clock.now_s += 60
    with pytest.raises(ConflictError, match="already"):
        store.add(store.read(receipt, "c-1"), 1)
    clock.now_s += 2
    for one in (receipt, late):
        with pytest.raises(
            ConflictError, match="the answer is 62 s old: feedback is taken for 60 s"
        ):
            store.read(one, "c-1")
    store.add(store.read(store.receipt("run", "a", "c-2"), "c-2"), 1)
    assert store._query("SELECT count(*) FROM used") == [(1,)], (
        "marks of what is late anyway are removed"
    )
    assert store.sums("run") == {"a": (2, 2.0)}


@pytest.mark.parametrize(
    "reward", [-0.1, 1.1, float("nan"), float("inf"), True, "1", None], ids=repr
)
def test_what_is_no_reward_is_refused_and_may_be_given_again(store, reward):
    receipt = store.read(store.receipt("run", "a", "c-1"), "c-1")
    with pytest.raises(InvalidInputError, match="reward is"):
        store.add(receipt, reward)
    store.add(receipt, 1)


def test_nobody_decides_alone(store):
    for _ in range(5):
        store.add(store.read(store.receipt("run", "a", "c-1"), "c-1"), 1)
    with pytest.raises(ForbiddenError, match="has given its 5 rewards"):
        store.add(store.read(store.receipt("run", "b", "c-1"), "c-1"), 1)
    store.add(store.read(store.receipt("run", "b", "c-2"), "c-2"), 1)
    assert store.sums("run") == {"a": (5, 5.0), "b": (1, 1.0)}


def test_of_many_that_replay_one_receipt_at_once_in_two_stores_one_counts(store, tmp_path, clock):
    other = FeedbackStore(str(tmp_path), receipt_s=60, clock=clock)
    receipt, threads, ready = store.receipt("run", "a", "c-1"), Threads(), threading.Barrier(8)

    def give(where):
        ready.wait(PATIENCE_S)
        where.add(where.read(receipt, "c-1"), 1)

    for place in range(8):
        threads.start(give, (store, other)[place % 2])
    outcomes = threads.outcomes()
    assert (
        outcomes.count(None) == 1 and sum(isinstance(one, ConflictError) for one in outcomes) == 7
    )
    assert other.sums("run") == {"a": (1, 1.0)}
    other.close()
    if os.name == "posix":
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (FILE_NAME, KEY_FILE)]
        assert modes == [0o600, 0o600], "who gave which reward, and the key to their names"


# Over the network


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with published(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def server(registry):
    with server_of(registry) as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server):
    tokens = Tokens()
    for i in range(8):
        tokens.add(f"token-{i}", Role.INFER, f"c-{i}")
    tokens.add("nobody", Role.INFER)
    tokens.add("reader", Role.READ, "c-1")
    with flserving.serve(server, tokens=tokens) as endpoint:
        yield endpoint


@pytest.fixture(params=["http", "grpc"])
def door(request, endpoint):
    """Where a client calls, over REST and over gRPC."""
    return endpoint.url if request.param == "http" else f"grpc://{endpoint.grpc_url}"


@pytest.fixture
def running(registry, server):
    yield registry.start_experiment("m", AB, **LOG)
    registry.conclude_experiment("m", **LOG)


def given(server):
    return {name: arm["rewards"] for name, arm in server.experiments.report("m")["arms"].items()}


def test_the_answer_names_its_arm_and_its_client_may_reward_it_once(door, server, running):
    for i in range(8):
        with Client(door, f"token-{i}") as caller:
            answers = [
                caller.predict(ROW),
                caller.predict(ROW, personal=True),
                caller.predict(ROW, arrays=True),
            ]
            arm = running.arm_of(f"c-{i}")
            for answer in answers:
                assert answer["arm"] == arm == {"1": "a", "2": "b"}[answer["model_version"]]
                assert np.array_equal(answer["predictions"], [int(answer["model_version"])])
            assert "arm" not in caller.predict(ROW, version=1), (
                "who names a version is in no experiment"
            )
            before = given(server)
            caller.feedback(answers[0]["receipt"], 1)
            with pytest.raises(ConflictError, match="feedback for this answer already"):
                caller.feedback(answers[0]["receipt"], 1)
            assert given(server) == before | {arm: before[arm] + 1}
    with Client(door, "nobody") as caller:
        answer = caller.predict(ROW)
        assert answer["model_version"] == "1" and not {"arm", "receipt"} & answer.keys()


def test_feedback_whose_answer_is_lost_is_tried_again_and_counts_once(
    door, server, running, monkeypatch
):
    with Client(door, "token-5", sleep=lambda _: None) as caller:
        receipt, before, send, tries = (
            caller.predict(ROW)["receipt"],
            given(server),
            caller._transport.send,
            [],
        )

        def lossy(*call):
            tries.append(send(*call))
            raise Refused(ServerClosedError("no answer"), again=True)

        monkeypatch.setattr(caller._transport, "send", lossy)
        with pytest.raises(ConflictError, match="already"):
            caller.feedback(receipt, 1)
    assert len(tries) == 1 and sum(given(server).values()) == sum(before.values()) + 1


async def test_the_awaiting_client_gives_feedback_too(door, server, running):
    async with AsyncClient(door, "token-2") as caller:
        receipt, before = (await caller.predict(ROW))["receipt"], given(server)
        await caller.feedback(receipt, 0.5, model="m")
        with pytest.raises(ConflictError):
            await caller.feedback(receipt, 0.5)
    assert sum(given(server).values()) == sum(before.values()) + 1


def test_what_is_refused_over_the_network_changes_nothing(
    door, server, running, registry, monkeypatch
):
    with Client(door, "token-1") as caller:
        receipt = caller.predict(ROW)["receipt"]
    before, protocol = given(server), "rest" if door.startswith("http") else "grpc"
    refused = server.telemetry.totals()["refusals"].get(protocol, {}).get("Forbidden", 0)
    for token, kind, says, options in [
        ("token-2", ForbiddenError, "not issued to this client", {}),
        ("nobody", ForbiddenError, "feedback needs a client", {}),
        ("reader", ForbiddenError, "role", {}),
        ("unknown", UnauthorizedError, "credential|token", {}),
        (
            "token-1",
            ForbiddenError,
            "not issued to this client",
            {"receipt": receipt[:-4] + "AAAA"},
        ),
        ("token-1", ForbiddenError, "not issued to this client", {"receipt": ""}),
        ("token-1", InvalidInputError, "reward is 2", {"reward": 2}),
        ("token-1", InvalidInputError, "reward is nan", {"reward": math.nan}),
        ("token-1", InvalidInputError, "reward is '1'", {"reward": "1"}),
        ("token-1", InvalidInputError, "receipt is 7", {"receipt": 7}),
        ("token-1", NotFoundError, "nothing", {"model": "nothing"}),
    ]:
        with Client(door, token) as caller, pytest.raises(kind, match=says):
            caller.feedback(**({"receipt": receipt, "reward": 1, "model": "m"} | options))
    now = server.telemetry.totals()["refusals"][protocol]
    assert now["Forbidden"] == refused + 5, "each is in the metrics"
    store = server.experiments._store(registry)
    with Client(door, "token-1") as caller:
        monkeypatch.setattr(store, "_clock", lambda: time.time() + store.receipt_s + 1)
        with pytest.raises(ConflictError, match="s old: feedback is taken for 3600 s"):
            caller.feedback(receipt, 1)
        monkeypatch.undo()
        assert given(server) == before
        caller.feedback(receipt, 1)


def test_what_the_client_never_sends_is_refused_by_the_doors(endpoint, server, running):
    with Client(endpoint.url, "token-1") as caller:
        receipt = caller.predict(ROW)["receipt"]
    before, headers = given(server), {"authorization": "Bearer token-1"}
    for body in (
        b"",
        b"{}",
        b"no",
        *({"receipt": receipt, "reward": r} for r in (2, "1", None, True)),
        {"reward": 1},
    ):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = httpx.post(f"{endpoint.url}/v2/models/m/feedback", content=body, headers=headers)
        assert (reply.status_code, reply.headers["flserving-error"]) == (400, "InvalidInput"), (
            body,
            reply.text,
        )
    kind = message("flserving.FeedbackRequest")
    with Caller(endpoint.grpc_url, "token-1") as caller:
        for body in (
            kind(model_name="m", receipt=receipt),
            kind(model_name="m", receipt=receipt, reward=2),
            b"no",
        ):
            assert caller.refused("/flserving.Experiments/Feedback", body)[0] == "INVALID_ARGUMENT"
        too_long = kind(
            model_name="m", receipt="A" * (endpoint.options.max_body_bytes + 1), reward=1
        )
        assert (
            caller.refused("/flserving.Experiments/Feedback", too_long)[0] == "RESOURCE_EXHAUSTED"
        )
    assert given(server) == before


def test_stubs_made_from_the_proto_file_give_feedback(endpoint, server, running, monkeypatch):
    pytest.importorskip("grpc_tools")
    monkeypatch.syspath_prepend(Path(flserving.__file__).parent / "api" / "grpc")
    protos, services = grpc.protos_and_services("experiments.proto")
    with Client(endpoint.url, "token-4") as caller:
        receipt, before = caller.predict(ROW)["receipt"], given(server)
    request = protos.FeedbackRequest(model_name="m", receipt=receipt, reward=0.0)
    with grpc.insecure_channel(endpoint.grpc_url) as channel:
        stub = services.ExperimentsStub(channel)
        assert stub.Feedback(request, metadata=metadata("token-4"), timeout=PATIENCE_S).counted
        assert status(health(channel, "flserving.Experiments")) == "SERVING"
    assert sum(given(server).values()) == sum(before.values()) + 1


def test_feedback_for_an_experiment_that_is_over_decides_nothing(door, registry, server):
    running = registry.start_experiment("m", AB, **LOG)
    with Client(door, "token-3") as caller:
        receipt = caller.predict(ROW)["receipt"]
        registry.conclude_experiment("m", **LOG)
        with pytest.raises(ConflictError, match="is over"):
            caller.feedback(receipt, 1)
        again = registry.start_experiment("m", AB, **LOG)
        with pytest.raises(ConflictError, match="is over"):  # another run of the same id
            caller.feedback(receipt, 1)
    registry.conclude_experiment("m", **LOG)
    store = server.experiments._store(registry)
    name = store.pseudonym("c-3").hex()
    assert (
        name not in store.rewards(running.run).get(running.arm_of("c-3"), {})
        and store.rewards(again.run) == {}
    )
    with pytest.raises(NotFoundError):
        server.experiments.feedback("nothing", receipt, 1, "c-3")
