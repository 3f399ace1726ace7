"""What many write first: FastAPI, pydantic, one forward a request, no batching.

python by_hand.py PORT SIZE,SIZE,...
"""

import sys

import torch
import uvicorn
from fastapi import FastAPI
from network_model import build
from pydantic import BaseModel

app = FastAPI()


class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(BaseModel):
    inputs: list[Tensor]


@app.post("/v2/models/m/infer")
async def infer(request: Request):
    tensor = request.inputs[0]
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor(tensor.data).reshape(tensor.shape)), 1)
    confidences, predictions = probabilities.max(1)
    outputs = [
        {
            "name": "predictions",
            "datatype": "INT64",
            "shape": list(predictions.shape),
            "data": predictions.tolist(),
        },
        {
            "name": "confidences",
            "datatype": "FP32",
            "shape": list(confidences.shape),
            "data": confidences.tolist(),
        },
        {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": list(probabilities.shape),
            "data": probabilities.flatten().tolist(),
        },
    ]
    return {"model_name": "m", "model_version": "1", "outputs": outputs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = build([int(size) for size in sys.argv[2].split(",")])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
