"""Notebook 05: the retry exercise, its solution and plausible wrong ones. Registers into ``wrong_solutions``."""

from wrong_solutions import WRONG, Wrong, edited

_SAFE = "            if error.http_status not in (429, 503):\n                raise\n"
_STOP = "            if clock() + wait_s >= end_s:\n                raise\n"
_WAIT = "error.retry_after_s + random.uniform(0, 0.1 * 2**failures)"
_SEND, _TRY = "            return send(end_s - clock())\n", "    while True:\n"
WRONG["retry"] = {
    "retries InvalidInput": Wrong(
        edited("retry", (_SAFE, "")), r"InvalidInputError \(400\) was tried \d+ times: the same rows are refused again"
    ),
    "retries 401": Wrong(edited("retry", ("not in (429, 503)", "== 400")), "UnauthorizedError .* stays unknown"),
    "retries every 5xx": Wrong(
        edited("retry", ("not in (429, 503)", "< 429")), "ModelExecutionError .* the same rows fail in the same model"
    ),
    "retries a deadline": Wrong(
        edited("retry", ("(429, 503)", "(429, 503, 504)")), r"DeadlineExceededError \(504\) was tried"
    ),
    "never retries": Wrong(
        edited("retry", ("not in (429, 503)", "> 0")), "gave up after 1 tries; 429 and 503 are safe"
    ),
    "only 429": Wrong(edited("retry", ("not in (429, 503)", "!= 429")), "ServerClosedError .* gave up after 1 tries"),
    "sleeps past the deadline": Wrong(
        edited(
            "retry",
            (_STOP, ""),
            (_TRY, "    error = None\n    while clock() < end_s or not error:\n"),
            ("as error", "as failed"),
            ("if error.http", "error = failed\n            if error.http"),
            ("        sleep(wait_s)\n", "        sleep(wait_s)\n    raise error\n"),
        ),
        "do not start a wait that ends too late",
    ),
    "asks when no time is left": Wrong(
        edited("retry", ("clock() + wait_s >= end_s", "clock() >= end_s")), "gave up after .* s: do not start a wait"
    ),
    "passes the full timeout": Wrong(
        edited("retry", ("send(end_s - clock())", "send(deadline_s)")), "the whole deadline, when only .* were left"
    ),
    "cuts the timeout in pieces": Wrong(
        edited("retry", ("send(end_s - clock())", "send(deadline_s / 4)")), "pass on what is left until the deadline"
    ),
    "no back-off": Wrong(edited("retry", (f"wait_s = {_WAIT}", "wait_s = 0")), "asked again at once, without a wait"),
    "ignores Retry-After": Wrong(
        edited("retry", ("error.retry_after_s + ", "")), "Retry-After 0.7 s, and was asked again"
    ),
    "waits for Retry-After in vain": Wrong(
        edited(
            "retry",
            (
                "            wait_s = error.retry_after_s + ",
                "            sleep(error.retry_after_s)\n            wait_s = ",
            ),
        ),
        "in vain; raise the error at once",
    ),
    "swallows the error": Wrong(
        edited("retry", (_STOP, _STOP.replace("raise", "return None"))), "takes that for an answer"
    ),
    "swallows what is final": Wrong(
        edited("retry", (_SAFE, _SAFE.replace("raise", "return {'error': str(error)}"))),
        "after InvalidInputError .* returned",
    ),
    "retries for ever": Wrong(edited("retry", (_STOP, "")), "it still asks, with a deadline of 2 s"),
    "the same delay for all": Wrong(
        edited("retry", ("random.uniform(0, 0.1 * 2**failures)", "0.1 * 2**failures")), "they come back together"
    ),
    "jitter that does not grow": Wrong(edited("retry", (" * 2**failures", "")), "they must grow"),
    "two retries at most": Wrong(
        edited("retry", ("clock() + wait_s >= end_s", "failures >= 2 or clock() + wait_s >= end_s")), "four times 429"
    ),
    "an error of its own": Wrong(
        edited("retry", (_STOP, _STOP.replace("raise", "raise TimeoutError('no answer') from None"))),
        "raised TimeoutError",
    ),
    "another typed error": Wrong(
        edited("retry", (_STOP, _STOP.replace("raise", "raise type(error)('gave up') from None"))),
        "raise the OverloadedError that send raised",
    ),
    "the first error": Wrong(
        edited(
            "retry",
            ("failures = clock() + deadline_s, 0", "failures, seen = clock() + deadline_s, 0, []"),
            ("            wait_s =", "            seen.append(error)\n            wait_s ="),
            (_STOP, _STOP.replace("raise", "raise seen[0]")),
        ),
        "raised the first error again",
    ),
    "waits after the answer": Wrong(
        edited(
            "retry",
            (_SEND, "            answer = send(end_s - clock())\n            sleep(0.1)\n            return answer\n"),
        ),
        "had to wait 0.1 s more",
    ),
    "forgets to return": Wrong(
        edited("retry", ("return send(end_s - clock())", "send(end_s - clock())\n            return")), "returned None"
    ),
}
