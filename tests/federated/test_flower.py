"""With the real flwr. It pins versions that ours does not, so it lives in an environment of its
own:

python -m venv .flower && .flower/bin/python -m pip install -e ".[flower,test]"
.flower/bin/python -m pytest -m flower tests/federated/test_flower.py
"""

import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import psutil
import pytest
import torch
from scipy.stats import ttest_ind

from flserving import ModelServer, PersonalizedServer, Preprocessor, Registry, models
from flserving.errors import ConfigError, InvalidModelError, ModelExecutionError, NotFoundError
from flserving.federated import training
from flserving.federated.data import digits, federated_statistics, make_clients
from flserving.federated.gate import Gate, gated
from flserving.federated.heads import fit_heads
from flserving.federated.rounds import publish_rounds
from flserving.models import architectures

pytestmark = pytest.mark.flower
ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray then stays on 127.0.0.1, on Linux too
K, ROUNDS = 10, 3
CLIENTS = make_clients(*digits(), num_clients=K, alpha=1.0, seed=0)
STATISTICS = federated_statistics(CLIENTS)
FORM = {"architecture": "digits_mlp", "preprocessing": STATISTICS}


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    if importlib.util.find_spec("flwr") is None:
        pytest.skip(f"this Python has no flwr: {__doc__}")
    home = tmp_path_factory.mktemp("flwr")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("FLWR_HOME", str(home))
        patch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
        warnings.simplefilter("ignore")  # typer uses what click has deprecated
        from flserving.federated import flower

        yield flower
    assert not any(home.iterdir()), "a run in this process writes no file and tells nobody"


@pytest.fixture(scope="module")
def apps(flower):
    import flower_apps

    return flower_apps


@pytest.fixture(scope="module")
def strategies(flower):
    from flwr.serverapp import strategy

    return strategy


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "models") as registry:
        yield registry


@pytest.fixture
def play(flower, apps, strategies):
    """Play a run; returns its rounds and Flower's own result."""

    def play(
        strategy=None,
        *,
        app=None,
        seed=0,
        rounds=ROUNDS,
        on_round=lambda _: None,
        config=None,
        **options,
    ):
        seen = []
        strategy = flower.Publishing(
            strategy or strategies.FedAvg(),
            on_round=lambda it: (seen.append(it), on_round(it)),
            **FORM,
        )
        grid = flower.LocalGrid(app or apps.client_app(CLIENTS), K)
        config = config or apps.train_config(seed)
        arrays = apps.initial_arrays(seed)
        return seen, strategy.start(grid, arrays, rounds, train_config=config, **options)

    return play


def faulty(apps, change):
    """The usual clients, but ``change(partition, round, reply)`` stands behind their training."""
    from flwr.clientapp import ClientApp

    app, inner = ClientApp(), apps.client_app(CLIENTS)

    @app.train()
    def train(message, context):
        reply = inner(message, context)
        return change(
            context.node_config["partition-id"], message.content["config"]["server-round"], reply
        )

    app.evaluate()(inner)
    return app


def counting(reply, count):
    reply.content["metrics"]["num-examples"] = count
    return reply


def scaled(reply, factor):
    from flwr.app import ArrayRecord

    state = {
        name: factor * tensor
        for name, tensor in reply.content["arrays"].to_torch_state_dict().items()
    }
    reply.content["arrays"] = ArrayRecord(state)
    return reply


