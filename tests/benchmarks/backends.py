"""Every backend and technique against plain torch, as ratios, by the width of an mlp 64-w-w-10 and the batch size.

    python tests/benchmarks/backends.py              # about a minute, and one more with --compiled
    python tests/benchmarks/backends.py --quick      # seconds; too short to quote

All are timed in turns within one run, so that other load on the machine hits all of them; a row shows the median ratio
over the turns (above 1: faster than plain torch), and the range of the middle half of them. One thread throughout.
"""

import argparse
import os
import platform

import pandas as pd
import torch

from flserving.lab.sweep import claims, sweep


def rows(quick: bool = False, compiled: bool = False) -> pd.DataFrame:
    """The sweep; ``quick`` only shows that each row runs."""
    torch.set_num_threads(1)
    if quick:
        return sweep((16,), turns=2, each=2)
    return sweep(compiled=compiled, turns=30, each=20)


def markdown(frame: pd.DataFrame) -> str:
    """One line per technique and batch size, one column per width."""
    widths = sorted(frame.width.unique())
    lines = [f"| technique | batch | {' | '.join(f'w {w}' for w in widths)} |", "| --- " * (len(widths) + 2) + "|"]
    for (technique, batch), part in frame[frame.technique != "original"].groupby(["technique", "batch"]):
        cells = [f"**{it.times:.2f}** ({it.low:.2f} to {it.high:.2f})" for it in part.sort_values("width").itertuples()]
        lines.append(f"| {technique} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute; too short to quote")
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
