"""launch.py with one process, which it starts without torchrun."""

import os
import platform
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

LAUNCH = [sys.executable, str(ROOT / "ptuning" / "launch.py")]


@pytest.fixture
def program(tmp_path):
    """Writes a program and returns the command that launches it."""

    def write(code):
        file = tmp_path / "program.py"
        file.write_text(code)
        return [*LAUNCH, str(file), "--flag", "value"]

    return write


def test_the_program_gets_its_words_and_gives_its_status(program):
    done = subprocess.run(
        program("import sys; print(sys.argv[1:]); sys.exit(2)"), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "['--flag', 'value']\n", "")


def test_a_killed_program_is_put_into_words(program):
    done = subprocess.run(program("import os; os.kill(os.getpid(), 9)"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 137
    assert done.stderr.startswith("error: process 0 was ended by SIGKILL. The system does that when memory runs out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_program(program, number):
    code = f"""
import signal, sys, time
signal.signal({int(number)}, lambda *_: sys.exit({128 + number}))
print("ready", flush=True)
time.sleep(60)
"""
    running = subprocess.Popen(program(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (128 + number, "")


def test_torch_is_not_loaded_for_it(program):
    command = [LAUNCH[0], "-X", "importtime", *program("")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "failure" in done.stderr
    assert "torch" not in done.stderr


ROUNDS = """
import resource
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [bytearray(20 << 20) for _ in range(10)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc's malloc")
@pytest.mark.parametrize("given, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)])
def test_memory_that_a_step_frees_is_kept_for_the_next_unless_the_user_says_otherwise(program, given, kept):
    done = subprocess.run(
        program(ROUNDS), capture_output=True, text=True, timeout=60, env={**os.environ, **given}, check=True
    )
    assert (int(done.stdout) < 1000) is kept  # pages of the second round that the system had to give again
