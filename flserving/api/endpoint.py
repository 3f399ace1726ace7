"""The doors of a server, opened and closed: REST by uvicorn and gRPC, in one event loop in a thread of their own."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import uvicorn

from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2, Others
from flserving.api.options import ApiOptions, check_origin
from flserving.api.sockets import descriptors, listen, refuse
from flserving.errors import ConfigError

if TYPE_CHECKING:
    from flserving.serving.server import ModelServer

SPARE = 256  # files that connections never take
DRAIN_S = 5.0
"""How long admitted requests may take to finish when an endpoint closes."""


class Endpoint:
    """Where a server can be reached. Made by :func:`flserving.serve`; closing it leaves the server itself open.

    Attributes:
        url: Of REST. ``grpc_url`` is "host:port", None without gRPC. Clients of flserving take either.
        token: The random one; None where the options brought their own credentials.
        v2: The operations behind both doors.

    Closed at the end of a ``with`` block, by :meth:`close`, when nobody holds it any more, and when Python ends.
    """

    def __init__(
        self, server: "ModelServer", options: ApiOptions, *, reuse_port: bool = False, others: Others = tuple
    ) -> None:
        self.token: str | None = None
        if options.tokens is None:
            tokens, self.token = Tokens.random(Role.ADMIN if options.admin else Role.INFER)
            options = replace(options, tokens=tokens)
        options = replace(options, max_connections=min(options.max_connections, connections_at_most(options)))
        self.v2, self.options = V2(server, options.admin), options
        self.v2.others = others  # before a port opens: the first scrape must see them
        self._doors = _Doors(self.v2, options, listen(options.host, options.port, reuse_port), reuse_port)
        self._finalize = weakref.finalize(self, self._doors.close, 0.0, 0.0)
        port, grpc_port = self._doors.open()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
        host = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if options.secure else 'http'}://{host}:{port}"
        self.grpc_url = None if grpc_port is None else f"{host}:{grpc_port}"

    @property
    def headers(self) -> dict[str, str]:
        """What a request of the default role has to send; empty where the options brought their own credentials."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def allow_origin(self, origin: str) -> None:
        """Let web pages of ``origin`` (``http://host[:port]``) call from now on."""
        self.v2.origins.add(check_origin(origin))

    def close(self, drain_s: float = DRAIN_S, notice_s: float = 0.0) -> None:
        """Stop listening, let admitted requests finish, end the thread. Idempotent.

        Args:
            drain_s: Longest wait for admitted requests; what is left then is cut off.
            notice_s: How long before that to go on answering with readiness false, so that a load balancer turns away.
        """
        if self._finalize.detach() is not None:
            self._doors.close(drain_s, notice_s)

    @property
    def beats(self) -> int:
        """Grows about once a second while the event loop turns."""
        return self._doors.beats

    @property
    def closed(self) -> bool:
        """Whether it has stopped listening."""
        return not self._finalize.alive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:  # a notebook shows it: it must not hold the token
        grpc = "" if self.grpc_url is None else f", gRPC {self.grpc_url}"
        return f"<Endpoint {self.url}{grpc}{' (closed)' if self.closed else ''}>"


class _Doors:
    """What runs in the thread. It knows nothing of the Endpoint, which can so be collected."""

    def __init__(self, v2: V2, options: ApiOptions, listener: socket.socket, reuse_port: bool) -> None:
        self._v2, self._options, self._listener, self._reuse_port = v2, options, listener, reuse_port
        self.beats = 0
        self._opened: Future[tuple[int, int | None]] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._notice_s, self._drain_s = asyncio.Event(), 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="flserving-doors", daemon=True)

    def open(self) -> tuple[int, int | None]:
        """Start; the ports once both doors answer. Raises what kept them from opening."""
        self._thread.start()
        try:
            return self._opened.result()
        except BaseException:
            self.close(0.0, 0.0)
            raise

    def close(self, drain_s: float, notice_s: float) -> None:
        """Drain and join. Called again, or from the thread itself (by the garbage collector), it waits for nothing."""
        self._drain_s, self._notice_s = drain_s, notice_s
        self._v2.draining = True
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        rest, grpc = _Rest(self._v2, self._options, self._listener), None
        try:
            if self._options.grpc_port is not None:
                from flserving.api.grpc.server import start_grpc  # an endpoint without gRPC does not load grpcio

                grpc = await start_grpc(self._v2, self._options, reuse_port=self._reuse_port)
            await rest.open()
            self._opened.set_result((self._listener.getsockname()[1], None if grpc is None else grpc.port))
            while not self._stop.is_set():
                self.beats += 1
                await rest.tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), 1.0)
            rest.turn_away()
            await asyncio.sleep(self._notice_s)
        finally:
            closing: list[Awaitable[None]] = [rest.close(self._drain_s)]
            if grpc is not None:
                closing.append(grpc.stop(self._drain_s))
            await asyncio.gather(*closing)


