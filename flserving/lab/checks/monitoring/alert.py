"""Check of the exercise "a burn-rate alert" (notebook 11): scripted traffic, scraped once a
minute."""

from collections.abc import Callable
from typing import Any

import numpy as np

from flserving.lab.checks.asking import ask
from flserving.lab.checks.parts import Part, judge
from flserving.lab.measuring import slo
from flserving.lab.queueing.arrivals import Floats

_A_MINUTE = 60  # valid requests
_OLD = 50  # failures before the first scrape


def check_burn_rate_alert(alert_class: Callable[..., Any]) -> None:
    """Check ``alert_class()`` with ``scraped(t_s, asked, failed) -> bool``, ``burn_rate(window_s)``
    and ``left(requests)``.

    Right is: burn rates of the requests inside the window, by seconds; a counter that falls began
    again; on while both windows of a pair are above its burn rate.

    Raises:
        AssertionError: Says who would be woken for nothing, or sleep while the month's budget
            burns.
    """
    judge(
        "burn-rate-alert",
        alert_class,
        Part(
            "knows the burn rate of a window",
            _rates,
            (
                "Two scrapes are needed: the newest, and the first one that is not older than the window.",
                "lost = failed now - failed then, asked likewise; lost / asked / self.budget, and 0 if asked is 0.",
            ),
        ),
        Part(
            "bears a restart",
            _restart,
            (
                "Keep sums of your own that never fall, beside the counters as they were scraped last.",
                "What a counter grew by is now - before, or now if it is below before.",
            ),
        ),
        Part(
            "wakes somebody when it matters, and only then",
            _pages,
            (
                "One pair: the long window says that it matters, the short one that it still goes on.",
                "any(min(self.burn_rate(long), self.burn_rate(short)) > rate for long, short, rate in self.pairs)",
            ),
        ),
        Part(
            "knows what is left of the budget",
            _left,
            ("1 - failed so far / (self.budget * requests)",),
        ),
    )


def _made(alert_class: Callable[..., Any]) -> Any:
    return ask("BurnRateAlert()", alert_class)


def _feed(alert: Any, times_s: Floats, asked: Floats, failed: Floats) -> list[bool]:
    return [
        ask(
            f"scraped({t_s:g}, {total:g}, {lost:g})",
            alert.scraped,
            float(t_s),
            float(total),
            float(lost),
        )
        for t_s, total, lost in zip(times_s, asked, failed, strict=True)
    ]


def _burn(alert: Any, window_s: float) -> float:
    got = ask(f"burn_rate({window_s})", alert.burn_rate, window_s)
    number = isinstance(got, int | float)
    assert number, f"burn_rate({window_s}) returned {got!r:.60}: return a number"
    return float(got)


def _rates(alert_class: Callable[..., Any]) -> None:
    times_s = np.array([0, 60, 120, 600, 660, 700, 900.0])  # irregular: a scrape may be late
    asked = np.array([5000, 5060, 5120, 5600, 5660, 5700, 5900.0])
    failed = np.array([7, 7, 7, 7, 9, 10, 12.0])
    alert = _made(alert_class)
    _feed(alert, times_s, asked, failed)
    got = _burn(alert, 300)
    wanted = 5 / 300 / 0.001
    told = f"in the last 300 s 300 requests were asked and 5 failed; burn_rate(300) is {got:.4g}, not {wanted:.4g}"
    for wrong, why in (
        (5 / 300, "that is the share; 0.1 % may fail, divide by the budget"),
        (5 / 300 / 0.999, "divide by the budget, 1 - target, not by the target"),
        (5 / 295 / 0.001, "divide by all valid requests, not by the answered ones"),
        (
            12 / 5900 / 0.001,
            "those are the counters since the server began; the window is the growth inside it",
        ),
        (
            5 / 900 / 0.001,
            "everything since the first scrape; only what is inside the window counts",
        ),
        (5 / 0.001, "failures alone say nothing, divide by the requests"),
        (
            3 / 240 / 0.001,
            "the window reaches back to the scrape of 600 s, which is just not older than 300 s",
        ),
    ):
        assert abs(got - wrong) > 1e-6, f"{told}: {why}"
    assert abs(got - wanted) < 1e-6, f"{told}: a window is a time, not a number of scrapes"
    quiet = _made(alert_class)
    _feed(quiet, np.array([0, 60, 120.0]), np.full(3, 100.0), np.full(3, 5.0))
    got = _burn(quiet, 60)
    assert got == 0, (
        f"nobody asked for two minutes, and burn_rate(60) is {got}: nothing burns, return 0"
    )


