"""Notebook 01's measurements: who holds what, each client's accuracy, who answers while an alias
moves."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from flserving.federated.data import Client, Features
from flserving.lab.queueing.arrivals import Ints
from flserving.registry.manifest import Manifest
from flserving.serving.server import ModelServer

if TYPE_CHECKING:
    import pandas as pd


class Answered(NamedTuple):
    """When a request was sent, in seconds from the first one, and which version answered it."""

    at_s: float
    version: int


def class_counts(clients: Sequence[Client], classes: int = 10) -> Ints:
    """Samples of each client and class, both splits together: int64 [clients, classes]."""
    held = [np.bincount(np.concatenate([c.train_y, c.test_y]), minlength=classes) for c in clients]
    return np.array(held, np.int64)


def accuracy_by_client(
    predict: Callable[..., Mapping[str, Any]], clients: Sequence[Client], **options: Any
) -> "pd.Series[float]":
    """Share of each client's held-out samples that is named right, by client id.

    Args:
        predict: Called as ``predict(samples, **options)``, a server's ``predict`` for example;
            ``options`` may name the version.
    """
    import pandas as pd

    right = {
        c.id: float(np.mean(np.asarray(predict(c.test_x, **options)["predictions"]) == c.test_y))
        for c in clients
    }
    return pd.Series(right, name="accuracy")


def metrics_table(
    accuracy: Mapping[str, "pd.Series[float]"], clients: Sequence[Client]
) -> "pd.DataFrame":
    """The three numbers of a version, one row per entry: over all samples, the mean client, the
    worst client."""
    import pandas as pd

    tested = [len(c.test_y) for c in clients]
    rows = {
        name: {
            "global": np.average(one, weights=tested),
            "mean_client": one.mean(),
            "worst_client": one.min(),
        }
        for name, one in accuracy.items()
    }
    return pd.DataFrame(rows).T


def told(manifest: Manifest, most: int = 4) -> str:
    """A manifest as JSON for people: of a list longer than ``most`` the first entries and the
    length."""
    text = msgspec.json.format(
        msgspec.json.encode(_shortened(msgspec.to_builtins(manifest), most)), indent=2
    )
    return text.decode()


def _shortened(value: Any, most: int) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(entry, most) for key, entry in value.items()}
    if isinstance(value, list | tuple) and len(value) > most:
        first = ", ".join(
            entry if isinstance(entry, str) else f"{entry:.3g}" for entry in value[:most]
        )
        return f"{first}, ... ({len(value)} in all)"
    return value


def keep_asking(
    server: ModelServer,
    row: Features,
    moves: Sequence[Callable[[], object]],
    *,
    every_s: float = 0.1,
    pause_s: float = 0.0005,
) -> tuple[list[Answered], list[float]]:
    """Send one row again and again from a thread of its own while ``moves`` happen, at least
    ``every_s`` apart.

    Returns:
        Every answer, and when each move returned, in seconds from the start.

    Raises:
        FlservingError: What a request or a move raised: an error ends the experiment.
    """
    answered: list[Answered] = []
    moved_s: list[float] = []
    problems: list[Exception] = []
    done = threading.Event()
    began_s = time.perf_counter()

    def ask() -> None:
        try:
            while not done.is_set():
                at_s = time.perf_counter() - began_s
                answered.append(Answered(at_s, int(server.predict(row)["model_version"])))
                done.wait(pause_s)
        except Exception as error:  # a thread's error would be lost
            problems.append(error)

    def listen() -> None:
        """Wait until it is time, and on a slow machine until a request that was sent after now is
        answered."""
        enough = len(answered) + 2  # the first may be under way already
        done.wait(every_s)
        while len(answered) < enough and client.is_alive():
            done.wait(pause_s)

    client = threading.Thread(target=ask, name="asks")
    client.start()
    try:
        for move in moves:
            listen()
            move()
            moved_s.append(time.perf_counter() - began_s)
        listen()
    finally:
        done.set()
        client.join()
    if problems:
        raise problems[0]
    return answered, moved_s
