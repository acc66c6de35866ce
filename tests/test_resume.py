"""Nothing is lost: checkpoints that are whole or not there, runs that go on as if never stopped, kills, full disks."""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE, TINY
from test_main import flags

from checkpoint import read_prefix
from checkpoints import run_folder
from checkpoints.run_folder import (
    clear_leftovers,
    newest_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
    stage_checkpoint,
    verify_checkpoint,
)
from common.files import write_json
from training import resume, shards

# ---- folders that look like checkpoints, without a model


def write_checkpoint(run, step, number, text="", publish=publish_checkpoint):
    """A small complete checkpoint; `number` says which one of its run it is."""
    staging = stage_checkpoint(run / f"checkpoint-{step}")
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.ones(2, 3)}, staging / "pytorch_model.bin")
    write_json(staging / "ptuning.json", {"training": {"save_number": number}, "text": text})
    write_json(staging / "trainer_state.json", {"global_step": step, "train_batch_size": 4})
    for name in resume.RESUME_FILES:
        torch.save({"noise": torch.rand(100)}, staging / name)
    publish(staging, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def names(run):
    return sorted(path.name for path in run.iterdir())


def saved(run):
    """What is there of checkpoints, half written ones too."""
    return [name for name in names(run) if "checkpoint-" in name]


def text_of(folder):
    return json.loads((folder / "ptuning.json").read_text())["text"]


FILES = ["checksums.json", "optimizer.pt", "ptuning.json", "pytorch_model.bin", "scheduler.pt", "trainer_state.json"]


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


DAMAGES = [(name, damage) for name in FILES for damage in (truncate, empty, flip_bit, Path.unlink)]
DAMAGES.remove(("checksums.json", Path.unlink))  # what is left then looks like a checkpoint of the official scripts


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(name, damage, tmp_path):
    earlier, newest = write_checkpoint(tmp_path, 1, 1), write_checkpoint(tmp_path, 2, 2)
    damage(newest / name)
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: \S+ (is missing|has|is not|cannot be read)"):
        verify_checkpoint(newest)
    folder, lines = resume.find_resume_checkpoint("last", tmp_path)
    assert folder == str(earlier)
    assert "checkpoint-2 is damaged" in lines[0] and "for checkpoint-1, the newest complete one" in lines[0]
    with pytest.raises(ValueError, match="checkpoint-2 is damaged.*Give an earlier one"):
        resume.find_resume_checkpoint(str(newest), tmp_path)


def test_every_single_bit_of_the_checksums_counts(tmp_path):
    file = write_checkpoint(tmp_path, 1, 1) / "checksums.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged"):
            verify_checkpoint(file.parent)


