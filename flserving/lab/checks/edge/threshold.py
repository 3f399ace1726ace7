"""Check of the exercise "choose a threshold" (notebook 07): an accuracy and a latency to keep."""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Choose = Callable[..., float | None]


class World(NamedTuple):
    """Held-out requests, and what is asked of the threshold. In each, whatever way one counts a p95
    gives the same."""

    candidates: tuple[float, ...]
    confidence: np.ndarray[Any, Any]
    local_right: np.ndarray[Any, Any]
    cloud_right: np.ndarray[Any, Any]
    local_ms: np.ndarray[Any, Any]
    cloud_ms: np.ndarray[Any, Any]
    floor: float
    budget_ms: float

    def asks(self, threshold: float) -> Any:
        return self.confidence < threshold

    def right(self, threshold: float) -> float:
        return float(np.where(self.asks(threshold), self.cloud_right, self.local_right).mean())

    def latency_ms(self, threshold: float) -> Any:
        return self.local_ms + self.asks(threshold) * self.cloud_ms

    def p95_ms(self, threshold: float) -> float:
        return float(np.percentile(self.latency_ms(threshold), 95))

    def chosen(self) -> float | None:
        good = []
        for threshold in self.candidates:
            if self.right(threshold) >= self.floor and self.p95_ms(threshold) <= self.budget_ms:
                good.append(threshold)
        return min(good, default=None)


def check_threshold(choose_threshold: Choose) -> None:
    """Check ``choose_threshold(candidates, confidence, local_right, cloud_right, local_ms,
    cloud_ms, floor, budget_ms)``.

    Right is: the smallest candidate with which at least ``floor`` of all answers are right and the
    95th percentile of the latency is at most ``budget_ms``; None if there is none. A request below
    the threshold takes the device's time and the cloud's.

    Raises:
        AssertionError: Recognises the usual mistakes by the thresholds that they choose in fifty
            worlds.
    """
    judge(
        "threshold",
        choose_threshold,
        Part(
            "keeps the floor",
            partial(_chooses_as_in, worlds_without_budget),
            (
                "For a threshold: who asks the cloud, and whose answer counts for each request?",
                "`asks = confidence < threshold`, `np.where(asks, cloud_right, local_right).mean()`",
            ),
        ),
        Part(
            "keeps both budgets",
            partial(_chooses_as_in, worlds),
            (
                "What does each single request take? Only then the percentile, over all of them.",
                "`np.percentile(local_ms + asks * cloud_ms, 95)`",
                "Go through sorted(candidates); return the first that keeps both, None behind the loop.",
            ),
        ),
    )


def _chooses_as_in(worlds: Callable[[], list[World]], choose_threshold: Choose) -> None:
    given = worlds()
    got = [_choice(choose_threshold, world) for world in given]
    right = [world.chosen() for world in given]
    if got == right:
        return
    for mistake, chosen in _by_mistake(worlds).items():
        assert got != chosen, mistake
    differ = [chose != wanted for chose, wanted in zip(got, right, strict=True)]
    first = differ.index(True)
    world = given[first]
    chose = got[first]
    wanted = right[first]
    asked = f"floor {world.floor:.1%}, budget {world.budget_ms:.0f} ms:"
    assert chose is not None, f"{asked} you found no threshold, but {_told(world, wanted)}"
    assert chose in world.candidates, (
        f"{asked} you chose {chose!r}, which is not one of the candidates"
    )
    assert wanted is not None, (
        f"{asked} you chose {chose}, but {_told(world, chose)}; no candidate keeps both: None"
    )
    raise AssertionError(
        f"{asked} you chose {chose}, {_told(world, chose)}; right is {_told(world, wanted)}"
    )


@functools.cache
def _by_mistake(worlds: Callable[[], list[World]]) -> dict[str, list[float | None]]:
    return {mistake: [choose(world) for world in worlds()] for mistake, choose in MISTAKES.items()}


