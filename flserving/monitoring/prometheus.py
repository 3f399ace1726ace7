"""What ``/metrics`` shows: the server's totals as Prometheus reads them, base units, labels only from closed sets.

Models come from the router, versions are those that are held (in memory, or led to) and ``other`` for the rest, reasons
are error classes, stages and protocols are fixed: no caller can add series without bound. Nothing is counted here;
every scrape reads :meth:`Telemetry.totals` and the caches' own counters.
"""

import contextlib
import math
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from importlib.metadata import version as version_of
from itertools import accumulate
from typing import Any, cast

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from flserving.errors import BY_REASON, FlservingError
from flserving.monitoring import Observed
from flserving.monitoring.fleet import AGES_S, Skew
from flserving.monitoring.metrics import BOUNDS_S, merged

_Values = Iterable[tuple[tuple[str, ...], float]]  # those of the labels, and the number
_PROCESS = ProcessCollector(registry=None)
BATCH_ROWS = tuple(2**i for i in range(11))
ACCURACIES = ("global", "mean_client", "worst_client")
OUTCOMES = ("ok", "client_error", "overloaded", "server_error")
_CACHES = {
    "model_cache": ("loads", "failed_loads", "hits", "misses", "evictions"),
    "prediction_cache": ("hits", "misses", "shared", "evictions", "expirations"),
}
_MEANING = {
    "loads": "Models read from disk and warmed up.",
    "failed_loads": "Loads that ended in an error.",
    "hits": "Look-ups that found what they sought.",
    "misses": "Look-ups that did not.",
    "shared": "Requests that waited for an identical one that ran.",
    "evictions": "Entries dropped to make room.",
    "expirations": "Entries found too old.",
}
_GAUGES = {
    "ready": "Processes whose default model can answer.",
    "processes": "Processes that answer at this address.",
    "problems": "Versions and registries that need a look (health_check names them).",
    "queue_rows": "Rows waiting for a worker.",
    "queue_limit_rows": "Rows that may wait; beyond it a request is refused.",
    "executions_running": "Batches that run now.",
    "execution_slots": "Batches that may run at once.",
    "model_cache_entries": "Models in memory.",
    "model_cache_bytes": "Bytes of the models in memory.",
    "model_cache_limit_bytes": "Byte budget of the model cache.",
    "prediction_cache_entries": "Predictions in memory.",
    "prediction_cache_bytes": "Bytes of the predictions in memory.",
    "prediction_cache_limit_bytes": "Byte budget of the prediction cache.",
}


def totals(server: Observed) -> dict[str, Any]:
    """Everything that processes add up to show as one: :meth:`Telemetry.totals`, the caches' counters, and under
    ``now`` what may also fall: leave that out of what a process that ended has left behind."""
    stats, health = server.get_all_stats(), server.health_check()
    caches = {name: stats[name] or {} for name in _CACHES}
    now: dict[str, Any] = {
        "fleet": server.fleet.lines(),
        "ready": int(health["ready"]),
        "processes": 1,
        "problems": len(health["problems"]),
        "queue_rows": stats["queue"]["waiting_rows"],
        "queue_limit_rows": stats["queue"]["max_queue_rows"],
        "executions_running": stats["queue"]["running"],
        "execution_slots": server.config.num_workers,
    }
    for name, cache in caches.items():
        for theirs, ours in (("size", "entries"), ("nbytes", "bytes"), ("max_bytes", "limit_bytes")):
            now[f"{name}_{ours}"] = cache.get(theirs, 0)
    counters = {name: {key: cache.get(key, 0) for key in _CACHES[name]} for name, cache in caches.items()}
    process = {sample.name: sample.value for metric in _PROCESS.collect() for sample in metric.samples}
    process.pop("process_start_time_seconds", None)  # cannot be added
    cpu = {name: process.pop(name) for name in list(process) if name.endswith("_total")}
    whole: dict[str, Any] = server.telemetry.totals()
    return whole | {"caches": counters, "process": cpu, "now": now | process}


