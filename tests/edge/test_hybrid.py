"""Hybrid serving: which path a request takes, what each answer says, and that nothing leaves
without consent."""

import asyncio
import itertools
import socket
import threading
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

import flserving
from flserving import ServingConfig, models
from flserving.api.client import Client
from flserving.edge import EdgeModelServer
from flserving.edge.breaker import CircuitBreaker
from flserving.edge.hybrid import HybridServer, HybridSettings
from flserving.errors import (
    ConfigError,
    DeadlineExceededError,
    FlservingError,
    InvalidInputError,
    ServerClosedError,
    StaleModelError,
    UnauthorizedError,
)
from flserving.monitoring.prometheus import exposition
from serving_models import PATIENCE_S, Gated, Probe, Threads, wait_until

pytestmark = pytest.mark.timeout(120)
CONFIG = ServingConfig(warmup_samples=1, timeout_ms=PATIENCE_S * 1e3)
MLP = {"architecture": "mlp", "parameters": {"sizes": [2, 2, 2]}}
# the device answers 0 with confidences 0.98 and 0.52; the cloud answers 1
SURE, UNSURE = [4.0, 0.0], [0.1, 0.0]
HEAD = {"head.weight": torch.eye(2), "head.bias": torch.tensor([0.01, 0.0])}


def state(scale=1.0):
    """Logits that are the row itself, times ``scale``."""
    return {
        "body.0.weight": torch.eye(2), "body.0.bias": torch.zeros(2),
        "head.weight": scale * torch.eye(2), "head.bias": torch.zeros(2),
    }  # fmt: skip


def paths_of(hybrid):
    return Counter(hybrid.get_all_stats()["server"]["answers_by_path"])


class Cloud:
    """Answers class 1 to every row, raises ``error``, or waits for ``gate``; notes what it was
    asked."""

    def __init__(self):
        self.asked, self.error, self.version, self.said = [], None, "9", {"round": 5}
        self.gate = threading.Event()
        self.gate.set()

    def predict(self, features, *, model, timeout_ms, arrays, personal=False):
        self.asked.append(
            {
                "model": model,
                "timeout_ms": timeout_ms,
                "personal": personal,
                "rows": features.copy(),
            }
        )
        assert arrays, "lists would lose the dtype"
        assert self.gate.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        n = len(features)
        outputs = {"predictions": np.ones(n, np.int64), "confidences": np.full(n, 0.9, np.float32)}
        return (
            outputs
            | {"latency_ms": 1.0, "model_version": self.version, "model_type": "global"}
            | self.said
        )


class World:
    """An edge, a cloud and a clock, and hybrids of them."""

    def __init__(self, head=False, **limits):
        self.now_s, self.cloud, self.hybrids = 1.9e9, Cloud(), []
        self.edge = EdgeModelServer(
            config=CONFIG, clock=lambda: self.now_s, wall=lambda: self.now_s, **limits
        )
        self.edge.update_global(state(), round=4, head=HEAD if head else None, **MLP)

    def hybrid(self, policy="local_first", **options):
        options = {"consent": True, "breaker": CircuitBreaker(1000), "cache_ttl_s": 0, **options}
        named = {field.name for field in fields(HybridSettings)} & options.keys()
        options["settings"] = HybridSettings(**{name: options.pop(name) for name in named})
        self.hybrids.append(HybridServer(self.edge, self.cloud, policy, **options))
        return self.hybrids[-1]

    def close(self):
        self.cloud.gate.set()
        for hybrid in self.hybrids:
            hybrid.close()
        self.edge.close()


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


# Policies


