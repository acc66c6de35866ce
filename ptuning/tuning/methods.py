"""The other ways to tune ChatGLM2: all weights, some layers, a LoRA adapter, or nothing.

Answers to the official `ds_train_finetune.sh` and to ChatGLM-Efficient-Tuning's `--finetuning_type`. P-Tuning v2 needs
nothing of this file: its prefix is a part of the model (prefix_encoder.py) and of checkpoint.py. LoRA is PEFT's.

    method     trains, in float32                         a checkpoint holds, beside the sidecar ptuning.json
    full       every weight                               a complete base model in the official layout
    freeze     mlp or query_key_value of some layers      these tensors, official names, in pytorch_model.bin
    lora       two narrow matrices beside some linears    PEFT's adapter_config.json, adapter_model.safetensors
    none       nothing                                    -

Weights that train are float32, also where the others are bf16 or fp16: the products are then made in half precision by
autocast (full, freeze), or the adapter computes in float32 (lora).
"""

from pathlib import Path

import torch

from checkpoint import load_prefix, read_prefix_settings, save_model, save_prefix, warn_of_other_base
from checkpoints.run_folder import find_checkpoints, trained_files, verify_checkpoint
from checkpoints.sidecar import SIDECAR_FILE, check_sidecar, finetuning_type
from checkpoints.weight_files import PREFIX_FILE, read_tensors, weight_files
from common.files import read_json, write_json
from tuning.freeze import freeze_pattern, load_tensors
from tuning.lora import (
    add_adapter,
    fill_adapter,
    in_order,
    load_adapters,
    read_adapter,
    read_adapter_settings,
    save_adapter,
)

DEFAULTS = {
    "num_layer_trainable": 3,
    "name_module_trainable": "mlp",
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target": "query_key_value",
}


# ---- what a checkpoint says of itself


def find_trained(text):
    """(the checkpoint folders that `--ptuning_checkpoint` means, what is wrong with others that were passed over).

    As find_checkpoints says, or several LoRA adapters with commas. Raises FileNotFoundError and ValueError.
    """
    if not text:
        return [], []
    if "," not in str(text) or Path(text).exists():
        found, damaged = find_checkpoints(text)
        kinds = {finetuning_type(folder) or "p_tuning" for folder in found}
        if len(found) > 1 and kinds != {"p_tuning"}:
            raise ValueError(
                f"--ptuning_checkpoint {text}: only prefixes are evaluated one by one. Give one checkpoint."
            )
        return found, damaged
    parts = [find_checkpoints(part.strip()) for part in text.split(",") if part.strip()]
    found = [folders[-1] for folders, _ in parts]
    kinds = [finetuning_type(folder) or "p_tuning" for folder in found]
    if set(kinds) != {"lora"}:
        listed = ", ".join(f"{folder}: {kind}" for folder, kind in zip(found, kinds, strict=True))
        raise ValueError(f"Several checkpoints can be given for LoRA adapters only; found {listed}. Give one of them.")
    return found, [problem for _, damaged in parts for problem in damaged]


def read_settings(checkpoints):
    """What checkpoints say of themselves: finetuning_type, quantization_bit, the sidecar's keys, and `checkpoints`.

    The last one counts. `checkpoints` are the folders to load one after the other: those given, or for one LoRA
    adapter also those that had been merged before it was trained. {} where none is given.

    Raises FileNotFoundError and ValueError, naming the folder: nothing trained in it, or damaged.
    """
    if not checkpoints:
        return {}
    *_, checkpoint = checkpoints
    kind = finetuning_type(checkpoint) or "p_tuning"
    if kind == "p_tuning":
        return {**read_prefix_settings(checkpoint), "finetuning_type": "p_tuning", "checkpoints": checkpoints}
    for folder in checkpoints:
        verify_checkpoint(folder, trained_files(folder))
    settings = {}
    if kind == "lora":
        adapter = read_adapter_settings(checkpoint)
        settings = {
            "base_model": adapter.get("base_model_name_or_path"),
            "lora_rank": adapter.get("r"),
            "lora_alpha": adapter.get("lora_alpha"),
            "lora_dropout": adapter.get("lora_dropout"),
            "lora_target": in_order(adapter.get("target_modules") or []),
        }
    sidecar = Path(checkpoint) / SIDECAR_FILE
    if sidecar.is_file():
        settings.update(read_json(sidecar))
    check_sidecar(settings, sidecar)
    merged = (settings.pop("merged_checkpoints", None) or []) if len(checkpoints) == 1 else []
    return {**settings, "finetuning_type": kind, "checkpoints": [*merged, *checkpoints]}


