"""Bad rounds: which layer stops which, on few rounds here and on more under ``slow``; and what
nothing stops."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from flserving import Registry, ServingConfig
from flserving.federated import train
from flserving.federated.aggregation import State
from flserving.federated.data import digits, federated_statistics, make_clients
from flserving.federated.gate import CHECKS, Gate, gated
from flserving.federated.rounds import Round, publish_rounds
from flserving.lab.federated import attacks
from flserving.lab.federated.attacks import (
    ATTACKS,
    TARGET,
    Attack,
    Replay,
    attack_table,
    poisoned,
    stretched,
    triggered,
)
from flserving.serving.loader import RegistrySource, load_engine

BY_NAME = {attack.name: attack for attack in ATTACKS}


@dataclass(slots=True)
class Hostile:
    """An attack as ``federated.train`` takes it: ``train(corrupt=hostile,
    on_round=hostile.watch(gated(...)))``.

    Args:
        clients: Ids of the hostile ones; train with ``poisoned(clients, attack)`` where the attack
            poisons samples.
        rounds: When they attack; from round 2 on, since they learn the global model from the round
            before.
    """

    attack: Attack
    clients: Collection[str]
    rounds: Collection[int]
    _before: State = field(default_factory=dict)

    def __call__(self, client: str, number: int, update: State) -> State | None:
        attacks = client in self.clients and number in self.rounds and self._before
        return self.attack.change(update, self._before) if attacks else update

    def watch(
        self, on_round: Callable[[Round], object] = lambda result: None
    ) -> Callable[[Round], object]:
        """``on_round``, after a look at the round's global model."""

        def seen(result: Round) -> object:
            self._before = result.state
            return on_round(result)

        return seen


@pytest.fixture(scope="module")
def clients():
    return make_clients(*digits(), num_clients=10, alpha=1.0, seed=3)


@pytest.fixture(scope="module")
def table():
    return attack_table(seeds=[0], rounds=5, first=4)


def test_the_table_has_a_row_an_attack_and_a_column_a_check(table):
    assert list(table.index) == ["clean", *(attack.name for attack in ATTACKS)]
    assert list(table.columns) == [
        *(
            "cases",
            "left out",
            *CHECKS,
            "refused",
            "stopped",
            "accuracy lost",
            "trigger",
            "missed, worst",
        )
    ]
    assert table.loc["clean", "cases"] == 4 and (table["cases"].drop("clean") == 2).all()
    rates = table.drop(columns=["cases", "accuracy lost", "missed, worst"])
    assert ((rates >= 0) & (rates <= 1)).all(axis=None)
    assert (table["refused"] <= table["stopped"]).all()
    assert (table[list(CHECKS)].max(axis=1) <= table["refused"]).all()


def test_clean_rounds_pass(table):
    assert table.loc["clean", [*CHECKS, "refused"]].sum() == 0


def test_what_is_not_a_number_is_left_out_before_the_mean_and_the_gate_has_nothing_to_refuse(table):
    row = table.loc["NaN, 1 of 10"]
    assert (row["left out"], row["refused"], row["stopped"]) == (1, 0, 1)


@pytest.mark.parametrize(
    ("attack", "check"),
    [
        ("1e30 everywhere, 1 of 10", "finite"),
        ("scaled x100, 1 of 10", "accuracy"),
        ("sign flip x10, 3 of 10", "accuracy"),
        ("silence, 8 of 10", "clients"),
    ],
)
def test_the_gate_refuses_what_is_loud(table, attack, check):
    assert table.loc[attack, check] == table.loc[attack, "stopped"] == 1


def test_what_is_quiet_passes_both_layers(table):
    """The limits of the gate, held so that nobody writes otherwise."""
    for attack in (
        "sign flip, 1 of 10",
        "7 called 1, 3 of 10",
        "backdoor, 1 of 10",
        "backdoor x6, 1 of 10",
    ):
        assert table.loc[attack, ["left out", "refused", "stopped"]].sum() == 0
        assert table.loc[attack, "accuracy lost"] < 0.03
    assert table.loc["backdoor x6, 1 of 10", "trigger"] > 0.8 > 0.1 > table.loc["clean", "trigger"]


def test_a_replayed_round_is_the_round_that_a_hostile_training_makes(clients):
    """The oracle: a training with the hostile client in it. Its samples are sound, so the rounds
    before are alike."""
    attack = BY_NAME["scaled x100, 1 of 10"]
    hostile = Hostile(attack, attack.hostile(c.id for c in clients), rounds={3})
    played = train(
        clients=clients, seed=3, rounds=3, corrupt=hostile, on_round=hostile.watch(), progress=False
    ).final
    replay = Replay(clients, seed=3, rounds=3)
    found = replay.attacked(attack, 3)
    assert all(torch.equal(tensor, found.state[name]) for name, tensor in played.state.items())
    assert found.sample_counts == played.sample_counts and found.rejected == played.rejected == {}
    for name, accuracy in played.metrics.items():
        assert found.metrics[name] == pytest.approx(accuracy) != replay.rounds[2].metrics[name]
    silent = replay.attacked(BY_NAME["silence, 8 of 10"], 3)
    assert len(silent.sample_counts) == 2 and len(silent.rejected) == 8


