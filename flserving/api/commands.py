"""The commands that serve: ``flserving serve`` and ``flserving demo``. Each loads what it needs when it runs."""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from flserving.api.options import ApiOptions
from flserving.errors import ConfigError
from flserving.models.own_code import import_option
from flserving.serving.config import CHOICES, ServingConfig

_API = {  # field of ApiOptions -> its help
    "host": "address to listen on; 0.0.0.0 lets other computers in",
    "port": "port of REST; 0 takes a free one",
    "grpc_port": "port of gRPC; 0 takes a free one",
    "max_body_bytes": "largest body of a request",
    "max_numbers": "most numbers in a body that are not binary tensors; a list counts as 16",
    "max_connections": "most connections at once, for each door of each worker",
    "slow_client_s": "longest wait for the rest of a request that has begun",
    "certificate": "PEM file with the certificate chain: REST and gRPC then speak TLS",
    "key": "PEM file with the certificate's private key",
}
_PORTS = {"port": 8000, "grpc_port": 8001}


def serve_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving serve``; those of :class:`ServingConfig` are its fields."""
    home = os.path.expanduser  # a shell leaves ~ alone in --registry=~/models
    parser.add_argument(
        "--registry", required=True, metavar="DIR", type=home, help="folder that versions were published to"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the one model to serve; by default all of the registry, new ones too"
    )
    import_option(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes on one port, each with its own engine")
    parser.add_argument("--grace-s", type=float, default=5.0, help="how long admitted requests may finish at the end")
    parser.add_argument("--notice-s", type=float, default=0.5, help="how long before that readiness is false already")
    parser.add_argument(
        "--token-file", metavar="FILE", type=home, help='JSON: [{"token": "...", "role": "infer"}, ...]'
    )
    parser.add_argument("--no-token", action="store_true", help="let everybody in who can reach the port")
    parser.add_argument("--no-grpc", action="store_true", help="REST only")
    parser.add_argument("--admin", action="store_true", help="let the role admin load and unload models")
    parser.add_argument("--artifacts", action="store_true", help="let devices (flserving edge) download the models")
    parser.add_argument("--origin", action="append", default=[], help="web page that may call: https://host[:port]")
    parser.add_argument("--allow-host", action="append", default=[], help="one more name for the Host header")
    for name, text in _API.items():
        default = _PORTS.get(name, ApiOptions.__dataclass_fields__[name].default)
        kind = str if default is None else type(default)
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(_flag(name), type=kind, default=default, help=text + shown)
    settings = parser.add_argument_group("batching, caches and limits (see flserving.ServingConfig)")
    for field in dataclasses.fields(ServingConfig):
        choices = CHOICES.get(field.name)
        settings.add_argument(
            _flag(field.name), type=str if choices else _number, default=field.default, choices=choices,
            help=f"default {field.default}",
        )  # fmt: skip


def serve(arguments: argparse.Namespace) -> int:
    """Serve a registry with ``--workers`` processes until SIGTERM or Ctrl-C."""
    from flserving.api.supervisor import Supervisor
    from flserving.api.worker import Plan

    given = vars(arguments)
    config = ServingConfig(**{field.name: given[field.name] for field in dataclasses.fields(ServingConfig)})
    tokens, token = _tokens(arguments)
    options = ApiOptions(
        **{name: given[name] for name in _API if name != "grpc_port"},
        grpc_port=None if arguments.no_grpc else arguments.grpc_port,
        tokens=tokens,
        admin=arguments.admin,
        artifacts=arguments.artifacts,
        origins=tuple(arguments.origin),
        hosts=tuple(arguments.allow_host),
    )
    plan = Plan(
        registry=arguments.registry,
        model=arguments.model,
        config=config,
        options=options,
        imports=tuple(arguments.imports),
    )
    supervisor = Supervisor(
        plan, arguments.workers, drain_s=arguments.grace_s, notice_s=arguments.notice_s,
        say=lambda line: print(f"flserving: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip

    def announce(url: str, grpc_url: str | None) -> None:
        print(f"REST   {url}\ngRPC   {grpc_url or 'off'}\ntoken  {token}", flush=True)

    return supervisor.run(announce)


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving demo``."""
    parser.add_argument(
        "--directory", metavar="DIR", type=os.path.expanduser, help="keep the registry here; by default it is temporary"
    )
    parser.add_argument("--rounds", type=int, default=3, help="federated rounds to train (default 3)")
    parser.add_argument("--port", type=int, default=0, help="port of REST; 0 takes a free one")


def demo(arguments: argparse.Namespace) -> int:
    """Train a model over clients, publish its rounds, promote the best, serve it, and say how to call it."""
    from flserving import api
    from flserving.federated import train
    from flserving.federated.data import digits
    from flserving.federated.rounds import publish_rounds
    from flserving.registry import Registry
    from flserving.serving.server import ModelServer

    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="flserving-demo-") as temporary:
        folder = Path(arguments.directory or temporary) / "registry"
        with Registry(folder) as registry:
            first = max(registry.version_numbers("digits"), default=0) + 1
            print(f"training {arguments.rounds} federated rounds of 20 clients ...", flush=True)
            run = train(rounds=arguments.rounds, progress=False, on_round=publish_rounds(registry, "digits"))
            best = max(range(len(run.rounds)), key=lambda place: run.rounds[place].metrics["global_accuracy"])
            registry.set_alias("digits", "default", first + best, who="flserving demo", why="best global accuracy")
            accuracy = run.rounds[best].metrics["global_accuracy"]
            print(f"published as versions {first} to {first + arguments.rounds - 1} of 'digits' in {folder}")
            print(f"promoted version {first + best}: {accuracy:.1%} of the clients' held-out digits are right")
            row, label = digits()[0][:1], digits()[1][0]
            with ModelServer(registry=registry) as server, api.serve(server, port=arguments.port) as endpoint:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: stop.set())
                print(f"\nask it (a handwritten {label}):\n")
                print("\n\n".join(_curl_lines(endpoint.url, endpoint.headers, row.tolist())))
                print("\nCtrl-C ends it", flush=True)
                stop.wait()
                print("draining ...", flush=True)
    return 0


def _curl_lines(url: str, headers: dict[str, str], row: list[list[float]]) -> list[str]:
    token = "".join(f"-H '{name}: {value}' " for name, value in headers.items())
    data = [[round(value, 4) for value in values] for values in row]
    tensor = f'{{"name": "features", "shape": [1, {len(row[0])}], "datatype": "FP32", "data": {data}}}'
    return [
        f"curl -s {url}/v2/health/ready",
        f"curl -s {token}{url}/v2/models/digits",
        f"curl -s {token}{url}/v2/models/digits/infer -d '{{\"inputs\": [{tensor}]}}'",
        f"curl -s {token}{url}/metrics",
    ]


def _tokens(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Whom to let in, and what to tell the operator about it."""
    from flserving.api.auth import Role, Tokens

    role = Role.ADMIN if arguments.admin else Role.INFER
    given = os.environ.get("FLSERVING_TOKEN")
    if arguments.no_token and (arguments.token_file or given):
        raise ConfigError("--no-token beside a token: drop one of them (also the variable FLSERVING_TOKEN)")
    if arguments.no_token:
        return Tokens.open(), "none is asked"
    tokens = Tokens.read(arguments.token_file) if arguments.token_file else Tokens()
    if given:
        tokens.add(given, role)
    if arguments.token_file:
        return tokens, f"those in {arguments.token_file}"
    if given:
        return tokens, "the one in FLSERVING_TOKEN"
    return Tokens.random(role)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdecimal() else float(text)