@pytest.mark.parametrize("policy", ["local_first", "as_drawn"])
@pytest.mark.parametrize("head", [False, True])
def test_every_state_of_the_world_leads_to_the_path_that_the_policy_says(policy, head):
    world, wrong = World(head, fresh_s=60, refuse_s=600), []
    cases = itertools.product(
        (True, False), (0, 61, 601), (True, False), (True, False), (True, False)
    )
    try:
        for sure, age_s, consent, up, cached in cases:
            world.edge.confirm()
            world.cloud.error = None
            hybrid, row = world.hybrid(policy), SURE if sure else UNSURE
            before = paths_of(hybrid)
            if cached:
                hybrid._stands, kept = (lambda answer, threshold: False), hybrid._stands
                assert hybrid.predict(row)["path"] == "cloud"
                hybrid._stands = kept
            world.now_s += age_s
            hybrid.consent, world.cloud.error = consent, None if up else ServerClosedError("away")
            local_first = sure and age_s == 0 if policy == "local_first" else head and age_s < 600
            wanted = (
                "local" if local_first else "cache" if cached else "cloud" if consent and up
                else "degraded" if age_s < 600 else "refused"
            )  # fmt: skip
            try:
                answer = hybrid.predict(row)
                said = answer["path"]
                device = said in ("local", "degraded")
                right = answer["predictions"] == [0 if device else 1] and answer["round"] == (
                    4 if device else 5
                )
                right &= answer["age_s"] == (age_s if device or said == "cache" else 0)
                right &= answer["degraded"] == (
                    said == "degraded" or (said == "local" and age_s > 60)
                )
                right &= answer["model_version"] == ("1" if device else "9")
            except StaleModelError:
                said, right = "refused", True
            if said != wanted or not right:
                wrong.append((sure, age_s, consent, up, cached, wanted, said))
            told = paths_of(hybrid) - before
            assert told == Counter([said] * (said != "refused") + ["cloud"] * cached)
        assert not wrong, wrong
    finally:
        world.close()


def test_one_unsure_row_sends_the_whole_request_and_the_threshold_counts_as_sure(world):
    hybrid = world.hybrid()
    confidence = hybrid.edge.predict(UNSURE)["confidences"][0]
    assert hybrid.predict([SURE, SURE])["path"] == "local"
    answer = hybrid.predict([SURE, UNSURE])
    assert answer["path"] == "cloud" and answer["predictions"] == [1, 1]
    hybrid.threshold = confidence
    assert hybrid.predict([SURE, UNSURE])["path"] == "local"
    hybrid.threshold = np.nextafter(confidence, 1)
    assert hybrid.predict([UNSURE, SURE])["path"] == "cloud"


def test_a_version_by_name_is_the_device_s_alone(world):
    hybrid = world.hybrid()
    assert (
        hybrid.predict(UNSURE, version=1)["path"]
        == hybrid.predict(UNSURE, version="default")["path"]
        == "local"
    )
    assert not world.cloud.asked


def test_what_the_cloud_is_asked(world):
    hybrid = world.hybrid(cloud_share=0.25, personal=True, cloud_model="digits")
    hybrid.predict(UNSURE, timeout_ms=8000)
    hybrid.predict(UNSURE, use_personalized=False)
    first, second = world.cloud.asked
    assert first["model"] == "digits" and first["personal"] and not second["personal"]
    assert first["timeout_ms"] == pytest.approx(2000) and first["rows"].tolist() == [
        pytest.approx(UNSURE)
    ]


def test_the_head_that_the_cloud_keeps_is_for_the_device_s_client_alone(world):
    """The credential is the device's: asked for "b", the cloud would answer with the head of
    "device"."""
    hybrid = world.hybrid(personal=True)
    for client in (None, "device", "b", ["device"], ""):
        hybrid.predict(UNSURE, client=client)
    assert [asked["personal"] for asked in world.cloud.asked] == [True, True, False, False, False]


# Consent


def test_consent_that_is_withdrawn_stops_what_still_waits_for_a_thread(world):
    hybrid, threads = world.hybrid(cloud_calls=1), Threads()
    world.cloud.gate.clear()
    threads.start(hybrid.predict, UNSURE)
    wait_until(lambda: len(world.cloud.asked) == 1)
    threads.start(hybrid.predict, [0.2, 0.1])
    wait_until(lambda: hybrid._calls._work_queue.qsize() == 1, "a call that waits")
    hybrid.consent = False
    world.cloud.gate.set()
    assert sorted(answer["path"] for answer in threads.results()) == ["cloud", "degraded"]
    assert len(world.cloud.asked) == 1