def _restart(alert_class: Callable[..., Any]) -> None:
    alert = _made(alert_class)
    _feed(
        alert,
        np.array([0, 60, 120, 180.0]),
        np.array([900, 960, 40, 100.0]),
        np.array([50, 51, 1, 2.0]),
    )
    got = _burn(alert, 300)
    wanted = 3 / 160 / 0.001
    assert abs(got - wanted) < 1e-6, (
        f"the counter of requests went 900, 960, 40, 100, that of failures 50, 51, 1, 2: burn_rate(300) is {got:.4g}, "
        f"not {wanted:.4g}; a counter that falls began again at 0, and what it shows is what grew: 160 and 3"
    )


def _script(hours: float, begin: int, end: int, share: float) -> tuple[Floats, Floats, Floats]:
    """Scrapes once a minute; from minute ``begin`` to ``end`` a share of the requests fails."""
    minutes = np.arange(hours * 60)
    lost = np.floor(_A_MINUTE * share * np.clip(minutes - begin, 0, end - begin))
    return 60 * minutes, _A_MINUTE * minutes + 1000, lost + _OLD


def _pages(alert_class: Callable[..., Any]) -> None:
    for told, script, sleeps, wakes in (
        (
            "all requests of a single minute failed by half",
            (8, 400, 401, 0.5),
            "one bad minute costs 1 % of the "
            "month's budget; the short window alone would wake somebody for it",
            "",
        ),
        (
            "from minute 400 on, 5 % failed for 40 minutes",
            (9, 400, 440, 0.05),
            "the trouble is over and the long window remembers it for an hour; both windows of a pair must burn",
            "the fast pair, 1 h and 5 min above 14.4, must wake somebody",
        ),
        (
            "from minute 400 on, 0.9 % failed for six hours",
            (13, 400, 760, 0.009),
            "one page needs both of its own windows above its own rate",
            "5 % of the month is gone: the slow pair, 6 h and 30 min above 6, must wake somebody; one pair is enough",
        ),
        (
            "from minute 400 on, 0.3 % failed for six hours",
            (13, 400, 760, 0.003),
            "a burn rate of 3 lasts for ten days: a ticket, and no reason to wake anybody",
            "",
        ),
    ):
        traffic = _script(*script)
        wanted = np.logical_or(*(slo.firing(*traffic, pair) for pair in (slo.FAST, slo.SLOW)))
        got = np.array([bool(each) for each in _feed(_made(alert_class), *traffic)])
        wrong = np.flatnonzero(got != wanted)
        if wrong.size:
            minute = int(wrong[0])
            why = sleeps if got[minute] else wakes
            raise AssertionError(
                f"{told}; in minute {minute} the alert is {'on' if got[minute] else 'off'}: {why}"
            )


def _left(alert_class: Callable[..., Any]) -> None:
    alert = _made(alert_class)
    _feed(alert, *_script(4, 60, 120, 0.25))
    got = ask("left(2_592_000)", alert.left, 2_592_000)
    wanted = 1 - 900 / 2592
    for wrong, why in (
        (1 - wanted, "that is what was spent"),
        (2592 - 900, "a share of the budget, not a number of requests"),
        (1 - 900 / 2_592_000, "divide by what may fail, budget times requests"),
        (
            1 - 950 / 2592,
            f"the {_OLD} failures that the first scrape showed may be of last month; only growth counts",
        ),
    ):
        assert abs(got - wrong) > 1e-6, (
            f"900 of a month's 2,592,000 requests failed; left(2_592_000) is {got:.4g}: {why}"
        )
    assert abs(got - wanted) < 1e-6, (
        f"900 failed and 2,592 may; left(2_592_000) is {got:.4g}, not {wanted:.4g}"
    )
