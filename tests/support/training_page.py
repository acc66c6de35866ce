"""The training page, in a copy of the project: its runs land there."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE

from support.over_http import free_port, wait_for

PARTS = ("ptuning", "docs", "AdvertiseGen")
ENVIRONMENT = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class TrainingPage:
    """The page's program; `restart` starts it anew on the same port, as after a reboot or a kill."""

    def __init__(self, project):
        self.project, self.port, self.process = project, free_port(), None
        self.output = project / "output"
        self.restart()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def restart(self, *words, before=()):
        """`before`: a program, with its words, that starts the page's."""
        self.log = open(self.project / "page.log", "ab")  # noqa: SIM115 - as long as the program
        self.process = subprocess.Popen(
            [
                *before,
                sys.executable,
                "ptuning/train_web.py",
                "--server_port",
                str(self.port),
                "--root",
                str(self.project),
                *words,
            ],
            cwd=self.project,
            env={**os.environ, **ENVIRONMENT},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        wait_for(lambda: b"Open http" in (self.project / "page.log").read_bytes() and self.answers())

    def answers(self):
        import http.client

        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        return False

    def kill(self):
        """kill -9 of the page's program alone."""
        self.process.kill()
        self.process.wait()

    def record(self, name, kind="web"):
        file = self.output / name / f"{kind}.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def close(self):
        for record in self.output.glob("*/web*.json"):
            with contextlib.suppress(OSError, KeyError, ValueError):
                os.killpg(json.loads(record.read_text())["pid"], signal.SIGKILL)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def training_page(tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    for part in PARTS:
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.sh"):
        shutil.copy(file, project)
    (project / "output").mkdir()
    page = TrainingPage(project)
    yield page
    page.close()


def other_rows(folder, count=120):
    """A file of the sample's rows under other names of columns, and of other ones beside."""
    rows = [json.loads(line) for line in (SAMPLE / "train.json").read_text("utf-8").splitlines()[:count]]
    file = folder / "my rows.jsonl"
    lines = [{"编号": n, "问题": row["content"], "回答": row["summary"]} for n, row in enumerate(rows)]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return file
