"""Which flags go with which way of tuning, engine and integer weights. It loads no torch."""

from __future__ import annotations

import os

from checkpoints.ways import METHOD_FLAGS, RULES, default_method

LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # in the order of the model


def check_method(model_args, training_args):
    """Raise ValueError for flags that do not go with the way of tuning."""
    method = model_args.finetuning_type or default_method(model_args.stage)
    rules = RULES[method]
    for name, owner in METHOD_FLAGS.items():
        value = getattr(model_args, name)
        if value not in (None, False) and method != owner and rules.trains:
            raise ValueError(
                f"--{name} {value} belongs to --finetuning_type {owner}, but this run's is {method}. "
                f"Leave the flag out{' (finetune.sh does)' * (name == 'pre_seq_len')}, or give --finetuning_type {owner}."
            )
    if training_args.do_train and not rules.trains:
        raise ValueError(
            f"--finetuning_type {method} trains nothing: it is for --do_predict and --do_eval of the base."
        )
    if training_args.precision == "official" and not rules.official:
        raise ValueError(
            f"--precision official is how the official scripts train a prefix; --finetuning_type {method} trains in "
            "float32. Leave it out."
        )
    check_bits_train(method, model_args.quantization_bit, training_args.do_train)
    if model_args.num_layer_trainable == 0:
        raise ValueError("--num_layer_trainable 0 trains nothing. Give n for the last n layers, -n for the first n.")
    unknown = set((model_args.lora_target or LORA_TARGETS[0]).split(",")) - set(LORA_TARGETS)
    if unknown:
        raise ValueError(f"--lora_target {model_args.lora_target}: expected some of {','.join(LORA_TARGETS)}.")
    check_engines(method, training_args)


def check_bits_train(method, bits, do_train):
    """Raise ValueError for integer weights (`bits` 4 or 8) where a method trains, or has trained, such weights."""
    rules = RULES[method]
    if bits and rules.weights and (do_train or not rules.only_while_training):
        raise ValueError(
            f"--finetuning_type {method} {rules.weights.format(f'int{bits}')}. Leave "
            "--quantization_bit out and give a float base model; to tune integer weights give --finetuning_type lora."
        )


def check_device_map(model_args, training_args):
    """Raise ValueError where --device_map is given for more than answers and their loss, or to several processes."""
    if not model_args.device_map:
        return
    given = f"--device_map {model_args.device_map}"
    if training_args.do_train:
        raise ValueError(
            f"{given} spreads a model for answers; in training each GPU holds a whole one. Leave the flag out: for small "
            "GPUs give --quantization_bit 4, or --finetuning_type full, whose weights --deepspeed ptuning/deepspeed_zero3.json "
            "and --fsdp full_shard divide."
        )
    if training_args.stage != "sft":
        raise ValueError(
            f"{given} is for answers and dev losses of --stage sft. Leave it out, or give --quantization_bit 4."
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{given} spreads one model over all GPUs, and here are several processes. Give NUM_GPUS=1, or leave "
            "--nproc-per-node out."
        )


def engine_of(training_args):
    """What divides weights and optimizer over the processes: deepspeed, fsdp, or None."""
    return next((name for name in ("deepspeed", "fsdp") if getattr(training_args, name, None)), None)


def check_engines(method, training_args):
    """Raise ValueError where --deepspeed or --fsdp cannot be of use."""
    engine = engine_of(training_args)
    if not engine:
        return
    if engine == "deepspeed" and getattr(training_args, "fsdp", None):
        raise ValueError("--deepspeed and --fsdp both shard the model over the processes; give one of them.")
    if not RULES[method].shards:
        raise ValueError(
            f"--{engine} divides what --finetuning_type full trains, and this run's is {method}, which trains so little that "
            f"launch.py alone (one copy of the model for each GPU) serves it. Leave --{engine} out, or to tune all weights, "
            f"as the official ds_train_finetune.sh, give --finetuning_type full (ENGINE={engine} FINETUNING_TYPE=full bash "
            "finetune.sh)."
        )
    if not training_args.do_train or training_args.do_predict or training_args.do_eval:
        raise ValueError(
            f"--{engine} is for training only, and cannot generate. Evaluate the checkpoint in a run of its own "
            f"without it: bash evaluate_finetune.sh."
        )
