"""The routes: alone over a fake registry, and in a server over a real one that other processes
change too."""

import asyncio
import itertools
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from flserving import ModelServer, Registry, ServingConfig, models
from flserving.errors import (
    ConflictError,
    CorruptArtifactError,
    DeadlineExceededError,
    FlservingError,
    InvalidModelError,
    ModelUnloadedError,
    NotFoundError,
)
from flserving.registry.experiment import Experiment, TrafficSplit
from flserving.serving import router as routing
from flserving.serving.router import Router
from serving_models import PATIENCE_S, Constant, Threads, collected, row, serving, wait_until

pytestmark = pytest.mark.timeout(90)


class FakeRegistry:
    """One model's versions and aliases, and what goes wrong with reading them."""

    def __init__(self, versions=2, **aliases):
        self.numbers, self.moved, self.local_changes, self.token = (
            list(range(1, versions + 1)),
            aliases,
            0,
            0,
        )
        self.error, self.reads, self.running = None, 0, {}
        # what happens once, between the answer to change_token and its reader
        self.after_token = lambda: None

    def change_token(self):
        if self.error:
            raise self.error
        token = self.token
        self.after_token()
        self.after_token = lambda: None
        return token

    def models_by_promotion(self):
        return ["digits"]

    def version_numbers(self, name):
        self.reads += 1
        return list(self.numbers)

    def experiments(self, name):
        return dict(self.running)

    def unread_experiments(self, name):
        return {}

    def aliases(self, name):
        return dict(self.moved)

    def change(self, here=True, version=None, **aliases):
        """Publish a version or move aliases, in this process or in another one."""
        self.numbers += [version] if version else []
        self.moved |= aliases
        self.moved = {alias: number for alias, number in self.moved.items() if number is not None}
        self.token += 1
        self.local_changes += here


class FakeLoads:
    """Stands for the server's preload: which versions were loaded, and which fail."""

    def __init__(self):
        self.loaded, self.broken = [], {}

    def __call__(self, key):
        self.loaded.append(key)
        if key in self.broken:
            raise self.broken[key]


@pytest.fixture
def loads():
    return FakeLoads()


@pytest.fixture
def quiet(monkeypatch):
    """No look by the watcher: what is seen was seen by :meth:`refresh`."""
    monkeypatch.setattr(Router, "WATCH_S", 3600)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(Router, "WATCH_S", 0.01)


@pytest.fixture
def router(loads):
    router = Router(loads)
    yield router
    router.close()


def followed(router, **registries):
    for name, registry in registries.items():
        router.follow(registry, name)
    return router


def answer(router, version=None, model=None):
    """Which version answers, found as a request finds it."""
    key = router.find(version, model)
    if key is None:
        router.refresh()
        key = router.require(version, model)
    return key


# Without a registry


def test_an_empty_router_knows_nothing(router):
    assert router.find(None, None) is None
    with pytest.raises(NotFoundError, match="no model is served: call load_model or serve first"):
        router.require(None, None)
    with pytest.raises(NotFoundError, match="no model 'digits': served are none"):
        router.require(None, "digits")


def test_versions_and_aliases_of_several_models(router, loads):
    for key in [("a", "v1"), ("a", "v2"), ("b", "v1"), ("a", "v2")]:
        router.add(key)
    assert {name: one.versions for name, one in router.routes.models.items()} == {
        "a": ("v1", "v2"),
        "b": ("v1",),
    }
    assert router.find("v2", None) == ("a", "v2"), "the first model answers who names none"
    assert router.find("v1", "b") == ("b", "v1")
    assert router.find(None, None) is None and not loads.loaded
    router.set_alias(("a", "v2"))
    router.set_alias(("b", "v1"), "canary")
    router.set_alias(("a", "default"), "champion")  # an alias may be given by an alias
    assert loads.loaded == [("a", "v2"), ("b", "v1"), ("a", "v2")]
    assert [router.find(None, None), router.find("champion", "a"), router.find("canary", "b")] == [
        ("a", "v2"), ("a", "v2"), ("b", "v1"),
    ]  # fmt: skip
    router.set_alias(("a", "v1"))
    assert [router.find("default", "a"), router.find("champion", "a")] == [("a", "v1"), ("a", "v2")]


