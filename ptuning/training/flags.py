"""The flags of training that are not transformers' own, or have another default. It loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.flags import declare


@dataclass
class TrainingArguments:
    """The flags of training that are not transformers' own, or have another default; see PrefixTrainingArguments."""

    overwrite_output_dir: bool = declare("Train into an output_dir that already has checkpoints.", default=False)
    debug: str = declare(
        "Without a value: show the traceback of an error. transformers' own: underflow_overflow looks for overflow in "
        "every layer.",
        default="",
    )
    precision: Literal["auto", "official"] = declare(
        "auto: bfloat16 weights where the GPU has it, else float16 with loss scaling; float32 on a CPU. official: the "
        "recipe of the official scripts number for number, to reproduce their runs.",
        default="auto",
    )
    plot_loss: bool = declare("Draw training_loss.png when training ends.", default=True)
    gradient_checkpointing: bool | None = declare(
        "Keep less for the backward pass and compute it again: less memory, a third more time. auto: where the "
        "estimated memory exceeds what is free [auto]."
    )
    eval_with_generate: bool = declare(
        "Besides every dev loss, answer the dev rows and score BLEU-4 and ROUGE. Takes its time.", default=False
    )
    early_stopping: bool = declare(
        "End the run where the dev loss, or else the training loss, keeps rising.", default=False
    )
    # Off, or one NaN would be logged as a loss of 0.0.
    logging_nan_inf_filter: bool = declare("Leave NaN losses out of the log (hides a failed run).", default=False)
    general_file: str | None = declare(
        "General prompts, one a row, answers not needed: at the start and at every save the run logs how far the model has "
        "moved from its base on them (drift), and how many it still answers as its base does. none: do not measure."
    )
    keep_base: float = declare(
        "Weight of general prompts that every step learns with the base's own answers, so that less is forgotten; 0: off. "
        "The prompts are those of --general_file that are not measured.",
        default=0.0,
    )
    keep_base_rows: float = declare(
        "keep_base: how many general rows a step has, for each of its own rows.", default=1.0
    )
    stage: Literal["sft", "rm", "dpo", "ppo"] = declare(
        "What is trained for: sft: to give the answers of the rows; rm: a reward model, from pairs of answers; dpo: to "
        "prefer the chosen answer of each pair; ppo: to please a reward model.",
        default="sft",
    )
    dpo_beta: float = declare(
        "dpo: how much a change of the log-probability counts; lower lets more change.", default=0.1
    )
    dpo_label_smoothing: float = declare(
        "dpo: share of the pairs that are taken to be the wrong way round.", default=0.0
    )
    dpo_cache: bool = declare(
        "dpo: compute the reference's log-probabilities once, before the first step.", default=False
    )
    reward_model: str | None = declare("ppo: the reward model, a checkpoint or run of --stage rm.")
    ppo_epochs: int = declare("ppo: optimizer steps with the answers of each step.", default=1)
