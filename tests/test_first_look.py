"""What the programs say before torch is loaded: what they are about to do, and mistakes that need no torch."""

import json
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE, TINY

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # an import of it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = (
    f"--do_train --train_file {SAMPLE}/train.json --prompt_column content --response_column summary --pre_seq_len 4 "
    f"--model_name_or_path {TINY} --output_dir {{here}}/new"
)
PREDICT = f"--do_predict --test_file {SAMPLE}/dev.json --output_dir {{here}}/new --prompt_column content"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a run of one step, whose prefix is never read, and a folder of another model."""
    here = tmp_path_factory.mktemp("here")
    (here / "output" / "run" / "checkpoint-1").mkdir(parents=True)
    (here / "output" / "run" / "checkpoint-1" / "pytorch_model.bin").write_bytes(b"")
    (here / "other").mkdir()
    (here / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return here


@pytest.fixture(scope="module")
def busy_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def start(program, words):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "ptuning" / program), *words.split()]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "ptuning")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


NO_FOLDER = "there is no such folder. Give a folder with config.json"
NO_STEP = "checkpoint-2: there is no pytorch_model.bin in it. {here}/output/run has checkpoint-1."
NO_RUN = "there is no pytorch_model.bin in it. {here}/output has the runs run."
ANY = "--ptuning_checkpoint {here}/output/run --model_name_or_path"
MISTAKES = {
    "main: the model": ("main.py", TRAIN + " --model_name_or_path ./none", NO_FOLDER),
    "main: another model": ("main.py", TRAIN + " --model_name_or_path {here}/other", "a model of type 'llama'"),
    "main: the step": ("main.py", PREDICT + " --ptuning_checkpoint {here}/output/run/checkpoint-2", NO_STEP),
    "main: the run": ("main.py", PREDICT + " --ptuning_checkpoint {here}/output/nosuch", NO_RUN),
    "main: no model": (
        "main.py",
        PREDICT + " --ptuning_checkpoint {here}/output/run",
        "--model_name_or_path is missing",
    ),
    "main: a column": ("main.py", TRAIN + " --prompt_column contents", "has no column 'contents'; its columns are:"),
    "main: a dev column": (
        "main.py",
        f"{PREDICT} --model_name_or_path {TINY} --prompt_column contents",
        "dev.json row 1 has no column 'contents'",
    ),
    "web: no model": ("web_demo.py", "--server_port 45871", "--model_name_or_path is missing: the base model"),
    "web: the port": ("web_demo.py", f"--model_name_or_path {TINY} --server_port {{port}}", "Address already in use"),
    "api: the port": ("api_demo.py", f"--model_name_or_path {TINY} --server_port {{port}}", "Address already in use"),
    "api: the model": ("api_demo.py", "--model_name_or_path ./none --server_port 45872", NO_FOLDER),
    "cli: the step": ("cli_demo.py", "--ptuning_checkpoint {here}/output/run/checkpoint-2", NO_STEP),
    "cli: best": ("cli_demo.py", "--ptuning_checkpoint {here}/output/run/best", "no best checkpoint is known"),
    "cli: no model": ("cli_demo.py", "--ptuning_checkpoint {here}/output/run", "--model_name_or_path is missing"),
    "cli: another model": ("cli_demo.py", ANY + " {here}/other", "a model of type 'llama'"),
    "export: the model": ("export_model.py", "--output_dir {here}/new --model_name_or_path ./none", NO_FOLDER),
    "export: the run": ("export_model.py", "--output_dir {here}/new --ptuning_checkpoint {here}/output/nosuch", NO_RUN),
    "compare: the run": ("compare.py", "{here}/nosuch", "nosuch is no folder. Give folders that main.py wrote"),
}


@pytest.mark.parametrize(("program", "words", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_that_needs_no_torch_is_said_without_it(program, words, says, here, busy_port):
    done = start(program, words.format(here=here, port=busy_port))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and says.format(here=here) in done.stderr


def test_a_run_says_what_it_is_about_before_libraries_load(here):
    done = start("main.py", TRAIN.format(here=here) + " --max_steps 7")
    assert done.stdout == (
        f"Model: {TINY}. Data: {SAMPLE}/train.json, 2,400 rows. Run: {here}/new, 7 steps.\nLoading libraries …\n"
    )
    assert "torch" in done.stderr  # which it went on to load
