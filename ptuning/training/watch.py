"""Watches a training run: numbers that are not finite, gradients of exactly 0, a loss that rises, the best step.

Answers to nothing in the official scripts: there a run goes on to its last step with a loss of NaN, which the log
shows as 0.0, or with a loss that has been climbing since the first quarter. What is here raises or speaks; trainer.py
and the library's callbacks hand it what it looks at.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback

from checkpoints.run_folder import BEST_LINK, checkpoint_name, list_checkpoints, point_to_best, step_of
from common.messages import dtype_name
from common.ranks import gather
from data.mixture import shown_rows
from training.schedule import plan_steps

ZERO_STEPS = 5  # steps in a row with a gradient of exactly 0 before it is said
SKIPPED_STEPS = 20  # steps in a row that loss scaling may skip: it has then halved its factor a million times
# A loss rises when it has stood above its lowest value by RISE for RISE_STEPS steps. The dev loss is taken as it is.
# Of the training loss the mean of the last SMOOTH_STEPS counts, and it must also be above by so many of its own
# standard errors that chance does not explain it.
RISE = 0.02
RISE_STEPS = 200
SMOOTH_STEPS = 100
STANDARD_ERRORS = 6


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
    optimizer, and are an error only when they do not end. `last_checkpoint` gives the run's newest, or None.
    """

    def __init__(self, *, dtype, loss_scaling, last_checkpoint, say):
        self.dtype = dtype_name(dtype)
        self.loss_scaling = loss_scaling
        self.last_checkpoint = last_checkpoint
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
        flags, event = to_host(flags)
        self.unread = step, flags, event
        if event is None:
            self.read()

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
        """The message for a step that ends the run, of which each process gets the same."""
        losses, rows = gather_batches(step)
        suspects = [numbers for loss, numbers in zip(losses, rows, strict=True) if not math.isfinite(loss)] or rows
        shown = next(loss for loss in losses if not math.isfinite(loss)) if bad_loss else "finite"
        what = f"the loss is {shown}"
        if self.skipped_steps == SKIPPED_STEPS and not bad_loss:
            what += f", but the last {SKIPPED_STEPS} steps had to be skipped, whatever the loss scaling"
        return (
            f"Training stopped at step {step.number}: {what}.\n"
            f"  gradient norm {step.gradient_norm.item()}, learning rate {step.learning_rate:g}, weights {self.dtype}\n"
            f"  rows {shown_rows(sum(suspects, []))} of the training data\n"
            + way_out(self.last_checkpoint(), self.dtype)
        )


def way_out(checkpoint, dtype):
    """The end of a message that stops training: the last good checkpoint and what to do, in two lines."""
    start = f"start from it (--ptuning_checkpoint {checkpoint})" if checkpoint else "start again"
    return (
        f"  last good checkpoint: {checkpoint or 'none was saved before this step'}\n"
        f"  what to do: {start} with a lower --learning_rate{', or --bf16' if dtype == 'float16' else ''}"
    )


def step_flags(step):
    """int32 (3,) on the device of the loss, 1 where: a loss is not finite, the gradient norm is not, the norm is 0."""
    norm = step.gradient_norm.detach().float()
    finite = torch.stack([loss.detach().float() for loss in step.losses]).isfinite().all()
    return torch.stack((~finite, ~norm.isfinite(), norm == 0)).to(torch.int32)


def to_host(flags):
    """(flags on the host, None), or for a GPU (flags that will be there, the event after which they are)."""
    if flags.device.type != "cuda":
        return flags, None
    on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    on_host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return on_host, event


def gather_batches(step):
    """(losses, lists of row numbers) of the batches that all processes had in this step."""
    batches = zip(step.losses, step.rows, strict=True)
    mine = [(loss.item(), [row for row in rows.tolist() if row]) for loss, rows in batches]  # without blank ones, 0
    return tuple(zip(*sum(gather(mine), []), strict=True))


# ---- the whole run


class LossTrend:
    """Takes one loss after the other and tells where they have been rising for long, see RISE."""

    def __init__(self, smooth):
        self.smooth = smooth
        self.recent = deque()  # (step, loss) of the last SMOOTH_STEPS
        self.value = self.lowest = math.inf
        self.lowest_step = self.near_step = 0  # near_step: the last one that was not above

    def add(self, step, loss):
        """Take the loss logged at `step`; True where it has been rising up to here."""
        self.value, error = loss, 0.0
        if self.smooth:
            self.recent.append((step, loss))
            while self.recent[0][0] <= step - SMOOTH_STEPS:
                self.recent.popleft()
            if step < SMOOTH_STEPS:
                return False
            losses = [loss for _, loss in self.recent]
            self.value = statistics.fmean(losses)
            if len(losses) > 1:
                error = statistics.stdev(losses) / len(losses) ** 0.5
        if self.value < self.lowest:
            self.lowest, self.lowest_step = self.value, step
        if self.value - self.lowest <= max(RISE * self.lowest, STANDARD_ERRORS * error):
            self.near_step = step
        return step - self.near_step >= RISE_STEPS


