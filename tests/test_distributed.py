"""train.sh and main.py with several processes on a CPU, which talk through gloo. On GPUs the same code talks
through NCCL; that cannot be seen here."""

import re

import pytest
from conftest import ROOT, SAMPLE, TINY
from test_scripts import bash

pytestmark = pytest.mark.slow

INSIDE = ROOT / "tests" / "inside"  # records rows, or breaks a process
# 4 steps of 16 rows, from 42 rows: an epoch ends in the middle of a batch. Then 10 dev rows and 7 answers.
WORDS = (
    "--prefix_dropout 0 --max_train_samples 42 --logging_steps 1 --preprocessing_num_workers 1 --disable_tqdm true "
    f"--report_to none --output_dir run --do_predict --test_file {SAMPLE}/dev.json --max_predict_samples 7 "
    "--do_sample false"
)
VARIABLES = {
    "MODEL": TINY,
    "DATA": SAMPLE,
    "PRE_SEQ_LEN": 8,
    "MAX_STEPS": 4,
    "SAVE_STEPS": 4,
    "DEV_ROWS": 10,
    "EVAL_BATCH_SIZE": 2,
    "MAX_TARGET_LENGTH": 16,
    "QUANTIZATION_BIT": "",
    "OMP_NUM_THREADS": 1,
    "PYTHONPATH": INSIDE,
}


def cut(processes):
    """A step of 16 rows on so many processes."""
    return {"NUM_GPUS": processes, "BATCH_SIZE": 8 // processes, "ACCUMULATION": 2}


# ---- a process that dies


def broken(command, code, **more):
    """(exit status, output lines from the first error on) of a run whose process 1 runs `code` before step 3."""
    environment = {**VARIABLES, **cut(2), "MAX_STEPS": 100_000, "BREAK": code, **more}
    done = bash(f"timeout 300 {command} 2>&1", **environment)  # far less than 100,000 steps take
    match = re.search(r"^error: .*", done.stdout, re.DOTALL | re.MULTILINE)
    assert match and "Traceback" not in done.stdout[: match.start()], done.stdout[-3000:]
    return done.returncode, match[0].splitlines()


DEATHS = {
    "an exception": ("raise RuntimeError('broken wire')", 1, "error: [rank 1] RuntimeError: broken wire"),
    "killed": ("os.kill(os.getpid(), 9)", 137, "error: process 1 was ended by SIGKILL. The system does that when"),
    "gone": ("os._exit(7)", 7, "error: process 1 ended with status 7 and without a message."),
}


@pytest.mark.parametrize(("code", "status", "message"), DEATHS.values(), ids=DEATHS.keys())
def test_a_process_that_dies_ends_the_job_with_its_own_error(code, status, message, tmp_path):
    returncode, lines = broken(f"bash train.sh {WORDS}", code, RECORD=tmp_path)
    assert returncode == status
    assert lines[0].startswith(message)
    assert len(lines) <= 2


def test_under_plain_torchrun_the_error_of_the_process_that_died_comes_first(tmp_path):
    settings = f"--do_train --train_file {SAMPLE}/train.json --prompt_column content --response_column summary"
    settings += f" --model_name_or_path {TINY} --pre_seq_len 8 --max_steps 100000 --max_target_length 16"
    command = f"torchrun --standalone --nproc-per-node=2 ptuning/main.py {settings} {WORDS}"
    returncode, lines = broken(command, "raise RuntimeError('broken wire')", RECORD=tmp_path)
    assert returncode == 1
    assert lines[0] == "error: [rank 1] RuntimeError: broken wire"
    assert not any("Another process is gone" in line for line in lines)
