"""The network: REST and gRPC by the Open Inference Protocol V2, clients, processes and the command line.

``dataplane.py`` is what both protocols do once they have read the bytes, ``rest/`` and ``grpc/`` how they read them,
``auth.py`` who may. ``endpoint.py`` serves from a thread of this process (notebook 05), ``supervisor.py`` and
``worker.py`` from processes of their own. ``client/`` asks. ``cli.py`` is the command; ``doctor.py`` is its check.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flserving.api.endpoint import Endpoint
    from flserving.serving.server import ModelServer


def serve(server: "ModelServer", **options: Any) -> "Endpoint":
    """Let other processes call ``server`` over REST and gRPC, from a thread and an event loop of their own.

    ::

        with flserving.serve(server) as endpoint:
            print(endpoint.url, endpoint.headers)

    Args:
        options: Of :class:`flserving.api.options.ApiOptions`: by default free ports on 127.0.0.1 and a random token.

    Raises:
        ConfigError: An option is wrong. ConflictError: A port is in use.
    """
    from flserving.api.endpoint import open_endpoint  # not before it is asked for: it loads uvicorn

    return open_endpoint(server, **options)
