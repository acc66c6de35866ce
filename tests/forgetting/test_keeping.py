"""--keep_base: the base's own answers beside the rows of a step."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLE
from support.finetuned import TRAIN, run

from forgetting.keeping import KeptRows

GENERAL = {"general_file": SAMPLE / "general_dev.json", "keep_base": 2, "keep_base_rows": 0.5}
SHORT = {**TRAIN, "max_train_samples": 24, "max_steps": 2, "save_steps": 1}
METHODS = {
    "prefix": {"pre_seq_len": 4, "prefix_dropout": 0},
    "int4 lora": {"finetuning_type": "lora", "quantization_bit": 4, "lora_dropout": 0},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_learns_the_bases_answers_with_their_weight(method, tmp_path, monkeypatch):
    trainer = run(monkeypatch, SHORT, **GENERAL, **METHODS[method], output_dir=tmp_path)
    model = trainer.model
    model.zero_grad()
    trainer.learn_kept(trainer.model_wrapped)
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    rows = trainer.kept.of_step(2)
    assert len(rows) == 2  # for the 4 rows of a step
    losses = []
    for row in rows:  # plainly: each row alone, all logits, torch's cross-entropy
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum"))
    (2 * sum(losses) / sum(label != -100 for row in rows for label in row["labels"])).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert (found[name] - weight.grad).abs().max() <= 1e-6 + 1e-5 * weight.grad.abs().max(), name


def test_a_stopped_run_goes_on_with_the_same_general_rows(tmp_path, monkeypatch):
    settings = {**SHORT, **GENERAL, "pre_seq_len": 4, "max_steps": 3, "save_steps": 2, "logging_steps": 3}
    run(monkeypatch, settings, output_dir=tmp_path / "whole")
    settings |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
    run(monkeypatch, settings, output_dir=tmp_path / "again")
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "again")]
    logged = [[entry for entry in state["log_history"] if "keep_loss" in entry] for state in states]
    assert logged[0] == logged[1] and len(logged[0]) == 1
    files = [tmp_path / name / "checkpoint-3" / "pytorch_model.bin" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_row_is_learned_once_before_any_is_learned_twice():
    prompts, answers = [[number, number] for number in range(5)], [[number] for number in range(5)]
    kept = KeptRows(prompts, answers, per_step=2, seed=1)
    read = [row["row"] for step in range(5) for row in kept.of_step(step)]
    assert sorted(read[:5]) == sorted(read[5:]) == [1, 2, 3, 4, 5]
    assert read != [
        row["row"] for step in range(5) for row in KeptRows(prompts, answers, per_step=2, seed=2).of_step(step)
    ]


def test_the_bases_answers_are_found_once_for_all_runs(tmp_path, monkeypatch):
    run(monkeypatch, SHORT, **GENERAL, pre_seq_len=4, output_dir=tmp_path / "a")
    monkeypatch.setattr("forgetting.answers.answers_of", None)
    assert len(run(monkeypatch, SHORT, **GENERAL, pre_seq_len=4, output_dir=tmp_path / "b").kept.rows) > 40
