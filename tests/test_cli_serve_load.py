"""``flserving serve`` under load: promotions, SIGTERM and killed workers, over REST and gRPC at once."""

import contextlib
import re
import signal
import time

import httpx
import psutil
import pytest

from flserving import Registry
from flserving.api.retries import Retries
from flserving.errors import ServerClosedError
from serving_models import wait_until
from serving_processes import Load, kill_one, running, two_versions

NEVER = Retries(attempts=1)


@pytest.fixture(scope="module")
def registry_root(tmp_path_factory):
    return two_versions(tmp_path_factory.mktemp("serve") / "registry")


def test_a_promotion_reaches_every_worker_within_a_second_and_fails_no_request(registry_root):
    with running(registry_root, "--model", "digits", "--workers", 2) as served:
        assert len(served.workers()) == 2
        load = Load(lambda n: served.client(n, retries=NEVER), threads=6)
        wait_until(lambda: len(load.answers) >= 100)
        for version in (2, 1):
            with Registry(registry_root) as registry:
                registry.set_alias("digits", "default", version, who="test", why="promotion")
            promoted_s = time.monotonic()
            wait_until(lambda start=promoted_s: load.answers[-1][0] > start + 1.2)
            late = {answer for at_s, answer in list(load.answers) if at_s > promoted_s + 1}
            assert late == {str(version)}
        load.stop()
        assert load.errors == []
        assert {version for _, version in load.answers} == {"1", "2"}
        assert served.end() == 0 and served.stderr == ""


def test_sigterm_under_load_answers_all_that_was_admitted(registry_root):
    with running(registry_root, "--workers", 2, "--notice-s", 2) as served:
        load = Load(lambda n: served.client(n, retries=NEVER))
        wait_until(lambda: len(load.answers) >= 100)
        metrics = {"authorization": f"Bearer {served.token}"}
        assert httpx.get(f"{served.url}/metrics", headers=metrics).status_code == 200
        served.process.send_signal(signal.SIGTERM)
        probe = httpx.Client()
        wait_until(lambda: probe.get(f"{served.url}/v2/health/ready").status_code == 503)
        before = len(load.answers)
        wait_until(lambda: len(load.answers) > before + 10, "answers after readiness was false")
        assert served.wait() == 0
        load.stop()
        # Nobody was cut off: what failed found nobody to take the request.
        assert {type(error) for error in load.errors} <= {ServerClosedError}
        cut = [str(error) for error in load.errors if not re.search("ConnectError|refused|Connect", str(error))]
        assert len(cut) <= 4, cut  # a connection may close in the moment in which its client asks again: never sent


def test_a_killed_worker_is_replaced_and_a_client_that_retries_sees_no_failure(registry_root):
    with running(registry_root, "--workers", 2) as served:
        load = Load(lambda n: served.client(n, timeout_ms=10_000))
        for _ in range(3):
            answered = len(load.answers)
            wait_until(lambda start=answered: len(load.answers) > start + 50)
            killed_s = time.monotonic()
            other, newest = kill_one(served)
            wait_until(lambda worker=newest: _listening(worker))
            assert time.monotonic() - killed_s < 2 and other in served.workers()
        load.stop()
        assert load.errors == []
        assert served.end() == 0
        assert served.stderr.count("ended by signal 9: starting another") == 3


def _listening(worker):
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return sum(c.status == psutil.CONN_LISTEN for c in worker.net_connections("inet")) >= 2
    return False
