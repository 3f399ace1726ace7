"""The monitoring files in the hands of the real Prometheus: it checks, scrapes, and answers the
dashboard."""

import json
import re
import shutil
import socket
import subprocess
from importlib.resources import files

import httpx
import numpy as np
import pytest
import yaml

import flserving
from flserving.errors import FlservingError
from flserving.monitoring.prometheus import exposition
from serving_models import PATIENCE_S, POISON, Poison, Probe, Tagged, row, serving, wait_until

MONITORING = files("flserving.monitoring")
DASHBOARD = json.loads(MONITORING.joinpath("dashboard.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load(MONITORING.joinpath("alerts.yml").read_text(encoding="utf-8"))["groups"]
ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"] if "alert" in rule}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {
    f"{panel['title']}: {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel.get("targets", ())
}
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (apt: prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="prometheus is not installed"
)


def promtool(*arguments, stdin=None):
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return (done.stdout + done.stderr).decode()


@pytest.fixture
def folder(tmp_path):
    """What an operator has: the files, and a token."""
    for name in ("alerts.yml", "prometheus.yml"):
        tmp_path.joinpath(name).write_bytes(MONITORING.joinpath(name).read_bytes())
    tmp_path.joinpath("token").write_text("secret")
    return tmp_path


# The dashboard as Grafana reads it


def test_the_dashboard_has_the_structure_that_grafana_needs():
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["uid"] and DASHBOARD["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and all(type(number) is int for number in ids)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert variables["job"]["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["title"] and panel["description"] and panel["targets"]
        assert panel["type"] in {"stat", "timeseries", "table"}
        assert panel["fieldConfig"]["defaults"]["unit"] in {
            "s",
            "reqps",
            "percentunit",
            "bytes",
            "none",
        }
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == list("ABCDEFGH"[: len(refs)])
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] and 'job="$job"' in target["expr"]


def test_no_panel_covers_another_and_all_lie_in_the_grid():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboard_and_rules_name_only_what_exists():
    """Names of series: those of the exposition, of the recording rules, and ``up``."""
    with serving(Tagged()) as server:
        server.predict(row(1.0))
        server.telemetry.refusal("rest", "Unauthorized")
        server.telemetry.codec("rest", 0.1, 0.1)
        exposed = set(re.findall(r"^(\w+)[{ ]", exposition(server)[0].decode(), re.MULTILINE))
    exposed |= {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
    expressions = [*QUERIES.values(), *(rule["expr"] for group in RULES for rule in group["rules"])]
    used = {
        name for text in expressions for name in re.findall(r"\b(?:flserving|process)[\w:]+", text)
    }
    used -= {"flserving"}
    assert len(used) > 20 and used <= exposed, used - exposed


@needs_promtool
def test_promtool_accepts_rules_configuration_and_exposition(folder):
    promtool("check", "rules", folder / "alerts.yml")
    promtool("check", "config", folder / "prometheus.yml")
    with serving(Tagged(), prediction_cache_bytes=1 << 20) as server:
        server.predict(row(1.0))
        promtool("check", "metrics", stdin=exposition(server)[0])


# The alerts, in virtual time


def steady(
    ok=100.0, error=0.0, overloaded=0.0, within=1.0, busy=0.1, queue=0, ready=1, problems=0, up=1
):
    """Series of a server, one sample a minute: ``ok`` and the others a second, the rest as it
    stands."""

    def counter(per_s):
        return f"0+{per_s * 60:g}x80"

    seconds = 'flserving_request_seconds_bucket{job="flserving",instance="a",model="m",version="1",le="%s"}'
    count = 'flserving_request_seconds_count{job="flserving",instance="a",model="m",version="1"}'
    here = '{job="flserving",instance="a"}'
    outcome = 'flserving_outcomes_total{job="flserving",instance="a",outcome="%s"}'
    busy_s = 'flserving_execution_seconds_total{job="flserving",instance="a",model="m",version="1",stage="infer"}'
    values = {
        outcome % "ok": counter(ok), outcome % "server_error": counter(error), outcome % "client_error": counter(50),
        outcome % "overloaded": counter(overloaded), count: counter(ok), seconds % "0.05": counter(ok * within),
        seconds % "+Inf": counter(ok), busy_s: counter(busy * 4), f"flserving_execution_slots{here}": "4x80",
        f"flserving_queue_rows{here}": f"{queue}x80", f"flserving_queue_limit_rows{here}": "4096x80",
        f"flserving_ready{here}": f"{ready}x80", f"flserving_processes{here}": "1x80",
        f"flserving_problems{here}": f"{problems}x80", f"up{here}": f"{up}x80",
    }  # fmt: skip
    return [{"series": name, "values": value} for name, value in values.items()]


CASES = {
    "healthy": ({}, set()),
    "asked by nobody": ({"ok": 0}, set()),
    "quiet but slowly refilled": ({"ok": 0.1}, set()),
    "just within the budget": ({"error": 0.0999}, set()),
    "burning at 3.5": ({"ok": 100, "error": 0.351}, {"FlservingErrorBudgetBurns"}),
    "burning at 7": (
        {"error": 0.705},
        {"FlservingErrorBudgetBurnsFast", "FlservingErrorBudgetBurns"},
    ),
    "burning at 50": (
        {"error": 5.3},
        {"FlservingErrorBudgetBurnsFast", "FlservingErrorBudgetBurns"},
    ),
    "exactly 99 % in time": ({"within": 0.99, "ok": 200}, set()),
    "98.9 % in time": ({"within": 0.989}, {"FlservingSlow"}),
    "refusing at 900 a second": ({"ok": 900, "overloaded": 20}, {"FlservingRefusesBelowTarget"}),
    "refusing at 1100 a second": ({"ok": 1100, "overloaded": 200}, set()),
    "full at 500 a second": ({"ok": 500, "busy": 0.9}, {"FlservingSaturatedBelowTarget"}),
    "full at 2000 a second": ({"ok": 2000, "busy": 0.9}, set()),
    "a long queue": ({"queue": 3000}, {"FlservingQueueFills"}),
    "not ready": ({"ready": 0}, {"FlservingNotReady"}),
    "a version that does not load": ({"problems": 1}, {"FlservingVersionProblem"}),
    "gone": ({"up": 0}, {"FlservingDown"}),
}


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(folder):
    """``promtool test rules``: which alerts fire after 75 minutes of each state."""
    tests = []
    for name, (state, firing) in CASES.items():
        samples = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(firing)]
        query = "count by (alertname) (ALERTS{alertstate='firing'})"
        tests.append({"name": name, "interval": "1m", "input_series": steady(**state),
                      "promql_expr_test": [{"expr": query, "eval_time": "75m", "exp_samples": samples}]})  # fmt: skip
    folder.joinpath("tests.yml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests})
    )
    promtool("test", "rules", folder / "tests.yml")
    assert set().union(*(firing for _, firing in CASES.values())) == ALERTS.keys(), (
        "an alert without a test"
    )


@needs_promtool
def test_the_page_ends_soon_after_the_errors_end(folder):
    """The short window's purpose: an hour of errors, then none; ten minutes later nobody is paged
    for the last hour."""
    series = steady()
    for entry in series:
        if 'outcome="server_error"' in entry["series"]:
            entry["values"] = "0x60 0+600x60 36000x80"
    expr = (
        "count(ALERTS{alertname='FlservingErrorBudgetBurnsFast',alertstate='firing'}) or vector(0)"
    )
    tests = [{"expr": expr, "eval_time": at, "exp_samples": [{"labels": "{}", "value": n}]} for at, n in
             (("59m", 0), ("90m", 1), ("118m", 1))]  # fmt: skip
    one_hour = "flserving:server_errors:ratio_rate1h > 0.0144 and flserving:server_errors:ratio_rate5m > 0.0144"
    tests.append({"expr": one_hour, "eval_time": "130m", "exp_samples": []})
    content = {"rule_files": ["alerts.yml"], "tests": [{"interval": "1m", "input_series": series,
                                                        "promql_expr_test": tests}]}  # fmt: skip
    folder.joinpath("tests.yml").write_text(yaml.safe_dump(content))
    promtool("test", "rules", folder / "tests.yml")


# A real Prometheus and a real server


class Prometheus:
    """One Prometheus on a free port, scraping ``target`` with and without ``token`` twice a
    second."""

    def __init__(self, folder, target, token):
        config = yaml.safe_load(folder.joinpath("prometheus.yml").read_text())
        config["global"] = {
            "scrape_interval": "500ms",
            "evaluation_interval": "500ms",
            "scrape_timeout": "500ms",
        }
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        refused = {"job_name": "stranger", "static_configs": [{"targets": [target]}]}
        config["scrape_configs"].append(refused)
        folder.joinpath("prometheus.yml").write_text(yaml.safe_dump(config))
        folder.joinpath("token").write_text(token)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = folder.joinpath("log").open("wb")
        arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                     f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
        self.process = subprocess.Popen(
            ["prometheus", *arguments], stdout=self.log, stderr=self.log
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def ready(self):
        assert self.process.poll() is None, "Prometheus ended: see its log"
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression):
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return [
            (sample["metric"], float(sample["value"][1])) for sample in answer["data"]["result"]
        ]

    def value(self, expression):
        found = self.query(expression)
        return found[0][1] if found else None

    def close(self):
        self.http.close()
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        self.log.close()


def load(server, requests):
    """Good requests of both versions, and every kind of failure that the dashboard
    distinguishes."""
    for i in range(requests):  # every fourth is new to the prediction cache
        first = i if i % 4 else server.telemetry.snapshot()["requests"]
        server.predict(np.full((1 + i % 8, 2), first, np.float32), "v2.0" if i % 4 == 0 else None)
    for bad in (
        {"features": [[1.0]]},
        {"features": row(1.0), "model": "unknown"},
        {"features": row(POISON)},
    ):
        with pytest.raises(FlservingError):
            server.predict(**bad)


@pytest.fixture
def watched(folder):
    """A server, its endpoint, and a Prometheus that has scraped it while it worked."""
    with serving(Poison(Probe(), "raise"), prediction_cache_bytes=1 << 20) as server:
        server.load_model("v2.0", Tagged(), output_type="regression", num_features=2)
        with flserving.serve(server) as endpoint:
            prometheus = Prometheus(folder, endpoint.url.removeprefix("http://"), endpoint.token)
            try:
                wait_until(prometheus.ready, "Prometheus")
                wait_until(lambda: prometheus.value('up{job="flserving"}') == 1, "the first scrape")
                yield server, endpoint, prometheus
            finally:
                prometheus.close()


@needs_prometheus
def test_prometheus_scrapes_the_server_and_answers_every_query_of_the_dashboard(watched):
    server, endpoint, prometheus = watched
    body = {
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]
    }
    infer = f"{endpoint.url}/v2/models/local/infer"
    queries = {
        name: text.replace("$job", "flserving").replace("$__rate_interval", "10s")
        for name, text in QUERIES.items()
    }
    assert "$" not in "".join(queries.values())
    queries |= {name: name for name in ("flserving:server_errors:ratio_rate5m", "flserving:within_50ms:ratio_rate5m",
                                        "flserving:server_errors:ratio_rate3d")}  # fmt: skip

    unanswered, rounds = {}, 0

    def all_answered():
        """Work goes on until every query has a value: a rate needs two scrapes that saw the
        work."""
        nonlocal rounds
        load(server, 40)
        rounds += 1
        assert httpx.post(infer, json=body, headers=endpoint.headers).status_code == 200
        assert httpx.post(infer, json=body).status_code == 401
        unanswered.clear()
        for name, text in queries.items():
            values = prometheus.query(text)
            if not values or any(
                value != value for _, value in values if "latency by version" not in name
            ):
                unanswered[name] = values
        return not unanswered

    wait_until(all_answered, unanswered)
    told, counted = prometheus.value, server.telemetry.snapshot()
    wait_until(
        lambda: told("sum(flserving_requests_total)") == counted["requests"], "the last scrape"
    )
    assert told('sum(flserving_outcomes_total{outcome="ok"})') == counted["succeeded"]
    assert told('flserving_outcomes_total{outcome="server_error"}') == rounds
    p50_s = told("histogram_quantile(0.5, sum by (le) (flserving_request_seconds_bucket))")
    assert p50_s * 1e3 == pytest.approx(counted["latency"]["p50_ms"], rel=1.5), "within its bucket"
    assert {
        labels.get("alias") for labels, _ in prometheus.query("flserving_model_version_info")
    } == {None, "default"}
    assert told('up{job="stranger"}') == 0, "who has no token sees nothing"
    groups = prometheus.http.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == ALERTS.keys()
    assert not [rule["name"] for rule in rules if rule["health"] == "err"]
