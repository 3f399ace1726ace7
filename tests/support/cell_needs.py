"""Which cells of a notebook hang together, so that a test need not run again what nbval has run.

Judged by the global names that a cell reads, binds, or changes in place. ``needed_cells`` may miss
one: then the cells that were wanted fail, they do not pass. ``dependent_cells`` rather names one
too many.
"""

import ast
import builtins
import dis
import symtable
from collections.abc import Collection
from functools import cache
from types import CodeType
from typing import NamedTuple

from nbformat import NotebookNode

from notebook_gates import code_cells


class Names(NamedTuple):
    read: frozenset[str]  # before the cell binds them itself
    bound: frozenset[str]
    # by assignment to a part, or by a call for its effect: server.promote(2)
    changed: frozenset[str]
    imported: frozenset[str]


@cache
def names_in(source: str) -> Names:
    """The global names of a cell."""
    table = symtable.symtable(source, "cell", "exec")
    symbols = table.get_symbols()
    read = (
        _read_first(compile(source, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
        - vars(builtins).keys()
    )
    changed = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            changed.add(_root(node.value.func))
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            changed.add(_root(node))
    imported = {symbol.get_name() for symbol in symbols if symbol.is_imported()}
    bound = {
        symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()
    }
    return Names(*map(frozenset, (read, bound, changed, imported)))


def _read_first(code: CodeType) -> set[str]:
    """The global names that code reads before it binds them. Instructions stand in the order of the
    source; what a function reads counts where the function is made."""
    read, bound = set[str](), set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname in {"LOAD_NAME", "LOAD_GLOBAL"}:
            read |= {instruction.argval} - bound
        elif instruction.opname == "STORE_NAME":
            bound.add(instruction.argval)
        elif isinstance(instruction.argval, CodeType):
            read |= _read_first(instruction.argval) - bound
    return read


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def needed_cells(notebook: NotebookNode, wanted: Collection[int]) -> set[int]:
    """The cells ``wanted`` (by position), and those before them that bind or change what they
    read."""
    needed, missing = set(wanted), set[str]()
    imported = _imported(notebook)
    for index, cell in reversed(code_cells(notebook)):
        names = names_in(cell.source)
        if index in needed or (names.bound | names.changed - imported) & missing:
            needed.add(index)
            missing = (missing - names.bound) | names.read
    return needed


def dependent_cells(notebook: NotebookNode, changed: Collection[int]) -> set[int]:
    """The cells ``changed``, and those after them that may run otherwise when these do."""
    dependent, touched = set(changed), set[str]()
    imported = _imported(notebook)
    for index, cell in code_cells(notebook):
        names = names_in(cell.source)
        if index in dependent or names.read & touched:
            dependent.add(index)
            touched |= (names.read | names.bound) - imported
    return dependent


def _imported(notebook: NotebookNode) -> frozenset[str]:
    """What no cell changes: a call of a module's function for its effect leaves the module as it
    was."""
    return frozenset[str]().union(
        *(names_in(cell.source).imported for _, cell in code_cells(notebook))
    )
