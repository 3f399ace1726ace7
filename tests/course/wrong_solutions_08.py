"""The exercises of notebook 08, batch the heads and choose a head: solutions, checks, and what
wrong ones are told.

Imported by ``wrong_solutions``, which says what the tables hold.
"""

from functools import partial

from wrong_solutions import WRONG, Wrong, wrong

_OWN = "weights[slots]  # [N, D + 1, C]: a copy of this batch's heads"
_PRODUCT = "torch.bmm(features[:, None], own[:, :-1])"
_ANSWER = "product[:, 0] + own[:, -1]"
_LOOP = """\
import torch


def batched_heads(features, weights, slots):
    {}
"""


_wrong = partial(wrong, "batch-heads")


WRONG["batch-heads"] = {
    "the loop": Wrong(
        _LOOP.format(
            "return torch.stack([x @ weights[k, :-1] + weights[k, -1] for x, k in zip(features, slots)])"
        ),
        "a loop over the rows; gather",
    ),
    "a loop without Python": Wrong(
        _LOOP.format(
            "return torch.cat(list(map(torch.matmul, features[:, None], weights[slots][:, :-1]))) + weights[slots, -1]"
        ),
        "64 rows take",
    ),
    "a loop in numpy": Wrong(
        _LOOP.format(
            "w = weights.numpy()\n    return torch.from_numpy(np.array("
            "[x @ w[k, :-1] + w[k, -1] for x, k in zip(features.numpy(), slots.tolist())]))"
        ),
        "steps of Python",
    ),
    "a loop over the rows whoever they are": Wrong(
        _LOOP.format(
            "out = torch.empty(len(slots), weights.shape[2])\n    for i in range(len(slots)):\n        "
            "out[i] = features[i] @ weights[slots[i], :-1] + weights[slots[i], -1]\n    return out"
        ),
        "a loop over the rows; gather",
    ),
    "grouped by client": Wrong(
        _LOOP.format(
            "out = torch.empty(len(slots), weights.shape[2])\n    for k in slots.unique():\n        mine = slots == k\n"
            "        out[mine] = features[mine] @ weights[k, :-1] + weights[k, -1]\n    return out"
        ),
        "a loop over the clients of a batch",
    ),
    "a loop over all heads": Wrong(
        _LOOP.format(
            "out = torch.zeros(len(slots), weights.shape[2])\n    for k, head in enumerate(weights):\n"
            "        out = torch.where((slots == k)[:, None], features @ head[:-1] + head[-1], out)\n    return out"
        ),
        "a loop over all heads",
    ),
    "all heads for every row": Wrong(
        _LOOP.format(
            "every = torch.einsum('nd,kdc->nkc', features, weights[:, :-1]) + weights[:, -1]\n"
            "    return every[torch.arange(len(slots)), slots]"
        ),
        "gather first",
    ),
    "copies the table": _wrong("gather first", (_OWN, "weights.clone()[slots]")),
    "no bias": _wrong("the bias is missing", (_ANSWER, "product[:, 0]")),
    "bias first": _wrong(
        "the bias is the last row",
        ("own[:, :-1]", "own[:, 1:]"),
        (_ANSWER, "product[:, 0] + own[:, 0]"),
    ),
    "the first heads": _wrong("row k got head number k", (_OWN, "weights[: len(slots)]")),
    "one head for all": _wrong(
        "every row got the head of the first row",
        (_OWN, "weights[slots[:1]].expand(len(slots), -1, -1)"),
    ),
    "an average": _wrong(
        "an average of heads",
        (_OWN, "weights[slots].mean(0, keepdim=True).expand(len(slots), -1, -1)"),
    ),
    "softmax": _wrong("return the logits", (_ANSWER, f"({_ANSWER}).softmax(dim=1)")),
    "sorted by client": _wrong(
        "answer k belongs to row k", (_ANSWER, f"({_ANSWER})[torch.argsort(slots)]")
    ),
    "one bias for all": _wrong(
        "the biases belong to other rows", (_ANSWER, "product[:, 0] + own[:1, -1]")
    ),
    "the neighbour's head": _wrong(
        "its own head, number", (_OWN, "weights[(slots + 1) % len(weights)]")
    ),
    "each client once": _wrong(
        "its own head, number 4",
        (_OWN, "weights[slots.unique()]"),
        (_PRODUCT, "(features[: len(own), None] @ own[:, :-1])"),
    ),
    "keeps an axis": _wrong("returned the shape", (_ANSWER, "product + own[:, -1:]")),
    "every row by every head of the batch": _wrong(
        "returned the shape",
        (_PRODUCT, "features @ own[:, :-1]"),
        (_ANSWER, "product + own[:, -1:]"),
    ),
    "forgets to return": _wrong("returned None", (f"return {_ANSWER}", _ANSWER)),
    "works on the caller's heads": _wrong(
        "belong to the caller", (f"own = {_OWN}", f"weights[:, -1] *= 1.0001\n    own = {_OWN}")
    ),
    "the wrong way round": _wrong(
        "raised RuntimeError", (_PRODUCT, "torch.bmm(own[:, :-1], features[:, None])")
    ),
}


