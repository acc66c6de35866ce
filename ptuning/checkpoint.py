"""Weight files: load and save a base model, save / load / describe a prefix, decide dtypes.

The only place that knows the names of weight files. Answers to `from_pretrained(..., trust_remote_code=True)`
and the prefix loading pasted into three of the official scripts. It differs in that no code of the folder
is run, pickles are read with `weights_only`, nothing is half loaded, and the weights are memory-mapped and
converted tensor by tensor, so there is never a second copy of them in memory.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import GenerationConfig

from arguments import SUPPORTED_BITS, check_quantization_bit
from chat_chatglm import unknown_token_ids
from claims import (
    MOST_JSON_BYTES,
    MOST_LOG_BYTES,
    ZIP_MARK,
    check_claim,
    check_safetensors,
    check_size,
    check_torch_file,
    path_inside,
)
from configuration_chatglm import ChatGLMConfig
from data import parse_json
from families import model_family
from modeling_chatglm import ChatGLMForConditionalGeneration, rotary_frequencies
from products import Linear, convert
from quantization import (
    choose_backend,
    is_quantized_weight,
    quantize_weight,
    use_backend_,
)
from tokenization_chatglm import ChatGLMTokenizer
from trainer_state import check_state, is_count, shown

PREFIX_FILE = "pytorch_model.bin"  # the official name; holds transformer.prefix_encoder.* only
PREFIX_KEY = "transformer.prefix_encoder."
SIDECAR_FILE = "ptuning.json"  # what config.json lacks: base model, columns, lengths, how it was trained
STATE_FILE = "trainer_state.json"  # the Trainer's: step, log
CHECKSUM_FILE = "checksums.json"  # size and sha256 of every other file; written last
BEST_LINK = "best"  # in a run's folder: a link to the checkpoint with the lowest dev loss
SIDECAR_KINDS = {
    **dict.fromkeys(
        "base_model prompt_column response_column history_column messages_column source_prefix".split(), str
    ),
    **dict.fromkeys(("base_fingerprint", "engine"), str),
    **dict.fromkeys(("max_source_length", "max_target_length"), int),
    "training": dict,
    "merged_checkpoints": list,
}
KIND_NAMES = {str: "text", int: "a positive integer", dict: "an object", list: "a list of folders"}
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's names; the latter is from 2023
# Differs between any two base models, and is the same in their float, int8 and int4 folders.
FINGERPRINT_TENSOR = "transformer.encoder.layers.0.input_layernorm.weight"
# Copied with a model, beside its weights. Python files are there for the official code, and never run here.
COPIED = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "tokenization_chatglm.py",
    "quantization.py",
    "*LICENSE*",
)
# Stored by the official checkpoints, computed here.
NOT_NEEDED = "transformer.rotary_pos_emb.inv_freq"


# ---- which folder


def resolve_folder(name_or_path, revision=None, cache_dir=None, weights=True):
    """The local folder of a model: `name_or_path` itself, or the hub's snapshot of it without code files.

    Without `weights` the hub is asked for configuration and tokenizer only.

    Raises FileNotFoundError that says where it looked and how to get the model.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"--model_name_or_path {name_or_path} is a file; give the folder that holds it.")
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(
            f"--model_name_or_path {name_or_path}: there is no such folder. Give a folder with config.json, "
            "tokenizer.model and the weights, or a hub id such as THUDM/chatglm2-6b."
        )
    patterns = ["*.json", "tokenizer.model", *(("*.bin", "*.safetensors") if weights else ())]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"--model_name_or_path {name_or_path} is no local folder, and the hub did not give it ({reason}). "
            "Check the spelling, set HF_ENDPOINT to a mirror, or download the folder by other means (ModelScope: "
            "ZhipuAI/chatglm2-6b) and give its path."
        ) from error


