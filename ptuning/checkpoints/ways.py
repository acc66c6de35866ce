"""The ways to tune, a row each: which flags are its own, what it goes with, how its checkpoints are told.

What a way does is in a file of its own in tuning/. It loads no torch, so that the command line can ask.
"""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's names; the latter is from 2023


@dataclass(frozen=True)
class Rules:
    """What a way of tuning goes with."""

    flags: tuple[str, ...] = ()  # those that it reads
    trains: bool = True
    needs_prefix: bool = False  # --do_train needs --pre_seq_len
    official: bool = False  # --precision official is a recipe of it, or does it no harm
    shards: bool = False  # it trains so much that an engine is of use
    weights: str = ""  # why integer weights ({} is int4 or int8) do not train like this; "" where they do
    only_while_training: bool = False  # when they do not train, integer weights can be used with it
    files: tuple[str, ...] = ()  # those that tell a checkpoint of it that has no sidecar
    swaps: bool = False  # a frozen base takes it in and out, as --stage rm, dpo and ppo do
    needs_base: bool = False  # its sidecar or its files say that a folder is no base model; a prefix's keys say it


# In the order of the choices of --finetuning_type; the first is the default.
RULES = {
    "p_tuning": Rules(flags=("pre_seq_len", "prefix_projection"), needs_prefix=True, official=True, swaps=True),
    "full": Rules(
        shards=True, weights="trains the weights themselves, and {} weights cannot be trained", only_while_training=True
    ),
    "freeze": Rules(
        flags=("num_layer_trainable", "name_module_trainable"),
        weights="trains some of the weights themselves, and they are {} here",
        needs_base=True,
    ),
    "lora": Rules(
        flags=("lora_rank", "lora_alpha", "lora_dropout", "lora_target"),
        files=ADAPTER_FILES,
        swaps=True,
        needs_base=True,
    ),
    "none": Rules(trains=False, official=True),
}
DEFAULT_METHOD = next(iter(RULES))
METHOD_FLAGS = {flag: name for name, rules in RULES.items() for flag in rules.flags}  # {flag: the way that reads it}
SWAPPED = [name for name, rules in RULES.items() if rules.swaps]
TRAINED = [name for name, rules in RULES.items() if rules.trains]  # those that write checkpoints
# What holds with --stage, a flag of ChatGLM-Efficient-Tuning, where neither another flag nor a checkpoint decides.
EFFICIENT_TUNING = {"finetuning_type": "lora", "max_source_length": 512, "max_target_length": 512}


def has_signature(kind: str, stage: str | None) -> bool:
    """True for a way and stage whose base is left to answer what is unlike the training prompts."""
    return RULES[kind].swaps and stage != "rm"


def default_method(stage: str | None) -> str:
    """The way of tuning where neither a flag nor a checkpoint names one."""
    return EFFICIENT_TUNING["finetuning_type"] if stage else DEFAULT_METHOD
