"""Federated rounds: against closed forms, against faulty clients, and against the accuracy that
others reached."""

import doctest
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_iris
from torch import nn

from budget import examples
from flserving import models
from flserving.errors import (
    ConfigError,
    InvalidInputError,
    InvalidModelError,
    ModelExecutionError,
    NotFoundError,
)
from flserving.federated import aggregation, training
from flserving.federated.aggregation import aggregate, fault
from flserving.federated.data import Client, digits, make_clients
from flserving.federated.rounds import STRATEGIES, publish_rounds
from flserving.registry import Registry

X, Y = digits()
UNSCALED = {"mean": [0.0] * 64, "std": [1.0] * 64}
PIXELS = {"mean": [0.0] * 64, "std": [16.0] * 64}
# enough to train on, small enough to be quick
FOUR = make_clients(X[:200], Y[:200], num_clients=4, alpha=1.0)


def train(strategy="fedavg", **options):
    """A quick training: four clients, two rounds of one epoch."""
    options = {"clients": FOUR, "rounds": 2, "local_epochs": 1, "progress": False} | options
    return training.train(strategy, **options)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(got, wanted, rtol=1e-4, atol=1e-6):
    """As ``torch.testing.assert_close``, which would import half of sympy."""
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_allclose(got[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)


def weights_at_the_start(seed=0):
    """The initial model: what is left when no client says anything."""
    return train(seed=seed, rounds=1, corrupt=lambda *_: None).final.state


def accuracy(module, client, preprocessing):
    """By hand: standardise, forward, count."""
    mean, std = (np.array(preprocessing[name], np.float32) for name in ("mean", "std"))
    with torch.no_grad():
        logits = module(torch.from_numpy((client.test_x - mean) / std))
    return float((logits.argmax(1).numpy() == client.test_y).mean())


# --- closed forms ---------------------------------------------------------------------------------


def test_the_examples_of_the_textbook_file_run():
    result = doctest.testmod(aggregation)
    assert result.attempted and not result.failed


@given(seed=st.integers(0, 10_000), weights=st.lists(st.integers(1, 500), min_size=1, max_size=6))
@examples(40)
def test_aggregation_is_the_weighted_mean(seed, weights):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((len(weights), 3, 2)).astype(np.float32)
    steps = rng.integers(0, 1000, len(weights))
    updates = [
        {"w": torch.from_numpy(value), "steps": torch.tensor(step)}
        for value, step in zip(values, steps, strict=True)
    ]
    mean = aggregate(updates, weights)
    np.testing.assert_allclose(
        mean["w"], np.average(values, axis=0, weights=weights), rtol=1e-6, atol=1e-7
    )
    assert mean["w"].dtype == torch.float32 and mean["steps"].dtype == torch.int64
    assert abs(mean["steps"].item() - np.average(steps, weights=weights)) <= 0.5 + 1e-9


def test_aggregation_by_hand_and_without_overflow():
    updates = [{"w": torch.tensor([1.0, 3e38])}, {"w": torch.tensor([4.0, 3e38])}]
    assert torch.equal(aggregate(updates, [2, 1])["w"], torch.tensor([2.0, 3e38]))


def test_aggregation_of_many_clients_loses_no_digit():
    """Summed up in float32, two thousand times a two-thousandth of 0.1 would drift."""
    update = {"w": torch.full((3,), 0.1)}
    assert equal(aggregate([update] * 2000, [1] * 2000), update)


def gradient_descent(clients, steps, learning_rate=0.1, trained=("body", "head"), start=None):
    """Full-batch gradient descent on ``digits_mlp``, derived by hand in float64: the oracle."""
    w = {
        name: tensor.double().numpy().copy()
        for name, tensor in (start or weights_at_the_start()).items()
    }
    x = np.concatenate([client.train_x for client in clients]).astype(float) / 16
    y = np.concatenate([client.train_y for client in clients])
    for _ in range(steps):
        hidden = np.maximum(x @ w["body.0.weight"].T + w["body.0.bias"], 0)
        logits = hidden @ w["head.weight"].T + w["head.bias"]
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        # softmax minus one-hot
        error = (error / error.sum(axis=1, keepdims=True) - np.eye(10)[y]) / len(y)
        below = (error @ w["head.weight"]) * (hidden > 0)
        gradients = {
            "head.weight": error.T @ hidden,
            "head.bias": error.sum(axis=0),
            "body.0.weight": below.T @ x,
            "body.0.bias": below.sum(axis=0),
        }
        for name, gradient in gradients.items():
            w[name] -= learning_rate * gradient * name.startswith(trained)
    return {name: torch.from_numpy(value).float() for name, value in w.items()}


def test_one_client_is_plain_sgd():
    run = train(clients=FOUR[:1], rounds=3, local_epochs=4, batch_size=1000, preprocessing=PIXELS)
    assert_close(run.final.state, gradient_descent(FOUR[:1], steps=12))


def test_one_full_batch_step_per_round_is_gradient_descent_on_all_samples_together():
    """FedSGD (McMahan et al. 2017, section 2): the weighted mean of one step each is one step on
    everything."""
    run = train(rounds=5, local_epochs=1, batch_size=1000, preprocessing=PIXELS)
    assert_close(run.final.state, gradient_descent(FOUR, steps=5))


@pytest.fixture
def spy(monkeypatch):
    """An architecture that writes down the rows it is trained on (their first feature), and on how
    many threads."""
    batches = []

    class Spy(models.SplitModel):
        def forward(self, x):
            if self.training and not x.is_meta:
                batches.append((x[:, 0].int().tolist(), torch.get_num_threads()))
            return super().forward(x)

    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))
    models.register("spy", input_shape=(64,), output_shape=(10,))(
        lambda: Spy(nn.Identity(), nn.Linear(64, 10))
    )
    return batches


