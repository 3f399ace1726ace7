"""Which HTTP server stands before our application: today's (uvicorn's protocol with our limits),
uvicorn, granian.

    python tests/benchmarks/http_servers.py                    # today's and uvicorn: 8 minutes
    python tests/benchmarks/http_servers.py --granian PYTHON   # one that has granian: 11 minutes
    python tests/benchmarks/http_servers.py --quick            # seconds; too short to quote

All three run the same application, and each gets the limits that it offers (3 s for slow clients).
For speed all are driven in turns, medians over the turns; CPU is that of the whole process tree.
Needs Debian's wrk.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "servers"))
from http_server import SLOW_CLIENT_S, TOKEN
from load import Target, family_of, measure, missing_tools, pinned
from network import (
    JSON_HEADERS,
    SERVERS,
    SIZES,
    System,
    await_answer,
    bodies,
    compare,
    free_port,
    publish,
)

NAMES = {"ours": "today's", "uvicorn": "plain uvicorn", "granian": "granian"}
PATIENCE_S = 4 * SLOW_CLIENT_S
"""So long each bad client goes on."""
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n"
INFER = (
    b"POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
    + TOKEN.encode()
    + b"\r\n"
)
SMALL_ROW = np.zeros((1, SIZES["small"][0]), np.float32)
WHOLE = INFER + b"Content-Length: %d\r\n\r\n" % len(bodies(SMALL_ROW)[0]) + bodies(SMALL_ROW)[0]


@contextlib.contextmanager
def started(
    kind: str, python: str, registry: Path, row: np.ndarray, workers: int = 1
) -> Iterator[System]:
    port = free_port()
    headers = JSON_HEADERS | {"authorization": f"Bearer {TOKEN}"}
    target = Target(f"http://127.0.0.1:{port}/v2/models/m/infer", bodies(row)[0], headers)
    command = [
        python,
        str(SERVERS / "http_server.py"),
        kind,
        str(port),
        str(registry),
        str(workers),
    ]
    # uvicorn logs a lot
    with pinned(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        system = System(NAMES[kind], process, target, None)
        await_answer(system)
        yield system


def port_of(system: System) -> int:
    return int(system.target.url.split(":")[2].split("/")[0])


# Clients that are not well-behaved. Each function says in a few words what became of them.


def connect(system: System, **options: int) -> socket.socket:
    client = socket.socket()
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    client.settimeout(PATIENCE_S)
    client.connect(("127.0.0.1", port_of(system)))
    return client


def held(system: System) -> int:
    """Connections that the server still has."""
    return sum(
        connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port_of(system)
        for member in family_of(system.process)
        for connection in member.net_connections("tcp")
    )


def read_answer(client: socket.socket) -> bytes:
    """One whole answer, or what came of it."""
    received = b""
    with contextlib.suppress(OSError):
        while more := client.recv(65536):
            received += more
            head, end, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if end and length and len(body) >= int(length[1]):
                break
    return received


def answer_to(system: System, request: bytes, end: bool = False) -> str:
    """The status of the first answer, and whether it has our form: JSON, with ``error`` where
    something is wrong."""
    with connect(system) as client:
        with contextlib.suppress(ConnectionError):  # it may be refused before it is whole
            client.sendall(request)
            if end:
                client.shutdown(socket.SHUT_WR)
        received = read_answer(client)
    if not received:
        return "no answer"
    return received[9:12].decode() + ("" if b'{"' in received else ", no JSON")


def drip(system: System, start: bytes, clients: int = 200) -> str:
    """One byte a second on many connections; what others get meanwhile."""
    sockets = [connect(system) for _ in range(clients)]
    for client in sockets:
        client.sendall(start)
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(1):
            for client in sockets:
                with contextlib.suppress(OSError):
                    client.send(b"x")

    sender = threading.Thread(target=send)
    sender.start()
    load = measure(system.process, system.target, 16, PATIENCE_S)
    still = held(system)
    stop.set()
    sender.join()
    for client in sockets:
        client.close()
    return f"{still} of {clients} stay, others' p99 {load.p99_ms:.0f} ms"


def slow_heads(system: System) -> str:
    return drip(system, LIVE + b"X: ")


def slow_bodies(system: System) -> str:
    return drip(system, INFER + b"Content-Length: 1000\r\n\r\n")


def unread_answers(system: System, clients: int = 64) -> str:
    """They ask 100 times for a page and read nothing."""
    sockets = [connect(system, SO_RCVBUF=4096) for _ in range(clients)]
    for client in sockets:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.send((b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") * 100)
    time.sleep(PATIENCE_S)
    still = held(system)
    for client in sockets:
        client.close()
    return f"{still} of {clients} stay"


def endless_head(system: System, most: int = 64 << 20) -> str:
    """How much of a head that never ends the server takes."""
    sent = 0
    with connect(system) as client, contextlib.suppress(OSError):
        client.sendall(LIVE)
        line = b"X-%d: " + b"x" * 1000 + b"\r\n"
        while sent < most:
            sent += client.send(line % sent)
    return f"{'all of ' if sent >= most else 'cut at '}{sent / 2**20:.1f} MiB"


def large_head(system: System) -> str:
    return answer_to(
        system, LIVE + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(128)) + b"\r\n"
    )


def many_chunks(system: System) -> str:
    return answer_to(
        system,
        INFER + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n",
    )


def large_body(system: System) -> str:
    return answer_to(system, INFER + b"Content-Length: 100000000\r\n\r\n")


def coded_body(system: System) -> str:
    return answer_to(
        system, INFER + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    )


def no_http(system: System) -> str:
    return answer_to(system, b"garbage\r\n\r\n")


def upgrade(system: System) -> str:
    """Java's client and ``curl --http2`` offer HTTP/2 along with a body."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    return answer_to(system, INFER + offer + WHOLE[len(INFER) :])


