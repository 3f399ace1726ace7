"""What a cloud knows of its fleet: which rounds its devices run, how old they are, and that nobody
can make it grow."""

import contextlib
import json
import math

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import flserving
from edge_cloud import Between, cloud, publish, tokens
from flserving import Registry
from flserving.edge import EdgeModelServer
from flserving.edge.sync import SyncAgent
from flserving.errors import FlservingError
from flserving.monitoring import fleet
from flserving.monitoring.fleet import Fleet
from flserving.monitoring.metrics import merged
from rest_door import bearer

DAY_S = 86_400.0


class Clock:
    def __init__(self):
        self.now_s = 1_800_000_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def known(clock):
    return Fleet(clock)


def samples(endpoint, token="read"):
    """{(name, labels): value} of what a scrape shows."""
    text = httpx.get(f"{endpoint.url}/metrics", headers=bearer(token)).text
    families = text_string_to_metric_families(text)
    return {
        (it.name, tuple(sorted(it.labels.items()))): it.value
        for family in families
        for it in family.samples
    }


def devices(endpoint):
    return {
        dict(labels)["round"]: value
        for (name, labels), value in samples(endpoint).items()
        if name == "flserving_fleet_devices"
    }


@contextlib.contextmanager
def device(root, url, token):
    with (
        Registry(root) as registry,
        EdgeModelServer(registry=registry, model="m", client=token) as edge,
        contextlib.closing(SyncAgent(url, token, registry, edge=edge)) as agent,
    ):
        yield edge, agent


def test_a_cloud_shows_which_rounds_its_devices_run_and_how_old_one_is_that_was_cut_off(
    tmp_path, clock
):
    """Four real devices: two follow, one is cut off after round 1, one has just come."""
    with contextlib.ExitStack() as stack:
        released, endpoint = stack.enter_context(cloud(tmp_path / "cloud", 1))
        server = endpoint.v2.server
        server.fleet = Fleet(clock)
        relay = stack.enter_context(contextlib.closing(Between(endpoint.url)))
        _, first = stack.enter_context(device(tmp_path / "a", endpoint.url, "c-1"))
        _, second = stack.enter_context(device(tmp_path / "b", endpoint.url, "infer"))
        _, cut_off = stack.enter_context(device(tmp_path / "c", relay.url, "c-2"))
        assert devices(endpoint) == {}
        for agent in (first, second, cut_off):
            agent.pull()
        assert devices(endpoint) == {"none": 3}, "as of what each ran when it asked"
        for agent in (first, second, cut_off):
            agent.pull()
        assert devices(endpoint) == {"1": 3}
        relay.close()
        publish(released, 2)
        for _ in range(2):
            for agent in (first, second):
                agent.pull()
            with pytest.raises(FlservingError):
                cut_off.pull()
        _, new = stack.enter_context(device(tmp_path / "d", endpoint.url, "admin"))
        new.pull()
        assert devices(endpoint) == {"2": 2, "1": 1, "none": 1}
        clock.now_s += 2 * DAY_S
        for agent in (first, second, new):
            agent.pull()
        assert devices(endpoint) == {"2": 3, "1": 1}
        shown = samples(endpoint)
        ages = {
            dict(labels)["le"]: value
            for (name, labels), value in shown.items()
            if name == "flserving_fleet_age_seconds_bucket"
        }
        assert (ages["60.0"], ages["86400.0"], ages["+Inf"]) == (3, 3, 4), (
            "the one of two days ago is seen"
        )
        skew = server.get_all_stats()["fleet"]["m"]
        assert skew["devices"] == 4 and skew["rounds"] == {"2": 3, "1": 1}
        assert 2 * DAY_S <= skew["oldest_s"] < 2 * DAY_S + 600
        clock.now_s += 6 * DAY_S
        first.pull()
        clock.now_s += 2 * DAY_S
        assert devices(endpoint) == {"2": 1}, "a week without a word: no longer counted"
        assert not any("c-1" in str(key) or "c-2" in str(key) for key in samples(endpoint))


