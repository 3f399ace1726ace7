"""``flserving.asgi``: REST inside another application, below a prefix, with the rules that
``serve`` has."""

import re
import socket
import threading

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import flserving
from flserving.api.auth import Role, Tokens
from flserving.api.rest.openapi import OPERATIONS
from flserving.errors import ConfigError
from rest_door import bearer, binary, known_tokens, outputs_of, rows, text, two_versions
from serving_models import PATIENCE_S, wait_until

HOST = "http://models.example.org"
INFER = "/v2/models/local/infer"
PREFIXES = ["", "/fl", "/api/v1/fl", "/~a:b", "/v2", "/é f", "/a%b", "/v2/models/local/infer"]


@pytest.fixture(scope="module")
def server():
    with two_versions() as server:
        yield server


async def hello(request):
    return PlainTextResponse("hello")


def mounted(server, prefix, **options):
    """The application below ``prefix``, beside a route of somebody else's."""
    options = {"tokens": known_tokens(), "hosts": ("models.example.org",), **options}
    inner = flserving.asgi(server, **options)
    if not prefix:
        return inner
    return Starlette(routes=[Route("/hello", hello), Mount(prefix, inner)])


def calling(app, role="infer", **transport):
    headers = {} if role is None else bearer(role)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, **transport), base_url=HOST, headers=headers
    )


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_every_kind_of_route_answers_below_a_prefix(server, prefix):
    x = rows(3)
    expected = server.predict(x)
    async with calling(mounted(server, prefix)) as client:
        answer = await client.post(prefix + INFER, content=text(x))
        assert answer.status_code == 200, answer.text
        assert outputs_of(answer)[1]["predictions"].tolist() == expected["predictions"]
        sent = binary(x)
        answer = await client.post(f"{prefix}/v2/models/local/versions/v1/infer", **sent)
        np.testing.assert_allclose(
            outputs_of(answer)[1]["probabilities"], expected["probabilities"], atol=1e-6
        )
        metadata = (await client.get(f"{prefix}/v2/models/local/versions/v2")).json()
        assert (metadata["name"], metadata["versions"]) == ("local", ["v2"])
        assert (await client.get(f"{prefix}/v2/health/ready")).json() == {
            "live": True,
            "ready": True,
        }
        assert (await client.post(f"{prefix}/v2/repository/index")).json()[0]["name"] == "local"
        assert "flserving_" in (await client.get(f"{prefix}/metrics")).text
        for wrong in (
            "/v2/nothing",
            "/v2/models/lo%63al",
            "/v2/models%2Flocal",
            "/v2%2Fmodels/local",
            "/",
            "",
        ):
            refused = await client.get(prefix + wrong)
            assert refused.status_code in (307, 404) and (
                not prefix or wrong == "" or "error" in refused.json()
            )
        assert (await client.get(prefix + INFER)).status_code == 405
        if prefix:
            assert (await client.get("/hello")).text == "hello"
            assert (await client.get("/v2/health/live")).status_code == 404


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_the_document_and_the_page_say_the_prefix(server, prefix):
    """Whoever follows ``servers`` and a path of the document, or the curl line of the page,
    arrives."""
    async with calling(mounted(server, prefix), role=None) as client:
        document = (await client.get(f"{prefix}/openapi.json")).json()
        (at,) = document["servers"]
        assert (await client.get(at["url"].rstrip("/") + "/v2/health/live")).json() == {
            "live": True
        }
        assert document["paths"].keys() == {operation.path for operation in OPERATIONS}
        page = await client.get(f"{prefix}/docs")
        assert (
            page.headers["content-type"].startswith("text/html")
            and 'href="openapi.json"' in page.text
        )
        curl = re.search(r"\$URL(\S*)/v2/models/MODEL/infer", page.text)
        assert curl and (await client.get(f"{curl[1]}/v2/health/live")).json() == {"live": True}


async def test_a_prefix_that_callers_choose_stays_text(server):
    """A parameter of the outer route is no argument of ours, and no HTML."""
    app = Starlette(
        routes=[
            Mount(
                "/{model}",
                flserving.asgi(server, tokens=known_tokens(), hosts=("models.example.org",)),
            )
        ]
    )
    async with calling(app) as client:
        assert (await client.get("/other/v2/models/local")).json()["name"] == "local"
        page = (await client.get("/<script>alert('x')</docs")).text + (
            await client.get('/"<b>/docs')
        ).text
        assert "<script" not in page and "<b>/" not in page
        quoted = (await client.get('/"}],"x/openapi.json')).json()
        assert quoted["servers"] == [{"url": "/%22%7D%5D%2C%22x/"}]


