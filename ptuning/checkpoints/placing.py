"""Where the tensors of a model go and in which dtype: what the arguments of `from_pretrained` mean.

Answers to what transformers and accelerate do with these arguments. What has no effect on this model, or another name,
is an entry of a table.
"""

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory

from chatglm2.configuration_chatglm import DEFAULTS
from checkpoints.weight_files import stored_dtype

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


def wanted_devices(wanted, config, dtype, model_class):
    """The device, or {module: device} for several, that `device_map` or `device` means for a model of this class.

    ValueError for what is none.
    """
    if wanted is None:
        return torch.device("cpu")
    if wanted in ("auto", "balanced", "balanced_low_0", "sequential"):
        if torch.cuda.device_count() < 2:
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = model_class(config)
        options = {"no_split_module_classes": ["GLMBlock"], "dtype": dtype}
        low_zero = wanted == "balanced_low_0"
        memory = None if wanted == "sequential" else get_balanced_memory(model, low_zero=low_zero, **options)
        wanted = infer_auto_device_map(model, max_memory=memory, **options)
    places = wanted if isinstance(wanted, dict) else {"": wanted}
    if "disk" in places.values():
        raise ValueError(
            'device_map puts a part of the model on "disk"; nothing can be offloaded there. Give "cpu", or quantize: '
            "quantization_bit=4."
        )
    try:
        places = {
            name: torch.device("cuda", place) if type(place) is int else torch.device(place)
            for name, place in places.items()
        }
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device_map is {wanted!r}, expected a device such as "cuda:0", a dictionary of modules to devices, or "auto".'
        ) from error
    if len(set(places.values())) > 1:
        return places
    (device,) = set(places.values())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'The model shall go to {device}, but torch can use no GPU here. Give device="cpu".')
    return device


def own_memory(model, stored):
    """Copy what still lies in the mapped files, so that the folder can be written anew while the model is in use."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_cpu and tensor.dtype in (stored, torch.int8):
            tensor.data = tensor.data.clone()
