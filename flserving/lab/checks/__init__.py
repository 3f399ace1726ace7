"""Checks that teach: each takes a student's function or class and says what is wrong with it, not only that it is.

A check raises ``AssertionError`` with a message that points at the mistake, lets the stub's ``NotImplementedError``
through, and returns nothing when all is well. None of them knows how a solution is written.
"""

from flserving.lab.checks.batcher import check_batcher
from flserving.lab.checks.breakdown import check_bottleneck
from flserving.lab.checks.edge import check_hybrid
from flserving.lab.checks.heads import check_head_choice, check_heads
from flserving.lab.checks.latency import check_latency_budget
from flserving.lab.checks.lru import check_lru
from flserving.lab.checks.metrics import check_metrics
from flserving.lab.checks.optimization import check_proof
from flserving.lab.checks.retry import check_retry
from flserving.lab.checks.rollout import check_router
from flserving.lab.checks.threshold import check_threshold
from flserving.lab.checks.version import check_version_choice

__all__ = [
    "check_batcher",
    "check_bottleneck",
    "check_head_choice",
    "check_heads",
    "check_hybrid",
    "check_latency_budget",
    "check_lru",
    "check_metrics",
    "check_proof",
    "check_retry",
    "check_router",
    "check_threshold",
    "check_version_choice",
]
