"""/metrics against prometheus-client's own parsers: accounts that balance (R17), series that nobody
can add (R18)."""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from flserving import ModelServer, Registry, ServingConfig, models
from flserving.api.dataplane import V2
from flserving.api.totals import Totals
from flserving.edge import EdgeModelServer
from flserving.errors import FlservingError, InvalidInputError
from flserving.monitoring.metrics import BOUNDS_S, STAGES, merged
from flserving.monitoring.prometheus import OUTCOMES, exposition, totals
from flserving.monitoring.telemetry import KEEP_S
from flserving.serving.engine import InferenceEngine
from serving_models import POISON, Poison, Probe, Tagged, Threads, row, serving

SIZES = {"sizes": [2, 4, 2]}


def series(server, accept="", others=()):
    """(name, labels) -> value, as Prometheus would store them."""
    content, content_type = exposition(server, accept, others)
    assert content_type.startswith("application/openmetrics-text" if accept else "text/plain")
    parse = openmetrics_families if accept else text_string_to_metric_families
    samples = [sample for family in parse(content.decode()) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a series twice"
    return found


def total(found, name, **labels):
    """Sum over all series of ``name`` with these labels."""
    return sum(
        value
        for (n, have), value in found.items()
        if n == name and labels.items() <= dict(have).items()
    )


def by(found, name, label):
    sums = Counter()
    for (n, have), value in found.items():
        if n == name:
            sums[dict(have)[label]] += value
    return dict(sums)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 24], ids=["no-cache", "cache"])
