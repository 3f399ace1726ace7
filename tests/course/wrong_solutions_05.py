"""Notebook 05: messages, a retry budget and a retry; plausible wrong solutions. Registers into
``wrong_solutions``."""

from wrong_solutions import WRONG, wrong

_TYPE = 'array.dtype.name.upper().replace("FLOAT", "FP")'
_SHAPE, _DATA = "list(array.shape)", "array.ravel().tolist()"
_DUMPS = "json.dumps(message, allow_nan=False).encode()"
_TIMEOUT = '        message["parameters"] = {"timeout": int(timeout_s * 1e6)}\n'
WRONG["build-request"] = {
    "numpy's name": wrong("build-request", "'float32', numpy's name", (_TYPE, "array.dtype.name")),
    "upper case only": wrong(
        "build-request",
        "'FLOAT32', the protocol's name is 'FP32'",
        (_TYPE, "str(array.dtype).upper()"),
    ),
    "bytes for bits": wrong(
        "build-request",
        "'FP4': the number counts bits",
        (
            _TYPE,
            '{"f": "FP", "i": "INT", "u": "UINT", "b": "BOOL"}[array.dtype.kind] + str(array.dtype.itemsize)',
        ),
    ),
    "always FP32": wrong("build-request", "datatype of float64 is 'FP32'", (_TYPE, '"FP32"')),
    "BOOL with bits": wrong(
        "build-request",
        "datatype of bool is 'BOOL8'",
        (_TYPE, _TYPE + '.replace("BOOL", "BOOL8")'),
    ),
    "flat shape": wrong(
        "build-request", r"is \[6\]: a server cannot tell", (_SHAPE, "[array.size]")
    ),
    "shape turned round": wrong("build-request", "rows first", (_SHAPE, "list(array.shape[::-1])")),
    "no shape": wrong(
        "build-request", "has no 'shape'", ('            "shape": list(array.shape),\n', "")
    ),
    "the first tensor only": wrong(
        "build-request",
        "has 1 inputs for 2 tensors",
        ("        inputs.append(tensor)\n", "        inputs = [tensor]\n"),
    ),
    "nested": wrong("build-request", "is a list of lists", (_DATA, "array.tolist()")),
    "as it lies in memory": wrong(
        "build-request", "takes pixels of other rows", (_DATA, 'array.ravel(order="K").tolist()')
    ),
    "by columns": wrong(
        "build-request", "goes column by column", (_DATA, "array.T.ravel().tolist()")
    ),
    "rounded": wrong(
        "build-request",
        "send every digit",
        (_DATA, "[round(x, 6) for x in array.ravel().tolist()]"),
    ),
    "all floats": wrong(
        "build-request",
        "a float has only 53 bits",
        (_DATA, "array.ravel().astype(float).tolist()"),
    ),
    "bools as numbers": wrong(
        "build-request", "true and false", (_DATA, "(array.ravel() * 1).tolist()")
    ),
    "writes NaN": wrong("build-request", "JSON has no such word", (", allow_nan=False", "")),
    "a dict": wrong("build-request", "returned a dict", (_DUMPS, "message")),
    "a text": wrong("build-request", "returned a text", (_DUMPS, _DUMPS.removesuffix(".encode()"))),
    "Python's text": wrong("build-request", "use json.dumps", (_DUMPS, "str(message).encode()")),
    "the list alone": wrong(
        "build-request", "has no list `inputs`", (_DUMPS, "json.dumps(inputs).encode()")
    ),
    "timeout in seconds": wrong(
        "build-request", "0.25, seconds", ("int(timeout_s * 1e6)", "timeout_s")
    ),
    "timeout in ms": wrong("build-request", "250, milliseconds", ("1e6", "1e3")),
    "a float of microseconds": wrong(
        "build-request",
        "250000.0: it is 250000, an int",
        ("int(timeout_s * 1e6)", "timeout_s * 1e6"),
    ),
    "timeout beside inputs": wrong(
        "build-request",
        "the message's own `parameters`",
        (
            _TIMEOUT,
            _TIMEOUT.replace('["parameters"] = {"timeout": ', '["timeout"] = ').replace(
                "}\n", "\n"
            ),
        ),
    ),
    "forgets the timeout": wrong(
        "build-request", "the server works on for nobody", (_TIMEOUT, "        pass\n")
    ),
}

