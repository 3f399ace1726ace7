"""What every test shares: repeatable settings, and nothing of the user's own configuration."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is loaded: the suite runs on two workers, each with its own threads. Kernels of notebooks inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# Kernels neither read the user's IPython profile nor write into its history.
_home = tempfile.mkdtemp(prefix="flserving-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ["IPYTHONDIR"] = str(Path(_home) / "ipython")
os.environ["JUPYTER_CONFIG_DIR"] = str(Path(_home) / "jupyter")
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this Python, whatever else is installed

# A shared machine may stall for longer than any deadline that would still say something about the code.
settings.register_profile("flserving", deadline=None, print_blob=True)
settings.load_profile("flserving")


@pytest.fixture(autouse=True)
def _live_widgets() -> Iterator[None]:
    """run.py sets this for the kernels of nbval; a test that wants it says so."""
    with pytest.MonkeyPatch.context() as patch:  # one of its own: a test's is undone before the test's fixtures end
        patch.delenv("FLSERVING_STATIC", raising=False)
        yield
