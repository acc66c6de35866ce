"""A program looks at its command, loads its libraries, then works."""

import gc
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from common.start import look_first, work


@pytest.fixture(autouse=True)
def collector_and_signals():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    gc.enable()
    gc.unfreeze()
    gc.freeze()  # as conftest.py has left it
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_collector_rests_while_the_libraries_load_and_works_again_after_it():
    seen = []
    look_first(lambda: seen.append(gc.isenabled()))
    seen.append(gc.isenabled())
    work(lambda: seen.append(gc.isenabled()))
    assert seen == [True, False, True]


def test_the_collector_passes_over_what_the_libraries_are():
    look_first(lambda: None)
    before = gc.get_freeze_count()
    library = [[]]
    work(lambda: None)
    assert gc.get_freeze_count() > before
    assert not any(found is library for found in gc.get_objects())


def test_a_mistake_ends_the_program_before_the_libraries_load():
    with pytest.raises(SystemExit) as end:
        look_first(exit, 2)
    assert end.value.code == 2
    assert gc.isenabled()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_program_where_python_loses_exceptions(number):
    """In the callback of a reference, as Python's import has them: an exception there is printed, and nothing ends."""
    code = (
        "import os, weakref\n"
        "from common.start import look_first\n"
        "look_first(lambda: None)\n"
        "library = type('Library', (), {})()\n"
        f"reference = weakref.ref(library, lambda _: os.kill(os.getpid(), {int(number)}))\n"
        "del library\n"
        "print('goes on')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"Stopped by {number.name}.\n")