_SENTENCE = 'json.loads(body)["error"]'
_CATCH = "(ValueError, KeyError, TypeError)"
_STATUS = "        error.http_status = status\n"
_AFTER = 'float(headers.get("retry-after", 0))'
_ARRAY = 'np.array(output["data"], dtype)'
_RESHAPE = 'data.reshape(output["shape"])'
WRONG["parse-answer"] = {
    "float32 for all": wrong(
        "parse-answer",
        "INT64 became float32",
        ('np.array(output["data"], dtype)', 'np.array(output["data"], "float32")'),
    ),
    "numpy's own choice": wrong(
        "parse-answer", "FP32 became float64", (_ARRAY, 'np.array(output["data"])')
    ),
    "through float32": wrong(
        "parse-answer",
        "into the right type at once",
        (_ARRAY, 'np.array(output["data"], "float32").astype(dtype)'),
    ),
    "flat": wrong("parse-answer", r"became \(6,\): reshape it", (_RESHAPE, "data")),
    "by columns": wrong(
        "parse-answer",
        "column by column",
        (_RESHAPE, 'data.reshape(output["shape"], order="F")'),
    ),
    "minus one": wrong(
        "parse-answer", "raised IndexError", (_RESHAPE, 'data.reshape(-1, output["shape"][1])')
    ),
    "a list": wrong("parse-answer", "is a list: make an array", (_RESHAPE, f"{_RESHAPE}.tolist()")),
    "the first output only": wrong(
        "parse-answer", "read were", ("    return arrays\n", "        break\n    return arrays\n")
    ),
    "returns a list": wrong(
        "parse-answer",
        "returned list: return a dict",
        ("return arrays", "return list(arrays.values())"),
    ),
    "an error is an answer": wrong(
        "parse-answer",
        "takes that for an answer",
        ("        raise error\n", "        return error\n"),
    ),
    "only 4xx": wrong(
        "parse-answer",
        "raised KeyError: 'outputs'",
        ("if status != 200:", "if 400 <= status < 500:"),
    ),
    "no words": wrong(
        "parse-answer",
        "pass its words on",
        ("FlservingError(sentence)", 'FlservingError("request failed")'),
    ),
    "no status": wrong("parse-answer", "whoever tries again decides by it", (_STATUS, "")),
    "HTML breaks it": wrong("parse-answer", "raised JSONDecodeError", (_CATCH, "KeyError")),
    "a list breaks it": wrong(
        "parse-answer", "raised TypeError", (_CATCH, "(ValueError, KeyError)")
    ),
    "another server breaks it": wrong(
        "parse-answer", "raised KeyError", (_CATCH, "(ValueError, TypeError)")
    ),
    "says nothing": wrong(
        "parse-answer", "say at least the status", ('f"status {status} without a sentence"', '""')
    ),
    "no Retry-After": wrong(
        "parse-answer", "has no retry_after_s", (f"        error.retry_after_s = {_AFTER}\n", "")
    ),
    "Retry-After is a text": wrong(
        "parse-answer", "is the text '1.5'", (_AFTER, 'headers.get("retry-after", 0)')
    ),
    "whole seconds": wrong(
        "parse-answer",
        "raised ValueError: invalid literal",
        (_AFTER, 'int(headers.get("retry-after", 0))'),
    ),
    "Retry-After must be there": wrong(
        "parse-answer", "raised KeyError", (_AFTER, 'float(headers["retry-after"])')
    ),
    "None for nothing": wrong(
        "parse-answer",
        "is None: 0, the server said nothing",
        (_AFTER, 'float(headers["retry-after"]) if "retry-after" in headers else None'),
    ),
    "its own error": wrong(
        "parse-answer",
        "its caller handles FlservingError",
        ("error = FlservingError(sentence)", "error = RuntimeError(sentence)"),
    ),
}

