"""No log ends a run: full disks, folders that are moved away, loggers that fail. Only a save decides."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from support.runs import TRAIN_SETTINGS, flags, run

import trainer
from training import results
from training.run_log import RunLog

TWO_STEPS = {**TRAIN_SETTINGS, "max_train_samples": 20, "max_steps": 4, "save_steps": 2}


@contextlib.contextmanager
def files_of_at_most(size):
    """No file can grow beyond `size` bytes, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Log:
    """A RunLog that has begun in `folder` at `step`; `said` is what it told the user."""

    def __init__(self, folder, step=0):
        self.said = []
        self.log = RunLog(self.said.append)
        self.state = SimpleNamespace(global_step=step, max_steps=100, epoch=0.5, is_world_process_zero=True)
        self.log.on_train_begin(SimpleNamespace(output_dir=folder), self.state, None)

    def add(self, step):
        self.state.global_step = step
        self.log.on_log(None, self.state, None, logs={"loss": 1.0})


def steps(folder):
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line["current_steps"] for line in lines if "phase" not in line]


def test_a_line_that_does_not_fit_on_the_disk_is_said_once_and_written_later(tmp_path):
    log = Log(tmp_path)
    log.add(1)
    with files_of_at_most((tmp_path / "trainer_log.jsonl").stat().st_size + 10):
        log.add(2)
        log.add(3)
        assert steps(tmp_path) == [1]  # and no part of a line
    assert len(log.said) == 1 and f"{tmp_path}/trainer_log.jsonl could not be written: File too large" in log.said[0]
    log.add(4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_log_whose_folder_is_moved_away_is_said_once(tmp_path):
    log = Log(tmp_path / "run")
    log.add(1)
    (tmp_path / "run").rename(tmp_path / "moved")
    log.add(2)
    log.add(3)
    assert steps(tmp_path / "moved") == [1]
    assert len(log.said) == 1 and "No such file or directory" in log.said[0]


def test_half_a_line_of_a_killed_run_is_ended_and_ignored(tmp_path):
    file = tmp_path / "trainer_log.jsonl"
    log = Log(tmp_path)
    log.add(1)
    with open(file, "ab") as opened:
        opened.write(b'{"current_steps": 2, "los\xe5')
    log.add(3)
    assert file.read_bytes().split(b"\n")[1] == b'{"current_steps": 2, "los\xe5'
    resumed = Log(tmp_path, step=3)
    resumed.add(4)
    assert steps(tmp_path) == [1, 3, 4] and not resumed.said


def test_a_log_of_an_earlier_start_is_kept_where_it_cannot_be_written_anew(tmp_path):
    log = Log(tmp_path)
    log.add(1)
    with files_of_at_most(10):
        resumed = Log(tmp_path, step=1)
    assert steps(tmp_path) == [1] and len(resumed.said) == 1


def test_a_run_whose_output_folder_is_renamed_goes_on_and_saves_in_a_new_one(tmp_path, monkeypatch, capsys):
    compute = trainer.PrefixTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2 and not (tmp_path / "moved").exists():
            (tmp_path / "run").rename(tmp_path / "moved")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer.PrefixTrainer, "training_step", training_step)
    run(monkeypatch, TWO_STEPS, output_dir=tmp_path / "run")
    assert (tmp_path / "moved" / "checkpoint-2").is_dir() and (tmp_path / "run" / "checkpoint-4").is_dir()
    assert steps(tmp_path / "moved") == [1, 2] and steps(tmp_path / "run") == [3, 4]
    assert capsys.readouterr().out.count("trainer_log.jsonl could not be written") == 1


def test_a_logger_that_fails_on_the_way_is_said_once_and_left_out(tmp_path, monkeypatch, capsys):
    def on_log(self, *args, **kwargs):
        calls.append(1)
        raise OSError(28, "No space left on device")

    calls = []
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.on_log", on_log)
    run(monkeypatch, TWO_STEPS, output_dir=tmp_path, report_to="tensorboard")
    said = capsys.readouterr().out
    assert said.count("TensorBoard can log nothing more: No space left on device. The disk is full") == 1
    assert len(calls) == 1 and (tmp_path / "checkpoint-4").is_dir()


def test_a_plot_that_cannot_be_written_is_said_and_the_results_are_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "training_loss.png").mkdir()
    run(monkeypatch, TWO_STEPS, output_dir=tmp_path, plot_loss=None)
    assert f"{tmp_path}/training_loss.png could not be written: Is a directory." in capsys.readouterr().out
    assert "train_loss" in json.loads((tmp_path / "all_results.json").read_text())


def test_results_that_cannot_be_read_are_written_anew(tmp_path, monkeypatch, capsys):
    (tmp_path / "all_results.json").write_text('{"train_loss": 1.')
    run(monkeypatch, TWO_STEPS, output_dir=tmp_path)
    assert "all_results.json is not valid JSON" in capsys.readouterr().out
    assert json.loads((tmp_path / "all_results.json").read_text())["train_samples"] == 20


def test_results_that_do_not_fit_name_their_file_and_leave_the_old_ones(tmp_path):
    file = tmp_path / "all_results.json"
    file.write_text("{}")
    with files_of_at_most(10), pytest.raises(OSError, match=f"File too large: '{file}'"):
        results.write_metrics(tmp_path, "all", {"train_loss": 1.0, "train_samples": 20}, False, print)
    assert file.read_text() == "{}" and [path.name for path in tmp_path.iterdir()] == ["all_results.json"]


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["a full disk", "nobody"])
def test_a_run_whose_output_cannot_be_printed_ends_well(reader, tmp_path):
    words = [sys.executable, ROOT / "ptuning" / "main.py", *flags({**TWO_STEPS, "output_dir": tmp_path / "run"})]
    if reader == "nobody":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written to") == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and (tmp_path / "run" / "all_results.json").is_file()
