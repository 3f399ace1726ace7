"""Names over the network: who is told them, what a new one needs to be served, and that none means
two things."""

import re

import grpc
import httpx
import pytest
import torch

from flserving import ModelServer, Registry, models
from flserving.api.auth import Tokens
from flserving.api.client import Client
from flserving.api.dataplane import V2
from flserving.api.grpc import codec
from flserving.api.grpc.service import Service
from flserving.api.options import ApiOptions
from flserving.api.rest.openapi import OPERATIONS
from flserving.errors import InvalidModelError, NotFoundError
from flserving.registry.registry import NOT_FOR_MODELS
from flserving.serving.router import Router
from grpc_door import Caller, metadata, open_door
from rest_door import bearer, door
from serving_models import PATIENCE_S, wait_until

SECRET = ("hospital", "study-7", "canary")  # a model, a model without a default version, an alias
NONE = [None, "unknown"]


def publish(registry, name, alias="default"):
    torch.manual_seed(len(name))
    registry.publish(name, models.build("digits_mlp"), architecture="digits_mlp", alias=alias)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with Registry(tmp_path_factory.mktemp("names")) as registry:
        publish(registry, "hospital")
        publish(registry, "study-7", alias=None)
        for _ in range(12):
            publish(registry, "hospital", alias=None)
        registry.set_alias("hospital", "canary", 7, who="test", why="test")
        yield registry


@pytest.fixture(scope="module")
def server(registry):
    with ModelServer(registry=registry) as server:
        server.unload("study-7")
        yield server


# What there is, in every combination of right and wrong names; the numbers of versions are names
# too
MODELS, VERSIONS = ["zzz", "hospital", "study-7", "local", "%20"], ["99", "1", "default", "zzz"]


def told(text, *asked):
    """Names, or lists of versions, in ``text`` that the caller did not send itself."""
    for name in asked:
        text = text.replace(name, "")
    return [name for name in (*SECRET, "default") if name in text] + re.findall(
        r"\d+, \d+|1 to 1\d", text
    )