def numbered(client_id, rows):
    """A client whose samples say which they are."""
    x = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 64, axis=1)
    return Client(client_id, x, Y[:rows], x[:2], Y[:2])


def test_every_sample_is_used_once_an_epoch_in_a_new_order_each_time(spy):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        twins = [numbered("a", 37), numbered("b", 37)]
        train(architecture="spy", clients=twins, rounds=1, local_epochs=3, preprocessing=UNSCALED)
    finally:
        torch.set_num_threads(threads)
    assert [len(rows) for rows, _ in spy] == [16, 16, 5] * 6
    epochs = [
        [row for rows, _ in spy[start : start + 3] for row in rows] for start in range(0, 18, 3)
    ]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6, "shuffled for each client and epoch"
    assert {threads for _, threads in spy} == {1}, "short steps are not shared out"


@pytest.mark.full
def test_the_default_training_takes_seconds():
    """20 clients, 10 rounds: 2 s of one quiet core. Processor time does not count what else the
    machine does, and on a core that is shared it is up to three times as much."""
    begin = time.process_time()
    training.train(progress=False)
    assert time.process_time() - begin < 20


def test_two_rounds_are_one_and_then_another():
    one, two = train(rounds=1), train(rounds=2)
    assert equal(one.final.state, two.rounds[0].state) and not equal(
        two.rounds[0].state, two.final.state
    )


def flowers(scale=1.0, shift=0.0):
    """Iris at four clients, in a unit of its own: ``scale`` 1 is centimetres."""
    x, y = load_iris(return_X_y=True)
    return make_clients(
        (x * scale + shift).astype(np.float32), y.astype(np.int64), num_clients=4, alpha=1.0
    )


def flower_model(scale, shift):
    sizes = {"sizes": [4, 16, 3]}
    return train(
        clients=flowers(scale, shift),
        rounds=20,
        architecture="mlp",
        parameters=sizes,
        local_epochs=5,
    ).final


@pytest.mark.parametrize(
    ("scale", "shift"),
    [
        (0.01, 0.0),
        (10.0, 0.0),
        (1e-6, 0.0),
        (1e6, 0.0),
        (1.0, 200.0),
        (0.01, -3.0),
        (np.array([1, 10, 0.01, 1e4]), 0),
    ],
    ids=[
        "metres",
        "millimetres",
        "tiny",
        "huge",
        "offset",
        "metres and offset",
        "a unit for each column",
    ],
)
def test_a_training_does_not_depend_on_the_unit_of_its_features(scale, shift):
    """Without a setting: in metres, iris was at chance, because a spread below 1 was taken for
    none."""
    centimetres = flower_model(scale=1.0, shift=0.0)
    same = flower_model(scale, shift)
    assert_close(same.state, centimetres.state, rtol=1e-2, atol=1e-3)
    metric = centimetres.metrics
    other = same.metrics
    assert metric["global_accuracy"] > 0.9
    samples = 45
    assert other["global_accuracy"] == pytest.approx(
        metric["global_accuracy"], abs=1.01 / samples
    ), "one sample"


