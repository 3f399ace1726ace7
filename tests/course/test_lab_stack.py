"""Parts of the student's own stack: what ``keep`` writes, what ``kept`` gives back, and that
nothing is lost."""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from flserving.errors import ConfigError
from flserving.lab.workbook import stack
from flserving.lab.workbook.stack import MissingPartError, keep, kept

LRU = '''
class LRU:
    """Keeps values."""

    def __init__(self, capacity):
        self.capacity = capacity
        ### BEGIN SOLUTION
        self.items = {}
        ### END SOLUTION
'''


class Notebook:
    """Cells that run as in a kernel: in ``__main__``, each remembered in ``In``."""

    def __init__(self, monkeypatch) -> None:
        self.main = ModuleType("__main__")
        self.cells = [""]
        monkeypatch.setitem(sys.modules, "__main__", self.main)
        monkeypatch.setattr(stack, "shell", lambda: SimpleNamespace(user_ns={"In": self.cells}))

    def run(self, cell: str):
        self.cells.append(cell)
        exec(compile(cell, f"cell {len(self.cells)}", "exec"), vars(self.main))
        return self.main


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield Notebook(monkeypatch)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "my_stack":
            del sys.modules[name]


def test_a_class_is_kept_without_the_markers_and_comes_back(notebook, capsys):
    keep(notebook.run(LRU).LRU)
    assert capsys.readouterr().out == "Kept: my_stack/lru.py\n"
    text = Path("my_stack/lru.py").read_text()
    assert (
        text.startswith('"""LRU, kept from notebook."""\n\n\nclass LRU:\n')
        and "SOLUTION" not in text
    )
    assert text.endswith("        self.items = {}\n")
    assert kept("LRU")(3).capacity == 3
    from my_stack.lru import LRU as imported

    assert pickle.loads(pickle.dumps(imported(2))).capacity == 2
    keep(notebook.main.LRU)
    assert capsys.readouterr().out == "Already kept: my_stack/lru.py\n"


NEEDS = """
import numpy as np
import os.path
from collections import OrderedDict
from collections.abc import Callable as Function
from dataclasses import dataclass, field
LIMITS = {"small": (1, 2.5), "large": None}

def half(n):
    return n if n < 2 else half(n // 2)

@dataclass
class Part:
    shape: tuple = LIMITS["small"]
    order: OrderedDict = field(default_factory=OrderedDict)

    @property
    def size(self) -> "int":
        return half(int(np.prod(self.shape)))

    async def later(self, run: Function[[int], int]):
        return [os.path.join(str(i), "x") for i in range(3)]
"""


def test_what_a_part_needs_goes_with_it(notebook):
    keep(notebook.run(NEEDS).Part)
    text = Path("my_stack/part.py").read_text()
    for line in (
        "import numpy as np",
        "import os",
        "from collections import OrderedDict",
        "from collections.abc import Callable as Function",
        "from dataclasses import field",
        "LIMITS = {'small': (1, 2.5), 'large': None}",
        "@dataclass",
    ):
        assert line in text.splitlines(), text
    assert text.index("def half") < text.index("class Part")
    del sys.modules["my_stack.part"]
    assert kept("Part")().size == 1


@pytest.mark.parametrize(
    ("cell", "name", "message"),
    [
        ('def f():\n    raise NotImplementedError("f: replace this line with your code")', "f", "waits for your code"),
        ("state = object()\ndef f():\n    return state", "f", "f uses state, which lives only in this notebook"),
        ("state = [object()]\ndef f():\n    return state", "f", "f uses state, which lives only in this notebook"),
        ("def f():\n    return nowhere", "f", "f uses nowhere, which this notebook does not define"),
        ("def g():\n    return nowhere\ndef f():\n    return g()", "f", "g uses nowhere"),
        ("f = lambda: 1", "f", "keep takes a class or a function that has a name"),
        ("f = 3", "f", "keep takes a class or a function"),
        ("from collections import OrderedDict as f", "f", "it comes from collections"),
        ("if True:\n    def f(): pass", "f", "define it at the top of a cell"),
    ],
)  # fmt: skip
def test_what_cannot_stand_alone_is_told_and_what_was_there_stays(
    notebook, capsys, cell, name, message
):
    Path("my_stack").mkdir()
    Path("my_stack/f.py").write_text("f = 1\n")
    keep(getattr(notebook.run(cell), name))
    told = capsys.readouterr().out
    assert message in told and told.count("\n") == 1
    assert Path("my_stack/f.py").read_text() == "f = 1\n"


def test_a_part_that_fails_alone_is_told(notebook, capsys):
    cell = "import sys\ndef once(f):\n    assert sys.modules['__main__'].first\n    return f\n"
    notebook.main.first = True
    keep(notebook.run(cell + "@once\ndef f(): pass").f)
    assert Path("my_stack/f.py").exists()
    notebook.main.first = False
    capsys.readouterr()
    keep(notebook.main.f)
    assert "alone in a file it fails with AssertionError" in capsys.readouterr().out


