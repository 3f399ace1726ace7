"""The exercise of notebook 06, find the bottleneck: its solution, its check, and what wrong solutions are told.

Imported by ``wrong_solutions``, which says what the tables hold.
"""

from functools import partial

from wrong_solutions import WRONG, Wrong, edited

_TIMES = "np.diff(marks_s, axis=1) * 1e3"
_P99, _UP = "np.percentile(total_ms, 99)", "1 / ((1 - share) + share / times_faster)"
_SHARE = "mean_ms.max() / mean_ms.sum()"
_MEANS = '"mean_ms": dict(zip(names, mean_ms, strict=True))'


_with = partial(edited, "bottleneck")


WRONG["bottleneck"] = {
    "seconds": Wrong(_with((_TIMES, "np.diff(marks_s, axis=1)")), "in seconds: a second has 1000 ms"),
    "microseconds": Wrong(_with((_TIMES, "np.diff(marks_s, axis=1) * 1e6")), "too large by 1000"),
    "marks as durations": Wrong(_with((_TIMES, "marks_s[:, 1:] * 1e3")), "readings of the clock"),
    "since the arrival": Wrong(
        _with((_TIMES, "(marks_s[:, 1:] - marks_s[:, :1]) * 1e3")), "count every earlier stage again"
    ),
    "the wrong way round": Wrong(_with((_TIMES, "(marks_s[:, :-1] - marks_s[:, 1:]) * 1e3")), "are negative"),
    "medians": Wrong(_with((_MEANS, '"mean_ms": dict(zip(names, np.median(times_ms, axis=0)))')), "are medians"),
    "sums": Wrong(_with((_MEANS, '"mean_ms": dict(zip(names, times_ms.sum(axis=0)))')), "sums over all requests"),
    "only those who waited": Wrong(
        _with((_MEANS, '"mean_ms": dict(zip(names, [t[t > 0].mean() for t in times_ms.T]))')), "the mean of those who"
    ),
    "adds percentiles": Wrong(_with((_P99, "np.percentile(times_ms, 99, axis=0).sum()")), "as if they added up"),
    "mean for p99": Wrong(_with((_P99, "total_ms.mean()")), "the mean: half of the users"),
    "median for p99": Wrong(_with((_P99, "np.median(total_ms)")), "the median: half of the users"),
    "maximum": Wrong(_with((_P99, "total_ms.max()")), "the maximum: one request"),
    "bell curve": Wrong(_with((_P99, "total_ms.mean() + 2.33 * total_ms.std()")), "no bell curve"),
    "percentile counts to one": Wrong(_with((_P99, "np.percentile(total_ms, 0.99)")), "counts to 100"),
    "p99 without the queue": Wrong(
        _with((_P99, "np.percentile(total_ms - times_ms[:, names.index('queue')], 99)")), "without the queue"
    ),
    "worst by p99": Wrong(
        _with(("names[mean_ms.argmax()]", "names[np.percentile(times_ms, 99, axis=0).argmax()]")), "worst is 'queue'"
    ),
    "position of the worst": Wrong(_with(("names[mean_ms.argmax()]", "int(mean_ms.argmax())")), "a position"),
    "everything faster": Wrong(_with((_UP, "times_faster")), "times_faster itself"),
    "share saved": Wrong(_with((_UP, "share * (1 - 1 / times_faster)")), "the share of the time that is saved"),
    "upside down": Wrong(_with((_UP, "(1 - share) + share / times_faster")), "turn it round"),
    "slower": Wrong(_with((_UP, "1 / ((1 - share) + share * times_faster)")), "as slow"),
    "no time at all": Wrong(_with((_UP, "1 / (1 - share)")), "takes no time at all"),
    "share without the queue": Wrong(
        _with((_SHARE, "mean_ms.max() / (mean_ms.sum() - mean_ms[names.index('queue')])")),
        "the queue is part of a request's time",
    ),
    "share of the run": Wrong(
        _with((_SHARE, "times_ms[:, mean_ms.argmax()].sum() / (np.ptp(marks_s) * 1e3)")),
        "counts concurrent stages twice",
    ),
    "mean of speed-ups": Wrong(
        _with((_SHARE, "times_ms[:, mean_ms.argmax()] / total_ms"), (_UP, f"np.mean({_UP})")), "each request's own"
    ),
    "works on the caller's array": Wrong(
        _with((f"times_ms = {_TIMES}", f"marks_s -= marks_s.min()\n    times_ms = {_TIMES}")), "changed the array"
    ),
}
