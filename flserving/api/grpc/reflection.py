"""Server reflection: which services there are and what their messages hold, for grpcurl and other
tools.

It shows the protocol, which is public, and nothing of the models. grpcio-reflection would answer
under the older of the two names alone, and needs its messages in the default pool of the process.

Source: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
"""

from typing import Any

import grpc

from flserving.api.grpc import codec

SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
"""One protocol, its messages the same byte for byte: older tools know the second name only."""
_Request = codec.message("grpc.reflection.v1.ServerReflectionRequest")
_Response = codec.message("grpc.reflection.v1.ServerReflectionResponse")


def answer(body: bytes) -> bytes:
    """The answer to one question: NOT_FOUND is an answer, too.

    Raises:
        InvalidInputError: The bytes are no question.
    """
    asked = codec.decode(_Request, body)
    try:
        said = _said(asked)
    except KeyError:
        code = grpc.StatusCode.NOT_FOUND.value[0]
        said = {
            "error_response": {"error_code": code, "error_message": "nothing here has that name"}
        }
    return bytes(
        _Response(valid_host=asked.host, original_request=asked, **said).SerializeToString()
    )


def _said(asked: Any) -> dict[str, Any]:
    """The field of the answer, and what is in it. Raises KeyError."""
    if asked.HasField("list_services"):
        names = (codec.SERVICE, codec.HEALTH, codec.EXPERIMENTS, SERVICES[0])
        return {"list_services_response": {"service": [{"name": name} for name in names]}}
    symbol = asked.file_containing_symbol
    if asked.HasField("file_by_filename"):
        file = codec.POOL.FindFileByName(asked.file_by_filename)
    else:  # of extensions there are none: the empty symbol is not found
        try:
            file = codec.POOL.FindFileContainingSymbol(symbol)
        except KeyError:  # it does not look for methods
            file = codec.POOL.FindMethodByName(symbol).containing_service.file
    return {"file_descriptor_response": {"file_descriptor_proto": [file.serialized_pb]}}
