"""Where the tensors of a model go and in which dtype: what the arguments of `from_pretrained` mean.

Answers to what transformers and accelerate do with these arguments. What has no effect on this model, or another name,
is an entry of a table.
"""

import gc

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import get_balanced_memory

from chatglm2.configuration_chatglm import DEFAULTS
from checkpoints.weight_files import PREFIX_KEY, stored_dtype

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # how accelerate fills the devices

# Accepted and of no effect: how to load, or which code may run; here one way of loading holds, and no such code runs.
IGNORED = (
    "_commit_hash _fast_init _from_auto _from_pipeline adapter_kwargs attn_implementation code_revision empty_init "
    "force_download ignore_mismatched_sizes local_files_only low_cpu_mem_usage mirror offload_state_dict proxies "
    "resume_download token trust_remote_code use_auth_token use_safetensors weights_only"
).split()
REPLACEMENTS = {
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_config"), "quantization_bit=4 or quantization_bit=8"
    ),
    **dict.fromkeys(("subfolder", "variant", "gguf_file"), "the folder that holds config.json and the weights"),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), "device_map"),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_buffers"), "a device_map that says where each part lies"),
}


def device_of(name, devices):
    """Where the tensor `name` goes: `devices` is a device, or {module: device}, of which the innermost counts.

    "" gives the first that is no CPU: the one that computes.
    """
    if not isinstance(devices, dict):
        return devices
    if not name:
        return next((device for device in devices.values() if torch.device(device).type != "cpu"), "cpu")
    fitting = [module for module in devices if not module or f"{name}.".startswith(f"{module}.")]
    if not fitting:
        raise ValueError(f"device_map does not say where {name} goes; it names {', '.join(devices)}.")
    return devices[max(fitting, key=len)]


def check_settings(settings):
    """TypeError for an argument that is none of the configuration, with what to give instead."""
    for name in settings:
        if name in REPLACEMENTS:
            raise TypeError(f"from_pretrained: {name} has no effect on this model. Give {REPLACEMENTS[name]}.")
        if name not in DEFAULTS:
            raise TypeError(f"from_pretrained: {name} is neither an argument nor a field of ChatGLM2's config.json.")


def wanted_dtype(dtype, config, folder):
    """The torch.dtype that an argument of that name means. ValueError for what is none."""
    if dtype == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else stored_dtype(folder)
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, expected such as torch.float16, or its name.")
    return found


def wanted_devices(wanted):
    """The device, {module: device} for several, or the name in MAPS that `device_map` or `device` means.

    ValueError for what is none.
    """
    if wanted is None or (isinstance(wanted, str) and wanted in MAPS):
        return wanted or torch.device("cpu")
    places = read_places(wanted)
    if len(set(places.values())) > 1:
        return places
    (device,) = set(places.values())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'The model shall go to {device}, but torch can use no GPU here. Give device="cpu".')
    return device


def read_places(wanted):
    """{module: torch.device} of a device map. ValueError for what is none."""
    places = wanted if isinstance(wanted, dict) else {"": wanted}
    if "disk" in places.values():
        raise ValueError(
            'device_map puts a part of the model on "disk"; nothing can be offloaded there. Give "cpu", or quantize: '
            "quantization_bit=4."
        )
    try:
        return {
            name: torch.device("cuda", place) if type(place) is int else torch.device(place)
            for name, place in places.items()
        }
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device_map is {wanted!r}, expected a device such as "cuda:0", a dictionary of modules to devices, or "auto".'
        ) from error


def infer_devices(model, wanted, dtype):
    """The device, or {module: device} for several, that holds a model, by its name in MAPS and the free memory.

    `model` is on the meta device, its float weights will have `dtype`. What the GPUs have no room for is on the CPU. The
    prefix is on the first device.
    """
    gc.collect()  # what an earlier model has left counts as free
    torch.cuda.empty_cache()
    options = {"no_split_module_classes": ["GLMBlock"], "dtype": dtype}
    low_zero = wanted == "balanced_low_0"
    memory = None if wanted == "sequential" else get_balanced_memory(model, low_zero=low_zero, **options)
    places = read_places(infer_auto_device_map(model, max_memory=memory, **options))
    if len(set(places.values())) == 1:
        return next(iter(places.values()))
    first = device_of("", places)
    return {name: first if f"{name}.".startswith(PREFIX_KEY) else place for name, place in places.items()}


def parts_on(model, devices):
    """{each part of a model that computes in one piece: its device} of {module: device}.

    ValueError for a part that lies on two devices, or on none.
    """
    layers = [f"transformer.encoder.layers.{layer}" for layer in range(model.config.num_layers)]
    others = ["transformer.embedding", "transformer.encoder.final_layernorm", "transformer.output_layer"]
    parts = {part: {} for part in (others[0], *layers, *others[1:], PREFIX_KEY.removesuffix("."))}
    for name in model.state_dict():
        part = next(part for part in parts if name.startswith(f"{part}."))
        parts[part][torch.device(device_of(name, devices))] = name
    for part, found in parts.items():
        if len(found) > 1:
            raise ValueError(f"device_map puts {part} on {' and '.join(map(str, found))}; give it one device.")
    return {part: next(iter(found)) for part, found in parts.items() if found}


def spread_model(model, devices):
    """Let each part of a model compute where it lies by parts_on(): accelerate brings there what it is given."""
    model.first_device = device_of("", devices)
    dispatch_model(
        model,
        devices,
        main_device=model.first_device,
        skip_keys=["past_key_values", "attentions"],  # which the layers fill
    )
    model.layer_devices = [device for part, device in devices.items() if ".layers." in part]
    for name, device in devices.items():
        part = model.get_submodule(name)
        _, *inside = part.modules()
        for module in inside:  # what comes into a part is on its device: to look again inside takes time
            remove_hook_from_module(module)
        if device.type == "cuda":
            compute_on(part, device)


def compute_on(module, device):
    """Let a GPU be the current one while a module computes there: Triton starts its kernels on the current one."""
    before = []

    def enter(*_):
        before.append(torch.cuda.current_device())
        torch.cuda.set_device(device)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(lambda *_: torch.cuda.set_device(before.pop()), always_call=True)


def places_of(model):
    """What load_model() may be given as `device` for a model to lie as this one."""
    return getattr(model, "hf_device_map", model.device)


def describe_places(model):
    """Text: the layers on each device of a model that is spread, else ""."""
    layers = {}
    for layer, device in enumerate(model.layer_devices):
        layers.setdefault(str(device), []).append(layer)
    if not layers:
        return ""
    parts = [f"{min(found)} to {max(found)} on {device}" for device, found in layers.items()]
    slow = " The CPU is slow; --quantization_bit 4 takes less memory." if "cpu" in layers else ""
    return f"Layers {', '.join(parts)}.{slow}"


def own_memory(model, stored):
    """Copy what still lies in the mapped files, so that the folder can be written anew while the model is in use."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_cpu and tensor.dtype in (stored, torch.int8):
            tensor.data = tensor.data.clone()
