"""The routes of the REST door, and their OpenAPI document, which is made from them and from the messages' types."""

from collections.abc import Mapping
from functools import cache
from html import escape
from typing import Any, NamedTuple

import msgspec

from flserving.api.auth import Role
from flserving.api.rest.codec import InferRequest, InferResponse
from flserving.edge.delta import FORMS
from flserving.edge.release import Head, Release


class Error(msgspec.Struct):
    """The body of every answer that is not 200."""

    error: str


class Health(msgspec.Struct, omit_defaults=True):
    live: bool | None = None
    ready: bool | None = None
    name: str | None = None


class ServerMetadata(msgspec.Struct):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Models(msgspec.Struct):
    models: list[str]


class Duration(msgspec.Struct):
    count: int
    ns: int


class ModelStatistics(msgspec.Struct):
    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, Duration]
    batch_stats: list[dict[str, int | Duration]]


class Statistics(msgspec.Struct):
    model_stats: list[ModelStatistics]


class IndexRequest(msgspec.Struct):
    """``ready``: only what can answer now."""

    ready: bool = False


class IndexEntry(msgspec.Struct):
    name: str
    version: str
    state: str
    reason: str


class RepositoryRequest(msgspec.Struct):
    parameters: dict[str, bool | int | float | str] | None = None


class FeedbackRequest(msgspec.Struct):
    """``receipt``: of the caller's own answer, an hour at most after it. ``reward``: in [0, 1]."""

    receipt: str
    reward: float


class Counted(msgspec.Struct):
    counted: bool


class Changed(msgspec.Struct, omit_defaults=True):
    name: str
    load: bool | None = None
    unload: bool | None = None


class Operation(NamedTuple):
    """A route: ``name`` is the method of the app that answers; ``role`` None asks for no credential."""

    method: str
    path: str
    name: str
    role: Role | None
    summary: str
    answers: Any = None
    takes: Any = None
    query: Mapping[str, Any] = {}  # its parameters' names and schemas


_MODEL, _VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
_REPOSITORY, _RELEASED = "/v2/repository/models/{model}", "/v2/repository/models/{model}/versions/{version}"
_NONCE = {
    "nonce": {"type": "string", "pattern": "^[0-9a-f]{0,64}$"},
    "device": {"type": "string", "pattern": "^[0-9a-f]{16}$"},  # with what it runs now, for the picture of the fleet
    "version": {"type": "integer", "minimum": 0},
    "round": {"type": "integer", "minimum": 0},
    "age_s": {"type": "number", "minimum": 0},
    "by": {"type": "string", "enum": ["version"]},  # what was taken back is told in versions, not in rounds alone
}
_DELTA = {"base": {"type": "string", "pattern": "^[0-9]{1,18}$"}, "form": {"type": "string", "enum": list(FORMS)}}
_READ, _INFER, _ADMIN = Role.READ, Role.INFER, Role.ADMIN
OPERATIONS = (
    Operation("GET", "/v2", "server_metadata", _READ, "Name, version and extensions", ServerMetadata),
    Operation("GET", "/v2/", "server_metadata", _READ, "Name, version and extensions", ServerMetadata),
    Operation("GET", "/v2/health/live", "live", None, "Whether the process answers", Health),
    Operation("GET", "/v2/health/ready", "ready", None, "Whether it can infer: 503 if not", Health),
    Operation("GET", "/v2/models", "models", _READ, "The models' names", Models),
    Operation("GET", "/v2/models/stats", "statistics", _READ, "Counters of every version", Statistics),
    *(
        operation
        for base in (_MODEL, _VERSION)
        for operation in (
            Operation("GET", base, "model_metadata", _READ, "Inputs and outputs", ModelMetadata),
            Operation("GET", f"{base}/ready", "model_ready", None, "Whether it can infer: 503 if not", Health),
            Operation("GET", f"{base}/config", "model_config", _READ, "Batching and tensors", dict[str, Any]),
            Operation("GET", f"{base}/stats", "statistics", _READ, "Counters", Statistics),
            Operation("POST", f"{base}/infer", "infer", _INFER, "Predict", InferResponse, InferRequest),
        )
    ),
    Operation("POST", f"{_MODEL}/feedback", "feedback", _INFER, "Reward an answer's arm", Counted, FeedbackRequest),
    Operation("POST", "/v2/repository/index", "index", _READ, "Versions, states", list[IndexEntry], IndexRequest),
    Operation("POST", "/v2/repository/models/{model}/load", "load", _ADMIN, "Load", Changed, RepositoryRequest),
    Operation("POST", "/v2/repository/models/{model}/unload", "unload", _ADMIN, "Unload", Changed, RepositoryRequest),
    Operation("GET", f"{_REPOSITORY}/release", "release", _INFER, "Which version to run", Release, None, _NONCE),
    Operation("GET", f"{_RELEASED}/manifest", "manifest", _INFER, "A version's manifest", dict[str, Any]),
    Operation("GET", f"{_RELEASED}/weights", "weights", _INFER, "A version's weights; takes Range: bytes=N-"),
    Operation("GET", f"{_RELEASED}/delta", "delta", _INFER, "The same since a base; as resumable", query=_DELTA),
    Operation("GET", f"{_RELEASED}/head", "head", _INFER, "The caller's own head", Head),
    Operation("GET", "/v2/config", "settings", _READ, "The server's settings", dict[str, Any]),
    Operation("GET", "/metrics", "metrics", _READ, "Prometheus text"),
    Operation("GET", "/openapi.json", "document", None, "This document", dict[str, Any]),
    Operation("GET", "/docs", "page", None, "This document, to read"),
)

