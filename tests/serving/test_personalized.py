"""Personal models through the one path: the right head for each row, stated fallbacks, one unit
with the body."""

import threading
import tracemalloc

import numpy as np
import pytest
import torch

from flserving import Registry, ServingConfig, models
from flserving.errors import InvalidInputError, NotFoundError
from flserving.federated import training
from flserving.federated.rounds import publish_rounds
from flserving.models.processing import Preprocessor
from flserving.registry.heads import HeadSet
from flserving.serving.personalized import PersonalizedServer
from serving_models import Threads

WARM = ServingConfig(warmup_samples=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Clients whose labels mean something else at each: only its own head can be right."""
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        run = training.train(
            "fedper", num_clients=8, rounds=3, alpha=1.0, permute_labels=True, progress=False,
            on_round=publish_rounds(registry, "digits", alias="default"),
        )  # fmt: skip
        yield registry, run


@pytest.fixture(scope="module")
def server(trained):
    with PersonalizedServer(WARM, trained[0]) as server:
        server.load_model("bare", trained[1].final.model())
        yield server


def by_hand(run, client, rows):
    """What the round's own module of this client says: the oracle."""
    x = Preprocessor(**run.final.preprocessing)(rows)
    with torch.no_grad():
        return torch.softmax(run.final.model(client)(x), dim=1).numpy()


def test_each_client_is_answered_by_the_model_that_was_trained_with_it(trained, server):
    run = trained[1]
    rows = run.clients[0].test_x[:5]
    for client in run.clients:
        answer = server.predict(client.id, rows, arrays=True)
        np.testing.assert_allclose(
            answer["probabilities"], by_hand(run, client.id, rows), atol=1e-5
        )
        assert (answer["head"], answer["model_type"], answer["model_version"]) == (
            "own",
            "personal",
            "3",
        )


def test_rows_of_many_clients_share_a_batch_and_none_gets_anothers_head(trained, server):
    run, rng = trained[1], np.random.default_rng(0)
    chosen = [run.clients[i] for i in rng.integers(0, len(run.clients), 40)]
    batch = [(client.id, client.test_x[0]) for client in chosen] + [("nobody", chosen[0].test_x[0])]
    answers = server.batch_predict(batch)
    for (client, row), answer in zip(batch[:-1], answers, strict=False):
        assert (answer["head"], answer["model_type"]) == ("own", "personal")
        np.testing.assert_allclose(
            answer["probabilities"], by_hand(run, client, row[None]), atol=1e-5
        )
    assert (answers[-1]["head"], answers[-1]["model_type"]) == ("unknown", "global")
    np.testing.assert_allclose(
        answers[-1]["probabilities"], by_hand(run, None, batch[-1][1][None]), atol=1e-5
    )
    mixed = server.predict([client for client, _ in batch], np.stack([row for _, row in batch]))
    assert mixed["model_type"] == "mixed" and mixed["head"] == ["own"] * 40 + ["unknown"]


def test_an_unknown_client_gets_the_global_answer_bit_for_bit(trained, server):
    rows = trained[1].clients[0].test_x[:3]
    answer = server.predict("nobody", rows, arrays=True)
    shared = super(PersonalizedServer, server).predict(rows, arrays=True)
    assert (answer["head"], answer["model_type"]) == ("unknown", "global") and "head" not in shared
    assert (answer["probabilities"] == shared["probabilities"]).all()


def test_unknown_clients_can_be_refused_and_the_refusal_is_counted(trained):
    registry, run = trained
    row = run.clients[0].test_x[0]
    with PersonalizedServer(
        ServingConfig(warmup_samples=1, unknown_client="refuse"), registry
    ) as server:
        with pytest.raises(NotFoundError, match="no personal head here for this client"):
            server.predict("nobody", row)
        with pytest.raises(NotFoundError, match="no personal head"):
            server.predict([run.clients[0].id, "nobody"], np.stack([row, row]))
        assert server.predict(run.clients[0].id, row)["head"] == "own"
        assert server.get_all_stats()["server"]["failed_by_reason"] == {"NotFound": 2}


def test_accuracy_of_every_version_is_measured_by_asking_it(trained, server):
    run = trained[1]
    table = server.accuracy(run.clients)
    assert list(table.index) == ["1", "2", "3"] and (table["own_heads"] == len(run.clients)).all()
    for version, trained_round in zip(table.index, run.rounds, strict=True):
        measured = table.loc[version]
        for name, value in trained_round.metrics.items():
            assert measured[name] == pytest.approx(value, abs=1e-9), (version, name)
        assert (
            trained_round.client_accuracy[measured["worst_client"]]
            == measured["worst_client_accuracy"]
        )
    with pytest.raises(NotFoundError, match="no model 'other'"):
        server.accuracy(run.clients, model="other")
    with pytest.raises(InvalidInputError, match="no clients"):
        server.accuracy([])
    assert table.loc["3", "mean_client_accuracy"] > table.loc["3", "global_accuracy"] + 0.2


@pytest.mark.parametrize(
    "clients",
    [["a"], ["a", "b", "c"], [], ["a", 7], 7, [None, None], None, ("a", b"b"), b"ab", {"a", "b"}],
    ids=range(10),
)
@pytest.mark.parametrize("version", ["3", "bare"])
def test_ids_that_are_none_are_refused(trained, server, clients, version):
    """Also by a version without heads."""
    options = {"version": version, "model": "local" if version == "bare" else "digits"}
    with pytest.raises(InvalidInputError, match="give one id, or one for each row"):
        server.predict(clients, trained[1].clients[0].test_x[:2], **options)


@pytest.mark.parametrize(
    "batch", [[], 3, [("a",)], [("a", "text")], [("a", ["1"] * 64)], [("a", [1e300] * 64)],
              [("a", [1.0]), ("b", [1.0, 2.0])], [3]],
    ids=["empty", "no list", "no row", "text", "texts", "beyond float32", "ragged", "number"],
)  # fmt: skip
def test_batches_that_are_none_are_refused_and_counted(server, batch):
    def count():
        return server.get_all_stats()["server"]["failed_by_reason"].get("InvalidInput", 0)

    before = count()
    with pytest.raises(InvalidInputError, match="batch"):
        server.batch_predict(batch)
    assert count() == before + 1


def test_in_a_batch_of_arrays_each_client_gets_its_own_rows_only(trained, server):
    batch = [(client.id, client.test_x[0]) for client in trained[1].clients]
    for lists, arrays in zip(
        server.batch_predict(batch), server.batch_predict(batch, arrays=True), strict=True
    ):
        assert all(
            arrays[name].tolist() == lists[name]
            for name in ("predictions", "confidences", "probabilities")
        )


def test_rows_of_the_personal_lane_count_as_the_engines(trained):
    with PersonalizedServer(WARM, trained[0]) as server:
        client = trained[1].clients[0]
        server.predict(client.id, client.test_x[:3]), server.predict("nobody", client.test_x[:2])
        stats = server.get_all_stats()
        assert (
            sum(engine["rows"] for engine in stats["engines"].values())
            == stats["server"]["rows"]
            == 5
        )


def test_cached_predictions_are_private_to_the_client(trained):
    registry, run = trained
    config = ServingConfig(warmup_samples=1, prediction_cache_bytes=1 << 20)
    row = run.clients[0].test_x[0]
    with PersonalizedServer(config, registry) as server:
        first = {
            client.id: server.predict(client.id, row)["probabilities"] for client in run.clients
        }
        server.predict("nobody", row), server.predict("somebody", row)
        assert server.prediction_cache.stats()["hits"] == 0, (
            "the same row, another client: nothing is shared"
        )
        for client in run.clients:
            assert server.predict(client.id, row)["probabilities"] == first[client.id]
        assert server.prediction_cache.stats()["hits"] == len(run.clients)


def test_ids_that_change_meanwhile_put_nothing_into_anothers_cache(trained, monkeypatch):
    config = ServingConfig(warmup_samples=1, prediction_cache_bytes=1 << 20)
    mine, other = (client.id for client in trained[1].clients[:2])
    rows, asked = trained[1].clients[0].test_x[:1], [mine]
    with PersonalizedServer(config, trained[0]) as server:
        expected = server.predict(other, rows)["probabilities"]
        with server.lease() as engine, monkeypatch.context() as patch:
            choose = engine.personal.choose

            def then_change(*arguments):
                chosen = choose(*arguments)
                asked[0] = other
                return chosen

            patch.setattr(engine.personal, "choose", then_change)
            server.predict(asked, rows)
            del engine
        assert server.predict([other], rows)["probabilities"] == expected


def test_long_ids_take_no_more_memory_than_the_cache_may(trained):
    config = ServingConfig(warmup_samples=1, prediction_cache_bytes=1 << 20)
    with PersonalizedServer(config, trained[0]) as server:
        row = trained[1].clients[0].test_x[0]
        server.predict("nobody", row)
        tracemalloc.start()
        try:
            for number in range(40):
                server.predict(f"{number:03}" * 50_000, row)
            assert tracemalloc.get_traced_memory()[0] < 1 << 20
        finally:
            tracemalloc.stop()


# Body and heads as one unit

CLIENTS = ["a", "b"]


def constant(registry, value, **options):
    """Publish a version whose body says ``value`` and whose heads add 100 for a, 200 for b, nothing
    for all others."""
    model = models.build("mlp", {"sizes": [1, 1, 1]})
    state = model.state_dict()
    for name in state:
        state[name].zero_()
    state["body.0.bias"].fill_(value), state["head.weight"].fill_(1.0)
    weights = np.array([[[1.0], [100.0]], [[1.0], [200.0]]], np.float32)
    return registry.publish(
        "m", state, architecture="mlp", parameters={"sizes": [1, 1, 1]}, output_type="regression",
        heads=HeadSet("head", CLIENTS, weights, **options), alias="default",
    )  # fmt: skip


def test_a_head_of_another_body_falls_back_and_the_answer_says_so(tmp_path):
    with Registry(tmp_path) as registry:
        old = constant(registry, 1.0)
        constant(
            registry, 2.0, trained_on=[old.digests.body, registry.manifest("m", 1).digests.body]
        )
        with PersonalizedServer(WARM, registry) as server:
            for version, prediction, head in (("1", 101.0, "own"), ("2", 2.0, "stale")):
                answer = server.predict("a", [0.0], version)
                assert (answer["predictions"], answer["head"]) == ([prediction], head)
            assert server.predict(["a", "b"], [[0.0], [0.0]], "2")["model_type"] == "global"


def test_body_and_heads_change_together_under_load(tmp_path):
    """0 answers that mix versions: whatever is read, the body's value and the head's sum belong to
    one version."""
    with Registry(tmp_path) as registry:
        for value in (1.0, 2.0, 3.0):
            constant(registry, value)
        with PersonalizedServer(ServingConfig(warmup_samples=1, num_workers=2), registry) as server:
            stop, seen = threading.Event(), set()

            def ask(client, extra):
                while not stop.is_set():
                    answer = server.predict(client, [0.0])
                    assert answer["predictions"] == [float(answer["model_version"]) + extra]
                    assert answer["head"] == ("own" if extra else "unknown")
                    seen.add(answer["model_version"])

            threads = Threads()
            for client, extra in (("a", 100), ("b", 200), ("c", 0)) * 2:
                threads.start(ask, client, extra)
            for turn in range(60):
                registry.set_alias("m", "default", turn % 3 + 1, who="test", why="swap under load")
                server.refresh()
            stop.set()
            threads.results()
            assert seen == {"1", "2", "3"}


# What operators see


def series(server):
    from flserving.monitoring.prometheus import exposition

    lines = exposition(server)[0].decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if not line.startswith("#")
    }


def test_metrics_tell_the_heads_found_and_the_worst_client_and_no_client_can_add_a_series(trained):
    registry, run = trained
    with PersonalizedServer(WARM, registry) as server:
        server.predict(run.clients[0].id, run.clients[0].test_x[:3])
        server.predict("nobody", run.clients[0].test_x[0])
        before = series(server)
        assert before['flserving_head_rows_total{head="own"}'] == 3
        assert before['flserving_head_rows_total{head="unknown"}'] == 1
        worst = before['flserving_model_accuracy{model="digits",of="worst_client",version="3"}']
        assert worst == run.final.metrics["worst_client_accuracy"]
        assert server.get_all_stats()["server"]["rows_by_head"] == {"own": 3, "unknown": 1}
        rows = np.repeat(run.clients[0].test_x[:1], 10_000, axis=0)
        for turn in range(10):
            server.predict([f"random-{turn}-{i}" for i in range(10_000)], rows, arrays=True)
        after = series(server)
        assert (
            after['flserving_head_rows_total{head="unknown"}'] == 100_001
            and after.keys() == before.keys()
        )
