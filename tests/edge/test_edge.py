"""The edge device: the global model or the client's own head, updates seen whole, and how old an
answer is."""

import asyncio
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import edge_updates
import flserving
from edge_updates import MLP, head_of, state_of
from flserving import ServingConfig
from flserving.api.client import Client
from flserving.edge.device import Age, EdgeModelServer
from flserving.errors import (
    ConfigError,
    FlservingError,
    InvalidInputError,
    InvalidModelError,
    ModelExecutionError,
    NotFoundError,
    ServerClosedError,
    StaleModelError,
)
from flserving.models import build
from flserving.registry import Registry
from flserving.registry.heads import HeadSet
from serving_models import Tagged, Threads

pytestmark = pytest.mark.timeout(120)
CONFIG = ServingConfig(warmup_samples=1, timeout_ms=20_000)
ROW = [1.0, 1.0]


class Clocks:
    """The two clocks of a device, moved by hand."""

    def __init__(self, wall_s=1.9e9):
        self.monotonic_s, self.wall_s = 5.0, wall_s

    def pass_s(self, seconds):
        self.monotonic_s += seconds
        self.wall_s += seconds

    def registry(self, folder):
        return Registry(folder, now=lambda: datetime.fromtimestamp(self.wall_s, UTC))

    def edge(self, registry, **options):
        clocks = {"clock": lambda: self.monotonic_s, "wall": lambda: self.wall_s}
        return EdgeModelServer(config=CONFIG, registry=registry, **clocks, **options)


@pytest.fixture
def edge():
    with EdgeModelServer(config=CONFIG) as made:
        yield made


def told(answer):
    return answer["predictions"][0], answer["model_type"], answer.get("head"), answer["round"]


def test_global_and_personal_answers_and_what_they_say(edge):
    assert not edge.ready and edge.get_all_stats()["edge"] is None
    edge.update_global(state_of(1), round=7, output_type="regression", **MLP)
    assert told(edge.predict(ROW)) == (1, "global", "none", 7)
    edge.update_local(head_of(1.5))
    assert told(edge.predict(ROW)) == (1.5, "personal", "own", 7)
    assert told(edge.predict(ROW, use_personalized=False)) == (1, "global", None, 7)
    assert told(edge.predict(ROW, False)) == (1, "global", None, 7)
    answer = edge.predict(ROW)
    assert (answer["path"], answer["degraded"], answer["model_version"]) == ("local", False, "2")
    assert 0 <= answer["age_s"] < 60
    assert edge.get_all_stats()["edge"].items() >= {"model_version": "2", "round": 7}.items()


def test_every_way_in_answers_the_device_s_client(edge):
    edge.update_global(state_of(1), output_type="regression", head=head_of(1.5), **MLP)
    assert told(asyncio.run(edge.apredict(ROW))) == (1.5, "personal", "own", None)
    assert edge.predict([ROW, ROW], client=["device", "mallory"])["head"] == ["own", "unknown"]
    with flserving.serve(edge) as endpoint, Client(endpoint.url, endpoint.token) as client:
        answer = client.predict(ROW)
        assert (
            answer.items()
            >= {"predictions": [1.5], "head": "own", "path": "local", "degraded": False}.items()
        )


def test_personal_answers_are_those_of_a_linear_layer(edge):
    torch.manual_seed(3)
    model, head = build("mlp", {"sizes": [4, 8, 3]}), torch.nn.Linear(8, 3)
    edge.update_global(model, architecture="mlp", parameters={"sizes": [4, 8, 3]})
    edge.update_local({f"head.{name}": value for name, value in head.state_dict().items()})
    rows = torch.randn(17, 4)
    with torch.no_grad():
        own, generic = torch.softmax(head(model.body(rows)), 1), torch.softmax(model(rows), 1)
    np.testing.assert_allclose(edge.predict(rows.numpy())["probabilities"], own, atol=1e-5)
    np.testing.assert_allclose(
        edge.predict(rows.numpy(), False)["probabilities"], generic, atol=1e-5
    )


