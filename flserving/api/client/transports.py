"""How a client's call travels: written as bytes by a codec, carried over HTTP by httpx or over
gRPC, and read again.

A codec knows the Open Inference Protocol, a transport knows the network; both know nothing of
retries. REST carries tensors in binary: four bytes a number, where JSON needs about twenty and much
more time. Every failure on the way leaves here as :class:`Refused` around an error of the package's
own tree.
"""

import contextlib
import functools
import importlib
import json
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import anyio
import httpx
import numpy as np

from flserving.api.client.retries import Refused
from flserving.api.dataplane import ANSWER_PARAMETERS, Fields
from flserving.errors import (
    BY_REASON,
    REASON,
    DeadlineExceededError,
    FlservingError,
    OverloadedError,
    ServerClosedError,
    TooLargeError,
    answered,
)
from flserving.models.processing import Floats

MAX_ANSWER_NBYTES = 1 << 28
"""More than any answer has: whoever sends it is no server of predictions, or wants the caller's
memory."""

# the types that an output may have
_DTYPES: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}
_LENGTH = "inference-header-content-length"
_ABOUT = {  # what is asked -> the route of the server, the end of a model's route
    "metadata": ("/v2", ""),
    "ready": ("/v2/health/ready", "/ready"),
    "statistics": ("/v2/models/stats", "/stats"),
}
Version = str | int | None


class Call(NamedTuple):
    """A gRPC method or a REST route, its bytes and its headers; REST without a body is a GET."""

    path: str
    body: bytes | None
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


class Reply(NamedTuple):
    """What came back."""

    body: bytes
    headers: Mapping[str, str] = {}


# Codecs: calls as bytes, bytes as answers


