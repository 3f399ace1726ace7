"""Tables of a registry's content: pandas DataFrames for people. Pure functions of what the registry
read."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import pandas as pd
import torch
from torch import Tensor

from flserving.registry.manifest import Manifest

NAN = float("nan")
_MISSING = torch.empty(0)  # no tensor of a version is empty
_HISTORY = ["when", "alias", "action", "from", "to", "who", "why"]
_COUNTS = ["round", "parent_version", "num_clients", "num_heads", "weights_nbytes"]


def versions(entries: Mapping[int, Manifest | str], aliases: Mapping[str, int]) -> pd.DataFrame:
    """One row per version, oldest first.

    Columns: created_at, aliases, round, parent_version, num_clients, strategy, one per metric
    (missing: NaN), weights_nbytes, note; num_heads where any version has personal heads. A version
    whose manifest cannot be read (a message instead of a manifest) keeps its row, and a column
    ``problem`` appears.
    """
    rows = []
    for version, entry in entries.items():
        leading = [alias for alias, target in aliases.items() if target == version]
        row: dict[str, Any] = {
            "version": version,
            "created_at": None,
            "aliases": ", ".join(leading),
        }
        if isinstance(entry, str):
            row["problem"] = entry
        else:
            row |= _columns(entry)
        rows.append(row)
    frame = pd.DataFrame(rows).set_index("version")
    frame["created_at"] = pd.to_datetime(frame["created_at"], utc=True, format="ISO8601")
    return frame.astype({column: "Int64" for column in _COUNTS if column in frame})


def _columns(manifest: Manifest) -> dict[str, Any]:
    row: dict[str, Any] = {"created_at": manifest.created_at}
    for field in ("round", "parent_version", "num_clients", "strategy"):
        row[field] = getattr(manifest.lineage, field, None)
    row |= manifest.metrics
    if manifest.heads is not None:
        row["num_heads"] = manifest.heads.num_heads
    row["weights_nbytes"] = manifest.weights_nbytes
    row["note"] = manifest.note
    return row


def history(moves: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """One row per move, oldest first. ``from`` and ``to`` are missing (<NA>) where an alias pointed
    nowhere."""
    frame = pd.DataFrame(list(moves), columns=_HISTORY)
    # damaged: NaT
    frame["when"] = pd.to_datetime(frame["when"], utc=True, format="ISO8601", errors="coerce")
    return frame.astype({"from": "Int64", "to": "Int64"})


def compare(
    a: tuple[Manifest, Mapping[str, Tensor]], b: tuple[Manifest, Mapping[str, Tensor]]
) -> pd.DataFrame:
    """Two versions side by side: rows (kind, item); columns a, b, equal, difference.

    ``metric``: difference is b - a. ``digest``: whether weights, body, head and preprocessing are
    the same. ``tensor``: a and b are the L2 norms, difference is the norm of b - a (NaN if the
    shapes differ).
    """
    one, tensors = a
    other, others = b
    rows: list[tuple[Any, ...]] = []
    digests = msgspec.structs.asdict(one.digests)
    for item, x, y in _pairs(digests, msgspec.structs.asdict(other.digests)):
        rows.append(("digest", item, x, y, x == y, NAN))
    for item, x, y in _pairs(one.metrics, other.metrics):
        rows.append(("metric", item, x, y, x == y, y - x))
    for item, x, y in _pairs(tensors, others, missing=_MISSING):
        same = x.dtype == y.dtype and torch.equal(x, y)
        difference = _MISSING
        if x.shape == y.shape:
            difference = y.double() - x.double()
        rows.append(("tensor", item, _norm(x), _norm(y), same, _norm(difference)))
    frame = pd.DataFrame(rows, columns=["kind", "item", "a", "b", "equal", "difference"])
    return frame.set_index(["kind", "item"])


def _pairs(
    a: Mapping[str, Any], b: Mapping[str, Any], missing: Any = NAN
) -> Iterator[tuple[str, Any, Any]]:
    """Each name, and what both have under it."""
    for name in {**a, **b}:
        yield name, a.get(name, missing), b.get(name, missing)


def _norm(tensor: Tensor) -> float:
    """L2; NaN of what is missing."""
    if tensor is _MISSING:
        return NAN
    return float(torch.linalg.vector_norm(tensor.double()))
