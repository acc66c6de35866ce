"""freeze: which weights of the model train, and a checkpoint of them."""

import re
from pathlib import Path

import torch

from checkpoints.weight_files import PREFIX_FILE, check_trained, read_tensors

FREEZE_MODULES = {"mlp": "mlp", "qkv": "self_attention.query_key_value"}


def check_layers(num_layer_trainable, num_layers):
    """ValueError where a model has not that many layers."""
    if abs(num_layer_trainable or 0) > num_layers:
        raise ValueError(
            f"--num_layer_trainable {num_layer_trainable}: this base model has {num_layers} layers. "
            "--finetuning_type full trains all weights."
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
