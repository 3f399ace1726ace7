"""How well membership inference does against a server under each policy of outputs.

    python tests/benchmarks/membership.py            # half a minute; prints MEASURED.md's table
    python tests/benchmarks/membership.py --quick    # seconds; too short to quote

Every answer comes over REST, to a credential of its own for each policy. The seeds draw the
members, the others, the noise on both and the first weights anew.
"""

import argparse

import pandas as pd

from flserving.lab.federated.membership import membership_table

SEEDS = 5


def table(quick: bool = False) -> pd.DataFrame:
    """Policy x weight decay: rows guessed right in percent; then what each model labels right."""
    training = {"members": 100, "epochs": 20} if quick else {}
    found = membership_table(seeds=range(1 if quick else SEEDS), **training)
    shown = found["attack"].unstack(0).reindex(found.index.unique(1))
    for name, what in (
        ("members", "members labelled right"),
        ("others", "new rows labelled right"),
    ):
        shown.loc[what] = found[name].groupby(level=0).first()
    return shown


def markdown(shown: pd.DataFrame) -> str:
    lines = [f"| outputs | {' | '.join(f'weight decay {decay:g}' for decay in shown.columns)} |"]
    lines.append("| --- |" + " --- |" * len(shown.columns))
    lines += [
        f"| {name} | {' | '.join(f'{value:.0f}' for value in row)} |"
        for name, row in shown.iterrows()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    print(markdown(table(parser.parse_args().quick)))
