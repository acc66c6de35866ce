"""What takes turns on one frozen base model: prefixes and LoRA adapters, put in and taken out; no weight is copied.

Answers to `replace_model` of ChatGLM-Efficient-Tuning. It differs in that prefixes take turns, too, that a policy and its
reward model may be of different kinds, and that what was there is there again behind the block, whatever happened in it.

    start = start_of(model)                       what trains, as it is now: the reference
    reward = load_beside(model, "output/reward")  another checkpoint's prefix or adapter
    with swapped(model, start): …                 the model computes as the reference; BASE: without either
"""

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from chatglm2.prefix_encoder import PrefixEncoder
from checkpoints.prefix import fill_prefix_encoder
from checkpoints.sidecar import read_sidecar
from checkpoints.ways import SWAPPED
from tuning.lora import adapter_layers, add_adapter, read_adapter
from tuning.methods import METHODS, read_settings


@dataclass(frozen=True)
class Adaptation:
    """What is put on a frozen base: a prefix, an adapter, or neither."""

    prefix_encoder: nn.Module | None = None
    adapter: str | None = None  # the name that PEFT knows it by
    values: dict | None = None  # {name of a weight of it: tensor in place of what it has trained to}


BASE = Adaptation()


def adaptation_of(model: nn.Module) -> Adaptation:
    """What a model computes with now."""
    active = [name for layer in adapter_layers(model) for name in layer.active_adapters]
    return Adaptation(model.transformer.prefix_encoder, active[0] if active else None)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: weight} of the prefix or adapter that trains, without a value head."""
    named = model.named_parameters()
    return {name: weight for name, weight in named if weight.requires_grad and not name.startswith("value_head.")}


def start_of(model: nn.Module) -> Adaptation:
    """The prefix or adapter that trains, with the values that it has now."""
    now = adaptation_of(model)
    values = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    return Adaptation(now.prefix_encoder, now.adapter, values)


def load_beside(model: nn.Module, checkpoint: Path | str, name: str = "reward", merged: list = ()) -> Adaptation:
    """The prefix or adapter of a checkpoint folder, frozen, for swapped(); the model computes as before.

    `name` is that of no other adapter in the model; `merged` are the adapters that are merged into its weights.
    ValueError for a checkpoint of another base model, and raises as read_settings.
    """
    checkpoint = Path(checkpoint)
    settings = read_settings([checkpoint])
    trained_on, here = read_sidecar(checkpoint).get("base_fingerprint"), getattr(model, "fingerprint", None)
    if here and trained_on not in (None, here):
        raise ValueError(
            f"{checkpoint} was trained on another base model (fingerprint {trained_on}, here {here}). Give one that was "
            "trained on this base."
        )
    kind = settings["finetuning_type"]
    if METHODS[kind].beside_model:
        config = copy.copy(model.config)
        config.pre_seq_len, config.prefix_projection = settings["pre_seq_len"], settings["prefix_projection"]
        encoder = PrefixEncoder(config)
        fill_prefix_encoder(encoder, checkpoint)
        return Adaptation(encoder.to(model.device).eval().requires_grad_(False))
    if kind not in SWAPPED:
        raise ValueError(f"{checkpoint} was trained with --finetuning_type {kind}; expected {' or '.join(SWAPPED)}.")
    earlier = [str(folder) for folder in settings["checkpoints"][:-1]]
    if earlier != [str(Path(folder).resolve()) for folder in merged]:
        raise ValueError(
            f"{checkpoint} was trained on top of {', '.join(earlier) or 'no other adapter'}, and here "
            f"{', '.join(map(str, merged)) or 'none'} is merged into the base. Give one that was trained on this base."
        )
    trains = {id(weight) for weight in model.parameters() if weight.requires_grad}
    active = {layer: layer.active_adapters for layer in adapter_layers(model)}
    config, tensors = read_adapter(checkpoint)
    config.lora_dropout, config.inference_mode = 0.0, True
    add_adapter(model, config, tensors, checkpoint, name)
    for weight in model.parameters():  # PEFT lets the newest adapter alone train, and be active
        weight.requires_grad_(id(weight) in trains)
    for layer in adapter_layers(model):
        layer._active_adapter = list(active.get(layer, ()))
    return Adaptation(adapter=name)


@contextlib.contextmanager
def swapped(model: nn.Module, adaptation: Adaptation):
    """Inside the block the model computes with what `adaptation` says, and behind it as before.

    What trains keeps its gradients and stays what the optimizer knows. No block stands within another of the same
    values.
    """
    before = model.transformer.prefix_encoder
    layers = [(layer, layer._active_adapter) for layer in adapter_layers(model)]
    active = [adaptation.adapter] if adaptation.adapter else []
    values = adaptation.values or {}
    weights = {name: weight for name, weight in model.named_parameters() if name in values}
    assert weights.keys() == values.keys()

    def exchange():
        for name, weight in weights.items():
            weight.data, values[name] = values[name], weight.data

    model.transformer.prefix_encoder = adaptation.prefix_encoder
    for layer, _ in layers:
        layer._active_adapter = active  # not set_adapter(), which also decides what trains
    exchange()
    try:
        yield
    finally:
        exchange()
        model.transformer.prefix_encoder = before
        for layer, was_active in layers:
            layer._active_adapter = was_active


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Inside the block nothing is dropped."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def untouched(model: nn.Module):
    """Inside the block a model computes as its base, and nothing is dropped."""
    with evaluating(model), swapped(model, BASE):
        yield


def turn_dropout_off(model: nn.Module) -> None:
    """Let nothing be dropped while training: what is compared with a reference must not be drawn."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if model.transformer.prefix_encoder is not None:
        model.transformer.prefix_encoder.dropout = 0.0
    model.config.attention_dropout = 0.0


def fill_values(adaptation: Adaptation, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the values of an adaptation with tensors of the same names and shapes. ValueError for others."""
    expected = {name: tuple(tensor.shape) for name, tensor in adaptation.values.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
        raise ValueError(f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'missing')}")
    for name, tensor in tensors.items():
        adaptation.values[name].copy_(tensor)
