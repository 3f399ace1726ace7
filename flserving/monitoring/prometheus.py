"""What ``/metrics`` shows: the server's totals as Prometheus reads them, base units, labels only
from closed sets.

Models come from the router, versions are those that are held (in memory, or led to) and ``other``
for the rest, reasons are error classes, stages and protocols are fixed: no caller can add series
without bound. Nothing is counted here; every scrape reads :meth:`Telemetry.totals` and the caches'
own counters.
"""

import math
import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
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
from flserving.monitoring.metrics import BOUNDS_S, Sums, merged

_Numbers = dict[Any, float]  # by the values of the labels
_OF_VERSION = ("model", "version")
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


def totals(server: Observed) -> Sums:
    """Everything that processes add up to show as one: :meth:`Telemetry.totals`, the caches'
    counters, and under ``now`` what may also fall: leave that out of what a process that ended has
    left behind."""
    stats = server.get_all_stats()
    health = server.health_check()
    now: Sums = {
        "fleet": server.fleet.lines(),
        "ready": int(health["ready"]),
        "processes": 1,
        "problems": len(health["problems"]),
        "queue_rows": stats["queue"]["waiting_rows"],
        "queue_limit_rows": stats["queue"]["max_queue_rows"],
        "executions_running": stats["queue"]["running"],
        "execution_slots": server.config.num_workers,
    }
    counters = {}
    for name, keys in _CACHES.items():
        cache = stats[name] or {}
        counters[name] = {key: cache.get(key, 0) for key in keys}
        now[f"{name}_entries"] = cache.get("size", 0)
        now[f"{name}_bytes"] = cache.get("nbytes", 0)
        now[f"{name}_limit_bytes"] = cache.get("max_bytes", 0)
    process = {}
    for metric in _PROCESS.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                process[sample.name] = sample.value
            elif sample.name != "process_start_time_seconds":  # cannot be added
                now[sample.name] = sample.value
    whole: Sums = server.telemetry.totals()
    return whole | {"caches": counters, "process": process, "now": now}


def exposition(
    server: Observed, accept: str = "", others: Sequence[Sums] = ()
) -> tuple[bytes, str]:
    """What ``/metrics`` answers, and its content type: OpenMetrics where ``accept`` asks for it.

    Args:
        others: :func:`totals` of the other processes behind the same address. Sums are shown, of
            ``process_...`` too; only the time of the start stays this one's.

    Thread-safe. Cost: about 1 ms, and 30 us for each version that is held.
    """
    registry = CollectorRegistry()
    registry.register(ServerCollector(server, others))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class ServerCollector(Collector):
    """A server for prometheus-client's registries:
    ``registry.register(ServerCollector(server))``."""

    def __init__(self, server: Observed, others: Sequence[Sums] = ()) -> None:
        self._server = server
        self._others = others

    def collect(self) -> Iterator[Metric]:
        whole = merged([totals(self._server), *self._others])
        # what is not held any more is hidden before it is forgotten
        for counts in ("versions", "failures"):
            for name in whole[counts].keys() - whole["named"]:
                del whole[counts][name]
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"flserving_{name}", text, value=whole["now"][name])
        for metric in _PROCESS.collect():  # gives names and texts; the values are those of all
            values = whole["process"] | whole["now"]
            samples = []
            for sample in metric.samples:
                value = values.get(sample.name, sample.value)
                samples.append(sample._replace(value=value))
            metric.samples = samples
            yield metric
        for cache, counters in whole["caches"].items():
            for name, value in counters.items():
                yield CounterMetricFamily(f"flserving_{cache}_{name}", _MEANING[name], value=value)
        yield from self._versions(self._server._held() | whole["named"].keys())
        yield from _fleet(self._server.fleet.skew(whole["now"]["fleet"]))
        yield from _device(self._server.get_all_stats().get("edge"))
        yield from _requests(whole)
        yield from _inference(whole["versions"])
        yield from _codec(whole)
        counts = whole["counts"]
        text = "Rows of callers who are clients, by the personal head that was found."
        yield _metric(CounterMetricFamily, "head_rows", text, ("head",), counts["head"])
        text = "Answers of an edge or hybrid server, by where they came from."
        yield _metric(CounterMetricFamily, "path_answers", text, ("path",), counts["path"])
        text = "Deltas that devices asked for first: made, refused (too many), not_kept (the disk)."
        yield _metric(CounterMetricFamily, "deltas", text, ("outcome",), counts.get("delta", {}))

    def _versions(self, held: Set[str]) -> Iterator[Metric]:
        software = {"flserving": version_of("flserving"), "torch": version_of("torch")}
        software["python"] = platform.python_version()
        present = {tuple(software.values()): 1}
        yield _metric(
            GaugeMetricFamily, "build_info", "Versions of the software.", tuple(software), present
        )
        served: _Numbers = {}
        accuracies: _Numbers = {}
        for model, known in self._server.health_check()["models"].items():
            named = [("", version) for version in known["versions"]]
            for alias, version in [*known["aliases"].items(), *named]:
                if f"{model}/{version}" not in held:
                    continue
                served[model, version, alias] = 1
                if alias:
                    accuracies |= self._accuracies(model, version)
        text = "Versions in memory or led to, each also once for every alias that leads to it."
        yield _metric(
            GaugeMetricFamily, "model_version_info", text, (*_OF_VERSION, "alias"), served
        )
        text = "Accuracy on held-out data as published, of every version that an alias leads to."
        yield _metric(GaugeMetricFamily, "model_accuracy", text, (*_OF_VERSION, "of"), accuracies)

    def _accuracies(self, model: str, version: str) -> _Numbers:
        try:
            published = self._server.published_metrics((model, version))
        except FlservingError:  # gone since, or unreadable: other metrics show it
            return {}
        found = {}
        for of in ACCURACIES:
            accuracy = published.get(f"{of}_accuracy")
            if accuracy is not None:
                found[model, version, of] = accuracy
        return found


