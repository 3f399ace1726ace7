"""Check of the exercise "the key of a prediction" (notebook 03): all that an answer depends on, and
nothing else."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

MakeKey = Callable[..., Any]
Change = dict[str, Any]
# two requests that must not share an answer, by what differs from ROWS's, and why
Case = tuple[Change, Change, str]

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
LONG = np.linspace(0, 1, 4096, dtype=np.float32).reshape(1, 4096)
_MOST_NBYTES = 1000


def check_prediction_key(make_key: MakeKey) -> None:
    """Check ``make_key(model, version, rows, settings, client)``: equal for equal requests, else
    different.

    ``rows`` is an array of any type and shape, ``settings`` a dict of numbers and texts; ``client``
    is a text, or None where an answer is nobody's own. The key is small, and a dict can hold it.

    Raises:
        AssertionError: Names two requests of which the second gets the first one's answer, or does
            not find its own.
    """
    judge(
        "prediction-key",
        make_key,
        Part(
            "finds the same request again",
            _finds_the_same,
            (
                "A dict's keys are texts, numbers, bytes, and tuples of them: no list, no dict, no array.",
                "A dict with the same settings in another order is the same: `tuple(sorted(settings.items()))`.",
                "A view may lie scattered in memory: `np.ascontiguousarray(rows)` puts its values side by side.",
            ),
        ),
        Part(
            "knows the model and the version",
            _apart(_models),
            (
                "Return a tuple, with model and version as two of its entries: texts in a row may run into each other.",
            ),
        ),
        Part(
            "knows every byte of the rows",
            _apart(_bytes),
            (
                "Not a text, not a sum: the bytes of the array, all of them.",
                "`hashlib.sha256(rows).hexdigest()` reads the bytes of an array, and 64 letters stand for all of them.",
            ),
        ),
        Part(
            "knows the type and the shape of the rows",
            _apart(_forms),
            (
                "The same bytes can be other numbers in other rows: `rows.dtype.str` and `rows.shape` tell them apart.",
            ),
        ),
        Part(
            "knows the settings",
            _apart(_settings),
            ("Names and values: `tuple(sorted(settings.items()))`.",),
        ),
        Part(
            "knows whose answer it is",
            _apart(_clients),
            ("The client is an entry of the tuple, as it is: None is not the text 'None'.",),
        ),
        Part(
            "is small, and hard to forge",
            _is_small,
            (
                "Keep a digest in place of the bytes: hashlib.sha256(...) gives 32 bytes, whatever the input's size.",
            ),
        ),
    )


def _key(make_key: MakeKey, changed: Change) -> Any:
    settings = {"output": "classification", "threshold": 0.5}
    request: Change = {
        "model": "digits",
        "version": "2",
        "rows": ROWS.copy(),
        "settings": settings,
        "client": "ada",
    } | changed
    return ask(
        f"prediction_key for rows of shape {request['rows'].shape}", make_key, *request.values()
    )


def _finds_the_same(make_key: MakeKey) -> None:
    rows = ROWS.copy()
    settings = {"threshold": 0.5, "output": "classification"}
    key = _key(make_key, {"rows": rows, "settings": settings})
    try:
        hash(key)
    except TypeError as error:
        raise AssertionError(
            f"no dict can hold this key ({error}): return a tuple of texts, numbers, bytes"
        ) from None
    assert np.array_equal(rows, ROWS) and list(settings) == ["threshold", "output"], (
        "prediction_key changed what it was given: the model would answer to other rows or settings"
    )
    again = {
        "the same settings in another order, and the same rows in another array": {},
        "the same rows, as every second column of a wider array": {
            "rows": np.repeat(ROWS, 2, axis=1)[:, ::2]
        },
        "the same rows, laid out by columns": {"rows": np.asfortranarray(ROWS)},
    }
    for told, changed in again.items():
        assert key == _key(make_key, changed), (
            f"{told}: another key, so the answer that is there is not found and the model runs for nothing"
        )


def _apart(cases: Callable[[], Iterator[Case]]) -> Callable[[MakeKey], None]:
    def check(make_key: MakeKey) -> None:
        for first, second, told in cases():
            assert _key(make_key, first) != _key(make_key, second), told

    return check


def _models() -> Iterator[Case]:
    yield (
        {},
        {"version": "3"},
        (
            "whoever asks version 3 after version 2 gets version 2's answer: the key forgets the version, so after a "
            "promotion all go on getting the old answers"
        ),
    )
    yield (
        {},
        {"model": "letters"},
        "'letters' gets the answer of 'digits' to the same rows: the key forgets the model",
    )
    yield (
        {"model": "m", "version": "12"},
        {"model": "m1", "version": "2"},
        ("version 2 of 'm1' gets the answer of version 12 of 'm': their texts run into each other"),
    )


def _bytes() -> Iterator[Case]:
    middle = LONG.copy()
    middle[0, 2000] = 9
    little = LONG.copy()
    little[0, 1] = np.nextafter(little[0, 1], np.float32(2))
    for changed, told in (
        (LONG + 1, "any row gets the answer of the first one: the key forgets the rows"),
        (
            LONG[:, ::-1].copy(),
            "a row gets the answer of its mirror image: a sum or a set does not know the order",
        ),
        (
            middle,
            "a row gets the answer of one that differs in the middle: the text of a long array has '...' there",
        ),
        (
            little,
            "a row gets the answer of one that differs in a bit: rounded, as in a text, they are the same",
        ),
    ):
        yield {"rows": LONG.copy()}, {"rows": changed}, told


def _forms() -> Iterator[Case]:
    yield (
        {},
        {"rows": ROWS.copy().reshape(4, 3)},
        (
            "4 rows of 3 numbers get the answer of 3 rows of 4: three predictions, where four were asked for; the key "
            "forgets the shape"
        ),
    )
    yield (
        {},
        {"rows": ROWS.copy().view(np.int32)},
        (
            "int32 rows get the answer of float32 rows of the same bytes, which are other numbers: the key forgets the "
            "type"
        ),
    )


def _settings() -> Iterator[Case]:
    yield (
        {"settings": {"threshold": 0.5}},
        {"settings": {"threshold": 0.9}},
        (
            "with threshold 0.9, a doubtful row gets the answer of threshold 0.5, where the server should abstain: the "
            "key forgets the settings' values"
        ),
    )
    yield (
        {"settings": {"scale": 1.0}},
        {"settings": {"shift": 1.0}},
        ("{'shift': 1.0} gets the answer of {'scale': 1.0}: the key forgets the settings' names"),
    )


def _clients() -> Iterator[Case]:
    yield (
        {},
        {"client": "bob"},
        (
            "Bob gets the answer of Ada's personal model, and learns what she asked: the key forgets the client"
        ),
    )
    for name in ("None", ""):
        yield (
            {"client": None},
            {"client": name},
            (
                f"a client who is called {name!r} gets what was answered to nobody in particular: keep None as it is"
            ),
        )


def _is_small(make_key: MakeKey) -> None:
    rows = np.zeros((1000, 1000), np.float32)
    key = _key(make_key, {"rows": rows})
    nbytes = len(pickle.dumps(key))
    assert nbytes <= _MOST_NBYTES, (
        f"the key of 4 MB of rows has {nbytes:,} bytes: the keys of 1,000 answers would fill 4 GB; keep a digest"
    )
    parts = key if isinstance(key, tuple) else (key,)
    assert not any(isinstance(part, int) and abs(part) > rows.size for part in parts), (
        "the key holds a hash of at most 64 bits: two inputs can meet there, also by an attacker's choice, and hash() "
        "of a text is another number in every process; hashlib.sha256 has 256 bits"
    )
