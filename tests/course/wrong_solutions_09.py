"""Notebook 09: int8 by hand, a mask, a structured cut, softened targets, and the proof; plausible
wrong solutions.

Imported by ``wrong_solutions``, which says what the tables hold.
"""

from functools import partial

from wrong_solutions import WRONG, Wrong, edited, wrong

_STEPS, _SCALE = "steps, least = 255, -128", "scale = (high - low) / steps"
_LOW = "low = np.minimum(values.min(axis=axis, keepdims=True), 0)"
_ZERO = "np.round(least - low / self.scale)"
_PLACES = "np.round(values / self.scale) + self.zero_point"
_CLIP = "np.clip(places, least, 127)"
_HIGH = "            high = np.maximum(high, -low)\n"
_BACK = "(self.q - self.zero_point).astype(np.float32) * self.scale"
_int8 = partial(wrong, "int8-by-hand")


WRONG["int8-by-hand"] = {
    "256 steps": _int8("256 numbers have 255 steps", (_STEPS, "steps, least = 256, -128")),
    "127 steps": _int8("the range over 127", (_STEPS, "steps, least = 127, -128")),
    "always symmetric": _int8(
        "wastes what lies below", ("if symmetric:", "if True:"), ("254, -127", "254, -127")
    ),
    "from zero": _int8("the range begins at the smallest", (_SCALE, "scale = high / steps")),
    "reciprocal": _int8("what one step is worth", (_SCALE, "scale = steps / (high - low)")),
    "zero point not rounded": _int8(
        "must be a whole number", (f"{_ZERO}.astype(np.int32)", "least - low / self.scale")
    ),
    "zero point's sign": _int8(
        "with the wrong sign", (_ZERO, "-np.round(least - low / self.scale)")
    ),
    "no zero point": _int8("0: the symmetric one", (_ZERO, "0 * low")),
    "uint8": _int8("int8 begins at -128", (_ZERO, "np.round(-low / self.scale)")),
    "zero outside the range": _int8(
        "let the range reach 0", (_LOW, "low = values.min(axis=axis, keepdims=True)")
    ),
    "cuts off": _int8("round, astype cuts", (_PLACES, "values / self.scale + self.zero_point")),
    "wraps around": _int8("clip before astype", (_CLIP, "places.astype(np.int64)")),
    "float32 all the way": _int8(
        "one byte a number", (f"{_CLIP}.astype(np.int8)", f"{_CLIP}.astype(np.float32)")
    ),
    "dequantises without the zero point": _int8(
        "subtract zero_point", (_BACK, "self.q.astype(np.float32) * self.scale")
    ),
    "float64": _int8(
        "compute with float32",
        (_BACK, "(self.q - self.zero_point) * self.scale.astype(np.float64)"),
    ),
    "symmetric by the largest value": _int8("-2.54 is larger", (_HIGH, "")),
    "128 below": _int8(
        "the largest magnitude over 128",
        ("steps, least = -high, 254, -127", "steps, least = -high, 256, -128"),
    ),
    "symmetric in 255": _int8(
        "without -128 there are 254",
        ("steps, least = -high, 254, -127", "steps, least = -high, 255, -128"),
    ),
    "per column": _int8("one a column", ("axis = 1 if", "axis = 0 if")),
    "per_row ignored": _int8(
        "one scale for both rows", ("axis = 1 if per_row else None", "axis = None")
    ),
    "a flat scale": _int8(
        r"scale has the shape \(2,\)",
        (
            _PLACES,
            "np.round(values / self.scale) + self.zero_point\n        self.scale = self.scale.squeeze()",
        ),
    ),
    "a row of zeros": _int8(
        "has the scale 0",
        ("np.where(scale > 0, scale, 1).astype(np.float32)", "scale.astype(np.float32)"),
    ),
    "in place": _int8(
        "are the model's own",
        (_PLACES, "np.round(values.__itruediv__(self.scale)) + self.zero_point"),
    ),
}

_ABS, _CHOSEN = "w.abs().flatten() for w", "magnitudes.argsort()[:gone]"
_GONE, _ONES = "round(share * len(magnitudes))", "torch.ones(len(magnitudes), dtype=torch.bool)"
_RETURNED = "{name: part.view_as(w) for (name, w), part in pairs}"
_mask = partial(wrong, "magnitude-mask")
_START = "    magnitudes = torch.cat"
_EACH = """\
    if len(weights) > 1:
        return {n: magnitude_masks({n: w}, share)[n] for n, w in weights.items()}
"""


