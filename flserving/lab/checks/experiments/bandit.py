"""Check of the exercise "Thompson sampling" (notebook 10): what it believes, and how often it takes
each arm."""

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Known = Mapping[str, tuple[float, float]]
_DRAWS = 4000
_FIVE_SIGMA = 2.5 / _DRAWS**0.5


def check_thompson(bandit_class: Callable[..., Any]) -> None:
    """Check ``bandit_class(arms, seed)`` with ``learn(known)`` and ``choose() -> arm``.

    Right is: each arm is taken as often as it is the best one under Beta(1 + sum, 1 + count - sum),
    the sums being those of the last ``learn``; random numbers of its own, which follow from the
    seed.

    Raises:
        AssertionError: Says what the bandit believes, and which mistake gives just that.
    """
    judge(
        "thompson",
        bandit_class,
        Part(
            "takes one of its arms, each alike at first",
            _begins,
            (
                "choose returns a name out of arms, not a number that was drawn.",
                "self.known = dict.fromkeys(arms, (0, 0.0)) is what is known before the first reward.",
            ),
        ),
        Part(
            "draws from what it believes",
            _believes,
            (
                "The draw, not the mean, decides: an arm of which little is known must win now and then.",
                "self.random.betavariate(a, b) draws; a counts the right answers, b the wrong ones, both from 1 on.",
                "For each arm draws[arm] = self.random.betavariate(1 + total, 1 + count - total); then the largest.",
            ),
        ),
        Part(
            "learns the sums",
            _learns,
            (
                "The sums that come are all rewards so far: they take the place of the old ones.",
                "self.known = {arm: known.get(arm, (0, 0.0)) for arm in self.known}",
            ),
        ),
        Part(
            "has random numbers of its own",
            _own_dice,
            ("Make self.random = random.Random(seed) in __init__, and draw from it alone.",),
        ),
    )


def _made(bandit_class: Callable[..., Any], arms: str = "ab", seed: int = 1) -> Any:
    return ask(f"Thompson({list(arms)}, seed={seed})", bandit_class, list(arms), seed)


def _shares(bandit: Any, told: str, arms: str = "ab", draws: int = _DRAWS) -> dict[str, float]:
    chosen: Counter[Any] = Counter()
    for _ in range(draws):
        got = ask(f"choose() {told}", bandit.choose)
        assert got != "c" or "c" in arms, (
            f"choose() {told} returned 'c', an arm of another bandit: keep what is known in self, not in the class"
        )
        assert isinstance(got, str) and got in list(arms), (
            f"choose() {told} returned {got!r:.60}: return the name of an arm, one of {', '.join(arms)}"
        )
        chosen[got] += 1
    return {arm: chosen[arm] / draws for arm in arms}


def _learned(bandit_class: Callable[..., Any], *sums: Known, arms: str = "ab") -> dict[str, float]:
    bandit = _made(bandit_class, arms)
    for known in sums:
        ask(f"learn({dict(known)})", bandit.learn, dict(known))
    return _shares(bandit, f"after learn({dict(sums[-1])})", arms)


@functools.cache
def _best(*beliefs: tuple[float, float]) -> float:
    """How often the first of these Beta distributions gives the largest draw."""
    rng = np.random.default_rng(0)
    draws = np.array([rng.beta(a, b, 100_000) for a, b in beliefs])
    return float((draws.argmax(axis=0) == 0).mean())


def _begins(bandit_class: Callable[..., Any]) -> None:
    shares = _shares(_made(bandit_class, "abc"), "before any reward", "abc")
    worst = min(shares, key=lambda arm: shares[arm])
    assert abs(shares[worst] - 1 / 3) < _FIVE_SIGMA, (
        f"before any reward arm {worst!r} of three got {shares[worst]:.0%} of {_DRAWS} requests: nothing is known of "
        "any of them, so each gets a third; an arm that is never asked is never learned"
    )


