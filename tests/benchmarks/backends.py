"""Every backend and technique against plain torch, as ratios, by the width of an mlp 64-w-w-10 and
the batch size.

    python tests/benchmarks/backends.py              # about a minute, and one more with --compiled
    python tests/benchmarks/backends.py --quick      # seconds; too short to quote

All are timed in turns within one run, so that other load on the machine hits all of them; a row
shows the median ratio over the turns (above 1: faster than plain torch), and the range of the
middle half of them. One thread throughout.
"""

import argparse
import math
import os
import platform
from collections.abc import Mapping

import pandas as pd
import torch

from flserving.lab.measuring.sweep import sweep

# the tutorial's: how many times faster, and percentage points lost
CLAIMS: Mapping[str, tuple[float, float]] = {
    "quantised": (2, 1),
    "pruned": (2, 1),
    "distilled": (5, 2),
    "onnx": (2, 0),
}
MARGIN = 0.05  # a speed-up counts when the middle half of the turns lies this far from 1


def rows(quick: bool = False, compiled: bool = False) -> pd.DataFrame:
    """The sweep; ``quick`` only shows that each row runs."""
    torch.set_num_threads(1)
    if quick:
        return sweep((16,), turns=2, each=2)
    return sweep(compiled=compiled, turns=30, each=20)


def markdown(frame: pd.DataFrame) -> str:
    """One line per technique and batch size, one column per width."""
    widths = sorted(frame.width.unique())
    lines = [
        f"| technique | batch | {' | '.join(f'w {w}' for w in widths)} |",
        "| --- " * (len(widths) + 2) + "|",
    ]
    for (technique, batch), part in frame[frame.technique != "original"].groupby(
        ["technique", "batch"]
    ):
        cells = [
            f"**{it.times:.2f}** ({it.low:.2f} to {it.high:.2f})"
            for it in part.sort_values("width").itertuples()
        ]
        lines.append(f"| {technique} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(swept: pd.DataFrame) -> pd.DataFrame:
    """The tutorial's claims beside a sweep: one row per technique and batch size.

    Columns: ``claimed`` (times faster, at least), ``least`` and ``most`` (medians over the widths),
    ``pays_from`` (the smallest width from which on it is faster at every width; <NA>: none),
    ``holds_from`` (the same for the claim).
    """
    rows = []
    for (technique, batch), part in swept[swept.technique != "original"].groupby(
        ["technique", "batch"], sort=False
    ):
        part = part.sort_values("width")
        claimed = CLAIMS.get(str(technique).split(",")[0], (math.nan, math.nan))[0]
        rows.append({
            "technique": technique, "batch": batch, "claimed": claimed, "least": part.times.min(),
            "most": part.times.max(), "pays_from": _from(part, part.low > 1 + MARGIN),
            "holds_from": _from(part, part.times >= claimed),
        })  # fmt: skip
    frame = pd.DataFrame(rows).set_index(["technique", "batch"])
    return frame.astype({"pays_from": "Int64", "holds_from": "Int64"})


def _from(part: pd.DataFrame, holds: pd.Series) -> int | None:
    """The width from which on it holds without a gap."""
    lasting = holds[::-1].cummin()[::-1]
    return int(part.width[lasting].min()) if lasting.any() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of a minute; too short to quote"
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    given = parser.parse_args()
    frame = rows(given.quick, given.compiled)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one intra-op thread\n"
    )
    print(markdown(frame), "\n\nThe tutorial's claims beside it:\n")
    print(claims(frame).to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