@pytest.mark.parametrize("resolution", [1 / 16, None])
def test_digits_train_as_well_with_their_grey_levels_in_another_unit(resolution):
    """Equal where the unit's step is told (a division by 16 rounds nothing); a little else without
    it."""
    options = {"rounds": 5, "local_epochs": 2, "alpha": 1.0}
    usual = training.train(**options, progress=False).final.metrics
    clients = make_clients(X / 16, Y, alpha=options.pop("alpha"), resolution=resolution)
    other = training.train(**options, clients=clients, progress=False).final.metrics
    assert usual["global_accuracy"] > 0.8
    tolerance = {
        "mean_client_accuracy": 0.02,
        "global_accuracy": 0.02,
        "worst_client_accuracy": 0.15,
    }
    for name, value in usual.items():
        assert other[name] == pytest.approx(value, abs=1e-9 if resolution else tolerance[name])


# --- strategies -----------------------------------------------------------------------------------


def test_fedper_clients_share_the_body_and_keep_their_heads():
    run = train("fedper")
    heads = [run.final.personal[client.id] for client in FOUR]
    assert all(head.keys() == {"head.weight", "head.bias"} for head in heads)
    assert all(not equal(a, b) for i, a in enumerate(heads) for b in heads[:i])
    sizes = [len(client.train_y) for client in FOUR]
    assert_close(aggregate(heads, sizes), {name: run.final.state[name] for name in heads[0]})


def test_fedper_trains_on_from_each_clients_own_head():
    """With a learning rate that moves nothing, the heads of round 2 are those of round 1, not the
    average."""
    seen = {}

    def spread(client, number, update):
        if number == 1:
            update["head.bias"] += float(client[-2:])  # heads that can be told apart
        seen[client, number] = update["head.bias"].clone()
        return update

    train("fedper", corrupt=spread, learning_rate=1e-9)
    for client in FOUR:
        np.testing.assert_allclose(seen[client.id, 2], seen[client.id, 1], rtol=0, atol=1e-5)


def test_fedrep_trains_the_head_on_the_old_body_then_the_body_under_the_new_head():
    client = FOUR[:1]
    run = train("fedrep", clients=client, rounds=1, batch_size=1000, preprocessing=PIXELS)
    head_first = gradient_descent(client, steps=1, trained=("head",))
    wanted = gradient_descent(client, steps=1, trained=("body",), start=head_first)
    got = run.final.state | run.final.personal[client[0].id]
    assert_close(got, wanted)


def test_fine_tuned_heads_serve_but_never_reach_the_global_model():
    plain, tuned = train("fedavg", rounds=3), train("fedavg_ft", rounds=3)
    assert equal(plain.final.state, tuned.final.state)
    assert plain.final.personal == {} and set(tuned.final.personal) == {
        client.id for client in FOUR
    }
    body = tuned.final.model(FOUR[0].id).body.state_dict()
    assert equal(body, tuned.final.model().body.state_dict()), "only the head was tuned"
    loss = {}
    for which in (None, FOUR[0].id):
        module = tuned.final.model(which)
        mean, std = (torch.tensor(tuned.final.preprocessing[name]) for name in ("mean", "std"))
        rows = (torch.from_numpy(FOUR[0].train_x) - mean) / std
        loss[which] = nn.functional.cross_entropy(
            module(rows), torch.from_numpy(FOUR[0].train_y)
        ).item()
    assert loss[FOUR[0].id] < loss[None]


def test_local_clients_never_learn_from_each_other():
    # computed from all clients otherwise: the one thing that they share
    statistics = {"preprocessing": PIXELS}
    together, without = train("local", **statistics), train("local", clients=FOUR[:3], **statistics)
    assert together.final.personal[FOUR[0].id].keys() == together.final.state.keys()
    for client in FOUR[:3]:
        assert equal(together.final.personal[client.id], without.final.personal[client.id])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics_are_what_the_models_score_on_held_out_samples(strategy):
    result = train(strategy).final
    assert not result.model().training
    own = {
        client.id: accuracy(result.model(client.id), client, result.preprocessing)
        for client in FOUR
    }
    assert result.client_accuracy == pytest.approx(own)
    sizes = [len(client.test_y) for client in FOUR]
    pooled = np.average(
        [accuracy(result.model(), client, result.preprocessing) for client in FOUR], weights=sizes
    )
    assert result.metrics == pytest.approx(
        {
            "global_accuracy": pooled,
            "mean_client_accuracy": np.mean(list(own.values())),
            "worst_client_accuracy": min(own.values()),
        }
    )
    assert result.sample_counts == {client.id: len(client.train_y) for client in FOUR}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ["digits_cnn", "mlp"])
def test_every_strategy_trains_every_architecture(strategy, architecture):
    parameters = {"sizes": [64, 16, 12, 10]} if architecture == "mlp" else {}
    run = train(strategy, local_epochs=6, architecture=architecture, parameters=parameters)
    assert run.final.metrics["mean_client_accuracy"] > 0.25, "chance is 0.1"
    assert run.final.rejected == {}


