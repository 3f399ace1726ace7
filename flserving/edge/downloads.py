"""Downloads from a cloud: bounded in bytes and time, and continued where an earlier try was cut."""

import contextlib
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import httpx
from torch import Tensor

from flserving.errors import (
    REASON,
    ConfigError,
    DeadlineExceededError,
    FlservingError,
    ServerClosedError,
    TooLargeError,
    kind_of,
)
from flserving.registry import storage

_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})")
_IDLE_S = 4.0  # a cloud lets go of a connection that was idle for 5 s: be sure to do so first


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
        self,
        url: str,
        token: str | None,
        folder: Path,
        ca: bytes | None = None,
        timeout_s: float = 10.0,
        limit_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._folder = folder
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._clock = clock
        self.nbytes = dict[str, int]()
        try:
            trusted = ssl.create_default_context(cadata=None if ca is None else ca.decode())
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the authority to trust is no PEM certificate ({error}): check the file") from error
        headers = {"accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.Client(
            headers=headers,
            verify=trusted,
            timeout=timeout_s,
            limits=httpx.Limits(keepalive_expiry=_IDLE_S),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def get(self, path: str, most: int, kind: str) -> bytes:
        """A short answer, into memory."""
        until_s = self._clock() + self._limit_s
        data = bytearray()
        try:
            with self._stream(path) as response:
                for chunk in response.iter_raw():
                    data += chunk
                    self._count(kind, len(chunk))
                    if len(data) > most:
                        raise TooLargeError(f"the cloud's {kind} has more than {most:,} bytes: it is not one")
                    if self._clock() > until_s:
                        raise DeadlineExceededError(f"the {kind} took longer than {self._limit_s:g} s")
        except httpx.TransportError as error:
            raise self._unanswered(error) from error
        return bytes(data)

    def fetch(self, path: str, name: str, most: int, kind: str) -> Tensor:
        """A long one, through a file ``name`` in the folder: uint8 [nbytes].

        Goes on where an earlier try ended, as long as each try brings something; the end of the file proves nothing,
        so compare a digest. Other parts in the folder are removed: they are of something older.
        """
        target = self._folder / f"{name}.part"
        until_s = self._clock() + self._limit_s
        with _disk():
            for other in self._folder.glob("*.part"):
                if other != target:
                    other.unlink()
        while (have := _size(target)) < most:
            try:
                if self._go_on(path, target, have, most, kind, until_s):
                    break
            except httpx.TransportError as error:
                if _size(target) <= have:
                    raise self._unanswered(error) from error
        with _disk():
            try:
                return storage.read_file(str(self._folder), target.name, most)
            finally:
                target.unlink()

    def _go_on(self, path: str, target: Path, have: int, most: int, kind: str, until_s: float) -> bool:
        """One try; whether it came to the end."""
        with self._stream(path, have) as response:
            if response.status_code == 416:  # what is here is not the beginning of what is there
                target.unlink(missing_ok=True)
                if not have:
                    raise TooLargeError(f"the cloud has no such range of {kind}, though none was asked for")
                return False
            start, total = _extent(response)
            if not 0 < total <= most or start != (have if response.status_code == 206 else 0):
                raise TooLargeError(
                    f"the cloud sends {total:,} bytes of {kind} from byte {start:,} on: at most {most:,} can be right"
                )
            with _disk(target), open(target, "r+b" if start else "wb") as file:
                file.seek(start)
                for chunk in response.iter_raw():
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

    @contextlib.contextmanager
    def _stream(self, path: str, start: int = 0) -> Iterator[httpx.Response]:
        """An answer (200, 206, 416) whose body is still to be read."""
        headers = {"range": f"bytes={start}-"} if start else {}
        with self._http.stream("GET", self._url + path, headers=headers) as response:
            if response.status_code not in (200, 206, 416):
                raise _refusal(response)
            yield response

    def _unanswered(self, error: httpx.TransportError) -> FlservingError:
        if isinstance(error, httpx.TimeoutException):
            return DeadlineExceededError(f"no answer from {self._url} within {self._timeout_s:g} s: try again later")
        return ServerClosedError(f"no answer from {self._url} ({type(error).__name__}: {error})")

    def _count(self, kind: str, nbytes: int) -> None:
        self.nbytes[kind] = self.nbytes.get(kind, 0) + nbytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _extent(response: httpx.Response) -> tuple[int, int]:
    """Where the body begins in the file, and how long the file is; -1: it is not said."""
    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if found:
        return int(found[1]), int(found[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdecimal() else -1


def _refusal(response: httpx.Response) -> FlservingError:
    body = b"".join(islice(response.iter_raw(), 4))  # a message is short, whatever is sent
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a proxy, or a liar
        text = f"status {response.status_code}"
    return kind_of(response.status_code, response.headers.get(REASON, ""))(text)


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