def half_closed(system: System) -> str:
    """Whether its request was answered before or after its side was seen to be shut is a matter of
    chance: 50 tries."""
    return f"{sum(answer_to(system, WHOLE, end=True) == '200' for _ in range(50))} of 50 answered"


BAD_CLIENTS: dict[str, Callable[[System], str]] = {
    "200 connections, a byte of a head a second": slow_heads,
    "200 connections, a byte of a body a second": slow_bodies,
    "64 clients that never read": unread_answers,
    "a head that never ends": endless_head,
    "a head of 128 KiB": large_head,
    "a body in 200,000 chunks": many_chunks,
    "a body of 100 MB": large_body,
    "Transfer-Encoding: gzip, chunked": coded_body,
    "what is no HTTP": no_http,
    "an offer of HTTP/2 with a body": upgrade,
    "clients that have shut their side down": half_closed,
}

# Stops, kills, threads


class Askers:
    """Threads that ask again and again; half of them connect anew each time. A request that was
    sent and not answered is lost; a connection that is refused is not."""

    def __init__(self, system: System, threads: int = 16) -> None:
        self.counts: Counter[str] = Counter()
        self.last_lost_s = 0.0
        self._stop = threading.Event()
        self._system = system
        self._threads = [
            threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, keep: bool) -> None:
        client = None
        while not self._stop.is_set():
            try:
                client = client or connect(self._system)
            except OSError:
                self.counts["refused"] += 1
                self._stop.wait(0.01)
                continue
            with contextlib.suppress(OSError):
                client.sendall(WHOLE)
            received = read_answer(client)
            good = received.startswith(b"HTTP/1.1 200 ") and received.endswith(b"}")
            self.counts["answered" if good else "lost"] += 1
            if not good:
                self.last_lost_s = time.monotonic()
            if not (keep and good) or b"connection: close" in received.lower():
                client.close()
                client = None

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def __str__(self) -> str:
        return f"{self.counts['lost']} of {self.counts['lost'] + self.counts['answered']} lost"


def at_sigterm(system: System) -> str:
    askers = Askers(system)
    time.sleep(2)
    system.process.send_signal(signal.SIGTERM)
    asked_s = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        system.process.wait(15)
    took_s = time.monotonic() - asked_s
    askers.stop()
    return f"{askers}, exit code {system.process.poll()} after {took_s:.1f} s"


