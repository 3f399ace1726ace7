"""The gRPC door to real clients: tritonclient and grpc.aio get what ``predict`` gives, whatever stack is below it."""

import asyncio
import contextlib
import importlib.util
import shutil
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from torch import nn
from tritonclient.utils import InferenceServerException

from flserving.api import messages
from flserving.config import ServingConfig
from flserving.errors import ConfigError
from flserving.server import ModelServer
from grpc_door import INFER, Caller, arrays, metadata, open_door, request
from serving_models import PATIENCE_S, Constant, Gated, Probe, Threads, serving, wait_until

WIDTH, CLASSES = 6, 4
HEADERS = {"authorization": "Bearer infer"}
STACKS = [
    False,
    pytest.param(
        True, marks=pytest.mark.skipif(not importlib.util.find_spec("pygrpc_native"), reason="needs pygrpc-native")
    ),
]
X = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module", params=STACKS, ids=["grpcio", "native"])
def native(request):
    return request.param


@pytest.fixture(scope="module")
def server():
    with ModelServer(ServingConfig(warmup_samples=1, timeout_ms=PATIENCE_S * 1e3)) as server:
        for seed, version in enumerate(("v1", "v2")):
            torch.manual_seed(seed)
            module = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))
            server.load_model(version, module, num_features=WIDTH)
        yield server


@pytest.fixture(scope="module")
def door(server, native):
    with open_door(server, native=native) as (v2, target, _, _):
        yield v2, target


@pytest.fixture(scope="module")
def target(door):
    return door[1]


@pytest.fixture
def caller(target):
    with Caller(target) as caller:
        yield caller


