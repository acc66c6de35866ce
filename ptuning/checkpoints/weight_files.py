"""Files of weights: what is in them, memory-mapped.

Answers to the `torch.load` of the official scripts. It differs in that pickles are read with `weights_only`, so that no
code in a file is run, and that what a file claims is checked before it is believed.
"""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from chatglm1.weight_names import official_name
from chatglm2.quantization import dequantize_weight
from checkpoints.file_names import weight_files
from common.claims import ZIP_MARK, check_claim, check_safetensors, check_torch_file
from common.messages import first_line

PREFIX_KEY = "transformer.prefix_encoder."
# Differs between any two base models, and is the same in their float, int8 and int4 folders.
FINGERPRINT_TENSOR = "transformer.encoder.layers.0.input_layernorm.weight"
FINGERPRINT_TENSORS = (FINGERPRINT_TENSOR, official_name(FINGERPRINT_TENSOR))  # with the names of each model's files
# Stored as integers in some int4 folders of the first ChatGLM-6B, and read as floats.
EMBEDDINGS = ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight")
# Copied with a model, beside its weights. Python files are there for the official code, and never run here.
COPIED = (
    "generation_config.json tokenizer.model ice_text.model tokenizer_config.json special_tokens_map.json "
    "configuration_chatglm.py modeling_chatglm.py tokenization_chatglm.py quantization.py *LICENSE*"
).split()


def read_tensors(file: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
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
        except Exception as error:  # bytes at random make safetensors raise anything
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


def read_model(folder: Path | str, own_name, bits: int, dtype: torch.dtype) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield (file, name, tensor) of each tensor of a model that is not computed here.

    `own_name(stored)` is the name that a stored tensor has in the model, None for one that is computed. Embeddings that
    are stored as integers of `bits`, not 0, come as floats of `dtype`.
    """
    integers = {}
    for file in weight_files(folder):
        for stored_name, tensor in read_tensors(file):
            name = own_name(stored_name)
            embedding = (name or "").removesuffix("_scale")
            if bits and embedding in EMBEDDINGS and (tensor.dtype == torch.int8 or name != embedding):
                parts = integers.setdefault(embedding, {})
                parts[name] = tensor
                if len(parts) < 2:
                    continue
                weight, scale = parts[embedding], parts[embedding + "_scale"]
                check_finite(scale, embedding + "_scale", file)
                if weight.ndim != 2 or scale.shape != weight.shape[:1]:
                    raise ValueError(
                        f"{file}: {embedding} is {tuple(weight.shape)} of int8 with a scale {tuple(scale.shape)}, "
                        f"which are no weights of {bits} bits (quantization_bit of its config.json)."
                    )
                name, tensor = embedding, dequantize_weight(weight, scale, bits, dtype)
            if name is not None:
                yield file, name, tensor


def claim_too_large(file, size):
    """Why a torch file of `size` bytes could not be read, if a tensor in it claims more; it is not read for that."""
    try:
        for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
            if tensor.untyped_storage().nbytes() > size:
                return f"{name} claims {tensor.untyped_storage().nbytes():,} bytes, and the file has {size:,}"
    except Exception:  # it has another fault
        return None


def stored_dtype(folder: Path | str) -> torch.dtype:
    """Dtype of the float weights in a model folder."""
    for file in weight_files(folder):
        for name, tensor in read_tensors(file):
            if name in FINGERPRINT_TENSORS:
                return tensor.dtype
    raise ValueError(f"{folder} has no {FINGERPRINT_TENSOR}. Is it the complete folder of a ChatGLM2 model?")


def check_tensor(tensor: torch.Tensor, name: str, expected: torch.Tensor, file: Path | str) -> None:
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


def check_trained(tensor: torch.Tensor, name: str, file: Path | str) -> None:
    """Raise ValueError for a tensor that no training can have written: empty, of integers, or not finite."""
    if tensor.ndim == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected float numbers.")
    check_finite(tensor, name, file)
