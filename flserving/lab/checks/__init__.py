"""Checks that teach: each takes a student's function or class and says what is wrong with it, not
only that it is.

A check raises ``AssertionError`` with a message that points at the mistake, lets the stub's
``NotImplementedError`` through, and returns nothing when all is well. None of them knows how a
solution is written.
"""

from flserving.lab.checks.api.breakdown import check_bottleneck
from flserving.lab.checks.api.generator import check_open_loop
from flserving.lab.checks.api.message import check_build_request, check_parse_answer
from flserving.lab.checks.api.retry import check_retry, check_retry_budget
from flserving.lab.checks.api.stopwatch import check_gains, check_timed_call
from flserving.lab.checks.edge.delta import check_decode_delta, check_encode_delta
from flserving.lab.checks.edge.fitting import check_fit_head
from flserving.lab.checks.edge.head_table import check_head_table
from flserving.lab.checks.edge.heads import check_head_choice, check_heads
from flserving.lab.checks.edge.hybrid import check_hybrid
from flserving.lab.checks.edge.threshold import check_threshold
from flserving.lab.checks.experiments.always_valid import check_always_valid
from flserving.lab.checks.experiments.bandit import check_thompson
from flserving.lab.checks.experiments.rollout import check_router
from flserving.lab.checks.federated.average import check_fedavg
from flserving.lab.checks.federated.publishing import check_promote, check_publish
from flserving.lab.checks.federated.version import check_version_choice
from flserving.lab.checks.monitoring.alert import check_burn_rate_alert
from flserving.lab.checks.monitoring.metrics import check_metrics
from flserving.lab.checks.monitoring.quantile import check_quantile
from flserving.lab.checks.optimize.compression import check_cut, check_int8, check_masks
from flserving.lab.checks.optimize.distillation import check_distillation
from flserving.lab.checks.optimize.optimization import check_proof
from flserving.lab.checks.serving.admission import check_admission
from flserving.lab.checks.serving.batcher import check_batcher
from flserving.lab.checks.serving.characteristic import check_characteristic_time
from flserving.lab.checks.serving.flight import check_single_flight
from flserving.lab.checks.serving.latency import check_latency_budget
from flserving.lab.checks.serving.lru import check_lru
from flserving.lab.checks.serving.prediction_key import check_prediction_key
from flserving.lab.checks.serving.sharing import check_async_batcher
from flserving.lab.checks.serving.simulator import check_simulate
from flserving.lab.checks.serving.stages import check_by_hand, check_stage_timer

__all__ = [
    "check_admission",
    "check_always_valid",
    "check_async_batcher",
    "check_batcher",
    "check_bottleneck",
    "check_build_request",
    "check_burn_rate_alert",
    "check_by_hand",
    "check_characteristic_time",
    "check_cut",
    "check_decode_delta",
    "check_distillation",
    "check_encode_delta",
    "check_fedavg",
    "check_fit_head",
    "check_gains",
    "check_head_choice",
    "check_head_table",
    "check_heads",
    "check_hybrid",
    "check_int8",
    "check_latency_budget",
    "check_lru",
    "check_masks",
    "check_metrics",
    "check_open_loop",
    "check_parse_answer",
    "check_prediction_key",
    "check_promote",
    "check_proof",
    "check_publish",
    "check_quantile",
    "check_retry",
    "check_retry_budget",
    "check_router",
    "check_simulate",
    "check_single_flight",
    "check_stage_timer",
    "check_thompson",
    "check_threshold",
    "check_timed_call",
    "check_version_choice",
]
