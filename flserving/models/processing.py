"""What happens to numbers before and after the model: validation and normalisation, softmax and
abstention.

Both sides work on a whole batch at once. :class:`Several` is for requests that are sent together.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flserving.errors import ConfigError, InvalidInputError, ModelExecutionError, check_number

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
OutputType = Literal["classification", "regression"]
ONE_OUTPUT = (
    "a classifier with one output would answer class 0 with confidence 1.0 to every row, for a softmax over one logit "
    "is 1: give it two outputs (a sigmoid's model becomes one when a constant 0 is put before its logit), or serve its "
    "number with output_type='regression'"
)
_REAL = "biuf"  # numpy's kinds of dtype: bool, integers, floats
ABSTAIN = -1
"""The prediction of a row whose confidence is under the threshold (scikit-learn's label for
"unlabelled")."""


def _is_finite(x: NDArray[Any]) -> bool:
    """Whether every element is finite. The dot product with itself shows it in one pass for the
    usual small row (vdot: dot warns when it overflows); only an overflow needs a second look."""
    if x.size <= 4096 and math.isfinite(np.vdot(x, x)):
        return True
    return bool(np.isfinite(x).all())


def _tensor(rows: Floats) -> "Tensor":
    import torch  # not before it is asked for: a device may have none

    return torch.as_tensor(rows)  # of one number, too, which numpy makes no array


class Preprocessor:
    """Features -> float32: checked, and standardised with the statistics of the training data.

    Rows stay flat, [N, D], from the check to the model, which gets them in its own shape.

    Example:
        >>> preprocess = Preprocessor(mean=[1, 2], std=[2, 4])
        >>> preprocess([[3, 2]])
        tensor([[1., 0.]])

    Args:
        normalize: Apply ``(x - mean) / std`` where statistics are given; False shows what
            training-serving skew does.
        mean: Per-feature mean, [D]. ``std``: per-feature standard deviation, [D], >= 0. Give both
            or neither. One number stands for all features. A constant feature (std 0) is centred
            and left unscaled, as in scikit-learn's StandardScaler. With an ``input_shape`` also
            what broadcasts to it: [3, 1, 1] holds one number per channel.
        num_features: Expected D; taken from the statistics where they are given. None accepts any
            width.
        input_shape: Shape of one row as the model takes it, e.g. (3, 32, 32); D is then its
            product. None: (D,).

    Raises:
        ConfigError: One statistic without the other, different lengths, negative or non-finite
            values, an absurd D.
    """

    def __init__(
        self,
        normalize: bool = True,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
        num_features: int | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        self.normalize = normalize
        self.input_shape: tuple[int, ...] | None = None  # None: (D,)
        if input_shape is not None:
            num_features = self._shaped(input_shape, num_features)
        if num_features is not None:
            check_number("num_features", num_features, 1, math.inf, whole=True)
        self.num_features = num_features
        self.mean: Floats | None = None
        self.std: Floats | None = None
        if mean is not None and std is not None:
            self._set_statistics(self._statistic("mean", mean), self._statistic("std", std))
        elif mean is not None or std is not None:
            raise ConfigError(
                f"{'std' if std is None else 'mean'} is missing: give mean and std, or neither"
            )

    def _set_statistics(self, mean: Floats, std: Floats) -> None:
        """Each of them [D], or [] where one number stands for all features."""
        widths = {statistic.size for statistic in (mean, std) if statistic.ndim}
        if len(widths) == 2:
            raise ConfigError(
                f"mean has {mean.size} features, std has {std.size}: one of them is wrong"
            )
        if (std < 0).any():
            raise ConfigError(f"std holds {std.min():g}: a standard deviation is not negative")
        for width in widths:
            if self.num_features not in (None, width):
                raise ConfigError(
                    f"statistics have {width} features, the model takes {self.num_features}"
                )
            self.num_features = width
        if self.num_features is not None:
            mean = np.resize(mean, self.num_features)
            std = np.resize(std, self.num_features)
        self.mean = mean
        self.std = std
        # A constant feature is only centred; so is one with a subnormal std, whose inverse may
        # overflow float32.
        divisor = np.where(std >= np.finfo(np.float32).tiny, std, np.float32(1))
        with np.errstate(under="ignore"):
            self._arrays = mean, np.reciprocal(divisor)

    @cached_property
    def _tensors(self) -> "tuple[Tensor, Tensor]":
        shift, scale = map(_tensor, self._arrays)
        return shift, scale

    def _shaped(self, input_shape: Sequence[int], num_features: int | None) -> int:
        """Keep the shape of a row; returns its number of features."""
        shape: tuple[int, ...] = (0,)
        if isinstance(input_shape, Sequence):
            shape = tuple(input_shape)
        if not all(type(size) is int and size > 0 for size in shape):
            raise ConfigError(
                f"input_shape is {input_shape!r}: give the sizes of one row, e.g. (3, 32, 32)"
            )
        size = math.prod(shape)
        if num_features not in (None, size):
            raise ConfigError(
                f"input_shape {list(shape)} has {size} numbers, num_features is {num_features!r}"
            )
        if len(shape) != 1:
            self.input_shape = shape
        return size

    def _statistic(self, name: str, values: ArrayLike) -> Floats:
        """``values`` as float32 [D], or as [] where it is one number."""
        try:
            array = np.asarray(values)
            if self.input_shape is not None and array.ndim == len(self.input_shape):
                array = np.broadcast_to(array, self.input_shape).ravel()
        except Exception as error:
            raise ConfigError(f"{name} is not a list of numbers: {error}") from error
        if array.ndim > 1 or not array.size or array.dtype.kind not in _REAL:
            raise ConfigError(
                f"{name} has shape {array.shape} and dtype {array.dtype}: give one number per feature"
            )
        with np.errstate(all="ignore"):  # beyond float32 becomes infinite
            numbers = array.astype(np.float32)
        if not _is_finite(numbers):
            worst = int(np.isfinite(numbers).argmin())
            raise ConfigError(
                f"{name} of feature {worst} is {array.flat[worst]}: it must be finite in float32"
            )
        return numbers

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row as the model takes it; (0,) where it is not known."""
        return self.input_shape or (self.num_features or 0,)

    @property
    def digest(self) -> str:
        """sha256 of what the statistics do to the data: equal digests, equal preprocessing."""
        if self.mean is None or self.std is None or not self.normalize:
            return hashlib.sha256(b"identity").hexdigest()
        return hashlib.sha256(b"standardise" + self.mean.tobytes() + self.std.tobytes()).hexdigest()

    def validate(self, features: Any, max_rows: int | None = None) -> Floats:
        """Check one request: a row [D] or rows [N, D] of real numbers (array, tensor, nested lists)
        -> float32 [N, D].

        Where the model takes rows of another shape than [D], a row or rows of that shape, too: no
        request can be read in two ways. No copy where the input is a float32 array already. Cost:
        about 1 us for one small row.

        Raises:
            InvalidInputError: Ragged, empty, of the wrong width or dtype, too many rows, NaN or
                infinite.
        """
        if type(features) is not np.ndarray:
            features = self._to_array(features)
        if features.dtype != np.float32:
            features = self._to_float32(features)
        if self.input_shape is not None:
            features = self._flat(features)
        if features.ndim == 1:
            features = features.reshape(1, -1)
        if features.ndim != 2 or not features.size:
            row = ", ".join(map(str, self.input_shape or ["D"]))
            raise InvalidInputError(
                f"features have shape {features.shape}: send one row [{row}] or rows [N, {row}], not empty"
            )
        if self.num_features is not None and features.shape[1] != self.num_features:
            raise InvalidInputError(
                f"rows have {features.shape[1]} features, the model takes {self.num_features}"
            )
        if max_rows is not None and len(features) > max_rows:
            raise InvalidInputError(
                f"request has {len(features)} rows, the limit is {max_rows}: split it, or raise max_request_rows"
            )
        if not _is_finite(features):
            row, column = np.argwhere(~np.isfinite(features))[0]
            raise InvalidInputError(
                f"row {row}, feature {column} is {features[row, column]}: every number must be finite in float32"
            )
        return features  # type: ignore[no-any-return]

    def standardise(
        self, rows: Floats, in_place: bool = False, tensor: Callable[[Floats], Any] | None = None
    ) -> Any:
        """Validated rows [N, D] -> float32 [N, *input_shape], standardised where there are
        statistics: torch's tensor, or what an engine's ``tensor`` makes of an array.

        A copy, unless ``in_place``: the model may work in place, and the caller's array is not
        ours. A value too large for the statistics becomes infinite, which :class:`Postprocessor`
        refuses.
        """
        if not in_place:
            rows = rows.copy()
        values = (tensor or _tensor)(rows)
        if self.mean is not None and self.normalize:
            shift, scale = self._arrays if values is rows else self._tensors
            values -= shift
            values *= scale
        if self.input_shape is not None:
            values = values.reshape(-1, *self.input_shape)
        return values

    def __call__(self, features: Any) -> "Tensor":
        """Validate and standardise: features -> float32 tensor [N, *input_shape]."""
        values: Tensor = self.standardise(self.validate(features))
        return values

    @classmethod
    def rows_of_any_shape(cls, features: Any) -> Floats:
        """Numbers float32, checked as :meth:`validate` does, of at least two dimensions: for who
        sends them to where the shape is known."""
        preprocess = cls()
        array = preprocess._to_array(features)
        if array.ndim <= 2:
            return preprocess.validate(array)
        return preprocess.validate(array.reshape(len(array), -1)).reshape(array.shape)

    def _to_array(self, features: Any) -> NDArray[Any]:
        if isinstance(features, Several):
            return features.rows(self.validate)
        if isinstance(features, np.ma.MaskedArray):
            raise InvalidInputError("features are a masked array: fill the missing values first")
        try:
            if hasattr(features, "is_floating_point"):  # torch's
                if features.is_floating_point():
                    features = features.float()  # numpy does not know bfloat16
                features = features.numpy(force=True)
            return np.asarray(features)
        except Exception as error:  # whatever the object's own conversion raises
            raise InvalidInputError(
                f"features are not a table of numbers ({error}): send an array, a tensor or rows of one length"
            ) from error

    def _to_float32(self, features: NDArray[Any]) -> Floats:
        if features.dtype.kind not in _REAL:
            raise InvalidInputError(f"features have dtype {features.dtype}: send real numbers")
        # what is too large for float32 becomes infinite, which is refused later
        with np.errstate(all="ignore"):
            return features.astype(np.float32)

    def _flat(self, features: Floats) -> Floats:
        """Rows of the model's own shape as rows [N, D]; anything else as it is."""
        shape = self.input_shape or ()
        extra = features.ndim - len(shape)  # 1: the batch; 0: a row of its own
        if extra in (0, 1) and features.shape[extra:] == shape:
            return features.reshape(-1, math.prod(shape))
        return features


