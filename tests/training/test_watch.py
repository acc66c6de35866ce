"""watch.py: runs that go wrong are stopped, or said to, with what a user needs to know."""

import json
import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SAMPLE
from support.runs import TRAIN_SETTINGS, flags, run

from trainer import PrefixTrainer
from training import watch
from training.watch import SKIPPED_STEPS, ZERO_STEPS, LossTrend, StepWatch


def make_watch(said=None, dtype=torch.float32, loss_scaling=False, checkpoint=None):
    say = (lambda line: None) if said is None else said.append
    return StepWatch(dtype=dtype, loss_scaling=loss_scaling, last_checkpoint=lambda: checkpoint, say=say)


def step(watch, number, *losses, norm=1.0, first_row=1):
    """One step of batches of two rows each."""
    for index, loss in enumerate(losses):
        first = first_row + 2 * index
        watch.saw_batch(torch.tensor(loss), torch.tensor([first, first + 1]))
    watch.saw_gradient(number, 2e-2, torch.tensor(norm))


# ---- no finite number


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_finite_number_stops_with_the_rows_of_its_own_batch(loss):
    with pytest.raises(ValueError, match=rf"(?s)stopped at step 7: the loss is {loss}\..* rows 13, 14 of the training"):
        step(make_watch(), 7, 1.0, loss, 2.0, first_row=11)


def test_a_gradient_that_is_no_finite_number_stops_with_the_rows_of_the_step():
    with pytest.raises(ValueError, match=r"(?s)the loss is finite\..*gradient norm inf, .* rows 1, 2, 3, 4 of"):
        step(make_watch(), 7, 1.0, 2.0, norm=math.inf)


def test_the_message_names_dtype_learning_rate_last_good_checkpoint_and_what_to_do():
    with pytest.raises(ValueError) as stopped:
        step(make_watch(dtype=torch.float16, checkpoint="output/run/checkpoint-5"), 12, math.nan)
    message = str(stopped.value)
    assert "learning rate 0.02, weights float16\n" in message
    assert "last good checkpoint: output/run/checkpoint-5\n" in message
    assert "(--ptuning_checkpoint output/run/checkpoint-5) with a lower --learning_rate, or --bf16" in message


def test_with_loss_scaling_skipped_steps_are_normal_until_they_do_not_end():
    watch = make_watch(loss_scaling=True)
    for number in range(SKIPPED_STEPS - 1):
        step(watch, number, 1.0, norm=math.inf)
    step(watch, 100, 1.0)  # one good step in between starts the count again
    for number in range(SKIPPED_STEPS - 1):
        step(watch, 101 + number, 1.0, norm=math.nan)
    with pytest.raises(ValueError, match=f"the last {SKIPPED_STEPS} steps had to be skipped"):
        step(watch, 200, 1.0, norm=math.nan)


def test_with_loss_scaling_a_bad_loss_stops_at_once():
    with pytest.raises(ValueError, match="the loss is nan"):
        step(make_watch(loss_scaling=True), 3, math.nan, norm=math.nan)


def test_on_a_gpu_a_step_is_judged_when_the_next_one_is_queued_or_something_is_saved(monkeypatch):
    # There is no GPU here: this stands for its copy to the host, which ends some time later.
    waits = []
    event = SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(watch, "to_host", lambda flags: (flags, event))
    watched = make_watch()
    step(watched, 1, 1.0)
    step(watched, 2, math.nan)
    assert len(waits) == 1  # for step 1, while step 2 is being computed
    with pytest.raises(ValueError, match="stopped at step 2: the loss is nan"):
        step(watched, 3, 1.0)
    watched = make_watch()
    step(watched, 1, math.nan)
    with pytest.raises(ValueError, match="stopped at step 1: the loss is nan"):
        watched.read()  # the trainer does so before it logs, evaluates or saves


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


