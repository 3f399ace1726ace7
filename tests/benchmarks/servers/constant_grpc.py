"""The floor for gRPC: grpcio answers every call with the same bytes.

python constant_grpc.py PORT aio|sync ANSWER_FILE
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc


def handlers(method):
    return [
        grpc.method_handlers_generic_handler(
            "inference.GRPCInferenceService", {"ModelInfer": method}
        )
    ]


async def serve_aio(port: int, answer: bytes) -> None:
    async def infer(request, context):
        return answer

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(handlers(grpc.unary_unary_rpc_method_handler(infer)))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def serve_sync(port: int, answer: bytes) -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(
        handlers(grpc.unary_unary_rpc_method_handler(lambda request, context: answer))
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    port, answer = int(sys.argv[1]), Path(sys.argv[3]).read_bytes()
    if sys.argv[2] == "aio":
        asyncio.run(serve_aio(port, answer))
    else:
        serve_sync(port, answer)
