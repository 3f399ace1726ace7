"""Notebook 10: a router, an always-valid interval, a bandit; plausible wrong solutions. Registers
into ``wrong_solutions``."""

from functools import partial

from wrong_solutions import SOLUTIONS, WRONG, Wrong, edited, wrong

_BODY = SOLUTIONS["router"].split("    ### BEGIN SOLUTION\n")[1].split("    ### END SOLUTION\n")[0]
_DIGEST = "        digest = hashlib.blake2b(text, digest_size=8, key=key).digest()\n"
_UNIFORM = '        uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64\n'
_SCORE = "score = uniform ** (1 / weight)"
_ONE_DRAW = """\
    digest = hashlib.blake2b(client.encode(), digest_size=8, key=key).digest()
    uniform = int.from_bytes(digest, "big") / 2**64
"""
_INTERVALS = """\
    for version, weight in weights.items():
        uniform -= weight
        if uniform < 0:
            break
    return version
"""


_route = partial(edited, "router")


def _instead(body: str) -> str:
    return edited("router", (_BODY, body))


WRONG["router"] = {
    "throws dice": Wrong(
        _instead(
            "    import random\n    return random.choices(list(weights), list(weights.values()))[0]\n"
        ),
        "of 200 clients got another version when they came back",
    ),
    "takes turns": Wrong(
        _instead(
            "    route.turn = getattr(route, 'turn', 0) + 1\n"
            "    return list(weights)[route.turn * 7 // 3 % len(weights)]\n"
        ),
        "got another version when they came back",
    ),
    "remembers its dice": Wrong(
        _instead(
            "    import random\n    route.seen = getattr(route, 'seen', {})\n"
            "    own = random.Random()\n"
            "    return route.seen.setdefault(\n"
            "        (client, key, tuple(sorted(weights.items()))),\n"
            "        own.choices(list(weights), list(weights.values()))[0],\n"
            "    )\n"
        ),
        "% of the clients must get another version",
    ),
    "seeds everybody's dice": Wrong(
        _instead(
            "    import random\n    random.seed(client + key.hex())\n"
            "    return random.choices(list(weights), list(weights.values()))[0]\n"
        ),
        "the random numbers of the whole process, or seeded",
    ),
    "the built-in hash": Wrong(
        _route(
            (_DIGEST, ""),
            (_UNIFORM, "        uniform = (hash((text, key)) % 10**9 + 0.5) / 10**9\n"),
        ),
        "salts the hash of a str anew in every process",
    ),
    "ignores the weights": Wrong(
        _route((_SCORE, "score = uniform")), "you split evenly, whatever the weights are"
    ),
    "weight times chance": Wrong(
        _route((_SCORE, "score = uniform * weight")), "by chance .* would do"
    ),
    "the wrong power": Wrong(_route((_SCORE, "score = uniform**weight")), "by chance .* would do"),
    "the heaviest": Wrong(_route((_SCORE, "score = weight")), "the smaller weights get nobody"),
    "the same draw for all versions": Wrong(
        _route(('f"{version}/{client}"', 'f"{client}"')),
        "the smaller weights get nobody|by chance .* would do",
    ),
    "letters of the name": Wrong(
        _instead("    uniform = sum(client.encode() + key) % 100 / 100\n" + _INTERVALS),
        "by chance .* would do",
    ),
    "no key": Wrong(_route((", key=key)", ")")), "put the key into the hash"),
    "borders in a row": Wrong(
        _instead(_ONE_DRAW + _INTERVALS), "the same weights in another order"
    ),
    "borders in order": Wrong(
        _instead(_ONE_DRAW + _INTERVALS.replace("weights.items()", "sorted(weights.items())")),
        "of the clients must get another version, and",
    ),
    "hashes the weights, too": Wrong(
        _route(('f"{version}/{client}"', 'f"{version}/{client}/{sorted(weights.items())}"')),
        "20% of the clients must get another version",
    ),
    "returns the share": Wrong(
        _route(("best, highest = version,", "best, highest = weight,")), "return one of the ver"
    ),
    "returns nothing": Wrong(
        _route(("    return best\n", "")), "returned None: return one of the versions"
    ),
    "empties the weights": Wrong(
        _route(("    return best\n", "    weights.clear()\n    return best\n")),
        "changed the dict of weights",
    ),
    "latin letters only": Wrong(
        _route((".encode()", ".encode('ascii')")), "raised UnicodeEncodeError"
    ),
}


# ---------------------------------------------------------------- an interval that may be looked at


