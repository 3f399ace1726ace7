"""The Open Inference Protocol (V2) over numpy: what REST and gRPC both do, once they have read the
bytes.

Nothing here knows a wire format. Names and meanings are the protocol's; where Triton's extensions
fill it out (statistics, configuration, repository), they are Triton's.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flserving.api.auth import Identity, Role
from flserving.errors import (
    FlservingError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    NotSupportedError,
)
from flserving.models.masking import OUTPUTS, OutputPolicy, by_role
from flserving.monitoring.metrics import Sums, merged
from flserving.monitoring.telemetry import OTHER
from flserving.registry.manifest import Signature
from flserving.serving.request import Request
from flserving.serving.server import ModelServer

Fields = dict[str, Any]
"""A JSON object, or of an answer the arrays in its place."""
Arrays = dict[str, NDArray[Any]]
INPUT = "features"
Value = bool | int | float | str
ANSWER_PARAMETERS = ("head", "path", "round", "age_s", "degraded", "arm", "receipt", "outputs")
"""What an answer may say of itself beside its tensors: parameters on the wire, keys of the client's
answer."""
Others = Callable[[], Sequence[Sums]]
"""Gives the totals of the other processes behind an address."""
_STAGES = {
    "queue": "queue",
    "compute_input": "preprocess",
    "compute_infer": "infer",
    "compute_output": "postprocess",
}
_Tensor = tuple[str, str, list[int]]  # name, datatype, dimensions
_UNSUPPORTED = ("sequence_id", "sequence_start", "sequence_end", "classification")


@dataclass(slots=True)
class Call:
    """One inference request, read from the wire. ``outputs`` None asks for all of them. ``who``:
    what its credential stands for."""

    model: str
    version: str | None
    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[str] | None
    parameters: Mapping[str, Value]
    who: Identity


@dataclass(slots=True)
class Answer:
    """What is to be written to the wire. The arrays are only to be read."""

    model: str
    version: str
    outputs: Arrays
    parameters: dict[str, bool | int | str]


class V2:
    """The protocol's operations on one server.

    Args:
        admin: Whether models may be loaded and unloaded over the network.
    """

    def __init__(self, server: ModelServer, admin: bool = False) -> None:
        self.server = server
        self.admin = admin
        # web pages that may call, beside those of the options; may grow while serving
        self.origins = set[str]()
        self.draining = False  # not ready any more, though what was let in is still answered
        self.others: Others = tuple
        self._policies = by_role(server.config.outputs)

    def policy(self, who: Identity) -> OutputPolicy:
        """What answers to a credential show; to one that may only read, what those of the role to
        infer are shown."""
        return who.outputs or self._policies[max(who.role, Role.INFER).name.lower()]

    # Health

    def ready(self) -> bool:
        return not self.draining and self.server.ready

    def model_ready(self, model: str, version: str | None = None) -> bool:
        """Whether a version can answer. Raises NotFoundError, ModelUnloadedError."""
        key = self.server.resolve(version, model)
        return not self.draining and "/".join(key) not in self.server.health_check()["problems"]

    # What there is

    def server_metadata(self) -> Fields:
        extensions = [
            "binary_tensor_data",
            "parameters",
            "statistics",
            "model_configuration",
            "model_repository",
        ]
        return {
            "name": "flserving",
            "version": installed_version("flserving"),
            "extensions": extensions,
        }

    def models(self) -> dict[str, list[str]]:
        """Names; the one that answers who names none comes first."""
        return {"models": _default_first(self.server.health_check())}

    def model_metadata(self, who: Identity, model: str, version: str | None = None) -> Fields:
        """Its outputs are those that this credential is shown.

        Raises:
            NotFoundError, ModelUnloadedError, CorruptArtifactError.
        """
        key = self.server.resolve(version, model)
        policy = self.policy(who)
        inputs, outputs = _tensors(self.server.signature(key), policy)
        versions = [key[1]]
        if version is None:
            versions = self.server.health_check()["models"][model]["versions"]
        return {
            "name": model,
            "versions": versions,
            "platform": "pytorch_safetensors",
            "inputs": _as_metadata(inputs),
            "outputs": _as_metadata(outputs),
            "parameters": {"outputs": policy.name},
        }

    def model_config(self, who: Identity, model: str, version: str | None = None) -> Fields:
        """What perf_analyzer asks for. Raises as :meth:`model_metadata`."""
        policy = self.policy(who)
        key = self.server.resolve(version, model)
        inputs, outputs = _tensors(self.server.signature(key), policy)
        config = self.server.config
        queue = {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": int(config.timeout_ms * 1e3),
            "allow_timeout_override": True,
            "max_queue_size": config.max_queue_rows,
        }
        held_ms = config.max_wait_time_ms if config.batching == "hold_until_full" else 0
        return {
            "name": model,
            "platform": "pytorch_safetensors",
            "backend": "flserving",
            "version_policy": {"all": {}},
            "max_batch_size": config.max_batch_size,
            "input": _as_config(inputs),
            "output": _as_config(outputs),
            "dynamic_batching": {
                "max_queue_delay_microseconds": int(held_ms * 1e3),
                "default_queue_policy": queue,
            },
            "model_transaction_policy": {"decoupled": False},
            "response_cache": {"enable": self.server.prediction_cache is not None},
            "parameters": {"outputs": {"string_value": policy.name}},
        }

    def settings(self) -> Fields:
        """The server's :class:`ServingConfig`."""
        return asdict(self.server.config)

    def statistics(self, model: str | None = None, version: str | None = None) -> Fields:
        """Counters since the start, of all processes behind this address, durations in nanoseconds.

        One entry for each version that was asked, or for the one that is named.

        Raises:
            NotFoundError, ModelUnloadedError: The named model or version is not served.
        """
        totals = merged([self.server.telemetry.totals(), *self.others()])
        names = {*totals["versions"], *totals["failures"]} - {""}
        if model is not None:
            known = self.server.health_check()["models"]
            of_model = set()
            if version is None and model in known:
                of_model = {f"{model}/{number}" for number in (*known[model]["versions"], OTHER)}
            names &= of_model
            if not names:
                names = {"/".join(self.server.resolve(version, model))}
        return {"model_stats": [_model_statistics(name, totals) for name in sorted(names)]}

    # The repository

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Every version of every model, with its state and, where it cannot answer, the reason. The
        model that answers who names none comes first."""
        health = self.server.health_check()
        withdrawn = self.server.unloaded
        rows: list[dict[str, str]] = []
        for model in _default_first(health):
            for version in health["models"][model]["versions"]:
                problem = health["problems"].get(f"{model}/{version}", "")
                reason = "unloaded" if model in withdrawn else problem
                if not (ready and reason):
                    state = "UNAVAILABLE" if reason else "READY"
                    rows.append(
                        {"name": model, "version": version, "state": state, "reason": reason}
                    )
        return rows

    async def load(self, model: str) -> None:
        """Read the model's registry again, load its default version, and put it (back) into
        service.

        Raises:
            ForbiddenError: Not switched on.
            NotFoundError, CorruptArtifactError, OverloadedError: Nothing changed.
        """
        self._check_admin()
        await asyncio.to_thread(self.server.reload, model)

    async def unload(self, model: str) -> None:
        """Take a model out of service and out of memory. Raises ForbiddenError, NotFoundError."""
        self._check_admin()
        await asyncio.to_thread(self.server.unload, model)

    def _check_admin(self) -> None:
        if not self.admin:
            raise ForbiddenError(
                "loading and unloading over the network is off: start the server with admin=True"
            )

    # Inference

    async def infer(self, call: Call) -> Answer:
        """Answer one request. Raises what :meth:`ModelServer.predict` raises, and
        InvalidInputError, NotSupportedError or ForbiddenError for what the protocol lets a caller
        ask and this server does not answer."""
        policy = self.policy(call.who)
        request = Request(
            None, call.version, model=call.model, arrays=True, caller=call.who.caller, policy=policy
        )
        # whose arm it is, also where no personal answer is asked for
        request.identity = call.who.client
        try:
            request.features = _features(call, policy)
            if call.parameters:
                _understand(call, request)
        except FlservingError as error:
            self.server.telemetry.failure(error.reason)  # from here on the server counts
            raise
        answer = await self.server.ahandle(request)
        outputs = {name: value for name, value in answer.items() if type(value) is np.ndarray}
        if call.outputs is not None:
            try:
                outputs = {name: outputs[name] for name in call.outputs}
            except KeyError as error:
                raise InvalidInputError(
                    f"a regression has no output {error}: there are {', '.join(outputs)}"
                ) from None
        parameters = {
            "model_type": answer["model_type"],
            "latency_us": round(answer["latency_ms"] * 1e3),
        }
        extra = {name: answer[name] for name in ANSWER_PARAMETERS if answer.get(name) is not None}
        parameters |= {
            name: round(value) if isinstance(value, float) else value
            for name, value in extra.items()
        }
        if request.stages:
            parameters |= {
                f"stage_{name}_us": round(ms * 1e3) for name, ms in answer["stages_ms"].items()
            }
        return Answer(call.model, answer["model_version"], outputs, parameters)

    async def feedback(
        self, model: str, receipt: str, reward: float | None, client: str | None
    ) -> None:
        """Reward the answer of an experiment. Raises as :meth:`Experiments.feedback`, which counts
        it."""
        await self.server.experiments.afeedback(model, receipt, reward, client)


def unnamed(error: FlservingError) -> FlservingError:
    """``error`` for a caller without the role to read: of the same class, without a word on what
    there is here."""
    if isinstance(error, NotFoundError):
        return NotFoundError("no such model or version")
    return type(error)("the model cannot answer now")


def _default_first(health: Mapping[str, Any]) -> list[str]:
    return sorted(health["models"], key=lambda name: name != health["default_model"])


def _features(call: Call, policy: OutputPolicy) -> NDArray[Any]:
    if INPUT not in call.inputs or len(call.inputs) != 1:
        raise InvalidInputError(
            f"inputs are {', '.join(map(repr, call.inputs)) or 'none'}: send one, {INPUT!r}"
        )
    if call.outputs is not None and (
        unknown := [name for name in call.outputs if name not in OUTPUTS]
    ):
        raise InvalidInputError(f"no output {unknown[0][:64]!r}: there are {', '.join(OUTPUTS)}")
    if call.outputs is not None and (
        hidden := [name for name in call.outputs if name not in policy.offered]
    ):
        raise ForbiddenError(
            f"output {hidden[0]!r} is not shown to this credential: ask for {OUTPUTS[0]}"
        )
    return call.inputs[INPUT]


def _understand(call: Call, request: Request) -> None:
    """Put what the parameters say into the request. Unknown names are the caller's own."""
    said = call.parameters
    for name in _UNSUPPORTED:
        if said.get(name):
            raise NotSupportedError(f"parameter {name!r} is not supported: leave it out")
    if said.get("priority"):
        raise NotSupportedError(
            f"priority is {said['priority']!r:.64}: there are no priorities here, send 0 or none"
        )
    if "alias" in said:
        alias = said["alias"]
        if call.version is not None or not isinstance(alias, str):
            raise InvalidInputError(
                f"alias is {alias!r:.64}: send a string, and no version in the path"
            )
        request.version = alias
    timeout_us = said.get("timeout")
    if timeout_us:  # 0 is the protocol's "none"
        if type(timeout_us) is not int:
            raise InvalidInputError(
                f"timeout is {timeout_us!r:.64}: send an integer of microseconds"
            )
        request.timeout_ms = timeout_us / 1e3
    request.stages = _flag(said, "stages")
    if _flag(said, "personal") or "client" in said:
        client = call.who.client
        if client is None:
            raise ForbiddenError(
                "personal answers need a credential of a client: ask for a token that names you"
            )
        # the same words whether or not there is such a client
        if said.get("client", client) != client:
            raise NotFoundError(
                "no personal head here under that name: leave the parameter client out"
            )
        request.client = client


