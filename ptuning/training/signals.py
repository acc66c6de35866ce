"""Ctrl-C and SIGTERM while training: the step is finished and saved, on all processes alike.

Answers to nothing in the official scripts, which lose all steps since the last checkpoint when they are stopped.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback

from checkpoints.run_folder import checkpoint_name
from common import failure
from common.failure import catch_signals, leave

SAME_SIGNAL_SECONDS = 2.0  # torchrun hands a signal on that the terminal has sent to every process already


class StopOnSignal(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP: finish the step, save, and end the training; the second time leave at once.

    `signal` is what arrived in this process, `agreed` what arrived in any, known to all at the end of a step. Python
    runs signal handlers between two of its own operations, which may be a whole backward pass away; so a thread that
    reads signal numbers from a pipe answers the user.
    """

    def __init__(self):
        self.signal = self.agreed = 0
        self.arrived = None
        self.group = None
        self.before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.signal = self.agreed = 0
        self.arrived = None
        if distributed.is_initialized() and distributed.get_backend() != "gloo":
            # The CPUs agree, without waiting for the GPUs.
            self.group = distributed.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
        threading.Thread(target=self.listen, args=(reader,), daemon=True).start()
        self.before = catch_signals(self.note)
        os.register_at_fork(after_in_child=self.forget)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore_handlers()
        os.close(self.pipe)  # ends the thread

    def restore_handlers(self):
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def forget(self):
        """In a process that loads data: its parent ends it, and Ctrl-C is the parent's."""
        if self.before:
            self.restore_handlers()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def note(self, number, frame):
        self.signal = failure.signal_at_hand = self.signal or number

    def listen(self, reader):
        while number := os.read(reader, 1):
            name = signal.Signals(number[0]).name
            if name not in ("SIGINT", "SIGTERM", "SIGHUP"):
                continue
            if self.arrived is None:
                self.arrived = time.monotonic()
                if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                    line = f"\n{name}: finishing this step, then saving and leaving. A second time leaves at once.\n"
                    with contextlib.suppress(OSError):  # a log on a full disk
                        os.write(2, line.encode())
            elif time.monotonic() - self.arrived > SAME_SIGNAL_SECONDS:
                leave(128 + number[0], f"{name}, the second time: left at once, without saving.")
        os.close(reader)

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.signal
        if distributed.is_initialized():
            flag = torch.tensor([self.signal])
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self.group)
            self.agreed = int(flag)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed and state.epoch != int(state.epoch):  # stopped on the way: the resumed run ends the epoch
            control.should_log = control.should_evaluate = control.should_save = False


def describe_stop(number: int, state, training_args) -> str:
    """The message at the end of a run that a signal has ended."""
    name = signal.Signals(number).name
    folder = Path(training_args.output_dir, checkpoint_name(state.global_step))
    if state.global_step >= state.max_steps:
        return f"{name}: stopped after the last step; {folder} is complete."
    return (
        f"{name}: stopped after step {state.global_step} of {state.max_steps}; {folder} is complete. To go on, run the "
        "same command with --resume_from_checkpoint last."
    )
