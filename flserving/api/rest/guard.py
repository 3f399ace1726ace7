"""Who may reach the REST door at all: the Host header against DNS rebinding, the Origin header against foreign pages.

A page of another site can make a browser send requests to 127.0.0.1, by a name of its own that suddenly resolves to it
or across origins. The first carries a Host that is not ours, the second an Origin that nobody named: both are refused,
whatever the method and the credential (Ray's CVE-2026-27482 checked POST and PUT, but not DELETE).
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from flserving.api.options import ApiOptions
from flserving.errors import ForbiddenError, InvalidInputError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ONCE = (b"host", b"origin", b"authorization", b"content-type", b"content-encoding", b"inference-header-content-length")
_MOST_KNOWN = 256
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, content-encoding, inference-header-content-length",
    ),
    (b"access-control-max-age", b"600"),
]


class Guard:
    """The names that a request may call us by, and the pages that may call; ``origins`` may grow live."""

    def __init__(self, options: ApiOptions, origins: set[str]) -> None:
        self._names = {*_LOOPBACK, options.host.lower()}
        self._listed = {host.lower() for host in options.hosts}
        self._origins = origins
        self._known: set[tuple[bytes, Any]] = set()  # Host headers that passed, by the address that they reached

    def headers(self, scope: Scope) -> dict[bytes, bytes]:
        """The headers by name, once the Host is one of ours.

        Raises:
            InvalidInputError: A header that decides something is there twice, or Host is missing.
            ForbiddenError: Another Host. (403 and not 421: it is the caller who is wrong, not the connection.)
        """
        pairs = scope["headers"]
        headers: dict[bytes, bytes] = dict(pairs)
        if len(headers) != len(pairs):
            names = [name for name, _ in pairs]
            for name in _ONCE:
                if names.count(name) > 1:
                    raise InvalidInputError(f"the header {name.decode()} is there twice: send it once")
        host, server = headers.get(b"host"), tuple(scope.get("server") or ("", None))
        if host is None:
            raise InvalidInputError("the header Host is missing: send the address that you call")
        if (host, server) not in self._known:
            self._check_host(host, server)
            if len(self._known) >= _MOST_KNOWN:  # spellings of allowed names: few, but a client's choice
                self._known.clear()
            self._known.add((host, server))
        return headers

    def _check_host(self, header: bytes, server: tuple[Any, ...]) -> None:
        text = header.decode("latin-1").lower()
        address, our_port = server[0].removeprefix("::ffff:"), server[1]  # IPv4 on a socket of IPv6
        try:
            parts = urlsplit(f"//{text}")
            name, port, plain = parts.hostname or "", parts.port, parts.netloc == text and "@" not in text
        except ValueError:
            name, port, plain = "", None, False
        if plain and (text in self._listed or name in self._listed):
            return
        # An address that the connection came to is no name that somebody else could let point here.
        ours = name in self._names or name == address
        if not (plain and ours and (our_port is None or our_port == (port or 80) or our_port == (port or 443))):
            raise ForbiddenError(
                f"Host {text[:80]!r} is not this server: call it by its address, or start it with hosts=(...)"
            )

    def cors(self, scope: Scope, headers: dict[bytes, bytes], send: Send) -> Send:
        """``send`` for a request with an Origin, which lets the page read the answer if its origin is allowed.

        Raises:
            ForbiddenError: A page that nobody named.
        """
        origin = headers[b"origin"].decode("latin-1").lower()
        if origin == f"{scope.get('scheme', 'http')}://{headers[b'host'].decode('latin-1').lower()}":
            return send
        if origin not in self._origins:
            raise ForbiddenError(f"pages of {origin[:80]!r} may not call: start the server with origins=(...)")
        extra = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
                 (b"access-control-expose-headers", b"inference-header-content-length, retry-after")]  # fmt: skip

        async def send_to_page(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        return send_to_page
