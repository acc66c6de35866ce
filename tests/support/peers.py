"""Other people's test suites, as modules: those of the installed transformers and PEFT, whose wheels hold none.

`.ci/run` lays the source distributions into PEERS. What a distribution lacks is stood in for by empty classes, so that
the rest can be imported; `has` tells.
"""

import contextlib
import importlib
import importlib.metadata
import os
import sys
import types
import unittest
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from conftest import ROOT

from support.expected import EXPECTED

PEERS = Path(os.environ.get("PEERS", ROOT / ".peers"))
# Modules that a suite imports and that are not in every distribution, or are for what is not tested here.
STANDINS = {
    "peers_transformers.exporters.test_export": ("ExportTesterMixin",),
    "peers_transformers.generation.test_utils": ("GenerationTesterMixin",),
    "tests.exporters": (),
    "tests.exporters.test_export": ("ExportGenerateTesterMixin",),
    "diffusers": ("StableDiffusionPipeline",),
}

MARKERS = "accelerate_tests bitsandbytes flash_attn_test flash_attn_3_test flash_attn_4_test generate torch_compile_test".split()


def tests_of(package):
    """The folder of a package's own tests, of the version that is installed."""
    return PEERS / f"{package}-{importlib.metadata.version(package)}" / "tests"


def has(package, path=""):
    """True where a package's tests are at hand, or the file `path` of them."""
    return (tests_of(package) / path).exists()


def suite(package, module, copy=""):
    """A module of the package's tests, such as test_modeling_common; skips the module that asks where it is not here.

    With a `copy` it is loaded once more, for whoever changes it.
    """
    folder = tests_of(package)
    if not folder.is_dir():
        pytest.skip(f"the tests of {package} are not here: {folder} (.ci/run fetches them)", allow_module_level=True)
    name = f"peers_{package}{copy}"
    if name not in sys.modules:
        root = types.ModuleType(name)
        root.__path__ = [str(folder)]
        sys.modules[name] = root
    for standin, classes in STANDINS.items():
        if standin not in sys.modules and not found(standin):
            sys.modules[standin] = types.ModuleType(standin)
            for class_name in classes:
                setattr(sys.modules[standin], class_name, type(class_name, (), {}))
    return importlib.import_module(f"{name}.{module}")


def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the folder above it
        return False


class Whole:
    """A test case whose parts fail it at once, as a failing part alone would leave it passed."""

    @contextlib.contextmanager
    def subTest(self, *arguments, **names):
        with contextlib.suppress(unittest.SkipTest):
            yield


def expect_failures(items, complete):
    """Mark the tests that EXPECTED names; with `complete` files, a line of it that names no test is an error."""
    used = set()
    for item in items:
        name = item.nodeid.rpartition("/")[2]
        for pattern, reason in EXPECTED.items():
            if fnmatchcase(name, pattern):
                used.add(pattern)
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    files = {item.path.name for item in items}
    if not has("transformers", "generation/test_utils.py"):
        files.discard("test_model_peers.py")
    lost = [pattern for pattern in EXPECTED.keys() - used if pattern.partition("::")[0] in files]
    if complete and lost:
        raise pytest.UsageError(f"EXPECTED names tests that there are not: {', '.join(lost)}")