def _fleet(skews: Mapping[str, Skew]) -> Iterator[Metric]:
    text = "Devices by the round that they run, as of their last pull within a week; of most rounds, the rest is other."
    rounds: _Numbers = {}
    ages = {}
    for model, skew in skews.items():
        ages[model] = (_buckets(AGES_S, skew.ages), skew.total_s)
        for number, devices in skew.rounds.items():
            rounds[model, number] = devices
    yield _metric(GaugeMetricFamily, "fleet_devices", text, ("model", "round"), rounds)
    text = "How long ago each device's model was known to be the current one."
    yield _metric(GaugeHistogramMetricFamily, "fleet_age_seconds", text, ("model",), ages)


def _device(edge: Sums | None) -> Iterator[Metric]:
    """Of a device: what it serves itself."""
    if edge is None:
        return
    age_s = edge["age_s"]
    if age_s is None:
        age_s = math.inf
    text = "Seconds since this device's model was known to be the current one; infinite: it cannot tell."
    yield GaugeMetricFamily("flserving_edge_age_seconds", text, value=age_s)
    if edge["round"] is not None:
        yield GaugeMetricFamily(
            "flserving_edge_round", "Federated round of this device's model.", value=edge["round"]
        )


def _requests(whole: Sums) -> Iterator[Metric]:
    versions = {_split(name): account for name, account in whole["versions"].items()}
    requests: Counter[Any] = Counter(
        {key: account["requests"] for key, account in versions.items()}
    )
    outcomes: Counter[Any] = Counter(dict.fromkeys(OUTCOMES, 0))
    outcomes["ok"] += whole["answered"]
    for reason, count in whole["failed"].items():
        outcomes[_outcome(reason)] += count
    failed: _Numbers = {("", "", reason, _code(reason)): 0 for reason in ("Internal", "Overloaded")}
    for name, reasons in whole["failures"].items():
        for reason, (count, _) in reasons.items():
            requests[_split(name)] += count
            failed[*_split(name), reason, _code(reason)] = count
    refused: _Numbers = {}
    for protocol, reasons in whole["refusals"].items():
        for reason, count in reasons.items():
            outcomes[_outcome(reason)] += count
            refused[protocol, reason, _code(reason)] = count
    text = "Requests, answered or failed."
    yield _metric(CounterMetricFamily, "requests", text, _OF_VERSION, requests)
    text = "Requests that got an error, by its class and HTTP status."
    yield _metric(
        CounterMetricFamily, "request_failures", text, (*_OF_VERSION, "reason", "code"), failed
    )
    text = "Calls that a protocol refused, so that no request came of them."
    yield _metric(CounterMetricFamily, "refusals", text, ("protocol", "reason", "code"), refused)
    text = "Requests and refusals by who must act: nobody, the client, capacity, the server."
    yield _metric(CounterMetricFamily, "outcomes", text, ("outcome",), outcomes)
    rows = {key: account["rows"] for key, account in versions.items()}
    text = "Rows of the answered requests."
    yield _metric(CounterMetricFamily, "request_rows", text, _OF_VERSION, rows)
    text = "Duration of the answered requests."
    yield _metric(HistogramMetricFamily, "request_seconds", text, _OF_VERSION, _durations(versions))
    text = "Duration of the stages that answered requests entered."
    yield _metric(
        HistogramMetricFamily, "stage_seconds", text, ("stage",), _durations(whole["stages"])
    )


