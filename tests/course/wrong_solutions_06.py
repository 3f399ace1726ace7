"""Notebook 06: bottleneck, stopwatch, offers, load generator; wrong solutions. Registers into
``wrong_solutions``."""

from functools import partial

from wrong_solutions import WRONG, Wrong, edited, wrong

_TIMES = "np.diff(marks_s, axis=1) * 1e3"
_P99, _UP = "np.percentile(total_ms, 99)", "1 / ((1 - share) + share / times_faster)"
_SHARE = "mean_ms.max() / mean_ms.sum()"
_MEANS = '"mean_ms": dict(zip(names, mean_ms, strict=True))'


_with = partial(edited, "bottleneck")


WRONG["bottleneck"] = {
    "seconds": Wrong(
        _with((_TIMES, "np.diff(marks_s, axis=1)")), "in seconds: a second has 1000 ms"
    ),
    "microseconds": Wrong(_with((_TIMES, "np.diff(marks_s, axis=1) * 1e6")), "too large by 1000"),
    "marks as durations": Wrong(_with((_TIMES, "marks_s[:, 1:] * 1e3")), "readings of the clock"),
    "since the arrival": Wrong(
        _with((_TIMES, "(marks_s[:, 1:] - marks_s[:, :1]) * 1e3")),
        "count every earlier stage again",
    ),
    "the wrong way round": Wrong(
        _with((_TIMES, "(marks_s[:, :-1] - marks_s[:, 1:]) * 1e3")), "are negative"
    ),
    "medians": Wrong(
        _with((_MEANS, '"mean_ms": dict(zip(names, np.median(times_ms, axis=0)))')), "are medians"
    ),
    "sums": Wrong(
        _with((_MEANS, '"mean_ms": dict(zip(names, times_ms.sum(axis=0)))')),
        "sums over all requests",
    ),
    "only those who waited": Wrong(
        _with((_MEANS, '"mean_ms": dict(zip(names, [t[t > 0].mean() for t in times_ms.T]))')),
        "the mean of those who",
    ),
    "adds percentiles": Wrong(
        _with((_P99, "np.percentile(times_ms, 99, axis=0).sum()")), "as if they added up"
    ),
    "mean for p99": Wrong(_with((_P99, "total_ms.mean()")), "the mean: half of the users"),
    "median for p99": Wrong(_with((_P99, "np.median(total_ms)")), "the median: half of the users"),
    "maximum": Wrong(_with((_P99, "total_ms.max()")), "the maximum: one request"),
    "bell curve": Wrong(_with((_P99, "total_ms.mean() + 2.33 * total_ms.std()")), "no bell curve"),
    "percentile counts to one": Wrong(
        _with((_P99, "np.percentile(total_ms, 0.99)")), "counts to 100"
    ),
    "p99 without the queue": Wrong(
        _with((_P99, "np.percentile(total_ms - times_ms[:, names.index('queue')], 99)")),
        "without the queue",
    ),
    "worst by p99": Wrong(
        _with(("names[mean_ms.argmax()]", "names[np.percentile(times_ms, 99, axis=0).argmax()]")),
        "worst is 'queue'",
    ),
    "position of the worst": Wrong(
        _with(("names[mean_ms.argmax()]", "int(mean_ms.argmax())")), "a position"
    ),
    "everything faster": Wrong(_with((_UP, "times_faster")), "times_faster itself"),
    "share saved": Wrong(
        _with((_UP, "share * (1 - 1 / times_faster)")), "the share of the time that is saved"
    ),
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
        _with((_SHARE, "times_ms[:, mean_ms.argmax()] / total_ms"), (_UP, f"np.mean({_UP})")),
        "each request's own",
    ),
    "works on the caller's array": Wrong(
        _with((f"times_ms = {_TIMES}", f"marks_s -= marks_s.min()\n    times_ms = {_TIMES}")),
        "changed the array",
    ),
}


