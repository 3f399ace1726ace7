"""Try solutions of an exercise in its real notebook: what would a student who wrote this read?"""

import os
from collections.abc import Mapping
from pathlib import Path

import nbformat

from flserving.errors import ConfigError
from flserving.lab.exercises import find_exercises
from flserving.lab.explore import STATIC_SWITCH


def failure_messages(
    notebook: Path, grade_id: str, solutions: Mapping[str, str], *, cell_timeout_s: int = 120
) -> dict[str, str | None]:
    """Run a notebook up to an exercise once, then each solution and the cells up to and including its check.

    Args:
        notebook: The file; earlier exercises run with their own solutions, widgets are not shown.
        grade_id: Which exercise.
        solutions: Source of the solution cell, by a name of your choice.
        cell_timeout_s: Longest that one cell may take.

    Returns:
        For each name None if the check passes, otherwise the error that ends it, as ``"AssertionError: ..."``.

    Raises:
        ConfigError: No such exercise in the notebook.
        nbclient.exceptions.CellExecutionError: A cell before the exercise fails.

    Cost: one kernel start (about 3 s), the cells before the exercise, and each solution's own cells.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    source = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    exercise = next((one for one in find_exercises(source) if one.grade_id == grade_id), None)
    if exercise is None:
        raise ConfigError(f"{notebook.name} has no exercise {grade_id!r}")
    folder = {"metadata": {"path": str(notebook.parent)}}
    client = NotebookClient(source, timeout=cell_timeout_s, interrupt_on_timeout=True, resources=folder)
    messages: dict[str, str | None] = {}
    with client.setup_kernel(env={**os.environ, STATIC_SWITCH: "1"}):
        for number, cell in enumerate(source.cells[: exercise.solution]):
            client.execute_cell(cell, number)
        for name, solution in solutions.items():
            messages[name] = None
            source.cells[exercise.solution].source = solution
            for number in range(exercise.solution, exercise.check + 1):
                try:
                    client.execute_cell(source.cells[number], number)
                except CellExecutionError as error:
                    messages[name] = f"{error.ename}: {error.evalue}"
                    break
                except CellTimeoutError:
                    messages[name] = f"CellTimeoutError: cell {number} took more than {cell_timeout_s} s"
                    break
    return messages
