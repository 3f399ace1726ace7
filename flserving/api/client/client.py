"""Clients of a server, blocking and awaiting, over REST and gRPC: the same answers and errors as
the server itself.

::

    with Client(endpoint.url, endpoint.token) as client:
        client.predict([[0.0] * 64])["predictions"]
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from flserving.api.auth import checked_token
from flserving.api.client.retries import Attempts, Refused, Retries
from flserving.api.client.transports import (
    AsyncGrpcTransport,
    AsyncRestTransport,
    Call,
    GrpcCodec,
    GrpcTransport,
    Reply,
    RestCodec,
    RestTransport,
    Version,
)
from flserving.api.dataplane import Fields
from flserving.errors import ConfigError, InvalidInputError, NotFoundError, ServerClosedError
from flserving.models.processing import Preprocessor
from flserving.serving.config import deadline_s

_TARGET = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")  # host:port, [IPv6]:port
Timed = Callable[[float], Call]
"""Makes a call of the seconds that are left."""
_PORTS = {"http": 80, "https": 443, "grpc": None, "grpcs": None}


def address(url: str, ports: Mapping[str, int | None]) -> SplitResult:
    """A server's address, with a scheme of ``ports`` (its default port, None: it has none). Raises
    ConfigError."""
    try:
        parts = urlsplit(url)
        known = (
            parts.scheme in ports
            and parts.hostname
            and parts.port != 0
            and (parts.port or ports[parts.scheme])
        )
    except ValueError:
        known = None
    if (
        not known
        or parts.path not in {"", "/"}
        or parts.query
        or parts.fragment
        or parts.username is not None
    ):
        schemes = " or ".join(f"{scheme}://" for scheme in ports)
        raise ConfigError(f"url {url!r} cannot be called: write {schemes} and host:port")
    return parts


class _Calls:
    """What both clients share: their settings, and what a call says. How it is sent is what they
    differ in."""

    _rest: Any
    _grpc: Any

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
        # as gRPC writes addresses, and Endpoint.grpc_url
        if isinstance(url, str) and _TARGET.fullmatch(url):
            url = f"grpc://{url}" if ca is None else f"grpcs://{url}"
        parts = address(url, _PORTS)
        headers = {}
        if token is not None:
            headers["authorization"] = f"Bearer {checked_token(token)}"
        authority = None
        try:
            if ca is not None:
                authority = Path(ca).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"ca {str(ca)!r} cannot be read: {error.strerror}") from error
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.timeout_ms = timeout_ms
        self._retries = retries or Retries()
        self._clock = clock
        self._sleep = sleep
        self._default = ""
        self._codec: RestCodec | GrpcCodec
        if parts.scheme in ("http", "https"):
            self._codec = RestCodec(headers)
            self._transport = self._rest(self.url, authority)
        else:
            self._codec = GrpcCodec(headers)
            self._transport = self._grpc(parts.netloc, parts.scheme == "grpcs", authority)

    def _attempts(
        self, timeout_ms: float | None = None, retries: Retries | None = None
    ) -> Attempts:
        if timeout_ms is None:
            timeout_ms = self.timeout_ms
        return Attempts(retries or self._retries, deadline_s(timeout_ms), self._clock)

    def _inference(self, model: str, version: Version, features: Any, **flags: bool) -> Timed:
        """The call as a function of the seconds that are left: the server is told its deadline."""
        rows = Preprocessor.rows_of_any_shape(features)
        parameters: Fields = {name: True for name, wanted in flags.items() if wanted}
        if version is not None and not str(version).isdecimal():
            parameters["alias"] = str(version)
            version = None

        def call(left_s: float) -> Call:
            timeout_us = max(1, int(left_s * 1e6))
            return self._codec.infer(model, version, rows, parameters | {"timeout": timeout_us})

        return call

    def _reward(self, model: str, receipt: str, reward: float) -> Call:
        if not isinstance(receipt, str) or not receipt.isascii():
            raise InvalidInputError(f"receipt is {receipt!r:.64}: send the one of your own answer")
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise InvalidInputError(f"reward is {reward!r:.64}: send a number in [0, 1]")
        return self._codec.feedback(model, receipt, reward)

    def _first(self, index: list[Fields]) -> str:
        if not index:
            raise NotFoundError(f"no model is served at {self.url}: publish one first")
        self._default = str(index[0]["name"])
        return self._default

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"


_ONCE = Retries(attempts=1)


class Client(_Calls):
    """Calls a server and waits. Thread-safe; connections are kept, so make one and use it many
    times.

    Args:
        url: ``http://``, ``https://``, ``grpc://`` or ``grpcs://`` host:port. A mere host:port
            means gRPC, with TLS where ``ca`` is given: ``Endpoint.grpc_url`` is one.
        timeout_ms: Deadline of a call, retries included; the server is told what is left of it.
        retries: How often and when to try again; ``Retries(attempts=1)`` for never.
        ca: PEM file of the authority to trust instead of the system's: for a certificate that you
            signed yourself.
        clock: Monotonic seconds. ``sleep`` waits so many of them.

    Raises:
        ConfigError: The URL, the token or ``ca`` cannot be used.
    """

    _rest = RestTransport
    _grpc = GrpcTransport

    def predict(
        self,
        features: Any,
        version: Version = None,
        *,
        model: str | None = None,
        timeout_ms: float | None = None,
        stages: bool = False,
        arrays: bool = False,
        personal: bool = False,
    ) -> Fields:
        """Answer and errors of :meth:`ModelServer.predict`; ``latency_ms`` is the server's part.

        Args:
            personal: Ask for the private answers of the client that the token names.
        """
        attempts = self._attempts(timeout_ms)
        name = self._named(model, attempts)
        call = self._inference(name, version, features, stages=stages, personal=personal)
        reply = self._send(call, attempts)
        return self._codec.read_infer(reply, arrays)

    def feedback(
        self,
        receipt: str,
        reward: float,
        *,
        model: str | None = None,
        timeout_ms: float | None = None,
    ) -> None:
        """Say how good the answer with this ``receipt`` was, in [0, 1]. Errors of
        :meth:`Experiments.feedback`.

        It counts once, so it is tried again as a prediction is: a ConflictError may mean that the
        first try counted.
        """
        attempts = self._attempts(timeout_ms)
        name = self._named(model, attempts)
        self._read(self._reward(name, receipt, reward), attempts)

    def ready(self, model: str | None = None, version: Version = None) -> bool:
        """Whether the server, or one model of it, can answer now; not even a server that is gone is
        an error here."""
        try:
            call = self._codec.about("ready", model, version)
            answer = self._read(call, self._attempts(retries=_ONCE))
        except (ServerClosedError, TimeoutError):
            return False
        return bool(answer["ready"])

    def metadata(self, model: str | None = None, version: Version = None) -> Fields:
        """Name, version and extensions of the server; of a model its versions, inputs and
        outputs."""
        return dict(self._read(self._codec.about("metadata", model, version)))

    def statistics(self, model: str | None = None, version: Version = None) -> list[Fields]:
        """Counters of each version: requests, rows, executions, nanoseconds by stage."""
        answer = self._read(self._codec.about("statistics", model, version))
        return list(answer["model_stats"])

    def models(self) -> list[Fields]:
        """Every version of every model: ``name``, ``version``, ``state``, ``reason``."""
        return list(self._read(self._codec.models()))

    def close(self) -> None:
        """Let go of the connections. Idempotent."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named(self, model: str | None, attempts: Attempts) -> str:
        if model is not None:
            return model
        return self._default or self._first(self._read(self._codec.models(), attempts))

    def _read(self, call: Call, attempts: Attempts | None = None) -> Any:
        reply = self._send(lambda _: call, attempts or self._attempts())
        return self._codec.read(call.path, reply)

    def _send(self, call: Timed, attempts: Attempts) -> Reply:
        sleep = self._sleep or time.sleep
        while True:
            left_s = attempts.left_s()
            try:
                reply: Reply = self._transport.send(call(left_s), left_s)
            except Refused as refused:
                sleep(attempts.failed(refused))
            else:
                attempts.succeeded()
                return reply


