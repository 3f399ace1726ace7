"""What every test shares: repeatable settings, and nothing of the user's own configuration."""

import atexit
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from budget import EXAMPLES, FUZZ_TIMES, fuzzing

# Before torch is loaded: the suite runs on two workers, each with its own threads. Kernels of
# notebooks inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# Kernels neither read the user's IPython profile nor write into its history.
_home = tempfile.mkdtemp(prefix="flserving-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ["IPYTHONDIR"] = str(Path(_home) / "ipython")
os.environ["JUPYTER_CONFIG_DIR"] = str(Path(_home) / "jupyter")
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this Python, whatever else is installed

# The same examples today and in a year. A shared machine may stall for longer than any deadline
# that would still say something about the code. The fuzz tier draws anew; pytest's
# --hypothesis-profile chooses it.
settings.register_profile(
    "flserving", max_examples=EXAMPLES, derandomize=True, database=None, deadline=None
)
# Hypothesis derandomises by itself where the variable CI is set: this tier draws anew there as
# well.
settings.register_profile(
    "fuzz", max_examples=EXAMPLES * FUZZ_TIMES, derandomize=False, deadline=None, print_blob=True
)
settings.load_profile("flserving")

# The quick tier: four minutes on two cores. It leaves out what is marked ``full``, these modules
# (processes that are started, killed and waited for; real durations; long trainings), and all
# notebooks but two.
FULL = {
    *("test_notebooks_in_browser", "test_student_in_browser"),
    *(
        "test_api_prometheus",
        "test_cli_serve",
        "test_cli_serve_canary",
        "test_cli_serve_load",
        "test_edge_process",
    ),
    *("test_api_rest_attacks", "test_bookkeeping", "test_network_proxy", "test_own_code"),
    *("test_lab_attacks", "test_lab_optimization", "test_optimization", "test_optimization_fleet"),
    *("test_lab_draw", "test_lab_player"),  # in a browser
    *("test_benchmarks", "test_registry_crash", "test_student_copies", "test_tiers", "test_wheel"),
}
QUICK_NOTEBOOKS = {"00_start_here", "03_caching"}


def pytest_configure(config: pytest.Config) -> None:
    """Who names nothing gets the quick tier; who names a path, words (-k) or marks (-m) gets what
    is named."""
    nothing_named = (
        config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.keyword
    )
    if nothing_named and config.option.markexpr in config.getini("addopts"):
        # xdist hands it to its workers
        config.option.markexpr = f"({config.option.markexpr}) and not full"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        notebook = item.path.suffix == ".ipynb"
        if item.path.stem in FULL or (notebook and item.path.stem not in QUICK_NOTEBOOKS):
            item.add_marker("full")


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own is the same in every run, whatever ran before
    it."""
    if not fuzzing():
        random.seed(0)
        np.random.seed(0)
        if torch := sys.modules.get("torch"):
            torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that runs in this process sets up the process's log; the next test has none of
    that."""
    root, ours = logging.getLogger(), logging.getLogger("flserving")
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.fixture(autouse=True)
def _live_widgets() -> Iterator[None]:
    """run.py sets this for the kernels of nbval; a test that wants it says so."""
    # one of its own: a test's is undone before the test's fixtures end
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLSERVING_STATIC", raising=False)
        yield