def test_the_accounts_balance_over_ten_thousand_requests(cache_bytes):
    requests, threads = 10_000, 8
    refusing = ("wrong-shape", "no-model", "no-version", "poison")

    def call(server, kind, rng):
        features = np.full((rng.randint(1, 8), 2), rng.randrange(40), np.float32)
        if kind == "wrong-shape":
            server.predict(features[:, :1])
        elif kind == "no-model":
            server.predict(features, model=f"m{rng.random()}")
        elif kind == "no-version":
            server.predict(features, version=f"v{rng.random()}")
        elif kind == "poison":
            server.predict(np.vstack([features, row(POISON)]))
        else:
            server.predict(features, rng.choice(["v1.0", "v2.0", "default"]))
            return "ok", len(features)
        raise AssertionError(f"{kind} was answered")

    def work(server, seed):
        rng, seen = random.Random(seed), Counter()
        for _ in range(requests // threads):
            kind = rng.choice(refusing) if rng.random() < 0.1 else "good"
            try:
                outcome, rows = call(server, kind, rng)
                seen["rows"] += rows
            except FlservingError as error:
                outcome = error.reason
            seen[outcome] += 1
        return seen

    with serving(Poison(Probe(), "raise"), prediction_cache_bytes=cache_bytes) as server:
        server.load_model(
            "v2.0", Poison(Probe(), "raise"), output_type="regression", num_features=2
        )
        with ThreadPoolExecutor(threads) as pool:
            seen = sum(pool.map(lambda seed: work(server, seed), range(threads)), Counter())
        found, sums, snapshot = (
            series(server),
            server.telemetry.totals(),
            server.telemetry.snapshot(),
        )
    ok, rows = seen.pop("ok"), seen.pop("rows")
    assert ok + seen.total() == requests == total(found, "flserving_requests_total")
    reasons = by(found, "flserving_request_failures_total", "reason")
    assert {reason: n for reason, n in reasons.items() if n} == dict(seen)
    assert set(seen) == {"InvalidInput", "NotFound", "ModelExecution"}
    outcomes = by(found, "flserving_outcomes_total", "outcome")
    assert outcomes == {
        "ok": ok, "client_error": seen["InvalidInput"] + seen["NotFound"], "overloaded": 0,
        "server_error": seen["ModelExecution"],
    }  # fmt: skip
    for version in ("v1.0", "v2.0"):
        one = {"version": version}
        answered = total(found, "flserving_request_seconds_count", **one)
        assert total(found, "flserving_request_seconds_bucket", le="+Inf", **one) == answered
        failed = total(found, "flserving_request_failures_total", **one)
        assert total(found, "flserving_requests_total", **one) == answered + failed
    unknown = total(found, "flserving_request_failures_total", model="", reason="NotFound")
    assert (
        unknown
        == seen["NotFound"]
        == total(found, "flserving_requests_total", model="", version="")
    )
    assert total(found, "flserving_request_rows_total") == rows == snapshot["rows"]
    executed = total(found, "flserving_batch_rows_sum")
    if cache_bytes:
        hits = sum(account["cache"]["hit"][0] for account in sums["versions"].values())
        misses = sum(account["cache"]["miss"][0] for account in sums["versions"].values())
        assert hits + misses == ok and hits > 0 and executed < rows
    else:
        assert executed == rows, "all that ran was answered"
    whole_s = total(found, "flserving_request_seconds_sum")
    stages_s = by(found, "flserving_stage_seconds_sum", "stage")
    assert list(stages_s) == list(STAGES) and sum(stages_s.values()) == pytest.approx(whole_s)
    assert (
        0
        < sum(stages_s[stage] for stage in ("queue", "preprocess", "infer", "postprocess"))
        <= whole_s
    )
    for account in sums["versions"].values():
        parts_s = [
            account["stages"][stage][1] for stage in ("queue", "preprocess", "infer", "postprocess")
        ]
        assert sum(parts_s) <= account["seconds"]


@pytest.mark.full
def test_a_hundred_thousand_unknown_names_add_no_series():
    with serving(Tagged()) as server:

        def ask(name):
            for unknown in ({"model": name}, {"version": name}):
                with pytest.raises(FlservingError):
                    server.predict(row(1.0), **unknown)

        server.predict(row(1.0))
        ask("first")
        before, size = series(server), len(json.dumps(server.telemetry.totals()))
        for i in range(50_000):
            ask(f"unknown-{i}")
        after = series(server)
        grown = len(json.dumps(server.telemetry.totals())) - size
    assert after.keys() == before.keys() and grown < 100, "digits of the counters only"
    assert total(after, "flserving_request_failures_total", reason="NotFound") == 100_002


def test_both_formats_say_the_same_and_keep_the_rules_of_names():
    with serving(Tagged(), prediction_cache_bytes=1 << 20) as server:
        for i in range(30):
            server.predict(np.full((1 + i % 9, 2), i, np.float32))
        server.telemetry.refusal("rest", "Unauthorized")
        server.telemetry.codec("grpc", 0.25, 0.5)
        text, openmetrics = (
            series(server),
            series(server, "application/openmetrics-text; version=1.0.0"),
        )
        families = list(text_string_to_metric_families(exposition(server)[0].decode()))
    own = {key: value for key, value in text.items() if key[0].startswith("flserving_")}
    assert own == {
        key: value for key, value in openmetrics.items() if key[0].startswith("flserving_")
    }
    for family in families:
        assert family.documentation and family.name.startswith(("flserving_", "process_"))
        assert not any(unit in family.name for unit in ("_ms", "milli", "_us", "micro", "_kb"))
    assert {family.type for family in families} <= {"counter", "gauge", "histogram"}
    assert (
        total(text, "flserving_refusals_total", protocol="rest", reason="Unauthorized", code="401")
        == 1
    )
    assert total(text, "flserving_door_seconds_total", protocol="grpc", part="parse") == 0.25
    assert total(text, "flserving_door_seconds_total", protocol="grpc", part="serialise") == 0.5
    assert (
        total(text, "flserving_model_version_info", model="local", version="v1.0", alias="default")
        == 1
    )
    assert total(text, "flserving_prediction_cache_misses_total") == 30
    assert (
        total(text, "flserving_ready") == 1 and total(text, "process_resident_memory_bytes") > 1e6
    )
    assert set(by(text, "flserving_outcomes_total", "outcome")) == set(OUTCOMES)


def test_a_quiet_server_has_every_outcome_at_zero():
    with serving() as server:
        found = series(server)
    assert by(found, "flserving_outcomes_total", "outcome") == dict.fromkeys(OUTCOMES, 0)
    assert total(found, "flserving_ready") == 0 == total(found, "flserving_requests_total")


def test_rows_of_executions_are_in_exact_buckets():
    with serving(Tagged(), max_batch_size=32) as server:
        sizes = [1, 2, 3, 4, 5, 8, 9, 31, 32, 80]  # the last runs as 32 + 32 + 16
        for size in sizes:
            server.predict(np.zeros((size, 2), np.float32))
        found = series(server)
        batches = server.telemetry.totals()["versions"]["local/v1.0"]["batches"]
    executed = [*sizes[:-1], 32, 32, 16]
    for bound in (1, 2, 4, 8, 16, 32, 64):
        count = total(found, "flserving_batch_rows_bucket", le=str(float(bound)))
        assert count == sum(size <= bound for size in executed)
    assert total(found, "flserving_batch_rows_sum") == sum(sizes)
    assert {int(size): runs[0] for size, runs in batches.items()} == dict(Counter(executed))


def test_several_processes_show_as_one():
    with serving(Tagged()) as one, serving(Tagged()) as two:
        for server, count in ((one, 3), (two, 5)):
            for i in range(count):
                server.predict(row(i))
            with pytest.raises(FlservingError):
                server.predict(row(0.0), model="unknown")
        theirs = json.loads(json.dumps(totals(two)))
        theirs["process"]["process_cpu_seconds_total"] += 1e6
        found, gone = series(one, others=[theirs]), series(one, others=[{**theirs, "now": {}}])
    assert total(found, "flserving_requests_total") == 10 == total(gone, "flserving_requests_total")
    assert total(found, "flserving_outcomes_total", outcome="ok") == 8
    assert total(found, "flserving_model_cache_loads_total") == 2
    assert [total(shown, "flserving_processes") for shown in (found, gone)] == [2, 1]
    assert total(found, "flserving_request_seconds_bucket", le="+Inf") == 8
    assert (
        total(found, "process_cpu_seconds_total") > 1e6 < total(gone, "process_cpu_seconds_total")
    )
    memory = [total(shown, "process_resident_memory_bytes") for shown in (found, gone)]
    assert memory[0] == pytest.approx(2 * memory[1], rel=0.2), "of the processes that live"
    assert found.keys() == series(one).keys() == gone.keys()


def test_merged_adds_and_takes_the_latest():
    def account(requests, at_most, last_ms, infer_s):
        stages = {"infer": [requests, infer_s]}
        return {
            "requests": requests,
            "at_most": at_most,
            "last_inference_ms": last_ms,
            "stages": stages,
        }

    a = {"versions": {"m/1": account(2, [1, 1], 50, 0.5)}}
    b = {"versions": {"m/1": account(3, [0, 3], 40, 0.25), "m/2": account(1, [1, 0], 7, 0.125)}}
    both = {"versions": {"m/1": account(5, [1, 4], 50, 0.75), "m/2": account(1, [1, 0], 7, 0.125)}}
    assert merged([a, b]) == merged([b, {}, a]) == both
    assert merged([a]) == merged([a, {}]) == a and merged([]) == {}


@pytest.mark.full
def test_no_counter_ever_falls_while_the_server_works():
    with serving(Tagged()) as server:
        threads, stop = Threads(), []

        def work():
            count = 0
            while not stop or count < 50:
                server.predict(row(count % 7))
                count += 1
            return count

        for _ in range(3):
            threads.start(work)
        before = {}
        for _ in range(40):
            now = series(server)
            counted = {
                key: value
                for key, value in now.items()
                if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
            }
            assert all(counted[key] >= value for key, value in before.items())
            ok = total(now, "flserving_outcomes_total", outcome="ok")
            assert (
                ok
                == total(now, "flserving_request_seconds_count")
                == total(now, "flserving_requests_total")
            )
            before = counted
        stop.append(True)
        calls = sum(threads.results())
        server.load_model("v2.0", Tagged(), output_type="regression", num_features=2)
        server.model_cache.clear()
        assert total(series(server), "flserving_requests_total") == calls, (
            "totals survive what leaves the memory"
        )


def test_the_bounds_hold_the_target():
    assert 0.05 in BOUNDS_S and list(BOUNDS_S) == sorted(set(BOUNDS_S))


def test_series_are_as_many_as_versions_are_held_however_many_were_asked(tmp_path):
    """One role-infer caller names every old version of a registry, once each: what is in memory, or
    led to, has a name, the rest is one version ``other``; and health names a bounded number of
    those that cannot be loaded."""
    with Registry(tmp_path) as registry:
        for _ in range(40):
            registry.publish("m", models.build("mlp", SIZES), architecture="mlp", parameters=SIZES)
        registry.set_alias("m", "default", 40, who="test", why="test")
        with ModelServer(ServingConfig(cache_size=3, warmup_samples=0), registry) as server:
            lines = []
            for version in range(1, 41):
                server.predict(np.zeros(2), version)
                with pytest.raises(InvalidInputError):
                    server.predict(np.zeros(3), version)
                found = series(server)
                lines.append(len(found))
                versions = {dict(labels).get("version") for _, labels in found} - {None, ""}
                assert versions <= {"40", "other", *(str(version - i) for i in range(3))}
            assert max(lines[5:]) - min(lines[5:]) <= 2, lines
            assert total(found, "flserving_outcomes_total") == 80
            assert by(found, "flserving_request_failures_total", "version")["40"] == 1
            statistics = V2(server).statistics()["model_stats"]
            assert {it["version"] for it in statistics} >= {"40"} and len(statistics) <= 41


def test_what_several_processes_counted_of_a_version_stays_a_sum_while_one_of_them_holds_it(
    tmp_path,
):
    """Else the series would fall, and a monitor take what one of them had counted before for
    new."""
    with Registry(tmp_path / "registry") as registry:
        for _ in range(3):
            registry.publish("m", models.build("mlp", SIZES), architecture="mlp", parameters=SIZES)
        registry.set_alias("m", "default", 3, who="test", why="test")
        config = ServingConfig(cache_size=2, warmup_samples=0)
        now_s = [0.0]
        with (
            ModelServer(config, registry, clock=lambda: now_s[0]) as here,
            ModelServer(config, registry, clock=lambda: now_s[0]) as there,
        ):
            exchanges = [
                Totals(str(tmp_path), place, server) for place, server in enumerate((here, there))
            ]
            for server, exchange in zip((here, there), exchanges, strict=True):
                server.predict(np.zeros(2), 1)
                exchange.write()
            here.predict(np.zeros(2), 2)
            here.predict(np.zeros(2), 3)
            assert "m/1" not in here._held() and "m/1" in there._held()
            for _ in range(3):
                now_s[0] += KEEP_S
                for exchange in exchanges:
                    exchange.write()
                for server, exchange in zip((here, there), exchanges, strict=True):
                    found = series(server, others=exchange.others())
                    assert total(found, "flserving_requests_total", version="1") == 2
            there.predict(np.zeros(2), 2)
            there.predict(np.zeros(2), 3)
            for _ in range(2):
                for exchange in exchanges:
                    exchange.write()
                found = series(here, others=exchanges[0].others())
                assert total(found, "flserving_requests_total", version="1") == 0, "nobody holds it"
                assert total(found, "flserving_outcomes_total") == 6
                now_s[0] += KEEP_S
            assert "m/1" not in here.telemetry.totals()["versions"]


def json_or_error(value):
    return json.loads(json.dumps(value, allow_nan=False))


def test_all_that_a_server_says_of_itself_is_json(tmp_path):
    """Before its first request, and after one: no NaN, no infinity, no arrays."""
    with Registry(tmp_path) as registry:
        registry.publish(
            "m", models.build("mlp", SIZES), architecture="mlp", parameters=SIZES, alias="default"
        )
        with (
            ModelServer(ServingConfig(prediction_cache_bytes=1 << 20), registry) as server,
            EdgeModelServer() as edge,
        ):
            edge.update_global(models.build("mlp", SIZES), architecture="mlp", parameters=SIZES)
            engine = InferenceEngine(models.build("mlp", SIZES))
            door = V2(server)
            for asked in range(2):
                for it in (server, edge):
                    json_or_error(
                        [it.get_all_stats(), it.health_check(), it.telemetry.totals(), totals(it)]
                    )
                json_or_error(
                    [door.statistics(), door.settings(), door.index(), engine.get_stats()]
                )
                if not asked:
                    assert server.get_all_stats()["server"]["latency"]["p99_ms"] is None
                json_or_error(
                    [
                        server.predict(np.zeros(2), stages=True),
                        edge.predict(np.zeros(2), stages=True),
                    ]
                )
                json_or_error([engine.predict(np.zeros(2)), server.batch_predict([np.zeros(2)])])
