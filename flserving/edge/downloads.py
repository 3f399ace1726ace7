"""Downloads from a cloud: bounded in bytes and time, and continued where an earlier try was cut."""

import contextlib
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from flserving.api.client.retries import Refused
from flserving.api.client.transports import Rest, Sent
from flserving.errors import ConfigError, DeadlineExceededError, FlservingError, TooLargeError
from flserving.registry import storage

_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})")


class Downloads:
    """One cloud, one folder for what is half here.

    Args:
        timeout_s: Longest wait for the next bytes. ``limit_s``: for a whole file; what came stays for the next try.
        clock: Monotonic seconds.

    ``nbytes`` counts what was received, by kind.

    Raises (both methods):
        ServerClosedError, DeadlineExceededError: No answer, or too slow. Any other error: what the cloud answered.
        TooLargeError: More bytes than there can be. FlservingError: The disk is full.
    """

    def __init__(
        self, url: str, token: str | None, folder: Path, ca: bytes | None = None, timeout_s: float = 10.0,
        limit_s: float = 3600.0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._folder, self._timeout_s, self._limit_s, self._clock = folder, timeout_s, limit_s, clock
        self.nbytes = dict[str, int]()
        try:
            self._cloud = Rest(url.rstrip("/"), ca)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the authority to trust is no PEM certificate ({error}): check the file") from error

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._cloud.close()

    def get(self, path: str, most: int, kind: str) -> bytes:
        """A short answer, into memory."""
        data = bytearray()
        try:
            with self._cloud.stream(Sent(path, None, self._headers), self._timeout_s, self._limit_s) as response:
                for chunk in response.iter_stream():
                    data += chunk
                    self._count(kind, len(chunk))
                    if len(data) > most:
                        raise TooLargeError(f"the cloud's {kind} has more than {most:,} bytes: it is not one")
        except Refused as refused:
            raise refused.error from None
        return bytes(data)

    def fetch(self, path: str, name: str, most: int, kind: str) -> Tensor:
        """A long one, through a file ``name`` in the folder: uint8 [nbytes].

        Goes on where an earlier try ended, as long as each try brings something; the end of the file proves nothing,
        so compare a digest. Other parts in the folder are removed: they are of something older.
        """
        target, until_s = self._folder / f"{name}.part", self._clock() + self._limit_s
        with _disk():
            for other in self._folder.glob("*.part"):
                if other != target:
                    other.unlink()
        while (have := target.stat().st_size if target.exists() else 0) < most:
            try:
                if self._go_on(path, target, have, most, kind, until_s):
                    break
            except Refused as refused:
                if not target.exists() or target.stat().st_size <= have:
                    raise refused.error from None
        with _disk():
            try:
                return storage.read_file(str(self._folder), target.name, most)
            finally:
                target.unlink()

    def _go_on(self, path: str, target: Path, have: int, most: int, kind: str, until_s: float) -> bool:
        """One try; whether it came to the end."""
        headers = self._headers | ({"range": f"bytes={have}-"} if have else {})
        with self._cloud.stream(Sent(path, None, headers), self._timeout_s, self._limit_s) as response:
            if response.status == 416:  # what is here is not the beginning of what is there
                target.unlink(missing_ok=True)
                if not have:
                    raise TooLargeError(f"the cloud has no such range of {kind}, though none was asked for")
                return False
            said = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            length, found = said.get("content-length", ""), _RANGE.fullmatch(said.get("content-range", ""))
            start, total = (int(found[1]), int(found[2])) if found else (0, int(length) if length.isdecimal() else -1)
            if not 0 < total <= most or start != (have if response.status == 206 else 0):
                raise TooLargeError(
                    f"the cloud sends {total:,} bytes of {kind} from byte {start:,} on: at most {most:,} can be right"
                )
            with _disk(target), open(target, "r+b" if start else "wb") as file:
                file.seek(start)
                for chunk in response.iter_stream():
                    start += len(chunk)
                    self._count(kind, len(chunk))
                    if start > total:
                        raise TooLargeError(f"the cloud sends more {kind} than the {total:,} bytes that it announced")
                    file.write(chunk)
                    if self._clock() > until_s:
                        break
        if start < total:
            raise DeadlineExceededError(f"the {kind} took longer than {self._limit_s:g} s: what came is kept")
        return True

    def _count(self, kind: str, nbytes: int) -> None:
        self.nbytes[kind] = self.nbytes.get(kind, 0) + nbytes


@contextlib.contextmanager
def _disk(part: Path | None = None) -> Iterator[None]:
    """A part that filled the disk goes: others need the space."""
    try:
        yield
    except FlservingError:  # one of them is an OSError too
        raise
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise disk_full(error) from error


def disk_full(error: OSError) -> FlservingError:
    return FlservingError(f"the device cannot store the update ({error.strerror}): free some space")
