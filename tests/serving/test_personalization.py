"""The personal lane: every row gets its own client's head, whatever shares its batch."""

import gc
import os
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from budget import examples
from flserving import models
from flserving.errors import CorruptArtifactError, ModelExecutionError
from flserving.federated import STRATEGIES, publish_rounds, train
from flserving.registry import Registry
from flserving.registry.heads import HeadSet, trained_on
from flserving.serving.config import ServingConfig
from flserving.serving.loader import RegistrySource, load_engine
from flserving.serving.server import ModelServer

SIZES, CLIENTS = [5, 8, 3], 12
NAMES = [f"client-{number}" for number in range(CLIENTS)]
STALE = "client-3"
LAYOUTS = ("head", "additive", "adapter")


def published(folder, layout="head", count=CLIENTS):
    """A registry with one version that answers raw values; the head of ``STALE`` was trained on
    another body."""
    torch.manual_seed(0)
    model, rng = models.build("mlp", {"sizes": SIZES}), np.random.default_rng(0)
    inputs = SIZES[2] if layout == "adapter" else SIZES[1]
    weights = rng.standard_normal((count, inputs + 1, SIZES[2]), np.float32)
    heads = HeadSet(layout, [f"client-{number}" for number in range(count)], weights)
    registry = Registry(folder)
    options = {
        "architecture": "mlp",
        "parameters": {"sizes": SIZES},
        "output_type": "regression",
        "alias": "default",
    }
    ours = registry.publish("m", model, heads=heads, **options)
    if count == CLIENTS:
        digests = [trained_on(layout, ours.digests)] * count
        digests[NAMES.index(STALE)] = "f" * 64
        registry.publish("m", model, heads=HeadSet(layout, NAMES, weights, digests), **options)
    return registry, model.eval().requires_grad_(False), weights


def oracle(layout, model, weights, client, row):
    """What a server with one ``nn.Linear`` a client answers to one row."""
    x = torch.from_numpy(row)[None]
    features = model.body(x)
    generic = model.head(features)
    if client not in NAMES or client == STALE:
        return generic[0].numpy()
    matrix = torch.from_numpy(weights[NAMES.index(client)])
    own = nn.Linear(matrix.shape[0] - 1, matrix.shape[1]).requires_grad_(False)
    own.weight.copy_(matrix[:-1].T)
    own.bias.copy_(matrix[-1])
    answers = {
        "head": lambda: own(features),
        "additive": lambda: generic + own(features),
        "adapter": lambda: own(generic),
    }
    return answers[layout]()[0].numpy()


@pytest.fixture(scope="module", params=LAYOUTS)
def stage(request, tmp_path_factory):
    registry, model, weights = published(tmp_path_factory.mktemp("registry"), request.param)
    with registry:
        config = ServingConfig(max_batch_size=7, head_cache_bytes=5 * 192)
        engine = load_engine(RegistrySource(registry, "m"), "2", config)
        yield request.param, model, weights, engine


