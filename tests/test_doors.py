"""The doors of the rooms: what one room imports from another, and that each docstring stands alone."""

import ast
import re

import pytest
from conftest import ROOT

HOUSE = ROOT / "ptuning"
FILES = sorted(HOUSE.rglob("*.py"))
# A docstring that begins so needs the text above it, or says no more than the name of its function.
LEANS = re.compile(r"(The same|Same|Likewise|As above|As the|Whether|Ditto)\b")


def module_of(path):
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts)


TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
DEFINED = {
    (module, node.name): node
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


def imported_by_others():
    """{(module, name)} of what a file imports from another room."""
    found = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in TREES:
                if node.module.split(".")[0] != module.split(".")[0]:
                    found.update((node.module, alias.name) for alias in node.names)
    return found


def test_no_room_imports_an_underscored_name_of_another():
    assert not [name for name in imported_by_others() if name[1].startswith("_")]


@pytest.mark.parametrize("door", sorted(imported_by_others() & DEFINED.keys()), ids=".".join)
def test_what_another_room_imports_says_what_it_is(door):
    assert ast.get_docstring(DEFINED[door])


@pytest.mark.parametrize("module", TREES)
def test_every_docstring_stands_alone(module):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(TREES[module]) if isinstance(node, kinds)]
    assert not [text.split("\n")[0] for text in texts if LEANS.match(text)]


def test_every_file_says_what_it_is_for():
    assert not [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
