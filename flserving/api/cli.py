"""The ``flserving`` command and its subcommands. Each loads what it needs when it is chosen.

A new subcommand is one more entry in ``COMMANDS`` (of ``registry``: in ``commands/registry.py``): a
function that runs, and one that adds its options to a parser.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import random
import re
import secrets
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flserving.api.commands.parser import Command, Parser, Version, described, subcommands
from flserving.errors import ConfigError, FlservingError
from flserving.extras import need

if TYPE_CHECKING:
    from flserving.edge import EdgeModelServer, HybridServer, SyncAgent
    from flserving.monitoring.observability import Observability

_TOKEN = "FLSERVING_TOKEN"
_CLOUD_TOKEN = "FLSERVING_CLOUD_TOKEN"
_log = logging.getLogger("flserving")
_home = os.path.expanduser  # a shell leaves ~ alone in --registry=~/models


# serve

_PORTS = {"port": 8000, "grpc_port": 8001}
# settings of ApiOptions that are not passed on as they are typed
_OWN = {"grpc_port", "tokens", "admin", "artifacts", "origins", "hosts"}
_OUTPUTS = "what answers show: full, label, top-K (classes) or rounded-D (decimals)"


def _one_core() -> None:
    """NumPy's products keep to one core, as torch's do. It looks once, when it is loaded: the
    options below load it."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving serve``: the fields of ApiOptions and of ServingConfig, with what
    these say of them."""
    _one_core()
    from flserving.api.options import ApiOptions
    from flserving.models.own_code import import_option
    from flserving.serving.config import CHOICES, ServingConfig

    parser.add_argument(
        "--registry",
        required=True,
        metavar="DIR",
        type=_home,
        help="folder that versions were published to",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the one model to serve; by default all of the registry, new ones too",
    )
    import_option(parser)
    parser.add_argument(
        "--workers", type=int, default=1, help="processes on one port, each with its own engine"
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=5.0,
        help="how long admitted requests may finish at the end",
    )
    parser.add_argument(
        "--notice-s",
        type=float,
        default=0.5,
        help="how long before that readiness is false already",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=_home,
        help='JSON: [{"token": "...", "role": "infer"}, ...]',
    )
    parser.add_argument(
        "--no-token", action="store_true", help="let everybody in who can reach the port"
    )
    parser.add_argument("--no-grpc", action="store_true", help="REST only")
    parser.add_argument(
        "--admin", action="store_true", help="let the role admin load and unload models"
    )
    parser.add_argument(
        "--artifacts", action="store_true", help="let devices (flserving edge) download the models"
    )
    parser.add_argument(
        "--origin", action="append", default=[], help="web page that may call: https://host[:port]"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], help="one more name for the Host header"
    )
    texts = described(ApiOptions) | described(ServingConfig)
    for field in dataclasses.fields(ApiOptions):
        if field.name not in _OWN or field.name in _PORTS:
            default = _PORTS.get(field.name, field.default)
            kind = str if default is None else type(default)
            parser.add_argument(
                _flag(field.name), type=kind, default=default, help=texts[field.name]
            )
    _observability_options(parser)
    settings = parser.add_argument_group(
        "batching, caches and limits (see flserving.ServingConfig)"
    )
    for field in dataclasses.fields(ServingConfig):
        settings.add_argument(
            _flag(field.name),
            type=str if isinstance(field.default, str) else _number,
            default=field.default,
            choices=CHOICES.get(field.name),
            help=texts[field.name],
        )


def _serve(arguments: argparse.Namespace) -> int:
    """Serve a registry with ``--workers`` processes until SIGTERM or Ctrl-C."""
    from flserving.api.options import ApiOptions
    from flserving.api.processes import Plan, Supervisor
    from flserving.serving.config import ServingConfig

    given = vars(arguments)
    config = ServingConfig(
        **{field.name: given[field.name] for field in dataclasses.fields(ServingConfig)}
    )
    tokens, token = asked_tokens(arguments)
    options = ApiOptions(
        **{
            field.name: given[field.name]
            for field in dataclasses.fields(ApiOptions)
            if field.name not in _OWN
        },
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
        observability=_observability(arguments),
    )
    supervisor = Supervisor(
        plan,
        arguments.workers,
        drain_s=arguments.grace_s,
        notice_s=arguments.notice_s,
        say=_log.warning,
    )

    def announce(url: str, grpc_url: str | None) -> None:
        print(f"REST   {url}\ngRPC   {grpc_url or 'off'}\ntoken  {token}", flush=True)

    return supervisor.run(announce)


def asked_tokens(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Whom to let in, and what to tell the operator about it."""
    from flserving.api.auth import Role, Tokens

    role = Role.ADMIN if arguments.admin else Role.INFER
    given = os.environ.get(_TOKEN)
    if arguments.no_token and (arguments.token_file or given):
        raise ConfigError(
            "--no-token beside a token: drop one of them (also the variable FLSERVING_TOKEN)"
        )
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


