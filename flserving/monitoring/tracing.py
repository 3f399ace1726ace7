"""OpenTelemetry spans: one a request, and in it one for each stage. Needs the extra ``otel``; costs nothing until used.

The spans are made of the marks that time a request anyway, after its end, so tracing cannot change what it measures.
A request continues the trace whose context is current where it was called. Over the network that is the one which its
W3C ``traceparent`` header names, unless an instrumentation of the web server (``opentelemetry-instrumentation-asgi``,
``-grpc``) has made a span already. No span holds features, answers or tokens.
"""

import time
from collections.abc import Awaitable, Iterable
from itertools import pairwise
from typing import Any

from opentelemetry import context, propagate
from opentelemetry.trace import Status, StatusCode, TracerProvider, get_current_span, get_tracer, set_span_in_context

from flserving.monitoring import Observed
from flserving.monitoring.metrics import STAGES


def trace(server: Observed, tracer_provider: TracerProvider | None = None) -> None:
    """Make spans of every request from now on, with the global provider when none is given. Replaces an earlier one.

    Attributes: ``flserving.model``, ``flserving.version`` (both absent where no served one was named),
    ``flserving.rows``, and ``error.type`` of a failed request.
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

    server.telemetry.observer, server.telemetry.continued = tell, _continued


async def _continued(headers: Iterable[tuple[Any, Any]], answer: Awaitable[Any]) -> Any:
    """``await answer`` in the trace that the ``headers`` of REST, or the metadata of gRPC, come from."""
    if get_current_span().get_span_context().is_valid:
        return await answer
    token = context.attach(propagate.extract({_text(name): _text(value) for name, value in headers}))
    try:
        return await answer
    finally:
        context.detach(token)


def _text(part: str | bytes) -> str:
    return part.decode("latin-1") if isinstance(part, bytes) else part