def _flag(said: Mapping[str, Value], name: str) -> bool:
    value = said.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name} is {value!r:.64}: send true or false")
    return value


def _tensors(signature: Signature, policy: OutputPolicy) -> tuple[list[_Tensor], list[_Tensor]]:
    """Inputs, and the outputs that are shown; the batch's dimension left out."""
    inputs = [(INPUT, "FP32", list(signature.input_shape))]
    shape = list(signature.output_shape)
    if signature.output_type == "regression":
        return inputs, [("predictions", "FP32", [] if shape == [1] else shape)]
    outputs = [
        ("predictions", "INT64", []),
        ("confidences", "FP32", []),
        ("probabilities", "FP32", shape),
    ]
    return inputs, outputs[: len(policy.offered)]


def _as_metadata(tensors: Sequence[_Tensor]) -> list[Fields]:
    return [{"name": name, "datatype": kind, "shape": [-1, *dims]} for name, kind, dims in tensors]


def _as_config(tensors: Sequence[_Tensor]) -> list[Fields]:
    return [
        {"name": name, "data_type": f"TYPE_{kind}", "dims": dims} for name, kind, dims in tensors
    ]


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": round(seconds * 1e9)}


def _model_statistics(name: str, totals: Sums) -> Fields:
    """The entry of one version in Triton's statistics, ``name`` = "model/version", from
    :meth:`Telemetry.totals`.

    Per request: success, fail, queue and the three stages; cached answers count in none of the
    stages. Per execution: ``batch_stats``, one entry for each number of rows that ran together.
    Durations are sums in nanoseconds.
    """
    model, _, version = name.partition("/")
    failed = totals["failures"].get(name, {}).values()
    served = totals["versions"].get(name) or {}
    stages = served.get("stages", {})
    cache = served.get("cache", {})
    batches = served.get("batches", {})
    executions = 0
    inferences = 0
    batch_stats = []
    for rows, (runs, preprocess_s, infer_s, postprocess_s) in batches.items():
        executions += runs
        inferences += int(rows) * runs
        batch_stats.append(
            {
                "batch_size": int(rows),
                "compute_input": _duration(runs, preprocess_s),
                "compute_infer": _duration(runs, infer_s),
                "compute_output": _duration(runs, postprocess_s),
            }
        )
    return {
        "name": model,
        "version": version,
        "last_inference": served.get("last_inference_ms", 0),
        "inference_count": inferences,
        "execution_count": executions,
        "inference_stats": {
            "success": _duration(served.get("requests", 0), served.get("seconds", 0)),
            "fail": _duration(sum(n for n, _ in failed), sum(seconds for _, seconds in failed)),
            **{theirs: _duration(*stages.get(ours, (0, 0))) for theirs, ours in _STAGES.items()},
            "cache_hit": _duration(*cache.get("hit", (0, 0))),
            "cache_miss": _duration(*cache.get("miss", (0, 0))),
        },
        "batch_stats": batch_stats,
    }