class RestCodec:
    """Calls as routes."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)

    def infer(
        self, model: str, version: Version, rows: Floats, parameters: Mapping[str, Any]
    ) -> Call:
        """A prediction for ``rows``, float32 [N, ...]."""
        data = rows.astype("<f4", copy=False).tobytes()
        tensor = {
            "name": "features",
            "shape": list(rows.shape),
            "datatype": "FP32",
            "parameters": {"binary_data_size": len(data)},
        }
        wanted = {**parameters, "binary_data_output": True}
        head = json.dumps({"inputs": [tensor], "parameters": wanted}).encode()
        headers = {"content-type": "application/octet-stream", _LENGTH: str(len(head))}
        return Call(self._path(model, version) + "/infer", head + data, self._headers | headers)

    def read_infer(self, reply: Reply, arrays: bool) -> Fields:
        """The answer to ``infer``, with the keys of the server's own."""
        try:
            length = int(reply.headers[_LENGTH])
            head = json.loads(reply.body[:length])
            data = memoryview(reply.body)[length:]
            outputs = {}
            for output in head["outputs"]:
                size = output["parameters"]["binary_data_size"]
                outputs[output["name"]] = _tensor(data[:size], output["datatype"], output["shape"])
                data = data[size:]
            return _answer(outputs, head.get("parameters", {}), head["model_version"], arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise FlservingError(
                f"an answer that is not of the protocol's binary form ({error!r})"
            ) from error

    def about(self, what: str, model: str | None, version: Version) -> Call:
        """``what`` ("metadata", "ready" or "statistics") of a model, None: of the server."""
        of_server, of_model = _ABOUT[what]
        path = of_server if model is None else self._path(model, version) + of_model
        return Call(path, None, self._headers)

    def models(self) -> Call:
        return Call("/v2/repository/index", b"", self._headers)

    def feedback(self, model: str, receipt: str, reward: float) -> Call:
        body = json.dumps({"receipt": receipt, "reward": reward}).encode()
        return Call(self._path(model) + "/feedback", body, self._headers)

    def read(self, path: str, reply: Reply) -> Any:
        """The answer to any other call, whose path says which."""
        try:
            return json.loads(reply.body)
        except ValueError as error:
            raise FlservingError(
                f"the answer to {path} is not JSON: is that a server of flserving?"
            ) from error

    def _path(self, model: str, version: Version = None) -> str:
        path = f"/v2/models/{quote(model, safe='')}"
        if version is not None:
            path += f"/versions/{quote(str(version), safe='')}"
        return path


class GrpcCodec:
    """Calls as methods of the service."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        from flserving.api.grpc import codec  # a client of REST does not load protobuf

        self._messages = codec
        self._headers = dict(headers)

    def infer(
        self, model: str, version: Version, rows: Floats, parameters: Mapping[str, Any]
    ) -> Call:
        """A prediction for ``rows``, float32 [N, ...]."""
        request = self._messages.InferRequest(model_name=model, model_version=_text(version))
        request.inputs.add(name="features", datatype="FP32", shape=rows.shape)
        for name, value in parameters.items():
            if isinstance(value, bool):
                request.parameters[name].bool_param = value
            elif isinstance(value, int):
                request.parameters[name].int64_param = value
            else:
                request.parameters[name].string_param = value
        request.raw_input_contents.append(rows.astype("<f4", copy=False).tobytes())
        return self._sent("ModelInfer", request)

    def read_infer(self, reply: Reply, arrays: bool) -> Fields:
        """The answer to ``infer``, with the keys of the server's own."""
        message = self._messages.decode(self._messages.InferResponse, reply.body)
        if len(message.outputs) != len(message.raw_output_contents):
            raise FlservingError(
                "an answer without raw_output_contents: is that a server of flserving?"
            )
        outputs = {
            output.name: _tensor(raw, output.datatype, output.shape)
            for output, raw in zip(message.outputs, message.raw_output_contents, strict=True)
        }
        parameters = self._messages.parameters(message.parameters)
        return _answer(outputs, parameters, message.model_version, arrays)

    def about(self, what: str, model: str | None, version: Version) -> Call:
        """``what`` ("metadata", "ready" or "statistics") of a model, None: of the server."""
        if model is not None:
            return self._call(f"Model{what.capitalize()}", name=model, version=_text(version))
        if what == "statistics":  # of all models
            return self._call("ModelStatistics")
        return self._call(f"Server{what.capitalize()}")

    def models(self) -> Call:
        return self._call("RepositoryIndex")

    def feedback(self, model: str, receipt: str, reward: float) -> Call:
        kind = self._messages.message("flserving.FeedbackRequest")
        message = kind(model_name=model, receipt=receipt, reward=reward)
        return Call(
            f"/{self._messages.EXPERIMENTS}/Feedback", message.SerializeToString(), self._headers
        )

    def read(self, path: str, reply: Reply) -> Any:
        """The answer to any other call, whose path says which: as REST would give it."""
        service, _, method = path[1:].partition("/")
        kind = self._messages.message(f"{service.rpartition('.')[0]}.{method}Response")
        fields = _plain(self._messages.decode(kind, reply.body))
        if method == "RepositoryIndex":
            return fields["models"]
        return fields

    def _call(self, method: str, **fields: str) -> Call:
        return self._sent(method, self._messages.message(f"inference.{method}Request")(**fields))

    def _sent(self, method: str, message: Any) -> Call:
        return Call(
            f"/{self._messages.SERVICE}/{method}", message.SerializeToString(), self._headers
        )


def _text(version: Version) -> str:
    if version is None:
        return ""
    return str(version)


def _answer(
    outputs: Mapping[str, Any], parameters: Mapping[str, Any], version: str, arrays: bool
) -> Fields:
    result = dict(outputs) if arrays else {name: value.tolist() for name, value in outputs.items()}
    result["latency_ms"] = parameters.get("latency_us", 0) / 1e3
    result["model_version"] = version
    result["model_type"] = parameters.get("model_type", "global")
    result |= {name: parameters[name] for name in ANSWER_PARAMETERS if name in parameters}
    stages = {}
    for name, value in parameters.items():
        if name.startswith("stage_") and name.endswith("_us"):
            stage = name.removeprefix("stage_").removesuffix("_us")
            stages[stage] = value / 1e3
    if stages:
        result["stages_ms"] = stages
    return result


def _tensor(data: bytes | memoryview, datatype: str, shape: Any) -> np.ndarray[Any, Any]:
    try:
        flat = np.frombuffer(data, _DTYPES[datatype])
        return flat.reshape(tuple(map(int, shape)))
    except (KeyError, ValueError) as error:
        raise FlservingError(
            f"an answer's tensor of {len(data)} bytes is no {datatype[:20]} of shape {list(shape)}: is that a server "
            "of flserving?"
        ) from error


def _plain(message: Any) -> Fields:
    """A message as the JSON of REST has it: every field, integers as integers."""
    fields: Fields = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is None:
            fields[field.name] = (
                value if isinstance(value, str | int | float | bytes) else list(value)
            )
        elif field.message_type.GetOptions().map_entry:
            fields[field.name] = dict(value)
        elif hasattr(value, "DESCRIPTOR"):
            fields[field.name] = _plain(value)
        else:
            fields[field.name] = [_plain(item) for item in value]
    return fields


# Refusals

# A code stands for several classes: the first in the tree's order, where a server does not name the
# class itself. RESOURCE_EXHAUSTED without a name is what other servers say when they are busy.
_BY_CODE = {kind.grpc_code: kind for kind in reversed(BY_REASON.values())} | {
    "RESOURCE_EXHAUSTED": OverloadedError
}


def _refusal(
    kind: type[FlservingError], text: str, headers: Mapping[str, str], again: bool = False
) -> Refused:
    kind = BY_REASON.get(headers.get(REASON, ""), kind)
    try:
        after_s = max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return Refused(kind(text), again)
    return Refused(kind(text), again or kind.http_status in (429, 503), after_s)


def _late(timeout_s: float) -> Refused:
    error = DeadlineExceededError(
        f"no answer in the {timeout_s * 1e3:.0f} ms left: raise timeout_ms"
    )
    return Refused(error, again=False)


# REST, over httpx's transports: its Client would follow nothing and know no proxy either, at 0.2 ms
# more a call


def _options(url: str, authority: bytes | None) -> Fields:
    if url.startswith("https"):
        context = ssl.create_default_context(
            cadata=None if authority is None else authority.decode()
        )
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used, and made in no time
    # uvicorn closes a connection that was idle for 5 s: be sure to let go of it first
    limits = httpx.Limits(max_connections=100, keepalive_expiry=4.0)
    return {"verify": context, "limits": limits, "trust_env": False}


_url = functools.lru_cache(maxsize=256)(httpx.URL)  # read once: the paths of a client are few


def _request(url: str, call: Call, timeout_s: float) -> httpx.Request:
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)
    return httpx.Request(
        method="GET" if call.body is None else "POST",
        url=_url(url + call.path),
        headers=call.headers,
        content=call.body,
        extensions={"timeout": timeouts},
    )


