"""The proxy before a real server: the link's closed forms in real time, four cuts, nothing left
behind.

In virtual time the proxy's pacing is the closed form. Through real sockets an exchange never takes
less than the link says, and the best of some tries is within 5 % of it, late wake-ups of the
machine apart.
"""

import asyncio
import contextlib
import gc
import hashlib
import http.client
import http.server
import math
import os
import socket
import socketserver
import struct
import threading
import time

import numpy as np
import pytest

from bystander import Bystander, prove
from flserving.errors import ConfigError
from flserving.lab.network.link import Link
from flserving.lab.network.proxy import Proxy
from serving_models import PATIENCE_S, wait_until
from virtual_loop import VirtualLoop

TRIES = 15


class Answer(socketserver.BaseRequestHandler):
    """Frames (request length, response length, request): answers with so many bytes of the
    request's hash."""

    def handle(self):
        with contextlib.suppress(OSError):
            while header := self.request.recv(8, socket.MSG_WAITALL):
                asked, wanted = struct.unpack("!II", header)
                digest = hashlib.sha256()
                while asked > 0 and (data := self.request.recv(min(asked, 1 << 16))):
                    digest.update(data)
                    asked -= len(data)
                self.request.sendall((digest.digest() * (wanted // 32 + 1))[:wanted])


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, block_on_close, request_queue_size = True, True, False, 64


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def port():
    with running(Server(("127.0.0.1", 0), Answer)) as port:
        yield port


def connect(proxy, timeout_s=PATIENCE_S):
    caller = socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)
    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return caller


def exchange(caller, request_nbytes=8, response_nbytes=1):
    """One request of so many bytes, header included, and the seconds until its whole answer is
    here."""
    body = os.urandom(request_nbytes - 8)
    started_s = time.monotonic()
    caller.sendall(struct.pack("!II", len(body), response_nbytes) + body)
    answer = bytearray()
    while len(answer) < response_nbytes:
        data = caller.recv(1 << 16)
        if not data:
            raise ConnectionError("closed in the middle of an answer")
        answer += data
    took_s = time.monotonic() - started_s
    assert answer == (hashlib.sha256(body).digest() * (response_nbytes // 32 + 1))[:response_nbytes]
    return took_s


def assert_closed_form(measure, expected_s):
    """Never faster; and, the best of some tries, 5 % slower at most, and the late wake-ups of six
    threads in turn."""

    def attempt():
        with Bystander() as beside:
            took_s = measure()
        assert took_s >= expected_s, "faster than the link"
        return (
            took_s <= 1.05 * expected_s + 6 * beside.late_s,
            beside.late_s,
            (took_s, beside.late_s, expected_s),
        )

    prove(attempt, TRIES)


class Sink:
    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += bytes(data)

    async def drain(self):
        self.done_s = asyncio.get_running_loop().time() - 500

    def write_eof(self):
        pass


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("nbytes", [1, 1_500, 40_000, 1_000_000])
@pytest.mark.parametrize(
    "settings",
    [
        {"rtt_ms": 100},
        {"rtt_ms": 60, "up_bytes_s": 1e5, "down_bytes_s": 3e6},
        {"rtt_ms": 60, "up_bytes_s": 1e7, "down_bytes_s": 1e7, "loss": 1e-4},
        {"rtt_ms": 30, "up_bytes_s": 1e5, "down_bytes_s": 1e5, "outages": [(0.001, 5), (5.02, 6)]},
    ],
    ids=["rtt", "bandwidth", "mathis", "outages"],
)
def test_in_virtual_time_a_message_takes_what_the_link_says(settings, nbytes, up):
    """The proxy's own pacing, without a machine below it: equal to the closed form, whatever pieces
    come in."""
    payload, sink = np.random.default_rng(nbytes).bytes(nbytes), Sink()

    async def send():
        source, line = asyncio.StreamReader(limit=1 << 30), asyncio.Queue(1_000)
        pacing = Proxy.__new__(Proxy)  # no socket, no thread
        pacing._link, pacing._loop, pacing._started_s = (
            Link(**settings),
            asyncio.get_running_loop(),
            500.0,
        )
        pacing._slow_bytes_s, pacing._passing = 0.0, asyncio.Event()
        pacing.up_nbytes = pacing.down_nbytes = 0
        pacing._passing.set()
        source.feed_data(payload)
        source.feed_eof()
        await asyncio.gather(pacing._send(source, line, 0.0, up), pacing._deliver(line, sink, up))
        return pacing.up_nbytes if up else pacing.down_nbytes

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(send()) == nbytes
    assert sink.data == payload
    assert sink.done_s == pytest.approx(Link(**settings).transfers_s(nbytes, up=up), rel=0.01)


@pytest.mark.parametrize(
    ("settings", "request_nbytes", "response_nbytes"),
    [
        ({"rtt_ms": 100}, 8, 40),
        ({"rtt_ms": 60, "up_bytes_s": 1e6}, 100_000, 40),
        ({"rtt_ms": 60, "down_bytes_s": 2e6}, 800, 300_000),
        ({"rtt_ms": 0, "up_bytes_s": 5e5, "down_bytes_s": 5e5}, 50_000, 50_000),
        ({"rtt_ms": 50, "loss": 1e-9, "down_bytes_s": 2e6}, 8, 200_000),
    ],
    ids=["rtt", "up", "down", "bandwidth", "bulk"],
)
def test_an_exchange_takes_what_the_link_says(port, settings, request_nbytes, response_nbytes):
    expected_s = Link(**settings).exchanges_s(request_nbytes, response_nbytes)
    with Proxy(Link(**settings), "127.0.0.1", port) as proxy, connect(proxy) as caller:
        exchange(caller)  # the handshake is over
        assert_closed_form(lambda: exchange(caller, request_nbytes, response_nbytes), expected_s)


def test_a_new_connection_costs_a_round_trip_more(port):
    with Proxy(Link(rtt_ms=80), "127.0.0.1", port) as proxy:

        def measure():
            started_s = time.monotonic()
            with connect(proxy) as caller:
                exchange(caller)
            return time.monotonic() - started_s

        assert_closed_form(measure, 0.160)


def test_an_http_server_behind_it(port):
    class Hello(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 100_000)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    server.daemon_threads, server.block_on_close = True, False
    with (
        running(server) as port,
        Proxy(Link(rtt_ms=50, down_bytes_s=1e6), "127.0.0.1", port) as proxy,
    ):
        caller = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=PATIENCE_S)

        def measure():
            started_s = time.monotonic()
            caller.request("GET", "/")
            assert len(caller.getresponse().read()) == 100_000
            return time.monotonic() - started_s

        with contextlib.closing(caller):
            measure()
            assert_closed_form(measure, 0.050 + 0.100)


def test_an_outage_is_waited_for(port):
    def measure():
        started_s = time.monotonic()
        with (
            Proxy(Link(rtt_ms=50, outages=[(0, 0.3)]), "127.0.0.1", port) as proxy,
            connect(proxy) as caller,
        ):
            exchange(caller)
        return time.monotonic() - started_s

    assert_closed_form(measure, 0.3 + 0.100)


def test_losses_cost_the_timeouts_that_the_links_seed_draws(port):
    settings = {"rtt_ms": 20, "loss": 0.3, "seed": 21}
    link = Link(**settings)
    link.rtts_s()  # the handshake's
    expected_s = 0.020 + float(sum(link.delay_s(8) + link.delay_s(1) for _ in range(2)))
    assert expected_s > 0.060 + 2 * link.rto_s, "a seed without losses shows nothing"

    def measure():
        with Proxy(Link(**settings), "127.0.0.1", port) as proxy:
            started_s = time.monotonic()
            with connect(proxy) as caller:
                for _ in range(2):
                    exchange(caller)
            return time.monotonic() - started_s

    assert_closed_form(measure, expected_s)


def test_every_byte_arrives_in_order_and_is_counted(port):
    with Proxy(Link(rtt_ms=2, rtt_p99_ms=20), "127.0.0.1", port) as proxy, connect(proxy) as caller:
        # more than may be under way; `exchange` checks what comes back
        exchange(caller, 9_000_000, 9_000_000)
        assert (proxy.up_nbytes, proxy.down_nbytes) == (9_000_000, 9_000_000)


def test_many_connections_do_not_wait_for_each_other(port):
    with Proxy(Link(rtt_ms=150), "127.0.0.1", port) as proxy, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(proxy)) for _ in range(20)]
        started_s = time.monotonic()
        for caller in callers:
            caller.sendall(struct.pack("!II", 0, 1))
        assert all(caller.recv(1) for caller in callers)
        assert 0.3 <= time.monotonic() - started_s + 0.15 < 20 * 0.3  # one after the other: 6 s


# --------------------------------------------------------------------------------------------- cuts


def assert_reset(caller):
    with pytest.raises(ConnectionError):
        exchange(caller)


def test_refuse_and_heal_on_the_same_port(port):
    with Proxy(Link(), "127.0.0.1", port) as proxy, connect(proxy) as before:
        exchange(before)
        proxy.cut("refuse")
        assert_reset(before)
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
        proxy.cut("refuse")  # twice is once
        proxy.heal()
        with connect(proxy) as after:
            exchange(after)


def test_a_black_hole_answers_nothing_until_it_heals(port):
    with Proxy(Link(), "127.0.0.1", port) as proxy, connect(proxy) as before:
        exchange(before)
        counted = proxy.up_nbytes, proxy.down_nbytes
        proxy.cut("black_hole")
        with connect(proxy) as new:
            for caller in (before, new):
                caller.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    exchange(caller)
                caller.settimeout(PATIENCE_S)
            assert (proxy.up_nbytes, proxy.down_nbytes) == counted
            proxy.heal()
            for caller in (before, new):
                assert len(caller.recv(1)) == 1  # the answer to what was sent in vain


def test_from_cut_to_cut(port):
    with Proxy(Link(), "127.0.0.1", port) as proxy:
        for how in ("black_hole", "refuse", "black_hole"):
            proxy.cut(how)
        proxy.heal()
        with connect(proxy) as caller:
            exchange(caller)


def test_an_outage_without_end_is_silence_that_close_ends(port):
    proxy = Proxy(Link(outages=[(0, math.inf)]), "127.0.0.1", port)
    with proxy, pytest.raises(TimeoutError), connect(proxy, 0.1) as caller:
        exchange(caller)


# ------------------------------------------------------------------------------ ends, bounds, leaks


def test_a_server_that_is_gone_is_a_reset(port):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        proxy = Proxy(Link(), "127.0.0.1", nobody.getsockname()[1])
        with proxy, pytest.raises(ConnectionError), connect(proxy) as caller:
            exchange(caller)


def test_connections_beyond_the_limit_are_reset_and_places_come_free(port):
    with Proxy(Link(), "127.0.0.1", port, max_connections=2) as proxy:
        with connect(proxy) as first, connect(proxy) as second:
            exchange(first), exchange(second)
            with pytest.raises(ConnectionError), connect(proxy) as third:
                exchange(third)
            assert proxy.connections == 2
        wait_until(lambda: proxy.connections == 0, "the end of both connections")
        with connect(proxy) as fourth:
            exchange(fourth)


def test_half_a_close_passes():
    class UntilEnd(socketserver.BaseRequestHandler):
        def handle(self):
            received = b""
            while data := self.request.recv(100):
                received += data
            self.request.sendall(received[::-1])

    with contextlib.ExitStack() as proxied:
        port = proxied.enter_context(running(Server(("127.0.0.1", 0), UntilEnd)))
        proxy = proxied.enter_context(Proxy(Link(rtt_ms=10), "127.0.0.1", port))
        caller = proxied.enter_context(connect(proxy))
        caller.sendall(b"abc")
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(10, socket.MSG_WAITALL) == b"cba"


def test_a_dozen_proxies_closed_in_the_middle_leave_nothing(port):
    def left():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files in /proc")
    names = lambda: sum(thread.name == "flserving-proxy" for thread in threading.enumerate())  # noqa: E731
    before = None
    for number in range(13):
        proxy = Proxy(Link(rtt_ms=10, down_bytes_s=1e5), "127.0.0.1", port)
        with connect(proxy) as caller, connect(proxy):
            caller.sendall(struct.pack("!II", 0, 20_000_000))  # far more than can be delivered
            caller.recv(1)
            if number % 2:
                proxy.cut(("black_hole", "refuse")[number // 2 % 2])
            proxy.close()
            proxy.close()
            assert names() == 0
            with pytest.raises(ConnectionError):
                connect(proxy).close()
        if number == 0:
            wait_until(lambda: sum("process_request" in t.name for t in threading.enumerate()) == 0)
            before = left()
    wait_until(lambda: left() <= before, "the release of every socket")


def test_a_cut_that_is_none(port):
    with (
        Proxy(Link(), "127.0.0.1", port) as proxy,
        pytest.raises(ConfigError, match="cut is 'explode'"),
    ):
        proxy.cut("explode")
