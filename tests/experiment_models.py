"""Versions that answer with their own number, for the tests of experiments."""

import numpy as np

from flserving import ModelServer, Registry, ServingConfig, models
from serving_models import PATIENCE_S

ROW = np.zeros((1, 4), np.float32)


def published(root, versions=3, **options):
    """A registry of a regression model "m": version k answers k; ``default`` leads to 1."""
    registry = Registry(root)
    for number in range(1, versions + 1):
        publish(registry, number, alias="default" if number == 1 else None, **options)
    return registry


def publish(registry, value, **options):
    state = models.build("mlp", {"sizes": [4, 2, 1]}).state_dict()
    for tensor in state.values():
        tensor.zero_()
    state["head.bias"].fill_(float(value))
    return registry.publish(
        "m", state, architecture="mlp", parameters={"sizes": [4, 2, 1]}, output_type="regression", **options
    )


def server_of(registry, **settings):
    return ModelServer(ServingConfig(**{"warmup_samples": 1, "timeout_ms": PATIENCE_S * 1e3, **settings}), registry)
