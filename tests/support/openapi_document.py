"""Writes the OpenAPI document of the REST routes: ``python tests/support/openapi_document.py``,
when these changed.

A test remakes it and compares. The package serves the file and needs none of this.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from flserving.api.rest import openapi
from flserving.api.rest.codec import InferRequest
from flserving.api.rest.openapi import (
    OPERATIONS,
    FeedbackRequest,
    IndexRequest,
    Operation,
    RepositoryRequest,
)
from flserving.edge.delta import FORMS
from flserving.edge.release import Head, Release

FILE = Path(openapi.__file__).with_name("openapi.json")
Datatype = Literal["INT64", "FP32"]  # of what this server sends, and of what it wants


class Error(msgspec.Struct):
    """The body of every answer that is not 200."""

    error: str


class Health(msgspec.Struct, omit_defaults=True):
    live: bool | UnsetType = UNSET
    ready: bool | UnsetType = UNSET
    name: str | UnsetType = UNSET


class ServerMetadata(msgspec.Struct):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct):
    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, str]  # "outputs": what answers show


class OutputTensor(msgspec.Struct, omit_defaults=True):
    """``data`` in row-major order, or ``binary_data_size`` (a parameter) bytes after the JSON."""

    name: str
    datatype: Datatype
    shape: list[int]
    data: list[float] | UnsetType = UNSET
    parameters: dict[str, bool | int | str] | UnsetType = UNSET


class InferResponse(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    parameters: dict[str, bool | int | str]
    id: str | UnsetType = UNSET


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


class IndexEntry(msgspec.Struct):
    name: str
    version: str
    state: str
    reason: str


class Counted(msgspec.Struct):
    counted: bool


class Changed(msgspec.Struct, omit_defaults=True):
    name: str
    load: bool | UnsetType = UNSET
    unload: bool | UnsetType = UNSET


class About(NamedTuple):
    """What the document says of an operation beside its route."""

    tag: str
    summary: str
    answers: Any = None
    takes: Any = None
    query: Mapping[str, Any] = {}  # its parameters' names and schemas


_NONCE = {
    "nonce": {"type": "string", "pattern": "^[0-9a-f]{0,64}$"},
    # with what it runs now, for the picture of the fleet
    "device": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    "version": {"type": "integer", "minimum": 0},
    "round": {"type": "integer", "minimum": 0},
    "age_s": {"type": "number", "minimum": 0},
    # what was taken back is told in versions, not in rounds alone
    "by": {"type": "string", "enum": ["version"]},
    "forgotten": {"type": "string", "enum": ["1"]},  # whether the client was forgotten is told too
}
_DELTA = {
    "base": {"type": "string", "pattern": "^[0-9]{1,18}$"},
    "form": {"type": "string", "enum": list(FORMS)},
}
ABOUT = {  # name of an operation -> what it does
    "server_metadata": About("server", "Name, version and extensions", ServerMetadata),
    "live": About("health", "Whether the process answers", Health),
    "ready": About("health", "Whether it can infer: 503 if not", Health),
    "models": About("models", "The models' names", Models),
    "statistics": About("models", "Counters of every version", Statistics),
    "model_metadata": About("models", "Inputs and outputs", ModelMetadata),
    "model_ready": About("health", "Whether it can infer: 503 if not", Health),
    "model_config": About("models", "Batching and tensors", dict[str, Any]),
    "infer": About("inference", "Predict", InferResponse, InferRequest),
    "feedback": About("inference", "Reward an answer's arm", Counted, FeedbackRequest),
    "index": About("repository", "Versions, states", list[IndexEntry], IndexRequest),
    "load": About("repository", "Load", Changed, RepositoryRequest),
    "unload": About("repository", "Unload", Changed, RepositoryRequest),
    "release": About("edge", "Which version to run", Release, query=_NONCE),
    "manifest": About("edge", "A version's manifest", dict[str, Any]),
    "weights": About("edge", "A version's weights; takes Range: bytes=N-"),
    "delta": About("edge", "The same since a base; as resumable", query=_DELTA),
    "head": About("edge", "The caller's own head", Head),
    "settings": About("server", "The server's settings", dict[str, Any]),
    "metrics": About("server", "Prometheus text"),
    "document": About("server", "This document", dict[str, Any]),
    "page": About("server", "This document, to read"),
}
_TAGS = {
    "health": "For load balancers and probes: no credential is asked",
    "server": "The server itself: what it offers, its settings, its metrics, this document",
    "models": "What there is to ask, and how often it was asked",
    "inference": "Predictions, and the rewards of experiments",
    "repository": "Every version and its state; loading and unloading",
    "edge": "What a device downloads to answer by itself",
}
_STATUSES = {
    400: "The request cannot be answered as it is",
    401: "No credential, or one that is not known",
    403: "The credential's role, the Host or the Origin may not do this",
    404: "No such model, version or route",
    405: "The route takes another method",
    408: "The rest of the request did not come in time",
    409: "Feedback that is late or given already, or two versions that cannot be told as a difference",
    413: "The body is over the limit",
    415: "A content type or encoding that is not read here",
    416: "The range starts behind the end",
    429: "A queue is full: try again after Retry-After seconds",
    431: "The headers are over the limit",
    500: "The model or the server failed",
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


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of ``OPERATIONS``."""
    kinds = {
        repr(kind): kind
        for about in ABOUT.values()
        for kind in (about.answers, about.takes)
        if kind is not None
    }
    kinds[repr(Error)] = Error
    template = "#/components/schemas/{name}"
    schemas, components = msgspec.json.schema_components(kinds.values(), ref_template=template)
    for schema in components.values():
        for field in schema["properties"].values():
            if "default" in field and field["default"] is None:
                # null here says that it may be left out: it is no array's or string's default
                del field["default"]
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _entry(
            operation, schema_of
        )
    error = {"application/json": {"schema": schema_of[repr(Error)]}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "flserving",
            "version": "2",
            "summary": "Open Inference Protocol V2 over REST",
            "description": "Answers of models that were trained by federated learning.",
        },
        "servers": [{"url": "/"}],  # below a prefix, the server says which
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                str(code): {"description": why, "content": error} for code, why in _STATUSES.items()
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _entry(operation: Operation, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    about = ABOUT[operation.name]
    role = operation.role
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    identity = operation.name + "".join(f"_by_{name}" for name in names)
    if operation.path == "/v2/":
        identity += "_slash"
    if about.answers is not None:
        media = {"application/json": {"schema": schema_of[repr(about.answers)]}}
    elif operation.name in _RANGED:
        media = {"application/octet-stream": _RAW}
    else:
        media = {_TEXT[operation.name]: {"schema": {"type": "string"}}}
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in names
    ]
    query = [
        {"name": name, "in": "query", "schema": schema} for name, schema in about.query.items()
    ]
    entry: dict[str, Any] = {
        "operationId": identity,
        "tags": [about.tag],
        "summary": about.summary,
        "description": "No credential." if role is None else f"Role: {role.name.lower()}.",
        "security": [] if role is None else [{"bearer": []}],
        "parameters": path + query,
        "responses": {
            "200": {"description": about.summary, "content": media},
            **{str(code): {"$ref": f"#/components/responses/{code}"} for code in _STATUSES},
        },
    }
    if operation.name in _RANGED:
        entry["responses"]["206"] = {"description": "From that byte on", "content": media}
    if about.takes is not None:
        body = {"application/json": {"schema": schema_of[repr(about.takes)]}}
        entry["requestBody"] = {
            "required": about.takes in (InferRequest, FeedbackRequest),
            "content": body,
        }
    if about.takes is InferRequest:
        media["application/octet-stream"] = _RAW
        entry["requestBody"]["content"]["application/octet-stream"] = _RAW
        entry["parameters"].append(_JSON_BYTES)
    return entry


def text() -> str:
    """The document as the file has it."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
