"""The exercises of notebook 07 (a threshold, the hybrid policy, an int8 delta): what wrong
solutions are told.

Imported by ``wrong_solutions``, which says what the tables hold.
"""

from functools import partial

from wrong_solutions import WRONG, Wrong, edited, wrong

_RIGHT, _TOOK = "np.where(asks, cloud_right, local_right).mean()", "local_ms + asks * cloud_ms"
_P95, _KEEPS = f"np.percentile({_TOOK}, 95)", "right >= floor and p95_ms <= budget_ms"
_FIRST, _ASKS, _NONE = "sorted(candidates)", "confidence < threshold", "    return None\n"


_chooses = partial(edited, "threshold")


WRONG["threshold"] = {
    "only what the device keeps": Wrong(
        _chooses((_RIGHT, "local_right[~asks].mean() if not asks.all() else 1.0")),
        "only the answers that the device",
    ),
    "the device's accuracy": Wrong(
        _chooses((_RIGHT, "local_right.mean()")), "the device's accuracy at every threshold"
    ),
    "right if either is": Wrong(
        _chooses((_RIGHT, "(local_right | (asks & cloud_right)).mean()")), "either of the two"
    ),
    "equal goes to the cloud": Wrong(
        _chooses((_ASKS, "confidence <= threshold")), "sure enough: it stays"
    ),
    "the sure ones go": Wrong(_chooses((_ASKS, "confidence >= threshold")), "the other way round"),
    "the cloud's time alone": Wrong(
        _chooses((_TOOK, "np.where(asks, cloud_ms, local_ms)")),
        "takes both times, not the cloud's alone",
    ),
    "mean latency": Wrong(_chooses((_P95, f"({_TOOK}).mean()")), "the mean latency"),
    "median latency": Wrong(_chooses((_P95, f"np.median({_TOOK})")), "the median latency"),
    "slowest request": Wrong(_chooses((_P95, f"({_TOOK}).max()")), "one in twenty may take longer"),
    "p95 of the cloud's": Wrong(
        _chooses((_P95, f"np.percentile(({_TOOK})[asks], 95) if asks.any() else 0")),
        "it is meant of all requests",
    ),
    "percentile counts to one": Wrong(_chooses((", 95)", ", 0.95)")), "it counts to 100"),
    "adds percentiles": Wrong(
        _chooses((_P95, "np.percentile(local_ms, 95) + np.percentile(asks * cloud_ms, 95)")),
        "do not add up",
    ),
    "largest": Wrong(
        _chooses((_FIRST, "sorted(candidates, reverse=True)")),
        "the largest threshold that keeps both",
    ),
    "first in the list": Wrong(_chooses((_FIRST, "candidates")), "they come in any order"),
    "strictly better": Wrong(
        _chooses((_KEEPS, "right > floor and p95_ms < budget_ms")), "compare with >= and <="
    ),
    "no budget": Wrong(_chooses((_KEEPS, "right >= floor")), "never look at the latency budget"),
    "no floor": Wrong(_chooses((_KEEPS, "p95_ms <= budget_ms")), "never look at the floor"),
    "always one": Wrong(
        _chooses((_NONE, "    return max(candidates)\n")), "you name the largest one: return None"
    ),
    "a position": Wrong(
        _chooses(("return threshold", "return candidates.index(threshold)")),
        "not one of the candidat",
    ),
    "sorts the caller's array": Wrong(
        _chooses((f"asks = {_ASKS}", f"confidence.sort()\n        asks = {_ASKS}")),
        "changed an array",
    ),
    "gives everything": Wrong(
        _chooses(("return threshold", "return threshold, right")), "return one number, or None"
    ),
}

# -------------------------------------------------------------------------------- the hybrid policy


_CACHE = """\
    known = cache.get(row)
    if known is not None:
        return known | {"path": "cache"}
"""
_REFUSE = """\
    if local["age_s"] > refuse_s:
        raise StaleModelError("the device's model is too old, and nobody else answers")
"""
_SURE = 'local["confidence"] >= threshold and local["age_s"] <= fresh_s'
_STORE = "            cache.put(row, answer)\n"


_policy = partial(edited, "hybrid-policy")


