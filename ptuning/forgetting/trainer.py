"""PrefixTrainer that also looks after general prompts: it measures what tuning makes a model forget, and keeps it.

Answers to nothing in the official scripts. Without general prompts it is PrefixTrainer, number for number; with them
alone, too, but for what it writes: measuring draws no random number and changes no weight.
"""

import time
from pathlib import Path

from transformers import TrainerCallback

from checkpoints.ways import SWAPPED
from common.failure import going_on_without
from common.files import write_text
from common.ranks import gather
from data.general import General, read_general
from data.splits import seed_of_rows
from forgetting.answers import answers_of, base_answers
from forgetting.drift import Drift
from forgetting.keeping import KeptRows
from forgetting.page import PAGE_FILE, lines_of, page_of
from trainer import PrefixTrainer
from training.results import describe_drift
from training.run_log import DRIFT_FIGURES
from training.schedule import rows_of_whole_step
from tuning.swapping import BASE, swapped

MEASURED_TOKENS = 32  # of an answer of the base
SHOWN, SHOWN_TOKENS = 6, 64  # prompts that are answered at the end, and tokens of their answers


def open_general(session, data_args, training_args, tokenizer, seq_length: int, say) -> General | None:
    """The prompts of --general_file, or None where a run does not ask for them or cannot use them, which it is told."""
    if not (training_args.do_train and training_args.general_file):
        return None
    if session.method.name not in SWAPPED:
        say(
            f"What is forgotten is not measured: --finetuning_type {session.method.name} changes the base's own weights, "
            f"so there is nothing to compare with. {' and '.join(SWAPPED)} leave them alone."
        )
        return None
    general = read_general(training_args.general_file, data_args, tokenizer, seq_length, say)
    if training_args.keep_base and not len(general.kept):
        raise ValueError(
            f"--keep_base has no prompts to learn: of the {len(general.measured)} that fit in {training_args.general_file} "
            f"half are measured, and the others are longer than --max_source_length {data_args.max_source_length}. Give a "
            "file with more of them."
        )
    return general


class AtStart(TrainerCallback):
    """Calls a function when the training of a new run begins."""

    def __init__(self, begin):
        self.begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.begin()


