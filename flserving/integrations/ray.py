"""Ray Serve: several model servers behind one address, on one machine or on a cluster of them.

    python -m flserving.integrations.ray --registry models --model digits --max-replicas 2

Needs the extra ``ray``, best in an environment of its own: it brings some fifty packages along.
Every replica is a process with a :class:`ModelServer` of its own over the same registry, which
every machine must be able to read. It follows promotions by itself, as ``flserving serve`` does,
and answers with the same ASGI application: credentials, roles, clients, outputs. What Ray's proxy
does not have: gRPC, and our HTTP server's limits on slow connections.

**Which replica answers whom.** Ray's ConsistentHashRouter (a ring of hashes: Karger et al., STOC
1997), by the header Authorization: a credential is a client, and its requests reach the replica
that read its head, and that computed what it asks again. Ray's multiplexing mixin would do the same
by asking every replica which heads it holds: it needs a header of Ray's own in each request, and
the list of all heads, of which there may be a million, in every proxy. A ring needs neither, and of
N + 1 replicas a new one takes over 1 in N + 1 clients. Who sends no credential is dealt out.

**Starting on a busy machine.** Ray's raylet waits 15 s for two Python agents that it starts, which
no setting changes (ray-project/ray#65983), and Ray waits 30 s for the raylet, also where
``RAY_raylet_start_wait_time_s`` says more. So little else starts beside them (no dashboard, one
worker a core in advance, an object store of 80 MB), and a start that failed is made again: its
files are in the page cache then.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from flserving.api.cli import asked_tokens
from flserving.api.commands.parser import Parser
from flserving.api.dataplane import V2
from flserving.api.options import ApiOptions
from flserving.api.processes import STOPPING, Plan, serving
from flserving.api.rest.app import RestApp
from flserving.api.sockets import listen
from flserving.api.totals import EXCHANGE_S, Totals
from flserving.errors import ConfigError, FlservingError, check_number
from flserving.extras import of_extra
from flserving.models.own_code import import_option
from flserving.serving.config import ServingConfig

STARTS = 4
"""How often starting Ray is tried."""
REPLICA_BYTES = 512 << 20
"""Memory that Ray sets aside for a replica: torch takes 250 MB of it."""
_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes; requests do not go through it
_ENVIRONMENT = {  # of Ray's processes, replicas included
    "RAY_SERVE_SESSION_ID_HEADER_KEY": "authorization",
    # "no cluster", on Linux too: Ray's own ports on the loopback only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many replicas, and when.

    Args:
        min_replicas: So many are always there.
        max_replicas: And so many where the load asks for it; each takes a core and 512 MiB.
        ongoing: Requests under way at a replica, on average, above which there should be another
            one.
        affinity: Whether a credential's requests go to one replica.

    Raises:
        ConfigError: A value lies outside its bounds.
    """

    min_replicas: int = 1
    max_replicas: int = 2
    ongoing: int = 16
    affinity: bool = True

    def __post_init__(self) -> None:
        check_number("min_replicas", self.min_replicas, 1, 1000, whole=True)
        check_number("max_replicas", self.max_replicas, self.min_replicas, 1000, whole=True)
        check_number("ongoing", self.ongoing, 1, 1000, whole=True)


