"""What is counted and timed, and how it is shown.

``telemetry.py`` takes what happens to requests, ``metrics.py`` adds it up; ``fleet.py`` knows what
devices reported. ``prometheus.py`` shows all of it at ``/metrics``, ``tracing.py`` as spans. For
those who operate a server: the rules in ``alerts.yml``, ``prometheus.yml``, and a Grafana
``dashboard.json``.
"""

from collections.abc import Mapping
from typing import Any, Protocol


class Observed(Protocol):
    """What ``/metrics`` and traces need to see of a server."""

    config: Any
    fleet: Any
    telemetry: Any
    _clock: Any

    def get_all_stats(self) -> dict[str, Any]: ...
    def health_check(self) -> dict[str, Any]: ...
    def published_metrics(self, key: tuple[str, str]) -> Mapping[str, float]: ...
    def _held(self) -> set[str]: ...