def follow(log_history: list[dict], key: str) -> tuple[LossTrend, bool]:
    """(LossTrend after the losses that a log has under `key`, whether they have been rising for long at any of them)."""
    trend = LossTrend(smooth=key == "loss")
    return trend, any([trend.add(entry["step"], entry[key]) for entry in log_history if key in entry])


def watched_key(args) -> str:
    """The key in the log of the losses that are watched: those of the dev rows, or without these, of training.

    "" where neither says how good a model is: the loss of ppo is that of the answers of its step alone.
    """
    if args.stage == "ppo":
        return ""
    return "loss" if args.eval_strategy == "no" else "eval_loss"


class RunWatch(TrainerCallback):
    """Measures a dev loss at every save, keeps `best` in the output folder, and notices a loss that rises.

    Where batches are merged, it counts epochs in those of the flags: logs have the same numbers then.
    With `early_stopping` the run ends there, with a checkpoint; otherwise it is said once.
    """

    key = None  # in the log of what is watched; nothing without training

    def __init__(self, *, dtype, early_stopping, say):
        self.dtype = dtype_name(dtype)
        self.early_stopping = early_stopping
        self.say = say

    def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
        self.plan = plan_steps(args, len(train_dataloader.dataset)) if args.merged_batches > 1 else None
        self.output_dir, self.saved_step = args.output_dir, state.global_step  # where a resumed run goes on, or 0
        self.key = watched_key(args)
        self.trend, self.rise_said = follow(state.log_history, self.key)
        if state.is_world_process_zero:  # of a run before this one in the same folder, or after where this one resumes
            if said := point_to_best(args.output_dir, state.best_global_step):
                self.say(said)

    def on_step_end(self, args, state, control, **kwargs):
        if self.plan:
            state.epoch = self.plan.epochs_after(state.global_step)
        if control.should_save and args.eval_strategy != "no":
            control.should_evaluate = True

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs, **kwargs):
        loss = logs.get(self.key)
        if loss is None:
            return
        if not math.isfinite(loss):  # of the dev rows; a bad training loss has not come so far
            raise ValueError(
                f"Training stopped at step {state.global_step}: the dev loss is {loss} ({self.dtype} weights).\n"
                + way_out(self.last_checkpoint(), self.dtype)
            )
        if not self.trend.add(state.global_step, loss) or self.rise_said:
            return
        self.rise_said = True
        kind = f"training loss (mean of {SMOOTH_STEPS} steps)" if self.trend.smooth else "dev loss"
        best = checkpoint_name(state.best_global_step) if state.best_global_step else "none known"
        self.say(
            f"The {kind} has been rising: {self.trend.value:.4f} at step {state.global_step}, lowest "
            f"{self.trend.lowest:.4f} at step {self.trend.lowest_step}; best checkpoint: {best}. "
            + ("Stopping here." if self.early_stopping else "With --early_stopping the run would end here.")
        )
        if self.early_stopping:
            control.should_training_stop = control.should_save = True

    def last_checkpoint(self):
        """The folder that this run has saved last, or has been resumed from; None without one."""
        folder = Path(self.output_dir) / checkpoint_name(self.saved_step)
        return folder if folder.is_dir() else None

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step


def describe_checkpoints(state, output_dir: Path | str) -> str:
    """One line on where the run's best and last checkpoints are; empty without checkpoints."""
    # An earlier, longer run may have left others there.
    names = [name for name, folder in list_checkpoints(output_dir).items() if step_of(folder) <= state.global_step]
    if not names:
        return ""
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
    dev_losses = {checkpoint_name(entry["step"]): entry["eval_loss"] for entry in evaluated}

    def shown(name):
        return f"{Path(output_dir) / name}" + (f" (dev loss {dev_losses[name]:.4f})" if name in dev_losses else "")

    last, best = names[-1], checkpoint_name(state.best_global_step)
    if best not in names:
        return f"Last checkpoint: {shown(last)}. Without a dev loss no best one is known."
    if best == last:
        return f"Best and last checkpoint: {shown(best)}, also called {Path(output_dir) / BEST_LINK}."
    return f"Best checkpoint: {shown(best)}, also called {Path(output_dir) / BEST_LINK}. Last: {shown(last)}."