def _add(body: bytearray, chunk: bytes) -> None:
    body += chunk
    if len(body) > MAX_ANSWER_NBYTES:
        error = TooLargeError(
            f"the answer has more than {MAX_ANSWER_NBYTES:,} bytes: ask for fewer rows at once"
        )
        raise Refused(error, again=False)


def _reply(response: httpx.Response, body: bytes) -> Reply:
    if response.status_code == 200:
        return Reply(body, response.headers)
    error = answered(response.status_code, body)
    raise _refusal(type(error), str(error), response.headers)


@contextlib.contextmanager
def _failures(url: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except (httpx.TimeoutException, TimeoutError) as error:
        raise _late(timeout_s) from error
    except (httpx.TransportError, OSError) as error:
        # To ask again is safe: a prediction changes nothing, feedback counts once.
        closed = ServerClosedError(f"no answer from {url} ({type(error).__name__}: {error})")
        raise Refused(closed, again=True) from error


class RestTransport:
    """REST, blocking. Connections are kept and shared between threads."""

    def __init__(self, url: str, authority: bytes | None) -> None:
        self._url = url
        self._http = httpx.HTTPTransport(**_options(url, authority))

    def send(self, call: Call, timeout_s: float) -> Reply:
        until_s = time.monotonic() + timeout_s
        body = bytearray()
        with _failures(self._url, timeout_s):
            response = self._http.handle_request(_request(self._url, call, timeout_s))
            with contextlib.closing(response):
                for chunk in response.iter_raw():
                    _add(body, chunk)
                    # httpx's timeout is of each read: an answer may drip for ever
                    if time.monotonic() > until_s:
                        raise _late(timeout_s)
        return _reply(response, bytes(body))

    def close(self) -> None:
        self._http.close()


class AsyncRestTransport:
    """REST, awaiting."""

    def __init__(self, url: str, authority: bytes | None) -> None:
        self._url = url
        self._http = httpx.AsyncHTTPTransport(**_options(url, authority))

    async def send(self, call: Call, timeout_s: float) -> Reply:
        body = bytearray()
        with _failures(self._url, timeout_s):
            # not asyncio's: the pool closes idle connections in here, shielded from anyio's
            # cancelling only
            with anyio.fail_after(timeout_s):
                response = await self._http.handle_async_request(
                    _request(self._url, call, timeout_s)
                )
                async with contextlib.aclosing(response):
                    async for chunk in response.aiter_raw():
                        _add(body, chunk)
        return _reply(response, bytes(body))

    async def close(self) -> None:
        await self._http.aclose()


# gRPC

_CHANNEL = {
    "grpc.enable_retries": 0,  # retries are ours: they know the budget
    "grpc.max_receive_message_length": MAX_ANSWER_NBYTES,
    "grpc.initial_reconnect_backoff_ms": 50,
    # in spite of its name, how long one attempt to connect may take
    "grpc.min_reconnect_backoff_ms": 2000,
    "grpc.max_reconnect_backoff_ms": 1000,
}


def _grpc_refusal(where: str, error: Any, timeout_s: float) -> Refused:
    code = error.code().name
    trailing: Iterable[tuple[str, Any]] = error.trailing_metadata() or ()
    headers = {name: value for name, value in trailing if isinstance(value, str)}
    if code == "DEADLINE_EXCEEDED" and REASON not in headers:
        return _late(timeout_s)
    # by a server that stops, in the moment in which the call came: it was not let in
    if code == "CANCELLED":
        code = "UNAVAILABLE"
    text = error.details() or code
    too_large = "message larger than max" in text  # gRPC's own words
    kind = TooLargeError if too_large else _BY_CODE.get(code, FlservingError)
    return _refusal(
        kind,
        text if REASON in headers else f"{where}: {text}",
        headers,
        again=code == "UNAVAILABLE",
    )


class _Channel:
    """One connection, shared by all calls."""

    _module = "grpc"

    def __init__(self, target: str, secure: bool, authority: bytes | None) -> None:
        import grpc  # a client of REST does not load it

        module = importlib.import_module(self._module)
        options = list(_CHANNEL.items())
        self._target = target
        self._error = grpc.RpcError
        if secure:
            credentials = grpc.ssl_channel_credentials(authority)
            self._channel = module.secure_channel(target, credentials, options)
        else:
            self._channel = module.insecure_channel(target, options)

    def close(self) -> Any:
        """Close the connection; a coroutine where the channel has one."""
        return self._channel.close()


class GrpcTransport(_Channel):
    """gRPC, blocking."""

    def send(self, call: Call, timeout_s: float) -> Reply:
        method = self._channel.unary_unary(call.path)
        try:
            return Reply(method(call.body, timeout=timeout_s, metadata=tuple(call.headers.items())))
        except self._error as error:
            raise _grpc_refusal(self._target, error, timeout_s) from error


class AsyncGrpcTransport(_Channel):
    """gRPC, awaiting."""

    _module = "grpc.aio"

    async def send(self, call: Call, timeout_s: float) -> Reply:
        method = self._channel.unary_unary(call.path)
        try:
            return Reply(
                await method(call.body, timeout=timeout_s, metadata=tuple(call.headers.items()))
            )
        except self._error as error:
            raise _grpc_refusal(self._target, error, timeout_s) from error
