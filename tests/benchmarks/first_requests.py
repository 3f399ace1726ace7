"""First requests of 64 connections opened at once, beside those of connections that are open
already.

    python tests/benchmarks/first_requests.py            # half a minute
    python tests/benchmarks/first_requests.py --quick    # seconds; too short to quote

The server has one core, the callers the other. A first request is timed from the connect to the
whole answer; in a steady round the same 64 requests are sent at once over connections that have
answered before.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from attacks import TOKEN, serving
from load import LOAD_CORE

CONNECTIONS = 64
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def infer(host: str, port: int) -> bytes:
    tensor = {"name": "features", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    body = json.dumps({"inputs": [tensor]}).encode()
    lines = [
        "POST /v2/models/digits/infer HTTP/1.1",
        f"Host: {host}:{port}",
        f"Authorization: Bearer {TOKEN}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(stream: Stream, request: bytes) -> None:
    reader, writer = stream
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    await reader.readexactly(
        int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    )


async def timed_first(host: str, port: int, request: bytes) -> tuple[float, Stream]:
    started_s = time.perf_counter()
    stream = await asyncio.open_connection(host, port)
    await ask(stream, request)
    return time.perf_counter() - started_s, stream


async def timed_next(stream: Stream, request: bytes) -> float:
    started_s = time.perf_counter()
    await ask(stream, request)
    return time.perf_counter() - started_s


async def rounds(host: str, port: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds of first requests and of steady ones."""
    request = infer(host, port)
    first: list[float] = []
    steady: list[float] = []
    for number in range(count + 1):
        opened = await asyncio.gather(
            *(timed_first(host, port, request) for _ in range(CONNECTIONS))
        )
        streams = [stream for _, stream in opened]
        again = await asyncio.gather(*(timed_next(stream, request) for stream in streams))
        for _, writer in streams:
            writer.close()
        if number:  # the first round warms up
            first += [seconds for seconds, _ in opened]
            steady += again
        await asyncio.sleep(0.02)
    return first, steady


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds; too short to quote")
    count = 20 if parser.parse_args().quick else 300
    with serving(max_connections=1024) as (_, url, _):
        os.sched_setaffinity(0, {LOAD_CORE})
        host, _, port = url.removeprefix("http://").rpartition(":")
        parts = asyncio.run(rounds(host, int(port), count))
    p99 = [float(np.percentile(part, 99)) * 1e3 for part in parts]
    p50 = [float(np.percentile(part, 50)) * 1e3 for part in parts]
    print("| 64 at once over REST | p50 ms | p99 ms |\n| --- | --- | --- |")
    for name, middle, high in zip(
        ("first request, connect included", "steady"), p50, p99, strict=True
    ):
        print(f"| {name} | {middle:.1f} | {high:.1f} |")
    print(f"\nratio of the p99: **{p99[0] / p99[1]:.2f}** (target: below 2)")


if __name__ == "__main__":
    main()
