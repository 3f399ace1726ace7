"""Checks of the exercises "write a request" and "read an answer" (notebook 05): messages of the
protocol V2 as JSON."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np

from flserving.api.rest.codec import NAMES, ParsedRequest, read_infer, write_infer
from flserving.errors import FlservingError
from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Tensors = Mapping[str, np.ndarray[Any, Any]]
Write = Callable[..., Any]
Read = Callable[[int, Mapping[str, str], bytes], Any]

_BY_LINES = np.arange(6, dtype=np.float32).reshape(2, 3)


def check_build_request(build_request: Write) -> None:
    """Check ``build_request(tensors, timeout_s=None) -> bytes``: a request of the protocol, as
    JSON.

    ``tensors`` maps names to arrays. Right is: each as name, datatype, shape and ``data``, its
    numbers in one list, the last axis fastest; every number as it was; ``timeout`` in whole
    microseconds; a ValueError for what JSON has no word for.

    Raises:
        CheckError: Says which field is wrong, and what a server makes of it.
    """
    judge(
        "build-request",
        build_request,
        Part(
            "says name, type and shape",
            _describes,
            (
                "An array knows its type: `array.dtype.kind` is one letter, `array.dtype.itemsize` counts bytes.",
                "A dict from the letter to the word, f: FP, i: INT, u: UINT, and 8 * itemsize behind it; BOOL alone.",
            ),
        ),
        Part(
            "numbers row by row",
            _row_major,
            (
                "However an array lies in memory, the list has its first row first.",
                "`array.ravel()` goes row by row, whatever the memory looks like; `order='K'` does not.",
            ),
        ),
        Part(
            "every number as it was",
            _exact,
            (
                "`.tolist()` gives Python numbers with all of their digits.",
                "`json.dumps(message, allow_nan=False)` raises ValueError for NaN and for infinities.",
            ),
        ),
        Part(
            "tells the deadline",
            _deadline,
            (
                "It stands in the message's own `parameters`, beside `inputs`.",
                'Only if timeout_s is not None: `message["parameters"] = {"timeout": int(timeout_s * 1e6)}`.',
            ),
        ),
        Part("the server reads the same arrays", _server_reads),
    )


def check_parse_answer(parse_answer: Read) -> None:
    """Check ``parse_answer(status, headers, body) -> {name: array}``.

    Right is: each output as an array of its type and shape; for any status but 200 a FlservingError
    with the server's sentence, ``http_status`` and ``retry_after_s`` (from the header Retry-After,
    0 if there is none), even when the body is not JSON.

    Raises:
        CheckError: Says what the caller is told wrongly.
    """
    judge(
        "parse-answer",
        parse_answer,
        Part(
            "arrays of the given type and shape",
            _arrays,
            (
                "Every entry of `outputs` has a name, a datatype, a shape and data.",
                "`np.array(data, dtype)`, then `.reshape(shape)`; FP32 is np.float32, INT64 np.int64, BOOL bool.",
            ),
        ),
        Part(
            "an error is raised, and says why",
            _errors,
            (
                "Look at the status before you read outputs.",
                'The sentence is `json.loads(body)["error"]`; an error may be given attributes before it is raised.',
                "`error = FlservingError(sentence)`, `error.http_status = status`, `raise error`.",
            ),
        ),
        Part(
            "bears a body that is not JSON",
            _not_json,
            (
                "What may `json.loads(body)['error']` raise, if the body is an HTML page, or a list?",
                "`except (ValueError, KeyError, TypeError):` and take a sentence of your own, with the status in it.",
            ),
        ),
        Part(
            "passes on Retry-After",
            _retry_after,
            ("A header is text, and may be missing.", '`float(headers.get("retry-after", 0))`'),
        ),
        Part("reads what the server writes", _reads_the_server),
    )


# ---------------------------------------------------------------------------------------- a request


def _message(build_request: Write, tensors: Tensors, *timeout_s: float) -> dict[str, Any]:
    """What it wrote, read again as JSON."""
    told = f"build_request({{{', '.join(map(repr, tensors))}}}{''.join(f', {each:g}' for each in timeout_s)})"
    body = ask(told, build_request, dict(tensors), *timeout_s)
    assert not isinstance(body, dict), (
        f"{told} returned a dict: a socket carries bytes, use json.dumps and .encode()"
    )
    assert not isinstance(body, str), (
        f"{told} returned a text: a socket carries bytes, add .encode()"
    )
    assert isinstance(body, bytes), (
        f"{told} returned {type(body).__name__}: return the bytes of the message"
    )
    try:
        message = json.loads(body)
    except ValueError as error:
        raise AssertionError(
            f"{told} is not JSON ({error}): str(dict) writes 'single quotes', use json.dumps"
        ) from error
    assert isinstance(message, dict) and isinstance(message.get("inputs"), list), (
        f"{told} has no list `inputs`: the message is a JSON object with the key inputs"
    )
    assert len(message["inputs"]) == len(tensors), (
        f"{told} has {len(message['inputs'])} inputs for {len(tensors)} tensors: one entry for each"
    )
    return message


def _described(build_request: Write, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    tensor = _message(build_request, {"features": array})["inputs"][0]
    missing = [key for key in ("name", "datatype", "shape", "data") if key not in tensor]
    assert not missing, (
        f"the input has no {missing[0]!r}, only {sorted(tensor)}: a server cannot read it without"
    )
    return dict(tensor)


def _describes(build_request: Write) -> None:
    for kind in ("float32", "float64", "int64", "int8", "uint8", "bool"):
        array = np.ones((2, 3), kind)
        tensor = _described(build_request, array)
        wanted = NAMES[array.dtype]
        found = tensor["datatype"]
        assert tensor["name"] == "features", (
            f"the input is called {tensor['name']!r}: its name is 'features'"
        )
        assert found != kind, (
            f"the datatype is {kind!r}, numpy's name: the protocol's is {wanted!r}"
        )
        assert found != f"{wanted.rstrip('0123456789')}{array.itemsize}" or kind == "bool", (
            f"the datatype of {kind} is {found!r}: the number counts bits, itemsize counts bytes"
        )
        assert found == wanted, (
            f"the datatype of {kind} is {found!r}, the protocol's name is {wanted!r}"
        )
        shape = tensor["shape"]
        assert shape != [6], (
            "the shape of 2 rows of 3 is [6]: a server cannot tell that from one row of 6"
        )
        assert shape != [3, 2], "the shape of 2 rows of 3 is [3, 2]: rows first, as in array.shape"
        assert shape == [2, 3], f"the shape of 2 rows of 3 is {shape!r}: a list, [2, 3]"
    names = [
        each["name"] for each in _message(build_request, {"a": _BY_LINES, "b": _BY_LINES})["inputs"]
    ]
    assert names == ["a", "b"], f"the inputs of {{'a': ..., 'b': ...}} are called {names}"


def _row_major(build_request: Write) -> None:
    columns = np.ascontiguousarray(_BY_LINES.T)
    views: dict[str, np.ndarray[Any, Any]] = {
        "[[0, 1, 2], [3, 4, 5]]": _BY_LINES,
        "the same in Fortran order (columns side by side in memory)": np.asfortranarray(_BY_LINES),
        "the same as a transposed view": columns.T,
        "every second line of a larger array": np.repeat(_BY_LINES, 2, axis=0)[::2],
    }
    for told, array in views.items():
        data = _described(build_request, array)["data"]
        assert isinstance(data, list), f"the data of {told} is {data!r}: a list of numbers"
        assert not any(isinstance(each, list) for each in data), (
            f"the data of {told} is a list of lists: one flat list; the shape says how to cut it"
        )
        assert data != [0, 3, 1, 4, 2, 5], (
            f"the data of {told} goes column by column: the server reads row by row, and takes pixels of other rows "
            "for this one; the answer is wrong, and no error says so"
        )
        assert data == [0, 1, 2, 3, 4, 5], (
            f"the data of {told} is {data}: row by row it is [0, 1, 2, 3, 4, 5]"
        )
    data = _described(build_request, np.arange(8, dtype=np.float32).reshape(2, 2, 2))["data"]
    assert data == list(range(8)), (
        f"the data of two images of 2 x 2 is {data}: the last axis goes fastest"
    )


def _exact(build_request: Write) -> None:
    numbers = np.array([0.1, 1 / 3, 1e-7, -16777217, 3e38], np.float32)
    got: Any = np.array(_described(build_request, numbers)["data"], np.float32)
    assert np.array_equal(got, numbers), (
        f"{numbers[got != numbers][:1]} came out as {got[got != numbers][:1]}: send every digit; the model was trained "
        "on numbers, not on rounded ones"
    )
    large = np.array([2**53 + 1, -7])
    got = _described(build_request, large)["data"]
    assert got == large.tolist(), (
        f"the INT64 {large[0]} came out as {got[0]!r}: a float has only 53 bits"
    )
    assert all(type(each) is int for each in got), f"INT64 came out as {got}: whole numbers"
    got = _described(build_request, np.array([True, False]))["data"]
    assert all(type(each) is bool for each in got), f"BOOL came out as {got}: true and false"
    for bad in (np.nan, np.inf):
        try:
            body = build_request({"features": np.array([1, bad], np.float32)})
        except ValueError:
            continue
        raise AssertionError(
            f"a row with {bad} was written as {bytes(body)[-40:]!r}: JSON has no such word, and a server refuses it "
            "all with a sentence about its text; raise ValueError before it is sent"
        )


def _deadline(build_request: Write) -> None:
    message = _message(build_request, {"features": _BY_LINES})
    assert "timeout" not in (message.get("parameters") or {}), (
        "without timeout_s the message names a timeout all the same"
    )
    message = _message(build_request, {"features": _BY_LINES}, 0.25)
    assert "timeout" not in message and not any(
        "parameters" in each for each in message["inputs"]
    ), "the timeout is of the whole request: it stands in the message's own `parameters`"
    found = (message.get("parameters") or {}).get("timeout")
    assert found is not None, (
        "with timeout_s=0.25 there is no parameters['timeout']: the server works on for nobody"
    )
    mistakes = {0.25: "seconds", 250: "milliseconds", 0: "rounded down to 0"}
    for wrong, why in mistakes.items():
        assert found != wrong, (
            f"the timeout of 0.25 s is {wrong:g}, {why}: the protocol counts microseconds"
        )
    assert found == 250_000 and type(found) is int, (
        f"the timeout of 0.25 s is {found!r}: it is 250000, an int"
    )


def _server_reads(build_request: Write) -> None:
    rng = np.random.default_rng(5)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "features": rng.standard_normal((2, 3, 7), np.float32).T,
        "ids": rng.integers(-(2**60), 2**60, (2, 2)),
        "none": np.zeros((0, 4), np.float32),
        "flags": rng.random(5) > 0.5,
    }
    body = ask("build_request(four tensors, 1)", build_request, tensors, 1)
    read = ask("the server's own read_infer(your bytes)", read_infer, body)
    assert read.inputs.keys() == tensors.keys(), (
        f"sent were {list(tensors)}, the server reads {list(read.inputs)}"
    )
    for name, array in tensors.items():
        got = read.inputs[name]
        assert got.dtype == array.dtype and np.array_equal(got, array), (
            f"the server reads {name!r} as {got.dtype} {list(got.shape)}, sent was {array.dtype} {list(array.shape)}"
        )


# ---------------------------------------------------------------------------------------- an answer


def _answer(datatype: str, shape: list[int], data: list[Any]) -> bytes:
    output = {"name": "scores", "datatype": datatype, "shape": shape, "data": data}
    return json.dumps({"model_name": "m", "model_version": "1", "outputs": [output]}).encode()


def _read(parse_answer: Read, body: bytes, told: str) -> dict[str, Any]:
    got = ask(f"parse_answer(200, headers, {told})", parse_answer, 200, httpx.Headers(), body)
    assert isinstance(got, dict), (
        f"parse_answer returned {type(got).__name__}: return a dict, name -> array"
    )
    return got


def _arrays(parse_answer: Read) -> None:
    cases: dict[str, tuple[type, list[Any]]] = {
        "FP32": (np.float32, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        "INT64": (np.int64, [2**53 + 1, 1, 2, 3, 4, 5]),
        "BOOL": (np.bool_, [True, False, True, True, False, True]),
        "UINT8": (np.uint8, [255, 1, 2, 3, 4, 5]),
    }
    for datatype, (dtype, data) in cases.items():
        got = _read(parse_answer, _answer(datatype, [2, 3], data), f"{datatype} of shape [2, 3]")
        assert list(got) == ["scores"], (
            f"the one output is called 'scores', the keys are {list(got)}"
        )
        array = got["scores"]
        assert isinstance(array, np.ndarray), (
            f"'scores' is a {type(array).__name__}: make an array of it"
        )
        assert array.dtype == dtype, f"{datatype} became {array.dtype}: it is {np.dtype(dtype)}"
        assert array.shape == (2, 3), f"an output of shape [2, 3] became {array.shape}: reshape it"
        wanted: np.ndarray[Any, Any] = np.array(data, dtype).reshape(2, 3)
        assert not np.array_equal(array, np.array(data, dtype).reshape(3, 2).T), (
            "an output of shape [2, 3] was read column by column: the list goes row by row"
        )
        assert np.array_equal(array, wanted), (
            f"{datatype} {data[0]} became {array.ravel()[0]}: read the list into the right type at once"
        )
    empty = _read(parse_answer, _answer("FP32", [0, 10], []), "no rows of 10")["scores"]
    assert empty.shape == (0, 10), f"an answer of shape [0, 10] became {empty.shape}"


def _raised(parse_answer: Read, status: int, body: bytes, **headers: str) -> FlservingError:
    told = f"parse_answer({status}, headers, {body[:40]!r})"
    try:
        got = parse_answer(
            status, httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}), body
        )
    except (NotImplementedError, AssertionError):
        raise
    except FlservingError as error:
        return error
    except Exception as error:
        raise AssertionError(
            f"{told} raised {type(error).__name__}: {error}; its caller handles FlservingError, and this one passes by"
        ) from error
    raise AssertionError(
        f"{told} returned {got!r}: the caller takes that for an answer; raise a FlservingError"
    )


def _errors(parse_answer: Read) -> None:
    for status, sentence in (
        (400, "rows have 63 features"),
        (429, "the queue is full"),
        (503, "closed"),
        (504, "late"),
    ):
        error = _raised(parse_answer, status, json.dumps({"error": sentence}).encode())
        assert sentence in str(error), (
            f"the server said {sentence!r}, the error says {str(error)!r}: pass its words on"
        )
        assert error.http_status == status, (
            f"http_status of a {status} is {error.http_status!r}: whoever tries again decides by it"
        )


def _not_json(parse_answer: Read) -> None:
    bodies = (
        b"<html><h1>502 Bad Gateway</h1></html>",
        b"",
        b'["no", "object"]',
        b'{"detail": "another server"}',
    )
    for body in bodies:
        error = _raised(parse_answer, 502, body)
        assert str(error).strip(), (
            f"the error for the body {body!r} says nothing: say at least the status"
        )
        assert error.http_status == 502, (
            f"http_status of a 502 with the body {body!r} is {error.http_status!r}"
        )


def _retry_after(parse_answer: Read) -> None:
    body = b'{"error": "the queue is full"}'
    error = _raised(parse_answer, 429, body, Retry_After="1.5")
    found = getattr(error, "retry_after_s", None)
    assert found is not None, "the server said Retry-After: 1.5, and the error has no retry_after_s"
    assert found != "1.5", (
        "retry_after_s is the text '1.5': nobody can wait a text, make it a number"
    )
    assert found == 1.5, f"the server said Retry-After: 1.5, retry_after_s is {found!r}"
    found = getattr(_raised(parse_answer, 429, body), "retry_after_s", None)
    assert found == 0, (
        f"without the header Retry-After retry_after_s is {found!r}: 0, the server said nothing"
    )


def _reads_the_server(parse_answer: Read) -> None:
    rng = np.random.default_rng(5)
    outputs: dict[str, np.ndarray[Any, Any]] = {
        "predictions": rng.integers(0, 10, 8),
        "confidences": rng.random(8, np.float32),
        "probabilities": rng.random((8, 10), np.float32),
    }
    body, _ = write_infer(
        "digits", "7", outputs, {"round": 7}, ParsedRequest({}, None, {}, None, {}, False)
    )
    got = _read(parse_answer, body, "what the server wrote")
    assert got.keys() == outputs.keys(), f"the server wrote {list(outputs)}, read were {list(got)}"
    for name, array in outputs.items():
        assert isinstance(got[name], np.ndarray), (
            f"{name} is a {type(got[name]).__name__}: make an array of it"
        )
        assert got[name].dtype == array.dtype and np.array_equal(got[name], array), (
            f"{name} differ from what was sent"
        )
