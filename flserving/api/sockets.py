"""Listening sockets: opened with words for what is wrong, and closed without a reset for who has
just connected."""

import asyncio
import contextlib
import ctypes
import errno
import os
import selectors
import socket
import struct
import sys

from flserving.errors import ConfigError, ConflictError

_SO_ATTACH_FILTER = 26
# Classic BPF over a TCP header: drop what has the flag SYN, keep the rest
_NO_SYN = struct.pack(
    "=HBBIHBBIHBBIHBBI",
    0x30, 0, 0, 13,
    0x45, 0, 1, 0x02,
    0x06, 0, 0, 0,
    0x06, 0, 0, 0xFFFFFFFF
)  # fmt: skip
_POLL_S = 0.005


def listen(host: str, port: int, reuse_port: bool = False, backlog: int = 2048) -> socket.socket:
    """A socket that listens on the port; with ``backlog`` 0 it only keeps the port for sockets with
    ``reuse_port``.

    Raises:
        ConflictError: The port is in use.
        ConfigError: There is no such address here, or the port needs more rights.
    """
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows it would let two servers share a port by accident
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if backlog:
            listener.listen(backlog)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(
                f"port {port} of {host} is in use: stop what listens there, or take port 0"
            ) from error
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error.strerror}): take 127.0.0.1 or an address of this computer, "
            "and a port above 1023"
        ) from error


def descriptors(wanted: int) -> int:
    """How many files this process may hold open, after raising the soft limit as far as ``wanted``
    where it is lower and the hard limit allows it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    raised = wanted
    if hard != resource.RLIM_INFINITY:
        raised = min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (ValueError, OSError):  # the kernel's own maximum is lower
        return soft
    return raised


async def refuse(listener: socket.socket, end_s: float) -> None:
    """Let nobody new connect, and the event loop accept all who have: those in the queue when a
    listener closes are reset, though each may have sent a request already.

    On Linux the kernel then drops a stranger's first packet, who tries again after a second and
    finds the port closed or another process. Elsewhere, and where a kernel lets root alone attach a
    filter, there is no such means: the queue is only seen to be empty a moment before.
    """
    if sys.platform == "linux":
        steps = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
        program = struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(steps))
        with contextlib.suppress(PermissionError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    loop = asyncio.get_running_loop()
    await asyncio.sleep(_POLL_S)  # for handshakes under way
    while readable(listener) and loop.time() < end_s:
        await asyncio.sleep(_POLL_S)


def readable(peer: socket.socket) -> bool:
    """Whether something came that nobody has taken yet: bytes, the end, or for a listener a
    connection."""
    with selectors.DefaultSelector() as selector:
        selector.register(peer, selectors.EVENT_READ)
        return bool(selector.select(0))
