"""Notebook 02: a stage timer, the answer by hand, admission control; wrong solutions for
``WRONG``."""

from wrong_solutions import WRONG, wrong

_BEGAN, _TOOK = "        began_s = self.clock()\n", "(self.clock() - began_s) * 1e3"
_TRY = """\
        try:
            yield
        finally:
            took_ms = (self.clock() - began_s) * 1e3
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + took_ms
"""
_BARE = """\
        yield
        took_ms = (self.clock() - began_s) * 1e3
        self.stages_ms[name] = self.stages_ms.get(name, 0.0) + took_ms
"""
_SUM = "self.stages_ms.get(name, 0.0) + took_ms"
WRONG["stage-timer"] = {
    "seconds": wrong(
        "stage-timer", "0.25, seconds: a second has 1000 ms", (_TOOK, "self.clock() - began_s")
    ),
    "microseconds": wrong(
        "stage-timer", "250000, microseconds", (_TOOK, "(self.clock() - began_s) * 1e6")
    ),
    "the wrong way round": wrong(
        "stage-timer", "negative: the end minus", (_TOOK, "(began_s - self.clock()) * 1e3")
    ),
    "the clock's reading": wrong(
        "stage-timer", "a reading of the clock", (_TOOK, "self.clock() * 1e3")
    ),
    "begins too late": wrong(
        "stage-timer", "read the clock before `yield`", (_TOOK, "(self.clock() - self.clock())")
    ),
    "its own clock": wrong(
        "stage-timer",
        "does it read another clock",
        (_BEGAN, "        began_s = time.perf_counter()\n"),
        (_TOOK, "(time.perf_counter() - began_s) * 1e3"),
    ),
    "the last time only": wrong(
        "stage-timer", "both times count, the sum is 375", (_SUM, "took_ms")
    ),
    "since the timer was made": wrong(
        "stage-timer",
        "5 s of something else",
        (
            "        self.stages_ms = {}\n",
            "        self.stages_ms = {}\n        self.began_s = clock()\n",
        ),
        (_TOOK, "(self.clock() - self.began_s) * 1e3"),
    ),
    "an error is not counted": wrong("stage-timer", "slow failures cost time too", (_TRY, _BARE)),
    "an error is swallowed": wrong(
        "stage-timer",
        "the timer swallowed it",
        ("        finally:", "        except Exception:\n            pass\n        if True:"),
    ),
    "another error": wrong(
        "stage-timer",
        "answered with RuntimeError",
        (
            "        finally:",
            "        except Exception as e:\n            raise RuntimeError(str(e))\n        finally:",
        ),
    ),
    "one key for all": wrong(
        "stage-timer",
        "its key is the stage's name",
        ("self.stages_ms[name] =", "self.stages_ms['ms'] ="),
    ),
    "shared by all timers": wrong(
        "stage-timer",
        "give each its own dict",
        ("        self.stages_ms = {}\n", ""),
        ("    def __init__", "    stages_ms = {}\n\n    def __init__"),
    ),
    "a list": wrong(
        "stage-timer",
        "it is a dict, name -> milliseconds",
        ("self.stages_ms = {}", "self.stages_ms = []"),
        (f"self.stages_ms[name] = {_SUM}", "self.stages_ms.append(took_ms)"),
    ),
}

