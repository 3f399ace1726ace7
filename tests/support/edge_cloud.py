"""A cloud that releases rounds of a small model, for the tests of devices, and a way to stand
between the two."""

import contextlib
import socket
import threading

import numpy as np
import torch

import flserving
from flserving import ModelServer, Registry
from flserving.api.auth import Role, Tokens
from flserving.registry.heads import HeadSet
from serving_models import PATIENCE_S

SIZES = [8, 24, 3]
CLIENTS = ("c-1", "c-2")
X = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)


def state(number, sizes=SIZES):
    """The weights of round ``number``: each a small step from the one before; even rounds leave the
    head alone."""
    rng = np.random.default_rng(7)
    shapes = {"body.0.weight": (sizes[1], sizes[0]), "body.0.bias": (sizes[1],),
              "head.weight": (sizes[2], sizes[1]), "head.bias": (sizes[2],)}  # fmt: skip
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for step in range(1, number + 1):
        for name, values in tensors.items():
            moved = rng.standard_normal(values.shape, dtype=np.float32)
            if step % 2 or name.startswith("body."):
                tensors[name] = values + np.float32(0.01) * moved
    return {name: torch.from_numpy(values) for name, values in tensors.items()}


def heads(number):
    rng = np.random.default_rng(number)
    return HeadSet(
        "head",
        CLIENTS,
        rng.standard_normal((len(CLIENTS), SIZES[1] + 1, SIZES[2]), dtype=np.float32),
    )


def publish(registry, number, *, with_heads=False, sizes=SIZES, alias="default"):
    return registry.publish(
        "m", state(number, sizes), architecture="mlp", parameters={"sizes": sizes}, lineage={"round": number},
        preprocessing={"mean": [0.5] * sizes[0], "std": [2.0] * sizes[0]}, metrics={"global_accuracy": 0.5},
        heads=heads(number) if with_heads else None, alias=alias,
    )  # fmt: skip


def tokens():
    """``read``, ``infer``, and one for each client, spelled like its id."""
    known = Tokens()
    known.add("read", Role.READ)
    known.add("infer", Role.INFER)
    known.add("admin", Role.ADMIN)
    for client in CLIENTS:
        known.add(client, Role.INFER, client)
    return known


@contextlib.contextmanager
def cloud(root, *rounds, with_heads=False, **options):
    """(registry, endpoint) of a cloud with these rounds released one after another."""
    with Registry(root) as registry:
        for number in rounds:
            publish(registry, number, with_heads=with_heads)
        options = {
            "tokens": tokens(),
            "grpc_port": None,
            "artifacts": True,
            "hosts": ("127.0.0.1",),
        } | options
        with (
            ModelServer(registry=registry) as server,
            flserving.serve(server, **options) as endpoint,
        ):
            yield registry, endpoint


def _cut(*sockets):
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Between:
    """A relay in front of a cloud that cuts a connection after so many bytes of answers: ``cuts``,
    one per connection, first come first cut; None, and what comes after the last one, is passed
    whole."""

    def __init__(self, url, cuts=()):
        host, port = url.removeprefix("http://").split(":")
        self._cloud, self.cuts = (host, int(port)), list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests, self._open = [], []  # what was asked; sockets
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            limit = self.cuts.pop(0) if self.cuts else None
            self._threads.append(threading.Thread(target=self._relay, args=(near, limit)))
            self._threads[-1].start()

    def _relay(self, near, limit):
        with near, socket.create_connection(self._cloud, timeout=PATIENCE_S) as far:
            self._open += [near, far]
            upward = threading.Thread(target=self._upward, args=(near, far))
            upward.start()
            passed = 0
            with contextlib.suppress(OSError):
                while data := far.recv(4096):
                    data = data if limit is None else data[: limit - passed]
                    near.sendall(data)
                    passed += len(data)
                    if limit is not None and passed >= limit:
                        break
            _cut(near, far)
            upward.join()

    def _upward(self, near, far):
        with contextlib.suppress(OSError):
            while data := near.recv(4096):
                self.requests.append(data)
                far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def close(self):
        _cut(self._listener)  # wakes the accept
        self._listener.close()
        self._threads[0].join(PATIENCE_S)
        _cut(*self._open)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