def test_a_checkpoint_of_an_earlier_run_in_the_same_folder_is_not_the_last_good_one(monkeypatch, tmp_path):
    run(monkeypatch, TRAIN_SETTINGS, max_steps=1, output_dir=tmp_path)
    settings = {**TRAIN_SETTINGS, "learning_rate": 1e38, "overwrite_output_dir": True}
    with pytest.raises(ValueError, match="last good checkpoint: none was saved before this step"):
        run(monkeypatch, settings, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


@pytest.mark.slow
def test_a_bad_loss_on_one_process_stops_all_with_one_message(tmp_path):
    # The loss of process 1 is infinite in step 2, its gradient finite: the other one can know only by being told.
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT / 'ptuning')!r})\n"
        "from chatglm2 import modeling_chatglm\n"
        "honest, calls = modeling_chatglm.supervised_loss, []\n"
        "def loss(*args):\n"
        "    calls.append(1)\n"
        "    bad = os.environ['RANK'] == '1' and len(calls) == 2\n"
        "    return honest(*args) + (float('inf') if bad else 0)\n"
        "modeling_chatglm.supervised_loss = loss\n"
        f"sys.argv[0] = {str(ROOT / 'ptuning' / 'main.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    settings = {**TRAIN_SETTINGS, "per_device_train_batch_size": 2, "output_dir": tmp_path / "run"}
    command = [sys.executable, ROOT / "ptuning" / "launch.py", "--standalone", "--nproc-per-node=2", program]
    done = subprocess.run(
        [*command, *flags(settings)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: Training stopped at step 2: the loss is inf.\n  gradient norm " in done.stderr
    rows = done.stderr.split("  rows ")[1].split(" of the")[0].split(", ")
    assert len(rows) == 4  # two batches of process 1 alone, which are computed at once
    assert "Traceback" not in done.stderr


# ---- exactly 0


def test_a_gradient_of_exactly_0_over_several_steps_is_said_once():
    said = []
    watch = make_watch(said)
    for number in range(1, ZERO_STEPS):
        step(watch, number, 1.0, norm=0.0)
    step(watch, ZERO_STEPS, 1.0, norm=1e-30)
    assert said == []
    for number in range(20, 40):
        step(watch, number, 1.0, norm=0.0)
    assert len(said) == 1 and "exactly 0 for 5 steps, up to step 24" in said[0]


# ---- a loss that rises

# What a user of the official scripts reported of a run on 8 GPUs (step, training loss).
CLIMBING = [(10, 4.58), (100, 3.58), (500, 3.37), (840, 3.30), (1000, 3.34), (2000, 3.48), (3000, 3.61)]


def between(points, step):
    """The loss at a step, on the straight lines between the reported points."""
    for (start, first), (end, last) in zip(points, points[1:], strict=False):
        if step <= end:
            return first + (last - first) * max(0, step - start) / (end - start)


def first_rise(curve, smooth=True):
    """The step at which a curve of (step, loss) is said to rise, or None."""
    trend = LossTrend(smooth)
    return next((step for step, loss in curve if trend.add(step, loss)), None)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_reported_climb_is_noticed_long_before_its_end(noise):
    normal = random.Random(0).gauss
    curve = [(step, between(CLIMBING, step) + normal(0, noise)) for step in range(10, 3001, 10)]
    assert 1000 < first_rise(curve) < 2000


def test_the_reported_climb_is_noticed_at_the_second_dev_loss():
    # train.sh measures one every 1,000 steps
    assert first_rise([(0, 4.6), (1000, 3.34), (2000, 3.48), (3000, 3.61)], smooth=False) == 2000


def test_a_healthy_noisy_run_is_not_said_to_rise(shared):
    losses = json.loads((shared / "golden" / "mini-run.json").read_text())["loss"]
    assert first_rise(losses) is None
    # the same noise about the same course, ten times as long
    residuals = [loss - sum(value for _, value in losses[i - 2 : i + 3]) / 5 for i, (_, loss) in enumerate(losses)][
        2:-2
    ]
    for seed in range(50):
        draw = random.Random(seed).choice
        smooth_course = [(step, 5.7 + 1.1 * math.exp(-step / 90)) for step in range(10, 3001, 10)]
        assert first_rise([(step, loss + draw(residuals)) for step, loss in smooth_course]) is None


def test_a_flat_loss_of_single_rows_is_not_said_to_rise():
    # one row a step: a mean of 10 steps scatters by 0.16, more than the 2% that count
    for seed in range(50):
        normal = random.Random(seed).gauss
        assert first_rise([(step, 3.3 + normal(0, 0.16)) for step in range(10, 3001, 10)]) is None


DEV = {
    **TRAIN_SETTINGS,
    "validation_file": SAMPLE / "dev.json",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "max_eval_samples": 2,
    "max_train_samples": 8,
}


@pytest.fixture
def dev_losses(monkeypatch):
    """Makes the dev loss after step n the n-th number of the list that a test fills."""
    scripted = []
    honest = PrefixTrainer.prediction_step

    def prediction_step(self, *args, **kwargs):
        honest(self, *args, **kwargs)
        nats_and_tokens = torch.tensor([[float(scripted[self.state.global_step]), 1.0]])
        return None, nats_and_tokens, None

    monkeypatch.setattr(PrefixTrainer, "prediction_step", prediction_step)
    monkeypatch.setattr(watch, "RISE_STEPS", 2)
    return scripted


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_early_stopping_ends_a_run_that_rises_and_the_best_checkpoint_is_named(
    dev_losses, monkeypatch, tmp_path, capsys
):
    dev_losses += [3, 2, 1, 1.5, 1.6, 1.7]
    run(monkeypatch, DEV, early_stopping=True, eval_on_start=True, output_dir=tmp_path)
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    output = capsys.readouterr().out
    assert (
        "dev loss has been rising: 1.6000 at step 4, lowest 1.0000 at step 2; best checkpoint: checkpoint-2. Stop"
        in output
    )
    assert f"Best checkpoint: {tmp_path}/checkpoint-2 (dev loss 1.0000), also called {tmp_path}/best. " in output
    assert f"Last: {tmp_path}/checkpoint-4 (dev loss 1.6000)." in output


def test_a_run_that_was_stopped_early_is_not_trained_on_by_the_same_command(dev_losses, monkeypatch, tmp_path, capsys):
    dev_losses += [3, 1, 2, 2, 2, 2]
    for _ in range(2):
        run(monkeypatch, DEV, early_stopping=True, resume_from_checkpoint="last", output_dir=tmp_path)
    assert checkpoints(tmp_path)[-1] == "checkpoint-3"
    assert "checkpoint-3: the loss had been rising, and with --early_stopping the run ended there." in (
        capsys.readouterr().out
    )
    run(monkeypatch, DEV, resume_from_checkpoint="last", output_dir=tmp_path)
    assert checkpoints(tmp_path)[-1] == "checkpoint-5"


def test_without_early_stopping_a_rise_is_said_once_and_the_run_goes_on(dev_losses, monkeypatch, tmp_path, capsys):
    dev_losses += [3, 1, 2, 2, 2, 2]
    run(monkeypatch, DEV, output_dir=tmp_path)
    assert capsys.readouterr().out.count("loss has been rising") == 1
    assert checkpoints(tmp_path)[-1] == "checkpoint-5"


# ---- the best checkpoint


def test_best_is_a_relative_link_to_the_saved_checkpoint_of_the_lowest_dev_loss(dev_losses, monkeypatch, tmp_path):
    dev_losses += [0, 1, 3, 2, 4, 5]  # the lowest ones, of steps 0 and 1, are of no checkpoint
    (tmp_path / "best").symlink_to("of-another-run")
    run(monkeypatch, DEV, save_steps=2, eval_on_start=True, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert os.readlink(tmp_path / "best") == "checkpoint-2"
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (3, 2)
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_every_save_has_a_dev_loss_whatever_eval_steps_says(dev_losses, monkeypatch, tmp_path):
    dev_losses += [1] * 6
    run(monkeypatch, DEV, save_steps=2, eval_steps=3, output_dir=tmp_path)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 3, 4, 5]


def test_a_run_without_dev_loss_removes_the_link_of_the_run_before(monkeypatch, tmp_path, capsys):
    (tmp_path / "best").symlink_to("checkpoint-9")
    run(monkeypatch, TRAIN_SETTINGS, max_steps=1, output_dir=tmp_path)
    assert not (tmp_path / "best").is_symlink()
    assert f"Last checkpoint: {tmp_path}/checkpoint-1. Without a dev loss no best" in capsys.readouterr().out


def test_a_dev_loss_that_is_no_finite_number_stops_the_run_before_it_is_saved(dev_losses, monkeypatch, tmp_path):
    dev_losses += [1, 1, math.nan]
    with pytest.raises(ValueError, match="(?s)stopped at step 2: the dev loss is nan .*checkpoint: .*checkpoint-1\n"):
        run(monkeypatch, DEV, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-1"]
