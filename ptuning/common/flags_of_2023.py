"""Flags of 2023 that have another name today, or no effect any more: of transformers 4.30, the official scripts and
ChatGLM-Efficient-Tuning.

Every one of them is accepted: renamed ones are mapped, and what has no effect (most never had any) is said in a line.
"""

from __future__ import annotations

import difflib

from common.environment import set_by_flags
from common.flags import is_switch, is_true, split_flags
from common.quoting import NEEDS_EQUALS

# Flag of 2023 -> the flag that does the same today.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a ratio
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "activation_checkpointing": "gradient_checkpointing",  # the other way round: newer than transformers 5.17
    # ChatGLM-Efficient-Tuning's names
    "checkpoint_dir": "ptuning_checkpoint",
    "eval_num_beams": "num_beams",
}

# Flags of 2023 that change nothing, and why.
UNREAD = "the official scripts never read it"
RETIRED = {
    **dict.fromkeys(
        (
            "config_name tokenizer_name use_fast_tokenizer resize_position_embeddings lang dataset_name "
            "dataset_config_name pad_to_max_length forced_bos_token"
        ).split(),
        UNREAD,
    ),
    **dict.fromkeys(
        (
            "half_precision_backend fp16_backend fp16_opt_level sharded_ddp fsdp_min_num_params past_index "
            "fsdp_transformer_layer_cls_to_wrap use_ipex jit_mode_eval torchdynamo xpu_backend tpu_num_cores "
            "tpu_metrics_debug mp_parameters ray_scope use_mps_device include_inputs_for_metrics "
            "push_to_hub_model_id push_to_hub_organization push_to_hub_token use_legacy_prediction_loop"
        ).split(),
        "transformers dropped it",
    ),
    "use_auth_token": "log in with `hf auth login`, or set HF_TOKEN",
    "use_v2": "the base model's config.json tells which ChatGLM it is",
    "quantization_type": "integer weights are ChatGLM2's own int4, not bitsandbytes' fp4 or nf4",
    "double_quantization": "integer weights are ChatGLM2's own int4, whose scales stay as they are",
    "compute_dtype": "--fp16, --bf16 or the GPU decide",
    "save_safetensors": "a prefix is always pytorch_model.bin, an adapter always safetensors",
    "logging_dir": "",  # handled in translate_flags
    "group_by_length": "",
    "adafactor": "",
}


def translate_flags(argv: list[str], known) -> tuple[list[str], list[str]]:
    """Flags as this version knows them, and a line of text for each that changed its meaning.

    `known` are the names of today's fields. Of a flag given twice the last counts. Raises ValueError for an
    unknown flag, with the nearest known one.
    """
    translated, notes = [], []
    flags = split_flags(argv)
    last = dict(flags)  # a script's own flag, then the user's "$@"
    for name in sorted({name for name, _ in flags if sum(other == name for other, _ in flags) > 1}):
        notes.append(f"--{name} is given more than once; the last one counts: {' '.join(last[name])}")
    for name, values in last.items():
        if name == "group_by_length" and name not in known:
            if is_true(values):
                translated += ["--train_sampling_strategy", "group_by_length"]
        elif name == "adafactor" and name not in known:
            if is_true(values):
                translated += ["--optim", "adafactor"]
        elif name == "logging_dir" and name not in known:
            set_by_flags(tensorboard_folder=" ".join(values))
            notes.append(f"--logging_dir: TensorBoard writes to {' '.join(values)}.")
        elif name == "debug" and is_switch(values):  # transformers has a --debug of its own, with a value
            set_by_flags(traceback=is_true(values))
        elif name == "gradient_checkpointing" and values == ["auto"]:
            pass
        elif name in RENAMED and name not in known:
            translated += [f"--{RENAMED[name]}", *values]
        elif name in RETIRED and name not in known:
            notes.append(f"--{name} is accepted and has no effect: {RETIRED[name]}.")
        elif (
            name in ("prefix_projection", "train_on_history") and not values
        ):  # a switch in 2023; here it may also be left to the checkpoint
            translated += [f"--{name}", "true"]
        elif name in known and len(values) == 1 and NEEDS_EQUALS.match(values[0]):  # or it is taken for a flag
            translated.append(f"--{name}={values[0]}")
        elif name in known or name == "help":
            translated += [f"--{name}", *values]
        elif name.startswith("no_") and name[3:] in known:
            translated += [f"--{name[3:]}", "false"]
        else:
            nearest = difflib.get_close_matches(name, [*known, *RENAMED, *RETIRED], n=1)
            hint = f"Did you mean --{nearest[0]}?" if nearest else "python ptuning/main.py --help lists the flags."
            raise ValueError(f"Unknown flag --{name}. {hint}")
    return translated, notes