def _durations(sums: Mapping[Any, Sums]) -> dict[Any, Any]:
    """Of each, its buckets and its seconds together."""
    found = {}
    for key, spent in sums.items():
        buckets = _buckets(BOUNDS_S, spent["at_most"])
        found[key] = (buckets, spent["seconds"])
    return found


def _inference(versions: Sums) -> Iterator[Metric]:
    rows = {}
    seconds = {}
    for name, account in versions.items():
        counts = [0] * (len(BATCH_ROWS) + 1)
        total = 0
        for size, (runs, *_) in account["batches"].items():
            counts[bisect_left(BATCH_ROWS, int(size))] += runs
            total += int(size) * runs
        rows[_split(name)] = (_buckets(BATCH_ROWS, counts), total)
        batches = account["batches"].values()
        for place, stage in enumerate(("preprocess", "infer", "postprocess"), start=1):
            seconds[*_split(name), stage] = sum(batch[place] for batch in batches)
    text = "Rows of each execution of a model."
    yield _metric(HistogramMetricFamily, "batch_rows", text, _OF_VERSION, rows)
    text = "Time that executions took: busy slots, when divided by time."
    yield _metric(CounterMetricFamily, "execution_seconds", text, (*_OF_VERSION, "stage"), seconds)


def _codec(whole: Sums) -> Iterator[Metric]:
    answers: _Numbers = {}
    spent: _Numbers = {}
    for protocol, (count, parse_s, serialise_s) in whole["codec"].items():
        answers[protocol] = count
        spent[protocol, "parse"] = parse_s
        spent[protocol, "serialise"] = serialise_s
    text = "Inference calls that a protocol answered."
    yield _metric(CounterMetricFamily, "door_answers", text, ("protocol",), answers)
    text = "Bytes to arrays, and arrays to bytes."
    yield _metric(CounterMetricFamily, "door_seconds", text, ("protocol", "part"), spent)


def _metric(
    kind: type[Metric], name: str, text: str, labels: Sequence[str], values: Mapping[Any, Any]
) -> Metric:
    """Series by the values of their ``labels``: each a number, or the buckets and the sum of a
    histogram."""
    family: Any = kind(f"flserving_{name}", text, labels=labels)  # type: ignore[call-arg]
    for key, value in values.items():
        label_values = (key,) if isinstance(key, str) else key
        if isinstance(value, tuple):
            family.add_metric(label_values, *value)
        else:
            family.add_metric(label_values, value)
    return cast(Metric, family)


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """``counts``: how many are at most each bound but more than the one before, then the rest."""
    names = [str(float(bound)) for bound in bounds]
    names.append("+Inf")
    return list(zip(names, accumulate(counts), strict=True))


def _split(name: str) -> tuple[str, str]:
    model, _, version = name.partition("/")
    return model, version


def _status(reason: str) -> int:
    if reason == "Cancelled":
        return 499
    return BY_REASON.get(reason, FlservingError).http_status


def _code(reason: str) -> str:
    return str(_status(reason))


def _outcome(reason: str) -> str:
    status = _status(reason)
    if status == 429:
        return "overloaded"
    if status < 500:
        return "client_error"
    return "server_error"
