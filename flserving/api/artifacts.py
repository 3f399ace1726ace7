"""What devices download: signed releases, manifests, weights, deltas, and the caller's own head.

Files are sent from any byte on (``Range: bytes=N-``), so that a download that was cut goes on where it ended; what
they hold never changes under their address. Everything runs in threads: it reads the disk.
"""

import asyncio
import contextlib
import os
import re
import secrets
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flserving.api.guard import Receive, Scope, Send
from flserving.delta import FORMS, Form, encode
from flserving.errors import FlservingError, ForbiddenError, InvalidInputError, NotFoundError
from flserving.heads import HeadStore
from flserving.loader import RegistrySource
from flserving.registry import WEIGHTS, Registry
from flserving.release import Head, Release, Signer, manifest_bytes
from flserving.server import ModelServer
from flserving.storage import open_file, write_file

_CHUNK = 1 << 18  # bytes
_DELTAS_NBYTES = 1 << 30  # that are kept; each is made once, for all devices that have the same version
_FROM = re.compile(r"bytes=(\d{1,15})-")


class Artifacts:
    """The routes under ``/v2/repository/models/{model}``. Each method answers the operation of its name.

    Raises (all):
        ForbiddenError: Not offered. NotFoundError: No such model (only those of a registry can be had) or version.
    """

    def __init__(self, server: ModelServer, offered: bool) -> None:
        self._server, self._offered = server, offered
        self._signers: dict[str, Signer] = {}
        self._heads: dict[tuple[str, int], HeadStore] = {}
        # One delta, one store at a time: many devices ask for the same at once. They wait outside of the threads, which
        # others need too; the lock inside is for those whose caller went away.
        self._releasing, self._making, self._one = asyncio.Lock(), asyncio.Lock(), threading.Lock()

    async def release(self, request: Request) -> Response:
        async with self._releasing:
            return _json(await asyncio.to_thread(self._release, request))

    async def manifest(self, request: Request) -> Response:
        content = await asyncio.to_thread(lambda: manifest_bytes(*self._version(request)))
        return Response(content, media_type="application/json")

    async def weights(self, request: Request) -> Response:
        return await asyncio.to_thread(self._weights, request)

    async def delta(self, request: Request) -> Response:
        async with self._making:
            return await asyncio.to_thread(self._delta, request)

    async def head(self, request: Request) -> Response:
        async with self._making:
            return _json(await asyncio.to_thread(self._head, request))

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
        return self._signer(registry).release(request.path_params["model"], nonce, by_version)

    def _weights(self, request: Request) -> Response:
        registry, model, version = self._version(request)
        return _ranged(request, f"{registry.root}/models", f"{model}/{version}/{WEIGHTS}")

    def _delta(self, request: Request) -> Response:
        registry, model, version = self._version(request)
        form, base = request.query_params.get("form", "exact"), request.query_params.get("base", "0")
        if form not in FORMS:
            raise InvalidInputError(f"form is {form[:80]!r}: choose one of {', '.join(FORMS)}")
        start = None if base == "0" else registry.resolve(model, base)
        name = f"{model}-{version}-{start or 0}-{form}"
        with self._one:
            try:
                _keep_delta(registry, model, version, start, form, name)
            except OSError as error:
                raise FlservingError(f"the delta cannot be kept ({error.strerror}): check the free space") from error
            return _ranged(request, f"{registry.root}/deltas", name)

    def _head(self, request: Request) -> Head:
        (registry, model, version), client = self._version(request), request.state.who.client
        if client is None:
            raise ForbiddenError("heads are given to their clients only: ask for a token that names you")
        signer = self._signer(registry)
        with self._one:
            if (store := self._heads.get((model, version))) is None and (store := registry.read(model, version).heads):
                self._heads = dict([*self._heads.items(), ((model, version), store)][-2:])
            taken = None if store is None else store.take(client)
        if taken is None:
            raise NotFoundError(f"version {version} of {model!r} has no head of this client")
        return signer.head(model, version, taken)


def _keep_delta(registry: Registry, model: str, version: int, base: int | None, form: Form, name: str) -> None:
    """Make a delta if nobody has, and forget the oldest ones."""
    folder = Path(registry.root) / "deltas"
    if (folder / name).exists():
        return
    start = None if base is None else registry.read(model, base).tensors
    content = encode(registry.read(model, version).tensors, start, form)
    folder.mkdir(exist_ok=True)
    fresh = folder / f".{secrets.token_hex(8)}"
    try:
        write_file(str(fresh), content)  # on the disk first: after a power cut nobody would make it again
        os.replace(fresh, folder / name)
    finally:
        fresh.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process forgets them too
        kept_nbytes = 0
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            kept_nbytes += path.stat().st_size
            if kept_nbytes > _DELTAS_NBYTES and path.name != name:
                path.unlink()


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
