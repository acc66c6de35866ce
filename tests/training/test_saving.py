"""Every way of tuning with every flag of the Trainer that touches checkpoints: what a run leaves, and what it refuses."""

import json
import subprocess
import zipfile

import pytest
import torch
from conftest import SAMPLE, TINY
from support.finetuned import TRAIN, run
from support.runs import flags

from arguments import parse_flags
from tuning.methods import load_trained

METHODS = {
    "prefix": {"pre_seq_len": 4},
    "prefix with projection": {"pre_seq_len": 4, "prefix_projection": True},
    "prefix on int4": {"pre_seq_len": 4, "quantization_bit": 4},
    "prefix on int8": {"pre_seq_len": 4, "quantization_bit": 8},
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze"},
    "lora": {"finetuning_type": "lora"},
    "lora on int4": {"finetuning_type": "lora", "quantization_bit": 4},
    "lora on int8": {"finetuning_type": "lora", "quantization_bit": 8},
}
DEV = {"validation_file": SAMPLE / "dev.json", "max_eval_samples": 4, "eval_strategy": "steps", "eval_steps": 1}
HIGHEST = {"metric_for_best_model": "loss", "greater_is_better": True}  # the loss falls: so the best is the first step
EPOCHS = {"max_steps": None, "num_train_epochs": 2, "max_train_samples": 8, "save_strategy": "epoch"}
# Flags, in 4 steps -> (steps whose checkpoints are left, the step that `best` names).
FLAGS = {
    "the best at the end": ({**DEV, "save_steps": 1, "load_best_model_at_end": True, **HIGHEST}, [1, 2, 3, 4], 1),
    "the best at the end, limited to 1": (
        {**DEV, "save_steps": 1, "load_best_model_at_end": True, **HIGHEST, "save_total_limit": 1},
        [1, 4],
        1,
    ),
    "a limit of 1 with the best last": ({**DEV, "save_steps": 1, "save_total_limit": 1}, [4], 4),
    "the best at the end, weights only": (
        {**DEV, "save_steps": 1, "load_best_model_at_end": True, **HIGHEST, "save_only_model": True},
        [1, 2, 3, 4],
        1,
    ),
    "only the best": ({**DEV, "save_strategy": "best", **HIGHEST}, [1, 4], 1),
    "only the best by default": ({**DEV, "save_strategy": "best"}, [1, 2, 3, 4], 4),
    "only the best, at the end": (
        {**DEV, "save_strategy": "best", "load_best_model_at_end": True, **HIGHEST},
        [1, 4],
        1,
    ),
    "each epoch": ({**EPOCHS}, [2, 4], None),
    "each epoch, the best at the end": (
        {**DEV, **EPOCHS, "eval_strategy": "epoch", "load_best_model_at_end": True, **HIGHEST},
        [2, 4],
        2,
    ),
    "nothing": ({"save_strategy": "no"}, [], None),
    "a dev loss and nothing": ({**DEV, "save_strategy": "no"}, [], None),
    "the best by BLEU-4": (
        {**DEV, "save_steps": 1, "load_best_model_at_end": True, "eval_with_generate": True}
        | {"metric_for_best_model": "bleu-4"},
        [1, 2, 3, 4],
        "any",
    ),
    "no limit": ({"save_total_limit": 0}, [2, 4], None),
    "on each node": ({"save_on_each_node": True}, [2, 4], None),
    "smaller batches": ({"auto_find_batch_size": True}, [2, 4], None),
    "on SIGTERM": ({"enable_jit_checkpoint": True}, [2, 4], None),
    "with callbacks": ({"restore_callback_states_from_checkpoint": True}, [2, 4], None),
    "a dev loss before": (
        {**DEV, "save_steps": 1, "eval_on_start": True, "load_best_model_at_end": True},
        [1, 2, 3, 4],
        4,
    ),
    "a late dev loss": ({**DEV, "save_steps": 1, "eval_delay": 2, "load_best_model_at_end": True}, [1, 2, 3, 4], 4),
    "a plateau": ({**DEV, "save_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}, [1, 2, 3, 4], "any"),
}


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("flags_of_run", FLAGS)
@pytest.mark.parametrize("method", ["prefix", "full", "freeze", "lora"])
def test_every_method_trains_to_the_end_with_every_flag_of_checkpoints(method, flags_of_run, tmp_path, monkeypatch):
    settings, steps, best = FLAGS[flags_of_run]
    trainer = run(monkeypatch, TRAIN, output_dir=tmp_path, **METHODS[method], **settings)
    assert trainer.state.global_step == 4
    assert checkpoints(tmp_path) == steps
    if best != "any":
        assert (tmp_path / "best").is_symlink() == (best is not None)
        assert best is None or (tmp_path / "best").resolve().name == f"checkpoint-{best}"


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_at_the_end_are_the_best_checkpoints(method, tmp_path, monkeypatch, capsys):
    settings, _, best = FLAGS["the best at the end"]
    trainer = run(monkeypatch, TRAIN, output_dir=tmp_path, **METHODS[method], **settings)
    assert f"The best checkpoint has been loaded: {tmp_path}/checkpoint-{best}" in capsys.readouterr().out
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    found = {name: weight.detach().clone() for name, weight in trained.items()}
    for step, same in ((4, False), (1, True)):
        load_trained(trainer.model, tmp_path / f"checkpoint-{step}", trainer.sidecar["finetuning_type"])
        assert all(torch.equal(found[name], weight) for name, weight in trained.items()) == same


@pytest.mark.slow
@pytest.mark.parametrize(("method", "metric"), [("lora", "loss"), ("full", "loss"), ("prefix", "bleu-4")])
def test_two_processes_load_the_same_best_checkpoint_at_the_end(method, metric, ranks, tmp_path):
    settings = FLAGS["the best at the end"][0] | {"metric_for_best_model": metric, "eval_with_generate": True}
    predict = {"do_predict": True, "test_file": SAMPLE / "dev.json", "max_predict_samples": 2, "max_target_length": 8}
    words = flags({**TRAIN, **METHODS[method], **settings, **predict, "output_dir": tmp_path / "run"})
    statuses, output = ranks.run(words, processes=2)
    assert statuses == [0, 0], output[-3000:]
    best = (tmp_path / "run" / "best").resolve()
    assert f"The best checkpoint has been loaded: {tmp_path}/run/{best.name}" in output
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    values = {entry["step"]: entry[f"eval_{metric}"] for entry in state["log_history"] if f"eval_{metric}" in entry}
    assert best.name == f"checkpoint-{max(values, key=values.get)}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--push_to_hub",
            r"--push_to_hub: this program uploads nothing.*hf upload <user>/<name> out/checkpoint-<step>",
        ),
        ("--save_strategy best", "--save_strategy best saves where the dev loss is lowest.*--eval_strategy steps"),
        (
            "--validation_file d --eval_strategy steps --metric_for_best_model runtime",
            "--metric_for_best_model runtime: expected loss",
        ),
        (
            "--validation_file d --eval_strategy steps --metric_for_best_model eval_bleu-4",
            r"eval_bleu-4: expected loss \(--eval_with_generate gives it\)",
        ),
        (
            "--validation_file d --eval_strategy steps --eval_with_generate --metric_for_best_model bleu",
            "--metric_for_best_model bleu: expected loss or rouge-1 or rouge-2 or rouge-l or bleu-4",
        ),
    ],
)
def test_a_flag_of_checkpoints_that_cannot_be_meant_is_refused_before_anything_is_loaded(words, message):
    base = f"--do_train --train_file t --output_dir out --model_name_or_path {TINY} --pre_seq_len 4"
    base += " --prompt_column content --response_column summary "
    with pytest.raises(ValueError, match=message):
        parse_flags((base + words).split())


