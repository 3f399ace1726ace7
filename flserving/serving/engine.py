"""The inference engine: one loaded model version with its pre- and postprocessing. Usable alone in
a notebook.

:class:`PersonalEngine` runs the same version with one head per client.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flserving import models
from flserving.errors import (
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    ModelExecutionError,
)
from flserving.models.plain import NumpyModel
from flserving.models.processing import Floats, Outputs, Postprocessor, Preprocessor
from flserving.models.weights import nbytes_of
from flserving.monitoring.telemetry import Executions
from flserving.registry.heads import EXPIRED, STALE, UNKNOWN, HeadStore
from flserving.serving.config import ServingConfig, checked

if TYPE_CHECKING:
    from torch import nn

Clock = Callable[[], float]
Slots = NDArray[np.int64]
Answer = dict[str, Any]
"""What a caller gets: predictions, confidences and probabilities, and what is said of them, by
name."""
_FOUND = {UNKNOWN: "unknown", STALE: "stale", EXPIRED: "expired"}


class Execution(NamedTuple):
    """What one run of the model gave, and when: ``marks_s`` are start, preprocessed, inferred,
    postprocessed."""

    outputs: Outputs
    marks_s: tuple[float, float, float, float]


class Prediction(NamedTuple):
    """One request's rows [start, stop) of an execution."""

    execution: Execution
    start: int
    stop: int

    def lists(self) -> dict[str, list[Any]]:
        """predictions, confidences, probabilities of this request as plain lists."""
        outputs = self.execution.outputs
        lists = outputs.lists()
        if self.stop - self.start == outputs.rows:
            return dict(lists)
        return {name: values[self.start : self.stop] for name, values in lists.items()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as views of the batch's arrays: read them, do not write to them."""
        return {
            name: values[self.start : self.stop]
            for name, values in self.execution.outputs.arrays().items()
        }


class Engine:
    """What runs validated rows as batches, in chunks of ``max_batch_size``, and counts how long
    that took."""

    def __init__(
        self,
        version: str,
        runner: "models.Runner",
        preprocessor: Preprocessor,
        postprocessor: Postprocessor,
        max_batch_size: int,
        clock: Clock,
    ) -> None:
        self.version = version
        self.served_as = version  # what a server's statistics call it
        self.runner = runner
        self._scope = runner.scope
        self._tensor = runner.tensor
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.max_batch_size = max_batch_size
        self.typical_s = math.inf
        self._executions = Executions()
        self._clock = clock

    def run(
        self, rows: Floats, lengths: Sequence[int], forward: Callable[[int, int], Execution]
    ) -> list[Prediction]:
        """``forward(start, stop)`` of every chunk of ``rows``, dealt out to requests of these
        lengths."""
        total = len(rows)
        size = self.max_batch_size
        if total <= size:
            execution = forward(0, total)
            chunks = 1
        else:
            executions = [forward(start, start + size) for start in range(0, total, size)]
            execution = _join(executions)
            chunks = len(executions)
        seconds = execution.marks_s[3] - execution.marks_s[0]
        self._executions.add(total, seconds, len(lengths))
        seconds /= chunks  # of one forward
        typical_s = self.typical_s
        # moves slowly: one hiccup must not send a fast model to the worker threads
        if typical_s != math.inf:
            seconds = 0.9 * typical_s + 0.1 * seconds
        self.typical_s = seconds
        if len(lengths) == 1:
            return [Prediction(execution, 0, total)]
        stops = accumulate(lengths)
        return [
            Prediction(execution, stop - length, stop)
            for length, stop in zip(lengths, stops, strict=True)
        ]

    def forward(self, rows: Floats, in_place: bool, infer: Callable[[Any], Any]) -> Execution:
        """Preprocess, ``infer`` (standardised rows [N, D] -> outputs), postprocess.

        Raises:
            ModelExecutionError: The model raised, or its output is not finite or not one row per
                input row.
        """
        started = self._clock()
        try:
            with self._scope():
                values = self.preprocessor.standardise(rows, in_place, self._tensor)
                preprocessed = self._clock()
                values = infer(values)
                inferred = self._clock()
                if values.shape[0] != len(rows):
                    raise ModelExecutionError(
                        f"model {self.version!r} answered shape {tuple(values.shape)} to {len(rows)} rows: it must "
                        "give one row of outputs each"
                    )
                outputs = self.postprocessor(values)
        except FlservingError:
            raise
        except Exception as error:
            raise ModelExecutionError(
                f"model {self.version!r} failed on rows of shape {rows.shape}: {type(error).__name__}"
            ) from error
        return Execution(outputs, (started, preprocessed, inferred, self._clock()))


class InferenceEngine(Engine):
    """A model that is ready to answer. It works on a frozen copy: the caller's module is never
    changed.

    Args:
        model: Maps float32 [N, D] to logits [N, C] (or values [N] or [N, K] for regression):
            torch's, or a :class:`flserving.models.plain.NumpyModel`.
        preprocessor, postprocessor: Default to no statistics and to classification.
        config: Of its settings, an engine heeds ``max_batch_size`` (most rows in one forward;
            larger input runs in chunks) and ``warmup_samples`` (single-row forwards of
            :meth:`warmup`; 0: it does nothing).
        version: What the answers name as ``model_version``.
        digest: Names the weights and the code that runs them (equal digests, equal answers: caches
            rely on it); unique to this engine when not given.
        owned: The module is the engine's own already (the loader's): skip the copy.

    Raises:
        InvalidModelError: Not a module, or one that cannot be copied.
        ConfigError: ``config`` is something else.

    Example:
        >>> engine = InferenceEngine(torch.nn.Linear(2, 3), version="v1.0")
        >>> answer = engine.predict([0.5, 1.5])
        >>> len(answer["probabilities"][0]), answer["model_version"]
        (3, 'v1.0')

    Thread-safe: an engine keeps no state between requests but its statistics.
    """

    def __init__(
        self,
        model: "nn.Module | NumpyModel",
        preprocessor: Preprocessor | None = None,
        postprocessor: Postprocessor | None = None,
        config: ServingConfig | None = None,
        *,
        version: str = "unversioned",
        digest: str | None = None,
        owned: bool = False,
        clock: Clock = time.perf_counter,
    ) -> None:
        if isinstance(model, NumpyModel):
            runner: models.Runner = model
        else:
            from flserving.models import modules  # loads torch

            runner = modules.Runner(model, owned)
        self.config = checked(config)
        preprocessor = preprocessor or Preprocessor()
        postprocessor = postprocessor or Postprocessor()
        super().__init__(
            version, runner, preprocessor, postprocessor, self.config.max_batch_size, clock
        )
        self.model: Any = runner.model
        self.nbytes = nbytes_of(self.model)
        self.digest = digest or uuid.uuid4().hex
        self.identity = f"{self.digest}/{self.preprocessor.digest}/{self.postprocessor.policy}"
        self._warmups = 0
        self._steps = runner.steps
        self.personal: PersonalEngine | None = None  # where the version has heads
        self.round: int | None = None  # of the federated training that made it, where that is known

    # What callers use

    def predict(self, features: Any) -> Answer:
        """Answer one request: a row [D] or rows [N, D].

        Returns:
            ``predictions``, ``confidences`` and ``probabilities`` (classification only) as lists,
            ``latency_ms``, ``model_version``, ``model_type``.

        Raises:
            InvalidInputError: See :meth:`Preprocessor.validate`.
            ModelExecutionError: The model failed.
        """
        return self.batch_predict([features])[0]

    def batch_predict(self, batch: Iterable[Any]) -> list[Answer]:
        """Answer several requests, each a row or rows, in as few forwards as ``max_batch_size``
        allows.

        Each answer equals that of :meth:`predict` to float32 rounding (about 1e-6: a matrix product
        may sum in another order than a matrix-vector product).
        """
        started_s = self._clock()
        if not isinstance(batch, Iterable):
            raise InvalidInputError(f"batch is a {type(batch).__name__}: send a list of requests")
        payloads = [self.preprocessor.validate(features) for features in batch]
        widths = {payload.shape[1] for payload in payloads}
        if len(widths) != 1:
            raise InvalidInputError(
                f"the batch has rows of {sorted(widths)} features: send requests of one width"
            )
        predictions = self.execute(payloads)
        latency_ms = (self._clock() - started_s) * 1e3
        return [self.answer(prediction, latency_ms) for prediction in predictions]

    def answer(self, prediction: Prediction, latency_ms: float) -> Answer:
        """The answer of one request, with the contract's keys."""
        return prediction.lists() | {
            "latency_ms": latency_ms,
            "model_version": self.version,
            "model_type": "global",
        }

    def warmup(self, sample: Any = None) -> float:
        """Run ``warmup_samples`` single-row forwards and one of ``max_batch_size`` rows, outside
        the statistics.

        Args:
            sample: Typical features; zeros where the width is known and nothing is given.

        Returns:
            Seconds of the last full batch: what an execution usually takes (0 when nothing ran).
        """
        if not self.config.warmup_samples:
            return 0.0
        if sample is None:
            if self.preprocessor.num_features is None:
                raise InvalidModelError(
                    "the model's number of features is not known: warm up with a sample"
                )
            sample = np.zeros(self.preprocessor.num_features, np.float32)
        row = self.preprocessor.validate(sample)[:1]
        for _ in range(self.config.warmup_samples):
            self.forward(row, in_place=False, infer=self._infer)
        batch = np.repeat(row, self.max_batch_size, axis=0)
        marks = self.forward(batch, in_place=True, infer=self._infer).marks_s
        self._warmups += self.config.warmup_samples + 1
        self.typical_s = marks[-1] - marks[0]
        return self.typical_s

    def get_stats(self) -> dict[str, Any]:
        """Requests, rows and executions so far, durations of the executions in ms, size in bytes;
        warm-ups are counted apart."""
        return {
            "model_version": self.version,
            "warmup_executions": self._warmups,
            "nbytes": self.nbytes,
            **self._executions.summary(),
        }

    # What the batcher uses

    def execute(self, payloads: Sequence[Floats]) -> list[Prediction]:
        """Run validated requests, each float32 [n, D], as one batch; one :class:`Prediction` each,
        in their order.

        Raises:
            ModelExecutionError: The model raised, or its output is not finite or not one row per
                input row.
        """
        if len(payloads) == 1:
            rows = payloads[0]
            return self.run(
                rows,
                (len(rows),),
                lambda start, stop: self.forward(rows[start:stop], False, self._infer),
            )
        rows = np.concatenate(payloads)  # nobody else sees this array: the model may work in place
        lengths = [len(part) for part in payloads]
        return self.run(
            rows, lengths, lambda start, stop: self.forward(rows[start:stop], True, self._infer)
        )

    def _infer(self, values: Any) -> Any:
        for step, arguments in self._steps:
            values = step(values, *arguments)
        return values


class PersonalEngine(Engine):
    """The heads of a loaded version on its body: what a batch of several clients runs on.

    The body runs once for a whole batch, then every row's own head, gathered and applied together.
    Source: a batch over one shared base with one adapter per row, as in Punica (Chen et al., MLSys
    2024, arXiv 2310.18547) and S-LoRA (Sheng et al., MLSys 2024, arXiv 2311.03285); here with whole
    heads, on a CPU.

    Args:
        engine: The version's own engine, whose module, preprocessing and limits are shared.
        store: Its heads.

    ``identity`` names all that an answer depends on beside the slot and the row. Its executions are
    counted with the engine's.
    """

    def __init__(self, engine: InferenceEngine, store: HeadStore) -> None:
        # holds parts of the engine, not the engine: in a circle, neither would go before the next
        # garbage collection
        super().__init__(
            engine.version,
            engine.runner,
            engine.preprocessor,
            engine.postprocessor,
            engine.max_batch_size,
            engine._clock,
        )
        self._executions = engine._executions
        self.store = store
        self.identity = f"{engine.identity}/{store.digest}"
        self._body = engine.runner.body
        self._head = engine.runner.head

    def choose(self, clients: str | Sequence[str], rows: int) -> tuple[Slots, str | list[str]]:
        """Slots [rows] of these clients' heads, and what was found: "own", "unknown", "stale" or
        "expired".

        One client has all rows; of several there is one a row (the server sees to that), and one
        word a row comes back.
        """
        if isinstance(clients, str):
            slot = self.store.find(clients)
            return np.full(rows, slot), _FOUND.get(slot, "own")
        slots = [self.store.find(client) for client in clients]
        return np.array(slots), [_FOUND.get(slot, "own") for slot in slots]

    def execute(self, payloads: Sequence[tuple[Floats, Slots]]) -> list[Prediction]:
        """Run requests, each rows float32 [n, D] and their slots [n], as one batch; one prediction
        each, in order.

        Raises:
            ModelExecutionError: As :meth:`InferenceEngine.execute`.
            CorruptArtifactError: A head's bytes have changed.
        """
        rows = np.concatenate([rows for rows, _ in payloads])
        slots = np.concatenate([slots for _, slots in payloads])

        def forward(start: int, stop: int) -> Execution:
            infer = partial(self._infer, slots=slots[start:stop])
            return self.forward(rows[start:stop], in_place=True, infer=infer)

        return self.run(rows, [len(part) for part, _ in payloads], forward)

    def _infer(self, values: Any, slots: Slots) -> Any:
        for step, arguments in self._body:
            values = step(values, *arguments)
        inputs = values
        generic = None  # the outputs to which the client's own are added
        if self.store.layout != "head":
            for step, arguments in self._head:
                values = step(values, *arguments)
            if self.store.layout == "adapter":
                inputs = values
            else:
                generic = values
        heads = self.store.gather(slots, self.runner.empty)
        return self.runner.apply_heads(inputs, heads, generic)


def each(found: str | list[str]) -> list[str]:
    """What :meth:`PersonalEngine.choose` found, as a list."""
    if isinstance(found, str):
        return [found]
    return found


def _join(executions: Sequence[Execution]) -> Execution:
    """Chunks of one large request as one execution. Its stages' times are sums; gaps count as
    preprocessing."""
    parts = [execution.outputs.arrays() for execution in executions]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    marks_s = np.array([execution.marks_s for execution in executions])
    _, infer_s, post_s = np.diff(marks_s).sum(axis=0).tolist()
    start_s = float(marks_s[0, 0])
    end_s = float(marks_s[-1, 3])
    return Execution(Outputs(**joined), (start_s, end_s - post_s - infer_s, end_s - post_s, end_s))
