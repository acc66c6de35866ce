"""Watches a training run: loss and gradient that are no finite numbers, gradients that are exactly 0.

Answers to nothing in the official scripts: there a run goes on to its last step with a loss of NaN, which the log
shows as 0.0. Functions here raise or speak; what they look at, trainer.py hands them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint import list_checkpoints
from data import shown_rows

ZERO_STEPS = 5  # steps in a row with a gradient of exactly 0 before it is said
SKIPPED_STEPS = 20  # steps in a row that loss scaling may skip: it has then halved its factor a million times


@dataclass
class Step:
    """One optimizer step on this process: its number, and the loss and the row numbers of each batch in it."""

    number: int
    learning_rate: float
    gradient_norm: torch.Tensor
    losses: list = field(default_factory=list)
    rows: list = field(default_factory=list)


class StepWatch:
    """Looks at loss and gradient norm of every step, at no cost worth measuring.

    A GPU is never waited for at the step itself. Three flags are computed on it, reduced over the processes, and
    copied to the host in the background; they are read one step later, when that step's whole work has been queued
    behind them, or before anything of the step is logged, evaluated or saved. So no checkpoint is written that a bad
    step has touched. On a CPU the flags are read at once, before the optimizer moves the prefix.

    `loss_scaling`: fp16 with a factor that is found by trial; steps whose gradient overflows are skipped by the
    optimizer, and are an error only when they do not end.
    """

    def __init__(self, *, dtype, output_dir, loss_scaling, say):
        self.dtype = str(dtype).removeprefix("torch.")
        self.output_dir = output_dir
        self.loss_scaling = loss_scaling
        self.say = say
        self.losses, self.rows = [], []  # of the batches since the last step
        self.unread = None  # (Step, flags on the host, event after which they are there)
        self.zero_steps = self.skipped_steps = 0
        self.zero_said = False

    def saw_batch(self, loss, rows):
        """Take note of a batch: its loss, a scalar on any device, and the numbers of its rows."""
        self.losses.append(loss)
        self.rows.append(rows)

    def saw_gradient(self, step_number, learning_rate, gradient_norm):
        """End a step: `gradient_norm` is that of all processes together. Raises ValueError, on all of them."""
        self.read()
        step = Step(step_number, learning_rate, gradient_norm, self.losses, self.rows)
        self.losses, self.rows = [], []
        flags = step_flags(step)
        if torch.distributed.is_initialized():  # a loss of one process only
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        if flags.device.type != "cuda":
            self.unread = step, flags, None
            self.read()
            return
        on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.unread = step, on_host, event

    def read(self):
        """Judge the step that was not read yet, if there is one. Raises ValueError where training must stop."""
        if self.unread is None:
            return
        (step, flags, event), self.unread = self.unread, None
        if event is not None:
            event.synchronize()
        bad_loss, bad_gradient, zero_gradient = flags.tolist()
        self.skipped_steps = self.skipped_steps + 1 if bad_gradient else 0
        if bad_loss or (bad_gradient and not self.loss_scaling) or self.skipped_steps == SKIPPED_STEPS:
            raise ValueError(self.describe_bad_step(step, bad_loss))
        self.zero_steps = self.zero_steps + 1 if zero_gradient else 0
        if self.zero_steps == ZERO_STEPS and not self.zero_said:
            self.zero_said = True
            self.say(
                f"The gradient has been exactly 0 for {ZERO_STEPS} steps, up to step {step.number} ({self.dtype} "
                "weights): the prefix learns nothing. In float16 gradients can be too small to exist; try --bf16."
            )

    def describe_bad_step(self, step, bad_loss):
        """What is wrong with it, where, and what to do; the same text on every process."""
        losses, rows = gather_batches(step)
        suspects = [numbers for loss, numbers in zip(losses, rows, strict=True) if not _finite(loss)] or rows
        what = f"the loss is {next(loss for loss in losses if not _finite(loss))}" if bad_loss else "the loss is finite"
        if self.skipped_steps == SKIPPED_STEPS and not bad_loss:
            what += f", but the last {SKIPPED_STEPS} steps had to be skipped, whatever the loss scaling"
        checkpoint = last_good_checkpoint(self.output_dir, step.number)
        advice = "start again" if checkpoint is None else f"start from it (--ptuning_checkpoint {checkpoint})"
        advice += " with a lower --learning_rate" + (", or --bf16" if self.dtype == "float16" else "")
        return (
            f"Training stopped at step {step.number}: {what}.\n"
            f"  gradient norm {step.gradient_norm.item()}, learning rate {step.learning_rate:g}, weights {self.dtype}\n"
            f"  rows {shown_rows(sum(suspects, []))} of the training file\n"
            f"  last good checkpoint: {checkpoint or 'none was saved before this step'}\n"
            f"  what to do: look at those rows; {advice}"
        )


def _finite(loss):
    return float("-inf") < loss < float("inf")


def step_flags(step):
    """int32 (3,) on the device of the loss: some loss is not finite, the gradient norm is not, it is exactly 0."""
    norm = step.gradient_norm.detach().float()
    finite = torch.stack([loss.detach().float() for loss in step.losses]).isfinite().all()
    return torch.stack((~finite, ~norm.isfinite(), norm == 0)).to(torch.int32)


def gather_batches(step):
    """(losses, lists of row numbers) of the batches that all processes had in this step."""
    mine = [(loss.item(), rows.tolist()) for loss, rows in zip(step.losses, step.rows, strict=True)]
    everyones = [mine]
    if torch.distributed.is_initialized():
        everyones = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, mine)
    return tuple(zip(*sum(everyones, []), strict=True))


def last_good_checkpoint(output_dir, before_step):
    """The newest checkpoint of the run from before a step, or None."""
    steps = [int(name.removeprefix("checkpoint-")) for name in list_checkpoints(output_dir)]
    steps = [step for step in steps if step < before_step]
    return Path(output_dir) / f"checkpoint-{max(steps)}" if steps else None
