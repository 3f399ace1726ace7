"""Membership inference: the attacks against what theory says of them, then against a real server
under each policy."""

import math

import numpy as np
import pytest
import torch

from flserving.lab.alt import described
from flserving.lab.federated.membership import (
    POLICIES,
    asked,
    evidence,
    membership_figure,
    membership_table,
    threshold_attack,
    trained,
)

MANY = 40_000
MEMBERS = np.arange(MANY) < MANY // 2


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0, 2.0])
def test_two_normals_are_told_apart_as_often_as_theory_says(apart):
    """Of unit normals at a distance d the best threshold is right with probability Phi(d / 2)."""
    rng = np.random.default_rng(int(10 * apart))
    found = rng.normal(size=MANY) + apart * MEMBERS
    best = 0.5 * (1 + math.erf(apart / 2 / math.sqrt(2)))
    assert threshold_attack(found, MEMBERS) == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize(
    ("on_members", "on_others"), [(1.0, 0.7), (0.9, 0.6), (1.0, 1.0), (0.8, 0.8)]
)
def test_with_labels_alone_it_is_as_good_as_the_gap(on_members, on_others):
    """Yeom et al. 2018: guessing "member" where the label is right is right in 1/2 + gap/2 of the
    cases."""
    share = np.where(MEMBERS, on_members, on_others)
    right = np.random.default_rng(3).random(MANY) < share
    gap = right[MEMBERS].mean() - right[~MEMBERS].mean()
    assert threshold_attack(right.astype(float), MEMBERS) == pytest.approx(0.5 + gap / 2, abs=0.01)


def test_the_threshold_is_not_chosen_on_the_rows_that_are_guessed():
    """Evidence that says everything of the known rows and nothing of the others wins nothing."""
    rng = np.random.default_rng(0)
    known = np.arange(MANY) % 2 == 0
    found = np.where(known, MEMBERS + 0.0, rng.random(MANY))
    assert threshold_attack(found, MEMBERS) == pytest.approx(0.5, abs=0.01)


def test_evidence_is_what_is_shown_of_the_true_label():
    y = np.array([1, 0])
    answer = {"predictions": np.array([1, 1]), "probabilities": np.array([[0.2, 0.8], [0.0, 0.9]])}
    assert evidence(answer, y).tolist() == [0.8, 0.0], "what is masked counts as 0"
    assert evidence({"predictions": answer["predictions"]}, y).tolist() == [1, 0]


@pytest.fixture(scope="module")
def target():
    return trained(0.0, members=100, epochs=50)


def test_an_attacker_sees_what_the_policy_of_his_credential_shows(target):
    answers = asked(target)
    assert answers.keys() == {*POLICIES}
    inputs = (target.x - target.statistics["mean"]) / target.statistics["std"]
    with torch.inference_mode():
        own = torch.softmax(target.model(torch.from_numpy(inputs)), 1).numpy()
    np.testing.assert_allclose(answers["full"]["probabilities"], own, atol=1e-4)
    assert (np.count_nonzero(answers["top-3"]["probabilities"], axis=1) <= 3).all()
    assert "probabilities" not in answers["label"]
    for policy in POLICIES:
        np.testing.assert_array_equal(
            answers[policy]["predictions"], answers["full"]["predictions"]
        )


@pytest.fixture(scope="module")
def table():
    return membership_table(seeds=range(2))


def test_masking_takes_a_part_of_what_the_attack_learns_and_weight_decay_nearly_all(table):
    heart, decayed = table.loc[0.0], table.loc[0.1]
    assert heart["members"].min() > 99 and heart["attack"]["full"] > 75, (
        "it has learned its members by heart"
    )
    assert heart["attack"]["top-1"] > heart["attack"]["full"] - 3, (
        "the likeliest class is nearly all of the evidence"
    )
    assert heart["attack"]["full"] - 5 > heart["attack"]["rounded-1"] > heart["attack"]["label"]
    gap = heart["members"]["label"] - heart["others"]["label"]
    assert (
        heart["attack"]["label"] == pytest.approx(50 + gap / 2, abs=4)
        and heart["attack"]["label"] > 57
    )
    assert (decayed["attack"] < heart["attack"]["label"]).all(), (
        "no policy does as much as a model that learned less"
    )
    assert decayed["others"].mean() > heart["others"].mean() - 3, (
        "and it costs no accuracy on new rows"
    )


def test_the_figure_says_what_is_in_the_table(table):
    fig = membership_figure(table)
    (ax,) = fig.axes
    widths = [bar.get_width() for bars in ax.containers for bar in bars]
    assert widths == pytest.approx(table["attack"].tolist())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [*POLICIES]
    words = described(fig)
    assert "%" in words and "weight decay 0.1" in words and "a coin" in words and "label" in words
