"""The tests: they lie in the rooms of the code, share through tests/support/ only, and none hides another."""

import ast
from collections import Counter

import pytest
from conftest import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
MOST_LINES = 600


def name_of(path):
    return str(path.relative_to(TESTS))


def statements_of(path):
    return ast.parse(path.read_text(encoding="utf-8")).body


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_imports_from_a_test_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    tests = {file.stem for file in FILES if file.stem.startswith("test_")}
    assert tests.isdisjoint(names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_defines_a_function_twice(path):
    # The first would never run. The style's own rule for this takes fixtures that come from tests/support/ for it, too.
    defined = Counter(node.name for node in statements_of(path) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert [name for name, times in defined.items() if times > 1] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_a_reader_wants(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_no_two_test_files_have_one_name():
    # pytest imports them by their names alone.
    names = Counter(path.name for path in FILES if path.name.startswith("test_"))
    assert [name for name, times in names.items() if times > 1] == []


def test_the_rooms_are_those_of_the_code():
    rooms = {path.parent.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS} - {"support", "peers"}
    assert [room for room in rooms if not (ROOT / "ptuning" / room).is_dir()] == []
