"""Our REST application behind one of three HTTP servers, each with the limits that it offers.

python http_server.py ours|uvicorn|granian PORT REGISTRY WORKERS  # until SIGTERM
python http_server.py ours|uvicorn|granian PORT REGISTRY thread   # as in a notebook; two times
"""

import asyncio
import gc
import os
import sys
import threading
import time
import urllib.request

import torch

import flserving
from flserving import ModelServer, Registry
from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2
from flserving.api.options import ApiOptions
from flserving.api.rest.app import RestApp

TOKEN = "benchmark"
SLOW_CLIENT_S = 3.0
NAME = "http_server:application"


def options(port: int) -> ApiOptions:
    tokens = Tokens()
    tokens.add(TOKEN, Role.INFER)
    return ApiOptions(
        port=port, grpc_port=None, tokens=tokens, hosts=("127.0.0.1",), slow_client_s=SLOW_CLIENT_S
    )


def model_server() -> ModelServer:
    torch.set_num_threads(1)
    return ModelServer(registry=Registry(os.environ["BENCH_REGISTRY"]), model="m")


def application() -> RestApp:
    app = RestApp(V2(model_server(), False), options(0))
    gc.collect()
    gc.freeze()  # as our workers do
    return app


def application_of_granian():
    """granian says its own port as a string; ASGI wants a number, and our check of the Host header
    does too."""
    app = application()

    async def called(scope, receive, send) -> None:
        host, port = scope["server"]
        scope["server"] = (host, int(port))
        await app(scope, receive, send)

    return called


def serve_ours(port: int, workers: int) -> None:
    from flserving.api.processes import Plan, Supervisor

    plan = Plan(registry=os.environ["BENCH_REGISTRY"], model="m", options=options(port))
    sys.exit(Supervisor(plan, workers).run(print))


def serve_uvicorn(port: int, workers: int) -> None:
    import uvicorn

    uvicorn.run(
        NAME, factory=True, port=port, workers=workers, lifespan="off", access_log=False, log_level="error",
        loop="uvloop", http="httptools", timeout_keep_alive=int(SLOW_CLIENT_S), timeout_graceful_shutdown=5,
        # by default a worker that needs 5 s to import torch is killed, for ever
        timeout_worker_healthcheck=60,
    )  # fmt: skip


def serve_granian(port: int, workers: int) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.http import HTTP1Settings

    Granian(
        f"{NAME}_of_granian", factory=True, port=port, workers=workers, interface=Interfaces.ASGINL,
        http=HTTPModes.http1, loop=Loops.uvloop, websockets=False, log_enabled=False,
        respawn_failed_workers=True, workers_kill_timeout=5,
        http1_settings=HTTP1Settings(header_read_timeout=int(SLOW_CLIENT_S * 1e3)),
    ).serve()  # fmt: skip


def thread_of_ours(port: int):
    return flserving.serve(model_server(), port=port, grpc_port=None).close


def thread_of_uvicorn(port: int):
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(application, factory=True, port=port, lifespan="off", log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()

    def close() -> None:
        server.should_exit = True
        thread.join()

    return close


def thread_of_granian(port: int):
    from granian.constants import Interfaces
    from granian.server.embed import Server

    loop = asyncio.new_event_loop()
    holder = {}

    async def serve() -> None:
        holder["server"] = Server(
            application_of_granian(), port=port, interface=Interfaces.ASGINL, log_enabled=False
        )
        await holder["server"].serve()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(holder["server"].stop)
        thread.join()

    return close


def try_thread(kind: str, port: int) -> None:
    """Seconds from the start to the first answer, and of the stop."""
    started_s = time.perf_counter()
    close = globals()[f"thread_of_{kind}"](port)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/live", timeout=5).close()
            break
        except OSError:
            time.sleep(0.01)
    answered_s = time.perf_counter()
    close()
    print(f"{answered_s - started_s:.2f} {time.perf_counter() - answered_s:.2f}")


if __name__ == "__main__":
    kind, port, os.environ["BENCH_REGISTRY"], how = sys.argv[1:]
    if how == "thread":
        try_thread(kind, int(port))
    else:
        globals()[f"serve_{kind}"](int(port), int(how))
