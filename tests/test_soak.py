"""Long runs, by hand: chaos over two workers (marker soak), a hundred thousand requests during hot
swaps (slow).

``FLSERVING_SOAK_S=600 python run.py test tests/test_soak.py -m soak`` takes ten minutes instead of
one.
"""

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections import Counter

import grpc
import httpx
import numpy as np
import pytest
import torch
from scipy.stats import beta

import flserving
from flserving import Registry, ServingConfig, models
from flserving.api.client import AsyncClient
from flserving.errors import (
    DeadlineExceededError,
    FlservingError,
    OverloadedError,
    ServerClosedError,
)
from flserving.serving.server import ModelServer
from serving_models import Constant, row
from serving_processes import X, running

SOAK_S = float(os.environ.get("FLSERVING_SOAK_S", "60"))
VALID = {("1", (1,)), ("2", (2,))}
HOSTILE = [  # route, body
    ("/v2/models/digits/infer", b"{"),
    ("/v2/models/digits/infer", b'{"inputs": []}'),
    ("/v2/models/digits/infer", b'{"inputs": [{"name": "features", "shape": [1], "datatype": "FP32", "data": [1]}]}'),
    ("/v2/models/digits/infer", b'{"inputs": [{"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]}'),
    ("/v2/models/nobody/infer", b"{}"),
    ("/v2/models/digits/versions/99/infer", b"{}"),
    ("/v2/" + "x" * 5000, b""),
]  # fmt: skip


class Tally:
    """What the callers of one kind saw."""

    def __init__(self):
        self.seconds, self.refused, self.failed = [], 0, []

    def ask(self, client, stop):
        with client:
            while not stop.is_set():
                begun_s = time.perf_counter()
                try:
                    answer = client.predict(X)
                except OverloadedError:
                    self.refused += 1
                except Exception as error:
                    self.failed.append(error)
                else:
                    check(answer)
                    self.seconds.append(time.perf_counter() - begun_s)


def check(answer):
    """Anything but the one constant or the other is a wrong answer, which ends the run."""
    found = answer["model_version"], tuple(answer["predictions"])
    assert {(found[0], (value,)) for value in found[1]} <= VALID, found


def constants(root):
    """A registry with versions 1 and 2 of "digits": whatever they are asked, they answer 1 and
    2."""
    with Registry(root) as registry:
        for label in (1, 2):
            state = {
                name: torch.zeros_like(value)
                for name, value in models.build("digits_mlp").state_dict().items()
            }
            state["head.bias"][label] = 1.0
            registry.publish(
                "digits", state, architecture="digits_mlp", alias="default" if label == 1 else None
            )
    return root


class Storms:
    """Threads that run until stopped; the first error of any of them is raised at the end."""

    def __init__(self):
        self.stop, self.errors, self._threads = threading.Event(), [], []

    def run(self, call, *args):
        def guarded():
            try:
                call(*args)
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()

        self._threads.append(threading.Thread(target=guarded))
        self._threads[-1].start()

    def every(self, seconds, call):
        def again():
            while not self.stop.wait(seconds):
                call()

        self.run(again)

    def end(self):
        self.stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 120)
