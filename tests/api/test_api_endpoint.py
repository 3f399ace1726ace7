"""An endpoint opens, answers, drains, closes, and leaves nothing behind: no thread, port or file
handle."""

import asyncio
import gc
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import flserving
from flserving.api.auth import Role, Tokens
from flserving.api.client import AsyncClient, Client
from flserving.api.client.retries import Retries
from flserving.api.options import ApiOptions
from flserving.api.sockets import listen
from flserving.errors import (
    ConfigError,
    ConflictError,
    ForbiddenError,
    ServerClosedError,
    UnauthorizedError,
)
from serving_models import PATIENCE_S, Gated, Probe, Tagged, serving, wait_until

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def server():
    with flserving.create_serving_pipeline(
        Tagged(), output_type="regression", num_features=4
    ) as server:
        yield server


def test_serves_both_doors_and_only_with_the_token(server):
    with flserving.serve(server) as endpoint:
        assert endpoint.headers == {"Authorization": f"Bearer {endpoint.token}"}
        for url in (endpoint.url, f"grpc://{endpoint.grpc_url}"):
            with Client(url, endpoint.token) as client, Client(url) as stranger:
                assert client.predict(X)["predictions"] == X.tolist()
                with pytest.raises(UnauthorizedError):
                    stranger.predict(X)
                assert stranger.ready(), "health needs no credential"
    assert not server.health_check()["problems"] and server.predict(X), "the server stays open"


def test_the_notebook_sees_the_addresses_and_not_the_token(server):
    with flserving.serve(server) as endpoint:
        assert endpoint.url in repr(endpoint) and str(endpoint.grpc_url) in repr(endpoint)
        assert endpoint.token not in repr(endpoint) and endpoint.token not in repr(
            vars(endpoint)["options"]
        )
    assert "closed" in repr(endpoint) and endpoint.closed


def test_close_is_idempotent_and_the_port_is_free_at_once(server):
    endpoint = flserving.serve(server)
    port = endpoint.url.rpartition(":")[2]
    endpoint.close()
    endpoint.close()
    with flserving.serve(server, port=int(port)) as again:
        assert again.url.endswith(port)
        assert httpx.get(f"{again.url}/v2/health/live").status_code == 200


@pytest.mark.full
def test_a_hundred_cycles_leak_nothing(server):
    process = psutil.Process()

    def cycle():
        with flserving.serve(server) as endpoint, Client(endpoint.url, endpoint.token) as client:
            client.predict(X)

    def counts():
        gc.collect()
        return process.num_threads(), process.num_fds(), len(process.net_connections())

    for _ in range(3):  # what is made once: gRPC's own threads
        cycle()
    before = counts()
    for _ in range(100):
        cycle()
    wait_until(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)))
    assert "flserving-endpoint" not in {thread.name for thread in threading.enumerate()}


def test_a_forgotten_endpoint_closes(server):
    endpoint = flserving.serve(server)
    url = endpoint.url
    del endpoint
    gc.collect()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@pytest.mark.full
