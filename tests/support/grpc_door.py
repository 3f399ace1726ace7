"""A server behind its gRPC door, on a loop of its own thread, and calls to it, for the tests of the
door."""

import asyncio
import contextlib
import threading

import grpc
import numpy as np

from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2
from flserving.api.grpc.codec import InferRequest, InferResponse, message
from flserving.api.grpc.server import start_grpc
from flserving.api.options import ApiOptions
from serving_models import PATIENCE_S

ROLES = {"read": Role.READ, "infer": Role.INFER, "admin": Role.ADMIN}
INFER = "/inference.GRPCInferenceService/ModelInfer"


def known_tokens():
    """One token per role, spelled like it; "c-1" infers and speaks for the client of that name."""
    tokens = Tokens()
    for name, role in ROLES.items():
        tokens.add(name, role)
    tokens.add("c-1", Role.INFER, "c-1")
    return tokens


@contextlib.contextmanager
def open_door(server, *, reuse_port=False, **options):
    """``(V2, "host:port", door, run)`` of a gRPC door that answers while the block runs; ``run``
    runs on its loop."""
    v2 = V2(server, admin=True)
    chosen = ApiOptions(**{"tokens": known_tokens(), **options})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="grpc-door", daemon=True)
    thread.start()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE_S)

    try:
        door = run(start_grpc(v2, chosen, reuse_port=reuse_port))
        try:
            yield v2, f"{chosen.host}:{door.port}", door, run
        finally:
            run(door.stop(1.0))
    finally:
        run(cancel_others())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


async def cancel_others():
    """As ``asyncio.run`` does at its end: a task that is left is destroyed later, and another
    test's log says so."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def metadata(token):
    return () if token is None else (("authorization", f"Bearer {token}"),)


def request(x, model="local", version="", raw=True, **more):
    """A ModelInferRequest for the float32 rows ``x``."""
    filled = InferRequest(model_name=model, model_version=version, **more)
    tensor = filled.inputs.add(name="features", datatype="FP32", shape=x.shape)
    if raw:
        filled.raw_input_contents.append(x.astype("<f4").tobytes())
    else:
        tensor.contents.fp32_contents.extend(x.ravel().tolist())
    return filled


def arrays(answer):
    """The outputs of a ModelInferResponse, or of its bytes, by name."""
    if isinstance(answer, bytes):
        answer = InferResponse.FromString(answer)
    kinds = {"INT64": "<i8", "FP32": "<f4"}
    return {
        tensor.name: np.frombuffer(raw, kinds[tensor.datatype]).reshape(tuple(tensor.shape))
        for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


class Caller:
    """One channel; :meth:`call` gives the bytes of the answer, or raises grpc.RpcError."""

    def __init__(self, target, token="infer", **options):
        self.channel = grpc.insecure_channel(target, options=list(options.items()))
        self.token = token

    def call(self, method, body, timeout=PATIENCE_S, token=None, **more):
        method = method if method.startswith("/") else f"/inference.GRPCInferenceService/{method}"
        body = body if isinstance(body, bytes) else body.SerializeToString()
        return self.channel.unary_unary(method)(
            body, timeout=timeout, metadata=metadata(token or self.token), **more
        )

    def refused(self, method, body=b"", **more):
        """The code and the text of a call that must not be answered."""
        try:
            answer = self.call(method, body, **more)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        raise AssertionError(f"answered: {answer[:200]!r}")

    def ask(self, method, **fields):
        """The answer to a method of the inference service, as its message."""
        request_, reply = (message(f"inference.{method}{kind}") for kind in ("Request", "Response"))
        return reply.FromString(self.call(method, request_(**fields)))

    def infer(self, x, **more):
        return arrays(self.call(INFER, request(x, **more)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()


def health(channel, service="", method="Check"):
    body = message("grpc.health.v1.HealthCheckRequest")(service=service).SerializeToString()
    call = channel.unary_stream if method == "Watch" else channel.unary_unary
    return call(f"/grpc.health.v1.Health/{method}")(body, timeout=PATIENCE_S)


def status(body):
    reply = message("grpc.health.v1.HealthCheckResponse")
    return (
        reply.DESCRIPTOR.enum_types_by_name["ServingStatus"]
        .values_by_number[reply.FromString(body).status]
        .name
    )
