"""The exercises of notebook 08, batch the heads and choose a head: solutions, checks, and what wrong ones are told.

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
        _LOOP.format("return torch.stack([x @ weights[k, :-1] + weights[k, -1] for x, k in zip(features, slots)])"),
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
        "the bias is the last row", ("own[:, :-1]", "own[:, 1:]"), (_ANSWER, "product[:, 0] + own[:, 0]")
    ),
    "the first heads": _wrong("row k got head number k", (_OWN, "weights[: len(slots)]")),
    "one head for all": _wrong(
        "every row got the head of the first row", (_OWN, "weights[slots[:1]].expand(len(slots), -1, -1)")
    ),
    "an average": _wrong(
        "an average of heads", (_OWN, "weights[slots].mean(0, keepdim=True).expand(len(slots), -1, -1)")
    ),
    "softmax": _wrong("return the logits", (_ANSWER, f"({_ANSWER}).softmax(dim=1)")),
    "sorted by client": _wrong("answer k belongs to row k", (_ANSWER, f"({_ANSWER})[torch.argsort(slots)]")),
    "one bias for all": _wrong("the biases belong to other rows", (_ANSWER, "product[:, 0] + own[:1, -1]")),
    "the neighbour's head": _wrong("its own head, number", (_OWN, "weights[(slots + 1) % len(weights)]")),
    "each client once": _wrong(
        "its own head, number 4",
        (_OWN, "weights[slots.unique()]"),
        (_PRODUCT, "(features[: len(own), None] @ own[:, :-1])"),
    ),
    "keeps an axis": _wrong("returned the shape", (_ANSWER, "product + own[:, -1:]")),
    "every row by every head of the batch": _wrong(
        "returned the shape", (_PRODUCT, "features @ own[:, :-1]"), (_ANSWER, "product + own[:, -1:]")
    ),
    "forgets to return": _wrong("returned None", (f"return {_ANSWER}", _ANSWER)),
    "works on the caller's heads": _wrong(
        "belong to the caller", (f"own = {_OWN}", f"weights[:, -1] *= 1.0001\n    own = {_OWN}")
    ),
    "the wrong way round": _wrong("raised RuntimeError", (_PRODUCT, "torch.bmm(own[:, :-1], features[:, None])")),
}


_HITS = 'hits = {head: seen.sum() for head, seen in splits["held_out"].items()}'
_IF = '"own" if hits["own"] > hits["shared"] else "shared"'


_choice = partial(wrong, "choose-head")


WRONG["choose-head"] = {
    "on the training samples": _choice("use the held-out ones", ('splits["held_out"]', 'splits["train"]')),
    "on all samples": _choice(
        "leave the training samples out, also",
        (_HITS, "hits = {h: splits['train'][h].sum() + splits['held_out'][h].sum() for h in ('own', 'shared')}"),
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
        (_HITS, 'hits = {h: sum(s["held_out"][h].sum() for s in right.values()) for h in ("own", "shared")}'),
    ),
    "leaves out who has no samples": _choice(
        "chose nothing for 'fay'",
        (f"        {_HITS}", f'        if not len(splits["held_out"]["own"]):\n            continue\n        {_HITS}'),
    ),
    "own without samples": _choice(
        "fay has no held-out samples",
        (_IF, '"shared" if len(splits["held_out"]["own"]) and hits["own"] <= hits["shared"] else "own"'),
    ),
    "a true or false": _choice("chose (True|False|np)", (_IF, 'hits["own"] > hits["shared"]')),
    "a list": _choice("return a dict", ("return choice", "return list(choice.values())")),
    "only a few points more": _choice(
        "ada got 'shared': of 5", ('hits["own"] > hits["shared"]', 'hits["own"] > hits["shared"] + 2')
    ),
    "the wrong split's name": _choice("raised KeyError", ('splits["held_out"]', 'splits["test"]')),
}
