"""The methods of gRPC: the Open Inference Protocol V2, health, feedback, reflection; over the same
operations as REST.

They take and give bytes, so that a message which cannot be read is answered with INVALID_ARGUMENT
and a reason. They are registered as methods that read a stream, which looks the same on the wire:
so the credential in a call's headers is checked before its message is read, and the message has to
come in time.
"""

import asyncio
import contextlib
import logging
import math
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from flserving.api.auth import Identity, Role, Tokens
from flserving.api.dataplane import V2, Call, unnamed
from flserving.api.grpc import codec, reflection
from flserving.api.options import ApiOptions
from flserving.errors import (
    REASON,
    DeadlineExceededError,
    FlservingError,
    InvalidInputError,
    NotFoundError,
    NotSupportedError,
    OverloadedError,
    ServerClosedError,
)
from flserving.monitoring.telemetry import Exchange, Refusals

_LOG = logging.getLogger(__name__)
_LONGEST_DETAIL = 600  # characters of up to 12 bytes on the wire: clients refuse 8 KiB of trailers
_LONGEST_WAIT_S = 3600.0  # a deadline beyond the longest timeout is none
MOST_WATCHERS = 64  # they need no credential
# calls without a credential whose message is still to come: each may hold a message's size
MOST_STRANGERS = 4
_POLL_S = 0.1

_HealthRequest = codec.message("grpc.health.v1.HealthCheckRequest")
_HealthResponse = codec.message("grpc.health.v1.HealthCheckResponse")


