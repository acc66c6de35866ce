"""What a run says of its rows a step, epochs and speed is what it feeds."""

import json
from types import SimpleNamespace

import pytest
from support.runs import TRAIN_SETTINGS, run
from transformers import Trainer

from training.schedule import plan_steps


def flags(batch_size=1, accumulation=1, processes=1, max_steps=-1, epochs=3.0, drop_last=False, precision="auto"):
    return SimpleNamespace(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        world_size=processes,
        max_steps=max_steps,
        num_train_epochs=epochs,
        dataloader_drop_last=drop_last,
        precision=precision,
        given_batches=(batch_size, accumulation),
    )


@pytest.mark.parametrize(
    ("given", "num_rows", "rows_a_step", "rows_at_the_end", "steps", "epochs"),
    [
        (flags(16, max_steps=200), 2400, 16, 16, 200, 200 / 150),
        (flags(4, 2, max_steps=5), 60, 8, 4, 5, 10 / 15),
        (flags(1, 16, max_steps=10), 20, 16, 4, 10, 5),
        (flags(16, max_steps=10), 20, 16, 4, 10, 5),
        (flags(16, epochs=3), 20, 16, 4, 6, 3),
        (flags(16, epochs=0.5), 20, 16, 4, 1, 0.5),
        (flags(16, max_steps=7), 6, 6, 6, 7, 7),
        (flags(4, 8, max_steps=7), 6, 6, 6, 7, 7),
        (flags(1, 16, max_steps=3000), 114599, 16, 7, 3000, 48000 / 114599),
        (flags(4, 2, 2, max_steps=4), 42, 16, 10, 4, 1 + 2 / 6),
        (flags(4, 2, 4, max_steps=3), 6, 6, 6, 3, 3),
        (flags(16, drop_last=True, max_steps=4), 20, 16, 16, 4, 4),
        (flags(2, 2, 2, max_steps=4, drop_last=True), 21, 8, 4, 4, 1 + 2 / 5),
        (flags(4, 1, 2, max_steps=4, precision="official"), 6, 8, 8, 4, 4),  # accelerate repeats two rows
    ],
)
def test_plan_says_rows_steps_and_epochs(given, num_rows, rows_a_step, rows_at_the_end, steps, epochs):
    plan = plan_steps(given, num_rows)
    assert (plan.rows_per_step, plan.rows_of_last_step, plan.steps) == (rows_a_step, rows_at_the_end, steps)
    assert plan.epochs_after(plan.steps) == pytest.approx(epochs)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 6, 8, 20, 42, 60])
@pytest.mark.parametrize(
    "given", [flags(4), flags(4, 2), flags(1, 16), flags(16, max_steps=7), flags(4, 3, max_steps=9)]
)
def test_plan_counts_steps_as_the_library_does(given, num_rows):
    trainer = SimpleNamespace(
        get_total_train_batch_size=lambda args: 0, get_sp_size=lambda: 1, num_examples=lambda loader: num_rows
    )
    loader = range(-(-num_rows // given.per_device_train_batch_size))
    _, steps_per_epoch, *_, batches, steps = Trainer.set_initial_training_values(trainer, given, loader)
    plan = plan_steps(given, num_rows)
    assert (plan.steps_per_epoch, plan.batches_per_epoch, plan.steps) == (steps_per_epoch, batches, steps)


def test_too_few_rows_for_one_batch_are_refused_where_incomplete_ones_are_dropped():
    with pytest.raises(ValueError, match="--dataloader_drop_last .* 6 rows .* 16"):
        plan_steps(flags(16, drop_last=True), 6)


SMALL = {**TRAIN_SETTINGS, "max_steps": 4, "save_steps": 2, "max_target_length": 8}


def fed(folder):
    """Rows that the run says it has fed, by its speed and its time."""
    results = json.loads((folder / "train_results.json").read_text())
    return results["train_samples_per_second"] * results["train_runtime"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said", "rows", "epochs"),
    [
        (
            {"max_train_samples": 20, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
            "16 rows a step; 4 steps = 2.00 epochs of 20 rows. The last step of an epoch has 4 rows.",
            40,
            2,
        ),
        (
            {"max_train_samples": 6, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
            "Batch: 16 rows x 1 accumulated x 1 processes, but there are 6: 6 rows a step; 4 steps = 4.00 epochs of 6 rows.",
            24,
            4,
        ),
        (
            {"max_train_samples": 20, "per_device_train_batch_size": 4, "group_by_length": True},
            "8 rows a step; 4 steps = 1.40 epochs of 20 rows. The last step of an epoch has 4 rows.",
            28,
            1.4,
        ),
    ],
    ids=["an incomplete last step", "fewer rows than a step", "grouped by length"],
)
def test_a_small_run_says_what_it_feeds(settings, said, rows, epochs, monkeypatch, tmp_path, capsys):
    run(monkeypatch, SMALL, output_dir=tmp_path, **settings)
    assert said in capsys.readouterr().out
    assert fed(tmp_path) == pytest.approx(rows, rel=1e-3)
    results = json.loads((tmp_path / "all_results.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert results["epoch"] == pytest.approx(epochs) and log[-1]["epoch"] == pytest.approx(epochs)


@pytest.mark.slow
def test_a_resumed_run_counts_the_rows_that_it_feeds_itself(monkeypatch, tmp_path):
    settings = {**SMALL, "max_train_samples": 20, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    run(monkeypatch, settings, output_dir=tmp_path, max_steps=3)  # 16, 4, 16 rows
    run(monkeypatch, settings, output_dir=tmp_path, max_steps=5, resume_from_checkpoint="last")  # 4, 16
    assert fed(tmp_path) == pytest.approx(20, rel=1e-3)