def test_telemetry_is_off(flower):
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED == os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def test_it_is_our_fedavg(play):
    """Same start, same shuffles: the same models but for rounding, Flower's mean being taken in
    float32."""
    play(rounds=1)  # torch.optim imports half of torch when it is first used
    began_s = time.process_time()
    rounds, _ = play(rounds=5)
    print(f"five rounds of ten clients: {time.process_time() - began_s:.2f} s of CPU time")
    ours = training.train(clients=CLIENTS, rounds=5, progress=False)
    pairs = [
        (it.state[name], own.state[name])
        for it, own in zip(rounds, ours.rounds, strict=True)
        for name in own.state
    ]
    print("largest difference of a weight", max(float((a - b).abs().max()) for a, b in pairs))
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert [it.number for it in rounds] == [1, 2, 3, 4, 5]
    for theirs, own in zip(rounds, ours.rounds, strict=True):
        assert theirs.state.keys() == own.state.keys()
        assert list(theirs.sample_counts.values()) == list(own.sample_counts.values())
        for name, value in own.metrics.items():
            assert theirs.metrics[name] == pytest.approx(value, abs=0.02), name
    assert rounds[-1].metrics["global_accuracy"] > 0.93


def test_other_seeds_reach_the_same_accuracy(play, apps):
    """Five seeds against five others, Welch's t-test at 1 % each; at a tenth of the rate it sees
    the difference."""

    def accuracies(rate):
        config = [apps.train_config(seed) for seed in range(5)]
        for it in config:
            it["lr"] = rate
        return [play(seed=s, config=config[s])[0][-1].metrics["global_accuracy"] for s in range(5)]

    ours = [
        training.train(clients=CLIENTS, rounds=ROUNDS, seed=seed, progress=False).final.metrics[
            "global_accuracy"
        ]
        for seed in range(100, 105)
    ]
    theirs = accuracies(0.1)
    print("ours", ours, "Flower's", theirs)
    assert len(set(theirs)) > 1 and abs(np.mean(theirs) - np.mean(ours)) < 0.02
    assert ttest_ind(theirs, ours, equal_var=False).pvalue > 0.01
    assert ttest_ind(accuracies(0.01), ours, equal_var=False).pvalue < 0.01


def test_every_round_is_a_version_with_its_lineage(play, registry, apps):
    from flwr.app import MetricRecord

    def evaluate(number, arrays):
        return MetricRecord({"accuracy": 0.5 + number / 100, "loss": 1.0 / (number + 1)})

    rounds, result = play(
        on_round=publish_rounds(registry, "m", alias="default"), evaluate_fn=evaluate
    )
    assert registry.version_numbers("m") == [1, 2, 3] and registry.resolve("m") == 3
    final = result.arrays.to_torch_state_dict()
    stored = registry.read("m", 3).tensors
    assert stored.keys() == final.keys()
    assert all(stored[name].numpy().tobytes() == final[name].numpy().tobytes() for name in final)
    for number, it in enumerate(rounds, start=1):
        manifest = registry.manifest("m", number)
        lineage = manifest.lineage
        assert (lineage.round, lineage.parent_version) == (number, number - 1 or None)
        assert (lineage.strategy, lineage.num_clients) == ("FedAvg", K)
        assert lineage.sample_counts == tuple(len(client.train_y) for client in CLIENTS)
        assert lineage.extra["config.lr"] == 0.1 and lineage.extra["config.local-epochs"] == 5
        assert (
            lineage.extra["framework"].startswith("flwr ")
            and lineage.extra["rejected_clients"] == 0
        )
        assert manifest.metrics == it.metrics
        assert manifest.metrics["server.loss"] == result.evaluate_metrics_serverapp[number]["loss"]
        assert (
            manifest.metrics["global_accuracy"]
            == result.evaluate_metrics_serverapp[number]["accuracy"]
        )
        assert manifest.metrics["train.loss"] == result.train_metrics_clientapp[number]["loss"]
        assert (
            manifest.metrics["evaluate.accuracy"]
            == result.evaluate_metrics_clientapp[number]["accuracy"]
        )
        accuracies = it.client_accuracy.values()
        assert len(accuracies) == K and manifest.metrics["worst_client_accuracy"] == min(accuracies)
        assert manifest.metrics["mean_client_accuracy"] == pytest.approx(np.mean(list(accuracies)))
    # the start was judged, and not published
    assert result.evaluate_metrics_serverapp[0]["accuracy"] == 0.5


