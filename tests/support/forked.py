"""A child process for the tests that kill: forked, and gone without a trace of its parent's
clean-up."""

import os
import sys
from collections.abc import Callable


def fork(action: Callable[[], object]) -> int:
    """Run ``action`` in a child and end it; an error goes to its stderr and makes the exit code
    1."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid
