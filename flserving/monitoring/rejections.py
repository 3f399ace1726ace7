"""What a door itself refuses or breaks: no request came of it, or its answer was lost, and no server counts it."""

from flserving.monitoring.telemetry import Protocol, Telemetry


class Refusals:
    """Counts, under ``protocol``, the error that ends a ``with`` block. One for all requests: it holds no state."""

    def __init__(self, telemetry: Telemetry, protocol: Protocol) -> None:
        self._telemetry, self._protocol = telemetry, protocol

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ConnectionResetError):  # that one just left
            self._telemetry.refusal(self._protocol, getattr(error, "reason", "Internal"))