WRONG["magnitude-mask"] = {
    "values": _mask("compare magnitudes, not values", (_ABS, "w.flatten() for w")),
    "the largest go": _mask(
        "the two largest went", (_CHOSEN, "magnitudes.argsort(descending=True)[:gone]")
    ),
    "upside down": _mask(
        "True is what stays",
        (_ONES, "~torch.ones(len(magnitudes), dtype=torch.bool)"),
        ("] = False", "] = True"),
    ),
    "each layer": _mask("was each layer judged by itself", (_START, _EACH + _START)),
    "a threshold": _mask(
        "takes all that are equal",
        (
            f"stays[{_CHOSEN}] = False",
            "stays = magnitudes > (magnitudes.sort().values[gone - 1] if gone else -1)",
        ),
    ),
    "rounds down": _mask("at a share of 0.7", (_GONE, "int(share * len(magnitudes))")),
    "the share stays": _mask(
        "of 20 weights", (_GONE, "len(magnitudes) - round(share * len(magnitudes))")
    ),
    "floats": _mask("bool, True where", (_ONES, "torch.ones(len(magnitudes))")),
    "masked weights": _mask(
        "bool, True where", (_RETURNED, "{name: w * part.view_as(w) for (name, w), part in pairs}")
    ),
    "flat": _mask("has another shape", (_RETURNED, "{name: part for (name, w), part in pairs}")),
    "a list": _mask(
        "a dict with the names", (_RETURNED, "[part.view_as(w) for (name, w), part in pairs]")
    ),
    "changes the weights": _mask(
        "the weights are the caller's", (_ABS, "w.abs_().flatten() for w")
    ),
}

_IN, _BIAS_CUT = "[:, inputs], bias[units]", "bias[units]))\n"
_NORMS = "incoming * after.norm(dim=0)"
_cut = partial(wrong, "cut-units")


WRONG["cut-units"] = {
    "the next layer's columns": _cut(
        "the next one still expects all",
        ("weight[units][:, inputs]", "weight[units]"),
        ("weight[:, inputs], bias)", "weight, bias)"),
    ),
    "biases stay": _cut("a bias has not as many", ("bias[units]))", "bias))")),
    "first biases": _cut("of the same units", ("bias[units]))", "bias[: len(units)]))")),
    "first columns": _cut(
        "of the same units", ("weight[:, inputs], bias)", "weight[:, : len(inputs)], bias)")
    ),
    "without the last": _cut(
        "the last one stays", ("    smaller.append((weight[:, inputs], bias))\n", "")
    ),
    "classes cut": _cut(
        "classes are no hidden units", ("weight[:, inputs], bias)", "weight[:2, inputs], bias[:2])")
    ),
    "rounds down": _cut(
        r"left \(6, 9\)", ("round(len(score) * (1 - share))", "int(len(score) * (1 - share))")
    ),
    "the share stays": _cut("hidden units left", ("(1 - share)", "share")),
    "none left": _cut(
        "hidden units left",
        ("max(1, round(len(score) * (1 - share)))", "round(len(score) * (1 - share))"),
    ),
    "the weakest stay": _cut(
        "of the same units|other units", ("score.topk(number)", "(-score).topk(number)")
    ),
    "incoming only": _cut("look at both", (_NORMS, "incoming")),
    "outgoing only": _cut("is the outgoing weight all", (_NORMS, "after.norm(dim=0)")),
    "without the bias": _cut(
        "2's bias of 6 forgotten", ("torch.cat([weight, bias[:, None]], dim=1)", "weight")
    ),
    "a sum": _cut("and multiply", (_NORMS, "incoming + after.norm(dim=0)")),
    "not sorted": _cut("in this order: sort", (".indices.sort().values", ".indices")),
    "scores by column": _cut("raised", ("dim=1).norm(dim=1)", "dim=1).norm(dim=0)")),
    "sets to zero": _cut(
        "the layers that were given have changed",
        (
            "    weight, bias = layers[-1]\n",
            "    weight, bias = layers[-1]\n    layers[0][0][0] = 0\n",
        ),
    ),
}

_TARGETS, _LOGS = (
    "torch.softmax(teacher.detach() / temperature, dim=1)",
    "torch.log_softmax(student / temperature, dim=1)",
)
_SOFT = "-(targets * logs).sum(dim=1).mean() * temperature**2"
_MIX = "(1 - label_share) * soft + label_share * hard"
_loss = partial(wrong, "softened-targets")