_always = partial(wrong, "always-valid")
_FIRST = "        ratio = variance / self.effect**2\n"
_ROOT = "np.sqrt(variance * (1 + ratio) * evidence)"
_SQUARES = "max(((sums - mean * counts) ** 2).sum(), 2)"
_VARIANCE = "squares / total**2 * clients / (clients - 1)"
_GAIN = "gain, half = new_mean - old_mean, self.half_width(old_variance + new_variance)"
_ENDS = "return gain - half, gain + half"
WRONG["always-valid"] = {
    "one look": _always("that is the interval for one look", (_ROOT, "1.96 * np.sqrt(variance)")),
    "one look at 0.2 %": _always(
        "every test would|compare with the formula", (_ROOT, "3.1 * np.sqrt(variance)")
    ),
    "no root": _always(
        "a team that peeks|take the root", (_ROOT, "variance * (1 + ratio) * evidence")
    ),
    "the whole width": _always("half of the interval, not all of it", (_ROOT, f"2 * {_ROOT}")),
    "no mixture": _always(
        r"the factor 1 \+ V / tau\^2 is missing", (_ROOT, "np.sqrt(variance * evidence)")
    ),
    "tau is not squared": _always(
        "tau is squared|a team that peeks",
        (_ROOT, "np.sqrt(variance * (1 + variance / self.effect) * evidence)"),
    ),
    "upside down": _always(
        "the other way round", ("(1 + ratio) * evidence", "(1 + 1 / ratio) * evidence")
    ),
    "evidence that falls": _always(
        "the evidence grows as the variance falls", ("1 + 1 / ratio", "1 + ratio")
    ),
    "half the evidence": _always(
        r"it is 2 ln\(1 / alpha\)|11% found a difference",
        ("2 * np.log(1 / self.alpha)", "np.log(1 / self.alpha)"),
    ),
    "decimal logarithms": _always(
        "natural logarithm|a team that peeks",
        ("2 * np.log(1 / self.alpha) + np.log(", "2 * np.log10(1 / self.alpha) + np.log10("),
    ),
    "alpha on both sides": _always(
        "both sides are in it already", ("np.log(1 / self.alpha)", "np.log(2 / self.alpha)")
    ),
    "a factor for safety": _always("every test would take longer", (_ROOT, f"1.5 * {_ROOT}")),
    "a number for many": _always(
        "one for each", (_FIRST, "        variance = np.max(variance)\n" + _FIRST)
    ),
    "numbers only": _always(
        "raised TypeError",
        ("evidence = 2 * np.log", "import math\n        evidence = 2 * np.log"),
        ("np.log(1 + ", "math.log(1 + "),
    ),
    "counts requests": _always(
        "that counts requests",
        (_VARIANCE, "mean * (1 - mean) / total"),
    ),
    "mean of means": _always(
        "each client's own mean with equal weight", ("sums.sum() / total", "(sums / counts).mean()")
    ),
    "k clients are enough": _always(
        r"the factor k / \(k - 1\) is missing", (" * clients / (clients - 1)", "")
    ),
    "the deviation": _always("that is the deviation", (_VARIANCE, f"np.sqrt({_VARIANCE})")),
    "n is not squared": _always("square of the number of rewards", ("total**2", "total")),
    "sums alone": _always(
        "asks more has more right answers", (_SQUARES, "max(((sums - sums.mean()) ** 2).sum(), 2)")
    ),
    "certain of those who agree": _always(
        "nobody is that certain", (_SQUARES, "((sums - mean * counts) ** 2).sum()")
    ),
    "the mean alone": _always("return two numbers", ("return mean, squares", "return squares")),
    "old minus new": _always(
        "a loss would look like a gain", ("new_mean - old_mean", "old_mean - new_mean")
    ),
    "high before low": _always(
        "return the low end first", (_ENDS, "return gain + half, gain - half")
    ),
    "middle and half": _always(
        "interval goes from|the middle of the interval", (_ENDS, "return gain, half")
    ),
    "half of the half": _always(
        "is half of the interval already", (_ENDS, "return gain - half / 2, gain + half / 2")
    ),
    "adds widths": _always(
        "adds two half widths",
        (
            "self.half_width(old_variance + new_variance)",
            "self.half_width(old_variance) + self.half_width(new_variance)",
        ),
    ),
    "subtracts variances": _always(
        "subtracted, they add", ("old_variance + new_variance", "abs(old_variance - new_variance)")
    ),
    "the new arm alone": _always(
        "only the new version's variance", ("old_variance + new_variance", "new_variance")
    ),
    "whether it is sure": _always("return its two ends", (_ENDS, "return gain - half > 0")),
}


