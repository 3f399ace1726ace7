"""Wrong solutions of notebook 03's exercises "how long does a version survive?", "the key of a
prediction" and "single flight"; those of the LRU stand in ``wrong_solutions``.
"""

from wrong_solutions import WRONG, Wrong, edited, wrong

# ----------------------------------------------------------------- how long does a version survive?

_SUM = "(1 - np.exp(-shares * time)).sum()"
_FITS = "    if cache_size >= len(shares):\n        return math.inf\n"
_DOUBLE = "    while different_versions(high) < cache_size:\n        high *= 2\n"
_HALVE = "while high - low > 1e-9 * high:"
WRONG["characteristic-time"] = {
    "returns the cache size": wrong(
        "characteristic-time", "is the cache size", ("return high", "return cache_size")
    ),
    "returns the hit rate": wrong(
        "characteristic-time",
        "is the hit rate: return T",
        ("return high", "return (shares * (1 - np.exp(-shares * high))).sum()"),
    ),
    "negative": wrong("characteristic-time", "is negative", ("return high", "return -high")),
    "forgets the shares": wrong(
        "characteristic-time",
        "what equally popular versions would give",
        (_SUM, "(1 - np.exp(-time / len(shares))) * len(shares)"),
    ),
    "whole requests": wrong(
        "characteristic-time", "is a whole number", ("return high", "return math.ceil(high)")
    ),
    "one place too few": wrong(
        "characteristic-time",
        "solved for 4 places",
        (_SUM, f"1 + {_SUM} if cache_size > 1 else {_SUM}"),
    ),
    "one place too many": wrong(
        "characteristic-time", "solved for 6 places", (_SUM, f"{_SUM} - 1")
    ),
    "Fagin's formula": wrong(
        "characteristic-time", "T is too small", (_SUM, "(1 - (1 - shares) ** time).sum()")
    ),
    "weighted sum": wrong(
        "characteristic-time",
        "without an end: what it waits for never",
        (_SUM, f"(shares * {_SUM[:-6]}).sum()"),
    ),
    "small steps": wrong(
        "characteristic-time",
        "or its steps are too small",
        (
            _HALVE,
            "while different_versions(low) < cache_size:\n        low += 1e-5\n    while False:",
        ),
        ("return high", "return low"),
    ),
    "stops too early": wrong(
        "characteristic-time",
        "is near, and .* is right: the search ends too early",
        (_HALVE, "while high - low > 1e-3 * high:"),
    ),
    "the wrong half is kept": wrong(
        "characteristic-time",
        "T is too small",
        ("            low = middle\n", "            high = middle\n"),
        ("        else:\n            high = middle\n", "        else:\n            low = middle\n"),
    ),
    "the upper end is guessed": wrong(
        "characteristic-time",
        "900 places: .*T is too small",
        ("high = 0.0, 1.0", "high = 0.0, 1000.0"),
        (_DOUBLE, ""),
    ),
    "does not know that all may fit": wrong(
        "characteristic-time",
        "all of them fit, none is ever evicted, so T is math.inf",
        (_FITS, ""),
    ),
    "says 0 when all fit": wrong(
        "characteristic-time",
        "T = 0 for 20 versions and 20 places",
        ("return math.inf", "return 0.0"),
    ),
    "returns nothing": wrong("characteristic-time", "returned None", ("return high", "high")),
    "not a number": wrong(
        "characteristic-time", "returned nan", ("return high", "return math.nan")
    ),
    "sorts the caller's shares": wrong(
        "characteristic-time", "changed the shares", (_FITS, _FITS + "    shares.sort()\n")
    ),
    "no float": wrong("characteristic-time", "raised AttributeError", (_SUM, f"{_SUM}.total")),
}


# -------------------------------------------------------------------------- the key of a prediction

