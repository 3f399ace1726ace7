"""Serving on the device: the second and the third architecture beside the central server.

``device.py`` answers on the device, ``hybrid.py`` asks the device or the cloud as ``policies.py`` decides;
``calibration.py`` and ``breaker.py`` say when to ask and when to stop asking. Updates: ``sync.py`` follows the cloud,
``release.py`` signs and checks what it offers, ``delta.py`` makes it small, ``downloads.py`` fetches it.
"""

from flserving.edge.breaker import CircuitBreaker
from flserving.edge.calibration import calibrate
from flserving.edge.device import EdgeModelServer
from flserving.edge.hybrid import HybridServer

__all__ = ["CircuitBreaker", "EdgeModelServer", "HybridServer", "calibrate"]