def test_a_head_for_another_body_never_answers_and_comes_back_with_its_body(edge):
    edge.update_global(state_of(1), round=1, output_type="regression", head=head_of(1.5), **MLP)
    edge.update_global(state_of(2), round=2)
    assert told(edge.predict(ROW)) == (2, "global", "stale", 2)
    edge.update_global(state_of(3), round=3)  # carried on, still stale
    assert told(edge.predict(ROW)) == (3, "global", "stale", 3)
    edge.update_local(head_of(2.5), version=2)  # trained while round 3 came
    assert told(edge.predict(ROW)) == (3, "global", "stale", 3)
    edge.update_global(state_of(2), round=2)
    assert told(edge.predict(ROW)) == (2.5, "personal", "own", 2)
    edge.update_global(state_of(4), round=4, head=head_of(4.5))
    assert told(edge.predict(ROW)) == (4.5, "personal", "own", 4)


def test_a_model_of_another_shape_comes_without_the_head_of_the_one_before(edge):
    edge.update_global(state_of(1), round=1, head=head_of(0.5), output_type="regression", **MLP)
    wider = {"architecture": "mlp", "parameters": {"sizes": [2, 5, 1]}}
    edge.update_global(build("mlp", wider["parameters"]), round=2, **wider)
    answer = edge.predict(ROW)
    assert (answer["round"], answer["model_type"], answer["head"]) == (2, "global", "none")
    with pytest.raises(InvalidModelError, match="do not fit"):
        edge.update_global(state_of(1), round=3, **wider)
    assert edge.predict(ROW)["round"] == 2


def test_additive_heads_and_adapters(edge):
    edge.update_global(state_of(1), output_type="regression", **MLP)
    edge.update_local(head_of(0.5), layout="additive")
    assert told(edge.predict(ROW))[:3] == (1.5, "personal", "own")
    edge.update_local(
        {"head.weight": torch.tensor([[3.0]]), "head.bias": torch.tensor([0.25])}, layout="adapter"
    )
    assert told(edge.predict(ROW))[:3] == (3.25, "personal", "own")
    edge.update_global(state_of(2))
    assert told(edge.predict(ROW))[:3] == (2, "global", "stale")


@pytest.mark.full
def test_sixteen_threads_see_each_update_whole_or_not_at_all(edge):
    edge.update_global(state_of(1), round=1, output_type="regression", head=head_of(1.5), **MLP)
    expected, stop = {"1": (1, 1.5)}, threading.Event()

    def ask(personalised):
        seen = set()
        while not stop.is_set():
            answer = edge.predict(ROW, personalised)
            seen.add(
                (answer["model_version"], personalised, answer["predictions"][0], answer["round"])
            )
        return seen

    threads = Threads()
    for caller in range(16):
        threads.start(ask, caller % 2 == 0)
    try:
        body = 1
        for update in range(2, 18):
            if update % 3:
                body = update
                head = head_of(update + 0.5) if update % 2 else None
                version = edge.update_global(state_of(body), round=body, head=head).version
                # a carried head is stale
                expected[str(version)] = body, (body + 0.5 if update % 2 else body)
            else:
                version = edge.update_local(head_of(update + 0.25)).version
                expected[str(version)] = body, update + 0.25
            assert edge.predict(ROW)["model_version"] == str(version), (
                "on return, the update answers"
            )
    finally:
        stop.set()
    seen = set.union(*threads.results())
    assert len({version for version, *_ in seen}) > 5
    for version, personalised, value, number in seen:
        assert value == expected[version][personalised], f"version {version} answered {value}"
        assert number == expected[version][0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.full
def test_killed_at_random_instants_of_its_updates_it_starts_with_a_whole_model(tmp_path, kills):
    result = edge_updates.start(tmp_path, kills)
    assert result["kills"] == kills and result["updates"] >= max(2, kills / 4), result


# How old


def test_the_soft_limit_flags_and_the_hard_limit_refuses(tmp_path):
    clocks = Clocks()
    with (
        clocks.registry(tmp_path) as registry,
        clocks.edge(registry, fresh_s=60, refuse_s=600) as edge,
    ):
        edge.update_global(state_of(1), round=1, output_type="regression", **MLP)
        for passed_s, age_s, degraded in (
            (0, 0, False),
            (60, 60, False),
            (1, 61, True),
            (539, 600, True),
        ):
            clocks.pass_s(passed_s)
            answer = edge.predict(ROW)
            assert (answer["age_s"], answer["degraded"], answer["path"]) == (
                age_s,
                degraded,
                "local",
            )
        clocks.pass_s(1)
        for _ in range(2):
            with pytest.raises(StaleModelError, match=r"601 s old, refuse_s is 600"):
                edge.predict(ROW)
        assert edge.get_all_stats()["server"]["failed_by_reason"] == {"StaleModel": 2}
        edge.confirm()
        assert edge.predict(ROW)["age_s"] == 0
        clocks.pass_s(601)
        edge.update_global(state_of(2), round=2)
        assert edge.predict(ROW)["age_s"] == 0


def test_a_new_head_makes_the_body_no_younger_not_even_after_a_restart(tmp_path):
    clocks = Clocks()
    with clocks.registry(tmp_path) as registry:
        with clocks.edge(registry) as edge:
            edge.update_global(state_of(1), round=1, output_type="regression", **MLP)
            clocks.pass_s(100)
            edge.update_local(head_of(1.5))
            clocks.pass_s(100)
            edge.update_local(head_of(1.25))
            assert edge.predict(ROW)["age_s"] == 200
        clocks.pass_s(100)
        clocks.monotonic_s = 0.0  # the device was switched off and on
        with clocks.edge(registry) as edge:
            answer = edge.predict(ROW)
            assert told(answer) == (1.25, "personal", "own", 1) and answer[
                "age_s"
            ] == pytest.approx(300, abs=1e-3)


def test_a_clock_that_was_set_back_between_two_starts_makes_the_age_unknown(tmp_path):
    clocks = Clocks()
    with clocks.registry(tmp_path) as registry:
        with clocks.edge(registry) as edge:
            edge.update_global(state_of(1), round=1, output_type="regression", **MLP)
        clocks.wall_s = 0.0  # a battery that is empty: 1970
        with clocks.edge(registry, fresh_s=60) as edge:
            answer = edge.predict(ROW)
            assert answer["age_s"] is None and answer["degraded"]
            with flserving.serve(edge) as endpoint, Client(endpoint.url, endpoint.token) as client:
                assert client.predict(ROW)["degraded"] is True
        with (
            clocks.edge(registry, refuse_s=1e9) as edge,
            pytest.raises(StaleModelError, match="of unknown age"),
        ):
            edge.predict(ROW)
        with clocks.edge(registry, fresh_s=60, refuse_s=600) as edge:
            edge.confirm()
            assert not edge.predict(ROW)["degraded"]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e9, 1e9), st.booleans()), max_size=8))
