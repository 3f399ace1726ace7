"""The exercise of notebook 11, and plausible wrong solutions of it. Registers itself in ``wrong_solutions``."""

from functools import partial

from wrong_solutions import WRONG, wrong

_COUNT, _OBSERVE = "self.requests.labels(outcome).inc()", "self.seconds.observe(self.clock() - began_s)"
_BUCKETS = "            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),\n"
_COUNTER = 'Counter("bare_requests", "By outcome.", ["outcome"], registry=registry)'
_DONE, _FINALLY = '            outcome = "answered"\n', "        finally:\n            self.running.dec()\n"


_wrong = partial(wrong, "metrics")


WRONG["metrics"] = {
    "milliseconds": _wrong(
        "those are milliseconds, the base unit", ("self.clock() - began_s", "1e3 * (self.clock() - began_s)")
    ),
    "milliseconds, and a name that says so": _wrong(
        "is not in a base unit", ("bare_request_seconds", "bare_request_ms")
    ),
    "no unit": _wrong("does not say its unit", ("bare_request_seconds", "bare_latency")),
    "no failures in the counter": _wrong(
        "count failures too", (f"            {_COUNT}\n", ""), (_DONE, f"{_DONE}            {_COUNT}\n")
    ),
    "no failures in the histogram": _wrong(
        "the failed ones are missing", (f"            {_OBSERVE}\n", ""), (_DONE, f"{_DONE}            {_OBSERVE}\n")
    ),
    "failures look like answers": _wrong(
        "must tell them apart",
        ("self.clock()\n        self.running", "self.clock()\n        outcome = 'any'\n        self.running"),
        (_DONE, ""),
    ),
    "no label": _wrong(
        "answered and failed requests are counted in the same series", ('["outcome"], ', ""), (".labels(outcome)", "")
    ),
    "counts at the start and at the end": _wrong(
        "count each request once", ("        self.running.inc()\n", f"        self.running.inc()\n        {_COUNT}\n")
    ),
    "never counts": _wrong(r"call \.inc\(\) for every request", (_COUNT, "self.requests.labels(outcome)")),
    "gauge as counter": _wrong(
        "is a gauge that counts",
        (_COUNTER, _COUNTER.replace("Counter", "Gauge").replace("bare_requests", "bare_requests_total")),
    ),
    "label per client": _wrong(
        "a label client with one value per client",
        ('["outcome"]', '["outcome", "client"]'),
        ("labels(outcome)", "labels(outcome, client)"),
    ),
    "gauge per client": _wrong(
        "one value per client",
        ('"In the model.", ', '"In the model.", ["who"], '),
        ("self.running.inc()", "self.running.labels(client).inc()"),
        ("self.running.dec()", "self.running.labels(client).dec()"),
    ),
    "the error's text as a label": _wrong(
        "free text never ends",
        (
            "        finally:\n",
            "        except Exception as error:\n            outcome = str(error)\n            raise\n"
            + "        finally:\n",
        ),
    ),
    "a counter per outcome": _wrong(
        "can be summed and divided",
        (
            "        self.seconds = ",
            '        self.lost = Counter("bare_failures", "Failures.", registry=registry)\n        self.seconds = ',
        ),
    ),
    "buckets in milliseconds": _wrong("none at 0.05", (_BUCKETS, "            buckets=(1, 5, 10, 50, 100),\n")),
    "buckets without the target": _wrong(
        "none at 0.05", (_BUCKETS, "            buckets=(0.001, 0.01, 0.1, 1, 10),\n")
    ),
    "summary": _wrong(
        "is a summary",
        (_BUCKETS, ""),
        ("Gauge, Histogram", "Gauge, Summary"),
        ("self.seconds = Histogram", "self.seconds = Summary"),
    ),
    "another clock": _wrong(
        r"read self\.clock\(\)",
        ('began_s = "failed", self.clock()', 'began_s = "failed", time.perf_counter()'),
        ("self.clock() - began_s", "time.perf_counter() - began_s"),
    ),
    "the time of day": _wrong("observe end - beginning", ("self.clock() - began_s", "self.clock()")),
    "observes twice": _wrong("observe each once", (_OBSERVE, f"{_OBSERVE}\n            {_OBSERVE}")),
    "gauge that never falls": _wrong(r"\.dec\(\) at the end", (_FINALLY, "        finally:\n")),
    "gauge that a failure leaves up": _wrong(
        "after a failed request, and nothing is running",
        (_FINALLY, "        finally:\n"),
        (_DONE, f"{_DONE}            self.running.dec()\n"),
    ),
    "gauge that is set": _wrong(
        "not .set", ("self.running.inc()", "self.running.set(1)"), ("self.running.dec()", "self.running.set(0)")
    ),
    "gauge that stays at 0": _wrong(
        r"\.inc\(\) before the model", ("        self.running.inc()\n", ""), ("            self.running.dec()\n", "")
    ),
    "no gauge": _wrong(
        "0 metrics of type gauge",
        ('        self.running = Gauge("bare_requests_in_progress", "In the model.", registry=registry)\n', ""),
        ("        self.running.inc()\n", ""),
        ("            self.running.dec()\n", ""),
    ),
    "swallows the error": _wrong(
        "then raise it again",
        ("        finally:\n", "        except Exception:\n            return None\n        finally:\n"),
    ),
    "wraps the error": _wrong(
        "let it through",
        (
            "        finally:\n",
            "        except Exception as error:\n            raise RuntimeError from error\n        finally:\n",
        ),
    ),
    "forgets to answer": _wrong("predict returned None where the model answered", ("            return answer\n", "")),
    "one global registry": _wrong(
        "pass registry=registry",
        ('["outcome"], registry=registry', '["outcome"]'),
        ('failed requests too.",\n            registry=registry', 'failed requests too."'),
        ('"In the model.", registry=registry', '"In the model."'),
    ),
    "wrong number of labels": _wrong(
        "predict for client 'client 0' raised ValueError", ("labels(outcome)", "labels(outcome, client)")
    ),
}