def _observability_options(parser: argparse.ArgumentParser) -> None:
    from flserving.monitoring.observability import FORMATS, LEVELS, Observability

    settings = parser.add_argument_group("logs and traces")
    texts = described(Observability)
    settings.add_argument("--log-level", choices=LEVELS, default="info", help=texts["log_level"])
    settings.add_argument("--log-format", choices=FORMATS, default="text", help=texts["log_format"])
    settings.add_argument("--access-log", action="store_true", help=texts["access_log"])
    settings.add_argument("--otel", metavar="URL", help=texts["otel"])


def _observability(arguments: argparse.Namespace) -> "Observability":
    from flserving.monitoring.observability import Observability

    names = ("log_level", "log_format", "access_log", "otel")
    settings = Observability(**{name: getattr(arguments, name) for name in names})
    settings.configure()
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


# edge

_END_S = 2.0  # how long a pull under way may hold up the end
_FIRST_S = 1.0  # the wait after a first failure; it doubles up to ``poll_s``


def _edge_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving edge``."""
    _one_core()
    from flserving.models.own_code import import_option
    from flserving.serving.config import CHOICES

    parser.add_argument(
        "--cloud", required=True, metavar="URL", help="a server that was started with --artifacts"
    )
    parser.add_argument(
        "--client",
        required=True,
        metavar="ID",
        help="whose device this is: its own head comes along",
    )
    parser.add_argument(
        "--directory",
        required=True,
        metavar="DIR",
        type=_home,
        help="where the device keeps its models",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the model to run; the first one of the cloud by default"
    )
    import_option(parser)
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=_home,
        help=f"the token for the cloud; or the variable {_CLOUD_TOKEN}",
    )
    parser.add_argument(
        "--key",
        metavar="HEX",
        help="the cloud's public key (GET .../release tells it); by default that of the first contact",
    )
    parser.add_argument(
        "--ca", metavar="FILE", type=_home, help="PEM file of the authority to trust for https"
    )
    parser.add_argument(
        "--engine",
        choices=CHOICES["engine"],
        default="torch",
        help="numpy: without torch, which is slow to load and large; for linear layers with ReLU",
    )
    parser.add_argument(
        "--form", choices=["exact", "int8"], default="exact", help="int8: a quarter of the bytes"
    )
    parser.add_argument(
        "--poll-s", type=float, default=60.0, help="how often to look for a newer model"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=10.0, help="longest silence of the cloud"
    )
    parser.add_argument(
        "--fresh-s", type=float, help="an answer from an older model says that it is degraded"
    )
    parser.add_argument("--refuse-s", type=float, help="an older model does not answer")
    parser.add_argument(
        "--policy",
        choices=["local", "local_first", "as_drawn"],
        default="local",
        help="local: nothing that is asked leaves the device; the others ask the cloud where they are "
        "in doubt, and choosing one is the consent to that",
    )
    parser.add_argument("--outputs", default="full", help=_OUTPUTS)
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="lowest confidence that is trusted"
    )
    _observability_options(parser)
    parser.add_argument(
        "--port", type=int, default=0, help="port of REST on 127.0.0.1; 0 takes a free one"
    )
    parser.add_argument("--grpc-port", type=int, default=0, help="port of gRPC; 0 takes a free one")
    parser.add_argument("--no-grpc", action="store_true", help="REST only")


def _edge(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, from the first moment on and without the cloud; update in the
    background."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    observability = _observability(arguments)
    _check_edge(arguments)
    from flserving import api
    from flserving.api.auth import Role, Tokens
    from flserving.edge import EdgeModelServer
    from flserving.edge.sync import Memory, SyncAgent, SyncSettings
    from flserving.models.own_code import import_modules
    from flserving.registry import Registry
    from flserving.serving.config import ServingConfig

    import_modules(arguments.imports)
    given = os.environ.get(_TOKEN)
    token = given or secrets.token_urlsafe(32)
    tokens = Tokens()
    tokens.add(token, Role.INFER, arguments.client)
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(Registry(arguments.directory))
        memory = Memory(registry)
        model = (
            arguments.model
            or memory.facts.model
            or next(iter(registry.models_by_promotion()), "model")
        )
        edge = stack.enter_context(
            EdgeModelServer(
                config=ServingConfig(engine=arguments.engine, outputs=arguments.outputs),
                registry=registry,
                model=model,
                client=arguments.client,
                wall=memory.wall,
                fresh_s=arguments.fresh_s,
                refuse_s=arguments.refuse_s,
            )
        )
        secret = _cloud_token(arguments.token_file)
        ca = None if arguments.ca is None else _read(arguments.ca)
        settings = SyncSettings(
            key=arguments.key, ca=ca, timeout_s=arguments.timeout_s, memory=memory
        )
        agent = SyncAgent(
            arguments.cloud,
            secret,
            registry,
            edge=edge,
            model=arguments.model,
            client=arguments.client,
            form=arguments.form,
            settings=settings,
        )
        stack.callback(agent.close)
        server: Any = edge
        if arguments.policy != "local":
            server = stack.enter_context(_hybrid(arguments, edge, secret, stack))
        end_spans = observability.observe(edge)
        grpc_port = None if arguments.no_grpc else arguments.grpc_port
        endpoint = stack.enter_context(
            api.serve(server, tokens=tokens, port=arguments.port, grpc_port=grpc_port)
        )
        shown = "the one in FLSERVING_TOKEN" if given else token
        print(
            f"REST   {endpoint.url}\ngRPC   {endpoint.grpc_url or 'off'}\ntoken  {shown}",
            flush=True,
        )
        pulling = threading.Thread(
            target=_keep_up, args=(agent, arguments.poll_s, stop, _say), daemon=True
        )
        pulling.start()
        stop.wait()
        # also where the first look for an update is not over yet and has said nothing
        _say("stopping")
        endpoint.close()
        end_spans()
        pulling.join(_END_S)
        if pulling.is_alive():  # the registry survives any end; a silent cloud must not put it off
            sys.stdout.flush()
            os._exit(0)
    return 0


def _hybrid(
    arguments: argparse.Namespace,
    edge: "EdgeModelServer",
    token: str | None,
    stack: contextlib.ExitStack,
) -> "HybridServer":
    from flserving.api.client import Client
    from flserving.edge import HybridServer, HybridSettings

    if edge.model not in edge.registry.models() and arguments.model is None:
        raise ConfigError(
            f"policy {arguments.policy!r} asks the cloud for a model: name it with --model"
        )
    client = stack.enter_context(Client(arguments.cloud, token, ca=arguments.ca))
    return HybridServer(
        edge,
        client,
        arguments.policy,
        consent=True,
        threshold=arguments.threshold,
        settings=HybridSettings(personal=True),
    )


def _keep_up(
    agent: "SyncAgent", poll_s: float, stop: threading.Event, say: Callable[[str], object]
) -> None:
    """Pull, wait, pull. Waits are spread by a tenth: a fleet that started together does not come
    together."""
    wait_s = _FIRST_S
    last = ""
    while not stop.is_set():
        try:
            pulled = agent.pull()
            line = f"round {pulled.round} serves (the cloud's version {pulled.version}, here {pulled.local})"
            wait_s = _FIRST_S
            pause_s = poll_s
        except Exception as error:  # whatever happens to an update, the device serves on
            line = f"no update ({error if isinstance(error, FlservingError) else type(error).__name__})"
            pause_s = min(wait_s, poll_s)
            wait_s *= 2
        if line != last and not stop.is_set():
            say(line)
        last = line
        stop.wait(pause_s * random.uniform(0.9, 1.1))


def _say(line: str) -> None:
    # part of it may be the cloud's
    text = "".join(char if char.isprintable() else "?" for char in line)
    _log.info("%s", text)


def _check_edge(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot work, before anything is opened."""
    from flserving.api.client.client import address

    for name in ("poll_s", "timeout_s"):
        if not 0 < (seconds := getattr(arguments, name)) <= 86_400:
            raise ConfigError(
                f"{name.replace('_', '-')} is {seconds}: it must lie in (0, 86400] seconds"
            )
    if arguments.key is not None and (
        len(arguments.key) != 64 or arguments.key.strip("0123456789abcdef")
    ):
        raise ConfigError(
            f"key is {arguments.key[:80]!r}: give the 64 hex digits of the cloud's public key"
        )
    address(arguments.cloud, {"http": 80, "https": 443})