@pytest.mark.parametrize(
    ("version", "model", "message"),
    [
        (
            "v9",
            None,
            "model 'a' has no version or alias 'v9': it has versions v1, v2, aliases default",
        ),
        ("canary", "a", "no version or alias 'canary'"),
        (9, None, "no version or alias '9'"),
        (True, None, "no version or alias 'True'"),
        (["v1"], None, "no version or alias"),
        ("v1", "z", "no model 'z': served are a"),
        ("v1", ["a"], "no model"),
        ("v1", "", "no model ''"),
        ("", None, "no version or alias ''"),
        ("v1", {"a": 1}, "no model"),
    ],
)
def test_what_is_unknown_is_named_beside_what_exists(router, version, model, message):
    for name in ("v1", "v2"):
        router.add(("a", name))
    router.set_alias(("a", "v1"))
    assert router.find(version, model) is None
    with pytest.raises(NotFoundError) as raised:
        router.require(version, model)
    assert message in str(raised.value)


def test_a_message_stays_short(router):
    for number in range(500):
        router.add(("a", f"version-{number}"))
    for version, model in [("x" * 100_000, None), (None, "x" * 100_000)]:
        with pytest.raises(NotFoundError) as raised:
            router.require(version, model)
        assert len(str(raised.value)) < 400


def test_a_version_that_cannot_be_loaded_does_not_become_an_alias(router, loads):
    for name in ("v1", "v2"):
        router.add(("a", name))
    router.set_alias(("a", "v1"))
    loads.broken[("a", "v2")] = CorruptArtifactError("broken")
    with pytest.raises(CorruptArtifactError):
        router.set_alias(("a", "v2"))
    with pytest.raises(NotFoundError, match="'v3'"):
        router.set_alias(("a", "v3"))
    assert router.find(None, None) == ("a", "v1")


def test_readers_see_the_old_table_or_the_new_one(router):
    """Four threads read while versions and aliases change: what a reader finds in one table is
    always consistent."""
    router.add(("a", "v0"))
    router.set_alias(("a", "v0"))
    done = threading.Event()

    def read():
        while not done.is_set():
            routes = router.routes
            assert routes.targets[("a", "default")][1] == routes.of("a").aliases["default"]
            assert routes.of("a").aliases["default"] in routes.of("a").versions
            assert router.find(None, None) is not None

    readers = Threads()
    for _ in range(4):
        readers.start(read)
    for number in range(100):
        router.add(("a", f"v{number}"))
        router.set_alias(("a", f"v{number}"))
    done.set()
    readers.results()
    assert len(router.routes.of("a").versions) == 100


# Following a registry


def test_follows_versions_and_aliases(router, loads, quiet):
    registry = FakeRegistry(3, default=2, canary=3)
    followed(router, digits=registry)
    assert router.followed("digits") is registry and router.followed("letters") is None
    assert router._watcher.daemon, "a program that forgets its server still ends"
    assert answer(router) == ("digits", "2") and answer(router, "canary") == ("digits", "3")
    assert answer(router, 1) == answer(router, "1", "digits") == ("digits", "1")
    assert loads.loaded == [("digits", "2")], "only who takes over by default is loaded ahead"
    with pytest.raises(NotFoundError, match="versions 1, 2, 3, aliases default, canary"):
        answer(router, "4")


def test_changes_of_this_process_are_seen_by_the_next_request(router, loads, quiet):
    registry = FakeRegistry(2, default=1)
    followed(router, digits=registry)
    for number in [2, 1, 2]:
        registry.change(default=number)
        assert answer(router) == ("digits", str(number))
    loaded = len(loads.loaded)
    registry.change(version=3, canary=1)
    assert answer(router, 3) == ("digits", "3") and answer(router) == ("digits", "2")
    assert len(loads.loaded) == loaded, "a default that stays is not loaded again"
    reads = registry.reads
    for _ in range(10):
        assert router.find(None, None) == ("digits", "2")
    assert registry.reads == reads, "nothing changed, nothing is read"


def test_changes_of_another_process_are_seen_by_a_look(router, quiet):
    registry = FakeRegistry(2, default=1)
    followed(router, digits=registry)
    registry.change(here=False, default=2, version=3)
    assert answer(router) == ("digits", "1"), "nothing in this process tells of it"
    assert answer(router, 3) == ("digits", "3"), "an unknown version is worth a look"
    assert answer(router) == ("digits", "2")


def test_the_watcher_sees_changes_of_other_processes(router, quick):
    registry = FakeRegistry(2, default=1)
    followed(router, digits=registry)
    for number in [2, 1, 2]:
        registry.change(here=False, default=number)
        wait_until(
            lambda number=number: router.find(None, None) == ("digits", str(number)),
            "the watcher's look",
        )


def test_a_removed_alias_leads_nowhere(router, quiet):
    registry = FakeRegistry(2, default=1, canary=2)
    followed(router, digits=registry)
    registry.change(canary=None)
    with pytest.raises(NotFoundError, match=r"'canary'.*aliases default"):
        answer(router, "canary")
    registry.change(default=None)
    with pytest.raises(NotFoundError, match=r"'default'.*aliases none"):
        answer(router)
    registry.change(default=2)
    assert answer(router) == ("digits", "2")