@pytest.mark.parametrize("policy", ["local_first", "as_drawn"])
def test_without_consent_not_a_byte_leaves_the_device(policy):
    received, ends = [], threading.Event()

    def count(listener):
        while not ends.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                received.append(len(connection.recv(65536)))

    world, threads = World(refuse_s=60), Threads()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.02)
        threads.start(count, listener)
        port = listener.getsockname()[1]
        try:
            with Client(f"http://127.0.0.1:{port}") as world.cloud:
                # consent is off unless somebody gives it
                hybrid = HybridServer(world.edge, world.cloud, policy)
                world.hybrids.append(hybrid)
                for row in (SURE, UNSURE):
                    assert hybrid.predict(row)["path"] in ("local", "degraded")
                    assert asyncio.run(hybrid.apredict(row))["path"] in ("local", "degraded")
                world.now_s += 61
                with pytest.raises(StaleModelError):
                    hybrid.predict(UNSURE)
                assert received == [] and hybrid.get_all_stats()["hybrid"][
                    "cloud_refusals"
                ].keys() == {"Forbidden"}
                hybrid.consent = True  # the counter does count
                with pytest.raises(StaleModelError):
                    hybrid.predict(UNSURE, timeout_ms=2000)
                wait_until(
                    lambda: received and received[0] > 0, "the bytes of a request with consent"
                )
        finally:
            ends.set()
            threads.results()
            world.cloud = Cloud()
            world.close()


# The cloud's answers on the device


def test_cached_answers_are_private_and_gone_after_a_promotion_on_either_side(world):
    hybrid = world.hybrid(cache_ttl_s=50)
    path = lambda **options: hybrid.predict(UNSURE, **options)["path"]  # noqa: E731
    assert [path(), path(), path(use_personalized=False), path(client="b")] == [
        "cloud",
        "cache",
        "cloud",
        "cloud",
    ]
    assert [path(), path(use_personalized=False), path(client="b")] == ["cache"] * 3
    world.edge.update_global(state(1.1), round=5)  # the device heard of a new round
    assert [path(), path()] == ["cloud", "cache"]
    world.cloud.version = "10"
    # here it is told that the cloud has a new version
    assert hybrid.predict([UNSURE, UNSURE])["path"] == "cloud"
    assert [path(), path()] == ["cloud", "cache"]
    world.now_s += 49
    assert hybrid.predict(UNSURE)["age_s"] == 49
    world.now_s += 1
    assert path() == "cloud"


def test_cached_answers_cannot_be_changed_by_who_got_them(world):
    hybrid = world.hybrid()
    hybrid.predict(UNSURE)["predictions"].append("mine")
    answer = asyncio.run(hybrid.apredict(UNSURE, arrays=True))
    assert answer["path"] == "cache" and answer["predictions"].tolist() == [1]
    with pytest.raises(ValueError, match="read-only"):
        answer["predictions"][0] = 7


def test_identical_requests_ask_the_cloud_once():
    world, threads = World(), Threads()
    try:
        hybrid = world.hybrid()
        world.cloud.gate.clear()
        for _ in range(6):
            threads.start(hybrid.predict, UNSURE)
        wait_until(
            lambda: hybrid.cloud_cache.stats()["shared"] == 5, "five that wait for the sixth"
        )
        world.cloud.gate.set()
        assert [answer["path"] for answer in threads.results()] == ["cloud"] * 6 and len(
            world.cloud.asked
        ) == 1
    finally:
        world.close()


def test_who_follows_the_call_of_another_hears_why_it_failed(world):
    hybrid, threads = world.hybrid(), Threads()
    world.cloud.gate.clear()
    world.cloud.error = UnauthorizedError("who are you?")
    for _ in range(3):
        threads.start(hybrid.predict, UNSURE)
    wait_until(lambda: hybrid.cloud_cache.stats()["shared"] == 2, "two that wait for the third")
    world.cloud.gate.set()
    assert [answer["path"] for answer in threads.results()] == ["degraded"] * 3
    assert hybrid.get_all_stats()["hybrid"]["cloud_refusals"] == {"Unauthorized": 3}