def _cloud_token(path: str | None) -> str | None:
    """The device's credential: of a file that others cannot read, or of the environment; never of
    the command line, which every user of the machine sees."""
    from flserving.api.auth import checked_token, text_of

    given = os.environ.get(_CLOUD_TOKEN)
    if path is None:
        return None if given is None else checked_token(given)
    if given is not None:
        raise ConfigError(f"a token in {path} and one in {_CLOUD_TOKEN}: drop one of them")
    try:
        token = text_of(_read(path)).strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: write the token into it, in UTF-8") from error
    if os.name == "posix" and os.stat(path).st_mode & stat.S_IROTH:
        raise ConfigError(f"{path} holds a token and every user can read it: chmod 600")
    return checked_token(token)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


# demo


def _demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving demo``."""
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=_home,
        help="keep the registry here; by default it is temporary",
    )
    parser.add_argument("--rounds", type=int, default=3, help="federated rounds to train")
    parser.add_argument("--port", type=int, default=0, help="port of REST; 0 takes a free one")


def _demo(arguments: argparse.Namespace) -> int:
    """Train a model over clients, publish its rounds, promote the best, serve it, and say how to
    call it."""
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
            run = train(
                rounds=arguments.rounds, progress=False, on_round=publish_rounds(registry, "digits")
            )
            best = max(
                range(len(run.rounds)),
                key=lambda place: run.rounds[place].metrics["global_accuracy"],
            )
            registry.set_alias(
                "digits", "default", first + best, who="flserving demo", why="best global accuracy"
            )
            accuracy = run.rounds[best].metrics["global_accuracy"]
            print(
                f"published as versions {first} to {first + arguments.rounds - 1} of 'digits' in {folder}"
            )
            print(
                f"promoted version {first + best}: {accuracy:.1%} of the clients' held-out digits are right"
            )
            images, labels = digits()
            with (
                ModelServer(registry=registry) as server,
                api.serve(server, port=arguments.port) as endpoint,
            ):
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: stop.set())
                print(f"\nask it (a handwritten {labels[0]}):\n")
                print("\n\n".join(_curl_lines(endpoint.url, endpoint.headers, images[:1].tolist())))
                print("\nCtrl-C ends it", flush=True)
                stop.wait()
                print("draining ...", flush=True)
    return 0


def _curl_lines(url: str, headers: dict[str, str], row: list[list[float]]) -> list[str]:
    token = "".join(f"-H '{name}: {value}' " for name, value in headers.items())
    data = [[round(value, 4) for value in values] for values in row]
    tensor = (
        f'{{"name": "features", "shape": [1, {len(row[0])}], "datatype": "FP32", "data": {data}}}'
    )
    return [
        f"curl -s {url}/v2/health/ready",
        f"curl -s {token}{url}/v2/models/digits",
        f"curl -s {token}{url}/v2/models/digits/infer -d '{{\"inputs\": [{tensor}]}}'",
        f"curl -s {token}{url}/metrics",
    ]


# The table


def _import_options(parser: argparse.ArgumentParser) -> None:
    from flserving.integrations import command

    command.options(parser)


def _import(arguments: argparse.Namespace) -> int:
    from flserving.integrations import command

    return command.run(arguments)


def _registry_options(parser: argparse.ArgumentParser) -> None:
    from flserving.api.commands.registry import COMMANDS

    subcommands(parser, "registry_command", COMMANDS)


def _registry(arguments: argparse.Namespace) -> int:
    from flserving.api.commands.registry import COMMANDS

    return COMMANDS[arguments.registry_command].run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from flserving.api import doctor  # not before it is asked for: it loads torch

    return doctor.report(sys.stdout)


def _lab_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving lab``."""
    parser.add_argument(
        "words", nargs="...", metavar="PLACE", help="folder or notebook; then jupyter lab's options"
    )


