"""The value head: one number of a hidden state, float32; made, read, written.

Answers to the `v_head` of ChatGLM-Efficient-Tuning, whose file it reads and writes: `value_head.bin` with summary.weight
(1, H) and summary.bias (1). It differs in that it reads the hidden states behind the last norm, which have the same
size in every model, and in what trains: summary.weight = weight / scale, with the power of two that is nearest to √H,
so that a step moves a value by about the learning rate times √H, and one rate serves prefix, adapter and head.
"""

import contextlib
import math
from pathlib import Path

import torch
from torch import nn

from checkpoints.file_names import VALUE_HEAD_FILE
from checkpoints.run_folder import verify_checkpoint
from checkpoints.sidecar import read_sidecar
from checkpoints.weight_files import check_trained, read_tensors

KEYS = ("summary.weight", "summary.bias")
OTHER_PREFIX = "v_head."  # before these keys, in files of its later versions


class ValueHead(nn.Module):
    """Hidden states (…, H) -> values (…), in float32 whatever the model computes in.

    `before_norm`: it reads what comes before the model's last norm, as heads of ChatGLM-Efficient-Tuning do.
    """

    def __init__(self, hidden_size: int, before_norm: bool = False):
        super().__init__()
        self.before_norm = before_norm
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))  # every value is 0 at first
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    @property
    def scale(self):
        return 2.0 ** round(math.log2(len(self.weight)) / 2)  # by which float32 is divided without rounding

    def forward(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return hidden_states.float() @ (self.weight / self.scale) + self.bias

    @contextlib.contextmanager
    def reading(self, model):
        """Inside the block the hidden states of a model are those that this head reads."""
        encoder = model.transformer.encoder
        norm = encoder.final_layernorm
        if self.before_norm:
            encoder.final_layernorm = None
        try:
            yield
        finally:
            encoder.final_layernorm = norm


def save_value_head(head: ValueHead, folder: Path | str) -> None:
    """Write value_head.bin into the folder of a checkpoint."""
    weight = head.weight.detach().cpu() / head.scale
    torch.save(dict(zip(KEYS, (weight[None], head.bias.detach().cpu()), strict=True)), Path(folder) / VALUE_HEAD_FILE)


def has_value_head(checkpoint: Path | str) -> bool:
    """True for the checkpoint of a reward model, or of a policy with its critic."""
    return (Path(checkpoint) / VALUE_HEAD_FILE).is_file()


def read_value_head(checkpoint: Path | str, hidden_size: int) -> ValueHead:
    """The value head in a checkpoint folder, of these or of ChatGLM-Efficient-Tuning.

    FileNotFoundError without one; ValueError for one that is not as it was written, or of a model of another size.
    """
    file = Path(checkpoint) / VALUE_HEAD_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{checkpoint} is no reward model: there is no {VALUE_HEAD_FILE} in it. Train one with --stage rm."
        )
    verify_checkpoint(checkpoint, [VALUE_HEAD_FILE])
    tensors = {name.removeprefix(OTHER_PREFIX): tensor for name, tensor in read_tensors(file)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = dict(zip(KEYS, ((1, hidden_size), (1,)), strict=True))
    if found != expected:
        raise ValueError(
            f"{file} does not fit this base model: found {found}, expected {expected}. It is the value head of a model "
            "of another size, or no value head."
        )
    for name, tensor in tensors.items():
        check_trained(tensor, name, file)
    sidecar = read_sidecar(checkpoint)
    head = ValueHead(hidden_size, before_norm=sidecar.get("value_head_before_norm", "stage" not in sidecar))
    with torch.no_grad():
        head.weight.copy_(tensors[KEYS[0]][0].float() * head.scale)
        head.bias.copy_(tensors[KEYS[1]].float())
    return head


def fill_value_head(head: ValueHead, checkpoint: Path | str) -> None:
    """Fill a value head that trains from a checkpoint folder; raises as read_value_head."""
    head.load_state_dict(read_value_head(checkpoint, len(head.weight)).state_dict())
