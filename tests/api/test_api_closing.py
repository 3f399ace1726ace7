"""An endpoint that closes resets nobody who has connected, and answers every request that it
admitted."""

import contextlib
import re
import socket
import sys
import threading
import time

import pytest

import flserving
from flserving.api.client import Client
from flserving.api.client.retries import Retries
from flserving.errors import ServerClosedError
from serving_models import PATIENCE_S, wait_until
from serving_processes import Load

_SO_LOCK_FILTER = 44  # from then on, to attach one is "Operation not permitted"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can turn new connections away before the rest"
)


@pytest.fixture
def server():
    with flserving.create_serving_pipeline(flserving.models.build("digits_mlp")) as server:
        yield server


@contextlib.contextmanager
def callers(endpoint, number):
    address = ("127.0.0.1", int(endpoint.url.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            for _ in range(number)
        ]


def answer(caller):
    """All that comes until the other end closes."""
    return b"".join(iter(lambda: caller.recv(65536), b""))


@linux
def test_who_waits_in_the_queue_of_the_listener_is_answered(server):
    endpoint = flserving.serve(server, grpc_port=None, hosts=("127.0.0.1",))
    stalled, resume = threading.Event(), threading.Event()
    endpoint._thread._loop.call_soon_threadsafe(lambda: (stalled.set(), resume.wait(PATIENCE_S)))
    assert stalled.wait(PATIENCE_S)
    with callers(endpoint, 100) as waiting:  # nobody accepts them
        for caller in waiting:
            caller.sendall(LIVE)
        closing = threading.Thread(target=endpoint.close)
        closing.start()
        wait_until(lambda: endpoint.v2.draining)
        resume.set()
        assert all(answer(caller).startswith(b"HTTP/1.1 200 ") for caller in waiting)
    closing.join()


@linux
@pytest.mark.parametrize("locked", [False, True], ids=["filter", "no-filter"])
def test_who_has_only_connected_may_still_ask_and_who_is_idle_is_let_go(server, locked):
    """Also where the kernel refuses a filter: some let root alone attach one, and a container's
    user is not root."""
    endpoint = flserving.serve(server, grpc_port=None, hosts=("127.0.0.1",))
    endpoint._thread._listener.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, locked)
    with callers(endpoint, 3) as (idle, fresh, halfway):
        idle.sendall(LIVE)
        assert b" 200 OK" in idle.recv(65536)
        halfway.sendall(LIVE[:20])
        closing = threading.Thread(target=endpoint.close)
        closing.start()
        assert idle.recv(1) == b""
        fresh.sendall(LIVE)
        halfway.sendall(LIVE[20:])
        assert b" 200 OK" in answer(fresh) and b" 200 OK" in answer(halfway)
        closing.join()


def test_a_connection_that_says_nothing_does_not_hold_it_up(server):
    endpoint = flserving.serve(server, grpc_port=None, hosts=("127.0.0.1",))
    with callers(endpoint, 2) as (silent, _):
        started_s = time.monotonic()
        endpoint.close(drain_s=10 * PATIENCE_S)
        assert time.monotonic() - started_s < PATIENCE_S and silent.recv(1) == b""


@linux
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_closing_under_load_answers_exactly_what_was_admitted(server, scheme):
    endpoint = flserving.serve(server)
    url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"
    with Load(
        lambda _: Client(url, endpoint.token, retries=Retries(attempts=1)), threads=8
    ) as load:
        wait_until(lambda: len(load.answers) > 200)
        endpoint.close(notice_s=0.1)
        admitted = server.get_all_stats()["server"]["requests"]
    assert len(load.answers) == admitted == server.get_all_stats()["server"]["requests"], (
        "admitted and not answered"
    )
    assert {type(error) for error in load.errors} <= {ServerClosedError}
    # gRPC cancels what had not reached the server when it closed. REST lets all in who can connect;
    # a connection that was idle is let go, and who asks over it at that very moment is disconnected
    # (RFC 9112, section 9.5)
    refused = {
        "http": "[Cc]onnection refused|Server disconnected without sending",
        "grpc": "[Cc]onnection refused|failed to connect|CANCELLED|Server shutdown|is stopping",
    }[scheme]
    texts = {re.sub(r"[\d.:]+", "", str(error)) for error in load.errors}
    assert all(re.search(refused, text) for text in texts), texts
