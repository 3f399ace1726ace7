"""Notebook 08: who gains from a head, whose head is whose, what heads cost; and that each figure can be drawn."""

import numpy as np
import pandas as pd
import pytest
import torch

from flserving.federated import training
from flserving.federated.heads import fit_heads
from flserving.lab import figures_08 as figures
from flserving.lab import who_gains
from flserving.lab.checks import check_heads

SETTING = {"alpha": 100, "clients": 5, "samples": 20, "private": True}


@pytest.fixture(scope="module")
def run():
    """Clients with names of their own for the digits: no head but a client's own is right."""
    return training.train(
        "fedavg_ft", num_clients=6, rounds=2, alpha=1.0, permute_labels=True, local_epochs=2, progress=False
    )


@pytest.fixture(scope="module")
def matrix(run):
    return who_gains.head_matrix(run.final, run.clients)


def test_the_table_holds_every_setting_that_the_controls_reach():
    def steps(low, high, step):
        return range(low, high + 1, step)

    for alpha in who_gains.ALPHAS:
        for clients in steps(*who_gains.CLIENTS):
            for samples in steps(*who_gains.SAMPLES):
                for private in (False, True):
                    found = who_gains.looked_up(alpha, clients, samples, private)
                    assert list(found.index) == [who_gains.GLOBAL, *who_gains.METHODS.values()]
                    assert ((found >= 0) & (found <= 1)).all(axis=None)
                    assert (found["worst"] <= found["mean"]).all()
                    assert (found["gain"] + found["lose"] <= 1.001).all()  # rounded to three places
    with pytest.raises(KeyError):
        who_gains.looked_up(0.2, 5, 20, False)


def test_the_table_is_what_a_training_gives():
    fresh, stored = who_gains.measure(**SETTING), who_gains.looked_up(**SETTING)
    assert (fresh["mean"] - stored["mean"]).abs().max() < 0.05  # another processor may round otherwise
    assert (fresh.loc["FedPer", ["mean", "gain"]] > fresh.loc[who_gains.GLOBAL, ["mean", "gain"]] + 0.3).all()


def test_the_accuracies_are_those_of_the_round(run, matrix):
    own = who_gains.own_accuracy(run)
    assert own.mean() == pytest.approx(run.final.metrics["mean_client_accuracy"])
    np.testing.assert_allclose(matrix.diagonal(), own)
    shared = who_gains.global_accuracy(run)
    sizes = [len(client.test_y) for client in run.clients]
    assert np.average(shared, weights=sizes) == pytest.approx(run.final.metrics["global_accuracy"])


def test_the_matrix_is_what_each_head_says_of_each_clients_samples(run, matrix):
    x = torch.tensor((run.clients[1].test_x - run.final.preprocessing["mean"]) / run.final.preprocessing["std"])
    for whose in range(len(run.clients)):
        with torch.no_grad():
            answers = run.final.model(run.clients[whose].id)(x.float()).argmax(dim=1).numpy()
        assert matrix[1, whose] == pytest.approx((answers == run.clients[1].test_y).mean())


def test_own_and_others():
    matrix = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.0], [0.5, 0.1, 1.0]])
    found = who_gains.own_and_others(matrix)
    assert found == pytest.approx({"own head": 0.9, "the neighbour's": (0.1 + 0.0 + 0.5) / 3, "anybody's": 0.2})


def test_right_answers_come_to_the_same_accuracy(run):
    fitted = fit_heads(run)
    answers = who_gains.right_answers(run.final, run.clients, fitted.heads)
    for client in run.clients:
        splits = answers[client.id]
        for head, accuracy in (("own", fitted.accuracy), ("shared", fitted.global_accuracy)):
            held_out = np.concatenate([splits["held_out"][head], splits["later"][head]])
            assert held_out.mean() == pytest.approx(accuracy[client.id])
            assert len(splits["train"][head]) == len(client.train_y)


def test_the_measured_ways_agree_and_the_gathered_one_passes_the_exercise():
    features, weights = torch.randn(9, 64), torch.randn(5, 65, 10)
    slots = torch.tensor([0, 4, 4, 1, 2, 0, 3, 3, 4])
    modules = [figures._linear(weights[slot]) for slot in slots]
    one_by_one = figures.loop_over_heads(features, modules)
    torch.testing.assert_close(figures.gathered(features, weights, slots), one_by_one, atol=1e-4, rtol=1e-4)
    check_heads(figures.gathered)
    check_heads(lambda x, w, s: torch.einsum("nd,ndc->nc", x, w[s][:, :-1]) + w[s, -1])
    check_heads(lambda x, w, s: torch.vmap(lambda row, head: row @ head[:-1] + head[-1])(x, w[s]))
    check_heads(lambda x, w, s: torch.cat([x, torch.ones(len(x), 1)], 1)[:, None].bmm(w.index_select(0, s)).squeeze(1))


def test_costs_are_measured_for_every_corner():
    costs = figures.measure_heads((1, 4), (1, 10), repeats=2)
    assert list(costs.index) == [(1, 1), (1, 4), (10, 1), (10, 4)]
    assert set(costs.columns) == set(figures.WAYS) and (costs > 0).all(axis=None) and np.isfinite(costs).all(axis=None)


def test_every_figure_can_be_drawn(matrix):
    right = {who_gains.GLOBAL: np.array([0.1, 0.5, 1.0]), "FedPer": np.array([0.9, 0.9, 0.8])}
    drawn = figures.clients_figure({"one": right, "two": right})
    assert [ax.get_xlabel() for ax in drawn.axes] == ["accuracy (%)"] * 2
    table = who_gains.looked_up(**SETTING)
    drawn = figures.who_gains_figure(table)
    assert len(figures.who_gains_figure(table * 0).axes) == 2
    assert [ax.get_xlabel() for ax in drawn.axes] == ["accuracy (%)", "clients that it serves (%)"]
    gains = pd.DataFrame({"samples": [10, 20, 30], "gain": [0.1, -0.2, 0.0]})
    assert figures.gain_figure({"one": gains, "two": gains}).axes[1].get_title("left") == "two\n1 gain, 1 lose"
    assert len(figures.matrix_figure({"one": matrix, "two": matrix}).axes) == 3  # and the colours
    costs = pd.DataFrame(
        {way: [9.0, 90.0, 9.0, 90.0] for way in figures.WAYS},
        index=pd.MultiIndex.from_product([(1, 100_000), (1, 64)], names=["heads", "rows"]),
    )
    drawn = figures.cost_figure((costs, 1, 1))
    assert drawn.axes[0].get_title("left") == "1 head, 0.0026 MB"
    drawn = figures.cost_figure((costs, 100_000, 64))
    assert [ax.get_title("left") for ax in drawn.axes] == ["100,000 heads, 260 MB", "64 rows, clients at random"]
