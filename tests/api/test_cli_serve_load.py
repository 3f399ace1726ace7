"""``flserving serve`` under load: promotions, killed workers and SIGTERM, over REST and gRPC at
once."""

import re
import sys
import time

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flserving import Registry
from flserving.api.client.retries import Retries
from flserving.errors import ServerClosedError
from flserving.serving.router import Router
from serving_models import PATIENCE_S, wait_until
from serving_processes import Load, X, kill_one, listens, running, two_versions

NEVER = Retries(attempts=1)


@pytest.fixture(scope="module")
def registry_root(tmp_path_factory):
    return two_versions(tmp_path_factory.mktemp("serve") / "registry")


@pytest.fixture(scope="module")
def served(registry_root):
    """Two workers that all tests share; what they say at the end is what the tests did to them."""
    with running(registry_root, "--model", "digits", "--workers", 2) as served:
        yield served
        assert served.end() == 0
        assert all(
            "ended by signal 9: starting another" in line for line in served.stderr.splitlines()
        )


def test_every_worker_shows_the_sum_and_it_never_goes_down(served):
    headers, seen = {"authorization": f"Bearer {served.token}"}, [0]

    def shown():
        # a new connection: any worker
        text = httpx.get(f"{served.url}/metrics", headers=headers).text
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in {"flserving_requests_total", "flserving_processes"}
            and sample.labels.get("outcome", "ok") == "ok"
        }
        seen.append(found.get("flserving_requests_total", 0))
        return seen[-1], found["flserving_processes"]

    wait_until(lambda: shown()[1] == 2)
    wait_until(lambda: len({shown()[0] for _ in range(4)}) == 1)
    before = seen[-1]
    for _ in range(40):
        with served.client(0) as client:  # a connection each: both workers get some
            client.predict(X)
    wait_until(lambda: shown() == (before + 40, 2))
    kill_one(served)
    with served.client(0) as client:
        client.predict(X)
    wait_until(lambda: shown() == (before + 41, 2))
    assert seen == sorted(seen)


def test_a_promotion_reaches_every_worker_and_fails_no_request(served, registry_root):
    """Each worker looks every ``WATCH_S``. Once it has seen the new version it never answers with
    the old one again."""
    assert Router.WATCH_S <= 0.25
    with Load(lambda n: served.client(n, retries=NEVER)) as load:
        wait_until(lambda: len(load.answers) >= 50)
        for version in (2, 1):
            with Registry(registry_root) as registry:
                registry.set_alias("digits", "default", version, who="test", why="promotion")
            told = {str(version)}
            wait_until(lambda told=told: set(load.latest) == told, "the new version")
            # those under way are noted after they came
            turned = len(load.answers) + len(load.latest)
            wait_until(lambda start=turned: len(load.answers) >= start + 200)
            assert {answer for _, answer in load.answers[turned:]} == told
    assert load.errors == []


def test_a_killed_worker_is_replaced_and_a_client_that_retries_sees_no_failure(served):
    with Load(lambda n: served.client(n, timeout_ms=PATIENCE_S * 1e3)) as load:
        for _ in range(2):
            wait_until(
                lambda: all(map(listens, served.workers())),
                "the worker that an earlier test had replaced",
            )
            answered = len(load.answers)
            wait_until(lambda start=answered: len(load.answers) > start + 50)
            other, _ = kill_one(served)
            assert other in served.workers()
    assert load.errors == []


def test_sigterm_under_load_answers_all_that_was_admitted(registry_root):
    options = ("--workers", 2, "--notice-s", 2)
    with (
        running(registry_root, *options) as served,
        Load(lambda n: served.client(n, retries=NEVER)) as load,
    ):
        wait_until(lambda: len(load.answers) >= 100)
        signalled_s = time.monotonic()
        assert served.end() == 0 and served.stderr == ""
    assert max(at_s for at_s, _ in load.answers) > signalled_s + 0.3, (
        "nobody was answered during the notice"
    )
    # Nobody was cut off: what failed found nobody to take the request. gRPC itself cancels what
    # comes in the moment in which it closes, before we see it (test_api_closing counts that): at
    # most the one call of each client.
    assert {type(error) for error in load.errors} == {ServerClosedError}
    refused = "[Cc]onnection refused|failed to connect|Server shutdown|the server is stopping"
    cut = [str(error) for error in load.errors if not re.search(refused, str(error))]
    assert len(cut) <= 2 and all(re.fullmatch(r"[\d.:]+: CANCELLED", text) for text in cut), cut


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
@pytest.mark.parametrize("engine", ["torch", "numpy"])
def test_workers_share_the_memory_of_torch_where_they_need_it(registry_root, engine):
    with running(registry_root, "--model", "digits", "--engine", engine) as served:
        maps = psutil.Process(served.process.pid).memory_maps()
        assert any("libtorch" in one.path for one in maps) == (engine == "torch"), (
            "loaded before the fork"
        )