def read_json(file):
    """A JSON object from `file`. Raises FileNotFoundError and ValueError naming the file."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; is {file.parent} the folder you meant?")
    check_size(file, MOST_LOG_BYTES if file.name == STATE_FILE else MOST_JSON_BYTES)
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected an object of settings.")
    return value


def is_prefix_checkpoint(folder):
    """Whether `folder` holds a trained prefix and no base model."""
    file = Path(folder) / PREFIX_FILE
    if not file.is_file() or any((Path(folder) / name).is_file() for name in INDEX_FILES):
        return False
    names = [name for name, _ in read_tensors(file)]
    return bool(names) and all(name.startswith(PREFIX_KEY) for name in names)


def read_config(folder, **overrides):
    """ChatGLMConfig of a base model folder, with fields overridden.

    Raises FileNotFoundError without config.json, ValueError for a folder of another model or of a prefix.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    family = model_family(settings, folder)
    if family != "chatglm2":
        raise ValueError(
            f"{folder} holds {family}; this program trains ChatGLM2 (ChatGLM2-6B and models of its architecture). "
            "Give a ChatGLM2 folder as --model_name_or_path."
        )
    trained = finetuning_type(folder)
    if trained in ("freeze", "lora"):
        raise ValueError(
            f"{folder} holds only what --finetuning_type {trained} trained, not a base model. "
            f"Use --model_name_or_path <base model> --ptuning_checkpoint {folder}"
        )
    if is_prefix_checkpoint(folder):
        raise ValueError(
            f"{folder} holds only a trained prefix (pre_seq_len {settings.get('pre_seq_len')}), not a base model. "
            f"Use --model_name_or_path <base model> --ptuning_checkpoint {folder}"
        )
    try:
        config = ChatGLMConfig(**{**settings, **overrides})
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f'torch_dtype is {config.dtype!r}, expected the name of one, such as "float16".')
        return config
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {str(error).removeprefix('config.json: ')}") from error
    except Exception as error:  # transformers meets settings of any type with any error
        raise ValueError(f"{folder / 'config.json'} has a setting of a wrong kind ({error}).") from error


# ---- reading weight files


