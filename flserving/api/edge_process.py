"""``flserving edge``: a device that serves on loopback from its own folder, and looks for newer models now and then."""

import argparse
import contextlib
import os
import random
import secrets
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flserving.errors import ConfigError, FlservingError
from flserving.models.own_code import import_modules, import_option

if TYPE_CHECKING:
    from flserving.edge import EdgeModelServer
    from flserving.edge.hybrid import HybridServer
    from flserving.edge.sync import SyncAgent

TOKEN = "FLSERVING_CLOUD_TOKEN"
_END_S = 2.0  # how long a pull under way may hold up the end
_FIRST_S = 1.0  # the wait after a first failure; it doubles up to ``poll_s``


def options(parser: argparse.ArgumentParser) -> None:
    """Options of ``flserving edge``."""
    parser.add_argument("--cloud", required=True, metavar="URL", help="a server that was started with --artifacts")
    parser.add_argument("--client", required=True, metavar="ID", help="whose device this is: its own head comes along")
    home = os.path.expanduser  # a shell leaves ~ alone in --directory=~/device
    parser.add_argument(
        "--directory", required=True, metavar="DIR", type=home, help="where the device keeps its models"
    )
    parser.add_argument("--model", metavar="NAME", help="the model to run; the first one of the cloud by default")
    import_option(parser)
    parser.add_argument(
        "--token-file", metavar="FILE", type=home, help=f"the token for the cloud; or the variable {TOKEN}"
    )
    parser.add_argument(
        "--key",
        metavar="HEX",
        help="the cloud's public key (GET .../release tells it); by default that of the first contact",
    )
    parser.add_argument("--ca", metavar="FILE", type=home, help="PEM file of the authority to trust for https")
    parser.add_argument("--form", choices=["exact", "int8"], default="exact", help="int8: a quarter of the bytes")
    parser.add_argument("--poll-s", type=float, default=60.0, help="how often to look for a newer model (default 60)")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="longest silence of the cloud (default 10)")
    parser.add_argument("--fresh-s", type=float, help="an answer from an older model says that it is degraded")
    parser.add_argument("--refuse-s", type=float, help="an older model does not answer")
    parser.add_argument("--policy", choices=["local", "local_first", "as_drawn"], default="local",
                        help="local: nothing that is asked leaves the device; the others ask the cloud where they are "
                        "in doubt, and choosing one is the consent to that")  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.8, help="lowest confidence that is trusted (default 0.8)")
    parser.add_argument("--port", type=int, default=0, help="port of REST on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--grpc-port", type=int, default=0, help="port of gRPC; 0 takes a free one")
    parser.add_argument("--no-grpc", action="store_true", help="REST only")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, from the first moment on and without the cloud; update in the background."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _check(arguments)
    from flserving import api
    from flserving.api.auth import Role, Tokens
    from flserving.edge import EdgeModelServer
    from flserving.edge.sync import Memory, SyncAgent, SyncSettings
    from flserving.registry import Registry

    import_modules(arguments.imports)
    given, tokens = os.environ.get("FLSERVING_TOKEN"), Tokens()
    tokens.add(token := given or secrets.token_urlsafe(32), Role.INFER, arguments.client)
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(Registry(arguments.directory))
        memory = Memory(registry)
        model = arguments.model or memory.facts.model or next(iter(registry.models_by_promotion()), "model")
        edge = stack.enter_context(
            EdgeModelServer(
                registry=registry, model=model, client=arguments.client, wall=memory.wall,
                fresh_s=arguments.fresh_s, refuse_s=arguments.refuse_s,
            )
        )  # fmt: skip
        secret = _cloud_token(arguments.token_file)
        ca = None if arguments.ca is None else _read(arguments.ca)
        settings = SyncSettings(key=arguments.key, ca=ca, timeout_s=arguments.timeout_s, memory=memory)
        agent = SyncAgent(
            arguments.cloud, secret, registry, edge=edge, model=arguments.model,
            client=arguments.client, form=arguments.form, settings=settings,
        )  # fmt: skip
        stack.callback(agent.close)
        server: Any = edge
        if arguments.policy != "local":
            server = stack.enter_context(_hybrid(arguments, edge, secret, stack))
        grpc_port = None if arguments.no_grpc else arguments.grpc_port
        endpoint = stack.enter_context(api.serve(server, tokens=tokens, port=arguments.port, grpc_port=grpc_port))
        shown = "the one in FLSERVING_TOKEN" if given else token
        print(f"REST   {endpoint.url}\ngRPC   {endpoint.grpc_url or 'off'}\ntoken  {shown}", flush=True)
        pulling = threading.Thread(target=_keep_up, args=(agent, arguments.poll_s, stop, _say), daemon=True)
        pulling.start()
        stop.wait()
        _say("stopping")  # also where the first look for an update is not over yet and has said nothing
        endpoint.close()
        pulling.join(_END_S)
        if pulling.is_alive():  # the registry survives any end; a silent cloud must not put it off
            sys.stdout.flush()
            os._exit(0)
    return 0


