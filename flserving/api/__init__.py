"""The network: REST and gRPC by the Open Inference Protocol V2, clients, processes and the command
line.

``dataplane.py`` is what both protocols do once they have read the bytes, ``rest/`` and ``grpc/``
how they read them, ``auth.py`` who may. ``endpoint.py`` serves from a thread of this process
(notebook 05), ``processes.py`` from several processes, whose counts ``totals.py`` adds up.
``client/`` calls. ``cli.py`` is the command; ``doctor.py`` is its check.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flserving.api.endpoint import Endpoint
    from flserving.api.rest.app import RestApp
    from flserving.serving.server import ModelServer


def serve(server: "ModelServer", **options: Any) -> "Endpoint":
    """Let other processes call ``server`` over REST and gRPC, from a thread and an event loop of
    their own.

    ::

        with flserving.serve(server) as endpoint:
            print(endpoint.url, endpoint.headers)

    Args:
        options: Of :class:`flserving.api.options.ApiOptions`: by default free ports on 127.0.0.1
            and a random token.

    Raises:
        ConfigError: An option is wrong.
        ConflictError: A port is in use.
    """
    from flserving.api.endpoint import open_endpoint  # not before it is asked for: it loads uvicorn

    return open_endpoint(server, **options)


def asgi(server: "ModelServer", **options: Any) -> "RestApp":
    """The REST protocol of ``server`` as an ASGI application, for a web server or another
    application to run.

    ::

        models = flserving.asgi(server, hosts=("models.example.org",))
        app = Starlette(routes=[Mount("/models", models)])  # FastAPI: app.mount("/models", models)
        print(models.token)

    Closing ``server`` is the caller's. Give ``tokens`` where several processes answer: a random one
    is each one's own.

    Args:
        options: Those of :func:`serve` that are not about a port: ``tokens``, ``admin``,
            ``artifacts``, ``origins``, ``hosts`` (the names that callers use; addresses of this
            computer always may), ``max_body_bytes`` and ``max_numbers``. Slow clients and the
            number of connections are for the web server to bound.

    Raises:
        ConfigError: An option is wrong, or one of a port.
    """
    from flserving.api.endpoint import application

    return application(server, **options)