@pytest.mark.parametrize(
    "name", ["FedAdam", "FedYogi", "FedAvgM", "FedMedian", "FedTrimmedAvg", "Krum"]
)
def test_any_strategy_publishes(play, registry, strategies, name):
    strategy = getattr(strategies, name)(**({"num_malicious_nodes": 1} if name == "Krum" else {}))
    _, result = play(strategy, on_round=publish_rounds(registry, "m"), rounds=2)
    manifest, stored = registry.manifest("m", 2), registry.read("m", 2).tensors
    assert manifest.lineage.strategy == name and manifest.lineage.num_clients == K
    for key, array in result.arrays.to_torch_state_dict().items():  # FedAdam's are float64
        assert torch.equal(stored[key], array.to(torch.float32))


def test_a_strategy_in_a_wrapper_of_flowers_publishes_and_the_wrong_order_is_told(
    flower, play, strategies, apps
):
    noisy = {"noise_multiplier": 0.0, "clipping_norm": 50.0, "num_sampled_clients": K}
    wrapper = strategies.DifferentialPrivacyServerSideFixedClipping
    rounds, _ = play(wrapper(strategies.FedAvg(), **noisy))
    assert (
        rounds[-1].recipe.strategy == wrapper.__name__
        and rounds[-1].metrics["global_accuracy"] > 0.8
    )
    inside = wrapper(flower.Publishing(strategies.FedAvg(), on_round=print, **FORM), **noisy)
    with pytest.raises(ConfigError, match="outermost"):
        inside.start(flower.LocalGrid(apps.client_app(CLIENTS), K), apps.initial_arrays(), 1)


def test_an_answer_comes_from_a_flower_round(play, registry):
    rounds, _ = play(on_round=publish_rounds(registry, "m", alias="default"))
    rows, labels = (
        np.concatenate([getattr(c, it) for c in CLIENTS]) for it in ("test_x", "test_y")
    )
    with ModelServer(registry=registry, model="m") as server:
        answer = server.predict(rows)
    assert answer["model_version"] == "3"
    right = np.mean(np.array(answer["predictions"]) == labels)
    # the clients', who hold these rows
    assert right == pytest.approx(rounds[-1].metrics["global_accuracy"])
    assert fit_heads(rounds[-1], clients=CLIENTS).accuracy.keys() == {
        client.id for client in CLIENTS
    }


def test_a_failing_client_is_one_lost_reply(play, registry, apps):
    def change(client, number, reply):
        if client == 4 and number == 2:
            raise ZeroDivisionError("no samples today")
        return None if client == 5 and number == 2 else reply

    rounds, result = play(app=faulty(apps, change), on_round=publish_rounds(registry, "m"))
    assert [len(it.sample_counts) for it in rounds] == [K, K - 2, K] and len(
        result.train_metrics_clientapp
    ) == 3
    assert (
        rounds[1].rejected["5"] == "ZeroDivisionError: no samples today"
        and "NoneType" in rounds[1].rejected["6"]
    )
    manifest = registry.manifest("m", 2)
    assert manifest.lineage.num_clients == K - 2 and manifest.lineage.extra["rejected_clients"] == 2
    assert "5 rejected: ZeroDivisionError: no samples today" in manifest.note


def test_a_reply_that_cannot_be_averaged_is_one_lost_reply(play, registry, apps):
    """Each of these ended the federation."""

    def change(client, number, reply):
        if number == 2:
            if client == 3:
                reply.content["metrics"].pop("num-examples")
            if client == 4:
                reply.content["metrics"]["num-examples"] = -1.0
            if client in (5, 6):
                arrays = reply.content["arrays"].to_torch_state_dict()
                arrays["head.bias"] = (
                    arrays["head.bias"][:1] if client == 5 else arrays["head.bias"] * float("nan")
                )
                reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    from flwr.app import ArrayRecord

    rounds, _ = play(app=faulty(apps, change), on_round=publish_rounds(registry, "m"))
    assert [len(it.sample_counts) for it in rounds] == [K, K - 4, K]
    assert list(rounds[1].rejected.values()) == [
        "it tells 'num-examples' = None",
        "it tells 'num-examples' = -1.0",
        "its arrays or metrics have other names or shapes than those of the others",
        "its arrays hold NaN or infinite values",
    ]
    assert registry.manifest("m", 2).lineage.extra["rejected_clients"] == 4


