"""Nothing is lost: runs that go on as if never stopped, signals, kills, full disks."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SAMPLE
from support.pairs import write_pairs
from support.resuming import RUN, flip_bit, names
from support.runs import flags

from checkpoints.run_folder import verify_checkpoint

# ---- folders that look like checkpoints, without a model


def saved(run):
    """What is there of checkpoints, half written ones too."""
    return [name for name in names(run) if "checkpoint-" in name]


# ---- whole runs, in forks of a process that has loaded everything


@pytest.fixture(scope="module")
def run(ranks):
    """main.py with the flags of RUN and more, as a process of its own or several: (exit statuses, output).

    `before` is Python that the process runs first; `meanwhile` is called with the process ids.
    """

    def run(output_dir, before="", processes=1, meanwhile=None, **more):
        settings = {
            name: value for name, value in {**RUN, "output_dir": output_dir, **more}.items() if value is not None
        }
        return ranks.run(flags(settings), before, processes, meanwhile)

    return run


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


def assert_same_end(run, whole, steps=12):
    """Same log and, bit for bit, same weights and optimizer state."""
    assert log_of(run) == log_of(whole)
    found, expected = (tensors_of(folder / f"checkpoint-{steps}") for folder in (run, whole))
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


@pytest.fixture(scope="module")
def pairs(run, tmp_path_factory):
    """{stage: the flags that it needs beside those of RUN}"""
    folder = tmp_path_factory.mktemp("pairs")
    files = {"train_file": write_pairs(folder / "train.json", 18), "response_column": None}
    common = {**files, "max_steps": 6, "save_steps": 3, "resume_from_checkpoint": "last"}
    statuses, output = run(folder / "rm", **{**common, "max_steps": 2}, stage="rm")
    assert statuses == [0], output
    ppo = {"reward_model": folder / "rm", "ppo_epochs": 2}
    return {"rm": common, "dpo": {**common, "dpo_cache": True}, "ppo": {**common, **ppo}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo"])
def test_a_stage_on_preferences_stopped_and_killed_ends_like_one_never_stopped(stage, run, pairs, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = {**pairs[stage], "stage": stage}
    statuses, output = run(whole, **more)
    assert statuses == [0], output
    statuses, output = run(stopped, before=signals(signal.SIGTERM, 2), **more)
    assert statuses == [143], output
    assert output.count("stopped after step 2 of 6;") == 1
    statuses, output = run(stopped, before=signals(signal.SIGKILL, 5), **more)
    assert statuses == [-signal.SIGKILL] and "checkpoint-2 at step 2" in output, output
    statuses, output = run(stopped, **more)
    assert statuses == [0] and "checkpoint-3 at step 3" in output, output
    assert_same_end(stopped, whole, steps=6)


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
    before = "import main, os\nmain.open_run = lambda *args, **more: os.kill(os.getpid(), 15)"
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
        while "  loss " not in log.read_text() and program.poll() is None:
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