WRONG["softened-targets"] = {
    "sign": _loss("negative", (_SOFT, _SOFT[1:])),
    "sum of rows": _loss(
        "the sum of the rows", (_SOFT, "-(targets * logs).sum() * temperature**2")
    ),
    "mean of everything": _loss(
        "a mean over rows and classes", (_SOFT, "-(targets * logs).mean() * temperature**2")
    ),
    "the best class": _loss(
        "only the winner",
        (_TARGETS, "torch.nn.functional.one_hot(teacher.argmax(dim=1), teacher.shape[1]).float()"),
    ),
    "exchanged": _loss(
        "with teacher and student exchanged",
        (_TARGETS, "torch.softmax(student / temperature, dim=1)"),
        (_LOGS, "torch.log_softmax(teacher.detach() / temperature, dim=1)"),
    ),
    "raw targets": _loss("raw logits as targets", (_TARGETS, "teacher.detach() / temperature")),
    "over the rows": _loss(
        "dim=1 are the classes",
        (_TARGETS, _TARGETS.replace("dim=1", "dim=0")),
        (_LOGS, _LOGS.replace("dim=1", "dim=0")),
    ),
    "student not softened": _loss(
        "the student is not softened", (_LOGS, "torch.log_softmax(student, dim=1)")
    ),
    "teacher not softened": _loss(
        "the teacher is not softened", (_TARGETS, "torch.softmax(teacher.detach(), dim=1)")
    ),
    "multiplied": _loss(
        "divide", (_TARGETS, _TARGETS.replace(" / ", " * ")), (_LOGS, _LOGS.replace(" / ", " * "))
    ),
    "probabilities divided": _loss(
        "nothing is softened",
        (_TARGETS, "torch.softmax(teacher.detach(), dim=1) / temperature"),
        (_LOGS, "torch.log_softmax(student, dim=1)"),
    ),
    "no factor": _loss("it falls as 1 / T", (_SOFT, "-(targets * logs).sum(dim=1).mean()")),
    "T once": _loss(
        "the factor is T\\^2, not T", (_SOFT, "-(targets * logs).sum(dim=1).mean() * temperature")
    ),
    "labels forgotten": _loss("without the labels", (_MIX, "soft")),
    "shares exchanged": _loss(
        "with the shares exchanged", (_MIX, "label_share * soft + (1 - label_share) * hard")
    ),
    "soft part whole": _loss("its full weight", (_MIX, "soft + label_share * hard")),
    "softened labels": _loss(
        "labels at temperature 1", ("    logs = torch.log_softmax(student, dim=1)\n", "")
    ),
    "T for the labels": _loss(
        "on the labels' part",
        (_MIX, "(1 - label_share) * soft + label_share * hard * temperature**2"),
    ),
    "teacher learns": _loss("a gradient for the teacher", ("teacher.detach()", "teacher")),
    "no gradient": _loss(
        "knows nothing of the student",
        (_LOGS, "torch.log_softmax(student.detach() / temperature, dim=1)"),
    ),
    "log of softmax": _loss(
        "log\\(0\\)", (_LOGS, "torch.softmax(student / temperature, dim=1).log()")
    ),
    "a number": _loss(
        "backward\\(\\) can start", ("        return soft\n", "        return soft.item()\n")
    ),
    "a loss for each row": _loss(
        "one number", (_SOFT, "-(targets * logs).sum(dim=1) * temperature**2")
    ),
}

_MAKE = 'quantise(registry, "digits", before, "static", clients)'
_SMALLER, _FASTER = "size[before] / size[after]", "np.median(turn[before] / turn[after])"
_TURN, _ALL = "np.median(us, axis=1)", "100 * np.concatenate(right).mean()"
_POINTS, _WORST = "overall[after] - overall[before]", "worst[after] - worst[before]"
_LOST, _MIN = (
    'min(report["points"], report["worst_points"]) < -budget',
    "min(part.mean() for part in right)",
)


_proves = partial(edited, "quantise-and-prove")


