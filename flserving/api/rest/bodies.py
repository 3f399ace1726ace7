"""The bodies of REST: read with a limit, inflated with a limit, deflated where it pays."""

import asyncio
import zlib

from flserving.api.rest.guard import Receive
from flserving.errors import InvalidInputError, TooLargeError, UnsupportedEncodingError

_WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # zlib's wbits; deflate is zlib's framing
_LEAST = 1400
"""Bytes of an answer that one packet carries anyway: compressing fewer gains nothing."""
_QUICK = 256 << 10
"""Bytes that are inflated on the spot; more of them would hold up everybody for milliseconds. (Reading JSON in a thread
frees nobody: it holds the interpreter lock.)"""


async def read_body(headers: dict[bytes, bytes], receive: Receive, most_bytes: int) -> bytes:
    """The whole body, inflated.

    Raises:
        TooLargeError: More than ``most_bytes``, as sent or inflated; no more than that is ever held.
        UnsupportedEncodingError: A content type or encoding that is not read here.
        InvalidInputError: The compressed body is broken. ConnectionResetError: The client is gone.
    """
    _check_type(headers)
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding != b"identity" and encoding not in _WINDOW:
        raise UnsupportedEncodingError(f"Content-Encoding {_shown(encoding)} is not read here: gzip, deflate or none")
    if int(headers.get(b"content-length", b"0")) > most_bytes:  # what is announced need not be read
        raise _too_large(most_bytes)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts, size = [body], len(body)
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


def _check_type(headers: dict[bytes, bytes]) -> None:
    """JSON, bytes, or not said. A form is what curl says by default, and a page can send one without asking first; but
    browsers name their page's origin with every POST, so a form from a page is told by its Origin and refused."""
    kind = headers.get(b"content-type")
    if kind is None or kind in (b"application/json", b"application/octet-stream"):
        return
    kind = kind.partition(b";")[0].strip().lower()
    if kind in (b"application/json", b"application/octet-stream", b""):
        return
    if kind == b"application/x-www-form-urlencoded" and b"origin" not in headers:
        return
    raise UnsupportedEncodingError(f"Content-Type {_shown(kind)} is not read here: send application/json")


def _inflated(body: bytes, window: int, most_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window)
    try:
        content = inflater.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise InvalidInputError(f"the compressed body is broken: {error}") from None
    if len(content) > most_bytes:
        raise _too_large(most_bytes)
    if not inflater.eof or inflater.unused_data:
        raise InvalidInputError("the compressed body is cut off, or something follows it: send one whole stream")
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
    return TooLargeError(f"the body has more than {most_bytes} bytes: send less at once, or raise max_body_bytes")


def _shown(value: bytes) -> str:
    return repr(value[:64].decode("latin-1"))
