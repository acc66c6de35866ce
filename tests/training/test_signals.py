"""Programs that a parent has made deaf to signals: in a script's background job, under nohup, cron or some CI systems."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SAMPLE, TINY

DEAF = ["bash", "-c", "trap '' INT HUP; exec \"$@\"", "-"]  # what the rest of the command inherits


def test_a_program_that_a_test_starts_hears_every_signal():
    code = "import signal as s; print([s.getsignal(n) == s.SIG_IGN for n in (s.SIGINT, s.SIGTERM, s.SIGHUP)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[False, False, False]\n"


@pytest.mark.slow
def test_so_it_does_where_the_tests_themselves_were_started_deaf():
    test = f"{__file__}::test_a_program_that_a_test_starts_hears_every_signal"
    command = [*DEAF, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


FLAGS = (
    f"--do_train --train_file {SAMPLE}/train.json --prompt_column content --response_column summary --pre_seq_len 8 "
    f"--model_name_or_path {TINY} --max_steps 100000 --save_steps 100000 --logging_steps 1 --max_target_length 16 "
    "--report_to none --disable_tqdm true"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--nproc-per-node=2"]], ids=["1 process", "2 processes"])
def test_a_run_that_was_started_deaf_goes_on_after_ctrl_c_and_saves_by_sigterm(words, tmp_path):
    launch = [sys.executable, ROOT / "ptuning" / "launch.py", *words, ROOT / "ptuning" / "main.py"]
    command = [*DEAF, *map(str, launch), *FLAGS, "--output_dir", str(tmp_path / "run")]
    log = tmp_path / "log"

    def wait_for_steps(count):
        until = time.monotonic() + 300
        while log.read_text().count("  loss ") < count:
            assert time.monotonic() < until and running.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        wait_for_steps(1)
        for number in (signal.SIGINT, signal.SIGHUP):
            os.killpg(running.pid, number)
        wait_for_steps(log.read_text().count("  loss ") + 2)
        running.terminate()
        assert running.wait(timeout=200) == 143, log.read_text()[-2000:]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    step = re.search(r"stopped after step (\d+) of 100000", log.read_text())[1]
    assert (tmp_path / "run" / f"checkpoint-{step}" / "pytorch_model.bin").is_file()