# ---- any method


def prepare_model(model, method, checkpoints=(), *, do_train=False, **settings):
    """Fill a loaded base model with what checkpoints hold, and set what trains. Returns one line that says so.

    `settings` are the flags of DEFAULTS, None for those not given, and `resume_lora_training`.
    """
    resume = settings.pop("resume_lora_training", True)
    settings = {name: default if settings.get(name) is None else settings[name] for name, default in DEFAULTS.items()}
    source = f" from {', '.join(map(str, checkpoints))}" if checkpoints else ""
    if method == "p_tuning":
        if checkpoints:
            load_prefix(model, checkpoints[-1])
        length, kind = model.config.pre_seq_len, "with" if model.config.prefix_projection else "without"
        return f"Prefix of {length} tokens, {kind} projection,{source}." if checkpoints else None
    model.requires_grad_(False)
    if method == "freeze":
        count, module = settings["num_layer_trainable"], settings["name_module_trainable"]
        pattern = freeze_pattern(model.config.num_layers, count, module)
        for name, parameter in model.named_parameters():
            if do_train and pattern.fullmatch(name):
                parameter.data = parameter.data.float().contiguous()  # load_model() laid it out to be read
                parameter.requires_grad_(True)
        if checkpoints:
            load_tensors(model, checkpoints[-1])
            warn_of_other_base(model, checkpoints[-1])
        return f"{module} of the {'last' if count > 0 else 'first'} {abs(count)} layers{source}."
    if method == "lora":
        load_adapters(model, checkpoints, do_train=do_train, resume=resume)
        if do_train and not (checkpoints and resume):
            from peft import LoraConfig

            add_adapter(
                model,
                LoraConfig(
                    r=settings["lora_rank"],
                    lora_alpha=settings["lora_alpha"],
                    lora_dropout=settings["lora_dropout"],
                    target_modules=settings["lora_target"].split(","),
                    task_type="CAUSAL_LM",
                ),
            )
            source = f", new{', on' + source.removeprefix(' from') if source else ''}"
        return f"LoRA adapter{source}."
    if method == "full":
        for parameter in model.parameters() if do_train else ():
            parameter.data = parameter.data.contiguous()  # as engines want what they divide
            parameter.requires_grad_(True)
        return "All weights." if do_train else None
    return "The untouched base model." if method == "none" else None


def save_trained(model, folder, sidecar, tensors=None):
    """Write what trained, and the sidecar; `tensors` are the model's where it has not all of them itself."""
    folder, method = Path(folder), sidecar["finetuning_type"]
    if method == "p_tuning":
        return save_prefix(model, folder, sidecar)
    folder.mkdir(parents=True, exist_ok=True)
    if method == "full":
        save_model(model, folder, tensors=tensors)
    elif method == "lora":
        save_adapter(model, folder, sidecar["base_model"])
    else:
        trained = {
            name: parameter.detach().cpu() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        torch.save(trained, folder / PREFIX_FILE)
    write_json(folder / SIDECAR_FILE, sidecar)


def load_trained(model, folder, method):
    """Read what `save_trained` wrote back into a model that trains: the same names and shapes, or ValueError."""
    if method == "p_tuning":
        load_prefix(model, folder)
    elif method == "lora":
        fill_adapter(model, read_adapter(folder)[1], folder)
    elif method == "freeze":
        load_tensors(model, folder)
    else:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for file in weight_files(folder):
                for name, tensor in read_tensors(file):
                    if name in parameters:
                        parameters[name].copy_(tensor)
