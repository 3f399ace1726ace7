"""What no HTTP client would say, said on bare sockets: slow, half, broken, too much."""

import gzip
import socket
import struct

import httpx
import orjson
import pytest

from flserving.api.rest.http1 import _MOST_CHUNKS
from rest_corpus import MOST
from rest_door import INFER, Wire, bearer, door, rows, text, two_versions
from serving_models import Threads, wait_until


@pytest.fixture(scope="module")
def endpoint():
    with two_versions() as server, door(server, max_body_bytes=MOST) as endpoint:
        yield endpoint


POST = b"POST /v2/models/local/infer HTTP/1.1\r\nHost: {host}\r\n"
GET = b"GET /v2 HTTP/1.1\r\nHost: {host}\r\n"
LINES = [
    GET + b"Host: {host}\r\n\r\n",
    GET + b"Authorization: Bearer read\r\nAuthorization: Bearer admin\r\n\r\n",
    GET + b"A B: c\r\n\r\n",
    GET + b"C : d\r\n\r\n",
    GET + b"C: d\x00\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\n\r\n",
    b"GET /v2 HTTP/9.9\r\n\r\n",
    b"GET\r\n\r\n",
    b"BREW /v2 HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"GET http://evil.example/v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    POST + b"Content-Length: -1\r\n\r\n",
    POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    POST + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_what_is_no_http_gets_a_400_and_the_connection_is_of_no_more_use(endpoint, line):
    with Wire(endpoint) as wire:
        wire.say(line.replace(b"{host}", wire.host))
        status, body = wire.answer()
        assert 400 <= status < 500 and orjson.loads(body)["error"]


@pytest.mark.parametrize(
    ("version", "codings", "status"),
    [
        (b"1.1", [b"chunked"], 200),
        (b"1.1", [b" Chunked "], 200),
        (b"1.1", [b"gzip, chunked"], 501),
        (b"1.1", [b"gzip", b"chunked"], 501),
        (b"1.1", [b"identity, chunked"], 501),
        (b"1.1", [b"x-own"], 501),
        (b"1.1", [b"chunked, gzip"], 400),
        (b"1.1", [b"chunked", b"gzip"], 400),
        (b"1.1", [b"chunked, chunked"], 400),
        (b"1.0", [b"chunked"], 400),
        (b"1.0", [b"gzip, chunked"], 400),
    ],
)
def test_a_transfer_coding_that_is_not_undone_here_is_refused(endpoint, version, codings, status):
    """RFC 9112, 6.1: what was coded is never read as if it were the body, and a doubtful end closes
    the connection."""
    body = gzip.compress(text()) if b"gzip" in b"".join(codings) else text()
    with Wire(endpoint) as wire:
        head = wire.head(*(b"Transfer-Encoding: " + coding for coding in codings)).replace(
            b"HTTP/1.1", b"HTTP/" + version
        )
        wire.say(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        seen, answer = wire.answer()
        assert seen == status, answer
        if status != 200:
            assert orjson.loads(answer)["error"]
            assert wire.closed()


def test_headers_over_the_limit_get_a_431(endpoint):
    with Wire(endpoint) as wire:
        wire.say(wire.head(*[b"X-%d: " % i + b"x" * 1000 for i in range(80)]))
        status, body = wire.answer()
        assert status == 431 and "65536" in orjson.loads(body)["error"]
    with Wire(endpoint) as wire:  # the head never ends
        wire.say(b"GET /v2 HTTP/1.1\r\n" + b"x" * (1 << 20))
        assert wire.answer()[0] in (400, 431)
    with Wire(endpoint) as wire:
        wire.say(wire.head(b"X: " + b"x" * 30_000, b"Content-Length: %d" % len(text())) + text())
        assert wire.answer()[0] == 200


def test_a_body_in_too_many_chunks_gets_a_413(endpoint):
    with Wire(endpoint) as wire:
        wire.say(wire.head(b"Transfer-Encoding: chunked") + b"1\r\n \r\n" * (_MOST_CHUNKS + 1))
        status, body = wire.answer()
        assert status == 413 and orjson.loads(body)["error"]


def test_a_large_body_is_refused_before_it_is_sent(endpoint):
    with Wire(endpoint) as wire:
        wire.say(wire.head(b"Content-Length: 999999999999", b"Expect: 100-continue"))
        assert wire.answer()[0] == 413
    with Wire(endpoint) as wire:  # who has no credential gets no buffer either
        wire.say(wire.head(b"Content-Length: 99999").replace(b"Bearer infer", b"Bearer wrong"))
        assert wire.answer()[0] == 401


def test_one_byte_at_a_time_in_many_chunks_and_pipelined_requests_are_all_answered(endpoint):
    body = text()
    whole = b"Content-Length: %d" % len(body)
    with Wire(endpoint) as wire:
        for byte in wire.head(whole) + body:
            wire.say(bytes([byte]))
        assert wire.answer()[0] == 200
        wire.say(
            wire.head(b"Transfer-Encoding: chunked")
            + b"".join(b"1\r\n%c\r\n" % b for b in body)
            + b"0\r\n\r\n"
        )
        assert wire.answer()[0] == 200
    with Wire(endpoint) as wire:
        wire.say((wire.head(whole) + body) * 5 + wire.head(b"Connection: close", whole) + body)
        received = b""
        while more := wire.socket.recv(65536):
            received += more
        assert received.count(b"HTTP/1.1 200") == 6


def test_who_is_slow_is_told_and_who_is_silent_is_closed():
    with two_versions() as server, door(server, slow_client_s=0.4) as endpoint:
        with (
            Wire(endpoint) as silent,
            Wire(endpoint) as head,
            Wire(endpoint) as body,
            Wire(endpoint) as newline,
        ):
            head.say(head.head()[:-10])
            body.say(body.head(b"Content-Length: 50") + b"{")
            newline.say(b"\r\n")
            for wire in (head, body, newline):
                status, content = wire.answer()
                assert status == 408 and "0.4 s" in orjson.loads(content)["error"] and wire.closed()
            assert silent.closed()
        assert server.telemetry.totals()["refusals"]["rest"]["DeadlineExceeded"] == 3
        with httpx.Client(base_url=endpoint.url, headers=bearer("infer")) as http:
            assert http.post(INFER, content=text()).status_code == 200


def test_who_does_not_take_its_answer_is_cut_off():
    with (
        two_versions(max_queue_rows=100_000) as server,
        door(server, slow_client_s=0.4) as endpoint,
    ):
        body = text(rows(4000))
        with Wire(endpoint) as wire:
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            threads = Threads()
            threads.start(wire.say, (wire.head(b"Content-Length: %d" % len(body)) + body) * 40)
            threads.outcomes()  # the server stopped reading, then closed
            wait_until(
                lambda: not server.get_all_stats()["queue"]["waiting_rows"],
                "the end of its requests",
            )
        assert (
            httpx.post(endpoint.url + INFER, content=text(), headers=bearer("infer")).status_code
            == 200
        )


def test_a_connection_too_many_is_told_so_and_the_others_go_on():
    with two_versions() as server, door(server, max_connections=3) as endpoint:
        http = httpx.Client(base_url=endpoint.url, headers=bearer("infer"))
        with http, Wire(endpoint), Wire(endpoint):
            wait_until(
                lambda: http.post(INFER, content=text()).status_code == 200, "the first connection"
            )
            with Wire(endpoint) as extra:
                extra.say(extra.head(b"Content-Length: 0"))
                status, body = extra.answer()
                assert status == 429 and orjson.loads(body)["error"] and extra.closed()
            assert http.post(INFER, content=text()).status_code == 200


def test_clients_that_vanish_in_the_midst_leave_nothing_behind(endpoint):
    body = text()
    whole = b"Content-Length: %d" % len(body)
    for cut in range(0, 400, 7):
        with Wire(endpoint) as wire:
            assert len(wire.head(whole) + body) < 400
            wire.say((wire.head(whole) + body)[:cut])
            # close by a reset
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert (
        httpx.post(endpoint.url + INFER, content=body, headers=bearer("infer")).status_code == 200
    )
