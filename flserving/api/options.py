"""Settings of a network endpoint: frozen, checked when made, so that a wrong one is a message and
not a hang."""

import os
import ssl
from dataclasses import dataclass
from os import PathLike
from urllib.parse import urlsplit

from flserving.api.auth import Tokens
from flserving.api.rest.codec import MOST_NUMBERS
from flserving.errors import ConfigError

# name -> (lowest, highest, what the bound protects from)
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "port": (0, 65_535, "0 takes a free one"),
    "grpc_port": (0, 65_535, "0 takes a free one, None leaves gRPC out"),
    "max_body_bytes": (1024, 1 << 30, "a body lives in memory"),
    "max_numbers": (
        1024,
        1 << 27,
        "to read a number takes up to 50 ns, in which nobody else is answered",
    ),
    "max_connections": (1, 65_536, "each connection is an open file"),
    "slow_client_s": (0.1, 3600, "a client that sends nothing must not hold a connection for ever"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions:
    """How an endpoint listens, whom it lets in, and what it refuses.

    Args:
        host: Address to listen on; only this computer reaches the default.
        port: Port of REST, 0 takes a free one.
        grpc_port: Port of gRPC, 0 takes a free one; None leaves gRPC out.
        tokens: Credentials; None makes a random token, ``Tokens.open()`` asks for none.
        admin: Whether the routes that load and unload models exist for the role admin.
        artifacts: Whether devices may download releases, manifests, weights, deltas and their own
            heads (role infer).
        origins: Web pages that may call, as ``https://host[:port]``; none by default.
        hosts: More names that a request's Host header may hold (behind a proxy); the address itself
            always may.
        max_body_bytes: Largest body of a request, also after decompression.
        max_numbers: Most numbers in a body that are not binary tensors (JSON; typed contents of
            gRPC); a list counts as 16, a name as 7. To read them holds up everybody, up to 50 ns
            each. Binary tensors are read at once.
        max_connections: Most connections at once, and most gRPC calls under way; each protocol
            counts its own.
        slow_client_s: Longest wait for the rest of a request that has begun.
        certificate: PEM file with the certificate chain; given with ``key``, both protocols speak
            TLS.
        key: PEM file with the private key of ``certificate``.

    Raises:
        ConfigError: A value has the wrong type or lies outside its bounds, or the certificate
            cannot be used.
    """

    host: str = "127.0.0.1"
    port: int = 0
    grpc_port: int | None = 0
    tokens: Tokens | None = None
    admin: bool = False
    artifacts: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_numbers: int = MOST_NUMBERS
    max_connections: int = 1024
    slow_client_s: float = 10.0
    certificate: "str | PathLike[str] | None" = None
    key: "str | PathLike[str] | None" = None

    def __post_init__(self) -> None:
        for name, (low, high, why) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name == "grpc_port":
                continue
            kinds = (int, float) if name == "slow_client_s" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                raise ConfigError(
                    f"{name} is {value!r}: it must be a number in [{low}, {high}] ({why})"
                )
        if self.port and self.port == self.grpc_port:
            raise ConfigError(
                f"port and grpc_port are both {self.port}: give each its own, or 0 for a free one"
            )
        if (
            not isinstance(self.host, str)
            or not self.host
            or any(c.isspace() or c in "/[]" for c in self.host)
        ):
            raise ConfigError(
                f"host is {self.host!r}: give an address or a name, for example 127.0.0.1"
            )
        for name in ("origins", "hosts"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise ConfigError(f"{name} is {values!r}: give a tuple of strings")
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "origins", tuple(map(check_origin, self.origins)))
        for host in self.hosts:
            if not host or any(c.isspace() or c in "/@*" for c in host):
                raise ConfigError(
                    f"hosts holds {host!r}: give a name or name:port, for example models.example.org"
                )
        if not isinstance(self.tokens, Tokens | None):
            raise ConfigError(f"tokens is a {type(self.tokens).__name__}: make a Tokens object")
        for name in ("certificate", "key"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        if (self.certificate is None) != (self.key is None):
            given, missing = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise ConfigError(f"{given} is given without {missing}: TLS needs both PEM files")
        if self.certificate is not None:
            self.ssl_context()

    @property
    def secure(self) -> bool:
        """Whether both protocols speak TLS."""
        return self.certificate is not None

    @property
    def reachable(self) -> str:
        """The host as a URL names it for callers on this computer."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    def url(self, port: int) -> str:
        """Of REST on ``port``, for callers on this computer."""
        return f"{'https' if self.secure else 'http'}://{self.reachable}:{port}"

    def ssl_context(self) -> ssl.SSLContext:
        """The certificate and its key, loaded. Raises ConfigError where they cannot be used."""
        assert self.certificate is not None and self.key is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for name in ("certificate", "key"):
            try:
                with open(getattr(self, name), "rb"):
                    pass
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise ConfigError(
                    f"{name} {str(getattr(self, name))!r} cannot be read: {reason}"
                ) from error
        try:  # an encrypted key must not ask at the terminal: the empty password fails at once
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                f"certificate {str(self.certificate)!r} with key {str(self.key)!r} cannot be used "
                f"({getattr(error, 'reason', None) or error}): give PEM files of one pair, the key without a password"
            ) from error
        return context


def check_origin(origin: str) -> str:
    """``origin`` as browsers send it, if it is ``scheme://host[:port]``; else a ConfigError."""
    try:
        parts = urlsplit(origin)
        whole = f"{parts.scheme}://{parts.netloc}".lower() == origin.lower() and parts.port != 0
    except ValueError:
        whole = False
    if (
        not whole
        or parts.scheme not in {"http", "https"}
        or not parts.hostname
        or "@" in origin
        or "*" in origin
    ):
        raise ConfigError(
            f"origin {origin!r} cannot be used: name each one as scheme://host or scheme://host:port, without a path"
        )
    default = {"http": 80, "https": 443}[parts.scheme]
    return origin.lower().removesuffix(f":{default}")  # browsers leave it out
