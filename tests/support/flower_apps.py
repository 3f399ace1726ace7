"""A Flower app as its users write one, on the same digits that ``federated.train`` deals out. Needs
flwr."""

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

from flserving import models
from flserving.federated.data import Client, federated_statistics
from flserving.models.processing import Preprocessor

ARCHITECTURE = "digits_mlp"
CONFIG = {"lr": 0.1, "local-epochs": 5, "batch": 16}


def initial_arrays(seed: int = 0) -> ArrayRecord:
    """What ``federated.train(seed=...)`` starts from."""
    torch.manual_seed(int(np.random.SeedSequence((seed,)).generate_state(1)[0]))
    return ArrayRecord(models.build(ARCHITECTURE).state_dict())


def train_config(seed: int = 0) -> ConfigRecord:
    return ConfigRecord(CONFIG | {"seed": seed})


def client_app(clients: tuple[Client, ...]) -> ClientApp:
    """SGD on the cross entropy; shuffles as ``federated.train`` does, so that the two can be
    compared."""
    standardise = Preprocessor(**federated_statistics(clients))
    app = ClientApp()

    def opened(message: Message, context: Context) -> tuple[Client, torch.nn.Module]:
        module = models.build(ARCHITECTURE)
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return clients[context.node_config["partition-id"]], module

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, module = opened(message, context)
        config = message.content["config"]
        key = (config["seed"], config["server-round"], context.node_config["partition-id"])
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        x, y = standardise(client.train_x), torch.from_numpy(client.train_y)
        optimiser = torch.optim.SGD(module.parameters(), lr=config["lr"])
        for _ in range(config["local-epochs"]):
            for batch in torch.split(torch.randperm(len(y)), config["batch"]):
                optimiser.zero_grad()
                loss = cross_entropy(module(x[batch]), y[batch])
                loss.backward()
                optimiser.step()
        metrics = MetricRecord({"num-examples": len(y), "loss": float(loss.detach())})
        return Message(
            RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}),
            reply_to=message,
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client, module = opened(message, context)
        with torch.inference_mode():
            hits = module.eval()(standardise(client.test_x)).argmax(dim=1).numpy() == client.test_y
        metrics = MetricRecord({"num-examples": len(hits), "accuracy": float(hits.mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app
