"""Speed over the network: flserving against a floor written by hand, and against what a user would
pick instead.

    python tests/benchmarks/network.py                    # REST and gRPC against floors: 6 minutes
    python tests/benchmarks/network.py --peers PYTHON [...]   # also FastAPI, LitServe, MLServer
    python tests/benchmarks/network.py --quick                # seconds; too short to quote

Every server has one core, the load generator (wrk for REST, h2load for gRPC: Debian's wrk and
nghttp2-client) the other. All servers stay up and are driven in turns; a ratio is taken within a
turn. Before and after the load every server must give the same answer to the same row. A PYTHON is
the interpreter of an environment with torch and fastapi, litserve or mlserver.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import torch

from flserving import Registry, models
from flserving.api.grpc import codec

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "servers"))
from load import Load, Target, measure, missing_tools, pinned
from network_model import build

SERVERS = Path(__file__).parent / "servers"
SIZES = {"small": [32, 64, 10], "large": [784, 512, 512, 10]}
# module -> server
PEERS = {"fastapi": "by_hand.py", "litserve": "litserve_app.py", "mlserver": "mlserver_model.py"}
TOKEN = "benchmark"
JSON_HEADERS = {"content-type": "application/json"}
GRPC_HEADERS = {
    "content-type": "application/grpc",
    "te": "trailers",
    "authorization": f"Bearer {TOKEN}",
}


@dataclass
class System:
    """A running server and one way to ask it."""

    name: str
    process: subprocess.Popen
    target: Target
    floor: str | None  # name of what it is compared with

    def answer(self) -> list[float]:
        """The probabilities that it gives for the row of the load."""
        if self.target.grpc:
            with grpc.insecure_channel(self.target.url.split("//")[1].split("/")[0]) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                reply = call(
                    self.target.body[5:],
                    metadata=[("authorization", f"Bearer {TOKEN}")],
                    timeout=10,
                )
            raw = codec.InferResponse.FromString(reply).raw_output_contents[2]
            return np.frombuffer(raw, np.float32).tolist()
        request = urllib.request.Request(self.target.url, self.target.body, self.target.headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            body, json_nbytes = (
                response.read(),
                response.headers.get("Inference-Header-Content-Length"),
            )
        if json_nbytes is not None:
            return np.frombuffer(body[-40:], np.float32).tolist()
        outputs = {tensor["name"]: tensor["data"] for tensor in json.loads(body)["outputs"]}
        return np.ravel(outputs["probabilities"]).tolist()


def free_port() -> int:
    # three in a row: MLServer takes the next two for gRPC and metrics
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def bodies(row: np.ndarray) -> tuple[bytes, bytes, dict[str, str], bytes]:
    """The same request as JSON, as JSON + binary tensors with its headers, and as a framed gRPC
    message."""
    tensor = {"name": "features", "shape": list(row.shape), "datatype": "FP32"}
    plain = json.dumps(
        {"inputs": [tensor | {"data": [round(x, 4) for x in row.ravel().tolist()]}]}
    ).encode()
    head = {"inputs": [tensor | {"parameters": {"binary_data_size": row.nbytes}}]}
    front = json.dumps(head | {"parameters": {"binary_data_output": True}}).encode()
    headers = {
        "content-type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(front)),
    }
    request = codec.InferRequest(model_name="m", raw_input_contents=[row.tobytes()])
    request.inputs.add(name="features", datatype="FP32", shape=row.shape)
    message = request.SerializeToString()
    return plain, front + row.tobytes(), headers, b"\0" + len(message).to_bytes(4, "big") + message


@contextlib.contextmanager
def systems(size: str, pythons: list[str]) -> Iterator[list[System]]:
    """Every server of the comparison, started and warm."""
    sizes = SIZES[size]
    text = ",".join(map(str, sizes))
    row = np.round(np.random.default_rng(0).standard_normal((1, sizes[0])), 4).astype(np.float32)
    plain, binary, binary_headers, framed = bodies(row)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        registry, answer_file = Path(folder, "registry"), Path(folder, "answer")
        publish(registry, sizes)

        def start(python: str, script: str, port: int, *arguments: str) -> subprocess.Popen:
            return stack.enter_context(
                pinned([python, str(SERVERS / script), str(port), *arguments])
            )

        def serve() -> tuple[subprocess.Popen, int, int]:
            port = free_port()
            grpc_port = free_port()
            ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
            command = [
                sys.executable,
                "-m",
                "flserving",
                "serve",
                "--registry",
                str(registry),
                "--model",
                "m",
                *ports,
            ]
            quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"FLSERVING_TOKEN": TOKEN}}
            return stack.enter_context(pinned(command, **quiet)), port, grpc_port

        ours, port, grpc_port = serve()
        infer, auth = "/v2/models/m/infer", {"authorization": f"Bearer {TOKEN}"}
        rest, rpc = f"http://127.0.0.1:{port}{infer}", "/inference.GRPCInferenceService/ModelInfer"
        found = [
            System("flserving REST, JSON", ours, Target(rest, plain, JSON_HEADERS | auth), "floor"),
            System(
                "flserving REST, binary",
                ours,
                Target(rest, binary, binary_headers | auth),
                "flserving REST, JSON",
            ),
        ]
        port = free_port()
        floor = start(sys.executable, "floor.py", port, text)
        target = Target(f"http://127.0.0.1:{port}{infer}", plain, JSON_HEADERS)
        found.append(System("floor: raw ASGI, orjson, batches", floor, target, None))
        target = Target(f"http://127.0.0.1:{grpc_port}{rpc}", framed, GRPC_HEADERS, grpc=True)
        found.append(System("flserving gRPC", ours, target, "constant"))
        await_answer(found[-1])
        channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        with channel:
            reply = channel.unary_unary(rpc)(
                framed[5:], metadata=[("authorization", f"Bearer {TOKEN}")]
            )
        answer_file.write_bytes(reply)
        for kind in ("sync", "aio"):
            port = free_port()
            process = start(sys.executable, "constant_grpc.py", port, kind, str(answer_file))
            target = Target(f"http://127.0.0.1:{port}{rpc}", framed, GRPC_HEADERS, True)
            found.append(System(f"constant gRPC answer, grpcio {kind}", process, target, None))
        for python in pythons:
            for name, script in PEERS.items():
                if has_module(python, name) and name not in {system.name for system in found}:
                    port = free_port()
                    target = Target(f"http://127.0.0.1:{port}{infer}", plain, JSON_HEADERS)
                    found.append(System(name, start(python, script, port, text), target, "floor"))
        for system in found:
            await_answer(system)
        yield found


def publish(folder: Path, sizes: list[int]) -> None:
    """The floor's own model as version 1 of "m"."""
    model = models.build("mlp", {"sizes": sizes})
    values = build(sizes).state_dict().values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    with Registry(folder) as registry:
        registry.publish(
            "m", model, architecture="mlp", parameters={"sizes": sizes}, alias="default"
        )