class _Rest:
    """uvicorn's protocol and listener under our own loop: its ``Server.serve`` polls ten times a second, and closes
    idle connections without having told their clients."""

    POLL_S = 0.005
    FIRST_S = 0.5
    """How long a client that has just connected may take to send its request when the endpoint closes."""
    TOLD = 64
    """So many connections beyond the limit are told 429; further ones are closed at once."""

    def __init__(self, v2: V2, options: ApiOptions, listener: socket.socket) -> None:
        from flserving.api.rest.app import RestApp
        from flserving.api.rest.http1 import protocol_class

        def refused(reason: str) -> None:
            v2.server.telemetry.refusal("rest", reason)

        self._options = options
        self._refused = refused
        self._shaking: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        context = options.ssl_context() if options.secure else None
        self._config = uvicorn.Config(
            RestApp(v2, options), http=protocol_class(options, refused), ws="none", lifespan="off", interface="asgi3",
            access_log=False, log_config=None, server_header=False, proxy_headers=False,
            ssl_context_factory=None if context is None else lambda *_: context,
        )  # fmt: skip
        self._server, self._listener = uvicorn.Server(self._config), listener

    async def open(self) -> None:
        self._config.load()
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self.tick()
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        """Take connections in. What is too much is closed here, before it can take a file, a handshake or a place:
        only ``TOLD`` more than the limit stay to be told so."""
        loop = asyncio.get_running_loop()
        limit = self._options.max_connections + self.TOLD
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # no file is left for it, or it has gone already
                await asyncio.sleep(self.POLL_S)
                continue
            if len(self._shaking) + len(self._server.server_state.connections) >= limit:
                connection.close()
                self._refused("Overloaded")
                continue
            shaking = loop.create_task(self._connect(connection))
            self._shaking.add(shaking)
            shaking.add_done_callback(self._shaking.discard)

    async def _connect(self, connection: socket.socket) -> None:
        """Hand a connection to the protocol; with TLS, after the handshake."""
        loop = asyncio.get_running_loop()
        clocks = {}
        if self._config.ssl is not None:
            clocks = dict.fromkeys(("ssl_handshake_timeout", "ssl_shutdown_timeout"), self._options.slow_client_s)
        connection.setblocking(False)
        with contextlib.suppress(OSError, ssl.SSLError):  # a handshake that failed or took too long
            await loop.connect_accepted_socket(self._protocol, connection, ssl=self._config.ssl, **clocks)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self._config.http_protocol_class(  # type: ignore[call-arg]
            config=self._config, server_state=self._server.server_state, app_state={}
        )
        return made

    async def tick(self) -> None:
        """Once a second: the Date header."""
        await self._server.on_tick(0)

    def turn_away(self) -> None:
        """From now on each answer is the last one of its connection."""
        state = self._server.server_state
        state.default_headers = [*state.default_headers, (b"connection", b"close")]

    async def close(self, drain_s: float) -> None:
        """Close the listener and idle connections, wait for the busy ones, cut off what is left after ``drain_s``."""
        if self._accepting is None:
            return
        state, end_s = self._server.server_state, time.monotonic() + drain_s
        await refuse(self._listener, end_s)
        await asyncio.sleep(self.POLL_S)  # an accept that has just succeeded must not be cancelled
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._listener.close()  # the drain may take long: others who share the port take new connections
        while (self._shaking or state.connections or state.tasks) and time.monotonic() < end_s:
            for connection in list(state.connections):
                connection.retire(self.FIRST_S)  # type: ignore[union-attr]
            await asyncio.sleep(self.POLL_S)
        for connection in list(state.connections):
            connection.transport.abort()  # a lost connection takes its request with it
        for shaking in self._shaking:
            shaking.cancel()
        await asyncio.gather(*state.tasks, *self._shaking, return_exceptions=True)


def connections_at_most(options: ApiOptions) -> int:
    """How many connections of each kind leave ``SPARE`` files for models and databases, within the system's limit."""
    kinds = 1 if options.grpc_port is None else 2
    return max(1, (descriptors(kinds * options.max_connections + SPARE) - SPARE) // kinds)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def open_endpoint(server: "ModelServer", **options: Any) -> Endpoint:
    """:func:`flserving.serve`."""
    if unknown := options.keys() - ApiOptions.__dataclass_fields__.keys():
        raise ConfigError(
            f"serve has no option {', '.join(sorted(unknown))}: it takes {', '.join(ApiOptions.__dataclass_fields__)}"
        )
    return Endpoint(server, ApiOptions(**options))
