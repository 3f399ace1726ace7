"""The gRPC door in time: deadlines, cancellation, the end of a server, a limit on calls, a hot swap
under load."""

import asyncio
import contextlib
import threading

import grpc
import numpy as np
import pytest

from flserving.api.grpc import codec
from grpc_door import INFER, Caller, arrays, health, metadata, open_door, request, status
from serving_models import PATIENCE_S, Constant, Gated, Probe, Threads, serving, wait_until


@contextlib.contextmanager
def held(probe):
    """A server of one worker that is busy until the probe releases it: calls wait in the queue."""
    with (
        serving(Gated(probe), num_workers=1) as server,
        open_door(server) as (_, target, door, run),
    ):
        probe.shut()
        threads = Threads()
        threads.start(server.predict, np.zeros((1, 2), np.float32))
        probe.wait_inside(1)
        with Caller(target) as caller:
            yield server, caller, lambda: run(door.stop(PATIENCE_S))
            probe.release()
        threads.results()


def waiting(server, rows):
    wait_until(
        lambda: server.get_all_stats()["queue"]["waiting_rows"] == rows, f"{rows} rows in the queue"
    )


def failed(server):
    return server.get_all_stats()["server"]["failed_by_reason"]


ONE = np.full((1, 2), 7, np.float32)


@pytest.mark.parametrize(
    ("timeout_us", "deadline_s"), [(20_000, PATIENCE_S), (int(PATIENCE_S * 1e6), 0.05)]
)
def test_the_smaller_of_timeout_and_deadline_wins(timeout_us, deadline_s):
    probe = Probe()
    with held(probe) as (server, caller, _):
        late = request(ONE, parameters={"timeout": {"int64_param": timeout_us}})
        assert caller.refused(INFER, late, timeout=deadline_s)[0] == "DEADLINE_EXCEEDED"
        waiting(server, 0)
        wait_until(lambda: sum(failed(server).values()) == 1)
        probe.release()
        assert caller.infer(ONE)["predictions"].tolist() == [[7.0, 7.0]]


def test_a_cancelled_call_is_cancelled_in_the_server():
    probe = Probe()
    with held(probe) as (server, caller, _):
        body = request(ONE).SerializeToString()
        call = caller.channel.unary_unary(INFER).future(body, metadata=metadata("infer"))
        waiting(server, 1)
        call.cancel()
        waiting(server, 0)
        wait_until(lambda: failed(server).get("Cancelled") == 1, "the cancellation")
        assert probe.calls == 1  # the model never saw it


def test_stop_lets_admitted_calls_finish_and_ends_watches_at_once():
    probe = Probe()
    with held(probe) as (server, caller, stop):
        body = request(ONE).SerializeToString()
        call = caller.channel.unary_unary(INFER).future(body, metadata=metadata("infer"))
        watch = health(caller.channel, method="Watch")
        assert status(next(watch)) == "SERVING"
        waiting(server, 1)
        threads = Threads()
        threads.start(stop)
        assert list(watch) == []
        probe.release()
        assert arrays(call.result(PATIENCE_S))["predictions"].tolist() == [[7.0, 7.0]]
        threads.results()


def test_calls_beyond_the_limit_are_turned_away_and_health_is_not():
    probe = Probe()
    with serving(Gated(probe), num_workers=1) as server:
        probe.shut()
        threads = Threads()
        threads.start(server.predict, np.zeros((1, 2), np.float32))
        probe.wait_inside(1)
        with open_door(server, max_connections=2) as (_, target, _, _), Caller(target) as caller:
            body = request(ONE).SerializeToString()
            calls = [
                caller.channel.unary_unary(INFER).future(body, metadata=metadata("infer"))
                for _ in range(2)
            ]
            waiting(server, 2)
            assert caller.refused(INFER, body)[0] == "RESOURCE_EXHAUSTED"
            assert status(health(caller.channel)) == "SERVING" and caller.ask("ServerReady").ready
            probe.release()
            assert [arrays(call.result(PATIENCE_S))["predictions"].tolist() for call in calls] == [
                [[7.0, 7.0]]
            ] * 2
            threads.results()


def test_a_hot_swap_under_load_fails_nobody_and_mixes_nothing():
    with serving(Constant(1), "v1") as server, open_door(server) as (_, target, _, _):
        server.load_model("v2", Constant(2), output_type="regression", num_features=2)
        seen, failures, stop = [], [], threading.Event()

        async def ask(channel):
            call, body = (
                channel.unary_unary(INFER),
                request(np.zeros((4, 2), np.float32)).SerializeToString(),
            )
            while not stop.is_set():
                try:
                    answer = codec.InferResponse.FromString(
                        await call(body, metadata=metadata("infer"))
                    )
                except grpc.RpcError as error:
                    failures.append(error)
                    return
                seen.append((answer.model_version, *arrays(answer)["predictions"].tolist()))

        async def load():
            async with grpc.aio.insecure_channel(target) as channel:
                await asyncio.gather(*(ask(channel) for _ in range(16)))

        thread = threading.Thread(target=lambda: asyncio.run(load()))
        thread.start()
        for turn in range(20):
            count, version = len(seen), ("v2", "v1")[turn % 2]
            server.set_default(version)
            wait_until(
                lambda n=count, v=version: failures or any(a[0] == v for a in seen[n:]),
                f"{version} in answers",
            )
        stop.set()
        thread.join(PATIENCE_S)
        assert not failures
        assert set(seen) == {("v1", *[1.0] * 4), ("v2", *[2.0] * 4)}


def test_two_doors_share_a_port_and_one_may_leave():
    with (
        serving(Constant(1)) as server,
        open_door(server, reuse_port=True) as (_, target, door, run),
    ):
        port = int(target.rpartition(":")[2])
        with open_door(server, reuse_port=True, grpc_port=port) as (_, other, _, _):
            assert other == target
            run(door.stop(0.0))
            for _ in range(8):  # each time another connection, and so perhaps another door
                with Caller(target) as caller:
                    assert caller.infer(ONE)["predictions"].tolist() == [1.0]