_CONNECT = "    if connection.sock is None:\n        connection.connect()\n"
_MARK = "    marks_s.append(clock())\n"
_REQUEST = '    connection.request("POST", path, body, headers)\n'
_RESPONSE, _READ = "    response = connection.getresponse()\n", "    answer = response.read()\n"
_MS = "(ended_s - began_s) * 1e3"
WRONG["timed-call"] = {
    "seconds": wrong("timed-call", "in seconds: a second has 1000 ms", (_MS, "ended_s - began_s")),
    "microseconds": wrong("timed-call", "in microseconds", (_MS, "(ended_s - began_s) * 1e6")),
    "the wrong way round": wrong("timed-call", "negative", (_MS, "(began_s - ended_s) * 1e3")),
    "since the beginning": wrong(
        "timed-call", "each counts all earlier parts", (_MS, "(ended_s - marks_s[0]) * 1e3")
    ),
    "connect is hidden": wrong("timed-call", "send has the time of connect", (_CONNECT, "")),
    "connects each time": wrong(
        "timed-call", "opened it again", (_CONNECT, "    connection.connect()\n")
    ),
    "closes": wrong(
        "timed-call",
        "timed_call closed the connection",
        (_READ, f"{_READ}    connection.close()\n"),
    ),
    "reads too early": wrong(
        "timed-call",
        "wait has the time of receive",
        (_READ, ""),
        (_RESPONSE, f"{_RESPONSE}{_READ}"),
    ),
    "the answer is awaited in send": wrong(
        "timed-call",
        "send has the time of wait",
        (_RESPONSE, ""),
        (_REQUEST, f"{_REQUEST}{_RESPONSE}"),
    ),
    "does not read": wrong("timed-call", "the answer is <", (_READ, "    answer = response\n")),
    "GET": wrong("timed-call", "it is 'POST', the path", ('"POST"', '"GET"')),
    "no headers": wrong(
        "timed-call",
        "the path, the body and the headers",
        ("body, headers)\n    marks", "body)\n    marks"),
    ),
    "asks twice": wrong(
        "timed-call",
        "the next request was sent before",
        (_RESPONSE, f"{_RESPONSE}{_REQUEST}{_RESPONSE}"),
    ),
    "its own clock": wrong(
        "timed-call",
        "by the clock that timed_call was given",
        ("    marks_s = [clock()]\n", "    clock = time.perf_counter\n    marks_s = [clock()]\n"),
    ),
    "the times only": wrong(
        "timed-call", "return two things", ("return answer, times_ms", "return times_ms")
    ),
    "other names": wrong(
        "timed-call", "a dict with the keys connect, send", ('"connect", "send"', '"open", "send"')
    ),
}

_NEW, _GAIN = "took_us / offer.get(part, 1)", "total_us / new_us"
WRONG["amdahl"] = {
    "multiplies": wrong("amdahl", "4 times slower: divide", (_NEW, "took_us * offer.get(part, 1)")),
    "new over old": wrong("amdahl", "turn it round", (_GAIN, "new_us / total_us")),
    "saved share": wrong(
        "amdahl", "the share of the time that is saved", (_GAIN, "1 - new_us / total_us")
    ),
    "saved time": wrong("amdahl", "the saved microseconds", (_GAIN, "total_us - new_us")),
    "new total": wrong("amdahl", "the new total", (_GAIN, "new_us")),
    "part vanishes": wrong(
        "amdahl", "no time at all: it takes a quarter", (_NEW, "took_us * (part not in offer)")
    ),
    "the part alone": wrong(
        "amdahl",
        "the parts that the offer does not name count too",
        (f"new_us += {_NEW}", f"new_us += {_NEW} if part in offer else 0"),
        (_GAIN, "total_us / (new_us or total_us)"),
    ),
    "times faster": wrong(
        "amdahl", "times faster itself", (_GAIN, "max(offer.values(), default=1)")
    ),
    "product of gains": wrong(
        "amdahl",
        "multiplied",
        ("        new_us = 0\n", "        gain = 1\n"),
        (
            f"            new_us += {_NEW}\n",
            f"            gain *= total_us / (total_us - took_us + {_NEW})\n",
        ),
        (_GAIN, "gain"),
    ),
    "one part only": wrong(
        "amdahl",
        "that of one of the two",
        ("        new_us = 0\n", "        new_us = total_us\n"),
        (
            f"            new_us += {_NEW}\n",
            f"            if part in offer:\n                new_us = total_us - took_us + {_NEW}\n",
        ),
    ),
    "never slower": wrong("amdahl", "may be below 1", (_GAIN, f"max(1, {_GAIN})")),
    "worst first": wrong("amdahl", "the worst offer stands first", (", reverse=True", "")),
    "as they came": wrong(
        "amdahl", "in which they came", ("return dict(best_first)", "return found")
    ),
    "by name": wrong("amdahl", "by their gain, the largest first", ("item[1]", "item[0]")),
    "a list": wrong(
        "amdahl", "a dict, name of the offer", ("return dict(best_first)", "return best_first")
    ),
    "changes the request": wrong(
        "amdahl",
        "gains changed parts_us",
        (f"new_us += {_NEW}", f"parts_us[part] = {_NEW}\n            new_us += parts_us[part]"),
    ),
}

