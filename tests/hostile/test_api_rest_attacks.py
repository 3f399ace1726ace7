"""As many attackers on the REST server as are let in: callers beside them are answered or turned
away at once, and all is as before within twice the limit for slow clients."""

import contextlib
import os
import socket
import ssl
import subprocess
import sys

import httpx
import psutil
import pytest

from flserving.api import sockets
from flserving.api.endpoint import SPARE, connections_at_most
from flserving.api.options import ApiOptions
from flserving.api.rest.http1 import RestServer
from rest_door import INFER, Wire, bearer, door, rows, text, two_versions
from serving_models import PATIENCE_S, wait_until

SLOW_S = 0.5
PLACES = 64


def answered(endpoint):
    """Whether a good request is answered; if not, it was turned away."""
    try:
        response = httpx.post(
            endpoint.url + INFER, content=text(), headers=bearer("infer"), timeout=PATIENCE_S
        )
    except httpx.TransportError:  # closed at once
        return False
    assert response.status_code in (200, 429)
    return response.status_code == 200


@pytest.mark.parametrize("ends", ["stays", "shuts its side down", "asks for the last answer"])
# rows whose answer stays below, and goes above, the mark for writing
@pytest.mark.parametrize("number", [300, 2000])
def test_who_never_reads_a_large_answer_loses_its_place(number, ends):
    body = text(rows(number))
    last = [b"Connection: close"] * (ends == "asks for the last answer")
    with (
        two_versions(max_queue_rows=1 << 20) as server,
        door(server, slow_client_s=SLOW_S, max_connections=PLACES) as endpoint,
        contextlib.ExitStack() as stack,
    ):
        # what is accepted inherits it
        endpoint._thread._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024)
        for _ in range(PLACES):
            wire = stack.enter_context(Wire(endpoint, receive_nbytes=1024))
            wire.say(wire.head(b"Content-Length: %d" % len(body), *last) + body)
            if ends == "shuts its side down":
                wire.socket.shutdown(socket.SHUT_WR)
        wait_until(lambda: answered(endpoint), "a place")
        wait_until(lambda: held(endpoint) == 0, "the end of the attackers")


def held(endpoint):
    """Connections that the server holds."""
    port = int(endpoint.url.rpartition(":")[2])
    return sum(
        c.laddr.port == port and bool(c.raddr) for c in psutil.Process().net_connections("tcp")
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test -addext"
    files = {"certificate": folder / "cert.pem", "key": folder / "key.pem"}
    options = ["subjectAltName=IP:127.0.0.1", "-out", files["certificate"], "-keyout", files["key"]]
    try:
        subprocess.run([*command.split(), *options], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("makes its certificate with openssl")
    return files


@pytest.mark.parametrize("secure", [False, True])
def test_silent_connections_are_counted_at_accept_and_closed(secure, pair):
    files = pair if secure else {}
    with (
        two_versions() as server,
        door(server, slow_client_s=SLOW_S, max_connections=4, **files) as endpoint,
        contextlib.ExitStack() as stack,
    ):
        port = int(endpoint.url.rpartition(":")[2])
        before = psutil.Process().num_fds()
        attackers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)
        ]
        most = before + len(attackers) + 4 + RestServer.SURPLUS + 8
        for attacker in attackers:
            assert psutil.Process().num_fds() <= most
            attacker.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionError):
                assert attacker.recv(100) == b""
        verify: ssl.SSLContext | bool = True
        if secure:
            verify = ssl.create_default_context(cafile=files["certificate"])
        assert httpx.get(f"{endpoint.url}/v2/health/live", verify=verify).status_code == 200


CROWD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
sys.path[:0] = {path!r}
import flserving
from rest_door import door, two_versions
with two_versions() as server, door(server, slow_client_s=2.0) as endpoint:
    print(endpoint.url, flush=True)
    for line in sys.stdin:
        server.load_model(line.strip(), flserving.models.build("digits_mlp"))
        print(bool(open("/proc/self/status").read()), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of descriptors are Linux's here")
def test_a_crowd_of_silent_connections_leaves_descriptors_for_the_server():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("this machine lets nobody open 1,500 connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    command = [sys.executable, "-c", CROWD.format(path=sys.path)]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        try:
            assert process.stdout is not None and process.stdin is not None
            url = process.stdout.readline().strip()
            for _ in range(1500):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", int(url.rpartition(":")[2])))
            print("v3", file=process.stdin, flush=True)
            assert process.stdout.readline() == "True\n"  # a model was loaded, and a file opened
            wait_until(lambda: live(url), "an answer")
        finally:
            process.kill()


def live(url):
    try:
        return httpx.get(f"{url}/v2/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_the_limit_of_connections_leaves_spare_descriptors(monkeypatch):
    monkeypatch.setattr("flserving.api.endpoint.descriptors", lambda wanted: min(wanted, 1024))
    assert connections_at_most(ApiOptions(grpc_port=None)) == 1024 - SPARE
    assert connections_at_most(ApiOptions()) == (1024 - SPARE) // 2
    assert connections_at_most(ApiOptions(max_connections=10)) == 10
    assert sockets.descriptors(1) == 1
