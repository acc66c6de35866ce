"""What a run's folder says: running, ended, stopped, killed, started anew, damaged."""

import json
import os
import signal
import sys
import time

import pytest
from support.over_http import wait_for

from board.commands import Command
from board.files import PROJECT
from board.runs import advice_for, answers_of, log_tail, message_in, read_run
from board.starting import MOST_AT_ONCE, Starter, is_alive, read_record, started_at, stop, writing_process
from common.files import write_json

SLEEPS = Command(["python", "-c", "import time; print('begun', flush=True); time.sleep(60)"])
GRACEFUL = Command(
    ["python", "-c"],
    {},
    [
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    ],
)


def entry(step, loss=None, **more):
    return {"current_steps": step, "total_steps": 10, "loss": loss, "eval_loss": None, "learning_rate": 1e-3, **more}


def write_log(folder, *entries):
    folder.mkdir(exist_ok=True)
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    return folder


@pytest.fixture
def starter(tmp_path):
    """A Starter for output/; whatever it started is gone afterwards."""
    starter = Starter(tmp_path)
    yield starter
    for process, *_ in starter.children:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("finished", "finished"),
        ("stopped early: the loss had been rising", "finished"),
        ("SIGINT: stopped after step 4 of 10; x is complete.", "stopped"),
        ("error: Training stopped at step 12: the loss is nan.", "failed"),
    ],
)
def test_the_end_record_says_how_a_run_ended(tmp_path, reason, state):
    run = read_run(write_log(tmp_path / "a", entry(4, 1.5), entry(4, phase="end", reason=reason)))
    assert (run.state, run.reason, run.step, run.total, run.latest("loss")) == (state, reason, 4, 10, 1.5)


def test_a_run_whose_process_is_gone_without_an_end_was_killed(tmp_path):
    assert read_run(write_log(tmp_path / "a", entry(4, 1.5))).state == "killed"


def test_lines_that_are_none_are_left_out_and_no_curve_has_nan(tmp_path):
    folder = write_log(tmp_path / "a", entry(1, 2.0), entry(2, float("nan")), entry(3, 1.0, drift=0.1))
    with open(folder / "trainer_log.jsonl", "a") as file:
        file.write('{"current_steps": 4, "lo\n[1]\n{"current_steps": "x"}\n' + "[" * 9000 + "\n")
    run = read_run(folder)
    assert run.curves["loss"] == [(1, 2.0), (3, 1.0)] and run.curves["drift"] == [(3, 0.1)]


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    run = read_run(write_log(tmp_path / "a", *(entry(step, 1.0) for step in range(5000))))
    assert len(run.curves["loss"]) <= 401 and run.curves["loss"][-1][0] == 4999


def test_a_process_is_known_again_and_stopped_with_its_children(starter, tmp_path):
    starter.start(tmp_path / "a", "train", GRACEFUL)
    run = wait_for(lambda: log_tail(tmp_path / "a").endswith("\nready") and read_run(tmp_path / "a"))
    assert (run.state, run.alive, run.ours) == ("starting", True, True)
    with pytest.raises(ValueError, match="running already"):
        starter.start(tmp_path / "a", "train", GRACEFUL)
    stop(tmp_path / "a", "train")
    wait_for(lambda: not read_run(tmp_path / "a").alive)
    wait_for(lambda: starter.reap() or read_record(tmp_path / "a").get("status") == 143)
    with pytest.raises(ValueError, match="is not running"):
        stop(tmp_path / "a", "train")


def test_another_process_with_the_same_id_is_not_taken_for_the_run(tmp_path):
    record = {"command": "x", "pid": os.getpid(), "started_ticks": started_at(os.getpid()) - 1, "boot": "b"}
    assert not is_alive(record) and started_at(os.getpid()) > 0
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}, since 2026\n")
    assert writing_process(folder) == 0  # it does not hold that file
    with open(folder / ".lock"):
        assert writing_process(folder) == os.getpid()
        os.utime(folder / ".lock", (1, 1))
        assert writing_process(folder) == 0  # written before this process began


def test_a_killed_process_is_dead_at_once_though_nobody_has_asked_for_its_status(starter, tmp_path):
    record = starter.start(tmp_path / "a", "train", SLEEPS)
    os.killpg(record["pid"], signal.SIGKILL)
    wait_for(lambda: read_run(tmp_path / "a").state == "killed", seconds=5)


