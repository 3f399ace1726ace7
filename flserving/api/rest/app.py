"""The REST protocol: the Open Inference Protocol V2 as an ASGI application.

The way to infer is written against ASGI itself: a framework's request and response objects would
cost as much as the answer. Every other route is starlette's. All share one guard, one credential
check, one place that turns an error into ``{"error": "..."}``.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2, Answer, Call, unnamed
from flserving.api.options import ApiOptions
from flserving.api.rest.artifacts import Artifacts
from flserving.api.rest.codec import ParsedRequest, read_infer, read_json, write_infer
from flserving.api.rest.http1 import GONE
from flserving.api.rest.middleware import PREFLIGHT, Guard, Headers, deflated, read_body
from flserving.api.rest.openapi import (
    OPERATIONS,
    FeedbackRequest,
    IndexRequest,
    Operation,
    RepositoryRequest,
    document,
    page,
)
from flserving.errors import (
    REASON,
    FlservingError,
    ForbiddenError,
    InvalidInputError,
    NotSupportedError,
)
from flserving.monitoring.telemetry import Exchange, Refusals

_log = logging.getLogger("flserving.api")
Header = tuple[bytes, bytes]
_JSON = (b"content-type", b"application/json")
_EXCHANGE = "flserving.exchange"  # in the scope of a call that somebody traces or logs
_BYTES = (b"content-type", b"application/octet-stream")
_EXTRA = {
    401: (b"www-authenticate", b"Bearer"),
    429: (b"retry-after", b"1"),
    503: (b"retry-after", b"1"),
}


class RestApp:
    """The ASGI application of one server. ``v2.origins`` stays live: an origin added there may call
    from then on.

    Attributes:
        token: The random one of :func:`flserving.asgi`; None where the options brought their own
            credentials.
    """

    def __init__(self, v2: V2, options: ApiOptions, token: str | None = None) -> None:
        self.token = token
        self._v2 = v2
        self._options = options
        self._tokens = options.tokens or Tokens()
        self._telemetry = v2.server.telemetry
        self._refusals = Refusals(v2.server.telemetry, "rest")
        v2.origins.update(options.origins)
        self._guard = Guard(options, v2.origins)
        self._artifacts = Artifacts(v2.server, options.artifacts)
        routes = [
            self._route_of(operation) for operation in OPERATIONS if operation.name != "infer"
        ]
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
        elif self._telemetry.watchers:
            await self._watched(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call that somebody traces or logs."""
        exchange = Exchange(
            protocol="rest",
            method=scope["method"],
            headers=scope["headers"],
            scheme=scope.get("scheme", "http"),
            path=_sent_path(scope),
        )

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            await send(message)

        with self._telemetry.watched(exchange):
            await self._answer({**scope, _EXCHANGE: exchange}, receive, noted)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._refusals:
                headers = self._guard.headers(scope)
                if b"origin" in headers:
                    send = self._guard.cors(scope, headers, send)
            await self._route(scope, headers, receive, send)
        except asyncio.CancelledError as error:
            if error.args != (GONE,):
                raise
        except ConnectionResetError:
            pass
        except Exception as error:
            await self._refuse(error, send)

    async def _route(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if method == "OPTIONS" and {b"origin", b"access-control-request-method"} <= headers.keys():
            await _respond(send, 204, PREFLIGHT, b"")
            return
        path = _sent_path(scope)
        prefix = scope.get("root_path", "")
        # an application around this one: as many parts of the path are ours as stand behind the
        # prefix
        if prefix:
            parts = scope["path"].removeprefix(prefix).count("/")
            path = "/".join(["", *path.rsplit("/", parts)[1:]])
        if path.endswith("/infer"):
            match path.split("/"):
                case "", "v2", "models", model, "infer" if model:
                    _found(scope, "/v2/models/{model}/infer")
                    return await self._infer(method, model, None, headers, receive, send)
                case "", "v2", "models", model, "versions", version, "infer" if model and version:
                    _found(scope, "/v2/models/{model}/versions/{version}/infer")
                    return await self._infer(method, model, version, headers, receive, send)
        # the path as it was sent: a name with a percent sign is no name of a model
        ours = {
            "app": self,
            "path": path,
            "root_path": "",
            "path_params": {},
            "state": {"prefix": prefix},
        }
        await self._router({**scope, **ours}, receive, send)

    async def _infer(
        self,
        method: str,
        model: str,
        version: str | None,
        headers: Headers,
        receive: Receive,
        send: Send,
    ) -> None:
        if method != "POST":
            raise HTTPException(405, headers={"allow": "POST"})
        with self._refusals:
            who = self._tokens.check(headers.get(b"authorization"), Role.INFER)
            body = await read_body(headers, receive, self._options.max_body_bytes)
            started_s = time.perf_counter()
            json_bytes = _json_bytes(headers.get(b"inference-header-content-length"))
            request = read_infer(body, json_bytes, self._options.max_numbers)
            parse_s = time.perf_counter() - started_s
        call = Call(
            model=model,
            version=version,
            inputs=request.inputs,
            outputs=request.outputs,
            parameters=request.parameters,
            who=who,
        )
        answer = await self._v2.infer(call)
        answered_s = time.perf_counter()
        with self._refusals:
            reply, content = await self._serialise(answer, request, headers.get(b"accept-encoding"))
        serialise_s = time.perf_counter() - answered_s
        self._telemetry.codec("rest", parse_s, serialise_s)
        if request.parameters.get("stages"):
            reply.append((b"server-timing", _timing(parse_s, serialise_s, answer.parameters)))
        await _respond(send, 200, reply, content)

    async def _serialise(
        self, answer: Answer, request: ParsedRequest, accept_encoding: bytes | None
    ) -> tuple[list[Header], bytes]:
        """Headers and body of an answer."""
        content, json_bytes = write_infer(
            answer.model,
            answer.version,
            answer.outputs,
            answer.parameters,
            request,
            self._options.max_numbers,
        )
        headers = [_JSON]
        if json_bytes is not None:
            headers = [_BYTES, (b"inference-header-content-length", b"%d" % json_bytes)]
        if accept_encoding is not None:
            encoding, content = await deflated(accept_encoding, content)
            if encoding is not None:
                headers.append((b"content-encoding", encoding))
        headers.append(_length(content))
        return headers, content

    async def _refuse(self, error: Exception, send: Send) -> None:
        """The one place where an error becomes an answer."""
        headers: list[Header] = []
        if isinstance(error, FlservingError):
            status = error.http_status
            text = str(error) or error.reason
            headers.append((REASON.encode(), error.reason.encode()))
        elif isinstance(error, HTTPException):
            status = error.status_code
            text = f"{error.detail}: GET /docs shows the routes"
            for name, value in (error.headers or {}).items():
                headers.append((name.lower().encode(), value.encode()))
        else:  # its message may hold what the caller sent: only where it happened is logged
            status = 500
            text = "internal error"
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("a request failed with %s at\n%s", type(error).__name__, where)
        if status in _EXTRA:
            headers.append(_EXTRA[status])
        body = orjson.dumps({"error": text.encode(errors="replace").decode()})
        await _respond(send, status, [_JSON, _length(body), *headers], body)

    # The other routes

    def _route_of(self, operation: Operation) -> Route:
        """The route of an operation: answered here, by the artifacts, or else by the method of V2
        of that name."""
        name = operation.name
        artifact = getattr(self._artifacts, name, None)
        answer: Callable[[Request], Awaitable[Any]] = (
            getattr(self, f"_{name}", None) or artifact or partial(_call, self._v2, name)
        )

        async def endpoint(request: Request) -> Response:
            _found(request.scope, operation.path)
            if operation.role is not None:
                with self._refusals:
                    who = request.state.who = self._tokens.check(
                        request.headers.get("authorization"), operation.role
                    )
                    shown = self._v2.policy(who).name
                    if artifact is not None and shown != "full":
                        raise ForbiddenError(
                            f"this credential is shown {shown}, and the weights would tell all: ask for one with "
                            '"outputs": "full"'
                        )
            content = await answer(request)
            if isinstance(content, Response):
                return content
            return Response(orjson.dumps(content), media_type="application/json")

        return Route(operation.path, endpoint, methods=[operation.method], name=name)

    async def _body(
        self, request: Request, kind: type[msgspec.Struct], required: bool = False
    ) -> Any:
        headers = dict(request.scope["headers"])
        body = await read_body(headers, request.receive, self._options.max_body_bytes)
        if not (body or required):
            return kind()
        return read_json(body, kind, self._options.max_numbers)

    async def _live(self, request: Request) -> Any:
        return {"live": True}  # whoever can ask gets an answer: nothing here blocks

    async def _ready(self, request: Request) -> Any:
        if not self._v2.ready():
            return _unready(live=True, ready=False)
        return {"live": True, "ready": True}

    async def _model_ready(self, request: Request) -> Any:
        try:
            ready = await _call(self._v2, "model_ready", request)
        except FlservingError as error:
            authorization = request.headers.get("authorization")
            if self._tokens.allow(authorization, Role.READ):
                raise
            raise unnamed(error) from None
        name = request.path_params["model"]
        if not ready:
            return _unready(name=name, ready=False)
        return {"name": name, "ready": True}

    async def _index(self, request: Request) -> Any:
        wanted = await self._body(request, IndexRequest)
        return await asyncio.to_thread(self._v2.index, wanted.ready)

    async def _load(self, request: Request) -> Any:
        sent = await self._body(request, RepositoryRequest)
        if any(name == "config" or name.startswith("file:") for name in sent.parameters or ()):
            raise NotSupportedError(
                "a model's files and configuration come from its registry: publish it there"
            )
        model = request.path_params["model"]
        await self._v2.load(model)
        return {"name": model, "load": True}

    async def _unload(self, request: Request) -> Any:
        await self._body(request, RepositoryRequest)
        model = request.path_params["model"]
        await self._v2.unload(model)
        return {"name": model, "unload": True}

    async def _feedback(self, request: Request) -> Any:
        sent = await self._body(request, FeedbackRequest, required=True)
        client = request.state.who.client
        with self._refusals:
            await self._v2.feedback(request.path_params["model"], sent.receipt, sent.reward, client)
        return {"counted": True}

    async def _metrics(self, request: Request) -> Any:
        # prometheus-client is loaded when somebody asks
        from flserving.monitoring.prometheus import exposition

        accept = request.headers.get("accept", "")
        content, media_type = await asyncio.to_thread(
            lambda: exposition(self._v2.server, accept, self._v2.others())
        )
        return Response(content, media_type=media_type)

    async def _document(self, request: Request) -> Any:
        return Response(document(request.state.prefix), media_type="application/json")

    async def _page(self, request: Request) -> Any:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(page(request.state.prefix), headers=policy, media_type="text/html")


async def _call(v2: V2, name: str, request: Request) -> Any:
    """What ``v2`` answers of the model and version of the path. In a thread: it may be on the
    disk."""
    method = getattr(v2, name)
    if name in ("model_metadata", "model_config"):
        method = partial(method, request.state.who)
    return await asyncio.to_thread(method, **request.path_params)


def _found(scope: Scope, route: str) -> None:
    if _EXCHANGE in scope:
        scope[_EXCHANGE].route = route


def _sent_path(scope: Scope) -> str:
    """The path as the caller wrote it, nothing of it decoded."""
    sent: bytes = scope.get("raw_path") or scope["path"].encode()
    return sent.partition(b"?")[0].decode("latin-1")


async def _respond(send: Send, status: int, headers: list[Header], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _json_bytes(header: bytes | None) -> int | None:
    if header is None:
        return None
    if not (header.isdigit() and len(header) < 16):
        raise InvalidInputError(
            f"Inference-Header-Content-Length is {header[:32].decode('latin-1')!r}: send a length"
        )
    return int(header)


def _length(body: bytes) -> Header:
    return b"content-length", b"%d" % len(body)


def _timing(parse_s: float, serialise_s: float, parameters: dict[str, Any]) -> bytes:
    """Where the time went, in ms, as browsers show it beside a request."""
    stages = {name[6:-3]: us / 1e3 for name, us in parameters.items() if name.startswith("stage_")}
    spans = {"parse": parse_s * 1e3, **stages, "serialise": serialise_s * 1e3}
    return ", ".join(f"{name};dur={ms:.3f}" for name, ms in spans.items()).encode()


def _unready(**state: Any) -> Response:
    body = {"error": "not ready: try again later", **state}
    return Response(orjson.dumps(body), 503, {"retry-after": "1"}, "application/json")
