"""A bandit over arms: Thompson sampling on rewards in [0, 1].

Clipper selects a model for each query by the feedback so far, with Exp3 and Exp4 (Crankshaw et al.,
NSDI 2017, section 5). Thompson sampling (Biometrika 25, 1933; Chapelle and Li, NeurIPS 2011) takes
its place here: it has no rate to tune.
"""

import random
from collections.abc import Iterable, Mapping


class Thompson:
    """Draws each arm's mean reward from its Beta posterior (uniform prior) and takes the arm with
    the best draw.

    :meth:`learn` replaces what is known, so several processes follow the same sums. Thread-safe.
    """

    def __init__(self, arms: Iterable[str], seed: int | None = None) -> None:
        # rewards, their sum
        self.known: Mapping[str, tuple[float, float]] = dict.fromkeys(arms, (0, 0.0))
        self._random = random.Random(seed)

    def learn(self, known: Mapping[str, tuple[float, float]]) -> None:
        """The rewards of each arm so far: how many, and their sum. A reward between 0 and 1 counts
        in parts."""
        self.known = {arm: known.get(arm, (0, 0.0)) for arm in self.known}

    def choose(self) -> str:
        """An arm for the next request."""
        draws = {}
        for arm, (count, total) in self.known.items():
            draws[arm] = self._random.betavariate(1 + total, 1 + count - total)
        return max(draws, key=draws.__getitem__)
