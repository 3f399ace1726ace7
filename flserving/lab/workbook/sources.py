"""The package's own source in a notebook: ``show(ModelCache.lease)``."""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flserving
from flserving.lab.workbook.sentences import SentenceError

_ROOT = Path(flserving.__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Source:
    """A piece of source, highlighted where a front end shows Markdown.

    Line numbers are left out: an edit elsewhere in the file would make the stored output of a
    notebook wrong.
    """

    file: str
    code: str

    def _repr_markdown_(self) -> str:
        return f"`{self.file}`:\n\n```python\n{self.code}\n```"

    def __repr__(self) -> str:
        return f"{self.file}\n{self.code}"


def show(thing: Any, *, docstring: bool = False) -> Source:
    """The source of a class, method, function or property, as it stands in the file; end the cell
    with this call.

    Args:
        thing: For example ``BatchQueue.take``. Wrappers (``functools.wraps``, cached and partial
            functions, bound methods) are looked through.
        docstring: Whether its own docstring is shown, too.

    Raises:
        SentenceError: It has no Python source: it is built in, or an object and no class or
            function.
    """
    inner = thing
    if isinstance(inner, partial):
        inner = inner.func
    inner = getattr(inner, "fget", None) or getattr(inner, "func", None) or inner
    inner = inspect.unwrap(inner) if callable(inner) else inner
    try:
        source = textwrap.dedent(inspect.getsource(inner))
        file = Path(inspect.getsourcefile(inner) or "")
    except (OSError, TypeError):
        raise SentenceError(
            f"{thing!r} has no Python source to show: name a class, a method or a function of a module"
        ) from None
    hidden = range(0) if docstring else _docstring(source)
    shown = [
        line for number, line in enumerate(source.splitlines(), start=1) if number not in hidden
    ]
    inside = file.is_relative_to(_ROOT)
    told = file.relative_to(_ROOT).as_posix() if inside else file.name
    return Source(told, "\n".join(shown))


def _docstring(source: str) -> range:
    """The lines of a definition's own docstring, counted from 1."""
    node = ast.parse(source).body[0]
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if not isinstance(node, kinds) or ast.get_docstring(node) is None or len(node.body) == 1:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
