"""What devices download: signed releases, manifests, weights, deltas, and the caller's own head.

Files are sent from any byte on (``Range: bytes=N-``), so that a download that was cut goes on where
it ended; what they hold never changes under their address. Everything runs in threads: it reads the
disk.

Weights are what a device needs; a delta saves bytes. So nobody waits for a delta but who asked for
one, there is none but to the released version, a caller has few of them made at a time, and where
none can be kept the weights are sent.
"""

import asyncio
import contextlib
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flserving.api.auth import Identity
from flserving.edge.delta import FORMS, Form, encode
from flserving.edge.release import Head, Release, Signer, device_manifest
from flserving.errors import (
    FlservingError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
)
from flserving.registry.heads import HeadStore
from flserving.registry.index import DEFAULT_ALIAS
from flserving.registry.registry import WEIGHTS, Registry
from flserving.registry.storage import open_file, write_file
from flserving.serving.loader import RegistrySource
from flserving.serving.server import ModelServer

_CHUNK = 1 << 18  # bytes
# deltas that are kept; each is made once, for all devices that have the same version
_DELTAS_NBYTES = 1 << 30
_PLACES = 1  # deltas that are made at a time for one client: a device asks for one
_SHARED_PLACES = 8  # for a credential without a client, which a fleet may share
_RETRY_S = 60.0  # after which deltas are tried again where none could be kept
_MOST_MAKING = 32  # for all callers together
_MOST_DIGITS = 20
_DEVICE = re.compile(r"[0-9a-f]{16}")
_FROM = re.compile(r"bytes=(\d{1,15})-")