_STANDARD = "(rows - np.array(mean)) / np.array(std)"
_SOFTMAX = "torch.softmax(logits, dim=1)"
_ANSWER = '"predictions": classes.tolist()'
WRONG["by-hand"] = {
    "raw rows": wrong("by-hand", "those of raw rows", (_STANDARD, "rows")),
    "variance": wrong(
        "by-hand",
        "divided by the variance",
        (_STANDARD, "(rows - np.array(mean)) / np.array(std) ** 2"),
    ),
    "times std": wrong(
        "by-hand",
        "multiplied by std: divide",
        (_STANDARD, "(rows - np.array(mean)) * np.array(std)"),
    ),
    "no std": wrong("by-hand", "without the division by std", (_STANDARD, "rows - np.array(mean)")),
    "no mean": wrong(
        "by-hand", "without the subtraction of mean", (_STANDARD, "rows / np.array(std)")
    ),
    "precedence": wrong(
        "by-hand",
        "subtract first, then divide",
        (_STANDARD, "rows / np.array(std) - np.array(mean)"),
    ),
    "statistics of the request": wrong(
        "by-hand",
        "the statistics of the training travel with",
        (_STANDARD, "(rows - rows.mean(0)) / rows.std(0)"),
    ),
    "logits": wrong("by-hand", "the logits: softmax", (_SOFTMAX, "logits")),
    "sigmoid": wrong("by-hand", "their sum is not 1", (_SOFTMAX, "torch.sigmoid(logits)")),
    "over the rows": wrong(
        "by-hand",
        "one caller's answer depends on the others",
        (_SOFTMAX, "torch.softmax(logits, dim=0)"),
    ),
    "logarithms": wrong(
        "by-hand", "the logarithms", (_SOFTMAX, "torch.log_softmax(logits, dim=1)")
    ),
    "a share of logits": wrong(
        "by-hand", "logits divided by their sum", (_SOFTMAX, "logits / logits.sum(1, keepdim=True)")
    ),
    "overflow": wrong(
        "by-hand",
        r"exp\(large\) overflows",
        (_SOFTMAX, "logits.exp() / logits.exp().sum(dim=1, keepdim=True)"),
    ),
    "confidence is a logit": wrong(
        "by-hand",
        "of each row the highest probability",
        ("confidences.tolist()", "logits.max(dim=1)[0].tolist()"),
    ),
    "largest by column": wrong(
        "by-hand", "one entry a row", ("probabilities.max(dim=1)", "probabilities.max(dim=0)")
    ),
    "classes from one": wrong(
        "by-hand",
        "the class with the highest probability",
        (_ANSWER, '"predictions": (classes + 1).tolist()'),
    ),
    "tensors": wrong(
        "by-hand", "JSON knows lists", ("= probabilities.tolist()", "= probabilities")
    ),
    "gradients": wrong(
        "by-hand",
        "with gradients",
        (", torch.inference_mode()", ""),
        ("= network(features)", "= network(features).detach() * 1"),
    ),
    "network outside its stage": wrong(
        "by-hand",
        "the network ran in the stage 'postprocess'",
        ("        logits = network(features)\n", "        pass\n"),
        (
            "        probabilities =",
            "        with torch.inference_mode():\n            logits = network(features)\n        probabilities =",
        ),
    ),
    "one stage for all": wrong(
        "by-hand",
        "the timer saw the stages",
        ('timer.stage("postprocess")', 'timer.stage("infer")'),
    ),
    "row by row": wrong(
        "by-hand",
        "once, for all rows together",
        ("= network(features)", "= torch.cat([network(f[None]) for f in features])"),
    ),
    "in place": wrong(
        "by-hand",
        "by_hand changed the rows",
        (_STANDARD, "rows.__isub__(np.float32(mean)) / np.array(std)"),
    ),
    "float64": wrong(
        "by-hand",
        r"by_hand\(rows, .*\) raised RuntimeError",
        ("standard.astype(np.float32)", "standard"),
    ),
}