_STATUSES = {
    400: "The request cannot be answered as it is",
    401: "No credential, or one that is not known",
    403: "The credential's role, the Host or the Origin may not do this",
    404: "No such model, version or route",
    405: "The route takes another method",
    409: "Feedback that is late or given already, or two versions that cannot be told as a difference",
    413: "The body is over the limit",
    415: "A content type or encoding that is not read here",
    416: "The range starts behind the end",
    429: "A queue is full: try again after Retry-After seconds",
    501: "A part of the protocol that is not offered here",
    503: "Not ready, or closed: try again after Retry-After seconds",
    504: "The deadline passed",
}
_TEXT = {"metrics": "text/plain", "page": "text/html"}
_RANGED = ("weights", "delta")
_RAW = {"schema": {"type": "string", "format": "binary"}}
_JSON_BYTES = {"name": "Inference-Header-Content-Length", "in": "header", "required": False,
               "schema": {"type": "integer", "minimum": 0},
               "description": "Bytes of the JSON, where bytes of tensors follow; 0: a bare row of FP32"}  # fmt: skip


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of :data:`OPERATIONS`."""
    types = list({repr(kind): kind for o in OPERATIONS for kind in (o.answers, o.takes) if kind is not None}.values())
    schemas, components = msgspec.json.schema_components([*types, Error], ref_template="#/components/schemas/{name}")
    schema_of = {repr(kind): schema for kind, schema in zip([*types, Error], schemas, strict=True)}
    error = {"application/json": {"schema": schema_of[repr(Error)]}}
    responses = {str(code): {"description": why, "content": error} for code, why in _STATUSES.items()}
    paths: dict[str, Any] = {}
    for o in OPERATIONS:
        media: dict[str, Any] = {_TEXT.get(o.name, "application/json"): {"schema": {"type": "string"}}}
        if o.answers is not None:
            media = {"application/json": {"schema": schema_of[repr(o.answers)]}}
        if o.name in _RANGED:
            media = {"application/octet-stream": _RAW}
        names = [part[1:-1] for part in o.path.split("/") if part.startswith("{")]
        entry: dict[str, Any] = {
            "operationId": f"{o.name}{''.join(f'_by_{name}' for name in names)}{'_slash' if o.path == '/v2/' else ''}",
            "summary": o.summary,
            "description": "No credential." if o.role is None else f"Role: {o.role.name.lower()}.",
            "security": [] if o.role is None else [{"bearer": []}],
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in names
            ]
            + [{"name": name, "in": "query", "schema": schema} for name, schema in o.query.items()],
            "responses": {
                "200": {"description": o.summary, "content": media},
                **{str(code): {"$ref": f"#/components/responses/{code}"} for code in _STATUSES},
            },
        }
        if o.name in _RANGED:
            entry["responses"]["206"] = {"description": "From that byte on", "content": media}
        if o.takes is not None:
            body = {"application/json": {"schema": schema_of[repr(o.takes)]}}
            entry["requestBody"] = {"required": o.takes in (InferRequest, FeedbackRequest), "content": body}
        if o.takes is InferRequest:
            media["application/octet-stream"] = entry["requestBody"]["content"]["application/octet-stream"] = _RAW
            entry["parameters"].append(_JSON_BYTES)
        paths.setdefault(o.path, {})[o.method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "flserving", "version": "2", "summary": "Open Inference Protocol V2 over REST"},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": responses,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


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


@cache
def page() -> str:
    """The document as a page that needs nothing else: no script, no other file."""
    doc = document()

    def folded(title: str, content: Any) -> str:
        text = escape(msgspec.json.format(msgspec.json.encode(content)).decode(), quote=False)
        return f"<details><summary>{title}</summary><pre>{text}</pre></details>"

    routes = [
        folded(
            f"<b>{method.upper()}</b> <code>{escape(path)}</code> {escape(entry['summary'])}. {entry['description']}",
            {part: entry[part] for part in ("parameters", "requestBody", "responses") if part in entry},
        )
        for path, methods in doc["paths"].items()
        for method, entry in methods.items()
    ]
    messages = [folded(f"<code>{name}</code>", schema) for name, schema in doc["components"]["schemas"].items()]
    return _PAGE.format(routes="\n".join(routes), messages="\n".join(messages))
