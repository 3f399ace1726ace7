"""The gRPC door to callers who mean no good or send nonsense: a reason for everyone, no crash, no
growth."""

import contextlib
import gc
import itertools
import os
import socket
import time

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn

from budget import examples
from flserving.api.grpc import codec
from flserving.api.grpc.codec import message
from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer
from grpc_attacks import PREFACE, SETTINGS, connected, frame, indexed, opening, push
from grpc_corpus import CORPUS, WIDTH, X, varied
from grpc_door import INFER, Caller, health, open_door, request, status
from serving_models import PATIENCE_S, Threads, wait_until

CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED",
                 "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with ModelServer(
        ServingConfig(warmup_samples=1, timeout_ms=PATIENCE_S * 1e3, max_request_rows=64)
    ) as server:
        server.load_model("v1", nn.Linear(WIDTH, 2), num_features=WIDTH)
        yield server


@pytest.fixture(scope="module")
def target(server):
    with open_door(server, max_body_bytes=1 << 20) as (_, target, _, _):
        yield target


@pytest.fixture(scope="module")
def caller(target):
    with Caller(target, "admin", **{"grpc.max_send_message_length": -1}) as caller:
        yield caller


def answers(caller):
    """Whether the server is ready, and answers a good request well."""
    return caller.ask("ServerReady").ready and caller.infer(X)["predictions"].shape == (2,)


def test_every_malformed_request_gets_a_reason_and_leaves_nothing_behind(caller):
    assert len(CORPUS) >= 200
    here = psutil.Process()

    def refuse_all():
        for what, body in CORPUS.items():
            # a deadline would replace absurd timeouts
            code, text = caller.refused(INFER, body, timeout=None)
            assert code in CALLERS_FAULT, (what, code, text)
            assert 5 < len(text) <= 600 and text != "internal error", (what, text)

    refuse_all()
    gc.collect()
    before = here.memory_info().rss
    for _ in range(3):
        refuse_all()
    gc.collect()
    assert here.memory_info().rss - before < 20 << 20
    assert answers(caller)


OTHERS = ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"]


@pytest.mark.parametrize(
    "method", [*OTHERS, "RepositoryModelLoad", "RepositoryModelUnload", "RepositoryIndex"]
)
def test_the_other_methods_refuse_with_a_reason(caller, method):
    kind = message(f"inference.{method}Request")
    bodies = {b"\xff\xff": "INVALID_ARGUMENT"}
    if method in OTHERS:
        bodies[kind(name="nope").SerializeToString()] = "NOT_FOUND"
        bodies[kind(name="local", version="nope").SerializeToString()] = "NOT_FOUND"
        bodies[kind(name="../../etc/passwd").SerializeToString()] = "NOT_FOUND"
    else:
        named = {"ready": True} if method == "RepositoryIndex" else {"model_name": "local"}
        bodies[kind(repository_name="other", **named).SerializeToString()] = "UNIMPLEMENTED"
    if method.startswith("RepositoryModel"):
        bodies |= {
            b"": "INVALID_ARGUMENT",
            kind(model_name="nope").SerializeToString(): "NOT_FOUND",
        }
        replaced = kind(model_name="local", parameters={"file:1/model.pt": {"bytes_param": b"x"}})
        bodies[replaced.SerializeToString()] = "UNIMPLEMENTED"
    for body, code in bodies.items():
        got, text = caller.refused(method, body)
        assert got == code and text
    assert answers(caller)


def test_unknown_methods_and_services_are_unimplemented(caller):
    for path in ("/inference.GRPCInferenceService/ModelStreamInfer", "/inference.GRPCInferenceService/modelinfer",
                 "/inference.Other/ModelInfer", "/grpc.health.v1.Health/check", "/x", "/"):  # fmt: skip
        assert caller.refused(path, b"")[0] == "UNIMPLEMENTED", path


@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_bytes_are_an_internal_error(caller, data):
    good = request(X).SerializeToString()
    method = data.draw(
        st.sampled_from(["ModelInfer", *OTHERS, "RepositoryIndex", "RepositoryModelLoad"])
    )
    body = bytearray(data.draw(st.sampled_from([good, b""])))
    if body:
        for place in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=8)):
            body[place] = data.draw(st.integers(0, 255))
        body = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=20))
    else:
        body = data.draw(st.binary(max_size=200))
    try:
        caller.call(method, bytes(body))
    except grpc.RpcError as error:
        assert error.code().name in CALLERS_FAULT, error


