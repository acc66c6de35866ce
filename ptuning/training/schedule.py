"""How many rows a run feeds: in a step, in an epoch, until its end. Arithmetic on flags and the number of rows.

Answers to `set_initial_training_values` of transformers' Trainer, which counts steps and epochs so, and rows as if
every step were full.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """Rows are those of all processes together, batches those of one process; the epochs are those of `steps`."""

    rows_per_step: int
    rows_of_last_step: int  # of an epoch
    batches_per_epoch: int
    batches_per_step: int
    steps_per_epoch: int
    steps: int

    def epochs_after(self, steps: int) -> float:
        """The epochs that so many steps make, as the Trainer counts them: in batches."""
        epochs, steps_left = divmod(steps, self.steps_per_epoch)
        return epochs + steps_left * self.batches_per_step / self.batches_per_epoch


def rows_of_whole_step(training_args):
    """Rows of a step for which there are enough rows."""
    batches = training_args.gradient_accumulation_steps * training_args.world_size
    return training_args.per_device_train_batch_size * batches


def plan_steps(training_args, num_rows: int) -> StepPlan:
    """The StepPlan of a run on `num_rows` rows. ValueError where --dataloader_drop_last leaves no batch of them.

    Batches are those of the flags, whatever is merged.
    """
    batch_size, accumulated = training_args.given_batches
    processes = training_args.world_size
    if training_args.dataloader_drop_last:
        batches = num_rows // batch_size // processes
    else:
        batches = -(-num_rows // batch_size // processes)
    if not batches:
        raise ValueError(
            f"--dataloader_drop_last leaves out incomplete batches, and the {num_rows} rows of training are fewer than "
            f"the {batch_size * processes} of one. Leave the flag out, or lower --per_device_train_batch_size."
        )
    steps_per_epoch = -(-batches // accumulated)
    # In the official recipe accelerate repeats rows until all processes have full batches.
    whole = training_args.dataloader_drop_last or (training_args.precision == "official" and processes > 1)
    rows_per_epoch = batches * batch_size * processes if whole else num_rows
    rows_per_step = min(rows_of_whole_step(training_args), rows_per_epoch)
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
    return StepPlan(
        rows_per_step,
        rows_per_epoch - (steps_per_epoch - 1) * rows_per_step,
        batches,
        accumulated,
        steps_per_epoch,
        steps,
    )


def describe_steps(training_args, num_rows: int) -> str:
    """One line: the rows of a step, and the steps of the run as epochs."""
    plan = plan_steps(training_args, num_rows)
    rows, accumulated = training_args.given_batches
    line = f"Batch: {rows} rows x {accumulated} accumulated x {training_args.world_size} processes"
    whole = rows_of_whole_step(training_args)
    line += " = " if plan.rows_per_step == whole else f", but there are {plan.rows_per_step}: "
    line += f"{plan.rows_per_step} rows a step; {plan.steps} steps = {plan.epochs_after(plan.steps):.2f} epochs of {num_rows} rows."
    if plan.rows_of_last_step < plan.rows_per_step and plan.steps >= plan.steps_per_epoch:
        line += f" The last step of an epoch has {plan.rows_of_last_step} rows."
    return line
