"""Hybrid serving: the device answers what it can, the cloud the rest, and every answer says which of them it was.

A request takes one path as a whole, whatever its rows: ``path`` is "local", "cache" (what the cloud said of the same
rows, kept on the device), "cloud", or "degraded" (the device's answer, where the policy wanted the cloud's).
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any, Protocol

from flserving.edge.breaker import CircuitBreaker
from flserving.edge.device import EdgeModelServer
from flserving.edge.policies import POLICIES, Answered, Kept, Turn, hedged
from flserving.errors import ConfigError
from flserving.serving.cache import PredictionCache
from flserving.serving.doors import Door


class Cloud(Protocol):
    """What is asked of the cloud: :class:`flserving.api.client.Client`, or anything that answers alike."""

    @property
    def predict(self) -> Callable[..., Answered]: ...


class HybridServer(EdgeModelServer):
    """An edge server that asks a cloud where its policy says so. Whatever it does not say itself is its edge's.

    Args:
        edge: The device. It and ``cloud`` stay open when the hybrid closes.
        cloud: A :class:`flserving.api.client.Client`; it is called in threads, at most ``cloud_calls`` at a time.
        policy: ``local_first`` or ``as_drawn``: the functions of ``policies.py``.
        consent: Nothing leaves the device unless it is True; may be set at any time.
        threshold: The lowest confidence that is trusted, see :func:`flserving.edge.calibration.calibrate`.
        cloud_share: Share of a request's time that the cloud may take; the rest comes first and is the device's.
        personal: Ask for the answers of the client that the cloud's credential names, where the device's client asks.
        cloud_model: The model's name in the cloud; that of the edge when not given.
        breaker: By default it opens after 5 failures in a row, for 5 s.
        hedge_ms: With ``local_first``: ask the cloud too when the device takes longer than this. None: never.
        cache_bytes, cache_ttl_s: Of the cloud's answers. They are private to the client. A local update changes their
            key, and an answer of another version of the cloud drops them all: so after a promotion in the cloud of
            which nothing was heard, an answer may be up to ``cache_ttl_s`` old, and ``age_s`` says how old.

    A request that names a version, or another model than the edge's, is the device's alone. A cloud answer's ``age_s``
    counts from when it was given, and ``round`` is None where the cloud does not say it.

    Raises:
        ConfigError: An unknown policy, a number out of range, or hedging with another policy than ``local_first``.
    """

    def __init__(
        self, edge: EdgeModelServer, cloud: Cloud, policy: str = "local_first", *, consent: bool = False,
        threshold: float = 0.8, cloud_share: float = 0.8, personal: bool = False, cloud_model: str | None = None,
        breaker: CircuitBreaker | None = None, hedge_ms: float | None = None, cloud_calls: int = 8,
        cache_bytes: int = 16 << 20, cache_ttl_s: float = 60.0,
    ) -> None:  # fmt: skip
        if policy not in POLICIES:
            raise ConfigError(f"policy is {policy!r}: choose one of {', '.join(POLICIES)}")
        if hedge_ms is not None and policy != "local_first":
            raise ConfigError(f"hedge_ms is {hedge_ms!r} with policy {policy!r}: only local_first hedges")
        numbers = (
            ("threshold", threshold, 0, inf),
            ("cloud_share", cloud_share, 0.01, 1),
            ("hedge_ms", hedge_ms, 0, inf),
        )
        for name, value, low, high in numbers:
            if value is not None and (type(value) not in (int, float) or not low <= value < high):
                raise ConfigError(f"{name} is {value!r}: it must be a number in [{low}, {high})")
        self.edge, self.cloud, self.consent, self.personal = edge, cloud, consent, personal
        self.threshold, self.cloud_share, self.hedge_ms = threshold, cloud_share, hedge_ms
        self.cloud_model, self.breaker = cloud_model, breaker or CircuitBreaker()
        self.cloud_cache: PredictionCache[Kept] = PredictionCache(cache_bytes, cache_ttl_s, edge._clock)
        self._policy = POLICIES[policy] if hedge_ms is None else hedged
        self._calls = ThreadPoolExecutor(cloud_calls, thread_name_prefix="flserving-cloud")
        self._hedges = [ThreadPoolExecutor(2 * cloud_calls, thread_name_prefix="flserving-hedge") for _ in range(2)]
        self._closed, self._lock, self._cloud_version = False, threading.Lock(), ""
        self._refusals = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if name == "edge":
            raise AttributeError(name)
        return getattr(self.edge, name)

    async def _answer(
        self, features: Any, version: str | int | None, model: str | None, timeout_ms: float | None,
        stages: bool, arrays: bool, client: str | Sequence[str] | None, caller: str | None, door: Door,
    ) -> Answered:  # fmt: skip
        if version is not None or model not in (None, self.model):
            self._check_open()
            answer = await self.edge._local(features, version, model, timeout_ms, stages, arrays, client, caller, door)
        else:
            turn = Turn(self, features, self._timeout_s(timeout_ms), stages, arrays, client, caller, door)
            answer = await self._policy(turn)
            answer["latency_ms"] = (self._clock() - turn.started_s) * 1e3
        self.telemetry.told("path", [answer["path"]])
        return answer

    def _refused(self, reason: str) -> None:
        with self._lock:
            self._refusals[reason] += 1

    def _heard(self, cloud_version: str) -> None:
        with self._lock:
            if cloud_version != self._cloud_version:
                self._cloud_version = cloud_version
                self.cloud_cache.clear()

    def get_all_stats(self) -> dict[str, Any]:
        """The edge's (answers by path are in them), and ``hybrid``: why the cloud gave none, its breaker, its cache."""
        with self._lock:
            refusals = dict(self._refusals)
        own = {"consent": self.consent, "breaker": self.breaker.stats(), "cloud_cache": self.cloud_cache.stats()}
        return self.edge.get_all_stats() | {"hybrid": own | {"cloud_refusals": refusals}}

    def close(self, drain_s: float = 5.0) -> None:
        """Answer no more. Calls to the cloud that still wait end by their own deadlines. Idempotent."""
        self._closed = True
        for pool in (self._calls, *self._hedges):
            pool.shutdown(wait=False, cancel_futures=True)
