"""Bearer tokens: who they stand for, and that neither a file nor a message gives one away."""

import codecs
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flserving.api.auth import Identity, Role, Tokens
from flserving.errors import ConfigError, ForbiddenError, UnauthorizedError
from flserving.models.masking import OutputPolicy


@pytest.mark.parametrize("has", Role, ids=lambda role: f"has-{role.name}")
@pytest.mark.parametrize("needs", Role, ids=lambda role: f"needs-{role.name}")
def test_a_role_includes_those_below_it_and_no_other(has, needs):
    tokens = Tokens()
    tokens.add("secret", has, "c-1")
    if has >= needs:
        assert tokens.check("Bearer secret", needs) == Identity(has, "c-1")
    else:
        with pytest.raises(
            ForbiddenError, match=f"role is {has.name.lower()}.*needs {needs.name.lower()}"
        ):
            tokens.check("Bearer secret", needs)


@pytest.mark.parametrize(
    "header",
    [b"Bearer secret", "Bearer secret", "bearer secret", "BEARER   secret ", b"bearer secret"],
)
def test_accepts_the_scheme_in_any_case_as_text_or_bytes(header):
    tokens = Tokens()
    tokens.add("secret")
    assert tokens.check(header, Role.INFER) == Identity(Role.INFER)


UNKNOWN = [
    "secret",
    "Basic secret",
    "Bearer",
    "Bearer ",
    "Bearer secre",
    "Bearer secrett",
    "Bearer Secret",
]
UNKNOWN += ["Bearer secret x", "Bearer s\u00e9cret", "Bearer \udc80", b"\xff"]


@pytest.mark.parametrize("header", UNKNOWN, ids=range(len(UNKNOWN)))
def test_every_unknown_credential_gets_the_same_message(header):
    tokens = Tokens()
    tokens.add("secret")
    with pytest.raises(UnauthorizedError, match=r"^this credential is not known") as error:
        tokens.check(header, Role.READ)
    assert "secre" not in str(error.value).lower()


@given(st.one_of(st.text(), st.binary()))
def test_nothing_but_the_token_opens(header):
    tokens, _ = Tokens.random(Role.ADMIN)
    with pytest.raises(UnauthorizedError):
        tokens.check(header, Role.READ)


@pytest.mark.parametrize("header", [None, "", b""])
def test_a_missing_credential_says_what_to_send(header):
    with pytest.raises(UnauthorizedError, match="Authorization: Bearer"):
        Tokens().check(header, Role.READ)


def test_random_tokens_are_strong_and_differ():
    texts = {Tokens.random()[1] for _ in range(50)}
    assert len(texts) == 50 and all(len(text) >= 43 for text in texts)  # 256 bits in base64
    tokens, token = Tokens.random(Role.ADMIN)
    assert tokens.check(f"Bearer {token}", Role.ADMIN).role is Role.ADMIN


def test_open_serves_everybody_but_administers_nothing():
    tokens = Tokens.open()
    assert (
        tokens.check(None, Role.INFER)
        == tokens.check("Bearer anything", Role.READ)
        == Identity(Role.INFER)
    )
    with pytest.raises(ForbiddenError):
        tokens.check("Bearer anything", Role.ADMIN)


def test_a_token_added_again_takes_its_new_role():
    tokens = Tokens()
    tokens.add("secret", Role.READ)
    tokens.add("secret", Role.INFER, "c-2")
    assert tokens.check("Bearer secret", Role.INFER) == Identity(Role.INFER, "c-2")


def test_keeps_no_token_in_memory():
    tokens = Tokens()
    tokens.add("canary-value")
    assert "canary-value" not in repr(vars(tokens))


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "\u00e9", "a\x00"])
def test_refuses_a_token_that_no_header_could_carry(token):
    with pytest.raises(ConfigError, match="visible ASCII"):
        Tokens().add(token)


