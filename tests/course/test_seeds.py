"""What the notebooks claim holds for other seeds, and beside two programs that never rest: by hand,
an hour or two.

``pytest -m slow tests/course/test_seeds.py -k "03 and seed-1"`` runs one notebook with one seed.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from notebook_gates import tags
from other_seeds import before_the_first_cell

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SHIFT = 1000  # farther than the ranges of seeds in the notebooks reach: no draw is met again


def failures(notebook: NotebookNode, folder: Path, shift: int) -> list[str]:
    """Run every cell in ``folder``, also after one that fails; of each that fails its number,
    source and error."""
    cells = [new_code_cell(before_the_first_cell(shift), id="other-seeds"), *notebook.cells]
    shifted = new_notebook(cells=cells, metadata=notebook.metadata)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(
        shifted, timeout=900, kernel_name="python3", allow_errors=True, resources=place
    ).execute()
    return [
        f"cell {number}:\n{cell.source}\n{output.ename}: {output.evalue}"
        for number, cell in enumerate(cells, start=-1)
        for output in cell.get("outputs", [])
        if output.output_type == "error" and "raises-exception" not in tags(cell)
    ]


@pytest.fixture
def two_busy_loops() -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2], ids="seed-{}".format)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_claims_hangs_on_no_seed_and_on_no_idle_machine(
    path: Path, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_busy_loops: None
) -> None:
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    found = failures(nbformat.read(path, as_version=4), tmp_path, seed * SHIFT)
    assert not found, "\n\n".join(found)


def draws(seed: int) -> dict[str, object]:
    """The first draw of each kind of generator: what it is in a cell, with ``seed``, and its
    value."""
    torch_draw = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
    return {
        "np.random.default_rng(3).random()": np.random.default_rng(seed).random(),
        "np.random.default_rng((3, 1)).random()": np.random.default_rng((seed, 1)).random(),
        "int(np.random.SeedSequence(3).spawn(2)[1].generate_state(1)[0])": int(
            np.random.SeedSequence(seed).spawn(2)[1].generate_state(1)[0]
        ),
        "random.Random(3).random()": random.Random(seed).random(),
        "(random.seed(3), random.random())[1]": random.Random(seed).random(),
        "(torch.manual_seed(3), torch.rand(1).item())[1]": torch_draw,
    }


@pytest.mark.full
def test_a_claim_that_hangs_on_the_seed_is_found_and_no_other(tmp_path: Path) -> None:
    def claims(seed: int) -> NotebookNode:
        cells = [new_code_cell("import random\nimport numpy as np\nimport torch")]
        cells += [
            new_code_cell(f"assert {drawn} == {value!r}") for drawn, value in draws(seed).items()
        ]
        by_design = new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]})
        any_seed = new_code_cell("assert np.random.default_rng(3).random() < 1")
        fixed = torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
        probe = new_code_cell(
            f"assert torch.rand(1, generator=torch.Generator().manual_seed(3)).item() == {fixed!r}"
        )
        return new_notebook(cells=[*cells, by_design, any_seed, probe])

    assert failures(claims(seed=3), tmp_path, shift=0) == []
    assert failures(claims(seed=1003), tmp_path, shift=1000) == []
    found = failures(claims(seed=3), tmp_path, shift=1000)
    assert [each.partition("\n")[0] for each in found] == [
        f"cell {1 + n}:" for n in range(len(draws(3)))
    ]
    assert all("AssertionError" in each for each in found)