def _hybrid(
    arguments: argparse.Namespace, edge: "EdgeModelServer", token: str | None, stack: contextlib.ExitStack
) -> "HybridServer":  # fmt: skip
    from flserving.api.client import Client
    from flserving.edge.hybrid import HybridServer

    if edge.model not in edge.registry.models() and arguments.model is None:
        raise ConfigError(f"policy {arguments.policy!r} asks the cloud for a model: name it with --model")
    client = stack.enter_context(Client(arguments.cloud, token, ca=arguments.ca))
    policy, threshold = arguments.policy, arguments.threshold
    return HybridServer(edge, client, policy, consent=True, threshold=threshold, personal=True)


def _keep_up(agent: "SyncAgent", poll_s: float, stop: threading.Event, say: Callable[[str], object]) -> None:
    """Pull, wait, pull. Waits are spread by a tenth: a fleet that started together does not come together."""
    wait_s, last = _FIRST_S, ""
    while not stop.is_set():
        try:
            pulled = agent.pull()
            line = f"round {pulled.round} serves (the cloud's version {pulled.version}, here {pulled.local})"
            wait_s, pause_s = _FIRST_S, poll_s
        except Exception as error:  # whatever happens to an update, the device serves on
            line = f"no update ({error if isinstance(error, FlservingError) else type(error).__name__})"
            pause_s = min(wait_s, poll_s)
            wait_s *= 2
        if line != last and not stop.is_set():
            say(line)
        last = line
        stop.wait(pause_s * random.uniform(0.9, 1.1))


def _say(line: str) -> None:
    text = "".join(char if char.isprintable() else "?" for char in line)  # part of it may be the cloud's
    print(f"flserving: {text}", file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot work, before anything is opened."""
    from flserving.api.client.client import address

    for name in ("poll_s", "timeout_s"):
        if not 0 < (seconds := getattr(arguments, name)) <= 86_400:
            raise ConfigError(f"{name.replace('_', '-')} is {seconds}: it must lie in (0, 86400] seconds")
    if arguments.key is not None and (len(arguments.key) != 64 or arguments.key.strip("0123456789abcdef")):
        raise ConfigError(f"key is {arguments.key[:80]!r}: give the 64 hex digits of the cloud's public key")
    address(arguments.cloud, {"http": 80, "https": 443})


def _cloud_token(path: str | None) -> str | None:
    """The device's credential: of a file that others cannot read, or of the environment; never of the command line,
    which every user of the machine sees."""
    from flserving.api.auth import checked_token, text_of

    given = os.environ.get(TOKEN)
    if path is None:
        return None if given is None else checked_token(given)
    if given is not None:
        raise ConfigError(f"a token in {path} and one in {TOKEN}: drop one of them")
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
