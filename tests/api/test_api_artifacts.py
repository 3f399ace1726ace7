"""What devices may download: who gets it, that it is what was published, and from any byte on."""

import contextlib
import os
import threading

import httpx
import pytest

from edge_cloud import CLIENTS, cloud, heads, publish, state
from flserving import Registry
from flserving.api import cli
from flserving.api.rest import artifacts
from flserving.api.rest.artifacts import Artifacts
from flserving.api.rest.openapi import OPERATIONS
from flserving.edge import EdgeModelServer, delta
from flserving.edge.release import Statement, open_head, verify
from flserving.edge.sync import SyncAgent
from flserving.models import weights
from flserving.registry.manifest import for_devices, sha256
from rest_door import bearer
from serving_models import PATIENCE_S, wait_until

REPOSITORY = "/v2/repository/models/m"
ROUTES = {
    "release": f"{REPOSITORY}/release?nonce=ab",
    "manifest": f"{REPOSITORY}/versions/2/manifest",
    "weights": f"{REPOSITORY}/versions/2/weights",
    "delta": f"{REPOSITORY}/versions/3/delta?base=1",
    "head": f"{REPOSITORY}/versions/3/head",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with cloud(tmp_path_factory.mktemp("cloud"), 1, 2) as (registry, endpoint):
        publish(registry, 3, with_heads=True)
        yield registry, endpoint


def get(endpoint, path, token="infer", **headers):
    return httpx.get(endpoint.url + path, headers=bearer(token) | headers)


def test_the_routes_are_all_of_the_repository():
    assert {
        o.name
        for o in OPERATIONS
        if o.path.startswith("/v2/repository/models") and o.method == "GET"
    } == {*ROUTES}


@pytest.mark.parametrize("token", [None, "unknown", "read", "infer", "admin", *CLIENTS], ids=str)
@pytest.mark.parametrize("name", ROUTES)
def test_role_matrix(served, name, token):
    answer = get(served[1], ROUTES[name], token)
    expected = {None: 401, "unknown": 401, "read": 403}.get(token, 200)
    if name == "head" and token in ("infer", "admin"):
        expected = 403  # nobody has a head but the client that its token names
    assert answer.status_code == expected, answer.text
    assert expected == 200 or answer.json()["error"]


@pytest.mark.parametrize("name", ROUTES)
def test_nothing_is_offered_unless_asked_for(tmp_path, name):
    with cloud(tmp_path, 1, artifacts=False) as (_, endpoint):
        answer = get(endpoint, ROUTES[name], "c-1")
        assert answer.status_code == 403 and "--artifacts" in answer.json()["error"]


def test_the_flag_of_the_command_reaches_the_doors(tmp_path, monkeypatch):
    plans = []

    class Supervisor:
        def __init__(self, plan, *_, **__):
            plans.append(plan)

        def run(self, announce):
            return 0

    monkeypatch.setattr("flserving.api.processes.Supervisor", Supervisor)
    for flags in ([], ["--artifacts"]):
        assert cli.main(["serve", "--registry", str(tmp_path), *flags]) == 0
    assert [plan.options.artifacts for plan in plans] == [False, True]


def test_what_comes_is_what_was_published(served):
    registry, endpoint = served
    statement, key = verify(get(endpoint, ROUTES["release"]).content, Statement, None)
    assert (statement.version, statement.nonce) == (3, "ab")
    for version in (1, 2, 3):
        content = get(endpoint, f"{REPOSITORY}/versions/{version}/manifest").content
        manifest = registry.manifest("m", version)
        assert content == for_devices(manifest)
        whole = get(endpoint, f"{REPOSITORY}/versions/{version}/weights")
        assert (
            len(whole.content) == manifest.weights_nbytes
            and sha256(whole.content) == manifest.digests.weights
        )
        assert whole.headers["accept-ranges"] == "bytes" and whole.status_code == 200
    for form in delta.FORMS:
        for base, start in ((0, None), (1, state(1))):
            content = get(
                endpoint, f"{REPOSITORY}/versions/3/delta?base={base}&form={form}"
            ).content
            start = delta.quantised(start) if form == "int8" and start else start
            got = delta.apply(content, start, state(3), form)
            assert weights.digest(got) == weights.digest(
                delta.quantised(state(3)) if form == "int8" else state(3)
            )
    assert (
        sha256(get(endpoint, f"{REPOSITORY}/versions/3/manifest").content)
        == statement.manifest_sha256
    )
    for place, client in enumerate(CLIENTS):
        answer = get(endpoint, ROUTES["head"], client)
        head = open_head(answer.content, key, "m", statement.manifest_sha256, client)
        assert (head.weights[0] == heads(3).weights[place]).all()


@pytest.mark.parametrize("route", ["weights", "delta"])
def test_from_any_byte_on(served, route):
    whole = get(served[1], ROUTES[route]).content
    for start in (0, 1, len(whole) // 2, len(whole) - 1):
        answer = get(served[1], ROUTES[route], Range=f"bytes={start}-")
        assert answer.status_code == 206 and answer.content == whole[start:]
        assert answer.headers["content-range"] == f"bytes {start}-{len(whole) - 1}/{len(whole)}"
    for start in (len(whole), 10**14):
        answer = get(served[1], ROUTES[route], Range=f"bytes={start}-")
        assert (
            answer.status_code == 416 and answer.headers["content-range"] == f"bytes */{len(whole)}"
        )
        assert answer.json()["error"]


@pytest.mark.parametrize("text", ["bytes=-5", "bytes=1-2,3-4", "bytes=5-1", "lines=1-", "bytes=" + "9" * 99 + "-", "x",
                                  "bytes=0-0," * 500], ids=range(7))  # fmt: skip
def test_other_ranges_are_answered_whole(served, text):
    answer = get(served[1], ROUTES["weights"], Range=text)
    assert (
        answer.status_code == 200
        and len(answer.content) == served[0].manifest("m", 2).weights_nbytes
    )


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/repository/models/none/release", 404),
        ("/v2/repository/models/..%2f..%2fetc/versions/1/weights", 404),
        (f"{REPOSITORY}/versions/99/weights", 404),
        (f"{REPOSITORY}/versions/0/manifest", 404),
        (f"{REPOSITORY}/versions/none/manifest", 404),
        (f"{REPOSITORY}/versions/..%2f1/weights", 404),
        (f"{REPOSITORY}/versions/2/delta?base=99", 404),
        (f"{REPOSITORY}/versions/2/delta?base=-1", 404),
        (f"{REPOSITORY}/versions/2/delta?form=pickle", 400),
        (f"{REPOSITORY}/release?nonce=not-hex", 400),
        (f"{REPOSITORY}/release?nonce={'a' * 65}", 400),
    ],
)
def test_bad_questions_are_answered(served, path, status):
    answer = get(served[1], path)
    assert answer.status_code == status and answer.json()["error"]


