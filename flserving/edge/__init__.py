"""Serving on the device: the second and the third architecture beside the central server.

``device.py`` answers on the device, ``hybrid.py`` asks the device or the cloud as its policy
decides; ``calibration.py`` and ``breaker.py`` say when to ask and when to stop asking. Updates:
``sync.py`` follows the cloud, ``release.py`` signs and checks what it offers, ``delta.py`` makes it
small.
"""

from typing import TYPE_CHECKING, Any

from flserving.edge.breaker import CircuitBreaker
from flserving.edge.calibration import calibrate
from flserving.edge.device import EdgeModelServer
from flserving.edge.hybrid import HybridServer, HybridSettings

if TYPE_CHECKING:
    from flserving.edge.sync import SyncAgent, SyncSettings

__all__ = [
    "CircuitBreaker",
    "EdgeModelServer",
    "HybridServer",
    "HybridSettings",
    "SyncAgent",
    "SyncSettings",
    "calibrate",
]


def __getattr__(name: str) -> Any:
    """The agent brings httpx, zstandard and cryptography along: not before it is asked for."""
    if name in ("SyncAgent", "SyncSettings"):
        from flserving.edge import sync

        return getattr(sync, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