WRONG["quantise-and-prove"] = {
    "dynamic": Wrong(
        _proves((_MAKE, 'quantise(registry, "digits", before)')), "made by 'quantised, dynamic'"
    ),
    "calibrates on the judges": Wrong(
        _proves((_MAKE, _MAKE.replace("clients", "np.concatenate([c.test_x for c in clients])"))),
        "held-out rows",
    ),
    "calibrates on one client": Wrong(
        _proves((_MAKE, _MAKE.replace("clients", "clients[:1]"))), "give all clients"
    ),
    "promotes first": Wrong(
        _proves((_MAKE, _MAKE[:-1] + ', alias="default")')), "nothing was proven yet"
    ),
    "the old version": Wrong(
        _proves(('"version": after', '"version": before')), "the one that you started from"
    ),
    "a manifest": Wrong(
        _proves(('"version": after', '"version": registry.manifest("digits", after)')),
        "a whole manifest",
    ),
    "size upside down": Wrong(
        _proves((_SMALLER, "size[after] / size[before]")), "smaller' is the other way round"
    ),
    "share saved": Wrong(
        _proves((_SMALLER, "1 - size[after] / size[before]")), "the share that was saved"
    ),
    "speed upside down": Wrong(
        _proves((_FASTER, "np.median(turn[after] / turn[before])")),
        "faster' is the other way round",
    ),
    "means": Wrong(_proves((_TURN, "us.mean()")), "a ratio of means: one slow call in each turn"),
    "means in each turn": Wrong(_proves((_TURN, "us.mean(axis=1)")), "medians within the turn"),
    "medians over all turns": Wrong(_proves((_TURN, "np.median(us)")), "compare within each turn"),
    "best turn": Wrong(_proves((_FASTER, "max(turn[before] / turn[after])")), "the best turn"),
    "mean of the ratios": Wrong(
        _proves((_FASTER, "np.mean(turn[before] / turn[after])")), "take their median"
    ),
    "the wrong axis": Wrong(_proves((_TURN, "np.median(us, axis=0)")), "and the two versions give"),
    "times only the new one": Wrong(
        _proves(("measure([before, after])", "{**measure([before]), **measure([after])}")),
        "time both versions",
    ),
    "mean over clients": Wrong(
        _proves((_ALL, "100 * np.mean([part.mean() for part in right])")),
        "all held-out rows count alike",
    ),
    "training rows": Wrong(
        _proves(
            (
                "answers(version, client.test_x) == client.test_y",
                "answers(version, client.train_x) == client.train_y",
            )
        ),
        "use the held-out rows",
    ),
    "agreement": Wrong(
        _proves(
            (
                "answers(version, client.test_x) == client.test_y",
                "answers(version, client.test_x) == answers(before, client.test_x)",
            )
        ),
        "agreeing with a wrong answer",
    ),
    "a share": Wrong(_proves((_ALL, _ALL[6:])), "in percentage points it is 100 times as much"),
    "sign": Wrong(
        _proves((_POINTS, "overall[before] - overall[after]")),
        "points is .*: a loss must be negative",
    ),
    "worst loss": Wrong(
        _proves(
            (
                f"worst[version] = 100 * {_MIN}",
                "worst[version] = 100 * np.array([part.mean() for part in right])",
            ),
            (_WORST, f"({_WORST}).min()"),
        ),
        "LOST the most",
    ),
    "the same client": Wrong(
        _proves(
            (
                f"worst[version] = 100 * {_MIN}",
                "worst[version] = 100 * np.array([part.mean() for part in right])",
            ),
            (_WORST, f"({_WORST})[worst[before].argmin()]"),
        ),
        "worst before: another one may be the worst now",
    ),
    "the best client": Wrong(
        _proves((_MIN, _MIN.replace("min", "max"))), "worst_points is .*, and the two versions"
    ),
    "speed is all": Wrong(_proves((_LOST, "False")), "fell by more than the budget"),
    "only the mean": Wrong(_proves((_LOST, 'report["points"] < -budget')), "the worst client pays"),
    "slower is fine": Wrong(
        _proves(('report["faster"] > 1 and not lost', "not lost")), "it is slower"
    ),
    "no loss at all": Wrong(
        _proves((_LOST, _LOST.replace("-budget", "0"))), "keeps the budget for everybody"
    ),
    "words": Wrong(
        _proves(('bool(report["faster"] > 1 and not lost)', '"no" if lost else "yes"')),
        "say True or False",
    ),
    "a key is missing": Wrong(
        _proves(
            ('    report["worst_points"] = ', '    report["worst"] = '),
            ('report["worst_points"])', 'report["worst"])'),
        ),
        "a dict with the keys",
    ),
}
