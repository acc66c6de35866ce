"""main.py in forks of one process that has imported everything, one fork for each rank; see run_server.py."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

LONGEST = 120  # seconds that a run may take


class Ranks:
    """The process that forks, with `modules` imported beside main.py, and `environment` changed."""

    def __init__(self, log: Path, *modules: str, **environment: str):
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        environment.pop("PTUNING_TRACEBACK", None)
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("run_server.py"), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, words, before="", processes=1, meanwhile=None, launched=False) -> tuple[list[int], str]:
        """(exit statuses, output) of a run with these words.

        `before` is Python that each process runs first; `meanwhile` is called with the process ids. Several processes, and one
        that is `launched`, have the environment that torchrun gives them.
        """
        self.log.unlink(missing_ok=True)
        job = {
            "words": [str(word) for word in words],
            "before": before,
            "processes": processes,
            "launched": launched or processes > 1,
            "log": str(self.log),
        }
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        children = json.loads(self.server.stdout.readline())
        limit = threading.Timer(LONGEST, lambda: [os.kill(child, signal.SIGKILL) for child in children])
        limit.start()
        if meanwhile:
            meanwhile(children)
        statuses = json.loads(self.server.stdout.readline())
        limit.cancel()
        return statuses, self.log.read_text()

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=60)