def test_no_head_and_no_heads_look_alike_to_their_client(served):
    answer = get(served[1], f"{REPOSITORY}/versions/2/head", "c-1")
    assert answer.status_code == 404 and "head of this client" in answer.json()["error"]


def test_versions_of_other_shapes_have_no_delta(tmp_path):
    with cloud(tmp_path, 1) as (registry, endpoint):
        publish(registry, 2, sizes=[8, 25, 3])
        assert get(endpoint, f"{REPOSITORY}/versions/2/delta?base=1").status_code == 409


def test_a_delta_is_made_once_and_old_ones_go(tmp_path, monkeypatch):
    made = []
    encode = delta.encode
    monkeypatch.setattr(
        "flserving.api.rest.artifacts.encode", lambda *given: (made.append(1), encode(*given))[1]
    )
    with cloud(tmp_path, 1, 2) as (registry, endpoint):
        path = f"{REPOSITORY}/versions/2/delta?base=1"
        contents = []
        threads = [
            threading.Thread(target=lambda: contents.append(get(endpoint, path).content))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1 and len(contents) == 6 and len(set(contents)) == 1
        looked, stored = [], artifacts._stored
        monkeypatch.setattr(
            artifacts, "_stored", lambda *given: stored(*given) if looked else looked.append(given)
        )
        assert get(endpoint, path).content == contents[0] and len(made) == 1, (
            "it came just after this caller looked"
        )
        most = 2 * len(contents[0])
        monkeypatch.setattr("flserving.api.rest.artifacts._DELTAS_NBYTES", most)
        for base, form in ((0, "exact"), (0, "int8"), (1, "int8"), (1, "exact")):
            assert (
                get(endpoint, f"{REPOSITORY}/versions/2/delta?base={base}&form={form}").status_code
                == 200
            )
            assert sum(file.stat().st_size for file in (tmp_path / "deltas").iterdir()) <= most
        monkeypatch.setattr("flserving.api.rest.artifacts._DELTAS_NBYTES", 1)
        publish(registry, 3)
        assert get(endpoint, f"{REPOSITORY}/versions/3/delta?form=exact").status_code == 200
        assert os.listdir(tmp_path / "deltas") == ["m-3-0-exact"], (
            "one larger than that is kept until the next"
        )
        refused = get(endpoint, path)
        assert refused.status_code == 404 and "not the released one" in refused.json()["error"]
        registry.rollback("m", who="test", why="worse")
        assert get(endpoint, path).content == contents[0]


def test_who_waits_for_a_delta_keeps_no_thread_from_others(tmp_path, monkeypatch):
    """40 devices want deltas while the first is made: threads for a fraction of them are there, and
    stay free."""
    made, arrived, encode, answer = threading.Event(), [], delta.encode, Artifacts.delta

    async def counted(self, request):
        arrived.append(request)
        return await answer(self, request)

    monkeypatch.setattr(Artifacts, "delta", counted)
    monkeypatch.setattr(
        "flserving.api.rest.artifacts.encode",
        lambda *given: made.wait(PATIENCE_S) and encode(*given),
    )
    with cloud(tmp_path, 1, 2) as (_, endpoint):
        statuses = []

        def ask():
            url = f"{endpoint.url}{REPOSITORY}/versions/2/delta?base=1"
            statuses.append(httpx.get(url, headers=bearer("infer"), timeout=PATIENCE_S).status_code)

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(arrived) == 40)
            assert get(endpoint, ROUTES["manifest"]).status_code == 200 and not statuses
        finally:
            made.set()
            for thread in threads:
                thread.join()
        assert statuses == [200] * 40


