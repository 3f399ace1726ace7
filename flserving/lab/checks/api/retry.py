"""Checks of the exercises "a retry budget" and "a call with deadline and retry" (notebook 05), in
virtual time."""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flserving import errors
from flserving.errors import FlservingError
from flserving.lab.checks.asking import ask, equal
from flserving.lab.checks.parts import Part, judge

Call = Callable[..., Any]
SAFE = (errors.OverloadedError, errors.ServerClosedError, errors.ModelUnloadedError)
FINAL = {
    errors.InvalidInputError: "the same rows are refused again, however often they are sent",
    errors.UnauthorizedError: "the same token stays unknown",
    errors.NotFoundError: "a version that does not exist will not appear while you wait",
    errors.ModelExecutionError: "the same rows fail in the same model again",
    errors.DeadlineExceededError: "whoever waits has no time left for another try",
}
_MOST_CALLS = 300
_CLOSE_S = 1e-6


def check_retry_budget(RetryBudget: Callable[[float], Any]) -> None:
    """Check ``RetryBudget(most)`` with ``may_retry()``, called after each failure, and
    ``answered()``.

    Right is: it begins with ``most`` tokens; a failure takes one, never below 0; an answer earns
    0.1, never above ``most``; a retry is allowed while more than half of ``most`` is left. Source:
    gRPC's proposal A6.

    Raises:
        CheckError: Says how many retries a server in trouble gets more, or a healthy one fewer.
    """
    judge(
        "retry-budget",
        RetryBudget,
        Part(
            "each client has its own",
            _own,
            ("What two budgets share stands in the class body, not in __init__.",),
        ),
        Part(
            "failures use it up",
            _used_up,
            (
                "Take the token first, then look at what is left.",
                "`self.tokens = max(0, self.tokens - 1)`, then `return self.tokens > self.most / 2`",
            ),
        ),
        Part(
            "answers fill it, up to the most",
            _filled,
            (
                "Two bounds: never below 0, never above most.",
                "`self.tokens = min(self.most, self.tokens + 0.1)`",
            ),
        ),
    )


def check_retry(call_with_retry: Call) -> None:
    """Check ``call_with_retry(send, deadline_s, budget, clock, sleep, idempotent=True)``.

    ``send(timeout_s)`` answers or raises; ``error.retry_after_s`` is what the server said in
    Retry-After, 0 if nothing. Right is: an error of status 429 (and 503, if ``idempotent``) is
    tried again after its Retry-After and a random wait that grows from failure to failure, as long
    as ``budget.may_retry()`` says so and that wait ends before the deadline; every other error, and
    the last one, is raised. Each try gets the time that is left. An answer is told to the budget.

    Raises:
        CheckError: Says what the caller, the server or the other callers suffer from the mistake.
    """
    kept = random.getstate(), np.random.get_state()  # whatever the student draws from is seeded
    try:
        judge("retry", call_with_retry, *_PARTS)
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


class _Budget:
    """A budget that allows so many retries, and notes what it was asked."""

    def __init__(self, allowed: float = float("inf")) -> None:
        self.allowed = allowed
        self.failures = 0
        self.answers = 0

    def may_retry(self) -> bool:
        self.failures += 1
        return self.failures <= self.allowed

    def answered(self) -> None:
        self.answers += 1


class _EnoughError(BaseException):
    """Not an Exception: a student's ``except Exception`` must not catch it."""


class _World:
    """A server that follows a script, and the time in it. A try takes ``took_s``."""

    def __init__(
        self, script: Iterable[object], deadline_s: float, took_s: float = 0.01, seed: int = 0
    ) -> None:
        self.script = iter(script)
        self.deadline_s = deadline_s
        self.took_s = took_s
        self.now_s = 100.0
        self.asked = 0
        self.budget = _Budget()
        self.start_s = self.now_s
        self.end_s = self.now_s + deadline_s
        self.tries: list[tuple[float, float]] = []  # when, with which timeout
        self.sleeps: list[float] = []
        self.raised: list[BaseException] = []
        random.seed(seed)
        np.random.seed(seed)

    def clock(self) -> float:
        self._count()
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self._count()
        assert seconds >= 0, f"sleep was called with {seconds!r}: a wait is never negative"
        self.sleeps.append(seconds)
        self.now_s += seconds

    def send(self, timeout_s: float) -> object:
        self._count()
        assert isinstance(timeout_s, int | float), (
            f"send got the timeout {timeout_s!r}: it is a number of seconds"
        )
        self.tries.append((self.now_s, timeout_s))
        outcome = next(self.script)
        self.now_s += self.took_s
        if isinstance(outcome, BaseException):
            self.raised.append(outcome)
            raise outcome
        return outcome

    def run(self, call_with_retry: Call, **options: bool) -> tuple[Any, BaseException | None]:
        """What was returned, and what was raised."""
        try:
            got = call_with_retry(
                self.send, self.deadline_s, self.budget, self.clock, self.sleep, **options
            )
            return got, None
        except (NotImplementedError, AssertionError):
            raise
        except _EnoughError:
            raise AssertionError(
                f"after {len(self.tries)} tries and {self.now_s - self.start_s:.1f} s it still asks, with a deadline "
                f"of {self.deadline_s:g} s and a server that stays busy: stop when the next wait would end too late"
            ) from None
        except Exception as error:
            if error not in self.raised and not isinstance(error, FlservingError):
                raise AssertionError(
                    f"call_with_retry raised {type(error).__name__}: {error}"
                ) from error
            return None, error

    def _count(self) -> None:
        self.asked += 1
        if self.asked > _MOST_CALLS:
            raise _EnoughError