def test_a_run_of_a_terminal_is_read_only_until_it_is_adopted(starter, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}, since 2026\n")
    write_log(folder, entry(4, 1.5))
    with open(folder / ".lock"):
        run = read_run(folder)
        assert (run.alive, run.ours, run.state) == (True, False, "running")
        with pytest.raises(ValueError, match="is not running"):
            stop(folder, "train")
        starter.adopt(folder)
        assert read_run(folder).ours and read_record(folder)["adopted"]
    with pytest.raises(ValueError, match="No process"):
        starter.adopt(tmp_path / "b")


def test_a_run_whose_log_has_ended_is_ending_and_one_begun_anew_is_starting(starter, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}, since 2026\n")
    write_log(folder, entry(4, 1.5), entry(4, phase="end", reason="finished"))
    with open(folder / ".lock"):
        run = read_run(folder)
        assert (run.state, run.phase) == ("running", "end")
        os.utime(folder / "trainer_log.jsonl", (time.time() - 60,) * 2)  # of an earlier run of that name
        assert read_run(folder).state == "starting"


def test_only_a_few_processes_run_at_once(starter, tmp_path):
    for number in range(MOST_AT_ONCE):
        starter.start(tmp_path / f"run-{number}", "train", SLEEPS)
    with pytest.raises(ValueError, match="Wait for one"):
        starter.start(tmp_path / "one-more", "train", SLEEPS)


def test_on_a_full_disk_nothing_is_started(starter, tmp_path, monkeypatch):
    def full(file, value):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("board.starting.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        starter.start(tmp_path / "a", "train", SLEEPS)
    assert not starter.children


def test_a_process_sees_the_words_as_they_are_and_no_variable_of_the_page(starter, tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_STEPS", "7")
    monkeypatch.setenv("PTUNING_BOARD_AUTH", "user:secret")
    words = ["$(touch pwned)", "a b", "it's", "`id`", '--x="y"', "line\nbreak"]
    program = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['LR'], sorted(os.environ), os.getcwd()]))"
    )
    starter.start(tmp_path / "a", "train", Command(["python", "-c", program], {"LR": "$(id) 'x'"}, words))
    wait_for(lambda: not read_run(tmp_path / "a").alive)
    printed = (tmp_path / "a" / "web.log").read_text().split("\n")[-2]
    found, rate, names, folder = json.loads(printed)
    assert found == words and folder == str(PROJECT) and rate == "$(id) 'x'"
    assert not {"MAX_STEPS", "PTUNING_BOARD_AUTH"} & set(names)


def test_what_was_printed_before_training_began_says_why_it_never_did(starter, tmp_path):
    program = "import sys; print('error: ./none: there is no such folder.'); sys.exit(2)"
    folder = write_log(tmp_path / "a", entry(4, 1.5), entry(4, phase="end", reason="finished"))
    os.utime(folder / "trainer_log.jsonl", (time.time() - 60,) * 2)
    starter.start(folder, "train", Command(["python", "-c", program]))
    wait_for(lambda: not read_run(folder).alive)
    run = read_run(folder)
    assert (run.state, run.message, run.curves) == ("failed", "error: ./none: there is no such folder.", {})


def test_records_and_answers_of_a_stranger_are_bounded(tmp_path):
    folder = write_log(tmp_path / "a", entry(1, 1.0))
    write_json(folder / "web.json", {"command": "x", "pid": "1; rm", "variables": {"MODEL": ["x"]}, "log_from": "y"})
    run = read_run(folder)
    assert (run.alive, run.variables) == (False, {})
    (folder / "web.log").write_bytes(b"\x1b[31mred\r\nsecond \r12%\r 50%\n" + b"x" * 2000 + b"\xff\n")
    tail = log_tail(folder)
    assert "\\x1b" in tail and "12%" not in tail and max(map(len, tail.split("\n"))) <= 1003
    (folder / "generated_predictions.txt").write_text('{"labels": 1}\n[]\n{"labels": "' + "y" * 5000 + '"}\n' * 50)
    assert len(answers_of(folder, 20)) <= 20 and all(len(row["labels"]) <= 2000 for row in answers_of(folder, 20))


@pytest.mark.parametrize(
    ("message", "advice", "zh"),
    [
        ("error: process 3 was ended by SIGKILL. The system does that", "memory ran out", "内存"),
        ("error: Training stopped at step 12: the loss is nan, …", "lower `LR`", "LR"),
        ("error: something that nobody has ever seen", "", ""),
    ],
)
def test_a_message_finds_its_row_of_the_troubleshooting_page(message, advice, zh):
    found, chinese = advice_for(message, False), advice_for(message, True)
    assert (advice in found and zh in chinese) if advice else found == chinese == ""


def test_the_last_message_of_a_log_counts():
    assert message_in("error: a\nmore\nerror: b\nsecond line\n") == "error: b\nsecond line"
    assert message_in("no error: here") == "" and sys.executable