class AsyncClient(_Calls):
    """:class:`Client` for coroutines; make it and use it in one event loop, with ``async with``."""

    _rest = AsyncRestTransport
    _grpc = AsyncGrpcTransport

    async def predict(
        self,
        features: Any,
        version: Version = None,
        *,
        model: str | None = None,
        timeout_ms: float | None = None,
        stages: bool = False,
        arrays: bool = False,
        personal: bool = False,
    ) -> Fields:
        """See :meth:`Client.predict`."""
        attempts = self._attempts(timeout_ms)
        name = await self._named(model, attempts)
        call = self._inference(name, version, features, stages=stages, personal=personal)
        reply = await self._send(call, attempts)
        return self._codec.read_infer(reply, arrays)

    async def feedback(
        self,
        receipt: str,
        reward: float,
        *,
        model: str | None = None,
        timeout_ms: float | None = None,
    ) -> None:
        """See :meth:`Client.feedback`."""
        attempts = self._attempts(timeout_ms)
        name = await self._named(model, attempts)
        await self._read(self._reward(name, receipt, reward), attempts)

    async def ready(self, model: str | None = None, version: Version = None) -> bool:
        """See :meth:`Client.ready`."""
        try:
            call = self._codec.about("ready", model, version)
            answer = await self._read(call, self._attempts(retries=_ONCE))
        except (ServerClosedError, TimeoutError):
            return False
        return bool(answer["ready"])

    async def metadata(self, model: str | None = None, version: Version = None) -> Fields:
        """See :meth:`Client.metadata`."""
        return dict(await self._read(self._codec.about("metadata", model, version)))

    async def statistics(self, model: str | None = None, version: Version = None) -> list[Fields]:
        """See :meth:`Client.statistics`."""
        answer = await self._read(self._codec.about("statistics", model, version))
        return list(answer["model_stats"])

    async def models(self) -> list[Fields]:
        """See :meth:`Client.models`."""
        return list(await self._read(self._codec.models()))

    async def close(self) -> None:
        """Let go of the connections. Idempotent."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _named(self, model: str | None, attempts: Attempts) -> str:
        if model is not None:
            return model
        return self._default or self._first(await self._read(self._codec.models(), attempts))

    async def _read(self, call: Call, attempts: Attempts | None = None) -> Any:
        reply = await self._send(lambda _: call, attempts or self._attempts())
        return self._codec.read(call.path, reply)

    async def _send(self, call: Timed, attempts: Attempts) -> Reply:
        sleep = self._sleep or asyncio.sleep
        while True:
            left_s = attempts.left_s()
            try:
                reply: Reply = await self._transport.send(call(left_s), left_s)
            except Refused as refused:
                await sleep(attempts.failed(refused))
            else:
                attempts.succeeded()
                return reply