def _busy(
    kind: type[FlservingError] = errors.OverloadedError, retry_after_s: float = 0.0
) -> FlservingError:
    error = kind("busy")
    error.retry_after_s = retry_after_s  # type: ignore[attr-defined]
    return error


def _for_ever(retry_after_s: float = 0.0) -> Iterable[FlservingError]:
    while True:
        yield _busy(retry_after_s=retry_after_s)


def _used_up(RetryBudget: Callable[[float], Any]) -> None:
    budget = ask("RetryBudget(10)", RetryBudget, 10)
    allowed = _failures_until_no(budget)
    told = f"a full budget of 10 met failures in a row, and may_retry() said yes {allowed} times:"
    assert allowed < 30, f"{told} each failure takes a token, or the budget is no bound"
    assert allowed < 9, (
        f"{told} it says yes until nothing is left; the half is kept back, so that few answers suffice to begin again"
    )
    assert allowed != 5, (
        f"{told} after the fifth 5 are left, which is not MORE than half; take the token first, then look"
    )
    assert allowed == 4, f"{told} after 4 failures 6 are left, more than half, after 5 no longer"
    small = ask("RetryBudget(2)", RetryBudget, 2)
    got = ask("may_retry()", small.may_retry)
    assert not got, (
        "of 2 tokens 1 is left after a failure, just half, and may_retry() said yes: take half of `most`"
    )


def _filled(RetryBudget: Callable[[float], Any]) -> None:
    budget = ask("RetryBudget(10)", RetryBudget, 10)
    for _ in range(300):
        ask("answered()", budget.answered)
    allowed = _failures_until_no(budget)
    assert allowed <= 4, (
        f"after 300 answers it allows {allowed} failures in a row, a fresh one 4: tokens never exceed `most`, or a "
        "good hour pays for a long storm"
    )
    for _ in range(100):
        ask("may_retry()", budget.may_retry)
    needed = 0
    while not _allows(budget) and needed < 2000:
        needed += 1
        ask("answered()", budget.answered)
    assert needed < 2000, "a budget that was used up stays so: each answer earns 0.1 token"
    assert needed >= 55, (
        f"used up, it allows a retry again after {needed} answers: each earns 0.1 token, so more than 50 are needed"
    )
    assert needed <= 70, (
        f"after a hundred failures it takes {needed} answers until it allows a retry: tokens never fall below 0, or a "
        "long outage is punished for long after"
    )
    left = getattr(budget, "tokens", None)
    assert left is None or equal(left, round(10 * left) / 10), (
        f"an answer earns 0.1 token, {left!r} are left"
    )


def _failures_until_no(budget: Any) -> int:
    for number in range(100):
        if not ask("may_retry()", budget.may_retry):
            return number
    return 100


def _allows(budget: Any) -> bool:
    """Whether it would allow a retry now; tried on a copy."""
    return bool(ask("may_retry()", copy.deepcopy(budget).may_retry))


def _own(RetryBudget: Callable[[float], Any]) -> None:
    first = ask("RetryBudget(10)", RetryBudget, 10)
    for _ in range(20):
        ask("may_retry()", first.may_retry)
    second = ask("RetryBudget(10)", RetryBudget, 10)
    got = ask("may_retry()", second.may_retry)
    assert got is not None, "may_retry() returned None: return whether the call may try again"
    assert got, (
        "one budget is used up, and a new one allows no retry: keep the tokens in self, one client's trouble is its own"
    )


def _answers(call_with_retry: Call) -> None:
    world = _World(["the answer", "a second answer"], deadline_s=2)
    got, error = world.run(call_with_retry)
    assert got == "the answer" and error is None, (
        f"send answered at once, and call_with_retry returned {got!r}"
    )
    assert len(world.tries) == 1, (
        f"send answered at once and was called {len(world.tries)} times: return the answer"
    )
    assert not world.sleeps, (
        f"send answered at once and the caller had to wait {sum(world.sleeps):g} s more"
    )


