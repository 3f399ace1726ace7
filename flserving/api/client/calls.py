"""What a client says and what it hears, as bytes: the calls of the Open Inference Protocol over REST and over gRPC.

REST carries tensors in binary: four bytes a number, where JSON needs about twenty and much more time.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np

from flserving.api.client.transports import Received, Sent
from flserving.api.dataplane import TOLD
from flserving.errors import FlservingError
from flserving.models.processing import Floats

_DTYPES: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}  # of every output
_LENGTH = "inference-header-content-length"
Where = tuple[str, str | None]
"""(model, version)."""


def answer(outputs: Mapping[str, Any], parameters: Mapping[str, Any], version: str, arrays: bool) -> dict[str, Any]:
    """The same keys as the server's own answer."""
    result: dict[str, Any] = {name: value if arrays else value.tolist() for name, value in outputs.items()}
    stages = {
        name.removeprefix("stage_").removesuffix("_us"): us / 1e3
        for name, us in parameters.items()
        if name.startswith("stage_") and name.endswith("_us")
    }
    result["latency_ms"] = parameters.get("latency_us", 0) / 1e3
    result["model_version"], result["model_type"] = version, parameters.get("model_type", "global")
    result |= {name: parameters[name] for name in TOLD if name in parameters}
    return result | {"stages_ms": stages} if stages else result


def _tensor(data: bytes | memoryview, datatype: str, shape: Any) -> np.ndarray[Any, Any]:
    try:
        return np.frombuffer(data, _DTYPES[datatype]).reshape(tuple(map(int, shape)))
    except (KeyError, ValueError) as error:
        raise FlservingError(
            f"an answer's tensor of {len(data)} bytes is no {datatype[:20]} of shape {list(shape)}: is that a server "
            "of flserving?"
        ) from error


class RestCalls:
    """Calls as routes."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)

    def infer(self, where: Where, rows: Floats, parameters: Mapping[str, Any]) -> Sent:
        data = rows.astype("<f4", copy=False).tobytes()
        tensor = {"name": "features", "shape": list(rows.shape), "datatype": "FP32"}
        head = {
            "inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}],
            "parameters": {**parameters, "binary_data_output": True},
        }
        text = json.dumps(head).encode()
        headers = {"content-type": "application/octet-stream", _LENGTH: str(len(text))}
        return Sent(self._path(where) + "/infer", text + data, self._headers | headers)

    def read_infer(self, received: Received, arrays: bool) -> dict[str, Any]:
        try:
            length = int(received.headers[_LENGTH])
            head, data, outputs = json.loads(received.body[:length]), memoryview(received.body)[length:], {}
            for output in head["outputs"]:
                size = output["parameters"]["binary_data_size"]
                outputs[output["name"]] = _tensor(data[:size], output["datatype"], output["shape"])
                data = data[size:]
            return answer(outputs, head.get("parameters", {}), head["model_version"], arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise FlservingError(f"an answer that is not of the protocol's binary form ({error!r})") from error

    def metadata(self, where: Where | None) -> Sent:
        return self._get("/v2" if where is None else self._path(where))

    def ready(self, where: Where | None) -> Sent:
        return self._get("/v2/health/ready" if where is None else self._path(where) + "/ready")

    def statistics(self, where: Where | None) -> Sent:
        return self._get(("/v2/models" if where is None else self._path(where)) + "/stats")

    def models(self) -> Sent:
        return Sent("/v2/repository/index", b"", self._headers)

    def feedback(self, model: str, receipt: str, reward: float) -> Sent:
        body = json.dumps({"receipt": receipt, "reward": reward}).encode()
        return Sent(self._path((model, None)) + "/feedback", body, self._headers)

    def read(self, call: str, received: Received) -> Any:
        try:
            return json.loads(received.body)
        except ValueError as error:
            raise FlservingError(f"the answer to {call} is not JSON: is that a server of flserving?") from error

    def _get(self, path: str) -> Sent:
        return Sent(path, None, self._headers)

    @staticmethod
    def _path(where: Where) -> str:
        names = ["models", where[0]] if where[1] is None else ["models", where[0], "versions", where[1]]
        return "/v2/" + "/".join(quote(name, safe="") for name in names)


class GrpcCalls:
    """Calls as methods of the service."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        from flserving.api.grpc import codec  # a client of REST does not load protobuf

        self._messages, self._headers = codec, dict(headers)

    def infer(self, where: Where, rows: Floats, parameters: Mapping[str, Any]) -> Sent:
        request = self._messages.InferRequest(model_name=where[0], model_version=where[1] or "")
        request.inputs.add(name="features", datatype="FP32", shape=rows.shape)
        for name, value in parameters.items():
            kind = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "string"
            setattr(request.parameters[name], f"{kind}_param", value)
        request.raw_input_contents.append(rows.astype("<f4", copy=False).tobytes())
        return self._sent("ModelInfer", request)

    def read_infer(self, received: Received, arrays: bool) -> dict[str, Any]:
        reply = self._messages.decode(self._messages.InferResponse, received.body)
        if len(reply.outputs) != len(reply.raw_output_contents):
            raise FlservingError("an answer without raw_output_contents: is that a server of flserving?")
        outputs = {
            output.name: _tensor(raw, output.datatype, output.shape)
            for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
        }
        return answer(outputs, self._messages.parameters(reply.parameters), reply.model_version, arrays)

    def metadata(self, where: Where | None) -> Sent:
        return self._named("ServerMetadata" if where is None else "ModelMetadata", where)

    def ready(self, where: Where | None) -> Sent:
        return self._named("ServerReady" if where is None else "ModelReady", where)

    def statistics(self, where: Where | None) -> Sent:
        return self._named("ModelStatistics", where)

    def models(self) -> Sent:
        return self._named("RepositoryIndex", None)

    def feedback(self, model: str, receipt: str, reward: float) -> Sent:
        kind = self._messages.message("flserving.FeedbackRequest")
        message = kind(model_name=model, receipt=receipt, reward=reward)
        return self._sent("Feedback", message, self._messages.EXPERIMENTS)

    def read(self, call: str, received: Received) -> Any:
        service, _, method = call[1:].partition("/")
        kind = self._messages.message(f"{service.rpartition('.')[0]}.{method}Response")
        fields = _plain(self._messages.decode(kind, received.body))
        return fields["models"] if call.endswith("/RepositoryIndex") else fields

    def _named(self, method: str, where: Where | None) -> Sent:
        name, version = where or ("", None)
        fields = {} if where is None else {"name": name, "version": version or ""}
        return self._sent(method, self._messages.message(f"inference.{method}Request")(**fields))

    def _sent(self, method: str, message: Any, service: str = "") -> Sent:
        path = f"/{service or self._messages.SERVICE}/{method}"
        return Sent(path, message.SerializeToString(), self._headers)


def _plain(message: Any) -> dict[str, Any]:
    """A message as the JSON of REST has it: every field, integers as integers."""
    fields: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value, nested = getattr(message, field.name), field.message_type
        if nested is None:
            fields[field.name] = value if isinstance(value, str | int | float | bytes) else list(value)
        elif nested.GetOptions().map_entry:
            fields[field.name] = dict(value)
        elif isinstance(value, type(message)) or hasattr(value, "DESCRIPTOR"):
            fields[field.name] = _plain(value)
        else:
            fields[field.name] = [_plain(item) for item in value]
    return fields
