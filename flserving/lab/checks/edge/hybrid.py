"""Check of the exercise "write the hybrid policy" (notebook 07), against devices and clouds that
keep a record."""

from collections.abc import Callable
from typing import Any

from flserving.errors import (
    DeadlineExceededError,
    OverloadedError,
    ServerClosedError,
    StaleModelError,
)
from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Hybrid = Callable[..., dict[str, Any]]
ROW = (0.1, 0.2)
OTHER = (0.3, 0.4)
LIMITS = {"threshold": 0.9, "fresh_s": 100, "refuse_s": 1000, "consent": True}
KEYS = ("prediction", "confidence", "round", "age_s", "path")


class _World:
    """A device, its cache of cloud answers, and a cloud, which all write down what they are
    asked."""

    def __init__(
        self, *, confidence: float = 0.6, age_s: float = 10, away: Exception | None = None
    ) -> None:
        self.local = {"prediction": 3, "confidence": confidence, "round": 7, "age_s": age_s}
        self.fresh = {"prediction": 8, "confidence": 0.97, "round": 9, "age_s": 1}
        self.away = away
        self.known = dict[Any, Any]()
        self.asked_device = self.asked_cloud = self.stored = 0

    def device(self, row: object) -> dict[str, Any]:
        self.asked_device += 1
        return dict(self.local)

    def cloud(self, row: object) -> dict[str, Any]:
        self.asked_cloud += 1
        if self.away is not None:
            raise self.away
        return dict(self.fresh)

    def get(self, row: object) -> dict[str, Any] | None:
        return self.known.get(row)

    def put(self, row: object, answer: dict[str, Any]) -> None:
        self.stored += 1
        self.known[row] = answer

    def run(self, hybrid: Hybrid, row: object = ROW, **limits: Any) -> dict[str, Any]:
        got = ask(
            "hybrid(row, device, cache, cloud, ...)",
            hybrid,
            row,
            self.device,
            self,
            self.cloud,
            *(LIMITS | limits).values(),
        )
        assert isinstance(got, dict), (
            f"hybrid returned {got!r}: return the answer, a dict with the key path"
        )
        missing = [key for key in KEYS if key not in got]
        assert not missing, (
            f"the answer {got} lacks {', '.join(missing)}: take the whole answer and add the path to it"
        )
        return got


def check_hybrid(hybrid: Hybrid) -> None:
    """Check ``hybrid(row, device, cache, cloud, threshold, fresh_s, refuse_s, consent)``.

    Right is: the device, if its confidence reaches ``threshold`` and its model is at most
    ``fresh_s`` old; else an earlier answer of the cloud from the cache; else, with consent, the
    cloud, whose answer goes into the cache; else the device's answer as ``degraded``, or a
    StaleModelError if its model is older than ``refuse_s``.

    Raises:
        AssertionError: Says what the user, the owner of the data or the network suffers from the
            mistake.
    """
    judge(
        "hybrid-policy",
        hybrid,
        Part(
            "the device where it is sure",
            _sure,
            (
                "Ask the device once, and keep what it said.",
                '`if local["confidence"] >= threshold and ...: return local | {"path": "local"}`',
            ),
        ),
        Part(
            "the cloud where it is not",
            _unsure,
            (
                "An answer of the cloud is returned whole, with its own round.",
                '`return cloud(row) | {"path": "cloud"}`',
            ),
        ),
        Part(
            "an old model is not trusted",
            _stale,
            ("Sure is one condition, fresh the other.", '`local["age_s"] <= fresh_s`'),
        ),
        Part(
            "remembers what the cloud said",
            _remembers,
            (
                "The cache is asked after the device and before the cloud.",
                "`known = cache.get(row)` is None where nothing is known. `cache.put(row, answer)` after an answer.",
            ),
        ),
        Part(
            "nothing leaves without consent",
            _consent,
            (
                "Only the call of the cloud sends something.",
                "`if consent:` stands around that call, and nothing else.",
            ),
        ),
        Part(
            "the cloud may fail",
            _away,
            (
                "All errors of the package are FlservingErrors.",
                "`try:` the call and the put, `except FlservingError: pass`, and go on to the device's answer.",
            ),
        ),
        Part(
            "too old to be given at all",
            _too_old,
            (
                "This is asked last: only where nobody else answered.",
                '`if local["age_s"] > refuse_s: raise ...`',
            ),
        ),
        Part(
            "what was said stays as it was",
            _keeps_what_it_said,
            (
                '`answer | {"path": ...}` makes a new dict, `answer["path"] = ...` changes the one in the cache.',
            ),
        ),
    )


def _sure(hybrid: Hybrid) -> None:
    world = _World(confidence=0.95)
    got = world.run(hybrid)
    assert not world.asked_cloud, (
        "the device was sure (0.95, threshold 0.9) and fresh, and you asked the cloud"
    )
    _expect(got, world.local, "local", "the device was sure and fresh")
    assert world.asked_device == 1, (
        f"you asked the device {world.asked_device} times for one answer: once is enough"
    )
    assert not world.stored, (
        "you put the device's own answer into the cache: it is for answers of the cloud"
    )
    world = _World(confidence=0.9)
    world.run(hybrid)
    assert not world.asked_cloud, (
        "a confidence of 0.9 reaches the threshold 0.9: the device answers"
    )


