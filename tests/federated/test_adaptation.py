"""Heads fitted afterwards: what they are worth on held-out samples, and that nothing else is
touched."""

import numpy as np
import pytest
import torch

from flserving.errors import ConfigError, InvalidInputError, InvalidModelError
from flserving.federated import train
from flserving.federated.data import Client, digits, make_clients
from flserving.federated.heads import fit_heads
from flserving.registry import Registry
from flserving.serving.config import ServingConfig
from flserving.serving.loader import RegistrySource, load_engine

LAYOUTS = ("head", "additive", "adapter")


@pytest.fixture(scope="module")
def skewed():
    return train("fedavg", rounds=10, alpha=0.1, seed=0, progress=False)


@pytest.fixture(scope="module")
def permuted():
    return train("fedavg", rounds=5, alpha=1.0, permute_labels=True, seed=0, progress=False)


def mean(accuracy):
    return sum(accuracy.values()) / len(accuracy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_heads_beat_the_global_model_on_skewed_clients(skewed, layout):
    """FEDERATED.md 2.3: fine-tuned heads and trained adapters beat it at every seed; the worst
    client gains too."""
    fitted = fit_heads(skewed, layout)
    assert fitted.metrics["mean_client_accuracy"] >= max(0.95, mean(fitted.global_accuracy) + 0.02)
    assert fitted.metrics["worst_client_accuracy"] >= min(fitted.global_accuracy.values()) + 0.05
    assert fitted.metrics == {
        "mean_client_accuracy": pytest.approx(mean(fitted.accuracy)),
        "worst_client_accuracy": min(fitted.accuracy.values()),
    }


def test_a_head_repairs_permuted_labels_and_an_adapter_only_some_of_it(permuted):
    results = {layout: fit_heads(permuted, layout) for layout in LAYOUTS}
    accuracy = {layout: mean(fitted.accuracy) for layout, fitted in results.items()}
    assert mean(results["head"].global_accuracy) <= 0.24
    assert accuracy["head"] >= 0.75 and accuracy["additive"] == pytest.approx(
        accuracy["head"], abs=0.01
    )
    assert 0.3 <= accuracy["adapter"] <= accuracy["head"] - 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_untrained_head_is_the_global_model(permuted, layout):
    fitted = fit_heads(permuted, layout, epochs=0)
    assert fitted.accuracy == pytest.approx(fitted.global_accuracy)
    assert permuted.final.metrics["mean_client_accuracy"] == pytest.approx(
        mean(fitted.global_accuracy)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_measured_is_what_is_served(skewed, layout, tmp_path):
    fitted, last = fit_heads(skewed, layout), skewed.final
    with Registry(tmp_path) as registry:
        registry.publish(
            "digits", last.state, architecture=last.recipe.architecture, preprocessing=last.preprocessing,
            heads=fitted.heads, metrics=fitted.metrics,
        )  # fmt: skip
        engine = load_engine(RegistrySource(registry, "digits"), "1", ServingConfig())
        for client in skewed.clients:
            slots, found = engine.personal.choose(client.id, len(client.test_y))
            answers = engine.personal.execute([(client.test_x, slots)])[0].arrays()["predictions"]
            assert found == "own" and (answers == client.test_y).mean() == pytest.approx(
                fitted.accuracy[client.id]
            )


def test_heads_know_the_model_that_they_were_fitted_on(skewed, tmp_path):
    fitted, last, before = fit_heads(skewed), skewed.final, skewed.rounds[-2]
    options = {
        "architecture": last.recipe.architecture,
        "preprocessing": last.preprocessing,
        "heads": fitted.heads,
    }
    with Registry(tmp_path) as registry:
        for result, word in ((last, "own"), (before, "stale")):
            version = registry.publish("digits", result.state, **options).version
            engine = load_engine(RegistrySource(registry, "digits"), str(version), ServingConfig())
            assert engine.personal.choose(skewed.clients[0].id, 1)[1] == word


def test_same_seed_same_heads_and_the_callers_random_state_stays(skewed):
    torch.manual_seed(5)
    expected = torch.rand(3)
    state = {name: tensor.clone() for name, tensor in skewed.final.state.items()}
    torch.manual_seed(5)
    first = fit_heads(skewed, epochs=2)
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(first.heads.weights, fit_heads(skewed, epochs=2).heads.weights)
    assert not np.array_equal(
        first.heads.weights, fit_heads(skewed, epochs=2, seed=1).heads.weights
    )
    assert all(torch.equal(tensor, skewed.final.state[name]) for name, tensor in state.items())


def test_clients_that_took_no_part_get_heads_too(skewed):
    others = make_clients(*digits(), num_clients=5, alpha=0.1, seed=99)
    fitted = fit_heads(skewed.final, clients=others, epochs=1)
    assert list(fitted.accuracy) == list(fitted.heads.clients) == [client.id for client in others]
    run = fit_heads(skewed, clients=others, epochs=1)
    assert np.array_equal(run.heads.weights, fitted.heads.weights)


def client(width=64, label=0, name="a"):
    x, y = np.zeros((2, width), np.float32), np.full(2, label, np.int64)
    return Client(name, x, y, x, y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clients": []}, ConfigError, "at least one"),
        ({"clients": [client(), client()]}, ConfigError, "unique ids"),
        ({"clients": [client(63)]}, InvalidInputError, "63 features"),
        ({"clients": [client(label=10)]}, InvalidInputError, "labels over 9"),
        ({"epochs": -1}, ConfigError, "epochs is -1"),
        ({"epochs": 1.5}, ConfigError, r"epochs is 1\.5"),
        ({"learning_rate": 0}, ConfigError, "learning_rate is 0"),
        ({"learning_rate": "fast"}, ConfigError, "learning_rate is 'fast'"),
        ({"learning_rate": float("nan")}, ConfigError, "learning_rate is nan"),
        ({"layout": "tail"}, InvalidModelError, "layout is 'tail'"),
    ],
    ids=range(10),
)
def test_what_cannot_be_fitted_is_refused(skewed, options, error, message):
    with pytest.raises(error, match=message):
        fit_heads(skewed, **options)


def test_a_round_alone_does_not_know_its_clients(skewed):
    with pytest.raises(ConfigError, match="at least one"):
        fit_heads(skewed.final)
