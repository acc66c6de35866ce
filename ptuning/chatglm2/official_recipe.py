"""The training recipe of the official scripts, number for number, for whoever wants to reproduce one of their runs.

`--precision official`: the frozen weights and every activation and gradient of theirs are float16, and nothing scales
the loss. What belongs to the recipe and is done otherwise elsewhere in this project:

- the prefix is cast to float16 first, then dropped out, one draw for each row, token, layer, group and channel in
  this order;
- operations, their order and their layout (tokens first) are those of the official model, with autograd's own
  gradients and logits for every position;
- the loss is the mean over the supervised tokens of one batch, rounded to float16; an accumulated step is the mean of
  its batches' losses, several processes the mean of theirs;
- batches are padded to max_source_length + max_target_length + 1;
- AdamW is the one transformers 4.30 brought along: eps is added before the bias correction, so that what a small
  gradient moves is up to 30 times less in the first steps.

What is left to today's libraries: the order of the rows, and the last step of an epoch, which here takes what is left
of it. Evaluation and prediction are the project's own.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from chatglm2.attention import leave_out_cudnn
from chatglm2.modeling_chatglm import RMSNorm, rotary_cos_sin


def prefix_in_official_order(prefix_encoder, batch_size, dtype, training):
    """[key of layer 0, value of layer 0, key of layer 1, …], each (P, B, G, D)."""
    tokens = torch.arange(prefix_encoder.pre_seq_len, device=prefix_encoder.embedding.weight.device)
    prefix = prefix_encoder.embedding(tokens.expand(batch_size, -1))  # (B, P, 2L * G * D)
    if prefix_encoder.trans is not None:
        prefix = prefix_encoder.trans(prefix)
    prefix = prefix.to(dtype).view(batch_size, prefix_encoder.pre_seq_len, *prefix_encoder.shape)
    prefix = F.dropout(prefix, prefix_encoder.dropout, training)
    return prefix.permute(2, 1, 0, 3, 4).unbind()


def norm(layer, x):
    """x (S, B, H) through an RMSNorm or LayerNorm: the mean in float32, the result in the dtype of x."""
    if not isinstance(layer, RMSNorm):
        return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    scaled = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + layer.eps)  # float32
    return (layer.weight * scaled).to(x.dtype)


def rotated(x, cos, sin):
    """x (S, B, heads, D) with the pairs of the first half of its channels turned; cos and sin (S, 1, 1, D/4)."""
    turning, passed = x.chunk(2, dim=-1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((turned.flatten(-2), passed), dim=-1)


def attention(layer, x, mask, cos, sin, prefix_key, prefix_value):
    """x (S, B, H) -> (S, B, H); `mask` (1, 1, S, P + S) is True where a query may look."""
    repeats = layer.num_heads // layer.num_groups
    mixed = layer.query_key_value(x)
    if layer.multi_query:
        widths = [heads * layer.head_channels for heads in (layer.num_heads, layer.num_groups, layer.num_groups)]
        query, key, value = (part.unflatten(-1, (-1, layer.head_channels)) for part in mixed.split(widths, dim=-1))
    else:
        query, key, value = mixed.unflatten(-1, (layer.num_heads, -1)).chunk(3, dim=-1)
    key = torch.cat((prefix_key, rotated(key, cos, sin)))  # (P + S, B, G, D)
    value = torch.cat((prefix_value, value))
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (rotated(query, cos, sin), key, value))
    context = F.scaled_dot_product_attention(query, key, value, mask)  # (B, N, S, D)
    return layer.dense(context.permute(2, 0, 1, 3).flatten(2))


def block(layer, x, mask, cos, sin, prefix_key, prefix_value):
    """x (S, B, H) -> (S, B, H) through one GLMBlock; prefix_key and prefix_value are (P, B, G, D)."""
    normed = norm(layer.input_layernorm, x)
    update = attention(layer.self_attention, normed, mask, cos, sin, prefix_key, prefix_value)
    x = (normed if layer.residual_after_norm else x) + F.dropout(update, layer.dropout, layer.training)
    normed = norm(layer.post_attention_layernorm, x)
    gate, value = layer.mlp.dense_h_to_4h(normed).chunk(2, dim=-1)
    update = layer.mlp.dense_4h_to_h(F.silu(gate) * value)
    return (normed if layer.residual_after_norm else x) + F.dropout(update, layer.dropout, layer.training)


def official_loss(model, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The loss of a batch in the official recipe: a scalar in the dtype of the frozen weights.

    `input_ids` and `labels` are (B, S); labels of -100 cost nothing. It is the mean of its batch in any case.
    """
    transformer = model.transformer
    batch_size, length = input_ids.shape
    dtype = transformer.dtype_of_blocks
    leave_out_cudnn(input_ids.device)
    prefix = prefix_in_official_order(transformer.prefix_encoder, batch_size, dtype, model.training)
    prefix_length = prefix[0].shape[0]
    positions = torch.arange(length, device=input_ids.device)
    cos, sin = (table[0, 0, :, None, None] for table in rotary_cos_sin(positions[None], transformer.config, dtype))
    mask = torch.ones(length, prefix_length + length, dtype=torch.bool, device=input_ids.device)
    mask = mask.tril(diagonal=prefix_length)[None, None]
    x = transformer.embedding(input_ids).transpose(0, 1).contiguous()  # (S, B, H)
    for layer, key, value in zip(transformer.encoder.layers, prefix[0::2], prefix[1::2], strict=True):
        if layer.gradient_checkpointing and model.training:
            x = checkpoint(block, layer, x, mask, cos, sin, key, value, use_reentrant=False)
        else:
            x = block(layer, x, mask, cos, sin, key, value)
    if transformer.encoder.final_layernorm is not None:
        x = norm(transformer.encoder.final_layernorm, x)
    logits = transformer.output_layer(x).transpose(0, 1).contiguous().float()  # (B, S, V)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss.to(dtype)


class OfficialAdamW(torch.optim.Optimizer):
    """AdamW as in transformers 4.30, `optim="adamw_hf"`."""

    def __init__(self, model, args):
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for name, weight in named if not name.endswith("bias")]},
            {"params": [weight for name, weight in named if name.endswith("bias")], "weight_decay": 0.0},
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        super().__init__([group for group in groups if group["params"]], settings | {"weight_decay": args.weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                state["step"] += 1
                mean, mean_square = state["exp_avg"], state["exp_avg_sq"]
                mean.mul_(first).add_(weight.grad, alpha=1 - first)
                mean_square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                correction = math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
                weight.addcdiv_(mean, mean_square.sqrt().add_(group["eps"]), value=-group["lr"] * correction)
                if group["weight_decay"]:
                    weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