def test_no_jump_of_the_wall_clock_makes_an_old_model_look_fresh(steps):
    """While it is awake, a device counts every second that passes, whatever its wall clock is set
    to."""
    clocks, true_s = Clocks(), 0.0
    age = Age(clocks.wall_s, lambda: clocks.monotonic_s, lambda: clocks.wall_s)
    for passed_s, jump_s, jumps in steps:
        clocks.pass_s(passed_s)
        true_s += passed_s
        clocks.wall_s += jump_s if jumps else 0
        assert age.age_s() >= true_s * (1 - 1e-9) - 1e-3


def test_a_device_that_slept_is_as_old_as_its_wall_clock_says():
    clocks = Clocks()
    age = Age(clocks.wall_s - 10, lambda: clocks.monotonic_s, lambda: clocks.wall_s)
    clocks.wall_s += 3600
    assert age.age_s() == 3610
    clocks.monotonic_s = -1e9  # not monotonic at all
    assert age.age_s() == 3610


def test_an_alias_that_another_process_moves_back_is_as_old_as_what_it_leads_to(tmp_path):
    clocks = Clocks()
    with clocks.registry(tmp_path) as registry, clocks.edge(registry, refuse_s=60) as edge:
        edge.update_global(state_of(1), round=1, output_type="regression", **MLP)
        clocks.pass_s(100)
        with clocks.registry(tmp_path) as other:
            other.publish(
                "model",
                state_of(2),
                lineage={"round": 2},
                alias="default",
                output_type="regression",
                **MLP,
            )
        edge.refresh()
        assert told(edge.predict(ROW)) == (2, "global", "none", 2)
        # this very process: no refresh is needed
        registry.rollback("model", who="test", why="back")
        with pytest.raises(StaleModelError, match="version 1 is 100 s old"):
            edge.predict(ROW)
        with pytest.raises(StaleModelError, match="version 1 "):
            edge.predict(ROW, version=1)
        assert told(edge.predict(ROW, version="2"))[0] == 2


# What goes wrong