def _unsure(hybrid: Hybrid) -> None:
    world = _World()
    got = world.run(hybrid)
    assert got["path"] != "local", (
        "the device was not sure (0.6, threshold 0.9), and its answer was given as local"
    )
    assert world.asked_cloud, (
        "the device was not sure, nothing was cached, the cloud was there: ask the cloud"
    )
    assert world.asked_cloud == 1, (
        f"you asked the cloud {world.asked_cloud} times for one answer: once is enough"
    )
    _expect(got, world.fresh, "cloud", "the cloud answered")


def _stale(hybrid: Hybrid) -> None:
    world = _World(confidence=0.99, age_s=500)
    got = world.run(hybrid)
    assert world.asked_cloud, (
        "the device was sure, but its model was 500 s old and fresh_s is 100: an old model may be sure and wrong"
    )
    _expect(
        got,
        world.fresh,
        "cloud",
        "the device's model was too old to be trusted, the cloud answered",
    )
    world = _World(confidence=0.99, age_s=100)
    world.run(hybrid)
    assert not world.asked_cloud, (
        "a model of 100 s is fresh where fresh_s is 100: the device answers"
    )


def _remembers(hybrid: Hybrid) -> None:
    world = _World()
    world.run(hybrid)
    assert world.known, (
        "the cloud answered and nothing was put into the cache: the same row will travel again"
    )
    got = world.run(hybrid)
    assert world.asked_cloud == 1, (
        "the cloud's answer was in the cache, and you sent the row a second time"
    )
    _expect(got, world.fresh, "cache", "the answer came from the cache")
    got = world.run(hybrid, OTHER)
    assert got["path"] == "cloud", (
        "another row was asked, and the first one's answer came from the cache"
    )
    world.local["confidence"] = 0.95
    got = world.run(hybrid)
    assert got["path"] == "local", (
        "the device was sure, and you preferred an older answer from the cache: device first"
    )


def _consent(hybrid: Hybrid) -> None:
    world = _World()
    got = world.run(hybrid, consent=False)
    assert not world.asked_cloud, (
        "without consent the row was sent to the cloud: nothing may leave the device"
    )
    _expect(
        got,
        world.local,
        "degraded",
        "there was no consent, so the device's answer is the best there is",
    )
    world.known[ROW] = dict(world.fresh)
    got = world.run(hybrid, consent=False)
    assert got["path"] == "cache", (
        "a cached answer sends nothing: it may be given without consent, too"
    )


def _away(hybrid: Hybrid) -> None:
    for error in (
        OverloadedError("busy"),
        DeadlineExceededError("too late"),
        ServerClosedError("gone"),
    ):
        world = _World(away=error)
        try:
            got = world.run(hybrid)
        except AssertionError as told:
            if type(error).__name__ not in str(told):
                raise
            raise AssertionError(
                f"the cloud raised {type(error).__name__} and so did you: the device has an answer, give it as degraded"
            ) from told
        _expect(got, world.local, "degraded", f"the cloud raised {type(error).__name__}")
        assert not world.stored, (
            "the cloud failed, and something was put into the cache: the next caller gets it"
        )
        world.away = None
        got = world.run(hybrid)
        assert got["path"] == "cloud", (
            f"the cloud came back, and the path was {got['path']!r}: ask it again"
        )


def _too_old(hybrid: Hybrid) -> None:
    world = _World(confidence=0.99, age_s=2000)
    try:
        got = world.run(hybrid)
    except AssertionError as told:
        assert "StaleModelError" not in str(told), (
            "the device's model was past refuse_s, and you refused: the cloud was there and had an answer"
        )
        raise
    _expect(got, world.fresh, "cloud", "the device's model was past refuse_s, the cloud answered")
    for limits, away in (({"consent": False}, None), ({}, ServerClosedError("gone"))):
        world = _World(confidence=0.99, age_s=2000, away=away)
        why = "there was no consent" if away is None else "the cloud was gone"
        try:
            got = world.run(hybrid, **limits)
        except AssertionError as told:
            assert isinstance(told.__cause__, StaleModelError), (
                f"the model was 2000 s old, refuse_s 1000, {why}: raise StaleModelError, not: {told}"
            )
        else:
            raise AssertionError(
                f"the model was 2000 s old, refuse_s is 1000, {why}: you answered {got['path']!r}"
            )
    world = _World(age_s=1000, away=ServerClosedError("gone"))
    world.run(hybrid)  # exactly at the limit: still given


def _keeps_what_it_said(hybrid: Hybrid) -> None:
    world = _World()
    first = world.run(hybrid)
    world.run(hybrid)
    assert first["path"] == "cloud", (
        "an answer that was given as cloud turned into cache later: you changed the dict in the cache; copy it"
    )


def _expect(got: dict[str, Any], wanted: dict[str, Any], path: str, when: str) -> None:
    assert got["path"] == path, f"{when}: the path is {path!r}, you wrote {got['path']!r}"
    wrong = [key for key in wanted if got[key] != wanted[key]]
    assert not wrong, (
        f"{when}: {wrong[0]} must be {wanted[wrong[0]]!r}, of the model that answered, not {got[wrong[0]]!r}"
    )
