"""Signed statements: what a device follows, and everything that it must not."""

import base64
import concurrent.futures
import os

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_cloud import CLIENTS, heads, publish, state
from flserving import Registry
from flserving.edge import delta
from flserving.edge.release import (
    KEY_FILE,
    VALID_S,
    HeadStatement,
    Release,
    Seen,
    Signer,
    Statement,
    check,
    device_manifest,
    open_head,
    round_of,
    verify,
)
from flserving.errors import CorruptArtifactError, FlservingError, ForbiddenError, NotFoundError
from flserving.models import weights
from flserving.registry.manifest import sha256

NOW_S = 1_800_000_000


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path) as registry:
        for number in (1, 2, 3):
            publish(registry, number)
        yield registry


@pytest.fixture
def signer(registry):
    return Signer(registry, now=lambda: NOW_S)


def wire(release):
    return msgspec.json.encode(release)


def test_a_statement_says_what_is_released(registry, signer):
    statement, key = verify(wire(signer.release("m", "ab12")), Statement, signer.public)
    assert key == signer.public
    assert (statement.model, statement.version, statement.round, statement.nonce) == (
        "m",
        3,
        3,
        "ab12",
    )
    assert statement.serial == registry.change_token() + 1 and statement.rollback == 0
    assert (statement.issued_at, statement.expires_at) == (NOW_S, NOW_S + VALID_S)
    assert statement.manifest_sha256 == sha256(device_manifest(registry, "m", 3))
    assert statement.int8_sha256 == weights.digest(delta.quantised(state(3)))
    text = signer.release("m").statement
    assert text == msgspec.json.encode(msgspec.json.decode(text, type=Statement)).decode(), (
        "canonical"
    )


def test_the_signature_is_ed25519_over_the_labelled_text(registry, signer):
    """Checked with another implementation's view: the private key in the file makes the same
    signature."""
    with open(f"{registry.root}/{KEY_FILE}") as file:
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(file.read()))
    release = signer.release("m")
    assert (
        key.sign(b"flserving Statement 1\n" + release.statement.encode()).hex() == release.signature
    )


