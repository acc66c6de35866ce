"""Programs that refuse bad input: flags that are good, how one runs, and what a refusal is."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from conftest import SAMPLE, TINY

TRAIN = {
    "do_train": True,
    "prompt_column": "content",
    "response_column": "summary",
    "model_name_or_path": TINY,
    "pre_seq_len": 4,
    "max_source_length": 32,
    "max_target_length": 16,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
PREDICT = {"do_predict": True, "max_target_length": 8, "disable_tqdm": True}
ROW = {"content": "类型#裙", "summary": "好看的裙子。"}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module")
def trained(forks, tmp_path_factory):
    """A run with checkpoint-1 and checkpoint-2. It must succeed, or every refusal below would mean nothing."""
    here = tmp_path_factory.mktemp("trained")
    words = flags(TRAIN, train_file=SAMPLE / "train.json", max_train_samples=8, output_dir=here / "run")
    done = forks.run("main.py", words, cwd=here)
    assert done.returncode == 0, done.stderr
    return here / "run"


@pytest.fixture
def here(tmp_path):
    """A folder with good data in it, for the input and output of one case."""
    (tmp_path / "train.json").write_text(LINE * 4, encoding="utf-8")
    return tmp_path


def flags(settings, **more):
    words = []
    for name, value in {**settings, **more}.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def train_flags(here, **more):
    return flags(TRAIN, **{"train_file": here / "train.json", "output_dir": here / "output", **more})


def predict_flags(here, **more):
    return flags(PREDICT, **{"test_file": here / "train.json", "output_dir": here / "output", **more})


def snapshot(folder):
    """Everything below a folder: kind, permissions, size and content."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name == ".lock":  # says which process used the run's folder last
            continue
        status = path.lstat()
        content = None
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (status.st_mode, status.st_size if stat.S_ISREG(status.st_mode) else None, content)
    return found


def assert_refused(done, says):
    """One message that contains each of `says`, under 10 lines, status 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1, done.stderr
    assert done.stderr.count("\n") < 10 and len(done.stderr) < 2500, done.stderr
    for part in [says] if isinstance(says, str) else says:
        assert part in done.stderr, done.stderr


def refuse(forks, here, words, says, program="main.py", **how):
    """Run a program and check that it refuses, leaving `here` and the small model as they were."""
    before = snapshot(here), snapshot(TINY)
    done = forks.run(program, words, cwd=here, **how)
    assert_refused(done, says)
    assert (snapshot(here), snapshot(TINY)) == before


def table(cases):
    """A table as parameters: the first of each entry is what is wrong and becomes the test's name."""
    return pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in cases])


COLUMNS = {"prompt_column": "content", "response_column": "summary"}
