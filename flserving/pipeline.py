"""The tutorial's entrance: one call that serves a model, and a demonstration of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from flserving import models
from flserving.config import ServingConfig
from flserving.server import ModelServer


def create_serving_pipeline(
    model: nn.Module,
    feature_stats: Mapping[str, ArrayLike] | None = None,
    config: ServingConfig | None = None,
    **options: Any,
) -> ModelServer:
    """The one-call set-up: a server whose default is ``model``, as version "v1.0".

    ``options`` go to :meth:`ModelServer.load_model`.
    """
    server = ModelServer(config)
    try:
        server.load_model("v1.0", model, feature_stats, **options)
    except BaseException:
        server.close()
        raise
    return server


def demo_serving(rows: int = 3) -> dict[str, Any]:
    """Serve the tutorial's 32-64-10 model (random weights) for ``rows`` random rows; prints and returns the answer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.build("tutorial_mlp")
    with create_serving_pipeline(model) as server:
        answer = server.predict(np.random.default_rng(0).standard_normal((rows, 32), dtype=np.float32))
        print(
            f"version {answer['model_version']} says {answer['predictions']} in {answer['latency_ms']:.2f} ms; "
            f"{server.health_check()['status']}"
        )
    return answer
