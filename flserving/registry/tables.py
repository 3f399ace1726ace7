"""Tables of a registry's content: pandas DataFrames for people. Pure functions of what the registry read."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pandas as pd
import torch
from torch import Tensor

from flserving.registry.manifest import Manifest

_HISTORY = ["when", "alias", "action", "from", "to", "who", "why"]


def versions(entries: Mapping[int, Manifest | str], aliases: Mapping[str, int]) -> pd.DataFrame:
    """One row per version, oldest first.

    Columns: created_at, aliases, round, parent_version, num_clients, strategy, one per metric (missing: NaN),
    weights_nbytes, note; num_heads where any version has personal heads. A version whose manifest cannot be read (a
    message instead of a manifest) keeps its row, and a column ``problem`` appears.
    """
    rows = []
    for version, entry in entries.items():
        row: dict[str, Any] = {"version": version, "created_at": None}
        row["aliases"] = ", ".join(alias for alias, target in aliases.items() if target == version)
        if isinstance(entry, str):
            rows.append({**row, "problem": entry})
            continue
        row["created_at"] = entry.created_at
        for field in ("round", "parent_version", "num_clients", "strategy"):
            row[field] = getattr(entry.lineage, field, None)
        heads = {"num_heads": entry.heads.num_heads} if entry.heads else {}
        rows.append({**row, **entry.metrics, **heads, "weights_nbytes": entry.weights_nbytes, "note": entry.note})
    frame = pd.DataFrame(rows).set_index("version")
    frame["created_at"] = pd.to_datetime(frame["created_at"], utc=True, format="ISO8601")
    counts = ["round", "parent_version", "num_clients", "num_heads", "weights_nbytes"]
    return frame.astype({column: "Int64" for column in counts if column in frame})


def history(moves: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """One row per move, oldest first. ``from`` and ``to`` are missing (<NA>) where an alias pointed nowhere."""
    frame = pd.DataFrame(list(moves), columns=_HISTORY)
    frame["when"] = pd.to_datetime(frame["when"], utc=True, format="ISO8601", errors="coerce")  # damaged: NaT
    return frame.astype({"from": "Int64", "to": "Int64"})


def compare(a: tuple[Manifest, Mapping[str, Tensor]], b: tuple[Manifest, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Two versions side by side: rows (kind, item); columns a, b, equal, difference.

    ``metric``: difference is b - a. ``digest``: whether weights, body, head and preprocessing are the same. ``tensor``:
    a and b are the L2 norms, difference is the norm of b - a (NaN if the shapes differ).
    """
    rows: list[tuple[str, str, Any, Any, bool, float]] = []
    left, right = (msgspec.structs.asdict(manifest.digests) for manifest, _ in (a, b))
    rows += [("digest", item, x, right[item], x == right[item], float("nan")) for item, x in left.items()]
    for item in {**a[0].metrics, **b[0].metrics}:
        x = a[0].metrics.get(item, float("nan"))
        y = b[0].metrics.get(item, float("nan"))
        rows.append(("metric", item, x, y, x == y, y - x))
    for item in {**a[1], **b[1]}:
        rows.append(("tensor", item, *_tensors(a[1].get(item), b[1].get(item))))
    frame = pd.DataFrame(rows, columns=["kind", "item", "a", "b", "equal", "difference"])
    return frame.set_index(["kind", "item"])


def _tensors(x: Tensor | None, y: Tensor | None) -> tuple[float, float, bool, float]:
    norms = [float("nan") if t is None else float(torch.linalg.vector_norm(t.double())) for t in (x, y)]
    if x is None or y is None or x.shape != y.shape:
        return norms[0], norms[1], False, float("nan")
    same = x.dtype == y.dtype and torch.equal(x, y)
    return norms[0], norms[1], same, float(torch.linalg.vector_norm(y.double() - x.double()))
