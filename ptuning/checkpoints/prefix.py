"""A trained prefix in a checkpoint's folder: written, read, described, put into a model.

Answers to the prefix loading pasted into three of the official scripts. It differs in that all of a prefix is loaded, or
nothing, and that what a file claims is checked.
"""

import json
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from chatglm2 import modeling_chatglm
from chatglm2.bits import SUPPORTED_BITS
from checkpoints.file_names import INDEX_FILES, TENSORS_FILE
from checkpoints.run_folder import check_holds, verify_checkpoint
from checkpoints.sidecar import SIDECAR_FILE, read_sidecar
from checkpoints.weight_files import PREFIX_KEY, check_trained, read_tensors
from common.files import read_json, write_json
from common.messages import dtype_name


def is_prefix_checkpoint(folder):
    """True where `folder` holds a trained prefix and no base model."""
    file = Path(folder) / TENSORS_FILE
    if not file.is_file() or any((Path(folder) / name).is_file() for name in INDEX_FILES):
        return False
    names = [name for name, _ in read_tensors(file)]
    return bool(names) and all(name.startswith(PREFIX_KEY) for name in names)


def save_prefix(
    model: modeling_chatglm.ChatGLMForConditionalGeneration, folder: Path | str, sidecar: dict | None = None
) -> None:
    """Write the prefix checkpoint's own files: pytorch_model.bin, config.json, generation_config.json, sidecar.

    The keys, their full names and float32 are the official ones, so the official code loads it too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = model.transformer.prefix_encoder.state_dict()
    torch.save({PREFIX_KEY + name: tensor.float().cpu() for name, tensor in prefix.items()}, folder / TENSORS_FILE)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    settings["torch_dtype"] = settings.pop("dtype", None) or dtype_name(model.dtype)
    settings["use_cache"] = True  # the Trainer turns it off; a checkpoint that says so generates slowly
    settings["architectures"] = [type(model).__name__]
    write_json(folder / "config.json", settings)
    ids = GenerationConfig(eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id)
    ids.save_pretrained(folder)
    if sidecar is not None:
        write_json(folder / SIDECAR_FILE, sidecar)


def read_prefix(checkpoint: Path | str) -> dict[str, torch.Tensor]:
    """The prefix encoder's tensors in a checkpoint folder, by name without `transformer.prefix_encoder.`.

    Raises FileNotFoundError without a folder or weights (naming the checkpoints beside it), ValueError for
    a file that holds no prefix or is not as it was written.
    """
    checkpoint = Path(checkpoint)
    file = check_holds(checkpoint, TENSORS_FILE)
    verify_checkpoint(checkpoint, [TENSORS_FILE])
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


def read_prefix_settings(checkpoint: Path | str) -> dict:
    """The settings of a prefix checkpoint: pre_seq_len, prefix_projection, quantization_bit and the sidecar's keys.

    The first two are read off the weights, so they hold even without config.json and sidecar.
    """
    checkpoint = Path(checkpoint)
    tensors = read_prefix(checkpoint)
    settings = {}
    config_file = checkpoint / "config.json"
    if config_file.is_file():
        bits = read_json(config_file).get("quantization_bit") or 0
        if bits not in (0, *SUPPORTED_BITS):
            raise ValueError(f"{config_file}: quantization_bit is {bits!r}, expected 4, 8, or 0 for float weights.")
        settings["quantization_bit"] = bits
    settings.update(read_sidecar(checkpoint))
    settings["pre_seq_len"] = tensors["embedding.weight"].shape[0]
    settings["prefix_projection"] = "trans.0.weight" in tensors
    return settings


def load_prefix(model: modeling_chatglm.ChatGLMForConditionalGeneration, checkpoint: Path | str) -> None:
    """Fill the model's prefix encoder from a checkpoint folder, all of it or ValueError.

    Warns where the checkpoint remembers another base model of the same shape.
    """
    fill_prefix_encoder(model.transformer.prefix_encoder, checkpoint)
    warn_of_other_base(model, checkpoint)


def warn_of_other_base(model: nn.Module, checkpoint: Path | str) -> None:
    """Warn where a checkpoint remembers that it was trained on another base model than this one."""
    trained_on = read_sidecar(checkpoint).get("base_fingerprint")
    if trained_on not in (None, getattr(model, "fingerprint", trained_on)):
        warnings.warn(
            f"{checkpoint} was trained on another base model than the one loaded now (fingerprint {trained_on}, "
            f"here {model.fingerprint}). Its answers will be poor; give the model it was trained on.",
            stacklevel=2,
        )


def fill_prefix_encoder(prefix_encoder: nn.Module, checkpoint: Path | str) -> None:
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
