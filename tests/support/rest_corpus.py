"""Requests to infer that must be refused: one good request, and everything that can be wrong with
each of its parts."""

import gzip
import json
import zlib

from rest_door import WIDTH, binary, rows, tensor, text

MOST = 64 << 10

NOT_A = {
    "string": [None, 5, 1.5, True, [], {}, ["features"]],
    "list": [None, 5, "x", True, {}, {"0": 1}],
    "object": [5, "x", True, []],
}
DATATYPES = ["", "fp32", "FP8", "FP16", "BF16", "BYTES", "float32", "FP32 ", "TYPE_FP32", "x" * 999]
SHAPES = [
    [],
    [WIDTH],
    [0, WIDTH],
    [1, WIDTH - 1],
    [2, WIDTH],
    [-1, WIDTH],
    [1, -WIDTH],
    [-1, -WIDTH],
    [1, 0],
    [0],
]
SHAPES += [
    [2**62, 4],
    [2**63, 2**63],
    [2**64],
    [0, 2**62],
    [0, 2**70],
    [1] * 8 + [WIDTH],
    [1, 1, WIDTH],
    [1.0, WIDTH],
]
SHAPES += [
    ["1", WIDTH],
    [None],
    [[1, WIDTH]],
    [True, WIDTH],
    [1, WIDTH, 1],
    [WIDTH, 1],
    [1e400, 1],
    [10**30],
    [0, 0],
]
FORMS = [
    [[1.0] * WIDTH] * 2,
    [[1.0] * (WIDTH - 1)],
    [[1.0] * WIDTH, 1.0],
    [1.0, [1.0] * WIDTH],
    ["123456"],
]
FORMS += [[{"a": 1}] * WIDTH, [[]], [[], []], [[[1.0]] * WIDTH]]
LENGTH = "Inference-Header-Content-Length"
NUMBERS = ["1", None, [], {}, [[1.0]], 10**400, "NaN"]


def json_cases():
    """Name -> JSON text of a body that must be refused."""
    good = tensor(rows())
    for key, kind in (
        ("name", "string"),
        ("datatype", "string"),
        ("shape", "list"),
        ("data", "list"),
    ):
        for number, value in enumerate(NOT_A[kind]):
            yield f"{key}-{number}", {"inputs": [good | {key: value}]}
        yield f"{key}-missing", {"inputs": [{k: v for k, v in good.items() if k != key}]}
    for number, value in enumerate(NOT_A["object"]):
        yield f"input-parameters-{number}", {"inputs": [good | {"parameters": value}]}
        yield f"parameters-{number}", {"inputs": [good], "parameters": value}
        yield f"input-{number}", {"inputs": [value]}
        yield f"output-{number}", {"inputs": [good], "outputs": [value]}
        yield f"body-{number}", value
    for number, value in enumerate(NOT_A["list"]):
        yield f"inputs-{number}", {"inputs": value}
        if value is not None:
            yield f"outputs-{number}", {"inputs": [good], "outputs": value}
    for number, value in enumerate([5, 1.5, True, [], {}, "x" * 1025]):
        yield f"id-{number}", {"inputs": [good], "id": value}
    for number, name in enumerate(
        ["", "Features", "feature", "x" * 300, "../features", "features\x00", "{0}", "%s"]
    ):
        yield f"input-name-{number}", {"inputs": [good | {"name": name}]}
        yield f"output-name-{number}", {"inputs": [good], "outputs": [{"name": name}]}
    for number, kind in enumerate(DATATYPES):
        yield f"datatype-name-{number}", {"inputs": [good | {"datatype": kind}]}
    for kind in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"):
        yield f"fraction-in-{kind}", {"inputs": [good | {"datatype": kind, "data": [0.5] * WIDTH}]}
        yield f"range-of-{kind}", {"inputs": [good | {"datatype": kind, "data": [2**64] * WIDTH}]}
    for number, shape in enumerate(SHAPES):
        wrong = good | {"shape": shape}
        if shape != [WIDTH]:  # that one is a good row
            yield f"shape-{number}-flat", {"inputs": [wrong]}
        yield f"shape-{number}-nested", {"inputs": [wrong | {"data": [[[[1.0] * WIDTH]]]}]}
    for number, value in enumerate(NUMBERS):
        for place in (0, WIDTH - 1):
            data = [0.5] * WIDTH
            data[place] = value
            yield f"number-{number}-{place}", {"inputs": [good | {"data": data}]}
        yield (
            f"nested-number-{number}",
            {"inputs": [good | {"data": [[0.5] * (WIDTH - 1) + [value]]}]},
        )
    for number, data in enumerate(FORMS):
        yield f"data-form-{number}", {"inputs": [good | {"data": data}]}
    yield "data-beyond-float32", {"inputs": [good | {"data": [1e39] * WIDTH}]}
    yield "input-twice", {"inputs": [good, good]}
    yield "input-too-many", {"inputs": [good | {"name": f"n{i}"} for i in range(17)]}
    yield "input-unknown-beside", {"inputs": [good, good | {"name": "more"}]}
    yield "output-twice", {"inputs": [good], "outputs": [{"name": "predictions"}] * 2}
    yield "output-too-many", {"inputs": [good], "outputs": [{"name": f"n{i}"} for i in range(17)]}
    yield "parameters-too-many", {"inputs": [good], "parameters": {f"p{i}": i for i in range(65)}}
    one = {"name": "predictions"}
    for value in (1, "true", 0.0, 2**70):
        yield (
            f"binary-data-{value}",
            {"inputs": [good], "outputs": [one | {"parameters": {"binary_data": value}}]},
        )
        yield (
            f"binary-data-output-{value}",
            {"inputs": [good], "parameters": {"binary_data_output": value}},
        )
    for value in (1, 0, 24, -1, 2**63, 1.5, "24", True):
        yield (
            f"binary-size-without-bytes-{value}",
            {"inputs": [good | {"parameters": {"binary_data_size": value}}]},
        )
    for name, value in (("timeout", -5), ("timeout", 1.5), ("timeout", "1"), ("timeout", 10**18), ("timeout", True),
                        ("alias", 5), ("alias", "none"), ("alias", ""), ("stages", 1),
                        ("personal", "yes")):  # fmt: skip
        yield f"parameter-{name}-{value}", {"inputs": [good], "parameters": {name: value}}
    for name, value in {"nested": {}, "list": [], "null": None}.items():
        yield f"parameter-value-{name}", {"inputs": [good], "parameters": {"x": value}}