@pytest.mark.parametrize(
    "options",
    [{"fresh_s": 0}, {"refuse_s": -1}, {"fresh_s": float("nan")}, {"refuse_s": float("inf")}, {"fresh_s": True},
     {"fresh_s": 2, "refuse_s": 1}, {"model": "local"}, {"client": ""}],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(options):
    with pytest.raises(ConfigError):
        EdgeModelServer(**options)


def test_a_bad_update_leaves_what_served_before(edge, monkeypatch):
    with pytest.raises(InvalidModelError, match="architecture"):
        edge.update_global(state_of(1))
    with pytest.raises(NotFoundError):
        edge.update_local(head_of(1))
    with pytest.raises(NotFoundError):
        edge.predict(ROW)
    edge.confirm()
    edge.update_global(state_of(1), round=1, output_type="regression", head=head_of(1.5), **MLP)
    infinite = state_of(2) | {
        "head.weight": torch.full((1, 2), 1e38),
        "body.0.bias": torch.full((2,), 1e38),
    }
    full = OSError(28, "No space left on device")
    bad = [
        (InvalidModelError, lambda: edge.update_global({"body.0.weight": torch.zeros(2, 2)})),
        (InvalidModelError, lambda: edge.update_global(state_of(float("nan")))),
        # finite weights, infinite answers
        (ModelExecutionError, lambda: edge.update_global(infinite)),
        (
            InvalidModelError,
            lambda: edge.update_global(state_of(2), head={"head.weight": torch.zeros(1, 3)}),
        ),
        (InvalidModelError, lambda: edge.update_local({"head.weight": torch.zeros(5, 2)})),
        (InvalidModelError, lambda: edge.update_local(head_of(float("inf")))),
        (InvalidModelError, lambda: edge.update_local({})),
        (NotFoundError, lambda: edge.update_local(head_of(2), version=99)),
        (InvalidInputError, lambda: edge.predict(ROW, "1")),
    ]
    for error, update in bad:
        with pytest.raises(error):
            update()
        assert told(edge.predict(ROW)) == (1.5, "personal", "own", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(FlservingError, match="free space"):
            edge.update_global(state_of(2), round=2)
    assert told(edge.predict(ROW)) == (1.5, "personal", "own", 1)
    edge.update_global(state_of(3), round=3, head=HeadSet.from_states({"device": head_of(3.5)}))
    assert told(edge.predict(ROW)) == (3.5, "personal", "own", 3)


def test_a_module_without_an_update_has_no_round_and_an_unknown_age():
    with EdgeModelServer(config=CONFIG, fresh_s=60) as edge:
        edge.load_model("v1", Tagged(), output_type="regression", num_features=2)
        answer = edge.predict(ROW)
        assert (answer["round"], answer["age_s"], answer["degraded"], answer["path"]) == (
            None,
            None,
            True,
            "local",
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_ends_takes_no_file_of_its_parent_along():
    """Its finalizers run too: they must leave the temporary registry to the process that made
    it."""
    program = """if True:
        import os, sys
        import numpy as np
        from edge_updates import MLP, state_of
        from flserving.edge.device import EdgeModelServer

        edge = EdgeModelServer()
        edge.update_global(state_of(1), output_type="regression", **MLP)
        pid = os.fork()
        if pid == 0:
            sys.exit(7)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        edge.update_global(state_of(2), output_type="regression", **MLP)
        print(len(edge.registry.versions("model")) if os.path.isdir(edge.registry.root) else "gone")
        edge.close()
    """
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(support), *sys.path])})  # fmt: skip
    assert (done.stdout.split(), done.returncode) == (["2"], 0), done.stderr


def test_a_temporary_registry_goes_with_its_server_and_a_given_one_stays(tmp_path):
    edge = EdgeModelServer(config=CONFIG)
    folder = Path(edge.registry.root)
    edge.update_global(state_of(1), output_type="regression", **MLP)
    edge.close()
    edge.close()
    assert not folder.exists() and edge.get_all_stats()["edge"] is None
    with pytest.raises(ServerClosedError):
        edge.predict(ROW)
    with Registry(tmp_path) as registry:
        with EdgeModelServer(config=CONFIG, registry=registry) as edge:
            edge.update_global(
                state_of(1), round=4, output_type="regression", head=head_of(1.5), **MLP
            )
        # started again, without anybody to ask
        with EdgeModelServer(config=CONFIG, registry=registry) as edge:
            assert told(edge.predict(ROW)) == (1.5, "personal", "own", 4)
