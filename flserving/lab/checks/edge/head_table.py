"""Check of the exercise "find the head" (notebook 08): own heads in their slots, the shared one for
everybody else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Kind = Callable[[Tensor, str], Any]
_BODY = "digest of round 7"
_BEFORE = "digest of round 6"
_HEADS = ("the shared head", "ada's head", "bob's head", "ada's first head")


def check_head_table(kind: Kind) -> None:
    """Check ``HeadTable(shared, body)`` with ``put(client, head, trained_on)``, ``find(clients)``
    and ``weights()``.

    Right is: slot 0 holds the shared head and answers whoever has no head of this body; a new head
    of a client takes the place of its old one; what is put is copied; ``find`` gives a slot and a
    word for each row.

    Raises:
        AssertionError: Names the client that is answered by the wrong head, or with the wrong word.
    """
    judge(
        "head-table",
        kind,
        Part(
            "its own head answers a client",
            _own,
            ("A client's slot is `len(self.heads)` before its head is added.",),
        ),
        Part(
            "the shared head answers a stranger",
            _stranger,
            (
                "`if client in self.slots` asks before a key is missing.",
                "The slot of whoever is not in it is 0.",
            ),
        ),
        Part(
            "the shared head answers for a stale one",
            _stale,
            (
                "Keep what each head was trained on in a dict, and compare it with `self.body` in `find`.",
            ),
        ),
        Part(
            "a new head replaces the old one",
            _replaced,
            (
                "Only a new client gets a new slot; of one that is known, `self.heads[slot]` is set anew.",
            ),
        ),
        Part(
            "keeps copies",
            _copied,
            ("`head.clone()` stays as it is when the client's tensor changes.",),
        ),
        Part(
            "any batch",
            _any_batch,
            (
                "One slot and one word for each row, in the order of the rows; of no rows, an empty tensor.",
            ),
        ),
    )


def _head(name: str) -> Tensor:
    return torch.full((3, 2), float(1 + _HEADS.index(name)))


def _table(kind: Kind, *put: tuple[str, str, str]) -> Any:
    """A table with heads: (client, name of the head, what it was trained on)."""
    table = ask("HeadTable(shared, body)", kind, _head("the shared head"), _BODY)
    for client, name, body in put:
        ask(f"put({client!r}, head, {body!r})", table.put, client, _head(name), body)
    return table


def _expect(table: Any, why: str, *rows: tuple[str, str, str]) -> None:
    """Each row: who asks, the head that must answer, the word for it."""
    clients = [client for client, *_ in rows]
    found = ask(f"find({clients})", table.find, clients)
    assert isinstance(found, tuple) and len(found) == 2, (
        f"find({clients}) returned {found!r}: return slots and words"
    )
    slots, words = found
    assert (
        isinstance(slots, Tensor) and slots.dtype == torch.int64 and slots.shape == (len(rows),)
    ), f"find({clients}) returned the slots {slots!r}: give a tensor of int64 with one for each row"
    heads = ask("weights()", table.weights)
    assert isinstance(heads, Tensor) and heads.shape[1:] == (3, 2), (
        "weights() must stack the heads to one tensor, [K, D + 1, C]"
    )
    assert isinstance(words, list) and len(words) == len(rows), (
        f"find({clients}) returned the words {words!r}: give a list with one for each row"
    )
    for (client, wanted, right), slot, word in zip(rows, slots.tolist(), words, strict=True):
        assert 0 <= slot < len(heads), (
            f"{client} got slot {slot}, and weights() has {len(heads)} heads: {why}"
        )
        known = (name for name in _HEADS if torch.equal(heads[slot], _head(name)))
        got = next(known, "a head that nobody put")
        assert got == wanted, f"{client} is answered by {got}, not by {wanted}: {why}"
        assert word == right, (
            f"{client} is answered by {wanted}, and find says {word!r}: that is {right!r}"
        )


_ADA = ("ada", "ada's head", _BODY)
_BOB = ("bob", "bob's head", _BODY)


def _own(kind: Kind) -> None:
    why = "each client's head has a slot of its own, after the shared one"
    _expect(
        _table(kind, _ADA, _BOB), why, ("ada", "ada's head", "own"), ("bob", "bob's head", "own")
    )


def _stranger(kind: Kind) -> None:
    why = "somebody who has no head gets the shared one, slot 0, and nobody else's"
    _expect(_table(kind), why, ("cem", "the shared head", "unknown"))
    _expect(_table(kind, _ADA, _BOB), why, ("cem", "the shared head", "unknown"))


def _stale(kind: Kind) -> None:
    why = "a head belongs to the body that it was trained on, and another one serves now"
    table = _table(kind, ("ada", "ada's head", _BEFORE), _BOB)
    _expect(table, why, ("ada", "the shared head", "stale"), ("bob", "bob's head", "own"))


def _replaced(kind: Kind) -> None:
    why = "ada has trained again, so her new head answers, and bob's stays where it was"
    old = ("ada", "ada's first head", _BEFORE)
    table = _table(kind, old, _BOB, _ADA)
    _expect(table, why, ("ada", "ada's head", "own"), ("bob", "bob's head", "own"))
    count = len(ask("weights()", table.weights))
    assert count == 3, (
        f"two clients have put three heads, and weights() has {count} with the shared one: a client that trains every "
        "round would fill the memory; put the new head into its slot"
    )
    why = "ada's last head was trained on another body"
    _expect(_table(kind, _ADA, old), why, ("ada", "the shared head", "stale"))


def _copied(kind: Kind) -> None:
    shared = _head("the shared head")
    own = _head("ada's head")
    table = ask("HeadTable(shared, body)", kind, shared, _BODY)
    ask("put('ada', head, ...)", table.put, "ada", own, _BODY)
    shared += 10
    own += 10
    why = "whoever put it has changed its own tensor since, by +=; keep a copy"
    _expect(table, why, ("ada", "ada's head", "own"), ("cem", "the shared head", "unknown"))


def _any_batch(kind: Kind) -> None:
    why = "row k is answered by the head of the client in row k"
    table = _table(kind, _ADA, _BOB)
    bob = ("bob", "bob's head", "own")
    cem = ("cem", "the shared head", "unknown")
    _expect(table, why, bob, cem, ("ada", "ada's head", "own"), bob, bob)
    _expect(table, why)
