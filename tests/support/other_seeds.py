"""A process in which every seed means another one: what a notebook claims must not hang on one
lucky draw.

The student reads a plain ``seed=0``. ``before_the_first_cell`` is the source of a cell that is
stored nowhere.
"""

import numbers
import random
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch


def before_the_first_cell(shift: int) -> str:
    """What a kernel runs first, so that seeds are shifted in all cells and in what they call; it
    leaves no names."""
    return f"__import__('runpy').run_path({__file__!r})['shift_seeds']({shift})"


def shift_seeds(shift: int) -> None:
    """From now on each whole number that seeds numpy's, torch's or Python's random numbers means
    ``shift`` more.

    Of several numbers in a tuple the first is shifted. A ``torch.Generator`` stays as it is: the
    package fixes probes by it that must be the same in every process.
    """

    def shifted(seed: Any) -> Any:
        if isinstance(seed, tuple) and seed:
            return (shifted(seed[0]), *seed[1:])
        return int(seed) + shift if isinstance(seed, numbers.Integral) else seed

    def with_another_seed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(seed: Any = None, *rest: Any, **named: Any) -> Any:
            return function(shifted(seed), *rest, **named)

        return call

    class SeedSequence(np.random.SeedSequence):
        def __init__(self, entropy: Any = None, **named: Any) -> None:
            # a child's is shifted
            super().__init__(entropy if "spawn_key" in named else shifted(entropy), **named)

    class Random(random.Random):
        def __init__(self, seed: Any = None) -> None:
            super().__init__(shifted(seed))

    np.random.SeedSequence, random.Random = SeedSequence, Random
    np.random.default_rng = with_another_seed(np.random.default_rng)
    torch.manual_seed, random.seed = (
        with_another_seed(torch.manual_seed),
        with_another_seed(random.seed),
    )