_SLEEP = "        await asyncio.sleep(start_s + due_s - clock())\n"
_TRY = '        try:\n            await ask()\n        except Exception:\n            return float("nan")\n'
_LATE_MS = "(clock() - start_s - due_s) * 1e3"
_TASKS = """\
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(due_s)) for due_s in plan_s]
    return [task.result() for task in tasks]
"""
WRONG["open-loop"] = {
    "one after the other": wrong(
        "open-loop",
        "26 requests behind it|requests behind it were sent late",
        (_TASKS, "    return [await one(due_s) for due_s in plan_s]\n"),
    ),
    "from the sending": wrong(
        "open-loop",
        "not from when it was sent",
        (_SLEEP, f"{_SLEEP}        began_s = clock()\n"),
        (_LATE_MS, "(clock() - began_s) * 1e3"),
    ),
    "the naive one": wrong(
        "open-loop",
        "users do not wait for each other",
        (_SLEEP, f"{_SLEEP}        began_s = clock()\n"),
        (_LATE_MS, "(clock() - began_s) * 1e3"),
        (_TASKS, "    return [await one(due_s) for due_s in plan_s]\n"),
    ),
    "all at once": wrong("open-loop", "all at once", (_SLEEP, "")),
    "gaps that add up": wrong(
        "open-loop",
        "count from the start, not from the request before",
        (_TASKS, "    return [await one(due_s) for due_s in plan_s]\n"),
        ("sleep(start_s + due_s - clock())", "sleep(due_s)"),
    ),
    "sleeps the gap": wrong(
        "open-loop",
        "must not add up from request to request",
        (
            _TASKS,
            "    found, before_s = [], 0\n    for due_s in plan_s:\n        found.append(await one(due_s - before_s))\n"
            "        before_s = due_s\n    return found\n",
        ),
        ("sleep(start_s + due_s - clock())", "sleep(due_s)"),
    ),
    "seconds": wrong("open-loop", "a second has 1000 ms", (_LATE_MS, "clock() - start_s - due_s")),
    "a failure ends it": wrong(
        "open-loop", "raised ConnectionError, and that ended", (_TRY, "        await ask()\n")
    ),
    "a failure is an answer": wrong(
        "open-loop", "a quick refusal is no quick answer", ('return float("nan")', "pass")
    ),
    "failures are left out": wrong(
        "open-loop",
        "10 requests were planned, 9 latencies",
        ("for task in tasks]", "for task in tasks if task.result() == task.result()]"),
    ),
    "in the order of the answers": wrong(
        "open-loop",
        "keep the order of the plan",
        ("    async def one", "    found = []\n\n    async def one"),
        (f"return {_LATE_MS}", f"found.append({_LATE_MS})"),
        (
            '            return float("nan")',
            '            found.append(float("nan"))\n            return',
        ),
        ("[task.result() for task in tasks]", "found"),
    ),
    "returns nothing": wrong(
        "open-loop",
        "returned None",
        ("return [task.result() for task in tasks]", "[task.result() for task in tasks]"),
    ),
    "not a coroutine": wrong(
        "open-loop",
        "begin with `async def`",
        ("async def open_loop", "def open_loop"),
        (_TASKS, "    return [one(due_s) for due_s in plan_s]\n"),
    ),
    "asks the clock in a loop": wrong(
        "open-loop",
        "sleep until the next request is due",
        (_SLEEP, "        while clock() < start_s + due_s:\n            await asyncio.sleep(0)\n"),
    ),
    "its own clock": wrong(
        "open-loop",
        "send when it is due|the latencies are|all at once",
        ("    start_s = clock()\n", "    clock = time.perf_counter\n    start_s = clock()\n"),
    ),
}