@pytest.mark.parametrize("token", NONE, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_no_route_tells_names_to_a_caller_without_the_role_to_read(server, operation, token):
    if operation.name in ("document", "page"):
        return  # the same for every server
    with (
        door(server, artifacts=True) as endpoint,
        httpx.Client(base_url=endpoint.url, headers=bearer(token)) as client,
    ):
        for model in MODELS:
            for version in VERSIONS:
                path = operation.path.format(model=model, version=version)
                for method in {operation.method, "PUT"}:
                    answer = client.request(method, path)
                    assert not told(answer.text, model, version), f"{method} {path}: {answer.text}"
                    assert not told(str(answer.headers)), f"{method} {path}: {answer.headers}"


@pytest.mark.parametrize("token", NONE, ids=str)
def test_no_method_tells_names_to_a_caller_without_the_role_to_read(server, token):
    with open_door(server) as (_, target, _, _), grpc.insecure_channel(target) as channel:
        for method in Service(V2(server), ApiOptions()).methods()[codec.SERVICE]:
            kind = codec.message(f"inference.{method}Request")
            fields = {field.name for field in kind.DESCRIPTOR.fields}
            for model in MODELS:
                for version in VERSIONS:
                    values = {
                        "name": model,
                        "model_name": model,
                        "version": version,
                        "model_version": version,
                    }
                    body = kind(**{name: value for name, value in values.items() if name in fields})
                    call = channel.unary_unary(f"/{codec.SERVICE}/{method}")
                    try:
                        said = str(
                            call(
                                body.SerializeToString(),
                                metadata=metadata(token),
                                timeout=PATIENCE_S,
                            )
                        )
                    except grpc.RpcError as error:
                        said = f"{error.details()} {error.trailing_metadata()}"
                    assert not told(said, model, version), f"{method}: {said}"


def test_who_may_read_is_told_what_there_is(server):
    with door(server) as endpoint:
        path = f"{endpoint.url}/v2/models/zzz/ready"
        assert httpx.get(path).json() == {"error": "no such model or version"}
        assert (
            "served are hospital, study-7"
            in httpx.get(path, headers=bearer("read")).json()["error"]
        )
        path = f"{endpoint.url}/v2/models/hospital/versions/99/ready"
        assert httpx.get(path).json() == {"error": "no such model or version"}
        assert "aliases canary, default" in httpx.get(path, headers=bearer("read")).json()["error"]
    with door(server, tokens=Tokens.open()) as endpoint:  # an explicit choice: everybody may read
        assert (
            "served are hospital"
            in httpx.get(f"{endpoint.url}/v2/models/zzz/ready").json()["error"]
        )


def test_a_loaded_name_is_served_over_rest_and_grpc(tmp_path, monkeypatch):
    """A server of one model, and nothing that looks for new names by itself."""
    monkeypatch.setattr(Router, "WATCH_S", 3600)
    with Registry(tmp_path) as registry:
        publish(registry, "digits")
        with ModelServer(registry=registry, model="digits") as server:
            for name in ("over-rest", "over-grpc"):
                publish(registry, name)
            with door(server) as endpoint:
                ready = f"{endpoint.url}/v2/models/over-rest/ready"
                load = f"{endpoint.url}/v2/repository/models/over-rest/load"
                assert httpx.get(ready).status_code == 404
                assert httpx.post(load, headers=bearer("infer")).status_code == 403
                assert httpx.get(ready).status_code == 404, "identity before data"
                assert httpx.post(load, headers=bearer("admin")).status_code == 200
                assert httpx.get(ready).status_code == 200
                nobody = httpx.post(
                    f"{endpoint.url}/v2/repository/models/nobody/load", headers=bearer("admin")
                )
                assert nobody.status_code == 404
            with open_door(server) as (_, target, _, _), Caller(target, "admin") as caller:
                assert caller.ask("RepositoryModelLoad", model_name="over-grpc").isLoaded
                assert caller.ask("ModelReady", name="over-grpc").ready


def test_a_new_name_is_found_by_the_next_request_with_the_role_to_infer(tmp_path, monkeypatch):
    monkeypatch.setattr(Router, "WATCH_S", 3600)
    with Registry(tmp_path) as registry, Registry(tmp_path) as elsewhere:
        publish(registry, "digits")
        with ModelServer(registry=registry) as server, door(server) as endpoint:
            publish(elsewhere, "later")
            assert httpx.get(f"{endpoint.url}/v2/models/later/ready").status_code == 404
            with Client(endpoint.url, "infer") as client:
                assert client.predict([[0.0] * 64], model="later")["model_version"] == "1"
            assert httpx.get(f"{endpoint.url}/v2/models/later/ready").status_code == 200


def test_a_client_that_names_no_model_gets_the_servers_default(tmp_path):
    with Registry(tmp_path) as registry:
        publish(registry, "digits")
        publish(registry, "aaa-draft", alias=None)
        with ModelServer(registry=registry) as server, door(server, grpc_port=0) as endpoint:
            for url in (endpoint.url, f"grpc://{endpoint.grpc_url}"):
                with Client(url, "infer") as client:
                    wait_until(client.ready)
                    assert client.predict([[0.0] * 64])["model_version"] == "1"
                    with pytest.raises(NotFoundError):
                        client.predict([[0.0] * 64], model="")


@pytest.mark.full
def test_no_model_can_have_the_name_of_a_route(tmp_path):
    """Where a route has a word in the place of a model's name, no new model gets that word; all
    others answer."""
    places = [o.path.split("/") for o in OPERATIONS]
    shape = ["", "v2", "models", "{model}"]
    words = {parts[3] for parts in places if parts[:3] == shape[:3] and len(parts) == 4} - {
        "{model}"
    }
    assert words == NOT_FOR_MODELS
    with Registry(tmp_path) as registry:
        for name in NOT_FOR_MODELS:
            with pytest.raises(InvalidModelError, match="is a route of REST"):
                publish(registry, name)
        routes = {word for parts in places for word in parts if word.isalnum()} - NOT_FOR_MODELS
        for name in routes | {"default", "1"}:
            publish(registry, name)
        with ModelServer(registry=registry) as server, door(server) as endpoint:
            for name in routes | {"default", "1"}:
                for path in (name, f"{name}/versions/1", f"{name}/versions/default"):
                    answer = httpx.get(f"{endpoint.url}/v2/models/{path}", headers=bearer("read"))
                    assert answer.json()["name"] == name
                    assert (
                        httpx.get(f"{endpoint.url}/v2/models/{path}/ready").json()["name"] == name
                    )
