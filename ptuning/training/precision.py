"""In which number formats a run computes, and what the user is told of it."""

import torch

from chatglm2.matmul import onednn_runs
from chatglm2.matmul_choice import decision_table
from checkpoint import choose_dtype
from common.failure import wants_traceback
from common.messages import dtype_name
from tuning.methods import METHODS


def set_precision(training_args, method: str) -> tuple[torch.dtype, str]:
    """Dtype of the weights and why. Of the Trainer's own mixed precision loss scaling remains, and autocast where
    weights of the model itself train (in float32)."""
    fp16 = training_args.fp16 or training_args.fp16_full_eval
    bf16 = training_args.bf16 or training_args.bf16_full_eval
    official = training_args.precision == "official"
    dtype, reason = choose_dtype(training_args.device, fp16, bf16, official)
    if torch.device(training_args.device).type == "mps" and training_args.do_train and not official:
        dtype = torch.float32  # loss scaling is CUDA's
    if training_args.deepspeed:  # it keeps the float32 weights itself
        return dtype, f"{reason}; DeepSpeed trains float32 copies"
    training_args.fp16 = dtype == torch.float16 and training_args.do_train and not official
    training_args.bf16 = dtype == torch.bfloat16 and training_args.do_train and METHODS[method].changes_weights
    training_args.mixed_precision = "fp16" if training_args.fp16 else "bf16" if training_args.bf16 else "no"
    training_args.fp16_full_eval = training_args.bf16_full_eval = False
    if METHODS[method].all_in_float32 and training_args.do_train:
        return torch.float32, f"all of them train; products in {dtype_name(dtype)}"
    return dtype, reason


def describe_precision(dtype: torch.dtype, reason: str, training_args) -> str:
    """One line: the formats of weights and of all else, the device, and why. With --debug what multiplies, too."""
    others = "prefix" if training_args.precision == "official" else "prefix, optimizer, loss and gradient norm"
    line = f"Weights: {dtype_name(dtype)} on {training_args.device} ({reason}); {others}: float32."
    shown = wants_traceback() and onednn_runs(training_args.device, dtype)
    return f"{line}\n{decision_table()}" if shown else line


def choose_products(training_args, backend: str) -> str:
    """--quantization_backend, where `auto` is left to load_model except in the official recipe."""
    if training_args.precision == "official" and backend == "auto":
        return "torch"  # the official kernels unpack to float16 and multiply in float16, as this one
    return backend
