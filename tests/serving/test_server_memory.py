"""Memory of a server: room is kept before a byte is read, and what can never fit is refused
unread."""

import gc
import os
import subprocess
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import flserving
from experiment_models import ROW, published, server_of
from flserving import ModelServer, Registry, ServingConfig, models
from flserving.errors import ModelTooLargeError
from flserving.optimize.methods import quantise
from flserving.registry.heads import HeadSet
from flserving.serving import repository
from flserving.serving.loader import load_engine
from serving_models import PATIENCE_S

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("kind", ["mlp", "small", "heads", "onnx", "local"])
def test_the_size_of_a_version_is_known_before_it_is_read(tmp_path, kind):
    """What the cache reserves is what the loaded engine holds, to the byte."""
    with Registry(tmp_path) as registry:
        sizes = [8, 8, 3] if kind == "small" else [8, 300, 300, 3]
        model, heads = models.build("mlp", {"sizes": sizes}), None
        if kind == "heads":
            state = {name: t for name, t in model.state_dict().items() if name.startswith("head.")}
            heads = HeadSet.from_states({f"client-{i}": state for i in range(50)})
        registry.publish("m", model, architecture="mlp", parameters={"sizes": sizes}, heads=heads)
        version = str(quantise(registry, "m", 1).version) if kind == "onnx" else "1"
        with ModelServer(ServingConfig(head_cache_bytes=40_000), registry) as server:
            if kind == "local":
                server.load_model(
                    "1", nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)), num_features=8
                )
            key = ("local" if kind == "local" else "m", version)
            with server._pinned(key) as engine:
                assert server._size(key) == engine.nbytes == server.model_cache.nbytes


def test_a_version_over_cache_bytes_is_refused_unread_at_every_request(tmp_path, monkeypatch):
    with Registry(tmp_path) as registry:
        for sizes in ([8, 3], [8, 1000, 3]):
            registry.publish(
                "m",
                models.build("mlp", {"sizes": sizes}),
                architecture="mlp",
                parameters={"sizes": sizes},
            )
        registry.set_alias("m", "default", 1, who="test", why="test")
        with ModelServer(ServingConfig(cache_bytes=20_000), registry) as server:
            server.predict(np.zeros(8))
            monkeypatch.setattr(
                Registry, "read", lambda *_: pytest.fail("a byte of the weights was read")
            )
            needs = 4 * (8 * 1000 + 1000 + 1000 * 3 + 3)
            for _ in range(3):
                with pytest.raises(
                    ModelTooLargeError, match=f"needs {needs:,} B of 20,000 B in all"
                ) as refused:
                    server.predict(np.zeros(8), 2)
            assert refused.value.http_status == 503
            assert server.predict(np.zeros(8))["model_version"] == "1", "nothing left for it"


def test_cold_versions_asked_at_once_stay_within_the_budget(tmp_path, monkeypatch):
    """Twenty-four cold versions, room for three: never are there more engines than fit, those being
    built included."""
    alive, most, lock = weakref.WeakSet(), [], threading.Lock()

    def built(*arguments):
        with lock:
            most.append(len(alive))  # beside the one that begins now
        engine = load_engine(*arguments)
        alive.add(engine)
        return engine

    sizes = [8, 64, 3]
    with Registry(tmp_path) as registry:
        for _ in range(24):
            registry.publish(
                "m",
                models.build("mlp", {"sizes": sizes}),
                architecture="mlp",
                parameters={"sizes": sizes},
            )
        nbytes = 4 * (8 * 64 + 64 + 64 * 3 + 3)
        monkeypatch.setattr(repository, "load_engine", built)
        config = ServingConfig(cache_size=100, cache_bytes=3 * nbytes, timeout_ms=PATIENCE_S * 1e3)
        with ModelServer(config, registry) as server, ThreadPoolExecutor(24) as callers:
            answers = list(
                callers.map(lambda version: server.predict(np.zeros(8), version), range(1, 25))
            )
            assert [answer["model_version"] for answer in answers] == [
                str(version) for version in range(1, 25)
            ]
            assert max(most) <= 2 and server.model_cache.nbytes <= 3 * nbytes


def test_a_promotion_keeps_nothing_of_the_version_before(tmp_path):
    """But its digest, as one that was found sound: of those 4,096 are kept."""
    versions, warm, most = 120, 60, 4000  # bytes a promotion; its engine takes more

    def promote(numbers):
        for number in numbers:
            registry.set_alias("m", "default", number, who="test", why="the next round")
            assert server.predict(ROW)["predictions"] == [number]
        server.get_all_stats()  # folds what is counted
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with published(tmp_path, versions) as registry, server_of(registry) as server:
        tracemalloc.start()
        try:
            before = promote(range(2, warm + 1))
            kept = (promote(range(warm + 1, versions + 1)) - before) / (versions - warm)
        finally:
            tracemalloc.stop()
    assert kept < most, kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.full
def test_a_child_that_a_busy_parent_forks_answers(tmp_path):
    """With none of its parent's threads, and whatever locks they held: at once, or with an error
    that says why."""
    program = Path(__file__).parents[1] / "support" / "busy_fork.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(flserving.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(program), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
