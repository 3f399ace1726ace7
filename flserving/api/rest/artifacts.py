"""What devices download: signed releases, manifests, weights, deltas, and the caller's own head.

Files are sent from any byte on (``Range: bytes=N-``), so that a download that was cut goes on where it ended; what
they hold never changes under their address. Everything runs in threads: it reads the disk.

Weights are what a device needs; a delta saves bytes. So nobody waits for a delta but who asked for one, there is none
but to the released version, a caller has few of them made at a time, and where none can be kept the weights are sent.
"""

import asyncio
import contextlib
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import BinaryIO

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flserving.api.auth import Identity
from flserving.edge.delta import FORMS, Form, encode
from flserving.edge.release import Head, Release, Signer, manifest_bytes
from flserving.errors import FlservingError, ForbiddenError, InvalidInputError, NotFoundError, OverloadedError
from flserving.registry.heads import HeadStore
from flserving.registry.index import DEFAULT_ALIAS
from flserving.registry.registry import WEIGHTS, Registry
from flserving.registry.storage import open_file, write_file
from flserving.serving.loader import RegistrySource
from flserving.serving.server import ModelServer

_CHUNK = 1 << 18  # bytes
_DELTAS_NBYTES = 1 << 30  # that are kept; each is made once, for all devices that have the same version
_PLACES = 1  # deltas that are made at a time for one client: a device asks for one
_SHARED_PLACES = 8  # for a credential without a client, which a fleet may share
_RETRY_S = 60.0  # after which deltas are tried again where none could be kept
_MOST_MAKING = 32  # for all callers together
_MOST_DIGITS = 20
_DEVICE = re.compile(r"[0-9a-f]{16}")
_FROM = re.compile(r"bytes=(\d{1,15})-")


