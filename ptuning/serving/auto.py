"""Who answers a prompt: the prefix or adapter whose training prompts it is like, or else the base model.

Answers to nothing in the official demos, whose prefix answers everything. What a prompt is like is told by the signature
beside a checkpoint's weights (tuning/signature.py), from what the base's own prefill computes: where the base answers,
that prefill goes on, so its answer is the one it would give alone.
"""

import math
from dataclasses import dataclass

import torch

from tuning.lora import ADAPTER, adapter_layers

AUTO = "auto"  # what is asked for where the prompt decides


class Prompt(list):
    """Token ids of a prompt for the base model, to be answered by it or by one of the models `among`.

    `others` are {model: ids} of those with a text of their own before every prompt.
    """

    def __init__(self, token_ids, among=(), others=None):
        super().__init__(token_ids)
        self.among, self.others = tuple(among), others or {}


def encode_for(before: dict, encode):
    """What encode() gives of the text before the prompts of one model {model: text}; of the base and others, a Prompt."""
    base, *among = before
    token_ids = encode(before[base])
    others = {name: encode(before[name]) for name in among if before[name] != before[base]}
    return Prompt(token_ids, among, others) if among else token_ids


@dataclass(frozen=True)
class Decision:
    """Who answers, and who would be the `other`. `distance` is that of the nearest model: up to 1 a prompt is like its
    training prompts.

    `sure` is from 0, at the border to another decision, to 1, far from it.
    """

    model: str
    other: str
    distance: float
    sure: float


class StateMean:
    """The mean of the hidden states of a prompt, of whose pieces (1, S, H) it is called with each."""

    def __init__(self):
        self.count, self.sum = 0, 0.0

    def __call__(self, hidden):
        self.sum, self.count = self.sum + hidden[0].float().sum(0), self.count + hidden.shape[1]

    @property
    def value(self):
        """(H,) float32."""
        return self.sum / self.count


class AdapterGate:
    """Lets a LoRA adapter beside the weights take part in some rows of a batch only; the others are the base's own.

    Up to `max_rows`. ValueError for an adapter that does more than add to what a layer computes.
    """

    def __init__(self, model, max_rows):
        config = model.peft_config[ADAPTER]
        if config.use_dora or config.bias != "none" or config.modules_to_save:
            raise ValueError(
                "--auto: this adapter (use_dora, bias or modules_to_save) changes the base model itself, which could not "
                "answer beside it. Leave --auto out."
            )
        self.rows = {}  # on each device of the adapter; in place, as CUDA graphs read it there
        for layer in adapter_layers(model):
            matrix = layer.lora_B[ADAPTER]
            device = matrix.weight.device
            if device not in self.rows:
                self.rows[device] = torch.ones(max_rows, 1, 1, device=device)
            matrix.register_forward_hook(
                lambda layer, inputs, output, rows=self.rows[device]: output * rows[: len(output)]
            )

    def open(self, rows: list[bool]):
        """Say of each row that is fed next whether the adapter takes part."""
        for places in self.rows.values():
            places[: len(rows), 0, 0] = torch.tensor(rows, dtype=places.dtype)


def decide(signatures: dict, mean, base: str) -> Decision:
    """The Decision on a prompt of this mean (H,) between {model: its signature} and the base model."""
    distances = {name: signature.distance(mean[None]).item() for name, signature in signatures.items()}
    nearest, *others = sorted(distances, key=distances.get)
    distance = distances[nearest]
    if not distance <= 1:  # also where it is no number
        known = 1 < distance < math.inf
        return Decision(base, nearest, distance if known else 0.0, 1 - 1 / distance if known else 0.0)
    border = min([1.0, *(distances[name] for name in others[:1])])
    return Decision(nearest, base, distance, 1 - distance / border if border else 0.0)
