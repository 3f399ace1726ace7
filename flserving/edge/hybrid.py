"""Hybrid serving: the device answers what it can, the cloud the rest, and every answer says which
of them it was.

A request takes one path as a whole, whatever its rows: ``path`` is "local", "cache" (an earlier
answer of the cloud to the same rows), "cloud", or "degraded" (the device's answer, where the policy
wanted the cloud's).
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from flserving.edge.breaker import CircuitBreaker
from flserving.edge.device import EdgeModelServer, device_request
from flserving.errors import (
    ConfigError,
    CorruptArtifactError,
    DeadlineExceededError,
    FlservingError,
    ForbiddenError,
    ModelExecutionError,
    ModelTooLargeError,
    NotFoundError,
    OverloadedError,
    ServerClosedError,
    StaleModelError,
    check_number,
)
from flserving.models.masking import FULL, OUTPUTS
from flserving.models.processing import Preprocessor, Several
from flserving.serving.cache import PredictionCache
from flserving.serving.engine import Answer
from flserving.serving.request import Request, finished
from flserving.serving.server import dealt_out
from flserving.serving.synonyms import version_id_too

_NO_CONSENT = "nothing leaves this device without consent: set consent=True"
_MENDABLE = (
    StaleModelError,
    NotFoundError,
    OverloadedError,
    DeadlineExceededError,
    ModelExecutionError,
    CorruptArtifactError,
    ModelTooLargeError,
)
"""What keeps the device from answering, and need not keep the cloud."""
_DEGRADED = {"path": "degraded", "degraded": True}
_NOTES = ("model_version", "model_type", "head", "round", "age_s", "degraded", "outputs")


class Cloud(Protocol):
    """What is asked of the cloud: :class:`flserving.api.client.Client`, or anything that answers
    alike."""

    @property
    def predict(self) -> Callable[..., Answer]: ...


# Policies: whether the device's answer stands. Where it does not, the cache is asked, then the
# cloud; where neither answers, the device's answer is given after all, and flagged.


def local_first(answer: Answer, threshold: float) -> bool:
    """The device answers when it is sure of every row (a regression has no confidence: it is
    trusted), and fresh."""
    confidences = answer.get("confidences", ())
    return not answer["degraded"] and (len(confidences) == 0 or min(confidences) >= threshold)


def as_drawn(answer: Answer, threshold: float) -> bool:
    """The drawing: local head -> cache hit? -> else the cloud's model.

    Where the client has a head of its own that fits the device's body, it answers, sure or not, up
    to the hard limit of its age. Who has none is answered from the cache or by the cloud. The
    drawing does not show a cloud that is away: then the device's global model answers, flagged.
    """
    return bool(answer["model_type"] == "personal")


POLICIES: dict[str, Callable[[Answer, float], bool]] = {
    "local_first": local_first,
    "as_drawn": as_drawn,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridSettings:
    """How a hybrid asks its cloud, and how long it relies on an answer.

    Args:
        cloud_share: Share of a request's time that the cloud may take; the rest comes first and is
            the device's.
        personal: Ask for the answers of the client that the cloud's credential names, where the
            device's client asks.
        cloud_calls: Most calls at a time; each takes a thread.
        cache_bytes, cache_ttl_s: Of the cloud's answers. They are private to the client. A local
            update changes their key, and an answer of another version of the cloud drops them all:
            so after a promotion in the cloud of which nothing was heard, an answer may be up to
            ``cache_ttl_s`` old, and ``age_s`` says how old.
    """

    cloud_share: float = 0.8
    personal: bool = False
    cloud_calls: int = 8
    cache_bytes: int = 16 << 20
    cache_ttl_s: float = 60.0


class HybridServer:
    """A server that has a device and a cloud, and asks the cloud where its policy says so.

    Args:
        edge: The device. It and ``cloud`` stay open when the hybrid closes.
        cloud: A :class:`flserving.api.client.Client`; it is called in threads.
        policy: ``local_first`` or ``as_drawn``: the functions of that name in this module.
        consent: Nothing leaves the device unless it is True; may be set at any time.
        threshold: The lowest confidence that is trusted, see
            :func:`flserving.edge.calibration.calibrate`.
        cloud_model: The model's name in the cloud; that of the edge when not given.
        breaker: By default it opens after 5 failures in a row, for 5 s.
        settings: See :class:`HybridSettings`.

    A request that names a version, or another model than the edge's, is the device's alone. A cloud
    answer's ``age_s`` counts from when it was given, and ``round`` is None where the cloud does not
    say it.

    Raises:
        ConfigError: An unknown policy, or a number out of range.
    """

    def __init__(
        self,
        edge: EdgeModelServer,
        cloud: Cloud,
        policy: str = "local_first",
        *,
        consent: bool = False,
        threshold: float = 0.8,
        cloud_model: str | None = None,
        breaker: CircuitBreaker | None = None,
        settings: HybridSettings | None = None,
    ) -> None:
        settings = settings or HybridSettings()
        if policy not in POLICIES:
            raise ConfigError(f"policy is {policy!r}: choose one of {', '.join(POLICIES)}")
        check_number("threshold", threshold, 0, inf)
        check_number("cloud_share", settings.cloud_share, 0.01, 0.99)
        self.edge = edge
        self.cloud = cloud
        self.consent = consent
        self.threshold = threshold
        self.cloud_model = cloud_model
        self.settings = settings
        self.breaker = breaker or CircuitBreaker()
        self.cloud_cache: PredictionCache[CloudAnswer] = PredictionCache(
            settings.cache_bytes, settings.cache_ttl_s, edge._clock
        )
        self._stands = POLICIES[policy]
        self._calls = ThreadPoolExecutor(settings.cloud_calls, thread_name_prefix="flserving-cloud")
        self._closed = False
        self._lock = threading.Lock()
        self._cloud_version = ""
        self._refusals = Counter[str]()
        # For all else that is called on a server, this is the device.
        self.config = edge.config
        self.registry = edge.registry
        self.telemetry = edge.telemetry
        self.fleet = edge.fleet
        self.experiments = edge.experiments
        self.prediction_cache = edge.prediction_cache
        self.resolve = edge.resolve
        self.signature = edge.signature
        self.published_metrics = edge.published_metrics
        self.refresh = edge.refresh
        self.confirm = edge.confirm
        self.update_global = edge.update_global
        self.update_local = edge.update_local
        self.unload = edge.unload
        self.reload = edge.reload
        self._clock = edge._clock
        self._held = edge._held

    # Requests

    @version_id_too
    def predict(
        self,
        features: Any,
        use_personalized: bool = True,
        version: str | int | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a row [D] or rows [N, D]: see :meth:`EdgeModelServer.predict`."""
        return self.handle(device_request(features, use_personalized, version, **options))

    @version_id_too
    async def apredict(
        self, features: Any, version: str | int | None = None, **options: Any
    ) -> Answer:
        """:meth:`predict` for coroutines."""
        return await self.ahandle(Request(features, version, **options))

    @version_id_too
    def batch_predict(
        self, batch: Iterable[Any], version: str | int | None = None, **options: Any
    ) -> list[Answer]:
        """Answer several requests as one, see :meth:`ModelServer.batch_predict`: they take one path
        together."""
        several = Several(batch)
        return dealt_out(self.predict(several, version=version, **options), several.lengths)

    def handle(self, request: Request) -> Answer:
        """Answer one request, on the caller's thread."""
        if self._is_the_devices(request):
            return self.edge.handle(request)
        exchange = Exchange(self, request)
        try:
            local = self.edge.handle(exchange.for_device())
        except _MENDABLE:
            answer = self._ask_cloud(exchange)
            if answer is None:
                raise
            return exchange.respond(answer)
        if self._stands(local, self.threshold):
            return exchange.respond(local)
        return exchange.respond(self._ask_cloud(exchange) or local | _DEGRADED)

    async def ahandle(self, request: Request) -> Answer:
        """:meth:`handle` for coroutines."""
        if self._is_the_devices(request):
            return await self.edge.ahandle(request)
        exchange = Exchange(self, request)
        try:
            local = await self.edge.ahandle(exchange.for_device())
        except _MENDABLE:
            answer = await self._aask_cloud(exchange)
            if answer is None:
                raise
            return exchange.respond(answer)
        if self._stands(local, self.threshold):
            return exchange.respond(local)
        return exchange.respond(await self._aask_cloud(exchange) or local | _DEGRADED)

    def _is_the_devices(self, request: Request) -> bool:
        if self._closed:
            raise ServerClosedError("the server was closed: open a new one")
        return request.version is not None or request.model not in (None, self.edge.model)

    def _ask_cloud(self, exchange: "Exchange") -> Answer | None:
        """The cloud's answer, an earlier one or a new one, in its part of the time; None where
        there is none.

        Raises:
            InvalidInputError: The features are not rows of finite numbers.
        """
        exchange.read_rows()
        with exchange:
            if exchange.begin():
                wait([exchange.awaited], exchange.cloud_left_s())
            return exchange.end()
        return None

    async def _aask_cloud(self, exchange: "Exchange") -> Answer | None:
        exchange.read_rows()
        with exchange:
            if exchange.begin():
                await finished(exchange.awaited, exchange.cloud_left_s())
            return exchange.end()
        return None

    # What operators see

    @property
    def ready(self) -> bool:
        """Whether the device can answer."""
        return not self._closed and self.edge.ready

    @property
    def model(self) -> str:
        """The name of the device's model."""
        return self.edge.model

    @property
    def client(self) -> str:
        """Whose device it is."""
        return self.edge.client

    @property
    def unloaded(self) -> frozenset[str]:
        """As :attr:`ModelServer.unloaded`."""
        return self.edge.unloaded

    def health_check(self) -> dict[str, Any]:
        """The edge's; unavailable once the hybrid is closed."""
        health = self.edge.health_check()
        if self._closed:
            health |= {"status": "unavailable", "ready": False}
        return health

    def get_all_stats(self) -> dict[str, Any]:
        """The edge's (answers by path are in them), and ``hybrid``: why the cloud gave none, its
        breaker, its cache."""
        with self._lock:
            refusals = dict(self._refusals)
        own = {
            "consent": self.consent,
            "breaker": self.breaker.stats(),
            "cloud_cache": self.cloud_cache.stats(),
            "cloud_refusals": refusals,
        }
        return self.edge.get_all_stats() | {"hybrid": own}

    def close(self) -> None:
        """Answer no more. Calls to the cloud that still wait end by their own deadlines.
        Idempotent."""
        self._closed = True
        self._calls.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Exchange:
    """One request between device and cloud: the time of each, and the call to the cloud.

    As a context: :meth:`begin`, wait for ``awaited``, :meth:`end`. An error of the package ends the
    context and goes no further: who follows this request's call hears of it, and it is counted.
    Nothing that an error's frames lead to holds the error, so it is gone with its last user.
    """

    def __init__(self, server: HybridServer, request: Request) -> None:
        timeout_s = server.edge._timeout_s(request.timeout_ms)
        self.request = request
        self.started_s = server._clock()
        self._server = server
        self._policy = server.edge._policy_of(request)
        self._cloud_s = timeout_s * server.settings.cloud_share if server.consent else 0.0
        self._device_s = timeout_s - self._cloud_s
        self._ends_s = self.started_s + timeout_s
        self._leads = False  # whether others wait for what comes of this one's call
        self._flight: Any = None  # the future of the flight that it leads or follows
        self.awaited: Any = None  # the future of its own call, else of the flight that it follows
        self._cached: CloudAnswer | None = None

    def for_device(self) -> Request:
        """The same request, in the device's part of the time; nothing is masked before it is known
        who answers."""
        request = copy(self.request)
        request.timeout_ms = self._device_s * 1e3
        request.nested = True
        request.policy = FULL
        request.outputs = None
        return request

    def respond(self, answer: Answer) -> Answer:
        """The answer to the request: masked, with the time that it took, counted by its path."""
        if self._policy != FULL:
            outputs = {name: np.asarray(answer.pop(name)) for name in OUTPUTS if name in answer}
            answer |= self._policy.shown(outputs, self.request.arrays)
        answer["latency_ms"] = (self._server._clock() - self.started_s) * 1e3
        self._server.telemetry.count("path", [answer["path"]])
        return answer

    def read_rows(self) -> None:
        """Check the features, and name what the cloud is asked. Raises InvalidInputError."""
        server = self._server
        client = self.request.client
        scope = client if client is None or isinstance(client, str) else tuple(client)
        route = server.edge._router.routes.targets.get((server.model, "default"))
        self._rows = self._flat_rows().copy()  # what is hashed is what is sent
        digest = hashlib.blake2b(self._rows.data, digest_size=32).digest()
        self._key = (self.request.personal, scope, route, self._rows.shape, digest)

    def _flat_rows(self) -> NDArray[np.float32]:
        """The request's rows, flat: what shape a row has, the device's model tells."""
        edge = self._server.edge
        shape = None
        with suppress(FlservingError):  # there may be no model yet
            shape = edge.signature(edge.resolve()).input_shape
        if shape is not None and len(shape) == 1:
            shape = None
        return Preprocessor(input_shape=shape).validate(self.request.features)

    def cloud_left_s(self) -> float:
        """What is left of the cloud's part of the time."""
        return max(0.0, self._until_s - self._server._clock())

    def __enter__(self) -> None:
        pass

    def begin(self) -> bool:
        """Ask the cloud, or join who asks it; False where the answer is in the cache."""
        server = self._server
        self._until_s = min(self._ends_s, server._clock() + self._cloud_s)
        self._cached, self._flight, self._leads = server.cloud_cache.begin(self._key)
        self.awaited = self._flight
        if self._leads:
            if not server.consent:
                raise ForbiddenError(_NO_CONSENT)
            if not server.breaker.allow():
                raise OverloadedError(
                    "the cloud failed several times in a row: it is left alone for a while"
                )
            try:
                self.awaited = server._calls.submit(self._ask)
            except RuntimeError as error:
                raise ServerClosedError("the server was closed: open a new one") from error
        return self._cached is None

    def end(self) -> Answer:
        """The cloud's answer, from wherever it came. Raises why there is none."""
        if self._cached is not None:
            return self._cached.answer("cache", self)
        if self._leads:
            answer = self._received()
            self._server.cloud_cache.finish(self._key, self._flight, answer)
            self._leads = False
        elif self.awaited.done():
            answer = self.awaited.result()
        else:
            raise DeadlineExceededError(
                "an identical request to the cloud took too long: raise timeout_ms"
            )
        return answer.answer("cloud", self)

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> bool:
        if self._leads:
            cancelled = OverloadedError("the request that asked the cloud was cancelled: try again")
            reason = error if isinstance(error, Exception) else cancelled
            self._server.cloud_cache.finish(self._key, self._flight, error=reason)
        self._flight = None
        self.awaited = None
        if not isinstance(error, FlservingError):
            return False
        with self._server._lock:
            self._server._refusals[error.reason] += 1
        return True

    def _received(self) -> "CloudAnswer":
        """The answer to the call that this request made."""
        server = self._server
        try:
            if not self.awaited.done():
                self.awaited.cancel()
                raise DeadlineExceededError(
                    f"no answer from the cloud in its {self._cloud_s * 1e3:.0f} ms"
                )
            answer = CloudAnswer(self.awaited.result(), len(self._rows), server._clock())
        except Exception as error:  # whatever it is, the device goes on
            status = error.http_status if isinstance(error, FlservingError) else 500
            server.breaker.record(status < 500 and status != 429)  # refusing me, it is alive
            if isinstance(error, FlservingError):
                raise
            raise FlservingError(f"the cloud's answer: {error!r}") from error
        server.breaker.record(True)
        version = str(answer.notes["model_version"])
        with server._lock:
            if version != server._cloud_version:
                server._cloud_version = version
                server.cloud_cache.clear()
        return answer

    def _ask(self) -> Answer:
        """Ask the cloud, in a thread that may have become free only now. The credential is that of
        the device's client: for anybody else the cloud's global model answers."""
        server = self._server
        if not server.consent:  # withdrawn meanwhile
            raise ForbiddenError(_NO_CONSENT)
        options: dict[str, Any] = {}
        if (
            server.settings.personal
            and self.request.personal
            and self.request.client in (None, server.client)
        ):
            options["personal"] = True
        left_ms = max(1e-3, (self._until_s - server._clock()) * 1e3)
        model = server.cloud_model or server.model
        return server.cloud.predict(
            self._rows, model=model, arrays=True, timeout_ms=left_ms, **options
        )