class Artifacts:
    """The routes under ``/v2/repository/models/{model}``. Each method answers the operation of its
    name.

    Raises (all):
        ForbiddenError: Not offered. NotFoundError: No such model (only those of a registry can be
        had) or version.
    """

    def __init__(self, server: ModelServer, offered: bool) -> None:
        self._server = server
        self._offered = offered
        self._signer = cache(Signer)  # two at once read or make the same key
        # One of a kind at a time: many devices ask for the same at once. They wait outside of the
        # threads, which others need too; the locks inside are for those whose caller went away.
        self._releasing = asyncio.Lock()
        self._encoding = asyncio.Lock()
        self._making: dict[_Delta, asyncio.Task[bytes | None]] = {}
        self._places: Counter[Hashable] = Counter()
        # when deltas may be made again for a folder that keeps none
        self._retry_s: dict[str, float] = {}
        # What is asked of an old version may need a long read: heads of the released one do not
        # wait for that.
        self._released_heads = _Stores(most=2)
        self._other_heads = _Stores(most=1)

    async def release(self, request: Request) -> Response:
        async with self._releasing:
            return _json(await asyncio.to_thread(self._release, request))

    async def manifest(self, request: Request) -> Response:
        content = await asyncio.to_thread(lambda: device_manifest(*self._version(request)))
        return Response(content, media_type="application/json")

    async def weights(self, request: Request) -> Response:
        return await asyncio.to_thread(self._weights, request)

    async def delta(self, request: Request) -> Response:
        wanted = await asyncio.to_thread(self._wanted, request)
        answer = await asyncio.to_thread(_stored, request, wanted)
        if answer is not None:
            return answer
        making = self._making.get(wanted) or self._make(wanted, request.state.who)
        content = await asyncio.shield(making)  # it goes on for the others when this caller leaves
        answer = await asyncio.to_thread(_stored, request, wanted)
        if answer is not None:
            return answer
        if content is None or wanted.form == "exact":
            raise NotFoundError(
                f"the cloud cannot keep a delta to version {wanted.version}: download the weights"
            )
        # nothing else brings this form
        return Response(content, media_type="application/octet-stream")

    async def head(self, request: Request) -> Response:
        client = request.state.who.client
        registry, model, version = await asyncio.to_thread(self._version, request)
        if client is None:
            raise ForbiddenError(
                "heads are given to their clients only: ask for a token that names you"
            )
        forgets = await asyncio.to_thread(registry.forgets)
        released = await asyncio.to_thread(_is_released, registry, model, version)
        stores = self._released_heads if released else self._other_heads
        store = await stores.get(registry, model, version, forgets)
        return _json(await asyncio.to_thread(self._head, registry, model, version, store, client))

    def _registry(self, request: Request) -> Registry:
        if not self._offered:
            raise ForbiddenError(
                "artifacts are not offered here: start the server with artifacts=True (--artifacts)"
            )
        model = request.path_params["model"]
        source = self._server._sources.get(model)
        if not isinstance(source, RegistrySource):
            raise NotFoundError(
                f"no model {model[:80]!r} with artifacts: serve one from a registry"
            )
        return source.registry

    def _version(self, request: Request) -> tuple[Registry, str, int]:
        registry = self._registry(request)
        model = request.path_params["model"]
        return registry, model, registry.resolve(model, request.path_params["version"])

    def _release(self, request: Request) -> Release:
        registry = self._registry(request)
        signer = self._signer(registry)
        nonce = request.query_params.get("nonce", "")
        if not re.fullmatch(r"[0-9a-f]{0,64}", nonce):
            raise InvalidInputError(f"nonce is {nonce[:80]!r}: send up to 64 hex digits")
        by_version = request.query_params.get("by") == "version"
        client = request.state.who.client if request.query_params.get("forgotten") == "1" else None
        release = signer.release(request.path_params["model"], nonce, by_version, client)
        self._report(request, signer)
        return release

    def _report(self, request: Request, signer: Signer) -> None:
        """Note what the asking device runs. It may say nothing; what makes no sense counts as
        that."""
        said = request.query_params
        client = request.state.who.client
        if not _DEVICE.fullmatch(said.get("device", "")):
            return
        name = f"device {said['device']}" if client is None else f"client {client}"
        with contextlib.suppress(ValueError):
            version, number = (
                int(said.get(key, "0")[:_MOST_DIGITS]) for key in ("version", "round")
            )
            age_s = float(said["age_s"][:_MOST_DIGITS]) if "age_s" in said else None
            model = request.path_params["model"]
            self._server.fleet.report(
                signer.pseudonym(name), client is None, model, version, number, age_s
            )

    def _weights(self, request: Request) -> Response:
        registry, model, version = self._version(request)
        return _ranged(request, f"{registry.root}/models", f"{model}/{version}/{WEIGHTS}")

    def _wanted(self, request: Request) -> "_Delta":
        registry, model, version = self._version(request)
        form = request.query_params.get("form", "exact")
        base = request.query_params.get("base", "0")
        if form not in FORMS:
            raise InvalidInputError(f"form is {form[:80]!r}: choose one of {', '.join(FORMS)}")
        start = None if base == "0" else registry.resolve(model, base)
        if not _is_released(registry, model, version):
            raise NotFoundError(
                f"version {version} of {model!r} is not the released one, so there is no delta to it"
            )
        return _Delta(registry, model, version, start=start, form=form)

    def _make(self, wanted: "_Delta", who: Identity) -> "asyncio.Task[bytes | None]":
        """Start making a delta. OverloadedError: enough are being made for this caller, or for
        all."""
        caller: Hashable = id(who) if who.client is None else who.client
        places = _SHARED_PLACES if who.client is None else _PLACES
        if self._places[caller] >= places or len(self._making) >= _MOST_MAKING:
            self._server.telemetry.count("delta", ["refused"])
            raise OverloadedError(
                f"{self._places[caller]} deltas are being made for this caller, {len(self._making)} in all: download "
                "the weights, or try again"
            )

        async def make() -> bytes | None:
            try:
                async with self._encoding:
                    return await asyncio.to_thread(self._made, wanted)
            finally:
                del self._making[wanted]
                self._places[caller] -= 1
                if not self._places[caller]:
                    del self._places[caller]

        self._places[caller] += 1
        making = self._making[wanted] = asyncio.create_task(make())
        # also where all callers left
        making.add_done_callback(lambda task: task.cancelled() or task.exception())
        return making

    def _made(self, wanted: "_Delta") -> bytes | None:
        """Make a delta and keep it. Where it cannot be kept: its content, or None if it was not
        made, because the weights do as well, and it would be made again for each device."""
        registry, model, version, start, form = wanted
        with contextlib.suppress(OSError, FlservingError):
            os.close(open_file(wanted.folder, wanted.name)[0])
            return None  # it came while this caller looked for it
        now_s = self._server._clock()
        if form == "exact" and now_s < self._retry_s.get(registry.root, now_s):
            self._server.telemetry.count("delta", ["not_kept"])
            return None
        base = None if start is None else registry.read(model, start).arrays
        content = encode(registry.read(model, version).arrays, base, form)
        problem = f"{model}/deltas"
        try:
            _keep_delta(wanted, content)
        except OSError as error:
            self._server.telemetry.count("delta", ["not_kept"])
            why = f"deltas cannot be kept ({error.strerror}), whole weights are sent: check the folder and free space"
            self._server._load_problems[problem] = why
            self._retry_s[registry.root] = now_s + _RETRY_S
            return content
        self._server.telemetry.count("delta", ["made"])
        self._server._load_problems.pop(problem, None)
        self._retry_s.pop(registry.root, None)
        return None

    def _head(
        self, registry: Registry, model: str, version: int, store: HeadStore | None, client: str
    ) -> Head:
        taken = None if store is None or store.expired else store.take(client)
        if taken is None:
            raise NotFoundError(f"version {version} of {model!r} has no head of this client")
        return self._signer(registry).head(model, version, taken)


