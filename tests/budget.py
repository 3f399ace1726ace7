"""How much a property test draws: the same examples in every run; in the fuzz tier new ones, and
more of them.

conftest.py registers the two profiles; ``python run.py test --fuzz`` chooses the second one.
"""

import os
from typing import Any

from hypothesis import settings

EXAMPLES = 100  # of a test that says nothing
MOST_EXAMPLES = 300  # of any one test in the default suite
FUZZ_TIMES = 20


def fuzzing() -> bool:
    return settings.get_current_profile_name() == "fuzz"


def examples(count: int, **more: Any) -> settings:
    """``@examples(40)`` over a property test: ``settings(max_examples=40)`` would be 40 in the fuzz
    tier, too."""
    if not 1 <= count <= MOST_EXAMPLES:
        raise ValueError(
            f"{count} examples: 1 to {MOST_EXAMPLES} in the default suite, the fuzz tier draws more"
        )
    return settings(max_examples=count * (FUZZ_TIMES if fuzzing() else 1), **more)


def seed() -> int:
    """Of a test that draws by itself: always the same; in the fuzz tier a new one, which the test
    must print."""
    return int.from_bytes(os.urandom(4), "little") if fuzzing() else 20
