"""What devices may download: who gets it, that it is what was published, and from any byte on."""

import os
import threading

import httpx
import pytest

from edge_cloud import CLIENTS, cloud, heads, publish, state
from flserving import cli, delta, weights
from flserving.api.artifacts import Artifacts
from flserving.api.openapi import OPERATIONS
from flserving.manifest import sha256
from flserving.release import Statement, open_head, verify
from rest_door import bearer
from serving_models import PATIENCE_S, wait_until

REPOSITORY = "/v2/repository/models/m"
ROUTES = {
    "release": f"{REPOSITORY}/release?nonce=ab",
    "manifest": f"{REPOSITORY}/versions/2/manifest",
    "weights": f"{REPOSITORY}/versions/2/weights",
    "delta": f"{REPOSITORY}/versions/2/delta?base=1",
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
    assert {o.name for o in OPERATIONS if o.path.startswith("/v2/repository/models") and o.method == "GET"} == {*ROUTES}


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

    monkeypatch.setattr("flserving.api.supervisor.Supervisor", Supervisor)
    for flags in ([], ["--artifacts"]):
        assert cli.main(["serve", "--registry", str(tmp_path), *flags]) == 0
    assert [plan.options.artifacts for plan in plans] == [False, True]


def test_what_comes_is_what_was_published(served):
    registry, endpoint = served
    statement, key = verify(get(endpoint, ROUTES["release"]).content, Statement, None)
    assert (statement.version, statement.nonce) == (3, "ab")
    for version in (1, 2, 3):
        content = get(endpoint, f"{REPOSITORY}/versions/{version}/manifest").content
        with open(f"{registry.root}/models/m/{version}/manifest.json", "rb") as file:
            assert content == file.read()
        manifest = registry.manifest("m", version)
        whole = get(endpoint, f"{REPOSITORY}/versions/{version}/weights")
        assert len(whole.content) == manifest.weights_nbytes and sha256(whole.content) == manifest.digests.weights
        assert whole.headers["accept-ranges"] == "bytes" and whole.status_code == 200
    for form in delta.FORMS:
        for base, start in ((0, None), (1, state(1))):
            content = get(endpoint, f"{REPOSITORY}/versions/2/delta?base={base}&form={form}").content
            start = delta.quantised(start) if form == "int8" and start else start
            got = delta.apply(content, start, state(2), form)
            assert weights.digest(got) == weights.digest(delta.quantised(state(2)) if form == "int8" else state(2))
    assert sha256(get(endpoint, f"{REPOSITORY}/versions/3/manifest").content) == statement.manifest_sha256
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
        assert answer.status_code == 416 and answer.headers["content-range"] == f"bytes */{len(whole)}"
        assert answer.json()["error"]


@pytest.mark.parametrize("text", ["bytes=-5", "bytes=1-2,3-4", "bytes=5-1", "lines=1-", "bytes=" + "9" * 99 + "-", "x",
                                  "bytes=0-0," * 500], ids=range(7))  # fmt: skip
def test_other_ranges_are_answered_whole(served, text):
    answer = get(served[1], ROUTES["weights"], Range=text)
    assert answer.status_code == 200 and len(answer.content) == served[0].manifest("m", 2).weights_nbytes


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
    monkeypatch.setattr("flserving.api.artifacts.encode", lambda *given: (made.append(1), encode(*given))[1])
    with cloud(tmp_path, 1, 2) as (_, endpoint):
        path = f"{REPOSITORY}/versions/2/delta?base=1"
        contents = []
        threads = [threading.Thread(target=lambda: contents.append(get(endpoint, path).content)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1 and len(contents) == 6 and len(set(contents)) == 1
        most = 2 * len(contents[0])
        monkeypatch.setattr("flserving.api.artifacts._DELTAS_NBYTES", most)
        for base, form in ((0, "exact"), (0, "int8"), (1, "int8"), (1, "exact")):
            assert get(endpoint, f"{REPOSITORY}/versions/2/delta?base={base}&form={form}").status_code == 200
            assert sum(file.stat().st_size for file in (tmp_path / "deltas").iterdir()) <= most
        monkeypatch.setattr("flserving.api.artifacts._DELTAS_NBYTES", 1)
        assert get(endpoint, f"{REPOSITORY}/versions/1/delta?form=exact").status_code == 200
        assert os.listdir(tmp_path / "deltas") == ["m-1-0-exact"], "one larger than that is kept until the next"
        assert get(endpoint, path).content == contents[0]


def test_who_waits_for_a_delta_keeps_no_thread_from_others(tmp_path, monkeypatch):
    """40 devices want deltas while the first is made: threads for a fraction of them are there, and stay free."""
    made, arrived, encode, answer = threading.Event(), [], delta.encode, Artifacts.delta

    async def counted(self, request):
        arrived.append(request)
        return await answer(self, request)

    monkeypatch.setattr(Artifacts, "delta", counted)
    monkeypatch.setattr("flserving.api.artifacts.encode", lambda *given: made.wait(PATIENCE_S) and encode(*given))
    with cloud(tmp_path, 1, 2) as (_, endpoint):
        statuses = []

        def ask():
            url = endpoint.url + ROUTES["delta"]
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


def test_a_full_disk_of_the_cloud_is_an_answer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with cloud(tmp_path, 1, 2) as (_, endpoint):
        monkeypatch.setattr("flserving.api.artifacts.os.replace", full)
        answer = get(endpoint, f"{REPOSITORY}/versions/2/delta?base=1")
        assert answer.status_code == 500 and "free space" in answer.json()["error"]
        assert os.listdir(tmp_path / "deltas") == []
        assert get(endpoint, ROUTES["weights"]).status_code == 200


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
        return [path for path in paths if os.path.islink(path) and os.readlink(path).endswith("weights.safetensors")]

    with cloud(tmp_path) as (registry, endpoint):
        publish(registry, 1, sizes=[2048, 2048, 3])  # 16 MB: more than sockets buffer
        endpoint.v2.server.serve(registry, "m")
        for _ in range(5):
            path = endpoint.url + f"{REPOSITORY}/versions/1/weights"
            with httpx.stream("GET", path, headers=bearer("infer")) as answer:
                assert answer.status_code == 200 and opened()
        wait_until(lambda: not opened())
