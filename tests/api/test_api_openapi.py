"""The OpenAPI document: valid, complete, true of the server, and readable without a network."""

import json
import re
from html.parser import HTMLParser

import jsonschema
import pytest
import referencing.jsonschema
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis import checks

import openapi_document
from budget import examples
from flserving.api.auth import Role, Tokens
from flserving.api.dataplane import V2
from flserving.api.options import ApiOptions
from flserving.api.rest.app import RestApp
from flserving.api.rest.codec import DTYPES
from flserving.api.rest.openapi import OPERATIONS, document, page
from serving_models import Constant, serving

TOKENS = Tokens()
TOKENS.add("secret", Role.ADMIN)
CHECKS = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.unsupported_method]  # fmt: skip


@pytest.fixture(scope="module")
def app():
    with serving(Constant(3)) as server:
        yield RestApp(V2(server), ApiOptions(tokens=TOKENS))


@pytest.fixture(scope="module")
def described(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("o", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_every_route_does_what_the_document_says(described, o):
    if o.name == "metrics":
        pytest.importorskip("flserving.monitoring.prometheus")

    @examples(12, suppress_health_check=list(HealthCheck))
    @given(case=described[o.path][o.method].as_strategy(), exists=st.booleans())
    def conforms(case, exists):
        if exists and "{model}" in o.path:
            case.path_parameters |= {"model": "local"} | (
                {"version": "v1.0"} if "{version}" in o.path else {}
            )
        case.call_and_validate(checks=CHECKS, headers={"Authorization": "Bearer secret"})

    conforms()


def test_the_file_is_what_the_routes_and_messages_make_of_it():
    remade = openapi_document.text()
    same = document().decode() == remade
    assert same, (
        "routes or messages changed: run python tests/support/openapi_document.py and commit what it writes"
    )


def parts(node):
    """Every object inside a JSON value."""
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from parts(child)


def test_every_schema_is_one_and_its_default_fits_it():
    """What makers of clients stumble over; tests/test_peers_clients.py has a whole validator and a
    maker of clients."""
    doc = json.loads(document())
    registry = referencing.Registry().with_resource(
        "", referencing.jsonschema.DRAFT202012.create_resource(doc)
    )
    checked = 0
    for part in parts(doc):
        if "$ref" in part:
            assert registry.resolver().lookup(part["$ref"]).contents
        if isinstance(part.get("type"), str) and "scheme" not in part:
            jsonschema.Draft202012Validator.check_schema(part)
            assert part["type"] != "array" or "items" in part, part
            if "default" in part:
                jsonschema.Draft202012Validator(part, registry=registry).validate(part["default"])
            checked += 1
    assert checked > 100
    assert doc["components"]["schemas"]["InputTensor"]["properties"]["datatype"]["enum"] == [
        *DTYPES,
        "BF16",
    ]


def test_every_route_and_status_is_in_the_document():
    doc = json.loads(document())
    assert {(o.method.lower(), o.path) for o in OPERATIONS} == {
        (method, path) for path, methods in doc["paths"].items() for method in methods
    }
    for o in OPERATIONS:
        entry = doc["paths"][o.path][o.method.lower()]
        assert entry["security"] == ([] if o.role is None else [{"bearer": []}])
        statuses = "200 400 401 403 404 405 408 413 415 429 431 500 503 504"
        assert {*statuses.split()} <= entry["responses"].keys()
        assert {*entry["tags"]} <= {tag["name"] for tag in doc["tags"]} and len(entry["tags"]) == 1
    names = [e["operationId"] for methods in doc["paths"].values() for e in methods.values()]
    assert len(names) == len(set(names))


def test_the_page_names_every_route_and_loads_nothing():
    text = page()
    assert all(f"<code>{o.path}</code>" in text for o in OPERATIONS)
    loaded = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            loaded.extend((tag, value) for name, value in attrs if name in ("src", "href"))
            assert tag not in ("script", "link", "img", "iframe")

    Links().feed(text)
    assert loaded == [("a", "openapi.json")]
    assert not re.search(r"https?://|@import|url\(", text.replace("http://json-schema", ""))
