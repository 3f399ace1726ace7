"""The tutorial's entrance: one call that serves a model, and a demonstration of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from flserving import models
from flserving.serving.config import ServingConfig
from flserving.serving.server import ModelServer


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


def demo_serving(requests: int = 100) -> tuple[ModelServer, list[dict[str, Any]]]:
    """Serve the tutorial's 32-64-10 model (random weights) and send it ``requests`` random rows, one at a time.

    Prints how many were answered, the server's health and statistics, and the mean latency.

    Returns:
        The server, still open (close it, or leave it to the end of the process), and its answers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.build("tutorial_mlp")
    rows = np.random.default_rng(0).standard_normal((requests, 32), dtype=np.float32)
    server = create_serving_pipeline(model)
    results = [server.predict(row) for row in rows]
    health = server.health_check()
    stats = server.get_all_stats()["v1.0"]
    mean_ms = sum(result["latency_ms"] for result in results) / max(1, len(results))
    print(f"answered {len(results)} requests with version {health['default_version']}")
    print(f"health: {health['status']}, loaded: {', '.join(health['loaded_models'])}")
    print(f"the engine: {stats['request_count']} requests, {stats['avg_latency_ms']:.3f} ms each")
    print(f"mean latency: {mean_ms:.3f} ms")
    return server, results
