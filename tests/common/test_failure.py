"""How a program ends: messages, exit statuses, --debug. Each case is a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def end(body, *words, **environment):
    """The finished program whose main() is `body`."""
    code = f"from common.failure import run\ndef main():\n    {body}\nrun(main)\nprint('the end')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning"), **environment}
    encoding = environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, timeout=60, env=environment, encoding=encoding)


def test_a_users_mistake_is_one_message_and_status_2():
    done = end("print('before'); raise ValueError('row 3 is broken')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "before\n", "error: row 3 is broken\n")


def test_the_loss_of_another_process_is_said_without_a_traceback():
    done = end("raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer')")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Another process is gone; the messages of its machine tell why.")
    assert "Connection closed by peer" in done.stderr and "traceback" not in done.stderr


@pytest.mark.parametrize("words, environment", [(["--debug"], {}), ([], {"PTUNING_TRACEBACK": "1"})])
def test_the_traceback_is_shown_on_request(words, environment):
    done = end("raise ValueError('row 3 is broken')", *words, **environment)
    assert done.returncode == 2
    assert re.search(r"^Traceback .*\nerror: row 3 is broken\n$", done.stderr, re.DOTALL)


def test_an_unforeseen_error_is_one_message_with_its_traceback_in_a_file(tmp_path):
    done = end("{}['x']", TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: KeyError: 'x'\n") and "Traceback" not in done.stderr
    file = re.search(r"The traceback is in (\S+);", done.stderr)[1]
    assert "KeyError: 'x'" in Path(file).read_text() and Path(file).parent == tmp_path


def test_an_unforeseen_error_shows_its_traceback_with_debug():
    assert "Traceback" in end("{}['x']", "--debug").stderr


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("open('/dev/null/x')", "error: /dev/null/x: Not a directory. A part of that path is a file"),
        ("import os; raise OSError(28, os.strerror(28), '/full')", "error: /full: No space left on device. The disk"),
        (
            "import no_such_package",
            "error: A package is missing or broken: No module named 'no_such_package'. Run: pip",
        ),
        ("raise MemoryError", "error: This machine has not enough memory"),
        ("open('no-such-file')", "No such file or directory: 'no-such-file'"),
    ],
)
def test_what_the_system_refuses_is_said_with_what_to_do(body, says):
    done = end(body)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_the_message_is_shown_although_a_library_hooks_the_end():
    # torch.distributed holds back what is printed until the hook of the program returns, which ours never does.
    done = end("import sys; sys.excepthook = lambda *words: None; raise ValueError('row 3')")
    assert (done.returncode, done.stderr) == (2, "error: row 3\n")


def test_an_import_that_fails_later_is_one_message():
    code = "from common.failure import run\nrun(print)\nimport no_such_package"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: A package is missing") and done.stderr.count("\n") == 1
    )


def test_control_characters_of_the_input_do_not_reach_the_terminal():
    done = end(r"raise ValueError('a\x1b[2Jb\x07\ud83d')")
    assert done.stderr == "error: a\\x1b[2Jb\\x07\\ud83d\n"


def test_a_long_message_is_cut():
    lines = end("raise ValueError('long ' * 999 + 'line\\n' * 50)").stderr.splitlines()
    assert len(lines) == 8 and max(map(len, lines)) < 520


def test_text_that_the_terminal_cannot_show_does_not_end_the_program():
    done = end("print('问⟦')", PYTHONIOENCODING="gbk:strict")
    assert (done.returncode, done.stdout) == (0, "问\\u27e6\nthe end\n")


def test_ctrl_c_ends_with_status_130_and_no_traceback():
    done = end("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_a_program_that_ends_well_goes_on():
    assert end("print('问')").stdout == "问\nthe end\n"


@pytest.mark.parametrize(
    "body",
    [
        "raise ImportError('libarrow.so: failed to map segment from shared object')",
        "raise OSError(12, os.strerror(12), '/lib/x.so')",
        'raise RuntimeError("can\'t start new thread")',
        "raise RuntimeError('std::bad_alloc')",
        "raise MemoryError",
    ],
)
def test_a_limit_of_addresses_is_named_where_memory_is_refused(body):
    limit = "import os, resource; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9)); "
    done = end(limit + body)
    assert done.returncode == 2
    assert "has not enough memory" in done.stderr and "pip" not in done.stderr
    assert "The shell allows 1.0 GB of addresses; lift that limit: ulimit -v unlimited." in done.stderr


@pytest.mark.parametrize("body", ["pathlib.Path('{}').resolve(strict=True)", "open('{}/x')"])
def test_a_symbolic_link_that_leads_to_itself_is_named(body, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = end("import pathlib; " + body.format(loop))
    assert done.returncode == 2
    assert f"{loop}" in done.stderr and ": a symbolic link there leads back to itself. Look with ls -l" in done.stderr