def test_a_round_that_nobody_answers(play, registry, apps):
    def change(client, number, reply):
        raise ValueError("away")

    with pytest.raises(
        ModelExecutionError, match=r"round 1 .*client 1: ValueError: away.*client app"
    ):
        play(app=faulty(apps, change), on_round=publish_rounds(registry, "m"))
    assert registry.models() == []  # nothing of the untrained model was published
    later = faulty(
        apps, lambda client, number, reply: change(client, number, reply) if number == 2 else reply
    )
    gate = Gate(clients=CLIENTS)
    rounds, _ = play(
        app=later, on_round=gated(registry, "m", gate, on_verdict=(verdicts := []).append)
    )
    assert all(
        torch.equal(rounds[1].state[name], tensor) for name, tensor in rounds[0].state.items()
    )
    assert [it.failed for it in verdicts] == [(), ("clients",), ()] and registry.resolve("m") == 3


def test_the_gate_refuses_a_poisoned_round(play, registry, apps):
    """Half of the clients turn in the third round; who is served does not notice."""
    app = faulty(
        apps,
        lambda client, number, reply: scaled(reply, -10) if number == 3 and client % 2 else reply,
    )
    verdicts = []
    play(app=app, on_round=gated(registry, "m", Gate(clients=CLIENTS), on_verdict=verdicts.append))
    assert [it.passed for it in verdicts] == [True, True, False] and "accuracy" in verdicts[
        2
    ].failed
    assert registry.resolve("m") == 2 and registry.version_numbers("m") == [1, 2, 3]


