"""Runs main.py in forks of one process that has loaded torch and transformers once: seconds are saved at every start.

Reads one JSON object a line: words (of the command line), before (code to run first), processes,
launched (with torchrun's environment), log (a file).
Answers with one line of process ids, and when all have ended with one line of their exit statuses. The words of its own
command line are modules to load, too.
"""

import gc
import importlib
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ptuning"))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - imported by the trainer only when it draws
import torch

import main
from common import failure

for module in sys.argv[1:]:
    importlib.import_module(module)
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is loaded is not searched again in every fork


def run(job, environment):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    sys.argv = ["main.py", *job["words"]]
    try:
        exec(job["before"], {})
        failure.catch_signals(failure.leave_on_signal)
        failure.run(main.main)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)  # ends the process
    sys.stdout.flush()
    os._exit(0)


def ranks(processes, launched):
    """What torchrun puts into the environment of each process; one that is not `launched` is alone."""
    if not launched:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


for line in sys.stdin:
    job = json.loads(line)
    children = []
    for environment in ranks(job["processes"], job["launched"]):
        child = os.fork()
        if not child:
            run(job, environment)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
