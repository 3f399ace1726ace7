"""The doors to a server for other processes: REST and gRPC by the Open Inference Protocol V2, and what serves them."""

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
