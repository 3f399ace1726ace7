"""A server behind its REST door, and requests to it, for the tests of the door."""

import contextlib
import socket

import numpy as np
import orjson
import torch
from torch import nn

import flserving
from flserving.api.auth import Role, Tokens
from serving_models import PATIENCE_S

TOKENS = {"read": Role.READ, "infer": Role.INFER, "admin": Role.ADMIN, "client": Role.INFER}
WIDTH, CLASSES = 6, 4
INFER = "/v2/models/local/infer"


def known_tokens():
    """One token per role, spelled like it; "client" speaks for the client c-1."""
    tokens = Tokens()
    for name, role in TOKENS.items():
        tokens.add(name, role, "c-1" if name == "client" else None)
    return tokens


def bearer(name):
    return {} if name is None else {"Authorization": f"Bearer {name}"}


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def two_versions(**settings):
    """A server of the versions v1 (default) and v2 of a classifier, from WIDTH features to
    CLASSES."""
    config = flserving.ServingConfig(
        **{"warmup_samples": 1, "timeout_ms": PATIENCE_S * 1e3, **settings}
    )
    server = flserving.ModelServer(config)
    for seed, version in enumerate(("v1", "v2")):
        server.load_model(version, classifier(seed), num_features=WIDTH)
    return server


def door(server, **options):
    """The server's REST door with the known tokens; gRPC stays shut."""
    return flserving.serve(
        server, **{"grpc_port": None, "tokens": known_tokens(), "admin": True, **options}
    )


def rows(n=1, seed=0):
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)


def tensor(x, **more):
    return {
        "name": "features",
        "shape": list(x.shape),
        "datatype": "FP32",
        "data": x.ravel().tolist(),
        **more,
    }


def text(x=None, **more):
    """The JSON body of a request to infer."""
    return orjson.dumps({"inputs": [tensor(rows() if x is None else x)], **more})


def binary(x, datatype="FP32", raw=None, size=None, **more):
    """Body and headers of a request to infer with one binary tensor."""
    raw = x.tobytes() if raw is None else raw
    parameters = {"binary_data_size": len(raw) if size is None else size}
    one = {
        "name": "features",
        "shape": list(x.shape),
        "datatype": datatype,
        "parameters": parameters,
    }
    head = orjson.dumps({"inputs": [one], **more})
    headers = {
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
    }
    return {"content": head + raw, "headers": headers}


def outputs_of(response):
    """The output tensors of an httpx response, JSON or binary, as arrays of the shape and type that
    it names."""
    length = response.headers.get("inference-header-content-length")
    at = len(response.content) if length is None else int(length)
    message = orjson.loads(response.content[:at])
    types = {"INT64": np.int64, "FP32": np.float32}
    outputs = {}
    for one in message["outputs"]:
        dtype = types[one["datatype"]]
        if "data" in one:
            array = np.array(one["data"], dtype)
        else:
            size = one["parameters"]["binary_data_size"]
            array = np.frombuffer(response.content[at : at + size], dtype)
            at += size
        outputs[one["name"]] = array.reshape(one["shape"])
    assert at == len(response.content)
    return message, outputs


class Wire:
    """A connection on which anything can be said."""

    def __init__(self, endpoint, receive_nbytes=None):
        host, port = endpoint.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE_S)
        if receive_nbytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_nbytes)
        self.socket.connect((host, int(port)))
        self.host = f"{host}:{port}".encode()

    def head(self, *headers):
        first = f"POST {INFER} HTTP/1.1".encode()
        lines = [first, b"Host: " + self.host, b"Authorization: Bearer infer", *headers]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def say(self, data):
        # closed while we spoke: the answer tells why
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def answer(self):
        """Status and body of the next answer; (0, b"") where the connection was closed without
        one."""
        received = b""
        try:
            while b"\r\n\r\n" not in received:
                received += (more := self.socket.recv(65536))
                if not more:
                    return 0, received
            head, _, body = received.partition(b"\r\n\r\n")
            length = next(
                int(line[15:])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            while len(body) < length:
                body += self.socket.recv(65536)
            return int(head[9:12]), body
        except ConnectionResetError:
            return 0, received

    def all(self):
        """Everything until the connection is closed."""
        return b"".join(iter(lambda: self.socket.recv(65536), b""))

    def closed(self):
        try:
            return self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
