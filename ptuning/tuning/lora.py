"""LoRA: PEFT's adapter beside linear layers, float or integer; read, added, filled, merged, saved."""

import copy
import dataclasses
import math
import warnings
from pathlib import Path

import safetensors.torch
import torch

from chatglm2.quantization import QuantizedLinear
from checkpoints.prefix import warn_of_other_base
from checkpoints.ways import ADAPTER_FILES
from checkpoints.weight_files import check_trained, read_tensors
from common.files import read_json
from common.messages import dtype_name, first_line
from tuning.method import Method, named
from tuning.rules import LORA_TARGETS

ADAPTER = "default"  # what PEFT calls the adapter that trains or answers
ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_KEY = "base_model.model."  # what PEFT puts before the names of a model's tensors
# What PEFT is given of an adapter_config.json: numbers, and names of the model's own layers.
ADAPTER_FIELDS = (
    "task_type r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern use_dora "
    "lora_bias alora_invocation_tokens trainable_token_indices layer_replication target_parameters"
).split()
# What it is not given because it tells where the adapter comes from, or (megatron_core) names code to import.
ADAPTER_NOTES = (
    "peft_type peft_version auto_mapping base_model_name_or_path revision megatron_core inference_mode"
).split()


def in_order(targets):
    """Names of linear layers as `--lora_target` lists them: known ones in the order of the model, then the others."""
    known = [name for name in LORA_TARGETS if name in targets]
    return ",".join([*known, *sorted(set(targets) - set(known))])


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


def adapter_layers(model):
    """PEFT's LoRA layers in a model, none where it has no adapter."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def add_adapter(model, config, tensors=None, source="", name=ADAPTER):
    """PEFT's tuner, which has put LoRA layers (float32) into `model`; filled with `tensors` if given."""
    from peft import LoraModel
    from peft.tuners.lora import Linear

    config._register_custom_module({QuantizedLinear: Linear})  # it asks for in_features, out_features and a forward
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of the adapter beside it
        tuner = LoraModel(model, config, name)
    for parameter in adapter_parameters(model, name).values():
        parameter.data = parameter.data.float()
    if tensors is not None:
        fill_adapter(model, tensors, source, name)
    return tuner


def adapter_parameters(model, adapter=ADAPTER):
    """{name as PEFT stores it: parameter} of an adapter in the LoRA layers of a model."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and f".{adapter}." in name
    }


def fill_adapter(model, tensors, source, adapter=ADAPTER):
    """Write an adapter's tensors, from the folder `source`, into the LoRA layers of a model, all or ValueError."""
    parameters = adapter_parameters(model, adapter)
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
    config = copy.copy(model.peft_config[ADAPTER])
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


def new_adapter(settings):
    """PEFT's LoraConfig of an adapter that the flags of LoRA describe."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=settings["lora_target"].split(","),
        task_type="CAUSAL_LM",
    )


class Lora(Method):
    """Two narrow matrices beside some linear layers train, in float32. A checkpoint is PEFT's folder of an adapter."""

    name = "lora"
    defaults = {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.1, "lora_target": "query_key_value"}
    stacks = True

    def read_own(self, checkpoint):
        adapter = read_adapter_settings(checkpoint)
        return {
            "base_model": adapter.get("base_model_name_or_path"),
            "lora_rank": adapter.get("r"),
            "lora_alpha": adapter.get("lora_alpha"),
            "lora_dropout": adapter.get("lora_dropout"),
            "lora_target": in_order(adapter.get("target_modules") or []),
        }

    def normalized(self, flags):
        targets = flags.get("lora_target")
        return {**flags, "lora_target": in_order(targets.split(","))} if targets else flags

    def bound_flags(self, resume):
        names = super().bound_flags(resume)
        return names if resume else [name for name in names if name not in self.defaults]

    def check(self, settings, config, checkpoints, bits, *, do_train, resume):
        super().check(settings, config, checkpoints, bits, do_train=do_train, resume=resume)
        if bits and (len(checkpoints) > 1 or (checkpoints and do_train and not resume)):
            why = f"{len(checkpoints)} adapters" if len(checkpoints) > 1 else "--resume_lora_training false"
            raise ValueError(
                f"{why} cannot be used on an int{bits} base model: a LoRA adapter is merged into float weights only. "
                "Leave --quantization_bit out, give one adapter and train it on, or merge them first and quantize the "
                "result: python ptuning/export_model.py."
            )

    def prepare(self, model, checkpoints, settings, *, do_train=False, resume=True):
        model.requires_grad_(False)
        load_adapters(model, checkpoints, do_train=do_train, resume=resume)
        if not do_train or (checkpoints and resume):
            return f"LoRA adapter{named(checkpoints)}."
        add_adapter(model, new_adapter(settings))
        on = named(checkpoints).replace(" from", ", on", 1)
        return f"LoRA adapter, new{on}."

    def merge(self, model, checkpoints, settings, probe):
        *earlier, last = checkpoints
        load_adapters(model, earlier, do_train=False)
        adapter, tensors = read_adapter(last)
        tuner = add_adapter(model.eval(), adapter, tensors, last)
        warn_of_other_base(model, last)
        beside = probe(model.eval())
        tuner.merge_and_unload()
        merged = probe(model)
        difference, largest = (beside - merged).abs().max().item(), beside.abs().max().item()
        if not difference <= 0.1 * largest:
            raise ValueError(f"Merged, {last} gives other logits than beside the weights (difference {difference:g}).")
        return (
            f"Merged {', '.join(map(str, checkpoints))}: logits differ by at most {difference:.2g} of {largest:.2g} "
            f"from those with the adapter beside the weights, by the rounding of {dtype_name(model.dtype)}."
        )

    def remember(self, settings, checkpoints, bits, *, resume):
        merged = checkpoints[:-1] if resume else checkpoints
        return {"quantization_bit": bits, "merged_checkpoints": [str(Path(folder).resolve()) for folder in merged]}

    def write(self, model, folder, sidecar, tensors):
        save_adapter(model, folder, sidecar["base_model"])

    def load(self, model, folder):
        fill_adapter(model, read_adapter(folder)[1], folder)