def has_module(python: str, module: str) -> bool:
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.call([python, "-c", question]) == 0


def await_answer(system: System, patience_s: float = 90) -> list[float]:
    """Its first answer. Raises RuntimeError if it ends or stays silent."""
    until_s = time.monotonic() + patience_s
    while True:
        try:
            return system.answer()
        except (OSError, grpc.RpcError, ValueError) as error:
            if system.process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"{system.name} does not answer: {error}") from error
            time.sleep(0.2)


def compare(
    found: list[System], turns: int, seconds: float, connections: int
) -> dict[str, list[Load]]:
    """One load of each system a turn; all must give the same answer before and after."""
    loads: dict[str, list[Load]] = {system.name: [] for system in found}
    expected = found[0].answer()
    for turn in range(turns + 1):
        for system in found:
            load = measure(system.process, system.target, connections, seconds if turn else 1)
            if turn:  # the first turn warms up
                loads[system.name].append(load)
    for system in found:
        assert np.allclose(system.answer(), expected, atol=1e-5), (
            f"{system.name} gives another answer"
        )
    return loads


def markdown(found: list[System], loads: dict[str, list[Load]]) -> Iterator[str]:
    """Lines of a table: medians over the turns, and the ratio of rates to the named other system
    within a turn."""
    for system in found:
        mine = loads[system.name]
        other = next(
            (name for name in loads if system.floor and name.startswith(system.floor)), None
        )
        ratio = "-"
        if other is not None:
            low, middle, high = np.percentile(
                [a.rate_per_s / b.rate_per_s for a, b in zip(mine, loads[other], strict=True)],
                [25, 50, 75],
            )
            ratio = (
                f"**{middle:.2f}** ({low:.2f} to {high:.2f}) of {other.split(':')[0].split(',')[0]}"
            )
        rate, cpu, p50, p99 = (
            statistics.median(getattr(load, name) for load in mine)
            for name in ("rate_per_s", "cpu_us", "p50_ms", "p99_ms")
        )
        yield f"| {system.name} | {rate:,.0f} | {cpu:,.0f} | {p50:.2f} | {p99:.1f} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; too short to quote"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="PYTHON",
        help="interpreters that hold other systems",
    )
    arguments = parser.parse_args()
    if missing := missing_tools():
        parser.exit(
            1, f"{', '.join(missing)}: not found; on Debian: apt-get install wrk nghttp2-client\n"
        )
    turns, seconds = (1, 1) if arguments.quick else (5, 3)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, one core a server, {os.cpu_count()} cores"
    )
    for size, sizes in SIZES.items():
        with systems(size, arguments.peers) as found:
            for connections in (64, 1):
                print(
                    f"\n{size} model {'-'.join(map(str, sizes))}, one row a request, {connections} connections\n"
                )
                print(
                    "| system | req/s | CPU us a request | p50 ms | p99 ms | rate against |\n"
                    + "| --- " * 6
                    + "|"
                )
                loads = compare(
                    found, turns if connections > 1 else min(3, turns), seconds, connections
                )
                print("\n".join(markdown(found, loads)), flush=True)


if __name__ == "__main__":
    main()
