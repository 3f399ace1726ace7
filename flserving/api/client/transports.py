"""How a client's call travels: bytes to a path and back, over HTTP by httpcore or over gRPC, blocking or awaiting.

Every failure leaves here as :class:`Refused` around an error of the package's own tree.
"""

import contextlib
import json
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import anyio
import httpcore

from flserving.api.client.retries import Refused
from flserving.api.rest.codec import REASON
from flserving.errors import (
    BY_REASON,
    DeadlineExceededError,
    FlservingError,
    OverloadedError,
    ServerClosedError,
    TooLargeError,
)

MAX_ANSWER_NBYTES = 1 << 28
"""More than any answer has: whoever sends it is no server of predictions, or wants the caller's memory."""


class Sent(NamedTuple):
    """One call: a gRPC method or a REST route, its bytes and its headers; REST without a body is a GET."""

    path: str
    body: bytes | None
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


class Received(NamedTuple):
    """What came back."""

    body: bytes
    headers: Mapping[str, str] = {}


class Carrier(Protocol):
    """Blocking; the awaiting one has coroutines of the same names."""

    def send(self, call: Sent, timeout_s: float) -> Received: ...
    def close(self) -> None: ...


# A status stands for several classes: the first in the tree's order, where a server does not name the class itself.
# RESOURCE_EXHAUSTED without a name is what other servers say when they are busy.
_BY_STATUS = {kind.http_status: kind for kind in reversed(BY_REASON.values())}
_BY_CODE = {kind.grpc_code: kind for kind in reversed(BY_REASON.values())} | {"RESOURCE_EXHAUSTED": OverloadedError}


def _refusal(kind: type[FlservingError], text: str, headers: Mapping[str, str], again: bool = False) -> Refused:
    kind = BY_REASON.get(headers.get(REASON, ""), kind)
    try:
        after_s = max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return Refused(kind(text), again)
    return Refused(kind(text), again or kind.http_status in (429, 503), after_s)


def _unanswered(where: str, error: BaseException) -> Refused:
    """No answer came. To ask again is safe: a prediction changes nothing, feedback counts once."""
    return Refused(ServerClosedError(f"no answer from {where} ({type(error).__name__}: {error})"), again=True)


def _late(timeout_s: float) -> Refused:
    error = DeadlineExceededError(f"no answer in the {timeout_s * 1e3:.0f} ms left: raise timeout_ms")
    return Refused(error, again=False)


# REST


def _options(ca: bytes | None, secure: bool) -> dict[str, Any]:
    context = ssl.create_default_context(cadata=None if ca is None else ca.decode()) if secure else None
    # uvicorn closes a connection that was idle for 5 s: be sure to let go of it first
    return {"ssl_context": context, "max_connections": 100, "keepalive_expiry": 4.0}


def _request(base: str, call: Sent, timeout_s: float, wait: "_Patience | None" = None) -> dict[str, Any]:
    return {
        "method": "GET" if call.body is None else "POST",
        "url": base + call.path,
        "headers": call.headers,
        "content": call.body,
        "extensions": {"timeout": dict.fromkeys(("connect", "read", "write"), wait or timeout_s) | {"pool": timeout_s}},
    }


class _Body(bytearray):
    def add(self, chunk: bytes) -> None:
        self += chunk
        if len(self) > MAX_ANSWER_NBYTES:
            error = TooLargeError(f"the answer has more than {MAX_ANSWER_NBYTES:,} bytes: ask for fewer rows at once")
            raise Refused(error, again=False)


def _read(response: httpcore.Response, body: bytes) -> Received:
    headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in response.headers}
    if response.status == 200:
        return Received(body, headers)
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):  # another protocol's server, or a proxy
        text = f"status {response.status}"
    kind = _BY_STATUS.get(response.status, FlservingError)
    raise _refusal(kind, text, headers)


@contextlib.contextmanager
def _failures(where: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except (httpcore.TimeoutException, TimeoutError) as error:
        raise _late(timeout_s) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        raise _unanswered(where, error) from error


class _Patience:
    """A timeout of httpcore's, which bounds each wait, that bounds them all together too: else an answer that drips
    would hold a thread as long as it likes."""

    def __init__(self, wait_s: float, limit_s: float) -> None:
        self._wait_s, self._until_s = wait_s, time.monotonic() + limit_s

    def left_s(self) -> float:
        left_s = min(self._wait_s, self._until_s - time.monotonic())
        if left_s <= 0:
            raise httpcore.ReadTimeout
        return left_s


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: Any = None) -> bytes:
        return self._stream.read(max_bytes, timeout.left_s())

    def write(self, buffer: bytes, timeout: Any = None) -> None:
        self._stream.write(buffer, timeout.left_s())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: Any = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout.left_s()))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()


class _Backend(httpcore.SyncBackend):
    def connect_tcp(
        self, host: str, port: int, timeout: Any = None, *rest: Any, **named: Any
    ) -> httpcore.NetworkStream:
        return _Stream(super().connect_tcp(host, port, timeout.left_s(), *rest, **named))