def _lab(arguments: argparse.Namespace) -> int:
    """By name: nothing imports the course."""
    return int(need("flserving.lab.opening", "course").main(arguments.words))


COMMANDS = {
    "doctor": Command("check this installation; every line is ok or says what to do", _doctor),
    "serve": Command("serve a registry over REST and gRPC", _serve, _serve_options),
    "edge": Command("serve on a device, from its own folder", _edge, _edge_options),
    "import": Command("publish a model that another tool saved", _import, _import_options),
    "demo": Command("train, publish, serve, and print how to call it", _demo, _demo_options),
    "registry": Command(
        "look at versions, promote them, clean up, forget a client", _registry, _registry_options
    ),
    "lab": Command("copy the course into a folder, and open it in JupyterLab", _lab, _lab_options),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 1 with the reason on stderr where it cannot do
    what was asked, 130 where Ctrl-C comes before it is under way.

    A wrong command line ends in ``SystemExit(2)`` with the usage.

    Args:
        argv: What follows the program's name; None takes the process's own.
    """
    parser = Parser(
        prog="flserving", description="Serve models that federated learning has trained."
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and end")
    subcommands(parser, "command", COMMANDS)
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except FlservingError as error:
        named = str(error).replace("-", "_")
        variables = [
            name
            for option, name in arguments.environment.items()
            if re.search(rf"\b{option}\b", named)
        ]
        line = f"{error}{f' (from {variables[0]})' if variables else ''}"
        if getattr(arguments, "log_format", "text") == "json":
            _log.error("%s", line)
        else:
            print(f"flserving: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # Ctrl-C while it starts; what serves has handlers of its own
        print("flserving: interrupted", file=sys.stderr)
        return 130  # what a shell says of SIGINT
