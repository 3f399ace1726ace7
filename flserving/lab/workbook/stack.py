"""The student's own serving stack: parts written in a notebook become files that other notebooks
import.

``keep(LRU)`` writes ``my_stack/lru.py`` beside the notebook, ``kept("LRU")`` gives it back. Nothing
is ever lost: every text that was kept, or written there by hand, stays in ``my_stack/versions/``.
"""

import ast
import builtins
import dis
import importlib
import inspect
import linecache
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from flserving.errors import ConfigError
from flserving.lab.workbook.answers import FOLDER, notebook, replace_file, shell
from flserving.lab.workbook.sentences import STUB, SentenceError

_MARKERS = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION[ \t]*\n", re.MULTILINE)


class MissingPartError(SentenceError):
    """A part that was not kept yet, or whose file cannot be imported."""


class _NotKeptError(Exception):
    """Why a part cannot stand alone."""


def keep(part: Any) -> None:
    """Write the source of a class or function of this notebook to ``my_stack/<name>.py``,
    importable by itself.

    The file begins with what the part needs of the notebook: imports, numbers and texts, and
    helpers defined there. A printed sentence says where it is; or why it is not kept: it is not
    finished, it is not of this notebook, it needs something that lives only in the notebook, or the
    folder is read-only.
    """
    name = getattr(part, "__name__", type(part).__name__)
    try:
        text = _module(part, name)
        path = _file(name)
        changed = _store(path, text)
    except _NotKeptError as error:
        print(f"{name} is not kept: {error}")
    except OSError as error:
        print(
            f"{name} is not kept, {FOLDER} cannot be written here: {error.strerror}. Your code stays in its cell."
        )
    else:
        print(f"{'Kept' if changed else 'Already kept'}: {path.as_posix()}")


def kept(name: str, otherwise: Any = None) -> Any:
    """The part ``name`` that was kept, read anew from its file.

    Args:
        name: Of the class or function, as in the notebook that keeps it.
        otherwise: What to use where no such part is there, for example a class of the package; a
            sentence says so.

    Raises:
        MissingPartError: There is none and ``otherwise`` is None, or its file cannot be imported.
    """
    if not isinstance(name, str):
        raise ConfigError(
            f'kept takes the name as a text: lab.kept("{getattr(name, "__name__", "LRU")}")'
        )
    path = _file(name)
    if not path.exists():
        missing = f"{name} is not in {FOLDER} yet: {_who_makes(name)}"
        if otherwise is None:
            raise MissingPartError(missing)
        print(f"{missing} Until then {getattr(otherwise, '__name__', otherwise)} takes its place.")
        return otherwise
    try:
        return getattr(_run(path.read_text(encoding="utf-8"), path), name)
    except (Exception, SystemExit) as error:
        raise MissingPartError(
            f"{path.as_posix()} cannot be used ({type(error).__name__}: {error}): keep {name} again from its notebook, "
            f"or take an earlier text from {FOLDER}/versions."
        ) from error