def test_a_damaged_prefix_is_refused_and_other_damage_does_not_matter_to_it(tmp_path):
    folder = write_checkpoint(tmp_path, 1, 1)
    truncate(folder / "optimizer.pt")
    assert read_prefix(folder)["embedding.weight"].shape == (2, 3)
    flip_bit(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: pytorch_model\.bin is not what was written"):
        read_prefix(folder)


def test_a_checkpoint_without_checksums_is_complete_if_its_state_can_be_read(tmp_path):
    folder = write_checkpoint(tmp_path, 1, 1)
    (folder / "checksums.json").unlink()
    verify_checkpoint(folder)
    truncate(folder / "trainer_state.json")
    with pytest.raises(ValueError, match=r"checkpoint-1 is incomplete: trainer_state\.json cannot be read"):
        verify_checkpoint(folder)


def test_an_official_checkpoint_is_complete(shared):
    verify_checkpoint(shared / "golden" / "official-checkpoint")


def test_the_newest_checkpoint_is_the_one_written_last_not_the_one_of_the_highest_step(tmp_path):
    # An earlier run of 300 steps, a second one over it that was killed after step 100.
    write_checkpoint(tmp_path, 300, 3)
    second_run = write_checkpoint(tmp_path, 100, 4)
    assert newest_checkpoint(tmp_path) == (second_run, [])


def test_without_a_single_complete_checkpoint_nothing_is_started_over(tmp_path):
    truncate(write_checkpoint(tmp_path, 1, 1) / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt has .* No other checkpoint is there"):
        resume.find_resume_checkpoint("last", tmp_path)


def test_a_checkpoint_without_optimizer_cannot_be_continued_and_says_so(tmp_path):
    folder = write_checkpoint(tmp_path, 1, 1)
    (folder / "checksums.json").unlink()
    (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="has no optimizer.pt.*--ptuning_checkpoint"):
        resume.find_resume_checkpoint("last", tmp_path)


# ---- written at once


class Killed(BaseException):
    """Stands for a kill: nothing of the program runs after it but what the test calls."""


@pytest.mark.parametrize("calls", range(12))
def test_a_kill_between_any_two_steps_of_publishing_leaves_a_whole_checkpoint(calls, monkeypatch, tmp_path):
    write_checkpoint(tmp_path, 1, 1, text="old")
    left = [calls]

    def kill_in_time(function):
        def wrapped(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapped

    def publish(staging, folder):
        for owner, name in ((os, "fsync"), (Path, "rename"), (shutil, "rmtree"), (run_folder, "write_json")):
            monkeypatch.setattr(owner, name, kill_in_time(getattr(owner, name)))
        publish_checkpoint(staging, folder)

    try:
        write_checkpoint(tmp_path, 1, 2, text="new", publish=publish)
    except Killed:
        pass
    else:
        pytest.fail(f"{calls} calls are more than publishing makes")
    monkeypatch.undo()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")
    assert text_of(tmp_path / "checkpoint-1") in ("old", "new")


def test_what_a_kill_left_is_never_taken_for_a_checkpoint(tmp_path):
    whole = write_checkpoint(tmp_path, 1, 1)
    for kind in ("partial", "deleted", "divided"):
        shutil.copytree(whole, tmp_path / f".checkpoint-9.{kind}")
    assert newest_checkpoint(tmp_path)[0] == whole
    assert list(run_folder.list_checkpoints(tmp_path)) == ["checkpoint-1"]
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


# ---- save_total_limit


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("best", [None, "state", "link"])
def test_the_oldest_checkpoints_go_but_never_the_best_or_the_last(limit, best, tmp_path):
    folders = {step: write_checkpoint(tmp_path, step, step) for step in (1, 2, 3, 4, 5)}
    if best == "link":
        (tmp_path / "best").symlink_to("checkpoint-2")
    rotate_checkpoints(tmp_path, limit, newest=folders[5], best=folders[2] if best == "state" else None)
    kept = {path.name for path in run_folder.checkpoint_folders(tmp_path)}
    newest = {f"checkpoint-{step}" for step in (5, 4, 3)[: max(limit - bool(best), 1)]}
    assert kept == newest | ({"checkpoint-2"} if best else set())


def test_checkpoints_of_an_earlier_run_go_first(tmp_path):
    write_checkpoint(tmp_path, 300, 1)
    newest = write_checkpoint(tmp_path, 100, 2)
    rotate_checkpoints(tmp_path, 1, newest=newest)
    assert names(tmp_path) == ["checkpoint-100"]


# ---- one run per folder


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    with open(tmp_path / ".lock", "w") as other:  # another open file stands for another process
        other.write("process 7 on somewhere, since yesterday")
        other.flush()
        resume.fcntl.flock(other, resume.fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match=r"Another run is writing to .*\(process 7 on somewhere, since yesterday\)"
        ):
            resume.lock_run(tmp_path)
    resume.lock_run(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    resume.release_run(tmp_path)


# ---- whole runs, in forks of a process that has loaded everything

RUN = {
    "do_train": True,
    "train_file": SAMPLE / "train.json",
    "prompt_column": "content",
    "response_column": "summary",
    "model_name_or_path": TINY,
    "max_train_samples": 18,  # 5 steps an epoch, the last of one batch
    "max_source_length": 32,
    "max_target_length": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 12,
    "save_steps": 4,
    "logging_steps": 3,
    "learning_rate": 2e-2,
    "pre_seq_len": 8,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """main.py with the flags of RUN and more, as a process of its own or several: (exit statuses, output).

    `before` is Python that the process runs first; `meanwhile` is called with the process ids.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PTUNING_TRACEBACK", None)
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "run_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    log = tmp_path_factory.mktemp("logs") / "log"

    def run(output_dir, before="", processes=1, meanwhile=None, **more):
        log.unlink(missing_ok=True)
        settings = {
            name: value for name, value in {**RUN, "output_dir": output_dir, **more}.items() if value is not None
        }
        job = {"words": flags(settings), "before": before, "processes": processes, "log": str(log)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        children = json.loads(server.stdout.readline())
        limit = threading.Timer(120, lambda: [os.kill(child, signal.SIGKILL) for child in children])
        limit.start()
        if meanwhile:
            meanwhile(children)
        statuses = json.loads(server.stdout.readline())
        limit.cancel()
        return statuses, log.read_text()

    yield run
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """folder(processes, settings) of a run that nothing stopped, made once for each kind."""
    done = {}

    def folder(processes=1, **more):
        key = (processes, *more.items())
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole") / "run"
            statuses, output = run(done[key], processes=processes, **more)
            assert statuses == [0] * processes, output
        return done[key]

    return folder


def log_of(run):
    """The log of a finished run without what depends on the clock."""
    entries = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "_per_" not in name}
        for entry in entries
    ]


def tensors_of(folder):
    """Prefix and optimizer state of a checkpoint, by name."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for number, state in torch.load(folder / "optimizer.pt", weights_only=True)["state"].items():
        tensors |= {f"{number} {name}": tensor for name, tensor in state.items()}
    return tensors


def assert_same_end(run, whole):
    """Same log and, bit for bit, same weights and optimizer state."""
    assert log_of(run) == log_of(whole)
    found, expected = (tensors_of(folder / "checkpoint-12") for folder in (run, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def signals(number, *steps):
    """Python that sends this process a signal in the middle of each of these steps."""
    return f"""
import os, trainer
compute = trainer.PrefixTrainer.training_step
sent = []
def training_step(self, *args, **kwargs):
    step = self.state.global_step + 1
    if step in {steps} and step not in sent:
        sent.append(step)
        os.kill(os.getpid(), {int(number)})
    return compute(self, *args, **kwargs)
trainer.PrefixTrainer.training_step = training_step
"""


KINDS = {
    "float": {},
    "int4": {"quantization_bit": 4},
    "int8": {"quantization_bit": 8},
    "projection": {"prefix_projection": True},
    "dev loss": {
        "validation_file": SAMPLE / "dev.json",
        "max_eval_samples": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_on_start": True,
    },
    "2 processes": {"processes": 2},
    "2 processes, int4": {"processes": 2, "quantization_bit": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("more", KINDS.values(), ids=KINDS.keys())
def test_a_run_stopped_twice_ends_like_one_never_stopped(more, run, whole, tmp_path):
    # In the first and in the second epoch, between two lines of the log; the second time only one process is told.
    processes = more.get("processes", 1)
    more = {**more, "resume_from_checkpoint": "last"}
    statuses, output = run(tmp_path, before=signals(signal.SIGTERM, 2), **more)
    assert statuses == [143] * processes, output
    assert output.count("stopped after step 2 of 12;") == 1
    only_rank_0 = f"import os\nif os.environ.get('RANK', '0') == '0':\n    exec({signals(signal.SIGINT, 7)!r}, {{}})"
    statuses, output = run(tmp_path, before=only_rank_0, **more)
    assert statuses == [130] * processes, output
    assert "checkpoint-2 at step 2" in output and "stopped after step 7 of 12;" in output
    assert not (tmp_path / "train_results.json").exists()
    statuses, output = run(tmp_path, **more)
    assert statuses == [0] * processes, output
    assert_same_end(tmp_path, whole(**{name: value for name, value in more.items() if "resume" not in name}))


# What fp16 on a GPU brings with it: gradients scaled by a factor that grows every 3 steps.
SCALER = """
import torch, trainer
prepare = trainer.PrefixTrainer._prepare_for_training
def _prepare_for_training(self, *args):
    self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    return prepare(self, *args)
trainer.PrefixTrainer._prepare_for_training = _prepare_for_training
"""


@pytest.mark.slow
def test_loss_scaling_goes_on_where_it_was_and_can_be_left(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, before=SCALER)
    run(two, before=SCALER + signals(signal.SIGTERM, 7))
    statuses, output = run(two, before=SCALER, resume_from_checkpoint="last")
    assert statuses == [0], output
    assert_same_end(two, one)
    states = [torch.load(folder / "checkpoint-12" / "scaler.pt", weights_only=True) for folder in (one, two)]
    assert states[0] == states[1] and states[0]["scale"] == 64 * 2**4
    statuses, output = run(two, resume_from_checkpoint=two / "checkpoint-8", overwrite_output_dir=True)
    assert statuses == [0], output


# Kills the process at a given call of a Python or C function, counted from the start of the training.
KILL = """
import os, signal, sys, trainer
calls = 0
def count(frame, event, argument):
    global calls
    calls += 1
    if calls == {kill_at}:
        names = []
        while frame:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        os.write(1, b"killed while saving" if "_write_checkpoint" in names else b"killed")
        os.kill(os.getpid(), signal.SIGKILL)
train = trainer.PrefixTrainer.train
def counted_train(self, **kwargs):
    sys.setprofile(count)
    try:
        return train(self, **kwargs)
    finally:
        sys.setprofile(None)
        print("calls:", calls)
trainer.PrefixTrainer.train = counted_train
"""


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_ends_like_one_never_killed(run, whole, tmp_path):
    draw = random.Random(20)
    more = {"save_steps": 1, "save_total_limit": 3, "resume_from_checkpoint": "last"}
    statuses, output = run(tmp_path / "counted", before=KILL.format(kill_at=0), **more)
    assert statuses == [0], output
    calls = int(output.rpartition("calls: ")[2].split()[0])
    kills, killed_saving, finished = 0, 0, 0
    while kills < 20:
        folder = tmp_path / str(finished)
        statuses, output = run(folder, before=KILL.format(kill_at=draw.randrange(calls // 3)), **more)
        assert "damaged" not in output
        if statuses == [0]:
            assert_same_end(folder, whole())
            assert saved(folder) == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
            finished += 1
        else:
            assert statuses == [-signal.SIGKILL], output
            kills += 1
            killed_saving += "killed while saving" in output
    run(folder, **more)
    assert_same_end(folder, whole())
    assert finished > 0 and killed_saving > 2


@pytest.mark.slow
def test_with_another_number_of_processes_the_same_rows_follow_and_it_is_said(run, whole, tmp_path):
    more = {"prefix_dropout": 0, "resume_from_checkpoint": "last"}
    run(tmp_path, before=signals(signal.SIGTERM, 7), **more, per_device_train_batch_size=1, processes=2)
    statuses, output = run(tmp_path, **more)
    assert statuses == [0], output
    assert "Not as in the checkpoint's run: processes 2 -> 1 (random numbers go on from those of process 0)" in output
    assert "per_device_train_batch_size 1 -> 2" in output and "rows_per_step" not in output
    found, expected = (
        [entry["loss"] for entry in log_of(folder) if "loss" in entry] for folder in (tmp_path, whole(prefix_dropout=0))
    )
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_what_a_resumed_run_does_differently_is_said_in_one_line(run, whole, tmp_path):
    statuses, output = run(
        tmp_path,
        resume_from_checkpoint=whole() / "checkpoint-8",
        max_steps=9,
        learning_rate=1e-3,
        gradient_accumulation_steps=1,
        max_train_samples=17,
        seed=1,
    )
    assert statuses == [0], output
    line = next(line for line in output.splitlines() if line.startswith("Not as in"))
    for difference in (
        "gradient_accumulation_steps 2 -> 1",
        "rows_per_step 4 -> 2 (the position",
        "learning_rate 0.02 -> 0.001 (not used",
        "max_steps 12 -> 9 (the schedule",
        "seed 42 -> 1",
        "train_rows (the rows",
    ):
        assert difference in line
    assert "processes" not in line and "num_train_epochs" not in line


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_keeps_its_results(run, whole, tmp_path):
    shutil.copytree(whole(), tmp_path, dirs_exist_ok=True)
    results = (tmp_path / "train_results.json").read_bytes()
    statuses, output = run(tmp_path, resume_from_checkpoint="last")
    assert statuses == [0], output
    assert "checkpoint-12 is the last step of this run: nothing is left to train." in output
    assert (tmp_path / "train_results.json").read_bytes() == results
    statuses, output = run(tmp_path, resume_from_checkpoint="last", max_steps=13)
    assert statuses == [0] and (tmp_path / "checkpoint-13").is_dir()


@pytest.mark.slow
def test_a_prefix_starts_a_new_run_and_a_checkpoint_of_the_run_counts_more(run, whole, tmp_path):
    both = {"ptuning_checkpoint": whole() / "checkpoint-4", "resume_from_checkpoint": "last", "pre_seq_len": None}
    statuses, output = run(tmp_path, **both, max_steps=2)
    assert statuses == [0], output
    assert "has no checkpoint yet, starting afresh" in output
    assert "from " + str(whole() / "checkpoint-4. A new run starts with it, at step 0.") in output
    statuses, output = run(tmp_path, **both, max_steps=3)
    assert statuses == [0], output
    assert f"Resuming from {tmp_path / 'checkpoint-2'} at step 2" in output
    assert "is not read: the run has gone on from there" in output and "A new run" not in output


@pytest.mark.slow
def test_a_resumed_run_cannot_change_the_prefix(run, whole, tmp_path):
    statuses, output = run(tmp_path, resume_from_checkpoint=whole() / "checkpoint-4", pre_seq_len=9)
    assert statuses == [2] and "--pre_seq_len 9 contradicts" in output, output


@pytest.mark.slow
def test_the_newest_checkpoint_is_left_aside_when_damaged_and_the_run_ends_the_same(run, whole, tmp_path):
    for name in ("checkpoint-4", "checkpoint-8"):
        shutil.copytree(whole() / name, tmp_path / name)
    flip_bit(tmp_path / "checkpoint-8" / "optimizer.pt")
    statuses, output = run(tmp_path, resume_from_checkpoint="last")
    assert statuses == [0], output
    assert "checkpoint-8 is damaged: optimizer.pt is not what was written" in output
    assert_same_end(tmp_path, whole())


# ---- signals


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(run, tmp_path):
    # Both in step 2; the clock is moved on between them, as one Ctrl-C may arrive twice.
    twice = (
        signals(signal.SIGINT, 2)
        + f"""
import time
real = time.monotonic
first = trainer.PrefixTrainer.training_step
def training_step(self, *args, **kwargs):
    result = first(self, *args, **kwargs)
    if sent:
        while self.stop.arrived is None:
            time.sleep(0.01)
        time.monotonic = lambda: real() + 60
        os.kill(os.getpid(), {int(signal.SIGTERM)})
    return result
trainer.PrefixTrainer.training_step = training_step
"""
    )
    statuses, output = run(tmp_path, before=twice)
    assert statuses == [143], output
    assert "SIGINT: finishing this step" in output and "SIGTERM, the second time: left at once" in output
    assert not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.slow
def test_one_ctrl_c_that_arrives_twice_counts_once(run, tmp_path):
    twice = signals(signal.SIGINT, 2).replace(
        "    return compute", "        os.kill(os.getpid(), 15)\n    return compute"
    )
    statuses, output = run(tmp_path, before=twice)
    assert statuses == [130], output
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_a_signal_before_training_leaves_without_a_trace(run, tmp_path):
    before = "import main, os\nmain.load_tokenizer = lambda *args: os.kill(os.getpid(), 15)"
    statuses, output = run(tmp_path / "run", before=before)
    assert statuses == [143]
    assert output.splitlines()[-1] == "Stopped by SIGTERM." and "Traceback" not in output
    assert not (tmp_path / "run").exists()


# ---- disks


def can_mount():
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


def on_a_disk(options, first, then, folder, out):
    """The finished program `then` on a disk of its own at `folder`, after `first`; what was on it is copied to `out`."""
    script = f"mount -t tmpfs tmpfs {folder} && {first} && mount -o remount,{options} {folder} || exit 99\n"
    script += f"{then}\nstatus=$?\ncp -a {folder} {out} || exit 98\nexit $status"
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def program(**more):
    words = flags({**RUN, **more})
    return " ".join(["OMP_NUM_THREADS=1", sys.executable, str(ROOT / "ptuning" / "main.py"), *map(str, words)])


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_checkpoints_before_stay_whole(run, whole, tmp_path):
    if not can_mount():
        pytest.skip("a disk of a given size needs a mount, which this system does not allow")
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    size = sum(-(-file.stat().st_size // 4096) * 4 for file in (whole() / "checkpoint-4").iterdir())  # KiB, in pages
    then = program(output_dir=disk / "run")
    done = on_a_disk(f"size={2 * size + size // 2}k", "true", then, disk, out)
    assert done.returncode == 2, done.stderr
    assert re.search(r"checkpoint-12 could not be written \(No space left on device, \d\.\d MB free\)", done.stderr)
    assert "The newest complete checkpoint is checkpoint-8." in done.stderr and "Traceback" not in done.stderr
    assert saved(out / "run") == ["checkpoint-4", "checkpoint-8"]
    statuses, output = run(out / "run", resume_from_checkpoint="last")
    assert statuses == [0], output
    assert_same_end(out / "run", whole())


@pytest.mark.slow
def test_a_read_only_output_folder_is_one_message_before_anything_is_read(whole, tmp_path):
    if not can_mount():
        pytest.skip("a read-only disk needs a mount, which this system does not allow")
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    then = program(output_dir=disk / "run", resume_from_checkpoint="last")
    done = on_a_disk("ro", f"cp -a {whole()} {disk}/run", then, disk, out)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {disk}/run/.lock: Read-only file system. ")
    assert "Traceback" not in done.stderr and "Loaded" not in done.stdout
    verify_checkpoint(out / "run" / "checkpoint-12")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_cannot_grow_leaves_no_half_checkpoint(processes, run, tmp_path):
    # Without any privilege: files may have at most 15,000 bytes from the second save on.
    before = """
import resource, trainer
write = trainer.PrefixTrainer._write_checkpoint
def limited(self, folder, processes):
    if folder.name == "checkpoint-8":
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))
    write(self, folder, processes)
trainer.PrefixTrainer._write_checkpoint = limited
"""
    statuses, output = run(tmp_path, before=before, processes=processes)
    assert statuses == [2] * processes, output
    assert "checkpoint-8 could not be written (File too large, " in output and "Traceback" not in output, output
    assert saved(tmp_path) == ["checkpoint-4"]
    verify_checkpoint(tmp_path / "checkpoint-4")


@pytest.mark.slow
def test_a_second_run_on_one_folder_is_refused_at_once_and_disturbs_nothing(run, whole, tmp_path):
    def second(children):
        while not (tmp_path / ".lock").is_file() or "process" not in (tmp_path / ".lock").read_text():
            os.kill(children[0], 0)
        os.kill(children[0], signal.SIGSTOP)
        try:
            command = [sys.executable, ROOT / "ptuning" / "main.py", *flags({**RUN, "output_dir": tmp_path})]
            done.append(subprocess.run(command, capture_output=True, text=True, timeout=100))
        finally:
            os.kill(children[0], signal.SIGCONT)

    done = []
    statuses, output = run(tmp_path, meanwhile=second)
    assert done[0].returncode == 2
    assert re.search(r"^error: Another run is writing to .* \(process \d+ on ", done[0].stderr)
    assert "Loaded" not in done[0].stdout
    assert statuses == [0], output
    assert_same_end(tmp_path, whole())


def stopped(command, number, group, log):
    """(exit status, output) of a command that gets a signal, with all its group or alone, once it has trained a step."""
    with open(log, "w") as output:
        program = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MODEL": "tiny", "NUM_GPUS": "2", "BATCH_SIZE": "2"},
        )
    try:
        while "'loss'" not in log.read_text() and program.poll() is None:
            time.sleep(0.1)
        (os.killpg if group else os.kill)(program.pid, number)
        return program.wait(timeout=120), log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


LONG = {**RUN, "max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["Ctrl-C", "TERM"])
def test_train_sh_saves_when_stopped_and_ends_with_the_signals_status(number, group, tmp_path):
    # Ctrl-C goes to the whole group of processes, a scheduler's SIGTERM to the one it has started.
    words = flags({**LONG, "output_dir": tmp_path / "run", "eval_strategy": "no", "eval_on_start": "false"})
    status, output = stopped(["bash", "train.sh", *words], number, group, tmp_path / "log")
    assert status == 128 + number, output
    stop = re.search(
        r"stopped after step (\d+) of 100000; .* run the same command with --resume_from_checkpoint last", output
    )
    assert saved(tmp_path / "run") == [f"checkpoint-{stop[1]}"]
    assert output.count("finishing this step") == 1 and "Traceback" not in output and "error" not in output


@pytest.mark.slow
def test_plain_torchrun_lets_the_processes_save(tmp_path):
    words = [ROOT / "ptuning" / "main.py", *flags({**LONG, "output_dir": tmp_path / "run"})]
    launch = ["torchrun", "--standalone", "--nproc-per-node=2"]
    status, output = stopped([*launch, *words], signal.SIGTERM, False, tmp_path / "log")
    stop = re.search(r"stopped after step (\d+) of 100000", output)
    assert stop and saved(tmp_path / "run") == [f"checkpoint-{stop[1]}"], output
    verify_checkpoint(tmp_path / "run" / f"checkpoint-{stop[1]}")


# ---- shards of FSDP and DeepSpeed


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-ran",)


@pytest.mark.parametrize("name", ["optimizer_0/.metadata", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("damage", ["payload", "noise"])
def test_a_shard_that_would_run_code_or_is_damaged_is_not_unpickled(name, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir()
    if damage == "noise":
        file.write_bytes(b"\x80\x02 no pickle")
    elif file.suffix == ".pt":
        torch.save({"optimizer": Payload()}, file)
    else:
        file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=f"{name} cannot be read .*--model_name_or_path {tmp_path}"):
        shards.check_shards(tmp_path)
    assert not Path("payload-ran").exists()


def test_a_shard_does_not_reach_a_function_by_way_of_a_module_that_may_be_named(tmp_path):
    (tmp_path / "optimizer_0").mkdir()
    names = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.getpid\x93"  # this module imports os
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(b"\x80\x04" + names + b")R.")
    with pytest.raises(ValueError, match="it names torch.distributed.checkpoint.metadata.os.getpid"):
        shards.check_shards(tmp_path)


def test_shards_of_tensors_and_plain_values_may_be_read(tmp_path):
    (tmp_path / "global_step2").mkdir()
    torch.save({"step": 2, "exp_avg": torch.zeros(3)}, tmp_path / "global_step2" / "mp_rank_00_model_states.pt")
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps((torch.Size([3]), torch.float16)))
    shards.check_shards(tmp_path)
