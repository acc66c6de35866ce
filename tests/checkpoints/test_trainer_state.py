"""What a checkpoint says of itself has the right kind before a run goes on from it: one clear line, or it works."""

import json
import shutil

import pytest
import torch
from conftest import SAMPLE
from support.finetuned import run
from support.resuming import RUN, write_checkpoint

from checkpoints.run_folder import newest_checkpoint, publish_checkpoint, save_number
from checkpoints.trainer_state import KINDS, check_state
from training import resume

STATE = {
    "best_global_step": 2,
    "best_metric": 1.5,
    "best_model_checkpoint": "run/checkpoint-2",
    "epoch": 0.4,
    "eval_steps": 500,
    "global_step": 2,
    "log_history": [{"step": 1, "loss": 2.0, "epoch": 0.2}, {"step": 2, "eval_loss": 2.0}],
    "logging_steps": 1,
    "max_steps": 4,
    "num_input_tokens_seen": 0,
    "num_train_epochs": 1,
    "save_steps": 2,
    "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}},
    "total_flos": 0.0,
    "train_batch_size": 2,
    "trial_name": None,
    "trial_params": None,
}
WRONG = {"text": "x", "-5": -5, "10^400": 10**400, "true": True, "a list": [[1]], "an object": {"a": 5}}
RIGHT = [
    ("best_metric", "-5"),
    ("best_model_checkpoint", "text"),
    ("trial_name", "text"),
    ("trial_params", "an object"),
]


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key in KINDS for kind in WRONG if (key, kind) not in RIGHT])
def test_a_value_of_a_wrong_kind_names_file_and_key(key, kind, tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/trainer_state.json: {key} is .{{1,70}}, expected "):
        check_state({**STATE, key: WRONG[kind]}, tmp_path / "trainer_state.json")


@pytest.mark.parametrize("entry", [5, {"loss": 1.0}, {"loss": "1", "step": 1}, {"eval_loss": None, "step": 1}])
def test_a_log_that_no_run_has_written_is_refused(entry):
    with pytest.raises(ValueError, match="log_history is .*expected a list of logged losses"):
        check_state({**STATE, "log_history": [entry]}, "state")


def test_a_step_beyond_the_end_of_the_run_is_refused():
    with pytest.raises(ValueError, match=r"global_step is 5, beyond the run's last step \(max_steps 4\)"):
        check_state({**STATE, "global_step": 5}, "state")


def test_a_right_state_and_one_with_unknown_keys_pass():
    assert check_state({**STATE, "of_a_later_version": [1]}, "state")["global_step"] == 2


@pytest.mark.parametrize("number", ["7", None, [], 1.5, -1, 10**400, True])
def test_a_save_number_that_is_none_does_not_keep_the_others_from_being_compared(number, tmp_path):
    write_checkpoint(tmp_path, 1, 1)
    strange = write_checkpoint(tmp_path, 2, number)
    assert save_number(strange) == float("inf")
    assert newest_checkpoint(tmp_path) == (strange, [])


# ---- whole runs from a checkpoint that somebody has changed


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """checkpoint-2 of a run of 4 steps."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, RUN, max_steps=4, save_steps=2, output_dir=folder)
    return folder / "checkpoint-2"


@pytest.fixture
def resumed(half, tmp_path, monkeypatch):
    """What remains of a run that goes on from that checkpoint once `change(folder)` was made, with right checksums."""

    def resumed(change, **more):
        shutil.copytree(half, tmp_path / "staged")
        change(tmp_path / "staged")
        (tmp_path / "staged" / "checksums.json").unlink()
        publish_checkpoint(tmp_path / "staged", tmp_path / "checkpoint-2")
        settings = {"max_steps": 4, "save_steps": 2, "resume_from_checkpoint": "last", **more}
        try:
            return run(monkeypatch, RUN, output_dir=tmp_path, **settings)
        finally:
            resume.release_run(tmp_path)

    return resumed


def with_key(name, key, value):
    def change(folder):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, key: value}))

    return change


def test_a_state_of_a_newer_transformers_is_continued(resumed):
    assert resumed(with_key("trainer_state.json", "of_a_later_version", {"a": 1})).state.global_step == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training", "x", 'training is "x", expected an object'),
        ("training", [1], "expected an object"),
        ("base_fingerprint", 5, "base_fingerprint is 5, expected text"),
        ("max_source_length", 10**400, "max_source_length is 1000.*expected a positive integer"),
    ],
)
def test_a_sidecar_of_a_wrong_kind_is_named(key, value, message, resumed):
    with pytest.raises(ValueError, match=f"ptuning.json: .*{message}"):
        resumed(with_key("ptuning.json", key, value))


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "rmsprop", "adagrad"])
def test_another_optimizer_is_refused_with_its_flag(optim, resumed):
    message = rf"optimizer.pt does not fit this run .*another optimizer's, which has amsgrad.*--optim {optim} has "
    with pytest.raises(ValueError, match=message):
        resumed(lambda folder: None, optim=optim)


def test_another_schedule_is_said(resumed, capsys):
    assert resumed(lambda folder: None, lr_scheduler_type="cosine").state.global_step == 4
    assert "lr_scheduler_type linear -> cosine (the schedule is that of the new type" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no pickle", {"foo": 1}, [], None, torch.zeros(3)], ids=str)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_bad_pickle_under_right_checksums_names_its_file(name, content, resumed):
    def change(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)

    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} (cannot be read|does not fit this run) "):
        resumed(change)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("optimizer.pt", ("param_groups", 0, "lr"), "x"),
        ("optimizer.pt", ("param_groups", 0, "betas"), None),
        ("optimizer.pt", ("param_groups", 0, "maximize"), torch.zeros(7)),
        ("optimizer.pt", ("state", 0, "exp_avg"), torch.zeros(7)),
        ("optimizer.pt", ("state", 0, "exp_avg_sq"), None),
        ("optimizer.pt", ("state", 0, "step"), torch.zeros(7)),
        ("scheduler.pt", ("last_epoch",), "x"),
        ("scheduler.pt", ("base_lrs",), ["x"]),
        ("scheduler.pt", ("_last_lr",), []),
        ("scheduler.pt", ("_step_count",), None),
        ("rng_state.pth", ("cpu",), torch.zeros(7)),
        ("rng_state.pth", ("losses", "sum"), "x"),
        ("rng_state.pth", ("losses", "since_log"), torch.zeros(7)),
    ],
)
def test_a_state_of_a_wrong_kind_names_its_file(name, path, value, resumed):
    def change(folder):
        with resume.safe_globals():
            state = inner = torch.load(folder / name, weights_only=True)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        torch.save(state, folder / name)

    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} does not fit this run "):
        resumed(change)


@pytest.mark.parametrize(
    "more",
    [{"optim": name} for name in ("adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad")]
    + [
        {"lr_scheduler_type": name} for name in ("reduce_lr_on_plateau", "greedy", "cosine_with_restarts", "polynomial")
    ],
    ids=lambda more: next(iter(more.values())),
)
def test_every_optimizer_and_schedule_is_continued(more, tmp_path, monkeypatch):
    dev = {"validation_file": SAMPLE / "dev.json", "max_eval_samples": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings = {**RUN, **dev, **more, "max_steps": 2, "save_steps": 1, "output_dir": tmp_path}
    run(monkeypatch, settings)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run(monkeypatch, settings, resume_from_checkpoint="last").state.global_step == 2
