"""PrefixTrainingArguments: transformers' arguments of training with ours on top, made from the given flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.utils import strtobool

from common.processes import join_processes
from common.text import load_json
from training.flags import TrainingArguments


def read_settings_of(flag, text):
    """The object that a flag spells out in JSON, or that is in the JSON file it names; {} of an empty flag."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        return load_json(text.encode(), f"--{flag}")
    try:
        settings = load_json(Path(text).read_bytes(), text)
    except FileNotFoundError:
        raise FileNotFoundError(f"--{flag} {text}: there is no such file.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--{flag} {text} must hold one object of settings, not a {type(settings).__name__}.")
    return settings


def check_gpu(num_gpus, process):
    """ValueError where there are more processes on this machine than GPUs; `process` counts from 0."""
    if process >= num_gpus:
        raise ValueError(
            f"There is no GPU for process {process + 1} of this machine: {num_gpus} can be used (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Give NUM_GPUS={num_gpus}, or --nproc-per-node."
        )


def use_one_device(training_args):
    """Keep the Trainer from splitting batches over GPUs in one process, which a prefix does not survive."""
    num_gpus = training_args.n_gpu
    if num_gpus < 2:
        return []
    training_args._n_gpu = 1
    return [
        f"Using 1 of {num_gpus} GPUs. To use all: NUM_GPUS={num_gpus} bash train.sh, or python ptuning/launch.py --nproc-per-node={num_gpus} ptuning/main.py …"
    ]


@dataclass
class PrefixTrainingArguments(TrainingArguments, Seq2SeqTrainingArguments):
    """Every flag of training: those of training/flags.py count where transformers has one of the same name."""

    # --per_device_eval_batch_size where it was given, which holds for the dev loss in any case; None: what fits
    prediction_batch_size: int | None = field(default=None, init=False)
    merged_batches: int = field(default=1, init=False)  # accumulated ones that are computed together, as one

    first_parts: int = field(default=1, init=False)  # that a batch is computed in, one after the other, at first

    @property
    def given_batches(self) -> tuple[int, int]:
        """(rows of a batch, batches accumulated) as the flags say, whatever is merged."""
        merged = self.merged_batches
        return self.per_device_train_batch_size // merged, self.gradient_accumulation_steps * merged

    def __post_init__(self):
        if self.metric_for_best_model is None and self.eval_strategy != "no":
            ppo = self.stage == "ppo"
            self.metric_for_best_model, self.greater_is_better = "reward" if ppo else "loss", ppo
        self.enable_jit_checkpoint = False  # StopOnSignal saves on SIGTERM in any case, and one handler must be enough
        super().__post_init__()


def read_launch(given: dict) -> list[str]:
    """Lines on what `accelerate launch` has made of its settings. ValueError where it asks for an engine by itself."""

    def asks(name):
        return strtobool(os.environ.get(name, "false"))

    for engine, flag in {"deepspeed": "--deepspeed ptuning/deepspeed.json", "fsdp": "--fsdp full_shard"}.items():
        if asks(f"ACCELERATE_USE_{engine.upper()}") and not given.get(engine):
            raise ValueError(
                f"accelerate is configured for {engine}, which a flag decides here. Give {flag} with --finetuning_type full, "
                "and set distributed_type: MULTI_GPU in accelerate's file."
            )
    if asks("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        return [
            "accelerate launch --cpu starts one process; --multi_gpu --num_processes 2 starts two, on a CPU as well."
        ]
    return []


def make_training_arguments(given: dict, spread: bool = False) -> tuple[PrefixTrainingArguments, list[str]]:
    """(PrefixTrainingArguments of the given flags {name: value}, lines to show the user); `spread`: with --device_map.

    ValueError for flags that cannot be used on this machine, or that transformers refuses.
    """
    given, notes = dict(given), read_launch(given)
    settings = {"report_to": "all", "ddp_find_unused_parameters": False}  # every parameter of the prefix is always used
    if not torch.cuda.is_available():
        settings["use_cpu"] = True  # without it several processes on a CPU would each train alone
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if wanted not in ("", "-1"):
            notes.append(f"CUDA_VISIBLE_DEVICES={wanted}, but no GPU can be used here: computing on the CPU, slowly.")
    elif not given.get("use_cpu"):
        check_gpu(torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0)))
    for name in ("deepspeed", "accelerator_config"):  # transformers reads files in UTF-8 only
        if given.get(name) and not given[name].lstrip().startswith("{"):
            given[name] = read_settings_of(name, given[name])
    checkpointing = given.pop("gradient_checkpointing", None)
    checkpointing = given.pop("activation_checkpointing", checkpointing)  # its name in transformers 5
    if given.get("fsdp"):  # saved in shards, so that a run can go on with another number of processes
        wanted = read_settings_of("fsdp_config", given.pop("fsdp_config", ""))
        settings["fsdp_config"] = {"state_dict_type": "SHARDED_STATE_DICT", **wanted}
    elif given.get("deepspeed") and torch.cuda.is_available() and not given.keys() & {"fp16", "bf16"}:
        settings["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"] = True
    cpu = settings.get("use_cpu") or given.get("use_cpu") or strtobool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    try:
        timeout = given.get("ddp_timeout", 1800)  # transformers' default
        notes += join_processes(cpu=bool(cpu), backend=given.get("ddp_backend"), timeout=timeout)
        training_args = PrefixTrainingArguments(**{**settings, **given})
    except ImportError as error:  # --deepspeed, an --optim of another package, …
        raise ValueError(f"A flag needs a package that is not installed: {error}. Install it with pip.") from error
    except ValueError as error:  # transformers names the value, seldom the flag
        suspects = [f"--{name} {value}" for name, value in given.items() if str(value) and str(value) in str(error)]
        if not suspects or str(error).startswith("--"):
            raise
        raise ValueError(f"A flag of training has a wrong value: {' or '.join(suspects)} ({error}).") from error
    if training_args.fsdp and training_args.parallel_mode.value != "distributed":
        raise ValueError(
            "--fsdp needs processes to shard over: python ptuning/launch.py --nproc-per-node=8 ptuning/main.py …"
        )
    if training_args.fsdp and training_args.distributed_state.distributed_type == "MULTI_CPU":
        raise ValueError("--fsdp shards on GPUs only; on CPUs accelerate would train whole copies. Leave the flag out.")
    training_args.prediction_batch_size = given.get("per_device_eval_batch_size")
    # None: main.py decides, once it knows the model and the free memory.
    training_args.gradient_checkpointing = training_args.activation_checkpointing = checkpointing
    if training_args.eval_strategy == "no":
        training_args.eval_on_start = False
    if "do_eval" not in given:
        training_args.do_eval = False  # transformers turns it on for any eval_strategy; here it means --do_eval
    left_over = use_one_device(training_args)
    notes += [] if spread else left_over
    training_args.remove_unused_columns = False  # the collators pick what they need
    return training_args, notes
