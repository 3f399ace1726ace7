"""Triton's statistics extension: the server's totals as its clients (perf_analyzer among them) read them."""

from collections.abc import Mapping
from typing import Any

_STAGES = {"queue": "queue", "compute_input": "preprocess", "compute_infer": "infer", "compute_output": "postprocess"}


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": round(seconds * 1e9)}


def model_statistics(name: str, totals: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of one version, ``name`` = "model/version", from what :meth:`Telemetry.totals` gives.

    Per request: success, fail, queue and the three stages; cached answers count in none of the stages. Per execution:
    ``batch_stats``, one entry for each number of rows that ran together. Durations are sums in nanoseconds.
    """
    model, _, version = name.partition("/")
    failed = totals["failures"].get(name, {}).values()
    fail = _duration(sum(n for n, _ in failed), sum(seconds for _, seconds in failed))
    served = totals["versions"].get(name) or {}
    stages, cache, batches = served.get("stages", {}), served.get("cache", {}), served.get("batches", {})
    return {
        "name": model,
        "version": version,
        "last_inference": served.get("last_inference_ms", 0),
        "inference_count": sum(int(rows) * runs[0] for rows, runs in batches.items()),
        "execution_count": sum(runs[0] for runs in batches.values()),
        "inference_stats": {
            "success": _duration(served.get("requests", 0), served.get("seconds", 0)),
            "fail": fail,
            **{theirs: _duration(*stages.get(ours, (0, 0))) for theirs, ours in _STAGES.items()},
            "cache_hit": _duration(*cache.get("hit", (0, 0))),
            "cache_miss": _duration(*cache.get("miss", (0, 0))),
        },
        "batch_stats": [
            {"batch_size": int(rows)}
            | {name: _duration(runs[0], s) for name, s in zip(list(_STAGES)[1:], runs[1:], strict=True)}
            for rows, runs in batches.items()
        ],
    }