@pytest.mark.slow
@pytest.mark.parametrize("start", [{"resume_from_checkpoint": "last", "max_steps": 6}, {"overwrite_output_dir": True}])
def test_a_copy_of_a_run_whose_links_have_become_folders_trains_on(start, tmp_path, monkeypatch, capsys):
    settings = {**TRAIN, **METHODS["prefix"], **DEV, "save_steps": 1}
    run(monkeypatch, settings, output_dir=tmp_path / "run")
    subprocess.run(["cp", "-rL", tmp_path / "run", tmp_path / "copy"], check=True)
    weights = (tmp_path / "copy" / "best" / "pytorch_model.bin").read_bytes()
    capsys.readouterr()
    trainer = run(monkeypatch, {**settings, **start}, output_dir=tmp_path / "copy")
    assert capsys.readouterr().out.count("copy/best is a folder") == 1
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert (tmp_path / "copy" / "best").is_symlink() and (tmp_path / "copy" / "best").resolve().name == best
    assert (tmp_path / "copy" / "best-1" / "pytorch_model.bin").read_bytes() == weights


def test_the_training_args_of_earlier_checkpoints_can_be_unpickled(tmp_path):
    named = b"\x80\x02ctrainer\nPrefixTrainingArguments\n)\x81}(X\x04\x00\x00\x00seedK\x07ub."
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
        archive.writestr("training_args/data.pkl", named)
        archive.writestr("training_args/version", "3\n")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).seed == 7
