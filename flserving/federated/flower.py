"""Flower: the rounds of its strategies become versions, and a whole run fits into a notebook cell.

Needs the extra ``flower``, in an environment of its own: flwr pins protobuf, starlette, uvicorn and
others to releases of its choice. Import this before flwr: its telemetry is then off, unless
FLWR_TELEMETRY_ENABLED says otherwise.

A strategy is wrapped in :class:`Publishing`, and then makes the same ``Round`` that
``federated.train`` makes; what takes the one takes the other: ``publish_rounds``, ``gated``, or a
function of your own.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flserving import models
from flserving.errors import ConfigError, InvalidModelError, ModelExecutionError, NotSupportedError
from flserving.federated.aggregation import State
from flserving.federated.rounds import Origin, Round, Statistics
from flserving.models import weights
from flserving.models.processing import ONE_OUTPUT
from flserving.registry import validation
from flserving.registry.manifest import encode

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads it once, when it is imported
try:
    import flwr
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy

    from flserving.federated.flower_grid import LocalGrid, run
except ImportError as error:
    raise NotSupportedError(
        f'flwr cannot be imported ({error}): run pip install "flserving[flower]" in an environment of its own: flwr '
        "pins protobuf, starlette, uvicorn and others to releases of its choice"
    ) from error

__all__ = ["LocalGrid", "Publishing", "run"]

HEAD = "head"
"""The name of the record that holds a client's own head, in its replies."""


@dataclass(slots=True)
class _Seen:
    """What passed between strategy and clients in the round under way. Clients go by their node
    id."""

    rejected: dict[str, str]
    samples: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    personal: dict[str, State] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)

    def note(self, kind: str, record: MetricRecord | None) -> None:
        """Keep the numbers of a record, as ``kind.name``. NaN and infinities, which no manifest
        takes, by name only."""
        for name, value in ({} if record is None else record).items():
            if not isinstance(value, list):
                if math.isfinite(value):
                    self.metrics[f"{kind}.{name}"[:64]] = float(value)
                else:
                    self.not_finite.append(f"{kind}.{name}")