def test_what_overflows_is_refused_and_what_only_tells_nan_is_not(play, registry, apps, strategies):
    def loss_is_nan(client, number, reply):
        reply.content["metrics"]["loss"] = float("nan") if client == 0 else 1.0
        return reply

    play(app=faulty(apps, loss_is_nan), rounds=1, on_round=publish_rounds(registry, "m"))
    manifest = registry.manifest("m", 1)
    assert (
        manifest.lineage.extra["not_finite"] == "train.loss"
        and "train.loss" not in manifest.metrics
    )
    app = faulty(apps, lambda client, number, reply: scaled(reply, float("nan")))
    with pytest.raises(ModelExecutionError, match="client 1: its arrays hold NaN"):
        play(app=app, rounds=1, on_round=publish_rounds(registry, "m"))

    class Overflowing(strategies.FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            state = {
                name: tensor * float("inf") for name, tensor in arrays.to_torch_state_dict().items()
            }
            return type(arrays)(state), metrics

    with pytest.raises(InvalidModelError, match="holds NaN"):
        play(Overflowing(), rounds=1, on_round=publish_rounds(registry, "m"))
    assert registry.version_numbers("m") == [1]


def test_a_client_keeps_its_state_but_for_a_call_that_failed(flower, apps):
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def count(message, context):
        calls = context.state.setdefault("calls", ConfigRecord({"n": 0}))
        calls["n"] += 1
        message.content["asked"]["n"] = -1  # its own copy
        assert calls["n"] != 3, "third time"
        return Message(RecordDict({"told": calls}), reply_to=message)

    grid = flower.LocalGrid(app, 2)
    content = RecordDict({"asked": ConfigRecord({"n": 7})})
    told = []
    for _ in range(4):
        messages = [Message(content, node, "query") for node in grid.get_node_ids()]
        replies = grid.send_and_receive(messages)
        assert [it.metadata.reply_to_message_id for it in replies] == [
            it.metadata.message_id for it in messages
        ]
        assert [it.metadata.src_node_id for it in replies] == [1, 2]
        told += [
            it.error.reason if it.has_error() else it.content["told"]["n"] for it in replies[:1]
        ]
    # the count stays 2
    assert told[:2] == [1, 2] and all("AssertionError: third time" in it for it in told[2:])
    assert content["asked"]["n"] == 7
    pushed = grid.push_messages([grid.create_message(deepcopy(content), "query", 9, "g")])
    (reply,) = grid.pull_messages([*pushed, "unknown"])
    assert "KeyError: 9" in reply.error.reason and grid.pull_messages(pushed) == []


async def test_a_whole_app_runs_under_a_running_event_loop(flower, apps, strategies, registry):
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        on_round = publish_rounds(registry, "m")
        strategy = flower.Publishing(strategies.FedAvg(), on_round=on_round, **FORM)
        config = apps.train_config(context.run_config["seed"])
        strategy.start(
            grid=grid, initial_arrays=apps.initial_arrays(), num_rounds=1, train_config=config
        )
        context.state["config"] = config

    context = flower.run(app, apps.client_app(CLIENTS), K, {"seed": 3})
    assert context.state["config"]["seed"] == 3 and registry.version_numbers("m") == [1]


CELLS = """
import logging
from flserving.federated import flower
import flower_apps
from flserving import Registry, federated
from flserving.federated.rounds import publish_rounds
from flserving.models import architectures
from flwr.serverapp.strategy import FedAvg
logging.getLogger("flwr").setLevel("WARNING")
clients = federated.make_clients(*federated.digits(), num_clients=10, alpha=1.0)
registry = Registry("models")
#
strategy = flower.Publishing(FedAvg(), on_round=publish_rounds(registry, "m"), architecture="digits_mlp",
                             preprocessing=federated.federated_statistics(clients))
grid = flower.LocalGrid(flower_apps.client_app(clients), 10)
result = strategy.start(grid, flower_apps.initial_arrays(), 2, train_config=flower_apps.train_config())
#
registry.manifest("m", 2).metrics["global_accuracy"] > 0.8
"""


def test_it_runs_in_a_notebook(flower, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support"))))
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(it) for it in CELLS.split("#\n")]
    )
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert notebook.cells[-1].outputs[0]["data"]["text/plain"] == "True"