class Service:
    """The methods of all services: bytes in, bytes out. Made in the event loop that serves them."""

    def __init__(self, v2: V2, options: ApiOptions) -> None:
        self._v2 = v2
        self._options = options
        self._tokens = options.tokens or Tokens()
        self._inside = 0
        self._watchers = 0
        self._strangers: list[asyncio.Timeout] = []  # the oldest first
        self._telemetry = v2.server.telemetry
        self._refusals = Refusals(v2.server.telemetry, "grpc")
        self.stopping = asyncio.Event()

    def methods(self) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
        """Handlers by service and method."""
        v2 = self._v2
        # method -> (least role, None: no credential is asked; its answer, by the names of the JSON
        # fields)
        plain: dict[str, tuple[Role | None, Callable[[Any, Any], Mapping[str, Any]]]] = {
            "ServerLive": (None, lambda r, who: {"live": True}),
            "ServerReady": (None, lambda r, who: {"ready": v2.ready()}),
            "ModelReady": (
                None,
                lambda r, who: {"ready": v2.model_ready(r.name, r.version or None)},
            ),
            "ServerMetadata": (Role.READ, lambda r, who: v2.server_metadata()),
            "ModelMetadata": (
                Role.READ,
                lambda r, who: v2.model_metadata(who, r.name, r.version or None),
            ),
            "ModelConfig": (
                Role.READ,
                lambda r, who: {"config": v2.model_config(who, r.name, r.version or None)},
            ),
            "ModelStatistics": (
                Role.READ,
                lambda r, who: v2.statistics(r.name or None, r.version or None),
            ),
            "RepositoryIndex": (
                Role.READ,
                lambda r, who: {"models": v2.index(_only_repository(r).ready)},
            ),
        }
        inference = {
            name: self._plain(name, role, answer) for name, (role, answer) in plain.items()
        }
        inference["ModelInfer"] = self._guarded(codec.SERVICE, "ModelInfer", self._infer)
        inference["RepositoryModelLoad"] = self._administer(
            "RepositoryModelLoad", v2.load, "isLoaded"
        )
        inference["RepositoryModelUnload"] = self._administer(
            "RepositoryModelUnload", v2.unload, "isUnloaded"
        )
        health = {
            "Check": self._guarded(codec.HEALTH, "Check", self._health),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        feedback = {"Feedback": self._guarded(codec.EXPERIMENTS, "Feedback", self._feedback)}
        reflected = {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._reflect)}
        return {
            codec.SERVICE: inference,
            codec.HEALTH: health,
            codec.EXPERIMENTS: feedback,
            **dict.fromkeys(reflection.SERVICES, reflected),
        }

    def _guarded(self, service: str, method: str, call: Callable[[Any], Awaitable[bytes]]) -> Any:
        """The handler for ``call``."""

        async def guarded(messages: Any, context: Any) -> bytes:
            if not self._telemetry.watchers:
                return await _answered(context, call)
            exchange = Exchange("grpc", f"{service}/{method}", context.invocation_metadata())
            with self._telemetry.watched(exchange):
                try:
                    reply = await _answered(context, call)
                    exchange.status = "OK"
                except BaseException:
                    # 0 where nothing has set one
                    exchange.status = getattr(context.code(), "name", "CANCELLED")
                    raise
            return reply

        return grpc.stream_unary_rpc_method_handler(guarded)

    async def _message(self, context: Any, known: bool) -> bytes:
        """The one message of a call.

        Args:
            known: Whether a credential was seen. A stranger keeps its place only until
                ``MOST_STRANGERS`` newer ones wait: who sends its message at once is never in the
                way.

        Raises:
            DeadlineExceededError: It did not come in time.
            OverloadedError: Newer strangers came before it did.
            InvalidInputError: None came.
        """
        body = await self._next(context, known)
        if body is grpc.aio.EOF:
            raise InvalidInputError("the call ended without a message: send one")
        return body  # type: ignore[no-any-return]

    async def _next(self, context: Any, known: bool) -> Any:
        """:meth:`_message`, or grpc's EOF."""
        clock = asyncio.timeout(self._options.slow_client_s)
        try:
            async with clock:
                if not known:
                    self._strangers.append(clock)
                    if len(self._strangers) > MOST_STRANGERS:
                        self._strangers.pop(0).reschedule(0.0)
                return await context.read()
        except TimeoutError:
            if not known and clock not in self._strangers:
                raise OverloadedError(
                    "many calls wait for their message: send yours with the headers"
                ) from None
            raise DeadlineExceededError(
                "the call's message did not come in time: send it with the headers"
            ) from None
        finally:
            if clock in self._strangers:
                self._strangers.remove(clock)

    async def _infer(self, context: Any) -> bytes:
        with self._refusals:
            if self.stopping.is_set():
                raise ServerClosedError("the server is stopping: ask another one, or later")
            if self._inside >= self._options.max_connections:
                raise OverloadedError(
                    f"{self._inside} calls are under way, the most that are let in: try again later"
                )
        identity = self._check(context, Role.INFER)
        self._inside += 1
        try:
            with self._refusals:
                body = await self._message(context, known=True)
                came_s = time.perf_counter()
                codec.check_cost(body, self._options.max_numbers)
                request = codec.decode(codec.InferRequest, body)
                call = Call(
                    model=request.model_name,
                    version=request.model_version or None,
                    inputs=codec.inputs(request),
                    outputs=codec.requested(request),
                    parameters=_within(
                        context.time_remaining(), codec.parameters(request.parameters)
                    ),
                    who=identity,
                )
            parsed_s = time.perf_counter()
            answer = await self._v2.infer(call)
        finally:
            self._inside -= 1
        answered_s = time.perf_counter()
        with self._refusals:
            reply = codec.response(
                answer.model, answer.version, request.id, answer.outputs, answer.parameters
            )
        self._telemetry.codec("grpc", parsed_s - came_s, time.perf_counter() - answered_s)
        return reply

    def _plain(
        self, method: str, role: Role | None, answer: Callable[[Any, Any], Mapping[str, Any]]
    ) -> Any:
        """A method that only asks the server: in a thread where the answer may be on the disk."""
        kind, reply = _kinds(method)

        async def call(context: Any) -> bytes:
            # nobody has to wait for a message that is always empty
            if method in ("ServerLive", "ServerReady"):
                return codec.encode(reply, answer(None, None))
            who = None if role is None else self._check(context, role)
            request = codec.decode(kind, await self._message(context, known=role is not None))
            try:
                content = await asyncio.to_thread(answer, request, who)
            except FlservingError as error:
                raise (
                    error
                    if self._tokens.allow(_authorization(context), Role.READ)
                    else unnamed(error)
                ) from None
            return codec.encode(reply, content)

        return self._guarded(codec.SERVICE, method, call)

    def _administer(self, method: str, change: Callable[[str], Awaitable[None]], done: str) -> Any:
        """Load or unload; the name of the model is read from either of the two fields where clients
        put it."""
        kind, reply = _kinds(method)

        async def call(context: Any) -> bytes:
            self._check(context, Role.ADMIN)
            request = codec.decode(kind, await self._message(context, known=True))
            name = request.model_name or request.repository_name
            if not name:
                raise InvalidInputError("model_name is empty: name the model")
            if request.model_name:
                _only_repository(request)
            if extra := set(request.parameters) - {"unload_dependents"}:
                raise NotSupportedError(
                    f"parameter {min(extra)[:80]!r} is not supported: a model loads as published"
                )
            await change(name)
            return codec.encode(reply, {"model_name": name, done: True})

        return self._guarded(codec.SERVICE, method, call)

    async def _feedback(self, context: Any) -> bytes:
        kind, reply = _kinds("Feedback", codec.EXPERIMENTS)
        client = self._check(context, Role.INFER).client
        with self._refusals:
            request = codec.decode(kind, await self._message(context, known=True))
            reward = request.reward if request.HasField("reward") else None
            await self._v2.feedback(request.model_name, request.receipt, reward, client)
        return codec.encode(reply, {"counted": True})

    def _check(self, context: Any, role: Role) -> Identity:
        with self._refusals:
            return self._tokens.check(_authorization(context), role)

    async def _health(self, context: Any) -> bytes:
        service = codec.decode(_HealthRequest, await self._message(context, known=False)).service
        status = self._status(service)
        if status == "SERVICE_UNKNOWN":
            raise NotFoundError(
                f"no service {service[:80]!r} here: ask for {codec.SERVICE!r} or ''"
            )
        return codec.encode(_HealthResponse, {"status": status})

    async def _watch(self, messages: Any, context: Any) -> AsyncIterator[bytes]:
        """The status now, and again each time that it changes.

        A watch ends after ``slow_client_s`` with UNAVAILABLE, so that others can watch: gRPC's
        clients watch again by themselves.
        """
        try:
            message = await self._message(context, known=False)
            service = codec.decode(_HealthRequest, message).service
            if self._watchers >= MOST_WATCHERS:
                raise OverloadedError(
                    f"{MOST_WATCHERS} callers watch already: ask Check now and then instead"
                )
        except FlservingError as error:
            await _abort(context, error)
        self._watchers += 1
        end_s = time.monotonic() + self._options.slow_client_s
        sent = None
        try:
            while not self.stopping.is_set():
                status = self._status(service)
                if status != sent:
                    yield codec.encode(_HealthResponse, {"status": status})
                    sent = status
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), _POLL_S)
                if time.monotonic() > end_s:
                    await context.abort(
                        grpc.StatusCode.UNAVAILABLE, "a watch is for a while: watch again"
                    )
        finally:
            self._watchers -= 1

    async def _reflect(self, messages: Any, context: Any) -> AsyncIterator[bytes]:
        """An answer to each question of one call, until the caller has no more."""
        try:
            self._check(context, Role.READ)
            while (body := await self._next(context, known=True)) is not grpc.aio.EOF:
                yield reflection.answer(body)
        except FlservingError as error:
            await _abort(context, error)

    def _status(self, service: str) -> str:
        if service not in ("", codec.SERVICE, codec.HEALTH, codec.EXPERIMENTS):
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._v2.ready() else "NOT_SERVING"


