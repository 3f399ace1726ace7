"""The gRPC door to real clients: tritonclient and grpc.aio get what ``predict`` gives."""

import asyncio
import shutil
import subprocess

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from torch import nn
from tritonclient.utils import InferenceServerException

from flserving.api.grpc import codec
from flserving.errors import ConfigError
from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer
from grpc_door import INFER, Caller, arrays, health, metadata, open_door, request, status
from serving_models import PATIENCE_S, wait_until

WIDTH, CLASSES = 6, 4
HEADERS = {"authorization": "Bearer infer"}
X = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def server():
    with ModelServer(ServingConfig(warmup_samples=1, timeout_ms=PATIENCE_S * 1e3)) as server:
        for seed, version in enumerate(("v1", "v2")):
            torch.manual_seed(seed)
            module = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))
            server.load_model(version, module, num_features=WIDTH)
        yield server


@pytest.fixture(scope="module")
def door(server):
    with open_door(server) as (v2, target, _, _):
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
        assert (
            client.is_server_live()
            and client.is_server_ready()
            and client.is_model_ready("local", "v2")
        )
        result = client.infer("local", triton_input(X), headers=HEADERS, request_id="42")
        same(server, result, X)
        answer = result.get_response()
        assert (answer.id, answer.model_name, answer.model_version) == ("42", "local", "v1")
        assert {value.WhichOneof("parameter_choice") for value in answer.parameters.values()} <= {
            "bool_param", "int64_param", "string_param"}  # fmt: skip
        same(
            server,
            client.infer("local", triton_input(X), model_version="v2", headers=HEADERS),
            X,
            "v2",
        )
        wanted = [triton.InferRequestedOutput("confidences")]
        result = client.infer("local", triton_input(X), outputs=wanted, headers=HEADERS)
        assert [output.name for output in result.get_response().outputs] == ["confidences"]
        staged = client.infer(
            "local", triton_input(X), headers=HEADERS, parameters={"stages": True}
        ).get_response()
        assert "stage_infer_us" in staged.parameters
        packed = client.infer(
            "local", triton_input(X), headers=HEADERS, compression_algorithm="gzip"
        )
        same(server, packed, X)
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*nope"):
            client.infer("nope", triton_input(X), headers=HEADERS)


def test_tritonclient_reads_metadata_configuration_statistics_and_the_repository(target):
    with triton.InferenceServerClient(target) as client:
        assert client.get_server_metadata(headers=HEADERS).name == "flserving"
        about = client.get_model_metadata("local", headers=HEADERS)
        assert [(t.name, t.datatype, list(t.shape)) for t in about.inputs] == [
            ("features", "FP32", [-1, WIDTH])
        ]
        assert list(about.outputs[2].shape) == [-1, CLASSES] and list(about.versions) == [
            "v1",
            "v2",
        ]
        config = client.get_model_config("local", headers=HEADERS).config
        assert (
            config.max_batch_size == 32
            and config.input[0].data_type == 11
            and config.output[2].dims == [CLASSES]
        )
        before = client.get_inference_statistics("local", "v1", headers=HEADERS).model_stats[0]
        client.infer("local", triton_input(X), headers=HEADERS)
        after = client.get_inference_statistics("local", "v1", headers=HEADERS).model_stats[0]
        assert after.inference_count - before.inference_count == len(X)
        assert after.inference_stats.success.count - before.inference_stats.success.count == 1
        assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
        index = client.get_model_repository_index(headers=HEADERS).models
        assert [(m.name, m.version, m.state) for m in index] == [
            ("local", "v1", "READY"),
            ("local", "v2", "READY"),
        ]


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
    same_values = caller.infer(
        X, parameters={"alias": {"string_param": "default"}, "mine": {"double_param": 0.5}}
    )
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


def test_health_needs_no_credential_and_follows_the_drain(door):
    v2, target = door
    with grpc.insecure_channel(target) as channel:
        assert {status(health(channel, s)) for s in ("", codec.SERVICE)} == {"SERVING"}
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
            live, ready = (
                channel.unary_unary(f"/{codec.SERVICE}/Server{kind}")(b"")
                for kind in ("Live", "Ready")
            )
            assert (live, ready) == (b"\x08\x01", b"")
        finally:
            v2.draining = False
        assert status(next(watch)) == "SERVING"
        watch.cancel()


def test_watchers_are_bounded(target):
    with grpc.insecure_channel(target) as channel:
        watches = []

        def another():
            watch = health(channel, method="Watch")
            try:
                assert status(next(watch)) == "SERVING"
            except grpc.RpcError:
                return False
            watches.append(watch)
            return True

        for _ in range(64):
            wait_until(another, "room for a watcher: those of the test before may still be leaving")
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


# The door itself


def test_calls_are_timed_and_refusals_counted(server, target, caller):
    def totals():
        counted = server.telemetry.totals()
        return counted["codec"].get("grpc", [0])[0], counted["refusals"].get("grpc", {})

    answers, refused = totals()
    caller.infer(X)
    caller.refused(INFER, b"\xff")
    caller.refused(INFER, request(X), token="wrong")
    wait_until(lambda: totals()[0] == answers + 1)
    after = totals()[1]
    for reason in ("InvalidInput", "Unauthorized"):
        assert after[reason] == refused.get(reason, 0) + 1


def test_a_port_in_use_is_said(server, target):
    port = int(target.rpartition(":")[2])
    with (
        pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"),
        open_door(server, grpc_port=port),
    ):
        pass


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_tls(server, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test -addext"
    command = [
        "openssl",
        *made.split(),
        "subjectAltName=IP:127.0.0.1",
        "-out",
        cert,
        "-keyout",
        key,
    ]
    subprocess.run(command, check=True, capture_output=True)
    options = {"certificate": cert, "key": key}
    with open_door(server, **options) as (_, target, _, _):
        trusted = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(target, trusted) as channel:
            answer = channel.unary_unary(INFER)(
                request(X).SerializeToString(), metadata=metadata("infer"), timeout=PATIENCE_S
            )
            assert arrays(answer)["predictions"].tolist() == server.predict(X)["predictions"]
        with Caller(target) as plain:
            assert plain.refused(INFER, request(X))[0] == "UNAVAILABLE"