_LESS, _MORE = "max(0, self.tokens - 1)", "min(self.most, self.tokens + 0.1)"
_HALF = "self.tokens > self.most / 2"
WRONG["retry-budget"] = {
    "until nothing is left": wrong("retry-budget", "until nothing is left", (_HALF, "self.tokens > 0")),
    "half is enough": wrong("retry-budget", "not MORE than half", (_HALF, "self.tokens >= self.most / 2")),
    "looks before it takes": wrong(
        "retry-budget",
        "take the token first",
        ("        self.tokens = max(0, self.tokens - 1)\n", ""),
        (f"return {_HALF}", f"allowed = {_HALF}\n        self.tokens = {_LESS}\n        return allowed"),
    ),
    "failures are free": wrong("retry-budget", "the budget is no bound", (_LESS, "max(0, self.tokens)")),
    "five or one": wrong("retry-budget", "take half of `most`", (_HALF, "self.tokens > min(5, self.most - 2)")),
    "grows without bound": wrong("retry-budget", "a good hour pays", (_MORE, "self.tokens + 0.1")),
    "falls without bound": wrong("retry-budget", "never fall below 0", (_LESS, "self.tokens - 1")),
    "a token for an answer": wrong(
        "retry-budget", "again after .* answers: each earns 0.1", (_MORE, "min(self.most, self.tokens + 1)")
    ),
    "answers earn nothing": wrong("retry-budget", "each answer earns 0.1 token", (_MORE, "self.tokens")),
    "full again": wrong("retry-budget", "after 1 answers", (_MORE, "self.most")),
    "returns nothing": wrong("retry-budget", "returned None", (f"return {_HALF}", _HALF)),
    "shared by all": wrong(
        "retry-budget",
        "keep the tokens in self",
        ("    def answered", "    left = [10]\n\n    def answered"),
        (f"self.tokens = {_MORE}", "self.left[0] = min(self.most, self.left[0] + 0.1)"),
        (f"self.tokens = {_LESS}", "self.left[0] = max(0, self.left[0] - 1)"),
        (f"return {_HALF}", "return self.left[0] > self.most / 2"),
    ),
}  # fmt: skip

_AGAIN = "            if not again or not budget.may_retry():\n                raise\n"
_STOP = "            if clock() + wait_s >= end_s:\n                raise\n"
_SAFE = "again = error.http_status in ((429, 503) if idempotent else (429,))"
_WAIT = "error.retry_after_s + random.uniform(0, 0.1 * 2**failures)"
_SEND, _TRY = "            answer = send(end_s - clock())\n", "    while True:\n"


def _retry(message: str, *edits: tuple[str, str]):
    return wrong("retry", message, *edits)


