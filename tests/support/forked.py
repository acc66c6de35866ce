"""Programs of this project, run in forks of one process that has imported everything.

A program starts in 0.1 s instead of 6, so that hundreds of starts can be tested. A fork runs the program's file as
`__main__`, with words, environment and folder of its own: what it prints and its exit status are the real ones.
"""

import ctypes
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "ptuning"
MAX_MEMORY = 8 * 2**30  # bytes a fork may ask for: what needs more has not looked at its input


class Forks:
    """The process that forks. `run` starts a program in it and waits for its end."""

    def __init__(self, **environment):
        environment = {**os.environ, "PYTHONPATH": str(PROGRAMS), "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.lock = threading.Lock()

    def run(self, program, words, *, cwd, environment=None, as_root=True, timeout=60, stdin=""):
        """The ended program: returncode (None where it ran out of time), stdout, stderr."""
        request = {
            "program": program,
            "words": [str(word) for word in words],
            "cwd": str(cwd),
            "environment": {name: str(value) for name, value in (environment or {}).items()},
            "as_root": as_root,
            "timeout": timeout,
            "stdin": stdin,
        }
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- inside that process


def respect_permissions():
    """Give up root's right to read and write everything, so that permission bits bind as they do for a user."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for index in (0, 1):
        sets[index] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def become(request, stdin, stdout, stderr):
    """Turn this fork into the program that is asked for. Does not return."""
    status = 1
    try:
        os.setsid()
        for number, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file.fileno(), number)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        if not request["as_root"]:
            respect_permissions()
        program = str(PROGRAMS / request["program"])
        sys.argv = [program, *request["words"]]
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(child, timeout):
    """Exit status of a child, minus the signal that ended it; None if it had to be killed."""
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def serve():
    """Answer requests, one JSON object a line, until there are no more."""
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import transformers
    import wandb  # noqa: F401

    import api_demo  # noqa: F401
    import arguments
    import cli_demo  # noqa: F401
    import main  # noqa: F401
    import web_demo  # noqa: F401

    arguments.library_flags()
    transformers.Seq2SeqTrainer  # noqa: B018 - imported on first use
    gc.collect()
    gc.freeze()  # what is loaded is not searched again in every fork
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            stdin.write(request["stdin"].encode())
            stdin.seek(0)
            child = os.fork()
            if child == 0:
                become(request, stdin, out, err)
            answer = {"returncode": wait_for(child, request["timeout"])}
            for name, file in (("stdout", out), ("stderr", err)):
                file.seek(0)
                answer[name] = file.read().decode(errors="replace")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    del sys.path[0]  # this folder, where a file may have the name of a room
    serve()
