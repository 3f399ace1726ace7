"""What workers tell each other: a place's totals outlive its workers, and no disk keeps them from their operators."""

import shutil

from flserving.accounts import merged
from flserving.api.metrics import exposition
from flserving.api.worker import Totals
from serving_models import Tagged, row, serving


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


def test_metrics_are_shown_when_nothing_can_be_written(tmp_path):
    with serving(Tagged()) as server:
        exchange = Totals(str(tmp_path / "gone"), 0, server)
        (tmp_path / "gone").mkdir()
        exchange.write()
        shutil.rmtree(tmp_path / "gone")
        server.predict(row(1.0))
        assert b"flserving_requests_total" in exposition(server, others=exchange.others())[0]
        assert requests(exchange, server) == 1
