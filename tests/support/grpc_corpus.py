"""Bodies of ModelInfer that must be refused, by what is wrong with them, for a model of three
features."""

import numpy as np

from flserving.api.grpc import codec
from flserving.api.grpc.codec import InferRequest
from grpc_door import request

WIDTH = 3
X = np.ones((2, WIDTH), np.float32)


def varied(**changes):
    """A good request with other fields of its message or of its one tensor; None takes a field
    away."""
    body = request(X)
    tensor = body.inputs[0]
    for name, value in changes.items():
        of = tensor if name in ("name", "datatype", "shape") else body
        of.ClearField(name)
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            getattr(of, name).extend(value)
        else:
            setattr(of, name, value)
    return body.SerializeToString()


def parameter(name, **value):
    return request(X, parameters={name: value}).SerializeToString()


def corpus():
    good = request(X).SerializeToString()
    raw = X.tobytes()
    for model in (
        "nope",
        "",
        "../local",
        "local/v1",
        "LOCAL",
        "local ",
        "\0",
        "%6cocal",
        "é",
        "a" * 100_000,
    ):
        yield f"model {model[:10]!r}", varied(model_name=model)
    for version in (
        "v0",
        "v1.0",
        "-1",
        "../v1",
        "V1",
        "v1 ",
        "999999999999999999999",
        "\0",
        "x" * 100_000,
    ):
        yield f"version {version[:10]!r}", varied(model_version=version)
    for name in ("", "Features", "x", "features ", "f" * 100_000, "\0"):
        yield f"input {name[:10]!r}", varied(name=name)
    for kind in ("", "fp32", "FP8", "BYTES", "STRING", "INT128", "float32", "FP32 ", "x" * 100_000, "BOOL", "INT64",
                 "UINT8", "FP64", "FP16", "BF16", "INT8"):  # fmt: skip
        yield f"datatype {kind[:10]!r}", varied(datatype=kind)
    for shape in ([], [2], [6], [3, 2], [2, 4], [1, 3], [0, 3], [2, 0], [2, 3, 1], [1, 2, 3], [-1, 3], [-2, -3], [-1],
                  [2**31, 3], [2**62, 2], [2**63 - 1, 2**63 - 1], [2**32, 2**32], [0, 2**62], [1] * 33,
                  [2**62] * 4000, [0] * 5000, [-(2**63), 3]):  # fmt: skip
        yield f"shape {shape[:4]} of {len(shape)}", varied(shape=shape)
    for size in (0, 1, 4, 12, 23, 25, 48, 1000):
        yield f"{size} raw bytes", varied(raw_input_contents=[b"\0" * size])
    yield "no raw entry", varied(raw_input_contents=None)
    yield "two raw entries", varied(raw_input_contents=[raw, raw])
    yield "many raw entries", varied(raw_input_contents=[b""] * 50_000)
    for what in ("nan", "inf", "-inf"):
        yield f"raw {what}", varied(raw_input_contents=[np.full_like(X, float(what)).tobytes()])
        yield f"typed {what}", request(np.full_like(X, float(what)), raw=False).SerializeToString()
    yield (
        "FP64 beyond FP32",
        varied(datatype="FP64", raw_input_contents=[np.full((2, 3), 1e300).tobytes()]),
    )
    for rows in (65, 10_000):
        yield f"{rows} rows", request(np.ones((rows, WIDTH), np.float32)).SerializeToString()
    for columns in (1, 2, 4, 1000):
        yield f"{columns} columns", request(np.ones((2, columns), np.float32)).SerializeToString()
    yield "no inputs", varied(inputs=None)
    yield "no inputs at all", varied(inputs=None, raw_input_contents=None)
    twice = request(X)
    twice.inputs.add().CopyFrom(twice.inputs[0])
    twice.raw_input_contents.append(raw)
    yield "the input twice", twice.SerializeToString()
    twice.inputs[1].name = "more"
    yield "another input", twice.SerializeToString()
    many = InferRequest(model_name="local", inputs=[{"name": str(i)} for i in range(10_000)])
    yield "10,000 inputs", many.SerializeToString()
    for field in ("bool", "int", "int64", "uint", "uint64", "fp32", "fp64", "bytes"):
        values = [b"1"] * 6 if field == "bytes" else [1] * 6
        both = request(X)
        getattr(both.inputs[0].contents, f"{field}_contents").extend(values)
        yield f"raw and {field}_contents", both.SerializeToString()
        del both.raw_input_contents[:]
        for kind in (
            "BOOL",
            "INT8",
            "INT64",
            "UINT32",
            "UINT64",
            "FP16",
            "FP32",
            "FP64",
            "BYTES",
            "BF16",
        ):
            if codec._CONTENTS.get(kind) != f"{field}_contents":
                both.inputs[0].datatype = kind
                yield f"{kind} in {field}_contents", both.SerializeToString()
        fits = next(
            (kind for kind, name in codec._CONTENTS.items() if name == f"{field}_contents"), "FP32"
        )
        both.inputs[0].datatype = fits
        getattr(both.inputs[0].contents, f"{field}_contents").append(values[0])
        yield f"seven {field}_contents", both.SerializeToString()
    for number in (128, -129, 2**31 - 1):
        wide = InferRequest(
            model_name="local", inputs=[{"name": "features", "datatype": "INT8", "shape": [2, 3]}]
        )
        wide.inputs[0].contents.int_contents.extend([number] * 6)
        yield f"INT8 of {number}", wide.SerializeToString()
    for outputs in (
        ["nope"],
        ["predictions", "predictions"],
        [""],
        ["x" * 100_000],
        [str(i) for i in range(1000)],
    ):
        yield (
            f"outputs {outputs[0][:10]!r} and {len(outputs) - 1}",
            request(X, outputs=[{"name": name} for name in outputs]).SerializeToString(),
        )
    classify = [{"name": "predictions", "parameters": {"classification": {"int64_param": 3}}}]
    yield "classification", request(X, outputs=classify).SerializeToString()
    yield "a parameter without value", parameter("stages")
    for name, values in {
        "timeout": [{"string_param": "1"}, {"bool_param": True}, {"int64_param": -1}, {"double_param": 1.5},
                    {"int64_param": 2**62}, {"uint64_param": 2**64 - 1}, {"double_param": float("nan")},
                    {"int64_param": 1}],
        "stages": [{"string_param": "yes"}, {"int64_param": 1}, {"double_param": 1.0}],
        "personal": [{"bool_param": True}, {"string_param": "c-1"}, {"int64_param": 1}],
        "alias": [{"string_param": "nope"}, {"string_param": ""}, {"int64_param": 1}, {"bool_param": True},
                  {"string_param": "../default"}, {"string_param": "a" * 100_000}],
        "priority": [{"int64_param": 1}, {"uint64_param": 2**64 - 1}, {"string_param": "high"}],
        "sequence_id": [{"int64_param": 1}, {"string_param": "s"}],
        "sequence_start": [{"bool_param": True}],
        "sequence_end": [{"bool_param": True}],
        "classification": [{"int64_param": 3}],
    }.items():  # fmt: skip
        for value in values:
            yield f"{name} {str(value)[:40]}", parameter(name, **value)
    for cut in (1, 2, 5, len(good) // 2, len(good) - 1):
        yield f"cut after {cut}", good[:cut]
    for body in (b"", b"\0", b"\xff" * 50, b"{}", b"PRI * HTTP/2.0", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 1000,
                 b"\x2a\x7f", b"\x0a\x02\xff\xfe", b"\x08\x96\x01", bytes(100_000)):  # fmt: skip
        yield f"bytes {body[:8]!r} x {len(body)}", body


CORPUS = dict(corpus())