def triton_input(x, kind=triton):
    tensor = kind.InferInput("features", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return [tensor]


def same(server, result, x, version="v1"):
    expected = server.predict(x, version, arrays=True)
    for name in ("predictions", "confidences", "probabilities"):
        np.testing.assert_array_equal(result.as_numpy(name), expected[name])


# Real clients, in the process of the server


def test_tritonclient_gets_what_predict_gives(server, target):
    with triton.InferenceServerClient(target) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("local", "v2")
        result = client.infer("local", triton_input(X), headers=HEADERS, request_id="42")
        same(server, result, X)
        answer = result.get_response()
        assert (answer.id, answer.model_name, answer.model_version) == ("42", "local", "v1")
        assert {value.WhichOneof("parameter_choice") for value in answer.parameters.values()} <= {
            "bool_param", "int64_param", "string_param"}  # fmt: skip
        same(server, client.infer("local", triton_input(X), model_version="v2", headers=HEADERS), X, "v2")
        wanted = [triton.InferRequestedOutput("confidences")]
        result = client.infer("local", triton_input(X), outputs=wanted, headers=HEADERS)
        assert [output.name for output in result.get_response().outputs] == ["confidences"]
        staged = client.infer("local", triton_input(X), headers=HEADERS, parameters={"stages": True}).get_response()
        assert "stage_infer_us" in staged.parameters
        packed = client.infer("local", triton_input(X), headers=HEADERS, compression_algorithm="gzip")
        same(server, packed, X)
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*nope"):
            client.infer("nope", triton_input(X), headers=HEADERS)


def test_tritonclient_reads_metadata_configuration_statistics_and_the_repository(target):
    with triton.InferenceServerClient(target) as client:
        assert client.get_server_metadata(headers=HEADERS).name == "flserving"
        about = client.get_model_metadata("local", headers=HEADERS)
        assert [(t.name, t.datatype, list(t.shape)) for t in about.inputs] == [("features", "FP32", [-1, WIDTH])]
        assert list(about.outputs[2].shape) == [-1, CLASSES] and list(about.versions) == ["v1", "v2"]
        config = client.get_model_config("local", headers=HEADERS).config
        assert config.max_batch_size == 32 and config.input[0].data_type == 11 and config.output[2].dims == [CLASSES]
        before = client.get_inference_statistics("local", "v1", headers=HEADERS).model_stats[0]
        client.infer("local", triton_input(X), headers=HEADERS)
        after = client.get_inference_statistics("local", "v1", headers=HEADERS).model_stats[0]
        assert after.inference_count - before.inference_count == len(X)
        assert after.inference_stats.success.count - before.inference_stats.success.count == 1
        assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
        index = client.get_model_repository_index(headers=HEADERS).models
        assert [(m.name, m.version, m.state) for m in index] == [("local", "v1", "READY"), ("local", "v2", "READY")]


async def test_async_clients_share_batches_and_get_their_own_rows(server, target):
    rows = np.random.default_rng(1).normal(size=(64, 1, WIDTH)).astype(np.float32)
    async with triton_aio.InferenceServerClient(target) as client:
        calls = (client.infer("local", triton_input(x, triton_aio), headers=HEADERS) for x in rows)
        results = await asyncio.gather(*calls)
    expected = server.predict(rows[:, 0], "v1", arrays=True)
    got = np.concatenate([result.as_numpy("probabilities") for result in results])
    np.testing.assert_allclose(got, expected["probabilities"], rtol=1e-5, atol=1e-7)
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(INFER)
        answer = await call(request(X).SerializeToString(), metadata=metadata("infer"))
    np.testing.assert_array_equal(arrays(answer)["predictions"], server.predict(X)["predictions"])


def test_typed_contents_give_the_same_as_raw(caller):
    raw, typed = caller.infer(X), caller.infer(X, raw=False)
    assert raw.keys() == typed.keys() == {"predictions", "confidences", "probabilities"}
    for name in raw:
        np.testing.assert_array_equal(raw[name], typed[name])
    same_values = caller.infer(X, parameters={"alias": {"string_param": "default"}, "mine": {"double_param": 0.5}})
    np.testing.assert_array_equal(same_values["probabilities"], raw["probabilities"])


def test_load_and_unload_understand_both_numberings(server, target):
    with Caller(target, "admin") as caller:
        answer = caller.ask("RepositoryModelUnload", repository_name="local")
        assert (answer.model_name, answer.isUnloaded) == ("local", True)
        assert caller.refused("ModelInfer", request(X))[0] == "UNAVAILABLE"
        assert caller.ask("RepositoryIndex", ready=True).models == []
        with triton.InferenceServerClient(target) as client:
            client.load_model("local", headers={"authorization": "Bearer admin"})
        assert caller.infer(X)["predictions"].tolist() == server.predict(X)["predictions"]


# Health


def health(channel, service="", method="Check"):
    body = messages.message("grpc.health.v1.HealthCheckRequest")(service=service).SerializeToString()
    call = channel.unary_stream if method == "Watch" else channel.unary_unary
    return call(f"/grpc.health.v1.Health/{method}")(body, timeout=PATIENCE_S)


def status(body):
    reply = messages.message("grpc.health.v1.HealthCheckResponse")
    return reply.DESCRIPTOR.enum_types_by_name["ServingStatus"].values_by_number[reply.FromString(body).status].name


def test_health_needs_no_credential_and_follows_the_drain(door):
    v2, target = door
    with grpc.insecure_channel(target) as channel:
        assert {status(health(channel, s)) for s in ("", messages.SERVICE)} == {"SERVING"}
        with pytest.raises(grpc.RpcError) as unknown:
            health(channel, "nope")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        strange, watch = health(channel, "nope", "Watch"), health(channel, method="Watch")
        assert status(next(strange)) == "SERVICE_UNKNOWN"
        strange.cancel()
        assert status(next(watch)) == "SERVING"
        v2.draining = True
        try:
            assert status(next(watch)) == "NOT_SERVING" and status(health(channel)) == "NOT_SERVING"
            live, ready = (channel.unary_unary(f"/{messages.SERVICE}/Server{kind}")(b"") for kind in ("Live", "Ready"))
            assert (live, ready) == (b"\x08\x01", b"")
        finally:
            v2.draining = False
        assert status(next(watch)) == "SERVING"
        watch.cancel()


def test_watchers_are_bounded(target):
    with grpc.insecure_channel(target) as channel:
        watches = [health(channel, method="Watch") for _ in range(64)]
        assert {status(next(watch)) for watch in watches} == {"SERVING"}
        with pytest.raises(grpc.RpcError) as refused:
            next(health(channel, method="Watch"))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for watch in watches:
            watch.cancel()

        def one_more():
            with grpc.insecure_channel(target) as other:
                watch = health(other, method="Watch")
                try:
                    return status(next(watch)) == "SERVING"
                except grpc.RpcError:
                    return False
                finally:
                    watch.cancel()

        wait_until(one_more, "room for another watcher")


# Who may ask what

LEAST = {
    "ServerLive": None, "ServerReady": None, "ModelReady": None, "ServerMetadata": "read", "ModelMetadata": "read",
    "ModelConfig": "read", "ModelStatistics": "read", "RepositoryIndex": "read", "ModelInfer": "infer",
    "RepositoryModelLoad": "admin", "RepositoryModelUnload": "admin",
}  # fmt: skip
BODIES = {
    "ModelInfer": request(X).SerializeToString(),
    **dict.fromkeys(("ModelReady", "ModelMetadata", "ModelConfig", "RepositoryModelLoad"), b"\n\x05local"),
    "RepositoryModelUnload": b"\n\x04nope",  # 404 once it is let in: the others go on
}
ORDER = [None, "read", "infer", "admin"]


@pytest.mark.parametrize("token", [None, "wrong", "read", "infer", "admin"])
@pytest.mark.parametrize("method", LEAST)
def test_every_method_with_every_role(target, method, token):
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/{method}")
        try:
            call(BODIES.get(method, b""), metadata=metadata(token), timeout=PATIENCE_S)
            got = "OK"
        except grpc.RpcError as error:
            got = error.code().name
    least = LEAST[method]
    if least is None or (token in ORDER and ORDER.index(token) >= ORDER.index(least)):
        assert got == ("NOT_FOUND" if method == "RepositoryModelUnload" else "OK")
    else:
        assert got == ("PERMISSION_DENIED" if token in ("read", "infer") else "UNAUTHENTICATED")


def test_personal_answers_take_the_client_of_the_credential(target):
    personal = request(X, parameters={"personal": {"bool_param": True}})
    with Caller(target) as caller:
        assert caller.refused(INFER, personal)[0] == "PERMISSION_DENIED"
        assert arrays(caller.call(INFER, personal, token="c-1"))["predictions"].shape == (3,)
        lower = caller.channel.unary_unary(INFER)(BODIES["ModelInfer"], metadata=(("authorization", "bearer infer"),))
        assert arrays(lower)["predictions"].shape == (3,)


def test_without_tokens_only_the_health_checks_answer(server):
    with open_door(server, tokens=None) as (_, target, _, _), Caller(target) as caller:
        assert caller.ask("ServerReady").ready
        assert caller.refused(INFER, request(X))[0] == "UNAUTHENTICATED"


# Time


@contextlib.contextmanager
def held(native, probe):
    """A server of one worker that is busy until the probe releases it: calls wait in the queue."""
    with serving(Gated(probe), num_workers=1) as server, open_door(server, native=native) as (_, target, door, run):
        probe.shut()
        threads = Threads()
        threads.start(server.predict, np.zeros((1, 2), np.float32))
        probe.wait_inside(1)
        with Caller(target) as caller:
            yield server, caller, lambda: run(door.stop(PATIENCE_S))
            probe.release()
        threads.results()


def waiting(server, rows):
    wait_until(lambda: server.get_all_stats()["queue"]["waiting_rows"] == rows, f"{rows} rows in the queue")


def failed(server):
    return server.get_all_stats()["server"]["failed_by_reason"]


ONE = np.full((1, 2), 7, np.float32)


@pytest.mark.parametrize(("timeout_us", "deadline_s"), [(20_000, PATIENCE_S), (int(PATIENCE_S * 1e6), 0.05)])
def test_the_smaller_of_timeout_and_deadline_wins(native, timeout_us, deadline_s):
    probe = Probe()
    with held(native, probe) as (server, caller, _):
        late = request(ONE, parameters={"timeout": {"int64_param": timeout_us}})
        assert caller.refused(INFER, late, timeout=deadline_s)[0] == "DEADLINE_EXCEEDED"
        waiting(server, 0)
        wait_until(lambda: sum(failed(server).values()) == 1)
        probe.release()
        assert caller.infer(ONE)["predictions"].tolist() == [[7.0, 7.0]]


def test_a_cancelled_call_is_cancelled_in_the_server(native):
    probe = Probe()
    with held(native, probe) as (server, caller, _):
        body = request(ONE).SerializeToString()
        call = caller.channel.unary_unary(INFER).future(body, metadata=metadata("infer"))
        waiting(server, 1)
        call.cancel()
        waiting(server, 0)
        wait_until(lambda: failed(server).get("Cancelled") == 1, "the cancellation")
        assert probe.calls == 1  # the model never saw it


def test_stop_lets_admitted_calls_finish_and_ends_watches_at_once(native):
    probe = Probe()
    with held(native, probe) as (server, caller, stop):
        body = request(ONE).SerializeToString()
        call = caller.channel.unary_unary(INFER).future(body, metadata=metadata("infer"))
        watch = health(caller.channel, method="Watch")
        assert status(next(watch)) == "SERVING"
        waiting(server, 1)
        threads = Threads()
        threads.start(stop)
        assert list(watch) == []
        probe.release()
        assert arrays(call.result(PATIENCE_S))["predictions"].tolist() == [[7.0, 7.0]]
        threads.results()


def test_calls_beyond_the_limit_are_turned_away_and_health_is_not(native):
    probe = Probe()
    with serving(Gated(probe), num_workers=1) as server:
        probe.shut()
        threads = Threads()
        threads.start(server.predict, np.zeros((1, 2), np.float32))
        probe.wait_inside(1)
        with open_door(server, native=native, max_connections=2) as (_, target, _, _), Caller(target) as caller:
            body = request(ONE).SerializeToString()
            calls = [caller.channel.unary_unary(INFER).future(body, metadata=metadata("infer")) for _ in range(2)]
            waiting(server, 2)
            assert caller.refused(INFER, body)[0] == "RESOURCE_EXHAUSTED"
            assert status(health(caller.channel)) == "SERVING" and caller.ask("ServerReady").ready
            probe.release()
            assert [arrays(call.result(PATIENCE_S))["predictions"].tolist() for call in calls] == [[[7.0, 7.0]]] * 2
            threads.results()


def test_a_hot_swap_under_load_fails_nobody_and_mixes_nothing(native):
    with serving(Constant(1), "v1") as server, open_door(server, native=native) as (_, target, _, _):
        server.load_model("v2", Constant(2), output_type="regression", num_features=2)
        seen, failures, stop = [], [], threading.Event()

        async def ask(channel):
            call, body = channel.unary_unary(INFER), request(np.zeros((4, 2), np.float32)).SerializeToString()
            while not stop.is_set():
                try:
                    answer = messages.InferResponse.FromString(await call(body, metadata=metadata("infer")))
                except grpc.RpcError as error:
                    failures.append(error)
                    return
                seen.append((answer.model_version, *arrays(answer)["predictions"].tolist()))

        async def load():
            async with grpc.aio.insecure_channel(target) as channel:
                await asyncio.gather(*(ask(channel) for _ in range(16)))

        thread = threading.Thread(target=lambda: asyncio.run(load()))
        thread.start()
        for turn in range(20):
            count, version = len(seen), ("v2", "v1")[turn % 2]
            server.set_default(version)
            wait_until(lambda n=count, v=version: failures or any(a[0] == v for a in seen[n:]), f"{version} in answers")
        stop.set()
        thread.join(PATIENCE_S)
        assert not failures
        assert set(seen) == {("v1", *[1.0] * 4), ("v2", *[2.0] * 4)}


# The door itself


def test_calls_are_timed_and_refusals_counted(server, target, caller):
    def totals():
        counted = server.telemetry.totals()
        return counted["doors"].get("grpc", [0])[0], counted["refusals"].get("grpc", {})

    answers, refused = totals()
    caller.infer(X)
    caller.refused(INFER, b"\xff")
    caller.refused(INFER, request(X), token="wrong")
    wait_until(lambda: totals()[0] == answers + 1)
    after = totals()[1]
    for reason in ("InvalidInput", "Unauthorized"):
        assert after[reason] == refused.get(reason, 0) + 1


def test_a_port_in_use_and_a_missing_package_are_said(server, target, monkeypatch):
    port = int(target.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"), open_door(server, grpc_port=port):
        pass
    monkeypatch.setitem(sys.modules, "pygrpc_native.aio", None)
    with pytest.raises(ConfigError, match="pip install pygrpc-native"), open_door(server, native=True):
        pass


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_tls(server, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test -addext"
    command = ["openssl", *made.split(), "subjectAltName=IP:127.0.0.1", "-out", cert, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    options = {"certificate": cert, "key": key}
    with open_door(server, **options) as (_, target, _, _):
        trusted = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(target, trusted) as channel:
            answer = channel.unary_unary(INFER)(BODIES["ModelInfer"], metadata=metadata("infer"), timeout=PATIENCE_S)
            assert arrays(answer)["predictions"].tolist() == server.predict(X)["predictions"]
        with Caller(target) as plain:
            assert plain.refused(INFER, request(X))[0] == "UNAVAILABLE"
    with pytest.raises(ConfigError, match="no TLS"), open_door(server, native=True, **options):
        pass
