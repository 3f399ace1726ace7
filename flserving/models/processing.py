"""What happens to numbers before and after the model: validation and normalisation, softmax and abstention.

Both sides work on a whole batch at once.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flserving.errors import ConfigError, InvalidInputError, ModelExecutionError

Floats = NDArray[np.float32]
OutputType = Literal["classification", "regression"]
ONE_OUTPUT = (
    "a classifier with one output would answer class 0 with confidence 1.0 to every row, for a softmax over one logit "
    "is 1: give it two outputs (a sigmoid's model becomes one when a constant 0 is put before its logit), or serve its "
    "number with output_type='regression'"
)
_REAL = "biuf"  # numpy's kinds of dtype: bool, integers, floats
ABSTAIN = -1
"""The prediction of a row whose confidence is under the threshold (scikit-learn's label for "unlabelled")."""


def _is_finite(x: NDArray[Any]) -> bool:
    """Whether every element is finite. The dot product with itself tells in one pass for the usual small row (vdot:
    dot warns when it overflows); only an overflow needs a second look."""
    return (x.size <= 4096 and math.isfinite(np.vdot(x, x))) or bool(np.isfinite(x).all())


class Several:
    """Several requests, each a row or rows, that are to be answered as one. They are checked where the model's shape
    is known; ``lengths`` holds their numbers of rows then."""

    def __init__(self, batch: Any) -> None:
        self.requests: Any = list(batch) if isinstance(batch, Iterable) else batch
        self.lengths: list[int] = []

    def rows(self, validate: Callable[[Any], Floats]) -> Floats:
        """All rows, float32 [N, D]. Raises InvalidInputError."""
        if not isinstance(self.requests, list):
            raise InvalidInputError(f"batch is a {type(self.requests).__name__}: send a list of requests")
        if not self.requests:
            raise InvalidInputError("the batch is empty: send at least one request")
        parts = []
        for number, features in enumerate(self.requests):
            try:
                parts.append(validate(features))
            except InvalidInputError as error:
                raise InvalidInputError(f"request {number} of the batch: {error}") from error
        if len(widths := {part.shape[1] for part in parts}) > 1:
            raise InvalidInputError(f"rows have {sorted(widths)} features: every request needs the model's number")
        self.lengths = [len(part) for part in parts]
        return np.concatenate(parts)


def ids_of(client: str | Sequence[str], rows: int) -> str | tuple[str, ...]:
    """One id, or a copy of one for each row: what was looked up is what is cached, whatever becomes of the caller's."""
    if isinstance(client, str):
        return client
    ids = tuple(client) if isinstance(client, Sequence) else ()
    if len(ids) != rows or not all(isinstance(one, str) for one in ids):
        raise InvalidInputError(
            f"client is {str(client)[:80]!r} for {rows} rows: give one id, or one for each row; ids are text"
        )
    return ids


class Preprocessor:
    """Features -> float32: checked, and standardised with the statistics of the training data.

    Rows are kept flat, [N, D], from the check to the model, which gets them in its own shape.

    Args:
        normalize: Apply ``(x - mean) / std`` where statistics are given; False shows what training-serving skew does.
        mean: Per-feature mean, [D]. ``std``: per-feature standard deviation, [D], >= 0. Give both or neither.
            One number stands for all features. A constant feature (std 0) is centred and left unscaled, as in
            scikit-learn's StandardScaler. With an ``input_shape`` also what broadcasts to it: [3, 1, 1] holds one
            number per channel.
        num_features: Expected D; taken from the statistics where they are given. None accepts any width.
        input_shape: Shape of one row as the model takes it, e.g. (3, 32, 32); D is then its product. None: (D,).

    Raises:
        ConfigError: One statistic without the other, different lengths, negative or non-finite values, an absurd D.
    """

    def __init__(
        self,
        normalize: bool = True,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
        num_features: int | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        self.input_shape: tuple[int, ...] | None = None  # None: (D,)
        if input_shape is not None:
            num_features = self._shaped(input_shape, num_features)
        if (mean is None) != (std is None):
            raise ConfigError(f"{'mean' if mean is None else 'std'} is missing: give mean and std, or neither")
        if num_features is not None and (type(num_features) is not int or num_features < 1):
            raise ConfigError(f"num_features is {num_features!r}: it must be an integer, at least 1")
        self.normalize = normalize
        self.num_features = num_features
        self.mean = None
        self.std = None
        if mean is not None and std is not None:
            self.mean = self._statistic("mean", mean)
            self.std = self._statistic("std", std)
            width = max(self.mean.size if self.mean.ndim else 0, self.std.size if self.std.ndim else 0)
            width = width or num_features or 0
            if width:  # else one number for rows of any width
                self.mean = self.mean if self.mean.ndim else np.full(width, self.mean)
                self.std = self.std if self.std.ndim else np.full(width, self.std)
            if self.mean.shape != self.std.shape:
                raise ConfigError(f"mean has {len(self.mean)} features, std has {len(self.std)}: one of them is wrong")
            if (self.std < 0).any():
                raise ConfigError(f"std holds {self.std.min():g}: a standard deviation is not negative")
            if width:
                if num_features not in (None, width):
                    raise ConfigError(f"statistics have {width} features, the model takes {num_features}")
                self.num_features = width
            # A constant feature is only centred; so is one with a subnormal std, whose inverse may overflow float32.
            std = np.where(self.std >= np.finfo(np.float32).tiny, self.std, np.float32(1))
            self._shift = torch.as_tensor(self.mean)
            self._scale = torch.as_tensor(std).reciprocal()

    def _shaped(self, input_shape: Sequence[int], num_features: int | None) -> int:
        """Keep the shape of a row; returns its number of features."""
        shape = tuple(input_shape) if isinstance(input_shape, Sequence) else (0,)
        if not all(type(size) is int and size > 0 for size in shape):
            raise ConfigError(f"input_shape is {input_shape!r}: give the sizes of one row, e.g. (3, 32, 32)")
        size = math.prod(shape)
        if num_features not in (None, size):
            raise ConfigError(f"input_shape {list(shape)} has {size} numbers, num_features is {num_features!r}")
        self.input_shape = None if len(shape) == 1 else shape
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
            raise ConfigError(f"{name} has shape {array.shape} and dtype {array.dtype}: give one number per feature")
        with np.errstate(all="ignore"):  # beyond float32 becomes infinite
            numbers = array.astype(np.float32)
        if not _is_finite(numbers):
            worst = int(np.isfinite(numbers).argmin())
            raise ConfigError(f"{name} of feature {worst} is {array.flat[worst]}: it must be finite in float32")
        return numbers

    @property
    def digest(self) -> str:
        """sha256 of what the statistics do to the data: equal digests, equal preprocessing."""
        if self.mean is None or self.std is None or not self.normalize:
            return hashlib.sha256(b"identity").hexdigest()
        return hashlib.sha256(b"standardise" + self.mean.tobytes() + self.std.tobytes()).hexdigest()

    def validate(self, features: Any, max_rows: int | None = None) -> Floats:
        """Check one request: a row [D] or rows [N, D] of real numbers (array, tensor, nested lists) -> float32 [N, D].

        Where the model takes rows of another shape than [D], a row or rows of that shape, too: no request can be read
        in two ways. No copy where the input is a float32 array already. Cost: about 1 us for one small row.

        Raises:
            InvalidInputError: Ragged, empty, of the wrong width or dtype, too many rows, NaN or infinite.
        """
        if type(features) is not np.ndarray:
            features = features.rows(self.validate) if type(features) is Several else self._to_array(features)
        if features.dtype != np.float32:
            if features.dtype.kind not in _REAL:
                raise InvalidInputError(f"features have dtype {features.dtype}: send real numbers")
            with np.errstate(all="ignore"):  # beyond float32 becomes infinite, which is refused below
                features = features.astype(np.float32)
        if self.input_shape is not None:
            extra = features.ndim - len(self.input_shape)  # 1: the batch; 0: a row of its own
            if extra in (0, 1) and features.shape[extra:] == self.input_shape:
                features = features.reshape(-1, self.num_features)
        if features.ndim == 1:
            features = features.reshape(1, -1)
        if features.ndim != 2 or not features.size:
            row = ", ".join(map(str, self.input_shape or ["D"]))
            raise InvalidInputError(
                f"features have shape {features.shape}: send one row [{row}] or rows [N, {row}], not empty"
            )
        if self.num_features is not None and features.shape[1] != self.num_features:
            raise InvalidInputError(f"rows have {features.shape[1]} features, the model takes {self.num_features}")
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

    @classmethod
    def rows_of_any_shape(cls, features: Any) -> Floats:
        """Numbers float32, checked as :meth:`validate` does, of at least two dimensions: for who sends them to where
        the shape is known."""
        array = cls._to_array(features)
        if array.ndim <= 2:
            return cls().validate(array)
        return cls().validate(array.reshape(len(array), -1)).reshape(array.shape)

    @staticmethod
    def _to_array(features: Any) -> NDArray[Any]:
        if isinstance(features, np.ma.MaskedArray):
            raise InvalidInputError("features are a masked array: fill the missing values first")
        try:
            if isinstance(features, torch.Tensor):  # numpy does not know bfloat16
                features = (features.float() if features.is_floating_point() else features).numpy(force=True)
            return np.asarray(features)
        except Exception as error:  # whatever the object's own conversion raises
            raise InvalidInputError(
                f"features are not a table of numbers ({error}): send an array, a tensor or rows of one length"
            ) from error

    def standardise(self, rows: Floats, in_place: bool = False) -> torch.Tensor:
        """Validated rows [N, D] -> float32 tensor [N, *input_shape], standardised where there are statistics.

        A copy, unless ``in_place``: the model may work in place, and the caller's array is not ours. A value too large
        for the statistics becomes infinite, which :class:`Postprocessor` refuses.
        """
        values = torch.from_numpy(rows if in_place else rows.copy())
        if self.mean is not None and self.normalize:
            values.sub_(self._shift).mul_(self._scale)
        return values if self.input_shape is None else values.view(-1, *self.input_shape)

    def __call__(self, features: Any) -> torch.Tensor:
        """Validate and standardise: features -> float32 tensor [N, *input_shape]."""
        return self.standardise(self.validate(features))


class Outputs(Mapping[str, list[Any]]):
    """What a model said about N rows: arrays for the whole batch, and their lists, made at most once.

    As a mapping it holds the lists by the names of the answer's keys: ``outputs["predictions"]``.

    ``predictions`` int64 [N] (classification) or float32 [N] or [N, K] (regression); ``confidences`` float32 [N] and
    ``probabilities`` float32 [N, C] for classification, else None.
    """

    __slots__ = ("_lists", "confidences", "predictions", "probabilities")

    def __init__(
        self, predictions: NDArray[Any], confidences: Floats | None = None, probabilities: Floats | None = None
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
        named = {"predictions": self.predictions, "confidences": self.confidences, "probabilities": self.probabilities}
        return {name: array for name, array in named.items() if array is not None}

    def lists(self) -> dict[str, list[Any]]:
        """:meth:`arrays` as plain Python lists: one conversion a batch, not one a request.

        A cached answer (:meth:`copy_rows`) is converted each time: it goes to many callers, and to whom a list is given
        may write to it.
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


class Postprocessor:
    """Model outputs -> predictions, and for classification confidences and probabilities.

    Args:
        output_type: ``classification`` (softmax over logits [N, C]) or ``regression`` (values [N] or [N, K] as they
            are).
        threshold: Classification only: a row whose highest probability is below it abstains (prediction ``ABSTAIN``,
            -1).

    Raises:
        ConfigError: An unknown output type, or a threshold outside [0, 1], or one for regression.
    """

    def __init__(self, output_type: OutputType = "classification", threshold: float = 0.0) -> None:
        if not isinstance(output_type, str) or output_type not in get_args(OutputType):
            raise ConfigError(f"output_type is {output_type!r}: choose one of {', '.join(get_args(OutputType))}")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is {threshold!r}: it must be a probability in [0, 1]")
        if threshold and output_type == "regression":
            raise ConfigError(f"threshold is {threshold}: a regression has no confidence to compare it with")
        self.output_type = output_type
        self.threshold = threshold

    @property
    def policy(self) -> str:
        """Names what a caller gets to see; part of the prediction cache's key."""
        return f"{self.output_type}/{self.threshold}"

    def __call__(self, values: Any) -> Outputs:
        """Logits [N, C], or values [N] or [N, K], of any real dtype -> :class:`Outputs` of N rows.

        Raises:
            ModelExecutionError: Another shape, a classifier's single logit, or something in the outputs is not finite
                (for logits: after the softmax, so a logit of minus infinity is a class that cannot be).
        """
        if type(values) is not torch.Tensor or values.dtype is not torch.float32 or values.requires_grad:
            values = torch.as_tensor(values).detach()
            if values.is_complex():
                raise ModelExecutionError(f"the model's outputs are {values.dtype}: it must answer real numbers")
            values = values.float()
        regression = self.output_type == "regression"
        dims = values.dim()
        if (dims != 2 and not (dims == 1 and regression)) or not values.numel():
            raise ModelExecutionError(
                f"the model's outputs have shape {tuple(values.shape)}: {self.output_type} takes "
                f"{'values [N] or [N, K]' if regression else 'logits [N, C]'}"
            )
        if regression:
            array = values.numpy()
            if not _is_finite(array):
                raise ModelExecutionError("the model's output is not finite: check its weights and the input's scale")
            return Outputs(array[:, 0] if dims == 2 and array.shape[1] == 1 else array)
        if values.shape[1] == 1:
            raise ModelExecutionError(ONE_OUTPUT)
        probabilities = torch.softmax(values, 1)
        top, classes = probabilities.max(1)
        confidences = top.numpy()
        predictions = classes.numpy()
        if not _is_finite(confidences):  # NaN if any logit of the row was NaN or +inf
            raise ModelExecutionError("the model's logits are not finite: check its weights and the input's scale")
        if self.threshold:
            predictions[confidences < self.threshold] = ABSTAIN
        return Outputs(predictions, confidences, probabilities.numpy())
