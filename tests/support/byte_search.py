"""Whether any file of a folder tells of a client: its id in the usual spellings, and every hash of
it that can be computed without a key, the registry's own among them."""

import base64
import hashlib
import json
from pathlib import Path
from urllib.parse import quote

from flserving.registry.headfile import key_of

HASHES = ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b", "blake2s")


def in_base64(data: bytes) -> set[bytes]:
    """The characters that ``data`` alone decides, wherever in a longer text it begins, in both
    alphabets."""
    found = set()
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + data)
        sure = text[-(-shift * 8 // 6) : (shift + len(data)) * 8 // 6]
        found |= {sure, sure.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def forms(client: str) -> dict[str, set[bytes]]:
    """What to search for, by name."""
    plain = client.encode("utf-8", "surrogatepass")
    found = {
        "UTF-8": {plain},
        "UTF-16": {client.encode("utf-16-le"), client.encode("utf-16-be")},
        "JSON": {json.dumps(client)[1:-1].encode()},
        "URL": {quote(client).encode()},
        "hex": {plain.hex().encode(), plain.hex().upper().encode()},
        "base64": in_base64(plain),
    }
    digests = {name: hashlib.new(name, plain).digest() for name in HASHES}
    digests["blake2b-128"] = hashlib.blake2b(plain, digest_size=16).digest()
    digests["key_of"] = key_of(client)
    for name, digest in digests.items():
        found[name] = {
            digest,
            digest.hex().encode(),
            digest.hex().upper().encode(),
            *in_base64(digest),
        }
    key = key_of(client)  # in the index of a file of heads: two columns of little-endian numbers
    found["key_of, first column"] = {key[7::-1]}
    found["key_of, second column"] = {key[:7:-1]}
    return found


def search(folder: str | Path, client: str, **more: bytes) -> set[tuple[str, str]]:
    """(file, form) of whatever is found, in names of files too; ``more``: other bytes to search
    for, by name."""
    wanted = forms(client) | {name: {content} for name, content in more.items()}
    found = set()
    for path in Path(folder).rglob("*"):
        relative = str(path.relative_to(folder))
        content = relative.encode() + (path.read_bytes() if path.is_file() else b"")
        found.update(
            (relative, name) for name, some in wanted.items() if any(one in content for one in some)
        )
    return found
