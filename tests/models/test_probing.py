"""Only what answers each row by itself may serve: rows that see each other, single logits, shapes
that do not fit."""

import numpy as np
import pytest
import torch
from torch import nn

from flserving import (
    InferenceEngine,
    ModelServer,
    Registry,
    ServingConfig,
    create_serving_pipeline,
    models,
)
from flserving.edge import EdgeModelServer
from flserving.errors import InvalidModelError, ModelExecutionError
from flserving.federated import train
from flserving.federated.data import Client
from flserving.models.probing import TOLERANCE, check_rows, probe_rows, tolerance_of
from flserving.registry import validation
from flserving.serving.loader import RegistrySource, load_engine


class Does(nn.Module):
    """A linear layer, and a function after it; ``flserving`` never sees more of a model than
    this."""

    def __init__(self, what, inputs=4, outputs=3):
        super().__init__()
        self.linear, self.what = nn.Linear(inputs, outputs), what

    def forward(self, x):
        return self.what(self, x)


class Recurrent(nn.Module):
    """An LSTM over [N, 4] takes the batch for one sequence: each row sees those before it."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Looking(nn.Module):
    """Attention over the batch."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class AlwaysTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(
            nn.functional.batch_norm(x, None, None, training=len(x) > 1) if len(x) > 1 else x
        )


class Remembers(nn.Module):
    """The last caller's rows are in the next one's answer."""

    def __init__(self):
        super().__init__()
        self.linear, self.register = nn.Linear(4, 3), 0.0

    def forward(self, x):
        values = self.linear(x) + self.register
        self.register = float(values.mean())
        return values


def quantised(x, largest):
    """As torch's dynamic quantisation does: one scale for the whole batch."""
    scale = largest.clamp(1e-6) / 127
    return (x / scale).round() * scale


SEE_EACH_OTHER = {
    "an LSTM over the batch": Recurrent,
    "attention over the batch": Looking,
    "softmax over dimension 0": lambda: Does(lambda m, x: m.linear(x).softmax(0)),
    "the batch's mean": lambda: Does(lambda m, x: m.linear(x - x.mean(0))),
    "the batch's largest": lambda: Does(lambda m, x: m.linear(x / x.abs().max().clamp(1e-6))),
    "the first row": lambda: Does(lambda m, x: m.linear(x - x[:1])),
    "the row before": lambda: Does(lambda m, x: m.linear(x + 0.1 * x.roll(1, 0))),
    "sorted over dimension 0": lambda: Does(lambda m, x: m.linear(x).sort(0).values),
    "statistics of the batch": AlwaysTraining,
    "only where a row is large": lambda: Does(
        lambda m, x: m.linear(x - x.mean(0) if x.abs().max() > 20 else x)
    ),
    "only among small rows": lambda: Does(
        lambda m, x: m.linear(x - x.mean(0) if x.abs().max() <= 1 else x)
    ),
    "the batch's size": lambda: Does(lambda m, x: m.linear(x) + len(x)),
    "an int8 scale of the whole batch": lambda: Does(
        lambda m, x: m.linear(quantised(x, x.abs().max()))
    ),
}


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path) as registry:
        yield registry


@pytest.fixture
def allow_list(monkeypatch):
    monkeypatch.setattr(models.architectures, "_known", dict(models.architectures._known))


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SEE_EACH_OTHER[kind]()


@pytest.mark.parametrize("kind", SEE_EACH_OTHER)
def test_a_module_whose_rows_see_each_other_is_not_loaded(kind):
    with (
        ModelServer() as server,
        pytest.raises(InvalidModelError, match=r"its rows see each other.*dimension 0"),
    ):
        server.load_model("v1", made(kind), num_features=4)


@pytest.mark.parametrize("kind", SEE_EACH_OTHER)
def test_a_model_whose_rows_see_each_other_is_neither_published_nor_loaded(
    kind, registry, allow_list, monkeypatch
):
    outputs = made(kind)(torch.zeros(2, 4)).shape[1:]
    models.register("sees", input_shape=(4,), output_shape=tuple(outputs))(lambda: made(kind))
    with pytest.raises(InvalidModelError, match="its rows see each other"):
        registry.publish("m", made(kind), architecture="sees")
    assert registry.models() == []
    # by a flserving that did not look
    monkeypatch.setattr(validation, "_check_service", lambda *_: None)
    registry.publish("m", made(kind), architecture="sees")
    with pytest.raises(ModelExecutionError, match="version '1': its rows see each other"):
        load_engine(RegistrySource(registry, "m"), "1", ServingConfig(warmup_samples=0))


