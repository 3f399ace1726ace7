"""What a serving process says of itself beside ``/metrics``: its log, and spans for a collector."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from flserving.errors import ConfigError, NotSupportedError
from flserving.extras import of_extra
from flserving.monitoring import Observed
from flserving.monitoring.telemetry import Exchange

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
_COLLECTORS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_log = logging.getLogger("flserving")
_access = logging.getLogger("flserving.access")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observability:
    """What is logged to stderr, and where spans go.

    Args:
        log_level: Least level of what is logged to stderr.
        log_format: Text, or one JSON object a line.
        access_log: Log each call: protocol, method, route, status and duration; nothing that its
            caller has sent. A call of gRPC that goes on, a watch or a reflection, is not logged.
        otel: URL of an OpenTelemetry collector, such as http://localhost:4318, that gets spans by
            OTLP over HTTP; where it is not given, the variable OTEL_EXPORTER_OTLP_ENDPOINT names
            one.

    Raises:
        ConfigError: An unknown level or format, or a URL that is none.
    """

    log_level: str = "info"
    log_format: str = "text"
    access_log: bool = False
    otel: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("log_level", self.log_level, LEVELS),
            ("log_format", self.log_format, FORMATS),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        if self.otel is not None and not self.otel.startswith(("http://", "https://")):
            raise ConfigError(
                f"otel is {self.otel!r}: give the collector's URL, such as http://localhost:4318"
            )

    def configure(self) -> None:
        """Log as these settings say, in this process. Replaces what an earlier call has set."""
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
            root.removeHandler(handler)
        handler = _Stderr()
        handler.setFormatter(
            _Json() if self.log_format == "json" else logging.Formatter("flserving: %(message)s")
        )
        root.addHandler(handler)
        _log.setLevel(self.log_level.upper())

    def observe(self, server: Observed) -> Callable[[], None]:
        """Log and trace the calls of a server from now on; returns what sends the last spans.

        Raises:
            NotSupportedError: ``otel`` is given and its extra is not installed. Where only a
                variable names a collector, as it may for every program of a machine, that is
                logged.
        """
        if self.access_log:
            server.telemetry.watchers["access"] = _logged
        if self.otel is not None or any(map(os.environ.get, _COLLECTORS)):
            try:
                with of_extra("otel"):
                    from flserving.monitoring.tracing import export
                return export(server, self.otel)
            except NotSupportedError as error:
                if self.otel is not None:
                    raise
                _log.warning("no spans are sent: %s", error)
        return lambda: None


@contextmanager
def _logged(exchange: Exchange) -> Iterator[None]:
    began_s = time.perf_counter()
    try:
        yield
    finally:
        said = {
            "protocol": exchange.protocol,
            "method": exchange.method,
            "route": exchange.route,
            "status": exchange.status,
            "duration_ms": round((time.perf_counter() - began_s) * 1e3, 3),
        }
        if exchange.trace_id:
            said["trace_id"] = exchange.trace_id
        line = " ".join(str(value) for value in said.values() if value not in ("", None))
        _access.info("%s", line, extra={"fields": said})


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is when a record comes."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Json(logging.Formatter):
    """One object a line: time, level, logger, pid, message, and the fields of an access log."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()