class _Delta(NamedTuple):
    """From which version (None: from zeros) to which one, and in which form."""

    registry: Registry
    model: str
    version: int
    start: int | None
    form: Form

    @property
    def folder(self) -> str:
        return f"{self.registry.root}/deltas"

    @property
    def name(self) -> str:
        """The file's."""
        return f"{self.model}-{self.version}-{self.start or 0}-{self.form}"


class _Stores:
    """Opened heads of the last few versions that were asked for, as long as no client is forgotten;
    one is opened at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._stores: dict[tuple[str, str, int, int], HeadStore] = {}
        self._waiting = asyncio.Lock()
        self._opening = threading.Lock()

    async def get(
        self, registry: Registry, model: str, version: int, forgets: int
    ) -> HeadStore | None:
        store = self._stores.get((registry.root, model, version, forgets))
        if store is None:
            async with self._waiting:
                store = await asyncio.to_thread(self._open, registry, model, version, forgets)
        return store

    def _open(self, registry: Registry, model: str, version: int, forgets: int) -> HeadStore | None:
        key = (registry.root, model, version, forgets)
        with self._opening:
            if key not in self._stores and registry.manifest(model, version).heads is not None:
                store = registry.read(model, version).heads
                if store is not None:
                    still = [
                        it
                        for it in self._stores.items()
                        if it[0][0] != registry.root or it[0][3] == forgets
                    ]
                    self._stores = dict([*still, (key, store)][-self._most :])
            return self._stores.get(key)


def _is_released(registry: Registry, model: str, version: int) -> bool:
    return registry.aliases(model).get(DEFAULT_ALIAS) == version


def _keep_delta(delta: _Delta, content: bytes) -> None:
    """Store a delta, and forget the oldest ones. OSError: it cannot be stored."""
    folder = Path(delta.folder)
    folder.mkdir(exist_ok=True)
    fresh = folder / f".{secrets.token_hex(8)}"
    try:
        # on the disk first: after a power cut nobody would make it again
        write_file(str(fresh), content)
        fresh.replace(folder / delta.name)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process forgets them too
        kept_nbytes = 0
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            kept_nbytes += path.stat().st_size
            if kept_nbytes > _DELTAS_NBYTES and path.name != delta.name:
                path.unlink()


def _stored(request: Request, delta: _Delta) -> Response | None:
    """A delta that was kept, from the byte on that was asked for; None where there is none that can
    be read."""
    with contextlib.suppress(OSError, FlservingError):
        return _ranged(request, delta.folder, delta.name)
    return None


def _ranged(request: Request, root: str, relative: str) -> Response:
    """A file from the byte on that was asked for. What is no such range is answered whole (RFC
    9110, 14.2)."""
    fd, nbytes = open_file(root, relative)
    file = open(fd, "rb")  # noqa: SIM115  # closed by the answer
    found = _FROM.fullmatch(request.headers.get("range", ""))
    start = int(found[1]) if found else 0
    headers = {"accept-ranges": "bytes", "content-length": str(nbytes - start)}
    if found and start >= nbytes:
        file.close()
        raise HTTPException(
            416, f"{relative} has {nbytes} bytes", {"content-range": f"bytes */{nbytes}"}
        )
    if found:
        headers["content-range"] = f"bytes {start}-{nbytes - 1}/{nbytes}"
    file.seek(start)
    return _File(file, 206 if found else 200, headers)


class _File(Response):
    """The rest of an open file, which is closed whatever becomes of the connection."""

    def __init__(self, file: BinaryIO, status: int, headers: dict[str, str]) -> None:
        super().__init__(None, status, headers, "application/octet-stream")
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            while chunk := await asyncio.to_thread(self._file.read, _CHUNK):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def _json(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
