"""The loss where the Trainer, its arguments or a collator compute it, or a part of it: right, or refused by name."""

import pytest
import torch
from conftest import SYNTHETIC, relative_difference, synthetic_model
from support.small_model import batch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from trainer import PrefixTrainer
from training.arguments import PrefixTrainingArguments

ROWS = [
    {"input_ids": ids, "labels": labels}
    for ids, labels in zip(SYNTHETIC["input_ids"], SYNTHETIC["labels"], strict=True)
]


def logits_and_targets(model):
    """(logits (tokens, V), targets (tokens,)) of all rows, each at the token before."""
    input_ids, labels = batch()
    with torch.no_grad():
        logits = model.eval()(input_ids).logits[:, :-1]
    return logits.flatten(0, 1), labels[:, 1:].flatten()


def first_loss(trainer):
    """What the trainer says of the first step of training."""
    trainer.train()
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line)


def settings(folder, **more):
    return {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": len(ROWS),
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def with_row_numbers(rows):
    return {**collate(rows), "row": torch.ones(len(rows), dtype=torch.long)}


@pytest.mark.parametrize("own", [False, True], ids=["transformers' trainer", "this project's"])
def test_label_smoothing_is_of_the_token_that_is_predicted(own, tmp_path):
    model = synthetic_model()
    logits, targets = logits_and_targets(model)
    expected = functional.cross_entropy(logits, targets, label_smoothing=0.1).item()
    arguments = settings(tmp_path, label_smoothing_factor=0.1)
    if own:
        arguments = PrefixTrainingArguments(**arguments, remove_unused_columns=False)
        trainer = PrefixTrainer(model=model, args=arguments, train_dataset=ROWS, data_collator=with_row_numbers)
    else:
        trainer = Trainer(model, TrainingArguments(**arguments), collate, ROWS)
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)


def test_noise_on_the_embeddings_gets_whole_rows(tmp_path):
    trainer = Trainer(synthetic_model(), TrainingArguments(**settings(tmp_path, neftune_noise_alpha=1)), collate, ROWS)
    assert first_loss(trainer) > 0


def test_a_loss_of_the_users_own_gets_logits_and_labels(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        total = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return 3 * total / num_items_in_batch

    model = synthetic_model()
    expected = 3 * functional.cross_entropy(*logits_and_targets(model)).item()
    trainer = Trainer(model, TrainingArguments(**settings(tmp_path)), collate, ROWS, compute_loss_func=own_loss)
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)


def test_the_trainer_finds_the_dev_loss_and_the_logits(tmp_path):
    model = synthetic_model()
    expected = functional.cross_entropy(*logits_and_targets(model)).item()
    trainer = Trainer(model, TrainingArguments(**settings(tmp_path)), collate)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(expected, rel=1e-4)
    predicted = trainer.predict(ROWS)
    predictions = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    assert predictions.shape[:2] == predicted.label_ids.shape == batch()[1].shape


@pytest.mark.parametrize("training", [False, True])
def test_shift_labels_are_the_targets_and_replace_the_labels(training):
    model = synthetic_model().train(training)
    input_ids, labels = batch()
    shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(input_ids, labels=labels)
    for others in (None, torch.zeros_like(labels)):
        output = model(input_ids, labels=others, shift_labels=shifted)
        assert torch.equal(output.loss, expected.loss)
        assert (output.logits is None) == training
    last = model(input_ids, shift_labels=shifted.index_fill(1, torch.tensor([labels.shape[1] - 1]), 5)).loss
    assert (
        relative_difference(last.detach(), expected.loss.detach()) > 1e-4
    )  # the last token counts, if it has a target


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 2], [2, 3, 4, 5, 6, 7], [0, 1, 2, 9, 10, 11]])
@pytest.mark.parametrize("training", [False, True])
def test_several_texts_in_one_row_and_parts_of_a_row_are_refused(training, positions):
    model = synthetic_model().train(training)
    input_ids, positions = torch.arange(6)[None], torch.tensor([positions])
    with pytest.raises(ValueError, match="position_ids"):
        model(input_ids, position_ids=positions, labels=input_ids)
    if training:  # by whoever computes the loss without the head, as TRL does
        with pytest.raises(ValueError, match="position_ids"):
            model.transformer(input_ids, position_ids=positions)


def test_positions_that_count_the_tokens_of_each_row_are_trained_with():
    model = synthetic_model().train()
    input_ids = torch.arange(6)[None].repeat(2, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = model(input_ids, labels=input_ids).loss
    assert torch.equal(model(input_ids, position_ids=torch.arange(6)[None], labels=input_ids).loss, plain)
    labels = input_ids.masked_fill(mask == 0, -100)
    assert model(input_ids, mask, position_ids=positions, labels=labels).loss.isfinite()


def test_a_loss_through_an_adapted_output_layer_is_that_of_its_logits():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["output_layer"], init_lora_weights=False)
    model = get_peft_model(synthetic_model(), config).train()
    input_ids, labels = batch()
    loss = model(input_ids=input_ids, labels=labels).loss
    logits = model.eval()(input_ids=input_ids).logits[:, :-1]
    assert loss.item() == pytest.approx(functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item())