class Publishing(Strategy):
    """A Flower strategy, with each of its rounds handed on as a ``Round``.

    ::

        strategy = FedAdam(fraction_evaluate=1.0)
        publish = publish_rounds(registry, "digits", alias="default")
        strategy = Publishing(strategy, on_round=publish, architecture="digits_mlp")
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=5)

    Args:
        strategy: Any of ``flwr.serverapp.strategy`` or of your own; it trains as it would by
            itself.
        on_round: Called after each round, e.g. ``publish_rounds(registry, name)`` or
            ``gated(registry, name, gate)``. What it raises ends the training.
        architecture: What the arrays are the weights of, with ``parameters``: a registered one.
        preprocessing: ``mean`` and ``std`` that the clients standardise with, so that the server
            does so too; zeros and ones if they train on rows as they come.
        data: The samples in words, for the lineage, which also gets the numbers and words of
            ``train_config``.
        samples: The metric by which clients tell how many samples they trained on.
        accuracy: Names under which clients, and ``evaluate_fn``, tell the accuracy. Those of the
            clients, each on its own held-out samples, make ``mean_client_accuracy`` and
            ``worst_client_accuracy``; that of ``evaluate_fn``, or else what the strategy made of
            the clients', is ``global_accuracy``. All numbers are kept, too, as ``train.*`` and
            ``evaluate.*`` (aggregated from the clients) and ``server.*`` (from ``evaluate_fn``).

    A client's own head comes in with its reply, beside the arrays, as one more ``ArrayRecord``:
    ``content["head"] = ArrayRecord(module.head.state_dict())``, in ``train`` or, fine-tuned on the
    new model, in ``evaluate``. The newest of each client goes with every version, by the client's
    node id; the strategy does not see it. The architecture must be a ``models.SplitModel``.

    A client counts as rejected whose reply is an error, does not come, holds NaN, infinite numbers
    or what is no array of numbers (a pickle, which is not opened), or has another form than most of
    the others have, the number of samples included; the strategy does not see it. Of a head that is
    so, or of an evaluation, only that is left out. A round without any valid reply leaves the model
    as it was, and says so; if it is the first one, the client app is broken, and the training ends.

    Raises:
        ConfigError: Wrong arguments; clients that do not tell ``samples``.
        NotFoundError: No such architecture.
        InvalidModelError: ``initial_arrays`` do not fit the architecture (before a round is
            played), or the arrays of a round are not finite.
        ModelExecutionError: No valid reply in the first round.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        on_round: Callable[[Round], object],
        architecture: str,
        parameters: models.Parameters | None = None,
        preprocessing: Statistics,
        data: str = "",
        samples: str = "num-examples",
        accuracy: Sequence[str] = ("accuracy", "eval_acc"),
    ) -> None:
        if not isinstance(strategy, Strategy) or type(strategy).start is not Strategy.start:
            raise ConfigError(
                f"strategy is a {type(strategy).__name__}: give an object of flwr.serverapp.strategy, whose start() is "
                "Flower's own"
            )
        if not callable(on_round):
            raise ConfigError(
                f"on_round is {on_round!r}: give a function, as publish_rounds(registry, name) makes one"
            )
        if models.signature(architecture, parameters)[1] == (1,):
            raise InvalidModelError(f"{architecture!r} has outputs of shape [1]: {ONE_OUTPUT}")
        with torch.device("meta"):
            module = models.build(architecture, parameters)
        self._wanted = module.state_dict()
        self._head_shapes = {}
        if isinstance(module, models.SplitModel):
            for name, tensor in self._wanted.items():
                if name.startswith("head."):
                    self._head_shapes[name] = tensor.shape
        self.strategy = strategy
        self.on_round = on_round
        self.preprocessing = preprocessing
        self.architecture = architecture
        self.parameters = dict(parameters or {})
        self.data = data
        self.samples = samples
        self.accuracy = accuracy
        self._seen: _Seen | None = None  # while a training runs

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As Flower's: same arguments, same result."""
        facts: dict[str, Any] = {}
        for name, value in (train_config or {}).items():
            if isinstance(value, bool | int | float | str):
                facts[f"config.{name}"[:64]] = value
        facts |= {"data": self.data, "framework": f"flwr {flwr.__version__}", "rounds": num_rounds}
        content = validation.Content(
            name="initial",
            model=self._state(initial_arrays),
            architecture=self.architecture,
            parameters=self.parameters,
            preprocessing=self.preprocessing,
            lineage={"extra": facts},
        )
        draft = validation.check(content, max_artifact_bytes=1 << 62)
        # what publishing would refuse after a round, is refused before the first
        encode(draft.manifest)

        # the last that Flower does in a round
        def finish(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            measured = None
            if evaluate_fn is not None:
                measured = evaluate_fn(number, arrays)
            if number:
                self.on_round(self._round(number, arrays, measured, facts))
            return measured

        self._seen = _Seen({})
        self._trained = False
        self._personal: dict[str, State] = {}
        try:
            return super().start(
                grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, finish
            )
        finally:
            self._seen = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's own; who is asked, is remembered."""
        if self._seen is None:
            raise ConfigError(
                "start() of another object asks for a round: wrap that one in Publishing, outermost"
            )
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        nodes = sorted(message.metadata.dst_node_id for message in messages)
        self._seen = _Seen({str(node): "no reply" for node in nodes})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's own; who replied, and with how many samples, is remembered."""
        seen = self._seen or _Seen({})
        ordered, heads = self._parted(replies)
        faults = self._faults(ordered)
        kept = [reply for reply in ordered if reply.has_error() or _client(reply) not in faults]
        counts = {}
        for reply in kept:
            if not reply.has_error():
                counts[_client(reply)] = _numbers(reply)[self.samples]
        arrays, metrics = self.strategy.aggregate_train(server_round, kept)
        seen.note("train", metrics)
        seen.rejected |= faults
        for client, count in counts.items():
            if arrays is None:
                seen.rejected[client] = "the strategy made no model of the replies"
            else:
                seen.samples[client] = int(count)
                seen.rejected.pop(client, None)
        if arrays is not None:
            self._keep(heads, seen, counts)
        if not self._trained and arrays is None:
            first = "nobody was asked"
            for client, why in seen.rejected.items():
                first = f"client {client}: {why}"
                break
            raise ModelExecutionError(
                f"round {server_round} has no valid reply ({first}): mend the client app"
            )
        self._trained = True
        return arrays, metrics

    def _parted(self, replies: Iterable[Message]) -> tuple[list[Message], dict[str, ArrayRecord]]:
        """The replies by client, and their heads taken out of them: strategies average the one
        record that is left."""
        ordered = sorted(replies, key=lambda reply: int(reply.metadata.src_node_id))
        heads = {}
        for reply in ordered:
            if reply.has_error():
                continue
            records = reply.content.array_records
            evaluated = reply.metadata.message_type == MessageType.EVALUATE
            if HEAD in records and (len(records) > 1 or evaluated):
                heads[_client(reply)] = reply.content.pop(HEAD)
        return ordered, heads

    def _keep(self, heads: Mapping[str, ArrayRecord], seen: _Seen, clients: Container[str]) -> None:
        """Keep the heads of these clients that are sound, and say why others are not kept."""
        for client, record in heads.items():
            if client not in clients:
                continue
            try:
                state = {}
                for name, array in record.items():
                    name = f"head.{name.removeprefix('head.')}"
                    state[name] = torch.from_numpy(_read(array))
            except (InvalidModelError, TypeError) as error:
                seen.rejected[client] = f"its head was left out: its arrays {error}"
                continue
            if {name: it.shape for name, it in state.items()} == self._head_shapes:
                seen.personal[client] = weights.cast(state, self._wanted)
            else:
                shapes = {name: list(shape) for name, shape in self._head_shapes.items()}
                seen.rejected[client] = (
                    f"its head was left out: it is not the architecture's, {shapes or 'which has none'}"
                )

    def _faults(self, replies: Sequence[Message], *, trained: bool = True) -> dict[str, str]:
        """Why replies are left out, by client. ConfigError: none of them tells on how many samples
        it ``trained``, so the app is wrong."""
        faults = {}
        sound = []
        for reply in replies:
            client = _client(reply)
            if reply.has_error():
                reason = reply.error.reason or f"error {reply.error.code}"
                faults[client] = " ".join(reason.split())[-200:]
            else:
                sound.append((client, reply, _form(reply), _numbers(reply)))
        default = None if trained else 0  # an evaluation need not tell
        uncounted = []
        for client, _, _, numbers in sound:
            if not _is_count(numbers.get(self.samples, default)):
                uncounted.append((client, numbers))
        if trained and sound and len(uncounted) == len(sound):
            client, numbers = uncounted[0]
            raise ConfigError(
                f"client {client} tells {self.samples!r} = {numbers.get(self.samples)!r} among {sorted(numbers)}: let "
                "it tell how many samples it trained on, or name that metric by samples="
            )
        for client, numbers in uncounted:
            faults[client] = f"it tells {self.samples!r} = {numbers.get(self.samples)!r:.40}"
        forms = Counter(form for client, _, form, _ in sound if client not in faults)
        for client, reply, form, _ in sound:
            if client in faults:
                continue
            (usual, _), *_ = forms.most_common(1)
            if form != usual:
                faults[client] = (
                    "its arrays or metrics have other names or shapes than those of the others"
                )
                continue
            try:
                for record in reply.content.array_records.values():
                    for array in record.values():
                        _read(array)
            except InvalidModelError as error:
                faults[client] = f"its arrays {error}"
        return faults

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's own."""
        messages: Iterable[Message] = self.strategy.configure_evaluate(
            server_round, arrays, config, grid
        )
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The strategy's own; the clients' accuracies are remembered."""
        seen = self._seen or _Seen({})
        ordered, heads = self._parted(replies)
        faults = self._faults(ordered, trained=False)
        for client, why in faults.items():
            seen.rejected.setdefault(client, f"its evaluation was left out: {why}")
        kept = [reply for reply in ordered if reply.has_error() or _client(reply) not in faults]
        sound = {_client(reply): reply for reply in kept if not reply.has_error()}
        self._keep(heads, seen, sound)
        for client, reply in sound.items():
            value = self._accuracy(_numbers(reply))
            if value is not None:
                seen.accuracy[client] = value
        metrics = self.strategy.aggregate_evaluate(server_round, kept)
        seen.note("evaluate", metrics)
        return metrics

    def summary(self) -> None:
        """The strategy's own."""
        self.strategy.summary()

    def _round(
        self, number: int, arrays: ArrayRecord, measured: MetricRecord | None, facts: dict[str, Any]
    ) -> Round:
        seen = self._seen or _Seen({})
        seen.note("server", measured)
        self._personal |= seen.personal
        metrics = seen.metrics
        of_all = self._accuracy(seen.metrics, "server.", "evaluate.")
        if of_all is not None:
            metrics["global_accuracy"] = of_all
        if seen.accuracy:
            values = seen.accuracy.values()
            metrics["mean_client_accuracy"] = sum(values) / len(values)
            metrics["worst_client_accuracy"] = min(values)
        if seen.not_finite:
            facts = facts | {"not_finite": ", ".join(seen.not_finite)[:1000]}
        origin = Origin(
            strategy=type(self.strategy).__name__[:64],
            architecture=self.architecture,
            parameters=self.parameters,
            facts=facts,
        )
        state = self._state(arrays)
        personal = dict(self._personal)
        return Round(
            number=number,
            recipe=origin,
            preprocessing=self.preprocessing,
            state=state,
            personal=personal,
            metrics=metrics,
            client_accuracy=seen.accuracy,
            sample_counts=seen.samples,
            rejected=seen.rejected,
        )

    def _accuracy(self, numbers: Mapping[str, Any], *prefixes: str) -> float | None:
        """The first of these names that is there."""
        for prefix in prefixes or ("",):
            for name in self.accuracy:
                value = numbers.get(prefix + name)
                if isinstance(value, int | float) and math.isfinite(value):
                    return float(value)
        return None

    def _state(self, arrays: ArrayRecord) -> State:
        """The arrays as tensors of the types that the architecture has.

        FedAdam and its like compute in float64 and hand that on; a client casts when it loads them,
        and so does this.
        """
        try:
            state: State = dict(arrays.to_torch_state_dict())
        except Exception as error:  # not arrays, or not NumPy's: trees, say
            raise InvalidModelError(f"the arrays cannot be read as tensors: {error}") from error
        return weights.cast(state, self._wanted)


def _numbers(reply: Message) -> dict[str, Any]:
    """All metrics of a reply, whatever its records are called."""
    numbers: dict[str, Any] = {}
    for record in reply.content.metric_records.values():
        for name, value in record.items():
            numbers[name] = value
    return numbers


def _client(reply: Message) -> str:
    """Whom a reply comes from."""
    return str(reply.metadata.src_node_id)


def _form(reply: Message) -> tuple[Any, ...]:
    """What must be alike in all replies, or they cannot be averaged."""
    arrays = []
    for record, content in reply.content.array_records.items():
        for name, array in content.items():
            arrays.append((record, name, tuple(array.shape), array.dtype))
    metrics = []
    for record, measured in reply.content.metric_records.items():
        for name in measured:
            metrics.append((record, name))
    return tuple(sorted(arrays)), tuple(sorted(metrics))


def _read(array: Array) -> NDArray[Any]:
    """The array's numbers. Raises InvalidModelError: they are no numbers, others than it claims, or
    not finite."""
    try:
        values: NDArray[Any] = array.numpy()  # which opens no pickle
    except Exception as error:
        raise InvalidModelError(
            f"cannot be read ({type(error).__name__}: {error!s:.200})"
        ) from error
    if (values.shape, str(values.dtype)) != (tuple(array.shape), array.dtype):
        raise InvalidModelError(
            f"hold {values.dtype}{list(values.shape)} and claim {array.dtype}{list(array.shape)}"
        )
    if values.dtype.kind not in "biufc" or not np.isfinite(values).all():
        raise InvalidModelError("hold NaN or infinite values")
    return values


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0 and float(value).is_integer()
