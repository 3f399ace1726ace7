"""Notebook 01's measurements against hand-made cases, and its pictures by what they show."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from flserving import create_serving_pipeline
from flserving.errors import FlservingError, NotFoundError
from flserving.federated import data
from flserving.lab import figures_01 as figures
from flserving.lab import rollout
from flserving.registry import Registry
from flserving.registry.manifest import Digests, Lineage, Manifest, Preprocessing, Signature
from flserving.serving.server import ModelServer

ACCURACY = pd.Series({"client-00": 0.9, "client-01": 0.4, "client-02": 0.8})


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
    accuracy = rollout.accuracy_by_client(lambda x, say: {"predictions": [say] * len(x)}, clients, say=1)
    assert accuracy.to_dict() == {"a": 0.75, "b": 0.0}
    table = rollout.metrics_table({"always 1": accuracy}, clients)
    expected = {"global": 0.6, "mean_client": 0.375, "worst_client": 0.0}
    assert table.loc["always 1"].to_dict() == pytest.approx(expected)


def test_told_shortens_long_lists_and_keeps_the_rest():
    manifest = Manifest(
        name="m", version=1, architecture="digits_mlp", parameters={}, signature=Signature((64,), (10,)),
        preprocessing=Preprocessing((0.5,) * 64, (1.0,) * 64), lineage=Lineage(round=3, sample_counts=(7, 8)),
        metrics={}, digests=Digests("0" * 64, "1" * 64, None, "2" * 64), weights_nbytes=9,
        created_at="2026-01-01T00:00:00+00:00", note="",
    )  # fmt: skip
    said = json.loads(rollout.told(manifest))
    assert said["preprocessing"]["mean"] == "0.5, 0.5, 0.5, 0.5, ... (64 numbers)"
    assert said["lineage"]["sample_counts"] == [7, 8] and said["lineage"]["round"] == 3


def test_keep_asking_sees_each_promotion(tmp_path):
    from flserving import models

    with Registry(tmp_path) as registry:
        for seed in (0, 1, 2):
            torch.manual_seed(seed)
            registry.publish("m", models.build("tutorial_mlp"), architecture="tutorial_mlp")
        registry.set_alias("m", "default", 1, who="test", why="test")
        with ModelServer(registry=registry, model="m") as server:
            moves = [lambda v=v: registry.set_alias("m", "default", v, who="test", why="test") for v in (2, 3)]
            answered, moved_s = rollout.keep_asking(server, np.zeros(32, np.float32), moves, every_s=0.03)
    versions = [one.version for one in answered]
    assert set(versions) == {1, 2, 3} and versions == sorted(versions) and len(moved_s) == 2
    assert all(one.version >= 2 for one in answered if one.at_s > moved_s[0])


def test_keep_asking_raises_what_a_request_or_a_move_raises():
    with create_serving_pipeline(nn.Linear(3, 2)) as server:
        with pytest.raises(FlservingError, match="features"):
            rollout.keep_asking(server, np.zeros(4, np.float32), [], every_s=0.02)
        with pytest.raises(NotFoundError):
            rollout.keep_asking(server, np.zeros(3, np.float32), [lambda: server.set_default("v9")], every_s=0.0)


# ------------------------------------------------------------------------------------------------- pictures


def test_round_figure_tells_its_four_steps():
    (ax,) = figures.round_figure().axes
    assert {text.get_text()[0] for text in ax.texts if text.get_text()[:1].isdigit()} == set("1234")


def test_digits_figure_shows_each_class_once():
    fig = figures.digits_figure(*data.digits())
    assert [ax.get_title() for ax in fig.axes] == list("0123456789")


def test_partition_figures_draw_a_dot_where_somebody_holds_something():
    held = np.zeros((3, 10), np.int64)
    held[0, 4], held[1, 2], held[2, 2], held[2, 9] = 180, 90, 1, 30
    fig = figures.partition_figure((0.1, held))
    top, below = fig.axes
    assert [bar.get_height() for bar in top.patches] == [180, 90, 31]
    assert "1 to 2 classes" in top.get_title(loc="left")
    assert below.collections[0].get_offsets().tolist() == [[0, 4], [1, 2], [2, 2], [2, 9]]
    assert below.collections[0].get_sizes().tolist() == pytest.approx([340, 170, 2, 340 / 6])
    panels = figures.partitions_figure({0.1: held, 1: held}).axes
    assert [ax.get_title(loc="left") for ax in panels] == ["alpha = 0.1", "alpha = 1"]


def test_rounds_figure_marks_the_rejected_update():
    accuracy = {f"{name}_accuracy": [0.5, 0.6] for name in ("global", "mean_client", "worst_client")}
    frame = pd.DataFrame({**accuracy, "rejected": [0, 2]}, index=[1, 2])
    (ax,) = figures.rounds_figure(frame).axes
    assert [text.get_text() for text in ax.texts] == ["2 rejected"]
    assert ax.lines[0].get_ydata().tolist() == [50, 60] and "%" in ax.get_ylabel()


def test_clients_figure_points_at_the_worst():
    fig = figures.clients_figure({"version 2": ACCURACY})
    (ax,) = fig.axes
    assert ax.get_title(loc="left") == "version 2: mean 70.0 %, worst 40.0 % (client 1)"
    orange = [bar.get_facecolor() == ax.patches[1].get_facecolor() for bar in ax.patches]
    assert orange == [False, True, False] and ax.get_legend() is None
    both = figures.clients_figure({"version 1": ACCURACY, "version 2": ACCURACY / 2})
    assert [text.get_text() for text in both.axes[0].get_legend().get_texts()] == [
        "version 1",
        "mean of version 2",
        "version 2",
    ]


def test_answers_figure_names_the_moves():
    answered = [rollout.Answered(0.0, 1), rollout.Answered(0.2, 2)]
    (ax,) = figures.answers_figure(answered, {"promote 2": 0.1}).axes
    assert ax.lines[0].get_xdata().tolist() == [0, 200] and ax.lines[0].get_ydata().tolist() == [1, 2]
    assert [text.get_text().strip() for text in ax.texts] == ["promote 2"] and "ms" in ax.get_xlabel()
