"""The client: the server's own answers and errors over both protocols, and retries only where they
are safe."""

import asyncio
import http.server
import threading

import numpy as np
import pytest

import flserving
from flserving import ServingConfig, errors, models
from flserving.api.client import AsyncClient, Client
from flserving.api.client.retries import Attempts, Refused, Retries
from flserving.api.client.transports import _CHANNEL, _grpc_refusal, _refusal
from flserving.errors import (
    REASON,
    ConfigError,
    DeadlineExceededError,
    FlservingError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    ServerClosedError,
    TooLargeError,
)

X = np.random.default_rng(0).standard_normal((3, 32), dtype=np.float32)
SCHEMES = ["http", "grpc"]


class Clock:
    """Virtual time: sleeping moves it."""

    def __init__(self):
        self.now_s, self.slept = 0.0, []

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture(scope="module")
def served():
    with (
        flserving.create_serving_pipeline(
            models.build("tutorial_mlp"), config=ServingConfig(max_request_rows=64)
        ) as server,
        flserving.serve(server) as endpoint,
    ):
        yield server, endpoint


@pytest.fixture(params=SCHEMES)
def url(request, served):
    return served[1].url if request.param == "http" else f"grpc://{served[1].grpc_url}"


@pytest.fixture
def client(url, served):
    with Client(url, served[1].token) as client:
        yield client


# Answers


def test_the_answer_is_the_servers_own(served, client):
    server = served[0]
    for features in (X, X[0], X.tolist(), X.astype(np.float64)):
        ours, direct = client.predict(features), server.predict(features)
        assert ours.pop("latency_ms") > 0 and direct.pop("latency_ms") > 0
        assert ours == direct
    assert client.predict(X, "default", model="local") == client.predict(X, "v1.0") | {
        "latency_ms": pytest.approx(0, abs=1e4)
    }


def test_arrays_and_stages(served, client):
    answer = client.predict(X, arrays=True, stages=True)
    direct = served[0].predict(X, arrays=True, stages=True)
    assert (
        answer.keys() == direct.keys() and answer["stages_ms"].keys() == direct["stages_ms"].keys()
    )
    for name in ("predictions", "confidences", "probabilities"):
        np.testing.assert_array_equal(answer[name], direct[name], strict=True)


def test_what_else_can_be_asked(served, client):
    client.predict(X)
    assert client.ready() and client.ready("local") and client.ready("local", "v1.0")
    assert client.metadata()["name"] == "flserving"
    assert client.metadata("local")["inputs"] == [
        {"name": "features", "datatype": "FP32", "shape": [-1, 32]}
    ]
    assert client.models() == [{"name": "local", "version": "v1.0", "state": "READY", "reason": ""}]
    (row,) = client.statistics("local")
    assert row["inference_stats"]["success"]["count"] >= 1 and row["inference_count"] >= 3
    assert client.statistics() == client.statistics("local", "v1.0") == [row]


async def test_the_awaiting_client_does_the_same(served, url):
    async with AsyncClient(url, served[1].token) as client:
        answers = await asyncio.gather(*(client.predict(X + i) for i in range(8)))
        for i, answer in enumerate(answers):
            assert answer["predictions"] == served[0].predict(X + i)["predictions"]
        assert await client.ready() and (await client.metadata("local"))["name"] == "local"
        assert (await client.models())[0]["state"] == "READY" and await client.statistics()
        with pytest.raises(NotFoundError, match="nothing"):
            await client.predict(X, model="nothing")


async def test_a_deadline_that_passes_while_idle_connections_are_closed_leaves_none_open(served):
    async with AsyncClient(served[1].url, served[1].token) as client:
        await asyncio.gather(*(client.predict(X) for _ in range(20)))
        idle = [connection._connection for connection in client._transport._http._pool.connections]
        sockets = [connection._network_stream.get_extra_info("socket") for connection in idle]
        for connection in idle:
            connection._expire_at = 0.0
        with pytest.raises(Refused, match="no answer in the 0 ms"):
            await client._transport.send(client._codec.models(), timeout_s=1e-9)
    await asyncio.sleep(0)  # what is closed here, the loop lets go of at its next turn
    assert len(sockets) > 1 and all(socket.fileno() == -1 for socket in sockets)