@examples(80)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, CLIENTS + 2), st.integers(0, 30)), min_size=1, max_size=30
    ),
    cuts=st.sets(st.integers(1, 29)),
)
def test_every_row_gets_its_own_head_whatever_the_batch(stage, asked, cuts):
    """Any clients in any order, repeated, unknown and stale ones among them, in any number of
    requests, in chunks."""
    layout, model, weights, engine = stage
    rng = np.random.default_rng(7)
    pool = rng.standard_normal((31, SIZES[0]), np.float32)
    clients = [f"client-{number}" for number, _ in asked]
    rows = pool[[row for _, row in asked]]
    slots, found = engine.personal.choose(clients, len(rows))
    words = {STALE: "stale"} | {
        f"client-{number}": "unknown" for number in range(CLIENTS, CLIENTS + 3)
    }
    assert found == [words.get(client, "own") for client in clients]
    edges = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    payloads = [(rows[a:b], slots[a:b]) for a, b in pairwise(edges)]
    predictions = engine.personal.execute(payloads)
    assert [p.stop - p.start for p in predictions] == [len(part) for part, _ in payloads]
    got = np.concatenate([p.arrays()["predictions"] for p in predictions])
    expected = np.stack(
        [oracle(layout, model, weights, *pair) for pair in zip(clients, rows, strict=True)]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_one_client_has_all_rows(stage):
    engine = stage[3]
    for client, word in (
        ("client-1", "own"),
        (STALE, "stale"),
        ("nobody", "unknown"),
        ("", "unknown"),
    ):
        slots, found = engine.personal.choose(client, 4)
        assert (
            found == word
            and slots.shape == (4,)
            and slots.dtype == np.int64
            and len(set(slots.tolist())) == 1
        )


def test_the_neutral_head_is_the_global_model(stage):
    engine, rows = stage[3], np.random.default_rng(1).standard_normal((9, SIZES[0]), np.float32)
    own = engine.personal.execute([(rows, np.full(9, -1))])[0].arrays()["predictions"]
    np.testing.assert_allclose(
        own, engine.execute([rows])[0].arrays()["predictions"], rtol=1e-5, atol=1e-6
    )


def test_the_callers_rows_are_not_changed(stage):
    rows = np.random.default_rng(1).standard_normal((9, SIZES[0]), np.float32)
    kept = rows.copy()
    stage[3].personal.execute([(rows, np.zeros(9, np.int64))])
    assert np.array_equal(rows, kept)


def test_what_is_not_finite_is_an_error_of_the_model(stage):
    rows = 3e38 * np.sign(np.random.default_rng(3).standard_normal((CLIENTS, SIZES[0]), np.float32))
    with pytest.raises(ModelExecutionError, match="not finite"):
        stage[3].personal.execute([(rows, np.arange(CLIENTS))])


def test_heads_change_the_identity_and_count_in_the_size(tmp_path):
    registry, _, _ = published(tmp_path)
    with registry:
        source = RegistrySource(registry, "m")
        first, second = (load_engine(source, version, ServingConfig()) for version in "12")
        assert first.identity == second.identity, "the same global model"
        assert len({first.identity, first.personal.identity, second.personal.identity}) == 3
        bare = first.nbytes - first.personal.store.nbytes
        assert bare == sum(p.nbytes for p in first.model.parameters())
        small = load_engine(source, "1", ServingConfig(head_cache_bytes=1))
        assert small.personal.store.nbytes < first.personal.store.nbytes


def test_an_evicted_model_closes_its_file_after_the_last_user(tmp_path):
    registry, _, _ = published(tmp_path)
    row, gc_was_on = np.zeros((1, SIZES[0]), np.float32), gc.isenabled()
    with registry, ModelServer(ServingConfig(cache_size=1), registry) as server:
        gc.disable()  # reference counting alone must do
        try:
            with server.lease("1") as engine:
                fd, forgotten = engine.personal.store._file._fd, weakref.ref(engine.personal)
                server.unload("m")
                assert len(server.model_cache) == 0
                slots, _ = engine.personal.choose("client-5", 1)
                assert len(engine.personal.execute([(row, slots)])) == 1
                del engine
            assert forgotten() is None
            with pytest.raises(OSError):
                os.fstat(fd)
        finally:
            if gc_was_on:
                gc.enable()


def test_a_damaged_head_fails_its_client_alone(tmp_path):
    registry, model, weights = published(tmp_path)
    with registry, ModelServer(ServingConfig(), registry) as server:
        with server.lease("1") as engine:
            assert engine.personal.served_as == engine.served_as == "m/1"
            slot = engine.personal.store.find("client-5")
        with open(tmp_path / "models" / "m" / "1" / "heads.bin", "r+b") as file:
            file.seek(64 + slot * 128 + 20)
            file.write(b"\xff\xff")
        row = np.ones((1, SIZES[0]), np.float32)
        with pytest.raises(CorruptArtifactError, match=r"m/1/heads\.bin has a changed record"):
            server.predict(row, "1", client="client-5")
        answer = server.predict(row, "1", client="client-6")
        assert answer["head"] == "own"
        np.testing.assert_allclose(
            answer["predictions"][0], oracle("head", model, weights, "client-6", row[0]), 1e-5, 1e-5
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_publishes_the_heads_that_its_clients_keep(tmp_path, strategy):
    with Registry(tmp_path) as registry:
        run = train(
            strategy,
            num_clients=4,
            rounds=2,
            local_epochs=1,
            progress=False,
            on_round=publish_rounds(registry, "m"),
        )
        for version, result in enumerate(run.rounds, 1):
            engine = load_engine(RegistrySource(registry, "m"), str(version), ServingConfig())
            # nobody differs from the global model, or in the body as well
            if strategy in ("fedavg", "local"):
                assert engine.personal is None and registry.manifest("m", version).heads is None
                continue
            for client in run.clients:
                slots, found = engine.personal.choose(client.id, len(client.test_x))
                got = engine.personal.execute([(client.test_x, slots)])[0].arrays()["probabilities"]
                with torch.no_grad():
                    expected = torch.softmax(
                        result.model(client.id)(engine.preprocessor(client.test_x)), 1
                    )
                assert found == "own"
                np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