class Outputs(Mapping[str, list[Any]]):
    """What a model said about N rows: arrays for the whole batch, and their lists, made at most
    once.

    As a mapping it holds the lists by the names of the answer's keys: ``outputs["predictions"]``.

    ``predictions`` int64 [N] (classification) or float32 [N] or [N, K] (regression);
    ``confidences`` float32 [N] and ``probabilities`` float32 [N, C] for classification, else None.
    """

    __slots__ = ("_lists", "confidences", "predictions", "probabilities")

    def __init__(
        self,
        predictions: NDArray[Any],
        confidences: Floats | None = None,
        probabilities: Floats | None = None,
    ) -> None:
        self.predictions = predictions
        self.confidences = confidences
        self.probabilities = probabilities
        self._lists: dict[str, list[Any]] | None = None

    @property
    def rows(self) -> int:
        """N."""
        return len(self.predictions)

    def __getitem__(self, name: str) -> list[Any]:
        return self.lists()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays())

    def __len__(self) -> int:
        return len(self.arrays())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The outputs that exist, by the names of the answer's keys."""
        named = {
            "predictions": self.predictions,
            "confidences": self.confidences,
            "probabilities": self.probabilities,
        }
        return {name: array for name, array in named.items() if array is not None}

    def lists(self) -> dict[str, list[Any]]:
        """:meth:`arrays` as plain Python lists: one conversion a batch, not one a request.

        A cached answer (:meth:`copy_rows`) is converted each time: it goes to many callers, and to
        whom a list is given may write to it.
        """
        if self._lists is not None:
            return self._lists
        lists = {name: array.tolist() for name, array in self.arrays().items()}
        if self.predictions.flags.writeable:
            self._lists = lists
        return lists

    def copy_rows(self, start: int, stop: int) -> "Outputs":
        """Rows [start, stop) in arrays of their own, which nobody may write to."""
        parts = {name: array[start:stop].copy() for name, array in self.arrays().items()}
        for array in parts.values():
            array.setflags(write=False)
        return Outputs(**parts)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