def read_tensors(file):
    """Yield (name, tensor) of one weight file, memory-mapped. Raises ValueError for a file that is no such."""
    file = Path(file)
    problem = f"{file} cannot be read as model weights ({{}}). Download or copy it again and compare its size."
    with open(file, "rb") as opened:
        is_zip = opened.read(4) == ZIP_MARK  # files from before torch 1.6 cannot be memory-mapped
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        try:
            check_safetensors(file)
            with safetensors.safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, tensors.get_tensor(name)
        except Exception as error:  # likewise
            raise ValueError(problem.format(first_line(error))) from error
        return
    try:
        check_torch_file(file)
    except ValueError as error:
        raise ValueError(problem.format(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle
            tensors = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is no torch file, or holds objects other than tensors, which are never loaded"
        raise ValueError(problem.format(reason)) from error
    except Exception as error:  # bytes at random make torch.load raise anything
        reason = (is_zip and claim_too_large(file, size)) or first_line(error)
        raise ValueError(problem.format(reason)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(problem.format("it does not hold a dictionary of tensors"))
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_nested:
            raise ValueError(problem.format(f"{name} is a {tensor.layout} tensor of {tensor.dtype}"))
        try:
            check_claim(name, tensor, size)
        except ValueError as error:
            raise ValueError(problem.format(error)) from error
        yield name, tensor


def claim_too_large(file, size):
    """Why a torch file of `size` bytes could not be read, if a tensor in it claims more; it is not read for that."""
    try:
        for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
            if tensor.untyped_storage().nbytes() > size:
                return f"{name} claims {tensor.untyped_storage().nbytes():,} bytes, and the file has {size:,}"
    except Exception:  # it has another fault
        return None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def weight_files(folder):
    """The weight files of a model folder, in order: those of its index, or the single one."""
    folder = Path(folder)
    for name in INDEX_FILES:
        if (folder / name).is_file():
            weight_map = read_json(folder / name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{folder / name} has no weight_map. Download it again.")
            files = weight_map.values()
            strange = [file for file in files if not isinstance(file, str) or Path(file).name != file or file == ".."]
            if strange:
                raise ValueError(f"{folder / name} names {strange[0]!r}, which is no file in its folder.")
            files = [folder / file for file in sorted(set(weight_map.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(missing)} ({len(missing)} of {len(files)} weight files that {name} "
                    "names). Download the rest."
                )
            return files
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(
        f"{folder} holds no weights; expected {', '.join(INDEX_FILES)}, or {' or '.join(SINGLE_FILES)}."
    )


# ---- the base model


def choose_dtype(device, fp16=False, bf16=False, official=False):
    """Dtype of the frozen weights and the reason, in words. The prefix is always float32, and so is the loss.

    Except with `official`, the recipe of 2023 to the letter: see official.py.
    """
    if official:
        return torch.float16, "--precision official: no loss scaling, loss rounded to float16"
    if torch.device(device).type != "cuda":
        reason = "half precision is slower and less exact on a CPU" if fp16 or bf16 else "no GPU"
        return torch.float32, reason
    if fp16:
        return torch.float16, "--fp16, with loss scaling"
    if bf16:
        return torch.bfloat16, "--bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    return torch.float16, "the GPU has no bfloat16; with loss scaling"


def place_tensor(model, name, tensor):
    """Make `tensor` the frozen parameter, or the buffer, called `name`."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)


def load_model(
    folder, *, config=None, dtype=torch.float32, device="cpu", quantization_bit=None, quantization_backend="auto"
):
    """A base model from a folder in the official layout, frozen, in eval mode, with a fresh prefix encoder.

    The module tree is built without storage; every tensor then goes from the memory-mapped file straight to
    `dtype` and `device`, quantized on the way with `quantization_bit` 4 or 8 (or already so in the folder). What
    computes with integer weights is one of quantization.BACKENDS, tried before any weight is read.
    `config` carries pre_seq_len, prefix_projection and prefix_dropout; by default the folder's own, without a
    prefix. The prefix encoder is float32 and is the only part with gradients; a prefix among the weights fills it.
    `device` may be a dictionary of modules to devices. `model.fingerprint` tells base models apart;
    `model.base_folder` is `folder`.

    Raises FileNotFoundError and ValueError: missing or unreadable files, and missing, unexpected or
    wrongly shaped tensors, by name.
    """
    config = config or read_config(folder, pre_seq_len=None)
    bits = config.quantization_bit = check_quantization_bit(quantization_bit, config.quantization_bit)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    if bits:
        use_backend_(model, choose_backend(quantization_backend, device_of("", device), bits, dtype))
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(PREFIX_KEY)}
    for name in expected:
        device_of(name, device)  # or an error, before any weight is read
    multiplied = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    model.base_folder = Path(folder)
    missing, unexpected, prefix = set(expected), [], {}
    for file in weight_files(folder):
        for stored_name, stored in read_tensors(file):
            if stored_name == NOT_NEEDED:
                continue
            if stored_name.startswith(PREFIX_KEY) and config.pre_seq_len:
                check_trained(stored, stored_name, file)
                prefix[stored_name.removeprefix(PREFIX_KEY)] = stored
                continue
            if stored_name not in expected:
                unexpected.append(stored_name)
                continue
            if stored_name == FINGERPRINT_TENSOR:
                model.fingerprint = hashlib.sha256(stored.float().numpy().tobytes()).hexdigest()[:16]
            tensors = {stored_name: stored.to(device_of(stored_name, device))}
            if bits and is_quantized_weight(stored_name) and stored.is_floating_point():
                weight, scale = quantize_weight(tensors[stored_name], bits)  # in the file's dtype, as official
                tensors = {stored_name: weight, stored_name + "_scale": scale}
            for name, tensor in tensors.items():
                check_tensor(tensor, name, expected[name], file)
                if name in multiplied:
                    tensor = convert(tensor, dtype)
                elif tensor.is_floating_point() and not name.endswith("_scale"):  # scales stay exact
                    tensor = tensor.to(dtype)
                place_tensor(model, name, tensor)
                missing.discard(name)
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json. Tensors {'; '.join(problems)}. "
            "Is this the complete, unchanged folder of a ChatGLM2 model?"
        )
    prefix_encoder = model.transformer.prefix_encoder
    if prefix_encoder is not None:
        prefix_encoder.to_empty(device="cpu")  # initialized on the CPU: the same numbers on every device and rank
        prefix_encoder.reset_parameters()
        if prefix:
            fill_with_prefix(prefix_encoder, prefix, folder)
        prefix_encoder.to(device_of(PREFIX_KEY, device)).requires_grad_(True)
    return model.eval()


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


def stored_dtype(folder):
    """Dtype of the float weights in a model folder."""
    for file in weight_files(folder):
        for name, tensor in read_tensors(file):
            if name == FINGERPRINT_TENSOR:
                return tensor.dtype
    raise ValueError(f"{folder} has no {FINGERPRINT_TENSOR}. Is it the complete folder of a ChatGLM2 model?")


def save_model(model, folder, *, tensors=None, max_shard_size="2GB", file_format="bin"):
    """Write a base model's folder in the official layout, the prefix left out; the names of the weight files.

    `tensors` are those of the model by name, by default its own. `file_format` is safetensors or bin. Files of at
    most `max_shard_size`, with their index if there are several. What is beside the weights is copied from the folder
    that the model was loaded from.
    """
    folder = Path(folder)
    tensors = model.state_dict() if tensors is None else tensors
    weights = {name: tensor.detach() for name, tensor in tensors.items() if not name.startswith(PREFIX_KEY)}
    dtype = weights[FINGERPRINT_TENSOR].dtype
    weights[NOT_NEEDED] = rotary_frequencies(model.config.kv_channels).to(
        dtype
    )  # not here, but one of the official names
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
    settings = ChatGLMConfig.known_settings(read_json(model.base_folder / "config.json"))
    for name in ("dtype", "pre_seq_len", "prefix_projection"):
        settings.pop(name, None)
    bits = {"quantization_bit": model.config.quantization_bit} if model.config.quantization_bit else {}
    write_json(folder / "config.json", {**settings, "torch_dtype": str(dtype).removeprefix("torch."), **bits})
    for file in (file for pattern in COPIED for file in model.base_folder.glob(pattern)):
        shutil.copy(file, folder)
    return list(split.filename_to_tensors)


def check_tensor(tensor, name, expected, file):
    """Raise ValueError unless shape and kind of dtype are those the configuration asks for."""
    if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
        raise ValueError(
            f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but config.json asks for "
            f"{'float' if expected.is_floating_point() else expected.dtype} {tuple(expected.shape)}."
        )
    check_finite(tensor, name, file)


def check_finite(tensor, name, file):
    """Raise ValueError for a tensor with a NaN or an infinity in it."""
    if tensor.is_floating_point():
        for extreme in tensor.aminmax():  # 0.3 s per GB; isfinite() takes 30 times as long
            if not extreme.isfinite():
                raise ValueError(
                    f"{file}: {name} holds {extreme.item()}; nothing can be computed with that. Download or copy the "
                    "file again; of a trained prefix take an earlier checkpoint."
                )


def check_trained(tensor, name, file):
    """Raise ValueError for a tensor that no training can have written: empty, of integers, or not finite."""
    if tensor.ndim == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected float numbers.")
    check_finite(tensor, name, file)


def load_tokenizer(folder, config, source_prefix=""):
    """The folder's tokenizer; ValueError where it has more tokens than the model has embeddings.

    Its prompts begin with `source_prefix`: chat() with a checkpoint that was trained so needs it.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (Path(folder) / name).is_file():
            read_json(Path(folder) / name)
    try:
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
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
    return tokenizer


def generation_config(tokenizer, config, **settings):
    """How to generate with this model: its end and padding ids, and no ids that stand for no token."""
    return GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=unknown_token_ids(tokenizer, config),
        use_cache=True,
        **settings,
    )


# ---- the prefix


def read_sidecar(checkpoint):
    """What the sidecar of a checkpoint remembers, nothing where there is none."""
    file = Path(checkpoint) / SIDECAR_FILE
    return read_json(file) if file.is_file() else {}


def save_prefix(model, folder, sidecar=None):
    """Write the prefix checkpoint's own files: pytorch_model.bin, config.json, generation_config.json, sidecar.

    The keys, their full names and float32 are the official ones, so the official code loads it too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = model.transformer.prefix_encoder.state_dict()
    torch.save({PREFIX_KEY + name: tensor.float().cpu() for name, tensor in prefix.items()}, folder / PREFIX_FILE)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    settings["torch_dtype"] = settings.pop("dtype", None) or str(model.dtype).removeprefix("torch.")
    settings["use_cache"] = True  # the Trainer turns it off; a checkpoint that says so generates slowly
    settings["architectures"] = [type(model).__name__]
    write_json(folder / "config.json", settings)
    ids = GenerationConfig(eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id)
    ids.save_pretrained(folder)
    if sidecar is not None:
        write_json(folder / SIDECAR_FILE, sidecar)


def write_bytes(file, data):
    """Write a file completely or not at all: what it held before stays until the new content is there.

    OSError names the file, which the system does not where a disk is full.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        try:
            partial.write_bytes(data)
            os.replace(partial, file)
        finally:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                partial.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_text(file, text):
    """Write a text file in UTF-8, as write_bytes does."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file, value):
    write_text(file, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def list_checkpoints(run_folder):
    """The checkpoints of a run that hold weights, by step: {"checkpoint-1000": path, …}."""
    found = {path.name: path for path in checkpoint_folders(run_folder) if (path / trained_file(path)).is_file()}
    return dict(sorted(found.items(), key=lambda item: step_of(item[1])))


def trained_file(checkpoint):
    """Name of the file that tells what a checkpoint holds: an adapter, the index of shards, or all of it."""
    names = (*ADAPTER_FILES, INDEX_FILES[1])
    return next((name for name in names if (Path(checkpoint) / name).is_file()), PREFIX_FILE)


def trained_files(checkpoint):
    """Names of all files with trained weights in a checkpoint folder."""
    name = trained_file(checkpoint)
    if name != INDEX_FILES[1]:
        return [name]
    return [name, *(file.name for file in weight_files(checkpoint))]


def point_to_best(run_folder, step):
    """Make `best` in a run's folder a relative link to the checkpoint of `step`; None, or a step without one: no link.

    Replaced in one move: whoever reads it meets the old one or the new one. A folder of that name, as a copy with
    `cp -rL` makes of the link, is renamed. Returns a line that says so, or "".
    """
    link = Path(run_folder) / BEST_LINK
    target = f"checkpoint-{step}"
    said = ""
    if link.is_dir() and not link.is_symlink():
        aside = next(path for number in itertools.count(1) if not (path := link.with_name(f"best-{number}")).exists())
        link.rename(aside)
        said = f"{link} is a folder, where this run keeps a link to its best checkpoint: it is now called {aside.name}."
    if not (link.parent / target).is_dir():
        link.unlink(missing_ok=True)
        return said
    new = link.with_name(f".{BEST_LINK}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
    return said


def find_checkpoints(path):
    """(the checkpoint folders that `--ptuning_checkpoint` means, what is wrong with others that were passed over).

    A checkpoint's folder is itself. A run's folder means its best checkpoint, or the last valid one where no best is
    known; `run/best` and `run/last` mean these, `run/all` every valid one, by step. Only the last gives several.
    Raises FileNotFoundError, with what the run has, where there is none such.
    """
    path = Path(path)
    run, wanted = path, None
    if path.name in ("last", "all") and (path / trained_file(path)).is_file():
        return [path], []  # a checkpoint that the user has called so
    if path.name in ("best", "last", "all") and not list_checkpoints(path):
        run, wanted = path.parent, path.name
    best = run / BEST_LINK
    if wanted in (None, "best") and (best / trained_file(best)).is_file():
        return [run / (run / BEST_LINK).resolve().name], []
    found = list_checkpoints(run)
    if wanted == "best" and found:
        raise FileNotFoundError(
            f"--ptuning_checkpoint {path}: no best checkpoint is known, for want of a dev loss in training. {run} has "
            f"{', '.join(found)}; {run}/last and {run}/all name the last and all."
        )
    if wanted == "all":
        damaged = {}
        for name, folder in found.items():
            try:
                verify_checkpoint(folder, trained_files(folder))
            except (ValueError, OSError) as error:
                damaged[name] = str(error)
        valid = [folder for name, folder in found.items() if name not in damaged]
        damaged = list(damaged.values())
    else:
        newest, damaged = newest_checkpoint(run, whole=False)
        valid = [newest] if newest else []
    if valid:
        return valid, damaged
    if wanted is None:
        return [path], []
    raise FileNotFoundError(" ".join([f"--ptuning_checkpoint {path}: {run} has no complete checkpoint.", *damaged]))


def dev_loss_of(checkpoint):
    """The dev loss that training measured when it saved the checkpoint, or None."""
    file = Path(checkpoint) / STATE_FILE
    if not file.is_file():
        return None
    state = check_state(read_json(file), file)
    losses = {entry["step"]: entry["eval_loss"] for entry in state.get("log_history") or [] if "eval_loss" in entry}
    return losses.get(state["global_step"])


def finetuning_type(checkpoint):
    """How the contents of a checkpoint folder were trained: p_tuning, full, freeze or lora; None for other folders."""
    checkpoint = Path(checkpoint)
    if (checkpoint / SIDECAR_FILE).is_file():
        kind = read_json(checkpoint / SIDECAR_FILE).get("finetuning_type", "p_tuning")
        if kind not in ("p_tuning", "full", "freeze", "lora"):
            raise ValueError(
                f"{checkpoint / SIDECAR_FILE}: finetuning_type is {kind!r}, expected p_tuning, full, freeze or lora."
            )
        return kind
    if any((checkpoint / name).is_file() for name in ADAPTER_FILES):
        return "lora"
    return None


def read_prefix(checkpoint):
    """The prefix encoder's tensors in a checkpoint folder, by name without `transformer.prefix_encoder.`.

    Raises FileNotFoundError without a folder or weights (naming the checkpoints beside it), ValueError for
    a file that holds no prefix or is not as it was written.
    """
    checkpoint = Path(checkpoint)
    file = checkpoint / PREFIX_FILE
    if not file.is_file():
        parent = checkpoint if checkpoint.is_dir() else checkpoint.parent
        others = list_checkpoints(parent)
        runs = sorted({found.parent.parent.name for found in parent.glob(f"*/checkpoint-*/{PREFIX_FILE}")})
        hint = "Give a folder that training wrote."
        if others or runs:
            hint = f"{parent} has {', '.join(others) or 'the runs ' + ', '.join(runs)}."
        raise FileNotFoundError(f"--ptuning_checkpoint {checkpoint}: there is no {PREFIX_FILE} in it. {hint}")
    verify_checkpoint(checkpoint, [PREFIX_FILE])
    tensors = {
        name.removeprefix(PREFIX_KEY): tensor for name, tensor in read_tensors(file) if name.startswith(PREFIX_KEY)
    }
    if "embedding.weight" not in tensors:
        raise ValueError(
            f"{file} holds no prefix ({PREFIX_KEY}embedding.weight is missing). Give a checkpoint of P-Tuning v2."
        )
    for name, tensor in tensors.items():
        check_trained(tensor, name, file)
    return tensors


def check_sidecar(settings, file):
    """Raise ValueError where what the sidecar `file` says has the wrong type."""
    for name, kind in SIDECAR_KINDS.items():
        value = settings.get(name)
        fits = is_count(value, 1) if kind is int else isinstance(value, kind)
        if kind is list and fits:
            fits = all(isinstance(item, str) for item in value)
        if value is not None and not fits:
            raise ValueError(
                f"{file}: {name} is {shown(value)}, expected {KIND_NAMES[kind]}. Repair or delete that file."
            )


def read_prefix_settings(checkpoint):
    """What a checkpoint says of itself: pre_seq_len, prefix_projection, quantization_bit and the sidecar's keys.

    The first two are read off the weights, so they hold even without config.json and sidecar.
    """
    checkpoint = Path(checkpoint)
    tensors = read_prefix(checkpoint)
    settings = {}
    config_file, sidecar_file = checkpoint / "config.json", checkpoint / SIDECAR_FILE
    if config_file.is_file():
        bits = read_json(config_file).get("quantization_bit") or 0
        if bits not in (0, *SUPPORTED_BITS):
            raise ValueError(f"{config_file}: quantization_bit is {bits!r}, expected 4, 8, or 0 for float weights.")
        settings["quantization_bit"] = bits
    settings.update(read_sidecar(checkpoint))
    check_sidecar(settings, sidecar_file)
    settings["pre_seq_len"] = tensors["embedding.weight"].shape[0]
    settings["prefix_projection"] = "trans.0.weight" in tensors
    return settings


def load_prefix(model, checkpoint):
    """Fill the model's prefix encoder from a checkpoint folder, all of it or ValueError.

    Warns where the checkpoint remembers another base model of the same shape.
    """
    fill_prefix_encoder(model.transformer.prefix_encoder, checkpoint)
    warn_of_other_base(model, checkpoint)


def warn_of_other_base(model, checkpoint):
    """Warn where a checkpoint remembers that it was trained on another base model than this one."""
    trained_on = read_sidecar(checkpoint).get("base_fingerprint")
    if trained_on not in (None, getattr(model, "fingerprint", trained_on)):
        warnings.warn(
            f"{checkpoint} was trained on another base model than the one loaded now (fingerprint {trained_on}, "
            f"here {model.fingerprint}). Its answers will be poor; give the model it was trained on.",
            stacklevel=2,
        )


def fill_prefix_encoder(prefix_encoder, checkpoint):
    """Fill a PrefixEncoder that is in no model from a checkpoint folder, all of it or ValueError."""
    fill_with_prefix(prefix_encoder, read_prefix(checkpoint), checkpoint)


def fill_with_prefix(prefix_encoder, tensors, source):
    """Fill a PrefixEncoder with the `tensors` of the folder `source`, all of it or ValueError."""
    expected = prefix_encoder.state_dict()
    found_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found_shapes != expected_shapes:
        raise ValueError(
            f"The prefix in {source} does not fit this base model: found {found_shapes}, "
            f"expected {expected_shapes}. It was trained on a model of another size, or with other settings."
        )
    prefix_encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


# ---- checkpoints of a run: written completely or not at all, and told apart from damaged ones
#
# A checkpoint is written as .checkpoint-N.partial, gets checksums.json, goes to the disk, and is then renamed to
# checkpoint-N. One of that name that is there already is .checkpoint-N.replaced for the moment between two renames;
# one that is deleted becomes .checkpoint-N.deleted first. None of the three is ever taken for a checkpoint.


def stage_checkpoint(folder):
    """An empty folder to write a checkpoint into; publish_checkpoint makes it `folder`."""
    staging = hidden(folder, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


@contextlib.contextmanager
def nothing_half_written(folder):
    """Around stage_checkpoint and publish_checkpoint: a failed write leaves nothing behind and says what there is."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        staging = hidden(folder, "partial")
        reason, free = describe_write_error(error, staging)
        shutil.rmtree(staging, ignore_errors=True)
        newest, _ = newest_checkpoint(staging.parent)
        raise OSError(
            f"{folder} could not be written ({reason}{free}). Nothing half written is left. "
            + (f"The newest complete checkpoint is {newest.name}" if newest else "There is no complete checkpoint yet")
            + ". Make room, or let the folder be written to, then run the same command with "
            "--resume_from_checkpoint last."
        ) from error


def describe_write_error(error, folder):
    """(the system's reason, the free space in words) for a write that failed in `folder`."""
    free = ""
    try:
        free = f", {shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
        if not isinstance(error, OSError):  # torch.save does not tell: ask again
            with open(folder / "probe", "wb") as probe:
                probe.write(bytes(1 << 20))
    except OSError as found:
        error = found
    return getattr(error, "strerror", None) or first_line(error), free


def publish_checkpoint(staging, folder):
    """Make a staged checkpoint `folder`, once all of it is on the disk. One of that name stays until then."""
    folder = Path(folder)
    checksums = {}
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        flush_to_disk(file)
        checksums[file.relative_to(staging).as_posix()] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(staging / CHECKSUM_FILE, checksums)
    flush_to_disk(staging / CHECKSUM_FILE)
    flush_to_disk(staging)
    replaced = hidden(folder, "replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    staging.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clear_leftovers(run_folder):
    """Remove what a killed run left half written or half deleted. Not while a run is writing there."""
    for leftover in Path(run_folder).glob(".checkpoint-*"):
        name, _, kind = leftover.name[1:].partition(".")
        if kind == "replaced" and not leftover.with_name(name).exists():
            leftover.rename(leftover.with_name(name))
        elif kind in ("partial", "replaced", "deleted", "divided"):
            shutil.rmtree(leftover, ignore_errors=True)


def rotate_checkpoints(run_folder, limit, newest, best=None):
    """Delete the oldest checkpoints until `limit` are left; never `newest` or the best (`best`, or the link so named)."""
    kept = {Path(path).resolve() for path in (newest, best, Path(run_folder) / "best") if path}
    folders = checkpoints_by_age(run_folder)
    surplus = len(folders) - limit
    for folder in [folder for folder in folders if folder.resolve() not in kept][: max(0, surplus)]:
        deleted = hidden(folder, "deleted")
        folder.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def verify_checkpoint(folder, files=None):
    """ValueError naming file and fault unless a checkpoint, or only `files` of it, is as it was written.

    Without checksums.json (official checkpoints, and those of earlier versions) it is taken as complete if it has
    `files`; by default the prefix, and a trainer_state.json that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    checksums = folder / CHECKSUM_FILE
    if checksums.is_file():
        try:
            expected = {name: (entry["size"], entry["sha256"]) for name, entry in read_json(checksums).items()}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder} is damaged: {CHECKSUM_FILE} cannot be read.") from error
        for name in expected if files is None else expected.keys() & set(files):
            size, sha256 = expected[name]
            file = path_inside(folder, name, checksums)
            if not file.is_file():
                raise ValueError(f"{folder} is damaged: {name} is missing.")
            if file.stat().st_size != size:
                found = file.stat().st_size
                raise ValueError(f"{folder} is damaged: {name} has {found} bytes, but {size} were written.")
            if file_sha256(file) != sha256:
                raise ValueError(f"{folder} is damaged: {name} is not what was written (its sha256 differs).")
        return
    for name in (trained_file(folder), STATE_FILE) if files is None else files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing.")
    if files is None:
        try:
            read_json(folder / STATE_FILE)
        except ValueError as error:
            raise ValueError(f"{folder} is incomplete: {STATE_FILE} cannot be read.") from error


def newest_checkpoint(run_folder, whole=True):
    """(the checkpoint of a run that was written last, what is wrong with each newer one); None where none is valid.

    Valid means that verify_checkpoint finds nothing, or nothing in the trained weights if not `whole`. Steps do not
    tell the newest: checkpoints of an earlier, longer run may lie in the same folder.
    """
    damaged = []
    for folder in reversed(checkpoints_by_age(run_folder)):
        try:
            verify_checkpoint(folder, None if whole else trained_files(folder))
        except (ValueError, OSError) as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def checkpoint_folders(run_folder):
    """The checkpoint-N folders of a run, complete or not, in no order."""
    folders = Path(run_folder).glob("checkpoint-*")
    return [folder for folder in folders if folder.name.removeprefix("checkpoint-").isdecimal() and folder.is_dir()]


def checkpoints_by_age(run_folder):
    """The same in the order in which they were written; last those that cannot tell."""
    return sorted(checkpoint_folders(run_folder), key=lambda folder: (save_number(folder), step_of(folder)))


def step_of(folder):
    return int(folder.name.removeprefix("checkpoint-"))


def save_number(folder):
    """How many checkpoints the run folder had seen when this one was written; 0 in older ones, infinity if unknown."""
    try:
        verify_checkpoint(folder, [SIDECAR_FILE])
        number = read_json(folder / SIDECAR_FILE)["training"]["save_number"]
        if not is_count(number):
            raise ValueError(f"{folder / SIDECAR_FILE}: save_number is no number.")
        return number
    except ValueError:
        return math.inf if (folder / CHECKSUM_FILE).is_file() else 0
    except (OSError, KeyError, TypeError):
        return 0


def next_save_number(run_folder):
    numbers = [save_number(folder) for folder in checkpoint_folders(run_folder)]
    return 1 + max((number for number in numbers if number < math.inf), default=0)


def hidden(folder, kind):
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.{kind}")


def flush_to_disk(path):
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network disks answer for a folder
            raise
    finally:
        os.close(handle)


def file_sha256(file):
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