def _raises_what_is_final(call_with_retry: Call) -> None:
    for kind, why in FINAL.items():
        world = _World([first := _busy(kind), *[_busy(kind) for _ in range(99)]], deadline_s=2)
        got, error = world.run(call_with_retry)
        name = kind.__name__
        status = kind.http_status
        assert len(world.tries) == 1, (
            f"{name} ({status}) was tried {len(world.tries)} times: {why}; raise it at once"
        )
        _check_raised(got, error, first, f"after {name} ({status})")
        assert not world.sleeps, f"it slept before it raised {name}: there is nothing to wait for"


def _asks_again(call_with_retry: Call) -> None:
    for kind in SAFE:
        world = _World([_busy(kind), _busy(kind), "the answer"], deadline_s=10)
        got, error = world.run(call_with_retry)
        told = f"{kind.__name__} ({kind.http_status}) twice, then an answer, 10 s to spare:"
        assert error is None, (
            f"{told} it gave up after {len(world.tries)} tries; 429 and 503 are safe to try again"
        )
        assert got == "the answer", f"{told} it returned {got!r}"
        gaps = [
            later[0] - earlier[0] - world.took_s
            for earlier, later in zip(world.tries, world.tries[1:], strict=False)
        ]
        assert max(gaps) > _CLOSE_S, (
            f"{told} it asked again at once, without a wait: that is how a busy server is kept busy"
        )


def _passes_on_what_is_left(call_with_retry: Call) -> None:
    world = _World([_busy(), _busy(), "the answer"], deadline_s=10, took_s=0.5)
    world.run(call_with_retry)
    for number, (at_s, timeout_s) in enumerate(world.tries, start=1):
        left_s = world.end_s - at_s
        if abs(timeout_s - left_s) < _CLOSE_S:
            continue
        told = f"try {number} got a timeout of {timeout_s:.3f} s"
        assert abs(timeout_s - world.deadline_s) > _CLOSE_S or number == 1, (
            f"{told}, the whole deadline, when only {left_s:.3f} s were left: the server works on for nobody"
        )
        raise AssertionError(
            f"{told} when {left_s:.3f} s were left: pass on what is left until the deadline"
        )


def _gives_up(call_with_retry: Call) -> None:
    for seed in range(20):
        world = _World(_for_ever(), deadline_s=2, seed=seed)
        got, error = world.run(call_with_retry)
        told = "with a server that stays busy and a deadline of 2 s,"
        assert world.now_s <= world.end_s + world.took_s, (
            f"{told} it gave up after {world.now_s - world.start_s:.2f} s: do not start a wait that ends too late"
        )
        late = [
            timeout_s for at_s, timeout_s in world.tries if at_s >= world.end_s or timeout_s <= 0
        ]
        assert not late, (
            f"{told} it called send({late[0]:.3f}) when no time was left: give up instead"
        )
        assert len(world.tries) >= 3, (
            f"{told} it gave up after {len(world.tries)} tries: there was time for more"
        )
        _check_raised(got, error, world.raised[-1], f"{told} at the end", world.raised[0])


def _honours_retry_after(call_with_retry: Call) -> None:
    world = _World([_busy(retry_after_s=0.7), "the answer"], deadline_s=10)
    world.run(call_with_retry)
    waited_s = sum(world.sleeps)
    assert waited_s >= 0.7 - _CLOSE_S, (
        f"the server said Retry-After 0.7 s, and was asked again after {waited_s:.2f} s: it knows best when it has room"
    )
    assert waited_s < 5, (
        f"the server said Retry-After 0.7 s, and was asked again only after {waited_s:.2f} s"
    )
    world = _World(_for_ever(retry_after_s=5), deadline_s=2)
    got, error = world.run(call_with_retry)
    told = "the server said Retry-After 5 s, the deadline is 2 s:"
    assert not sum(world.sleeps), (
        f"{told} it slept {sum(world.sleeps):.2f} s in vain; raise the error at once"
    )
    _check_raised(got, error, world.raised[0], told)


def _backs_off_with_jitter(call_with_retry: Call) -> None:
    waits: list[list[float]] = []
    for seed in range(40):
        world = _World([*[_busy() for _ in range(4)], "the answer"], deadline_s=1000, seed=seed)
        world.run(call_with_retry)
        ends = zip(world.tries, world.tries[1:], strict=False)
        waits.append([later[0] - earlier[0] - world.took_s for earlier, later in ends])
    table = np.array(waits)
    assert table.shape == (40, 4), (
        "four times 429, then an answer, 1000 s to spare: it gave up before the answer"
    )
    mean_s = table.mean(axis=0)
    spread = table.std(axis=0)
    assert (spread > 0.05 * mean_s).all(), (
        f"forty callers that failed at the same time all waited the same {_told(mean_s)} s: they come back together; "
        "draw each wait at random (jitter)"
    )
    assert mean_s[3] > 1.5 * mean_s[0], (
        f"the mean waits after failure 1, 2, 3, 4 are {_told(mean_s)} s: they must grow, or a long outage is hammered "
        "at the same pace to its end"
    )