_COMPARE = "self.rows and self.rows + rows > self.max_rows"
_REFUSE = '                raise OverloadedError(f"{inside}: try again later")\n'
_TAKE, _LEAVE = "            self.rows += rows\n", "                self.rows -= rows\n"
_ENTRY = f"""\
        with self.lock:
            if {_COMPARE}:
                inside = f"{{self.rows}} of {{self.max_rows}} rows are inside"
{_REFUSE}{_TAKE}"""
_EXIT = f"""\
        try:
            yield
        finally:
            with self.lock:
{_LEAVE}"""
_UNLOCKED_ENTRY = (
    _ENTRY.replace("        with self.lock:\n", "").replace("\n    ", "\n").removeprefix("    ")
)
WRONG["admission"] = {
    "lets everybody in": wrong(
        "admission", "has all places, and 1 row entered", (_COMPARE, "False")
    ),
    "counts requests": wrong(
        "admission",
        "count rows, not requests",
        (_COMPARE, "self.rows and self.rows + 1 > self.max_rows"),
        ("self.rows += rows", "self.rows += 1"),
        ("self.rows -= rows", "self.rows -= 1"),
    ),
    "one at a time": wrong(
        "admission", "a request of 1 row was refused: exactly full", (_COMPARE, "self.rows")
    ),
    "exactly full is too full": wrong(
        "admission", "exactly full is not too full", (_COMPARE, _COMPARE.replace(">", ">="))
    ),
    "looks only whether it is full": wrong(
        "admission", "let in only what fits", (_COMPARE, "self.rows >= self.max_rows")
    ),
    "waits for a place": wrong(
        "admission",
        "refuse at once, wait for nobody",
        (_ENTRY, f"        while {_COMPARE}:\n            time.sleep(0.01)\n{_TAKE[4:]}"),
        ("import threading\n", "import threading\nimport time\n"),
    ),
    "holds the lock while the block runs": wrong(
        "admission",
        "hold no lock while a block runs",
        (_EXIT, "            try:\n                yield\n            finally:\n" + _LEAVE),
    ),
    "another error": wrong(
        "admission", "raise OverloadedError, which REST", ("raise OverloadedError", "raise OSError")
    ),
    "returns instead": wrong(
        "admission",
        r"ended with RuntimeError: .*raise OverloadedError",
        (_REFUSE, "                return\n"),
    ),
    "never gives back": wrong(
        "admission", "the places must be free again", (_LEAVE, "                pass\n")
    ),
    "gives back one": wrong(
        "admission", "as many places as were taken", ("self.rows -= rows", "self.rows -= 1")
    ),
    "forgets all who are inside": wrong(
        "admission", "gives back its own places only", ("self.rows -= rows", "self.rows = 0")
    ),
    "the refused give back": wrong(
        "admission",
        "places back that it never took",
        (
            _ENTRY + _EXIT,
            "        try:\n"
            + _ENTRY.replace("        ", "            ", 1).replace("\n    ", "\n        ")
            + "            yield\n        finally:\n            with self.lock:\n"
            + _LEAVE,
        ),
    ),
    "the refused take places": wrong(
        "admission",
        "a refused request must take no place",
        (_TAKE, ""),
        (
            f"            if {_COMPARE}",
            f"{_TAKE}            if self.rows > rows and self.rows > self.max_rows",
        ),
    ),
    "an error keeps its places": wrong(
        "admission",
        "refuses everybody for ever",
        (_EXIT, f"        yield\n        with self.lock:\n{_LEAVE[4:]}"),
    ),
    "an error is swallowed": wrong(
        "admission",
        "enter swallowed it",
        ("        finally:", "        except Exception:\n            pass\n        finally:"),
    ),
    "a large request never enters": wrong(
        "admission", "it would be refused for ever", (_COMPARE, "self.rows + rows > self.max_rows")
    ),
    "a large request enters a full house": wrong(
        "admission", "only when it is alone", (_COMPARE, f"rows <= self.max_rows and {_COMPARE}")
    ),
    "no lock": wrong("admission", "they read the same count", (_ENTRY, _UNLOCKED_ENTRY)),
    "takes outside of the lock": wrong("admission", "they read the same count", (_TAKE, _TAKE[4:])),
    "leaves without the lock": wrong(
        "admission", "places were lost", ("            with self.lock:\n" + _LEAVE, _LEAVE[4:])
    ),
}