class GeneralTrainer(PrefixTrainer):
    """Measures the drift on `general` prompts at the start and at every save; see drift.py. None: measures nothing.

    With --keep_base every step also learns some of them, as keeping.py says. Their loss is logged as `keep_loss`, the
    mean over the steps since the last line.
    """

    kept = None  # KeptRows, with --keep_base
    kept_step = None  # the last step that has learned its general rows
    kept_loss, kept_steps = 0.0, 0  # since the last line of the log: the sum of their losses, and of how many steps

    def __init__(self, *args, general: General | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.general, self.drift = general, None
        if general is not None:
            self.add_callback(AtStart(self.measure_drift))

    # ---- the drift

    def answers_of_base(self, prompts, most):
        merged = self.sidecar.get("merged_checkpoints") or ()
        model, num_known = self.accelerator.unwrap_model(self.model), len(self.processing_class)
        ends = self.processing_class.stop_ids
        return base_answers(model, prompts, most, num_known, self.args, merged, self.say, ends)

    def measure_drift(self):
        """Log how far the model is from its base now, and let the next checkpoint remember it."""
        self.run_log.enter("evaluating")
        if self.drift is None:
            prompts = self.general.measured.ids
            self.drift = Drift(
                self.accelerator.unwrap_model(self.model),
                prompts,
                self.answers_of_base(prompts, MEASURED_TOKENS),
                num_known=len(self.processing_class),
                pad_token_id=self.processing_class.pad_token_id,
                process=self.args.process_index,
                processes=self.args.world_size,
            )
        figures = self.drift.measure()
        self.sidecar |= figures
        self.log(dict(figures))

    def show_forgetting(self):
        """Answer a few of the measured prompts as tuned and as base, side by side: said, and in forgetting.html."""
        if self.general is None or not self.args.should_save:
            return
        asked = self.general.measured
        asked = asked.chosen(
            [index * len(asked) // SHOWN for index in range(SHOWN)] if len(asked) > SHOWN else range(len(asked))
        )
        model, tokenizer = self.accelerator.unwrap_model(self.model), self.processing_class
        how = {"most": SHOWN_TOKENS, "num_known": len(tokenizer), "ends": tokenizer.stop_ids}
        with swapped(model, BASE):
            before = answers_of(model, asked.ids, **how)
        after = answers_of(model, asked.ids, **how)
        texts = [
            [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found] for found in (before, after)
        ]
        answers = [
            dict(zip(("prompt", "base", "tuned"), row, strict=True)) for row in zip(asked.texts, *texts, strict=True)
        ]
        file = Path(self.args.output_dir) / PAGE_FILE
        with going_on_without(file, self.say):
            write_text(file, page_of(answers, describe_drift(self.state.log_history)))
        self.say(f"General prompts, answered by base and tuned model; also in {file}:\n{lines_of(answers)}")

    def _save_checkpoint(self, model, trial):
        if self.general is not None:
            if self.stop.agreed:  # what stops the run may not wait
                self.sidecar = {name: value for name, value in self.sidecar.items() if name not in DRIFT_FIGURES}
            else:
                self.measure_drift()
        super()._save_checkpoint(model, trial)

    # ---- the base's own answers

    def train(self, *args, **kwargs):
        if self.general is not None and self.args.keep_base:
            self.open_kept()
        return super().train(*args, **kwargs)

    def open_kept(self):
        """Let the base answer the prompts that are to be learned, and say what they cost."""
        prompts, started = self.general.kept.ids, time.monotonic()
        answers = self.answers_of_base(prompts, self.sidecar["max_target_length"] + 1)
        rows = rows_of_whole_step(self.args)
        per_step = max(1, round(rows * self.args.keep_base_rows))
        self.kept = KeptRows(prompts, answers, per_step=per_step, seed=seed_of_rows(self.args))
        lengths = self.train_dataset["length"][:]
        more = per_step * self.kept.mean_length() / (rows * sum(lengths) / len(lengths))
        self.say(
            f"The base's own answers to {len(prompts):,} general prompts are there ({time.monotonic() - started:.1f} s). "
            f"Every step also learns {per_step} of them, which is {more:.0%} more tokens; they weigh "
            f"{self.args.keep_base:g} (--keep_base)."
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.kept and self.kept_step != self.state.global_step:  # before the first batch of a step
            self.kept_step = self.state.global_step
            self.learn_kept(model)
        return super().training_step(model, inputs, num_items_in_batch)

    def learn_kept(self, model):
        """Add the gradient of a step's general rows, of which each process computes a share."""
        rows, args = self.kept.of_step(self.state.global_step), self.args
        # The processes' gradients are averaged, and only with average_tokens_across_devices the loss is made up for it.
        averaged = 1 if args.average_tokens_across_devices else args.world_size
        divisor = self.kept.tokens(rows) / (args.keep_base * averaged)
        mine = sorted(rows[args.process_index :: args.world_size], key=lambda row: len(row["input_ids"]))
        with self.accelerator.no_sync(model):  # brought together with the gradient of the step's own rows
            for start in range(0, len(mine), args.per_device_train_batch_size):
                batch = self.data_collator(mine[start : start + args.per_device_train_batch_size])
                del batch["row"]
                loss = None
                while loss is None:
                    loss = self._compute_batch(model, batch, divisor)
                self.kept_loss = self.kept_loss + loss / args.keep_base
        self.kept_steps += 1

    def log(self, logs, start_time=None):
        if "loss" in logs and self.kept_steps:
            mean = sum(gather(float(self.kept_loss))) / self.args.world_size
            logs["keep_loss"] = mean / self.kept_steps
            self.kept_loss, self.kept_steps = 0.0, 0
        super().log(logs, start_time)

    def _process_state(self):
        kept = {"kept": [float(self.kept_loss), self.kept_steps]} if self.kept else {}
        return {**super()._process_state(), **kept}

    def _restore_process_state(self, state, states):
        super()._restore_process_state(state, states)
        saved = [state.get("kept")] if len(states) == self.args.world_size else [other.get("kept") for other in states]
        if self.kept and all(saved):
            self.kept_loss = sum(loss for loss, _ in saved) / len(saved)
            self.kept_steps = saved[0][1]
