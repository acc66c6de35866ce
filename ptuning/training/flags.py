"""The flags of training that are not transformers' own, or have another default. It loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainingArguments:
    """The flags of training that are not transformers' own, or have another default; see PrefixTrainingArguments."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into an output_dir that already has checkpoints."}
    )
    debug: str = field(
        default="",
        metadata={
            "help": "Without a value: show the traceback of an error. transformers' own: underflow_overflow looks "
            "for overflow in every layer."
        },
    )
    precision: Literal["auto", "official"] = field(
        default="auto",
        metadata={
            "help": "auto: bfloat16 weights where the GPU has it, else float16 with loss scaling; float32 on a CPU. "
            "official: the recipe of the official scripts number for number, to reproduce their runs."
        },
    )
    plot_loss: bool = field(default=True, metadata={"help": "Draw training_loss.png when training ends."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep less for the backward pass and compute it again: less memory, a third more time. auto: where "
            "the estimated memory exceeds what is free [auto]."
        },
    )
    eval_with_generate: bool = field(
        default=False,
        metadata={"help": "Besides every dev loss, answer the dev rows and score BLEU-4 and ROUGE. Takes its time."},
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "End the run where the dev loss, or else the training loss, keeps rising."}
    )
    # Off, or one NaN would be logged as a loss of 0.0.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN losses out of the log (hides a failed run)."}
    )
