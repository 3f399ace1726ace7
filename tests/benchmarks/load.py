"""Load from outside: wrk for REST and h2load for gRPC, pinned to the core that no server runs
on."""

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SERVER_CORE, LOAD_CORE = 0, (os.cpu_count() or 1) - 1


@dataclass(frozen=True)
class Load:
    """One measurement: answered requests a second, the server's CPU a request, latency
    percentiles."""

    rate_per_s: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Target:
    """What is sent where. A gRPC ``body`` is framed already."""

    url: str
    body: bytes
    headers: dict[str, str]
    grpc: bool = False


def missing_tools() -> list[str]:
    return [tool for tool in ("wrk", "h2load", "taskset") if shutil.which(tool) is None]


@contextmanager
def pinned(command: list[str], **options):
    """A server process on its own core, ended with its children."""
    process = subprocess.Popen(["taskset", "-c", str(SERVER_CORE), *command], **options)
    try:
        yield process
    finally:
        family = family_of(process) if process.poll() is None else []
        for member in family:
            member.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for member in alive:
            member.kill()
        process.wait()


def family_of(process: subprocess.Popen) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def cpu_s(process: subprocess.Popen) -> float:
    """CPU seconds of the process and all its children so far."""
    return sum(sum(member.cpu_times()[:2]) for member in family_of(process))


def measure(process: subprocess.Popen, target: Target, connections: int, seconds: float) -> Load:
    """Drive ``target`` as fast as ``connections`` callers can. Raises RuntimeError if any answer is
    not 200."""
    before_s = cpu_s(process)
    done, rate, p50, p99 = (_h2load if target.grpc else _wrk)(target, connections, seconds)
    return Load(rate, (cpu_s(process) - before_s) / max(1, done) * 1e6, p50, p99)


_LUA = """
wrk.method = "POST"
local file = io.open("{body}", "rb"); wrk.body = file:read("*a"); file:close()
{headers}
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format("RESULT %d %.3f %.4f %.4f %d", summary.requests, summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def _wrk(target: Target, connections: int, seconds: float) -> tuple[int, float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder, "body"), Path(folder, "post.lua")
        body.write_bytes(target.body)
        headers = "\n".join(
            f'wrk.headers["{name}"] = "{value}"' for name, value in target.headers.items()
        )
        script.write_text(_LUA.format(body=body, headers=headers))
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "-s",
            str(script),
            target.url,
        ]
        output = _run(command)
    found = re.search(r"RESULT (\d+) ([\d.]+) ([\d.]+) ([\d.]+) (\d+)", output)
    if found is None or int(found[5]) or "Non-2xx" in output:
        raise RuntimeError(f"the load on {target.url} was not answered as it should be:\n{output}")
    return int(found[1]), float(found[2]), float(found[3]), float(found[4])


def _h2load(target: Target, connections: int, seconds: float) -> tuple[int, float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(target.body)
        headers = [f"-H{name}: {value}" for name, value in target.headers.items()]
        shape = [f"-c{connections}", "-m1", "-t1", f"-D{max(1, round(seconds))}"]
        output = _run(["h2load", *shape, f"-d{body}", f"--log-file={log}", *headers, target.url])
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    latency_us = sorted(int(row[2]) for row in rows)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", output)
    rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", output)
    if counts is None or rate is None or int(counts[2]) or int(counts[3]) or not latency_us:
        raise RuntimeError(f"the load on {target.url} was not answered as it should be:\n{output}")
    middle, late = latency_us[len(latency_us) // 2], latency_us[int(len(latency_us) * 0.99)]
    return len(latency_us), float(rate[1]), middle / 1e3, late / 1e3


def _run(command: list[str]) -> str:
    result = subprocess.run(
        ["taskset", "-c", str(LOAD_CORE), *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout
