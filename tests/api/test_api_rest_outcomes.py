"""What the REST door answers when a request does not end well, what it counts, and what it does
under load."""

import logging
import threading

import httpx
import numpy as np
import orjson
import pytest

from flserving import errors
from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2
from flserving.api.options import ApiOptions
from flserving.api.rest import app as rest
from flserving.api.rest.app import RestApp
from flserving.monitoring.prometheus import exposition
from rest_door import WIDTH, Wire, bearer, door, text, two_versions
from serving_models import Constant, Gated, Probe, Threads, serving, wait_until

INFER = "/v2/models/local/infer"


@pytest.fixture(scope="module")
def server():
    with two_versions() as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server):
    with door(server) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def http(endpoint):
    with httpx.Client(base_url=endpoint.url, headers=bearer("infer")) as client:
        yield client


# One shape of error


def in_process(app, **options):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, **options), base_url="http://127.0.0.1"
    )


def every(kind):
    return [kind, *(below for child in kind.__subclasses__() for below in every(child))]


@pytest.mark.parametrize(
    "kind",
    [*every(errors.FlservingError), RuntimeError, MemoryError],
    ids=lambda kind: kind.__name__,
)
async def test_every_error_has_its_status_and_the_one_shape(kind, caplog):
    words = "canary \udcff words"

    class Failing(V2):
        async def infer(self, call):
            raise kind(words)

    with serving(Constant(1)) as server:
        async with in_process(RestApp(Failing(server), ApiOptions(tokens=Tokens.open()))) as http:
            response = await http.post(INFER, content=text())
    assert response.status_code == getattr(kind, "http_status", 500)
    assert response.headers["content-type"] == "application/json"
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    if issubclass(kind, errors.FlservingError):
        assert "canary" in response.json()["error"]
    else:
        assert response.json() == {"error": "internal error"}
        assert kind.__name__ in caplog.text and "canary" not in caplog.text


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/v2/nothing", 404), ("GET", "/v2/models/local/", 404),
    ("POST", "/v2/models//infer", 404), ("POST", "/v2/models/a/b/infer", 404),
    ("GET", "/v2/logging", 404), ("POST", "/v2/trace/setting", 404),
    ("POST", "/v2/systemsharedmemory/status", 404), ("POST", "/v2/models/local/generate", 404),
    ("GET", INFER, 405), ("DELETE", INFER, 405), ("POST", "/v2", 405), ("PUT", "/v2/models/local", 405),
    ("OPTIONS", INFER, 405), ("GET", "/v2/repository/index", 405),
    ("GET", "/v2/models/loc%61l", 404), ("GET", "/v2/models/..%2flocal", 404), ("GET", "/v2/models/l%00", 404),
    ("GET", "/v2/models/local%2Fready", 404), ("POST", "/v2/models/%ff/infer", 404),
    ("GET", "/v2/models/local/versions/9", 404), ("POST", "/v2/models/local/versions/9/infer", 404),
])  # fmt: skip
def test_what_is_not_there_is_told_in_the_same_shape(http, method, path, status):
    response = http.request(method, path, content=text() if method == "POST" else None)
    assert response.status_code == status and response.json()["error"]
    assert response.headers["content-type"] == "application/json"
    assert ("allow" in response.headers) == (status == 405)


def test_head_asks_for_the_status_alone(http):
    response = http.head("/v2/health/ready")
    assert response.status_code == 200 and not response.content


async def test_a_draining_server_is_alive_but_not_ready():
    with serving(Constant(1)) as server:
        v2 = V2(server)
        async with in_process(RestApp(v2, ApiOptions(tokens=Tokens.open()))) as http:
            v2.draining = True
            for path in ("/v2/health/ready", "/v2/models/local/ready"):
                response = await http.get(path)
                assert (
                    response.status_code == 503
                    and response.json()["ready"] is False
                    and response.json()["error"]
                )
                assert response.headers["retry-after"] == "1"
            assert (await http.get("/v2/health/live")).json() == {"live": True}
            assert (
                await http.post(INFER, content=text(np.ones((1, 2))))
            ).status_code == 200  # what came in is answered


# Requests that end early, and what is counted and logged


def test_a_client_that_hangs_up_takes_its_request_out_of_the_queue():
    probe = Probe()
    with serving(Gated(probe), max_batch_size=1, num_workers=1) as server, door(server) as endpoint:
        # a slow model runs on a worker, not on the event loop
        server.engines["v1.0"].typical_s = 1e9
        probe.shut()
        threads, url = Threads(), endpoint.url + INFER
        first = text(np.full((1, 2), 1, "f4"))
        threads.start(httpx.post, url, content=first, headers=bearer("infer"), timeout=30)
        probe.wait_inside(1)
        with Wire(endpoint) as wire:
            second = text(np.full((1, 2), 2, "f4"))
            wire.say(wire.head(b"Content-Length: %d" % len(second)) + second)
            wait_until(
                lambda: server.get_all_stats()["queue"]["waiting_rows"] == 1, "the second request"
            )
        wait_until(
            lambda: server.get_all_stats()["server"]["failed_by_reason"].get("Cancelled") == 1,
            "the cancellation",
        )
        probe.release()
        assert threads.results()[0].status_code == 200
        assert probe.seen == [1.0]


