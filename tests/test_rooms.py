"""The house: which room may import which, held against the imports in the code and the table in docs/development.md."""

import ast
import re

import pytest
from conftest import ROOT

HOUSE = ROOT / "ptuning"
# From the top floor down. A file imports from its own room and from floors below, never from one above.
FLOORS = (
    ("main", "web_demo", "cli_demo", "api_demo", "train_web"),
    ("export_model", "compare", "benchmark", "sign", "launch"),
    ("preference",),
    ("board",),
    ("serving",),
    ("forgetting",),
    ("alignment",),
    ("trainer",),
    ("first_look",),
    ("arguments",),
    ("training",),
    ("evaluation",),
    ("tuning",),
    ("data",),
    ("checkpoint", "families", "pretrained"),
    ("checkpoints",),
    ("chatglm3", "chatglm1"),
    ("chatglm2",),
    ("common",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in HOUSE.rglob("*.py") if "tiny" not in path.relative_to(HOUSE).parts)
MOST_LINES = 600


def module_of(path):
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Modules of the house that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found & set(map(module_of, FILES)) - {module_of(path)}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_imports_from_a_floor_above(path):
    own = FLOOR_OF[module_of(path).split(".")[0]]
    above = sorted(name for name in imports_of(path) if FLOOR_OF[name.split(".")[0]] < own)
    assert not above


def test_no_file_is_part_of_an_import_circle():
    graph = {module_of(path): imports_of(path) for path in FILES}
    while leaves := [name for name, imports in graph.items() if not imports & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_longer_than_a_reader_wants(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_main_is_a_recipe_of_at_most_120_lines():
    tree = ast.parse((HOUSE / "main.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno + 1 <= 120


@pytest.mark.parametrize(
    "room", [path for path in HOUSE.iterdir() if (path / "__init__.py").is_file()], ids=lambda p: p.name
)
def test_a_room_says_its_purpose_and_does_nothing_when_it_is_imported(room):
    tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


# What may stand at the top of a file: nothing there may have an effect on anything else.
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)


def is_quiet(node):
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    program = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    optional = isinstance(node, ast.Try) and all(isinstance(part, ast.Import | ast.ImportFrom) for part in node.body)
    return isinstance(node, DEFINITIONS) or text or program or optional


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_importing_a_file_registers_nothing_and_sets_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [ast.unparse(node)[:80] for node in tree.body if not is_quiet(node)]


@pytest.mark.parametrize("page", ["development.md", "development_zh.md"])
def test_the_page_of_rooms_names_these_floors_in_this_order(page):
    rows = re.findall(r"^\| `([^|]+)` \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M)
    named = [name.strip("`/ ").removesuffix(".py") for row in rows for name in row.split(",")]
    assert [name for name in named if name in FLOOR_OF] == [name for rooms in FLOORS for name in rooms]
