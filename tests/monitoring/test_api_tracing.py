"""Spans against the SDK's own exporter: stages inside their request, traces that go on, nothing
when not asked."""

import asyncio
import itertools

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import flserving
from flserving.api.auth import Tokens
from flserving.api.client import Client
from flserving.api.dataplane import V2
from flserving.api.options import ApiOptions
from flserving.api.rest.app import RestApp
from flserving.errors import InvalidInputError, NotFoundError, UnauthorizedError
from flserving.monitoring.metrics import STAGES
from flserving.monitoring.tracing import trace
from rest_door import text
from serving_models import Tagged, row, serving

INFER = "/v2/models/local/infer"
ROUTE = "/v2/models/{model}/infer"
METHOD = "inference.GRPCInferenceService/ModelInfer"
PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def by_parent(exporter):
    """Request span -> its stages, in order of their start."""
    spans = exporter.get_finished_spans()
    requests = [span for span in spans if span.name == "predict"]
    inside = {
        request.context.span_id: sorted(
            (
                span
                for span in spans
                if span.parent and span.parent.span_id == request.context.span_id
            ),
            key=lambda span: span.start_time,
        )
        for request in requests
    }
    calls = [span for span in spans if span.kind is otel.SpanKind.SERVER]
    assert len(spans) == len(calls) + len(requests) + sum(map(len, inside.values())), (
        "a span without its request"
    )
    return requests, inside


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20], ids=["no-cache", "cache"])
def test_the_stages_tile_their_request(exporter, provider, cache_bytes):
    with serving(Tagged(), prediction_cache_bytes=cache_bytes) as server:
        server.predict(row(0.0))
        trace(server, provider)
        answer = server.predict(row(1.0), stages=True)
        again = server.predict(row(1.0), stages=True)
    requests, inside = by_parent(exporter)
    assert len(requests) == 2, "what came before is not traced"
    for request, told in zip(requests, (answer, again), strict=True):
        stages = inside[request.context.span_id]
        assert [span.name for span in stages] == [
            name for name in STAGES if told["stages_ms"][name] > 0
        ]
        assert (stages[0].start_time, stages[-1].end_time) == (request.start_time, request.end_time)
        assert all(
            before.end_time == after.start_time for before, after in itertools.pairwise(stages)
        )
        assert (request.end_time - request.start_time) / 1e6 == pytest.approx(
            told["latency_ms"], abs=1e-3
        )
        assert dict(request.attributes) == {
            "flserving.model": "local", "flserving.version": "v1.0", "flserving.rows": 1
        }  # fmt: skip
    assert ("infer" in {span.name for span in inside[requests[1].context.span_id]}) is (
        cache_bytes == 0
    )


def test_a_failed_request_is_an_error_with_its_reason_and_no_stage(exporter, provider):
    with serving(Tagged()) as server:
        trace(server, provider)
        with pytest.raises(InvalidInputError):
            server.predict([[1.0, 2.0, 3.0]])
        with pytest.raises(NotFoundError):
            server.predict(row(1.0), model="somebody-elses-name")
    requests, inside = by_parent(exporter)
    assert not any(inside.values())
    known, unknown = (dict(request.attributes) for request in requests)
    assert known == {
        "flserving.model": "local",
        "flserving.version": "v1.0",
        "error.type": "InvalidInput",
    }
    assert unknown == {"error.type": "NotFound"}
    assert all(
        not request.status.is_ok and request.end_time > request.start_time for request in requests
    )


def test_concurrent_requests_continue_the_traces_of_their_callers(exporter, provider):
    tracer = otel.get_tracer("test", tracer_provider=provider)
    callers = {}

    async def call(server, number):
        with tracer.start_as_current_span(f"caller-{number}") as caller:
            callers[number] = caller.get_span_context()
            await asyncio.sleep(0)
            await server.apredict(row(number))

    async def crowd(server):
        await asyncio.gather(*(call(server, number) for number in range(20)))

    with serving(Tagged()) as server:
        trace(server, provider)
        asyncio.run(crowd(server))
    parents = {span.parent.span_id: span.context.trace_id for span in exporter.get_finished_spans()
               if span.name == "predict"}  # fmt: skip
    assert parents == {caller.span_id: caller.trace_id for caller in callers.values()}


def ids(span):
    return f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}"