def test_who_follows_the_call_of_another_waits_no_longer_than_its_own_time(world):
    """Of the two only the follower is in a hurry: the device answers it, the leader gets what it
    waits for."""
    with EdgeModelServer(config=CONFIG) as edge:  # by the real clock
        edge.update_global(state(), round=4, **MLP)
        world.cloud.gate.clear()
        settings = HybridSettings(
            cloud_share=0.1
        )  # 10 s for the leader; 0.3 s for the follower, and 2.7 for its device
        with HybridServer(edge, world.cloud, consent=True, settings=settings) as hybrid:
            threads = Threads()
            threads.start(hybrid.predict, UNSURE)
            wait_until(lambda: world.cloud.asked, "the leader's call")
            answer = hybrid.predict(UNSURE, timeout_ms=3000)
            assert answer["path"] == "degraded" and len(world.cloud.asked) == 1
            assert hybrid.get_all_stats()["hybrid"]["cloud_refusals"] == {"DeadlineExceeded": 1}
            world.cloud.gate.set()
            assert [answer["path"] for answer in threads.results()] == ["cloud"]


# What an answer says


def test_the_policy_of_outputs_masks_every_path(world):
    hybrid = world.hybrid(cache_ttl_s=50)
    paths = []
    for row, options in ((SURE, {}), (UNSURE, {}), (UNSURE, {"arrays": True})):
        whole = hybrid.predict(row, **options)
        masked = hybrid.predict(row, outputs="label", **options)
        assert "confidences" in whole and "outputs" not in whole
        assert masked["outputs"] == "label" and not {"confidences", "probabilities"} & masked.keys()
        assert list(masked["predictions"]) == list(whole["predictions"])
        paths += [whole["path"], masked["path"]]
    assert paths == ["local", "local", "cloud", "cache", "cache", "cache"]


def test_the_time_that_the_cloud_took_is_told_in_milliseconds(world):
    hybrid = world.hybrid()

    def slowly(rows, **options):
        world.now_s += 0.25
        return cloud(rows, **options)

    cloud, world.cloud.predict = world.cloud.predict, slowly
    answer = hybrid.predict(UNSURE, stages=True)
    assert answer["stages_ms"] == {"cloud": pytest.approx(250, abs=1e-3)}
    assert answer["latency_ms"] == pytest.approx(250, abs=1e-3)


@models.register("test-pictures", input_shape=(3, 4, 4), output_shape=(2,))
def pictures():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))


def test_one_image_is_one_row_for_the_cloud(world):
    """The device's model says what a row is. It is sent flat, which every server takes."""
    asked = []
    with EdgeModelServer(config=CONFIG) as edge:
        net = models.build("test-pictures", {})
        edge.update_global(net.state_dict(), architecture="test-pictures")
        world.cloud.predict = lambda rows, **_: asked.append(rows.shape) or {
            "predictions": np.ones(len(rows), np.int64), "model_version": "9"
        }  # fmt: skip
        with HybridServer(edge, world.cloud, consent=True, threshold=1.0) as hybrid:
            assert hybrid.predict(np.ones((3, 4, 4)))["path"] == "cloud"
            assert hybrid.predict(np.ones((2, 3, 4, 4)))["path"] == "cloud"
    assert asked == [(1, 48), (2, 48)]


# Time


