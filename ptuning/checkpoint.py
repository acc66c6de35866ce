"""The public door to weights: a base model or a prefix, loaded, saved or described.

Answers to `from_pretrained(..., trust_remote_code=True)` and the prefix loading pasted into three of the official
scripts. It differs in that no code of the folder is run or fetched, pickles are read with `weights_only`, nothing is
half loaded, and the weights are memory-mapped and converted tensor by tensor, so there is never a second copy of them
in memory. `from_pretrained` calls load_model: integer weights, a prefix and each tensor's dtype are its business.
"""

import copy
import hashlib
import shutil
from functools import cache, partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from chatglm2 import modeling_chatglm
from chatglm2.bits import check_quantization_bit
from chatglm2.chat import unknown_token_ids
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.matmul import MULTIPLIES_BFLOAT16, Linear, convert
from chatglm2.quantization import QuantizedLinear, choose_backend, prepare_output_layer_, quantize_weight
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from checkpoints.file_names import weight_files
from checkpoints.placing import (
    IGNORED,
    MAPS,
    check_settings,
    device_of,
    infer_devices,
    own_memory,
    parts_on,
    spread_model,
    wanted_devices,
    wanted_dtype,
)
from checkpoints.prefix import (  # noqa: F401 - some are here for the scripts of others
    fill_with_prefix,
    is_prefix_checkpoint,
    load_prefix,
    read_prefix,
    read_prefix_settings,
    save_prefix,
)
from checkpoints.weight_files import (
    COPIED,
    FINGERPRINT_TENSOR,
    FINGERPRINT_TENSORS,
    PREFIX_KEY,
    check_tensor,
    check_trained,
    read_model,
    read_tensors,
    stored_dtype,
)
from common.files import read_json, write_json
from common.messages import dtype_name, first_line
from families import BY_NAME, FAMILY_KEY, Family, check_template, find_family, local_folder, read_base_settings

# What PEFT's methods adapt where they are not told, other than query_key_value; as in models of the same shape.
ADAPTED_MODULES = {
    "IA3": ["query_key_value", "dense_4h_to_h"],
    "LNTUNING": ["input_layernorm", "post_attention_layernorm", "final_layernorm"],
}

# ---- which folder


def resolve_folder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, weights: bool = True
) -> Path:
    """The local folder of a model: `name_or_path` itself, or the hub's snapshot of it without code files.

    Without `weights` the hub is asked for configuration and tokenizer only.

    Raises FileNotFoundError that says where it looked and how to get the model.
    """
    if folder := local_folder(name_or_path):
        return folder
    patterns = ["*.json", "tokenizer.model", "ice_text.model", *(("*.bin", "*.safetensors") if weights else ())]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"--model_name_or_path {name_or_path} is no local folder, and the hub did not give it ({reason}). "
            "Check the spelling, set HF_ENDPOINT to a mirror, or download the folder by other means (ModelScope: "
            "ZhipuAI/chatglm2-6b) and give its path."
        ) from error


def read_config(
    folder: Path | str, model_family: str | None = None, *, remembered: str | None = None, **overrides
) -> ChatGLMConfig:
    """The configuration of a base model folder, of its family's class, with fields overridden.

    `model_family` names the family of a folder that does not tell; `remembered` is what a checkpoint names.

    Raises FileNotFoundError without config.json, ValueError for a folder of another model or of a prefix.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    if is_prefix_checkpoint(folder):
        raise ValueError(
            f"{folder} holds only a trained prefix (pre_seq_len {settings.get('pre_seq_len')}), not a base model. "
            f"Use --model_name_or_path <base model> --ptuning_checkpoint {folder}"
        )
    settings, family = read_base_settings(folder, model_family, remembered)
    try:
        config = family.configuration_class(**{**family.settings, **settings, **overrides, FAMILY_KEY: family.name})
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f'torch_dtype is {config.dtype!r}, expected the name of one, such as "float16".')
        return config
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {str(error).removeprefix('config.json: ')}") from error
    except Exception as error:  # transformers meets settings of any type with any error
        raise ValueError(f"{folder / 'config.json'} has a setting of a wrong kind ({error}).") from error


def family_of(config: ChatGLMConfig) -> Family:
    """The family of a model with this configuration; one that is not from read_config is ChatGLM2's."""
    return BY_NAME[config.model_family or "chatglm2"]


# ---- the base model