@pytest.mark.parametrize(
    "what",
    [lambda m, x: m.linear(x) + torch.rand(1), lambda m, x: m.linear(nn.functional.dropout(x))],
)
def test_random_answers_and_state_are_told_apart_from_rows_that_see_each_other(what):
    with pytest.raises(InvalidModelError, match="otherwise each time"):
        check_rows(Does(what), (4,))
    with pytest.raises(InvalidModelError, match="otherwise each time"):
        check_rows(Remembers(), (4,))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (
            lambda m, x: m.linear(x.reshape(1, 4)),
            r"answers a row alone, but not 8 at once.*first dimension must be the b",
        ),
        (lambda m, x: m.linear(x).sum(0), "one row of outputs each"),
        (lambda m, x: m.linear(x)[:1], "one row of outputs each"),
        (
            lambda m, x: m.linear(x)[:, : len(x)],
            "the shape of a row's outputs depends on the other rows",
        ),
    ],
)
def test_one_row_of_outputs_for_each_row_of_any_batch(what, reason):
    with pytest.raises(InvalidModelError, match=reason):
        check_rows(Does(what), (4,))


def overflown(*ends):
    """Sums that overflow: which of ``ends`` they give depends on how many rows there are, as it
    does with real ones."""
    return lambda module, x: module.linear(x) * 0 + ends[len(x) % len(ends)]


@pytest.mark.parametrize(
    "ends", [(torch.inf, -torch.inf), (torch.nan, torch.inf, -torch.inf), (3e38, torch.inf)]
)
def test_how_a_sum_overflows_says_nothing_of_other_rows(ends):
    check_rows(Does(overflown(*ends)), (4,))


@pytest.mark.parametrize("ends", [(1.0, torch.inf), (torch.nan, 0.0), (0.0, 3e38)])
def test_overflow_that_comes_with_other_rows_is_refused(ends):
    with pytest.raises(InvalidModelError, match="rows see each other"):
        check_rows(Does(overflown(*ends)), (4,))


def only_whole(module, x):
    """Word numbers; of a fraction none, which the embedding refuses."""
    return x.long().where(x == x.long(), -9)


GOOD = {
    "linear": lambda: nn.Linear(4, 3),
    "zeros": lambda: Does(lambda m, x: m.linear(x) * 0),
    "infinite": lambda: Does(lambda m, x: m.linear(x).masked_fill(x[:, :3] > 0, -torch.inf)),
    "none is a number": lambda: Does(lambda m, x: m.linear(x) * torch.nan),
    "not a number": lambda: Does(lambda m, x: m.linear(x).log()),
    "overflows": lambda: Does(lambda m, x: m.linear(x * 1e3).exp()),
    "all but cancels": lambda: Does(lambda m, x: (m.linear(x) + 1e3) - 1e3),
    "small numbers": lambda: Does(lambda m, x: m.linear(x) * 1e-12),
    "half precision": lambda: Does(lambda m, x: m.linear(x.half()).float()).half(),
    "bfloat16": lambda: Does(lambda m, x: m.linear(x.bfloat16()).float()).bfloat16(),
    "word numbers": lambda: nn.Sequential(Does(only_whole), nn.Embedding(2, 3), nn.Flatten()),
    "in place": lambda: Does(lambda m, x: m.linear(x.mul_(2))),
    "a sequence in each row": lambda: Does(lambda m, x: x.sort(1).values - x.mean(1, keepdim=True)),
    "BatchNorm in evaluation": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval(),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8)),
    "deep": lambda: nn.Sequential(*(60 * [nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()])),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("seed", range(3))