@functools.cache
def worlds() -> list[World]:
    """Fifty of them; most floors and budgets lie exactly on what some candidate reaches."""
    found = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        count = 401
        levels = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99])  # p95 of 401: one of them, exactly
        confidence = rng.choice(levels, count, p=[0.02, 0.04, 0.06, 0.08, 0.15, 0.25, 0.4])
        local_right = rng.random(count) < confidence
        cloud_right = rng.random(count) < rng.uniform(0.88, 0.97)
        local_ms = rng.integers(2, 12, count).astype(float)
        cloud_ms = np.round(rng.lognormal(np.log(50), 0.8, count))
        candidates = tuple(float(level) for level in rng.permutation([0.0, *levels]))
        base = World(candidates, confidence, local_right, cloud_right, local_ms, cloud_ms, 0.0, 0.0)
        for_floor, for_budget = rng.choice(levels[1:], 2).tolist()
        kind = seed % 10
        latency_ms = base.latency_ms(for_floor)
        p95_ms = base.p95_ms(for_floor)
        mean_ms = latency_ms.mean()
        just_below = {
            4: p95_ms,
            5: mean_ms,
            6: np.median(latency_ms),
            7: latency_ms.min(),
            9: (p95_ms + mean_ms) / 2,
        }
        budget_ms = base.p95_ms(max(for_floor, for_budget))
        if kind in just_below:
            budget_ms = just_below[kind] - 1
        floor = base.right(for_floor)
        if kind == 3:
            floor = base.right(0.0)
        if kind == 8:
            floor += 0.02
        found.append(base._replace(floor=floor, budget_ms=float(budget_ms)))
    return found


@functools.cache
def worlds_without_budget() -> list[World]:
    """The same requests, where an answer may take as long as it likes."""
    return [world._replace(budget_ms=1e6) for world in worlds()]


def _choice(choose_threshold: Choose, world: World) -> float | None:
    arrays = [part.copy() for part in world[1:6]]
    call = f"choose_threshold(..., floor={world.floor:.3f}, budget_ms={world.budget_ms:.0f})"
    got = ask(call, choose_threshold, list(world.candidates), *arrays, world.floor, world.budget_ms)
    changed = any(not np.array_equal(a, b) for a, b in zip(arrays, world[1:6], strict=True))
    assert not changed, "choose_threshold changed an array that it was given: work on a copy"
    assert got is None or isinstance(got, float | int | np.number), (
        f"choose_threshold returned {got!r}: return one number, or None"
    )
    if got is None:
        return None
    return float(got)


def _told(world: World, threshold: float | None) -> str:
    if threshold is None or threshold not in world.candidates:
        return f"{threshold}"
    away = world.asks(threshold).mean()
    return (
        f"{threshold} has {world.right(threshold):.1%} right answers, a p95 of {world.p95_ms(threshold):.0f} ms and "
        f"sends {away:.0%} to the cloud"
    )


def _variant(
    *,
    right: Callable[[World, float], float] = World.right,
    ms: Callable[[World, float], float] = World.p95_ms,
    pick: Callable[[World, Sequence[float]], float | None] = lambda world, good: min(
        good, default=None
    ),
    strict: bool = False,
    floor: bool = True,
    budget: bool = True,
) -> Callable[[World], float | None]:
    def choose(world: World) -> float | None:
        good = []
        for t in world.candidates:
            share = right(world, t)
            took_ms = ms(world, t)
            above = share >= world.floor
            below = took_ms <= world.budget_ms
            if strict:
                above = share > world.floor
                below = took_ms < world.budget_ms
            if (above or not floor) and (below or not budget):
                good.append(t)
        return pick(world, good)

    return choose


def _kept(world: World, threshold: float) -> float:
    kept = ~world.asks(threshold)
    if not kept.any():
        return 1.0
    return float(world.local_right[kept].mean())


