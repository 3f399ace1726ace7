"""The routes of the REST door, and their OpenAPI document, which is made from them and from the messages' types."""

from typing import Any, NamedTuple

import msgspec

from flserving.api.auth import Role
from flserving.api.protocol import InferRequest, InferResponse


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


_MODEL, _VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
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
    Operation("POST", "/v2/repository/index", "index", _READ, "Versions, states", list[IndexEntry], IndexRequest),
    Operation("POST", "/v2/repository/models/{model}/load", "load", _ADMIN, "Load", Changed, RepositoryRequest),
    Operation("POST", "/v2/repository/models/{model}/unload", "unload", _ADMIN, "Unload", Changed, RepositoryRequest),
    Operation("GET", "/v2/config", "settings", _READ, "The server's settings", dict[str, Any]),
    Operation("GET", "/metrics", "metrics", _READ, "Prometheus text"),
    Operation("GET", "/openapi.json", "document", None, "This document", dict[str, Any]),
    Operation("GET", "/docs", "page", None, "This document, to read"),
)


def document(title: str = "flserving") -> dict[str, Any]:
    """The OpenAPI 3.1 document of :data:`OPERATIONS`."""
    return {"openapi": "3.1.0", "info": {"title": title, "version": "2"}, "paths": {}}


def page(doc: dict[str, Any]) -> str:
    return "<!doctype html>"
