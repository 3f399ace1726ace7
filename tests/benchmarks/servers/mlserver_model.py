"""MLServer with adaptive batching.   python mlserver_model.py PORT SIZE,SIZE,..."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from network_model import build


class Model(MLModel):
    async def load(self):
        torch.set_num_threads(1)
        self.network = build([int(size) for size in os.environ["SIZES"].split(",")])
        return True

    async def predict(self, payload):
        rows = NumpyCodec.decode_input(payload.inputs[0])
        with torch.inference_mode():
            probabilities = torch.softmax(self.network(torch.from_numpy(rows).float()), 1).numpy()
        outputs = {
            "predictions": probabilities.argmax(1),
            "confidences": probabilities.max(1),
            "probabilities": probabilities,
        }
        encoded = [NumpyCodec.encode_output(name, array) for name, array in outputs.items()]
        return InferenceResponse(model_name=self.name, outputs=encoded)


if __name__ == "__main__":
    port, here = int(sys.argv[1]), Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "http_port": port,
            "grpc_port": port + 1,
            "metrics_port": port + 2,
            "parallel_workers": 0,
        }
        Path(folder, "settings.json").write_text(
            json.dumps(settings | {"host": "127.0.0.1", "debug": False})
        )
        model = {
            "name": "m",
            "implementation": "mlserver_model.Model",
            "max_batch_size": 32,
            "max_batch_time": 0.002,
        }
        Path(folder, "model-settings.json").write_text(json.dumps(model))
        environment = os.environ | {"SIZES": sys.argv[2], "PYTHONPATH": str(here)}
        command = [sys.executable, "-c", "from mlserver.cli import main; main()", "start", folder]
        os.execve(sys.executable, command, environment)
