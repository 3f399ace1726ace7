"""Where versions come from: clients' data, rounds of training, and the gate that a round must pass.

``aggregation.py`` is federated averaging in ten lines; read it first. ``data.py`` deals out a data
set to clients, ``training.py`` plays the rounds, ``rounds.py`` publishes them, ``heads.py`` fits
personal heads, ``gate.py`` decides on promotion. ``flower.py`` and ``flower_grid.py`` do the same
with Flower's strategies.
"""

from flserving.federated.aggregation import aggregate, fault
from flserving.federated.data import Client, digits, federated_statistics, make_clients
from flserving.federated.gate import Gate, gated
from flserving.federated.heads import fit_heads
from flserving.federated.rounds import STRATEGIES, Round, publish_rounds
from flserving.federated.training import train

__all__ = [
    "STRATEGIES",
    "Client",
    "Gate",
    "Round",
    "aggregate",
    "digits",
    "fault",
    "federated_statistics",
    "fit_heads",
    "gated",
    "make_clients",
    "publish_rounds",
    "train",
]
