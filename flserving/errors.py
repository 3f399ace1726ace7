"""Every error that flserving raises, in one tree. Each class carries its HTTP status and its gRPC
code.

::

    FlservingError
    ├── InvalidInputError         400 INVALID_ARGUMENT   a request that has no answer as it is
    ├── ConfigError               400 INVALID_ARGUMENT   a setting out of range
    ├── InvalidModelError         400 INVALID_ARGUMENT   what cannot be published
    ├── UnauthorizedError         401 UNAUTHENTICATED    no credential, or one that is not known
    ├── ForbiddenError            403 PERMISSION_DENIED  this role, host or origin may not
    ├── NotFoundError             404 NOT_FOUND          no such model, version or alias
    ├── ConflictError             409 ALREADY_EXISTS     the name is taken by something else
    ├── TooLargeError             413 RESOURCE_EXHAUSTED a message over a limit on its size
    ├── UnsupportedEncodingError  415 INVALID_ARGUMENT   a content type not read here
    ├── OverloadedError           429 RESOURCE_EXHAUSTED a queue is full; try again later
    ├── CorruptArtifactError      500 DATA_LOSS          a file is not what was published
    ├── ModelExecutionError       500 INTERNAL           the model raised, or answered NaN
    ├── NotSupportedError         501 UNIMPLEMENTED      a part of the protocol not offered
    ├── ServerClosedError         503 UNAVAILABLE        the server was closed
    ├── ModelUnloadedError        503 UNAVAILABLE        an operator unloaded the model
    ├── StaleModelError           503 UNAVAILABLE        a device's model is too old to answer
    ├── ModelTooLargeError        503 RESOURCE_EXHAUSTED a model is over the cache's budget
    └── DeadlineExceededError     504 DEADLINE_EXCEEDED  the answer would come too late

A message says what was wrong, the value seen, and what to change.
"""

import json


class FlservingError(Exception):
    """Root of the tree. ``http_status`` and ``grpc_code`` are what REST and gRPC answer with."""

    http_status: int = 500
    grpc_code: str = "INTERNAL"

    @property
    def reason(self) -> str:
        """Short label for statistics: a closed set of names, so that it can never grow a metric
        without bound."""
        return type(self).__name__.removesuffix("Error")


class InvalidInputError(FlservingError, ValueError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class ConfigError(FlservingError, ValueError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class InvalidModelError(FlservingError, ValueError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class UnauthorizedError(FlservingError):
    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class ForbiddenError(FlservingError):
    http_status = 403
    grpc_code = "PERMISSION_DENIED"


class NotFoundError(FlservingError, LookupError):
    http_status = 404
    grpc_code = "NOT_FOUND"


class ConflictError(FlservingError):
    http_status = 409
    grpc_code = "ALREADY_EXISTS"


class TooLargeError(FlservingError):
    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"


class UnsupportedEncodingError(FlservingError):
    http_status = 415
    grpc_code = "INVALID_ARGUMENT"


class OverloadedError(FlservingError):
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class CorruptArtifactError(FlservingError):
    http_status = 500
    grpc_code = "DATA_LOSS"


class ModelExecutionError(FlservingError):
    http_status = 500
    grpc_code = "INTERNAL"


class NotSupportedError(FlservingError):
    http_status = 501
    grpc_code = "UNIMPLEMENTED"


class ServerClosedError(FlservingError):
    http_status = 503
    grpc_code = "UNAVAILABLE"


class ModelUnloadedError(FlservingError):
    http_status = 503
    grpc_code = "UNAVAILABLE"


class StaleModelError(FlservingError):
    http_status = 503
    grpc_code = "UNAVAILABLE"


class ModelTooLargeError(FlservingError):
    http_status = 503
    grpc_code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(FlservingError, TimeoutError):
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


_KINDS: list[type[FlservingError]] = [FlservingError, *FlservingError.__subclasses__()]
BY_REASON = {kind().reason: kind for kind in _KINDS}
_BY_STATUS = {kind.http_status: kind for kind in reversed(_KINDS)}
REASON = "flserving-error"
"""Response header, and trailing metadata of gRPC, with :attr:`FlservingError.reason`: which class
of those with this status it was, for clients that know them."""


def answered(status: int, body: bytes, reason: str = "") -> FlservingError:
    """The error of an HTTP answer: of the class that its server names, else of the tree's first
    with this status."""
    try:
        text = str(json.loads(body)["error"])
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # another protocol's server, a proxy, or a liar
        text = f"status {status}"
    kind = BY_REASON.get(reason) or _BY_STATUS.get(status, FlservingError)
    return kind(text)


def check_number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Raise ConfigError unless the setting is a number in [low, high], and an integer where it must
    be ``whole``."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        noun = "an integer" if whole else "a number"
        raise ConfigError(f"{name} is {value!r}: use {noun} in [{low:g}, {high:g}]")