# --- reproducibility, and manners -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg_ft", "fedrep"])
def test_a_seed_means_one_result(strategy):
    torch.manual_seed(1)
    first = train(strategy, seed=5)
    torch.manual_seed(2)
    again, other = train(strategy, seed=5), train(strategy, seed=6)
    assert (
        equal(first.final.state, again.final.state) and first.final.metrics == again.final.metrics
    )
    assert all(
        equal(first.final.personal[k], again.final.personal[k]) for k in first.final.personal
    )
    assert not equal(first.final.state, other.final.state)


def test_a_callback_can_change_nothing():
    def meddle(result):
        torch.rand(3)
        for tensor in (*result.state.values(), *result.personal[FOUR[0].id].values()):
            tensor.fill_(float("nan"))

    assert equal(train("fedper", rounds=3).rounds[1].state, train("fedper", rounds=2).final.state)
    meddled = train("fedper", rounds=3, on_round=lambda r: meddle(r) if r.number < 3 else None)
    assert equal(meddled.final.state, train("fedper", rounds=3).final.state)


def test_the_callers_random_state_threads_and_gradient_mode_stay():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = torch.get_rng_state()
        inside = []
        with torch.inference_mode():
            train()
        with torch.no_grad():
            run = train(
                on_round=lambda _: inside.append((torch.get_num_threads(), torch.is_grad_enabled()))
            )
        with pytest.raises(ZeroDivisionError):
            train(corrupt=lambda *_: 1 / 0)
        run.final.model()
        assert inside == [(2, False)] * 2
        assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
        assert torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)


def test_the_average_of_a_round_can_be_the_callers_own():
    def last(updates, counts):
        seen.append(counts)
        return updates[-1]

    seen = []
    run = train(rounds=1, average=last)
    assert seen == [list(run.final.sample_counts.values())]
    alone = train(
        rounds=1, corrupt=lambda client, _, update: update if client == FOUR[-1].id else None
    )
    assert all(
        torch.equal(tensor, alone.final.state[name]) for name, tensor in run.final.state.items()
    )


def test_a_failing_callback_ends_the_training_with_its_own_error():
    with pytest.raises(RuntimeError, match="disk full"):
        train(on_round=lambda _: (_ for _ in ()).throw(RuntimeError("disk full")))


def test_the_progress_bar_is_an_option(capsys):
    train(progress=False)
    assert capsys.readouterr().err == ""
    train("fedper", progress=True)
    shown = capsys.readouterr().err
    assert "fedper" in shown and "2/2" in shown and "mean=" in shown


def test_a_run_tells_its_rounds_as_a_table():
    run = train(
        "fedper", corrupt=lambda client, number, update: update if client != FOUR[0].id else None
    )
    frame = run.to_frame()
    assert frame.index.tolist() == [1, 2] and frame["rejected"].tolist() == [1, 1] == [
        4 - n for n in frame["accepted"]
    ]
    assert frame.loc[2, "global_accuracy"] == run.final.metrics["global_accuracy"]
    assert run.clients == FOUR and run.recipe.strategy == "fedper"


# --- faulty clients -------------------------------------------------------------------------------


def change(name, value):
    return lambda update: update | {name: value(update[name])}


FAULTS = {
    "nan": (
        change("head.bias", lambda t: t * float("nan")),
        "head.bias holds NaN or infinite values",
    ),
    "inf": (
        change("body.0.weight", lambda t: t.index_fill(0, torch.tensor(3), -float("inf"))),
        "body.0.weight holds",
    ),
    "shape": (
        change("head.weight", lambda t: t.T),
        r"head.weight is float32 [64, 10] strided on cpu, expected",
    ),
    "broadcastable shape": (change("head.bias", lambda t: t[:1]), "head.bias is float32 [1]"),
    "dtype": (change("head.bias", torch.Tensor.double), "head.bias is float64 [10]"),
    "sparse": (
        change("head.weight", torch.Tensor.to_sparse),
        "head.weight is float32 [10, 64] sparse_coo",
    ),
    "no memory": (change("head.weight", lambda t: t.to("meta")), "on meta"),
    "list": (change("head.bias", torch.Tensor.tolist), "head.bias is a list, not a tensor"),
    "missing": (
        lambda update: {"head.bias": update["head.bias"]},
        "missing tensors ['body.0.bias', 'body.0.weight',",
    ),
    "unknown": (lambda update: update | {"x" * 10_000: 1}, f"unknown ['{'x' * 40}']"),
    "renamed": (
        lambda update: {f"module.{n}": t for n, t in update.items()},
        "unknown ['module.body.0.bias'",
    ),
    "silent": (lambda update: None, "no state dict arrived, but NoneType"),
    "module": (lambda update: nn.Linear(1, 1), "no state dict arrived, but Linear"),
}


