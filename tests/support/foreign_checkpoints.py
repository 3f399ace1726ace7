"""Writes tests/integrations/checkpoints with the tools themselves, each in an environment of its
own that has it:

python tests/support/foreign_checkpoints.py flower tests/integrations/checkpoints    # flwr 1.41.0
python tests/support/foreign_checkpoints.py nvflare tests/integrations/checkpoints   # nvflare 2.9.0

Beside each file lies what it should answer, NAME.answer.npy: the logits of ``rows()``, by torch
before it was saved.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from flserving import models

SIZES = [4, 8, 3]


def rows():
    return torch.linspace(-1, 1, 20).reshape(5, 4)


def build():
    return models.build("mlp", {"sizes": SIZES})


def answer_of(state, path):
    module = build()
    module.load_state_dict({name: torch.as_tensor(value).float() for name, value in state.items()})
    np.save(f"{path}.answer.npy", module(rows()).detach().numpy())


def flower(folder):
    """Three rounds of FedAdam, whose arrays are float64, saved after each as Flower's guide on
    checkpoints does."""
    # before flwr: it turns the telemetry off
    from flserving.federated.flower import LocalGrid  # isort: skip
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAdam

    app = ClientApp()

    @app.train()
    def train(message, context):
        state = message.content["arrays"].to_torch_state_dict()
        shift = 0.1 * (context.node_config["partition-id"] + 1)
        arrays = ArrayRecord({name: tensor + shift for name, tensor in state.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
        return Message(content, reply_to=message)

    def save(server_round, arrays):
        if server_round:
            np.savez(folder / f"round-{server_round}-weights.npz", *arrays.to_numpy_ndarrays())
        return MetricRecord({})

    torch.manual_seed(0)
    arrays = ArrayRecord(build().state_dict())
    result = FedAdam(fraction_evaluate=0.0).start(
        LocalGrid(app, 2), arrays, num_rounds=3, evaluate_fn=save
    )
    state = result.arrays.to_torch_state_dict()
    torch.save(state, folder / "final_model.pt")
    for number in (1, 2):
        (folder / f"round-{number}-weights.npz").unlink()
    for name in ("round-3-weights.npz", "final_model.pt"):
        answer_of(state, folder / name)


def nvflare(folder):
    """What NVFLARE's persistor writes after a round of its FedAvg: ``{"model": ..., "meta_props":
    ...}``."""
    from nvflare.app_common.abstract.model import make_model_learnable
    from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
    from nvflare.app_opt.pt.model_persistence_format_manager import PTModelPersistenceFormatManager

    torch.manual_seed(1)
    state = build().state_dict()
    train_conf = {"train": {"model": "Net"}}  # as the persistor notes it: the class's name
    persistor = PTFileModelPersistor()
    persistor.persistence_manager = PTModelPersistenceFormatManager(
        dict(state), default_train_conf=train_conf
    )
    learned = {name: tensor.numpy() + 0.5 for name, tensor in state.items()}
    meta = {"nr_aggregated": 2, "current_round": 7}  # as its aggregators leave them
    persistor.persistence_manager.update(make_model_learnable(learned, meta))
    persistor.save_model_file(str(folder / "FL_global_model.pt"))
    answer_of(learned, folder / "FL_global_model.pt")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    {"flower": flower, "nvflare": nvflare}[sys.argv[1]](target)