def _run(text: str, path: Path) -> ModuleType:
    """The module that the text of a part makes, in ``sys.modules`` like one that was imported.

    Not by an import: that could take bytecode of the text that was there a moment ago.
    """
    package = sys.modules.setdefault(str(FOLDER), ModuleType(str(FOLDER)))
    package.__path__ = [str(FOLDER.resolve())]
    module = ModuleType(f"{FOLDER}.{path.stem}")
    module.__file__ = str(path.resolve())
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    try:
        exec(compile(text, module.__file__, "exec"), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before
        raise
    setattr(package, path.stem, module)
    return module


def _file(name: str) -> Path:
    """LRU -> my_stack/lru.py, DynamicBatcher -> my_stack/dynamic_batcher.py."""
    if not name.isidentifier():
        raise ConfigError(f"{name!r} is no name of a class or function")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return FOLDER / f"{snake}.py"


def _who_makes(name: str) -> str:
    """The notebook in this folder that keeps a part of this name."""
    for path in sorted(Path.cwd().glob("*.ipynb")):
        if f"keep({name})" in path.read_text(encoding="utf-8", errors="replace"):
            return f"notebook {path.stem} makes it, run its exercise and the cell with lab.keep({name})."
    return f"write it, and call lab.keep({name})."


def _store(path: Path, text: str) -> bool:
    """Put a text in place in one step; the texts before and after are among the versions, whoever
    else writes."""
    versions = path.parent / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    # bytes: an editor may have saved it in another encoding
    before = path.read_bytes() if path.exists() else None
    if before == content:
        return False
    for one in (before, content):
        if one is not None:
            _add_version(versions, path.stem, one)
    replace_file(path, content)
    importlib.invalidate_caches()
    return True


def _add_version(folder: Path, stem: str, content: bytes) -> None:
    number = 1
    while True:
        path = folder / f"{stem}_{number}.py"
        try:
            with path.open("xb") as file:  # fails if another notebook was faster
                file.write(content)
            return
        except FileExistsError:
            if path.read_bytes() == content:
                return
        number += 1


# ------------------------------------------------------------------------------- the text of a part


def _module(part: Any, name: str) -> str:
    """A module that holds the part and what it needs.

    Raises:
        _NotKeptError: It says what to change.
    """
    if not (inspect.isclass(part) or inspect.isfunction(part)) or not name.isidentifier():
        raise _NotKeptError("keep takes a class or a function that has a name.")
    if part.__module__ != "__main__":
        raise _NotKeptError(
            f"it comes from {part.__module__}; only what you write in this notebook is kept."
        )
    needed: dict[str, str] = {}
    _collect(name, part, needed)
    imports = sorted(line for line in needed.values() if line.startswith(("import ", "from ")))
    rest = [text for text in needed.values() if not text.startswith(("import ", "from "))]
    blocks = [f'"""{name}, kept from {notebook()}."""', "\n".join(imports), *rest]
    text = "\n\n\n".join(block for block in blocks if block) + "\n"
    try:
        _run(text, _file(name))
    except (Exception, SystemExit) as error:
        raise _NotKeptError(
            f"alone in a file it fails with {type(error).__name__}: {error}"
        ) from error
    return text


def _collect(name: str, value: Any, needed: dict[str, str]) -> None:
    """Add the source of a part, after everything that it needs."""
    source = source_of(value, name)
    if STUB in source:
        raise _NotKeptError(
            f"{name} has a line that waits for your code. What you kept before stays."
        )
    namespace = sys.modules["__main__"].__dict__
    needed[name] = ""  # in work: a function that calls itself
    for other in sorted(
        _globals_in(compile(source, name, "exec")) - {name} - vars(builtins).keys()
    ):
        if other not in needed:
            _need(name, other, namespace, needed)
    needed[name] = needed.pop(name) + source  # last: below what it needs


def _need(user: str, name: str, namespace: dict[str, Any], needed: dict[str, str]) -> None:
    if name not in namespace:
        raise _NotKeptError(f"{user} uses {name}, which this notebook does not define.")
    value = namespace[name]
    module = getattr(value, "__module__", None)
    origin = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or name
    if isinstance(value, ModuleType):
        needed[name] = _import_line(value.__name__, name)
    elif module == "__main__" and (inspect.isclass(value) or inspect.isfunction(value)):
        _collect(name, value, needed)
    elif _is_constant(value):
        needed[name] = f"{name} = {value!r}"
    elif module and getattr(sys.modules.get(module), origin, None) is value:
        needed[name] = f"from {module} import {origin}" + (f" as {name}" if origin != name else "")
    else:
        raise _NotKeptError(
            f"{user} uses {name}, which lives only in this notebook ({type(value).__name__}): give it as an argument."
        )


def _is_constant(value: Any) -> bool:
    """Numbers, texts, and tuples, lists and dicts of them."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _import_line(module: str, name: str) -> str:
    return f"import {module}" if module == name else f"import {module} as {name}"


def _globals_in(code: CodeType) -> set[str]:
    """Names that code looks up outside itself, in functions and class bodies too."""
    found = set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname in {"LOAD_NAME", "LOAD_GLOBAL"} and not instruction.argval.startswith(
            "__"
        ):
            found.add(str(instruction.argval))
        if isinstance(instruction.argval, CodeType):
            found |= _globals_in(instruction.argval)
    return found


def source_of(value: Any, name: str) -> str:
    """The source of a class or function that a cell defined, without the markers of a solution."""
    for cell in _cells(value):
        try:
            tree = ast.parse(cell)
        except SyntaxError:
            continue
        for node in reversed(tree.body):
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name == name
            ):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = cell.splitlines()[first - 1 : node.end_lineno]
                return _MARKERS.sub("", "\n".join(lines) + "\n").rstrip("\n")
    raise _NotKeptError(
        f"no cell that begins with class or def {name} was found: define it at the top of a cell."
    )


def _cells(value: Any) -> Iterator[str]:
    """Texts that may define it: the file of its own code, then what was run, the newest first."""
    for each in (value, *vars(value).values()) if inspect.isclass(value) else (value,):
        inner = getattr(each, "fget", None) or getattr(each, "__func__", None) or each
        code = getattr(inspect.unwrap(inner), "__code__", None) if callable(inner) else None
        if code is not None:
            yield textwrap.dedent("".join(linecache.getlines(code.co_filename)))
    if shell() is not None:
        yield from reversed([str(cell) for cell in shell().user_ns.get("In", [])])