def test_python_ends_while_an_endpoint_is_open(tmp_path):
    code = (
        "import flserving, torch, sys\n"
        "server = flserving.create_serving_pipeline(torch.nn.Linear(4, 2))\n"
        "endpoint = flserving.serve(server)\n"
        "print(endpoint.url)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("http://")


async def test_inside_a_running_loop(server):
    """As in a notebook: the caller's loop runs while the endpoint serves from its own."""
    with flserving.serve(server) as endpoint:
        for url in (endpoint.url, f"grpc://{endpoint.grpc_url}"):
            async with AsyncClient(url, endpoint.token) as client:
                answers = await asyncio.gather(
                    *(client.predict(X + i, arrays=True) for i in range(20))
                )
                for i, answer in enumerate(answers):
                    np.testing.assert_array_equal(answer["predictions"], X + i)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_closing_finishes_what_was_admitted_and_takes_nothing_new(scheme):
    probe = Probe()
    with gated(probe) as server:
        endpoint = flserving.serve(server)
        url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"
        probe.shut()
        with Client(url, endpoint.token) as client, ThreadPoolExecutor(9) as pool:
            asked = [pool.submit(client.predict, X + i) for i in range(8)]
            wait_until(lambda: probe.rows + server.get_all_stats()["queue"]["waiting_rows"] == 16)
            closing = pool.submit(endpoint.close, 20)
            wait_until(lambda: not endpoint.v2.ready())
            wait_until(lambda: not _listens(endpoint.url))
            assert not closing.done()
            probe.release()
            assert [future.result()["predictions"] for future in asked] == [
                (X + i).tolist() for i in range(8)
            ]
            closing.result()


def test_readiness_is_false_first_and_each_answer_then_closes_its_connection(server):
    with flserving.serve(server) as endpoint, httpx.Client(headers=endpoint.headers) as client:
        assert "connection" not in client.get(f"{endpoint.url}/v2/health/ready").headers
        closing = threading.Thread(target=endpoint.close, kwargs={"notice_s": 0.5})
        closing.start()
        wait_until(lambda: not endpoint.v2.ready())
        answer = client.get(f"{endpoint.url}/v2/health/ready")
        assert answer.status_code == 503 and answer.json()["ready"] is False
        wait_until(
            lambda: (
                client.get(f"{endpoint.url}/v2/health/live").headers.get("connection") == "close"
            )
        )
        body = {
            "inputs": [
                {"name": "features", "shape": [2, 4], "datatype": "FP32", "data": X.tolist()}
            ]
        }
        assert client.post(f"{endpoint.url}/v2/models/local/infer", json=body).status_code == 200
        closing.join()


def test_the_grace_time_ends(caplog):
    probe = Probe()
    with gated(probe) as server:
        endpoint = flserving.serve(server, grpc_port=None)
        probe.shut()
        never = Retries(attempts=1)
        with (
            Client(endpoint.url, endpoint.token, retries=never) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            asked = pool.submit(client.predict, X)
            probe.wait_inside(1)
            started_s = time.monotonic()
            endpoint.close(drain_s=0.1)
            assert time.monotonic() - started_s < PATIENCE_S / 2, "it does not wait for the model"
            probe.release()
            with pytest.raises(ServerClosedError):
                asked.result()
    assert not caplog.records, "it was announced: no traceback in a notebook"


def test_a_port_in_use_is_said_at_once(server):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConflictError, match="in use"),
    ):
        flserving.serve(server, port=taken.getsockname()[1])
    with flserving.serve(server) as first:
        rest, grpc = (int(url.rpartition(":")[2]) for url in (first.url, first.grpc_url))
        with pytest.raises(ConflictError, match=str(rest)):
            flserving.serve(server, port=rest)
        with pytest.raises((ConflictError, ConfigError), match=str(grpc)):
            flserving.serve(server, grpc_port=grpc)
    assert "flserving-endpoint" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": 70_000}, "port is 70000"),
        ({"port": True}, "port is True"),
        ({"grpc_port": "8001"}, "grpc_port is '8001'"),
        ({"port": 8000, "grpc_port": 8000}, "both 8000"),
        ({"host": "http://127.0.0.1"}, "host is 'http://127.0.0.1'"),
        ({"host": "192.0.2.1"}, "192.0.2.1"),
        ({"host": "no-such-host.invalid"}, "no-such-host.invalid"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
        ({"max_connections": 0}, "max_connections is 0"),
        ({"slow_client_s": float("nan")}, "slow_client_s is nan"),
        ({"origins": "https://example.org"}, "tuple of strings"),
        ({"origins": ("*",)}, r"'\*'"),
        ({"origins": ("null",)}, "'null'"),
        ({"origins": ("https://example.org/page",)}, "without a path"),
        ({"hosts": ("a b",)}, "'a b'"),
        ({"tokens": "secret"}, "tokens is a str"),
        ({"certificate": "missing.pem"}, "without key"),
        ({"key": "missing.pem"}, "without certificate"),
        ({"certificate": "missing.pem", "key": "missing.pem"}, "missing.pem.*cannot be read"),
        ({"certificate": __file__, "key": __file__}, "cannot be used"),
        ({"prot": 1}, "no option prot"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_says_what_to_change(server, options, says):
    with pytest.raises(ConfigError, match=says):
        flserving.serve(server, **options)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("models.example.org", "http://models.example.org:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
    ],
)
def test_the_address_that_is_shown_can_be_called_from_this_computer(host, url):
    assert ApiOptions(host=host).url(80) == url


def test_origins_are_kept_as_browsers_send_them(server):
    assert ApiOptions(origins=["HTTPS://Example.org:8443"]).origins == ("https://example.org:8443",)
    own_ports = ApiOptions(origins=["https://a.org:443", "http://a.org:80", "http://a.org:443"])
    assert own_ports.origins == ("https://a.org", "http://a.org", "http://a.org:443")
    with flserving.serve(server) as endpoint:
        answer = httpx.get(
            f"{endpoint.url}/v2/health/live", headers={"origin": "http://Localhost:8888".lower()}
        )
        assert answer.status_code == 403
        endpoint.allow_origin("http://Localhost:8888")
        answer = httpx.get(
            f"{endpoint.url}/v2/health/live", headers={"origin": "http://localhost:8888"}
        )
        assert answer.headers["access-control-allow-origin"] == "http://localhost:8888"
        with pytest.raises(ConfigError, match="without a path"):
            endpoint.allow_origin("http://localhost:8888/lab")


def test_own_tokens_and_the_admin_role(server):
    tokens = Tokens()
    tokens.add("t-read", Role.READ)
    with (
        flserving.serve(server, tokens=tokens) as endpoint,
        Client(endpoint.url, "t-read") as client,
    ):
        assert endpoint.token is None and endpoint.headers == {}
        assert client.models()
        with pytest.raises(ForbiddenError):
            client.predict(X, model="local")
    with flserving.serve(server, admin=True) as endpoint:
        unload = f"{endpoint.url}/v2/repository/models/local/unload"
        assert httpx.post(unload, headers=endpoint.headers).status_code == 200


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_tls_on_both_doors(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    certificate, key = (
        "~/" + Path(path).relative_to(tmp_path).as_posix() for path in self_signed(tmp_path)
    )
    with flserving.serve(server, certificate=certificate, key=key) as endpoint:
        assert endpoint.url.startswith("https://")
        for url in (endpoint.url, f"grpcs://{endpoint.grpc_url}", endpoint.grpc_url):
            with Client(url, endpoint.token, ca=certificate) as client:
                assert client.predict(X)["predictions"] == X.tolist()
        once = Retries(attempts=1)
        with (
            Client(endpoint.url, endpoint.token, retries=once) as doubting,
            pytest.raises(ServerClosedError),
        ):
            doubting.predict(X)  # nobody told it to trust this certificate


def test_a_socket_keeps_a_port_without_listening():
    with listen("127.0.0.1", 0, reuse_port=True, backlog=0) as kept:
        port = kept.getsockname()[1]
        with (
            listen("127.0.0.1", port, reuse_port=True) as one,
            listen("127.0.0.1", port, reuse_port=True) as two,
        ):
            assert one.getsockname() == two.getsockname()
        assert not _listens(f"http://127.0.0.1:{port}")


def gated(probe):
    """A server whose model waits in worker threads: one that is known as quick would hold up the
    event loop instead."""
    return serving(Gated(probe), num_features=4, batching="hold_until_full", max_wait_time_ms=1)


def self_signed(folder):
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return certificate, key


def _listens(url):
    host, _, port = url.rpartition("/")[2].rpartition(":")
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex((host, int(port))) == 0