# Errors


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"features": X[:, :5]}, InvalidInputError, "the model takes 32"),
        ({"features": np.zeros((65, 32))}, InvalidInputError, "the limit is 64"),
        ({"features": [[float("nan")] * 32]}, InvalidInputError, "finite"),
        ({"features": "text"}, InvalidInputError, "feature"),
        ({"features": X, "version": "v9"}, NotFoundError, "v9"),
        ({"features": X, "version": 9}, NotFoundError, "9"),
        ({"features": X, "model": "nothing"}, NotFoundError, "nothing"),
        ({"features": X, "model": "../a b"}, NotFoundError, "no model|not served|Not Found"),
        ({"features": X, "personal": True}, ForbiddenError, "personal"),
        ({"features": X, "timeout_ms": 0}, InvalidInputError, "timeout_ms is 0"),
        ({"features": X, "timeout_ms": "5"}, InvalidInputError, "timeout_ms is '5'"),
    ],
    ids=[
        "width",
        "rows",
        "nan",
        "text",
        "alias",
        "version",
        "model",
        "path",
        "personal",
        "timeout",
        "timeout-text",
    ],
)
def test_errors_are_the_servers_own(client, arguments, kind, says):
    with pytest.raises(FlservingError, match=says) as caught:
        client.predict(**arguments)
    assert type(caught.value) is kind


@pytest.mark.parametrize("way", ["blocking", "awaiting"])
def test_an_answer_without_end_is_given_up(served, url, way, monkeypatch):
    monkeypatch.setattr("flserving.api.client.transports.MAX_ANSWER_NBYTES", 2000)
    monkeypatch.setitem(_CHANNEL, "grpc.max_receive_message_length", 2000)

    async def ask(rows):
        async with AsyncClient(url, served[1].token) as client:
            return await client.predict(rows)

    with Client(url, served[1].token) as client:
        asked = client.predict if way == "blocking" else lambda rows: asyncio.run(ask(rows))
        assert len(asked(X[:1])["predictions"]) == 1
        with pytest.raises(
            TooLargeError, match=r"more than 2,000 bytes|larger than max \(\d+ vs\. 2000\)"
        ):
            asked(np.resize(X, (64, X.shape[1])))
        assert len(asked(X[:1])["predictions"]) == 1


def _kinds(root=FlservingError):
    return [root, *(kind for child in root.__subclasses__() for kind in _kinds(child))]


@pytest.mark.parametrize("kind", [kind for kind in _kinds() if kind.__module__ == errors.__name__])
def test_every_error_comes_back_as_its_own_type(kind):
    assert type(_refusal(FlservingError, "text", {REASON: kind().reason}).error) is kind
    assert str(_refusal(FlservingError, "text", {REASON: kind().reason}).error) == "text"


@pytest.mark.parametrize(
    ("code", "kind", "again"),
    [
        ("UNAVAILABLE", ServerClosedError, True),
        ("RESOURCE_EXHAUSTED", OverloadedError, False),
        ("INTERNAL", FlservingError, False),
        ("NOT_FOUND", NotFoundError, False),
        ("DEADLINE_EXCEEDED", DeadlineExceededError, False),
        ("CANCELLED", ServerClosedError, True),
        ("ABORTED", FlservingError, False),
    ],
)
def test_the_codes_of_other_servers(code, kind, again):
    class Foreign:
        code = staticmethod(lambda: type("Code", (), {"name": code}))
        trailing_metadata = staticmethod(lambda: None)
        details = staticmethod(lambda: "text")

    refused = _grpc_refusal("a:1", Foreign(), 1.0)
    assert (type(refused.error), refused.again) == (kind, again)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        ":80",
        "a:99999",
        "a b:80",
        "a:80/v2",
        "u:p@a:1",
        "ftp://a:1",
        "grpc://host",
        "http://a:99999",
        "http://a/v2",
        "http://u:p@a:1",
        "http://a:1#x",
    ],
)
def test_a_url_that_cannot_be_called(url):
    with pytest.raises(ConfigError, match="cannot be called"):
        Client(url)


def test_a_token_or_an_authority_that_cannot_be_used():
    with pytest.raises(ConfigError, match="token"):
        Client("http://a:1", "two\nlines")
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        Client("https://a:1", ca="missing.pem")


# Retries


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_there_is_tried_again_until_the_attempts_end(scheme):
    clock, draws = Clock(), []

    def highest(low, high):
        draws.append((low, high))
        return high

    retries = Retries(attempts=4, base_s=0.05, draw=highest)
    client = Client(
        f"{scheme}://127.0.0.1:1",
        "t",
        retries=retries,
        timeout_ms=5000,
        clock=clock,
        sleep=clock.sleep,
    )
    with client, pytest.raises(ServerClosedError, match="127"):
        client.predict(X, model="m")
    assert draws == [(0, 0.05), (0, 0.1), (0, 0.2)] and clock.slept == [0.05, 0.1, 0.2], (
        "full jitter"
    )
    with Client(f"{scheme}://127.0.0.1:1", retries=retries) as client:
        assert not client.ready()


