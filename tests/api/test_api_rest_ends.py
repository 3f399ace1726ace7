"""Connections that end early, requests that wait in line, and what comes after a head: said on bare
sockets."""

import functools
import socket
import time

import httpx
import numpy as np
import psutil
import pytest
import uvicorn

from flserving.api.rest.http1 import _MOST_PIPELINED
from rest_door import Wire, door, text, two_versions
from serving_models import PATIENCE_S, Gated, Probe, serving, wait_until

POST = b"POST /v2/models/local/infer HTTP/1.1\r\nHost: {host}\r\n"


@pytest.fixture(scope="module")
def endpoint():
    with two_versions() as server, door(server) as endpoint:
        yield endpoint


@pytest.fixture
def gated():
    """A door to a model that waits, on a worker and not on the event loop, until its probe lets it
    go."""
    probe = Probe()
    with serving(Gated(probe), max_batch_size=1, num_workers=1) as server, door(server) as endpoint:
        server.engines["v1.0"].typical_s = 1e9
        probe.shut()
        yield endpoint, probe, server
        probe.release()


ONE = text(np.ones((1, 2), "f4"))
WHOLE = b"Content-Length: %d" % len(ONE)


def test_a_client_that_shuts_its_side_down_still_gets_its_answers(gated):
    endpoint, probe, _ = gated
    with Wire(endpoint) as wire:
        wire.say((wire.head(WHOLE) + ONE) * 2)
        probe.wait_inside(1)
        wire.socket.shutdown(socket.SHUT_WR)  # what ``nc -N`` does at the end of its input
        time.sleep(0.1)  # the server has seen that, and not taken it for the end
        probe.release()
        assert wire.all().count(b"HTTP/1.1 200") == 2


def test_a_client_that_is_gone_takes_all_its_requests_along_and_nobody_logs_it(gated, caplog):
    endpoint, probe, server = gated
    with Wire(endpoint) as wire:
        wire.say((wire.head(WHOLE) + ONE) * 2)
        probe.wait_inside(1)
    wait_until(
        lambda: server.get_all_stats()["server"]["failed_by_reason"] == {"Cancelled": 1},
        "the cancellation",
    )
    probe.release()
    httpx.get(f"{endpoint.url}/v2/health/live")
    assert probe.calls == 1 and not caplog.records


def test_a_broken_request_does_not_cost_those_before_it_their_answers(monkeypatch):
    good = b"GET /v2/health/live HTTP/1.1\r\nHost: {host}\r\n\r\n"
    patient = functools.partial(uvicorn.Config, timeout_keep_alive=10 * PATIENCE_S)
    # no timer of idle connections closes them, and all() would end
    monkeypatch.setattr(uvicorn, "Config", patient)
    with two_versions() as server, door(server) as endpoint:
        for broken in (b"garbage\r\n\r\n", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"):
            with Wire(endpoint) as wire:
                wire.say((good * 3 + broken).replace(b"{host}", wire.host))
                assert wire.all().count(b"HTTP/1.1 200") == 3


def test_requests_that_wait_on_one_connection_are_few(endpoint):
    with Wire(endpoint) as wire:
        wire.say((b"GET /v2/health/live HTTP/1.1\r\nHost: " + wire.host + b"\r\n\r\n") * 2000)
        assert 0 < wire.all().count(b"HTTP/1.1 200") <= _MOST_PIPELINED + 1


def test_trailers_are_no_headers_and_are_not_kept(endpoint):
    head = b"POST /v2/repository/index HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
    chunks = b"\r\n0\r\n"
    for late in (b"Host: {host}\r\n", b"Authorization: Bearer read\r\n"):
        early = {b"H": b"Authorization: Bearer read\r\n", b"A": b"Host: {host}\r\n"}[late[:1]]
        with Wire(endpoint) as wire:
            wire.say((head + early + chunks + late + b"\r\n").replace(b"{host}", wire.host))
            assert wire.answer()[0] == (400 if late.startswith(b"Host") else 401)
    with Wire(endpoint) as wire:
        before = psutil.Process().memory_info().rss
        wire.say(head + b"Host: " + wire.host + b"\r\n" + chunks + b"a:b\r\n" * (1 << 20))
        assert wire.answer()[0] == 401
        wire.say(b"\r\n" + wire.head(b"Content-Length: %d" % len(text())) + text())
        assert wire.answer()[0] == 200
        assert psutil.Process().memory_info().rss - before < 40 << 20


@pytest.mark.parametrize("split", [False, True])
def test_an_offer_to_upgrade_is_passed_over(endpoint, split, caplog):
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAAQAAP__",
    )
    head, body = b"Content-Length: %d" % len(text()), text()
    with Wire(endpoint) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.say(wire.head(*upgrade, head) + (b"" if split else body))
        if split:
            time.sleep(0.05)  # the head is read by itself
            wire.say(body)
        assert wire.answer()[0] == 200
        wire.say(wire.head(head) + body)
        assert wire.answer()[0] == 200
    assert not caplog.records


def test_a_refusal_is_counted_once():
    with two_versions() as server, door(server) as endpoint, Wire(endpoint) as wire:
        wire.say(b"\x00" * 100_000)
        assert wire.answer()[0] == 400
        assert server.telemetry.totals()["refusals"]["rest"] == {"InvalidInput": 1}


def test_a_connection_of_nothing_but_offers_to_upgrade_is_ended(endpoint, caplog):
    offer = (
        b"GET /v2/health/live HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHost: %s\r\n\r\n"
    )
    with Wire(endpoint) as wire:
        wire.say(offer % wire.host * 2000)
        assert 0 < wire.all().count(b"HTTP/1.1 200") <= _MOST_PIPELINED + 1
    assert "Traceback" not in caplog.text and "call failed" not in caplog.text
