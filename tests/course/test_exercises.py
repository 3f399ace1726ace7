"""Exercises in notebooks: the format, its validation, the students' copies."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from flserving.errors import ConfigError
from flserving.lab import exercises
from flserving.lab.exercises import (
    BEGIN,
    END,
    Exercise,
    check_cell,
    find_exercises,
    part_marks,
    solution_cell,
    student_copy,
)
from wrong_solutions import CHECKS, SOLUTIONS

DOUBLE = '''\
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    if x:
        return 2 * x
    return 0
    ### END SOLUTION
'''


def notebook():
    shown = new_output("execute_result", {"text/plain": "1"}, execution_count=1)
    cells = [
        new_markdown_cell("# Title"),
        new_code_cell("step = 1", execution_count=1, outputs=[shown]),
        solution_cell("double", DOUBLE),
        check_cell("double", "assert double(step + 1) == 4, f'expected 4, got {double(step + 1)}'", 2),
        new_code_cell("step += 1", execution_count=4, outputs=[new_output("stream", name="stdout", text="4\n")]),
        solution_cell("triple", DOUBLE.replace("double", "triple").replace("2", "3")),
        new_markdown_cell("Now the check."),
        check_cell("triple", "assert triple(step) == 6", 1.5),
    ]  # fmt: skip
    made = new_notebook(
        cells=cells,
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "widgets": {}},
    )
    for number in (2, 3):
        made.cells[number].update(
            execution_count=number, outputs=[new_output("stream", name="stdout", text="2 * x\n")]
        )
    nbformat.validate(made)
    return made


# ------------------------------------------------------------------------------------------- format


def test_cells_carry_nbgraders_metadata():
    solution, check = solution_cell("double", DOUBLE), check_cell("double", "assert True", 2)
    assert solution.metadata["nbgrader"] == {
        "schema_version": 3, "grade_id": "double", "solution": True, "grade": False, "locked": False, "task": False,
    }  # fmt: skip
    assert check.metadata["nbgrader"] == {
        "schema_version": 3, "grade_id": "double-check", "solution": False, "grade": True, "locked": True,
        "task": False, "points": 2,
    }  # fmt: skip


def test_exercises_are_found_in_order():
    assert find_exercises(notebook()) == [
        Exercise("double", 2, 3, 2),
        Exercise("triple", 5, 7, 1.5),
    ]
    assert find_exercises(new_notebook(cells=[new_markdown_cell("no exercise")])) == []


def without(cells, *numbers):
    return [cell for number, cell in enumerate(cells) if number not in numbers]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cells: [*cells, solution_cell("double", DOUBLE)], "grade_id 'double' is used twice"),
        (lambda cells: without(cells, 3), "comes before the check of \\('double', 2\\)"),
        (lambda cells: without(cells, 7), "solution \\('triple', 5\\) has no check after it"),
        (lambda cells: without(cells, 2), "check 'double-check' does not follow its solution"),
        (lambda cells: [cells[5], cells[3]], "check 'double-check' does not follow its solution"),
        (lambda cells: [new_code_cell(DOUBLE)], "cell 0 holds a solution that students would get"),
        (lambda cells: [new_markdown_cell("### END SOLUTION")], "cell 0 holds a solution that students would get"),
        (lambda cells: [solution_cell("", DOUBLE)], "cell 0 has no grade_id"),
        (lambda cells: [cells[2], check_cell("double", "assert 1", 0)], "worth 0 points"),
        (lambda cells: [solution_cell("a", "def f():\n    pass")], "'a' needs pairs of the lines"),
        (lambda cells: [solution_cell("a", DOUBLE.replace("### END SOLUTION", ""))], "needs pairs"),
        (lambda cells: [solution_cell("a", DOUBLE.replace("    ### BEGIN", "    x = 1  ### BEGIN"))], "needs pairs"),
        (lambda cells: [solution_cell("a", f"def f():\n    {BEGIN}\n\n    {END}")], "empty region"),
        (lambda cells: [solution_cell("a", f"{BEGIN}\nx = 1\n{END}")], "'a' has a region outside"),
        (lambda cells: [solution_cell("a", f"class A:\n    {BEGIN}\n    b = 1\n    {END}")], "outside a function"),
        (lambda cells: [solution_cell("a", DOUBLE.replace("def double(x):", "if True:"))], "outside a function"),
        (lambda cells: [solution_cell("a", DOUBLE + "    else:\n        pass")], "is no Python"),
    ],
)  # fmt: skip
def test_a_malformed_exercise_is_refused(damage, message):
    with pytest.raises(ConfigError, match=message):
        find_exercises(new_notebook(cells=damage(notebook().cells)))


def test_an_exercise_in_prose_is_refused():
    made = notebook()
    made.cells[0].metadata["nbgrader"] = {
        "solution": True,
        "grade_id": "essay",
        "grade": True,
        "points": 1,
    }
    with pytest.raises(ConfigError, match="exercise cell 'essay' is markdown"):
        find_exercises(made)


# -------------------------------------------------------------------------------------------- marks


@pytest.mark.parametrize(
    ("ename", "told", "points"),
    [
        ("CheckError", "3 of 4 parts are right:\n  not yet  a\n  done     b", ["3.00"]),
        ("CheckError", "0 of 4 parts are right:\n  not yet  a", ["0.00"]),
        ("AssertionError", "3 of 4 parts are right", []),  # of the student's own making
        ("CheckError", "no parts", []),
    ],
)
def test_a_check_that_fails_in_one_part_of_four_gives_three_quarters_of_its_points(
    ename, told, points
):
    error = new_output("error", ename=ename, evalue="x is wrong", traceback=["x is wrong", told])
    made = new_notebook(
        cells=[solution_cell("double", DOUBLE), check_cell("double", "check(double)", 4)]
    )
    for cell in made.cells:
        cell.outputs = [new_output("stream", name="stderr", text="a warning"), error]
    graded, resources = part_marks(made, {"student": "ada"})
    nbformat.validate(graded)
    assert resources == {"student": "ada"}
    first, second = ([output.get("data") for output in cell.outputs] for cell in graded.cells)
    assert first == [None, None], "only a check gives points"
    assert second == [*({"text/plain": text} for text in points), None, None], (
        "the sentence stays for the student"
    )


# ----------------------------------------------------------------------------------- student copies


def test_student_copy_holds_stubs_and_no_trace_of_the_solution():
    source = notebook()
    before = json.dumps(source)
    student = student_copy(source)
    assert json.dumps(source) == before
    nbformat.validate(student)
    stub = 'raise NotImplementedError("double: replace this line with your code")'
    assert student.cells[2].source == f'def double(x):\n    """Twice x."""\n    {stub}\n'
    assert "2 * x" not in json.dumps(student) and "SOLUTION" not in json.dumps(student)
    assert student.cells[1].outputs[0].data["text/plain"] == "1"  # to be looked at before it is run
    assert [bool(cell.get("outputs")) for cell in student.cells] == [
        False,
        True,
        False,
        False,
        True,
    ] + [False] * 3
    assert 'execution_count": 1' not in json.dumps(student) and "widgets" not in student.metadata
    assert all(cell.get("execution_count") is None for cell in student.cells)
    assert [cell.metadata.get("editable", True) for cell in student.cells] == [True] * 3 + [
        False
    ] + [True] * 3 + [False]
    assert student.cells[3].source == source.cells[3].source


@pytest.mark.parametrize(
    ("source", "tags", "stays"),
    [
        ("fives.mean()", [], True),
        ("fives.mean()", ["nbval-ignore-output"], True),
        ("double(5)", ["needs-solution", "nbval-ignore-output"], False),
        ("lab.keep(double)", [], False),
        ("keep(double)", [], False),
        ("lab.kept('double', max)", [], True),
    ],
)
def test_an_output_stays_unless_it_speaks_of_the_students_own_code(source, tags, stays):
    shown = new_output("execute_result", {"text/plain": "5"}, execution_count=3)
    made = notebook()
    made.cells.append(
        new_code_cell(source, execution_count=3, outputs=[shown], metadata={"tags": tags})
    )
    assert bool(student_copy(made).cells[-1].outputs) == stays


def test_every_region_becomes_a_stub_at_its_own_indentation():
    student = student_copy(
        new_notebook(
            cells=[solution_cell("lru", SOLUTIONS["lru"]), check_cell("lru", CHECKS["lru"], 3)]
        )
    )
    stub = student.cells[0].source
    assert (
        stub.count('\n        raise NotImplementedError("lru: replace this line with your code")\n')
        == 2
    )
    namespace = {}
    exec(stub, namespace)
    with pytest.raises(NotImplementedError):
        namespace["LRU"](2).get("a")


def test_command_writes_the_copies_and_keeps_somebodys_work(tmp_path, capsys):
    sources, out = tmp_path / "notebooks", tmp_path / "deep" / "student"
    sources.mkdir()
    nbformat.write(notebook(), sources / "03_b.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("Hello")]), sources / "00_a.ipynb")
    arguments = ["--notebooks", str(sources), "--out", str(out)]
    assert exercises.main(arguments) == 0
    told = capsys.readouterr().out
    assert (
        "00_a.ipynb: no exercise" in told
        and "03_b.ipynb: double (2 points), triple (1.5 points)" in told
    )
    assert (
        nbformat.read(out / "03_b.ipynb", as_version=4).cells[2].source
        == student_copy(notebook()).cells[2].source
    )

    (out / "03_b.ipynb").write_text("my work")
    (out / "00_a.ipynb").unlink()
    assert exercises.main(arguments) == 1
    assert "may hold somebody's work: move it, or use --force" in capsys.readouterr().err
    assert (out / "03_b.ipynb").read_text() == "my work" and not (out / "00_a.ipynb").exists()
    assert exercises.main([*arguments, "--force"]) == 0
    assert (out / "03_b.ipynb").read_text() != "my work"


def test_missing_copies_are_added_and_no_work_is_touched(tmp_path, capsys):
    sources, out = tmp_path / "notebooks", tmp_path / "student"
    (sources / "my_stack").mkdir(parents=True)
    (sources / "stack.png").write_bytes(b"\x89PNG\r\n")
    (sources / ".hidden").write_text("")
    nbformat.write(notebook(), sources / "03_b.ipynb")
    arguments = ["--notebooks", str(sources), "--out", str(out), "--missing"]
    assert exercises.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {"03_b.ipynb", "stack.png"}
    assert (out / "stack.png").read_bytes() == b"\x89PNG\r\n"
    (out / "03_b.ipynb").write_text("my work")
    (out / "my_stack").mkdir()
    nbformat.write(notebook(), sources / "12_new.ipynb")
    assert exercises.main(arguments) == 0
    assert (out / "03_b.ipynb").read_text() == "my work" and (out / "12_new.ipynb").exists()
    capsys.readouterr()
    assert exercises.main(arguments) == 0
    assert capsys.readouterr().out == "", "nothing was missing"


def test_a_copy_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    """A half copy would be taken for somebody's work, and never be mended."""
    nbformat.write(notebook(), tmp_path / "03_b.ipynb")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert (
        exercises.main(
            ["--notebooks", str(tmp_path), "--out", str(tmp_path / "student"), "--missing"]
        )
        == 1
    )
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "student").iterdir()) == []


def test_command_refuses_what_it_cannot_do(tmp_path, capsys):
    assert exercises.main(["--notebooks", str(tmp_path)]) == 1
    assert "no notebooks in" in capsys.readouterr().err
    nbformat.write(new_notebook(cells=[new_code_cell(DOUBLE)]), tmp_path / "bad.ipynb")
    assert exercises.main(["--notebooks", str(tmp_path), "--out", str(tmp_path), "--force"]) == 1
    assert "write the student copies to another folder" in capsys.readouterr().err
    assert exercises.main(["--notebooks", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "bad.ipynb: cell 0 holds a solution" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_module_runs_as_a_command_without_a_warning(tmp_path):
    nbformat.write(notebook(), tmp_path / "one.ipynb")
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "flserving.lab.exercises",
        "--notebooks",
        ".",
        "--out",
        "student",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "student" / "one.ipynb").exists()