# -------------------------------------------------------------------------------- Thompson sampling


_thompson = partial(wrong, "thompson")
_DRAW = "self.random.betavariate(1 + total, 1 + count - total)"
_BEST = "return max(draws, key=draws.get)"
_LEARN = "self.known = {arm: known.get(arm, (0, 0.0)) for arm in self.known}"
_GENERATOR = "self.random = random.Random(seed)"
_KNOWN = "self.known = dict.fromkeys(arms, (0, 0.0))"
WRONG["thompson"] = {
    "the best mean": _thompson(
        "you never ask it again|before any reward arm", (_DRAW, "total / count if count else 1.0")
    ),
    "the best mean, ties by chance": _thompson(
        "you never ask it again", (_DRAW, "(total / count if count else 0.5, self.random.random())")
    ),
    "the worst arm": _thompson(
        "the mirror image", (_DRAW, "self.random.betavariate(1 + count - total, 1 + total)")
    ),
    "the smallest draw": _thompson("the mirror image", (_BEST, "return min(draws, key=draws.get)")),
    "all answers are wrong ones": _thompson(
        "count - total, not all of them", (_DRAW, "self.random.betavariate(1 + total, 1 + count)")
    ),
    "too sure": _thompson(
        "forgets the 1",
        (
            _DRAW,
            "self.random.betavariate(max(total, 1e-9) if count else 1, max(count - total, 1e-9) if count else 1)",
        ),
    ),
    "no prior": _thompson(
        "raised ValueError", (_DRAW, "self.random.betavariate(total, count - total)")
    ),
    "proportional": _thompson(
        "proportional to the means",
        (
            _BEST,
            "means = [t / n if n else 1 for n, t in self.known.values()]\n"
            "        return self.random.choices(list(self.known), means)[0]",
        ),
    ),
    "an even split": _thompson(
        "the rewards change nothing", (_BEST, "return self.random.choice(list(draws))")
    ),
    "a tenth at random": _thompson(
        "each gets a third",
        (
            _BEST,
            "if self.random.random() < 0.1:\n            return self.random.choice(list(draws))\n"
            "        return max(self.known, key=lambda arm: self.known[arm][1] / max(self.known[arm][0], 1))",
        ),
    ),
    "whole rewards": _thompson(
        "counts in parts",
        (_DRAW, "self.random.betavariate(1 + int(total), 1 + count - int(total))"),
    ),
    "the draw itself": _thompson(
        "return the name of an arm", (_BEST, "return max(draws.values())")
    ),
    "a place": _thompson(
        "return the name of an arm", (_BEST, "return list(draws).index(max(draws, key=draws.get))")
    ),
    "adds up": _thompson(
        "count the first rewards twice",
        (
            _LEARN,
            "for arm, (count, total) in known.items():\n"
            "            n, s = self.known.get(arm, (0, 0.0))\n"
            "            self.known[arm] = n + count, s + total",
        ),
    ),
    "learns once": _thompson(
        "only the first call was taken",
        (_LEARN, f"if not any(count for count, _ in self.known.values()):\n            {_LEARN}"),
    ),
    "keeps what is not named": _thompson(
        "nothing is said of b",
        (_LEARN, "self.known |= {a: known[a] for a in self.known if a in known}"),
    ),
    "arms that it never had": _thompson(
        "return the name of an arm",
        (_LEARN, "self.known = {**dict.fromkeys(self.known, (0, 0.0)), **known}"),
    ),
    "every arm must be named": _thompson(
        "raised KeyError", (_LEARN, "self.known = {arm: known[arm] for arm in self.known}")
    ),
    "the whole process's dice": _thompson(
        "of the whole process", (_GENERATOR, "self.random = random")
    ),
    "seeds everybody's dice": _thompson(
        "of the whole process", (_GENERATOR, "random.seed(seed)\n        self.random = random")
    ),
    "no seed": _thompson(
        "two bandits with the same seed", (_GENERATOR, "self.random = random.Random()")
    ),
    "always the same seed": _thompson(
        "use the seed that is given", (_GENERATOR, "self.random = random.Random(0)")
    ),
    "shared by all": _thompson(
        "an arm of another bandit",
        ("    def __init__", "    known = {}\n\n    def __init__"),
        (_KNOWN, "self.known.update(dict.fromkeys(arms, (0, 0.0)))"),
        (_LEARN, "self.known.update({arm: known.get(arm, (0, 0.0)) for arm in self.known})"),
    ),
    "an arm that wins at first": _thompson(
        "before any reward arm", (_DRAW, f"{_DRAW} if count else 1.0")
    ),
}
