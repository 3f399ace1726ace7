"""Settings of a server: frozen, validated, every field live."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from flserving.errors import ConfigError, InvalidInputError
from flserving.models import masking
from flserving.models.plain import EngineName

BatchingPolicy = Literal["work_conserving", "hold_until_full"]
UnknownClient = Literal["global_head", "refuse"]
CacheScope = Literal["caller", "shared"]
CHOICES: dict[str, tuple[str, ...]] = {
    "batching": get_args(BatchingPolicy),
    "engine": get_args(EngineName),
    "unknown_client": get_args(UnknownClient),
    "prediction_cache_scope": get_args(CacheScope),
}

# name -> (lowest, highest, what the upper bound protects from)
_BOUNDS: dict[str, tuple[int, int, str]] = {
    "max_batch_size": (1, 65_536, "one batch must fit in memory"),
    "max_wait_time_ms": (0, 60_000, "nobody waits a minute for a fuller batch"),
    "cache_size": (1, 10_000, "a cache of models, not a store"),
    "warmup_samples": (0, 10_000, "a load must end"),
    "num_workers": (1, 256, "each worker is a thread"),
    "timeout_ms": (1, 3_600_000, "a request must end within an hour"),
    "max_queue_rows": (1, 10_000_000, "the queue lives in memory"),
    "max_request_rows": (1, 10_000_000, "a request lives in memory"),
    "cache_bytes": (1, 1 << 50, "a byte budget"),
    "prediction_cache_bytes": (0, 1 << 50, "a byte budget"),
    "prediction_cache_ttl_s": (0, 31_536_000, "a year"),
    "head_cache_bytes": (1, 1 << 50, "a byte budget"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How a server batches, caches and waits.

    Args:
        max_batch_size: Most rows in one execution of the model.
        max_wait_time_ms: Longest that a request may be held back on purpose. Under
            ``work_conserving`` a request is never held while a worker is idle; when a worker comes
            free it takes the fullest queue, but none whose oldest request has waited this long is
            passed over (where several callers wait, they take turns). Under ``hold_until_full`` it
            is how long a batch may wait to fill; nobody is held for more than half of what his
            deadline leaves.
        cache_size: Most model versions in memory at once, those being loaded included: with room
            for one only, the old version leaves before the new one is read.
        warmup_samples: Single-row forwards that a freshly loaded version runs before it answers
            (then one at ``max_batch_size``); 0 skips the warm-up.
        num_workers: Most model executions at the same time.
        timeout_ms: Default deadline of a request, from its arrival to its answer.
        batching: ``work_conserving`` holds no request while a worker is idle; ``hold_until_full``
            waits for a full batch, up to ``max_wait_time_ms``.
        max_queue_rows: Most rows waiting for a worker; beyond it a request is refused at once, or,
            where its caller has less than a share of them, the last request of the caller who has
            most. Long before that a request is refused that could not end before its deadline.
        max_request_rows: Most rows in one request.
        cache_bytes: Byte budget of the model cache.
        prediction_cache_bytes: Byte budget of the prediction cache; 0 switches it off.
        prediction_cache_ttl_s: Age in seconds at which a cached prediction is forgotten; 0 means
            never.
        prediction_cache_scope: Who may find a cached prediction: ``caller``, whom it was computed
            for (by credential; callers without one are one), or ``shared``, everybody. Shared, it
            hits more often and reveals what others asked: an input that somebody sent before is
            answered several times faster, so one probe tells. A personal prediction is its client's
            alone in either case.
        head_cache_bytes: Byte budget of the personal heads that one loaded version keeps in memory.
        unknown_client: What a client without a personal head gets: ``global_head``, or ``refuse``.
        outputs: What answers show, ``full``, ``label``, ``top-K`` (classes) or ``rounded-D``
            (decimals): for everybody (``label``), or by the role of a credential (``infer=label``,
            ``label,admin=full``). A credential of its own ``outputs`` goes before its role. Callers
            in this process have no role. See :class:`~flserving.models.masking.OutputPolicy`.
        engine: What runs the models: ``torch``, or ``numpy``, which starts in a moment, takes
            little memory, does not import torch, and runs linear layers with ReLU (see
            ``models/plain.py``).

    Raises:
        ConfigError: A value has the wrong type or lies outside its bounds.
    """

    max_batch_size: int = 32
    max_wait_time_ms: float = 100
    cache_size: int = 5
    warmup_samples: int = 10
    num_workers: int = 4
    timeout_ms: float = 5000
    batching: BatchingPolicy = "work_conserving"
    max_queue_rows: int = 4096
    max_request_rows: int = 16_384
    cache_bytes: int = 1 << 30
    prediction_cache_bytes: int = 0
    prediction_cache_ttl_s: float = 0
    prediction_cache_scope: CacheScope = "caller"
    head_cache_bytes: int = 256 << 20
    unknown_client: UnknownClient = "global_head"
    outputs: str = "full"
    engine: EngineName = "torch"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "outputs":
                masking.by_role(value)
                continue
            choices = CHOICES.get(field.name)
            if choices is not None:
                if not isinstance(value, str) or value not in choices:
                    raise ConfigError(
                        f"{field.name} is {value!r}: choose one of {', '.join(choices)}"
                    )
                continue
            wanted = "an int" if field.type is int else "an int or a float"
            kinds = int if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{field.name} is {value!r}: it must be {wanted}")
            low, high, why = _BOUNDS[field.name]
            if not low <= value <= high:  # False for NaN too
                raise ConfigError(
                    f"{field.name} is {value!r}: it must lie in [{low}, {high}] ({why})"
                )


def checked(config: ServingConfig | None) -> ServingConfig:
    """``config``, or the defaults. Raises ConfigError where something else stands in its place."""
    if config is not None and not isinstance(config, ServingConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: pass a ServingConfig, such as ServingConfig()"
        )
    return config or ServingConfig()


def deadline_s(timeout_ms: float) -> float:
    """A caller's ``timeout_ms`` in seconds. Raises InvalidInputError outside (0, an hour]."""
    if (
        isinstance(timeout_ms, bool)
        or not isinstance(timeout_ms, int | float)
        or not 0 < timeout_ms <= 3_600_000
    ):
        raise InvalidInputError(
            f"timeout_ms is {timeout_ms!r}: it must be a number of milliseconds in (0, 3600000]"
        )
    return timeout_ms / 1e3
