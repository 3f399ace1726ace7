"""What workers tell each other: a place's totals outlive its workers, and no disk keeps them from
their operators."""

import multiprocessing
import shutil

import httpx
import pytest

from flserving.api import processes
from flserving.api.endpoint import Endpoint
from flserving.api.options import ApiOptions
from flserving.api.processes import Plan, _serve
from flserving.api.totals import Totals
from flserving.monitoring.metrics import merged
from flserving.monitoring.prometheus import exposition
from serving_models import Tagged, row, serving
from serving_processes import two_versions


def requests(exchange, server):
    whole = merged([server.telemetry.totals(), *exchange.others()])
    return sum(account["requests"] for account in whole["versions"].values())


def test_a_place_keeps_the_totals_of_who_filled_it_before(tmp_path):
    with serving(Tagged()) as first, serving(Tagged()) as second:
        first.predict(row(1.0))
        Totals(str(tmp_path), 0, first).write()
        heir = Totals(str(tmp_path), 0, second)
        second.predict(row(1.0))
        assert requests(heir, second) == 2 == requests(heir, second), "shown twice, counted once"


def test_the_first_scrape_of_a_worker_shows_what_its_place_counted_before(tmp_path, monkeypatch):
    """Its ports open when it knows the totals of those before it and beside it: no counter falls at
    a replacement."""
    root = two_versions(tmp_path / "registry")
    with serving(Tagged()) as first, serving(Tagged()) as beside:
        for place, server in enumerate((first, beside)):
            server.predict(row(1.0))
            Totals(str(tmp_path), place, server).write()
    scraped = []

    class Scraped(Endpoint):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            scraped.append(httpx.get(f"{self.url}/metrics", headers=self.headers).text)
            self.close()
            raise KeyboardInterrupt  # the worker does not get any further

    monkeypatch.setattr(processes, "Endpoint", Scraped)
    told, tell = multiprocessing.Pipe(duplex=False)
    plan = Plan(
        registry=str(root), folder=str(tmp_path), options=ApiOptions(port=0, grpc_port=None)
    )
    with told, tell, pytest.raises(KeyboardInterrupt):
        _serve(plan, 0, tell, told)
    assert 'flserving_outcomes_total{outcome="ok"} 2.0' in scraped[0]


def test_metrics_are_shown_when_nothing_can_be_written(tmp_path):
    with serving(Tagged()) as server:
        exchange = Totals(str(tmp_path / "gone"), 0, server)
        (tmp_path / "gone").mkdir()
        exchange.write()
        shutil.rmtree(tmp_path / "gone")
        server.predict(row(1.0))
        assert b"flserving_requests_total" in exposition(server, others=exchange.others())[0]
        assert requests(exchange, server) == 1