_HITS = 'hits = {head: seen.sum() for head, seen in splits["held_out"].items()}'
_IF = '"own" if hits["own"] > hits["shared"] else "shared"'


_choice = partial(wrong, "choose-head")


WRONG["choose-head"] = {
    "on the training samples": _choice(
        "use the held-out ones", ('splits["held_out"]', 'splits["train"]')
    ),
    "on all samples": _choice(
        "leave the training samples out, also",
        (
            _HITS,
            "hits = {h: splits['train'][h].sum() + splits['held_out'][h].sum() for h in ('own', 'shared')}",
        ),
    ),
    "own if equal": _choice("equally good", ('hits["own"] > ', 'hits["own"] >= ')),
    "turned round": _choice("right less often", ('hits["own"] > ', 'hits["own"] < ')),
    "own if mostly right": _choice(
        "cem's heads are equally good",
        (_HITS, 'hits = {"own": splits["held_out"]["own"].mean(), "shared": 0.5}'),
    ),
    "everybody own": _choice("everybody got 'own'", (_IF, '"own"')),
    "one decision for all": _choice(
        "decide for each",
        (
            _HITS,
            'hits = {h: sum(s["held_out"][h].sum() for s in right.values()) for h in ("own", "shared")}',
        ),
    ),
    "leaves out who has no samples": _choice(
        "chose nothing for 'fay'",
        (
            f"        {_HITS}",
            f'        if not len(splits["held_out"]["own"]):\n            continue\n        {_HITS}',
        ),
    ),
    "own without samples": _choice(
        "fay has no held-out samples",
        (
            _IF,
            '"shared" if len(splits["held_out"]["own"]) and hits["own"] <= hits["shared"] else "own"',
        ),
    ),
    "a true or false": _choice("chose (True|False|np)", (_IF, 'hits["own"] > hits["shared"]')),
    "a list": _choice("return a dict", ("return choice", "return list(choice.values())")),
    "only a few points more": _choice(
        "ada got 'shared': of 5",
        ('hits["own"] > hits["shared"]', 'hits["own"] > hits["shared"] + 2'),
    ),
    "the wrong split's name": _choice("raised KeyError", ('splits["held_out"]', 'splits["test"]')),
}


# --------------------------------------------------------------------------------------- fit a head


_EMPTY = "    if len(labels) == 0:\n        return head\n"
_X, _P = (
    "torch.cat([features, torch.ones(len(features), 1)], dim=1)",
    "torch.softmax(x @ head, dim=1)",
)
_MEAN, _PULL = "x.T @ error / len(labels)", "pull * (head - shared)"


_fits = partial(wrong, "fit-head")


WRONG["fit-head"] = {
    "from zero": _fits("is all zeros: begin at", ("shared.clone()", "torch.zeros_like(shared)")),
    "from random": _fits("begin there", ("shared.clone()", "0.1 * torch.ones_like(shared)")),
    "up the hill": _fits("went up the hill", ("head -= rate", "head += rate")),
    "never moves": _fits(
        "the head does not move",
        ("        head -= rate * gradient\n", "        head - rate * gradient\n"),
    ),
    "one step": _fits("only one step was made", ("range(steps)", "range(min(steps, 1))")),
    "the sum": _fits("a client with many makes giant steps", (_MEAN, "x.T @ error")),
    "over samples and classes": _fits(
        "samples times classes", (_MEAN, "x.T @ error / error.numel()")
    ),
    "no bias": _fits("the bias never moves", ("torch.ones(", "torch.zeros(")),
    "the 1 comes first": _fits(
        "the bias is the last row",
        (_X, "torch.cat([torch.ones(len(features), 1), features], dim=1)"),
    ),
    "over the rows": _fits("its classes are; take dim=1", (_P, "torch.softmax(x @ head, dim=0)")),
    "logits": _fits("softmax makes probabilities", (_P, "x @ head")),
    "no pull": _fits("not pulled at all", (f" + {_PULL}", "")),
    "pulled to zero": _fits("pulled to zero", (_PULL, "pull * head")),
    "pushed away": _fits("pushed away", (_PULL, "pull * (shared - head)")),
    "twice the pull": _fits("twice as strong", (_PULL, "2 * pull * (head - shared)")),
    "the pull in the mean": _fits(
        "does not belong to the mean", (_PULL, "pull * (head - shared) / len(labels)")
    ),
    "no samples": _fits("for a client without samples the head holds NaN", (_EMPTY, "")),
    "no samples, no head": _fits(
        "fit_head returned NoneType", (_EMPTY, "    if len(labels) == 0:\n        return None\n")
    ),
    "works on the shared head": _fits("fit_head changed shared", ("shared.clone()", "shared")),
    "the head and the loss": _fits(
        "return the head, a tensor",
        (
            "        head -= rate * gradient\n    return head",
            "        head -= rate * gradient\n    return head, head.norm()",
        ),
    ),
    "the bias is dropped": _fits(
        "returned the shape",
        (
            "        head -= rate * gradient\n    return head",
            "        head -= rate * gradient\n    return head[:-1]",
        ),
    ),
    "overflow": _fits(
        "the head differs by up to",
        (_P, "(x @ head).exp() / (1 + (x @ head).exp().sum(1, keepdim=True))"),
    ),
}