WRONG["hybrid-policy"] = {
    "cloud first": Wrong(
        _policy((_SURE, "False")), "was sure (.*) and fresh, and you asked the cloud"
    ),
    "never the cloud": Wrong(
        _policy(("if consent:", "if False:")), "the cloud was there: ask the cloud"
    ),
    "always the device": Wrong(
        _policy((_SURE, "True")), "not sure .*, and its answer was given as local"
    ),
    "more than the threshold": Wrong(
        _policy((_SURE, _SURE.replace(">=", ">"))), "a confidence of 0.9 reaches the threshold"
    ),
    "fresh does not matter": Wrong(
        _policy((_SURE, 'local["confidence"] >= threshold')), "an old model may be sure and"
    ),
    "as old as the limit": Wrong(
        _policy((_SURE, _SURE.replace("<=", "<"))), "a model of 100 s is fresh"
    ),
    "no cache": Wrong(_policy((_CACHE, "")), "you sent the row a second time"),
    "nothing into the cache": Wrong(_policy((_STORE, "")), "nothing was put into the cache"),
    "one entry for all rows": Wrong(
        _policy(
            ("known = cache.get(row)", "known = cache.get('last')"),
            (_STORE, _STORE.replace("row", "'last'")),
        ),
        "another row was asked",
    ),
    "cache before the device": Wrong(
        _policy(
            (_CACHE, ""),
            ("    local = device(row)\n", f"{_CACHE}    local = device(row)\n"),
        ),
        "you preferred an older answer from the cache",
    ),
    "without consent": Wrong(_policy(("if consent:", "if True:")), "nothing may leave the device"),
    "no cache without consent": Wrong(
        _policy(("if known is not None:", "if known is not None and consent:")),
        "may be given without consent",
    ),
    "the cloud's error": Wrong(
        _policy(("except FlservingError:", "except ZeroDivisionError:")), "and so did you"
    ),
    "only one of its errors": Wrong(
        _policy(("except FlservingError:", "except TimeoutError:")),
        "the cloud raised OverloadedError and so did you",
    ),
    "says local": Wrong(
        _policy(('{"path": "degraded"}', '{"path": "local"}')),
        "not sure|the best there is: the path is",
    ),
    "keeps its own": Wrong(
        _policy(
            (
                '    return local | {"path": "degraded"}',
                '    cache.put(row, local)\n    return local | {"path": "degraded"}',
            )
        ),
        "the cloud failed, and something was put|came back, and the path",
    ),
    "never refuses": Wrong(_policy((_REFUSE, "")), "refuse_s is 1000, .*: you answered 'degraded'"),
    "refuses too soon": Wrong(
        _policy(
            (_REFUSE, ""), ("    local = device(row)\n", f"    local = device(row)\n{_REFUSE}")
        ),
        "the cloud was there and had an answer",
    ),
    "no path": Wrong(_policy(('local | {"path": "local"}', "local")), "lacks path"),
    "no round": Wrong(
        _policy(
            ('answer | {"path": "cloud"}', '{"prediction": answer["prediction"], "path": "cloud"}')
        ),
        "lacks confid",
    ),
    "the device's round": Wrong(
        _policy(
            (
                'answer | {"path": "cloud"}',
                'local | {"prediction": answer["prediction"], "path": "cloud"}',
            )
        ),
        "confidence must be 0.97, of the model that answered",
    ),
    "nothing at the end": Wrong(
        _policy(('    return local | {"path": "degraded"}\n', "")), "returned None"
    ),
    "marks the cached dict": Wrong(
        _policy(
            (
                'return answer | {"path": "cloud"}',
                'answer["path"] = "cloud"\n            return answer',
            ),
            ('return known | {"path": "cache"}', 'known["path"] = "cache"\n        return known'),
        ),
        "you changed the dict in the cache",
    ),
    "asks twice": Wrong(
        _policy(('return local | {"path": "local"}', 'return device(row) | {"path": "local"}')),
        "once is enough",
    ),
}


# ------------------------------------------------------------------------------------ an int8 delta


_CHANGE, _SCALE = "(new[name] - old[name]).numpy()", "np.float32(np.abs(change).max() / 127)"
_CODES = "np.rint(change / scale) if scale > 0 else np.zeros_like(change)"
_PARTS = "[scale.tobytes(), codes.astype(np.int8).tobytes()]"
_PACKED = 'zlib.compress(b"".join(parts))'


_encodes = partial(wrong, "encode-delta")


