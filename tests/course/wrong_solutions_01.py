"""Notebook 01: the average, publish and promote; plausible wrong solutions. Registers into
``wrong_solutions``."""

from wrong_solutions import WRONG, wrong

_SHARE, _ZERO = "(count / total)", "torch.zeros_like(first, dtype=torch.float64)"
_ADD = "mean += update[name].double() * (count / total)"
WRONG["fedavg"] = {
    "plain mean": wrong(
        "fedavg", "the plain mean: a client with 10 samples", (_SHARE, "(1 / len(updates))")
    ),
    "never divided": wrong("fedavg", "or the model grows with every round", (_SHARE, "count")),
    "divided by the clients": wrong(
        "fedavg", "divided by the number of clients", (_SHARE, "(count / len(updates))")
    ),
    "the wrong way round": wrong(
        "fedavg", "FEWER samples counts more", (_SHARE, "((total - count) / total)")
    ),
    "the last update": wrong(
        "fedavg", "the last update: add the others", (_ADD, "mean = update[name].double()")
    ),
    "the first client only": wrong(
        "fedavg",
        "without the second client",
        ("        state[name]", "            break\n        state[name]"),
    ),
    "sums in float32": wrong(
        "fedavg", "digits that float32 loses", (_ZERO, "torch.zeros_like(first)"), (".double()", "")
    ),
    "stays float64": wrong(
        "fedavg", "came back as torch.float64", ("mean.to(first.dtype)", "mean")
    ),
    "changes an update": wrong(
        "fedavg", "changed an update that it was given", (_ZERO, "first.mul_(0)")
    ),
    "one tensor only": wrong(
        "fedavg",
        "lacks .*average every tensor",
        ("    return state", "        break\n    return state"),
    ),
    "one number for all": wrong(
        "fedavg",
        "average over the clients, number by number",
        ("mean.to(first.dtype)", "mean.mean().float()"),
    ),
    "a list": wrong(
        "fedavg",
        "return a dict, name -> mean tensor",
        ("return state", "return list(state.values())"),
    ),
    "plain numbers": wrong(
        "fedavg", "return tensors, as the updates are", ("mean.to(first.dtype)", "mean.tolist()")
    ),
    "a typing error": wrong("fedavg", "raised KeyError", ("update[name]", "update['weights']")),
}

_WRITE, _SYNC = '    disk.write("staged", digest.encode() + data)\n', '    disk.sync("staged")\n'
_RENAME, _NAMES = '    disk.rename("staged", str(version))\n', "    disk.sync_names()\n"
_STORED = "digest.encode() + data"
_LARGEST = "max(numbers, default=0)"
WRONG["publish"] = {
    "under its own name": wrong(
        "publish",
        "version 3 was there with .* bytes: write and sync another name",
        (_WRITE, _WRITE.replace('"staged"', "str(version)")),
        (_SYNC, "    disk.sync(str(version))\n"),
        (_RENAME, ""),
    ),
    "never synced": wrong("publish", "version 3 was there with", (_SYNC, "")),
    "renamed before it is synced": wrong(
        "publish",
        "version 3 was there with",
        (_SYNC, ""),
        (_RENAME, _RENAME + "    disk.sync(str(version))\n"),
    ),
    "names never synced": wrong("publish", r"safe only after disk.sync_names\(\)", (_NAMES, "")),
    "names synced too early": wrong(
        "publish", r"safe only after disk.sync_names\(\)", (_NAMES, ""), (_RENAME, _NAMES + _RENAME)
    ),
    "counts the files": wrong(
        "publish", "is not counted|returned", (_LARGEST, "len(disk.names())")
    ),
    "counts the versions": wrong(
        "publish", "one more than the largest is 6", (_LARGEST, "len(numbers)")
    ),
    "largest as text": wrong(
        "publish", "compare numbers, not text", (_LARGEST, "int(max(map(str, numbers), default=0))")
    ),
    "always one": wrong("publish", "overwrote version 1", (_LARGEST, "0")),
    "from zero": wrong(
        "publish", "on an empty disk, publish returned 0", (_LARGEST, "max(numbers, default=-1)")
    ),
    "no digest": wrong("publish", "holds the data alone", (_STORED, "data")),
    "a raw digest": wrong(
        "publish",
        "32 raw bytes",
        ("digest = sha256(data).hexdigest()", "digest = sha256(data).digest()"),
        ("digest.encode()", "digest"),
    ),
    "digest at the end": wrong(
        "publish", "stands behind the data", (_STORED, "data + digest.encode()")
    ),
    "digest of something else": wrong(
        "publish",
        "is not the SHA-256 of the data",
        ("digest = sha256(data)", "digest = sha256(b'')"),
    ),
    "returns nothing": wrong(
        "publish", "returned None: return the number", ("    return version", "    return None")
    ),
    "returns the name": wrong(
        "publish", "returned '1': return the number", ("return version", "return str(version)")
    ),
    "default taken for a version": wrong(
        "publish", "raised ValueError", (" if name.isdecimal()", "")
    ),
    "refuses after a crash": wrong(
        "publish",
        r"the power failed in .*, and|publish\(disk, data\) raised ValueError",
        (
            _WRITE,
            "    if 'staged' in disk.names():\n        raise ValueError('somebody is publishing')\n"
            + _WRITE,
        ),
    ),
}

_KNOWN = "if str(version) not in disk.names():"
_PUT, _SAFE = (
    '    disk.write("default.new", str(version).encode())\n',
    '    disk.sync("default.new")\n',
)
_TEXT = "str(version).encode()"
_MOVE = '    disk.rename("default.new", "default")\n'
WRONG["promote"] = {
    "in place": wrong(
        "promote",
        "default held b'': write the number to another file",
        (_PUT, _PUT.replace("default.new", "default")),
        (_SAFE, '    disk.sync("default")\n'),
        (_MOVE, ""),
    ),
    "never synced": wrong("promote", "default held b''", (_SAFE, "")),
    "synced after the rename": wrong(
        "promote", "default held b''", (_SAFE, ""), (_MOVE, _MOVE + '    disk.sync("default")\n')
    ),
    "names never synced": wrong(
        "promote", r"a rename is safe only after disk.sync_names\(\)", (_NAMES, "")
    ),
    "old one out of the way": wrong(
        "promote",
        "there was no default any more",
        (
            _MOVE,
            '    if "default" in disk.names():\n        disk.rename("default", "default.old")\n'
            + _MOVE,
        ),
    ),
    "moves the version": wrong(
        "promote",
        "version is gone|default holds",
        (_MOVE, '    disk.rename(str(version), "default")\n'),
    ),
    "trusts the caller": wrong(
        "promote", "there is no version 9: every request would fail", (_KNOWN, "if False:")
    ),
    "another error": wrong(
        "promote", "raise NotFoundError", ("raise NotFoundError", "raise ValueError")
    ),
    "looks too late": wrong(
        "promote",
        "look before you write",
        ("    if str(version) not", _PUT + "    if str(version) not"),
    ),
    "one too far": wrong(
        "promote", "write the number as text, '2'", (_TEXT, "str(version + 1).encode()")
    ),
    "a raw byte": wrong("promote", "write the number as text", (_TEXT, "bytes([version])")),
    "forgets the rename": wrong("promote", "default is still b'1'", (_MOVE, "")),
    "needs an alias": wrong(
        "promote",
        "without an alias raised FileNotFoundError",
        (_PUT, '    disk.read("default")\n' + _PUT),
    ),
}
