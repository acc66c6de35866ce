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

import copy
import dataclasses
import math
import re
import warnings
from pathlib import Path

import safetensors.torch
import torch

from arguments import LORA_TARGETS
from checkpoint import (
    ADAPTER_FILES,
    PREFIX_FILE,
    SIDECAR_FILE,
    check_sidecar,
    check_trained,
    find_checkpoints,
    finetuning_type,
    first_line,
    load_prefix,
    read_json,
    read_prefix_settings,
    read_tensors,
    save_model,
    save_prefix,
    trained_files,
    verify_checkpoint,
    warn_of_other_base,
    weight_files,
    write_json,
)
from quantization import QuantizedLinear

FREEZE_MODULES = {"mlp": "mlp", "qkv": "self_attention.query_key_value"}
DEFAULTS = {
    "num_layer_trainable": 3,
    "name_module_trainable": "mlp",
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target": "query_key_value",
}
ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_KEY = "base_model.model."  # what PEFT puts before the names of a model's tensors
# What PEFT is given of an adapter_config.json: numbers, and names of the model's own layers.
ADAPTER_FIELDS = (
    "task_type",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
)
# What it is not given because it tells where the adapter comes from, or (megatron_core) names code to import.
ADAPTER_NOTES = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "megatron_core",
    "inference_mode",
)


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


def in_order(targets):
    """Names of linear layers as `--lora_target` lists them: known ones in the order of the model, then the others."""
    known = [name for name in LORA_TARGETS if name in targets]
    return ",".join([*known, *sorted(set(targets) - set(known))])


def check_layers(num_layer_trainable, num_layers):
    """ValueError where a model has not that many layers."""
    if abs(num_layer_trainable or 0) > num_layers:
        raise ValueError(
            f"--num_layer_trainable {num_layer_trainable}: this base model has {num_layers} layers. "
            "--finetuning_type full trains all weights."
        )


def check_adapters(checkpoints, bits, do_train=False, resume_lora_training=True):
    """ValueError where LoRA adapters would have to be merged into integer weights."""
    if bits and (len(checkpoints) > 1 or (checkpoints and do_train and not resume_lora_training)):
        why = f"{len(checkpoints)} adapters" if len(checkpoints) > 1 else "--resume_lora_training false"
        raise ValueError(
            f"{why} cannot be used on an int{bits} base model: a LoRA adapter is merged into float weights only. Leave "
            "--quantization_bit out, give one adapter and train it on, or merge them first and quantize the result: "
            "python ptuning/export_model.py."
        )


# ---- freeze


def freeze_pattern(num_layers, num_layer_trainable, name_module_trainable):
    """A regular expression for the names of the tensors that train: exactly the last n layers, or the first -n."""
    layers = range(num_layers)[-num_layer_trainable:] if num_layer_trainable > 0 else range(-num_layer_trainable)
    numbers = "|".join(map(str, layers))
    return re.compile(
        rf"transformer\.encoder\.layers\.({numbers})\.{re.escape(FREEZE_MODULES[name_module_trainable])}\..+"
    )


