"""Checkpoints are whole or not there: damage, kills, save_total_limit, one run per folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.resuming import flip_bit, names, write_checkpoint

from checkpoint import read_prefix, read_prefix_settings
from checkpoints import run_folder
from checkpoints.run_folder import (
    clear_leftovers,
    find_checkpoints,
    newest_checkpoint,
    point_to_best,
    publish_checkpoint,
    rotate_checkpoints,
    verify_checkpoint,
)
from training import resume

# ---- folders that look like checkpoints, without a model


def text_of(folder):
    return json.loads((folder / "ptuning.json").read_text())["text"]


FILES = ["checksums.json", "optimizer.pt", "ptuning.json", "pytorch_model.bin", "scheduler.pt", "trainer_state.json"]


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


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


# ---- which checkpoint of a run


@pytest.fixture
def a_run(tmp_path):
    """The folder of a run with checkpoints 9, 10 and 200, of which 10 is the best."""
    for step in (9, 10, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "pytorch_model.bin").touch()
    point_to_best(tmp_path, 10)
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "steps"),
    [("", [10]), ("best", [10]), ("last", [200]), ("all", [9, 10, 200]), ("checkpoint-9", [9]), ("checkpoint-7", [7])],
)
def test_a_run_or_a_word_names_its_checkpoints(wanted, steps, a_run):
    assert find_checkpoints(a_run / wanted) == ([a_run / f"checkpoint-{step}" for step in steps], [])


def test_without_a_best_a_run_means_its_last_checkpoint(a_run):
    point_to_best(a_run, None)
    assert not (a_run / "best").is_symlink()
    assert find_checkpoints(a_run) == ([a_run / "checkpoint-200"], [])
    with pytest.raises(
        FileNotFoundError, match="no best checkpoint is known.*checkpoint-9, checkpoint-10, checkpoint-"
    ):
        find_checkpoints(a_run / "best")


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        find_checkpoints(tmp_path / "last")


@pytest.mark.parametrize(("wanted", "steps"), [("", [10]), ("last", [10]), ("all", [9, 10])])
def test_a_damaged_checkpoint_is_passed_over_and_named(wanted, steps, a_run):
    point_to_best(a_run, None)
    (a_run / "checkpoint-200" / "checksums.json").write_text('{"pytorch_model.bin": {"size": 7, "sha256": "0"}}')
    found, damaged = find_checkpoints(a_run / wanted)
    assert found == [a_run / f"checkpoint-{step}" for step in steps]
    assert len(damaged) == 1 and "checkpoint-200 is damaged" in damaged[0]


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(a_run):
    output = a_run / "output"
    for name in ("one", "two"):
        (output / name / "checkpoint-5").mkdir(parents=True)
        (output / name / "checkpoint-5" / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=rf"{output} has the runs one, two\."):
        read_prefix_settings(find_checkpoints(output / "misspelt")[0][-1])


def test_a_run_may_be_called_best(a_run):
    run = a_run / "runs" / "best"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoint-5" / "pytorch_model.bin").touch()
    assert find_checkpoints(run) == ([run / "checkpoint-5"], [])


def test_the_link_to_the_best_checkpoint_is_relative_and_moves_with_the_run(a_run):
    moved = a_run.rename(a_run.with_name("moved"))
    assert os.readlink(moved / "best") == "checkpoint-10"
    assert find_checkpoints(moved) == ([moved / "checkpoint-10"], [])


def test_a_folder_called_best_is_used_where_it_is_and_renamed_by_training(a_run):
    (a_run / "best").unlink()
    for name in ("best", "best-1"):
        (a_run / name).mkdir()
        (a_run / name / "pytorch_model.bin").write_text(name)
    assert find_checkpoints(a_run / "best") == find_checkpoints(a_run) == ([a_run / "best"], [])
    assert "best is a folder, where this run keeps a link" in point_to_best(a_run, 10)
    assert point_to_best(a_run, 10) == ""
    assert os.readlink(a_run / "best") == "checkpoint-10"
    assert [(a_run / name / "pytorch_model.bin").read_text() for name in ("best-1", "best-2")] == ["best-1", "best"]


@pytest.mark.parametrize("name", ["last", "all"])
def test_a_checkpoint_that_is_called_like_a_word_is_itself(name, a_run):
    (a_run / name).mkdir()
    (a_run / name / "pytorch_model.bin").touch()
    assert find_checkpoints(a_run / name) == ([a_run / name], [])