def test_chaos_costs_no_answer(tmp_path, capsys):
    root = constants(tmp_path / "registry")
    options = (
        "--model",
        "digits",
        "--workers",
        2,
        "--max-queue-rows",
        64,
        "--max-request-rows",
        64,
    )
    with running(root, *options) as served, Registry(root) as registry:
        witness = served.workers()[0]  # never killed: its memory is looked at
        versions, kills, hostile, rss = itertools.cycle((2, 1)), [], [], []
        steady = {scheme: Tally() for scheme in ("REST", "gRPC")}
        burst, storms = Tally(), Storms()

        def promote():
            registry.set_alias("digits", "default", next(versions), who="chaos", why="promotion")

        def kill():
            for worker in served.workers():
                if worker != witness:
                    worker.kill()
                    kills.append(worker.pid)

        def malform():
            hostile.extend(_malformed(served))

        try:
            for place, tally in enumerate([*steady.values()] * 2):
                storms.run(tally.ask, served.client(place, timeout_ms=10_000), storms.stop)
            storms.every(0.5, promote)
            storms.every(5.0, kill)
            storms.every(0.1, malform)
            storms.every(3.0, lambda: asyncio.run(_burst(served, burst)))
            storms.every(1.0, lambda: rss.append(witness.memory_info().rss / 1e6))
            storms.stop.wait(SOAK_S)
        finally:
            storms.end()
        assert served.end() == 0 and served.stderr.count("ended by signal 9") == len(kills)
    early, late = np.median(rss[len(rss) // 4 : len(rss) // 2]), np.median(rss[-len(rss) // 4 :])
    with capsys.disabled():
        print(
            f"\n{SOAK_S:.0f} s, {len(kills)} workers killed, {len(hostile)} malformed requests refused"
        )
        for name, tally in (*steady.items(), ("bursts", burst)):
            asked, failed = len(tally.seconds) + len(tally.failed), len(tally.failed)
            bound = beta.ppf(0.95, failed + 1, asked - failed)
            print(
                f"{name}: N {asked}, failed {failed} (with 95 % confidence at most {bound:.3%}), refused "
                f"{tally.refused}, p99 {np.quantile(tally.seconds, 0.99) * 1e3:.1f} ms"
            )
        print("failures in bursts:", Counter(type(error).__name__ for error in burst.failed))
        print(f"RSS of a worker: {early:.0f} MB early, {late:.0f} MB late")
    asked, failed = (
        sum(len(getattr(tally, what)) for tally in steady.values())
        for what in ("seconds", "failed")
    )
    assert failed <= 0.001 * (asked + failed), [tally.failed[:3] for tally in steady.values()]
    assert set(map(type, burst.failed)) <= {ServerClosedError, DeadlineExceededError}, burst.failed
    assert late - early < 20


async def _burst(served, tally):
    """Far more at once than the queue holds; each client tries again as it would alone."""

    async def ask(client):
        begun_s = time.perf_counter()
        try:
            answer = await client.predict(np.repeat(X, 64, axis=0))
        except OverloadedError:
            tally.refused += 1
        except FlservingError as error:
            tally.failed.append(error)
        else:
            check(answer)
            tally.seconds.append(time.perf_counter() - begun_s)

    for url in (served.url, f"grpc://{served.grpc_url}"):
        async with AsyncClient(url, served.token) as client:
            await asyncio.gather(*(ask(client) for _ in range(90)))


def _malformed(served):
    """Everything that is wrong, once: each is refused, unless its worker is killed meanwhile. What
    they got."""
    headers = {"authorization": f"Bearer {served.token}"}
    for route, body in HOSTILE:
        with contextlib.suppress(httpx.TransportError):
            status = httpx.post(served.url + route, content=body, headers=headers).status_code
            assert 400 <= status < 500, (status, route, body)
            yield status
    with grpc.insecure_channel(served.grpc_url) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff", metadata=tuple(headers.items()), timeout=5)
    assert caught.value.code().name in {"INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED"}
    yield caught.value.code()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_two_hundred_hot_swaps_fail_and_mix_none_of_a_hundred_thousand_requests(
    scheme, capsys
):
    requests, swaps, callers = 100_000, 200, 16
    with ModelServer(ServingConfig(warmup_samples=2)) as server:
        server.load_model("0", Constant(0), output_type="regression", num_features=2)
        with flserving.serve(server) as endpoint:
            url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"

            async def ask(count):
                seconds = []

                async def caller():
                    while len(seconds) < count:
                        begun_s = time.perf_counter()
                        answer = await client.predict(row(0), model="local")
                        seconds.append(time.perf_counter() - begun_s)
                        assert answer["predictions"] == [float(answer["model_version"])]

                await asyncio.gather(*(caller() for _ in range(callers)))
                return np.quantile(seconds, 0.99) * 1e3

            def swap(number):
                server.load_model(
                    str(number), Constant(number), output_type="regression", num_features=2
                )
                server.set_default(str(number))

            async def swap_all(asked):
                for number in range(1, swaps + 1):
                    await asyncio.to_thread(swap, number)
                    await asyncio.sleep(pause_s)

            async with AsyncClient(url, endpoint.token) as client:
                begun_s = time.perf_counter()
                quiet = await ask(requests // 5)
                pause_s = (time.perf_counter() - begun_s) * 5 / swaps * 0.8
                asking = asyncio.create_task(ask(requests))
                await swap_all(asking)
                assert not asking.done(), "the swaps took longer than the requests"
                swapped = await asking
    with capsys.disabled():
        print(f"\n{scheme}: p99 {quiet:.1f} ms without and {swapped:.1f} ms with {swaps} swaps")
    assert swapped <= 2 * quiet
