"""The cloud is cut off in five ways, each by a real socket: the device answers in time, and says so
every time."""

import asyncio
import contextlib
import socket
import threading

import pytest
from test_hybrid import MLP, SURE, UNSURE, state

import flserving
from flserving import ServingConfig
from flserving.api.client import Client
from flserving.edge import EdgeModelServer
from flserving.edge.breaker import CircuitBreaker
from flserving.edge.hybrid import HybridServer, HybridSettings
from flserving.errors import DeadlineExceededError
from serving_models import PATIENCE_S, Threads, wait_until

pytestmark = pytest.mark.timeout(120)
FAILURES, PAUSE_S, TIMEOUT_MS = 3, 30.0, 10_000
CLOUD_SHARE = 0.02  # 200 ms for the cloud, and 9.8 s for a device on a machine that is busy


class Cut:
    """A server on a free port that does not answer as it should."""

    def __init__(self, how):
        self.how, self.connections, self._ends, self._threads = how, 0, threading.Event(), Threads()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        scheme = "https" if how == "tls" else "http"
        self.url = f"{scheme}://127.0.0.1:{self._socket.getsockname()[1]}"
        # bound and not listening: nobody else gets the port, and nobody answers
        if how != "refused":
            self._socket.listen(64)
            self._socket.settimeout(0.02)
            self._threads.start(self._accept)

    def _accept(self):
        while not self._ends.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._socket.accept()
                self.connections += 1
                self._threads.start(self._misbehave, connection)

    def _misbehave(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE_S)
            if self.how == "black hole":
                self._ends.wait(PATIENCE_S)
                return
            connection.recv(65536)
            if self.how == "tls":
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")  # this port speaks no TLS
            elif self.how == "500":
                body = b"Internal Server Error"
                connection.sendall(
                    b"HTTP/1.1 500 Oops\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                )
            else:  # slow: it goes on and on, never silent for long
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not self._ends.wait(0.02):
                    connection.sendall(b" ")

    def close(self):
        self._ends.set()
        self._threads.outcomes()
        self._socket.close()


@pytest.fixture
def edge():
    with EdgeModelServer(config=ServingConfig(warmup_samples=1, timeout_ms=TIMEOUT_MS)) as made:
        made.update_global(state(), round=4, **MLP)
        yield made


def ask(hybrid, row, way):
    if way == "predict":
        return hybrid.predict(row)
    return asyncio.run(hybrid.apredict(row))


@pytest.mark.parametrize("way", ["predict", "apredict"])
@pytest.mark.parametrize("how", ["refused", "black hole", "slow", "tls", "500"])
def test_a_cut_cloud(edge, how, way):
    now, cut = [0.0], Cut(how)
    breaker = CircuitBreaker(FAILURES, PAUSE_S, clock=lambda: now[0])
    try:
        with (
            EdgeModelServer(config=edge.config) as centre,
            flserving.serve(centre) as endpoint,
            Client(endpoint.url, endpoint.token) as healthy,
            Client(cut.url) as away,
            HybridServer(
                edge,
                away,
                consent=True,
                breaker=breaker,
                settings=HybridSettings(cloud_share=CLOUD_SHARE),
            ) as hybrid,
        ):
            centre.update_global(state(9.0), round=5, **MLP)
            answers = []
            for number in range(1, FAILURES + 1):
                assert breaker.state == "closed"
                answers.append(ask(hybrid, UNSURE, way))
                assert breaker.stats()["failures_in_a_row"] == number
                assert ask(hybrid, SURE, way)["path"] == "local"
            assert breaker.state == "open" and breaker.stats()["opened"] == 1
            connections = cut.connections
            answers += [ask(hybrid, UNSURE, way) for _ in range(20)]
            assert cut.connections == connections, "an open breaker leaves the cloud alone"
            assert [answer["path"] for answer in answers] == ["degraded"] * len(answers)
            for answer in answers:
                assert (answer["predictions"], answer["round"], answer["degraded"]) == (
                    [0],
                    4,
                    True,
                )
                assert answer["latency_ms"] < TIMEOUT_MS

            now[0] += PAUSE_S  # a probe, and it fails
            assert ask(hybrid, UNSURE, way)["path"] == "degraded" and breaker.state == "open"
            hybrid.cloud = healthy  # the cut is over; the device learns of it by the next probe
            assert ask(hybrid, UNSURE, way)["path"] == "degraded"
            now[0] += PAUSE_S
            hybrid.settings = HybridSettings(cloud_share=0.9)
            answer = ask(hybrid, UNSURE, way)
            assert (answer["path"], answer["round"], answer["degraded"]) == ("cloud", 5, False)
            assert breaker.state == "closed" and ask(hybrid, UNSURE, way)["path"] == "cache"
            paths = hybrid.get_all_stats()["server"]["answers_by_path"]
            assert paths == {
                "local": FAILURES,
                "degraded": len(answers) + 2,
                "cloud": 1,
                "cache": 1,
            }
    finally:
        cut.close()
    wait_until(
        lambda: not any(t.name.startswith("flserving-cloud") for t in threading.enumerate()),
        "the last call",
    )


def test_an_answer_that_drips_holds_its_caller_no_longer_than_the_deadline():
    cut = Cut("slow")
    try:
        with Client(cut.url) as client, pytest.raises(DeadlineExceededError):
            client.predict(UNSURE, model="model", timeout_ms=300)
    finally:
        cut.close()


def test_a_cut_under_load_flags_every_answer(edge):
    """Sixteen threads while the cloud is a black hole: no answer without its flag, none that is
    missing."""
    cut, threads = Cut("black hole"), Threads()
    try:
        with (
            Client(cut.url) as away,
            HybridServer(
                edge,
                away,
                consent=True,
                breaker=CircuitBreaker(FAILURES),
                settings=HybridSettings(cloud_share=CLOUD_SHARE),
            ) as hybrid,
        ):

            def many(caller):
                return [hybrid.predict([UNSURE[0], caller / 1e3])["path"] for _ in range(20)]

            for caller in range(16):
                threads.start(many, caller)
            assert [set(paths) for paths in threads.results()] == [{"degraded"}] * 16
            assert hybrid.breaker.stats()["opened"] == 1
    finally:
        cut.close()