WRONG["retry"] = {
    "retries InvalidInput": _retry(
        r"InvalidInputError \(400\) was tried \d+ times: the same rows are refused again",
        (_SAFE, "again = True"),
    ),
    "retries 401": _retry(
        "UnauthorizedError .* stays unknown", (_SAFE, "again = error.http_status != 400")
    ),
    "retries every 5xx": _retry(
        "ModelExecutionError .* the same rows fail in the same model",
        (_SAFE, "again = error.http_status >= 429"),
    ),
    "retries a deadline": _retry(
        r"DeadlineExceededError \(504\) was tried",
        (_SAFE, "again = error.http_status in (429, 503, 504)"),
    ),
    "never retries": _retry(
        "gave up after 1 tries; 429 and 503 are safe", (_SAFE, "again = False")
    ),
    "only 429": _retry(
        "ServerClosedError .* gave up after 1 tries", (_SAFE, "again = error.http_status == 429")
    ),
    "sleeps past the deadline": _retry(
        "do not start a wait that ends too late",
        (_STOP, ""),
        (_TRY, "    error = None\n    while clock() < end_s or not error:\n"),
        ("as error", "as failed"),
        ("            again =", "            error = failed\n            again ="),
        ("            return answer\n", "            return answer\n    raise error\n"),
    ),
    "asks when no time is left": _retry(
        "gave up after .* s: do not start a wait", ("clock() + wait_s >= end_s", "clock() >= end_s")
    ),
    "passes the full timeout": _retry(
        "the whole deadline, when only .* were left", ("send(end_s - clock())", "send(deadline_s)")
    ),
    "cuts the timeout in pieces": _retry(
        "pass on what is left until the deadline", ("send(end_s - clock())", "send(deadline_s / 4)")
    ),
    "no back-off": _retry(
        "asked again at once, without a wait", (f"wait_s = {_WAIT}", "wait_s = 0")
    ),
    "ignores Retry-After": _retry(
        "Retry-After 0.7 s, and was asked again", ("error.retry_after_s + ", "")
    ),
    "waits for Retry-After in vain": _retry(
        "in vain; raise the error at once",
        (
            "            wait_s = error.retry_after_s + ",
            "            sleep(error.retry_after_s)\n            wait_s = ",
        ),
    ),
    "swallows the error": _retry(
        "takes that for an answer", (_STOP, _STOP.replace("raise", "return None"))
    ),
    "swallows what is final": _retry(
        "after InvalidInputError .* returned",
        (_AGAIN, _AGAIN.replace("raise", "return {'error': str(error)}")),
    ),
    "retries for ever": _retry("it still asks, with a deadline of 2 s", (_STOP, "")),
    "the same delay for all": _retry(
        "they come back together", ("random.uniform(0, 0.1 * 2**failures)", "0.1 * 2**failures")
    ),
    "jitter that does not grow": _retry("they must grow", (" * 2**failures", "")),
    "two retries at most": _retry(
        "four times 429",
        ("clock() + wait_s >= end_s", "failures >= 2 or clock() + wait_s >= end_s"),
    ),
    "an error of its own": _retry(
        "raised TimeoutError",
        (_STOP, _STOP.replace("raise", "raise TimeoutError('no answer') from None")),
    ),
    "another typed error": _retry(
        "raise the OverloadedError that send raised",
        (_STOP, _STOP.replace("raise", "raise type(error)('gave up') from None")),
    ),
    "the first error": _retry(
        "raised the first error again",
        ("    failures = 0\n", "    failures = 0\n    seen = []\n"),
        ("            wait_s =", "            seen.append(error)\n            wait_s ="),
        (_STOP, _STOP.replace("raise", "raise seen[0]")),
    ),
    "waits after the answer": _retry(
        "had to wait 0.1 s more", (_SEND, f"{_SEND}            sleep(0.1)\n")
    ),
    "forgets to return": _retry("returned None", ("return answer", "return")),
    "no budget": _retry("keep a server down", (" or not budget.may_retry()", "")),
    "asks the budget twice": _retry(
        "allowed 2 retries and there were 1",
        ("not budget.may_retry()", "not (budget.may_retry() and budget.may_retry())"),
    ),
    "waits, then asks the budget": _retry(
        "the budget said no, and it slept",
        (" or not budget.may_retry()", ""),
        (
            "            sleep(wait_s)\n",
            "            sleep(wait_s)\n            if not budget.may_retry():\n                raise\n",
        ),
    ),
    "a caller's mistake costs tokens": _retry(
        "a 400 was counted",
        ("not again or not budget.may_retry()", "not budget.may_retry() or not again"),
    ),
    "answers earn nothing": _retry(
        "end all retries for good", ("            budget.answered()\n", "")
    ),
    "503 repeats what counts twice": _retry(
        "would count twice", (_SAFE, "again = error.http_status in (429, 503)")
    ),
    "nothing is repeated unless idempotent": _retry(
        "a 429 says that nothing was done",
        (_SAFE, "again = idempotent and error.http_status in (429, 503)"),
    ),
}