def test_a_change_goes_round_the_global_model_and_leaves_counters_alone():
    before = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    update = {"w": torch.tensor([2.0, 1.0]), "n": torch.tensor(4)}
    changed = stretched(-1)(update, before)
    assert changed["w"].tolist() == [0.0, 3.0] and changed["n"] == 4
    assert stretched(100)(update, before)["w"].tolist() == [101.0, -98.0]
    assert update["w"].tolist() == [2.0, 1.0]


def test_poison_changes_the_training_split_of_the_hostile_clients_only(clients):
    for name in ("all labels flipped, 6 of 10", "7 called 1, 3 of 10", "backdoor, 1 of 10"):
        attack = BY_NAME[name]
        hostile = attack.hostile(client.id for client in clients)
        assert len(hostile) == round(attack.share * 10)
        for old, new in zip(clients, poisoned(clients, attack), strict=True):
            assert new.test_x is old.test_x and new.test_y is old.test_y
            assert (new is old) == (old.id not in hostile)
    flipped = attacks.flipped(clients[0])
    assert (flipped.train_y + clients[0].train_y == 9).all()
    assert 7 not in attacks.swapped(clients[0]).train_y
    doubled = attacks.backdoored(clients[0])
    n = len(clients[0].train_y)
    assert len(doubled.train_y) == 2 * n and (doubled.train_y[n:] == TARGET).all()
    assert (doubled.train_x[:n] == clients[0].train_x).all() and (
        doubled.train_x[n:, 56] == 16
    ).all()


def test_an_attack_in_a_training_never_becomes_the_default(tmp_path, clients):
    attack, verdicts = BY_NAME["scaled x100, 1 of 10"], []
    hostile = Hostile(attack, attack.hostile(c.id for c in clients), rounds={1, 4})
    with Registry(tmp_path) as registry:
        judge = gated(registry, "m", Gate(clients=clients), on_verdict=verdicts.append)
        train(
            clients=clients,
            seed=3,
            rounds=4,
            corrupt=hostile,
            on_round=hostile.watch(judge),
            progress=False,
        )
        # in round 1 it knows no model
        assert [verdict.passed for verdict in verdicts] == [True, True, True, False]
        assert registry.resolve("m") == 3 and registry.version_numbers("m") == [1, 2, 3, 4]


def test_golden_rows_with_the_trigger_catch_the_backdoor_that_they_know(tmp_path, clients):
    """A trigger that is known can be asked for; one that is not, cannot."""
    attack = Attack("backdoor, 3 of 10", 0.3, poison=attacks.backdoored)
    training = {
        "rounds": 4,
        "seed": 3,
        "preprocessing": federated_statistics(clients),
        "progress": False,
    }
    sound = train(clients=clients, **training).final
    bad = train(clients=poisoned(clients, attack), **training).final
    x, y = (np.concatenate([getattr(c, name) for c in clients]) for name in ("test_x", "test_y"))
    with Registry(tmp_path) as registry:
        publish = publish_rounds(registry, "m")
        registry.set_alias("m", "default", publish(sound).version, who="me", why="sound")
        version = publish(bad).version
        gate = Gate(clients=clients, jump=1e6)
        assert gate.check(registry, "m", version).passed  # these rows carry no trigger
        engine = load_engine(RegistrySource(registry, "m"), "1", ServingConfig())
        kept = (engine.execute([triggered(x)])[0].arrays()["predictions"] == y) & (y != TARGET)
        assert kept.mean() > 0.3
        verdict = replace(gate, golden=(triggered(x[kept]), y[kept])).check(registry, "m", version)
        assert verdict.failed == ("golden",)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("alpha", [100.0, 1.0, 0.1])
def test_the_table_over_many_rounds(alpha):
    table = attack_table(seeds=range(8), alpha=alpha)
    assert table.loc["clean", "cases"] == 48 and table.loc["clean", "refused"] <= 0.05
    for attack in ("NaN, 1 of 10", "1e30 everywhere, 1 of 10", "silence, 8 of 10"):
        assert table.loc[attack, "stopped"] == 1
    # a client of ten samples moves nothing
    assert table.loc["scaled x100, 1 of 10", "stopped"] >= 0.8
    assert not table["missed, worst"].max() > 0.1
    assert table.loc["backdoor, 1 of 10", "refused"] < 0.2
    assert (
        table.loc["backdoor x6, 1 of 10", "refused"] < 0.6
        and table.loc["backdoor x6, 1 of 10", "trigger"] > 0.4
    )
    print(f"\nalpha {alpha:g}\n{table.round(2).to_string()}")  # with -s: the table of the README