def exposition(server: Observed, accept: str = "", others: Sequence[Mapping[str, Any]] = ()) -> tuple[bytes, str]:
    """What ``/metrics`` answers, and its content type: OpenMetrics where ``accept`` asks for it.

    Args:
        others: :func:`totals` of the other processes behind the same address. Sums are shown, of ``process_...`` too;
            only the time of the start stays this one's.

    Thread-safe. Cost: about 1 ms, and 30 us for each version that is held.
    """
    registry = CollectorRegistry()
    registry.register(ServerCollector(server, others))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class ServerCollector(Collector):
    """A server for prometheus-client's registries: ``registry.register(ServerCollector(server))``."""

    def __init__(self, server: Observed, others: Sequence[Mapping[str, Any]] = ()) -> None:
        self._server, self._others = server, others

    def collect(self) -> Iterator[Metric]:
        whole = merged([totals(self._server), *self._others])
        for counts in ("versions", "failures"):  # what is not held any more is hidden before it is forgotten
            whole[counts] = {name: it for name, it in whole[counts].items() if name in whole["named"]}
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"flserving_{name}", text, value=whole["now"][name])
        for metric in _PROCESS.collect():  # gives names and texts; the values are those of all
            values = whole["process"] | whole["now"]
            metric.samples = [sample._replace(value=values.get(sample.name, sample.value)) for sample in metric.samples]
            yield metric
        for cache, counters in whole["caches"].items():
            for name, value in counters.items():
                yield CounterMetricFamily(f"flserving_{cache}_{name}", _MEANING[name], value=value)
        yield from self._versions(self._server._held() | whole["named"].keys())
        yield from _fleet(self._server.fleet.skew(whole["now"]["fleet"]))
        yield from _device(self._server.get_all_stats().get("edge"))
        yield from _requests(whole)
        yield from _inference(whole["versions"])
        yield from _doors(whole)
        yield _counter("head_rows", "Rows of callers who are clients, by the personal head that was found.", ("head",),
                       (((head,), n) for head, n in whole["told"]["head"].items()))  # fmt: skip
        yield _counter("path_answers", "Answers of an edge or hybrid server, by where they came from.", ("path",),
                       (((path,), n) for path, n in whole["told"]["path"].items()))  # fmt: skip
        yield _counter("deltas", "Deltas that devices asked for first: made, refused (too many), not_kept (the disk).",
                       ("outcome",), (((it,), n) for it, n in whole["told"].get("delta", {}).items()))  # fmt: skip

    def _versions(self, held: Set[str]) -> Iterator[Metric]:
        labels = {name: version_of(name) for name in ("flserving", "torch")} | {"python": platform.python_version()}
        yield _gauge("build_info", "Versions of the software.", labels, [(tuple(labels.values()), 1)])
        served = {
            (model, version, alias): 1
            for model, known in self._server.health_check()["models"].items()
            for alias, version in [*known["aliases"].items(), *(("", version) for version in known["versions"])]
            if f"{model}/{version}" in held
        }
        help_text = "Versions in memory or led to, each also once for every alias that leads to it."
        yield _gauge("model_version_info", help_text, ("model", "version", "alias"), served.items())
        help_text = "Accuracy on held-out data as published, of every version that an alias leads to."
        keys = {(model, version) for model, version, alias in served if alias}
        yield _gauge("model_accuracy", help_text, ("model", "version", "of"), self._accuracies(sorted(keys)))

    def _accuracies(self, keys: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str, str], float]]:
        for key in keys:
            with contextlib.suppress(FlservingError):  # gone since, or unreadable: other metrics tell
                published = self._server.published_metrics(key)
                yield from (((*key, of), published[f"{of}_accuracy"]) for of in ACCURACIES
                            if f"{of}_accuracy" in published)  # fmt: skip


def _fleet(skews: Mapping[str, Skew]) -> Iterator[Metric]:
    text = "Devices by the round that they run, as of their last pull within a week; of most rounds, the rest is other."
    rounds = {(model, number): n for model, skew in skews.items() for number, n in skew.rounds.items()}
    yield _gauge("fleet_devices", text, ("model", "round"), rounds.items())
    text = "How long ago each device's model was known to be the current one."
    ages = GaugeHistogramMetricFamily("flserving_fleet_age_seconds", text, labels=("model",))
    for model, skew in skews.items():
        ages.add_metric([model], _buckets(AGES_S, skew.ages), skew.total_s)
    yield ages


def _device(edge: Mapping[str, Any] | None) -> Iterator[Metric]:
    """Of a device: what it serves itself."""
    if edge is None:
        return
    age_s = math.inf if edge["age_s"] is None else edge["age_s"]
    text = "Seconds since this device's model was known to be the current one; infinite: it cannot tell."
    yield GaugeMetricFamily("flserving_edge_age_seconds", text, value=age_s)
    if edge["round"] is not None:
        yield GaugeMetricFamily("flserving_edge_round", "Federated round of this device's model.", value=edge["round"])