def test_an_unexpected_error_is_told_without_a_detail(server, caller, monkeypatch, caplog):
    async def broken(*_, **__):
        raise RuntimeError(f"secret {6 * 7}")

    monkeypatch.setattr(server, "ahandle", broken)
    assert caller.refused(INFER, request(X)) == ("INTERNAL", "internal error")
    assert "secret 42" not in caplog.text and "RuntimeError" in caplog.text
    assert "Internal" not in server.telemetry.totals()["refusals"].get("grpc", {}), (
        "of the server, not of the door"
    )
    monkeypatch.undo()
    monkeypatch.setattr(codec, "response", None)
    assert caller.refused(INFER, request(X)) == ("INTERNAL", "internal error")
    assert server.telemetry.totals()["refusals"]["grpc"]["Internal"] == 1


# Sizes and floods


def test_messages_over_the_limit_are_refused_before_they_fill_memory(target, caller):
    here = psutil.Process()
    big = bytes(100 << 20)
    before = here.memory_info().rss
    code, text = caller.refused(INFER, big)
    assert code == "RESOURCE_EXHAUSTED" and "larger than max" in text
    # 100 KB that become 100 MB
    code, _ = caller.refused(INFER, big, compression=grpc.Compression.Gzip)
    assert code == "RESOURCE_EXHAUSTED"
    del big
    # the client's own copies are in this process, too
    assert here.memory_info().rss - before < 40 << 20
    just_under = request(X, id="x" * ((1 << 20) - 200))
    assert caller.call(INFER, just_under)
    assert answers(caller)


def test_long_metadata_and_long_names_do_not_hide_the_reason(caller):
    assert caller.refused(INFER, request(X), token="x" * 50_000)[0] in CALLERS_FAULT
    code, text = caller.refused(INFER, varied(name="🦊" * 50_000))
    assert code == "INVALID_ARGUMENT" and text.startswith("inputs are")
    assert answers(caller)


