"""The house stays as drawn: imports run down, public names are few, importing is light, the package
stays small."""

import ast
import importlib.metadata
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import flserving

PACKAGE = Path(flserving.__file__).parent

# Imports run down only, and never from a room into one on its own floor. The lab may import
# everything.
FLOORS = {
    # Ray's replicas run the command's server: above its room
    8: {"__init__", "__main__", "integrations.ray"},
    7: {"api", "optimize"},
    6: {"edge", "federated", "integrations"},  # integrations: below the command, which calls them
    5: {"serving"},
    4: {"experiments"},
    3: {"registry"},
    2: {"models", "monitoring"},
    1: {"extras"},
    0: {"errors", "forks"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
RING = {"errors", "extras", "forks", "models", "registry", "serving"}
"""The small module that a student reads: of the other rooms it imports only the hooks of two, if
anything."""
HOOKS = {"experiments", "monitoring"}
NOT_AT_IMPORT = {
    *("pandas", "sklearn", "matplotlib", "ipywidgets", "IPython", "tqdm"),
    *("grpc", "starlette", "uvicorn", "httpx", "prometheus_client", "cryptography", "zstandard"),
    *("onnx", "onnxruntime", "onnxscript", "flwr", "ray"),
}
# Budgets in tokens (names, numbers, operators and strings; docstrings are free): limits on lines
# reward packing them. The aims: core 52,000, api 21,000, 8.5 tokens a line and 3 packed assignments
# per 1,000 lines. What stands now is above them, with some room: lower these when something is
# deleted. The lab is below its aim (two thirds of 86,300, where it stood); the checks of the
# exercises count apart, as they grow with what students write, and so does what serves other tools,
# Flower among them.
TOKENS = {"core": 97_960, "api": 39_260, "lab": 46_000, "lab.checks": 52_400, "integrations": 9_000}
PARTS = {"lab.checks": "lab.checks", "federated.flower": "integrations"}
TOKENS_PER_LINE = 7.8
PACKED_PER_1000_LINES = 0.5
PARAMETERS = 8
WIDE = {
    "edge.device.EdgeModelServer.__init__": 10,
    "serving.repository.ModelHost.load_model": 9,
    "serving.server.ModelServer.predict": 9,
}
"""Functions outside the course that take more than ``PARAMETERS``: settings that users give by
name."""


def name_of(path: Path) -> str:
    """flserving/serving/cache.py -> serving.cache, flserving/serving/__init__.py -> serving."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """serving.batching.policy -> serving."""
    return module.partition(".")[0]


def floor_of(module: str) -> int:
    """The floor of a module that has one of its own, else of its room."""
    return FLOOR_OF.get(module, FLOOR_OF.get(room_of(module), 99))


def imported(source: str) -> set[str]:
    """Modules of the package that a file imports anywhere: inside functions and under TYPE_CHECKING
    as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: a relative import; name the module from flserving on"
            )
            base = (node.module or "").partition(".")
            if base[0] == "flserving":
                parts = [f"{base[2]}.{alias.name}".lstrip(".") for alias in node.names]
                found.update(part if part in MODULES else base[2] or "__init__" for part in parts)
        if isinstance(node, ast.Import):
            dotted = [alias.name.partition(".") for alias in node.names]
            found.update(rest or "__init__" for first, _, rest in dotted if first == "flserving")
    return found


GRAPH = {
    module: imported(path.read_text(encoding="utf-8")) - {module}
    for module, path in MODULES.items()
    if room_of(module) != "lab"
}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in GRAPH} == set(map(room_of, FLOOR_OF)), (
        "a new room: give it a floor in this table"
    )


def test_imports_run_down():
    wrong = {
        f"{module} -> {needed}"
        for module, modules in GRAPH.items()
        for needed in modules
        if room_of(needed) != room_of(module) and floor_of(needed) >= floor_of(module)
    }
    assert not wrong


