"""Feedback over the network: the answer names its arm, and one genuine, own, timely reward an answer counts."""

import base64
import os
import stat
import threading

import httpx
import numpy as np
import pytest

import flserving
from experiment_models import ROW, published, server_of
from flserving.api.auth import Role, Tokens
from flserving.api.client import Client
from flserving.errors import ConflictError, ForbiddenError, InvalidInputError, NotFoundError
from flserving.feedback import FILE_NAME, FeedbackStore
from flserving.split import Experiment
from serving_models import Threads

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
    assert store.rewards("run") == {"a": {"c-1": (1, 0.5)}, "b": {"c-1": (1, 1.0)}}
    assert store.sums("run") == {"a": (1, 0.5), "b": (1, 1.0)}


def test_no_changed_byte_no_other_client_and_no_other_key_is_believed(store, tmp_path_factory):
    receipt = store.receipt("run", "a", "c-1")
    raw = base64.urlsafe_b64decode(receipt)
    forged = [base64.urlsafe_b64encode(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]).decode() for i in range(len(raw))]
    with_other_key = FeedbackStore(str(tmp_path_factory.mktemp("other")))
    forged += [with_other_key.receipt("run", "a", "c-1"), "", "x", "é", "A" * 100_000, receipt[:-4], receipt + "AAAA"]
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
        with pytest.raises(ConflictError, match="the answer is 62 s old: feedback is taken for 60 s"):
            store.read(one, "c-1")
    store.add(store.read(store.receipt("run", "a", "c-2"), "c-2"), 1)
    assert store._query("SELECT count(*) FROM used") == [(1,)], "marks of what is late anyway are removed"
    assert store.sums("run") == {"a": (2, 2.0)}


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan"), float("inf"), True, "1", None], ids=repr)
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
        ready.wait(20)
        where.add(where.read(receipt, "c-1"), 1)

    for place in range(8):
        threads.start(give, (store, other)[place % 2])
    outcomes = threads.outcomes()
    assert outcomes.count(None) == 1 and sum(isinstance(one, ConflictError) for one in outcomes) == 7
    assert other.sums("run") == {"a": (1, 1.0)}
    other.close()
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600, "it holds the key"


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


@pytest.fixture
def running(registry, server):
    yield registry.start_experiment("m", AB, **LOG)
    registry.conclude_experiment("m", **LOG)


def give(endpoint, token, receipt, reward=1.0, model="m", **body):
    body = {"receipt": receipt, "reward": reward} | body
    headers = {"authorization": f"Bearer {token}"}
    return httpx.post(f"{endpoint.url}/v2/models/{model}/feedback", json=body, headers=headers)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_answer_names_its_arm_and_its_client_may_reward_it_once(endpoint, server, running, scheme):
    url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"
    for i in range(8):
        with Client(url, f"token-{i}") as caller:
            answers = [caller.predict(ROW), caller.predict(ROW, personal=True), caller.predict(ROW, arrays=True)]
            arm = running.arm_of(f"c-{i}")
            for answer in answers:
                assert answer["arm"] == arm == {"1": "a", "2": "b"}[answer["model_version"]]
                assert np.array_equal(answer["predictions"], [int(answer["model_version"])])
            assert "arm" not in caller.predict(ROW, version=1), "who names a version is in no experiment"
        before = server.experiments.report("m")["arms"][arm]["rewards"]
        assert give(endpoint, f"token-{i}", answers[0]["receipt"]).json() == {"counted": True}
        assert give(endpoint, f"token-{i}", answers[0]["receipt"]).status_code == 409
        assert server.experiments.report("m")["arms"][arm]["rewards"] == before + 1
    with Client(url, "nobody") as caller:
        answer = caller.predict(ROW)
        assert answer["model_version"] == "1" and not {"arm", "receipt"} & answer.keys()


def test_what_is_refused_over_the_network_changes_nothing(endpoint, server, running):
    with Client(endpoint.url, "token-1") as caller:
        receipt = caller.predict(ROW)["receipt"]
    before = server.experiments.report("m")["arms"]
    for token, status, reason, options in [
        ("token-2", 403, "Forbidden", {}),
        ("nobody", 403, "Forbidden", {}),
        ("reader", 403, "Forbidden", {}),
        ("unknown", 401, "Unauthorized", {}),
        ("token-1", 403, "Forbidden", {"receipt": receipt[:-4] + "AAAA"}),
        ("token-1", 400, "InvalidInput", {"reward": 2}),
        ("token-1", 400, "InvalidInput", {"reward": "1"}),
        ("token-1", 400, "InvalidInput", {"receipt": 7}),
        ("token-1", 404, "NotFound", {"model": "nothing"}),
    ]:
        reply = give(endpoint, token, **({"receipt": receipt} | options))
        assert (reply.status_code, reply.headers["flserving-error"]) == (status, reason), (token, options, reply.text)
    empty = httpx.post(f"{endpoint.url}/v2/models/m/feedback", headers={"authorization": "Bearer token-1"})
    assert empty.status_code == 400
    assert server.experiments.report("m")["arms"] == before
    assert give(endpoint, "token-1", receipt).status_code == 200


def test_feedback_for_an_experiment_that_is_over_decides_nothing(endpoint, registry, server):
    running = registry.start_experiment("m", AB, **LOG)
    with Client(endpoint.url, "token-3") as caller:
        receipt = caller.predict(ROW)["receipt"]
    registry.conclude_experiment("m", **LOG)
    reply = give(endpoint, "token-3", receipt)
    assert reply.status_code == 409 and "is over" in reply.json()["error"]
    again = registry.start_experiment("m", AB, **LOG)
    assert give(endpoint, "token-3", receipt).status_code == 409, "another run of the same id"
    registry.conclude_experiment("m", **LOG)
    store = server.experiments._store(registry)
    assert "c-3" not in store.rewards(running.run).get(running.arm_of("c-3"), {}) and store.rewards(again.run) == {}
    with pytest.raises(NotFoundError):
        server.experiments.feedback("nothing", receipt, 1, "c-3")
