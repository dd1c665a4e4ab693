"""How the code is divided: rooms that import only rooms below them, short files and functions, and a map that holds."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lrs_utils"
# From the bottom up: a room imports only rooms on earlier lines; rooms on one line don't import each other.
ORDER = [
    ["arguments", "progress", "analysis.statistics"],
    ["models"],
    ["tasks"],
    ["scaling"],
    ["scoring"],
    ["searchers", "peers"],
    ["analysis"],  # all of it but statistics
    ["export"],
    ["finding", "training", "playground"],
    ["notebook", "__init__"],
]
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60
NOTEBOOKS = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
NAMES_OF_A_CLONE = re.compile("|".join([r"\.ipynb", "notebooks/", "data/results", *NOTEBOOKS]))


def _name(path: Path) -> str:
    """A module's name below lrs_utils, "models.load"; a room's `__init__.py` has the room's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imported(path: Path) -> set[str]:
    """Full names of all that a file imports, even inside functions: "lrs_utils.tasks.Suite"."""
    names = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: give the whole name of the module"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _modules_imported(path: Path) -> set[str]:
    """Those of the package."""
    found = set()
    for name in _imported(path):
        first, *parts = name.split(".")
        if first == "lrs_utils":
            while parts and ".".join(parts) not in MODULES:  # the last part is a name inside a module
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found


def _place(module: str) -> str:
    room = module.partition(".")[0]
    return module if any(module in places for places in ORDER) else room


def _level(module: str) -> int:
    [level] = [level for level, places in enumerate(ORDER) if _place(module) in places]
    return level


def _docstring(node: ast.AST) -> ast.Constant | None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    has_one = isinstance(node, documented) and ast.get_docstring(node) is not None
    return node.body[0].value if has_one else None


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({name: _modules_imported(path) for name, path in MODULES.items()}).prepare()


def test_a_room_imports_only_rooms_below_it():
    imports = [(name, other) for name, path in MODULES.items() for other in _modules_imported(path)]
    wrong = [pair for pair in imports if len({*map(_place, pair)}) == 2 and _level(pair[1]) >= _level(pair[0])]
    assert wrong == []


def test_the_package_imports_no_tool():
    tools = {"tools", *(path.stem for path in TOOLS)}
    wrong = [(module, name) for module, path in MODULES.items() for name in _imported(path)]
    assert [pair for pair in wrong if pair[1].partition(".")[0] in tools] == []


def test_the_order_holds_every_room_and_contributing_gives_the_same():
    assert {_place(module) for module in MODULES} == {place for places in ORDER for place in places}
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"<!-- order -->\n```\n(.*?)\n```", page, re.DOTALL)
    assert lines.splitlines() == [", ".join(places) for places in ORDER]


def test_the_map_in_the_readme_names_files_that_exist_and_every_room():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"## Where things are\n\n```\n(.*?)\n```", page, re.DOTALL)
    folders: list[str] = []
    for line in lines.splitlines():
        [(indent, first, rest)] = re.findall(r"^( *)(\S+) +(.*)$", line)
        folders = [*folders[: len(indent) // 2], first]
        assert (ROOT / "".join(folders)).exists(), line
        folder = ROOT / "".join(name for name in folders if name.endswith("/"))
        missing = [name for name in re.findall(r"\b\w+\.(?:py|js)\b", rest) if not (folder / name).exists()]
        assert not missing, line
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {*re.findall(r"^  (\w+)/", lines, re.MULTILINE)}


def test_files_are_short():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_short():
    long = {}
    for path in [*MODULES.values(), *TOOLS]:
        for node in _nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if _docstring(node) else node.body
                length = node.end_lineno - body[0].lineno + 1 if body else 0
                if length > MOST_LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(ROOT)}, {node.name}"] = length
    assert long == {}


def test_only_notebook_py_names_notebooks_and_results():
    found = []
    for module in MODULES.keys() - {"notebook"}:
        nodes = _nodes(MODULES[module])
        docstrings = {*map(_docstring, nodes)}
        texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        found += [
            (module, text.value) for text in texts if text not in docstrings and NAMES_OF_A_CLONE.search(text.value)
        ]
    assert found == []
