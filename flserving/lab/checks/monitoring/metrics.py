"""Check of the exercise "make a bare server observable" (notebook 11)."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge

Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float]  # (name, sorted labels) -> value
_TARGET_S = 0.05
_CLIENTS = 1000
_WORK = (
    (0.004, False),
    (0.040, False),
    (0.060, False),
    (0.020, True),
    (0.900, False),
    (2.0, True),
    (0.030, False),
)
_USE_REGISTRY = "pass registry=registry to each metric, so that two servers do not share one"


class RowError(Exception):
    """What the check's model raises."""


class _World:
    """A clock that only the model moves, and a student's server around that model."""

    def __init__(self, server_class: Callable[..., Any]) -> None:
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.inside = list[Scrape]()
        self._nested = self.watch = False
        self.server = ask(
            "creating a server",
            lambda: self._no_clash(server_class, self.model, self.registry, lambda: self.now_s),
        )

    @staticmethod
    def _no_clash(server_class: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return server_class(*arguments)
        except ValueError as error:
            assert "Duplicated timeseries" not in str(error), (
                f"a second server could not be created ({str(error)[:60]}...): {_USE_REGISTRY}"
            )
            raise

    def model(self, features: tuple[float, bool]) -> str:
        seconds, fails = features
        self.now_s += seconds
        if self._nested:
            self._nested = False
            self.call(0.001, False, "inner")
        if self.watch:
            self.inside.append(self.scrape())
        if fails:
            raise RowError(f"row number {self.now_s:.6f} is out of range")
        return f"answer {seconds}"

    def call(self, seconds: float, fails: bool, client: str, nested: bool = False) -> None:
        """One request through the student's server; what it answers must be what the model
        answered."""
        self._nested = nested
        what = f"predict for client {client!r}"
        try:
            got = self.server.predict((seconds, fails), client)
        except RowError:
            assert fails
            return
        except NotImplementedError:
            raise
        except Exception as error:
            raise AssertionError(
                f"{what} raised {type(error).__name__}: {str(error)[:120]}; the model "
                + ("raised RowError, let it through" if fails else "had answered")
            ) from error
        assert not fails, (
            f"the model raised RowError and predict returned {got!r}: measure a failure, then raise it again"
        )
        assert got == f"answer {seconds}", (
            f"predict returned {got!r} where the model answered 'answer {seconds}'"
        )

    def families(self) -> list[Metric]:
        text = generate_latest(self.registry).decode()
        return [f for f in text_string_to_metric_families(text) if not f.name.endswith("_created")]

    def scrape(self) -> Scrape:
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for f in self.families()
            for s in f.samples
        }


def check_metrics(server_class: Callable[..., Any]) -> None:
    """Check ``server_class(model, registry, clock)`` with ``predict(features, client)`` by what a
    scrape of it says.

    Right is: the model's answer or error, unchanged; in ``registry`` one Counter of requests with a
    label that tells failures apart, one Histogram of seconds over all requests with a bound at
    0.05, one Gauge of requests in progress; and a number of series that does not depend on who asks
    or on what goes wrong.

    Raises:
        AssertionError: Names the rule, and what the scrape said.
    """
    judge(
        "metrics",
        server_class,
        Part(
            "answers as the model does",
            _worked,
            ("What stands in finally happens for an answer and for an error.",),
        ),
        Part(
            "has labels from a closed set",
            _closed_labels,
            (
                "Only the outcome is a label, answered or failed: neither the client nor the error's text is.",
            ),
        ),
        Part(
            "has a counter, a histogram and a gauge",
            _named,
            (
                "Each is made once, in __init__, with registry=registry.",
                'Counter("bare_requests", "By outcome.", ["outcome"], registry=registry)',
            ),
        ),
        Part(
            "counts each request once",
            _counts,
            ("self.requests.labels(outcome).inc() stands in the finally block, and nowhere else.",),
        ),
        Part(
            "observes the seconds of all requests",
            _durations,
            (
                "began_s = self.clock() before the model is called; observe the difference in finally.",
                "buckets=(..., 0.025, 0.05, 0.1, ...) has the target among its bounds.",
            ),
        ),
        Part(
            "knows the requests in progress",
            _in_progress,
            (".inc() before the try, .dec() in finally.",),
        ),
    )


