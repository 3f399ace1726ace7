"""A program that forks while its server is busy, and while other threads hold every lock: each
child must answer."""

import asyncio
import os
import signal
import sys
import threading
import time

import numpy as np
import torch
from torch import nn

from flserving import ModelServer, Registry, ServingConfig, models
from flserving.errors import ServerClosedError

X = np.ones(4, np.float32)
SIZES = {"sizes": [4, 8, 3]}


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        time.sleep(0.02)
        return self.layer(x)


def child(server, registry):
    signal.alarm(60)  # a hang ends it, and fails the test
    for model, version in (("local", "slow"), ("m", None)):
        began_s = time.monotonic()
        assert len(server.predict(X, version, model=model, timeout_ms=30_000)["predictions"]) == 1
        answer = asyncio.run(server.apredict(X, version, model=model, timeout_ms=30_000))
        assert len(answer["predictions"]) == 1 and time.monotonic() - began_s < 25
    server.load_model("childs", nn.Linear(4, 3))
    assert server.predict(X, "childs", model="local")["model_version"] == "childs"
    try:
        server.predict(X, 1, model="m")  # not in memory: its registry is its parent's
    except ServerClosedError as error:
        assert "fork" in str(error)
    else:
        raise AssertionError("read a registry that was opened before the fork")
    assert "fork" in server.health_check()["problems"]["registries"]
    server.get_all_stats(), server.telemetry.totals()
    server.close()


def fork(server, registry):
    pid = os.fork()
    if pid == 0:
        try:
            child(server, registry)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(0)  # with all its finalizers
    return os.waitpid(pid, 0)[1]


def main():
    stop = threading.Event()
    with Registry(sys.argv[1]) as registry:
        for alias in (None, "default"):
            registry.publish(
                "m", models.build("mlp", SIZES), architecture="mlp", parameters=SIZES, alias=alias
            )
        config = ServingConfig(
            num_workers=2, prediction_cache_bytes=1 << 20, cache_size=3, timeout_ms=30_000
        )
        with ModelServer(config, registry) as server:
            torch.manual_seed(0)
            server.load_model("slow", Slow(), num_features=4)
            engine = server.model_cache.get(("local", "slow"))

            def ask(seed):
                rng = np.random.default_rng(seed)
                while not stop.is_set():
                    server.predict(rng.random(4, np.float32), "slow", model="local")

            callers = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
            for caller in callers:
                caller.start()
            codes = [fork(server, registry) for _ in range(3)]
            stop.set()
            for caller in callers:
                caller.join()
            holders = [
                server._batcher, server.model_cache, server.prediction_cache, server.telemetry, server._store,
                server.experiments, server.experiments.shadow, engine._executions,
            ]  # fmt: skip
            locks = [
                holder._adding if holder is server._store else holder._lock for holder in holders
            ]
            locks += [registry._read_lock, registry._write_lock, server._router._admin]
            held, done = threading.Event(), threading.Event()

            def hold():
                for lock in locks:
                    lock.acquire()
                held.set()
                done.wait()
                for lock in locks:
                    lock.release()

            holder = threading.Thread(target=hold)
            holder.start()
            held.wait()
            codes.append(fork(server, registry))
            done.set()
            holder.join()
            assert len(server.predict(X, "slow", model="local")["predictions"]) == 1, (
                "the parent goes on"
            )
            assert server.predict(X, 1, model="m")
    return max(codes)


sys.exit(main() != 0)