class Replica:
    """One model server, as Ray Serve runs it."""

    def __init__(self, plan: Plan) -> None:
        self._stack = contextlib.ExitStack()
        server = self._stack.enter_context(serving(plan))
        os.makedirs(plan.folder, exist_ok=True)  # on another machine than the first one
        self._totals = Totals(plan.folder, os.getpid(), server)
        v2 = V2(server)
        v2.others = self._totals.others
        self._rest = RestApp(v2, plan.options)
        self._name = f"{os.uname().nodename}-{os.getpid()}".encode()
        self._closing = threading.Event()
        threading.Thread(target=self._write, name="flserving-totals", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application that Ray asks for: that of ``serve``, and the header X-Served-By."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_signed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"x-served-by", self._name)]
                await send(message)

            await self._rest(scope, receive, send_signed)

        return answer  # a function: uvicorn takes a bound method for an application of ASGI 2

    def _write(self) -> None:
        while not self._closing.wait(EXCHANGE_S):
            # a full disk makes the others' sums older, and stops nobody
            with contextlib.suppress(OSError):
                self._totals.write()

    def __del__(self) -> None:
        """Ray calls it once the last request is answered."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._totals.write()
        self._stack.close()


@contextlib.contextmanager
def running(plan: Plan, scale: Scale, address: str | None = None) -> Iterator[str]:
    """Replicas of ``plan`` on Ray, until the block ends; gives the URL at which they answer.

    Args:
        address: Of a cluster that runs already, or "auto"; by default Ray is started on this
            machine and stopped.

    Raises:
        NotSupportedError: Ray is not installed.
        ConfigError: Too few cores, or too little memory, for ``max_replicas``; no cluster at
            ``address``; ``admin``.
        ConflictError: The port is in use.
    """
    options = plan.options
    if options.admin:
        raise ConfigError(
            "admin with several replicas: a load would reach one of them only; use flserving serve"
        )
    if address is None:
        os.environ |= _ENVIRONMENT  # before the import, which reads them
    with of_extra("ray"):
        import ray
        from ray import serve
    with listen(options.host, options.port) as probe:
        options = replace(options, grpc_port=None, port=probe.getsockname()[1])
    # here and not only in a replica: what is wrong with it is then said at once, and in words
    with serving(plan):
        pass
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="flserving-ray-", ignore_cleanup_errors=True)
        )
        if address is None:
            _start_ray(folder)
        else:
            try:
                ray.init(address, log_to_driver=False, configure_logging=False)
            except ConnectionError as error:
                raise ConfigError(
                    f"no Ray cluster answers at {address!r}: see ray start --head ({error})"
                ) from error
        stack.callback(ray.shutdown)
        check_room(ray.cluster_resources(), scale)
        http = {"host": options.host, "port": options.port}
        if options.secure:
            http |= {"ssl_certfile": options.certificate, "ssl_keyfile": options.key}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        serve.start("EveryNode", http, logging_config=quiet)
        stack.callback(serve.shutdown)
        scaling = {
            "min_replicas": scale.min_replicas,
            "initial_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.ongoing,
        }
        router = (
            {"request_router_config": {"request_router_class": _ROUTER}} if scale.affinity else {}
        )
        deployment = serve.deployment(
            serve.ingress()(Replica),
            name="flserving",
            ray_actor_options={"num_cpus": 1, "memory": REPLICA_BYTES},
            max_ongoing_requests=options.max_connections,
            autoscaling_config=scaling,
            max_constructor_retry_count=1,
            logging_config=quiet,
            **router,
        )
        # replicas run in other folders
        registry = os.path.abspath(os.path.expanduser(plan.registry))
        plan = replace(
            plan, registry=registry, options=options, folder=os.path.join(folder, "totals")
        )
        try:
            serve.run(deployment.bind(plan), name="flserving")
        except RuntimeError as error:
            deployments = serve.status().applications["flserving"].deployments.values()
            reasons = "; ".join(deployment.message for deployment in deployments)
            raise FlservingError(f"Ray could not start the replicas: {reasons or error}") from error
        yield options.url(options.port)


def check_room(resources: MutableMapping[str, float], scale: Scale) -> None:
    """Raise ConfigError where the cluster's cores or memory are not enough for ``max_replicas``."""
    for name, each, unit in (("CPU", 1, "cores"), ("memory", REPLICA_BYTES, "bytes of memory")):
        there = resources.get(name, 0)
        if there < scale.max_replicas * each:
            raise ConfigError(
                f"max_replicas is {scale.max_replicas}: they take {scale.max_replicas * each} {unit}, Ray has "
                f"{there:.0f}: take at most {int(there // each)} replicas, or add machines with ray start"
            )


def _start_ray(folder: str) -> None:
    """Ray on this machine alone, with all its files in ``folder``. Raises FlservingError."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(
                "local",
                num_cpus=os.cpu_count(),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=folder,
            )
            return
        except Exception as error:  # Ray raises no narrower class here
            ray.shutdown()
            if not left:
                raise FlservingError(f"Ray did not start in {STARTS} tries: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a registry on Ray until SIGTERM or Ctrl-C."""
    parser = Parser(prog="python -m flserving.integrations.ray", description=main.__doc__)
    expanded = os.path.expanduser
    parser.add_argument(
        "--registry", required=True, metavar="DIR", type=expanded, help="every machine must see it"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the one model to serve; by default all of the registry"
    )
    import_option(parser)
    for name, text in (
        ("min", "always there"),
        ("max", "where the load asks for it; each takes a core"),
    ):
        default = Scale.__dataclass_fields__[f"{name}_replicas"].default
        parser.add_argument(f"--{name}-replicas", type=int, default=default, help=text)
    parser.add_argument(
        "--address", help="of a Ray cluster, or auto; by default Ray is started here and stopped"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other computers in"
    )
    parser.add_argument("--port", type=int, default=8000, help="port of REST; 0 takes a free one")
    parser.add_argument(
        "--allow-host", action="append", default=[], help="one more name for the Host header"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", type=expanded, help="as that of flserving serve"
    )
    parser.add_argument(
        "--no-token", action="store_true", help="let everybody in who can reach the port"
    )
    parser.add_argument(
        "--outputs", default="full", help="what answers show: see flserving serve --help"
    )
    parser.set_defaults(admin=False)
    given = parser.parse_args(argv)
    try:
        tokens, token = asked_tokens(given)
        options = ApiOptions(
            host=given.host,
            port=given.port,
            tokens=tokens,
            hosts=tuple(given.allow_host),
        )
        plan = Plan(
            registry=given.registry,
            model=given.model,
            config=ServingConfig(outputs=given.outputs),
            options=options,
            imports=tuple(given.imports),
        )
        scale = Scale(min_replicas=given.min_replicas, max_replicas=given.max_replicas)
        with running(plan, scale, given.address) as url:
            stop = threading.Event()
            # only now: Ray puts handlers of its own in place when it starts
            for number in STOPPING:
                signal.signal(number, lambda *_: stop.set())
            print(f"REST   {url}\ntoken  {token}", flush=True)
            stop.wait()
    except FlservingError as error:
        print(f"flserving: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # so that replicas find its classes by this name
    from flserving.integrations import ray as module

    sys.exit(module.main())