class Artifacts:
    """The routes under ``/v2/repository/models/{model}``. Each method answers the operation of its name.

    Raises (all):
        ForbiddenError: Not offered. NotFoundError: No such model (only those of a registry can be had) or version.
    """

    def __init__(self, server: ModelServer, offered: bool) -> None:
        self._server, self._offered = server, offered
        self._signers: dict[str, Signer] = {}
        # One of a kind at a time: many devices ask for the same at once. They wait outside of the threads, which others
        # need too; the locks inside are for those whose caller went away.
        self._releasing = asyncio.Lock()
        self._encoding = asyncio.Lock()
        self._making: dict[str, asyncio.Task[bytes | None]] = {}
        self._places: Counter[Hashable] = Counter()
        self._retry_s: dict[str, float] = {}  # when deltas may be made again for a folder that keeps none
        # What is asked of an old version may need a long read: heads of the released one do not wait for that.
        self._released_heads = _Stores(most=2)
        self._other_heads = _Stores(most=1)

    async def release(self, request: Request) -> Response:
        async with self._releasing:
            return _json(await asyncio.to_thread(self._release, request))

    async def manifest(self, request: Request) -> Response:
        content = await asyncio.to_thread(lambda: manifest_bytes(*self._version(request)))
        return Response(content, media_type="application/json")

    async def weights(self, request: Request) -> Response:
        return await asyncio.to_thread(self._weights, request)

    async def delta(self, request: Request) -> Response:
        registry, model, version, start, form = await asyncio.to_thread(self._ends, request)
        name = f"{model}-{version}-{start or 0}-{form}"
        folder = f"{registry.root}/deltas"
        answer = await asyncio.to_thread(_kept, request, folder, name)
        if answer is not None:
            return answer
        making = self._making.get(f"{registry.root}/{name}")
        if making is None:
            making = self._make(registry, model, version, start, form, name, request.state.who)
        content = await asyncio.shield(making)  # it goes on for the others when this caller leaves
        answer = await asyncio.to_thread(_kept, request, folder, name)
        if answer is not None:
            return answer
        if content is None or form == "exact":
            raise NotFoundError(f"the cloud cannot keep a delta to version {version}: download the weights")
        return Response(content, media_type="application/octet-stream")  # nothing else brings this form

    async def head(self, request: Request) -> Response:
        client = request.state.who.client
        registry, model, version = await asyncio.to_thread(self._version, request)
        if client is None:
            raise ForbiddenError("heads are given to their clients only: ask for a token that names you")
        released = await asyncio.to_thread(_is_released, registry, model, version)
        stores = self._released_heads if released else self._other_heads
        store = await stores.get(registry, model, version)
        return _json(await asyncio.to_thread(self._head, registry, model, version, store, client))

    def _registry(self, request: Request) -> Registry:
        if not self._offered:
            raise ForbiddenError("artifacts are not offered here: start the server with artifacts=True (--artifacts)")
        model = request.path_params["model"]
        source = self._server._sources.get(model)
        if not isinstance(source, RegistrySource):
            raise NotFoundError(f"no model {model[:80]!r} with artifacts: serve one from a registry")
        return source.registry

    def _version(self, request: Request) -> tuple[Registry, str, int]:
        registry, model = self._registry(request), request.path_params["model"]
        return registry, model, registry.resolve(model, request.path_params["version"])

    def _signer(self, registry: Registry) -> Signer:
        if (signer := self._signers.get(registry.root)) is None:  # two at once read or make the same key
            signer = self._signers[registry.root] = Signer(registry)
        return signer

    def _release(self, request: Request) -> Release:
        registry, nonce = self._registry(request), request.query_params.get("nonce", "")
        if not re.fullmatch(r"[0-9a-f]{0,64}", nonce):
            raise InvalidInputError(f"nonce is {nonce[:80]!r}: send up to 64 hex digits")
        by_version = request.query_params.get("by") == "version"
        signer = self._signer(registry)
        release = signer.release(request.path_params["model"], nonce, by_version)
        self._report(request, signer)
        return release

    def _report(self, request: Request, signer: Signer) -> None:
        """Note what the asking device runs. It may say nothing; what makes no sense counts as that."""
        said, client = request.query_params, request.state.who.client
        if not _DEVICE.fullmatch(said.get("device", "")):
            return
        name = f"device {said['device']}" if client is None else f"client {client}"
        with contextlib.suppress(ValueError):
            version, number = (int(said.get(key, "0")[:_MOST_DIGITS]) for key in ("version", "round"))
            age_s = float(said["age_s"][:_MOST_DIGITS]) if "age_s" in said else None
            model = request.path_params["model"]
            self._server.fleet.report(signer.pseudonym(name), client is None, model, version, number, age_s)

    def _weights(self, request: Request) -> Response:
        registry, model, version = self._version(request)
        return _ranged(request, f"{registry.root}/models", f"{model}/{version}/{WEIGHTS}")

    def _ends(self, request: Request) -> tuple[Registry, str, int, int | None, Form]:
        """Between which versions a delta is asked for, and in which form."""
        registry, model, version = self._version(request)
        form, base = request.query_params.get("form", "exact"), request.query_params.get("base", "0")
        if form not in FORMS:
            raise InvalidInputError(f"form is {form[:80]!r}: choose one of {', '.join(FORMS)}")
        start = None if base == "0" else registry.resolve(model, base)
        if not _is_released(registry, model, version):
            raise NotFoundError(f"version {version} of {model!r} is not the released one, so there is no delta to it")
        return registry, model, version, start, form

    def _make(
        self, registry: Registry, model: str, version: int, start: int | None, form: Form, name: str, who: Identity
    ) -> "asyncio.Task[bytes | None]":
        """Start making a delta. OverloadedError: enough are being made for this caller, or for all."""
        caller: Hashable = id(who) if who.client is None else who.client
        places = _SHARED_PLACES if who.client is None else _PLACES
        if self._places[caller] >= places or len(self._making) >= _MOST_MAKING:
            self._server.telemetry.told("delta", ["refused"])
            raise OverloadedError(
                f"{self._places[caller]} deltas are being made for this caller, {len(self._making)} in all: download "
                "the weights, or try again"
            )
        key = f"{registry.root}/{name}"

        async def make() -> bytes | None:
            try:
                async with self._encoding:
                    return await asyncio.to_thread(self._made, registry, model, version, start, form, name)
            finally:
                del self._making[key]
                self._places[caller] -= 1
                if not self._places[caller]:
                    del self._places[caller]

        self._places[caller] += 1
        making = self._making[key] = asyncio.create_task(make())
        making.add_done_callback(lambda task: task.cancelled() or task.exception())  # also where all callers left
        return making

    def _made(
        self, registry: Registry, model: str, version: int, start: int | None, form: Form, name: str
    ) -> bytes | None:
        """Make a delta and keep it. Where it cannot be kept: its content, or None if it was not made, because the
        weights do as well, and it would be made again for each device."""
        folder = Path(registry.root) / "deltas"
        now_s = self._server._clock()
        if form == "exact" and now_s < self._retry_s.get(registry.root, now_s):
            self._server.telemetry.told("delta", ["not_kept"])
            return None
        base = None if start is None else registry.read(model, start).tensors
        content = encode(registry.read(model, version).tensors, base, form)
        problem = f"{model}/deltas"
        try:
            _keep_delta(folder, name, content)
        except OSError as error:
            self._server.telemetry.told("delta", ["not_kept"])
            why = f"deltas cannot be kept ({error.strerror}), whole weights are sent: check the folder and free space"
            self._server._load_problems[problem] = why
            self._retry_s[registry.root] = now_s + _RETRY_S
            return content
        self._server.telemetry.told("delta", ["made"])
        self._server._load_problems.pop(problem, None)
        self._retry_s.pop(registry.root, None)
        return None

    def _head(self, registry: Registry, model: str, version: int, store: HeadStore | None, client: str) -> Head:
        taken = None if store is None or store.expired else store.take(client)
        if taken is None:
            raise NotFoundError(f"version {version} of {model!r} has no head of this client")
        return self._signer(registry).head(model, version, taken)