def test_no_attempt_after_the_deadline_and_the_server_is_told_what_is_left():
    clock, retries = (
        Clock(),
        Retries(attempts=100, base_s=1, longest_s=1, budget=1000, draw=lambda low, high: high),
    )
    with Client(
        "http://127.0.0.1:1", retries=retries, timeout_ms=3500, clock=clock, sleep=clock.sleep
    ) as client:
        told = []
        real = client._codec.infer
        client._codec.infer = lambda *call: told.append(call[-1]["timeout"]) or real(*call)
        with pytest.raises(ServerClosedError):
            client.predict(X, model="m")
    assert told == [3_500_000, 2_500_000, 1_500_000, 500_000] and clock.now_s == 3


def test_the_budget_ends_a_storm_of_retries():
    retries, clock = Retries(attempts=4, budget=10, draw=lambda low, high: 0.0), Clock()
    refused = Refused(OverloadedError("full"), again=True)

    def call():
        attempts = Attempts(retries, 5.0, clock)
        for sent in range(1, 10):
            try:
                attempts.failed(refused)
            except OverloadedError:
                return sent
        raise AssertionError("without end")

    assert [call() for _ in range(5)] == [4, 1, 1, 1, 1]
    for _ in range(100):
        Attempts(retries, 5.0, clock).succeeded()
    assert call() > 1, "answers earn it back"


@pytest.mark.parametrize(
    ("status", "headers", "attempts", "kind"),
    [
        (503, {"retry-after": "0.01"}, 3, ServerClosedError),
        (429, {"retry-after": "0.01"}, 3, OverloadedError),
        (503, {}, 1, ServerClosedError),
        (429, {}, 1, OverloadedError),
        (500, {"retry-after": "0.01"}, 1, FlservingError),
        (400, {}, 1, InvalidInputError),
        (None, {}, 3, ServerClosedError),
    ],
    ids=["503-after", "429-after", "503", "429", "500", "400", "dropped"],
)
def test_what_is_tried_again_over_rest(status, headers, attempts, kind):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["content-length"])))
            if status is None:
                self.close_connection = True  # read, and never answered
                return
            self.send_response(status)
            for name, value in {"content-length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        retries, clock = Retries(attempts=3), Clock()
        url = f"http://127.0.0.1:{server.server_port}"
        with (
            Client(url, retries=retries, clock=clock, sleep=clock.sleep) as client,
            pytest.raises(kind) as caught,
        ):
            client.predict(X, model="m")
        server.shutdown()
    assert type(caught.value) is kind and len(asked) == attempts
    if "retry-after" in headers:
        assert all(slept >= 0.01 for slept in clock.slept)


def test_the_printed_grpc_address_is_an_address():
    """What an endpoint shows as its gRPC address is one that our own client takes; so does gRPC
    write addresses."""
    with (
        flserving.create_serving_pipeline(models.build("tutorial_mlp")) as server,
        flserving.serve(server) as endpoint,
    ):
        with Client(endpoint.grpc_url, endpoint.token) as client:
            assert client.url == f"grpc://{endpoint.grpc_url}"
            assert client.predict(X)["model_version"] == "v1.0"

        async def ask():
            async with AsyncClient(endpoint.grpc_url, endpoint.token) as client:
                return await client.predict(X)

        assert asyncio.run(ask())["model_version"] == "v1.0"
        rest = endpoint.url.removeprefix("http://")
        once = Retries(attempts=1)
        with (
            Client(rest, endpoint.token, retries=once) as client,
            pytest.raises(ServerClosedError, match=rest),
        ):
            client.predict(X)  # gRPC's own words say that this is no port of its kind
    for address in ("localhost:8001", "10.0.0.1:8001", "[::1]:8001", "models.example.org:8001"):
        assert Client(address).url == f"grpc://{address}"


def test_a_slow_server_ends_at_the_deadline():
    with (
        flserving.create_serving_pipeline(models.build("tutorial_mlp")) as server,
        flserving.serve(server) as endpoint,
    ):
        for url in (endpoint.url, f"grpc://{endpoint.grpc_url}"):
            with Client(url, endpoint.token) as client, pytest.raises(DeadlineExceededError):
                client.predict(X, timeout_ms=0.001)
