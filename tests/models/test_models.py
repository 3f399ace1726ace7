"""Architectures: the allow-list, its bounds, and the shapes that it promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from budget import examples
from flserving import models
from flserving.errors import ConflictError, FlservingError, InvalidModelError, NotFoundError

BUILT_IN = {
    "tutorial_mlp": ({}, (32,), (10,), 32 * 64 + 64 + 64 * 10 + 10),
    "digits_mlp": ({}, (64,), (10,), 64 * 64 + 64 + 64 * 10 + 10),
    "digits_cnn": ({}, (64,), (10,), (9 * 16 + 16) + (9 * 16 * 32 + 32) + (128 * 10 + 10)),
    "mlp": (
        {"sizes": [784, 512, 512, 10]},
        (784,),
        (10,),
        784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10,
    ),
}


@pytest.fixture
def allow_list(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_ins_have_the_stated_shapes_sizes_and_split(name):
    parameters, input_shape, output_shape, num_values = BUILT_IN[name]
    module = models.build(name, parameters)
    logits = module(torch.randn(3, *input_shape))
    assert logits.shape == (3, *output_shape) and logits.dtype == torch.float32
    assert models.signature(name, parameters) == (input_shape, output_shape)
    assert sum(tensor.numel() for tensor in module.state_dict().values()) == num_values
    assert {key.split(".")[0] for key in module.state_dict()} == {"body", "head"}
    assert isinstance(module.head, nn.Linear) and module.head.out_features == output_shape[0]
    assert name in models.names()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_output_is_the_heads_answer_to_the_body_and_leaves_the_input_alone(name):
    parameters, input_shape, _, _ = BUILT_IN[name]
    module = models.build(name, parameters)
    x = torch.randn(5, *input_shape)
    before = x.clone()
    assert torch.equal(
        module(x), nn.functional.linear(module.body(x), module.head.weight, module.head.bias)
    )
    assert torch.equal(x, before), "an in-place ReLU must never reach the caller's tensor"
    assert (module.body(x) >= 0).all(), "what the head sees has passed a ReLU"


def test_an_mlp_equals_matrix_products_by_hand():
    module = models.build("mlp", {"sizes": [4, 3, 2]})
    x = torch.randn(6, 4)
    w = module.state_dict()
    hidden = (x @ w["body.0.weight"].T + w["body.0.bias"]).clamp(min=0)
    torch.testing.assert_close(module(x), hidden @ w["head.weight"].T + w["head.bias"])


def test_an_mlp_of_two_sizes_is_a_linear_model():
    module = models.build("mlp", {"sizes": [4, 2]})
    x = torch.randn(6, 4)
    assert torch.equal(module(x), module.head(x))


def test_the_cnn_reads_pixels_in_rows():
    """A digit and the same digit moved by one column: a convolution sees the same shape, moved by
    one column."""
    image = torch.zeros(1, 8, 8)
    image[0, 3:5, 2] = 1.0
    convolved = models.build("digits_cnn").body[:2]
    left, right = convolved(image.reshape(1, 64)), convolved(image.roll(1, dims=2).reshape(1, 64))
    torch.testing.assert_close(left[..., :7], right[..., 1:])


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6))
@examples(30)
def test_any_valid_mlp_keeps_its_signature_on_the_meta_device(sizes):
    (inputs,), (outputs,) = models.signature("mlp", {"sizes": sizes})
    with torch.device("meta"):
        module = models.build("mlp", {"sizes": sizes})
        assert module(torch.empty(2, inputs)).shape == (2, outputs)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert (inputs, outputs) == (sizes[0], sizes[-1])


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "sizes"),
        ({"sizes": []}, r"\[\]"),
        ({"sizes": [4]}, r"\[4\]"),
        ({"sizes": [4, 0]}, r"\[4, 0\]"),
        ({"sizes": [4, -1]}, r"\[4, -1\]"),
        ({"sizes": [4.0, 2]}, r"4\.0"),
        ({"sizes": [True, 2]}, "True"),
        ({"sizes": "64"}, "64"),
        ({"sizes": {"a": 1}}, "integers"),
        ({"sizes": None}, "None"),
        ({"sizes": [4, 2], "depth": 3}, "depth"),
        ({"sizes": [1 << 20, 1 << 20]}, "1,099,512,676,352 values: the most is"),
        ({"sizes": [1 << 40, 2]}, "1099511627776"),
        ({"sizes": [2] * 100}, "64 integers"),
        ({"sizes": [2] * 100_000}, "characters of JSON"),
        ({"sizes": [4, float("nan")]}, "JSON"),
        ({"sizes": {4, 2}}, "JSON"),
        ({1: object()}, "JSON"),
    ],
)
@pytest.mark.parametrize("call", [models.build, models.signature])
def test_bad_parameters_are_refused_with_the_value_seen(call, parameters, says):
    with pytest.raises(InvalidModelError, match=says):
        call("mlp", parameters)


def test_deep_nesting_is_refused():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidModelError, match="JSON"):
        models.build("mlp", {"sizes": nested})


@pytest.mark.parametrize("name", ["resnet", "", "os.system", None, ["mlp"], 3])
@pytest.mark.parametrize("call", [models.build, models.signature])
def test_an_unknown_architecture_names_the_known_ones(call, name):
    with pytest.raises(
        NotFoundError, match=r"digits_cnn, digits_mlp, mlp, .*tutorial_mlp.*register"
    ):
        call(name)


def test_a_users_own_architecture(allow_list):
    @models.register("wide.v2", input_shape=(64,), output_shape=lambda width: (width,))
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(64, width)

    assert models.signature("wide.v2", {"width": 7}) == ((64,), (7,))
    assert isinstance(models.build("wide.v2", {"width": 7}), Wide)
    assert Wide(3).layer.out_features == 3, "the decorator gives the class back as it was"
    with pytest.raises(InvalidModelError, match="width"):
        models.build("wide.v2")


def test_running_a_cell_again_replaces_its_architecture_and_a_stranger_is_refused(allow_list):
    def define(width):
        @models.register("mine", input_shape=(4,), output_shape=(width,))
        def mine():
            return nn.Linear(4, width)

    define(2)
    assert models.signature("mine") == ((4,), (2,))
    define(3)
    assert models.signature("mine") == ((4,), (3,)), "nothing of the first definition is remembered"
    with pytest.raises(ConflictError, match=r"taken by .*architectures\.mlp"):
        models.register("mlp", input_shape=(1,), output_shape=(1,))(nn.Linear)


@pytest.mark.parametrize("name", ["", "Wide", "a/b", "-a", ".", "a" * 65, "a\n", "ä"])
def test_names_outside_the_alphabet_are_refused(allow_list, name):
    with pytest.raises(InvalidModelError, match="lower-case"):
        models.register(name, input_shape=(1,), output_shape=(1,))


@pytest.mark.parametrize(
    ("factory", "output_shape", "says"),
    [
        (lambda: nn.Linear(100, 100), (100,), "10,100 values: the most is 1,000"),
        (lambda: nn.BatchNorm1d(600, affine=False), (600,), "1,201 values"),  # buffers count too
        (lambda: "a string", (1,), "built a str"),
        (lambda: 1 / 0, (1,), "division by zero"),
        (lambda: nn.Linear(1, 1), (0,), r"declares the shape \(0,\)"),
        (lambda: nn.Linear(1, 1), [1], r"declares the shape \[1\]"),
        (lambda: nn.Linear(1, 1), lambda: None, "declares the shape None"),
    ],
)
def test_what_a_registered_architecture_may_not_do(allow_list, factory, output_shape, says):
    models.register("bad", input_shape=(1,), output_shape=output_shape, max_values=1000)(factory)
    with pytest.raises(InvalidModelError, match=says):
        models.build("bad")


def test_a_terabyte_is_refused_before_it_is_asked_for(allow_list):
    asked = []

    @models.register("huge", input_shape=(1,), output_shape=(1,))
    def huge():
        asked.append(torch.get_default_device().type)
        return nn.Linear(1 << 20, 1 << 18)

    with pytest.raises(FlservingError, match="max_values"):
        models.build("huge")
    assert asked == ["meta"]


def test_building_dry_runs_once_and_a_later_change_of_the_parameters_does_not_reach_in():
    models.architectures._dry_run.cache_clear()
    parameters = {"sizes": [5, 4, 3]}
    models.build("mlp", parameters)
    parameters["sizes"][0] = 6
    assert models.signature("mlp", parameters) == ((6,), (3,))
    models.build("mlp", {"sizes": (5, 4, 3)})  # a tuple is the same JSON
    assert models.architectures._dry_run.cache_info().misses == 2


def test_a_seed_gives_the_same_weights_and_the_dry_run_draws_nothing():
    models.architectures._dry_run.cache_clear()
    built = []
    for _ in range(2):  # the first time with a dry run, the second without
        torch.manual_seed(0)
        built.append(models.build("digits_mlp"))
    assert all(
        torch.equal(a, b) for a, b in zip(built[0].parameters(), built[1].parameters(), strict=True)
    )
