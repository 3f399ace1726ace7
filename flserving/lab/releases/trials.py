"""Notebook 10: the plan of a test, by formula; and users who ask a real server and say whether it
was right."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flserving.errors import ConflictError
from flserving.experiments import statistics
from flserving.federated.data import Features
from flserving.lab.queueing.arrivals import Floats, Ints
from flserving.serving.server import ModelServer

if TYPE_CHECKING:
    import pandas as pd

MEAN = 0.9  # right answers of the version that answers now
BROKEN = 0.5  # what a broken version loses of them


class Plan(NamedTuple):
    """How long a test takes and what it risks; days by effect, answers lost by share."""

    picked: tuple[float, float]  # effect and share, in percent
    effects: Floats  # percentage points
    days: dict[str, Floats]
    shares: Floats  # percent of the users in the new arm
    lost: dict[str, Floats]  # right answers lost until the test ends


FIXED = "z-test, one look at the end"
MOST = "sequential, at most"
TYPICAL = "sequential, typically"


def plan(
    effect_percent: float,
    requests_a_day: int,
    share_percent: float,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Plan:
    """What a test of a new version costs, by formula: one reward per request, clients alike.

    "Typically" is where half of the tests of a version that is worse by the effect have ended.
    """
    needed: dict[str, Callable[[float], float]] = {
        FIXED: lambda effect: statistics.fixed_information(effect, alpha, power),
        MOST: lambda effect: statistics.information(effect, alpha, power),
        TYPICAL: lambda effect: statistics.information(effect, alpha, 0.5),
    }
    effects = np.geomspace(0.5, 10, 25)
    shares = np.geomspace(1, 50, 25)
    days = {}
    for name, of in needed.items():
        requests = [_requests(of(percent / 100), share_percent) for percent in effects]
        days[name] = np.array(requests) / requests_a_day
    effect = effect_percent / 100
    gaps = {
        f"worse by {effect_percent:g} points": (effect, needed[TYPICAL](effect)),
        f"broken, worse by {100 * BROKEN:.0f} points": (BROKEN, noticed(BROKEN, effect, alpha)),
    }
    lost = {}
    for name, (gap, information) in gaps.items():
        requests = [_requests(information, percent, gap) for percent in shares]
        lost[name] = gap * shares / 100 * np.array(requests)
    return Plan((effect_percent, share_percent), effects, days, shares, lost)


def _requests(information: float, share_percent: float, gap: float = 0.0) -> float:
    """``statistics.sample_size``, where the new version's rewards have the variance of their own
    mean."""
    share = share_percent / 100
    new = MEAN - gap
    of_new = new * (1 - new) / share
    of_old = MEAN * (1 - MEAN) / (1 - share)
    return information * (of_new + of_old)


def noticed(gap: float, effect: float, alpha: float = 0.05) -> float:
    """The information at which the sequential test tuned for ``effect`` sees a true ``gap`` in half
    of the cases."""
    low = 1e-3
    high = 1e9
    while high / low > 1.001:  # the width falls with the information
        middle = math.sqrt(low * high)
        if statistics.half_width(1 / middle, alpha, effect) < gap:
            high = middle
        else:
            low = middle
    return high


# Users of a real server


class Users:
    """People who ask for held-out samples and say of each answer whether it was right.

    Args:
        x, y: Samples and labels, [N, D] and [N].
        names: Everybody asks with equal probability.
    """

    def __init__(
        self, server: ModelServer, model: str, x: Features, y: Ints, names: Sequence[str]
    ) -> None:
        self.server = server
        self.model = model
        self.x = x
        self.y = y
        self.names = names

    def ask(self, rng: np.random.Generator) -> tuple[str, str | None, int, bool]:
        """One request and its feedback: who asked, the arm, the version, whether it was right."""
        name = self.names[int(rng.integers(len(self.names)))]
        i = rng.integers(len(self.y))
        answer = self.server.predict(self.x[i : i + 1], model=self.model, client=name)
        right = int(answer["predictions"][0]) == int(self.y[i])
        if "receipt" in answer:
            # the experiment ended between answer and feedback
            with contextlib.suppress(ConflictError):
                self.server.experiments.feedback(self.model, answer["receipt"], float(right), name)
        return name, answer.get("arm"), int(answer["model_version"]), right

    def in_turn(self, count: int, pause_s: float = 0.003) -> tuple[list[float], set[str]]:
        """One request after the other, each a row of its own. Returns the latencies in ms, and who
        answered."""
        latencies_ms = []
        versions = set()
        for i in range(count):
            name = self.names[i % len(self.names)]
            answer = self.server.predict(self.x[i : i + 1], model=self.model, client=name)
            latencies_ms.append(answer["latency_ms"])
            versions.add(answer["model_version"])
            time.sleep(pause_s)
        return latencies_ms, versions

    def keep_asking(
        self,
        begin: Callable[[], object],
        over: Callable[[], object],
        *,
        callers: int = 2,
        around: int = 800,
        most_s: float = 240.0,
        seed: int = 0,
    ) -> tuple["pd.DataFrame", tuple[float, float]]:
        """Ask from threads; after ``around`` answers call ``begin``, wait until ``over()`` or
        ``most_s`` passed, and go on for as many answers again.

        Returns:
            One row per answer (at_s, client, arm, version, right), and when ``begin`` returned and
            ``over`` was seen.

        Raises:
            Exception: Whatever a request raised: users notice nothing, or the notebook stops.
        """
        import pandas as pd

        answers: list[tuple[float, str, str | None, int, bool]] = []
        problems: list[Exception] = []
        done = threading.Event()
        began_s = time.perf_counter()

        def caller(number: int) -> None:
            rng = np.random.default_rng((seed, number))
            try:
                while not done.is_set():
                    answer = self.ask(rng)
                    answers.append((time.perf_counter() - began_s, *answer))
            except Exception as error:  # a thread's error would be lost
                problems.append(error)

        def wait(condition: Callable[[], object]) -> float:
            end_s = time.perf_counter() + most_s
            while not condition() and not problems and time.perf_counter() < end_s:
                done.wait(0.01)
            return time.perf_counter() - began_s

        threads = [
            threading.Thread(target=caller, args=(n,), name=f"user-{n}") for n in range(callers)
        ]
        for thread in threads:
            thread.start()
        try:
            wait(lambda: len(answers) >= around)
            begin()
            start_s = time.perf_counter() - began_s
            end_s = wait(over)
            enough = len(answers) + around
            wait(lambda: len(answers) >= enough)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        if problems:
            raise problems[0]
        table = pd.DataFrame(answers, columns=["at_s", "client", "arm", "version", "right"])
        return table.sort_values("at_s", ignore_index=True), (start_s, end_s)
