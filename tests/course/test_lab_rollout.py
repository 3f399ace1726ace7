"""Notebook 01's measurements against hand-made cases."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from flserving import create_serving_pipeline
from flserving.errors import FlservingError, NotFoundError
from flserving.federated import data
from flserving.lab.releases import rollout
from flserving.registry import Registry
from flserving.registry.manifest import Digests, Lineage, Manifest, Preprocessing, Signature
from flserving.serving.server import ModelServer


def client(name, labels):
    x = np.zeros((len(labels), 2), np.float32)
    y = np.array(labels, np.int64)
    return data.Client(name, x, y, x, y)


def test_class_counts_add_up_to_the_data_set():
    images, labels = data.digits()
    counts = rollout.class_counts(data.make_clients(images, labels, num_clients=7, alpha=0.3))
    assert counts.shape == (7, 10) and counts.dtype == np.int64
    assert (counts.sum(axis=0) == np.bincount(labels)).all()


def test_metrics_weigh_samples_in_one_and_clients_in_the_other():
    clients = [client("a", [1, 1, 1, 0]), client("b", [0])]
    accuracy = rollout.accuracy_by_client(
        lambda x, say: {"predictions": [say] * len(x)}, clients, say=1
    )
    assert accuracy.to_dict() == {"a": 0.75, "b": 0.0}
    table = rollout.metrics_table({"always 1": accuracy}, clients)
    expected = {"global": 0.6, "mean_client": 0.375, "worst_client": 0.0}
    assert table.loc["always 1"].to_dict() == pytest.approx(expected)


def test_told_shortens_long_lists_and_keeps_the_rest():
    manifest = Manifest(
        name="m", version=1, architecture="digits_mlp", parameters={}, signature=Signature((64,), (10,)),
        preprocessing=Preprocessing((0.5,) * 64, (1.0,) * 64),
        lineage=Lineage(round=3, sample_counts=(7,) * 9, clients=tuple(f"c-{n}" for n in range(9))),
        metrics={}, digests=Digests("0" * 64, "1" * 64, None, "2" * 64), weights_nbytes=9,
        created_at="2026-01-01T00:00:00+00:00", note="",
    )  # fmt: skip
    said = json.loads(rollout.told(manifest))
    assert said["preprocessing"]["mean"] == "0.5, 0.5, 0.5, 0.5, ... (64 in all)"
    assert said["lineage"]["clients"] == "c-0, c-1, c-2, c-3, ... (9 in all)"
    assert said["lineage"]["sample_counts"] == "7, 7, 7, 7, ... (9 in all)"
    assert said["signature"]["input_shape"] == [64] and said["lineage"]["round"] == 3


def test_keep_asking_sees_each_promotion(tmp_path):
    from flserving import models

    with Registry(tmp_path) as registry:
        for seed in (0, 1, 2):
            torch.manual_seed(seed)
            registry.publish("m", models.build("tutorial_mlp"), architecture="tutorial_mlp")
        registry.set_alias("m", "default", 1, who="test", why="test")
        with ModelServer(registry=registry, model="m") as server:
            moves = [
                lambda v=v: registry.set_alias("m", "default", v, who="test", why="test")
                for v in (2, 3)
            ]
            answered, moved_s = rollout.keep_asking(
                server, np.zeros(32, np.float32), moves, every_s=0.03
            )
    versions = [one.version for one in answered]
    assert set(versions) == {1, 2, 3} and versions == sorted(versions) and len(moved_s) == 2
    assert all(one.version >= 2 for one in answered if one.at_s > moved_s[0])


def test_keep_asking_raises_what_a_request_or_a_move_raises():
    with create_serving_pipeline(nn.Linear(3, 2)) as server:
        with pytest.raises(FlservingError, match="features"):
            rollout.keep_asking(server, np.zeros(4, np.float32), [], every_s=0.02)
        with pytest.raises(NotFoundError):
            rollout.keep_asking(
                server, np.zeros(3, np.float32), [lambda: server.set_default("v9")], every_s=0.0
            )
