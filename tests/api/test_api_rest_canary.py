"""What our HTTP server leans on in uvicorn, and uvicorn promises to nobody: a new release that
changes it fails here, with a sentence, before it fails in a user's hands."""

import ast
import asyncio
import inspect
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

import flserving
from flserving.api.rest import http1

PACKAGE = Path(flserving.__file__).parent
WHAT_NOW = (
    f"uvicorn {version('uvicorn')} is not what api/rest/http1.py leans on. Read what took its place, "
    "mend that file and this table, then raise uvicorn's bound in pyproject.toml"
)
# Attributes of a connection, of one request on it, of its flow control, and of what all connections
# share
LEANED_ON = {
    "protocol": {
        *(
            "app",
            "connections",
            "cycle",
            "flow",
            "headers",
            "loop",
            "parser",
            "pipeline",
            "scheme",
            "scope",
        ),
        *(
            "tasks",
            "transport",
            "url",
            "on_headers_complete",
            "on_message_begin",
            "on_message_complete",
            "shutdown",
        ),
        *("_start_asgi_task", "_unset_keepalive_if_required"),
    },
    "cycle": {
        *(
            "default_headers",
            "disconnected",
            "flow",
            "keep_alive",
            "message_event",
            "more_body",
            "on_response",
        ),
        *("response_complete", "response_started", "run_asgi", "scope", "send", "transport"),
    },
    "flow": {"pause_reading", "write_paused"},
    "state": {"connections", "default_headers", "tasks"},
}
PARAMETERS = {
    HttpToolsProtocol.__init__: ["self", "config", "server_state", "app_state", "_loop"],
    HttpToolsProtocol._start_asgi_task: ["self", "cycle", "app"],
    HttpToolsProtocol._unset_keepalive_if_required: ["self"],
    HttpToolsProtocol.shutdown: ["self"],
    ServerState.__init__: ["self"],
}
SETTINGS = {
    "app",
    "http",
    "ws",
    "lifespan",
    "interface",
    "access_log",
    "log_config",
    "proxy_headers",
}


@pytest.fixture
async def parts():
    """uvicorn's objects in the midst of a request, as they are without us."""
    started = []

    async def app(scope, receive, send):
        started.append(scope)
        await receive()  # until the body comes
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(
        app, ws="none", lifespan="off", interface="asgi3", log_config=None, proxy_headers=False
    )
    state = ServerState()
    protocol = HttpToolsProtocol(config=config, server_state=state, app_state={})
    protocol.connection_made(mock.MagicMock(**{"get_extra_info.return_value": None}))
    protocol.data_received(b"POST /a HTTP/1.1\r\nhost: b\r\ncontent-length: 1\r\n\r\n")
    yield {"protocol": protocol, "cycle": protocol.cycle, "flow": protocol.flow, "state": state}
    protocol.data_received(b"1")
    await asyncio.gather(*state.tasks)
    assert started


@pytest.mark.parametrize("part", LEANED_ON)
async def test_what_is_leaned_on_is_there(parts, part):
    missing = LEANED_ON[part] - set(dir(parts[part]))
    assert not missing, f"the {part} has no {', '.join(sorted(missing))}: {WHAT_NOW}"


async def test_what_is_leaned_on_holds_what_it_held(parts):
    protocol, cycle = parts["protocol"], parts["cycle"]
    told = f"{WHAT_NOW}. What changed: "
    assert (protocol.url, protocol.headers) == (
        b"/a",
        [(b"host", b"b"), (b"content-length", b"1")],
    ), told + "the head"
    assert protocol.scope["headers"] is protocol.headers, told + "where trailers go"
    assert protocol.app is protocol.config.app and protocol.scheme == "http", (
        told + "the application or the scheme"
    )
    assert isinstance(protocol.parser, httptools.HttpRequestParser), told + "the parser"
    assert protocol in parts["state"].connections and len(parts["state"].tasks) == 1, (
        told + "the shared state"
    )
    assert (
        protocol.connections is parts["state"].connections
        and protocol.tasks is parts["state"].tasks
    ), told + "that"
    assert len(protocol.pipeline) == 0 and callable(cycle.on_response), (
        told + "the requests that wait"
    )
    assert cycle.more_body and cycle.keep_alive, told + "the state of a request"
    assert not (cycle.disconnected or cycle.response_started or cycle.response_complete), (
        told + "the state of an answer"
    )
    assert STATUS_LINE[429] == b"HTTP/1.1 429 Too Many Requests\r\n", told + "status lines"


@pytest.mark.parametrize("method", PARAMETERS, ids=lambda method: method.__qualname__)
def test_what_is_overridden_or_called_takes_what_it_took(method):
    assert list(inspect.signature(method).parameters) == PARAMETERS[method], (
        f"{method.__qualname__}: {WHAT_NOW}"
    )


def test_the_settings_exist():
    missing = SETTINGS - inspect.signature(uvicorn.Config.__init__).parameters.keys()
    assert not missing, f"uvicorn.Config takes no {', '.join(sorted(missing))}: {WHAT_NOW}"


async def test_the_table_names_all_that_the_file_leans_on(parts):
    tree = ast.parse(Path(http1.__file__).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    promised = set(dir(asyncio.Protocol))
    leaned_on = {part: used & set(dir(thing)) - promised for part, thing in parts.items()}
    assert leaned_on == LEANED_ON, (
        "put what is new into the table, and out of it what is no longer used"
    )


def private_names(source: str) -> set[str]:
    """Imports of what a library calls private, and of uvicorn and httptools at all."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            private = any(part.startswith("_") for part in rest)
            if first in {"uvicorn", "httptools"} or (
                private and first not in {"flserving", "torch"}
            ):
                found.add(name)
    return found


def test_no_other_file_leans_on_a_servers_private_parts():
    assert private_names(
        "import uvicorn.config\nfrom grpc._cython import cygrpc\nfrom starlette import _utils"
    ) == {*("uvicorn.config", "grpc._cython.cygrpc", "starlette._utils")}
    own = Path(http1.__file__)
    for path in PACKAGE.rglob("*.py"):
        names = private_names(path.read_text(encoding="utf-8"))
        assert path == own or not names, (
            f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(names))}"
        )