def test_a_device_shows_its_own_round_and_age(tmp_path):
    with (
        cloud(tmp_path / "cloud", 1, 2) as (_, source),
        device(tmp_path / "a", source.url, "c-1") as (edge, agent),
        flserving.serve(edge, tokens=tokens(), grpc_port=None) as endpoint,
    ):
        assert not any("flserving_edge" in name for name, _ in samples(endpoint)), (
            "it serves nothing yet"
        )
        agent.pull()
        shown = samples(endpoint)
        assert (
            shown["flserving_edge_round", ()] == 2
            and 0 <= shown["flserving_edge_age_seconds", ()] < 60
        )


@pytest.mark.parametrize(
    "query",
    [
        "",
        "device=x&version=1",
        "device=0123456789abcdef&version=-1",
        "device=0123456789abcdef&version=one",
        "device=0123456789abcdef&version=1&round=1&age_s=nan",
        "device=0123456789abcdef&version=1&round=1&age_s=-5",
        "device=0123456789abcdef&version=1&round=" + "9" * 99,
        "device=0123456789abcdef%0A&version=1",
    ],
)
def test_a_report_that_makes_no_sense_is_none_and_the_release_comes_all_the_same(tmp_path, query):
    with cloud(tmp_path, 1) as (_, endpoint):
        url = f"{endpoint.url}/v2/repository/models/m/release?nonce=ab&{query}"
        assert httpx.get(url, headers=bearer("infer")).status_code == 200
        assert devices(endpoint) == {}


def test_who_shares_a_credential_can_invent_only_so_many_devices(known):
    for number in range(5 * fleet.MOST_SHARED):
        known.report(f"{number:024x}", True, "m", 7, number, 1.0)
    known.report("a" * 24, False, "m", 7, 3, 1.0)
    skew = known.skew()["m"]
    assert skew.devices == fleet.MOST_SHARED + 1
    assert len(skew.rounds) <= fleet.MOST_ROUNDS + 1 and sum(skew.rounds.values()) == skew.devices


def test_a_fleet_that_is_larger_than_the_picture_is_seen_by_its_last_reports(known, monkeypatch):
    monkeypatch.setattr(fleet, "MOST_DEVICES", 50)
    for number in range(200):
        known.report(f"{number:024x}", False, "m", 1, 1 + (number >= 150), 0.0)
    assert known.skew()["m"].rounds == {"2": 50}


def test_invented_rounds_do_not_hide_those_that_devices_run(known):
    for number in range(100):
        known.report(f"{number:024x}", False, "m", 1, 5, 0.0)
    for number in range(500):
        known.report(f"ff{number:022x}", True, "m", 1, 1000 + number, 0.0)
    rounds = known.skew()["m"].rounds
    assert rounds["5"] == 100 and len(rounds) == fleet.MOST_ROUNDS + 1


def test_of_several_processes_the_latest_word_of_a_device_counts(clock):
    """A device asks now this worker, now that one: it is one device."""
    workers = [Fleet(clock), Fleet(clock), Fleet(clock)]
    for number in range(9):
        workers[number % 3].report("a" * 24, False, "m", 1 + number % 5, number, 60.0 * number)
        clock.now_s += 10 + number
    lines = merged([json.loads(json.dumps({"now": {"fleet": it.lines()}})) for it in workers])[
        "now"
    ]["fleet"]
    skew = workers[0].skew(lines)["m"]
    assert (skew.devices, skew.rounds) == (1, {"8": 1})
    assert skew.oldest_s == pytest.approx(60 * 8 + 18, abs=0.01)


def test_the_summary_is_json_also_where_an_age_cannot_be_told(known, clock):
    known.report("a" * 24, False, "m", 4, 2, None)
    known.report("b" * 24, False, "m", 4, 2, 30.0)
    known.report("c" * 24, False, "m", 0, 0, None)
    clock.now_s += 40
    summary = known.skew()["m"].summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == {
        "devices": 3,
        "rounds": {"2": 2, "none": 1},
        "age_s": {
            "<= 60": 0,
            "<= 300": 1,
            "<= 900": 0,
            "<= 3600": 0,
            "<= 21600": 0,
            "<= 86400": 0,
            "> 86400": 1,
        },
        "oldest_s": None,
    }
    assert known.skew()["m"].oldest_s == math.inf