def test_a_cloud_that_waits_costs_its_share_of_the_time_and_then_the_device_answers(world):
    with EdgeModelServer(config=CONFIG) as edge:  # by the real clock
        edge.update_global(state(), round=4, **MLP)
        world.cloud.gate.clear()
        settings = HybridSettings(cloud_share=0.02, cloud_calls=1)
        with HybridServer(edge, world.cloud, consent=True, settings=settings) as hybrid:
            for _ in range(2):  # the second finds no thread free, and does not wait for one
                answer = hybrid.predict(UNSURE, timeout_ms=10_000)
                assert answer["path"] == "degraded" and 200 <= answer["latency_ms"] < 10_000
            assert len(world.cloud.asked) == 1
            assert hybrid.breaker.stats()["failures_in_a_row"] == 2
            assert hybrid.get_all_stats()["hybrid"]["cloud_refusals"] == {"DeadlineExceeded": 2}


async def test_the_event_loop_goes_on_while_the_cloud_is_asked(world):
    hybrid = world.hybrid()
    world.cloud.gate.clear()
    waiting = asyncio.create_task(hybrid.apredict(UNSURE))
    for _ in range(50):
        assert (await hybrid.apredict(SURE))["path"] == "local"
    assert not waiting.done()
    cancelled = asyncio.create_task(hybrid.apredict([UNSURE, UNSURE]))
    while len(world.cloud.asked) < 2:
        await asyncio.sleep(0.001)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    world.cloud.gate.set()
    assert (await waiting)["path"] == "cloud"
    # nobody waits for the cancelled one
    assert (await hybrid.apredict([UNSURE, UNSURE]))["path"] == "cloud"


def test_a_slow_device_is_waited_for():
    probe, cloud, threads = Probe(), Cloud(), Threads()
    with EdgeModelServer(config=CONFIG) as edge:
        edge.load_model("v1", Gated(probe), output_type="regression", num_features=2)
        with HybridServer(edge, cloud, consent=True) as hybrid:
            probe.shut()
            threads.start(hybrid.predict, UNSURE)
            probe.wait_inside(1)
            probe.release()
            assert threads.results()[0]["path"] == "local" and not cloud.asked
            with pytest.raises(InvalidInputError):
                hybrid.predict("nonsense")


# What goes wrong


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"predictions": [1, 1]}, "Flserving"),
        ({"predictions": 3}, "Flserving"),
        ({"predictions": None}, "Flserving"),
        ({"predictions": None, "confidences": [0.5]}, "Flserving"),
        ({"predictions": ["a"]}, "Flserving"),
        ({"age_s": "old"}, "Flserving"),
        ({"age_s": float("nan")}, "Flserving"),
        ({"age_s": -9}, "Flserving"),
        ({"model_version": ["9"]}, "Flserving"),
    ],
    ids=[
        "rows",
        "scalar",
        "none",
        "only_confidences",
        "text",
        "age_text",
        "age_nan",
        "age_negative",
        "version",
    ],
)
def test_an_answer_that_is_none_is_a_failure_of_the_cloud(world, said, reason):
    world.cloud.said = {"confidences": None} | said
    hybrid = world.hybrid()
    assert hybrid.predict(UNSURE)["path"] == "degraded"
    assert hybrid.get_all_stats()["hybrid"]["cloud_refusals"] == {reason: 1}
    assert hybrid.breaker.stats()["failures_in_a_row"] == 1


def test_the_breaker_counts_what_says_that_the_cloud_is_ill(world):
    hybrid = world.hybrid(breaker=CircuitBreaker(2))
    for error in (UnauthorizedError("who?"), InvalidInputError("no"), UnauthorizedError("who?")):
        world.cloud.error = error
        assert hybrid.predict(UNSURE)["path"] == "degraded"
    assert hybrid.breaker.state == "closed"
    for error in (OSError("cable"), DeadlineExceededError("late")):
        world.cloud.error = error
        assert hybrid.predict(UNSURE)["path"] == "degraded"
    assert hybrid.breaker.state == "open" and len(world.cloud.asked) == 5
    assert hybrid.predict(UNSURE)["path"] == "degraded" and len(world.cloud.asked) == 5


