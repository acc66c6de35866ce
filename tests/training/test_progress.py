"""How far a run is: one bar on a terminal, plain lines elsewhere; and the phases and the end in trainer_log.jsonl."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
from benchmarks.measuring import FIRST_STEP
from conftest import SAMPLE
from support.runs import TRAIN_SETTINGS, flags, run
from support.terminal import run_in_terminal, screen

import trainer
from common import failure
from common.messages import duration
from training import progress
from training.progress import ShownProgress, say_above_bar

SETTINGS = {
    **{**TRAIN_SETTINGS, "disable_tqdm": False, "max_train_samples": 16, "max_steps": 4, "save_steps": 2},
    **{"validation_file": SAMPLE / "dev.json", "eval_strategy": "steps", "eval_steps": 2, "max_eval_samples": 4},
}
STEP = r"step {}/4  loss \d\.\d{{3}}(  dev \d\.\d{{3}})?  \d+ s gone, \d+ s left"


@pytest.mark.slow
def test_a_terminal_shows_one_bar_that_ends_at_its_last_step(tmp_path):
    settings = {**SETTINGS, "output_dir": tmp_path, "do_predict": True, "test_file": SAMPLE / "dev.json"}
    words = [sys.executable, "ptuning/main.py", *flags({**settings, "max_predict_samples": 3})]
    status, written = run_in_terminal(words)
    lines = screen(written)
    assert status == 0, written[-3000:]
    bars = [line for line in lines if re.match(r" *\d+%\|", line)]
    assert re.fullmatch(r"100%\|█+\| step 4/4  loss [\d.]+  dev [\d.]+  lr \S+  \d+ s gone, 0 s left", bars[0])
    assert re.fullmatch(r"100%\|█+\| predict row 3/3  \d+ s gone, 0 s left", bars[1]) and len(bars) == 2
    assert max(map(len, bars)) <= 110
    assert [line for line in lines if line.startswith("{")] == []
    dev = [line for line in lines if line.startswith("step ")]
    assert [bool(re.fullmatch(STEP.format(step), line)) for step, line in zip((2, 4), dev, strict=True)] == [True] * 2
    assert "\x1b[A" not in written  # no bar below another


def test_a_pipe_gets_plain_lines_and_no_carriage_return(tmp_path, monkeypatch, capsys):
    settings = {**SETTINGS, "output_dir": tmp_path, "do_predict": True, "test_file": SAMPLE / "dev.json"}
    run(monkeypatch, settings, max_predict_samples=3)
    out, err = capsys.readouterr()
    assert "\r" not in out + err and "|" not in err
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    expected = [1, 2, 2, 3, 4, 4]  # the dev loss has a line of its own
    assert [bool(re.fullmatch(STEP.format(n), line)) for n, line in zip(expected, steps, strict=True)] == [True] * 6
    assert "  dev " in steps[2] and "  dev " not in steps[0]
    assert re.search(r"^predict row 3/3  \d+ s gone, 0 s left$", out, re.MULTILINE)


def test_the_benchmark_knows_the_line_of_the_first_step():
    said, state = [], SimpleNamespace(global_step=0, max_steps=1)
    shown = ShownProgress(shown=True, bar=False, say=said.append)
    shown.on_train_begin(None, state, None)
    shown.on_log(None, state, None, {"eval_loss": 1.0})
    state.global_step = 1
    shown.on_log(None, state, None, {"loss": 0.9})
    assert [bool(FIRST_STEP.match(line)) for line in said] == [False, True]


def test_each_line_is_written_at_once_and_whole(monkeypatch):
    read, write = os.pipe()
    with open(write, "w") as buffered, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", buffered)
        say_above_bar("now")
        assert os.read(read, 100) == b"now\n"
    os.close(read)


def test_long_work_in_a_pipe_says_how_far_it_is_every_ten_seconds(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = ShownProgress(shown=True, bar=True, say=said.append)
    shown.begin("predict row", 30)
    for _ in range(30):
        clock[0] += 1
        shown.advance()
    assert said == [f"predict row {n}/30  {n} s gone, {30 - n} s left" for n in (11, 22, 30)]


def test_other_processes_show_nothing():
    said = []
    shown = ShownProgress(shown=False, bar=True, say=said.append)
    shown.begin("predict row", 1)
    shown.advance()
    assert said == [] and shown.bar is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (11_100, "3 h 5 min")],
)
def test_a_time_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


# ---- trainer_log.jsonl


def phases(folder):
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [(line["phase"], line["current_steps"], line.get("reason")) for line in lines if "phase" in line]


def test_the_log_holds_every_phase_and_the_end_with_its_reason(tmp_path, monkeypatch):
    run(monkeypatch, SETTINGS, output_dir=tmp_path)
    expected = [("encoding", 0), ("loading", 0), ("training", 0)]
    for step in (2, 4):
        expected += [("evaluating", step), ("saving", step), ("training", step)]
    assert phases(tmp_path) == [*((*phase, None) for phase in expected[:-1]), ("end", 4, "finished")]


def test_a_run_that_fails_logs_the_reason_as_its_end(tmp_path, monkeypatch):
    def training_step(self, *args, **kwargs):
        raise OSError(28, "No space left on device", "a-file")

    monkeypatch.setattr(trainer.PrefixTrainer, "training_step", training_step)
    with pytest.raises(OSError) as raised:
        run(monkeypatch, SETTINGS, output_dir=tmp_path)
    monkeypatch.setattr(failure.os, "_exit", lambda status: None)
    failure.end_with(OSError, raised.value, None)
    reason = (
        "error: a-file: No space left on device. The disk is full (df -h): free some space or choose another folder."
    )
    assert phases(tmp_path)[-1] == ("end", 0, reason)


def test_a_resumed_run_has_the_phases_of_its_last_start_only(tmp_path, monkeypatch):
    run(monkeypatch, SETTINGS, output_dir=tmp_path)
    run(monkeypatch, SETTINGS, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2")
    found = phases(tmp_path)
    assert found[0] == ("encoding", 2, None) and found[-1] == ("end", 4, "finished")
    assert [phase for phase, *_ in found].count("end") == 1
