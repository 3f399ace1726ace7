"""Versions that answer with their own number, for the tests of experiments."""

import itertools

import numpy as np

from flserving import ModelServer, Registry, ServingConfig, models
from serving_models import PATIENCE_S

ROW, LOUD = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
"""``LOUD`` makes a fragile version fail."""


def published(root, versions=3, **options):
    """A registry of a regression model "m": version k answers k; ``default`` leads to 1."""
    registry = Registry(root)
    for number in range(1, versions + 1):
        publish(registry, number, alias="default" if number == 1 else None, **options)
    return registry


def publish(registry, value, fragile=False, name="m", **options):
    state = models.build("mlp", {"sizes": [4, 2, 1]}).state_dict()
    for part, tensor in state.items():
        # finite, but not what it makes of a 1
        tensor.fill_(1e30 if fragile and part.endswith("weight") else 0.0)
    state["head.bias"].fill_(float(value))
    return registry.publish(
        name,
        state,
        architecture="mlp",
        parameters={"sizes": [4, 2, 1]},
        output_type="regression",
        **options,
    )


def named(running, arm, count=1):
    """The first clients that are in ``arm``; one alone as a string."""
    names = (f"c-{i}" for i in itertools.count())
    found = list(itertools.islice((name for name in names if running.arm_of(name) == arm), count))
    return found[0] if count == 1 else found


def server_of(registry, **settings):
    return ModelServer(
        ServingConfig(**{"warmup_samples": 1, "timeout_ms": PATIENCE_S * 1e3, **settings}), registry
    )
