"""InferenceEngine: the contract's keys, the caller's module untouched, a batch equal to its rows,
exact steps."""

import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from budget import examples
from flserving import InferenceEngine, Postprocessor, Preprocessor, ServingConfig, models
from flserving.errors import ConfigError, InvalidInputError, InvalidModelError, ModelExecutionError
from flserving.models.modules import copy_of, lean
from flserving.serving.engine import Prediction

KEYS = ["predictions", "confidences", "probabilities", "latency_ms", "model_version", "model_type"]


def rows_of(count: int, features: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, features)).astype(np.float32)


def module(name: str = "tutorial_mlp", **parameters: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, parameters)


class Spy(nn.Module):
    """Notes the sizes of its batches and gives every row its own number back: logits [x, -x]."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return torch.stack([x[:, 0], -x[:, 0]], 1)


class Gives(nn.Module):
    """Answers with whatever a function makes of the rows."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


def spied(
    preprocessor: Preprocessor | None = None, **options: Any
) -> tuple[InferenceEngine, list[int]]:
    settings = {
        name: options.pop(name) for name in ("max_batch_size", "warmup_samples") if name in options
    }
    engine = InferenceEngine(Spy(), preprocessor, config=ServingConfig(**settings), **options)
    return engine, engine.model.sizes


class Clock:
    """Every look takes a second."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def __call__(self) -> float:
        return float(next(self.ticks))


# The contract


def test_a_classification_answers_with_the_contracts_keys_as_plain_python():
    model = module()
    answer = InferenceEngine(model, version="v7").predict(rows_of(3, 32))
    assert list(answer) == KEYS and (answer["model_version"], answer["model_type"]) == (
        "v7",
        "global",
    )
    assert [len(answer[key]) for key in KEYS[:3]] == [3, 3, 3] and len(
        answer["probabilities"][0]
    ) == 10
    assert type(answer["predictions"][0]) is int and type(answer["probabilities"][0][0]) is float
    assert answer["latency_ms"] > 0
    with torch.no_grad():
        wanted = torch.softmax(model(torch.from_numpy(rows_of(3, 32))), 1)
    assert (
        answer["probabilities"] == wanted.tolist()
        and answer["predictions"] == wanted.argmax(1).tolist()
    )
    assert answer["confidences"] == wanted.max(1).values.tolist()


def test_a_regression_answers_with_predictions_only():
    engine = InferenceEngine(nn.Linear(4, 1), postprocessor=Postprocessor("regression"))
    answer = engine.predict([1, 2, 3, 4])
    assert list(answer) == ["predictions", *KEYS[3:]] and type(answer["predictions"][0]) is float


def test_pre_and_postprocessing_are_the_engines():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    engine = InferenceEngine(
        model, Preprocessor(mean=[10, 20], std=[2, 4]), Postprocessor(threshold=0.9)
    )
    answer = engine.predict([[12, 20], [30, 20]])  # -> logits [1, 0], [10, 0]
    assert answer["predictions"] == [-1, 0] and answer["confidences"][0] == pytest.approx(
        1 / (1 + math.exp(-1))
    )


def test_latency_is_measured_with_the_given_clock():
    engine = InferenceEngine(Spy(), clock=Clock())
    # start; start, preprocessed, inferred, postprocessed; end
    assert engine.predict([1.0])["latency_ms"] == 5000.0


# The caller's module


def test_the_callers_module_is_never_changed():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )
    model.train()
    model(torch.randn(8, 6)).sum().backward()
    model[4].requires_grad_(False)
    before, x = copy.deepcopy(model), rows_of(40, 6)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    engine = InferenceEngine(model, config=ServingConfig(max_batch_size=16))
    engine.warmup(x)
    first = engine.predict(x)
    engine.batch_predict(list(x))
    assert all(part.training for part in model.modules()) and not any(
        part.training for part in engine.model.modules()
    )
    for (name, mine), theirs in zip(
        before.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        assert (gradient is None) == (p.grad is None) and (
            gradient is None or torch.equal(gradient, p.grad)
        )
    assert not any(p.requires_grad for p in engine.model.parameters())
    with torch.no_grad():  # training goes on; the engine does not notice
        for p in model.parameters():
            p.add_(1)
        model[1].running_mean.add_(5)
    assert engine.predict(x)["probabilities"] == first["probabilities"], (
        "dropout is off, and so is BatchNorm's learning"
    )


def test_the_callers_array_is_never_changed_by_a_model_that_works_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Hardtanh(inplace=True))
    engine = InferenceEngine(model, config=ServingConfig(max_batch_size=4))
    engine._steps = [(engine.model, ())]  # the module itself, in place
    for count in (1, 3, 9):
        x = rows_of(count, 2)
        before = x.copy()
        engine.predict(x)
        engine.batch_predict([x, x[:1]])
        engine.execute([x, x])
        engine.warmup(x)
        assert (x == before).all()


def test_an_owned_module_is_used_as_it_is():
    model = module().train()
    engine = InferenceEngine(model, owned=True)
    assert (
        engine.model is model
        and not model.training
        and not any(p.requires_grad for p in model.parameters())
    )


def test_pruned_modules_are_copied_whole():
    model = module()
    prune.l1_unstructured(model.head, "weight", amount=0.5)  # torch refuses to deep-copy this
    engine = InferenceEngine(model)
    x = torch.from_numpy(rows_of(4, 32))
    with torch.no_grad():
        assert engine.predict(x)["probabilities"] == torch.softmax(model(x), 1).tolist()
    assert (
        isinstance(model.head.weight_orig, nn.Parameter)
        and (model.head.weight == 0).float().mean() == 0.5
    )


@pytest.mark.parametrize(
    "wrong",
    [None, "model", nn.Linear, torch.zeros(3), lambda x: x],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_module_is_refused(wrong):
    with pytest.raises(InvalidModelError, match=f"model is a {type(wrong).__name__}: pass a torch"):
        InferenceEngine(wrong)


def test_a_module_that_cannot_be_copied_is_refused():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(
        InvalidModelError, match=r"cannot copy the Linear: TypeError: cannot pickle '_thread.lock'"
    ):
        InferenceEngine(model)
    with pytest.raises(
        InvalidModelError, match=r"cannot copy the LazyLinear: ValueError: .*uninitialized"
    ):
        InferenceEngine(nn.LazyLinear(2))


@pytest.mark.parametrize("wrong", [32, {"max_batch_size": 4}, ServingConfig], ids=repr)
def test_a_config_is_a_serving_config(wrong):
    with pytest.raises(ConfigError, match="pass a ServingConfig"):
        InferenceEngine(Spy(), config=wrong)


# Batches

BUILT_IN = {name: module(name) for name in ("tutorial_mlp", "digits_mlp", "digits_cnn")}


@examples(40)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    name=st.sampled_from(sorted(BUILT_IN)),
    limit=st.integers(1, 9),
)
def test_a_batch_answers_as_each_request_alone(sizes, name, limit):
    model, features = BUILT_IN[name], models.signature(name)[0][0]
    requests = [rows_of(size, features, seed) for seed, size in enumerate(sizes)]
    together = InferenceEngine(
        model, config=ServingConfig(max_batch_size=limit), owned=True
    ).batch_predict(requests)
    alone = InferenceEngine(model, config=ServingConfig(max_batch_size=1), owned=True)
    for request, got in zip(requests, together, strict=True):
        wanted = alone.predict(request)
        assert list(got) == KEYS and got["predictions"] == wanted["predictions"]
        np.testing.assert_allclose(got["probabilities"], wanted["probabilities"], atol=1e-6)
        np.testing.assert_allclose(got["confidences"], wanted["confidences"], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, [1]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (30, [8, 8, 8, 6])]
)
def test_no_forward_is_larger_than_the_limit(rows, sizes):
    engine, seen = spied(max_batch_size=8)
    x = np.arange(rows, dtype=np.float32)[:, None] - 4
    answer = engine.predict(x)
    assert seen == sizes
    assert answer["predictions"] == [int(value < 0) for value in x[:, 0]]
    assert answer["confidences"] == pytest.approx(1 / (1 + np.exp(-2 * np.abs(x[:, 0]))))


def test_requests_share_forwards_and_get_their_own_rows():
    engine, seen = spied(max_batch_size=8)
    requests = [
        np.full((n, 1), value, np.float32)
        for n, value in ((1, -1.0), (5, 2.0), (4, -3.0), (1, 4.0))
    ]
    answers = engine.batch_predict(iter(requests))
    assert seen == [8, 3]
    for request, answer in zip(requests, answers, strict=True):
        assert answer["predictions"] == [int(request[0, 0] < 0)] * len(request)
        assert answer["confidences"] == pytest.approx(
            [1 / (1 + math.exp(-2 * abs(request[0, 0])))] * len(request)
        )


def test_single_rows_and_a_table_are_batches_too():
    engine = InferenceEngine(module())
    x = rows_of(3, 32)
    assert [a["predictions"] for a in engine.batch_predict(x)] == [
        [p] for p in engine.predict(x)["predictions"]
    ]


def test_answers_of_one_batch_can_be_changed_apart():
    engine = InferenceEngine(module())
    first, second = engine.batch_predict([rows_of(2, 32), rows_of(2, 32)])
    wanted = copy.deepcopy(second["probabilities"])
    first["predictions"].clear()
    first["probabilities"][0][0] = "changed"
    assert len(second["predictions"]) == 2 and second["probabilities"] == wanted


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ([], r"rows of \[\] features"),
        (None, "batch is a NoneType: send a list of requests"),
        (5, "batch is a int"),
        ([np.ones(32), np.ones(31)], r"rows of \[31, 32\] features: send requests of one width"),
        ([np.ones(32), np.full(32, np.nan)], "row 0, feature 0 is nan"),
        ([np.ones(32), []], r"shape \(1, 0\)"),
    ],
    ids=repr,
)
def test_a_bad_batch_is_refused_before_anything_runs(batch, seen):
    engine, sizes = spied()
    with pytest.raises(InvalidInputError, match=seen):
        engine.batch_predict(batch)
    assert sizes == [] and engine.get_stats()["executions"] == 0


def test_eight_threads_get_right_answers_from_one_engine():
    engine = InferenceEngine(module(), config=ServingConfig(max_batch_size=8))
    requests = [rows_of(1 + seed % 12, 32, seed) for seed in range(64)]
    wanted = [engine.predict(request)["probabilities"] for request in requests]
    with ThreadPoolExecutor(8) as pool:
        got = list(
            pool.map(lambda i: engine.predict(requests[i % 64])["probabilities"], range(640))
        )
    assert all(answer == wanted[i % 64] for i, answer in enumerate(got))
    assert engine.get_stats()["executions"] == 704
    assert engine.get_stats()["rows"] == 11 * sum(map(len, requests))


# Warm-up and statistics


def test_a_warm_up_runs_single_rows_then_a_full_batch_and_is_not_in_the_statistics():
    engine, sizes = spied(max_batch_size=8, warmup_samples=3, clock=Clock())
    assert engine.typical_s == math.inf
    # start to postprocessed: three looks at the clock
    assert engine.warmup([5.0]) == engine.typical_s == 3.0
    assert sizes == [1, 1, 1, 8]
    stats = engine.get_stats()
    assert (
        stats["warmup_executions"],
        stats["executions"],
        stats["rows"],
        stats["execution"]["count"],
    ) == (4, 0, 0, 0)
    engine.warmup([[1.0], [2.0]])
    assert sizes == [1, 1, 1, 8] * 2 and engine.get_stats()["warmup_executions"] == 8


def test_a_warm_up_of_no_samples_does_nothing():
    engine, sizes = spied(warmup_samples=0)
    assert (
        engine.warmup() == engine.warmup([1.0]) == 0
        and sizes == []
        and engine.typical_s == math.inf
    )


def test_a_warm_up_needs_a_sample_only_where_the_width_is_unknown():
    known, sizes = spied(
        preprocessor=Preprocessor(num_features=2), max_batch_size=4, warmup_samples=1
    )
    assert known.warmup() > 0 and sizes == [1, 4]
    unknown, _ = spied()
    with pytest.raises(
        InvalidModelError, match="number of features is not known: warm up with a sample"
    ):
        unknown.warmup()
    with pytest.raises(InvalidInputError, match="rows have 3 features, the model takes 2"):
        known.warmup([1, 2, 3])


def test_a_warm_up_of_a_model_that_fails_says_so():
    with pytest.raises(ModelExecutionError):
        InferenceEngine(nn.Linear(4, 2)).warmup([1, 2, 3])


def test_statistics_count_rows_and_executions_and_time_them():
    engine, _ = spied(version="v3", max_batch_size=4, clock=Clock())
    engine.predict([1.0])
    engine.batch_predict([[1.0], [2.0], [3.0]])
    engine.predict(np.ones((6, 1)))  # two forwards, one execution
    stats = engine.get_stats()
    assert (
        stats["model_version"],
        stats["rows"],
        stats["executions"],
        stats["warmup_executions"],
    ) == ("v3", 10, 3, 0)
    assert stats["nbytes"] == 0
    assert stats["execution"]["count"] == 3 and stats["execution"]["max_ms"] == 7000, (
        "two forwards of 3 s, a gap of 1 s"
    )
    assert stats["execution"]["mean_ms"] == pytest.approx((3000 + 3000 + 7000) / 3)


def test_the_size_is_that_of_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert InferenceEngine(model).nbytes == 4 * (12 + 4) + 4 * 4 * 4 + 8


def test_what_an_execution_usually_takes_is_learned_slowly_and_per_forward():
    engine, _ = spied(max_batch_size=4, clock=Clock())
    engine.predict([1.0])
    assert engine.typical_s == 3.0
    engine.predict(np.ones((400, 1)))  # 100 forwards: 399 s
    assert engine.typical_s == pytest.approx(0.9 * 3.0 + 0.1 * 3.99)


def test_the_stages_of_an_execution_follow_one_another_and_chunks_add_up():
    engine, _ = spied(max_batch_size=4, clock=Clock())
    (single,) = engine.execute([np.ones((3, 1), np.float32)])
    assert single.execution.marks_s == (0, 1, 2, 3)
    (chunked,) = engine.execute([np.ones((10, 1), np.float32)])
    assert chunked.execution.marks_s == (4, 9, 12, 15), (
        "3 s of inference and of postprocessing, the rest before"
    )
    assert (chunked.start, chunked.stop, chunked.execution.outputs.rows) == (0, 10, 10)


def test_executing_payloads_gives_each_its_span():
    engine, _ = spied()
    payloads = [np.full((n, 1), n, np.float32) for n in (2, 1, 3)]
    predictions = engine.execute(payloads)
    assert [(p.start, p.stop) for p in predictions] == [(0, 2), (2, 3), (3, 6)]
    assert len({id(p.execution) for p in predictions}) == 1 and isinstance(
        predictions[0], Prediction
    )
    assert [len(p.lists()["predictions"]) for p in predictions] == [2, 1, 3]
    assert [p.lists()["confidences"][0] for p in predictions] == pytest.approx(
        [1 / (1 + math.exp(-2 * n)) for n in (2, 1, 3)]
    )


# What can go wrong in a model

BAD_OUTPUTS = {
    "one row too few": (lambda x: x[1:], r"answered shape \(2, 4\) to 3 rows"),
    "one row too many": (lambda x: torch.cat([x, x[:1]]), r"answered shape \(4, 4\) to 3 rows"),
    "a number": (lambda x: x.sum(), "IndexError"),
    "one number a row": (lambda x: x.sum(1), r"shape \(3,\): classification takes logits"),
    "three dimensions": (lambda x: x[:, None], r"shape \(3, 1, 4\)"),
    "no class": (lambda x: x[:, :0], r"shape \(3, 0\)"),
    "a tuple": (lambda x: (x, x), "AttributeError"),
    "a dict": (lambda x: {"logits": x}, "AttributeError"),
    "nothing": (lambda x: None, "AttributeError"),
    "NaN": (lambda x: x / 0 * 0, "logits are not finite"),
    "infinity": (lambda x: torch.full_like(x, math.inf), "logits are not finite"),
    "complex": (lambda x: x.to(torch.complex64), "outputs are torch.complex64"),
    "sparse": (lambda x: x.to_sparse(), "NotImplementedError|RuntimeError|TypeError"),
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_an_output_that_is_not_one_row_of_finite_numbers_each_is_an_error_of_the_model(kind):
    function, seen = BAD_OUTPUTS[kind]
    engine = InferenceEngine(Gives(function), version="v9")
    with pytest.raises(ModelExecutionError, match=seen):
        engine.predict(rows_of(3, 4))
    assert engine.get_stats()["executions"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_outputs_of_another_dtype_and_arrays_are_fine(dtype):
    x = np.array([[1, 2, 3]], np.float32)
    wanted = InferenceEngine(Gives(lambda x: x)).predict(x)["probabilities"]
    assert InferenceEngine(Gives(lambda x: x.to(dtype))).predict(x)["probabilities"] == wanted
    of_arrays = InferenceEngine(Gives(lambda x: x.numpy())).predict(x)["probabilities"]
    np.testing.assert_allclose(of_arrays, wanted, rtol=1e-6)  # NumPy's softmax


def test_an_error_of_the_model_names_version_shape_and_type_but_not_its_text():
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("secret path")

    with pytest.raises(ModelExecutionError) as error:
        InferenceEngine(Gives(fail), version="v2").predict(rows_of(2, 3))
    assert str(error.value) == "model 'v2' failed on rows of shape (2, 3): RuntimeError"
    assert str(error.value.__cause__) == "secret path", "for the operator, in the traceback"


def test_a_wrong_width_is_the_models_error_only_where_the_width_is_unknown():
    with pytest.raises(ModelExecutionError):
        InferenceEngine(nn.Linear(4, 2)).predict([1, 2, 3])
    with pytest.raises(InvalidInputError, match="rows have 3 features, the model takes 4"):
        InferenceEngine(nn.Linear(4, 2), Preprocessor(num_features=4)).predict([1, 2, 3])


def test_an_interrupt_is_not_swallowed():
    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InferenceEngine(Gives(interrupt)).predict([1.0])


def test_a_failed_chunk_fails_its_request_and_the_engine_goes_on():
    engine = InferenceEngine(
        Gives(lambda x: torch.log(x - 5)), config=ServingConfig(max_batch_size=2)
    )
    with pytest.raises(ModelExecutionError):
        engine.predict([[9.0, 6.0], [8.0, 6.0], [1.0, 6.0]])
    assert engine.predict([[9.0, 6.0], [8.0, 6.0]])["predictions"] == [0, 0]


# The fast path


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class OwnSequential(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class OwnReLU(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def layer_used_twice() -> nn.Module:
    relu, layer = nn.ReLU(), nn.Linear(8, 8)
    return nn.Sequential(layer, relu, layer, relu, nn.Linear(8, 3), relu)


def with_hook(kind: str) -> nn.Module:
    model = small()
    if kind == "forward":
        model[0].register_forward_hook(lambda layer, args, out: out * 3)
    elif kind == "pre":
        model[2].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    elif kind == "keywords":
        model[1].register_forward_hook(lambda layer, args, kwargs, out: out - 1, with_kwargs=True)
    else:
        model.register_forward_hook(lambda layer, args, out: out * 5)
    return model


def with_own_forward(part: int | None) -> nn.Module:
    model = small()
    target = model if part is None else model[part]
    target.forward = lambda x: (
        nn.functional.pad(x[:, :3], (0, 5 if part is not None and part < 2 else 0)) * 7
    )
    return model


def split_with_a_third_part() -> nn.Module:
    model = models.SplitModel(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 3))
    model.projector = nn.Linear(3, 3)  # not in the forward
    return model


def pruned() -> nn.Module:
    model = small()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


MODULES = {
    "a chain": small,
    "nested chains": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(), nn.Linear(8, 3)
    ),
    "no layer": nn.Sequential,
    "no bias": lambda: nn.Sequential(nn.Linear(8, 3, bias=False)),
    "a layer used twice": layer_used_twice,
    "in place": lambda: nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(8, 3), nn.ReLU(inplace=True)
    ),
    "other layers": lambda: nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.GELU(), nn.Linear(8, 3)
    ),
    "own linear": lambda: nn.Sequential(OwnLinear(8, 3), nn.ReLU()),
    "own sequential": lambda: OwnSequential(nn.Linear(8, 3), nn.ReLU()),
    "own ReLU": lambda: nn.Sequential(nn.Linear(8, 3), OwnReLU()),
    "forward hook": lambda: with_hook("forward"),
    "pre-hook": lambda: with_hook("pre"),
    "hook with keywords": lambda: with_hook("keywords"),
    "hook on the whole": lambda: with_hook("whole"),
    "own forward on the whole": lambda: with_own_forward(None),
    "own forward on a linear": lambda: with_own_forward(0),
    "own forward on a ReLU": lambda: with_own_forward(1),
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 3)), nn.ReLU()
    ),
    "pruned": pruned,
    "split with a third part": split_with_a_third_part,
    "tutorial_mlp": lambda: module("tutorial_mlp"),
    "digits_mlp": lambda: module("digits_mlp"),
    "digits_cnn": lambda: module("digits_cnn"),
    "mlp of two": lambda: module("mlp", sizes=[8, 3]),
    "deep mlp": lambda: module("mlp", sizes=[8, 16, 16, 16, 3]),
}
UNROLLED = {"a chain", "nested chains", "no layer", "no bias", "a layer used twice", "in place"} | {
    *("split with a third part", "tutorial_mlp", "digits_mlp", "mlp of two", "deep mlp")
}


@pytest.mark.parametrize("kind", MODULES)
def test_the_steps_give_the_modules_own_bits(kind):
    torch.manual_seed(0)
    model = MODULES[kind]()
    features = {"tutorial_mlp": 32, "digits_mlp": 64, "digits_cnn": 64}.get(kind, 8)
    engine = InferenceEngine(model, postprocessor=Postprocessor("regression"))
    model.eval()
    for count in (1, 2, 7, 32):
        x = torch.randn(count, features)
        with torch.inference_mode():
            wanted = model(x.clone())
        assert torch.equal(
            torch.tensor(engine.predict(x)["predictions"]).reshape(wanted.shape), wanted
        )
    assert (kind in UNROLLED) == (
        not any(isinstance(step, nn.Module) for step, _ in lean(engine.model))
    )


def test_every_built_in_architecture_is_tested_here():
    known = models.architectures._known
    assert {
        name for name in models.names() if models.build.__module__ == known[name].factory.__module__
    } == {*("tutorial_mlp", "digits_mlp", "digits_cnn", "mlp", "sequential")}


def test_a_copy_is_frozen_and_in_evaluation_mode_with_tensors_in_place_of_others():
    model = small()
    weight = nn.Parameter(torch.zeros(8, 8))
    twin = copy_of(model, {id(model[0].weight): weight})
    assert twin[0].weight is weight and twin[2].weight is not model[2].weight
    assert not twin.training and model.training
    assert not any(p.requires_grad for p in twin.parameters()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_answers_hold_no_graph():
    (prediction,) = InferenceEngine(nn.Linear(2, 2)).execute([rows_of(1, 2)])
    assert all(
        isinstance(array, np.ndarray) for array in prediction.execution.outputs.arrays().values()
    )


# Identity


def test_engines_share_an_identity_only_if_told_that_their_answers_are_equal():
    model, one = module(), "digest"
    options = [
        {"digest": one},
        {"digest": "another"},
        {"digest": one, "preprocessor": Preprocessor(mean=[0] * 32, std=[1] * 32)},
        {"digest": one, "postprocessor": Postprocessor(threshold=0.5)},
        {"digest": one, "postprocessor": Postprocessor("regression")},
        {},
        {},
    ]
    identities = [InferenceEngine(model, **each).identity for each in options]
    assert len(set(identities)) == len(options)
    assert InferenceEngine(model, digest=one, version="other name").identity == identities[0]
