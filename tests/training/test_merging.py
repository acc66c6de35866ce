"""Accumulated batches that are computed together: when, and that a step stays the same."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import synthetic_model
from support.runs import TRAIN_SETTINGS, losses, run
from torch import nn

from training import memory

BATCH = {"batch_size": 1, "length": 16, "num_supervised": 8, "checkpointing": False}


def merge(monkeypatch, room_for=16, model=None, **settings):
    """(training_args, batch, lines) behind merge_batches, where memory holds a batch of so many rows."""
    extra, model = model, synthetic_model()
    if extra:
        model.add_module("adapter", extra)
    needed = memory.added_bytes(model, **{**BATCH, "batch_size": room_for})
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * needed)
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "world_size": 1, "merged_batches": 1}
    args |= {"precision": "auto", "dataloader_drop_last": False, "fsdp": "", "deepspeed": None, **settings}
    args, batch, said = SimpleNamespace(**args), dict(BATCH), []
    memory.merge_batches(model, batch, args, said.append)
    return args, batch, said


@pytest.mark.parametrize("room, merged", [(16, 16), (40, 16), (15, 8), (3, 2)])
def test_as_many_batches_are_merged_as_half_of_the_free_memory_holds(room, merged, monkeypatch):
    args, batch, (line,) = merge(monkeypatch, room)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (merged, 16 // merged)
    assert args.merged_batches == batch["batch_size"] == merged
    assert line.startswith(f"{merged} accumulated batches are computed at once, {merged} rows, because")


@pytest.mark.parametrize(
    "settings",
    [
        {"room_for": 1},
        {"precision": "official"},
        {"dataloader_drop_last": True},
        {"gradient_accumulation_steps": 1},
        {"model": nn.Dropout(0.1)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_otherwise_nothing_is_merged(settings, monkeypatch):
    args, batch, said = merge(monkeypatch, **settings)
    assert args.per_device_train_batch_size == args.merged_batches == batch["batch_size"] == 1 and not said


@pytest.mark.parametrize("room, parts", [(16, 1), (15, 2), (5, 4), (1, 16), (0, 16)])
def test_a_batch_that_shall_fit_starts_in_as_many_parts_as_memory_asks_for(room, parts, monkeypatch):
    model, batch, said = synthetic_model(), {**BATCH, "batch_size": 16}, []
    needed = memory.added_bytes(model, **{**BATCH, "batch_size": room})
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed / 0.89)
    args = SimpleNamespace(
        auto_find_batch_size=True, gradient_checkpointing=None, fsdp="", deepspeed=None, first_parts=1
    )
    memory.cut_batch(model, batch, args, said.append)
    assert (args.first_parts, batch["batch_size"]) == (parts, 16 // parts) and len(said) == (parts > 1)


def prefix(folder):
    weights = torch.load(folder / "checkpoint-5" / "pytorch_model.bin", weights_only=True)
    return weights["transformer.prefix_encoder.embedding.weight"]


def test_a_run_is_the_same_with_merged_batches_dropout_and_the_rows_of_an_epochs_end_too(monkeypatch, tmp_path, capsys):
    settings = {**TRAIN_SETTINGS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    settings |= {"max_train_samples": 20, "prefix_dropout": 0.3}  # 3 steps an epoch, the last of 4 rows
    run(monkeypatch, settings, output_dir=tmp_path / "merged")
    said = capsys.readouterr().out
    assert "8 accumulated batches are computed at once, 8 rows" in said
    assert "Batch: 1 rows x 8 accumulated" in said
    monkeypatch.setattr(memory, "merge_batches", lambda *_: None)
    run(monkeypatch, settings, output_dir=tmp_path / "alone")
    assert "at once" not in capsys.readouterr().out
    assert losses(tmp_path / "merged") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert torch.allclose(prefix(tmp_path / "merged"), prefix(tmp_path / "alone"), atol=1e-4)
    middle = tmp_path / "merged" / "checkpoint-3"
    run(monkeypatch, settings, resume_from_checkpoint=middle, output_dir=tmp_path / "resumed")
    assert "Not as in the checkpoint's run" not in capsys.readouterr().out
    assert torch.allclose(prefix(tmp_path / "resumed"), prefix(tmp_path / "alone"), atol=1e-4)
    records = [
        json.loads((tmp_path / name / "checkpoint-5" / "ptuning.json").read_text()) for name in ("merged", "alone")
    ]
    assert records[0]["training"] == records[1]["training"]


@pytest.mark.parametrize(
    "method",
    [{"finetuning_type": "lora", "lora_dropout": 0}, {"finetuning_type": "freeze", "num_layer_trainable": 1}],
    ids=lambda method: method["finetuning_type"],
)
def test_other_methods_take_the_same_steps_with_merged_batches(method, monkeypatch, tmp_path, capsys):
    settings = {**TRAIN_SETTINGS, "pre_seq_len": None, "max_steps": 3, "learning_rate": 1e-3, **method}
    run(monkeypatch, settings, output_dir=tmp_path / "merged")
    assert "2 accumulated batches are computed at once, 8 rows" in capsys.readouterr().out
    monkeypatch.setattr(memory, "merge_batches", lambda *_: None)
    run(monkeypatch, settings, output_dir=tmp_path / "alone")
    assert losses(tmp_path / "merged") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