@pytest.mark.parametrize("strategy", ["fedavg", "fedper", "fedavg_ft"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_update_is_counted_and_the_round_goes_on_as_if_it_had_never_come(strategy, name):
    spoil, says = FAULTS[name]
    bad = FOUR[-1].id
    run = train(
        strategy, corrupt=lambda client, _, update: spoil(update) if client == bad else update
    )
    silent = train(strategy, corrupt=lambda client, _, update: None if client == bad else update)
    for result, wanted in zip(run.rounds, silent.rounds, strict=True):
        assert (
            list(result.rejected) == [bad]
            and says in result.rejected[bad]
            and len(result.rejected[bad]) < 300
        )
        assert equal(result.state, wanted.state) and bad not in result.sample_counts
        assert bad not in result.personal, "no head is taken from a client that was rejected"
        assert bad in result.client_accuracy, "it is served all the same, by the global model"
    assert all(tensor.isfinite().all() for tensor in run.final.state.values())


@pytest.fixture
def architecture(monkeypatch):
    """A registrar of architectures that are forgotten after the test."""
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))
    return models.register


class Normed(models.SplitModel):
    """What most networks look like: batch normalisation in the body."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 10)
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [17, 33, 2, 16])
def test_a_client_whose_last_batch_is_one_row_trains_under_batch_normalisation(
    architecture, strategy, rows
):
    """17 samples are a batch of 16 and one of 1, of which there are no statistics: a bare
    ValueError, once."""
    architecture("normed", input_shape=(64,), output_shape=(10,))(Normed)
    run = train(strategy, architecture="normed", clients=[numbered("odd", rows), *FOUR])
    assert all(result.rejected == {} for result in run.rounds)
    assert run.final.sample_counts["odd"] == rows


def test_a_last_batch_of_one_row_is_merged_under_batch_normalisation_only(architecture, spy):
    class NormedSpy(models.build("spy").__class__):
        def __init__(self):
            super().__init__(
                nn.Linear(64, 16), nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 10))
            )

    architecture("normed_spy", input_shape=(64,), output_shape=(10,))(NormedSpy)
    for name, sizes in (("spy", [16, 16, 1]), ("normed_spy", [16, 17])):
        spy.clear()
        train(architecture=name, clients=[numbered("a", 33)], rounds=1, preprocessing=UNSCALED)
        assert [len(rows) for rows, _ in spy] == sizes
        assert sorted(row for rows, _ in spy for row in rows) == list(range(33)), (
            "no sample is dropped"
        )


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_the_digits_partition_trains_under_batch_normalisation(architecture, alpha):
    architecture("normed", input_shape=(64,), output_shape=(10,))(Normed)
    run = training.train(
        architecture="normed", alpha=alpha, rounds=1, local_epochs=1, progress=False
    )
    sizes = [len(client.train_y) % 16 for client in run.clients]
    assert 1 in sizes, "some client's last batch is one row"
    assert run.final.rejected == {} and len(run.final.sample_counts) == 20


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "error",
    [ValueError("odd\nrows"), MemoryError(), RuntimeError("x" * 9999)],
    ids=["value", "memory", "long"],
)
def test_a_client_whose_training_raises_is_left_out_and_named(
    architecture, tmp_path, strategy, error
):
    """The others train as if it had said nothing, and its failure is in the version's note."""

    class Picky(nn.Linear):
        def forward(self, x):
            if self.training and not x.is_meta and (x[:, 0] == 77).any():
                raise error
            return super().forward(x)

    architecture("picky", input_shape=(64,), output_shape=(10,))(
        lambda: models.SplitModel(Picky(64, 16), nn.Linear(16, 10))
    )
    rows = FOUR[0].train_x.copy()
    rows[-1, 0] = 77
    bad = Client("bad", rows, FOUR[0].train_y, FOUR[0].test_x, FOUR[0].test_y)
    options = {"architecture": "picky", "clients": [*FOUR, bad], "preprocessing": UNSCALED}
    registry = Registry(tmp_path)
    run = train(strategy, on_round=publish_rounds(registry, "m"), **options)
    silent = train(strategy, **options | {"clients": FOUR})
    for result, wanted in zip(run.rounds, silent.rounds, strict=True):
        assert list(result.rejected) == ["bad"] and len(result.rejected["bad"]) <= 200
        assert (
            result.rejected["bad"].startswith(f"{type(error).__name__}: ")
            and "\n" not in result.rejected["bad"]
        )
        assert equal(result.state, wanted.state) and "bad" not in result.sample_counts
        assert "bad" in result.client_accuracy
    with registry:
        manifest = registry.manifest("m", 2)
    assert "bad rejected: " in manifest.note and manifest.lineage.extra["rejected_clients"] == 1


