"""Errors: the table in the module's docstring is the classes, and an error survives a trip to
another process."""

import inspect
import pickle
import re

import pytest

from flserving import errors
from flserving.errors import FlservingError

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, FlservingError) and kind is not FlservingError
}
ROWS = re.findall(r"[├└]── (\w+) +(\d{3}) ([A-Z_]+) +(\S.*)", errors.__doc__)
GRPC_CODES = {
    *(
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "RESOURCE_EXHAUSTED",
        "DATA_LOSS",
        "INTERNAL",
    ),
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"),
}


def test_the_table_is_the_classes():
    assert {name: (int(status), code) for name, status, code, _ in ROWS} == {
        name: (kind.http_status, kind.grpc_code) for name, kind in CLASSES.items()
    }
    statuses = [int(status) for _, status, _, _ in ROWS]
    assert statuses == sorted(statuses)
    assert set(statuses) == {400, 401, 403, 404, 409, 413, 415, 429, 500, 501, 503, 504}
    assert {code for _, _, code, _ in ROWS} <= GRPC_CODES


def test_the_root_answers_for_whatever_is_not_told_apart():
    assert (FlservingError.http_status, FlservingError.grpc_code) == (500, "INTERNAL")


@pytest.mark.parametrize("kind", [FlservingError, *CLASSES.values()])
def test_an_error_is_told_by_its_class_says_its_message_and_is_picklable(kind):
    error = kind("what was wrong, the value seen, what to change")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error) and copy.reason == error.reason
    assert kind.__bases__[0] in (FlservingError, Exception), (
        "one level: every class stands in the table"
    )


def test_reasons_are_a_closed_set_of_labels():
    reasons = {kind("different each time: " + name).reason for name, kind in CLASSES.items()}
    assert reasons == {
        *(
            "InvalidInput",
            "Config",
            "InvalidModel",
            "NotFound",
            "Conflict",
            "Overloaded",
            "CorruptArtifact",
        ),
        *(
            "ModelExecution",
            "ServerClosed",
            "ModelTooLarge",
            "DeadlineExceeded",
            "Unauthorized",
            "Forbidden",
        ),
        *("TooLarge", "UnsupportedEncoding", "NotSupported", "ModelUnloaded", "StaleModel"),
    }


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidInputError, ValueError),
        (errors.ConfigError, ValueError),
        (errors.InvalidModelError, ValueError),
        (errors.NotFoundError, LookupError),
        (errors.DeadlineExceededError, TimeoutError),
    ],
)
def test_who_catches_the_builtin_catches_ours(kind, builtin):
    with pytest.raises(builtin):
        raise kind("as a reader of Python expects")
