"""Notebook 10: the exercise "write the router", its solution and plausible wrong ones. Registers into
``wrong_solutions``."""

from functools import partial

from wrong_solutions import SOLUTIONS, WRONG, Wrong, edited

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
        _instead("    import random\n    return random.choices(list(weights), list(weights.values()))[0]\n"),
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
        _route((_DIGEST, ""), (_UNIFORM, "        uniform = (hash((text, key)) % 10**9 + 0.5) / 10**9\n")),
        "salts the hash of a str anew in every process",
    ),
    "ignores the weights": Wrong(_route((_SCORE, "score = uniform")), "you split evenly, whatever the weights are"),
    "weight times chance": Wrong(_route((_SCORE, "score = uniform * weight")), "by chance .* would do"),
    "the wrong power": Wrong(_route((_SCORE, "score = uniform**weight")), "by chance .* would do"),
    "the heaviest": Wrong(_route((_SCORE, "score = weight")), "the smaller weights get nobody"),
    "the same draw for all versions": Wrong(
        _route(('f"{version}/{client}"', 'f"{client}"')), "the smaller weights get nobody|by chance .* would do"
    ),
    "letters of the name": Wrong(
        _instead("    uniform = sum(client.encode() + key) % 100 / 100\n" + _INTERVALS), "by chance .* would do"
    ),
    "no key": Wrong(_route((", key=key)", ")")), "put the key into the hash"),
    "borders in a row": Wrong(_instead(_ONE_DRAW + _INTERVALS), "the same weights in another order"),
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
    "returns nothing": Wrong(_route(("    return best\n", "")), "returned None: return one of the versions"),
    "empties the weights": Wrong(
        _route(("    return best\n", "    weights.clear()\n    return best\n")), "changed the dict of weights"
    ),
    "latin letters only": Wrong(_route((".encode()", ".encode('ascii')")), "raised UnicodeEncodeError"),
}
