"""Confidence masking: what each policy leaves of the outputs, which policies are narrower, and
which do not exist."""

import itertools

import numpy as np
import pytest

from flserving.errors import ConfigError, ForbiddenError
from flserving.models.masking import FULL, OUTPUTS, OutputPolicy, by_role

POLICIES = ("full", "top-3", "top-1", "rounded-3", "rounded-1", "label")


def outputs(rows=50, classes=6, seed=0):
    logits = np.random.default_rng(seed).normal(size=(rows, classes), scale=2)
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    return {
        "predictions": probabilities.argmax(1),
        "confidences": probabilities.max(1),
        "probabilities": probabilities,
    }


def by_hand(policy, given):
    """The oracle, row by row in plain Python."""
    if policy == "label":
        return {"predictions": given["predictions"].tolist()}
    shown = {name: given[name].tolist() for name in OUTPUTS}
    kind, _, number = policy.partition("-")
    if kind == "top":
        for row in shown["probabilities"]:
            for place in sorted(range(len(row)), key=lambda place, row=row: row[place])[
                : -int(number)
            ]:
                row[place] = 0.0
    if kind == "rounded":
        shown["confidences"] = [round(value, int(number)) for value in shown["confidences"]]
        shown["probabilities"] = [
            [round(value, int(number)) for value in row] for row in shown["probabilities"]
        ]
    return shown


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_shows_what_its_name_says(policy):
    given = outputs()
    wanted = by_hand(policy, given)
    for arrays in (True, False):
        shown = OutputPolicy.parse(policy).shown(given, arrays)
        assert shown.pop("outputs") == policy
        assert shown.keys() == wanted.keys()
        for name, values in wanted.items():
            assert type(shown[name]) is (np.ndarray if arrays else list)
            np.testing.assert_allclose(shown[name], values, atol=1e-7)
    assert OutputPolicy.parse(policy).shown(given, True)["predictions"] is given["predictions"]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_masked_is_not_the_models_own_array(policy):
    given = outputs()
    before = {name: array.copy() for name, array in given.items()}
    OutputPolicy.parse(policy).shown(given, True)
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])


def test_the_types_on_the_wire_stay_what_the_metadata_say():
    for policy in POLICIES:
        shown = OutputPolicy.parse(policy).shown(outputs(), True)
        assert {shown[name].dtype for name in OUTPUTS[1:] if name in shown} <= {
            np.dtype(np.float32)
        }


def test_of_equal_probabilities_exactly_k_are_shown_and_the_first_is_the_predictions():
    even = {"predictions": np.array([0]), "probabilities": np.full((1, 4), 0.25, np.float32)}
    assert OutputPolicy.parse("top-2").shown(even, False)["probabilities"] == [[0.25, 0.25, 0, 0]]


def test_more_classes_than_there_are_mask_nothing():
    given = outputs(classes=3)
    shown = OutputPolicy.parse("top-9").shown(given, True)
    np.testing.assert_array_equal(shown["probabilities"], given["probabilities"])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_values_of_a_regression_are_never_masked(policy):
    values = {"predictions": np.array([0.123456, 9.87654], np.float32)}
    assert OutputPolicy.parse(policy).shown(values, True)["predictions"] is values["predictions"]


NARROWER = {  # policy -> what a caller with it may ask for
    "full": {*POLICIES},
    "top-3": {"top-3", "top-1", "label"},
    "top-1": {"top-1", "label"},
    "rounded-3": {"rounded-3", "rounded-1", "label"},
    "rounded-1": {"rounded-1", "label"},
    "label": {"label"},
}


@pytest.mark.parametrize(("policy", "asked"), [*itertools.product(POLICIES, POLICIES)])
def test_only_what_shows_no_more_can_be_asked_for(policy, asked):
    own = OutputPolicy.parse(policy)
    if asked in NARROWER[policy]:
        assert own.narrowed(asked) == OutputPolicy.parse(asked)
    else:
        with pytest.raises(
            ForbiddenError,
            match=rf"^outputs='{asked}' shows more than '{policy}', the most here: ask",
        ):
            own.narrowed(asked)


BAD = [
    "",
    "FULL",
    "labels",
    "top",
    "top-0",
    "top--1",
    "top-1.5",
    "rounded-0",
    "rounded-7",
    "label ",
    "full\n",
    None,
    3,
]


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_what_does_not_exist_is_refused_and_all_are_named(name):
    for refused in (
        lambda: OutputPolicy.parse(name),
        lambda: by_role(name),
        lambda: FULL.narrowed(name),
    ):
        with pytest.raises(
            ConfigError, match=r"no policy .*: choose full, label, top-K .* or rounded-D"
        ):
            refused()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("full", ("full", "full", "full")),
        ("label", ("label", "label", "label")),
        ("infer=label", ("full", "label", "full")),
        ("infer=top-1,admin=rounded-2", ("full", "top-1", "rounded-2")),
        ("label,admin=full", ("label", "label", "full")),
        ("infer=label,full", ("full", "label", "full")),
        ("admin=full,label", ("label", "label", "full")),
    ],
)
def test_each_role_gets_its_policy(text, wanted):
    found = by_role(text)
    assert tuple(found[role].name for role in ("", "infer", "admin")) == wanted


@pytest.mark.parametrize(
    "text", ["infer=label,infer=top-2", "label,full", "infer=label,admin=full,infer=label"]
)
def test_of_two_policies_for_one_role_none_is_guessed(text):
    with pytest.raises(ConfigError, match=r"two policies for (infer|all roles): leave one"):
        by_role(text)


def test_rounding_hides_no_class_however_many_there_are():
    even = {"predictions": np.array([0]), "probabilities": np.full((1, 20_000), 5e-5, np.float32)}
    assert (
        np.count_nonzero(OutputPolicy.parse("rounded-5").shown(even, True)["probabilities"])
        == 20_000
    )


@pytest.mark.parametrize(
    "text", ["read=label", "guest=full", "Infer=label", "infer=label,root=full"]
)
def test_a_role_that_cannot_infer_has_no_policy(text):
    with pytest.raises(ConfigError, match=r"^outputs: no role '.+' to infer: write infer=POLICY"):
        by_role(text)