def choose_device() -> str:
    """The device that answers: NVIDIA's GPU, else Apple's, on which nothing of this has been tried, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(
    device: torch.device | str, fp16: bool = False, bf16: bool = False, official: bool = False
) -> tuple[torch.dtype, str]:
    """Dtype of the frozen weights and the reason, in words. The prefix is always float32, and so is the loss.

    Except with `official`, the recipe of 2023 to the letter: see chatglm2/official_recipe.py.
    """
    if official:
        return torch.float16, "--precision official: no loss scaling, loss rounded to float16"
    if torch.device(device).type == "mps":
        return torch.float16, "an Apple GPU, on which this has not been tried"
    if torch.device(device).type != "cuda":
        if bf16:
            slow = "" if MULTIPLIES_BFLOAT16 else ", slow: this processor has no instructions for it"
            return torch.bfloat16, f"--bf16{slow}"
        return torch.float32, "float16 is slow on a CPU; --bf16 halves the memory" if fp16 else "no GPU"
    if fp16:
        return torch.float16, "--fp16, with loss scaling"
    if bf16:
        return torch.bfloat16, "--bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bfloat16; with loss scaling"


def load_model(
    folder: Path | str,
    *,
    config: ChatGLMConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | dict = "cpu",
    quantization_bit: int | None = None,
    quantization_backend: str = "auto",
    quantize_output_layer: bool = False,
) -> modeling_chatglm.ChatGLMForConditionalGeneration:
    """A base model from a folder in the official layout, frozen, in eval mode, with a fresh prefix encoder.

    The module tree is built without storage; every tensor then goes from the memory-mapped file straight to
    `dtype` and `device`, quantized on the way with `quantization_bit` 4 or 8 (or already so in the folder). What
    computes with integer weights is one of quantization.BACKENDS, tried before any weight is read. With
    `quantize_output_layer` the output layer is int8, too: a model for answers, not for training.
    `config` carries pre_seq_len, prefix_projection and prefix_dropout; by default the folder's own, without a
    prefix. The prefix encoder is float32 and is the only part with gradients; a prefix among the weights fills it.
    `device` may be a dictionary of modules to devices, or "auto" for all GPUs. `model.fingerprint` tells base models apart;
    `model.base_folder` is `folder`.

    Raises FileNotFoundError and ValueError: missing or unreadable files, and missing, unexpected or
    wrongly shaped tensors, by name.
    """
    config = config or read_config(folder, pre_seq_len=None)
    family = family_of(config)
    config.quantization_bit = check_quantization_bit(quantization_bit, config.quantization_bit)
    with torch.device("meta"):
        model = family.model_class(config)
    if quantize_output_layer:
        prepare_output_layer_(model)
    if isinstance(device, str) and device in MAPS:
        device = infer_devices(model, device, dtype) if torch.cuda.is_available() else choose_device()
    if isinstance(device, dict):
        device = parts_on(model, device)
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    integers = {f"{name}.weight": module.bits for name, module in quantized.items()}
    choose = cache(partial(choose_backend, quantization_backend, dtype=dtype))
    for name, module in quantized.items():
        module.backend = choose(device_of(f"{name}.weight", device), module.bits)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(PREFIX_KEY)}
    for name in expected:
        device_of(name, device)  # or an error, before any weight is read
    multiplied = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    model.base_folder = Path(folder)
    loaded, unexpected, prefix = {}, [], {}
    for file, stored_name, stored in read_model(folder, family.names.own_name, config.embedding_bits, dtype):
        if stored_name.startswith(PREFIX_KEY) and config.pre_seq_len:
            check_trained(stored, stored_name, file)
            prefix[stored_name.removeprefix(PREFIX_KEY)] = stored
            continue
        if stored_name not in expected:
            unexpected.append(stored_name)
            continue
        if stored_name == FINGERPRINT_TENSOR:
            model.fingerprint = _fingerprint(stored)
        tensors = {stored_name: stored.to(device_of(stored_name, device))}
        if stored_name in integers and stored.is_floating_point():
            # In the file's dtype, as official.
            weight, scale = quantize_weight(tensors[stored_name], integers[stored_name])
            tensors = {stored_name: weight, stored_name + "_scale": scale}
        for name, tensor in tensors.items():
            check_tensor(tensor, name, expected[name], file)
            if name in multiplied:
                tensor = convert(tensor, dtype)
            elif tensor.is_floating_point() and not name.endswith("_scale"):  # scales stay exact
                tensor = tensor.to(dtype)
            loaded[name] = tensor
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in (("missing", expected.keys() - loaded.keys()), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json. Tensors {'; '.join(problems)}. "
            f"Is this the complete, unchanged folder of a {family.title} model?"
        )
    model.load_state_dict(loaded, strict=False, assign=True)
    model.requires_grad_(False)
    prefix_encoder = model.transformer.prefix_encoder
    if prefix_encoder is not None:
        prefix_encoder.to_empty(device="cpu")  # initialized on the CPU: the same numbers on every device and rank
        prefix_encoder.reset_parameters()
        if prefix:
            fill_with_prefix(prefix_encoder, prefix, folder)
        prefix_encoder.to(device_of(PREFIX_KEY, device)).requires_grad_(True)
    if isinstance(device, dict):
        spread_model(model, device)
    return model.eval()


def _fingerprint(stored: torch.Tensor) -> str:
    return hashlib.sha256(stored.float().numpy().tobytes()).hexdigest()[:16]


def fingerprint_of(folder: Path | str) -> str | None:
    """The `fingerprint` that a base model in a folder has once it is loaded, read from its files alone."""
    tensors = (pair for file in weight_files(folder) for pair in read_tensors(file))
    return next((_fingerprint(tensor) for name, tensor in tensors if name in FINGERPRINT_TENSORS), None)


def save_model(
    model: modeling_chatglm.ChatGLMForConditionalGeneration,
    folder: Path | str,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "2GB",
    file_format: str = "bin",
) -> list[str]:
    """Write a base model's folder in the official layout, the prefix left out; the names of the weight files.

    `tensors` are those of the model by name, by default its own. `file_format` is safetensors or bin. Files of at
    most `max_shard_size`, with their index if there are several. What is beside the weights is copied from the folder
    that the model was loaded from.
    """
    folder = Path(folder)
    tensors = model.state_dict() if tensors is None else tensors
    weights = {name: tensor.detach() for name, tensor in tensors.items() if not name.startswith(PREFIX_KEY)}
    dtype = weights[FINGERPRINT_TENSOR].dtype
    names = family_of(model.config).names
    weights = {names.official_name(name): tensor for name, tensor in weights.items()}
    frequencies = modeling_chatglm.rotary_frequencies(model.config.kv_channels).to(dtype)  # official; not stored here
    weights.update(dict.fromkeys(names.computed_names(model.config.num_layers), frequencies))
    pattern = "model{suffix}.safetensors" if file_format == "safetensors" else "pytorch_model{suffix}.bin"
    try:
        split = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"--max_shard_size {max_shard_size}: expected a size such as 2GB or 500MB.") from error
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].cpu().clone(memory_format=torch.contiguous_format) for name in names}
        if file_format == "safetensors":
            safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / (pattern.format(suffix="") + ".index.json"), index)
    settings = type(model.config).known_settings(read_json(model.base_folder / "config.json"))
    for name in ("dtype", "pre_seq_len", "prefix_projection", "quantization_embeddings"):
        settings.pop(name, None)
    bits = {"quantization_bit": model.config.quantization_bit} if model.config.quantization_bit else {}
    family = {FAMILY_KEY: model.config.model_family} if model.config.model_family else {}
    write_json(folder / "config.json", {**settings, "torch_dtype": dtype_name(dtype), **bits, **family})
    for file in (file for pattern in COPIED for file in model.base_folder.glob(pattern)):
        shutil.copy(file, folder)
    return list(split.filename_to_tensors)


def load_tokenizer(
    folder: Path | str, config: ChatGLMConfig, source_prefix: str = "", prompt_template: str | None = None
) -> ChatGLMTokenizer:
    """The folder's tokenizer; ValueError where it has more tokens than the model has embeddings.

    Its prompts begin with `source_prefix`: chat() with a checkpoint that was trained so needs it. They are written as
    `prompt_template` says, by default as the model's family does.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (Path(folder) / name).is_file():
            read_json(Path(folder) / name)
    try:
        tokenizer = family_of(config).tokenizer_class.from_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # bytes at random in either file make transformers raise anything
        if str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder}: tokenizer.model or tokenizer_config.json is damaged ({first_line(error)}). Copy both again "
            "from the ChatGLM2-6B model folder."
        ) from error
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} tokens, but config.json says padded_vocab_size "
            f"{config.padded_vocab_size}. The two files come from different models."
        )
    if tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"{folder}: answers end with id {tokenizer.eos_token_id} in tokenizer.model, but with eos_token_id "
            f"{config.eos_token_id} in config.json. The two files come from different models."
        )
    tokenizer.source_prefix = source_prefix
    tokenizer.prompt_template = check_template(prompt_template, family_of(config))
    return tokenizer


