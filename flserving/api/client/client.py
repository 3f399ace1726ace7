"""Clients of a server, blocking and awaiting, over REST and gRPC: the same answers and errors as the server itself.

::

    with Client(endpoint.url, endpoint.token) as client:
        client.predict([[0.0] * 64])["predictions"]
"""

import asyncio
import functools
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from flserving.api.auth import checked_token
from flserving.api.client import transports
from flserving.api.client.calls import GrpcCalls, RestCalls, Where
from flserving.api.client.retries import Attempts, Refused, Retries
from flserving.api.client.transports import Received, Sent
from flserving.errors import ConfigError, InvalidInputError, NotFoundError, ServerClosedError
from flserving.models.processing import Preprocessor
from flserving.serving.config import deadline_s

P = ParamSpec("P")
R = TypeVar("R")
_TARGET = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")  # host:port, [IPv6]:port
_PORTS = {"http": 80, "https": 443, "grpc": None, "grpcs": None}


def address(url: str, ports: Mapping[str, int | None]) -> SplitResult:
    """A server's address, with a scheme of ``ports`` (its default port, None: it has none). Raises ConfigError."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ports and parts.hostname and parts.port != 0 and (parts.port or ports[parts.scheme])
    except ValueError:
        known = None
    if not known or parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"url {url!r} cannot be called: write {' or '.join(ports)} ://host:port")
    return parts


class _Calls:
    """What both clients share: what is sent, how an answer is read, and when to ask again."""

    _ways: ClassVar[tuple[Callable[..., Any], ...]]  # over REST, over gRPC, and how to sleep

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_ms: float = 5000,
        retries: Retries | None = None,
        ca: str | PathLike[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        if isinstance(url, str) and _TARGET.fullmatch(url):  # as gRPC writes addresses, and Endpoint.grpc_url
            url = f"{'grpc' if ca is None else 'grpcs'}://{url}"
        parts = address(url, _PORTS)
        headers = {} if token is None else {"authorization": f"Bearer {checked_token(token)}"}
        try:
            authority = None if ca is None else Path(ca).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"ca {str(ca)!r} cannot be read: {error.strerror}") from error
        self.url, self.timeout_ms = f"{parts.scheme}://{parts.netloc}", timeout_ms
        self._retries, self._clock, self._default = retries or Retries(), clock, ""
        rest, grpc, pause = self._ways
        self._sleep = sleep or pause
        self._calls: RestCalls | GrpcCalls
        if parts.scheme.startswith("http"):
            self._calls, self._carrier = RestCalls(headers), rest(self.url, authority)
        else:
            self._calls, self._carrier = GrpcCalls(headers), grpc(parts.netloc, parts.scheme == "grpcs", authority)

    def _attempts(self, timeout_ms: float | None) -> Attempts:
        timeout_s = deadline_s(self.timeout_ms if timeout_ms is None else timeout_ms)
        return Attempts(self._retries, timeout_s, self._clock)

    def _infer(self, features: Any, model: str, version: str | int | None, stages: bool,
               personal: bool) -> Callable[[float], Sent]:  # fmt: skip
        """The call as a function of the seconds that are left: the server is told its deadline."""
        rows, parameters = Preprocessor.rows_of_any_shape(features), dict[str, Any]()
        number = None if version is None else str(version)
        if number is not None and not number.isdecimal():
            parameters["alias"], number = number, None
        parameters |= {name: True for name, wanted in (("stages", stages), ("personal", personal)) if wanted}
        return lambda left_s: self._calls.infer(
            (model, number), rows, {**parameters, "timeout": max(1, int(left_s * 1e6))}
        )

    def _reward(self, model: str, receipt: str, reward: float) -> Sent:
        if not isinstance(receipt, str) or not receipt.isascii():
            raise InvalidInputError(f"receipt is {receipt!r:.64}: send the one of your own answer")
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise InvalidInputError(f"reward is {reward!r:.64}: send a number in [0, 1]")
        return self._calls.feedback(model, receipt, reward)

    async def _named(self, model: str | None, attempts: Attempts) -> str:
        if model is not None:
            return model
        if not self._default:
            if not (index := await self._read(self._calls.models(), attempts)):
                raise NotFoundError(f"no model is served at {self.url}: publish one first")
            self._default = index[0]["name"]
        return self._default

    @staticmethod
    def _where(model: str | None, version: str | int | None) -> Where | None:
        return None if model is None else (model, None if version is None else str(version))

    async def _read(self, call: Sent, attempts: Attempts) -> Any:
        return self._calls.read(call.path, await self._try(lambda _: call, attempts))

    async def _try(self, call: Callable[[float], Sent], attempts: Attempts) -> Received:
        while True:
            try:
                received: Received = await _done(self._carrier.send(call(left_s := attempts.left_s()), left_s))
            except Refused as refused:
                await _done(self._sleep(attempts.failed(refused)))
            else:
                attempts.succeeded()
                return received

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"


class AsyncClient(_Calls):
    """:class:`Client` for coroutines; make it and use it in one event loop, with ``async with``."""

    _ways = transports.AsyncRest, transports.AsyncGrpc, asyncio.sleep

    async def predict(self, features: Any, version: str | int | None = None, *, model: str | None = None,
                      timeout_ms: float | None = None, stages: bool = False, arrays: bool = False,
                      personal: bool = False) -> dict[str, Any]:  # fmt: skip
        """Answer and errors of :meth:`ModelServer.predict`; ``latency_ms`` is the server's part.

        Args:
            personal: Ask for the private answers of the client that the token names.
        """
        attempts = self._attempts(timeout_ms)
        call = self._infer(features, await self._named(model, attempts), version, stages, personal)
        return self._calls.read_infer(await self._try(call, attempts), arrays)

    async def feedback(self, receipt: str, reward: float, *, model: str | None = None,
                       timeout_ms: float | None = None) -> None:  # fmt: skip
        """Say how good the answer with this ``receipt`` was, in [0, 1]. Errors of :meth:`Experiments.feedback`.

        It counts once, so it is tried again as a prediction is: a ConflictError may mean that the first try counted.
        """
        attempts = self._attempts(timeout_ms)
        await self._read(self._reward(await self._named(model, attempts), receipt, reward), attempts)

    async def ready(self, model: str | None = None, version: str | int | None = None) -> bool:
        """Whether the server, or one model of it, can answer now; not even a server that is gone is an error here."""
        try:
            attempts = Attempts(Retries(attempts=1), self.timeout_ms / 1e3, self._clock)
            return bool((await self._read(self._calls.ready(self._where(model, version)), attempts))["ready"])
        except (ServerClosedError, TimeoutError):
            return False

    async def metadata(self, model: str | None = None, version: str | int | None = None) -> dict[str, Any]:
        """Name, version and extensions of the server; of a model its versions, inputs and outputs."""
        return dict(await self._read(self._calls.metadata(self._where(model, version)), self._attempts(None)))

    async def statistics(self, model: str | None = None, version: str | int | None = None) -> list[dict[str, Any]]:
        """Counters of each version: requests, rows, executions, nanoseconds by stage."""
        stats = await self._read(self._calls.statistics(self._where(model, version)), self._attempts(None))
        return list(stats["model_stats"])

    async def models(self) -> list[dict[str, Any]]:
        """Every version of every model: ``name``, ``version``, ``state``, ``reason``."""
        return list(await self._read(self._calls.models(), self._attempts(None)))

    async def close(self) -> None:
        """Let go of the connections. Idempotent."""
        await self._carrier.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _done(result: Any) -> Any:
    return await result if isinstance(result, Awaitable) else result


def _blocking(call: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate["Client", P], R]:
    """The same call, blocking: its carrier and its sleep give no coroutines, so one step is all of it."""

    @functools.wraps(call)
    def whole(client: "Client", /, *args: P.args, **named: P.kwargs) -> R:
        try:
            call(client, *args, **named).send(None)
        except StopIteration as done:
            result: R = done.value
            return result
        raise AssertionError("a blocking carrier awaited something")

    return whole


class Client(_Calls):
    """Calls a server and waits. Thread-safe; connections are kept, so make one and use it many times.

    Args:
        url: ``http://``, ``https://``, ``grpc://`` or ``grpcs://`` host:port. A mere host:port means gRPC, with TLS
            where ``ca`` is given: ``Endpoint.grpc_url`` is one.
        timeout_ms: Deadline of a call, retries included; the server is told what is left of it.
        retries: How often and when to try again; ``Retries(attempts=1)`` for never.
        ca: PEM file of the authority to trust instead of the system's: for a certificate that you signed yourself.
        clock: Monotonic seconds. ``sleep`` waits so many of them.

    Raises:
        ConfigError: The URL, the token or ``ca`` cannot be used.
    """

    _ways = transports.Rest, transports.Grpc, time.sleep

    predict = _blocking(AsyncClient.predict)
    feedback = _blocking(AsyncClient.feedback)
    ready = _blocking(AsyncClient.ready)
    metadata = _blocking(AsyncClient.metadata)
    statistics = _blocking(AsyncClient.statistics)
    models = _blocking(AsyncClient.models)

    def close(self) -> None:
        """Let go of the connections. Idempotent."""
        self._carrier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
