"""`from_pretrained` of the model class, and so that of transformers' Auto classes: load_model, called the official way.

Answers to `AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)`. It differs in that transformers
does not read the folder: integer weights, a prefix and each tensor's dtype are what load_model makes of them, and
nothing that the folder names is fetched or run, whatever `trust_remote_code` says.
"""

import copy

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from chatglm2 import modeling_chatglm
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from checkpoint import load_model, read_config, resolve_folder
from checkpoints.weight_files import stored_dtype

# Accepted and of no effect: how to load, or which code may run; here one way of loading holds, and no such code runs.
IGNORED = (
    "_commit_hash _fast_init _from_auto _from_pipeline adapter_kwargs attn_implementation code_revision empty_init "
    "force_download ignore_mismatched_sizes local_files_only low_cpu_mem_usage mirror offload_state_dict proxies "
    "resume_download token trust_remote_code use_auth_token use_safetensors weights_only"
).split()
# What PEFT's methods adapt where they are not told, other than query_key_value; as in models of the same shape.
ADAPTED_MODULES = {
    "IA3": ["query_key_value", "dense_4h_to_h"],
    "LNTUNING": ["input_layernorm", "post_attention_layernorm", "final_layernorm"],
}
REPLACEMENTS = {
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_config"), "quantization_bit=4 or quantization_bit=8"
    ),
    **dict.fromkeys(("subfolder", "variant", "gguf_file"), "the folder that holds config.json and the weights"),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), "device_map"),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_buffers"), "a device_map that says where each part lies"),
}


class ChatGLMForConditionalGeneration(modeling_chatglm.ChatGLMForConditionalGeneration):
    """The model for people's own scripts: its `from_pretrained` is `load_pretrained`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The model that load_pretrained makes of a folder or hub id; without one, that of transformers."""
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        return load_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def register_auto_classes():
    """Let transformers' AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM and AutoModelForSeq2SeqLM know
    ChatGLM2: their `from_pretrained(folder)` then gives the classes of this project, and runs no code of the folder.
    PEFT learns which modules its methods adapt where a configuration names none.

    It changes transformers and PEFT for the whole process; nothing else here does.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)

    from peft.utils import constants  # takes half a second, which others need not wait

    for name, modules in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
            modules.setdefault("chatglm", ADAPTED_MODULES.get(name.split("_")[3], ["query_key_value"]))
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.setdefault("chatglm", ["dense_4h_to_h"])


def load_pretrained(
    name_or_path,
    *,
    config=None,
    dtype=None,
    torch_dtype=None,
    device=None,
    device_map=None,
    quantization_backend="auto",
    generation_config=None,
    output_loading_info=False,
    revision=None,
    cache_dir=None,
    **settings,
):
    """load_model's model of a folder or hub id; `settings` are fields of the configuration, such as pre_seq_len.

    `dtype` is by default, and with "auto", the one that config.json names, else the stored one. With a prefix all but
    the prefix is frozen, as in the official constructor; else every float weight trains. `device_map` is a device, a
    dictionary of modules, or "auto". The configuration that is given is not changed.
    """
    settings = {name: value for name, value in settings.items() if name not in IGNORED}
    folder = resolve_folder(str(name_or_path), revision, cache_dir)
    own_config = read_config(folder) if config is None or (folder / "config.json").is_file() else None
    check_settings(settings, own_config or config)
    config = copy.deepcopy(config or own_config)
    for name, value in settings.items():
        setattr(config, name, value)
    config = type(config)(**config.to_dict())  # checked once more
    config.name_or_path = str(name_or_path)
    config.dtype = dtype = choose_dtype(dtype or torch_dtype or "auto", config, folder)
    devices = choose_devices(device if device_map is None else device_map, config, dtype)
    model = load_model(folder, config=config, dtype=dtype, device=devices, quantization_backend=quantization_backend)
    own_memory(model, stored_dtype(folder))
    if not config.pre_seq_len:
        model.requires_grad_(True)
    if isinstance(devices, dict):
        dispatch_model(model, devices, offload_buffers=True)
    if generation_config is not None:
        model.generation_config = generation_config
    if not output_loading_info:
        return model
    return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def check_settings(settings, config):
    """TypeError for an argument that is none of the configuration, with what to give instead."""
    for name in settings:
        if name in REPLACEMENTS:
            raise TypeError(f"from_pretrained: {name} has no effect on this model. Give {REPLACEMENTS[name]}.")
        if name not in type(config).fields():
            raise TypeError(f"from_pretrained: {name} is neither an argument nor a field of ChatGLM2's config.json.")


def choose_dtype(dtype, config, folder):
    """The torch.dtype that an argument of that name means. ValueError for what is none."""
    if dtype == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else stored_dtype(folder)
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, expected such as torch.float16, or its name.")
    return found


def choose_devices(wanted, config, dtype):
    """The device, or {module: device} for several, that `device_map` or `device` means. ValueError for what is none."""
    if wanted is None:
        return torch.device("cpu")
    if wanted in ("auto", "balanced", "balanced_low_0", "sequential"):
        if torch.cuda.device_count() < 2:
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = modeling_chatglm.ChatGLMForConditionalGeneration(config)
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