def generation_config(tokenizer, config: ChatGLMConfig, **settings) -> GenerationConfig:
    """How to generate with this model: its end and padding ids, and no ids that stand for no token."""
    return GenerationConfig(
        eos_token_id=[config.eos_token_id, *tokenizer.stop_ids] if tokenizer.stop_ids else config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=unknown_token_ids(tokenizer, config),
        use_cache=True,
        **settings,
    )


# ---- as transformers calls it


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
    model_family=None,
    **settings,
):
    """load_model's model of a folder or hub id; `settings` are fields of the configuration, such as pre_seq_len.

    `dtype` is by default, and with "auto", the one that config.json names, else the stored one. With a prefix all but
    the prefix is frozen, as in the official constructor; else every float weight trains. `model_family` is as in read_config. `device_map` is a device, a
    dictionary of modules, or "auto". The configuration that is given is not changed.
    """
    settings = {name: value for name, value in settings.items() if name not in IGNORED}
    folder = resolve_folder(str(name_or_path), revision, cache_dir)
    own_config = None
    if config is None or (folder / "config.json").is_file():
        own_config = read_config(folder, model_family or getattr(config, FAMILY_KEY, None))
    check_settings(settings)
    config = copy.deepcopy(config or own_config)
    if own_config is not None:  # AutoConfig knows one class for all of this type
        config = type(own_config)(**{**config.to_dict(), FAMILY_KEY: own_config.model_family})
    for name, value in settings.items():
        setattr(config, name, value)
    config = type(config)(**config.to_dict())  # checked once more
    config.name_or_path = str(name_or_path)
    config.dtype = dtype = wanted_dtype(dtype or torch_dtype or "auto", config, folder)
    devices = wanted_devices(device if device_map is None else device_map)
    model = load_model(folder, config=config, dtype=dtype, device=devices, quantization_backend=quantization_backend)
    own_memory(model, stored_dtype(folder))
    if not config.pre_seq_len:
        model.requires_grad_(True)
    if generation_config is not None:
        model.generation_config = generation_config
    if not output_loading_info:
        return model
    return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


