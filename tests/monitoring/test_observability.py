"""What ``flserving serve`` and ``flserving edge`` say of themselves: logs as text and JSON, calls,
spans at a real collector."""

import http.server
import json
import logging
import re
import socket
import sys
import threading

import httpx
import pytest

import flserving
from flserving.api import cli
from flserving.api.client import Client
from flserving.errors import ConfigError, InvalidInputError, UnauthorizedError
from flserving.monitoring.observability import Observability
from serving_models import Tagged, row, serving, wait_until
from serving_processes import X, running, two_versions

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def registry_root(tmp_path_factory):
    return two_versions(tmp_path_factory.mktemp("observed") / "registry")


def configured(**settings):
    """The log of this process, until the test ends."""
    Observability(**settings).configure()


# Logs


def test_json_is_one_object_a_line_whatever_the_message_holds(capsys):
    configured(log_format="json")
    logging.getLogger("flserving").warning('two\nlines and "quotes" of %s', "ü")
    logging.getLogger("asyncio").error("another's")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == (
        "warning",
        "flserving",
        'two\nlines and "quotes" of ü',
    )
    assert second["logger"] == "asyncio" and re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", second["time"]
    )


@pytest.mark.parametrize(
    ("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_the_level_is_the_least_that_is_shown(capsys, level, shown):
    configured(log_level="debug")
    configured(log_level=level)  # replaces the first: no line comes twice
    for say in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("flserving"), say)(say)
    assert len(capsys.readouterr().err.splitlines()) == shown


@pytest.mark.parametrize(("wrong", "says"), [
    ({"log_level": "loud"}, "log_level is 'loud': choose one of debug, info"),
    ({"log_format": "xml"}, "log_format is 'xml': choose one of text, json"),
    ({"otel": "localhost:4318"}, "give the collector's URL, such as http://localhost:4318"),
])  # fmt: skip
def test_a_wrong_setting_says_what_to_give(wrong, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        Observability(**wrong)


def test_an_error_at_the_start_is_json_too(capsys, tmp_path):
    assert (
        cli.main(["serve", "--registry", str(tmp_path), "--workers", "0", "--log-format", "json"])
        == 1
    )
    said = json.loads(capsys.readouterr().err)
    assert said["level"] == "error" and said["message"].startswith("workers is 0")


# The access log


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_access_log_holds_nothing_that_a_caller_sent(capsys, scheme):
    """Neither features nor tokens, nor who asks, nor a path: a stranger could write any text into
    that."""
    configured(log_format="json")
    secret = 271828.1828
    with serving(Tagged()) as server, flserving.serve(server) as endpoint:
        Observability(access_log=True).observe(server)
        url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"
        with Client(url, endpoint.token) as client:
            client.predict(row(secret))
            with pytest.raises(InvalidInputError):
                client.predict([[secret]])
        with Client(url, "token-of-somebody") as client, pytest.raises(UnauthorizedError):
            client.predict(row(secret))
        httpx.get(f"{endpoint.url}/v2/models/name-of-a-client/stats", headers=endpoint.headers)
        httpx.get(f"{endpoint.url}/sent-by-a-stranger?token=query-of-a-stranger")
    log = capsys.readouterr().err
    for sent in (
        "271828",
        endpoint.token,
        "somebody",
        "name-of-a-client",
        "stranger",
        "127.0.0.1",
        "Bearer",
    ):
        assert sent not in log
    lines = [json.loads(line) for line in log.splitlines()]
    infer = [
        line
        for line in lines
        if line["route"].endswith("/infer") or line["method"].endswith("/ModelInfer")
    ]
    ok, bad = ("200", "400") if scheme == "http" else ("OK", "INVALID_ARGUMENT")
    assert [str(line["status"]) for line in infer] == [ok, bad]
    assert all(line["duration_ms"] > 0 and line["logger"] == "flserving.access" for line in lines)
    assert (
        lines[-2]["route"] == "/v2/models/{model}/stats"
        and lines[-1]["route"] == ""
        and lines[-1]["status"] == 404
    )


def test_nothing_is_logged_of_calls_unless_asked(capsys):
    configured(log_level="debug")
    with serving(Tagged()) as server, flserving.serve(server) as endpoint:
        Observability().observe(server)
        with Client(endpoint.url, endpoint.token) as client:
            client.predict(row(1.0))
        assert not server.telemetry.watchers
    assert capsys.readouterr().err == ""


def test_workers_and_their_supervisor_log_in_json(registry_root):
    with running(
        registry_root, "--workers", 2, "--access-log", FLSERVING_LOG_FORMAT="json"
    ) as served:
        with served.client(0) as client:
            client.predict(X)
        victim, _ = served.workers()
        victim.kill()
        wait_until(lambda: len(set(served.workers()) - {victim}) == 2)
        served.end()
    lines = [json.loads(line) for line in served.stderr.splitlines()]
    (ended,) = (line for line in lines if "ended by signal 9" in line["message"])
    assert ended["level"] == "warning"
    assert {line["pid"] for line in lines if line["logger"] == "flserving.access"} - {ended["pid"]}


# Spans at a collector


@pytest.fixture
def collector():
    """A collector of OTLP over HTTP in this process: what came to it, as (path, headers,
    request)."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    came = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            came.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.came = came
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def spans_at(collector):
    """Span -> attributes of its resource, of all that came."""
    return [
        (span, {each.key: each.value for each in group.resource.attributes})
        for _, _, request in collector.came
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


@pytest.mark.parametrize("by", ["option", "variable"])
def test_the_spans_of_a_worker_reach_the_collector(registry_root, collector, by):
    """Also the last ones, though the worker ends at once; and a caller's trace goes on in them."""
    environment = {
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=digits,deployment.environment.name=test"
    }
    options = ["--otel", collector.url]
    if by == "variable":
        options = []
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
    with running(registry_root, *options, **environment) as served:
        answer = httpx.get(
            f"{served.url}/v2/health/ready", headers={"traceparent": PARENT}, trust_env=False
        )  # fmt: skip
        with served.client(0) as client:
            client.predict(X)
        (worker,) = served.workers()
        pid = worker.pid
        assert served.end() == 0 and served.stderr == ""
    assert answer.status_code == 200 and {path for path, _, _ in collector.came} == {"/v1/traces"}
    spans = {span.name: (span, resource) for span, resource in spans_at(collector)}
    ready, resource = spans["GET /v2/health/ready"]
    assert (ready.trace_id.hex(), ready.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert ready.kind == ready.SPAN_KIND_SERVER
    assert (
        resource["service.name"].string_value == "digits"
        and resource["process.pid"].int_value == pid
    )
    assert resource["deployment.environment.name"].string_value == "test"
    infer, predict = spans["POST /v2/models/{model}/infer"][0], spans["predict"][0]
    assert (
        predict.parent_span_id == infer.span_id
        and spans["infer"][0].parent_span_id == predict.span_id
    )
    assert infer.start_time_unix_nano <= predict.start_time_unix_nano < infer.end_time_unix_nano


def test_the_service_has_a_name_where_nobody_gives_one(collector):
    with serving(Tagged()) as server:
        end = Observability(otel=collector.url).observe(server)
        server.predict(row(1.0))
        end()
    (resource,) = {
        id(group): group for _, _, request in collector.came for group in request.resource_spans
    }.values()
    named = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (named["service.name"], named["service.version"]) == ("flserving", flserving.__version__)


def test_a_collector_that_is_silent_does_not_hold_up_the_end(registry_root):
    silent = socket.create_server(("127.0.0.1", 0))  # connections wait, and nobody answers
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with silent, running(registry_root, "--otel", url) as served:
        with served.client(0) as client:
            client.predict(X)
        assert served.end() == 0, "no worker had to be killed"


def test_without_the_extra_the_option_is_refused_and_the_variable_only_noted(monkeypatch, capsys):
    """OTEL_EXPORTER_OTLP_ENDPOINT may be set for every program of a machine."""
    configured()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with serving(Tagged()) as server:
        with pytest.raises(
            flserving.FlservingError, match=re.escape('pip install "flserving[otel]"')
        ):
            Observability(otel="http://localhost:4318").observe(server)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
        Observability().observe(server)()
    assert "no spans are sent: opentelemetry" in capsys.readouterr().err