def spoil(folder, how, monkeypatch):
    """Make it impossible to keep a delta."""
    if how == "a file in its place":
        folder.write_text("no folder")
    elif how == "a loop in its place":
        folder.symlink_to(folder)
    else:

        def full(path, *_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("flserving.api.rest.artifacts.write_file", full)


@pytest.mark.parametrize("how", ["a file in its place", "a loop in its place", "a full disk"])
@pytest.mark.parametrize("form", delta.FORMS)
def test_a_cloud_that_can_keep_no_delta_updates_its_devices_all_the_same(
    tmp_path, monkeypatch, how, form
):
    """Deltas save bytes, the weights are what matters; health and metrics say that something is
    wrong."""
    made = []
    encode = delta.encode
    monkeypatch.setattr(
        "flserving.api.rest.artifacts.encode", lambda *given: (made.append(1), encode(*given))[1]
    )
    with (
        cloud(tmp_path / "cloud", 1) as (released, endpoint),
        Registry(tmp_path / "edge") as registry,
    ):
        with EdgeModelServer(registry=registry) as edge:
            agent = SyncAgent(endpoint.url, "infer", registry, edge=edge, form=form)
            with contextlib.closing(agent):
                spoil(tmp_path / "cloud" / "deltas", how, monkeypatch)
                assert agent.pull().round == 1
                for number in (2, 3):
                    publish(released, number)
                    pulled = agent.pull()
                    assert pulled.changed and pulled.round == number
                    assert ("weights" in pulled.nbytes) == (form == "exact")
        assert len(made) == (1 if form == "exact" else 3), (
            "an exact one is not made again only to be thrown away"
        )
        server = endpoint.v2.server
        assert "deltas cannot be kept" in server.health_check()["problems"]["m/deltas"]
        assert server.health_check()["ready"]
        assert 'flserving_deltas_total{outcome="not_kept"}' in get(endpoint, "/metrics").text


def test_deltas_are_tried_again_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("flserving.api.rest.artifacts._RETRY_S", 0.0)
    with cloud(tmp_path, 1, 2) as (_, endpoint):
        path = f"{REPOSITORY}/versions/2/delta?base=1"
        (tmp_path / "deltas").write_text("no folder")
        refused = get(endpoint, path)
        assert refused.status_code == 404 and "download the weights" in refused.json()["error"]
        (tmp_path / "deltas").unlink()
        assert get(endpoint, path).status_code == 200
        assert endpoint.v2.server.health_check()["problems"] == {}


def test_one_device_that_wants_many_deltas_delays_nobodys_head(tmp_path, monkeypatch):
    """It has one made at a time, is told so at once for the others, and heads wait for none of
    them."""
    begun, go_on, encode = threading.Event(), threading.Event(), delta.encode

    def slow(*given):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return encode(*given)

    monkeypatch.setattr("flserving.api.rest.artifacts.encode", slow)
    with cloud(tmp_path, *range(1, 13), with_heads=True) as (_, endpoint):
        url = endpoint.url + REPOSITORY + "/versions/12"
        statuses = []

        def ask(base, token="c-1"):
            answer = httpx.get(
                f"{url}/delta?base={base}", headers=bearer(token), timeout=PATIENCE_S
            )
            statuses.append((token, answer.status_code))

        greedy = [threading.Thread(target=ask, args=(base,)) for base in range(12)]
        try:
            greedy[0].start()
            assert begun.wait(PATIENCE_S)
            for thread in greedy[1:]:
                thread.start()
            wait_until(lambda: len(statuses) == 11)
            assert statuses == [("c-1", 429)] * 11, "the excess is refused while the one is made"
            other = threading.Thread(target=ask, args=(3, "c-2"))
            other.start()
            greedy.append(other)
            for token in ("c-2", "c-1"):
                answer = httpx.get(f"{url}/head", headers=bearer(token), timeout=PATIENCE_S)
                assert answer.status_code == 200, "no delta is ready, the head is"
            assert len(statuses) == 11
        finally:
            go_on.set()
            for thread in greedy:
                thread.join()
        assert sorted(statuses[11:]) == [("c-1", 200), ("c-2", 200)]


def test_heads_of_old_versions_delay_no_head_of_the_released_one(tmp_path, monkeypatch):
    begun, go_on, read = threading.Event(), threading.Event(), Registry.read

    def slow(self, model, version):
        if version == 1:
            begun.set()
            assert go_on.wait(PATIENCE_S)
        return read(self, model, version)

    with cloud(tmp_path, 1, 2, with_heads=True) as (_, endpoint):
        monkeypatch.setattr(Registry, "read", slow)
        url = endpoint.url + REPOSITORY + "/versions"
        answers = []

        def ask():
            answers.append(
                httpx.get(f"{url}/1/head", headers=bearer("c-1"), timeout=PATIENCE_S).status_code
            )

        waiting = threading.Thread(target=ask)
        waiting.start()
        try:
            assert begun.wait(PATIENCE_S)
            assert (
                httpx.get(f"{url}/2/head", headers=bearer("c-2"), timeout=PATIENCE_S).status_code
                == 200
            )
            assert answers == []
        finally:
            go_on.set()
            waiting.join()
        assert answers == [200]


def test_a_device_takes_the_weights_where_its_delta_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flserving.api.rest.artifacts._SHARED_PLACES", 0)
    with (
        cloud(tmp_path / "cloud", 1) as (released, endpoint),
        Registry(tmp_path / "edge") as registry,
        EdgeModelServer(registry=registry) as edge,
        contextlib.closing(SyncAgent(endpoint.url, "infer", registry, edge=edge)) as agent,
    ):
        agent.pull()
        publish(released, 2)
        assert agent.pull().nbytes.keys() >= {"weights", "manifest"}


def test_a_link_in_the_place_of_weights_is_not_followed(tmp_path):
    with cloud(tmp_path, 1) as (_, endpoint):
        place = tmp_path / "models" / "m" / "1" / "weights.safetensors"
        place.unlink()
        place.symlink_to("/etc/hostname")
        assert get(endpoint, f"{REPOSITORY}/versions/1/weights").status_code == 500


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_a_caller_that_leaves_leaves_no_open_file(tmp_path):
    def opened():
        paths = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [
            path
            for path in paths
            if os.path.islink(path) and os.readlink(path).endswith("weights.safetensors")
        ]

    with cloud(tmp_path) as (registry, endpoint):
        publish(registry, 1, sizes=[2048, 2048, 3])  # 16 MB: more than sockets buffer
        endpoint.v2.server.serve(registry, "m")
        for _ in range(5):
            path = endpoint.url + f"{REPOSITORY}/versions/1/weights"
            with httpx.stream("GET", path, headers=bearer("infer")) as answer:
                assert answer.status_code == 200 and opened()
        wait_until(lambda: not opened())