def readme(language):
    """The block of the app in this language, in the README of the integrations."""
    text = (ROOT / "flserving" / "integrations" / "README.md").read_text("utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (block,) = [it for it in blocks if "flwr" in it]
    return block


def test_the_readmes_app_runs_in_this_process(flower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(readme("python"), "app.py", "exec"), {"__name__": "__main__"})
    with Registry("models") as registry:
        assert registry.models() == ["flower"] and registry.resolve("flower") == 3
        heads = registry.manifest("flower", 3).heads
        assert (heads.layout, heads.num_heads) == ("head", K)


@pytest.fixture
def ray(tmp_path):
    """The address of Ray, which Flower's simulation then joins. Its raylet waits 15 s for its own
    agents, whatever is set (ray-project/ray#65983); started by ``flwr run``, a failure of that
    hangs, so it is started, and again, here."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("pip install 'flwr[simulation]'")
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds sockets
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    ports = [it.getsockname()[1] for it in sockets]
    for it in sockets:
        it.close()
    names = (
        "port",
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
        "runtime-env-agent-port",
    )
    options = [
        f"--{name}={port}"
        for name, port in zip((*names, "metrics-export-port"), ports, strict=True)
    ]
    options += [
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--num-cpus=2",
        f"--temp-dir={folder}",
    ]
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        "--disable-usage-stats",
        *options,
    ]
    environment = os.environ | {"PATH": PATH} | LOOPBACK
    try:
        for number in range(5):
            said = tmp_path / f"ray-{number}.log"
            with said.open("w") as out:
                process = subprocess.Popen(
                    command, env=environment, stdout=out, stderr=out, start_new_session=True
                )
            while process.poll() is None and "Ray runtime started" not in said.read_text():
                time.sleep(0.2)
            if process.poll() is None:
                yield f"127.0.0.1:{ports[0]}"
                return
            end(process)
        pytest.skip(f"Ray itself does not start here: {said.read_text()[-300:]}")
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def end(process):
    """End a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(1200)  # Ray takes 90 s to fail
def test_the_readmes_app_runs_by_flwr_run(flower, ray, tmp_path):
    """With Flower's simulation engine, which is Ray: minutes on a busy machine."""
    home = tmp_path / "home"
    app = tmp_path / "app"
    app.mkdir()
    (app / "app.py").write_text(readme("python"), "utf-8")
    (app / "pyproject.toml").write_text(readme("toml"), "utf-8")
    environment = os.environ | {
        "PATH": PATH,
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": ray,
        "FLWR_HOME": str(home),
    }
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"} | LOOPBACK
    command = ["flwr", "run", ".", "--stream", "--run-config", f'registry="{tmp_path / "models"}"']
    try:
        done = subprocess.run(
            command, cwd=app, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:  # the local SuperLink, which flwr run starts, would stay
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == str(home):
                    process.kill()
    with Registry(tmp_path / "models") as registry:
        assert registry.version_numbers("flower") == [1, 2, 3], done.stdout
        manifest = registry.manifest("flower", 3)
        # flwr simulates two by default
        assert manifest.heads.num_heads == manifest.lineage.num_clients == 2


def with_head(reply, **changes):
    """The reply with the client's own head beside the arrays."""
    from flwr.app import ArrayRecord

    state = reply.content["arrays"].to_torch_state_dict()
    reply.content["head"] = ArrayRecord(
        {name: state[f"head.{name}"] for name in ("weight", "bias")}
    )
    for name, array in changes.items():
        reply.content["head"][name] = array
    return reply


def test_own_heads_of_clients_are_served(play, registry, apps):
    """A head comes with the reply; who replies without one later keeps it; the strategy averages
    what it always did."""
    sent = {}

    def change(client, number, reply):
        if client in (2, 5) and not (client == 5 and number > 1):
            reply = with_head(reply)
            sent[client] = reply.content["head"].to_torch_state_dict()
        return reply

    rounds, _ = play(
        app=faulty(apps, change), on_round=publish_rounds(registry, "m", alias="default"), rounds=2
    )
    plain, _ = play(rounds=2)
    assert all(
        torch.equal(rounds[1].state[name], tensor) for name, tensor in plain[1].state.items()
    )
    assert (
        registry.manifest("m", 2).heads.num_heads == 2
        and registry.manifest("m", 2).lineage.num_clients == K
    )
    rows = CLIENTS[0].test_x
    with PersonalizedServer(registry=registry, model="m") as server:
        for client, head in sent.items():
            module = models.build("digits_mlp")
            module.load_state_dict(
                rounds[1].state | {f"head.{name}": tensor for name, tensor in head.items()}
            )
            wanted = torch.softmax(module(Preprocessor(**STATISTICS)(rows)), 1).detach().numpy()
            got = server.predict(str(client + 1), rows)["probabilities"]
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def pickled(array):
    """An array that claims to be as it was, and hides a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    return type(array)(array.dtype, array.shape, array.stype, buffer.getvalue())


def test_what_is_no_array_of_numbers_is_left_out_and_named(play, registry, apps):
    """Each of these ended the run. A head is left out alone."""

    def change(client, number, reply):
        arrays = reply.content["arrays"]
        bias = arrays["head.bias"]
        if client == 1:
            arrays["head.bias"] = pickled(bias)
        if client == 2:
            arrays["head.bias"] = type(bias)(bias.dtype, bias.shape, "torch.Tensor", bias.data)
        if client == 3:
            arrays["head.bias"] = type(bias)(
                bias.dtype, bias.shape, bias.stype, arrays["head.weight"].data
            )
        if client == 4:
            reply = with_head(reply, bias=pickled(bias))
        if client == 5:
            reply = with_head(reply, bias=type(bias)(np.full(10, np.nan, "f4")))
        if client == 6:
            reply = with_head(reply, bias=type(bias)(np.zeros(9, "f4")))
        return with_head(reply) if client == 7 else reply

    rounds, _ = play(app=faulty(apps, change), rounds=1, on_round=publish_rounds(registry, "m"))
    why = rounds[0].rejected
    assert list(why) == ["2", "3", "4", "5", "6", "7"] and len(rounds[0].sample_counts) == K - 3
    assert (
        "allow_pickle=False" in why["2"]
        and "torch.Tensor" in why["3"]
        and "and claim float32[10]" in why["4"]
    )
    assert all(why[client].startswith("its head was left out: ") for client in "567")
    assert "allow_pickle=False" in why["5"] and "NaN" in why["6"] and "[10, 64]" in why["7"]
    assert rounds[0].personal.keys() == {"8"} and registry.manifest("m", 1).heads.num_heads == 1
    assert registry.manifest("m", 1).note.count("rejected: its head was left out") == 3


def test_an_evaluation_may_bring_a_head_and_a_faulty_one_is_left_out(play, apps):
    """A head that was fine-tuned on the new model comes with the evaluation."""
    from flwr.app import ArrayRecord, MetricRecord
    from flwr.clientapp import ClientApp

    app = ClientApp()
    inner = apps.client_app(CLIENTS)
    app.train()(inner)

    @app.evaluate()
    def evaluate(message, context):
        reply = inner(message, context)
        client = context.node_config["partition-id"]
        if client == 0:
            reply.content["head"] = ArrayRecord(
                {"weight": torch.ones(10, 64), "bias": torch.ones(10)}
            )
        if client == 1:
            reply.content["metrics"] = MetricRecord({"num-examples": 3})
        if client == 2:
            reply.content["metrics"]["num-examples"] = -3
        if client == 3:
            reply.content["metrics"]["accuracy"] = float("nan")
        return reply

    (done,), result = play(app=app, rounds=1)
    assert done.personal.keys() == {"1"} and done.personal["1"]["head.bias"].tolist() == [1.0] * 10
    assert len(done.sample_counts) == K and done.rejected.keys() == {"2", "3"}
    assert all(why.startswith("its evaluation was left out: ") for why in done.rejected.values())
    assert done.client_accuracy.keys() == {str(node) for node in range(1, K + 1)} - {"2", "3", "4"}
    assert "accuracy" in result.evaluate_metrics_clientapp[1]


def test_heads_of_a_model_that_has_none(flower, strategies, registry, monkeypatch):
    """An image model with a mean and a deviation per channel, of which no head can be told
    apart."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from torch import nn

    monkeypatch.setattr(architectures, "_known", dict(architectures._known))

    @models.register("image", input_shape=(3, 4, 4), output_shape=(2,))
    def image():
        return nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten())

    app = ClientApp()

    @app.train()
    def train(message, context):
        content = RecordDict(
            {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 3})}
        )
        if context.node_config["partition-id"]:
            content["head"] = ArrayRecord([np.zeros(3)])
        return Message(content, reply_to=message)

    statistics = {
        "mean": np.reshape([1.0, 2.0, 3.0], (3, 1, 1)),
        "std": np.reshape([1.0, 2.0, 4.0], (3, 1, 1)),
    }
    strategy = flower.Publishing(
        strategies.FedAvg(fraction_evaluate=0.0),
        on_round=publish_rounds(registry, "m", alias="default"),
        architecture="image",
        preprocessing=statistics,
    )
    torch.manual_seed(0)
    module = image()
    strategy.start(flower.LocalGrid(app, 2), ArrayRecord(module.state_dict()), 1)
    manifest = registry.manifest("m", 1)
    assert (
        manifest.heads is None
        and "its head was left out: " in manifest.note
        and "has none" in manifest.note
    )
    rows = torch.randn(5, 3, 4, 4)
    mean, std = (torch.tensor(statistics[name], dtype=torch.float32) for name in ("mean", "std"))
    wanted = torch.softmax(module((rows - mean) / std), 1)
    with ModelServer(registry=registry, model="m") as server:
        got = server.predict(rows.numpy())["probabilities"]
    np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-5)