async def _answered(context: Any, call: Callable[[Any], Awaitable[bytes]]) -> bytes:
    """The answer to a call. Errors become a status: one of ours by its table, anything else without
    a detail."""
    try:
        return await call(context)
    except FlservingError as error:
        await _abort(context, error)
    except (
        Exception
    ) as error:  # its message may hold what the caller sent: only where it happened is logged
        where = "".join(traceback.format_tb(error.__traceback__))
        _LOG.error("a call failed with %s at\n%s", type(error).__name__, where)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")
    raise AssertionError("abort raises")


async def _abort(context: Any, error: FlservingError) -> None:
    code = grpc.StatusCode[error.grpc_code]
    await context.abort(code, str(error)[:_LONGEST_DETAIL], ((REASON, error.reason),))


def _authorization(context: Any) -> str | bytes | None:
    for name, value in context.invocation_metadata():
        if name == "authorization":
            return value  # type: ignore[no-any-return]
    return None


def _within(remaining_s: float | None, said: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a request with its ``timeout`` (in us) cut to what the call's own deadline
    leaves."""
    if remaining_s is None or remaining_s > _LONGEST_WAIT_S:
        return said
    if remaining_s <= 0:
        raise DeadlineExceededError(
            "the call's deadline had passed when its message came: allow it more time"
        )
    left_us = math.ceil(remaining_s * 1e6)
    timeout_us = said.get("timeout", 0)
    # others are refused where they are read
    if type(timeout_us) is int and (timeout_us == 0 or timeout_us > left_us):
        said["timeout"] = left_us
    return said


def _kinds(method: str, service: str = codec.SERVICE) -> tuple[Any, Any]:
    package = service.rpartition(".")[0]
    return codec.message(f"{package}.{method}Request"), codec.message(f"{package}.{method}Response")


def _only_repository(request: Any) -> Any:
    if request.repository_name:
        raise NotSupportedError(
            f"there are no named repositories here: leave out {request.repository_name[:80]!r}"
        )
    return request