def _either(world: World, threshold: float) -> float:
    either = world.local_right | (world.asks(threshold) & world.cloud_right)
    return float(either.mean())


def _p95(values: Any) -> float:
    if not len(values):
        return 0.0
    return float(np.percentile(values, 95))


MISTAKES: Mapping[str, Callable[[World], float | None]] = {
    "you count only the answers that the device gives itself: all requests count, the cloud's answers too": (
        _variant(right=_kept)
    ),
    "you take the device's accuracy at every threshold: a request that goes to the cloud gets the cloud's answer": (
        _variant(right=lambda world, t: float(world.local_right.mean()))
    ),
    "you take an answer for right when either of the two is: nobody knows which of them, the cloud's answer is taken": (
        _variant(right=_either)
    ),
    "a request whose confidence equals the threshold is sure enough: it stays on the device": _variant(
        right=lambda w, t: float(np.where(w.confidence <= t, w.cloud_right, w.local_right).mean()),
        ms=lambda w, t: _p95(w.local_ms + (w.confidence <= t) * w.cloud_ms),
    ),
    "you send the sure requests to the cloud and keep the unsure ones: it is the other way round": _variant(
        right=lambda w, t: float(np.where(w.confidence >= t, w.cloud_right, w.local_right).mean()),
        ms=lambda w, t: _p95(w.local_ms + (w.confidence >= t) * w.cloud_ms),
    ),
    "a request that goes to the cloud has asked the device first: it takes both times, not the cloud's alone": _variant(
        ms=lambda w, t: _p95(np.where(w.asks(t), w.cloud_ms, w.local_ms))
    ),
    "you compare the mean latency with the budget: 95 % of the requests must keep it, so take the 95th percentile": (
        _variant(ms=lambda w, t: float(w.latency_ms(t).mean()))
    ),
    "you compare the median latency with the budget: half of the requests may be slower than that": _variant(
        ms=lambda w, t: float(np.median(w.latency_ms(t)))
    ),
    "you compare the slowest request with the budget: one in twenty may take longer": _variant(
        ms=lambda w, t: float(w.latency_ms(t).max())
    ),
    "you take the 95th percentile of those that go to the cloud: it is meant of all requests": _variant(
        ms=lambda w, t: _p95(w.latency_ms(t)[w.asks(t)])
    ),
    "np.percentile(x, 0.95) is nearly the minimum: it counts to 100": _variant(
        ms=lambda w, t: float(np.percentile(w.latency_ms(t), 0.95))
    ),
    "you add percentiles of device and cloud: percentiles do not add up; add the times of each request first": _variant(
        ms=lambda w, t: _p95(w.local_ms) + _p95(w.asks(t) * w.cloud_ms)
    ),
    "you take the largest threshold that keeps both budgets: it sends more than necessary to the cloud": _variant(
        pick=lambda w, good: max(good, default=None)
    ),
    "you take the most accurate threshold within the budgets: the floor is enough; keep requests on the device": (
        _variant(pick=lambda w, good: max(good, key=lambda t: (w.right(t), -t), default=None))
    ),
    "you take the first candidate that keeps both budgets: they come in any order, take the smallest": _variant(
        pick=lambda w, good: good[0] if good else None
    ),
    "a threshold that reaches the floor or the budget exactly keeps it: compare with >= and <=": _variant(
        strict=True
    ),
    "you never look at the latency budget": _variant(budget=False),
    "you never look at the floor of the accuracy": _variant(floor=False),
    "where no candidate keeps both budgets you still name one: whoever relies on it breaks a promise; return None": (
        _variant(
            pick=lambda w, good: min(
                good, default=max(w.candidates, key=lambda t: (w.right(t), -t))
            )
        )
    ),
    "where no candidate keeps both budgets you name the largest one: return None": _variant(
        pick=lambda w, good: min(good, default=max(w.candidates))
    ),
}