def _requests(whole: Mapping[str, Any]) -> Iterator[Metric]:
    answered, failures, refusals = whole["versions"], whole["failures"], whole["refusals"]
    requests = Counter({name: account["requests"] for name, account in answered.items()})
    outcomes = Counter(dict.fromkeys(OUTCOMES, 0) | {"ok": whole["answered"]})
    for reason, count in whole["failed"].items():
        outcomes[_outcome(reason)] += count
    failed = {(*_split(""), reason, str(_status(reason))): 0 for reason in ("Internal", "Overloaded")}
    for name, reasons in failures.items():
        for reason, (count, _) in reasons.items():
            requests[name] += count
            failed[*_split(name), reason, str(_status(reason))] = count
    refused = {}
    for protocol, reasons in refusals.items():
        for reason, count in reasons.items():
            outcomes[_outcome(reason)] += count
            refused[protocol, reason, str(_status(reason))] = count
    yield _counter("requests", "Requests, answered or failed.", ("model", "version"),
                   ((_split(name), n) for name, n in requests.items()))  # fmt: skip
    yield _counter("request_failures", "Requests that got an error, by its class and HTTP status.",
                   ("model", "version", "reason", "code"), failed.items())  # fmt: skip
    yield _counter("refusals", "Calls that a door refused, so that no request came of them.",
                   ("protocol", "reason", "code"), refused.items())  # fmt: skip
    yield _counter("outcomes", "Requests and refusals by who must act: nobody, the client, capacity, the server.",
                   ("outcome",), (((outcome,), n) for outcome, n in outcomes.items()))  # fmt: skip
    yield _counter("request_rows", "Rows of the answered requests.", ("model", "version"),
                   ((_split(name), account["rows"]) for name, account in answered.items()))  # fmt: skip
    seconds = HistogramMetricFamily("flserving_request_seconds", "Duration of the answered requests.",
                                    labels=("model", "version"))  # fmt: skip
    for name, account in answered.items():
        seconds.add_metric(_split(name), _buckets(BOUNDS_S, account["at_most"]), account["seconds"])
    stages = HistogramMetricFamily("flserving_stage_seconds", "Duration of the stages that answered requests entered.",
                                   labels=("stage",))  # fmt: skip
    for stage, spent in whole["stages"].items():
        stages.add_metric([stage], _buckets(BOUNDS_S, spent["at_most"]), spent["seconds"])
    yield from (seconds, stages)


def _inference(versions: Mapping[str, Any]) -> Iterator[Metric]:
    rows = HistogramMetricFamily("flserving_batch_rows", "Rows of each execution of a model.",
                                 labels=("model", "version"))  # fmt: skip
    seconds = {}
    for name, account in versions.items():
        batches = {int(size): batch for size, batch in account["batches"].items()}
        counts = [0] * (len(BATCH_ROWS) + 1)
        for size, batch in batches.items():
            counts[sum(size > bound for bound in BATCH_ROWS)] += batch[0]
        rows.add_metric(_split(name), _buckets(BATCH_ROWS, counts), sum(n * b[0] for n, b in batches.items()))
        for place, stage in enumerate(("preprocess", "infer", "postprocess"), start=1):
            seconds[*_split(name), stage] = sum(batch[place] for batch in batches.values())
    yield rows
    yield _counter("execution_seconds", "Time that executions took: busy slots, when divided by time.",
                   ("model", "version", "stage"), seconds.items())  # fmt: skip


def _doors(whole: Mapping[str, Any]) -> Iterator[Metric]:
    parts = ("parse", "serialise")
    yield _counter("door_answers", "Inference calls that a door answered.", ("protocol",),
                   (((protocol,), account[0]) for protocol, account in whole["doors"].items()))  # fmt: skip
    spent = {
        (protocol, part): s
        for protocol, (_, *both) in whole["doors"].items()
        for part, s in zip(parts, both, strict=True)
    }
    yield _counter("door_seconds", "Bytes to arrays, and arrays to bytes.", ("protocol", "part"), spent.items())


def _family(kind: type[Metric], name: str, text: str, labels: Iterable[str], values: _Values) -> Metric:
    family: Any = kind(f"flserving_{name}", text, labels=tuple(labels))  # type: ignore[call-arg]
    for key, value in values:
        family.add_metric(key, value)
    return cast(Metric, family)


_counter, _gauge = partial(_family, CounterMetricFamily), partial(_family, GaugeMetricFamily)


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    return list(zip([*(str(float(bound)) for bound in bounds), "+Inf"], accumulate(counts), strict=True))


def _split(name: str) -> tuple[str, str]:
    model, _, version = name.partition("/")
    return model, version


def _status(reason: str) -> int:
    return 499 if reason == "Cancelled" else BY_REASON.get(reason, FlservingError).http_status


def _outcome(reason: str) -> str:
    status = _status(reason)
    return "overloaded" if status == 429 else "client_error" if status < 500 else "server_error"