def _keeps_to_the_budget(call_with_retry: Call) -> None:
    world = _World(_for_ever(), deadline_s=1000)
    world.budget = _Budget(allowed=2)
    got, error = world.run(call_with_retry)
    tries = len(world.tries)
    assert tries <= 3, (
        f"the budget allowed 2 retries and there were {tries - 1}: ask budget.may_retry() after each failure; without "
        "it the callers keep a server down that has room for them"
    )
    assert tries == 3, (
        f"the budget allowed 2 retries and there were {tries - 1}: ask it once for each failure"
    )
    assert len(world.sleeps) <= 2, (
        "the budget said no, and it slept before it raised: there is nothing to wait for"
    )
    _check_raised(got, error, world.raised[-1], "when the budget said no", world.raised[0])
    world = _World([_busy(errors.InvalidInputError)], deadline_s=2)
    world.run(call_with_retry)
    assert not world.budget.failures, (
        "a 400 was counted by the budget: that mistake is the caller's and says nothing about the server"
    )
    world = _World([_busy(), "the answer"], deadline_s=100)
    world.run(call_with_retry)
    assert world.budget.answers, (
        "an answer was not told to the budget: without budget.answered() a few bad minutes end all retries for good"
    )
    assert world.budget.answers == 1, (
        f"one answer was told to the budget {world.budget.answers} times"
    )


def _repeats_only_what_is_safe(call_with_retry: Call) -> None:
    world = _World([first := _busy(errors.ServerClosedError), "the answer"], deadline_s=100)
    got, error = world.run(call_with_retry, idempotent=False)
    assert len(world.tries) == 1, (
        "idempotent=False and a 503: it was sent again, though the first may have been done before the connection "
        "broke; a training update would count twice"
    )
    _check_raised(got, error, first, "after a 503 with idempotent=False")
    world = _World([_busy(), "the answer"], deadline_s=100)
    got, error = world.run(call_with_retry, idempotent=False)
    assert got == "the answer", (
        "idempotent=False and a 429: it gave up, though a 429 says that nothing was done; that is safe to send again"
    )


def _check_raised(
    got: Any,
    error: BaseException | None,
    wanted: BaseException,
    when: str,
    first: BaseException | None = None,
) -> None:
    name = type(wanted).__name__
    assert error is not None, (
        f"{when} it returned {got!r}: the caller takes that for an answer; raise {name}, the last error"
    )
    assert error is not first or first is wanted, (
        f"{when} it raised the first error again: raise the last one"
    )
    assert error is wanted, (
        f"{when} it raised {type(error).__name__}: raise the {name} that send raised; it says why"
    )


def _told(numbers: Sequence[float] | np.ndarray[Any, Any]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


_PARTS = (
    Part("returns the answer", _answers, ("`return` ends the loop: one answer, one try.",)),
    Part(
        "raises at once what is final",
        _raises_what_is_final,
        (
            "`except FlservingError as error:`, then look at error.http_status.",
            "Inside the except, a bare `raise` raises what was caught.",
        ),
    ),
    Part(
        "tries 429 and 503 again",
        _asks_again,
        ("`if error.http_status not in (429, 503): raise`, else wait.",),
    ),
    Part(
        "tells each try what is left",
        _passes_on_what_is_left,
        (
            "Note the end of the call once: `end_s = clock() + deadline_s`.",
            "`send(end_s - clock())`",
        ),
    ),
    Part(
        "gives up in time",
        _gives_up,
        ("Decide before the wait, not after it.", "`if clock() + wait_s >= end_s: raise`"),
    ),
    Part(
        "heeds Retry-After",
        _honours_retry_after,
        ("error.retry_after_s is the least wait; the random one comes on top.",),
    ),
    Part(
        "waits at random, longer each time",
        _backs_off_with_jitter,
        (
            "Count the failures of this call.",
            "`random.uniform(0, bound)` draws a wait, and the bound doubles: `0.1 * 2**failures`.",
        ),
    ),
    Part(
        "keeps to the budget",
        _keeps_to_the_budget,
        (
            "The budget is asked once after each failure that could be tried again.",
            "`if not budget.may_retry(): raise`, behind the test of the status; `budget.answered()` before the return.",
        ),
    ),
    Part(
        "repeats only what is safe",
        _repeats_only_what_is_safe,
        (
            "A 429 was refused: nothing was done.",
            "`again = status == 429 or (idempotent and status == 503)`",
        ),
    ),
)
