"""A registry in another process: pickle carries its folder and settings; what cannot be carried
says what to do."""

import copy
import multiprocessing
import pickle
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from flserving import ModelServer, Registry, ServingConfig, models
from flserving.errors import ConfigError, NotSupportedError, ServerClosedError

X = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
PATIENCE_S = 300.0
START = ["spawn", *(["fork", "forkserver"] if sys.platform == "linux" else [])]


def noon() -> datetime:
    return datetime(2026, 1, 1, 12, tzinfo=UTC)


class Named(Registry):
    """Somebody's own."""


@pytest.fixture
def registry(tmp_path):
    with Registry(
        tmp_path / "models", max_artifact_bytes=1 << 20, busy_timeout_s=7.5, now=noon
    ) as registry:
        torch.manual_seed(0)
        registry.publish(
            "digits", models.build("digits_mlp"), architecture="digits_mlp", alias="default"
        )
        yield registry


def worker(asked, answers):
    """What a program's own worker process does: open a server of its own, answer, publish."""
    registry, config = asked.get(timeout=PATIENCE_S)
    with registry, ModelServer(config, registry=registry, model="digits") as server:
        predictions = server.predict(X)["predictions"]
        registry.set_alias("digits", "canary", 1, who="worker", why="from elsewhere")
    answers.put((predictions, registry.max_artifact_bytes))


@pytest.mark.parametrize("how", START)
# fork, Python 3.12
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_gets_the_registry_through_a_queue_and_serves_it(registry, how):
    context = multiprocessing.get_context(how)
    asked, answers = context.Queue(), context.Queue()
    process = context.Process(target=worker, args=(asked, answers))
    with ModelServer(registry=registry, model="digits") as server:
        expected = server.predict(X)["predictions"]
        process.start()
        try:
            asked.put((registry, ServingConfig(max_batch_size=8)))
            assert answers.get(timeout=PATIENCE_S) == (expected, 1 << 20)
            process.join(PATIENCE_S)
            assert process.exitcode == 0
        finally:
            process.kill()
            process.join()
    assert registry.resolve("digits", "canary") == 1


@pytest.mark.parametrize(
    "again", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy]
)
def test_a_copy_is_a_registry_of_the_same_folder_and_settings(registry, again):
    registry.close()
    with again(registry) as other:
        assert (other.root, other.max_artifact_bytes, other._timeout_s) == (
            registry.root,
            1 << 20,
            7.5,
        )
        other.set_alias("digits", "canary", 1, who="me", why="try")
        assert str(other.history("digits").iloc[-1]["when"]).startswith("2026-01-01 12:00")
    with pytest.raises(ServerClosedError):
        registry.read("digits", 1)


def test_a_plain_registry_and_a_subclass_are_carried_too(tmp_path):
    with Registry(tmp_path) as plain, Named(tmp_path) as named:
        for registry in (plain, named):
            with pickle.loads(pickle.dumps(registry)) as other:
                assert type(other) is type(registry) and other.root == registry.root


def test_a_folder_that_is_not_to_be_had_there_is_named(registry, tmp_path):
    data = pickle.dumps(registry)
    registry.close()
    (tmp_path / "models").rename(tmp_path / "gone")
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ConfigError, match="models' cannot hold a registry"):
        pickle.loads(data)


@pytest.mark.parametrize("again", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_server_says_how_to_make_one_there(registry, again):
    with ModelServer(registry=registry) as server:
        with pytest.raises(
            NotSupportedError,
            match=r"a ModelServer cannot leave its process: make one in the other",
        ):
            again(server)
        with pytest.raises(NotSupportedError, match=rf"Registry\('{registry.root}'\)"):
            again(server)
        assert pickle.loads(pickle.dumps(server.config)) == server.config
    with (
        ModelServer() as server,
        pytest.raises(NotSupportedError, match="of its config and the same models"),
    ):
        again(server)