_ROWS = "    rows = np.ascontiguousarray(rows)\n"
_FORM = "rows.dtype.str, rows.shape"
_DIGEST = "hashlib.sha256(rows).hexdigest()"
_CHOSEN = "tuple(sorted(settings.items()))"
_KEY = "return model, version, client, form, content, chosen"
WRONG["prediction-key"] = {
    "forgets the version": wrong(
        "prediction-key",
        "the key forgets the version",
        (_KEY, "return model, client, form, content, chosen"),
    ),
    "forgets the model": wrong(
        "prediction-key",
        "the key forgets the model",
        (_KEY, "return version, client, form, content, chosen"),
    ),
    "glued texts": wrong(
        "prediction-key",
        "their texts run into each other",
        (_KEY, "return model + version, client, form, content, chosen"),
    ),
    "forgets the rows": wrong(
        "prediction-key",
        "the key forgets the rows",
        (_KEY, "return model, version, client, form, chosen"),
    ),
    "forgets the shape": wrong(
        "prediction-key", "the key forgets the shape", (_FORM, "rows.dtype.str")
    ),
    "forgets the type": wrong("prediction-key", "the key forgets the type", (_FORM, "rows.shape")),
    "forgets the settings": wrong(
        "prediction-key",
        "forgets the settings' values",
        (_KEY, "return model, version, client, form, content"),
    ),
    "names of the settings only": wrong(
        "prediction-key", "forgets the settings' values", (_CHOSEN, "tuple(sorted(settings))")
    ),
    "values of the settings only": wrong(
        "prediction-key",
        "forgets the settings' names",
        (_CHOSEN, "tuple(sorted(map(str, settings.values())))"),
    ),
    "settings in their order": wrong(
        "prediction-key", "the same settings in another order", (_CHOSEN, "tuple(settings.items())")
    ),
    "a dict in the key": wrong(
        "prediction-key", "no dict can hold this key", (_CHOSEN, "settings")
    ),
    "a list as key": wrong(
        "prediction-key",
        "no dict can hold this key",
        (_KEY, "return [model, version, client, form, content, chosen]"),
    ),
    "forgets the client": wrong(
        "prediction-key",
        "Bob gets the answer of Ada's personal model",
        (_KEY, "return model, version, form, content, chosen"),
    ),
    "the client as text": wrong(
        "prediction-key",
        "a client who is called 'None'",
        (_KEY, "return model, version, str(client), form, content, chosen"),
    ),
    "no client is an empty name": wrong(
        "prediction-key",
        "a client who is called ''",
        (_KEY, 'return model, version, client or "", form, content, chosen'),
    ),
    "the sum of the rows": wrong(
        "prediction-key",
        "a sum or a set does not know the order",
        (_DIGEST, "np.sort(rows, axis=None).sum()"),
    ),
    "the text of the rows": wrong(
        "prediction-key", "differs in the middle", (_DIGEST, "str(rows)")
    ),
    "rounded": wrong(
        "prediction-key",
        "differs in a bit",
        (_DIGEST, "hashlib.sha256(np.round(rows, 5)).hexdigest()"),
    ),
    "the identity of the array": wrong(
        "prediction-key",
        "the same rows in another array",
        (_ROWS, "    content = id(rows)\n" + _ROWS),
        (f"    content = {_DIGEST}\n", ""),
    ),
    "all the bytes": wrong(
        "prediction-key",
        r"the key of 4 MB of rows has 4,\d{3},\d{3} bytes",
        (_DIGEST, "rows.tobytes()"),
    ),
    "hash of the bytes": wrong(
        "prediction-key", "a hash of at most 64 bits", (_DIGEST, "hash(rows.tobytes())")
    ),
    "hash of everything": wrong(
        "prediction-key",
        "a hash of at most 64 bits",
        (_KEY, "return hash((model, version, client, form, content, chosen))"),
    ),
    "a checksum": wrong(
        "prediction-key", "a hash of at most 64 bits", (_DIGEST, '__import__("zlib").crc32(rows)')
    ),
    "a scattered view": wrong("prediction-key", "raised ValueError: .*C-contiguous", (_ROWS, "")),
    "the array itself": wrong("prediction-key", "no dict can hold this key", (_DIGEST, "rows")),
    "changes the rows": wrong(
        "prediction-key", "changed what it was given", (_ROWS, "    rows -= rows.mean()\n" + _ROWS)
    ),
}


# ------------------------------------------------------------------------------------ single flight

