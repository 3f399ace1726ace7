"""Personal answers over the network: a client reaches its own head and nobody else's, and learns
nothing of others."""

import asyncio

import numpy as np
import pytest

import flserving
from flserving import Registry, ServingConfig, models
from flserving.api.auth import Identity, Role, Tokens
from flserving.api.client import Client
from flserving.api.dataplane import V2, Call
from flserving.errors import ForbiddenError, NotFoundError
from flserving.registry.heads import HeadSet
from flserving.serving.personalized import PersonalizedServer

CLIENTS = [f"c-{i}" for i in range(100)]
HEADLESS = "c-none"
ROW = np.zeros((1, 4), np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Whoever has a head is answered by its own number; the global model answers -1."""
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        state = models.build("mlp", {"sizes": [4, 2, 1]}).state_dict()
        for tensor in state.values():
            tensor.zero_()
        state["head.bias"].fill_(-1.0)
        heads = np.zeros((len(CLIENTS), 3, 1), np.float32)
        heads[:, -1, 0] = range(len(CLIENTS))
        registry.publish(
            "m", state, architecture="mlp", parameters={"sizes": [4, 2, 1]}, output_type="regression",
            heads=HeadSet("head", CLIENTS, heads), alias="default",
        )  # fmt: skip
        config = ServingConfig(warmup_samples=1, prediction_cache_bytes=1 << 20)
        with PersonalizedServer(config, registry) as server:
            yield server


def test_of_100_clients_none_reaches_anothers_head_and_none_can_tell_who_exists(server):
    """All 10,000 ordered pairs, through the protocol's one operation and the prediction cache."""
    v2 = V2(server)

    async def ask(client, said):
        try:
            answer = await v2.infer(
                Call("m", None, {"features": ROW}, None, said, Identity(Role.INFER, client))
            )
            return answer.outputs["predictions"].tolist(), answer.parameters["head"]
        except NotFoundError as error:
            return str(error)

    async def matrix():
        refusals = set()
        for mine, client in enumerate([*CLIENTS, HEADLESS]):
            own = ([-1.0], "unknown") if client == HEADLESS else ([float(mine)], "own")
            assert await ask(client, {"personal": True}) == own
            for other in [*CLIENTS, HEADLESS, "c-unheard-of"]:
                got = await ask(client, {"client": other})
                if other == client:
                    assert got == own
                else:
                    assert isinstance(got, str), f"{client} got {got} by naming {other}"
                    refusals.add(got)
        return refusals

    assert len(asyncio.run(matrix())) == 1, "one text for 'no such head' and 'not yours'"
    assert server.prediction_cache.stats()["size"] == len(CLIENTS) + 1


@pytest.fixture(scope="module")
def endpoint(server):
    tokens = Tokens()
    for client in [*CLIENTS[:3], HEADLESS]:
        tokens.add(f"token of {client}".replace(" ", "-"), Role.INFER, client)
    tokens.add("nobody", Role.INFER)
    with flserving.serve(server, tokens=tokens) as endpoint:
        yield endpoint


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_over_the_wire_the_credential_decides_and_the_answer_says_which_head(endpoint, scheme):
    url = endpoint.url if scheme == "http" else f"grpc://{endpoint.grpc_url}"
    for number, client in enumerate(CLIENTS[:3]):
        with Client(url, f"token-of-{client}") as caller:
            answer = caller.predict(ROW, personal=True)
            assert (answer["predictions"], answer["head"], answer["model_type"]) == (
                [number],
                "own",
                "personal",
            )
            assert caller.predict(ROW)["predictions"] == [-1.0] and "head" not in caller.predict(
                ROW
            )
    with Client(url, f"token-of-{HEADLESS}") as caller:
        answer = caller.predict(ROW, personal=True)
        assert (answer["predictions"], answer["head"], answer["model_type"]) == (
            [-1.0],
            "unknown",
            "global",
        )
    with (
        Client(url, "nobody") as caller,
        pytest.raises(ForbiddenError, match="credential of a client"),
    ):
        caller.predict(ROW, personal=True)


def test_to_name_somebody_else_is_answered_like_a_name_that_nobody_has(endpoint):
    import httpx

    def ask(client):
        body = {
            "inputs": [
                {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [0, 0, 0, 0]}
            ],
            "parameters": {"client": client},
        }
        headers = {"authorization": "Bearer token-of-c-0"}
        return httpx.post(f"{endpoint.url}/v2/models/m/infer", json=body, headers=headers)

    others = [ask("c-1"), ask("c-unheard-of"), ask(HEADLESS), ask(7)]
    assert {(reply.status_code, reply.text) for reply in others} == {(404, others[0].text)}
    own = ask("c-0")
    assert own.status_code == 200 and own.json()["parameters"]["head"] == "own"