@pytest.mark.parametrize(
    "error", [CorruptArtifactError("flipped byte"), RuntimeError("out of memory")]
)
def test_a_version_that_cannot_be_loaded_does_not_take_over(router, loads, quiet, error):
    registry = FakeRegistry(3, default=1)
    followed(router, digits=registry)
    loads.broken[("digits", "2")] = error
    registry.change(default=2, canary=3)
    assert answer(router) == ("digits", "1"), "what answered before goes on"
    assert answer(router, "canary") == ("digits", "3"), "other aliases move"
    assert answer(router, 2) == ("digits", "2"), "who asks for it by number gets its own error"
    assert router.problems == {"digits/default": f"version 2 does not answer: {error}"}
    tries = len(loads.loaded)
    for _ in range(20):
        with pytest.raises(NotFoundError):
            answer(router, "unknown")  # looks at the registry
        assert answer(router) == ("digits", "1")
    assert len(loads.loaded) == tries, "no request pays for trying it again"
    del loads.broken[("digits", "2")]
    router.refresh(retry=True)
    assert answer(router) == ("digits", "2") and not router.problems
    router.refresh(retry=True)
    assert len(loads.loaded) == tries + 1, "what leads there already is not loaded again"


def test_a_first_default_that_cannot_be_loaded_is_told_to_whoever_asks_for_it(router, loads, quiet):
    loads.broken[("digits", "1")] = CorruptArtifactError("flipped byte")
    followed(router, digits=FakeRegistry(1, default=1))
    with pytest.raises(
        NotFoundError, match=r"'default' \(version 1 does not answer: flipped byte\): it has"
    ):
        answer(router)


def test_the_watcher_tries_again_what_could_not_be_loaded(router, loads, quick):
    registry = FakeRegistry(2, default=1)
    followed(router, digits=registry)
    loads.broken[("digits", "2")] = CorruptArtifactError("flipped byte")
    registry.change(here=False, default=2)
    wait_until(lambda: loads.loaded.count(("digits", "2")) >= 3, "two more tries")
    assert answer(router) == ("digits", "1") and router.problems
    del loads.broken[("digits", "2")]
    wait_until(lambda: router.find(None, None) == ("digits", "2"), "the take-over")
    wait_until(lambda: not router.problems)


def test_a_problem_ends_with_the_next_good_version(router, loads, quiet):
    registry = FakeRegistry(3, default=1)
    followed(router, digits=registry)
    loads.broken[("digits", "2")] = CorruptArtifactError("flipped byte")
    registry.change(default=2)
    assert answer(router) == ("digits", "1") and router.problems
    registry.change(default=3)
    assert answer(router) == ("digits", "3") and not router.problems


def test_a_change_during_a_look_is_not_taken_for_one_that_was_seen(router, quiet):
    """An alias moves after the registry was asked for its token, before its models are gone
    through."""
    registry = FakeRegistry(2, default=1)
    router.follow_all(registry, lambda name: router.follow(registry, name))
    router.refresh()
    registry.after_token = lambda: registry.change(default=2)
    router.refresh()
    assert answer(router) == ("digits", "2")


def test_a_look_between_two_steps_of_a_reader_does_not_hide_the_change(router, quiet):
    """A reader looks up what is followed, then the routes; another thread's look comes just before,
    and replaces both.

    The other order of the reader finds the old routes, and that nothing has changed since the
    registry was read.
    """
    registry = FakeRegistry(2, default=1)
    followed(router, digits=registry)
    registry.change(default=2)

    class LookedAtFirst(dict):
        def get(self, name):
            router._followed = dict(self)
            router.refresh()
            return router._followed.get(name)

    router._followed = LookedAtFirst(router._followed)
    assert router.find(None, None) == ("digits", "2")


def test_a_registry_that_cannot_be_read_leaves_its_routes_and_the_others(router, quick):
    broken, sound = FakeRegistry(2, default=1), FakeRegistry(2, default=1)
    followed(router, broken=broken, sound=sound)
    broken.error = OSError("disk gone")
    broken.local_changes += 1  # requests look again each time, and still get an answer
    sound.change(default=2)
    assert answer(router, None, "broken") == ("broken", "1")
    assert answer(router, None, "sound") == ("sound", "2")
    assert router.problems == {"broken/registry": "OSError: disk gone"}
    with pytest.raises(NotFoundError):
        answer(router, "7", "broken")
    sound.change(here=False, default=1)
    wait_until(
        lambda: router.routes.of("sound").aliases["default"] == "1", "the watcher, which goes on"
    )
    broken.error = None
    broken.change(default=2)
    assert answer(router, None, "broken") == ("broken", "2")
    wait_until(lambda: not router.problems)


