"""Relative paths of a user who starts a script from another folder."""

import pytest
from conftest import ROOT
from support.resuming import write_checkpoint
from support.shell import bash

from common import paths
from common.paths import seen_from_caller
from training import resume


def test_a_path_that_only_the_users_folder_has_is_found_there(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "ptuning").mkdir()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(paths.CALLED_FROM, str(tmp_path))
    assert seen_from_caller("run") == str(tmp_path / "run")
    assert seen_from_caller("ptuning") == "ptuning"  # the program's own folder comes first
    assert seen_from_caller("nowhere") == "nowhere"
    monkeypatch.delenv(paths.CALLED_FROM)
    assert seen_from_caller("run") == "run"


@pytest.mark.parametrize("wanted", ["run/checkpoint-1", "checkpoint-1"])
def test_a_checkpoint_to_resume_is_found_in_the_folder_at_hand_and_in_the_run(wanted, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", 1, 1)
    monkeypatch.chdir(tmp_path)
    folder, _ = resume.find_resume_checkpoint(wanted, tmp_path / "run")
    assert (tmp_path / folder).samefile(tmp_path / "run" / "checkpoint-1")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["run/checkpoint-1", "checkpoint-1"])
def test_train_sh_from_another_folder_resumes_a_relative_checkpoint(wanted, tmp_path):
    variables = {"MODEL": "tiny", "NUM_GPUS": 1, "OMP_NUM_THREADS": 1, "DEV_ROWS": 2}
    words = "--max_train_samples 8 --eval_strategy no --eval_on_start false --save_steps 1 --report_to none --max_steps"
    script = f"bash {ROOT}/train.sh --output_dir {tmp_path}/run {words}"
    done = bash(f"{script} 1 && {script} 2 --resume_from_checkpoint {wanted}", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert f"Resuming from {tmp_path}/run/checkpoint-1 at step 1" in done.stdout
