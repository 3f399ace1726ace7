"""Notebook 08: who gains from a head, whose head is whose, and other solutions that its checks must
let pass."""

import numpy as np
import pytest
import torch

from flserving.federated import training
from flserving.federated.heads import fit_heads
from flserving.lab.checks import check_fit_head, check_heads
from flserving.lab.federated import who_gains

SETTING = {"alpha": 100, "clients": 5, "samples": 20, "private": True}


@pytest.fixture(scope="module")
def run():
    """Clients with names of their own for the digits: no head but a client's own is right."""
    return training.train(
        "fedavg_ft",
        num_clients=6,
        rounds=2,
        alpha=1.0,
        permute_labels=True,
        local_epochs=2,
        progress=False,
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


@pytest.mark.full
def test_the_table_is_what_a_training_gives():
    fresh, stored = who_gains.measure(**SETTING), who_gains.looked_up(**SETTING)
    # another processor may round otherwise
    assert (fresh["mean"] - stored["mean"]).abs().max() < 0.05
    assert (
        fresh.loc["FedPer", ["mean", "gain"]] > fresh.loc[who_gains.GLOBAL, ["mean", "gain"]] + 0.3
    ).all()


def test_the_accuracies_are_those_of_the_round(run, matrix):
    own = who_gains.own_accuracy(run)
    assert own.mean() == pytest.approx(run.final.metrics["mean_client_accuracy"])
    np.testing.assert_allclose(matrix.diagonal(), own)
    shared = who_gains.global_accuracy(run)
    sizes = [len(client.test_y) for client in run.clients]
    assert np.average(shared, weights=sizes) == pytest.approx(run.final.metrics["global_accuracy"])


def test_the_matrix_is_what_each_head_says_of_each_clients_samples(run, matrix):
    x = torch.tensor(
        (run.clients[1].test_x - run.final.preprocessing["mean"]) / run.final.preprocessing["std"]
    )
    for whose in range(len(run.clients)):
        with torch.no_grad():
            answers = run.final.model(run.clients[whose].id)(x.float()).argmax(dim=1).numpy()
        assert matrix[1, whose] == pytest.approx((answers == run.clients[1].test_y).mean())


def test_own_and_others():
    matrix = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.0], [0.5, 0.1, 1.0]])
    found = who_gains.own_and_others(matrix)
    assert found == pytest.approx(
        {"own head": 0.9, "the neighbour's": (0.1 + 0.0 + 0.5) / 3, "anybody's": 0.2}
    )


def test_right_answers_come_to_the_same_accuracy(run):
    fitted = fit_heads(run)
    answers = who_gains.right_answers(run.final, run.clients, fitted.heads)
    for client in run.clients:
        splits = answers[client.id]
        for head, accuracy in (("own", fitted.accuracy), ("shared", fitted.global_accuracy)):
            held_out = np.concatenate([splits["held_out"][head], splits["later"][head]])
            assert held_out.mean() == pytest.approx(accuracy[client.id])
            assert len(splits["train"][head]) == len(client.train_y)


def test_other_products_than_the_solution_pass_the_exercise():
    check_heads(lambda x, w, s: torch.einsum("nd,ndc->nc", x, w[s][:, :-1]) + w[s, -1])
    check_heads(lambda x, w, s: torch.vmap(lambda row, head: row @ head[:-1] + head[-1])(x, w[s]))
    check_heads(
        lambda x, w, s: (
            torch.cat([x, torch.ones(len(x), 1)], 1)[:, None].bmm(w.index_select(0, s)).squeeze(1)
        )
    )


def test_autograd_passes_the_exercise():
    def by_autograd(features, labels, shared, pull, rate, steps):
        head = shared.clone().requires_grad_()
        for _ in range(steps if len(labels) else 0):
            loss = torch.nn.functional.cross_entropy(features @ head[:-1] + head[-1], labels)
            loss = loss + pull / 2 * (head - shared).square().sum()
            (gradient,) = torch.autograd.grad(loss, head)
            head = (head - rate * gradient).detach().requires_grad_()
        return head.detach()

    check_fit_head(by_autograd)