def test_every_text_stays_also_one_that_was_edited_by_hand(notebook):
    for number in (1, 2, 2, 1):
        keep(notebook.run(f"def part():\n    return {number}").part)
    Path("my_stack/part.py").write_text("def part():\n    return 'by hand'\n")
    keep(notebook.run("def part():\n    return 3").part)
    found = {path.name: path.read_text() for path in Path("my_stack/versions").glob("part_*.py")}
    assert sorted(text.split()[-1] for text in found.values()) == ["1", "2", "3", "hand'"]
    assert kept("part")() == 3


def test_two_notebooks_that_keep_at_once_lose_nothing(notebook, monkeypatch):
    """The other one writes after we have looked, and before we replace the file."""
    keep(notebook.run("def part():\n    return 1").part)
    replace_file = stack.replace_file

    def late(path, text):
        monkeypatch.setattr(stack, "replace_file", replace_file)
        stack._store(path, "def part():\n    return 'other'\n")
        replace_file(path, text)

    monkeypatch.setattr(stack, "replace_file", late)
    keep(notebook.run("def part():\n    return 2").part)
    texts = [path.read_text() for path in Path("my_stack/versions").iterdir()]
    assert len(texts) == 3 and any("other" in text for text in texts)
    assert kept("part")() == 2


def test_a_folder_that_cannot_be_written_is_told(notebook, capsys):
    Path("my_stack").write_text("a file")
    keep(notebook.run(LRU).LRU)
    told = capsys.readouterr().out
    assert (
        told.startswith("LRU is not kept, my_stack cannot be written here:")
        and told.count("\n") == 1
    )


def test_a_missing_part_names_its_notebook_or_what_takes_its_place(notebook, capsys):
    with pytest.raises(MissingPartError, match=r"LRU is not in my_stack yet: write it") as missing:
        kept("LRU")
    assert missing.value._render_traceback_() == [str(missing.value)]
    Path("03_caching.ipynb").write_text('{"source": ["lab.keep(LRU)"]}')
    with pytest.raises(MissingPartError, match="notebook 03_caching makes it"):
        kept("LRU")
    assert kept("LRU", otherwise=dict) is dict
    assert "Until then dict takes its place." in capsys.readouterr().out


@pytest.mark.parametrize("text", ["def LRU(:\n", "1 / 0\n", "other = 1\n"])
def test_a_damaged_part_is_told(notebook, text):
    Path("my_stack").mkdir()
    Path("my_stack/lru.py").write_text(text)
    with pytest.raises(MissingPartError, match=r"my_stack/lru.py cannot be used .*keep LRU again"):
        kept("LRU", otherwise=dict)


NAMES = {
    "LRU": "lru",
    "DynamicBatcher": "dynamic_batcher",
    "V2Server": "v2_server",
    "HTTPDoor": "http_door",
}


@pytest.mark.parametrize(("name", "file"), NAMES.items())
def test_files_are_named_like_modules(name, file):
    assert stack._file(name) == Path(f"my_stack/{file}.py")


def test_only_plain_data_count_as_constants():
    assert all(stack._is_constant(value) for value in (1, "a", None, (1, [2.5]), {"a": b"b"}))
    assert not any(
        stack._is_constant(value) for value in (np.zeros(2), np.float32(1), object(), dataclass)
    )


def test_a_file_in_another_encoding_is_told_and_stays_among_the_versions(notebook, capsys):
    Path("my_stack").mkdir()
    Path("my_stack/lru.py").write_bytes(b"# \xff an editor of another age")
    with pytest.raises(MissingPartError, match="cannot be used"):
        kept("LRU")
    keep(notebook.run(LRU).LRU)
    assert capsys.readouterr().out == "Kept: my_stack/lru.py\n"
    assert kept("LRU")(3).capacity == 3
    assert Path("my_stack/versions/lru_1.py").read_bytes() == b"# \xff an editor of another age"


def test_a_part_that_ends_python_does_not_end_the_notebook(notebook, capsys):
    Path("my_stack").mkdir()
    Path("my_stack/lru.py").write_text("raise SystemExit")
    with pytest.raises(MissingPartError, match="SystemExit"):
        kept("LRU")


def test_a_part_is_asked_for_by_its_name(notebook):
    with pytest.raises(ConfigError, match=r'as a text: lab.kept\("LRU"\)'):
        kept(notebook.run(LRU).LRU)


@pytest.mark.parametrize("in_the_way", ["my_stack", "my_stack/versions"])
def test_a_file_where_the_folder_should_be_is_told_and_left_alone(in_the_way, notebook, capsys):
    Path(in_the_way).parent.mkdir(exist_ok=True)
    Path(in_the_way).write_text("mine")
    keep(notebook.run(LRU).LRU)
    assert "LRU is not kept, my_stack cannot be written here" in capsys.readouterr().out
    assert Path(in_the_way).read_text() == "mine"