def closes(target, *parts, pause_s=0.0):
    """Whether the server ends a connection that sends these bytes."""
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as client:
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(pause_s)
            client.settimeout(PATIENCE_S)
            while client.recv(65_536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


def test_floods_and_noise_end_the_connection_and_nobody_else_notices(target, caller):
    ping = b"\0\0\x08\6\0\0\0\0\0" + b"12345678"
    assert closes(target, PREFACE + SETTINGS, *[ping] * 50, pause_s=0.002)
    assert closes(target, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert closes(target, os.urandom(2000))
    assert closes(target, PREFACE + b"\xff\xff\xff\4\0\0\0\0\0")  # a frame of 16 MB
    assert answers(caller)


def test_headers_that_never_end_fill_no_memory(target, caller):
    # opens a header block; a million fields follow, each one byte long
    headers = b"\0\0\1\1\0\0\0\0\1\x82"
    more = b"\0\x40\0\x09\0\0\0\0\1" + b"\x82" * 0x4000
    host, _, port = target.rpartition(":")
    before = psutil.Process().memory_info().rss
    with (
        socket.create_connection((host, int(port)), PATIENCE_S) as client,
        contextlib.suppress(OSError),
    ):
        client.sendall(PREFACE + SETTINGS + headers)
        for _ in range(2000):  # 32 MB, some 2 GB once they were decoded
            client.sendall(more)
        assert answers(caller)
    assert psutil.Process().memory_info().rss - before < 20 << 20


def test_compressed_headers_of_the_senders_own_end_the_connection(target, caller):
    acknowledged = frame(4, 1, 0, b"")
    assert closes(target, PREFACE + SETTINGS + acknowledged, indexed(1, opens=True))
    assert answers(caller)


def test_compressed_headers_fill_no_memory_before_the_settings_are_agreed_on(target, caller):
    before = psutil.Process().memory_info().rss
    with connected(target) as client, contextlib.suppress(OSError):
        for stream in range(1, 40_001, 2):  # 10 MB, of some 30 kB each once they are Python's
            client.sendall(indexed(stream, opens=stream == 1))
        wait_until(lambda: answered(caller), "an answer beside the attacker")
    assert psutil.Process().memory_info().rss - before < 200 << 20


def test_reset_streams_leave_the_server_ready(target, caller):
    body = request(X).SerializeToString()
    for _ in range(200):
        caller.channel.unary_unary(INFER).future(
            body, metadata=(("authorization", "Bearer admin"),)
        ).cancel()
    assert answers(caller)


def test_half_open_and_silent_connections_are_cut_and_keep_nobody_out(server):
    with open_door(server, slow_client_s=0.3) as (_, target, _, _), Caller(target) as caller:
        assert closes(target)  # says nothing
        assert closes(target, PREFACE[:10])
        assert answers(caller)


HEALTH = "/grpc.health.v1.Health/Check"


@pytest.mark.parametrize("path", [INFER, HEALTH, "/grpc.health.v1.Health/Watch"])
def test_headers_without_a_message_take_no_places(server, path):
    with open_door(server, slow_client_s=0.5) as (_, target, _, _), Caller(target) as caller:
        attackers = [connected(target) for _ in range(2)]
        try:
            for client in attackers:
                # cut off already: it never agreed to the server's settings
                with contextlib.suppress(OSError):
                    for stream in range(1, 2000, 2):
                        client.sendall(opening(path, stream))
            wait_until(lambda: answered(caller), "an answer beside the attackers")
        finally:
            for client in attackers:
                client.close()


def answered(caller):
    """Whether a good request and a health check are answered; if not, both are told at once that
    others came first."""
    try:
        return answers(caller) and status(health(caller.channel)) == "SERVING"
    except grpc.RpcError as error:
        # by the server, by gRPC's core
        assert error.code().name in ("RESOURCE_EXHAUSTED", "CANCELLED"), error
        return False


@pytest.mark.parametrize("path", [INFER, HEALTH])
def test_unfinished_messages_of_strangers_fill_no_memory(server, path):
    with open_door(server, max_body_bytes=16 << 20) as (_, target, _, _), Caller(target) as caller:
        assert answers(caller)
        before = psutil.Process().memory_info().rss
        attackers = [connected(target) for _ in range(60)]
        threads = Threads()
        try:
            for client in attackers:
                client.settimeout(2)  # of whom nothing more is read
                threads.start(push, client, path, (16 << 20) - 5)
            wait_until(lambda: answered(caller), "an answer beside the attackers")
            threads.results()
            # of 960 MB that come: four strangers' messages at most, 64 MB
            assert psutil.Process().memory_info().rss - before < 200 << 20
            wait_until(lambda: answered(caller), "an answer after the attack")
        finally:
            for client in attackers:
                client.close()


def test_watchers_have_a_turn_each(server):
    with open_door(server, slow_client_s=0.5) as (_, target, _, _), Caller(target) as caller:
        for watch in [health(caller.channel, method="Watch") for _ in range(64)]:
            assert status(next(watch)) == "SERVING"
            with pytest.raises(grpc.RpcError, match="watch again"):
                next(watch)
        assert status(next(health(caller.channel, method="Watch"))) == "SERVING"


def test_connections_are_bounded(server):
    with open_door(server, max_connections=4, slow_client_s=PATIENCE_S) as (_, target, _, _):
        host, _, port = target.rpartition(":")
        kept = [socket.create_connection((host, int(port))) for _ in range(4)]
        try:
            for client in kept:
                client.sendall(PREFACE + SETTINGS)
                client.settimeout(PATIENCE_S)
                assert client.recv(9)  # the server's settings: it is let in
            assert closes(target, PREFACE + SETTINGS)
        finally:
            for client in kept:
                client.close()

        def lets_in():
            with Caller(target) as caller:
                try:
                    return answers(caller)
                except grpc.RpcError:
                    return False

        wait_until(lets_in, "room for another connection")


def test_a_hundred_starts_and_stops_leave_no_descriptors(server):
    here, counts = psutil.Process(), []
    for turn in itertools.count():
        with open_door(server) as (_, target, _, _), Caller(target) as caller:
            assert caller.ask("ServerLive").live
        counts.append(here.num_fds())
        if turn == 24:
            break
    assert counts[-1] <= counts[4] + 2, counts