def _float32(values: Any) -> Any:
    """A model's outputs in float32: torch's as torch's, anything else as an array."""
    if hasattr(values, "requires_grad"):
        if values.requires_grad:
            values = values.detach()
        if not values.is_complex():
            return values.float()
    else:
        values = np.asarray(values)
        if values.dtype.kind in _REAL:
            return values.astype(np.float32, copy=False)
    raise ModelExecutionError(
        f"the model's outputs are {values.dtype}: it must answer real numbers"
    )


def _softmax(logits: Any) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Probabilities [N, C], the highest of each row, and its class."""
    if not isinstance(logits, np.ndarray):  # torch's
        probabilities = logits.softmax(1)
        top, classes = probabilities.max(1)
        return probabilities.numpy(), top.numpy(), classes.numpy()
    with np.errstate(all="ignore"):  # what is not finite is found in the highest
        powers = np.exp(logits - logits.max(1, keepdims=True))
        shares = powers / powers.sum(1, keepdims=True)
    return shares, shares.max(1), shares.argmax(1)


class Postprocessor:
    """Model outputs -> predictions, and for classification confidences and probabilities.

    Example:
        >>> Postprocessor("regression")([0.5, 2.0])["predictions"]
        [0.5, 2.0]
        >>> Postprocessor(threshold=0.9)([[0.0, 0.0]])["predictions"]
        [-1]

    Args:
        output_type: ``classification`` (softmax over logits [N, C]) or ``regression`` (values [N]
            or [N, K] as they are).
        threshold: Classification only: a row whose highest probability is below it abstains
            (prediction ``ABSTAIN``, -1).

    Raises:
        ConfigError: An unknown output type, or a threshold outside [0, 1], or one for regression.
    """

    def __init__(self, output_type: OutputType = "classification", threshold: float = 0.0) -> None:
        if not isinstance(output_type, str) or output_type not in get_args(OutputType):
            raise ConfigError(
                f"output_type is {output_type!r}: choose one of {', '.join(get_args(OutputType))}"
            )
        check_number("threshold", threshold, 0, 1)
        if threshold and output_type == "regression":
            raise ConfigError(
                f"threshold is {threshold}: a regression has no confidence to compare it with"
            )
        self.output_type = output_type
        self.threshold = threshold

    @property
    def policy(self) -> str:
        """Names what a caller gets to see; part of the prediction cache's key."""
        return f"{self.output_type}/{self.threshold}"

    def __call__(self, values: Any) -> Outputs:
        """Logits [N, C], or values [N] or [N, K], of any real dtype -> :class:`Outputs` of N rows.

        Raises:
            ModelExecutionError: Another shape, a classifier's single logit, or something in the
                outputs is not finite (for logits: after the softmax, so a logit of minus infinity
                is a class that cannot be).
        """
        values = _float32(values)
        if self.output_type == "regression":
            return self._regression(values)
        if values.ndim != 2 or 0 in values.shape:
            raise self._misshapen(values, "logits [N, C]")
        if values.shape[1] == 1:
            raise ModelExecutionError(ONE_OUTPUT)
        probabilities, confidences, predictions = _softmax(values)
        if not _is_finite(confidences):  # NaN if any logit of the row was NaN or +inf
            raise ModelExecutionError(
                "the model's logits are not finite: check its weights and the input's scale"
            )
        if self.threshold:
            predictions[confidences < self.threshold] = ABSTAIN
        return Outputs(predictions, confidences, probabilities)

    def _regression(self, values: "Tensor | Floats") -> Outputs:
        if values.ndim not in (1, 2) or 0 in values.shape:
            raise self._misshapen(values, "values [N] or [N, K]")
        array = np.asarray(values)
        if not _is_finite(array):
            raise ModelExecutionError(
                "the model's output is not finite: check its weights and the input's scale"
            )
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        return Outputs(array)

    def _misshapen(self, values: "Tensor | Floats", wanted: str) -> ModelExecutionError:
        return ModelExecutionError(
            f"the model's outputs have shape {tuple(values.shape)}: {self.output_type} takes {wanted}"
        )