def test_aliases_of_a_registry_are_moved_in_the_registry(router, quiet):
    followed(router, digits=FakeRegistry(2, default=1))
    with pytest.raises(ConflictError, match=r"registry\.set_alias\('digits', 'default', '2'"):
        router.set_alias(("digits", "2"))
    with pytest.raises(NotFoundError, match="no version of 'empty': publish one first"):
        router.follow(FakeRegistry(0), "empty")
    assert router.routes.models.keys() == {"digits"}


def test_requests_go_on_while_another_registry_is_added(router, quiet):
    followed(router, first=FakeRegistry(1, default=1))
    done = threading.Event()

    def read():
        while not done.is_set():
            assert router.find(None, "first") == ("first", "1")

    readers = Threads()
    for _ in range(4):
        readers.start(read)
    for number in range(300):
        router.follow(FakeRegistry(1, default=1), f"m{number}")
    done.set()
    readers.results()


def test_who_waits_for_a_long_change_is_told_its_deadline(router, quiet):
    loading, finish = threading.Event(), threading.Event()

    def preload(key):
        loading.set()
        assert finish.wait(PATIENCE_S)

    router._preload = preload
    router.add(("a", "v1"))
    changing = Threads()
    changing.start(router.set_alias, ("a", "v1"))
    assert loading.wait(PATIENCE_S)
    with pytest.raises(DeadlineExceededError, match="timeout_ms"):
        router.refresh(wait_s=0.02)
    finish.set()
    changing.results()
    router.refresh(wait_s=0.02)


def test_close_ends_the_watcher_and_can_be_repeated(router, quiet):
    followed(router, digits=FakeRegistry(1, default=1))
    watcher = router._watcher
    assert watcher.is_alive()
    router.close()
    router.close()
    assert not watcher.is_alive()


def test_a_forgotten_router_is_collected_and_its_watcher_ends(quick):
    router = followed(Router(FakeLoads()), digits=FakeRegistry(1, default=1))
    forgotten, watcher = weakref.ref(router), router._watcher
    del router
    wait_until(lambda: collected(forgotten), "its collection")
    watcher.join(PATIENCE_S)
    assert not watcher.is_alive()


# In a server, over a real registry


def constant(label):
    """The tutorial's model with weights that answer ``label`` to every row."""
    module = models.build("tutorial_mlp")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        list(module.parameters())[-1][label] = 10.0
    return module


X = np.ones((1, 32), np.float32)


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def published(registry):
    """Version k answers label k; the default is version 1."""
    for label in (1, 2, 3):
        registry.publish(
            "digits",
            constant(label),
            architecture="tutorial_mlp",
            alias="default" if label == 1 else None,
        )
    return registry


@pytest.fixture
def server(published):
    with ModelServer(
        ServingConfig(warmup_samples=1, timeout_ms=PATIENCE_S * 1e3), published
    ) as server:
        yield server


def said(server, version=None):
    answer = server.predict(X, version)
    assert answer["predictions"] == [int(answer["model_version"])], (
        "the version in the answer is the one that answered"
    )
    return answer["predictions"][0]


def move(registry, version, alias="default"):
    registry.set_alias("digits", alias, version, who="test", why="test")


def test_a_promotion_is_seen_by_the_next_request(server, published, quiet):
    assert said(server) == 1
    for label in [2, 3, 1, 2]:
        move(published, label)
        assert said(server) == label
        assert asyncio.run(server.apredict(X))["predictions"] == [label]
    published.rollback("digits", who="test", why="test")
    assert said(server) == 1
    published.publish("digits", constant(4), architecture="tutorial_mlp", alias="canary")
    assert (said(server), said(server, "canary"), said(server, 4), said(server, "2")) == (
        1,
        4,
        4,
        2,
    )
    published.remove_alias("digits", "canary", who="test", why="test")
    for ask in (
        lambda: server.predict(X, "canary"),
        lambda: asyncio.run(server.apredict(X, "canary")),
    ):
        with pytest.raises(NotFoundError, match=r"'canary'.*aliases default"):
            ask()


def test_a_promotion_by_another_process_is_seen_by_the_watcher(server, published):
    """Another Registry object on the same folder stands for the process: nothing of it tells the
    server's own."""
    with Registry(published.root) as elsewhere:
        elsewhere.publish(
            "digits", constant(4), architecture="tutorial_mlp", alias="default", who="elsewhere"
        )
    wait_until(lambda: said(server) == 4, "the watcher's look")
    assert server.health_check()["models"]["digits"] == {
        "versions": ["1", "2", "3", "4"],
        "aliases": {"default": "4"},
    }