def test_when_the_training_of_every_client_raises_the_error_says_so(architecture):
    class Broken(models.SplitModel):
        def forward(self, x):
            if self.training and not x.is_meta:
                raise ValueError("no such thing")
            return super().forward(x)

    architecture("broken", input_shape=(64,), output_shape=(10,))(
        lambda: Broken(nn.Identity(), nn.Linear(64, 10))
    )
    with pytest.raises(
        ModelExecutionError, match=r"round 1: .*all 4 clients.*client-00.*ValueError: no such thing"
    ):
        train(architecture="broken")


def test_without_the_rejected_client_the_rest_is_averaged_by_hand():
    updates = {}

    def record(client, _, update):
        updates[client] = update
        return None if client == FOUR[1].id else update

    run = train(rounds=1, corrupt=record)
    others = [client for client in FOUR if client.id != FOUR[1].id]
    sizes = np.array([len(client.train_y) for client in others], float)
    for name, tensor in run.final.state.items():
        stacked = np.stack([updates[client.id][name].numpy() for client in others])
        np.testing.assert_allclose(
            tensor, np.average(stacked, axis=0, weights=sizes), rtol=1e-5, atol=1e-7
        )


def test_when_every_update_is_rejected_the_model_stays_and_the_round_says_so():
    run = train(rounds=3, corrupt=lambda _, number, update: update if number == 1 else {})
    assert [len(result.rejected) for result in run.rounds] == [0, 4, 4]
    assert equal(run.rounds[0].state, run.final.state) and run.final.sample_counts == {}
    assert run.final.metrics == run.rounds[0].metrics


def test_a_fault_in_one_round_is_forgiven_in_the_next_and_costs_no_head():
    run = train(
        "fedper", rounds=3, corrupt=lambda client, number, update: None if number == 2 else update
    )
    assert equal(run.rounds[0].personal[FOUR[0].id], run.rounds[1].personal[FOUR[0].id])
    assert not equal(run.rounds[1].personal[FOUR[0].id], run.final.personal[FOUR[0].id])
    assert [len(result.rejected) for result in run.rounds] == [0, 4, 0]


@pytest.mark.parametrize("faulty", [FOUR[0].id, FOUR[-1].id])
def test_one_clients_fault_changes_no_other_clients_update_or_head(faulty):
    def updates(spoil):
        seen = {}

        def watch(client, number, update):
            seen[client] = {name: tensor.clone() for name, tensor in update.items()}
            return spoil(update) if client == faulty else update

        return seen, train("fedavg_ft", rounds=1, corrupt=watch)

    fine, expected = updates(lambda update: update)
    # draws from the training's own generator
    noisy, run = updates(lambda update: (torch.rand(7), update)[1])
    assert all(equal(fine[client.id], noisy[client.id]) for client in FOUR)
    assert all(
        equal(expected.final.personal[client.id], run.final.personal[client.id]) for client in FOUR
    )


def test_a_training_that_diverges_is_refused_update_by_update():
    run = train(learning_rate=1e3, rounds=3, local_epochs=20)
    assert any(
        "NaN or infinite" in reason for result in run.rounds for reason in result.rejected.values()
    )
    assert all(tensor.isfinite().all() for tensor in run.final.state.values())


def test_sound_updates_have_no_fault():
    state = models.build("digits_cnn").state_dict()
    assert fault(dict(state), state) is None
    assert (
        fault({name: tensor.clone().requires_grad_() for name, tensor in state.items()}, state)
        is None
    )


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"strategy": "fedsgd"},
            "strategy is 'fedsgd': choose one of fedavg, fedavg_ft, fedper, fedrep, local",
        ),
        ({"strategy": None}, "strategy is None"),
        ({"rounds": 0}, r"rounds is 0: use an integer in \[1, 10000\]"),
        ({"rounds": 2.0}, r"rounds is 2\.0"),
        ({"rounds": True}, "rounds is True"),
        ({"local_epochs": 0}, "local_epochs is 0"),
        ({"batch_size": -16}, "batch_size is -16"),
        ({"learning_rate": 0}, "learning_rate is 0: use a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, r"seed is 0\.5"),
        ({"clients": None, "num_clients": 0}, "num_clients is 0"),
        ({"clients": None, "alpha": -1}, "alpha is -1"),
        ({"clients": []}, "at least one"),
        ({"clients": [FOUR[0], FOUR[0]]}, "unique ids"),
        ({"num_clients": 4}, "leave num_clients"),
        ({"alpha": 0.5}, "leave num_clients, alpha"),
        ({"permute_labels": True}, "permute_labels out"),
        ({"preprocessing": {"mean": [0.0] * 64}}, r"keys \['mean'\]"),
        ({"preprocessing": {"mean": [0.0] * 64, "std": [-1.0] * 64}}, "std holds -1"),
    ],
)
def test_bad_settings_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        train(**options)