def _worked(server_class: Callable[..., Any]) -> tuple[_World, list[Metric]]:
    world = _World(server_class)
    for number, (seconds, fails) in enumerate(_WORK):
        world.call(seconds, fails, f"client {number % 2}")
    families = world.families()
    assert families, f"after {len(_WORK)} requests the scrape is empty: {_USE_REGISTRY}"
    return world, families


def _found(server_class: Callable[..., Any]) -> tuple[Metric, Metric, Metric]:
    return _kinds(_worked(server_class)[1])


def _kinds(families: Iterable[Metric]) -> tuple[Metric, Metric, Metric]:
    by_kind: dict[str, list[Metric]] = {}
    for family in families:
        by_kind.setdefault(family.type, []).append(family)
    for family in by_kind.get("gauge", []):
        counts = family.name.endswith("_total") or any(s.labels for s in family.samples)
        assert not counts, (
            f"{family.name} is a gauge that counts: rate() needs a Counter, of which it knows that a fall is a restart"
        )
    for family in by_kind.get("summary", []):
        raise AssertionError(
            f"{family.name} is a summary: it cannot say which share took at most 0.05 s; use a Histogram"
        )
    found = []
    for kind, use in (
        ("counter", "requests"),
        ("histogram", "seconds"),
        ("gauge", "requests in progress"),
    ):
        names = [family.name for family in by_kind.get(kind, [])]
        assert len(names) == 1, (
            f"the scrape holds {len(names)} metrics of type {kind} {names}: make one, for {use}"
            + (
                "; one counter whose label tells outcomes apart can be summed and divided"
                if len(names) > 1
                else ""
            )
        )
        found += by_kind[kind]
    return found[0], found[1], found[2]


def _named(server_class: Callable[..., Any]) -> None:
    counter, histogram, gauge = _found(server_class)
    wrong_unit = re.search(r"(_ms|millis|_us|micros|_minutes)", histogram.name)
    assert not wrong_unit, (
        f"{histogram.name} is not in a base unit: measure seconds, and say so: ..._seconds"
    )
    assert histogram.name.endswith("_seconds"), (
        f"{histogram.name} does not say its unit: end the name with _seconds"
    )
    assert "request" in counter.name, (
        f"{counter.name}_total does not say what it counts: ..._requests_total"
    )
    for family in (counter, histogram, gauge):
        assert "_" in family.name, (
            f"{family.name} has no prefix that says whose it is: bare_{family.name}"
        )
        assert family.documentation.strip(), (
            f"{family.name} has no help text: say in a sentence what it is"
        )


def _closed_labels(server_class: Callable[..., Any]) -> None:
    world, _ = _worked(server_class)
    before = world.scrape()
    for number in range(_CLIENTS):
        world.call(0.001 * (1 + number), number % 2 == 0, f"stranger {number}")
    grown = [key for key in world.scrape() if key not in before]
    for name, labels in grown:
        for label, value in labels:
            told = f"{len(before)} series became {len(before) + len(grown)} after {_CLIENTS} requests: {name} has "
            assert "stranger" not in value, (
                told + f"a label {label} with one value per client; leave it out"
            )
            assert "row number" not in value, (
                told
                + f"an error's text as label {label}; free text never ends, use the error's class or 'failed'"
            )
    assert not grown, (
        f"{len(before)} series became {len(before) + len(grown)} after {_CLIENTS} more requests of the same kinds, "
        f"the first {grown[0]}: take labels from a closed set"
    )