def test_promotions_never_give_a_stale_answer(published, quiet):
    """With the prediction cache on, from a thread and from a loop."""
    config = ServingConfig(
        warmup_samples=0, prediction_cache_bytes=1 << 20, timeout_ms=PATIENCE_S * 1e3
    )
    with ModelServer(config, published) as server, asyncio.Runner() as runner:

        async def ask():
            return await server.apredict(X)

        for promotion, label in zip(range(150), itertools.cycle([1, 2, 3]), strict=False):
            move(published, label)
            answer = server.predict(X) if promotion % 2 else runner.run(ask())
            assert (answer["predictions"], answer["model_version"]) == ([label], str(label))
        cache = server.get_all_stats()["prediction_cache"]
        assert cache["hits"] == 147 and cache["misses"] == 3, (
            "an old version's answers are still known"
        )


@pytest.fixture
def busy_switching():
    """Threads take turns 50 times as often as usual: more orders of events in less time."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(usual_s)


def test_alias_moves_under_sixteen_threads_answer_with_exactly_one_of_the_versions(
    server, published, busy_switching
):
    swapped, counts = threading.Event(), dict.fromkeys((1, 2), 0)

    def thread():
        while not swapped.is_set():
            counts[said(server)] += 1

    async def tasks():
        async def task():
            while not swapped.is_set():
                answer = await server.apredict(X)
                assert answer["predictions"] == [int(answer["model_version"])]
                counts[answer["predictions"][0]] += 1

        await asyncio.gather(*(task() for _ in range(4)))

    callers = Threads()
    for _ in range(14):
        callers.start(thread)
    for _ in range(2):
        callers.start(lambda: asyncio.run(tasks()))
    for swap in range(100):
        label = 2 if swap % 2 == 0 else 1
        move(published, label)
        assert said(server) == label
        until = sum(counts.values()) + 5
        wait_until(lambda until=until: sum(counts.values()) >= until, "traffic between the moves")
    swapped.set()
    callers.results()
    assert min(counts.values()) > 50
    assert server.get_all_stats()["server"]["failed"] == 0


def break_weights(registry, version):
    path = Path(registry.root, "models", "digits", str(version), "weights.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return lambda: path.write_bytes(whole)


def test_a_broken_version_does_not_take_over_and_health_says_why(server, published, quick):
    repair = break_weights(published, 2)
    move(published, 2)
    assert said(server) == 1, "what answered before goes on"
    health = server.health_check()
    assert (health["status"], health["ready"]) == ("degraded", True)
    assert "version 2 does not answer" in health["problems"]["digits/default"]
    assert "sha256" in health["problems"]["digits/default"]
    with pytest.raises(CorruptArtifactError, match="digits/2"):
        server.predict(X, 2)
    repair()
    server.refresh()
    assert said(server) == 2
    assert server.health_check()["status"] == "healthy"


def test_a_registry_that_is_gone_leaves_what_was_served(server, published, quick):
    assert said(server) == 1
    published.close()
    wait_until(lambda: server.health_check()["problems"], "the watcher's look")
    assert server.health_check()["status"] == "degraded"
    assert said(server) == 1, "in memory"
    with pytest.raises(FlservingError):
        server.predict(X, 2)
    with pytest.raises(NotFoundError):
        server.predict(X, "unknown")
    assert said(server) == 1


def test_local_models_live_beside_a_registry(server, published):
    server.load_model("v1", Constant(7), output_type="regression", num_features=2)
    # a change that the next request looks at
    published.publish("digits", constant(4), architecture="tutorial_mlp")
    server.load_model("v2", Constant(8), output_type="regression", num_features=2)
    assert server.predict(row(0), model="local")["predictions"] == [7.0], (
        "the default moves by set_default only"
    )
    server.set_default("v2", "local")
    assert server.predict(row(0), model="local")["predictions"] == [8.0]
    assert said(server) == 1, "the first model still answers who names none"


def test_names_are_served_once_and_a_refused_one_leaves_nothing(server, published, tmp_path):
    server.serve(published, "digits")  # again: the server may have found a new name first
    with pytest.raises(ConflictError, match="'digits' is served already"):
        server.serve(published, "digits", threshold=0.5)
    server.load_model("v1", Constant(7), output_type="regression", num_features=2)
    with pytest.raises(ConflictError, match="'local' is served already"):
        server.serve(published, "local")
    with pytest.raises(NotFoundError, match="no version of 'later'"):
        server.serve(published, "later")
    with Registry(tmp_path / "other") as other:
        other.publish("later", constant(5), architecture="tutorial_mlp", alias="default")
        server.serve(other, "later")
        with pytest.raises(ConflictError, match="'later' is served already"):
            server.serve(published, "later")
        assert server.predict(X, model="later")["predictions"] == [5], (
            "from the registry that has it"
        )


def test_a_server_of_all_models_of_a_registry(published):
    published.publish("extra", constant(9), architecture="tutorial_mlp", alias="default")
    with (
        ModelServer(registry=published) as both,
        ModelServer(registry=published, model="extra") as one,
    ):
        assert both.predict(X)["predictions"] == [1] and both.predict(X, model="extra")[
            "predictions"
        ] == [9]
        assert one.predict(X)["predictions"] == [9]
        with pytest.raises(NotFoundError, match="no model 'digits': served are extra"):
            one.predict(X, model="digits")


def test_a_model_without_a_default_is_not_ready(registry):
    registry.publish("digits", constant(1), architecture="tutorial_mlp")
    with ModelServer(registry=registry) as server:
        assert server.health_check()["status"] == "unavailable"
        with pytest.raises(
            NotFoundError, match="no version or alias 'default': it has versions 1, aliases none"
        ):
            server.predict(X)
        assert said(server, 1) == 1
        move(registry, 1)
        assert said(server) == 1 and server.health_check()["ready"]


def publish(registry, name, label, alias="default"):
    registry.publish(name, constant(label), architecture="tutorial_mlp", alias=alias)


def test_readiness_and_the_default_model_do_not_depend_on_the_alphabet(published, quiet):
    """A draft that sorts first keeps nobody waiting; who was promoted first stays the default, also
    after a restart."""
    publish(published, "aaa-draft", 5, alias=None)
    for promoted_later in (False, True):
        if promoted_later:
            published.set_alias("aaa-draft", "default", 1, who="test", why="test")
        with ModelServer(registry=published) as server:
            health = server.health_check()
            assert (health["ready"], health["default_model"]) == (True, "digits")
            assert said(server) == 1
            assert server.predict(X, 1, model="aaa-draft")["predictions"] == [5]


def test_the_first_model_that_is_promoted_becomes_the_default(registry, quiet):
    for name in ("a", "b"):
        publish(registry, name, 5, alias=None)
    with ModelServer(registry=registry) as server:
        assert not server.ready
        registry.set_alias("b", "default", 1, who="test", why="test")
        assert server.predict(X)["predictions"] == [5] and server.ready
        registry.set_alias("a", "default", 1, who="test", why="test")
        server.refresh()
        registry.remove_alias("b", "default", who="test", why="test")
        server.refresh()
        assert server.health_check()["default_model"] == "b", (
            "who names no model never gets another one in silence"
        )
        assert not server.ready


def test_a_default_model_that_cannot_be_loaded_is_not_replaced_by_another_one(published, quiet):
    publish(published, "extra", 5)
    break_weights(published, 1)
    with ModelServer(registry=published) as server:
        assert server.health_check()["default_model"] == "digits" and not server.ready


def test_a_model_published_under_a_new_name_is_served_by_itself(server, published, quick):
    publish(published, "aaa", 5)
    assert server.predict(X, model="aaa")["predictions"] == [5], (
        "this process's own change, at the next request"
    )
    with Registry(published.root) as elsewhere:
        publish(elsewhere, "bbb", 6)
    wait_until(lambda: "bbb" in server.health_check()["models"], "the watcher's look")
    assert server.predict(X, model="bbb")["predictions"] == [6]
    assert said(server) == 1, "a new model never becomes the default one"


def test_a_server_of_one_model_serves_another_one_when_it_is_loaded_and_not_before(
    published, quiet
):
    with ModelServer(registry=published, model="digits") as server:
        publish(published, "extra", 5)
        server.refresh()
        for name in ("extra", "nobody", "Not A Name"):
            with pytest.raises(NotFoundError, match="no model"):
                server.predict(X, model=name)
        server.reload("extra")
        assert server.predict(X, model="extra")["predictions"] == [5] and said(server) == 1
        for name in ("nobody", "Not A Name", ""):
            with pytest.raises(NotFoundError, match="no model"):
                server.reload(name)


def test_a_new_model_that_cannot_be_served_stops_no_other(server, published, quiet):
    server.load_model("v1", Constant(7), output_type="regression", num_features=2)
    publish(published, "local", 5)
    publish(published, "zzz", 6)
    assert server.predict(X, model="zzz")["predictions"] == [6]
    assert "served already" in server.health_check()["problems"]["local/registry"]
    assert server.predict(row(1), model="local")["predictions"] == [7.0]


def test_a_registry_may_have_a_model_called_local(registry, quiet):
    publish(registry, "local", 5)
    with ModelServer(registry=registry) as server:
        assert server.predict(X)["predictions"] == [5]
        with pytest.raises(ConflictError, match="'local' comes from a registry"):
            server.load_model("v1", Constant(7), output_type="regression", num_features=2)


class FakeWhole(FakeRegistry):
    """A registry of many models, each with version 1."""

    def __init__(self, *names):
        super().__init__(1, default=1)
        self.names = list(names)

    def models_by_promotion(self):
        return list(self.names)


def test_new_models_are_followed_a_few_at_a_time_and_up_to_a_limit(router, quiet, monkeypatch):
    monkeypatch.setattr(routing, "MOST_MODELS", 40)
    registry = FakeWhole("first")
    broken = [f"broken-{number:02}" for number in range(20)]

    def serve(name):
        if name in broken:
            raise CorruptArtifactError("flipped byte")
        router.follow(registry, name)

    router.follow_all(registry, serve)
    registry.names += broken + [f"m-{number:02}" for number in range(60)]
    registry.change(here=False)
    router.refresh()
    assert len(router.problems) - 1 == 16, (
        "others wait for a look: it does not take everything at once"
    )
    for _ in range(5):
        router.refresh()
    assert len(router.routes.models) == 40, "what cannot be served keeps nobody out"
    assert router.problems["registry"] == "21 models are not served, the most is 40: load them"
    broken.clear()
    monkeypatch.setattr(routing, "MOST_MODELS", 100)
    for _ in range(5):
        router.refresh(retry=True)
    assert len(router.routes.models) == 81 and not router.problems


def test_looks_cost_one_question_for_each_registry_and_not_for_each_model(router, quiet):
    registry = FakeWhole(*(f"m-{number}" for number in range(30)))
    asked = []
    token = registry.change_token
    registry.change_token = lambda: asked.append(1) or token()
    router.follow_all(registry, lambda name: router.follow(registry, name))
    router.refresh()
    asked.clear()
    reads = registry.reads
    router.refresh()
    assert len(asked) == 1 and registry.reads == reads


# No name means two things


def test_a_version_is_never_called_as_an_alias(router):
    """load_model("v1", A), load_model("default", B): asking for "default" must not give A."""
    with serving(Constant(1), version="v1") as server:
        with pytest.raises(InvalidModelError, match="'default' is the alias"):
            server.load_model("default", Constant(2), output_type="regression", num_features=2)
        assert server.predict(row(0), "default")["predictions"] == [1.0]
        assert server.health_check()["models"]["local"]["versions"] == ["v1"]
    for name in ("v1", "v2"):
        router.add(("a", name))
    router.set_alias(("a", "v1"), "champion")
    for version in ("champion", "default"):
        with pytest.raises(ConflictError, match=f"'{version}' is an alias of 'a'"):
            router.add(("a", version))
    with pytest.raises(ConflictError, match="'v2' is a version of 'a'"):
        router.set_alias(("a", "v1"), "v2")
    assert router.require("v2", "a") == ("a", "v2")


def test_a_version_number_has_one_spelling_for_the_registry_and_for_its_server(server, published):
    for ref in ("01", "001", "+1", "1.0", " 1", "١", "1" * 30):
        for ask in (published.resolve, lambda name, ref: server.resolve(ref, name)):
            with pytest.raises(NotFoundError):
                ask("digits", ref)
    assert published.resolve("digits", "1") == int(server.resolve("1", "digits")[1]) == 1
    for alias in ("1", "01", "default "):
        with pytest.raises(InvalidModelError):
            move(published, 1, alias)


def test_a_forgotten_server_of_a_registry_is_collected(published, quick):
    server = serving()
    server.serve(published, "digits")
    assert said(server) == 1
    forgotten = weakref.ref(server)
    del server
    wait_until(lambda: collected(forgotten), "its collection")


# Out of service and back


def test_an_unloaded_model_answers_nobody_and_leaves_memory_until_it_is_loaded_again():
    with serving(Constant(1), version="a") as server:
        server.unload("local")
        for version in (None, "a", "nothing"):
            with pytest.raises(ModelUnloadedError, match="'local' was unloaded: load it again"):
                server.predict(row(1), version)
        assert not server.model_cache.items() and not server.health_check()["ready"]
        # a new version does not put the model back by itself
        server.load_model("b", Constant(2), output_type="regression", num_features=1)
        with pytest.raises(ModelUnloadedError):
            server.predict(row(1), "b")
        server.reload("local")
        assert server.predict(row(1))["model_version"] == "a" and server.health_check()["ready"]


def test_a_model_whose_default_cannot_be_loaded_stays_out_of_service():
    def fail(key):
        raise CorruptArtifactError("broken")

    registry = FakeRegistry(default=1)
    router = Router(lambda key: None)
    router.follow(registry, "m")
    router.withdraw("m")
    router._preload = fail
    with pytest.raises(CorruptArtifactError):
        router.restore("m")
    with pytest.raises(ModelUnloadedError):
        router.require(None, "m")
    router._preload = lambda key: None
    # what happened meanwhile is seen before it answers
    registry.token, registry.moved = 1, {"default": 2}
    router.restore("m")
    assert router.require(None, "m") == ("m", "2")
    router.close()


@pytest.mark.parametrize("act", ["unload", "reload"])
def test_only_a_model_that_is_served_can_be_taken_out_of_service(act):
    with (
        serving(Constant(1)) as server,
        pytest.raises(NotFoundError, match="no model 'x': served are local"),
    ):
        getattr(server, act)("x")


# Signatures


def test_a_signature_is_known_without_loading_the_model(tmp_path):
    config = ServingConfig(cache_size=1)
    with Registry(tmp_path) as registry, ModelServer(config) as server:
        registry.publish(
            "digits", models.build("digits_mlp"), architecture="digits_mlp", alias="default"
        )
        server.serve(registry, "digits")
        server.load_model("wide", torch.nn.Linear(7, 3))
        server.load_model("value", torch.nn.Linear(5, 1), output_type="regression")
        loads = server.model_cache.loads
        seen = [
            server.signature(server.resolve(v, m))
            for v, m in ((None, "digits"), ("wide", "local"), ("value", "local"))
        ]
        assert [(s.input_shape, s.output_shape, s.output_type) for s in seen] == [
            ((64,), (10,), "classification"),
            ((7,), (3,), "classification"),
            ((5,), (), "regression"),
        ]
        assert server.model_cache.loads == loads
        with pytest.raises(NotFoundError):
            server.resolve("none", "digits")


# Experiments: the routes carry them; who gets which arm is in test_experiments.py


AB = Experiment.of("ab", {"a": (1, 0.5), "b": (2, 0.5)}, shadow=3)


def test_an_alias_in_an_experiment_is_a_crossroads_and_still_leads_where_it_led(
    router, loads, quiet
):
    registry = FakeRegistry(3, default=1, beside=2)
    followed(router, m=registry)
    loads.loaded.clear()
    registry.running = {"default": AB}
    registry.change()
    router.refresh()
    split = router.find(None, "m")
    assert (
        isinstance(split, TrafficSplit)
        and split == ("m", "1")
        and (split.alias, split.experiment) == ("default", AB)
    )
    assert loads.loaded == [("m", "1"), ("m", "2"), ("m", "3")], (
        "every version is warm before the first request"
    )
    for ref in ("beside", "1"):
        assert type(router.find(ref, "m")) is tuple
    router.withdraw("m")
    with pytest.raises(ModelUnloadedError):
        router.require(None, "m")
    router.restore("m")
    assert router.require(None, "m").experiment is AB
    registry.running = {}
    registry.change(default=2)
    router.refresh()
    assert answer(router, None, "m") == ("m", "2") and type(answer(router, None, "m")) is tuple


def test_other_models_keep_their_experiments_when_one_changes(router, quiet):
    one, two = FakeRegistry(3, default=1), FakeRegistry(3, default=1)
    one.running = {"default": AB}
    followed(router, one=one, two=two)
    two.change(default=2)
    router.refresh()
    assert router.find(None, "one").experiment is AB and type(router.find(None, "two")) is tuple


def test_an_experiment_with_a_version_that_does_not_load_leaves_the_one_before(
    router, loads, quiet
):
    registry = FakeRegistry(3, default=1)
    registry.running = {"default": AB}
    followed(router, m=registry)
    loads.broken["m", "3"] = CorruptArtifactError("broken")
    changed = Experiment.of("ab", {"a": (1, 0.1), "b": (2, 0.9)}, shadow=3)
    registry.running = {"default": changed}
    registry.change()
    router.refresh()
    assert router.find(None, "m").experiment is AB
    assert router.problems == {"m/default experiment": "ab does not run: broken"}
    del loads.broken["m", "3"]
    router.refresh(retry=True)
    assert router.find(None, "m").experiment is changed and router.problems == {}


def test_an_alias_and_its_experiment_are_read_of_one_moment(router, quiet):
    """A promotion between the two reads: what was read first is thrown away."""
    registry = FakeRegistry(3, default=1)
    registry.running = {"default": AB}
    followed(router, m=registry)

    read, once = registry.aliases, []

    def aliases(name):
        seen = read(name)
        if not once:
            once.append(1)
            registry.running = {}
            registry.change(default=2)
        return seen

    registry.aliases = aliases
    registry.change()
    router.refresh()
    assert router.routes.targets["m", "default"] == ("m", "2")
    assert type(router.routes.targets["m", "default"]) is tuple