def test_what_answers_each_row_by_itself_passes(kind, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = GOOD[kind]()
    check_rows(module, (64,) if kind == "deep" else (4,), tolerance_of(module))


@pytest.mark.parametrize("seed", range(5))
def test_rounding_stays_a_hundred_times_under_the_tolerance(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wide = models.build("mlp", {"sizes": [784, 512, 512, 10]})
    check_rows(wide, (784,), TOLERANCE / 100)


def test_the_probe_is_always_the_same_and_no_row_is_like_another():
    rows = probe_rows((4,))
    probe_rows.cache_clear()
    assert torch.equal(rows, probe_rows((4,)))
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_a_version_is_probed_once_in_a_process_and_again_when_its_code_is_registered_anew(
    registry, allow_list
):
    calls = []

    def factory():
        return Does(lambda m, x: calls.append(len(x)) or m.linear(x))

    for _ in range(2):
        models.register("counted", input_shape=(4,), output_shape=(3,))(factory)
        registry.publish("m", factory(), architecture="counted")
        source, version = RegistrySource(registry, "m"), registry.version_numbers("m")[-1]
        config = ServingConfig(warmup_samples=0)
        calls.clear()
        load_engine(source, str(version), config)
        assert sum(calls) == 16, "the rows of one probe"
        load_engine(source, str(version), config)
        assert sum(calls) == 16
    models.register("counted", input_shape=(4,), output_shape=(3,))(factory)
    load_engine(source, str(version), config)
    assert sum(calls) == 32


# One logit


def test_a_classifier_with_one_logit_is_refused_at_every_door(registry):
    """It would answer class 0 with confidence 1.0 to everything."""
    told = "one output.*two outputs.*output_type='regression'"
    with pytest.raises(InvalidModelError, match=told):
        create_serving_pipeline(nn.Linear(4, 1))
    with ModelServer() as server:
        with pytest.raises(InvalidModelError, match=told):
            server.load_model("v1", nn.Linear(4, 1))
        server.load_model("v1", nn.Linear(4, 1), output_type="regression")
        assert server.predict([0.0] * 4).keys().isdisjoint({"confidences", "probabilities"})
    with pytest.raises(ModelExecutionError, match=told):
        InferenceEngine(nn.Linear(4, 1)).predict([0.0] * 4)
    one = {"architecture": "mlp", "parameters": {"sizes": [4, 1]}}
    with pytest.raises(InvalidModelError, match=told):
        registry.publish("m", models.build("mlp", one["parameters"]), **one)
    with EdgeModelServer() as edge, pytest.raises(InvalidModelError, match=told):
        edge.update_global(models.build("mlp", one["parameters"]), **one)
    with pytest.raises(InvalidModelError, match=r"\(2,\) or more"):
        train(rounds=1, **one, progress=False, clients=binary_clients())


def test_one_logit_that_was_published_before_is_not_loaded(registry, monkeypatch):
    monkeypatch.setattr(validation, "_check_service", lambda *_: None)
    monkeypatch.setattr(validation, "ONE_OUTPUT", "")
    one = {"architecture": "mlp", "parameters": {"sizes": [4, 1]}}
    registry.publish("m", models.build("mlp", one["parameters"]), output_type="regression", **one)
    source = RegistrySource(registry, "m")
    parts = source.parts("1")
    parts.postprocessor.output_type = "classification"
    monkeypatch.setattr(source, "parts", lambda version: parts)
    with pytest.raises(ModelExecutionError, match="two outputs"):
        load_engine(source, "1", ServingConfig())


def binary_clients():
    source = np.random.default_rng(0)
    x = source.standard_normal((40, 4), dtype=np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    return [Client(name, x[:30], y[:30], x[30:], y[30:]) for name in "ab"]


# An alias moves to what answers


def test_publish_with_an_alias_tries_an_answer_before_the_alias_moves(registry, allow_list):
    @models.register("picky", input_shape=(4,), output_shape=(3,))
    class Picky(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)

        def forward(self, x):
            return super().forward(x).log()

    good = models.build("mlp", {"sizes": [4, 3]})
    registry.publish("m", good, architecture="mlp", parameters={"sizes": [4, 3]}, alias="default")
    silent = Picky()
    with torch.no_grad():
        silent.bias.fill_(-1)
    with pytest.raises(InvalidModelError, match="not finite"):
        registry.publish("m", silent, architecture="picky", alias="default")
    assert registry.aliases("m") == {"default": 1} and registry.version_numbers("m") == [1]


def test_outputs_must_have_the_shape_that_is_declared(registry, allow_list):
    models.register("liar", input_shape=(4,), output_shape=(5,))(lambda: nn.Linear(4, 3))
    with pytest.raises(
        InvalidModelError, match=r"declares outputs of shape \[5\] a row and answers \[3\]"
    ):
        registry.publish("m", nn.Linear(4, 3), architecture="liar")