def _believes(bandit_class: Callable[..., Any]) -> None:
    known = {"a": (5, 4.0), "b": (10, 6.0)}
    share = _learned(bandit_class, known)["a"]
    told = f"of a, 4 of 5 answers were right, of b 6 of 10; a got {share:.0%} of {_DRAWS} requests"
    assert 0 < share < 1, (
        f"{told}: the other one was unlucky perhaps, and you never ask it again; draw from each belief, so that "
        "each arm gets its chance"
    )
    for wrong, why in (
        (0.5, "the rewards change nothing; choose must draw from what learn was given"),
        (
            _best((2, 5), (5, 7)),
            "that is the mirror image, the worse arm is preferred; the first parameter of Beta "
            "grows with the right answers",
        ),
        (
            _best((5, 6), (7, 11)),
            "the second parameter must count the wrong answers, count - total, not all of them",
        ),
        (
            _best((4, 1), (6, 4)),
            "Beta(total, count - total) forgets the 1 that stands for an arm of which nothing is "
            "known: it is too sure, and without a right answer it fails",
        ),
        (
            8 / 14,
            "that is proportional to the means, and stays so for ever: the worst arm never loses its share",
        ),
    ):
        assert abs(share - wrong) > _FIVE_SIGMA, f"{told}: {why}"
    right = _best((5, 2), (7, 5))
    assert abs(share - right) < _FIVE_SIGMA, (
        f"{told}; a draw from Beta(1 + 4, 1 + 1) is above one from Beta(1 + 6, 1 + 4) in {right:.0%} of all cases"
    )
    halves = {"a": (4, 2.6), "b": (4, 1.3)}
    share = _learned(bandit_class, halves)["a"]
    right = _best((3.6, 2.4), (2.3, 3.7))
    assert abs(share - right) < _FIVE_SIGMA, (
        f"after learn({halves}) a got {share:.0%}, expected {right:.0%}: a reward between 0 and 1 counts in parts, "
        "so do not round the sums"
    )


def _learns(bandit_class: Callable[..., Any]) -> None:
    first = {"a": (10, 2.0), "b": (10, 9.0)}
    then = {"a": (20, 15.0), "b": (20, 14.0)}
    share = _learned(bandit_class, first, then)["a"]
    right = _best((16, 6), (15, 7))
    for wrong, why in (
        (_best((18, 14), (24, 8)), "you added them up, and count the first rewards twice"),
        (_best((3, 9), (10, 2)), "only the first call was taken"),
    ):
        assert abs(share - wrong) > _FIVE_SIGMA, (
            f"learn came twice, first {first}, then {then}, and a got {share:.0%}: {why}; what comes are the sums "
            "of all rewards so far"
        )
    assert abs(share - right) < _FIVE_SIGMA, (
        f"after learn({first}) and learn({then}) a got {share:.0%}, expected {right:.0%}: the last sums count, alone"
    )
    share = _learned(bandit_class, first, {"a": (10, 8.0)})["a"]
    assert abs(share - 0.75) < _FIVE_SIGMA, (
        f"after learn({{'a': (10, 8.0)}}) a got {share:.0%}, expected 75%: nothing is said of b, so it is as "
        "unknown as at first, Beta(1, 1)"
    )
    _learned(bandit_class, {"a": (10, 8.0), "gone": (500, 500.0)})


def _own_dice(bandit_class: Callable[..., Any]) -> None:
    state = random.getstate(), str(np.random.get_state())
    one, same, other = (_made(bandit_class, "abc", seed) for seed in (7, 7, 8))
    taken = [[ask("choose()", bandit.choose) for _ in range(60)] for bandit in (one, same, other)]
    assert state == (random.getstate(), str(np.random.get_state())), (
        "the bandit drew from the random numbers of the whole process, or seeded them: everybody else's follow from "
        "yours now; draw from a random.Random(seed) of its own"
    )
    assert taken[0] == taken[1], (
        "two bandits with the same seed chose differently: a day that went wrong could not be played again; make the "
        "generator from the seed"
    )
    assert taken[0] != taken[2], (
        "bandits with seeds 7 and 8 chose the same 60 times: use the seed that is given"
    )
    ask("learn", one.learn, {"a": (50, 50.0)})
    shares = _shares(same, "of a bandit that learned nothing", "abc", 300)
    assert shares["a"] < 0.7, (
        "a second bandit knows what the first one learned: keep it in self, not in the class"
    )
