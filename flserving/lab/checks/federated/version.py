"""Check of the exercise "choose the version to promote" (notebook 01)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Choose = Callable[[Sequence[dict[str, Any]], float], int | None]


def check_version_choice(choose_version: Choose) -> None:
    """Check ``choose_version(rounds, floor) -> version or None``.

    ``rounds`` is a list of dicts with the keys ``version`` (int), ``global_accuracy`` and
    ``worst_client_accuracy`` (in [0, 1]; NaN if it was not measured). Right is the version whose
    worst client does best, the older one if two are equal, and None if no worst client reaches
    ``floor``.

    Raises:
        AssertionError: Names the rule that was broken, and shows the rounds.
    """
    judge(
        "choose-version",
        choose_version,
        Part(
            "takes the best worst client",
            _takes_the_best,
            (
                "Compare the rounds by `worst_client_accuracy`, and return the `version` of the best, not the round.",
                '`max(rounds, key=lambda r: r["worst_client_accuracy"])["version"]`.',
            ),
        ),
        Part(
            "keeps the floor",
            _keeps_the_floor,
            (
                "First a list of the rounds that reach the floor; it may be empty, and max of an empty list raises.",
                '`good = [r for r in rounds if r["worst_client_accuracy"] >= floor]`, then `if not good: return None`.',
            ),
        ),
        Part(
            "leaves out what was not measured",
            _leaves_out_unmeasured,
            (
                "Every comparison with NaN is false, `>=` as well as `<`: which of the two keeps a NaN out of a list?",
                "Keep what is `>= floor`; do not drop what is `< floor`.",
            ),
        ),
        Part(
            "keeps the older of two equal ones",
            _keeps_the_older,
            (
                "A tuple as key is compared entry by entry: a second entry breaks ties.",
                'The older one must be the larger: `key=lambda r: (r["worst_client_accuracy"], -r["version"])`.',
            ),
        ),
    )


def _four_rounds() -> list[dict[str, Any]]:
    return [
        _round(4, 0.80, 0.30),
        _round(5, 0.86, 0.62),
        _round(6, 0.93, 0.41),
        _round(7, 0.91, 0.55),
    ]


def _takes_the_best(choose_version: Choose) -> None:
    rounds = _four_rounds()
    before = _four_rounds()
    got = _choose(choose_version, rounds, 0.5)
    assert rounds == before, (
        "choose_version changed the list that it was given: it belongs to the caller, copy it first"
    )
    assert not isinstance(got, dict), (
        f"choose_version returned the whole round {got}: return its version number, 5"
    )
    assert got != 1, (
        "choose_version returned 1, a position in the list: return the version number, 5"
    )
    assert got != 0.62, "choose_version returned 0.62, the accuracy: return the version number, 5"
    assert got != 7, (
        "choose_version took version 7, the newest: a later round can be worse for some client"
    )
    assert got != 6, (
        "choose_version took version 6, the best global accuracy: its worst client has 0.41, version 5 has 0.62"
    )
    assert got != 4, (
        "choose_version took version 4, whose worst client is the worst of all (0.30): take the largest"
    )
    assert got == 5, f"choose_version returned {got!r}: version 5 has the best worst client (0.62)"


def _keeps_the_floor(choose_version: Choose) -> None:
    rounds = _four_rounds()
    got = _choose(choose_version, rounds, 0.7)
    assert got is None, (
        f"choose_version returned {got!r} though no worst client reaches the floor 0.7: return None"
    )
    got = _choose(choose_version, rounds, 0.62)
    assert got == 5, (
        f"choose_version returned {got!r}: a worst client exactly at the floor 0.62 reaches it"
    )
    got = _choose(choose_version, [], 0.5)
    assert got is None, f"choose_version returned {got!r} for an empty list of rounds: return None"


def _leaves_out_unmeasured(choose_version: Choose) -> None:
    # max() keeps a NaN that comes first, and drops one that comes later
    for unmeasured in (0, 1, 2):
        mixed = [_round(1, 0.9, 0.6), _round(2, 0.9, 0.7)]
        mixed.insert(unmeasured, _round(9, 0.9, math.nan))
        got = _choose(choose_version, mixed, 0.5)
        assert got == 2, (
            f"choose_version returned {got!r} for {_told(mixed)}: a NaN is neither better nor worse than a number, "
            "leave those rounds out before you compare"
        )


def _keeps_the_older(choose_version: Choose) -> None:
    for order in (1, -1):
        equal = [_round(3, 0.8, 0.6), _round(8, 0.9, 0.6)][::order]
        got = _choose(choose_version, equal, 0.5)
        assert got == 3, (
            f"choose_version returned {got!r} for {_told(equal)}: if two are equal keep the older version, 3"
        )


def _round(version: int, global_accuracy: float, worst_client_accuracy: float) -> dict[str, Any]:
    return {
        "version": version,
        "global_accuracy": global_accuracy,
        "worst_client_accuracy": worst_client_accuracy,
    }


def _choose(choose_version: Choose, rounds: Sequence[dict[str, Any]], floor: float) -> Any:
    return ask(f"choose_version({_told(rounds)}, floor={floor})", choose_version, rounds, floor)


def _told(rounds: Sequence[dict[str, Any]]) -> str:
    return (
        "["
        + ", ".join(
            f"version {one['version']}: worst {one['worst_client_accuracy']}" for one in rounds
        )
        + "]"
    )
