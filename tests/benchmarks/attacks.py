"""What a well-behaved caller notices beside attackers without a credential, and how much memory
they take.

    python tests/benchmarks/attacks.py            # 2 minutes
    python tests/benchmarks/attacks.py --quick    # seconds; too short to quote

The server has one core and 64 places; attackers come again when they are cut off. The caller opens
a connection for each call over REST, and has one over gRPC. A call is answered, or refused with 429
or RESOURCE_EXHAUSTED, or its connection is closed, which counts as a refusal.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from load import LOAD_CORE, pinned

from grpc_attacks import connected, frame, indexed, opening, push
from grpc_door import INFER, request
from serving_processes import two_versions

TOKEN = "benchmark"
PLACES = 64
SLOW_CLIENT_S = 2.0
PAUSE_S = 0.01
HEALTH = "/grpc.health.v1.Health/"
Connection = tuple[str, int]


# Attacks: each goes on until its connections are cut, and is then begun again


def nothing(_: str) -> None:
    time.sleep(1)


def silent(target: str) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(split(target))) for _ in range(200)]
        wait_for_end(clients)


def never_reads(target: str) -> None:
    page = f"GET /docs HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(PLACES):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(split(target))
            client.sendall(page * 100)
        time.sleep(SLOW_CLIENT_S)


def slow_heads(target: str) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(split(target))) for _ in range(PLACES)
        ]
        for byte in b"GET /docs HTTP/1.1\r\nX: ":
            for client in clients:
                client.send(bytes([byte]))
            time.sleep(0.2)


def no_message(target: str) -> None:
    with connected(target) as first, connected(target) as second:
        for stream in range(1, 2000, 2):
            for client in (first, second):
                client.sendall(opening(HEALTH + "Check", stream))
        wait_for_end([first, second])


def unfinished(target: str) -> None:
    with contextlib.ExitStack() as stack:
        threads = []
        for _ in range(60):
            client = stack.enter_context(connected(target))
            client.settimeout(SLOW_CLIENT_S)
            threads.append(
                threading.Thread(target=push, args=(client, HEALTH + "Check", (16 << 20) - 5))
            )
            threads[-1].start()
        for thread in threads:
            thread.join()


def own_headers(target: str) -> None:
    with connected(target) as client:
        for stream in range(1, 1 << 20, 2):
            client.sendall(indexed(stream, opens=stream == 1))


def continuation(target: str) -> None:
    more = frame(9, 0, 1, b"\x82" * 0x4000)
    with connected(target) as client:
        client.sendall(frame(1, 1, 1, b"\x82"))
        while True:
            client.sendall(more)


def watchers(target: str) -> None:
    with connected(target) as client:
        for stream in range(1, 130, 2):
            client.sendall(opening(HEALTH + "Watch", stream) + frame(0, 1, stream, bytes(5)))
        wait_for_end([client])


REST: dict[str, Callable[[str], None]] = {
    "none": nothing,
    "200 silent connections": silent,
    "64 clients that never read": never_reads,
    "64 heads, a byte every 0.2 s": slow_heads,
}
GRPC: dict[str, Callable[[str], None]] = {
    "none": nothing,
    "1,000 calls without a message on 2 connections": no_message,
    "60 messages of 16 MB, never whole": unfinished,
    "calls with 400 headers of their own, 1 connection": own_headers,
    "a header block that never ends": continuation,
    "65 watchers": watchers,
}


def split(target: str) -> Connection:
    host, _, port = target.rpartition(":")
    return host, int(port)


def wait_for_end(clients: list[socket.socket]) -> None:
    """Until the server has closed them all."""
    for client in clients:
        client.settimeout(3 * SLOW_CLIENT_S)
        while client.recv(65_536):
            pass


def attack_again(attack: Callable[[str], None], target: str) -> None:
    os.nice(10)  # the caller shares a core with it
    while True:
        with contextlib.suppress(OSError):
            attack(target)
        time.sleep(PAUSE_S)


# The caller


@dataclass
class Seen:
    """Seconds of each call, and the growth of the server at its most."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    nbytes: int = 0

    def markdown(self, name: str) -> str:
        times = [
            f"{np.percentile(part, 99) * 1e3:,.0f}" if part else "-"
            for part in (self.answered, self.refused)
        ]
        calls = f"{len(self.answered):,} | {times[0]} | {len(self.refused):,} | {times[1]}"
        return f"| {name} | {calls} | {self.nbytes / 2**20:,.0f} |"


def call_rest(url: str) -> bool:
    body = {
        "inputs": [{"name": "features", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]
    }
    try:
        path = f"{url}/v2/models/digits/infer"
        response = httpx.post(
            path,
            json=body,
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=30,
            trust_env=False,
        )
    except httpx.TransportError:
        return False
    assert response.status_code in (200, 429), response.text
    return response.status_code == 200


def call_grpc(channel: grpc.Channel) -> bool:
    message = request(np.zeros((1, 64), np.float32), model="digits")
    try:
        call = channel.unary_unary(INFER)
        call(
            message.SerializeToString(),
            metadata=(("authorization", f"Bearer {TOKEN}"),),
            timeout=30,
        )
    except grpc.RpcError as error:
        assert error.code().name in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"), error
        return False
    return True


def beside(
    attack: Callable[[str], None],
    target: str,
    call: Callable[[], bool],
    server: psutil.Process,
    seconds: float,
) -> Seen:
    """Call again and again while the attack goes on."""
    process = multiprocessing.get_context("fork").Process(
        target=attack_again, args=(attack, target), daemon=True
    )
    seen = Seen()
    before = server.memory_info().rss
    process.start()
    try:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            started_s = time.perf_counter()
            times = seen.answered if call() else seen.refused
            times.append(time.perf_counter() - started_s)
            seen.nbytes = max(seen.nbytes, server.memory_info().rss - before)
            time.sleep(PAUSE_S)
    finally:
        process.kill()
        process.join()
    return seen


@contextlib.contextmanager
def serving(max_connections: int = PLACES) -> Iterator[tuple[psutil.Process, str, str]]:
    """The process of the worker, and its two addresses."""
    limits = ["--max-connections", str(max_connections), "--slow-client-s", str(SLOW_CLIENT_S)]
    with tempfile.TemporaryDirectory() as folder:
        root = two_versions(Path(folder, "registry"))
        command = [
            sys.executable,
            "-m",
            "flserving",
            "serve",
            "--registry",
            str(root),
            "--port",
            "0",
        ]
        environment = os.environ | {"FLSERVING_TOKEN": TOKEN}
        options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        with pinned([*command, "--grpc-port", "0", *limits], **options) as process:
            assert process.stdout is not None
            url, target = (process.stdout.readline().split()[1] for _ in range(2))
            yield psutil.Process(process.pid).children(recursive=True)[0], url, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; too short to quote"
    )
    seconds = 1 if parser.parse_args().quick else 10
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    print(
        "| attack | answered | p99 ms | refused | p99 ms | most memory, MB |\n" + "| --- " * 6 + "|"
    )
    for kind, attacks in (("REST", REST), ("gRPC", GRPC)):
        for name, attack in attacks.items():
            with serving() as (server, url, target):
                os.sched_setaffinity(0, {LOAD_CORE})
                with grpc.insecure_channel(target) as channel:
                    call = (
                        (lambda url=url: call_rest(url))
                        if kind == "REST"
                        else (lambda c=channel: call_grpc(c))
                    )
                    assert call()
                    where = url.removeprefix("http://") if kind == "REST" else target
                    print(
                        beside(attack, where, call, server, seconds).markdown(f"{kind}: {name}"),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
