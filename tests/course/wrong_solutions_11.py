"""Notebook 11: metrics, a quantile, an alert; plausible wrong solutions. Registers itself in
``wrong_solutions``."""

from functools import partial

from wrong_solutions import WRONG, wrong

_COUNT, _OBSERVE = (
    "self.requests.labels(outcome).inc()",
    "self.seconds.observe(self.clock() - began_s)",
)
_BUCKETS = "            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),\n"
_COUNTER = 'Counter("bare_requests", "All.", ["outcome"], registry=registry)'
_DONE, _FINALLY = (
    '            outcome = "answered"\n',
    "        finally:\n            self.running.dec()\n",
)


_wrong = partial(wrong, "metrics")


WRONG["metrics"] = {
    "milliseconds": _wrong(
        "those are milliseconds, the base unit",
        ("self.clock() - began_s", "1e3 * (self.clock() - began_s)"),
    ),
    "milliseconds, and a name that says so": _wrong(
        "is not in a base unit", ("bare_request_seconds", "bare_request_ms")
    ),
    "no unit": _wrong("does not say its unit", ("bare_request_seconds", "bare_latency")),
    "no failures in the counter": _wrong(
        "count failures too",
        (f"            {_COUNT}\n", ""),
        (_DONE, f"{_DONE}            {_COUNT}\n"),
    ),
    "no failures in the histogram": _wrong(
        "the failed ones are missing",
        (f"            {_OBSERVE}\n", ""),
        (_DONE, f"{_DONE}            {_OBSERVE}\n"),
    ),
    "failures look like answers": _wrong(
        "must tell them apart",
        (
            "self.clock()\n        self.running",
            "self.clock()\n        outcome = 'any'\n        self.running",
        ),
        (_DONE, ""),
    ),
    "no label": _wrong(
        "answered and failed requests are counted in the same series",
        ('["outcome"], ', ""),
        (".labels(outcome)", ""),
    ),
    "counts at the start and at the end": _wrong(
        "count each request once",
        ("        self.running.inc()\n", f"        self.running.inc()\n        {_COUNT}\n"),
    ),
    "never counts": _wrong(
        r"call \.inc\(\) for every request", (_COUNT, "self.requests.labels(outcome)")
    ),
    "gauge as counter": _wrong(
        "is a gauge that counts",
        (
            _COUNTER,
            _COUNTER.replace("Counter", "Gauge").replace("bare_requests", "bare_requests_total"),
        ),
    ),
    "label per client": _wrong(
        "a label client with one value per client",
        ('["outcome"]', '["outcome", "client"]'),
        ("labels(outcome)", "labels(outcome, client)"),
    ),
    "gauge per client": _wrong(
        "one value per client",
        ('"Now.", ', '"Now.", ["who"], '),
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
    "buckets in milliseconds": _wrong(
        "none at 0.05", (_BUCKETS, "            buckets=(1, 5, 10, 50, 100),\n")
    ),
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
    "the time of day": _wrong(
        "observe end - beginning", ("self.clock() - began_s", "self.clock()")
    ),
    "observes twice": _wrong(
        "observe each once", (_OBSERVE, f"{_OBSERVE}\n            {_OBSERVE}")
    ),
    "gauge that never falls": _wrong(r"\.dec\(\) at the end", (_FINALLY, "        finally:\n")),
    "gauge that a failure leaves up": _wrong(
        "after a failed request, and nothing is running",
        (_FINALLY, "        finally:\n"),
        (_DONE, f"{_DONE}            self.running.dec()\n"),
    ),
    "gauge that is set": _wrong(
        "not .set",
        ("self.running.inc()", "self.running.set(1)"),
        ("self.running.dec()", "self.running.set(0)"),
    ),
    "gauge that stays at 0": _wrong(
        r"\.inc\(\) before the model",
        ("        self.running.inc()\n", ""),
        ("            self.running.dec()\n", ""),
    ),
    "no gauge": _wrong(
        "0 metrics of type gauge",
        (
            '        self.running = Gauge("bare_requests_in_progress", "Now.", registry=registry)\n',
            "",
        ),
        ("        self.running.inc()\n", ""),
        ("            self.running.dec()\n", ""),
    ),
    "swallows the error": _wrong(
        "then raise it again",
        (
            "        finally:\n",
            "        except Exception:\n            return None\n        finally:\n",
        ),
    ),
    "wraps the error": _wrong(
        "let it through",
        (
            "        finally:\n",
            "        except Exception as error:\n            raise RuntimeError from error\n        finally:\n",
        ),
    ),
    "forgets to answer": _wrong(
        "predict returned None where the model answered", ("            return answer\n", "")
    ),
    "one global registry": _wrong(
        "pass registry=registry",
        ('["outcome"], registry=registry', '["outcome"]'),
        ('failed requests too.",\n            registry=registry', 'failed requests too."'),
        ('"Now.", registry=registry', '"Now."'),
    ),
    "wrong number of labels": _wrong(
        "predict for client 'client 0' raised ValueError",
        ("labels(outcome)", "labels(outcome, client)"),
    ),
}


# -------------------------------------------------------------------------- a quantile from buckets


_quantile = partial(wrong, "quantile")
_ALONG = "return low + (bounds[place] - low) * (rank - below) / inside"
_PLACE = "place = next(i for i, count in enumerate(counts) if count >= rank)"
_LAST = "    if place == len(bounds) - 1:\n        return bounds[-2]\n"
_LOW = "low, below = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0)"
_NONE = "    if not counts[-1]:\n        return math.nan\n"
WRONG["quantile"] = {
    "the upper end": _quantile(
        "a p80 just above 20 ms would look like 50 ms", (_ALONG, "return bounds[place]")
    ),
    "the lower end": _quantile("that is the lower end", (_ALONG, "return low")),
    "the middle": _quantile("that is its middle", (_ALONG, "return (low + bounds[place]) / 2")),
    "forgets those below": _quantile(
        "rank less the 40 requests before it", ("(rank - below) / inside", "rank / counts[place]")
    ),
    "from 0 on": _quantile(
        "the line begins at the lower end",
        (_ALONG, "return (bounds[place] - low) * (rank - below) / inside"),
    ),
    "the cumulative count": _quantile(
        "counts are cumulative", ("inside = counts[place] - below", "inside = counts[place]")
    ),
    "percent": _quantile("q is a share", ("rank = q * counts[-1]", "rank = q / 100 * counts[-1]")),
    "the sum of all counts": _quantile(
        r"rank 80 is the 40th of 50|a number of seconds|raised",
        ("rank = q * counts[-1]", "rank = q * sum(counts)"),
    ),
    "above the rank": _quantile(
        "the first bucket whose count is at least the rank", ("if count >= rank", "if count > rank")
    ),
    "the first bucket has one before": _quantile(
        "in Python bounds", (_LOW, "low, below = bounds[place - 1], counts[place - 1]")
    ),
    "the first bucket is its bound": _quantile(
        "half of the first bucket", (_LOW, f"if not place:\n        return bounds[0]\n    {_LOW}")
    ),
    "infinity": _quantile("nobody knows how long the last 4", (_LAST, "")),
    "a guess beyond": _quantile(
        "say the largest finite bound", ("return bounds[-2]", "return 2 * bounds[-2]")
    ),
    "as they come": _quantile("sort the bounds", ("sorted(buckets)", "list(buckets)")),
    "0 without requests": _quantile(
        "would look like a very fast server", ("return math.nan", "return 0.0")
    ),
    "divides by 0 requests": _quantile(
        "raised ZeroDivisionError|raised StopIteration|it is not known, NaN", (_NONE, "")
    ),
    "None without requests": _quantile(
        "return a number of seconds", ("return math.nan", "return None")
    ),
    "prints it": _quantile("returned None", (_ALONG, _ALONG.replace("return ", "print(") + ")")),
}


# -------------------------------------------------------------------------------- a burn-rate alert


_alert = partial(wrong, "burn-rate-alert")
_RATE = "return (self.failed - failed) / (self.asked - asked) / self.budget"
_BEGIN = "begin_s = self.scrapes[-1][0] - window_s"
_THEN = "next(each for each in self.scrapes if each[0] >= begin_s)"
_FIRST_SCRAPE = "self.last or (asked, failed)"
_ASKED = "self.asked += asked - before_asked if asked >= before_asked else asked"
_FAILED = "self.failed += failed - before_failed if failed >= before_failed else failed"
_ANY = "return any(burn > pair[2] for pair, burn in burns.items())"
_BURNS = "burns = {pair: min(map(self.burn_rate, pair[:2])) for pair in self.pairs}"
_LEFT = "return 1 - self.failed / (self.budget * requests)"
WRONG["burn-rate-alert"] = {
    "the share": _alert("divide by the budget", (_RATE, _RATE.replace(" / self.budget", ""))),
    "divides by the target": _alert(
        "not by the target", (_RATE, _RATE.replace("self.budget", "(1 - self.budget)"))
    ),
    "failed over answered": _alert(
        "not by the answered ones",
        (
            _RATE,
            "lost = self.failed - failed\n        return lost / (self.asked - asked - lost) / self.budget",
        ),
    ),
    "failures alone": _alert(
        "failures alone say nothing", (_RATE, "return (self.failed - failed) / self.budget")
    ),
    "since the first scrape": _alert(
        "everything since the first scrape", (_THEN, "self.scrapes[0]")
    ),
    "since the server began": _alert(
        "those are the counters since the server began",
        (_RATE, "return self.last[1] / self.last[0] / self.budget"),
    ),
    "a number of scrapes": _alert(
        "not a number of scrapes|everything since the first scrape",
        (_THEN, "self.scrapes[max(-1 - int(window_s / 60), -len(self.scrapes))]"),
    ),
    "a shorter window": _alert(
        "reaches back to the scrape of 600 s", ("each[0] >= begin_s", "each[0] > begin_s")
    ),
    "divides by nobody": _alert(
        "raised ZeroDivisionError",
        ("        if self.asked == asked:\n            return 0.0\n", ""),
    ),
    "counts what was there": _alert("may be of last month", (_FIRST_SCRAPE, "self.last or (0, 0)")),
    "no restart": _alert(
        "what it shows is what grew",
        (_ASKED, "self.asked += asked - before_asked"),
        (_FAILED, "self.failed += failed - before_failed"),
    ),
    "a restart is nothing": _alert(
        "what it shows is what grew",
        (_ASKED, "self.asked += max(asked - before_asked, 0)"),
        (_FAILED, "self.failed += max(failed - before_failed, 0)"),
    ),
    "the long window alone": _alert(
        "the long window remembers it",
        (_BURNS, "burns = {pair: self.burn_rate(pair[0]) for pair in self.pairs}"),
    ),
    "the short window alone": _alert(
        "the short window alone would wake",
        (_BURNS, "burns = {pair: self.burn_rate(pair[1]) for pair in self.pairs}"),
    ),
    "one of both windows": _alert(
        "the short window alone would wake", (_BURNS, _BURNS.replace("min(", "max("))
    ),
    "all pairs": _alert("the fast pair, 1 h and 5 min", (_ANY, _ANY.replace("any(", "all("))),
    "the fast pair only": _alert(
        "the slow pair, 6 h and 30 min",
        (_ANY, "pair = self.pairs[0]\n        return burns[pair] > pair[2]"),
    ),
    "any rate above 1": _alert(
        "costs 1 % of the month|and no reason to wake",
        (_ANY, "return any(burn > 1 for burn in burns.values())"),
    ),
    "never says": _alert(
        "must wake somebody", (_ANY, "any(burn > pair[2] for pair, burn in burns.items())")
    ),
    "what was spent": _alert(
        "that is what was spent", (_LEFT, "return self.failed / (self.budget * requests)")
    ),
    "requests that may fail": _alert(
        "a share of the budget, not a number",
        (_LEFT, "return self.budget * requests - self.failed"),
    ),
    "of all requests": _alert(
        "divide by what may fail", (_LEFT, "return 1 - self.failed / requests")
    ),
}
