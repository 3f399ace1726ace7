"""OpenTelemetry spans: one a call, in it one a request, and in it one for each stage. Needs the
extra ``otel``; costs nothing until used.

The spans of requests and stages are made of the marks that time a request anyway, after its end, so
tracing cannot change what it measures. A call continues the trace that its W3C ``traceparent``
header names. Where an instrumentation of the web server (``opentelemetry-instrumentation-asgi``,
``-grpc``) has made a span already, that is the call's. Names and attributes of calls are
OpenTelemetry's semantic conventions for HTTP and RPC servers. No span holds features, answers,
tokens or the names of clients.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from threading import Thread
from typing import Any

from opentelemetry import propagate
from opentelemetry.trace import (
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    get_current_span,
    get_tracer,
    set_span_in_context,
)

from flserving.extras import of_extra
from flserving.monitoring import Observed
from flserving.monitoring.metrics import STAGES
from flserving.monitoring.telemetry import Exchange

# methods that have a name of their own; all others are _OTHER
_METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
_SERVER_FAULTS = {
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
}
_FLUSH_S = 1.0  # a collector that is silent must not hold up the end


def trace(server: Observed, tracer_provider: TracerProvider | None = None) -> None:
    """Make spans of every call from now on, with the global provider when none is given. Replaces
    an earlier one.

    Attributes of a request: ``flserving.model``, ``flserving.version`` (both absent where no served
    one was named), ``flserving.rows``, and ``error.type`` of a failed one.
    """
    tracer = get_tracer("flserving", tracer_provider=tracer_provider)

    def tell(version: str, rows: int, marks_s: tuple[float, ...], reason: str) -> None:
        to_unix_ns = time.time_ns() - int(server._clock() * 1e9)
        marks_ns = [int(mark_s * 1e9) + to_unix_ns for mark_s in marks_s]
        span = tracer.start_span("predict", start_time=marks_ns[0])
        if span.is_recording():
            if version:
                model, _, number = version.partition("/")
                span.set_attributes({"flserving.model": model, "flserving.version": number})
            if reason:
                span.set_attribute("error.type", reason)
                span.set_status(Status(StatusCode.ERROR, reason))
            else:
                span.set_attribute("flserving.rows", rows)
                inside = set_span_in_context(span)
                for stage, (began_ns, ended_ns) in zip(STAGES, pairwise(marks_ns), strict=True):
                    if ended_ns > began_ns:  # else it was not entered
                        tracer.start_span(stage, inside, start_time=began_ns).end(ended_ns)
        span.end(marks_ns[-1])

    @contextmanager
    def watch(exchange: Exchange) -> Iterator[None]:
        if get_current_span().get_span_context().is_valid:
            yield
            return
        caller = propagate.extract({_text(name): _text(value) for name, value in exchange.headers})
        name, attributes = _opening(exchange)
        with tracer.start_as_current_span(
            name,
            caller,
            kind=SpanKind.SERVER,
            attributes=attributes,
            # its message may hold what the caller sent
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            exchange.trace_id = f"{span.get_span_context().trace_id:032x}"
            try:
                yield
            finally:
                name, attributes, failed = _closing(exchange, name)
                span.update_name(name)
                span.set_attributes(attributes)
                if failed:
                    span.set_status(StatusCode.ERROR)

    server.telemetry.observer = tell
    server.telemetry.watchers["trace"] = watch


def _opening(exchange: Exchange) -> tuple[str, dict[str, Any]]:
    """What is known of a call when it comes: the name of its span, and attributes, by which
    samplers may choose."""
    if exchange.protocol == "grpc":
        return exchange.method, {"rpc.system.name": "grpc", "rpc.method": exchange.method}
    method = exchange.method if exchange.method in _METHODS else "_OTHER"
    attributes = {
        "http.request.method": method,
        "url.scheme": exchange.scheme,
        "url.path": exchange.path,
    }
    return method if method in _METHODS else "HTTP", attributes


def _closing(exchange: Exchange, name: str) -> tuple[str, dict[str, Any], bool]:
    """What is known at its end: the name, more attributes, and whether the server is at fault."""
    attributes: dict[str, Any] = {}
    failed = False
    if exchange.route:
        attributes["http.route"] = exchange.route
        name = f"{name} {exchange.route}"
    if exchange.protocol == "grpc":
        attributes["rpc.response.status_code"] = exchange.status
        failed = exchange.status in _SERVER_FAULTS
    elif exchange.status:  # else its caller has left
        attributes["http.response.status_code"] = exchange.status
        failed = int(exchange.status) >= 500
    if failed:
        attributes["error.type"] = str(exchange.status)
    return name, attributes, failed


def _text(part: str | bytes) -> str:
    return part.decode("latin-1") if isinstance(part, bytes) else part


def export(server: Observed, url: str | None = None) -> Callable[[], None]:
    """Send the spans of a server to an OpenTelemetry collector, by OTLP over HTTP, from a thread of
    this process.

    Args:
        url: Of the collector; None: what the variables of OpenTelemetry say. They also set the
            sampler, the headers and the attributes of the resource; its ``service.name`` is
            ``flserving`` unless they name another.

    Returns:
        What sends the last spans and ends the thread.

    Raises:
        NotSupportedError: The extra ``otel`` is not installed.
    """
    with of_extra("otel"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import resources
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours: dict[str, Any] = {
        "service.name": "flserving",
        "service.version": version("flserving"),
        "process.pid": os.getpid(),
    }
    resource = resources.Resource.create(ours).merge(resources.OTELResourceDetector().detect())
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    endpoint = None if url is None else f"{url.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace(server, provider)

    def end() -> None:
        ending = Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(_FLUSH_S)

    return end