def byte_cases():
    """Name -> what httpx sends: bodies that are no JSON, or not what their headers say."""
    good = text()
    for number, body in enumerate([
        b"", b" ", b"{", b"[", b"null", b'"x"', b"0", b"NaN", good[:-1], good + b"x", good + good, b"\xff\xfe", b"\x00",
        good.replace(b"[1,6]", b"[1,06]"), good.replace(b'"', b"'"), b"\xef\xbb\xbf" + good, b"\x80\x04K\x01.",
        good.decode().encode("utf-16"), good.decode().encode("utf-32"), good.replace(b"features", b"\xff"),
        b'{"inputs":' * 2000, b"[" * 60_000, b"[" * 20_000 + b"]" * 20_000, good.replace(b"features", b"\\ud800"),
        good.replace(b'"FP32"', b'"FP32","datatype":"BYTES"'), b'{"inputs":[{}]' + b" " * 5000,
    ]):  # fmt: skip
        yield f"text-{number}", {"content": body}
    head, _, _ = good.partition(b'"data":')
    for word in (
        "NaN",
        "Infinity",
        "-Infinity",
        "nan",
        "inf",
        "1e999",
        "0x1",
        "1_0",
        "01",
        "+1",
        ".5",
        "1.",
        "--1",
    ):
        yield (
            f"number-{word}",
            {"content": head + b'"data":[' + b",".join([word.encode()] * WIDTH) + b"]}]}"},
        )
    for more in (-1, 1, 10**6):
        yield (
            f"header-length-off-by-{more}",
            {"content": good, "headers": {LENGTH: str(len(good) + more)}},
        )
    for length in ("-1", "x", "", "1.0", "1e2", "0x10", "+5", "5 5", "9" * 30, "1", "\u0665"):
        yield (
            f"header-length-{length[:6]!r}",
            {"content": good, "headers": {LENGTH: length.encode()}},
        )
    x = rows()
    for size in (0, 1, 4 * WIDTH - 1, 4 * WIDTH + 1, 2**40, -24):
        yield f"blob-size-{size}", binary(x, size=size)
    for cut in (0, 1, 4 * WIDTH - 4, 4 * WIDTH + 4):
        yield f"blob-of-{cut}", binary(x, raw=(x.tobytes() * 2)[:cut])
        yield f"blob-of-{cut}-said-right", binary(x, raw=(x.tobytes() * 2)[:cut], size=4 * WIDTH)
    for kind in ("FP16", "FP64", "INT8", "BF16", "BYTES", "nope"):
        yield f"blob-as-{kind}", binary(x, kind)
    for word, value in (
        ("nan", b"\0\0\xc0\x7f"),
        ("inf", b"\0\0\x80\x7f"),
        ("-inf", b"\0\0\x80\xff"),
    ):
        yield f"blob-{word}", binary(x, raw=x.tobytes()[:-4] + value)
    yield "blob-bool-2", binary(x, "BOOL", b"\2" * WIDTH)
    for cut in (0, 1, 3, 4, 25, 4 * WIDTH - 4, 4 * WIDTH + 4):
        raw = (x.tobytes() * 2)[:cut]
        yield f"raw-of-{cut}", {"content": raw, "headers": {LENGTH: "0"}}
    for coding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        bomb = pack(b" " * (50 * MOST))
        packed = pack(good)
        cut, more = (
            [packed[:-5], packed[: len(packed) // 2], packed[5:]],
            [packed + b"x", packed + packed],
        )
        for number, body in enumerate([b"", good, bomb, *cut, *more, pack(b""), pack(packed)]):
            yield f"{coding}-{number}", {"content": body, "headers": {"Content-Encoding": coding}}
    for coding in ("br", "zstd", "gzip, gzip", "identity, gzip", "compress", "x", ""):
        yield f"encoding-{coding!r}", {"content": good, "headers": {"Content-Encoding": coding}}
    yield "too-long", {"content": b" " * (MOST + 1)}
    yield "too-long-in-chunks", {"content": [b" " * 1000] * (MOST // 1000 + 1)}


CORPUS = {name: {"content": json.dumps(body).encode()} for name, body in json_cases()} | dict(
    byte_cases()
)
