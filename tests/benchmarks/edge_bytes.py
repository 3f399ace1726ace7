"""Bytes that a device downloads for each federated round, and what the smaller forms cost in
accuracy.

    python tests/benchmarks/edge_bytes.py            # under a minute; prints the table
    python tests/benchmarks/edge_bytes.py --quick    # seconds: a small model, few rounds

A real cloud and real devices over loopback: each device pulls every round. Counted are the bodies
of the answers; a pull without news costs one signed statement. The accuracy is that of the global
model on all held-out samples.
"""

import argparse
import contextlib
import tempfile
from collections import Counter
from dataclasses import dataclass

import numpy as np

import flserving
from flserving import ModelServer, Registry
from flserving.api.auth import Role, Tokens
from flserving.edge import EdgeModelServer
from flserving.edge.sync import SyncAgent
from flserving.federated import train
from flserving.federated.rounds import Round, Run
from flserving.registry.heads import HeadSet

MODELS = {
    "digits_mlp": ("digits_mlp", {}, 10),
    "mlp 64-512-512-10": ("mlp", {"sizes": [64, 512, 512, 10]}, 6),
}
WAYS = ("full", "delta exact", "delta int8", "head only")


@dataclass(frozen=True)
class Row:
    """Mean bytes of one round: ``payload`` is weights, delta or head, ``whole`` all that was
    received."""

    model: str
    way: str
    payload: float
    whole: float
    accuracy: float

    def markdown(self, full: "Row") -> str:
        loss = (
            ""
            if self.way not in ("delta int8",)
            else f"{100 * (full.accuracy - self.accuracy):+.2f} points"
        )
        return (
            f"| {self.model} | {self.way} | {self.payload:,.0f} | {self.payload / full.payload:.1%} | "
            f"{self.whole:,.0f} | {self.accuracy:.4f} | {loss} |"
        )


def publish(registry: Registry, recipe_round: Round, heads_of: Round) -> None:
    """A round with the heads of (perhaps another) round."""
    it = recipe_round
    registry.publish(
        "m", it.state, architecture=it.recipe.architecture, parameters=it.recipe.parameters, alias="default",
        preprocessing=it.preprocessing, lineage={"round": it.number}, metrics=it.metrics,
        heads=HeadSet.from_states(heads_of.personal),
    )  # fmt: skip


def accuracy(registry: Registry, run: Run) -> float:
    """Of the global model that a device serves now."""
    x = np.concatenate([client.test_x for client in run.clients])
    y = np.concatenate([client.test_y for client in run.clients])
    with ModelServer(registry=registry) as server:
        parts = [
            server.predict(part, arrays=True)["predictions"]
            for part in np.array_split(x, -(-len(x) // 200))
        ]
    return float((np.concatenate(parts) == y).mean())


def rows(quick: bool = False) -> list[Row]:
    """The table's rows, model by model, in the order of ``WAYS``."""
    made = []
    for model, (architecture, parameters, rounds) in list(MODELS.items())[: 1 if quick else None]:
        run = train(
            "fedavg_ft", rounds=3 if quick else rounds, architecture=architecture, parameters=parameters,
            num_clients=20, alpha=0.5, progress=False,
        )  # fmt: skip
        made += measure(model, run)
    return made


def measure(model: str, run: Run) -> list[Row]:
    tokens, client = Tokens(), run.clients[0].id
    tokens.add("device", Role.INFER, client)
    spent = {way: Counter[str]() for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        registry = stack.enter_context(Registry(f"{scratch}/cloud"))
        publish(registry, run.rounds[0], run.rounds[0])
        server = stack.enter_context(ModelServer(registry=registry))
        options = {"tokens": tokens, "grpc_port": None, "artifacts": True}
        url = stack.enter_context(flserving.serve(server, **options)).url

        def device(name: str, form: str) -> tuple[Registry, SyncAgent]:
            own = stack.enter_context(Registry(f"{scratch}/{name}"))
            edge = stack.enter_context(EdgeModelServer(registry=own, client=client))
            agent = SyncAgent(url, "device", own, edge=edge, client=client, form=form)
            return own, stack.enter_context(contextlib.closing(agent))

        devices = {"delta exact": device("exact", "exact"), "delta int8": device("int8", "int8")}
        for _, agent in devices.values():
            agent.pull()
        for it in run.rounds[1:]:
            publish(registry, it, it)
            for way, (_, agent) in devices.items():
                spent[way].update(agent.pull().nbytes)
            _, fresh = device(f"full-{it.number}", "exact")  # it has no base: all of it comes
            spent["full"].update(fresh.pull().nbytes)
        accuracies = {way: accuracy(own, run) for way, (own, _) in devices.items()}
        for it in run.rounds[1:]:
            publish(registry, run.rounds[-1], it)  # the same weights, other heads
            spent["head only"].update(devices["delta exact"][1].pull().nbytes)
    turns = len(run.rounds) - 1
    payload = {"full": ["weights"], "head only": ["head", "delta"]}
    return [
        Row(
            model, way, sum(spent[way][kind] for kind in payload.get(way, ["delta"])) / turns,
            sum(spent[way].values()) / turns, accuracies.get(way, accuracies["delta exact"]),
        )
        for way in WAYS
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    measured = rows(parser.parse_args().quick)
    print(
        "| model | a round travels as | bytes | of full | with manifest, statement, head | accuracy | loss |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in measured:
        print(
            row.markdown(
                next(full for full in measured if (full.model, full.way) == (row.model, "full"))
            )
        )


if __name__ == "__main__":
    main()