def load_tensors(model, checkpoint):
    """Write a freeze checkpoint's tensors over the model's, all or ValueError."""
    file = Path(checkpoint) / PREFIX_FILE
    if not file.is_file():
        raise FileNotFoundError(f"--ptuning_checkpoint {checkpoint}: there is no {PREFIX_FILE} in it.")
    parameters = dict(model.named_parameters())
    tensors = dict(read_tensors(file))
    for name, tensor in tensors.items():
        check_trained(tensor, name, file)
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "nothing of that name"
            raise ValueError(
                f"{file} does not fit this base model: {name} is {tuple(tensor.shape)}, the model has {found}."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


# ---- LoRA


def read_adapter_settings(checkpoint):
    """The object in an adapter's adapter_config.json. ValueError for another kind than LoRA, and for odd settings."""
    file = Path(checkpoint) / ADAPTER_SETTINGS
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: an adapter of type {settings.get('peft_type')}; only LoRA's can be used here.")
    targets = settings.get("target_modules")
    numbers = {name: settings.get(name) for name in ("r", "lora_alpha", "lora_dropout")}
    numbers = {name: value if isinstance(value, int | float) else math.nan for name, value in numbers.items()}
    fits = {
        "r": numbers["r"] >= 1 and isinstance(settings["r"], int),
        "lora_alpha": 0 < numbers["lora_alpha"] < math.inf,
        "lora_dropout": 0 <= numbers["lora_dropout"] < 1,
        "target_modules": isinstance(targets, str)
        or (isinstance(targets, list) and all(isinstance(name, str) for name in targets)),
    }
    for name, right in fits.items():
        if not right:
            raise ValueError(f"{file}: {name} is {settings.get(name)!r}, which no LoRA adapter has. Copy it again.")
    return settings


def read_adapter(checkpoint):
    """(PEFT's LoraConfig, {name: tensor}) of an adapter folder, names as in the base model. ValueError for others."""
    checkpoint = Path(checkpoint)
    files = [checkpoint / name for name in ADAPTER_FILES if (checkpoint / name).is_file()]
    if not files:
        raise FileNotFoundError(f"--ptuning_checkpoint {checkpoint}: there is no {ADAPTER_FILES[0]} in it.")
    config = adapter_config(read_adapter_settings(checkpoint), checkpoint / ADAPTER_SETTINGS)
    tensors = {name.removeprefix(ADAPTER_KEY): tensor for name, tensor in read_tensors(files[0])}
    for name, tensor in tensors.items():
        check_trained(tensor, name, files[0])
    largest = max((tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name), default=0)
    pattern = config.rank_pattern if isinstance(config.rank_pattern, dict) else {}
    claimed = max([config.r, *(rank for rank in pattern.values() if isinstance(rank, int))])
    if claimed > largest:  # PEFT makes matrices of that size first
        raise ValueError(
            f"{checkpoint / ADAPTER_SETTINGS}: claims a rank of {claimed:,}, and the matrices in {files[0].name} have at "
            f"most {largest:,}. Copy both again."
        )
    return config, tensors


def adapter_config(settings, file):
    """PEFT's LoraConfig of the settings in `file`. ValueError for one that would change what is computed, and is none
    of ADAPTER_FIELDS.
    """
    from peft import LoraConfig

    for field in dataclasses.fields(LoraConfig):
        value = settings.get(field.name)
        if field.name not in (*ADAPTER_FIELDS, *ADAPTER_NOTES) and value and value != field.default:
            raise ValueError(
                f"{file}: {field.name} is {value!r}. PEFT cannot use the adapter here with that setting; give one "
                "that was trained without it."
            )
    try:
        return LoraConfig(**{name: settings[name] for name in ADAPTER_FIELDS if name in settings})
    except Exception as error:  # settings of any type make PEFT raise anything
        raise ValueError(f"{file} cannot be used ({first_line(error)}).") from error


def add_adapter(model, config, tensors=None, source=""):
    """PEFT's tuner, which has put LoRA layers (float32) into `model`; filled with `tensors` if given."""
    from peft import LoraModel
    from peft.tuners.lora import Linear

    config._register_custom_module({QuantizedLinear: Linear})  # it asks for in_features, out_features and a forward
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        tuner = LoraModel(model, config, "default")
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    if tensors is not None:
        fill_adapter(model, tensors, source)
    return tuner


def adapter_parameters(model):
    """{name as PEFT stores it: parameter} of the LoRA layers in a model."""
    return {
        name.replace(".default.", "."): parameter for name, parameter in model.named_parameters() if "lora_" in name
    }


def fill_adapter(model, tensors, source):
    """Write an adapter's tensors, from the folder `source`, into the LoRA layers of a model, all or ValueError."""
    parameters = adapter_parameters(model)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = differing[0]
        raise ValueError(
            f"The LoRA adapter {source} does not fit this base model: {len(differing)} tensors differ, such as {name}: "
            f"{found.get(name, 'missing')} in the adapter, {expected.get(name, 'missing')} in the model. "
            "It was trained on another base model."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def save_adapter(model, folder, base_model):
    """Write PEFT's two files of the adapter in a model; PEFT alone can load them onto the same base model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.save_pretrained(folder)
    tensors = {
        ADAPTER_KEY + name: parameter.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(model).items()
    }
    safetensors.torch.save_file(tensors, folder / ADAPTER_FILES[0], metadata={"format": "pt"})


def load_adapters(model, checkpoints, *, do_train, resume=True):
    """Put LoRA adapters onto a frozen base model, in order: merged into its weights, the last one beside them where it
    trains on or where integer weights cannot take it.
    """
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    beside = quantized or (do_train and resume)
    for number, checkpoint in enumerate(checkpoints, start=1):
        config, tensors = read_adapter(checkpoint)
        config.inference_mode = not do_train
        try:
            tuner = add_adapter(model, config, tensors, checkpoint)
            if not (beside and number == len(checkpoints)):
                tuner.merge_and_unload()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT's many other settings, of any type, make it raise anything
            if str(checkpoint) in str(error):
                raise
            raise ValueError(
                f"PEFT cannot use the adapter in {checkpoint} ({first_line(error)}). Is its {ADAPTER_SETTINGS} as it "
                "was written, and was it trained on a ChatGLM2 model?"
            ) from error
        warn_of_other_base(model, checkpoint)


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