class Rest:
    """REST, blocking. Connections are kept and shared between threads."""

    def __init__(self, base: str, ca: bytes | None) -> None:
        options = _options(ca, base.startswith("https"))
        self._base, self._pool = base, httpcore.ConnectionPool(network_backend=_Backend(), **options)

    def send(self, call: Sent, timeout_s: float) -> Received:
        with _failures(self._base, timeout_s):
            request, body = _request(self._base, call, timeout_s, _Patience(timeout_s, timeout_s)), _Body()
            with self._pool.stream(**request) as response:
                for chunk in response.iter_stream():
                    body.add(chunk)
            return _read(response, bytes(body))

    @contextlib.contextmanager
    def stream(self, call: Sent, timeout_s: float, limit_s: float) -> Iterator[httpcore.Response]:
        """An answer (200, 206, 416) whose body is still to be read. ``timeout_s`` bounds each wait, ``limit_s`` all."""
        request = _request(self._base, call, timeout_s, _Patience(timeout_s, limit_s))
        with _failures(self._base, timeout_s), self._pool.stream(**request) as response:
            if response.status not in (200, 206, 416):
                _read(response, b"".join(islice(response.iter_stream(), 4)))  # a message is short, whatever is sent
            yield response

    def close(self) -> None:
        self._pool.close()


class AsyncRest:
    """REST, awaiting."""

    def __init__(self, base: str, ca: bytes | None) -> None:
        self._base, self._pool = base, httpcore.AsyncConnectionPool(**_options(ca, base.startswith("https")))

    async def send(self, call: Sent, timeout_s: float) -> Received:
        with _failures(self._base, timeout_s):
            body = _Body()
            # not asyncio's: the pool closes idle connections in here, shielded from anyio's cancelling only
            with anyio.fail_after(timeout_s):
                async with self._pool.stream(**_request(self._base, call, timeout_s)) as response:
                    async for chunk in response.aiter_stream():
                        body.add(chunk)
                return _read(response, bytes(body))

    async def close(self) -> None:
        await self._pool.aclose()


# gRPC

_CHANNEL = {
    "grpc.enable_retries": 0,  # retries are ours: they know the budget
    "grpc.max_receive_message_length": MAX_ANSWER_NBYTES,
    "grpc.initial_reconnect_backoff_ms": 50,
    "grpc.min_reconnect_backoff_ms": 2000,  # in spite of its name, how long one attempt to connect may take
    "grpc.max_reconnect_backoff_ms": 1000,
}


def _channel(kind: Any, target: str, secure: bool, ca: bytes | None) -> Any:
    import grpc  # a client of REST does not load it

    if not secure:
        return kind.insecure_channel(target, list(_CHANNEL.items()))
    return kind.secure_channel(target, grpc.ssl_channel_credentials(ca), list(_CHANNEL.items()))


def _grpc_refusal(where: str, error: Any, timeout_s: float) -> Refused:
    code = error.code().name
    trailing: Iterable[tuple[str, Any]] = error.trailing_metadata() or ()
    headers = {name: value for name, value in trailing if isinstance(value, str)}
    if code == "DEADLINE_EXCEEDED" and REASON not in headers:
        return _late(timeout_s)
    if code == "CANCELLED":  # by a server that stops, in the moment in which the call came: it was not let in
        code = "UNAVAILABLE"
    text = error.details() or code
    too_large = "message larger than max" in text  # gRPC's own words
    kind = TooLargeError if too_large else _BY_CODE.get(code, FlservingError)
    return _refusal(kind, text if REASON in headers else f"{where}: {text}", headers, again=code == "UNAVAILABLE")


class Grpc:
    """gRPC, blocking: one connection, shared between threads."""

    def __init__(self, target: str, secure: bool, ca: bytes | None) -> None:
        import grpc

        self._target, self._error, self._channel = target, grpc.RpcError, _channel(grpc, target, secure, ca)

    def send(self, call: Sent, timeout_s: float) -> Received:
        method = self._channel.unary_unary(call.path, None, None)
        try:
            return Received(method(call.body, timeout=timeout_s, metadata=tuple(call.headers.items())))
        except self._error as error:
            raise _grpc_refusal(self._target, error, timeout_s) from error

    def close(self) -> None:
        self._channel.close()


class AsyncGrpc:
    """gRPC, awaiting."""

    def __init__(self, target: str, secure: bool, ca: bytes | None) -> None:
        import grpc.aio

        self._target, self._error = target, grpc.aio.AioRpcError
        self._channel = _channel(grpc.aio, target, secure, ca)

    async def send(self, call: Sent, timeout_s: float) -> Received:
        method = self._channel.unary_unary(call.path, None, None)
        try:
            return Received(await method(call.body, timeout=timeout_s, metadata=tuple(call.headers.items())))
        except self._error as error:
            raise _grpc_refusal(self._target, error, timeout_s) from error

    async def close(self) -> None:
        await self._channel.close()