def _counts(server_class: Callable[..., Any]) -> None:
    name = _found(server_class)[0].name
    world = _World(server_class)
    answered = 0
    failed = 0
    touched: dict[bool, set[tuple[tuple[str, str], ...]]] = {False: set(), True: set()}
    for seconds, fails in _WORK:
        before = world.scrape()
        world.call(seconds, fails, "a")
        answered = answered + (not fails)
        failed = failed + fails
        after = world.scrape()
        steps = {
            key: value - before.get(key, 0)
            for key, value in after.items()
            if key[0] == f"{name}_total"
        }
        total = sum(value for key, value in after.items() if key[0] == f"{name}_total")
        kind = "a failed" if fails else "an answered"
        assert sum(steps.values()) != 0, (
            f"{name}_total stands at {total:g} before and after {kind} request: "
            + (
                "count failures too, or the failure rate is always 0"
                if fails
                else "call .inc() for every request"
            )
        )
        assert sum(steps.values()) == 1, (
            f"{name}_total grew by {sum(steps.values()):g} with {kind} request: count each request once, when it ends"
        )
        touched[fails] |= {labels for (_, labels), step in steps.items() if step}
    both = touched[False] & touched[True]
    assert not both, (
        f"answered and failed requests are counted in the same series {name}_total{dict(sorted(both)[0])}: "
        "a label such as outcome must tell them apart"
    )


def _durations(server_class: Callable[..., Any]) -> None:
    name = _found(server_class)[1].name
    world = _World(server_class)
    for seconds, fails in _WORK:
        world.call(seconds, fails, "a")
    scrape = world.scrape()
    count = _sum(scrape, f"{name}_count")
    seconds = _sum(scrape, f"{name}_sum")
    spent_s = sum(seconds for seconds, _ in _WORK)
    answered = [seconds for seconds, fails in _WORK if not fails]
    assert count != len(answered), (
        f"{name}_count is {count:g} after {len(_WORK)} requests: the failed ones are missing; one that failed after "
        "2 s was a slow one, observe it too (finally)"
    )
    assert count == len(_WORK), (
        f"{name}_count is {count:g} after {len(_WORK)} requests: observe each once"
    )
    assert abs(seconds - 1000 * spent_s) > 1e-3, (
        f"{name}_sum is {seconds:g} where {spent_s:g} s passed: those are milliseconds, the base unit is the second"
    )
    assert seconds > 1e-2, (
        f"{name}_sum is {seconds:.2g} where {spent_s:g} s passed on the server's clock: "
        "read self.clock() before and after"
    )
    assert abs(seconds - spent_s) < 1e-6, (
        f"{name}_sum is {seconds:g} where {spent_s:g} s passed: observe end - beginning"
    )
    within = [
        (dict(labels)["le"], value)
        for (n, labels), value in scrape.items()
        if n == f"{name}_bucket"
    ]
    bounds = sorted({float(le) for le, _ in within})
    assert _TARGET_S in bounds, (
        f"the buckets of {name} end at {bounds}, none at 0.05: the share of requests within the target of 50 ms "
        "could only be guessed; give buckets=(..., 0.05, ...)"
    )
    got = sum(value for le, value in within if float(le) == _TARGET_S)
    wanted = sum(seconds <= _TARGET_S for seconds, _ in _WORK)
    assert got == wanted, f"{name} says that {got:g} requests took at most 0.05 s, {wanted} did"


def _in_progress(server_class: Callable[..., Any]) -> None:
    name = _found(server_class)[2].name
    world = _World(server_class)
    world.watch = True  # what a scrape says while the model runs
    world.call(0.01, False, "a")
    seen = _sum(world.inside[-1], name)
    assert seen == 1, (
        f"{name} is {seen:g} while one request is in the model: .inc() before the model is called"
    )
    assert (rest := _sum(world.scrape(), name)) == 0, (
        f"{name} is {rest:g} when all are answered: .dec() at the end"
    )
    world.call(0.01, False, "a", nested=True)
    inner, outer = (_sum(scrape, name) for scrape in world.inside[-2:])
    assert (inner, outer) == (2, 1), (
        f"{name} is {inner:g} while two requests are in the model, and {outer:g} when one of them has left: "
        "use .inc() and .dec(), not .set()"
    )
    world.call(0.01, True, "a")
    rest = _sum(world.scrape(), name)
    assert rest == 0, (
        f"{name} is {rest:g} after a failed request, and nothing is running: .dec() in a finally block"
    )


def _sum(scrape: Scrape, name: str) -> float:
    return sum(value for (n, _), value in scrape.items() if n == name)