def test_models_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))
    models.register("headless", input_shape=(64,), output_shape=(10,))(lambda: nn.Linear(64, 10))
    assert train(architecture="headless").final.metrics["mean_client_accuracy"] > 0.1
    for options, says in (
        (
            {"architecture": "tutorial_mlp"},
            r"maps rows \(32,\) to \(10,\): the clients' samples need \(64,\)",
        ),
        ({"architecture": "mlp", "parameters": {"sizes": [64, 9]}}, r"to \(10,\) or more"),
        ({"architecture": "mlp"}, "sizes"),
        (
            {"architecture": "headless", "strategy": "fedper"},
            "no weights in a submodule 'head', which 'fedper' trains",
        ),
        ({"architecture": "headless", "strategy": "fedavg_ft"}, "'head'"),
        (
            {"architecture": "mlp", "parameters": {"sizes": [64, 10]}, "strategy": "fedrep"},
            "submodule 'body'",
        ),
    ):
        with pytest.raises(InvalidModelError, match=says):
            train(**options)
    with pytest.raises(NotFoundError, match="digits_mlp"):
        train(architecture="resnet")
    with pytest.raises(InvalidInputError, match="the model takes 3"):
        train(preprocessing={"mean": [0.0] * 3, "std": [1.0] * 3})


def test_clients_of_your_own_and_a_model_of_your_own(monkeypatch):
    """Two classes, three features, a few blobs: nothing here knows about digits."""
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))

    @models.register("blobs", input_shape=(3,), output_shape=(2,))
    class Blobs(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU()),
                nn.Linear(8, 2),
            )

        def forward(self, x):
            return self.head(self.body(x))

    rng, clients = np.random.default_rng(0), []
    for name in ("north", "south"):
        y = rng.integers(0, 2, 64)
        x = (rng.standard_normal((64, 3)) + 4 * y[:, None]).astype(np.float32)
        clients.append(Client(name, x[:48], y[:48], x[48:], y[48:]))
    run = train("fedper", architecture="blobs", clients=clients, rounds=5, local_epochs=5)
    assert run.final.metrics["worst_client_accuracy"] > 0.9
    assert run.final.state["body.1.num_batches_tracked"] == 5 * 5 * 3, (
        "a counter is averaged as a whole number"
    )
    assert run.recipe.data == ""


# --- rounds become versions -----------------------------------------------------------------------


def test_every_round_becomes_a_version_with_its_lineage(tmp_path):
    with Registry(tmp_path) as registry:
        bad = FOUR[2].id
        run = train(
            seed=3,
            rounds=3,
            on_round=publish_rounds(registry, "digits", alias="latest"),
            corrupt=lambda client, number, update: None if (client, number) == (bad, 2) else update,
        )
        assert (
            registry.version_numbers("digits") == [1, 2, 3]
            and registry.resolve("digits", "latest") == 3
        )
        for result in run.rounds:
            artifact = registry.read("digits", result.number)
            manifest, lineage = artifact.manifest, artifact.manifest.lineage
            assert equal(dict(artifact.tensors), result.state)
            assert lineage.round == result.number
            assert lineage.parent_version == (result.number - 1 or None)
            assert (
                lineage.num_clients
                == len(lineage.sample_counts)
                == (3 if result.number == 2 else 4)
            )
            assert lineage.strategy == "fedavg" and lineage.extra["seed"] == 3
            assert lineage.extra["rejected_clients"] == len(result.rejected)
            assert manifest.metrics == result.metrics
            assert list(manifest.preprocessing.mean) == result.preprocessing["mean"]
            assert (bad in manifest.note) == (result.number == 2)
        again = publish_rounds(registry, "digits")
        second = train(rounds=1, on_round=again)
        assert registry.manifest("digits", 4).lineage.parent_version is None, (
            "a training from scratch has no parent"
        )
        assert second.final.number == 1 and registry.resolve("digits", "latest") == 3


def test_what_was_published_serves_with_the_accuracy_that_was_measured(tmp_path):
    from flserving import create_serving_pipeline

    run = train("fedavg", rounds=3)
    with create_serving_pipeline(run.final.model(), run.final.preprocessing) as server:
        for client in FOUR:
            answer = server.predict(client.test_x)
            right = np.mean(np.array(answer["predictions"]) == client.test_y)
            assert right == pytest.approx(run.final.client_accuracy[client.id])