async def test_a_web_servers_own_root_path_is_a_prefix_too(server):
    """Uvicorn's ``--root-path`` stands before the path, as ASGI says; behind a proxy that cuts it
    off, it does not."""
    async with calling(mounted(server, ""), root_path="/behind") as client:
        for path in ("/behind/v2/models/local", "/v2/models/local"):
            assert (await client.get(path)).json()["name"] == "local"
        assert (await client.get("/behind/openapi.json")).json()["servers"] == [{"url": "/behind/"}]


async def test_the_surroundings_scope_is_left_as_it_was(server):
    seen = {}
    inner = flserving.asgi(server, tokens=known_tokens(), hosts=("models.example.org",))

    async def outer(scope, receive, send):
        scope["state"] = {"mine": 1}
        before = dict(scope)
        await inner(scope, receive, send)
        seen.update(same=scope == before and scope["state"] == {"mine": 1})

    async with calling(outer) as client:
        assert (await client.get("/v2/models/local")).status_code == 200
    assert seen == {"same": True}


@pytest.mark.parametrize(
    ("options", "role", "headers", "status"),
    [
        ({}, None, {}, 401),
        ({}, "unknown", {}, 401),
        ({}, "read", {}, 403),
        ({"tokens": Tokens.open()}, None, {}, 200),
        ({}, "infer", {"host": "rebound.example"}, 403),
        ({"hosts": ("proxy.example",)}, "infer", {"host": "proxy.example"}, 200),
        ({}, "infer", {"origin": "https://elsewhere.example"}, 403),
        ({"origins": ("https://app.example",)}, "infer", {"origin": "https://app.example"}, 200),
        ({"max_body_bytes": 1024, "max_numbers": 1024}, "infer", {}, 413),
        ({"max_numbers": 1024}, "infer", {}, 413),
    ],
    # the same in every worker of xdist
    ids=lambda value: re.sub(" object at 0x\\w+", "", str(value)),
)
async def test_credentials_names_and_sizes_are_checked_as_serve_checks_them(
    server, options, role, headers, status
):
    body = text(rows(2000 if status == 413 else 1))
    async with calling(mounted(server, "/fl", **options), role=role) as client:
        answer = await client.post(f"/fl{INFER}", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert (answer.headers.get("access-control-allow-origin") is not None) == ("origins" in options)


async def test_without_tokens_there_is_a_random_one(server):
    app = flserving.asgi(server, hosts=("models.example.org",))
    async with calling(app, role=app.token) as client:
        assert (await client.post(INFER, content=text())).status_code == 200
        assert (await client.post("/v2/repository/models/local/load")).status_code == 403
    assert flserving.asgi(server).token != app.token and len(app.token) > 30
    assert flserving.asgi(server, tokens=Tokens.open()).token is None
    assert flserving.asgi(server, admin=True).token is not None


@pytest.mark.parametrize(
    "name", ["host", "port", "grpc_port", "certificate", "max_connections", "slow_client_s", "prot"]
)
def test_an_option_of_a_port_is_refused_by_name(server, name):
    with pytest.raises(
        ConfigError, match=rf"asgi has no option {name}: it takes tokens, .* at the web server"
    ):
        flserving.asgi(server, **{name: 1})


def test_a_wrong_option_is_refused(server):
    with pytest.raises(ConfigError, match="max_numbers is 1"):
        flserving.asgi(server, max_numbers=1)


def test_a_real_web_server_and_a_real_client_meet_below_the_prefix(server):
    triton = pytest.importorskip("tritonclient.http")
    listener = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(mounted(server, "/fl"), log_level="error"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: web.started)
        x = rows(3)
        with triton.InferenceServerClient(f"127.0.0.1:{listener.getsockname()[1]}/fl") as client:
            assert client.is_server_ready()
            tensor = triton.InferInput("features", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            answer = client.infer("local", [tensor], headers=bearer("infer"))
            assert answer.as_numpy("predictions").tolist() == server.predict(x)["predictions"]
            with pytest.raises(triton.InferenceServerException, match="no credential"):
                client.infer("local", [tensor])
    finally:
        web.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()


def test_fastapi_mounts_it(server):
    """FastAPI is not among the packages of the tests: this runs where it is installed."""
    fastapi = pytest.importorskip("fastapi")
    testing = pytest.importorskip("fastapi.testclient")
    outer = fastapi.FastAPI()

    @outer.get("/mine")
    def mine() -> dict[str, int]:
        return {"mine": 1}

    tokens, token = Tokens.random(Role.INFER)
    outer.mount("/fl", flserving.asgi(server, tokens=tokens, hosts=("testserver",)))
    with testing.TestClient(outer, headers={"Authorization": f"Bearer {token}"}) as client:
        assert client.get("/mine").json() == {"mine": 1}
        assert client.post(f"/fl{INFER}", content=text()).status_code == 200
        assert client.get("/fl/openapi.json").json()["servers"] == [{"url": "/fl/"}]
        assert client.get("/fl/docs").status_code == client.get("/docs").status_code == 200
