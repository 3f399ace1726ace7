"""Every check passes the solution, fails the stub, and tells at least five plausible wrong
solutions what is wrong."""

import ast
import contextlib
import functools
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch

from flserving.lab import checks
from flserving.lab.checks import parts
from flserving.lab.checks.serving import latency
from flserving.lab.exercises import check_cell, solution_cell, student_copy
from wrong_solutions import CHECKS, SOLUTIONS, WRONG

CASES = [(grade_id, name) for grade_id, wrong in WRONG.items() for name in wrong]


@functools.cache
def run(grade_id, source):
    """What the student sees in a fresh kernel: None, or the error of the check cell."""
    namespace = {"np": np}
    exec(source, namespace)
    try:
        exec(CHECKS[grade_id], namespace)
    except (AssertionError, NotImplementedError) as error:
        return error
    return None


@pytest.mark.parametrize("grade_id", SOLUTIONS)
def test_the_solution_passes(grade_id):
    assert run(grade_id, SOLUTIONS[grade_id]) is None


@pytest.mark.parametrize("grade_id", SOLUTIONS)
def test_the_stub_runs_and_its_check_fails_with_what_to_do(grade_id):
    notebook = nbformat.v4.new_notebook(
        cells=[
            solution_cell(grade_id, SOLUTIONS[grade_id]),
            check_cell(grade_id, CHECKS[grade_id], 2),
        ]
    )
    error = run(grade_id, student_copy(notebook).cells[0].source)
    assert isinstance(error, NotImplementedError) and f"{grade_id}: replace this line" in str(error)


@pytest.mark.parametrize(("grade_id", "name"), CASES)
def test_a_wrong_solution_is_told_its_mistake(grade_id, name):
    error = run(grade_id, WRONG[grade_id][name].source)
    assert isinstance(error, AssertionError), f"{name} passed the check"
    assert re.search(WRONG[grade_id][name].message, str(error)), f"{name} was told: {error}"
    assert len(str(error)) < 400


class _Spoils(ast.NodeTransformer):
    """Lets every function begin with a look at its arguments that empties them."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body = ast.parse("for each in list(locals().values()): spoil(each)").body + node.body
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


def spoil(value):
    if isinstance(value, (list, dict, set)):
        value.clear()
    elif isinstance(value, np.ndarray) and value.flags.writeable:
        value[...] = 0
    elif isinstance(value, torch.Tensor) and not value.requires_grad:
        value.zero_()


@pytest.mark.parametrize("grade_id", SOLUTIONS)
def test_a_solution_that_spoils_what_it_is_given_harms_no_later_try(grade_id):
    """Who mends it must pass without a new kernel."""
    spoils = _Spoils().visit(ast.parse(SOLUTIONS[grade_id]))
    namespace = {"np": np, "spoil": spoil}
    exec(compile(ast.fix_missing_locations(spoils), "cell", "exec"), namespace)
    with contextlib.suppress(AssertionError):
        exec(CHECKS[grade_id], namespace)
    assert run.__wrapped__(grade_id, SOLUTIONS[grade_id]) is None


@pytest.mark.parametrize("grade_id", SOLUTIONS)
def test_messages_tell_the_mistakes_apart(grade_id):
    told = [str(run(grade_id, wrong.source)) for wrong in WRONG[grade_id].values()]
    assert len(set(told)) >= max(5, 0.8 * len(told))


@pytest.mark.parametrize("grade_id", SOLUTIONS)
def test_marks_are_kept_by_the_name_that_the_exercise_has_in_its_notebook(grade_id, monkeypatch):
    """The report to hand in finds them by it."""
    told = []
    monkeypatch.setattr(
        parts, "record", lambda kind, name, entry: told.append((kind, name, entry["right"]))
    )
    namespace = {"np": np}
    exec(SOLUTIONS[grade_id], namespace)
    exec(CHECKS[grade_id], namespace)
    assert {(kind, name) for kind, name, _ in told} <= {("checks", grade_id)}
    assert all(right > 1 for _, _, right in told)


def test_an_exception_in_the_students_code_names_the_call():
    class Broken:
        def __init__(self, capacity):
            self.items = {}

        def get(self, key):
            return self.items.get(key)

        def put(self, key, value):
            self.item[key] = value

    with pytest.raises(
        AssertionError, match=r"put\('a', 'a1'\) raised AttributeError: .*'item'"
    ) as caught:
        checks.check_lru(Broken)
    # the student's own traceback stays visible
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_batch_may_be_none_or_a_tuple():
    namespace = {}
    exec(SOLUTIONS["batcher"], namespace)

    class Other(namespace["DynamicBatcher"]):
        def next_batch(self, idle_workers):
            return tuple(super().next_batch(idle_workers)) or None

    checks.check_batcher(Other)


def test_the_data_of_the_latency_check_tell_all_mistakes_apart():
    stages = latency._stages()
    times = np.array(list(stages.values()))
    total_ms = times.sum(axis=0)
    for method in ("linear", "lower", "higher", "nearest", "inverted_cdf"):
        assert np.percentile(total_ms, 99, method=method) == np.percentile(total_ms, 99)
    assert (total_ms == 50).any() and (times >= 0).all()
    assert len({len(ms) for ms in stages.values()}) == 1


@pytest.mark.full
def test_a_try_waits_for_no_compiler():
    """What torch loads to export or compile takes seconds: no check, on its own in a fresh kernel,
    needs it."""
    code = f"""if True:
        import sys
        import numpy as np
        for solution, check in {list(zip(SOLUTIONS.values(), CHECKS.values(), strict=True))!r}:
            names = {{"np": np}}
            exec(solution, names)
            exec(check, names)
        print("loaded:", *sorted({{"sympy", "torch._dynamo", "torch._inductor", "onnxscript"}} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