# --- the bars of FEDERATED.md, 2.3 ----------------------------------------------------------------


def random_head_accuracy(run, draws=20):
    """The tutorial's personal layer: an untrained Linear(10, 10) on the logits. Mean over clients
    and draws."""
    module, rng = run.final.model(), torch.Generator().manual_seed(0)
    mean, std = (np.array(run.final.preprocessing[name], np.float32) for name in ("mean", "std"))
    scores = []
    for client in run.clients:
        with torch.no_grad():
            logits = module(torch.from_numpy((client.test_x - mean) / std))
        for _ in range(draws):
            weight, bias = (
                torch.rand(11, 10, generator=rng).sub(0.5).mul(2 / 10**0.5).split([10, 1])
            )
            answers = (logits @ weight.T + bias).argmax(1)
            scores.append((answers.numpy() == client.test_y).mean())
    return float(np.mean(scores))


def wrong_head_accuracy(run):
    """Everybody gets the neighbour's head."""
    ids = [client.id for client in run.clients]
    return np.mean(
        [
            accuracy(run.final.model(other), client, run.final.preprocessing)
            for client, other in zip(run.clients, ids[1:] + ids[:1], strict=True)
        ]
    )


def trained(strategies, partition, seed, rounds, preprocessing=None):
    """Runs by strategy, and the mean over clients of each at the end."""
    runs = {
        name: training.train(
            name, rounds=rounds, seed=seed, preprocessing=preprocessing, progress=False, **partition
        )
        for name in strategies
    }
    return runs, SimpleNamespace(
        **{name: run.final.metrics["mean_client_accuracy"] for name, run in runs.items()}
    )


def check_label_skew(seed, rounds, preprocessing=None):
    """20 clients, alpha 0.1. Also that a head must be trained, and must be the client's own."""
    runs, got = trained(
        ("fedavg", "fedavg_ft", "fedper"), {"alpha": 0.1}, seed, rounds, preprocessing
    )
    assert got.fedavg_ft >= 0.95 and got.fedavg_ft > got.fedavg
    assert got.fedper >= 0.88
    assert got.fedavg >= 0.857
    assert random_head_accuracy(runs["fedavg"]) <= 0.14
    assert wrong_head_accuracy(runs["fedper"]) <= got.fedper - 0.3
    return got


def check_concept_shift(seed, rounds, preprocessing=None):
    """20 clients, alpha 1, each naming the classes its own way: no global model can serve them."""
    runs, got = trained(
        ("fedavg", "fedper", "local"),
        {"alpha": 1.0, "permute_labels": True},
        seed,
        rounds,
        preprocessing,
    )
    assert got.fedper >= 0.87 and got.fedper > got.local
    assert got.local >= 0.84
    assert got.fedavg <= 0.24
    assert random_head_accuracy(runs["fedavg"]) <= 0.13
    assert wrong_head_accuracy(runs["fedper"]) <= got.fedper - 0.5
    return got


@pytest.mark.full
def test_the_bars_for_label_skew_in_ten_rounds():
    check_label_skew(seed=0, rounds=10)


@pytest.mark.full
def test_the_bars_for_concept_shift_in_ten_rounds():
    check_concept_shift(seed=0, rounds=10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("check", [check_label_skew, check_concept_shift])
def test_the_bars_in_thirty_rounds(check, seed):
    check(seed, rounds=30)


# Mean over clients, seeds 0 to 4, 30 rounds: FEDERATED.md, table of 2.3.
REFERENCE = {
    "label skew": (
        {"alpha": 0.1},
        {"fedavg": 0.898, "fedavg_ft": 0.967, "fedper": 0.949, "local": 0.940},
    ),
    "concept shift": ({"alpha": 1.0, "permute_labels": True}, {"fedper": 0.884, "local": 0.856}),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("setting", REFERENCE)
def test_the_reference_is_reproduced(setting):
    """With its normalisation (grey levels over 16) its figures come out, within three points.

    Two differences remain, both on purpose: held-out samples are drawn class by class, and the
    federated statistics that are the default learn faster, so that the global model ends above .93,
    the upper end of the reference.
    """
    partition, table = REFERENCE[setting]
    scores = [vars(trained(table, partition, seed, 30, PIXELS)[1]) for seed in range(5)]
    for strategy, wanted in table.items():
        assert np.mean([score[strategy] for score in scores]) == pytest.approx(wanted, abs=0.03), (
            strategy
        )
