"""launch.py with one process, which it starts without torchrun."""

import os
import platform
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from launch import describe_death

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


@pytest.mark.parametrize("words", [[], ["--nproc-per-node=1"]], ids=["alone", "by torchrun's words"])
def test_a_program_that_is_told_to_stop_before_it_listens_has_not_crashed(words, tmp_path):
    # It stops itself as a scheduler's SIGTERM would, before main.py has a handler, or once it has given it up.
    program = tmp_path / "program.py"
    program.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    done = subprocess.run([*LAUNCH, *words, program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 143
    assert done.stderr == (
        "error: process 0 was ended by SIGTERM. Somebody, or another program, has sent it that signal.\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_launcher_hands_on_to_a_program_without_handlers_is_no_error(number, program):
    code = "import time; print('ready', flush=True); time.sleep(60)"
    running = subprocess.Popen(program(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (128 + number, f"Stopped by {signal.Signals(number).name}.\n")


def test_ctrl_c_while_torchrun_loads_is_no_traceback(tmp_path):
    slow = tmp_path / "torch" / "__init__.py"
    slow.parent.mkdir()
    slow.write_text("import time; print('ready', flush=True); time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    running = subprocess.Popen(
        [*LAUNCH, "--nproc-per-node=1", "program.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    assert (running.communicate(timeout=60)[1], running.returncode) == ("", 130)


@pytest.mark.parametrize("machine", [0, 1])
def test_who_may_reach_the_port_of_several_machines_is_said_once_by_the_first(machine, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--nnodes=2", f"--node-rank={machine}", "--master-addr=127.0.0.1", f"--master-port={port}", "program.py"]
    running = subprocess.Popen([*LAUNCH, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if machine == 0:
        assert running.stdout.readline().startswith(f"Warning: whoever reaches port {port} of machine 0 (MASTER_PORT) ")
    running.terminate()
    assert "Warning" not in running.communicate(timeout=60)[0]


def test_without_any_word_the_launcher_says_what_is_missing():
    done = subprocess.run(LAUNCH, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Nothing to start. Give a program: ") and len(done.stderr.splitlines()) == 1


DEATHS = {
    signal.SIGKILL: "memory runs out",
    signal.SIGBUS: "/dev/shm is full",
    signal.SIGXCPU: "ulimit -t",
    signal.SIGSEGV: "A library crashed in it",
    signal.SIGABRT: "A library crashed in it",
    **dict.fromkeys([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1], "has sent it that"),
}


@pytest.mark.parametrize(("number", "said"), DEATHS.items(), ids=[number.name for number in DEATHS])
def test_only_a_signal_of_a_crash_is_called_one(number, said):
    sentence = describe_death(3, -number)
    assert sentence.startswith(f"process 3 was ended by {number.name}. ") and said in sentence
    assert ("crashed" in sentence) == ("crashed" in said)


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
