"""The exercises of the course: each solution cell, and plausible wrong solutions with what they
must be told.

``SOLUTIONS[grade_id]`` is a notebook's solution cell, markers included; ``CHECKS[grade_id]`` its
check cell up to the check; ``WRONG[grade_id][name]`` is a wrong solution and a regular expression
for the message that it must get. Most of them are the right solution with one edit, so that nothing
but the mistake differs.
"""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat

from flserving.lab.exercises import find_exercises


class Wrong(NamedTuple):
    source: str
    message: str  # regular expression, searched in the AssertionError's text


SOLUTIONS: dict[str, str] = {}
CHECKS: dict[str, str] = {}
WRONG: dict[str, dict[str, Wrong]] = {}

for _path in sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb")):
    _notebook = nbformat.read(_path, as_version=4)
    for _it in find_exercises(_notebook):
        SOLUTIONS[_it.grade_id] = _notebook.cells[_it.solution].source + "\n"
        _check = re.search(
            r"\A.*?^check_\w+\(\w+\)$", _notebook.cells[_it.check].source, re.DOTALL | re.MULTILINE
        )
        assert _check, f"{_path.name}: the check of {_it.grade_id} calls no check_...(solution)"
        CHECKS[_it.grade_id] = _check[0]


def edited(grade_id: str, *edits: tuple[str, str]) -> str:
    source = re.sub(r"^ *### (BEGIN|END) SOLUTION\n", "", SOLUTIONS[grade_id], flags=re.MULTILINE)
    for old, new in edits:
        assert source.count(old) == 1, (
            f"{old!r} occurs {source.count(old)} times in the solution of {grade_id}"
        )
        source = source.replace(old, new)
    return source


def wrong(grade_id: str, message: str, *edits: tuple[str, str]) -> Wrong:
    return Wrong(edited(grade_id, *edits), message)


# ---------------------------------------------------------------- 01: choose the version to promote


_KEY = 'key=lambda r: (r["worst_client_accuracy"], -r["version"])'
WRONG["choose-version"] = {
    "newest": Wrong(
        edited("choose-version", (_KEY, 'key=lambda r: r["version"]')), "version 7, the newest"
    ),
    "best on average": Wrong(
        edited(
            "choose-version",
            ('r["worst_client_accuracy"] >= floor', 'r["global_accuracy"] >= floor'),
            (_KEY, 'key=lambda r: r["global_accuracy"]'),
        ),
        "version 6, the best global accuracy",
    ),
    "smallest": Wrong(
        edited(
            "choose-version",
            ("max(good", "min(good"),
            ('["worst_client_accuracy"] >= floor', '["version"] > 0'),
        ),
        "take the largest",
    ),
    "returns the accuracy": Wrong(
        edited("choose-version", ('best["version"]', 'best["worst_client_accuracy"]')),
        "0.62, the accuracy",
    ),
    "returns the round": Wrong(
        edited("choose-version", ('best["version"]', "best")), "returned the whole round"
    ),
    "returns the position": Wrong(
        edited("choose-version", ('best["version"]', "rounds.index(best)")),
        "a position in the list",
    ),
    "ignores the floor": Wrong(
        edited(
            "choose-version",
            ('r["worst_client_accuracy"] >= floor', 'r["worst_client_accuracy"] >= 0'),
        ),
        "no worst client reaches the floor 0.7: return None",
    ),
    "strictly above the floor": Wrong(
        edited("choose-version", (">= floor", "> floor")), "exactly at the floor 0.62"
    ),
    "empty list": Wrong(
        edited("choose-version", ("if not good", "if good == [] and rounds")),
        r"choose_version\(\[\], floor=0.5\) raised",
    ),
    "NaN wins": Wrong(
        edited(
            "choose-version",
            ('r["worst_client_accuracy"] >= floor', 'not r["worst_client_accuracy"] < floor'),
        ),
        "a NaN is neither better nor worse",
    ),
    "newest of equals": Wrong(
        edited("choose-version", ('-r["version"]', 'r["version"]')), "keep the older version"
    ),
    "empties the list": Wrong(
        edited(
            "choose-version",
            ("    good = ", "    rounds.sort(key=lambda r: r['global_accuracy'])\n    good = "),
        ),
        "changed the list",
    ),
}


# ----------------------------------------------------------------------- 02: where does the time go