class _Stores:
    """Opened heads of the last few versions that were asked for; one is opened at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[tuple[str, str, int], HeadStore] = {}
        self._waiting = asyncio.Lock()
        self._opening = threading.Lock()

    async def get(self, registry: Registry, model: str, version: int) -> HeadStore | None:
        store = self._kept.get((registry.root, model, version))
        if store is None:
            async with self._waiting:
                store = await asyncio.to_thread(self._open, registry, model, version)
        return store

    def _open(self, registry: Registry, model: str, version: int) -> HeadStore | None:
        key = (registry.root, model, version)
        with self._opening:
            if key not in self._kept and registry.manifest(model, version).heads is not None:
                store = registry.read(model, version).heads
                if store is not None:
                    self._kept = dict([*self._kept.items(), (key, store)][-self._most :])
            return self._kept.get(key)


def _is_released(registry: Registry, model: str, version: int) -> bool:
    return registry.aliases(model).get(DEFAULT_ALIAS) == version


def _keep_delta(folder: Path, name: str, content: bytes) -> None:
    """Store a delta, and forget the oldest ones. OSError: it cannot be stored."""
    folder.mkdir(exist_ok=True)
    fresh = folder / f".{secrets.token_hex(8)}"
    try:
        write_file(str(fresh), content)  # on the disk first: after a power cut nobody would make it again
        os.replace(fresh, folder / name)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process forgets them too
        kept_nbytes = 0
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            kept_nbytes += path.stat().st_size
            if kept_nbytes > _DELTAS_NBYTES and path.name != name:
                path.unlink()


def _kept(request: Request, folder: str, name: str) -> Response | None:
    """A delta that was kept, from the byte on that was asked for; None where there is none that can be read."""
    try:
        if Path(folder, name).is_file():
            return _ranged(request, folder, name)
    except (OSError, FlservingError):
        pass
    return None


def _ranged(request: Request, root: str, relative: str) -> Response:
    """A file from the byte on that was asked for. What is no such range is answered whole (RFC 9110, 14.2)."""
    fd, nbytes = open_file(root, relative)
    file = open(fd, "rb")  # noqa: SIM115  # closed by the answer
    found = _FROM.fullmatch(request.headers.get("range", ""))
    start = int(found[1]) if found else 0
    headers = {"accept-ranges": "bytes", "content-length": str(nbytes - start)}
    if found and start >= nbytes:
        file.close()
        raise HTTPException(416, f"{relative} has {nbytes} bytes", {"content-range": f"bytes */{nbytes}"})
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
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while chunk := await asyncio.to_thread(self._file.read, _CHUNK):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def _json(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