def test_the_key_is_private_kept_and_one(registry, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        keys = {signer.public for signer in threads.map(lambda _: Signer(registry), range(16))}
    assert len(keys) == 1 and os.stat(tmp_path / KEY_FILE).st_mode & 0o777 == 0o600
    assert [name for name in os.listdir(tmp_path) if name.startswith(KEY_FILE)] == [KEY_FILE]
    os.chmod(tmp_path / KEY_FILE, 0o644)
    with pytest.raises(ForbiddenError, match="chmod 600"):
        Signer(registry)
    os.chmod(tmp_path / KEY_FILE, 0o600)
    (tmp_path / KEY_FILE).write_text("no key")
    with pytest.raises(CorruptArtifactError, match="restore it"):
        Signer(registry)
    (tmp_path / KEY_FILE).unlink()
    (tmp_path / KEY_FILE).mkdir(mode=0o700)
    with pytest.raises(FlservingError, match="check the folder"):
        Signer(registry)


def test_the_serial_grows_with_every_change_and_rollbacks_are_signed(registry, signer):
    def now():
        return verify(wire(signer.release("m")), Statement, None)[0]

    first = now()
    registry.rollback("m", who="test", why="worse")
    back = now()
    assert (back.round, back.rollback) == (2, 3) and back.serial > first.serial
    registry.set_alias("m", "default", 1, who="test", why="by hand")
    assert (now().round, now().rollback) == (1, 3), (
        "round 3 was rolled back: who has it may go lower"
    )
    publish(registry, 4)
    assert (now().round, now().rollback) == (4, 0)
    registry.set_alias(
        "m", "default", 3, who="test", why="no rollback: a mistake must not reach devices"
    )
    assert (now().round, now().rollback) == (3, 0)
    registry.set_alias(
        "m", "default", 2, who="test", why="so is this one, though 3 was taken back long ago"
    )
    assert (now().round, now().rollback) == (2, 3), "who has round 4 stays there"
    registry.remove_alias("m", "default", who="test", why="withdrawn")
    registry.rollback("m", who="test", why="back in service")
    assert (now().round, now().rollback) == (2, 3)


def test_what_was_taken_back_is_told_in_versions_too(registry, signer):
    """Rounds say nothing once a training starts anew."""

    def now(**options):
        return verify(wire(signer.release("m", **options)), Statement, None)[0]

    publish(registry, 1)
    assert (now().version, now().round, now().undone) == (4, 1, 0)
    registry.rollback("m", who="test", why="the new training is worse")
    assert (now().version, now().round, now().rollback, now().undone) == (3, 3, 0, 4)
    assert now(by_version=False).undone is None
    release = signer.release("m")
    without = msgspec.json.decode(release.statement)
    del without["serial"]
    changed = msgspec.structs.replace(release, statement=msgspec.json.encode(without).decode())
    with pytest.raises(CorruptArtifactError, match="serial"):
        verify(wire(changed), Statement, None)


def test_what_has_no_default_is_not_released(registry, signer):
    with pytest.raises(NotFoundError):
        signer.release("none")
    registry.remove_alias("m", "default", who="test", why="withdrawn")
    with pytest.raises(NotFoundError):
        signer.release("m")


def test_a_version_without_a_round_counts_by_its_number(registry):
    manifest = registry.publish("m", state(1), architecture="mlp", parameters={"sizes": [8, 24, 3]})
    assert round_of(manifest) == manifest.version == 4


# What is refused


def tampered(release, **changes):
    statement = msgspec.json.decode(release.statement)
    text = msgspec.json.encode(statement | changes).decode()
    return wire(msgspec.structs.replace(release, statement=text))


@pytest.mark.parametrize(
    "changes",
    [{"version": 1}, {"round": 99}, {"serial": 10**9}, {"manifest_sha256": "0" * 64}, {"rollback": 9},
     {"expires_at": 2 * NOW_S}, {"nonce": "cd"}, {"model": "n"}, {"int8_sha256": "1" * 64}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_changed_statement_is_refused(signer, changes):
    with pytest.raises(ForbiddenError, match="signature"):
        verify(tampered(signer.release("m", "ab"), **changes), Statement, signer.public)


def test_every_flipped_bit_is_refused(signer):
    good = wire(signer.release("m", "ab"))
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises((ForbiddenError, CorruptArtifactError)):
            verify(bytes(bad), Statement, signer.public)


def test_every_truncation_is_refused(signer):
    good = wire(signer.release("m", "ab"))
    for end in range(len(good)):
        with pytest.raises(CorruptArtifactError, match="cannot be read"):
            verify(good[:end], Statement, signer.public)


def test_another_key_is_refused_even_where_its_signature_is_right(signer, tmp_path):
    with Registry(tmp_path / "other") as foreign:
        publish(foreign, 9)
        other = Signer(foreign).release("m")
    with pytest.raises(ForbiddenError, match="this device trusts"):
        verify(wire(other), Statement, signer.public)
    assert verify(wire(other), Statement, None)[1] == other.key
    swapped = msgspec.structs.replace(other, key=signer.public)
    with pytest.raises(ForbiddenError, match="signature"):
        verify(wire(swapped), Statement, signer.public)


def test_a_signature_of_one_kind_is_none_of_another(registry, signer):
    statement = verify(wire(signer.release("m")), Statement, None)[0]
    text = signer.release("m").statement
    other = signer.sign(
        HeadStatement(model="m", manifest_sha256="0" * 64, client="c", layout="head", trained_on="0" * 64,
                      shape=(2, 1), sha256="0" * 64)
    )  # fmt: skip
    with pytest.raises(CorruptArtifactError):
        verify(wire(other), Statement, signer.public)
    with pytest.raises(ForbiddenError, match="signature"):
        verify(wire(Release(text, other.signature, other.key)), Statement, signer.public)
    assert statement.model == "m"


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[" * 100_000, b'{"statement":1}', b"\xff\xfe", b"<html>"],
                         ids=range(7))  # fmt: skip
def test_what_is_no_release_says_so(data):
    with pytest.raises(CorruptArtifactError, match="is this a cloud"):
        verify(data, Statement, None)


GOOD = Statement(
    model="m", version=3, round=3, serial=6, manifest_sha256="a" * 64, int8_sha256="b" * 64, issued_at=NOW_S,
    expires_at=NOW_S + 600, rollback=0, nonce="ab",
)  # fmt: skip
SEEN = Seen(serial=6, round=3, manifest_sha256="a" * 64)
RAN = msgspec.structs.replace(SEEN, version=3)
NEWER = {"serial": 7, "manifest_sha256": "c" * 64}


@pytest.mark.parametrize(
    ("changes", "seen", "now_s", "says"),
    [
        ({}, SEEN, NOW_S, None),
        ({}, Seen(), NOW_S, None),
        ({"serial": 7, "round": 4, "manifest_sha256": "c" * 64}, SEEN, NOW_S, None),
        ({"serial": 7, "round": 1, "rollback": 3, "manifest_sha256": "c" * 64}, SEEN, NOW_S, None),
        ({}, SEEN, 0, None),  # a clock at 1970: the nonce shows that the statement is new
        ({"model": "n"}, SEEN, NOW_S, "this device runs"),
        ({"nonce": "cd"}, SEEN, NOW_S, "another question"),
        ({"nonce": ""}, SEEN, NOW_S, "another question"),
        ({"serial": 5}, SEEN, NOW_S, "serial 5, 6 was seen"),
        ({"serial": 5, "rollback": 9}, SEEN, NOW_S, "serial 5, 6 was seen"),
        ({"manifest_sha256": "c" * 64}, SEEN, NOW_S, "name different versions"),
        ({}, SEEN, NOW_S + 600, "expired 0 s ago"),
        ({}, SEEN, 10 * NOW_S, "check the clocks"),
        ({"expires_at": NOW_S}, SEEN, 0, "expired"),
        (
            {"serial": 7, "round": 2, "manifest_sha256": "c" * 64},
            SEEN,
            NOW_S,
            "round 2, 3 ran here",
        ),
        (
            {"serial": 7, "round": 1, "rollback": 2, "manifest_sha256": "c" * 64},
            SEEN,
            NOW_S,
            "round 1, 3 ran here",
        ),
        (NEWER | {"version": 4, "round": 1, "undone": 0}, RAN, NOW_S, None),  # trained anew
        (NEWER | {"version": 2, "round": 9, "undone": 3}, RAN, NOW_S, None),
        (NEWER | {"version": 2, "round": 9, "undone": 0}, RAN, NOW_S, "version 2, 3 ran here"),
        (NEWER | {"version": 1, "undone": 2, "rollback": 99}, RAN, NOW_S, "version 1, 3 ran here"),
        # a cloud of before ``undone``
        (NEWER | {"version": 4, "round": 1}, RAN, NOW_S, "round 1, 3 ran here"),
        # what ran, is unknown
        (NEWER | {"version": 4, "round": 1, "undone": 0}, SEEN, NOW_S, "round 1, 3 ran here"),
    ],
    ids=range(22),
)
def test_what_a_device_follows(changes, seen, now_s, says):
    statement = msgspec.structs.replace(GOOD, **changes)
    if says is None:
        check(statement, "m", "ab", seen, now_s)
    else:
        with pytest.raises(ForbiddenError, match=says):
            check(statement, "m", "ab", seen, now_s)


# Heads


@pytest.fixture
def signed_head(registry, signer):
    manifest = publish(registry, 5, with_heads=True)
    taken = registry.read("m", manifest.version).heads.take("c-2")
    return (
        signer.head("m", manifest.version, taken),
        sha256(device_manifest(registry, "m", manifest.version)),
        manifest,
    )


def test_a_head_travels(signer, signed_head):
    head, version, manifest = signed_head
    got = open_head(wire(head), signer.public, "m", version, "c-2")
    assert np.array_equal(got.weights[0], heads(5).weights[CLIENTS.index("c-2")])
    assert (got.layout, got.clients, got.trained_on) == ("head", ["c-2"], [manifest.digests.body])


@pytest.mark.parametrize(
    "wrong", ["client", "model", "version", "key", "numbers", "shorter", "kind"]
)
def test_a_wrong_head_is_refused(signer, signed_head, wrong):
    head, version, _ = signed_head
    client, model, key, error = "c-2", "m", signer.public, ForbiddenError
    if wrong == "client":
        client = "c-1"
    elif wrong == "model":
        model = "n"
    elif wrong == "version":
        version = "0" * 64
    elif wrong == "key":
        key = "0" * 64
    else:
        error, record = CorruptArtifactError, bytearray(head.record)
        record[5] ^= 1
        record = {"numbers": bytes(record), "shorter": head.record[:-4], "kind": head.record}[wrong]
        head = msgspec.structs.replace(head, record=record)
    data = wire(head)
    if wrong == "kind":
        data = data.replace(base64.b64encode(head.record), b"???")
    with pytest.raises(error):
        open_head(data, key, model, version, client)