_P99, _SHARE, _WITHIN = (
    "np.percentile(total_ms, 99)",
    "ms.sum() / total_ms.sum()",
    "(total_ms <= budget_ms).mean()",
)
WRONG["latency-budget"] = {
    "adds percentiles": Wrong(
        edited("latency-budget", (_P99, "sum(np.percentile(ms, 99) for ms in stages.values())")),
        "not the same requests",
    ),
    "mean": Wrong(
        edited("latency-budget", (_P99, "total_ms.mean()")), "the mean: half of the users"
    ),
    "maximum": Wrong(
        edited("latency-budget", (_P99, "total_ms.max()")), "the maximum: one outlier"
    ),
    "median": Wrong(edited("latency-budget", (_P99, "np.median(total_ms)")), "the median"),
    "percentile counts to one": Wrong(
        edited("latency-budget", (_P99, "np.percentile(total_ms, 0.99)")), "counts to 100"
    ),
    "all stages in one heap": Wrong(
        edited("latency-budget", (_P99, "np.percentile(list(stages.values()), 99)")),
        "p99 of single stage times",
    ),
    "slowest stage": Wrong(
        edited("latency-budget", (_P99, "max(np.percentile(ms, 99) for ms in stages.values())")),
        "the slowest stage",
    ),
    "share in ms": Wrong(
        edited("latency-budget", (_SHARE, "ms.mean()")), "milliseconds, not shares"
    ),
    "share in percent": Wrong(
        edited("latency-budget", (_SHARE, f"100 * {_SHARE}")), "in percent: they must sum to 1"
    ),
    "share of percentiles": Wrong(
        edited(
            "latency-budget",
            (_SHARE, "np.percentile(ms, 99) / sum(np.percentile(m, 99) for m in stages.values())"),
        ),
        "percentiles do not add up",
    ),
    "mean of shares": Wrong(
        edited("latency-budget", (_SHARE, "(ms / total_ms).mean()")), "each request's own shares"
    ),
    "share of the last stage only": Wrong(
        edited(
            "latency-budget",
            ("for name, ms in stages.items()}", "for name, ms in list(stages.items())[-1:]}"),
        ),
        "one number per stage",
    ),
    "count": Wrong(
        edited("latency-budget", (_WITHIN, "(total_ms <= budget_ms).sum()")), "divide by all 1001"
    ),
    "strictly below": Wrong(
        edited("latency-budget", ("<= budget_ms", "< budget_ms")), "exactly 50 ms: it is inside"
    ),
    "over the budget": Wrong(
        edited("latency-budget", ("<= budget_ms", "> budget_ms")), "OVER the budget"
    ),
    "answers a tuple": Wrong(
        edited(
            "latency-budget",
            ("    return {", "    return list({"),
            ("mean(),\n    }", "mean(),\n    })"),
        ),
        "return a dict with the keys",
    ),
}


# -------------------------------------------------------------------------- 03: write the LRU cache