class Several:
    """Several requests, each a row or rows, that are answered as one. They are checked where the
    model's shape is known; then ``lengths`` holds the number of rows of each."""

    def __init__(self, batch: Any) -> None:
        self.requests: Any = list(batch) if isinstance(batch, Iterable) else batch
        self.lengths: list[int] = []

    def rows(self, validate: Callable[[Any], Floats]) -> Floats:
        """All rows, float32 [N, D]. Raises InvalidInputError."""
        if not isinstance(self.requests, list):
            raise InvalidInputError(
                f"batch is a {type(self.requests).__name__}: send a list of requests"
            )
        if not self.requests:
            raise InvalidInputError("the batch is empty: send at least one request")
        parts = []
        for number, features in enumerate(self.requests):
            try:
                parts.append(validate(features))
            except InvalidInputError as error:
                raise InvalidInputError(f"request {number} of the batch: {error}") from error
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise InvalidInputError(
                f"rows have {sorted(widths)} features: every request needs the model's number"
            )
        self.lengths = [len(part) for part in parts]
        return np.concatenate(parts)


def ids_of(client: str | Sequence[str], rows: int) -> str | tuple[str, ...]:
    """One id, or a copy of one for each row: what was looked up is what is cached, whatever becomes
    of the caller's."""
    if isinstance(client, str):
        return client
    ids = tuple(client) if isinstance(client, Sequence) else ()
    if len(ids) != rows or not all(isinstance(one, str) for one in ids):
        raise InvalidInputError(
            f"client is {str(client)[:80]!r} for {rows} rows: give one id, or one for each row; ids are text"
        )
    return ids
