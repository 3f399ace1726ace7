"""Every method of the gRPC door with every role, the client behind a credential, and no tokens at
all."""

import grpc
import numpy as np
import pytest
from torch import nn

from flserving.api.grpc import codec
from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer
from grpc_door import INFER, Caller, arrays, metadata, open_door, request
from serving_models import PATIENCE_S

X = np.ones((3, 2), np.float32)


@pytest.fixture(scope="module")
def server():
    with ModelServer(ServingConfig(warmup_samples=1, timeout_ms=PATIENCE_S * 1e3)) as server:
        server.load_model("v1", nn.Linear(2, 4), num_features=2)
        yield server


@pytest.fixture(scope="module")
def target(server):
    with open_door(server) as (_, target, _, _):
        yield target


LEAST = {
    "ServerLive": None, "ServerReady": None, "ModelReady": None, "ServerMetadata": "read", "ModelMetadata": "read",
    "ModelConfig": "read", "ModelStatistics": "read", "RepositoryIndex": "read", "ModelInfer": "infer",
    "RepositoryModelLoad": "admin", "RepositoryModelUnload": "admin",
}  # fmt: skip
BODIES = {
    "ModelInfer": request(X).SerializeToString(),
    **dict.fromkeys(
        ("ModelReady", "ModelMetadata", "ModelConfig", "RepositoryModelLoad"), b"\n\x05local"
    ),
    "RepositoryModelUnload": b"\n\x04nope",  # 404 once it is let in: the others go on
}
ORDER = [None, "read", "infer", "admin"]


@pytest.mark.parametrize("token", [None, "wrong", "read", "infer", "admin"])
@pytest.mark.parametrize("method", LEAST)
def test_every_method_with_every_role(target, method, token):
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(f"/{codec.SERVICE}/{method}")
        try:
            call(BODIES.get(method, b""), metadata=metadata(token), timeout=PATIENCE_S)
            got = "OK"
        except grpc.RpcError as error:
            got = error.code().name
    least = LEAST[method]
    if least is None or (token in ORDER and ORDER.index(token) >= ORDER.index(least)):
        assert got == ("NOT_FOUND" if method == "RepositoryModelUnload" else "OK")
    else:
        assert got == ("PERMISSION_DENIED" if token in ("read", "infer") else "UNAUTHENTICATED")


def test_personal_answers_take_the_client_of_the_credential(target):
    personal = request(X, parameters={"personal": {"bool_param": True}})
    with Caller(target) as caller:
        assert caller.refused(INFER, personal)[0] == "PERMISSION_DENIED"
        assert arrays(caller.call(INFER, personal, token="c-1"))["predictions"].shape == (3,)


@pytest.mark.parametrize(
    "value", ["bearer infer", " Bearer infer", "Bearer  infer ", "  BEARER infer"]
)
def test_the_credential_is_read_as_http_reads_it(target, value):
    """Perf_analyzer sends what stands behind the colon of its ``-H "Authorization: Bearer ..."``,
    the blank as well."""
    with grpc.insecure_channel(target) as channel:
        answer = channel.unary_unary(INFER)(
            BODIES["ModelInfer"], metadata=(("authorization", value),)
        )
    assert arrays(answer)["predictions"].shape == (3,)


@pytest.mark.parametrize(
    "value", [" ", "Bearer", " Bearer ", "Bearerinfer", "infer", "Basic infer", "Bearer inf er"]
)
def test_what_is_no_credential_stays_none(target, value):
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(INFER)(
            BODIES["ModelInfer"], metadata=(("authorization", value),), timeout=PATIENCE_S
        )
    assert error.value.code().name == "UNAUTHENTICATED"


def test_without_tokens_only_the_health_checks_answer(server):
    with open_door(server, tokens=None) as (_, target, _, _), Caller(target) as caller:
        assert caller.ask("ServerReady").ready
        assert caller.refused(INFER, request(X))[0] == "UNAUTHENTICATED"