_REFRESH = "        self.items[key] = self.items.pop(key)  # to the end: the most recently used\n"
_FULL = "if len(self.items) >= self.capacity:"
_EVICT = "del self.items[next(iter(self.items))]  # the least recently used"
_POP = "        self.items.pop(key, None)\n"
WRONG["lru"] = {
    "FIFO": Wrong(edited("lru", (_REFRESH, "")), "get must make its key the most recently used"),
    "MRU": Wrong(
        edited("lru", (_EVICT, "self.items.popitem()")), "the most recently used was evicted"
    ),
    "one too early": Wrong(
        edited("lru", (_FULL, "if self.items and len(self.items) >= self.capacity - 1:")),
        "evicts one too early",
    ),
    "one too late": Wrong(
        edited("lru", (_FULL, "if len(self.items) > self.capacity:")),
        "evicts one too late, or never",
    ),
    "never evicts": Wrong(edited("lru", (_FULL, "if False:")), "evicts one too late, or never"),
    "evicts all": Wrong(edited("lru", (_EVICT, "self.items.clear()")), "evict one, not all"),
    "drops the new one": Wrong(edited("lru", (_EVICT, "return")), "the new key 'c' is not there"),
    "replacing evicts": Wrong(
        edited(
            "lru",
            (_POP, ""),
            (
                "        self.items[key] = value",
                "        self.items.pop(key, None)\n        self.items[key] = value",
            ),
        ),
        "replacing needs no room",
    ),
    "replacing does not refresh": Wrong(
        edited(
            "lru",
            (_POP, ""),
            (_FULL, "if key not in self.items and len(self.items) >= self.capacity:"),
        ),
        "put of a key that is there must make it the most recently used",
    ),
    "replacing keeps the old value": Wrong(
        edited("lru", (_POP, "        if self.get(key) is not None:\n            return\n")),
        "put must replace the value",
    ),
    "miss raises": Wrong(
        edited("lru", ("        if key not in self.items:\n            return None\n", "")),
        "a miss is no error, return None",
    ),
    "miss gives False": Wrong(
        edited("lru", ("return None", "return False")), "returned False: it must return None"
    ),
    "miss changes the order": Wrong(
        edited(
            "lru",
            (
                "            return None\n",
                "            self.put(key, None)\n            return None\n",
            ),
        ),
        "a get that misses must change nothing",
    ),
    "truth of the value": Wrong(
        edited("lru", ("if key not in self.items:", "if not self.items.get(key):")),
        "ask whether the key is there",
    ),
    "shared by all caches": Wrong(
        edited(
            "lru",
            ("        self.items = {}  # a dict remembers the order in which its keys came\n", ""),
            ("    def __init__", "    items = {}\n\n    def __init__"),
        ),
        "two caches share their storage",
    ),
    "LFU": Wrong(
        """\
class LRU:
    def __init__(self, capacity):
        self.capacity, self.items, self.uses, self.tick = capacity, {}, {}, 0

    def _use(self, key):
        self.tick += 1
        self.uses[key] = (self.uses.get(key, (0, 0))[0] + 1, self.tick)

    def get(self, key):
        if key not in self.items:
            return None
        self._use(key)
        return self.items[key]

    def put(self, key, value):
        if key not in self.items and len(self.items) >= self.capacity:
            rarest = min(self.items, key=lambda k: self.uses[k])
            del self.items[rarest], self.uses[rarest]
        self.items[key] = value
        self._use(key)
""",
        "least FREQUENTLY used",
    ),
    "right but for long traces": Wrong(
        edited(
            "lru",
            (
                _REFRESH,
                "        self.reads = getattr(self, 'reads', 0) + 1\n        if self.reads % 5:\n    "
                + _REFRESH,
            ),
        ),
        r"capacity \d: after .*, get\('.'\) returned .*, LRU gives",
    ),
}


# ---------------------------------------------------------------------- 04: write a dynamic batcher