def test_the_ring_imports_nothing_else_but_hooks():
    leaks = {
        f"{module} -> {needed}"
        for module, modules in GRAPH.items()
        for needed in modules
        if room_of(module) in RING and room_of(needed) not in RING | HOOKS
    }
    assert not leaks


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, in whatever number of steps; rooms' ``__init__`` files left
    out."""
    reach = {module: set(needed) for module, needed in graph.items()}
    for through in graph:
        for needed in reach.values():
            if through in needed:
                needed |= reach[through]
    found = {
        frozenset(other for other in reach[m] & reach.keys() if m in reach[other])
        for m in reach
        if m in reach[m]
    }
    return sorted((set(circle) for circle in found), key=min)


def test_no_circles():
    files = {
        module: needed for module, needed in GRAPH.items() if MODULES[module].name != "__init__.py"
    }
    assert circles(files) == []


def test_a_circle_is_found_over_any_number_of_steps():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [{"a", "b", "c"}]


def test_no_folder_has_more_than_eleven_files():
    for folder in {path.parent for path in MODULES.values()}:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 11, (
            f"{folder.name} has {len(files)} files: an idea of its own makes a folder"
        )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from flserving.serving.cache import ModelCache", {"serving.cache"}),
        ("from flserving.lab.style import figure", {"lab.style"}),
        ("from flserving import ModelServer, models", {"__init__", "models"}),
        ("from flserving.models import weights", {"models.weights"}),
        ("def late():\n    import flserving.registry.index", {"registry.index"}),
        ("import flserving", {"__init__"}),
        (
            "if TYPE_CHECKING:\n    from flserving.serving.server import ModelServer",
            {"serving.server"},
        ),
        ("import torch", set()),
    ],
)
def test_the_import_reader_sees_every_form(source, found):
    assert imported(source) == found


def test_importing_the_package_is_light():
    code = (  # torch brings tqdm along by itself
        "import sys, torch; before = set(sys.modules); import flserving; "
        f"print(*sorted({NOT_AT_IMPORT!r} & (sys.modules.keys() - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


def test_a_command_that_only_helps_loads_none_of_what_serves():
    code = (
        "import sys\nfrom flserving.api.cli import main\n"
        "try: main([{0!r}])\nexcept SystemExit: pass\n"
        "assert not {{'torch', 'numpy', 'msgspec', 'ssl', 'asyncio'}} & sys.modules.keys()"
    )
    for option in ("--help", "--version"):
        command = [sys.executable, "-c", code.format(option)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stderr) == (0, ""), (
            "each takes 0.1 s; torch alone takes seconds"
        )


def test_the_exported_names_are_the_importable_ones():
    """Type checkers and editors read the imports that never run; Python asks ``__getattr__``: both
    find the same."""
    tree = ast.parse(MODULES["__init__"].read_text(encoding="utf-8"))
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0
    ]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    public = {name: home for name, home in homes.items() if (home or "").startswith("flserving.")}
    assert sorted(flserving.__all__) == sorted(public) == list(flserving.__all__)
    for name, home in public.items():
        assert getattr(flserving, name) is getattr(importlib.import_module(home), name)
    assert {*flserving.__all__, "__version__"} <= set(dir(flserving))
    assert 8 <= len(public) <= 16, "about a dozen names"


def test_the_version_is_the_installed_one_and_a_misspelt_name_is_none():
    assert flserving.__version__ == importlib.metadata.version("flserving")
    assert flserving.experiments.statistics.__name__ == "flserving.experiments.statistics", (
        "rooms load when asked for"
    )
    with pytest.raises(AttributeError, match="module 'flserving' has no attribute 'ModelSever'"):
        _ = flserving.ModelSever
    with pytest.raises(ImportError, match="cannot import name 'ModelSever'"):
        from flserving import ModelSever  # noqa: F401


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_every_module_says_what_it_holds(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
        "the first line says what the module holds"
    )


def code_tokens(source: str) -> list[tokenize.TokenInfo]:
    """Names, numbers, operators and strings, docstrings left out; an f-string is one, as before
    Python 3.12."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    counted = {tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING}
    begins = getattr(tokenize, "FSTRING_START", None)
    ends = getattr(tokenize, "FSTRING_END", None)
    found = []
    inside = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == ends:
            inside -= 1
        elif token.type in counted | {begins} and not inside and token.start[0] not in docstrings:
            found.append(token)
        inside += token.type == begins
    return found


def packed_assignments(source: str) -> int:
    """``a, b = x, y`` puts two assignments into one line. A swap is one idea, and so is an
    unpacking."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets), *_], value=ast.Tuple(elts=values)):
                read = sorted(ast.dump(target).replace("Store()", "Load()") for target in targets)
                found += read != sorted(map(ast.dump, values))
    return found


def parameters(source: str) -> dict[str, int]:
    """Function -> how many parameters it takes, self and cls left out; what is collected by a star
    is no parameter."""
    found = {}

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [
                    each.arg
                    for each in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)
                ]
                found[f"{path}{child.name}"] = len(names) - (names[:1] in (["self"], ["cls"]))
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{path}{child.name}.")
            else:
                visit(child, path)

    visit(ast.parse(source), "")
    return found


def test_parameters_are_counted_without_the_object():
    source = "class A:\n    def f(self, a, *b, c=1): ...\n\ndef g(a, /, b):\n    def h(): ...\n"
    assert parameters(source) == {"A.f": 2, "g": 2, "g.h": 0}


def test_functions_take_few_parameters():
    wide = {
        f"{module}.{name}": count
        for module, path in MODULES.items()
        if room_of(module) != "lab"
        for name, count in parameters(path.read_text(encoding="utf-8")).items()
        if count > PARAMETERS
    }
    assert wide == WIDE, "give a dataclass of the field's name"


def test_code_tokens_counts_code():
    source = '"""Doc\nstring."""\n\nx = (1,  # one\n     2)\n# no\ndef f():\n    """Doc."""\n    return x\n'
    assert len(code_tokens(source)) == 7 + 5 + 2


def test_packed_assignments_leaves_swaps_and_unpackings_out():
    assert packed_assignments("a, b = 1, 2\na, b = b, a\nfirst, last = name.split()\n") == 1


def test_the_package_stays_small():
    tokens = dict.fromkeys(TOKENS, 0)
    lines = packed = 0
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        counted = code_tokens(source)
        name = name_of(path)
        part = next(
            (part for prefix, part in PARTS.items() if name.startswith(prefix)), room_of(name)
        )
        tokens[part if part in tokens else "core"] += len(counted)
        lines += len({token.start[0] for token in counted})
        packed += packed_assignments(source)
    assert all(tokens[part] <= limit for part, limit in TOKENS.items()), f"{tokens} of {TOKENS}"
    density = sum(tokens.values()) / lines
    assert density <= TOKENS_PER_LINE, (
        f"{density:.2f} tokens a line: write it looser, or find the simpler idea"
    )
    assert 1000 * packed / lines <= PACKED_PER_1000_LINES, (
        f"{packed} packed assignments in {lines} lines"
    )
