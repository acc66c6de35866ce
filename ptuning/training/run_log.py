"""What a run tells while it goes on, such as trainer_log.jsonl: none of it ends the run.

Answers to nothing in the official scripts, where a full disk ends a run at the next line of a log. A checkpoint
decides whether a run can go on; of what is only read by people or plotted, the first failure is said.
"""

import atexit
import contextlib
import errno
import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path

from transformers import TrainerCallback

from common.failure import going_on_without, reason_of
from common.files import LOG_FILE, write_text
from common.messages import clock, silent

DRIFT_FIGURES = ("drift", "same_answers")  # logged of general prompts, in lines of their own; see forgetting/
GUARDED = (
    "on_epoch_begin on_epoch_end on_step_begin on_step_end on_log on_evaluate on_predict on_save on_train_end"
).split()


def guard_callback(callback: TrainerCallback, say) -> None:
    """Let a callback of TensorBoard, wandb or another logger fail once it has begun: said once, then left out.

    What is wrong when training begins, such as a folder that cannot be written to, is an error as ever.
    """
    name = type(callback).__name__.removesuffix("Callback")
    failed = []

    def guarded(event):
        def call(*args, **kwargs):
            if failed:
                return None
            try:
                return event(*args, **kwargs)
            except Exception as error:  # a logger's service raises anything
                failed.append(error)
                say(f"{name} can log nothing more: {reason_of(error)} The run goes on without it.")
                return None

        return call

    for event in GUARDED:
        setattr(callback, event, guarded(getattr(callback, event)))


class RunLog(TrainerCallback):
    """Writes trainer_log.jsonl, as the run goes on: a line for every training loss and dev loss, phase, and the end.

    For programs that watch a run; the keys are ChatGLM-Efficient-Tuning's. Times are of this start of the program. A
    resumed run goes on where its checkpoint was: losses that were logged after that are dropped, and logged again.
    Lines that cannot be written wait for a later one that can. `also` are further names that are logged, of training
    and of dev. `phases` are those before training, {name: seconds since 1970}: they are written when training begins,
    because a run that is refused leaves no folder behind.
    """

    file = None  # without training

    def __init__(self, say=print, also=()):
        self.say, self.phases = say, {}
        self.also = [*also, *(f"eval_{name}" for name in also), *DRIFT_FIGURES, "keep_loss"]
        self.writes = False  # from when training begins until the end is logged, on the first process

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step, self.written = time.monotonic(), state.global_step, set()
        self.file = Path(args.output_dir) / LOG_FILE
        self.waiting, self.said = "", False
        self.state, self.writes, self.phase = state, state.is_world_process_zero, None
        if not self.writes:
            return
        with self.trouble_said():
            kept = self.lines_before(state.global_step)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, "".join(kept))
        for phase, seconds in self.phases.items():
            self.enter(phase, seconds)

    def enter(self, phase, seconds=None, **more):
        """Log that a phase begins, now or at a time in seconds since 1970."""
        if self.writes and phase != self.phase:
            self.phase = phase
            when = datetime.fromtimestamp(time.time() if seconds is None else seconds)
            self.add({**self.entry({}), "phase": phase, "time": when.isoformat(timespec="seconds"), **more})

    def end(self, reason: str) -> None:
        """Log the end of the run and its reason, unless its end is logged already."""
        self.enter("end", reason=reason)
        self.writes = False

    def lines_before(self, step):
        """The lines of an earlier start of this run, up to `step`; notes in `written` what they are of."""
        kept = []
        if step and self.file.is_file():
            for line in self.file.read_text(encoding="utf-8", errors="replace").split("\n"):
                # Half a line of a killed run is none.
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    entry = json.loads(line)
                    if entry["current_steps"] <= step and "phase" not in entry:
                        self.written.add((entry["current_steps"], kind_of(entry)))
                        kept.append(line + "\n")
        return kept

    def end_training(self) -> None:
        """Log the end of a run that nothing has stopped but its own rules."""
        early = self.writes and self.state.global_step < self.state.max_steps
        self.end("stopped early: the loss had been rising" if early else "finished")

    def on_log(self, args, state, control, logs=None, **kwargs):
        event = state.global_step, kind_of(logs)
        if not self.writes or event in self.written or not {"loss", "eval_loss", *self.also} & logs.keys():
            return
        self.written.add(event)
        self.state = state
        self.add(self.entry(logs))

    def entry(self, logs):
        """What a line holds: how far the run is, and the losses of `logs`."""
        state, elapsed = self.state, time.monotonic() - self.start
        steps_to_go, steps_done = state.max_steps - state.global_step, state.global_step - self.first_step
        return {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            **{name: logs.get(name) for name in ("loss", "eval_loss", "learning_rate")},
            **{name: logs[name] for name in self.also if name in logs},
            "epoch": state.epoch,
            "percentage": round(100 * state.global_step / state.max_steps, 2),
            "elapsed_time": clock(elapsed),
            "remaining_time": clock(elapsed * steps_to_go / steps_done) if steps_done else None,
        }

    def add(self, entry):
        self.waiting += json.dumps(entry) + "\n"
        self.write()

    def on_step_begin(self, args, state, control, **kwargs):
        self.enter("training")

    def on_save(self, args, state, control, **kwargs):
        self.write()  # a save makes the folder anew where it was moved away

    def on_train_end(self, args, state, control, **kwargs):
        self.write()

    def write(self):
        """Add the lines that wait to the file, on the process that writes."""
        if self.waiting:
            with self.trouble_said():
                append(self.file, self.waiting)
                self.waiting = ""

    @contextlib.contextmanager
    def trouble_said(self):
        """Around each writing: the first OSError is said, and none ends the run."""
        with going_on_without(self.file, silent if self.said else self.say):
            try:
                yield
            except OSError:
                self.said = True
                raise


def kind_of(entry: dict) -> str:
    """What an entry of the log is about: the loss of a step, the drift, or dev rows."""
    return "loss" if entry.get("loss") is not None else "drift" if "drift" in entry else "dev"


def append(file, text):
    """Add whole lines to a file, all of `text` or nothing; half a line that a kill left there is ended first."""
    with open(file, "ab+", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        if size:
            opened.seek(size - 1)
            text = text if opened.read(1) == b"\n" else "\n" + text
        data = text.encode("utf-8")
        try:
            while data:
                data = data[opened.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                opened.truncate(size)
            raise


# ---- what is printed


class Unfailing:
    """A stream whose disk may be full, or whose reader may have gone: what cannot be written is lost, and no error."""

    def __init__(self, stream):
        self.stream = stream
        self.failed = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # nobody will read it any more
                self.drop()
            if not self.failed:
                self.failed = True
                tell(f"{self.name} cannot be written to: {reason_of(error)} The run goes on without it.\n")

    def drop(self):
        """Let the file descriptor lead nowhere."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def settle(self):
        """Before Python writes out the rest itself, and would end with status 120 where it cannot."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.drop()


def tell(text):
    """Write to the terminal's stderr, if that is possible."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def keep_printing() -> None:
    """Let this program go on where what it prints cannot be written: its results are in files."""
    for name in ("stdout", "stderr"):
        stream = Unfailing(getattr(sys, name))
        setattr(sys, name, stream)
        atexit.register(stream.settle)
