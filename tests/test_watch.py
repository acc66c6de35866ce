"""watch.py: runs that go wrong are stopped, or said to, with what a user needs to know."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_main import TRAIN_SETTINGS, flags, run

from watch import SKIPPED_STEPS, ZERO_STEPS, StepWatch


def make_watch(folder, said=None, dtype=torch.float32, loss_scaling=False):
    say = (lambda line: None) if said is None else said.append
    return StepWatch(dtype=dtype, output_dir=folder, loss_scaling=loss_scaling, say=say)


def step(watch, number, *losses, norm=1.0, first_row=1):
    """One step of batches of two rows each."""
    for index, loss in enumerate(losses):
        first = first_row + 2 * index
        watch.saw_batch(torch.tensor(loss), torch.tensor([first, first + 1]))
    watch.saw_gradient(number, 2e-2, torch.tensor(norm))


# ---- no finite number


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_finite_number_stops_with_the_rows_of_its_own_batch(loss, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s)stopped at step 7: the loss is {loss}\..* rows 13, 14 of the training"):
        step(make_watch(tmp_path), 7, 1.0, loss, 2.0, first_row=11)


def test_a_gradient_that_is_no_finite_number_stops_with_the_rows_of_the_step(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)the loss is finite\..*gradient norm inf, .* rows 1, 2, 3, 4 of"):
        step(make_watch(tmp_path), 7, 1.0, 2.0, norm=math.inf)


def test_the_message_names_dtype_learning_rate_last_good_checkpoint_and_what_to_do(tmp_path):
    for number in (5, 20):  # one before the step, and one of another run after it
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError) as stopped:
        step(make_watch(tmp_path, dtype=torch.float16), 12, math.nan)
    good = tmp_path / "checkpoint-5"
    message = str(stopped.value)
    for part in (
        "learning rate 0.02",
        "weights float16",
        f"last good checkpoint: {good}\n",
        "--bf16",
        "--learning_rate",
    ):
        assert part in message
    assert f"--ptuning_checkpoint {good}" in message and "checkpoint-20" not in message


def test_with_loss_scaling_skipped_steps_are_normal_until_they_do_not_end(tmp_path):
    watch = make_watch(tmp_path, loss_scaling=True)
    for number in range(SKIPPED_STEPS - 1):
        step(watch, number, 1.0, norm=math.inf)
    step(watch, 100, 1.0)  # one good step in between starts the count again
    for number in range(SKIPPED_STEPS - 1):
        step(watch, 101 + number, 1.0, norm=math.nan)
    with pytest.raises(ValueError, match=f"the last {SKIPPED_STEPS} steps had to be skipped"):
        step(watch, 200, 1.0, norm=math.nan)


def test_with_loss_scaling_a_bad_loss_stops_at_once(tmp_path):
    with pytest.raises(ValueError, match="the loss is nan"):
        step(make_watch(tmp_path, loss_scaling=True), 3, math.nan, norm=math.nan)


def test_a_run_that_blows_up_stops_before_it_saves_and_names_rows_of_the_file(monkeypatch, tmp_path):
    # At this learning rate the first step throws the prefix so far out that the second has no loss.
    settings = {**TRAIN_SETTINGS, "learning_rate": 1e38, "save_steps": 1, "max_train_samples": 8}
    with pytest.raises(ValueError) as stopped:
        run(monkeypatch, settings, output_dir=tmp_path)
    message = str(stopped.value)
    assert "Training stopped at step 2: the loss is nan.\n  gradient norm nan" in message
    assert "float32" in message and f"last good checkpoint: {tmp_path / 'checkpoint-1'}\n" in message
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    rows = message.split("rows ")[1].split(" of the")[0].split(", ")
    assert rows and {int(row) for row in rows} <= set(range(1, 9))


@pytest.mark.slow
def test_a_bad_loss_on_one_process_stops_all_with_one_message(tmp_path):
    # The loss of process 1 is infinite in step 2, its gradient finite: the other one can know only by being told.
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT / 'ptuning')!r})\n"
        "import modeling_chatglm\n"
        "honest, calls = modeling_chatglm.supervised_loss, []\n"
        "def loss(*args):\n"
        "    calls.append(1)\n"
        "    bad = os.environ['RANK'] == '1' and len(calls) == 3\n"
        "    return honest(*args) + (float('inf') if bad else 0)\n"
        "modeling_chatglm.supervised_loss = loss\n"
        f"sys.argv[0] = {str(ROOT / 'ptuning' / 'main.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    status = tmp_path / "status"
    settings = {**TRAIN_SETTINGS, "per_device_train_batch_size": 2, "output_dir": tmp_path / "run"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(
        [*command, *flags(settings)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PTUNING_STATUS_FILE": str(status)},
    )
    assert status.read_text() == "2", done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: Training stopped at step 2: the loss is inf.\n  gradient norm " in done.stderr
    rows = done.stderr.split("  rows ")[1].split(" of the")[0].split(", ")
    assert len(rows) == 2  # the batch of process 1 alone
    assert "Traceback" not in done.stderr


# ---- exactly 0


def test_a_gradient_of_exactly_0_over_several_steps_is_said_once(tmp_path):
    said = []
    watch = make_watch(tmp_path, said)
    for number in range(1, ZERO_STEPS):
        step(watch, number, 1.0, norm=0.0)
    step(watch, ZERO_STEPS, 1.0, norm=1e-30)
    assert said == []
    for number in range(20, 40):
        step(watch, number, 1.0, norm=0.0)
    assert len(said) == 1 and "exactly 0 for 5 steps, up to step 24" in said[0]
