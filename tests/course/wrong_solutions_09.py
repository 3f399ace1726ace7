"""The exercise of notebook 09, quantise and prove it: its solution, its check, and plausible wrong solutions.

Imported by ``wrong_solutions``, which says what the tables hold.
"""

from functools import partial

from wrong_solutions import WRONG, Wrong, edited

_MAKE = 'quantise(registry, "digits", before, "static", clients)'
_SMALLER, _FASTER = "size[before] / size[after]", "np.median(turn[before] / turn[after])"
_TURN, _ALL = "np.median(us, axis=1)", "100 * np.concatenate(right).mean()"
_POINTS, _WORST = "overall[after] - overall[before]", "worst[after] - worst[before]"
_LOST, _MIN = 'min(report["points"], report["worst_points"]) < -budget', "min(part.mean() for part in right)"


_proves = partial(edited, "quantise-and-prove")


WRONG["quantise-and-prove"] = {
    "dynamic": Wrong(_proves((_MAKE, 'quantise(registry, "digits", before)')), "made by 'quantised, dynamic'"),
    "calibrates on the judges": Wrong(
        _proves((_MAKE, _MAKE.replace("clients", "np.concatenate([c.test_x for c in clients])"))), "held-out rows"
    ),
    "calibrates on one client": Wrong(_proves((_MAKE, _MAKE.replace("clients", "clients[:1]"))), "give all clients"),
    "promotes first": Wrong(_proves((_MAKE, _MAKE[:-1] + ', alias="default")')), "nothing was proven yet"),
    "the old version": Wrong(_proves(('"version": after', '"version": before')), "the one that you started from"),
    "a manifest": Wrong(
        _proves(('"version": after', '"version": registry.manifest("digits", after)')), "a whole manifest"
    ),
    "size upside down": Wrong(_proves((_SMALLER, "size[after] / size[before]")), "smaller' is the other way round"),
    "share saved": Wrong(_proves((_SMALLER, "1 - size[after] / size[before]")), "the share that was saved"),
    "speed upside down": Wrong(
        _proves((_FASTER, "np.median(turn[after] / turn[before])")), "faster' is the other way round"
    ),
    "means": Wrong(_proves((_TURN, "us.mean()")), "a ratio of means: one slow call in each turn"),
    "means in each turn": Wrong(_proves((_TURN, "us.mean(axis=1)")), "medians within the turn"),
    "medians over all turns": Wrong(_proves((_TURN, "np.median(us)")), "compare within each turn"),
    "best turn": Wrong(_proves((_FASTER, "max(turn[before] / turn[after])")), "the best turn"),
    "mean of the ratios": Wrong(_proves((_FASTER, "np.mean(turn[before] / turn[after])")), "take their median"),
    "the wrong axis": Wrong(_proves((_TURN, "np.median(us, axis=0)")), "and the two versions give"),
    "times only the new one": Wrong(
        _proves(("measure([before, after])", "{**measure([before]), **measure([after])}")), "time both versions"
    ),
    "mean over clients": Wrong(
        _proves((_ALL, "100 * np.mean([part.mean() for part in right])")), "all held-out rows count alike"
    ),
    "training rows": Wrong(
        _proves(
            ("answers(version, client.test_x) == client.test_y", "answers(version, client.train_x) == client.train_y")
        ),
        "use the held-out rows",
    ),
    "agreement": Wrong(
        _proves(
            (
                "answers(version, client.test_x) == client.test_y",
                "answers(version, client.test_x) == answers(before, client.test_x)",
            )
        ),
        "agreeing with a wrong answer",
    ),
    "a share": Wrong(_proves((_ALL, _ALL[6:])), "in percentage points it is 100 times as much"),
    "sign": Wrong(_proves((_POINTS, "overall[before] - overall[after]")), "points is .*: a loss must be negative"),
    "worst loss": Wrong(
        _proves(
            (f"worst[version] = 100 * {_MIN}", "worst[version] = 100 * np.array([part.mean() for part in right])"),
            (_WORST, f"({_WORST}).min()"),
        ),
        "LOST the most",
    ),
    "the same client": Wrong(
        _proves(
            (f"worst[version] = 100 * {_MIN}", "worst[version] = 100 * np.array([part.mean() for part in right])"),
            (_WORST, f"({_WORST})[worst[before].argmin()]"),
        ),
        "worst before: another one may be the worst now",
    ),
    "the best client": Wrong(_proves((_MIN, _MIN.replace("min", "max"))), "worst_points is .*, and the two versions"),
    "speed is all": Wrong(_proves((_LOST, "False")), "fell by more than the budget"),
    "only the mean": Wrong(_proves((_LOST, 'report["points"] < -budget')), "the worst client pays"),
    "slower is fine": Wrong(_proves(('report["faster"] > 1 and not lost', "not lost")), "it is slower"),
    "no loss at all": Wrong(_proves((_LOST, _LOST.replace("-budget", "0"))), "keeps the budget for everybody"),
    "words": Wrong(
        _proves(('bool(report["faster"] > 1 and not lost)', '"no" if lost else "yes"')), "say True or False"
    ),
    "a key is missing": Wrong(
        _proves(
            ('    report["worst_points"] = ', '    report["worst"] = '), ('report["worst_points"])', 'report["worst"])')
        ),
        "a dict with the keys",
    ),
}
