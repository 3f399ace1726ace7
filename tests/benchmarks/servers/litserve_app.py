"""LitServe with batching, on the V2 JSON body.   python litserve_app.py PORT SIZE,SIZE,..."""

import sys

import litserve
import torch
from network_model import build


class Api(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(1)
        self.model = build([int(size) for size in sys.argv[2].split(",")])

    def decode_request(self, request):
        tensor = request["inputs"][0]
        return torch.tensor(tensor["data"], dtype=torch.float32).reshape(tensor["shape"])[0]

    def predict(self, batch):
        with torch.inference_mode():
            return torch.softmax(self.model(batch), 1)

    def encode_response(self, row):
        confidence, prediction = row.max(0)
        outputs = [
            {"name": "predictions", "datatype": "INT64", "shape": [1], "data": [prediction.item()]},
            {"name": "confidences", "datatype": "FP32", "shape": [1], "data": [confidence.item()]},
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [1, len(row)],
                "data": row.tolist(),
            },
        ]
        return {"model_name": "m", "model_version": "1", "outputs": outputs}


if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.002, api_path="/v2/models/m/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        port=int(sys.argv[1]), log_level="error", generate_client_file=False, num_api_servers=1
    )