def test_a_full_queue_and_a_deadline_have_their_statuses():
    probe = Probe()
    with (
        serving(Gated(probe), max_batch_size=1, num_workers=1, max_queue_rows=1) as server,
        door(server) as endpoint,
    ):
        server.engines["v1.0"].typical_s = 1e9
        probe.shut()
        threads, url, body = Threads(), endpoint.url + INFER, text(np.ones((1, 2), "f4"))
        threads.start(httpx.post, url, content=body, headers=bearer("infer"), timeout=30)
        probe.wait_inside(1)
        timed = text(np.ones((1, 2), "f4"), parameters={"timeout": 50_000})
        late = httpx.post(url, content=timed, headers=bearer("infer"), timeout=30)
        assert late.status_code == 504 and "50" in late.json()["error"]
        threads.start(httpx.post, url, content=body, headers=bearer("infer"), timeout=30)
        wait_until(
            lambda: server.get_all_stats()["queue"]["waiting_rows"] == 1, "the second request"
        )
        full = httpx.post(url, content=body, headers=bearer("infer"))
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        probe.release()
        assert [r.status_code for r in threads.results()] == [200, 200]


def test_refusals_and_times_of_the_door_are_counted():
    with two_versions() as server, door(server) as endpoint:
        url = endpoint.url + INFER
        for token, body in (
            (None, text()),
            ("read", text()),
            ("infer", b"{"),
            ("infer", text()),
            ("infer", text()),
        ):
            httpx.post(url, content=body, headers=bearer(token))
        totals = server.telemetry.totals()
        assert totals["refusals"]["rest"] == {"Unauthorized": 1, "Forbidden": 1, "InvalidInput": 1}
        answers, parse_s, serialise_s = totals["codec"]["rest"]
        assert answers == 2 and 0 < parse_s < 1 and 0 < serialise_s < 1
        httpx.post(url, content=text(), headers=bearer("infer") | {"Host": "evil.example"})
        httpx.post(
            url, content=text(), headers=bearer("infer") | {"Origin": "https://evil.example"}
        )
        httpx.get(f"{endpoint.url}/metrics")
        httpx.get(f"{endpoint.url}/nothing")  # no route is no refusal
        assert server.telemetry.totals()["refusals"]["rest"] == {
            "Unauthorized": 2,
            "Forbidden": 3,
            "InvalidInput": 1,
        }


@pytest.mark.parametrize("part", ["read_infer", "write_infer"])
def test_a_bug_of_the_door_itself_is_a_server_error_in_the_metrics(http, server, monkeypatch, part):
    def broken(*_):
        raise TypeError("a bug")

    def counted():
        found = [
            line
            for line in exposition(server)[0].decode().splitlines()
            if line.startswith("flserving_outcomes")
        ]
        return next(float(line.split()[1]) for line in found if "server_error" in line)

    before = counted()
    monkeypatch.setattr(rest, part, broken)
    response = http.post(INFER, content=text())
    assert (response.status_code, response.json()) == (500, {"error": "internal error"})
    assert counted() == before + 1


def test_no_log_holds_features_or_tokens(server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with door(server, tokens=Tokens.random(Role.INFER)[0]) as endpoint:
        for path in (INFER, "/v2/models/swordfish-name", "/nothing"):
            for body in (text(np.full((1, WIDTH), 424242)), b'{"inputs": [424242'):
                httpx.post(endpoint.url + path, content=body, headers=bearer("swordfish-token"))
    logged = caplog.text.replace(endpoint.url, "") + "".join(capfd.readouterr())
    ours = "\n".join(
        line for line in logged.splitlines() if "httpx" not in line and "httpcore" not in line
    )
    assert "424242" not in ours and "swordfish" not in ours


# Under load


def test_hot_swap_under_load_fails_and_mixes_nothing():
    """16 callers while the default moves to and fro: every answer is wholly of the version that it
    names."""
    with serving(Constant(1), "v1") as server:
        server.load_model("v2", Constant(2), output_type="regression", num_features=2)
        with door(server) as endpoint:
            threads, done, body = Threads(), threading.Event(), text(np.ones((3, 2), "f4"))

            def call():
                seen = []
                with httpx.Client(base_url=endpoint.url, headers=bearer("infer")) as http:
                    while not done.is_set():
                        answer = orjson.loads(
                            http.post(INFER, content=body).raise_for_status().content
                        )
                        seen.append((answer["model_version"], *answer["outputs"][0]["data"]))
                return seen

            for _ in range(16):
                threads.start(call)
            for swap in range(40):
                server.set_default(f"v{swap % 2 + 1}")
                before = server.get_all_stats()["server"]["requests"]
                wait_until(
                    lambda b=before: server.get_all_stats()["server"]["requests"] >= b + 20,
                    "more requests",
                )
            done.set()
            answers = [answer for seen in threads.results() for answer in seen]
    assert len(answers) >= 800
    assert set(answers) == {("v1", 1.0, 1.0, 1.0), ("v2", 2.0, 2.0, 2.0)}


def test_each_credential_has_its_own_scope_of_the_prediction_cache():
    """The token of a client, two of no client, and again: a hit is for who asked before, whatever
    the door."""
    asked = [("infer", 0), ("client", 0), ("admin", 0), ("infer", 1), ("client", 1), ("admin", 1)]
    with two_versions(prediction_cache_bytes=1 << 20) as server, door(server) as endpoint:
        for token, hit in asked:
            hits = server.prediction_cache.hits
            answer = httpx.post(endpoint.url + INFER, content=text(), headers=bearer(token))
            assert answer.status_code == 200 and server.prediction_cache.hits - hits == hit
