"""The REST door: the Open Inference Protocol V2 as an ASGI application.

The way to infer is written against ASGI itself: a framework's request and response objects would cost as much as the
answer. Every other route is starlette's. All share one guard, one credential check, one place that turns an error into
``{"error": "..."}``.
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
from starlette.types import Receive, Scope, Send

from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2, Call, unnamed
from flserving.api.options import ApiOptions
from flserving.api.rest.artifacts import Artifacts
from flserving.api.rest.codec import read_infer, read_json, write_infer
from flserving.api.rest.http1 import GONE
from flserving.api.rest.middleware import PREFLIGHT, Guard, deflated, read_body
from flserving.api.rest.openapi import OPERATIONS, FeedbackRequest, IndexRequest, RepositoryRequest, document, page
from flserving.errors import REASON, FlservingError, InvalidInputError, NotSupportedError
from flserving.monitoring.rejections import Refusals

_log = logging.getLogger("flserving.api")
_JSON, _BYTES = (b"content-type", b"application/json"), (b"content-type", b"application/octet-stream")
_EXTRA = {401: (b"www-authenticate", b"Bearer"), 429: (b"retry-after", b"1"), 503: (b"retry-after", b"1")}


class RestApp:
    """The ASGI application of one server. ``v2.origins`` stays live: an origin added there may call from then on."""

    def __init__(self, v2: V2, options: ApiOptions) -> None:
        self._v2, self._options = v2, options
        self._tokens, self._refusals = options.tokens or Tokens(), Refusals(v2.server.telemetry, "rest")
        v2.origins.update(options.origins)
        self._guard, self._artifacts = Guard(options, v2.origins), Artifacts(v2.server, options.artifacts)
        routes = [self._route(o.method, o.path, o.name, o.role) for o in OPERATIONS if o.name != "infer"]
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._router(scope, receive, send)
        try:
            with self._refusals:
                headers = self._guard.headers(scope)
                if b"origin" in headers:
                    send = self._guard.cors(scope, headers, send)
            if b"access-control-request-method" in headers and b"origin" in headers and scope["method"] == "OPTIONS":
                return await _answer(send, 204, PREFLIGHT, b"")
            path = (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0].decode("latin-1")
            if path.endswith("/infer"):
                match path.split("/"):
                    case "", "v2", "models", model, "infer" if model:
                        return await self._infer(scope["method"], model, None, headers, receive, send)
                    case "", "v2", "models", model, "versions", version, "infer" if model and version:
                        return await self._infer(scope["method"], model, version, headers, receive, send)
            scope["app"], scope["path"] = self, path  # as it was sent: a name with a percent sign is no name of a model
            await self._router(scope, receive, send)
        except asyncio.CancelledError as error:
            if error.args != (GONE,):
                raise
        except ConnectionResetError:
            pass
        except Exception as error:
            await self._refuse(error, send)

    async def _infer(
        self, method: str, model: str, version: str | None, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        if method != "POST":
            raise HTTPException(405, headers={"allow": "POST"})
        telemetry = self._v2.server.telemetry
        with self._refusals:
            who = self._tokens.check(headers.get(b"authorization"), Role.INFER)
            body = await read_body(headers, receive, self._options.max_body_bytes)
            started_s = time.perf_counter()
            json_bytes = _json_bytes(headers.get(b"inference-header-content-length"))
            asked = read_infer(body, json_bytes, self._options.max_numbers)
            parse_s = time.perf_counter() - started_s
            call = Call(model, version, asked.inputs, asked.outputs, asked.parameters, who.client, who.caller)
        continued, answering = telemetry.continued, self._v2.infer(call)
        answer = await (answering if continued is None else continued(headers.items(), answering))
        answered_s = time.perf_counter()
        with self._refusals:
            content, json_bytes = write_infer(
                answer.model, answer.version, answer.outputs, answer.parameters, asked, self._options.max_numbers
            )
            length = b"inference-header-content-length"
            reply = [_JSON] if json_bytes is None else [_BYTES, (length, b"%d" % json_bytes)]
            if b"accept-encoding" in headers:
                encoding, content = await deflated(headers[b"accept-encoding"], content)
                if encoding is not None:
                    reply.append((b"content-encoding", encoding))
            reply.append((b"content-length", b"%d" % len(content)))
        telemetry.door("rest", parse_s, serialise_s := time.perf_counter() - answered_s)
        if asked.parameters.get("stages"):
            reply.append((b"server-timing", _timing(parse_s, serialise_s, answer.parameters)))
        await _answer(send, 200, reply, content)

    async def _refuse(self, error: Exception, send: Send) -> None:
        """The one place where an error becomes an answer."""
        extra: list[tuple[bytes, bytes]] = []
        if isinstance(error, FlservingError):
            status, text = error.http_status, str(error) or error.reason
            extra = [(REASON.encode(), error.reason.encode())]
        elif isinstance(error, HTTPException):
            status, text = error.status_code, f"{error.detail}: GET /docs shows the routes"
            extra = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
        else:  # its message may hold what the caller sent: only where it happened is logged
            status, text = 500, "internal error"
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("a request failed with %s at\n%s", type(error).__name__, where)
        if status in _EXTRA:
            extra.append(_EXTRA[status])
        body = orjson.dumps({"error": text.encode(errors="replace").decode()})
        await _answer(send, status, [_JSON, (b"content-length", b"%d" % len(body)), *extra], body)

    # The other routes

    def _route(self, method: str, path: str, name: str, role: Role | None) -> Route:
        own = getattr(self, f"_{name}", None) or getattr(self._artifacts, name, None)
        answer: Callable[[Request], Awaitable[Any]] = own or partial(_ask, self._v2, name)

        async def endpoint(request: Request) -> Response:
            if role is not None:
                with self._refusals:
                    request.state.who = self._tokens.check(request.headers.get("authorization"), role)
            content = await answer(request)
            if isinstance(content, Response):
                return content
            return Response(orjson.dumps(content), media_type="application/json")

        return Route(path, endpoint, methods=[method], name=name)

    async def _body(self, request: Request, kind: type[msgspec.Struct], required: bool = False) -> Any:
        headers = dict(request.scope["headers"])
        body = await read_body(headers, request.receive, self._options.max_body_bytes)
        return read_json(body, kind, self._options.max_numbers) if body or required else kind()

    async def _live(self, request: Request) -> Any:
        return {"live": True}  # whoever can ask gets an answer: nothing here blocks

    async def _ready(self, request: Request) -> Any:
        return {"live": True, "ready": True} if self._v2.ready() else _unready(live=True, ready=False)

    async def _model_ready(self, request: Request) -> Any:
        try:
            ready = await _ask(self._v2, "model_ready", request)
        except FlservingError as error:
            authorization = request.headers.get("authorization")
            raise error if self._tokens.allow(authorization, Role.READ) else unnamed(error) from None
        name = request.path_params["model"]
        return {"name": name, "ready": True} if ready else _unready(name=name, ready=False)

    async def _index(self, request: Request) -> Any:
        wanted = await self._body(request, IndexRequest)
        return await asyncio.to_thread(self._v2.index, wanted.ready)

    async def _load(self, request: Request) -> Any:
        sent = await self._body(request, RepositoryRequest)
        if any(name == "config" or name.startswith("file:") for name in sent.parameters or ()):
            raise NotSupportedError("a model's files and configuration come from its registry: publish it there")
        await self._v2.load(request.path_params["model"])
        return {"name": request.path_params["model"], "load": True}

    async def _unload(self, request: Request) -> Any:
        await self._body(request, RepositoryRequest)
        await self._v2.unload(request.path_params["model"])
        return {"name": request.path_params["model"], "unload": True}

    async def _feedback(self, request: Request) -> Any:
        sent = await self._body(request, FeedbackRequest, required=True)
        client = request.state.who.client
        with self._refusals:
            await self._v2.feedback(request.path_params["model"], sent.receipt, sent.reward, client)
        return {"counted": True}

    async def _metrics(self, request: Request) -> Any:
        from flserving.monitoring.prometheus import exposition  # prometheus-client is loaded when somebody asks

        accept, others = request.headers.get("accept", ""), self._v2.others
        content, media_type = await asyncio.to_thread(lambda: exposition(self._v2.server, accept, others()))
        return Response(content, media_type=media_type)

    async def _document(self, request: Request) -> Any:
        return Response(document(), media_type="application/json")

    async def _page(self, request: Request) -> Any:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(page(), headers=policy, media_type="text/html")


async def _ask(v2: V2, name: str, request: Request) -> Any:
    """What ``v2`` says of the model and version of the path. In a thread: it may be on the disk."""
    return await asyncio.to_thread(getattr(v2, name), **request.path_params)


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _json_bytes(header: bytes | None) -> int | None:
    if header is not None and not (header.isdigit() and len(header) < 16):
        raise InvalidInputError(f"Inference-Header-Content-Length is {header[:32].decode('latin-1')!r}: send a length")
    return None if header is None else int(header)


def _timing(parse_s: float, serialise_s: float, parameters: dict[str, Any]) -> bytes:
    """Where the time went, in ms, as browsers show it beside a request."""
    stages = {name[6:-3]: us / 1e3 for name, us in parameters.items() if name.startswith("stage_")}
    spans = {"parse": parse_s * 1e3, **stages, "serialise": serialise_s * 1e3}
    return ", ".join(f"{name};dur={ms:.3f}" for name, ms in spans.items()).encode()


def _unready(**state: Any) -> Response:
    body = {"error": "not ready: try again later", **state}
    return Response(orjson.dumps(body), 503, {"retry-after": "1"}, "application/json")
