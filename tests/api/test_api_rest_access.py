"""Who may reach the REST door: every route by every role, by every name, from every page."""

import httpx
import pytest

from flserving.api.rest.openapi import OPERATIONS
from rest_door import TOKENS, bearer, door, text, two_versions

INFER = "/v2/models/local/infer"


@pytest.fixture(scope="module")
def server():
    with two_versions() as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server):
    with door(server, artifacts=True) as endpoint:
        yield endpoint


# Who may


# a registry has them: test_api_artifacts.py
ABSENT = {"unload", "release", "manifest", "weights", "delta", "head"}
ROUTES = [
    (o.method, o.path.format(model="local", version="v1"), o.role, o.name) for o in OPERATIONS
]


@pytest.mark.parametrize("token", [None, "unknown", *TOKENS], ids=str)
@pytest.mark.parametrize(
    ("method", "path", "role", "name"), ROUTES, ids=[f"{m} {p}" for m, p, _, _ in ROUTES]
)
def test_role_matrix(endpoint, method, path, role, name, token):
    if name == "feedback":
        return  # needs an answer's receipt: test_api_feedback.py
    if name == "metrics":
        pytest.importorskip("flserving.monitoring.prometheus")
    if name == "unload":  # the shared model stays; the role is checked first, the name after it
        path = path.replace("/local/", "/none/")
    content = text() if name == "infer" else b""
    response = httpx.request(method, endpoint.url + path, headers=bearer(token), content=content)
    if role is None or (token in TOKENS and TOKENS[token] >= role):
        assert response.status_code == (404 if name in ABSENT else 200), response.text
    else:
        assert response.status_code == (403 if token in TOKENS else 401)
        assert response.json()["error"] and response.headers["content-type"] == "application/json"
        assert ("www-authenticate" in response.headers) == (response.status_code == 401)


def test_admin_is_off_unless_switched_on(server):
    with door(server, admin=False) as endpoint:
        for verb in ("load", "unload"):
            response = httpx.post(
                f"{endpoint.url}/v2/repository/models/local/{verb}", headers=bearer("admin")
            )
            assert response.status_code == 403 and "admin=True" in response.json()["error"]


# Pages and names


GOOD_HOSTS = [
    "127.0.0.1:{port}",
    "localhost:{port}",
    "LOCALHOST:{port}",
    "[::1]:{port}",
    "models.example",
    "m.example:1",
]
BAD_HOSTS = [
    "evil.example",
    "127.0.0.1",
    "127.0.0.1:1",
    "localhost",
    "127.0.0.1:{port}.evil.example",
    "m.example:2",
]
BAD_HOSTS += [
    "127.0.0.2:{port}",
    "localhost.evil.example:{port}",
    "evil@127.0.0.1:{port}",
    "[::1",
    "x:99999",
    "\u00e9",
    "",
]


@pytest.fixture(scope="module")
def guarded(server):
    options = {"hosts": ("models.example", "m.example:1"), "origins": ("https://lab.example",)}
    with door(server, **options) as endpoint:
        yield endpoint


@pytest.mark.parametrize(
    ("host", "ours"), [*((h, True) for h in GOOD_HOSTS), *((h, False) for h in BAD_HOSTS)]
)
@pytest.mark.parametrize(
    "path", ["/v2/health/live", INFER, "/nothing", "/v2/repository/models/none/load"]
)
def test_only_our_own_names_are_answered(guarded, host, ours, path):
    port = guarded.url.rsplit(":", 1)[1]
    headers = bearer("admin") | {"Host": host.format(port=port).encode("latin-1")}
    response = httpx.request("POST" if path.endswith(("infer", "load")) else "GET", guarded.url + path,
                             headers=headers, content=text() if path == INFER else b"")  # fmt: skip
    assert (response.status_code == 403) == (not ours)
    if not ours:
        assert "Host" in response.json()["error"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://lab.example", "https://lab.example:8443",
                                    "http://127.0.0.1", "https://lab.example.evil", "\u00e9", ""])  # fmt: skip
def test_a_page_that_nobody_named_is_refused_whatever_it_does(guarded, method, origin):
    for path in ("/v2/health/live", INFER):
        headers = bearer("admin") | {
            "Origin": origin.encode("latin-1"),
            "Access-Control-Request-Method": "POST",
        }
        response = httpx.request(method, guarded.url + path, headers=headers)
        assert response.status_code == 403
        assert not any(name.startswith("access-control") for name in response.headers)


def test_a_named_page_may_ask_and_read(guarded):
    page = {"Origin": "https://lab.example"}
    asked = page | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    # a browser sends no credential with it
    preflight = httpx.options(guarded.url + INFER, headers=asked)
    assert (
        preflight.status_code == 204
        and preflight.headers["access-control-allow-origin"] == page["Origin"]
    )
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "content-length" not in preflight.headers, "a 204 has none (RFC 9110, 8.6)"
    for token, status in (("infer", 200), (None, 401)):
        answer = httpx.post(guarded.url + INFER, headers=page | bearer(token), content=text())
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (
            status,
            page["Origin"],
        )
        assert (
            answer.headers["vary"] == "origin"
            and "access-control-allow-credentials" not in answer.headers
        )
    form = page | bearer("infer") | {"Content-Type": "application/x-www-form-urlencoded"}
    assert httpx.post(guarded.url + INFER, headers=form, content=text()).status_code == 415


def test_an_ipv4_address_is_a_name_of_a_socket_of_both_families(server):
    with door(server, host="::") as endpoint:
        port = endpoint.url.rpartition(":")[2]
        # 127.0.0.2 is no name that we know beforehand
        for host, status in (("127.0.0.2", 200), ("evil.example", 403)):
            headers = {"Host": f"{host}:{port}"}
            assert (
                httpx.get(f"http://127.0.0.2:{port}/v2/health/live", headers=headers).status_code
                == status
            )


def test_our_own_page_may_call_and_a_page_can_be_named_while_serving(server):
    with door(server) as endpoint:
        own, other = {"Origin": endpoint.url}, {"Origin": "https://hub.example"}
        assert httpx.get(f"{endpoint.url}/v2/health/live", headers=own).status_code == 200
        assert httpx.get(f"{endpoint.url}/v2/health/live", headers=other).status_code == 403
        endpoint.allow_origin("https://hub.example")
        assert httpx.get(f"{endpoint.url}/v2/health/live", headers=other).status_code == 200
