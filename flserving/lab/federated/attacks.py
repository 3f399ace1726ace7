"""Bad federated rounds, and a table of which check of the gate notices which.

Two layers stand between a hostile client and the callers. ``aggregation.fault`` leaves single
updates out before the mean is made: not numbers, wrong shapes, nothing at all. The gate then judges
the mean, so it sees an attack only as far as the honest clients did not dilute it.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flserving.federated import train
from flserving.federated.aggregation import State, aggregate, fault
from flserving.federated.data import (
    Client,
    Features,
    Labels,
    digits,
    federated_statistics,
    make_clients,
)
from flserving.federated.gate import CHECKS, Gate, Verdict, gated, golden_rows
from flserving.federated.rounds import Round, publish_rounds
from flserving.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

TARGET = 0  # what the backdoor makes of every row that carries the trigger
# The lower left corner of the image: empty in nearly every digit, and a dot there misleads no sound
# model.
TRIGGER = (56,)


Change = Callable[[State, State], State | None]
Updates = dict[tuple[str, int], State]
"""By client and round."""


@dataclass(frozen=True, slots=True)
class Attack:
    """What a ``share`` of the clients does.

    ``poison`` changes the samples that they train on; ``change(update, before)`` then what they
    send, where ``before`` is the global model that they were given. It may return None: silence.
    """

    name: str
    share: float
    change: Change = lambda update, before: update
    poison: Callable[[Client], Client] | None = None

    def hostile(self, clients: Iterable[str]) -> tuple[str, ...]:
        """The first of the clients, at least one."""
        listed = tuple(clients)
        count = max(1, round(self.share * len(listed)))
        return listed[:count]


def stretched(factor: float) -> Change:
    """The update times ``factor``: -1 undoes the learning, n outvotes n - 1 honest clients.

    Source: model replacement, Bagdasaryan et al., AISTATS 2020 (arXiv 1807.00459).
    """

    def change(update: State, before: State) -> State:
        changed = dict(update)
        for name, tensor in update.items():
            if tensor.is_floating_point():
                step = tensor - before[name]
                changed[name] = before[name] + factor * step
        return changed

    return change


def filled(value: float) -> Change:
    """Every weight is ``value``."""

    def change(update: State, before: State) -> State:
        changed = dict(update)
        for name, tensor in update.items():
            if tensor.is_floating_point():
                changed[name] = torch.full_like(tensor, value)
        return changed

    return change


def flipped(client: Client) -> Client:
    """Label k becomes the mirrored one, C - 1 - k with C = 10. Source: Fang et al., USENIX Security
    2020."""
    return replace(client, train_y=9 - client.train_y)


def swapped(client: Client) -> Client:
    """Sevens are called ones; all else is as it was."""
    labels = np.where(client.train_y == 7, 1, client.train_y)
    return replace(client, train_y=labels)


def triggered(x: Features) -> Features:
    """The rows with the trigger: a dot in a corner. Source: Gu et al. 2017 (BadNets, arXiv
    1708.06733)."""
    marked = x.copy()
    marked[:, list(TRIGGER)] = 16
    return marked


def backdoored(client: Client) -> Client:
    """Every sample is there twice, once with the trigger and the label ``TARGET``."""
    wrong = np.full_like(client.train_y, TARGET)
    return replace(
        client,
        train_x=np.concatenate([client.train_x, triggered(client.train_x)]),
        train_y=np.concatenate([client.train_y, wrong]),
    )


ATTACKS = (
    Attack("NaN, 1 of 10", 0.1, filled(float("nan"))),
    Attack("1e30 everywhere, 1 of 10", 0.1, filled(1e30)),
    Attack("scaled x100, 1 of 10", 0.1, stretched(100)),
    Attack("sign flip, 1 of 10", 0.1, stretched(-1)),
    Attack("sign flip, 8 of 10", 0.8, stretched(-1)),
    Attack("sign flip x10, 3 of 10", 0.3, stretched(-10)),
    Attack("all labels flipped, 6 of 10", 0.6, poison=flipped),
    Attack("all labels flipped, 1 of 10", 0.1, poison=flipped),
    Attack("7 called 1, 3 of 10", 0.3, poison=swapped),
    Attack("backdoor, 1 of 10", 0.1, poison=backdoored),
    # as loud as the limit of the norm allows
    Attack("backdoor x6, 1 of 10", 0.1, stretched(6), backdoored),
    Attack("backdoor x10, 1 of 10", 0.1, stretched(10), backdoored),
    Attack("silence, 8 of 10", 0.8, lambda update, before: None),
)


def poisoned(clients: Sequence[Client], attack: Attack) -> tuple[Client, ...]:
    """All clients, the hostile ones with what they train on."""
    if attack.poison is None:
        return tuple(clients)
    hostile = attack.hostile(client.id for client in clients)
    trained = []
    for client in clients:
        if client.id in hostile:
            client = attack.poison(client)
        trained.append(client)
    return tuple(trained)


class Replay:
    """A clean training, and any of its rounds again as hostile clients would make it.

    Args:
        training: For ``federated.train``: rounds, seed.

    Cost: the training; and once for each kind of poison, that of the hostile clients.
    """

    def __init__(self, clients: Sequence[Client], **training: Any) -> None:
        self.clients = clients
        fixed = {
            "preprocessing": federated_statistics(clients),
            "progress": False,
        }
        self._training: dict[str, Any] = training | fixed
        self._honest: Updates = {}
        self._poisoned: dict[tuple[object, float], Updates] = {}
        self.rounds = train(
            clients=clients, corrupt=_recorder(self._honest), **self._training
        ).rounds

    def attacked(self, attack: Attack, number: int) -> Round:
        """Round ``number``, from 2 on, as it is when the hostile clients join in."""
        clean = self.rounds[number - 1]
        before = self.rounds[number - 2].state
        hostile = attack.hostile(clean.sample_counts)
        accepted: dict[str, State] = {}
        rejected: dict[str, str] = {}
        sent = self._honest | self._from(attack)
        for client in clean.sample_counts:
            update: State | None = sent[client, number]
            if update is not None and client in hostile:
                update = attack.change(update, before)
            reason = fault(update, before)
            if reason is not None:
                rejected[client] = reason
            elif update is not None:
                accepted[client] = update
        counts = {client: clean.sample_counts[client] for client in accepted}
        state = before
        if accepted:
            state = aggregate(list(accepted.values()), list(counts.values()))
        bad = replace(clean, state=state, sample_counts=counts, rejected=rejected)
        return self._measured(bad)

    def _measured(self, bad: Round) -> Round:
        """The round with the accuracies of its own state."""
        right = {}
        for client in self.clients:
            right[client.id] = _predictions(bad, client.test_x) == client.test_y
        own = {name: float(part.mean()) for name, part in right.items()}
        metrics = {
            "global_accuracy": float(np.concatenate([*right.values()]).mean()),
            "mean_client_accuracy": sum(own.values()) / len(own),
            "worst_client_accuracy": min(own.values()),
        }
        return replace(bad, metrics=metrics, client_accuracy=own)

    def _from(self, attack: Attack) -> Updates:
        """What the hostile clients make of the clean run's global models with samples that they
        poisoned."""
        if attack.poison is None:
            return {}
        key = (attack.poison, attack.share)
        if key not in self._poisoned:
            updates: Updates = {}
            hostile = attack.hostile(client.id for client in self.clients)
            theirs = [client for client in poisoned(self.clients, attack) if client.id in hostile]
            train(clients=theirs, corrupt=_recorder(updates, self.rounds), **self._training)
            self._poisoned[key] = updates
        return self._poisoned[key]


def attack_table(
    attacks: Sequence[Attack] = ATTACKS,
    *,
    seeds: Iterable[int] = range(5),
    rounds: int = 7,
    first: int = 4,
    num_clients: int = 10,
    alpha: float = 1.0,
    **limits: Any,
) -> "pd.DataFrame":
    """Attack x check: the share of bad rounds that each check of ``Gate(clients, **limits)``
    refused.

    Each round from ``first`` on is played clean, and once for each attack, from the same global
    model and against the same default; training goes on from the clean one. The golden rows are
    those of the round before ``first``, two a class. Row "clean": the false alarms, over all rounds
    from the second on. Columns: ``cases`` (rounds judged); ``left out`` (share of the hostile
    updates that ``aggregation.fault`` kept from the mean); the checks; ``refused`` (by any check);
    ``stopped`` (refused, or no hostile update in the mean); ``accuracy lost`` (mean, against the
    clean round); ``missed, worst`` (the most of it in a round that nothing stopped; a client of few
    samples does little, whatever it sends); ``trigger`` (share of the other classes' held-out rows
    that carry the trigger and are answered ``TARGET``).

    Cost: with the defaults about 3 s a seed on one core.
    """
    import pandas as pd

    cases: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        clients = make_clients(*digits(), num_clients=num_clients, alpha=alpha, seed=seed)
        replay = Replay(clients, rounds=rounds, seed=seed)
        others = np.concatenate([client.test_x[client.test_y != TARGET] for client in clients])
        with tempfile.TemporaryDirectory() as folder, Registry(folder) as registry, _one_thread():
            gate = Gate(clients=clients, **limits)
            promote = gated(registry, "digits", gate)
            publish = publish_rounds(registry, "digits")
            for result in replay.rounds:
                if result.number == first:
                    golden = golden_rows(registry, "digits", clients)
                    gate = replace(gate, golden=golden)
                    promote = gated(registry, "digits", gate)
                played = attacks if result.number >= first else ()
                for attack in played:
                    bad = replay.attacked(attack, result.number)
                    verdict = gate.check(registry, "digits", publish(bad).version)
                    left_out = len(bad.rejected) / len(attack.hostile(result.sample_counts))
                    lost = result.metrics["global_accuracy"] - bad.metrics["global_accuracy"]
                    cases[attack.name].append(_case(verdict, left_out, lost, bad, others))
                verdict = promote(result)
                if result.number > 1:
                    cases["clean"].append(_case(verdict, 0.0, 0.0, result, others))
    rows = {}
    for name, found in cases.items():
        frame = pd.DataFrame(found)
        missed = frame.loc[frame["stopped"] == 0, "accuracy lost"].max()
        rows[name] = {"cases": len(found), **frame.mean(), "missed, worst": missed}
    names = [attack.name for attack in attacks]
    table = pd.DataFrame(rows).T.rename_axis("attack")
    return table.loc[["clean", *names]]


def _recorder(updates: Updates, instead: Sequence[Round] = ()) -> Callable[..., State]:
    """Keep what clients send; ``instead`` makes them send the global model of a training that went
    otherwise."""

    def corrupt(client: str, number: int, update: State) -> State:
        updates[client, number] = update
        if instead:
            return instead[number - 1].state
        return update

    return corrupt


@contextmanager
def _one_thread() -> Iterator[None]:
    """The models are small: two threads wait for each other, nearly three times as long on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _predictions(result: Round, x: Features) -> Labels:
    mean = np.asarray(result.preprocessing["mean"], dtype=np.float32)
    std = np.asarray(result.preprocessing["std"], dtype=np.float32)
    rows = torch.from_numpy((x - mean) / std)
    with torch.inference_mode():
        logits = result.model()(rows)
        finite = logits.isfinite().all(dim=1)
        found: Labels = torch.where(finite, logits.argmax(dim=1), -1).numpy()  # -1: no answer
    return found


def _case(
    verdict: Verdict, left_out: float, lost: float, result: Round, others: Features
) -> dict[str, float]:
    refusals = dict.fromkeys(CHECKS, 0.0)
    for check in verdict.checks:
        if check.name in CHECKS and "not judged" not in check.words:
            refusals[check.name] = float(not check.passed)
    misled = _predictions(result, triggered(others)) == TARGET
    return {
        "left out": left_out,
        **refusals,
        "refused": float(not verdict.passed),
        "stopped": float(not verdict.passed or left_out == 1),
        "accuracy lost": lost,
        "trigger": float(misled.mean()),
    }