class CloudAnswer:
    """What the cloud answered to some rows, in arrays that nobody may write to."""

    def __init__(self, answer: Mapping[str, Any], rows: int, at_s: float) -> None:
        self.outputs = {
            name: np.array(answer[name]) for name in OUTPUTS if answer.get(name) is not None
        }
        self.notes = {name: answer[name] for name in _NOTES if name in answer}
        self._at_s = at_s
        self._age_s = float(answer.get("age_s") or 0.0)
        lengths = {len(output) for output in self.outputs.values()}
        whole = lengths == {rows} and "predictions" in self.outputs
        whole &= all(output.dtype.kind in "fiu" for output in self.outputs.values())
        if (
            not whole
            or not 0 <= self._age_s < inf
            or not isinstance(self.notes.get("model_version"), str)
        ):
            raise FlservingError(
                f"the cloud's answer to {rows} rows is not one: is that a server of flserving?"
            )
        for output in self.outputs.values():
            output.setflags(write=False)
        self.nbytes = sum(output.nbytes for output in self.outputs.values())

    def answer(self, path: str, exchange: Exchange) -> Answer:
        """The answer to a request that got it from the "cloud" or from the "cache"."""
        now_s = exchange._server._clock()
        answer = {
            "model_type": "global",
            "round": None,
            "degraded": False,
            **self.notes,
            "path": path,
        }
        answer["age_s"] = self._age_s + (now_s - self._at_s if path == "cache" else 0.0)
        for name, output in self.outputs.items():
            answer[name] = output if exchange.request.arrays else output.tolist()
        if exchange.request.stages:
            answer["stages_ms"] = {path: (now_s - exchange.started_s) * 1e3}
        return answer
