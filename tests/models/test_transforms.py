"""Preprocessor and Postprocessor: scikit-learn and torch as oracles, and every bad input a typed
error."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.special
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.preprocessing import StandardScaler

from flserving import Postprocessor, Preprocessor
from flserving.errors import ConfigError, InvalidInputError, ModelExecutionError
from flserving.models.processing import ABSTAIN, Outputs

F32 = np.finfo(np.float32)
finite = st.floats(-1e6, 1e6, width=32)
tables = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8), elements=finite
)


@pytest.fixture(autouse=True)
def numpy_at_its_strictest():
    """Whatever numpy could complain about is an error, as for a user who called np.seterr."""
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def batch(rows: int = 4, features: int = 3) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, features)).astype(np.float32)


# What goes in


def table_and_rows(draw):
    table = draw(tables)
    if draw(st.booleans()):
        table[:, 0] = table[0, 0]  # a constant feature
    return table, draw(arrays.arrays(np.float32, (5, table.shape[1]), elements=finite))


SUBNORMAL = np.array([[1.1754944e-38], [0]], np.float32)  # varies, by less than a normal float32


@example((np.array([[0], [3.73e-43], [3.73e-43]], np.float32), np.zeros((5, 1), np.float32)))
@example((SUBNORMAL, np.array([[0], [1], [-1e6], [1e-38], [3]], np.float32)))
@given(st.composite(table_and_rows)())
def test_standardises_as_scikit_learn_does(table_and_rows):
    train, rows = table_and_rows
    scaler = StandardScaler().fit(train.astype(np.float64))
    std = np.sqrt(scaler.var_)
    ours = Preprocessor(mean=scaler.mean_, std=std)
    # A float32 that is subnormal has no inverse to rely on: such a spread counts as none.
    scale = np.where(std < F32.tiny, 1.0, scaler.scale_)
    # scikit-learn takes a spread that is rounding of the mean for a constant feature; we are given
    # only the std
    same = (scale != 1) | (std < F32.tiny)
    with np.errstate(under="ignore"):
        mean = scaler.mean_[same].astype(np.float32)
    wanted = (rows[:, same] - mean).astype(np.float64) / scale[same]
    got = ours(rows).numpy()
    assert got.dtype == np.float32 and got.shape == rows.shape
    # what lies beyond float32 is infinite, and refused by the postprocessor
    got, wanted = (np.clip(values, -F32.max, F32.max) for values in (got[:, same], wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-30)


def test_a_constant_feature_is_centred_and_left_unscaled():
    train = np.array([[1, 5], [2, 5], [3, 5]], np.float32)
    scaler = StandardScaler().fit(train)
    ours = Preprocessor(mean=scaler.mean_, std=np.sqrt(scaler.var_))
    rows = np.array([[2, 5], [4, 7.5]], np.float32)
    np.testing.assert_allclose(ours(rows), scaler.transform(rows), rtol=1e-6)
    assert ours(rows)[:, 1].tolist() == [0.0, 2.5], "a zero std does not explode"


@pytest.mark.parametrize("std", [0.0, 1e-45, 1e-40, 1e-38, 1e-300])
def test_a_subnormal_std_counts_as_constant(std):
    assert Preprocessor(mean=[1], std=[std])([3.0]).tolist() == [[2.0]]


@pytest.mark.parametrize("std", [float(F32.tiny), 2e-38, 1e-37, 1e-30, 1.0, 1e30, 3e38])
def test_any_normal_std_scales(std):
    assert Preprocessor(mean=[0], std=[std])([std]).item() == pytest.approx(1, rel=1e-6)


def test_normalize_off_leaves_the_numbers_but_still_knows_the_width():
    ours = Preprocessor(normalize=False, mean=[1, 2], std=[3, 4])
    assert ours([5, 6]).tolist() == [[5, 6]]
    with pytest.raises(InvalidInputError, match="rows have 3 features, the model takes 2"):
        ours([1, 2, 3])


def test_a_single_row_becomes_a_batch_and_without_statistics_numbers_are_left_alone():
    assert Preprocessor()([1, 2, 3]).tolist() == [[1, 2, 3]]
    assert Preprocessor()([[1], [2]]).tolist() == [[1], [2]]
    assert Preprocessor()([1, 2]).dtype is torch.float32


def readonly(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.setflags(write=False)
    return x


ROWS = [[1.0, -2.0, 0.5], [3.0, 4.0, -8.0]]
ACCEPTED = {
    "lists": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "list of arrays": [np.array(row) for row in ROWS],
    "list of tensors": [torch.tensor(row) for row in ROWS],
    "float16": np.array(ROWS, np.float16),
    "float64": np.array(ROWS),
    "longdouble": np.array(ROWS, np.longdouble),
    "big-endian": np.array(ROWS, ">f4"),
    "read-only": readonly(np.array(ROWS, np.float32)),
    "read-only float64": readonly(np.array(ROWS)),
    "fortran order": np.asfortranarray(np.array(ROWS, np.float32)),
    "every other column": np.repeat(np.array(ROWS, np.float32), 2, axis=1)[:, ::2],
    "backwards": np.array(ROWS, np.float32)[::-1, ::-1][::-1, ::-1],
    "broadcast": np.broadcast_to(np.array(ROWS, np.float32), (2, 3)),
    "DataFrame": pd.DataFrame(ROWS),
    "tensor": torch.tensor(ROWS),
    "tensor that requires grad": torch.tensor(ROWS, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.tensor(ROWS)),
    "bfloat16": torch.tensor(ROWS, dtype=torch.bfloat16),
    "float8": torch.tensor(ROWS).to(torch.float8_e4m3fn),
    "half": torch.tensor(ROWS).half(),
    "double": torch.tensor(ROWS).double(),
    "transposed tensor": torch.tensor(ROWS).T.contiguous().T,
    "negative view": torch.complex(torch.zeros(2, 3), -torch.tensor(ROWS)).conj().imag,
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_numbers_in_any_usual_shape_of_container_are_accepted(kind):
    rows = Preprocessor(num_features=3).validate(ACCEPTED[kind])
    assert type(rows) is np.ndarray and rows.dtype == np.float32 and rows.dtype.isnative
    assert rows.tolist() == ROWS
    assert Preprocessor()(ACCEPTED[kind]).tolist() == ROWS


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64]
)
def test_bools_and_integers_are_numbers(dtype):
    assert Preprocessor().validate(np.array([0, 1, 1], dtype)).tolist() == [[0, 1, 1]]


class Rude:
    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("no array today")


def recursive() -> list:
    rows: list = []
    rows.append(rows)
    return rows


def nested(depth: int) -> object:
    value: object = 1.0
    for _ in range(depth):
        value = [value]
    return value


REFUSED = {  # name -> what is sent, what the message must show
    "nothing": (None, "dtype object"),
    "a number": (5.0, r"shape \(\)"),
    "a string": ("abc", "dtype <U3"),
    "strings": (["a", "b"], "dtype <U1"),
    "numbers as strings": (["1", "2"], "dtype <U1"),
    "bytes": (b"\0\0\0\0", "dtype |S"),
    "a dict": ({"features": [1, 2]}, "dtype object"),
    "a set": ({1, 2}, "dtype object"),
    "a generator": ((i for i in range(3)), "dtype object"),
    "None inside": ([1.0, None], "dtype object"),
    "object array of floats": (np.array([1.0, 2.0], object), "dtype object"),
    "dates": (np.array(["2026-01-01"], "M8[D]"), r"dtype datetime64\[D\]"),
    "durations": (np.array([1], "m8[s]"), r"dtype timedelta64\[s\]"),
    "a record array": (np.zeros(2, [("x", "f4")]), r"dtype \[\('x'"),
    "complex": (np.array([1 + 2j]), "dtype complex128"),
    "complex tensor": (torch.ones(2, dtype=torch.complex64), "dtype complex64"),
    "complex numbers": ([1j], "dtype complex128"),
    "ragged": ([[1, 2], [3]], "not a table of numbers"),
    "ragged arrays": ([np.ones(2), np.ones(3)], "not a table of numbers"),
    "a row and a number": ([[1, 2], 3], "not a table of numbers"),
    "empty list": ([], r"shape \(1, 0\)"),
    "empty rows": ([[], []], r"shape \(2, 0\)"),
    "no rows": (np.zeros((0, 3)), r"shape \(0, 3\)"),
    "no features": (np.zeros((3, 0), np.float32), r"shape \(3, 0\)"),
    "three dimensions": (np.zeros((2, 1, 3)), r"shape \(2, 1, 3\)"),
    "three dimensions, one empty": (np.zeros((2, 0, 3)), r"shape \(2, 0, 3\)"),
    "NaN": ([1.0, math.nan, 3.0], "row 0, feature 1 is nan"),
    "infinity": ([[1, 2, 3], [4, 5, math.inf]], "row 1, feature 2 is inf"),
    "minus infinity": (
        np.array([[1, 2, 3], [-math.inf, 5, 6]], np.float32),
        "row 1, feature 0 is -inf",
    ),
    "NaN in a large batch": (
        np.where(np.arange(6000).reshape(2000, 3) == 4000, np.nan, 1.0),
        "row 1333, feature 1",
    ),
    "NaN tensor": (torch.tensor([1.0, math.nan, 3.0]), "row 0, feature 1 is nan"),
    "beyond float32": (
        [0.0, 1e39, 0.0],
        "feature 1 is inf: every number must be finite in float32",
    ),
    "beyond float32, tensor": (
        torch.tensor([0.0, -1e39, 0.0], dtype=torch.float64),
        "feature 1 is -inf",
    ),
    "beyond float32, huge integer": ([10**39, 0, 0], "dtype object"),
    "beyond float64": ([10**400, 0, 0], "dtype object"),
    "masked": (
        np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]),
        "masked array: fill the missing values",
    ),
    "masked element": ([1.0, np.ma.masked, 2.0], "masked|nan"),
    "recursive": (recursive(), "not a table of numbers"),
    "nested too deep": (nested(100), "not a table of numbers"),
    "nested far too deep": (nested(100_000), "not a table of numbers"),
    "an object that raises": (Rude(), "no array today"),
    "list of tensors that require grad": (
        [torch.ones(3, requires_grad=True)],
        "not a table of numbers",
    ),
    "sparse tensor": (torch.eye(3).to_sparse(), "not a table of numbers"),
    "tensor without data": (torch.ones(3, device="meta"), "not a table of numbers"),
    "too wide": (np.zeros((2, 4)), "rows have 4 features, the model takes 3"),
    "too narrow": ([1.0], "rows have 1 features, the model takes 3"),
    "transposed": (np.zeros((3, 5)), "rows have 5 features, the model takes 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("statistics", [False, True], ids=["plain", "with statistics"])
def test_bad_input_is_a_typed_error_that_shows_what_was_seen(kind, statistics):
    features, seen = REFUSED[kind]
    ours = Preprocessor(mean=[0] * 3, std=[1] * 3) if statistics else Preprocessor(num_features=3)
    with pytest.raises(InvalidInputError, match=seen):
        ours.validate(features)
    assert ours.validate([1, 2, 3]).tolist() == [[1, 2, 3]], "it goes on"


def test_too_many_rows_are_refused_and_just_enough_are_not():
    assert len(Preprocessor().validate(batch(8), max_rows=8)) == 8
    with pytest.raises(
        InvalidInputError,
        match="request has 9 rows, the limit is 8: split it, or raise max_request_rows",
    ):
        Preprocessor().validate(batch(9), max_rows=8)


@pytest.mark.parametrize("size", [1, 32, 4096, 4097, 100_000])
def test_numbers_whose_squares_overflow_are_finite_and_pass_in_silence(size):
    rows = np.full((1, size), 3e38, np.float32)
    rows[0, 0] = F32.max
    assert Preprocessor().validate(rows) is rows


@given(data=st.data(), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_no_number_that_is_not_finite_gets_through(data, value):
    rows = data.draw(tables)
    place = tuple(data.draw(st.integers(0, size - 1)) for size in rows.shape)
    rows[place] = value
    with pytest.raises(InvalidInputError, match=f"row {place[0]}, feature {place[1]} is {value}"):
        Preprocessor().validate(rows)


def test_a_float32_array_is_not_copied_by_validation_and_never_changed_afterwards():
    for ours in (Preprocessor(), Preprocessor(mean=[1, 2, 3], std=[4, 5, 6])):
        rows = batch()
        before = rows.copy()
        assert ours.validate(rows) is rows, "no copy"
        out = ours(rows)
        out.zero_()  # as a model does whose first layer works in place
        assert (rows == before).all()


def test_a_callers_tensor_is_never_changed():
    rows = torch.from_numpy(batch())
    before = rows.clone()
    Preprocessor(mean=[1, 2, 3], std=[4, 5, 6])(rows).zero_()
    Preprocessor()(rows).zero_()
    assert torch.equal(rows, before)


def test_in_place_gives_the_same_numbers_in_the_same_memory():
    ours = Preprocessor(mean=[1, 2, 3], std=[4, 5, 6])
    rows = batch()
    wanted = ours.standardise(rows)
    got = ours.standardise(rows, in_place=True)
    assert torch.equal(got, wanted) and np.shares_memory(got.numpy(), rows)


def test_what_the_statistics_make_infinite_is_silent_here_and_refused_after_the_model():
    ours = Preprocessor(mean=[-3e38], std=[1e-10])
    out = ours([3e38])
    assert out.item() == math.inf
    with pytest.raises(ModelExecutionError, match="not finite"):
        Postprocessor("regression")(out)


STATISTICS = {
    "only mean": ({"mean": [1]}, "std is missing: give mean and std, or neither"),
    "only std": ({"std": [1]}, "mean is missing"),
    "lengths": ({"mean": [1, 2], "std": [1]}, "mean has 2 features, std has 1"),
    "negative": ({"mean": [1], "std": [-0.5]}, "std holds -0.5"),
    "NaN": ({"mean": [0, math.nan], "std": [1, 1]}, "mean of feature 1 is nan"),
    "infinite": ({"mean": [0], "std": [math.inf]}, "std of feature 0 is inf"),
    "beyond float32": (
        {"mean": [1e300], "std": [1]},
        r"mean of feature 0 is 1e\+300: it must be finite in float32",
    ),
    "beyond float64": ({"mean": [10**400], "std": [1]}, "mean has shape .* and dtype object"),
    "empty": ({"mean": [], "std": []}, r"mean has shape \(0,\)"),
    "table": ({"mean": [[1]], "std": [[1]]}, r"mean has shape \(1, 1\)"),
    "strings": ({"mean": ["1"], "std": ["1"]}, "dtype <U1"),
    "None": ({"mean": [None], "std": [1]}, "dtype object"),
    "complex": ({"mean": np.array([1j]), "std": [1]}, "dtype complex128"),
    "ragged": ({"mean": [[1], [1, 2]], "std": [1]}, "mean is not a list of numbers"),
    "an object that raises": (
        {"mean": Rude(), "std": [1]},
        "mean is not a list of numbers: no array today",
    ),
    "another width": (
        {"mean": [1], "std": [1], "num_features": 2},
        "statistics have 1 features, the model takes 2",
    ),
    "zero features": ({"num_features": 0}, "num_features is 0"),
    "negative features": ({"num_features": -4}, "num_features is -4"),
    "half a feature": ({"num_features": 2.5}, "num_features is 2.5"),
    "true features": ({"num_features": True}, "num_features is True"),
    "features in words": ({"num_features": "four"}, "num_features is 'four'"),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_bad_statistics_are_refused_with_what_was_seen(kind):
    arguments, seen = STATISTICS[kind]
    with pytest.raises(ConfigError, match=seen):
        Preprocessor(**arguments)


def test_statistics_are_copied():
    mean, std = np.ones(2, np.float32), np.ones(2, np.float32)
    ours = Preprocessor(mean=mean, std=std)
    digest = ours.digest
    mean[:], std[:] = 100, 100
    assert ours([1, 1]).tolist() == [[0, 0]] and ours.digest == digest


def test_equal_digests_mean_equal_preprocessing():
    def digest(**arguments: object) -> str:
        return Preprocessor(**arguments).digest

    assert digest() == digest(num_features=3) == digest(normalize=False, mean=[1], std=[2])
    one = digest(mean=[1, 2], std=[3, 4])
    assert one == digest(mean=np.array([1.0, 2.0]), std=torch.tensor([3.0, 4.0]))
    others = [
        digest(),
        digest(mean=[1, 2], std=[3, 5]),
        digest(mean=[1, 3], std=[3, 4]),
        digest(mean=[1], std=[3]),
    ]
    assert len({one, *others, digest(mean=[1, 2, 3], std=[4, 5, 6])}) == 6 and len(one) == 64


# What comes out

logits = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(2, 12)),
    elements=st.floats(-80, 80, width=32),
)


@given(logits)
def test_probabilities_are_scipys_softmax_and_predictions_its_argmax(values):
    out = Postprocessor()(torch.from_numpy(values))
    wanted = scipy.special.softmax(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(out.probabilities, wanted, rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(out.confidences, wanted.max(1), rtol=2e-5)
    np.testing.assert_allclose(out.probabilities.sum(1), 1, rtol=1e-5)
    rows = np.arange(len(values))
    assert (out.probabilities[rows, out.predictions] == out.confidences).all(), (
        "the class of the highest probability"
    )
    assert (out.predictions.dtype, out.confidences.dtype, out.probabilities.dtype) == (
        np.int64,
        np.float32,
        np.float32,
    )
    assert (
        out.probabilities.shape == values.shape
        and out.predictions.shape == out.confidences.shape == (len(values),)
    )


def test_the_bits_are_torchs():
    values = torch.randn(7, 10)
    top, classes = torch.softmax(values, 1).max(1)
    out = Postprocessor()(values)
    assert out.lists() == {
        "predictions": classes.tolist(),
        "confidences": top.tolist(),
        "probabilities": torch.softmax(values, 1).tolist(),
    }
    assert (
        list(out.lists()) == ["predictions", "confidences", "probabilities"]
        and type(out.lists()["predictions"][0]) is int
    )


def test_a_row_under_the_threshold_abstains_and_keeps_its_probabilities():
    values = torch.log(torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8], [0.31, 0.69]]))
    out = Postprocessor(threshold=0.7)(values)
    assert out.predictions.tolist() == [0, ABSTAIN, 1, ABSTAIN] and ABSTAIN == -1
    assert out.confidences.tolist() == pytest.approx([0.7, 0.5, 0.8, 0.69])
    assert out.probabilities[3].tolist() == pytest.approx([0.31, 0.69])


@pytest.mark.parametrize("threshold", [0, 0.0, 0.25, 1, 1.0])
def test_a_confidence_equal_to_the_threshold_is_enough(threshold):
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    even = torch.zeros(1, 4)  # confidence 0.25
    assert Postprocessor(threshold=threshold)(certain).predictions.tolist() == [0]
    assert Postprocessor(threshold=threshold)(even).predictions.tolist() == [
        0 if threshold <= 0.25 else ABSTAIN
    ]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((5,), (5,)),
        ((5, 1), (5,)),
        ((5, 3), (5, 3)),
        ((1, 1), (1,)),
        ((1,), (1,)),
        ((1, 2), (1, 2)),
    ],
)
def test_a_regression_gives_the_values_as_they_are(shape, wanted):
    values = torch.randn(shape)
    out = Postprocessor("regression")(values)
    assert out.predictions.shape == wanted and out.rows == shape[0]
    assert out.predictions.tolist() == values.reshape(wanted).tolist()
    assert (
        out.confidences is None
        and out.probabilities is None
        and list(out.lists()) == ["predictions"]
    )


@pytest.mark.parametrize("output_type", ["classification", "regression"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 3000])
def test_an_output_that_is_not_finite_is_refused(output_type, value, rows):
    values = torch.zeros(rows, 3)
    values[rows // 2] = value
    with pytest.raises(
        ModelExecutionError, match="not finite: check its weights and the input's scale"
    ):
        Postprocessor(output_type)(values)


def test_a_logit_of_minus_infinity_is_a_class_that_cannot_be():
    out = Postprocessor()(torch.tensor([[0.0, -math.inf, 0.0]]))
    assert out.lists() == {
        "predictions": [0],
        "confidences": [0.5],
        "probabilities": [[0.5, 0.0, 0.5]],
    }
    with pytest.raises(ModelExecutionError, match="logits are not finite"):
        Postprocessor()(torch.tensor([[0.0, math.inf, 0.0]]))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e5m2,
    ],
)
def test_outputs_of_any_real_dtype_answer_in_float32(dtype):
    values = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    wanted = Postprocessor()(values.float())
    assert Postprocessor()(values).lists() == wanted.lists()
    assert Postprocessor("regression")(values).predictions.dtype == np.float32


def test_outputs_may_be_arrays_lists_or_still_in_the_graph():
    wanted = Postprocessor()(torch.tensor([[1.0, 2.0]])).lists()
    for values in (
        [[1.0, 2.0]],
        np.array([[1.0, 2.0]]),
        torch.tensor([[1.0, 2.0]], requires_grad=True) * 1,
    ):
        got = Postprocessor()(values).lists()
        assert all(np.allclose(got[name], wanted[name], rtol=1e-6, atol=0) for name in wanted), (
            "NumPy's softmax rounds"
        )


@pytest.mark.parametrize(
    ("output_type", "shape", "seen"),
    [
        ("classification", (4,), r"shape \(4,\): classification takes logits \[N, C\]"),
        ("classification", (), r"shape \(\)"),
        ("classification", (2, 3, 4), r"shape \(2, 3, 4\)"),
        ("classification", (2, 0), r"shape \(2, 0\)"),
        ("classification", (0, 2), r"shape \(0, 2\)"),
        ("regression", (), r"shape \(\): regression takes values \[N\] or \[N, K\]"),
        ("regression", (2, 3, 4), r"shape \(2, 3, 4\)"),
        ("regression", (2, 0), r"shape \(2, 0\)"),
    ],
)
def test_outputs_of_another_shape_are_refused(output_type, shape, seen):
    with pytest.raises(ModelExecutionError, match=seen):
        Postprocessor(output_type)(torch.zeros(shape))


def test_complex_outputs_are_refused():
    with pytest.raises(ModelExecutionError, match=r"outputs are torch\.complex64"):
        Postprocessor()(torch.zeros(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "value", ["", "Classification", "ranking", None, 1, ["classification"], np.array(["a", "b"])]
)
def test_an_unknown_output_type_is_refused_and_the_known_ones_are_named(value):
    with pytest.raises(ConfigError, match="choose one of classification, regression"):
        Postprocessor(value)


@pytest.mark.parametrize(
    "value", [-0.001, 1.001, math.nan, math.inf, "0.5", None, True, [0.5], np.array([0.1, 0.2])]
)
def test_a_threshold_is_a_probability(value):
    with pytest.raises(ConfigError, match=r"threshold is .*: use a number in \[0, 1\]"):
        Postprocessor(threshold=value)


def test_a_regression_has_no_threshold():
    assert Postprocessor("regression", 0.0).threshold == 0
    with pytest.raises(ConfigError, match=r"threshold is 0.5: a regression has no confidence"):
        Postprocessor("regression", 0.5)


def test_policies_tell_apart_whatever_answers_differently():
    thresholds = [0.0, 0.5, 0.1234567, 0.12345671, math.nextafter(0.5, 1), 1.0]
    policies = {Postprocessor(threshold=t).policy for t in thresholds} | {
        Postprocessor("regression").policy
    }
    assert len(policies) == len(thresholds) + 1
    assert Postprocessor(threshold=0.5).policy == Postprocessor(threshold=0.5).policy


def test_lists_of_a_batch_are_made_once():
    whole = Outputs(np.arange(3), np.zeros(3, np.float32), np.zeros((3, 2), np.float32))
    assert whole.lists() is whole.lists()
    assert whole.nbytes == 3 * 8 + 3 * 4 + 6 * 4
    assert whole.copy_rows(1, 3).lists()["predictions"] == [1, 2]