_IDLE = "        if idle_workers == 0:\n            return []\n"
_TAKE, _LEAVE = "self.queue[: self.max_batch_size]", "self.queue[self.max_batch_size :]"
_ANSWER = "dict(zip(ids, outputs, strict=True))"
_HALVES = "return self.run_batch(first, model) | self.run_batch(second, model)"
WRONG["batcher"] = {
    "holds until full": Wrong(
        edited(
            "batcher",
            (
                "if idle_workers == 0:",
                "if idle_workers == 0 or len(self.queue) < self.max_batch_size:",
            ),
        ),
        "held back for a fuller batch",
    ),
    "starts without a worker": Wrong(
        edited("batcher", (_IDLE, "")), "no worker is idle, but next_batch"
    ),
    "exceeds the maximum": Wrong(
        edited(
            "batcher",
            (_TAKE, "self.queue[: self.max_batch_size + 1]"),
            (_LEAVE, "self.queue[self.max_batch_size + 1 :]"),
        ),
        "more than the model may get",
    ),
    "everything at once": Wrong(
        edited("batcher", (_TAKE, "self.queue"), (_LEAVE, "[]")), "more than the model may get"
    ),
    "loses one": Wrong(
        edited("batcher", (_LEAVE, "self.queue[self.max_batch_size + 1 :]")),
        "r4 never came out: a request was lost",
    ),
    "loses the rest": Wrong(
        edited("batcher", (_LEAVE, "[]")), "never came out of next_batch: a request was lost"
    ),
    "one at a time": Wrong(
        edited("batcher", (_TAKE, "self.queue[:1]"), (_LEAVE, "self.queue[1:]")),
        "running 4 rows costs hardly more than one",
    ),
    "duplicates": Wrong(
        edited("batcher", (_LEAVE, "self.queue[self.max_batch_size - 1 :]")),
        "a second time: a request leaves the queue",
    ),
    "never leaves the queue": Wrong(
        edited("batcher", (f"        self.queue = {_LEAVE}\n", "")),
        "a second time: a request leaves the queue",
    ),
    "newest first": Wrong(
        edited(
            "batcher",
            (_TAKE, "self.queue[::-1][: self.max_batch_size]"),
            (_LEAVE, "self.queue[: -self.max_batch_size]"),
        ),
        "r0 has waited longest and must go first",
    ),
    "sorted by row": Wrong(
        edited(
            "batcher",
            (
                "        return batch\n",
                "        return batch[:1] + sorted(batch[1:], key=lambda r: -r[1])\n",
            ),
        ),
        "keep the order of arrival",
    ),
    "hands out the queue itself": Wrong(
        edited(
            "batcher",
            (
                f"        batch = {_TAKE}\n        self.queue = {_LEAVE}\n",
                """\
        if len(self.queue) <= self.max_batch_size:
            return self.queue
        self.out = getattr(self, "out", [])
        self.out[:] = self.queue[: self.max_batch_size]
        del self.queue[: self.max_batch_size]
        batch = self.out
""",
            ),
        ),
        "a second time|changed after next_batch returned it",
    ),
    "the batch is the live queue": Wrong(
        edited(
            "batcher",
            (
                "self.queue.append((request_id, row))",
                "self.queue.append((request_id, row))\n        self.last = getattr(self, 'last', [])\n"
                "        self.last.append((request_id, row))",
            ),
            ("        return batch\n", "        self.last = batch\n        return batch\n"),
        ),
        "a batch changed after next_batch returned it",
    ),
    "shared by all batchers": Wrong(
        edited(
            "batcher",
            ("        self.queue = []  # (request_id, row), oldest first\n", ""),
            ("    def __init__", "    queue = []\n\n    def __init__"),
            (f"self.queue = {_LEAVE}", "del self.queue[: self.max_batch_size]"),
        ),
        "create the queue in __init__",
    ),
    "mixes up rows": Wrong(
        edited(
            "batcher",
            ("        return batch\n", "        return [(i, batch[-1][1]) for i, _ in batch]\n"),
        ),
        "but it was submitted with",
    ),
    "swaps answers": Wrong(
        edited(
            "batcher", ("zip(ids, outputs, strict=True)", "zip(sorted(ids), outputs, strict=True)")
        ),
        "answers were swapped between callers",
    ),
    "answers by row": Wrong(
        edited("batcher", (_ANSWER, "{row: output for (_, row), output in zip(batch, outputs)}")),
        "got no answer",
    ),
    "forgets the last answer": Wrong(
        edited("batcher", ("zip(ids, outputs, strict=True)", "zip(ids[:-1], outputs)")),
        "bob got no answer",
    ),
    "runs the model per row": Wrong(
        edited(
            "batcher",
            (
                "outputs = model([row for _, row in batch])",
                "outputs = [model([row])[0] for _, row in batch]",
            ),
        ),
        "ran the model 4 times: run it once",
    ),
    "lets the error out": Wrong(
        edited("batcher", ("                return {batch[0][0]: error}", "                raise")),
        "catch it, retry by halves",
    ),
    "one bad row fails all": Wrong(
        edited("batcher", (_HALVES, "return {request_id: error for request_id, _ in batch}")),
        "only the bad row may fail",
    ),
    "None instead of the error": Wrong(
        edited("batcher", ("return {batch[0][0]: error}", "return {batch[0][0]: None}")),
        "its output must be the exception",
    ),
    "drops the bad row": Wrong(
        edited("batcher", ("return {batch[0][0]: error}", "return {}")), "r0 got no answer"
    ),
    "retries one half only": Wrong(
        edited("batcher", (_HALVES, "return self.run_batch(first, model)")), "r1 got no answer"
    ),
    "never stops halving": Wrong(
        edited(
            "batcher",
            ("            if len(batch) == 1:\n                return {batch[0][0]: error}\n", ""),
        ),
        "raised RecursionError",
    ),
    "returns a list": Wrong(
        edited("batcher", (f"return {_ANSWER}", "return list(outputs)")),
        "return a dict request_id -> output",
    ),
}

import wrong_solutions_01  # noqa: E402, F401  # registers itself above
import wrong_solutions_02  # noqa: E402, F401
import wrong_solutions_03  # noqa: E402, F401
import wrong_solutions_04  # noqa: E402, F401
import wrong_solutions_05  # noqa: E402, F401
import wrong_solutions_06  # noqa: E402, F401
import wrong_solutions_07  # noqa: E402, F401
import wrong_solutions_08  # noqa: E402, F401
import wrong_solutions_09  # noqa: E402, F401
import wrong_solutions_10  # noqa: E402, F401
import wrong_solutions_11  # noqa: E402, F401
