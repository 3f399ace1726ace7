"""The gRPC server: where it listens, and the limits that gRPC itself keeps. The methods are in
``service.py``.

It runs on the event loop that starts it: calls that one pass of the loop finds share a batch with
those of REST.
"""

from pathlib import Path

import grpc
import grpc.aio

from flserving.api.dataplane import V2
from flserving.api.grpc.service import MOST_STRANGERS, MOST_WATCHERS, Service
from flserving.api.options import ApiOptions
from flserving.errors import ConfigError


class GrpcServer:
    """A gRPC server that runs. ``port`` is where.

    Against strangers it keeps the bounds that gRPC offers: connections, silent ones and idle ones
    in time, streams, calls, message and header sizes; the credential is checked before a message is
    read, and each message has a clock. So memory is bounded (``tests/benchmarks/attacks.py``
    measures it). Work is not: gRPC for Python has no bound on CONTINUATION frames of a header
    block, which it decodes and throws away, nor on new calls a second, and offers Python no
    resource quota. Towards a network that nobody trusts, put a proxy in front of gRPC, or leave it
    out.
    """

    def __init__(self, server: grpc.aio.Server, service: Service, port: int) -> None:
        self._server = server
        self._service = service
        self.port = port

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; those under way have ``grace_s`` to end, then they are cancelled.
        Idempotent.

        A call that comes between the shutdown of gRPC's core and the moment when its client hears
        of it is CANCELLED by the core itself: no handler sees it and no option changes it.
        :class:`Client` tries it again.
        """
        self._service.stopping.set()  # watchers would stay to the end of the grace
        await self._server.stop(grace_s)


async def start_grpc(v2: V2, options: ApiOptions, *, reuse_port: bool = False) -> GrpcServer:
    """Serve ``v2`` on ``options.host`` and ``options.grpc_port``, in the running event loop.

    Args:
        options: Their ``tokens`` say who may ask what; None lets nobody in but to the health
            checks.
        reuse_port: Let several processes listen on one port.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    service = Service(v2, options)
    server = _server(options, reuse_port)
    for name, methods in service.methods().items():
        server.add_registered_method_handlers(name, methods)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port or 0}"
    try:
        if options.certificate is None or options.key is None:
            port = server.add_insecure_port(address)
        else:
            pair = Path(options.key).read_bytes(), Path(options.certificate).read_bytes()
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"gRPC cannot listen on {address}: is the port taken, or the address not this computer's?"
        ) from error
    await server.start()
    return GrpcServer(server, service, port)


def _server(options: ApiOptions, reuse_port: bool) -> grpc.aio.Server:
    # limits of gRPC itself: every one of them bounds what a stranger can make the process hold
    slow_client_ms = int(options.slow_client_s * 1e3)
    limits = {
        "grpc.so_reuseport": int(reuse_port),
        "grpc.max_receive_message_length": options.max_body_bytes,
        "grpc.max_send_message_length": -1,
        "grpc.max_concurrent_streams": 1024,  # of one connection
        "grpc.max_connection_idle_ms": slow_client_ms,  # clients connect again by themselves
        "grpc.max_allowed_incoming_connections": options.max_connections,
        "grpc.absolute_max_metadata_size": 8192,  # as what gRPC calls the soft limit
        # calls that the event loop has not seen: from here on some are refused,
        "grpc.server.max_pending_requests": 256,
        "grpc.server.max_pending_requests_hard_limit": 512,  # and here all
        "grpc.server_handshake_timeout_ms": slow_client_ms,
        # else the windows of streams that nobody reads grow from 64 KiB to megabytes
        "grpc.http2.bdp_probe": 0,
        # no byte stands for a header that its sender made up
        "grpc.http2.hpack_table_size.decoder": 0,
        "grpc.http2.settings_timeout": slow_client_ms,  # the time to agree on that
        "grpc.keepalive_time_ms": 60_000,  # finds connections whose other end is gone
        "grpc.keepalive_timeout_ms": 20_000,
        # more often is a flood: two strikes, then goodbye
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.http2.max_ping_strikes": 2,
    }
    return grpc.aio.server(
        options=list(limits.items()),
        maximum_concurrent_rpcs=options.max_connections + MOST_WATCHERS + MOST_STRANGERS + 64,
    )
