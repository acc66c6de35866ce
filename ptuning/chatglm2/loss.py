"""The language-model head's loss: cross-entropy of the supervised tokens, a few rows of logits at a time.

Answers to the end of `forward` in the official `modeling_chatglm.py`, which computes the logits of all positions.
Shapes: U supervised tokens, H hidden, V padded vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from chatglm2.gradients import OwnGradient, is_transformed
from chatglm2.matmul import Linear, multiply, round_rows

FLOAT16_SCALE = 1024  # of a gradient that float16 would round to 0: a probability is about 1 / V = 1.5e-5


def loss_rows(device_type: str) -> int:
    """Supervised tokens whose logits exist at a time; 128 take 33 MB in float32, twice. Larger products pay on a GPU."""
    return 128 if device_type == "cpu" else 512


class SupervisedLoss(OwnGradient):
    """Sum of the cross-entropies, float32, of targets (U,) under the logits hidden_states (U, H) @ weight (V, H)ᵀ.

    With `each` it is every one of them, (U,), for a weight that does not train.

    The logits of all U tokens never exist: a few rows at a time are multiplied out, and while they are there their
    gradient, softmax - onehot, is multiplied back into that of the hidden states (and of the weight, if it trains).
    Each logit is thus computed once and kept nowhere. A run of ADGEN with 8 x 78 supervised tokens would otherwise
    hold 162 MB of float32 logits, and as much again twice for log-softmax and gradient.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, each=False):
        count, rows = len(targets), loss_rows(weight.device.type)
        losses = hidden_states.new_zeros(count if each else (), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        assert not (each and ctx.needs_input_grad[1])
        factor = FLOAT16_SCALE if weight.dtype == torch.float16 else 1
        missing = round_rows(count) - count  # filled with zeros, for the products
        hidden_states, targets = F.pad(hidden_states, (0, 0, 0, missing)), F.pad(targets, (0, missing))
        for start in range(0, count, rows):
            hidden, target = hidden_states[start : start + rows], targets[start : start + rows, None]
            filled = slice(min(rows, count - start))
            logits = multiply(hidden, weight).float()  # (rows, V)
            log_odds = logits.log_softmax(dim=-1)
            found = log_odds.gather(1, target)[filled, 0]
            if each:
                losses[start : start + rows] = -found
            else:
                losses -= found.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = torch.exp(log_odds, out=logits)  # softmax
            gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            if factor != 1:
                gradient *= factor
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = multiply(gradient, weight.t())[filled]
            if grad_weight is not None:  # rows that fill up are zeros
                grad_weight += gradient.t() @ hidden  # in autocast's dtype, which addmm_ in place does not take
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.factor = factor
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradient = (gradient[:, None] if gradient.ndim else gradient) / ctx.factor
        grads = (None if saved is None else (saved * gradient).to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None

    @staticmethod
    def by_torch(hidden_states, weight, targets, each=False):
        logits = F.linear(hidden_states, weight).float()
        return F.cross_entropy(logits, targets, reduction="none" if each else "sum")


class OutputLayer(Linear):
    """The language-model head: logits (…, V) of hidden states (…, H) or, with targets (U,), the sum of their losses or
    `each`.

    The loss is computed in this module's own forward because FSDP and DeepSpeed bring the parts of a weight together
    for the module that it belongs to.
    """

    def forward(self, hidden_states, targets=None, each=False):
        if targets is None:
            return super().forward(hidden_states)
        return SupervisedLoss.apply(hidden_states, self.weight, targets, each)


class Packing(NamedTuple):
    """Which tokens of a right-padded batch are computed: all work but attention's is done on those alone.

    They are the tokens up to the last that predicts a label. A row of ADGEN has 129 of them on average, the longest
    of 8 rows 167, so this saves a fifth of the arithmetic, whatever rows meet in a batch.
    """

    places: torch.Tensor  # (tokens,) int64, among the B * S of the batch
    batch_size: int
    length: int  # S

    @classmethod
    def of_targets(cls, targets):
        """The packing of targets (B, S), -100 where not supervised.

        Its number is rounded up, as products like it, by padding behind the rows: nothing looks there.
        """
        predicts = targets != -100
        needed = predicts.flip(1).cummax(1).values.flip(1).flatten()  # from the last predicting token to the left
        count = min(round_rows(int(needed.sum())), needed.numel())
        return cls(needed.int().argsort(descending=True, stable=True)[:count], *targets.shape)

    def pack(self, x):
        """(B, S, ·) -> (tokens, ·)"""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x):
        """(tokens, ·) -> (B, S, ·), with zeros at padding"""
        padded = x.new_zeros(self.batch_size * self.length, x.shape[-1])
        return padded.index_copy(0, self.places, x).view(self.batch_size, self.length, -1)


def next_tokens(labels):
    """The target of each place of labels (B, S): the label one place behind, -100 at the last."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def row_log_probs(hidden_states, targets, output_layer, packing):
    """Log-probability, float32, of each row's targets (B, S), those of -100 left out: (B,).

    Hidden states are the (tokens, H) of a `packing`.
    """
    batch_size, length = targets.shape
    targets = targets.flatten()[packing.places]
    supervised = (targets != -100).nonzero()[:, 0]
    losses = output_layer(hidden_states.index_select(0, supervised), targets[supervised], each=True)
    rows = packing.places[supervised] // length
    return -losses.new_zeros(batch_size).index_add(0, rows, losses)


def supervised_states(hidden_states, targets, packing=None):
    """The hidden states (U, H) that predict a label, of (B, S, H) or with a `packing` (tokens, H), and their targets
    (U,), of (B, S) with -100 elsewhere; row after row."""
    targets, hidden_states = targets.flatten(), hidden_states.flatten(0, -2)
    if packing is not None:
        targets = targets[packing.places]
    if is_transformed():  # how many they are would be a number of these labels
        return hidden_states, targets
    supervised = (targets != -100).nonzero()[:, 0]
    return hidden_states.index_select(0, supervised), targets[supervised]


def supervised_loss(hidden_states, targets, output_layer, num_items_in_batch=None, packing=None):
    """Mean cross-entropy, float32, of predicting targets (B, S) from the hidden states.

    Targets of -100 cost nothing: the (V, H) output layer is applied to the others only. With
    `num_items_in_batch` the sum is divided by it instead of by the number of supervised positions
    here, so that the parts of an accumulated or distributed step add up to one mean. With a `packing`
    the hidden states are (tokens, H).
    """
    hidden_states, targets = supervised_states(hidden_states, targets, packing)
    if isinstance(output_layer, OutputLayer):
        total = output_layer(hidden_states, targets)
    else:  # adapters have taken its place, and know of logits only
        total = F.cross_entropy(output_layer(hidden_states).float(), targets, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (targets != -100).sum() if is_transformed() else len(targets)
    return total / num_items_in_batch