WRONG["encode-delta"] = {
    "not compressed": _encodes("not what zlib.compress makes", (_PACKED, 'b"".join(parts)')),
    "a list": _encodes("return the bytes that travel", (_PACKED, "parts")),
    "no scale": _encodes("there is no scale", (_PARTS, "[codes.astype(np.int8).tobytes()]")),
    "codes of four bytes": _encodes(
        "four bytes for each weight", ("codes.astype(np.int8)", "codes")
    ),
    "codes of eight bytes": _encodes("eight bytes for each weight", ("np.int8", "np.int64")),
    "codes of two bytes": _encodes("two bytes for each weight", ("np.int8", "np.int16")),
    "a scale of eight bytes": _encodes(
        "make it an np.float32", (_SCALE, "np.float64(np.abs(change).max() / 127)")
    ),
    "the largest change": _encodes(
        "the largest change itself", (_SCALE, "np.float32(np.abs(change).max())")
    ),
    "128 steps": _encodes("int8 ends at 127", (" / 127)", " / 128)")),
    "255 steps": _encodes("codes have a sign", (" / 127)", " / 255)")),
    "the largest rise": _encodes("of the largest rise", ("np.abs(change).max()", "change.max()")),
    "the mean change": _encodes(
        "of the mean change", ("np.abs(change).max()", "np.abs(change).mean()")
    ),
    "the new weights": _encodes("not of what changed", (_CHANGE, "new[name].numpy()")),
    "one scale for all": _encodes(
        "one for all tensors",
        (_SCALE, "np.float32(max(np.abs((new[n] - old[n]).numpy()).max() for n in new) / 127)"),
    ),
    "the inverse": _encodes(
        "what is sent is the size of a step",
        (_SCALE, "np.float32(127 / np.abs(change).max())"),
        ("change / scale", "change * scale"),
    ),
    "in the order of the dict": _encodes("in the order of the dict", ("sorted(new)", "new")),
    "cut off": _encodes("cut off behind the point", ("np.rint(", "(")),
    "rounded down": _encodes("rounded down", ("np.rint(", "np.floor(")),
    "the wrong way round": _encodes(
        "the device would go the other way", (_CHANGE, "(old[name] - new[name]).numpy()")
    ),
    "no sign": _encodes(
        "a weight that falls would rise",
        ("np.rint(", "np.abs(np.rint("),
        (" if scale", ") if scale"),
    ),
    "not divided": _encodes("divide by the scale first", ("change / scale", "change")),
    "divides by nothing": _encodes(
        "change / scale is 0 / 0", (_CODES, "np.nan_to_num(np.rint(change / scale), nan=9)")
    ),
    "changes the new version": _encodes(
        "encode_delta changed new", (_CHANGE, "new[name].sub_(old[name]).numpy()")
    ),
}


_decodes = partial(wrong, "decode-delta")
_NEW = "old[name] + torch.from_numpy(change).reshape(shape)"


WRONG["decode-delta"] = {
    "no bound": _decodes("return two dicts", ("return state, bound", "return state")),
    "one bound for all": _decodes(
        "bound must be a dict", ("return state, bound", "return state, max(bound.values())")
    ),
    "an array": _decodes("a server loads tensors", (_NEW, f"({_NEW}).numpy()")),
    "flat": _decodes(
        "reshape what you read", (_NEW, "old[name].reshape(-1) + torch.from_numpy(change)")
    ),
    "float64": _decodes("the server takes torch.float32", (_NEW, f"({_NEW}).double()")),
    "what changed alone": _decodes(
        "a delta starts from the old weights", (_NEW, _NEW.removeprefix("old[name] + "))
    ),
    "the other way": _decodes("old minus the change", (_NEW, _NEW.replace("+", "-"))),
    "without the scale": _decodes(
        "a code counts scales", ("astype(np.float32) * scale", "astype(np.float32)")
    ),
    "over 127": _decodes(
        "by the tensor's own scale", ("astype(np.float32) * scale", "astype(np.float32) / 127")
    ),
    "no sign": _decodes("a code of -1 became 255", ("np.int8, count", "np.uint8, count")),
    "in the order of the dict": _decodes("they come sorted by name", ("sorted(old)", "old")),
    "always the first": _decodes(
        "each begins where the one before has ended", ("        at += 4 + count\n", "")
    ),
    "forgets the scale's bytes": _decodes(
        "each begins where the one before",
        ("at += 4 + count", "at += count"),
        ("plain, at =", "plain, at ="),
    ),
    "not decompressed": _decodes("zlib.decompress first", ("zlib.decompress(data)", "data")),
    "a whole scale": _decodes("at most half a step", ("float(scale) / 2", "float(scale)")),
    "the largest change": _decodes(
        "off by half a step", ("float(scale) / 2", "float(abs(change).max())")
    ),
    "half of the largest change": _decodes(
        "a step is a 127th", ("float(scale) / 2", "float(scale) * 127 / 2")
    ),
    "nothing is lost": _decodes("do not hit every change", ("float(scale) / 2", "0.0")),
    "in place": _decodes(
        "decode_delta changed old",
        (_NEW, "old[name].add_(torch.from_numpy(change).reshape(shape)).clone()"),
    ),
}
