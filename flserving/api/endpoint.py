"""Where a server answers: REST and gRPC, opened and closed, in one event loop in a thread of their
own."""

import asyncio
import contextlib
import socket
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2, Others
from flserving.api.options import ApiOptions, check_origin
from flserving.api.rest.app import RestApp
from flserving.api.rest.http1 import RestServer
from flserving.api.sockets import descriptors, listen
from flserving.errors import ConfigError

if TYPE_CHECKING:
    from flserving.serving.server import ModelServer

SPARE = 256  # files that connections never take
DRAIN_S = 5.0
"""How long admitted requests may take to finish when an endpoint closes."""


class Endpoint:
    """Where a server can be reached. Made by :func:`flserving.serve`; closing it leaves the server
    itself open.

    Attributes:
        url: Of REST. ``grpc_url`` is "host:port", None without gRPC. Clients of flserving take
            either.
        token: The random one; None where the options brought their own credentials.
        v2: The operations behind both protocols.

    Closed at the end of a ``with`` block, by :meth:`close`, when nobody holds it any more, and when
    Python ends.
    """

    def __init__(
        self,
        server: "ModelServer",
        options: ApiOptions,
        *,
        reuse_port: bool = False,
        others: Others = tuple,
    ) -> None:
        options, self.token = _with_tokens(options)
        options = replace(
            options, max_connections=min(options.max_connections, connections_at_most(options))
        )
        self.options = options
        self.v2 = V2(server, options.admin)
        self.v2.others = others  # before a port opens: the first scrape must see them
        listener = listen(options.host, options.port, reuse_port)
        self._thread = _ServerThread(self.v2, options, listener, reuse_port)
        self._finalize = weakref.finalize(self, self._thread.close, 0.0, 0.0)
        port, grpc_port = self._thread.open()
        self.url = options.url(port)
        self.grpc_url = None if grpc_port is None else f"{options.reachable}:{grpc_port}"

    @property
    def headers(self) -> dict[str, str]:
        """What a request of the default role has to send; empty where the options brought their own
        credentials."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def allow_origin(self, origin: str) -> None:
        """Let web pages of ``origin`` (``http://host[:port]``) call from now on."""
        self.v2.origins.add(check_origin(origin))

    def close(self, drain_s: float = DRAIN_S, notice_s: float = 0.0) -> None:
        """Stop listening, let admitted requests finish, end the thread. Idempotent.

        Args:
            drain_s: Longest wait for admitted requests; what is left then is cut off.
            notice_s: How long before that to go on answering with readiness false, so that a load
                balancer looks elsewhere.
        """
        if self._finalize.detach() is not None:
            self._thread.close(drain_s, notice_s)

    @property
    def beats(self) -> int:
        """Grows about once a second while the event loop turns."""
        return self._thread.beats

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


class _ServerThread:
    """What runs in the thread. It knows nothing of the Endpoint, which can so be collected."""

    def __init__(
        self, v2: V2, options: ApiOptions, listener: socket.socket, reuse_port: bool
    ) -> None:
        self._v2 = v2
        self._options = options
        self._listener = listener
        self._reuse_port = reuse_port
        self.beats = 0
        self._opened: Future[tuple[int, int | None]] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._notice_s = 0.0
        self._drain_s = 0.0
        self._thread = threading.Thread(target=self._run, name="flserving-endpoint", daemon=True)

    def open(self) -> tuple[int, int | None]:
        """Start; the ports once both protocols answer. Raises what prevented that."""
        self._thread.start()
        try:
            return self._opened.result()
        except BaseException:
            self.close(0.0, 0.0)
            raise

    def close(self, drain_s: float, notice_s: float) -> None:
        """Drain and join. Called again, or from the thread itself (by the garbage collector), it
        waits for nothing."""
        self._drain_s = drain_s
        self._notice_s = notice_s
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
        refused = partial(self._v2.server.telemetry.refusal, "rest")
        rest = RestServer(RestApp(self._v2, self._options), self._options, self._listener, refused)
        grpc = None
        try:
            if self._options.grpc_port is not None:
                # an endpoint without gRPC does not load grpcio
                from flserving.api.grpc.server import start_grpc

                grpc = await start_grpc(self._v2, self._options, reuse_port=self._reuse_port)
            rest.open()
            self._opened.set_result(
                (self._listener.getsockname()[1], None if grpc is None else grpc.port)
            )
            while not self._stop.is_set():
                self.beats += 1
                rest.tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), 1.0)
            rest.close_after_answers()
            await asyncio.sleep(self._notice_s)
        finally:
            closing: list[Awaitable[None]] = [rest.close(self._drain_s)]
            if grpc is not None:
                closing.append(grpc.stop(self._drain_s))
            await asyncio.gather(*closing)


def connections_at_most(options: ApiOptions) -> int:
    """How many connections of each kind leave ``SPARE`` files for models and databases, within the
    system's limit."""
    kinds = 1 if options.grpc_port is None else 2
    return max(1, (descriptors(kinds * options.max_connections + SPARE) - SPARE) // kinds)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _with_tokens(options: ApiOptions) -> tuple[ApiOptions, str | None]:
    """The options, with a random token where they bring no credentials, and that token."""
    if options.tokens is not None:
        return options, None
    tokens, token = Tokens.random(Role.ADMIN if options.admin else Role.INFER)
    return replace(options, tokens=tokens), token


def open_endpoint(server: "ModelServer", **options: Any) -> Endpoint:
    """:func:`flserving.serve`."""
    if unknown := options.keys() - ApiOptions.__dataclass_fields__.keys():
        raise ConfigError(
            f"serve has no option {', '.join(sorted(unknown))}: it takes {', '.join(ApiOptions.__dataclass_fields__)}"
        )
    return Endpoint(server, ApiOptions(**options))


OF_APPLICATIONS = (
    "tokens",
    "admin",
    "artifacts",
    "origins",
    "hosts",
    "max_body_bytes",
    "max_numbers",
)
"""The options that are not about where and how a port listens."""


def application(server: "ModelServer", **options: Any) -> RestApp:
    """:func:`flserving.asgi`."""
    if unknown := options.keys() - set(OF_APPLICATIONS):
        raise ConfigError(
            f"asgi has no option {', '.join(sorted(unknown))}: it takes {', '.join(OF_APPLICATIONS)}; where to listen, "
            "TLS and the bounds of connections are set at the web server that runs it"
        )
    checked, token = _with_tokens(ApiOptions(**options))
    return RestApp(V2(server, checked.admin), checked, token)
