"""HTTP/2 as no gRPC client writes it: frames of callers without a credential who want the server's
memory or time."""

import contextlib
import socket
import struct

from grpc_door import INFER
from serving_models import PATIENCE_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def frame(kind, flags, stream, body):
    """One of HTTP/2 (RFC 9113, 4.1)."""
    return (
        struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
    )


def opening(path, stream):
    """The headers of a call without a credential, uncompressed; no message follows."""
    fields = {
        ":path": path,
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    literal = [
        bytes([0, len(name)]) + name.encode() + bytes([len(text)]) + text.encode()
        for name, text in fields.items()
    ]
    return frame(1, 4, stream, b"\x83\x86" + b"".join(literal))  # POST, http


def connected(target):
    host, _, port = target.rpartition(":")
    client = socket.create_connection((host, int(port)), PATIENCE_S)
    client.sendall(PREFACE + SETTINGS)
    return client


def indexed(stream, opens):
    """A call without a credential whose headers are 400 times one of the sender's own, a byte each
    (RFC 7541)."""
    own = b"\x40\x03x-a\x01v" if opens else b""  # into the dynamic table, as its only entry
    return frame(1, 4, stream, opening(INFER, stream)[9:] + own + b"\xbe" * 400)


def push(client, path, nbytes):
    """Begin a message of ``nbytes`` and send what flow control lets through, but for the last
    byte."""
    with contextlib.suppress(OSError):
        client.sendall(opening(path, 1))
        windows = {0: 65_530, 1: 65_530}
        client.sendall(frame(0, 0, 1, b"\0" + struct.pack(">I", nbytes)))
        left = nbytes - 1
        came = b""
        while left:
            size = min(16_384, left, *windows.values())
            if size > 0:
                client.sendall(frame(0, 0, 1, bytes(size)))
                left -= size
                windows = {stream: window - size for stream, window in windows.items()}
                continue
            more = client.recv(65_536)
            came += more
            while len(came) >= 9 and len(came) >= (end := 9 + int.from_bytes(came[:3])):
                kind, flags, stream, body = came[3], came[4], int.from_bytes(came[5:9]), came[9:end]
                came = came[end:]
                if kind == 3 or not more:
                    return  # refused
                if kind == 6 and not flags & 1:
                    client.sendall(frame(6, 1, 0, body))
                if kind == 8:
                    windows[stream] = windows.get(stream, 0) + int.from_bytes(body)
                if kind == 4 and not flags & 1:
                    client.sendall(frame(4, 1, 0, b""))
                    settings = {
                        body[at : at + 2]: int.from_bytes(body[at + 2 : at + 6])
                        for at in range(0, len(body), 6)
                    }
                    windows[1] += settings.get(b"\0\4", 65_535) - 65_535