def calls_of(exporter, name=""):
    """The spans of calls whose names end in ``name``, in order of their end."""
    spans = [span for span in exporter.get_finished_spans() if span.kind is otel.SpanKind.SERVER]
    return [span for span in spans if span.name.endswith(name)]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_w3c_header_names_the_parent_over_the_network(exporter, provider, scheme):
    with serving(Tagged()) as server, flserving.serve(server) as endpoint:
        url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"
        trace(server, provider)
        for parent in (PARENT, {}, {"traceparent": "nonsense"}):
            with Client(url, endpoint.token) as client:
                client._codec._headers |= parent
                client.predict(row(1.0))
    first, *others = calls_of(exporter, ROUTE if scheme == "http" else METHOD)
    assert ids(first) == tuple(PARENT["traceparent"].split("-")[1:3])
    assert len(others) == 2 and all(call.parent is None for call in others)
    requests = by_parent(exporter)[0]
    assert [request.parent.span_id for request in requests] == [
        call.context.span_id for call in (first, *others)
    ]


def test_a_call_of_rest_has_the_names_of_the_conventions_for_http_servers(exporter, provider):
    """https://opentelemetry.io/docs/specs/semconv/http/http-spans/: the name is method and route;
    only 5xx are the server's fault; an unknown path has no route, and its name no end."""
    body = text(row(1.0))
    with serving(Tagged()) as server, flserving.serve(server) as endpoint:
        trace(server, provider)
        with httpx.Client(base_url=endpoint.url, headers=endpoint.headers) as http:
            http.post(f"{INFER}?secret=1", content=body)
            http.get("/v2/models/nobody/stats")
            http.post(INFER, content=body, headers={"authorization": "Bearer wrong"})
            http.request("PROPFIND", "/somewhere")
            server.close()
            http.post(INFER, content=body)
    common = {"url.scheme": "http", "url.path": INFER}
    assert [(span.name, dict(span.attributes), span.status.is_ok) for span in calls_of(exporter)] == [
        (f"POST {ROUTE}", {"http.request.method": "POST", **common, "http.route": ROUTE,
                           "http.response.status_code": 200}, True),
        ("GET /v2/models/{model}/stats", {"http.request.method": "GET", "url.scheme": "http",
                                          "url.path": "/v2/models/nobody/stats",
                                          "http.route": "/v2/models/{model}/stats",
                                          "http.response.status_code": 404}, True),
        (f"POST {ROUTE}", {"http.request.method": "POST", **common, "http.route": ROUTE,
                           "http.response.status_code": 401}, True),
        ("HTTP", {"http.request.method": "_OTHER", "url.scheme": "http", "url.path": "/somewhere",
                  "http.response.status_code": 404}, True),
        (f"POST {ROUTE}", {"http.request.method": "POST", **common, "http.route": ROUTE,
                           "http.response.status_code": 503, "error.type": "503"}, False),
    ]  # fmt: skip


def test_a_call_of_grpc_has_the_names_of_the_conventions_for_rpc_servers(exporter, provider):
    """https://opentelemetry.io/docs/specs/semconv/rpc/grpc/: of the codes that are not OK, six are
    the server's fault."""
    with serving(Tagged()) as server, flserving.serve(server) as endpoint:
        trace(server, provider)
        with Client(f"grpc://{endpoint.grpc_url}", endpoint.token) as client:
            client.predict(row(1.0))
            with pytest.raises(NotFoundError):
                client.predict(row(1.0), version="77")
        with (
            Client(f"grpc://{endpoint.grpc_url}", "wrong") as client,
            pytest.raises(UnauthorizedError),
        ):
            client.predict(row(1.0))
    assert [dict(span.attributes) for span in calls_of(exporter, METHOD)] == [
        {"rpc.system.name": "grpc", "rpc.method": METHOD, "rpc.response.status_code": code}
        for code in ("OK", "NOT_FOUND")
    ]
    calls = calls_of(exporter)
    assert calls[-1].attributes["rpc.response.status_code"] == "UNAUTHENTICATED"
    assert all(span.status.is_ok and not span.events for span in calls), (
        "no exception's text: it may hold the input"
    )


async def test_the_span_of_an_instrumented_web_server_stays_the_parent(exporter, provider):
    with serving(Tagged()) as server:
        trace(server, provider)
        app = RestApp(V2(server), ApiOptions(tokens=Tokens.open()))
        transport = httpx.ASGITransport(app)  # in the task, and so in the span, of who asks
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            with otel.get_tracer("test", tracer_provider=provider).start_as_current_span(
                "web server"
            ) as span:
                answer = await http.post(
                    "/v2/models/local/infer", content=text(row(1.0)), headers=PARENT
                )
    assert answer.status_code == 200
    (request,) = (one for one in exporter.get_finished_spans() if one.name == "predict")
    assert request.parent.span_id == span.get_span_context().span_id


def test_who_is_not_sampled_costs_no_stage_spans(exporter):
    provider = TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(Tagged()) as server:
        trace(server, provider)
        assert server.predict(row(1.0))["predictions"]
    provider.shutdown()
    assert not exporter.get_finished_spans()
