"""The floor for REST: raw ASGI, orjson, one forward per turn of the event loop; no validation,
registry or metrics.

python floor.py PORT SIZE,SIZE,...
"""

import asyncio
import sys

import numpy as np
import orjson
import torch
import uvicorn
from network_model import build
from torch import nn


class Floor:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.waiting = model, []

    async def __call__(self, scope, receive, send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        tensor = orjson.loads(body)["inputs"][0]
        future = asyncio.get_running_loop().create_future()
        if not self.waiting:
            asyncio.get_running_loop().call_soon(self.run)
        self.waiting.append((np.array(tensor["data"], np.float32).reshape(tensor["shape"]), future))
        probabilities = await future
        top = probabilities.argmax(1)
        outputs = [
            {"name": "predictions", "datatype": "INT64", "shape": [len(top)], "data": top},
            {
                "name": "confidences",
                "datatype": "FP32",
                "shape": [len(top)],
                "data": probabilities.max(1),
            },
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": probabilities.shape,
                "data": probabilities,
            },
        ]
        answer = {"model_name": "m", "model_version": "1", "outputs": outputs}
        data = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    def run(self) -> None:
        batch, self.waiting = self.waiting, []
        with torch.inference_mode():
            rows = torch.from_numpy(np.concatenate([rows for rows, _ in batch]))
            probabilities = torch.softmax(self.model(rows), 1).numpy()
        start = 0
        for rows, future in batch:
            future.set_result(probabilities[start : start + len(rows)])
            start += len(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    app = Floor(build([int(size) for size in sys.argv[2].split(",")]))
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="uvloop",
        http="httptools",
    )
