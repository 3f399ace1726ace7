"""The routes of REST, the messages that they take, and their OpenAPI document, which is a file
beside this one."""

from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from flserving.api.auth import Role


class IndexRequest(msgspec.Struct):
    """``ready``: only what can answer now."""

    ready: bool = False


class RepositoryRequest(msgspec.Struct):
    parameters: dict[str, bool | int | float | str] | None = None


class FeedbackRequest(msgspec.Struct):
    """``receipt``: of the caller's own answer, an hour at most after it. ``reward``: in [0, 1]."""

    receipt: str
    reward: float


class Operation(NamedTuple):
    """A route: ``name`` is the method of the app that answers; ``role`` None asks for no
    credential."""

    method: str
    path: str
    name: str
    role: Role | None


_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"
_REPOSITORY = "/v2/repository/models/{model}"
_RELEASED = "/v2/repository/models/{model}/versions/{version}"
OPERATIONS = (
    Operation("GET", "/v2", "server_metadata", Role.READ),
    Operation("GET", "/v2/", "server_metadata", Role.READ),
    Operation("GET", "/v2/health/live", "live", None),
    Operation("GET", "/v2/health/ready", "ready", None),
    Operation("GET", "/v2/models", "models", Role.READ),
    Operation("GET", "/v2/models/stats", "statistics", Role.READ),
    Operation("GET", _MODEL, "model_metadata", Role.READ),
    Operation("GET", f"{_MODEL}/ready", "model_ready", None),
    Operation("GET", f"{_MODEL}/config", "model_config", Role.READ),
    Operation("GET", f"{_MODEL}/stats", "statistics", Role.READ),
    Operation("POST", f"{_MODEL}/infer", "infer", Role.INFER),
    Operation("GET", _VERSION, "model_metadata", Role.READ),
    Operation("GET", f"{_VERSION}/ready", "model_ready", None),
    Operation("GET", f"{_VERSION}/config", "model_config", Role.READ),
    Operation("GET", f"{_VERSION}/stats", "statistics", Role.READ),
    Operation("POST", f"{_VERSION}/infer", "infer", Role.INFER),
    Operation("POST", f"{_MODEL}/feedback", "feedback", Role.INFER),
    Operation("POST", "/v2/repository/index", "index", Role.READ),
    Operation("POST", f"{_REPOSITORY}/load", "load", Role.ADMIN),
    Operation("POST", f"{_REPOSITORY}/unload", "unload", Role.ADMIN),
    Operation("GET", f"{_REPOSITORY}/release", "release", Role.INFER),
    Operation("GET", f"{_RELEASED}/manifest", "manifest", Role.INFER),
    Operation("GET", f"{_RELEASED}/weights", "weights", Role.INFER),
    Operation("GET", f"{_RELEASED}/delta", "delta", Role.INFER),
    Operation("GET", f"{_RELEASED}/head", "head", Role.INFER),
    Operation("GET", "/v2/config", "settings", Role.READ),
    Operation("GET", "/metrics", "metrics", Role.READ),
    Operation("GET", "/openapi.json", "document", None),
    Operation("GET", "/docs", "page", None),
)


def document(prefix: str = "") -> bytes:
    """The OpenAPI 3.1 document of :data:`OPERATIONS`: a file, which
    ``tests/support/openapi_document.py`` writes.

    Args:
        prefix: Of the paths, where another application mounts this one.
    """
    return _file().replace(b'"url": "/"', b'"url": "%b/"' % quote(prefix).encode().rstrip(b"/"))


@cache
def _file() -> bytes:
    return files(__package__).joinpath("openapi.json").read_bytes()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>flserving: REST</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
summary {{ padding: .4rem; cursor: pointer; }} summary b {{ display: inline-block; width: 4rem; }}
pre {{ background: #8881; padding: .8rem; overflow: auto; }} :root {{ color-scheme: light dark; }}
</style>
<h1>flserving: Open Inference Protocol V2 over REST</h1>
<p>Send the token as <code>Authorization: Bearer TOKEN</code>. Every answer that is not 200 is
<code>{{"error": "..."}}</code>. The same as a document: <a href="openapi.json">openapi.json</a>.</p>
<pre>curl -H "Authorization: Bearer $TOKEN" $URL/v2/models/MODEL/infer \\
  -d '{{"inputs": [{{"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.5]}}]}}'</pre>
<h2>Routes</h2>
{routes}
<h2>Messages</h2>
{messages}
</html>"""


def page(prefix: str = "") -> str:
    """The document as a page that needs nothing else: no script, no other file. ``prefix``: see
    :func:`document`."""
    below = quote(prefix)
    return _page().replace("<code>/", f"<code>{below}/").replace("$URL/", f"$URL{below}/")


@cache
def _page() -> str:
    doc = msgspec.json.decode(document())

    def folded(title: str, content: Any) -> str:
        text = escape(msgspec.json.format(msgspec.json.encode(content)).decode(), quote=False)
        return f"<details><summary>{title}</summary><pre>{text}</pre></details>"

    routes = [
        folded(
            f"<b>{method.upper()}</b> <code>{escape(path)}</code> {escape(entry['summary'])}. {entry['description']}",
            {
                part: entry[part]
                for part in ("parameters", "requestBody", "responses")
                if part in entry
            },
        )
        for path, methods in doc["paths"].items()
        for method, entry in methods.items()
    ]
    messages = [
        folded(f"<code>{name}</code>", schema)
        for name, schema in doc["components"]["schemas"].items()
    ]
    return _PAGE.format(routes="\n".join(routes), messages="\n".join(messages))