# ------------------------------------------------------------------------------------ find the head


_NEW = """\
        if client not in self.slots:
            self.slots[client] = len(self.heads)
            self.heads.append(head)
"""
_SET = "        self.heads[self.slots[client]] = head.clone()\n"
_FITS, _SLOT = "self.trained_on[client] == self.body", 'self.slots[client] if word == "own" else 0'
_WORD = 'word = "own" if self.trained_on[client] == self.body else "stale"'
_RETURN = "return torch.tensor(slots, dtype=torch.int64), words"


_finds = partial(wrong, "head-table")


WRONG["head-table"] = {
    "no slot for the shared head": _finds(
        "ada is answered by the shared head, not by ada's head",
        ("self.slots[client] = len(self.heads)", "self.slots[client] = len(self.slots)"),
        (_SET, "        self.heads[-1] = head.clone()\n"),
    ),
    "strangers are not expected": _finds(
        "raised KeyError: 'cem'",
        ("            if client in self.slots:\n                word", "            word"),
    ),
    "the last slot for strangers": _finds(
        "cem (got slot -1|is answered by)", (_SLOT, 'self.slots[client] if word == "own" else -1')
    ),
    "the first client's head for strangers": _finds(
        "nobody else's", (_SLOT, 'self.slots[client] if word == "own" else 1')
    ),
    "a stale head answers": _finds(
        "ada is answered by ada's head, not by the shared head: a head belongs",
        (_SLOT, "self.slots.get(client, 0)"),
    ),
    "stale is not told": _finds(
        "that is 'stale'", (_WORD, 'word = "own" if ' + _FITS + ' else "unknown"')
    ),
    "all heads are own": _finds("a head belongs to the body", (_WORD, 'word = "own"')),
    "the first head stays": _finds(
        "ada has trained again", (_NEW, _NEW.replace("(head)", "(head.clone())")), (_SET, "")
    ),
    "every head gets a new slot": _finds(
        r"weights\(\) has 4",
        (_NEW, "        self.slots[client] = len(self.heads)\n        self.heads.append(head)\n"),
    ),
    "what the first head was trained on": _finds(
        "ada (is answered by the shared head|is answered by ada's)",
        ("self.trained_on[client] = trained_on", "self.trained_on.setdefault(client, trained_on)"),
    ),
    "the client's own tensor": _finds(
        "keep a copy", (_SET, "        self.heads[self.slots[client]] = head\n")
    ),
    "the caller's shared tensor": _finds("keep a copy", ("[shared.clone()]", "[shared]")),
    "slots as a list": _finds("give a tensor of int64", (_RETURN, "return slots, words")),
    "no rows, no dtype": _finds(
        "give a tensor of int64", (_RETURN, "return torch.tensor(slots), words")
    ),
    "each client once": _finds(
        "one for each row", ("for client in clients:", "for client in dict.fromkeys(clients):")
    ),
    "only the slots": _finds(
        "return slots and words", (_RETURN, "return torch.tensor(slots, dtype=torch.int64)")
    ),
    "the heads as a list": _finds(
        "must stack the heads", ("torch.stack(self.heads)", "self.heads")
    ),
    "forgets to return": _finds("returned None", (_RETURN, _RETURN.removeprefix("return "))),
}
