"""The stages of training, and which flags go with which. It loads no torch.

Answers to `--stage` of ChatGLM-Efficient-Tuning: sft on answers; rm, a reward model, and dpo on pairs of answers; ppo on
prompts, whose answers a reward model scores.
"""

from __future__ import annotations

from checkpoints.ways import SWAPPED, default_method

OWN_FLAGS = {  # {flag: the stage that reads it}
    **dict.fromkeys(("dpo_beta", "dpo_label_smoothing", "dpo_cache"), "dpo"),
    **dict.fromkeys(("reward_model", "ppo_epochs"), "ppo"),
}
# What is logged of pairs or answers beside the loss: means over them, of training ones and, as eval_…, of dev ones.
FIGURES = {
    "rm": ("accuracy", "margin"),
    "dpo": ("accuracy", "margin", "reward_chosen", "reward_rejected"),
    "ppo": ("reward", "kl", "entropy", "answer_length"),
}
SAMPLING = ("do_sample", "num_beams", "top_p", "temperature")  # flags of predictions, which ppo does not read
WITHOUT = {  # flags of answers, {name: its value that changes nothing}
    "eval_with_generate": False,
    "label_smoothing_factor": 0.0,
    "precision": "auto",
    "general_file": None,
    "keep_base": 0.0,
}


def reads_pairs(stage: str) -> bool:
    """True for a stage whose rows hold two answers."""
    return stage in ("rm", "dpo")


def answers_per_row(training_args) -> int:
    """How many rows a batch has for each row of the data: 2 where these hold two answers."""
    return 2 if reads_pairs(getattr(training_args, "stage", "sft")) else 1


def check_own_flags(training_args, defaults: dict) -> None:
    """ValueError for a flag of another stage than this run's; `defaults` are {flag: value}."""
    for name, stage in OWN_FLAGS.items():
        value = getattr(training_args, name)
        if value != defaults[name] and training_args.stage != stage:
            raise ValueError(
                f"--{name} {value} belongs to --stage {stage}, but this run's is {training_args.stage}. Leave the flag out, "
                f"or give --stage {stage}."
            )


def check_stage(model_args, data_args, training_args) -> None:
    """ValueError for flags that do not go with the stage of a run; nothing for sft."""
    stage = training_args.stage
    if stage == "sft":
        return
    method = model_args.finetuning_type or default_method(model_args.stage)
    if method not in SWAPPED:
        raise ValueError(
            f"--stage {stage} trains a prefix or an adapter on a frozen base; --finetuning_type {method} is neither. Give "
            f"--finetuning_type {' or '.join(SWAPPED)}."
        )
    for name, nothing in WITHOUT.items():
        if getattr(training_args, name) != nothing:
            hint = "; --dpo_label_smoothing is that of dpo" if name == "label_smoothing_factor" else ""
            raise ValueError(
                f"--{name} {getattr(training_args, name)} is for --stage sft{hint}. With --stage {stage} leave it out."
            )
    if not data_args.ignore_pad_token_for_loss:
        raise ValueError(f"--ignore_pad_token_for_loss false: --stage {stage} compares answers only. Leave it out.")
    if stage in ("dpo", "ppo") and training_args.do_predict:
        raise ValueError(
            f"--do_predict with --stage {stage}: what it has trained answers as any other does. Leave --stage out, and give "
            "--ptuning_checkpoint."
        )
    if stage == "ppo" and training_args.early_stopping:
        raise ValueError(
            "--early_stopping ends a run whose loss rises, and that of --stage ppo says nothing of how good its answers are. "
            "Leave it out."
        )
    if stage == "ppo" and not training_args.reward_model:
        raise ValueError("--stage ppo needs --reward_model, a checkpoint that --stage rm has written.")
    if not training_args.do_train and not model_args.ptuning_checkpoint:
        raise ValueError(
            f"--stage {stage} without --do_train evaluates what was trained: give --ptuning_checkpoint, a checkpoint of it."
        )


def check_stage_of_run(session, stage: str) -> None:
    """ValueError where a run, of tuning/session.py, resumes a checkpoint of another stage."""
    written = session.saved.get("stage", "sft")
    if session.resumes and written != stage:
        raise ValueError(
            f"{session.checkpoint} was written with --stage {written}, and this run is --stage {stage}. To begin this stage "
            "with what it has trained, give it as --ptuning_checkpoint, with another --output_dir."
        )
