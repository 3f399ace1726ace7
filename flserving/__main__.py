"""``python -m flserving``: the same as the ``flserving`` command."""

import sys

from flserving.api.cli import main

if __name__ == "__main__":
    sys.exit(main())