def at_kill(system: System) -> str:
    """kill -9 for the busier of two workers."""
    askers = Askers(system)
    time.sleep(2)
    before = family_of(system.process)
    victim = max(before[1:], key=lambda member: sum(member.cpu_times()[:2]))
    victim.kill()
    killed_s = time.monotonic()
    time.sleep(10)
    new = set(family_of(system.process)) - set(before) if system.process.poll() is None else set()
    askers.stop()
    late_s = max(0.0, askers.last_lost_s - killed_s)
    return f"{askers}, the last after {late_s:.1f} s; {'replaced' if new else 'not replaced'}"


def in_thread(kind: str, python: str, registry: Path) -> str:
    command = [
        python,
        str(SERVERS / "http_server.py"),
        kind,
        str(free_port()),
        str(registry),
        "thread",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    if result.returncode:
        return f"fails: {result.stderr.strip().splitlines()[-1]}"
    started_s, stopped_s = result.stdout.split()
    return f"answers after {started_s} s, stopped in {stopped_s} s"


# The table


def row(what: str, cells: list[str]) -> None:
    print("| " + " | ".join([what, *cells]) + " |", flush=True)


def speed(kinds: dict[str, str], folder: Path, turns: int, seconds: float) -> None:
    for size, sizes in SIZES.items():
        features = np.round(np.random.default_rng(0).standard_normal((1, sizes[0])), 4).astype(
            np.float32
        )
        with contextlib.ExitStack() as stack:
            found = [
                stack.enter_context(started(kind, kinds[kind], folder / size, features))
                for kind in kinds
            ]
            for connections in (64, 16, 1):
                loads = compare(found, turns, seconds, connections)
                cells = []
                for system in found:
                    mine = loads[system.name]
                    rate, cpu, p99 = (
                        statistics.median(getattr(load, name) for load in mine)
                        for name in ("rate_per_s", "cpu_us", "p99_ms")
                    )
                    cells.append(f"{cpu:,.0f} us, {rate:,.0f}/s, {p99:.1f} ms")
                row(f"{size}, {connections} connections: CPU a request, rate, p99", cells)


def with_growth(system: System, attempt: Callable[[System], str]) -> str:
    before = nbytes_of(system)
    said = attempt(system)
    grown = nbytes_of(system) - before
    return said + (f", +{grown >> 20} MiB" if grown > 32 << 20 else "")


def nbytes_of(system: System) -> int:
    return sum(member.memory_info().rss for member in family_of(system.process))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short turn")
    parser.add_argument(
        "--no-speed", action="store_true", help="only what becomes of bad clients, stops and kills"
    )
    parser.add_argument(
        "--granian", metavar="PYTHON", help="an interpreter that has granian besides"
    )
    arguments = parser.parse_args()
    if "wrk" in missing_tools():
        parser.exit(1, "wrk: not found; on Debian: apt-get install wrk\n")
    kinds = {"ours": sys.executable, "uvicorn": sys.executable}
    if arguments.granian:
        kinds["granian"] = arguments.granian
    else:
        print("granian is left out: name an interpreter that has it with --granian\n")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row("", [NAMES[kind] for kind in kinds])
        row("---", ["---"] * len(kinds))
        for size, sizes in SIZES.items():
            publish(folder / size, sizes)
        turns, seconds = (1, 1) if arguments.quick else (5, 3)
        if not arguments.no_speed:
            speed(kinds, folder, turns, seconds)
        with contextlib.ExitStack() as stack:
            found = [
                stack.enter_context(started(*kind, folder / "small", SMALL_ROW))
                for kind in kinds.items()
            ]
            for what, attempt in BAD_CLIENTS.items():
                row(what, [with_growth(system, attempt) for system in found])
        for what, attempt, workers in (
            ("SIGTERM under load", at_sigterm, 1),
            ("kill -9 of a worker", at_kill, 2),
        ):
            cells = []
            for kind, python in kinds.items():
                with started(kind, python, folder / "small", SMALL_ROW, workers) as system:
                    cells.append(attempt(system))
            row(what, cells)
        row(
            "in a thread, as in a notebook",
            [in_thread(kind, kinds[kind], folder / "small") for kind in kinds],
        )


if __name__ == "__main__":
    main()