def test_wrong_arguments_are_told_before_anything_runs(flower, strategies, apps, play):
    class Own(strategies.FedAvg):
        def start(self, *_, **__):
            pass

    avg = strategies.FedAvg()
    for strategy in ("FedAvg", strategies.FedAvg, Own()):
        with pytest.raises(ConfigError, match=r"flwr\.serverapp\.strategy"):
            flower.Publishing(strategy, on_round=print, **FORM)
    with pytest.raises(ConfigError, match="publish_rounds"):
        flower.Publishing(avg, on_round=None, **FORM)
    with pytest.raises(NotFoundError, match="no architecture 'resnet'"):
        flower.Publishing(avg, on_round=print, architecture="resnet", preprocessing=STATISTICS)
    with pytest.raises(ConfigError, match="num_supernodes is 0"):
        flower.LocalGrid(apps.client_app(CLIENTS), 0)
    with pytest.raises(ConfigError, match="client_app is a int"):
        flower.LocalGrid(3, 3)
    with pytest.raises(ConfigError, match="server_app is a ClientApp"):
        flower.run(apps.client_app(CLIENTS), apps.client_app(CLIENTS), 3)


def test_what_no_version_takes_is_told_before_the_first_round(flower, strategies, apps):
    from flwr.app import Array, ArrayRecord, ConfigRecord

    grid = flower.LocalGrid(apps.client_app(CLIENTS), K)

    def start(arrays, config=None, **form):
        flower.Publishing(strategies.FedAvg(), on_round=pytest.fail, **FORM | form).start(
            grid, arrays, 1, train_config=config
        )

    state = apps.initial_arrays().to_torch_state_dict()
    with pytest.raises(InvalidModelError, match=r"head\.bias is .*\[11\], not .*\[10\]"):
        start(ArrayRecord(state | {"head.bias": torch.zeros(11)}))
    with pytest.raises(InvalidModelError, match="'digits_mlp': 0 is unexpected"):
        # as a list, without their names
        start(ArrayRecord([tensor.numpy() for tensor in state.values()]))
    with pytest.raises(InvalidModelError, match="cannot be read as tensors"):
        start(ArrayRecord({"trees": Array("", (), "", b"{}")}))
    with pytest.raises(ConfigError, match="statistics have 1 features, the model takes 64"):
        start(ArrayRecord(state), preprocessing={"mean": [0.0], "std": [1.0]})
    with pytest.raises(InvalidModelError, match="plain, finite values"):
        start(ArrayRecord(state), ConfigRecord({"lr": float("inf")}))


def test_clients_that_do_not_tell_their_samples(play, apps, strategies):
    def renamed(client, number, reply):
        metrics = reply.content["metrics"]
        metrics["weight"] = metrics.pop("num-examples") / 1000
        return reply

    strategy = strategies.FedAvg(weighted_by_key="weight", fraction_evaluate=0.0)
    for bad in (0.5, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="client 1 tells 'num-examples' = "):
            play(
                strategies.Krum(),
                app=faulty(apps, lambda *given, bad=bad: counting(given[-1], bad)),
                rounds=1,
            )
    with pytest.raises(
        ConfigError,
        match=r"client 1 tells 'num-examples' = None among \['loss', 'weight'\].*samples=",
    ):
        play(strategy, app=faulty(apps, renamed), rounds=1)


def test_a_strategy_that_waits_for_more_clients_does_not_wait_for_ever(
    flower, strategies, apps, monkeypatch
):
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _: None)
    strategy = strategies.FedAvg(min_available_nodes=3)
    with pytest.raises(
        ConfigError, match=r"more clients than the 2 of this run.*min_available_nodes"
    ):
        strategy.start(flower.LocalGrid(apps.client_app(CLIENTS), 2), apps.initial_arrays(), 1)
