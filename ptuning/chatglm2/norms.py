"""The norms between the blocks, in float32 whatever the dtype of the activations.

Answers to `RMSNorm` of the official `modeling_chatglm.py`; it differs in that few passes are made and little is kept for
backward. The shape legend is that of modeling_chatglm.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from chatglm2.gradients import OwnGradient
from chatglm2.kernels import kernels_for


class NormProduct(OwnGradient):
    """RMSNorm in float32, in few passes: keeps its input and one number a token.

    y = w n with n = r x and r = (mean x² + eps)^-½, so that dx = r (g - n mean(g n)) with g = w dy, and dw = Σ dy n.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).mul_(weight).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, scale, weight = ctx.saved_tensors
        normed, gradient = x * scale, gradient.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * weight
        along = (gradient * normed).mean(-1, keepdim=True)
        return gradient.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None

    @staticmethod
    def by_torch(x, weight, eps):
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(weight.dtype)


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32, returned in the dtype of its weight."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype:  # one kernel, float32 inside
            return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.eps)
        return NormProduct.apply(hidden_states, self.weight, self.eps)


class AddNorm(OwnGradient):
    """x + update (…, H) and its RMSNorm, by the fused kernel of a GPU; without a gradient for the norm's weight."""

    @staticmethod
    def forward(ctx, x, update, weight, eps):
        total, normed, scale = kernels_for(x).add_norm(x, update, weight, eps)
        ctx.save_for_backward(total, scale, weight)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_normed):
        gradient = kernels_for(grad_total).add_norm_backward(grad_total, grad_normed, *ctx.saved_tensors)
        return gradient, gradient, None, None


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 (`rmsnorm: false`), returned in the dtype of its weight."""

    def forward(self, hidden_states):
        normed = F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(self.weight.dtype)


def make_norm(config):
    return (RMSNorm if config.rmsnorm else LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)