def test_a_device_without_a_model_asks_the_cloud_and_says_why_it_cannot_when_that_fails(world):
    with (
        EdgeModelServer(config=CONFIG) as empty,
        HybridServer(empty, world.cloud, consent=True) as hybrid,
    ):
        assert hybrid.predict(UNSURE)["path"] == "cloud"
        world.cloud.error = ServerClosedError("away")
        with pytest.raises(FlservingError, match="no model is served"):
            hybrid.predict([7.0, 7.0])
        with pytest.raises(InvalidInputError, match="finite"):
            hybrid.predict([float("nan"), 0.0])


@pytest.mark.parametrize(
    "options",
    [{"policy": "cloud_first"}, {"threshold": -0.1}, {"threshold": float("nan")}, {"cloud_share": 0},
     {"cloud_share": 1}, {"cache_bytes": 0}],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(world, options):
    with pytest.raises(ConfigError):
        world.hybrid(**options)


def test_closing_leaves_edge_and_cloud_open(world):
    hybrid = world.hybrid()
    assert hybrid.ready and hybrid.predict(SURE)["path"] == "local"
    hybrid.close()
    hybrid.close()
    assert not hybrid.ready and world.edge.ready
    for call in (lambda: hybrid.predict(SURE), lambda: hybrid.predict(SURE, version=1)):
        with pytest.raises(ServerClosedError):
            call()
    assert world.edge.predict(SURE)["path"] == "local"


def test_the_doors_serve_it_unchanged(world):
    hybrid = world.hybrid()
    with flserving.serve(hybrid, grpc_port=0) as endpoint:
        for url in (endpoint.url, f"grpc://{endpoint.grpc_url}"):
            with Client(url, endpoint.token) as client:
                local, remote = (
                    client.predict(SURE),
                    client.predict([UNSURE, [0.2, 0.1]], stages=True),
                )
                assert (local["path"], local["round"], local["degraded"]) == ("local", 4, False)
                assert (
                    remote["path"] in ("cloud", "cache")
                    and remote["round"] == 5
                    and remote["predictions"] == [1, 1]
                )
                assert remote["stages_ms"].keys() == {remote["path"]}
                assert client.ready() and client.metadata()["name"] == "flserving"
                assert [row["name"] for row in client.models()] == ["model"]
    assert paths_of(hybrid) == {"local": 2, "cloud": 1, "cache": 1}
    assert b"flserving_ready 1.0" in exposition(hybrid)[0]


# The breaker


def test_a_breaker_opens_after_k_failures_in_a_row_and_closes_after_a_success():
    now = [0.0]
    breaker = CircuitBreaker(3, 10, clock=lambda: now[0])
    for outcome in (False, False, True, False, False):
        assert breaker.allow()
        breaker.record(outcome)
    assert breaker.state == "closed"
    breaker.record(False)
    assert breaker.state == "open" and not breaker.allow()
    now[0] = 9.9
    assert not breaker.allow()
    now[0] = 10.0
    assert breaker.state == "half_open"
    assert [breaker.allow() for _ in range(3)] == [True, False, False]  # one probe
    breaker.record(False)
    now[0] = 19.9
    assert not breaker.allow()
    now[0] = 20.0
    assert breaker.allow()  # of this one nothing is heard
    now[0] = 30.0
    assert breaker.allow()
    breaker.record(True)
    assert breaker.state == "closed" and breaker.allow() and breaker.allow()
    assert breaker.stats() == {"state": "closed", "failures_in_a_row": 0, "opened": 1, "refused": 5}


def test_of_many_threads_one_gets_the_probe():
    now, threads = [0.0], Threads()
    breaker, together = CircuitBreaker(1, 5, clock=lambda: now[0]), threading.Barrier(16)
    breaker.record(False)
    now[0] = 5.0

    def ask():
        together.wait(PATIENCE_S)
        return breaker.allow()

    for _ in range(16):
        threads.start(ask)
    assert sum(threads.results()) == 1


@pytest.mark.parametrize(
    "options", [{"failures": 0}, {"failures": 1.5}, {"pause_s": 0}, {"pause_s": True}], ids=str
)
def test_a_breaker_with_wrong_settings_is_refused(options):
    with pytest.raises(ConfigError):
        CircuitBreaker(**options)
