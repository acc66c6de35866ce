"""PrefixTrainer that also looks after general prompts: it measures what tuning makes a model forget.

Answers to nothing in the official scripts. Without general prompts it is PrefixTrainer, number for number; with them
alone, too, but for what it writes: measuring draws no random number and changes no weight.
"""

from transformers import TrainerCallback

from checkpoints.ways import SWAPPED
from data.general import General, read_general
from forgetting.answers import base_answers
from forgetting.drift import Drift
from trainer import PrefixTrainer
from training.run_log import DRIFT_FIGURES

MEASURED_TOKENS = 64  # of an answer of the base


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
    return read_general(training_args.general_file, data_args, tokenizer, seq_length, say)


class AtStart(TrainerCallback):
    """Calls a function when the training of a new run begins."""

    def __init__(self, begin):
        self.begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.begin()


class GeneralTrainer(PrefixTrainer):
    """Measures the drift on `general` prompts at the start and at every save; see drift.py. None: measures nothing."""

    def __init__(self, *args, general: General | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.general, self.drift = general, None
        if general is not None:
            self.add_callback(AtStart(self.measure_drift))

    def answers_of_base(self, prompts, most):
        merged = self.sidecar.get("merged_checkpoints") or ()
        model, num_known = self.accelerator.unwrap_model(self.model), len(self.processing_class)
        return base_answers(model, prompts, most, num_known, self.args, merged, self.say)

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

    def _save_checkpoint(self, model, trial):
        if self.general is not None:
            if self.stop.agreed:  # what stops the run may not wait
                self.sidecar = {name: value for name, value in self.sidecar.items() if name not in DRIFT_FIGURES}
            else:
                self.measure_drift()
        super()._save_checkpoint(model, trial)
