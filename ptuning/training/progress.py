"""How far a run is: one bar on a terminal, plain lines in a pipe or a file.

Answers to the bar and the log lines of transformers' Trainer. These are dicts with quoted numbers, leave debris where
one bar stands in another, and write \\r into files.
"""

import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback

from common.messages import duration

SECONDS_OF_SILENCE = 10  # after which work beside the steps says how far it is, where there is no bar
FORM = "{percentage:3.0f}%|{bar}| {desc}"
NO_SCORES = ("runtime", "per_second", "loss")  # ends of the keys of an evaluation that are not shown as scores


def say_above_bar(line: str) -> None:
    """Print a line now, above the bar if there is one."""
    tqdm.write(f"{line}\n", end="")
    sys.stdout.flush()


class ShownProgress(TrainerCallback):
    """Shows the steps of training and, through begin, advance and end, any other work in countable pieces.

    Without `shown`, as on all processes but the first, nothing is. `bar=False` never draws a bar.
    """

    def __init__(self, *, shown: bool, bar: bool, say):
        self.say, self.shown = say, shown
        self.draws = shown and bar and sys.stdout.isatty() and sys.stderr.isatty()
        self.bar = None
        self.trains = False
        self.work = None  # what, pieces done, pieces in all, when it began

    # ---- steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.trains, self.figures = True, {}
        self.started, self.first_step = time.monotonic(), state.global_step
        self.open(state.max_steps, state.global_step)
        self.show_step(state)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)
            self.show_step(state)

    def on_log(self, args, state, control, logs, **kwargs):
        if not self.trains or "train_loss" in logs:  # whose figures the table at the end has
            return
        shown = {"loss": "loss", "eval_loss": "dev", "drift": "drift"}
        self.figures.update({shown[key]: f"{logs[key]:.3f}" for key in shown if key in logs})
        if "learning_rate" in logs:
            self.figures["lr"] = f"{logs['learning_rate']:.2e}"
        scores = {key: value for key, value in logs.items() if key.startswith("eval_") and not key.endswith(NO_SCORES)}
        if scores:
            self.tell("  ".join(f"{key.removeprefix('eval_')} {value:.2f}" for key, value in scores.items()))
        elif not self.bar or "eval_loss" in logs or "drift" in logs:
            self.tell(self.line(state, without=("lr",)))
        self.show_step(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()
        self.trains = False

    def line(self, state, without=()):
        """ "step 40/200  loss 0.603  dev 0.580  lr 1.60e-02  12 s gone, 48 s left"."""
        gone = time.monotonic() - self.started
        names = [name for name in ("loss", "dev", "drift", "lr") if name in self.figures and name not in without]
        figures = "".join(f"  {name} {self.figures[name]}" for name in names)
        times = times_of(gone, state.global_step - self.first_step, state.max_steps - state.global_step)
        return f"step {state.global_step}/{state.max_steps}{figures}  {times}"

    def show_step(self, state):
        if self.bar:
            self.bar.set_description_str(self.line(state))

    # ---- other work

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not self.work:
            self.begin("dev loss" if self.trains else "batches", len(eval_dataloader))
        self.advance()

    def on_evaluate(self, args, state, control, **kwargs):
        self.end()

    on_predict = on_evaluate

    def begin(self, what: str, total: int) -> None:
        """From now on advance() counts `total` pieces of work."""
        self.work = [what, 0, total, time.monotonic()]
        self.said = time.monotonic()
        if not self.trains:
            self.open(total, 0)

    def advance(self, pieces: int = 1) -> None:
        what, done, total, began = self.work
        done = self.work[1] = done + pieces
        text = f"{what} {done}/{total}"
        if self.bar and self.trains:
            self.bar.set_description_str(text)
            return
        text += f"  {times_of(time.monotonic() - began, done, total - done)}"
        if self.bar:
            self.bar.update(pieces)
            self.bar.set_description_str(text)
        elif time.monotonic() - self.said > SECONDS_OF_SILENCE or (done == total and not self.trains):
            self.tell(text)

    def end(self) -> None:
        self.work = None
        if not self.trains:
            self.close()

    # ---- bar and lines

    def open(self, total, done):
        if self.draws:
            self.bar = tqdm(total=total, initial=done, bar_format=FORM, dynamic_ncols=True, file=sys.stderr)

    def close(self, message: str = "") -> None:
        """Leave the bar as it is, and go on below it."""
        if self.bar:
            self.bar.close()
            self.bar = None

    def tell(self, text):
        if self.shown:
            self.said = time.monotonic()
            self.say(text)


def times_of(gone, done, left):
    """ "12 s gone, 48 s left" where `done` pieces took `gone` seconds; without the second where nothing is done yet."""
    return f"{duration(gone)} gone" + (f", {duration(gone * left / done)} left" if done else "")