class ChatGLMForConditionalGeneration(modeling_chatglm.ChatGLMForConditionalGeneration):
    """The model of modeling_chatglm.py, which reads no files; its `from_pretrained` is `load_pretrained`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The model that load_pretrained makes of a folder or hub id; without one, that of transformers."""
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        return load_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class FamilyTokenizer(ChatGLMTokenizer):
    """What AutoTokenizer is given: its `from_pretrained` is that of the tokenizer of the folder's family."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, model_family=None, **kwargs):
        """The tokenizer of a folder or hub id; `model_family` is as in read_config."""
        name = str(pretrained_model_name_or_path)
        place = name if Path(name).is_dir() else None
        if place is None:
            place = resolve_folder(name, kwargs.get("revision"), kwargs.get("cache_dir"), weights=False)
        family = BY_NAME["chatglm2"]
        if (Path(place) / "config.json").is_file():
            family = find_family(read_json(Path(place) / "config.json"), place, model_family)
        tokenizer = family.tokenizer_class.from_pretrained(place, *init_inputs, **kwargs)
        tokenizer.prompt_template = family.template
        return tokenizer


# Under the name by which tokenizer_config.json calls it.
FamilyTokenizer.__name__ = ChatGLMTokenizer.__name__


def register_auto_classes():
    """Let transformers' AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM and AutoModelForSeq2SeqLM know
    ChatGLM2: their `from_pretrained(folder)` then gives the classes of this project, and runs no code of the folder.
    PEFT learns which modules its methods adapt where a configuration names none.

    It changes transformers and PEFT for the whole process; nothing else here does.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, tokenizer_class=FamilyTokenizer, exist_ok=True)

    from peft.utils import constants  # takes half a second, which others need not wait

    for name, modules in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
            modules.setdefault("chatglm", ADAPTED_MODULES.get(name.split("_")[3], ["query_key_value"]))
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.setdefault("chatglm", ["dense_4h_to_h"])
