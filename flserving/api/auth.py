"""Who may ask what: bearer tokens, their roles, and the client that a token speaks for.

A token is kept as its sha256 alone, so neither memory dumps nor messages of the server hold one.
"""

import codecs
import enum
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, Self

import msgspec

from flserving.errors import ConfigError, ForbiddenError, UnauthorizedError
from flserving.models.masking import OutputPolicy


class Role(enum.IntEnum):
    """What a credential allows; each role includes those below it."""

    READ = 1  # metadata, configuration, statistics, metrics
    INFER = 2  # predictions
    ADMIN = 3  # loading and unloading


@dataclass(frozen=True, slots=True)
class Identity:
    """What a credential stands for. ``client`` is the federated client whose private answers it may
    ask for.

    ``caller`` is whose share of the queue and of the prediction cache it uses: the client's,
    however many tokens that has, else the token's own; None where no credential is asked.
    ``outputs``: what its answers show, where that is not what the server's setting says of its
    role.
    """

    role: Role
    client: str | None = None
    caller: str | None = field(default=None, compare=False)
    outputs: OutputPolicy | None = None


class Tokens:
    """Credentials by the sha256 of the token, compared in constant time. Thread-safe: tokens may be
    added live."""

    def __init__(self) -> None:
        self._everybody: Identity | None = None
        # first 8 bytes of the sha256 -> (sha256, who)
        self._identities: dict[bytes, tuple[bytes, Identity]] = {}

    @classmethod
    def open(cls) -> Self:
        """No token is asked, an explicit choice: everybody may infer, nobody may administer."""
        tokens = cls()
        tokens._everybody = Identity(Role.INFER)
        return tokens

    @classmethod
    def random(cls, role: Role = Role.INFER) -> tuple[Self, str]:
        """One new token of 256 random bits, and its text to hand out."""
        tokens = cls()
        token = secrets.token_urlsafe(32)
        tokens.add(token, role)
        return tokens, token

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The tokens of a JSON file: ``[{"token": ..., "role": "infer", "client": "c-1"}, ...]``.

        ``"sha256": "<64 hex digits>"`` may stand in place of ``"token"``; ``role`` and ``client``
        may be left out. ``"outputs": "label"`` (see :class:`OutputPolicy`) goes before what the
        server's setting says of the role.

        Raises:
            ConfigError: Unreadable, malformed, a token twice, or plain tokens that every user of
                the machine can read.
        """
        try:
            with Path(path).expanduser().open("rb") as file:
                everybody_reads = os.name == "posix" and bool(
                    os.fstat(file.fileno()).st_mode & stat.S_IROTH
                )
                entries = msgspec.json.decode(text_of(file.read()), type=list[_Entry])
        except OSError as error:
            raise ConfigError(f"cannot read the tokens in {path}: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            wanted = '[{"token": "...", "role": "infer", "client": "c-1"}]'
            raise ConfigError(f"the tokens in {path}: {error}: write {wanted}") from error
        tokens = cls()
        for number, entry in enumerate(entries):
            where = f"entry {number} of {path}"
            if (entry.token is None) == (entry.sha256 is None):
                raise ConfigError(f"{where}: it needs either token or sha256")
            if entry.token is not None and everybody_reads:
                raise ConfigError(
                    f"{path} holds plain tokens and every user can read it: chmod 600, or write sha256"
                )
            try:
                digest = (
                    _digest_of(entry.token)
                    if entry.token is not None
                    else bytes.fromhex(entry.sha256 or "")
                )
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
            if len(digest) != 32:
                raise ConfigError(f"{where}: sha256 has {len(digest)} bytes: it is 64 hex digits")
            if digest[:8] in tokens._identities:
                raise ConfigError(
                    f"{where}: this token is in the file already: one role and client per token"
                )
            tokens._put(digest, Role[entry.role.upper()], entry.client, entry.outputs)
        return tokens

    def add(
        self,
        token: str,
        role: Role = Role.INFER,
        client: str | None = None,
        outputs: str | None = None,
    ) -> None:
        """Accept ``token`` from now on; one that is known already gets the new role, client and
        policy of outputs."""
        self._put(_digest_of(token), role, client, outputs)

    def _put(self, digest: bytes, role: Role, client: str | None, outputs: str | None) -> None:
        if client == "":
            raise ConfigError("client is '': name the client, or leave it out")
        policy = None if outputs is None else OutputPolicy.parse(outputs)
        caller = f"token {digest[:8].hex()}" if client is None else f"client {client}"
        self._identities[digest[:8]] = digest, Identity(role, client, caller, policy)

    def check(self, authorization: str | bytes | None, needed: Role) -> Identity:
        """Who sent this ``Authorization`` header.

        Raises:
            UnauthorizedError: No token, or one that is not known.
            ForbiddenError: A role below ``needed``.
        """
        identity = self._everybody or self._find(authorization)
        if identity.role < needed:
            raise ForbiddenError(
                f"this credential's role is {identity.role.name.lower()}: the request needs {needed.name.lower()}"
            )
        return identity

    def allow(self, authorization: str | bytes | None, role: Role) -> bool:
        """Whether :meth:`check` would let the sender in."""
        try:
            self.check(authorization, role)
        except (UnauthorizedError, ForbiddenError):
            return False
        return True

    def _find(self, authorization: str | bytes | None) -> Identity:
        if not authorization:
            raise UnauthorizedError(
                "no credential: send the header 'Authorization: Bearer <token>'"
            )
        if isinstance(authorization, str):
            authorization = authorization.encode(errors="surrogatepass")
        # HTTP trims a header's blanks, gRPC does not
        scheme, _, token = authorization.strip().partition(b" ")
        if scheme.lower() == b"bearer":
            digest = sha256(token.strip()).digest()
            known, identity = self._identities.get(digest[:8], (b"", None))
            if hmac.compare_digest(known, digest) and identity is not None:
                return identity
        raise UnauthorizedError(
            "this credential is not known: send 'Authorization: Bearer <token>' with a valid token"
        )


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    token: str | None = None
    sha256: str | None = None
    role: Literal["read", "infer", "admin"] = "infer"
    client: str | None = None
    outputs: str | None = None


def text_of(data: bytes) -> str:
    """A text file's content, with or without a byte order mark: editors and shells of Windows write
    one.

    Raises:
        UnicodeDecodeError: Neither UTF-8 nor, with its mark, UTF-16.
    """
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if marked else "utf-8-sig")


def checked_token(token: str) -> str:
    """The token, if a header can carry it. Raises ConfigError."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            "a token is one or more visible ASCII characters without spaces: this one could not be sent"
        )
    return token


def _digest_of(token: str) -> bytes:
    return sha256(checked_token(token).encode()).digest()
