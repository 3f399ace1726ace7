"""Mutation check: does a test fail when one thing in a module is wrong?

    python tests/support/mutants.py serving.cache     # 50 mutants, some minutes
    python tests/support/mutants.py federated.gate --number 20 --seed 2

A mutant is a copy of the package in which one operator, constant, condition, ``return`` or
statement is another one. The tests of the module run on it until the first one fails: then it is
killed. A survivor is a line that no test would miss, or a change that changes nothing: look at
each. Needs a system that forks (Linux, macOS).
"""

import argparse
import ast
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG_S = 20  # no test of these takes a quarter of it
TESTS = {  # below tests/, the quickest first: most mutants are killed by the first file
    "serving.cache": "serving/test_model_cache.py serving/test_prediction_cache.py serving/test_server_cache.py",
    "serving.batching.policy": "serving/test_batching.py serving/test_overload.py serving/test_workers.py",
    "serving.batching.workers": "serving/test_workers.py serving/test_batching.py serving/test_overload.py",
    "serving.router": "serving/test_routing.py",
    "edge.hybrid": "edge/test_hybrid.py edge/test_hybrid_cut.py",
    "registry.heads": "registry/test_heads.py registry/test_heads_expiry.py",
    "federated.gate": "federated/test_gate.py",
}
OTHER = {ast.And: ast.Or, ast.Or: ast.And, ast.FloorDiv: ast.Mult}
for one, other in (
    *(
        (ast.Lt, ast.LtE),
        (ast.Gt, ast.GtE),
        (ast.Eq, ast.NotEq),
        (ast.Is, ast.IsNot),
        (ast.In, ast.NotIn),
    ),
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div)),
):
    OTHER |= {one: other, other: one}


@dataclass(frozen=True)
class Mutant:
    """The place of a node in the source, and what stands there instead."""

    node: ast.expr | ast.stmt
    text: str

    def source(self, lines: list[bytes]) -> bytes:
        """The module with this mutant in it."""
        first, last = self.node.lineno - 1, (self.node.end_lineno or 0) - 1
        before = lines[first][: self.node.col_offset]
        after = lines[last][self.node.end_col_offset :]
        return b"".join([*lines[:first], before, self.text.encode(), after, *lines[last + 1 :]])


def passed_over(tree: ast.AST) -> set[ast.AST]:
    """Annotations, texts and what only a type checker reads: no test can see a change there."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        fields = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            fields.append(node)
        for field in fields:
            if field is not None:
                found.update(ast.walk(field))
    return found


def changed(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """What could stand in place of ``node``, each with one thing changed."""
    match node:
        case ast.Compare(ops=[operator, *others]) if type(operator) in OTHER:
            yield ast.Compare(node.left, [OTHER[type(operator)](), *others], node.comparators)
        case ast.BinOp() if type(node.op) in OTHER:
            yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(OTHER[type(node.op)](), node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield ast.Call(ast.Name("bool"), [node.operand], [])
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.IfExp():
            yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.Return(value=ast.expr()) if (
            not isinstance(node.value, ast.Constant) or node.value.value is not None
        ):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Constant() | ast.Yield()):
            pass
        case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield ast.Pass()


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse(source)
    skip = passed_over(tree)
    found = []
    for node in ast.walk(tree):
        if node in skip:
            continue
        if isinstance(node, ast.If | ast.While):  # the condition alone: the block keeps its layout
            found.append(Mutant(node.test, f"(not ({ast.unparse(node.test)}))"))
        for other in changed(node):
            text = ast.unparse(ast.fix_missing_locations(other))
            found.append(Mutant(node, f"({text})" if isinstance(other, ast.expr) else text))
    return sorted(
        found, key=lambda mutant: (mutant.node.lineno, mutant.node.col_offset, mutant.text)
    )


def run_tests(folder: Path, files: list[str]) -> None:
    """In a forked child: pytest on the copy in ``folder``; the exit code says how it ended."""
    os.setsid()  # what a test starts ends with us
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", f"timeout={HANG_S}"]
    code = pytest.main([*options, *(f"tests/{name}" for name in files)])
    os._exit(int(code))


def outcome(folder: Path, files: list[str], limit_s: float) -> str:
    """ "killed", "SURVIVED" or "killed (timeout)"."""
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, files))
    child.start()
    try:
        child.join(limit_s)
        late = child.is_alive()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
    if late:
        return "killed (timeout)"
    return "SURVIVED" if child.exitcode == 0 else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", choices=TESTS, metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument(
        "--number", type=int, default=50, help="how many mutants are drawn (default 50)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--line", type=int, help="all mutants of this line instead")
    arguments = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    import torch  # noqa: F401  each child finds it imported

    module = Path("flserving", *arguments.module.split(".")).with_suffix(".py")
    source = (ROOT / module).read_text(encoding="utf-8")
    every = mutants(source)
    drawn = random.Random(arguments.seed).sample(every, min(arguments.number, len(every)))
    if arguments.line:
        drawn = [mutant for mutant in every if mutant.node.lineno == arguments.line]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in ("flserving", "tests"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        files = TESTS[arguments.module].split()
        started_s = time.monotonic()
        if outcome(folder, files, 600) != "SURVIVED":
            parser.exit(1, f"the tests of {arguments.module} fail as they are: {' '.join(files)}\n")
        limit_s = 30 + 3 * (time.monotonic() - started_s)
        print(
            f"{arguments.module}: {len(drawn)} of {len(every)} mutants, at most {limit_s:.0f} s each",
            flush=True,
        )
        killed = 0
        for mutant in drawn:
            (folder / module).write_bytes(mutant.source(source.encode().splitlines(keepends=True)))
            how = outcome(folder, files, limit_s)
            killed += how != "SURVIVED"
            before = " ".join(ast.unparse(mutant.node).split())
            print(
                f"{how}: line {mutant.node.lineno}: {before[:80]} -> {mutant.text[:80]}", flush=True
            )
        print(f"{killed} of {len(drawn)} killed")


if __name__ == "__main__":
    main()