def file_with(folder, content, mode=0o600):
    path = folder / "tokens.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def test_reads_plain_and_hashed_tokens_from_a_file(tmp_path):
    hashed = hashlib.sha256(b"two").hexdigest()
    entries = [
        {"token": "one", "role": "admin"},
        {"sha256": hashed, "client": "c-9"},
        {"token": "three", "role": "read"},
        {"token": "four", "client": "c-9", "outputs": "label"},
    ]
    tokens = Tokens.read(file_with(tmp_path, entries))
    assert tokens.check("Bearer one", Role.READ) == Identity(Role.ADMIN)
    assert tokens.check("Bearer two", Role.READ) == Identity(Role.INFER, "c-9")
    assert tokens.check("Bearer three", Role.READ) == Identity(Role.READ)
    four = tokens.check("Bearer four", Role.READ)
    assert four == Identity(Role.INFER, "c-9", outputs=OutputPolicy.parse("label"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-sig"])
def test_a_file_of_tokens_may_have_a_byte_order_mark(tmp_path, encoding):
    """Notepad writes one before UTF-8, PowerShell's ``>`` before UTF-16."""
    content = json.dumps([{"token": "one", "client": "Zoë"}], ensure_ascii=False)
    path = tmp_path / "tokens.json"
    if encoding == "utf-16-be-sig":
        path.write_bytes(codecs.BOM_UTF16_BE + content.encode("utf-16-be"))
    else:
        path.write_bytes(content.encode(encoding))
    path.chmod(0o600)
    assert Tokens.read(path).check("Bearer one", Role.READ) == Identity(Role.INFER, "Zoë")


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file_with(tmp_path, [{"token": "one"}])
    assert Tokens.read("~/tokens.json").check("Bearer one", Role.READ).role is Role.INFER


def test_a_file_that_everybody_reads_may_hold_hashes_only(tmp_path):
    Tokens.read(file_with(tmp_path, [{"sha256": "0" * 64}], mode=0o644))
    with pytest.raises(ConfigError, match="chmod 600"):
        Tokens.read(file_with(tmp_path, [{"token": "one"}], mode=0o644))


@pytest.mark.parametrize(("content", "words"), [
    ("", "tokens in"), ("{", "tokens in"), ("{}", "array"), ([1], "object"), ('[{"token": "\udcff"}]', "tokens in"),
    ([{}], "either token or sha256"), ([{"token": "canary", "sha256": "0" * 64}], "either token or sha256"),
    ([{"token": "canary", "role": "root"}], "root"), ([{"token": "canary", "rule": "read"}], "rule"),
    ([{"token": 5}], "str"), ([{"token": "can ary"}], "visible ASCII"), ([{"token": "canary", "client": ""}], "client"),
    ([{"sha256": "zz"}], "entry 0"), ([{"sha256": "00"}], "64 hex digits"),
    ([{"token": "canary"}, {"token": "canary", "role": "admin"}], "already"),
    ([{"token": "one"}, {"token": "canary", "outputs": "all"}], "no policy 'all': choose full, label"),
], ids=[f"case{n}" for n in range(16)])  # fmt: skip
def test_a_malformed_file_is_refused_with_a_reason_and_without_the_token(tmp_path, content, words):
    path = tmp_path / "tokens.json"
    path.write_bytes(
        (content if isinstance(content, str) else json.dumps(content)).encode(
            errors="surrogateescape"
        )
    )
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=words) as error:
        Tokens.read(path)
    assert "canary" not in str(error.value)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Tokens.read(tmp_path / "none.json")


def test_a_caller_is_its_client_else_its_token_else_nobody():
    tokens = Tokens()
    for token, client in [
        ("one", "c-1"),
        ("two", "c-1"),
        ("three", None),
        ("four", None),
        ("five", "c-2"),
    ]:
        tokens.add(token, client=client)
    one, two, three, four, five = (
        tokens.check(f"Bearer {token}", Role.INFER).caller
        for token in ("one", "two", "three", "four", "five")
    )
    assert one == two and len({one, three, four, five}) == 4
    assert "three" not in three, "it is not the token itself"
    assert Tokens.open().check(None, Role.INFER).caller is None
