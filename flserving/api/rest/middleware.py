"""What stands between the network and the routes of REST: whose Host and Origin are answered, and
limits on bodies.

A page of another site can make a browser send requests to 127.0.0.1, by a name of its own that
suddenly resolves to it or across origins. The first carries a Host that is not ours, the second an
Origin that nobody named: both are refused, whatever the method and the credential (Ray's
CVE-2026-27482 checked POST and PUT, but not DELETE).

Functions and not starlette's middleware: its TrustedHost, CORS and GZip around the same application
cost 21 % of the requests per second (small model, 64 connections), and only withhold a header where
these refuse.
"""

import asyncio
import zlib
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Message, Receive, Scope, Send

from flserving.api.options import ApiOptions
from flserving.errors import (
    ForbiddenError,
    InvalidInputError,
    TooLargeError,
    UnsupportedEncodingError,
)

Headers = dict[bytes, bytes]

# Host and Origin

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ONCE = (
    b"host",
    b"origin",
    b"authorization",
    b"content-type",
    b"content-encoding",
    b"inference-header-content-length",
)
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
    """The names that a request may call us by, and the pages that may call; ``origins`` may grow
    live."""

    def __init__(self, options: ApiOptions, origins: set[str]) -> None:
        self._names = {*_LOOPBACK, options.host.lower()}
        self._listed = {host.lower() for host in options.hosts}
        self._origins = origins
        # Host headers that passed, by the address that they reached
        self._known: set[tuple[bytes, Any]] = set()

    def headers(self, scope: Scope) -> Headers:
        """The headers by name, once the Host is one of ours.

        Raises:
            InvalidInputError: A header that decides something is there twice, or Host is missing.
            ForbiddenError: Another Host. (403 and not 421: it is the caller who is wrong, not the
                connection.)
        """
        pairs = scope["headers"]
        headers: Headers = dict(pairs)
        if len(headers) != len(pairs):
            names = [name for name, _ in pairs]
            for name in _ONCE:
                if names.count(name) > 1:
                    raise InvalidInputError(
                        f"the header {name.decode()} is there twice: send it once"
                    )
        host = headers.get(b"host")
        if host is None:
            raise InvalidInputError("the header Host is missing: send the address that you call")
        server = tuple(scope.get("server") or ("", None))
        if (host, server) not in self._known:
            self._check_host(host, server)
            # spellings of allowed names: few, but a client's choice
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known.add((host, server))
        return headers

    def _check_host(self, header: bytes, server: tuple[Any, ...]) -> None:
        text = header.decode("latin-1").lower()
        try:
            parts = urlsplit(f"//{text}")
            name = parts.hostname or ""
            port = parts.port
            plain = parts.netloc == text and "@" not in text
        except ValueError:
            name = ""
            port = None
            plain = False
        if plain and (text in self._listed or name in self._listed):
            return
        # An address that the connection came to is no name that somebody else could let point here.
        address = server[0].removeprefix("::ffff:")  # IPv4 on a socket of IPv6
        our_port = server[1]
        ours = name in self._names or name == address
        right_port = our_port is None or our_port in (port or 80, port or 443)
        if not (plain and ours and right_port):
            raise ForbiddenError(
                f"Host {text[:80]!r} is not this server: call it by its address, or start it with hosts=(...)"
            )

    def cors(self, scope: Scope, headers: Headers, send: Send) -> Send:
        """``send`` for a request with an Origin, which lets the page read the answer if its origin
        is allowed.

        Raises:
            ForbiddenError: A page that nobody named.
        """
        origin = headers[b"origin"].decode("latin-1").lower()
        if (
            origin
            == f"{scope.get('scheme', 'http')}://{headers[b'host'].decode('latin-1').lower()}"
        ):
            return send
        if origin not in self._origins:
            raise ForbiddenError(
                f"pages of {origin[:80]!r} may not call: start the server with origins=(...)"
            )
        extra = [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"vary", b"origin"),
            (b"access-control-expose-headers", b"inference-header-content-length, retry-after"),
        ]

        async def send_to_page(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        return send_to_page


# Bodies: read with a limit, inflated with a limit, deflated where it pays

_WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # zlib's wbits; deflate is zlib's framing
_TYPES = (b"application/json", b"application/octet-stream")
_LEAST = 1400
"""Bytes of an answer that one packet carries anyway: compressing fewer gains nothing."""
_QUICK = 256 << 10
"""Bytes that are inflated on the spot; more of them would hold up everybody for milliseconds.
(Reading JSON in a thread frees nobody: it holds the interpreter lock.)"""


async def read_body(headers: Headers, receive: Receive, most_bytes: int) -> bytes:
    """The whole body, inflated.

    Raises:
        TooLargeError: More than ``most_bytes``, as sent or inflated; no more than that is ever
            held.
        UnsupportedEncodingError: A content type or encoding that is not read here.
        InvalidInputError: The compressed body is broken.
        ConnectionResetError: The client is gone.
    """
    _check_type(headers)
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding != b"identity" and encoding not in _WINDOW:
        raise UnsupportedEncodingError(
            f"Content-Encoding {_shown(encoding)} is not read here: gzip, deflate or none"
        )
    if int(headers.get(b"content-length", b"0")) > most_bytes:  # what is announced need not be read
        raise _too_large(most_bytes)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts = [body]
        size = len(body)
        while message.get("more_body") and size <= most_bytes:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        body = b"".join(parts)
    if message["type"] == "http.disconnect":
        raise ConnectionResetError("the client is gone")
    if len(body) > most_bytes:
        raise _too_large(most_bytes)
    if encoding == b"identity":
        return body
    if len(body) <= _QUICK // 16:  # those few may hold a thousand times as many
        quick = min(_QUICK, most_bytes)
        try:
            return _inflated(body, _WINDOW[encoding], quick)
        except TooLargeError:
            if quick == most_bytes:
                raise
    return await asyncio.to_thread(_inflated, body, _WINDOW[encoding], most_bytes)


def _check_type(headers: Headers) -> None:
    """JSON, bytes, or not said. A form is what curl says by default, and a page can send one
    without asking first; but browsers name their page's origin with every POST, so a form from a
    page is told by its Origin and refused."""
    kind = headers.get(b"content-type")
    if kind is None or kind in _TYPES:
        return
    kind = kind.partition(b";")[0].strip().lower()
    if kind in _TYPES or kind == b"":
        return
    if kind == b"application/x-www-form-urlencoded" and b"origin" not in headers:
        return
    raise UnsupportedEncodingError(
        f"Content-Type {_shown(kind)} is not read here: send application/json"
    )


def _inflated(body: bytes, window: int, most_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window)
    try:
        content = inflater.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise InvalidInputError(f"the compressed body is broken: {error}") from None
    if len(content) > most_bytes:
        raise _too_large(most_bytes)
    if not inflater.eof or inflater.unused_data:
        raise InvalidInputError(
            "the compressed body is cut off, or something follows it: send one whole stream"
        )
    return content


async def deflated(accepted: bytes, content: bytes) -> tuple[bytes | None, bytes]:
    """The encoding and the content: compressed if the caller accepts it and it is worth it."""
    if len(content) < _LEAST:
        return None, content
    if len(content) <= _QUICK:
        return _deflated(accepted, content)
    return await asyncio.to_thread(_deflated, accepted, content)


def _deflated(accepted: bytes, content: bytes) -> tuple[bytes | None, bytes]:
    offers = [offer.replace(b" ", b"").partition(b";q=") for offer in accepted.lower().split(b",")]
    names = {name for name, _, weight in offers if weight.strip(b"0.") or not weight}
    for name in (b"gzip", b"deflate"):
        if name in names:
            deflater = zlib.compressobj(1, wbits=_WINDOW[name])
            smaller = deflater.compress(content) + deflater.flush()
            return (name, smaller) if len(smaller) < len(content) else (None, content)
    return None, content


def _too_large(most_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"the body has more than {most_bytes} bytes: send less at once, or raise max_body_bytes"
    )


def _shown(value: bytes) -> str:
    return repr(value[:64].decode("latin-1"))