_LOOK = "            value = self.cache.get(key)\n            if value is not None:\n                return value\n"
_KEEP = "            self.cache.put(key, value)\n"
_FORGET = "            del self.flights[key]\n        flight.set_result"
_FAILED = """\
        except BaseException as error:
            with self.lock:
                del self.flights[key]
            flight.set_exception(error)
            raise
"""
_TRY = "        try:\n            value = load()\n" + _FAILED
WRONG["single-flight"] = {
    "no single flight": wrong(
        "single-flight",
        "8 threads asked for one missing key at the same time, and 8 of them",
        ("if not leads:", "if False:"),
        (_FAILED, "        finally:\n            pass\n"),
        (
            _FORGET,
            "            self.flights.pop(key, None)\n        flight.done() or flight.set_result",
        ),
    ),
    "does not ask the cache": wrong(
        "single-flight", "loaded it again: ask the cache first", (_LOOK, "")
    ),
    "truth of the value": wrong(
        "single-flight", "only None is a miss", ("if value is not None:", "if value:")
    ),
    "does not keep": wrong("single-flight", "does not hold 'a': put it there", (_KEEP, "")),
    "flights stay": wrong(
        "single-flight",
        "has evicted 'a', and .* still returned",
        (
            "            flight = self.flights.setdefault(key, Future())\n",
            "            flight = self.flights.setdefault(key, Future())\n",
        ),
        (_FORGET, "        flight.set_result"),
    ),
    "returns nothing": wrong(
        "single-flight",
        "returned None, the load returned",
        (
            "        flight.set_result(value)\n        return value\n",
            "        flight.set_result(value)\n",
        ),
    ),
    "the result is not passed on": wrong(
        "single-flight",
        "of 8 threads still wait, 1 s after the load",
        ("        flight.set_result(value)\n", ""),
    ),
    "who waits gets nothing": wrong(
        "single-flight",
        "a thread got None: all must get the object",
        ("return flight.result()", "flight.result()\n            return None"),
    ),
    "lock during the load": wrong(
        "single-flight",
        "get\\('warm', load\\) waited while 'a' was loading",
        (_TRY + "        with self.lock:\n", "            value = load()\n"),
        ("        if not leads:\n            return flight.result()\n", ""),
    ),
    "lock within the lock": wrong(
        "single-flight",
        "does not return: it waits for a lock",
        (
            "            value = self.cache.get(key)\n",
            "            with self.lock:\n                value = self.cache.get(key)\n",
        ),
    ),
    "reads the cache without the lock": wrong(
        "single-flight",
        "threads were in the cache at the same time",
        (
            "        with self.lock:\n" + _LOOK,
            _LOOK.replace("            ", "        ").replace(
                "        return", "            return"
            )
            + "        with self.lock:\n",
        ),
    ),
    "writes the cache without the lock": wrong(
        "single-flight",
        "threads were in the cache at the same time",
        (
            "        with self.lock:\n" + _KEEP,
            "        self.cache.put(key, value)\n        with self.lock:\n",
        ),
    ),
    "errors leave the others waiting": wrong(
        "single-flight",
        "the load raised, and 7 of 8 threads still wait",
        ("            flight.set_exception(error)\n", ""),
    ),
    "errors are kept": wrong(
        "single-flight",
        "raised the same error without a new try",
        (
            "            with self.lock:\n                del self.flights[key]\n            flight.set_exception",
            "            flight.set_exception",
        ),
    ),
    "errors become None": wrong(
        "single-flight",
        "the load raised OSError, and 7 of 8 threads got None",
        ("flight.set_exception(error)", "flight.set_result(None)"),
    ),
    "the leader's error is swallowed": wrong(
        "single-flight",
        "the load raised OSError, and 1 of 8 threads got None",
        ("            raise\n", "            return None\n"),
    ),
    "each tries again": wrong(
        "single-flight",
        "each of the 8 threads tried the broken load for itself",
        (
            "return flight.result()",
            "try:\n                return flight.result()\n            except OSError:\n                return load()",
        ),
    ),
    "waits for its own flight": wrong(
        "single-flight",
        "does not return: it waits for a lock or a flight of its own",
        ("if not leads:", "if flight:"),
    ),
    "wrong name": Wrong(
        edited("single-flight", ("self.cache.put(key, value)", "self.store.put(key, value)")),
        "not yet; AttributeError: .*'store'",
    ),
}
