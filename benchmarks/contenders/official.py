"""The official recipe, restated; official_scripts.py runs the official scripts themselves."""

import torch
import torch.nn.functional as F
from benchmarks.contenders.base import COMMON, MAX_SOURCE, MAX_TARGET, Contender
from torch.utils.checkpoint import checkpoint


class Official(Contender):
    """The official recipe, restated: its operations on our parameters, sequence first as there."""

    fused = False  # transformers 4.30's own AdamW, one parameter after another

    def build(self):
        self.model = self.chatglm()
        if self.settings.quantization_bit:
            from benchmarks.quantization import OfficialLinear

            from chatglm2.quantization import QuantizedLinear

            for module in self.model.modules():
                if isinstance(module, QuantizedLinear):
                    module.__class__ = OfficialLinear

    def rotary_table(self):
        channels = self.sizes["kv_channels"] // 2
        theta = 1.0 / 10000 ** (torch.arange(0, channels, 2, dtype=torch.float32, device=self.device) / channels)
        angles = torch.outer(torch.arange(COMMON["seq_length"], dtype=torch.float32, device=self.device), theta)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).to(self.dtype)

    def rotate(self, x, table):
        length, batch_size, heads, channels = x.shape
        turned, passed = x[..., : channels // 2], x[..., channels // 2 :]
        pairs = turned.reshape(length, batch_size, heads, channels // 4, 2)
        cos, sin = (table[:length].view(length, -1, 1, channels // 4, 2)[..., part] for part in (0, 1))
        turned = torch.stack(
            (pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin), dim=-1
        )
        return torch.cat((turned.flatten(3), passed), dim=-1)

    def norm(self, layer, x):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (layer.weight * (x * torch.rsqrt(variance + layer.eps))).to(x.dtype)

    def block(self, layer, hidden, mask, table, cache):
        heads, groups = self.sizes["num_attention_heads"], COMMON["multi_query_group_num"]
        channels = self.sizes["kv_channels"]
        attention = layer.self_attention
        mixed = attention.query_key_value(self.norm(layer.input_layernorm, hidden))
        query, key, value = mixed.split((heads * channels, groups * channels, groups * channels), dim=-1)
        query, key, value = (x.view(*x.shape[:2], -1, channels) for x in (query, key, value))
        query, key = self.rotate(query, table), self.rotate(key, table)
        key, value = torch.cat((cache[0], key)), torch.cat((cache[1], value))
        cache = (key, value)
        key, value = (
            x.unsqueeze(-2).expand(-1, -1, -1, heads // groups, -1).contiguous().view(*x.shape[:2], heads, channels)
            for x in (key, value)
        )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, None if mask is None else ~mask)
        context = context.permute(2, 0, 1, 3).reshape(hidden.shape[0], hidden.shape[1], heads * channels)
        hidden = hidden + F.dropout(attention.dense(context), 0.0, layer.training)
        gate, value = layer.mlp.dense_h_to_4h(self.norm(layer.post_attention_layernorm, hidden)).chunk(2, dim=-1)
        update = layer.mlp.dense_4h_to_h(F.silu(gate) * value)
        return hidden + F.dropout(update, 0.0, layer.training), cache

    def prompt(self, batch_size):
        """The prefix of every layer, (2, P, B, G, D)."""
        encoder = self.model.transformer.prefix_encoder
        tokens = torch.arange(encoder.pre_seq_len, device=self.device)[None].expand(batch_size, -1)
        prefix = encoder.embedding(tokens).to(self.dtype).view(batch_size, encoder.pre_seq_len, *encoder.shape)
        return torch.nn.functional.dropout(prefix, 0.1, encoder.training).permute(2, 1, 0, 3, 4).split(2)

    def mask(self, batch_size, length):
        causal = torch.ones(batch_size, length, length, device=self.device).tril_()
        seen = torch.ones(batch_size, length, self.settings.pre_seq_len, device=self.device)
        return (torch.cat((seen, causal), dim=-1) < 0.5).unsqueeze_(1)

    def blocks(self, input_ids, mask, caches, start=0):
        training = self.model.training
        hidden = self.model.transformer.embedding(input_ids).transpose(0, 1).contiguous()
        hidden.requires_grad_(training)  # enable_input_require_grads
        table = self.rotary_table()[None, start : start + input_ids.shape[1]].transpose(0, 1).contiguous()
        grown = []
        for layer, cache in zip(self.model.transformer.encoder.layers, caches, strict=True):
            if training:
                hidden, _ = checkpoint(self.block, layer, hidden, mask, table, cache, use_reentrant=True)
            else:
                hidden, cache = self.block(layer, hidden, mask, table, cache)
                grown.append(cache)
        return self.norm(self.model.transformer.encoder.final_layernorm, hidden), grown

    def loss(self, batch):
        length = MAX_SOURCE + MAX_TARGET + 1
        rows = [(row["input_ids"], row["labels"], length - len(row["input_ids"])) for row in batch]
        input_ids = torch.tensor([ids + [0] * padding for ids, _, padding in rows], device=self.device)
        labels = torch.tensor([labels + [-100] * padding for _, labels, padding in rows], device=self.device)
        mask = self.mask(len(batch), length)
        hidden, _ = self.blocks(input_ids, mask, self.prompt(len(batch)))
        logits = self.model.transformer.output_layer(hidden).transpose(0, 1).contiguous().to(torch.float32)
        shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        loss = torch.nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1))
        logits.to(hidden.dtype)  # returned, though nothing reads it
        return loss.to(hidden.dtype)

    def generate(self, prompts):
        tokens = torch.tensor(prompts, device=self.device)
        mask, caches = self.mask(*tokens.shape), self.prompt(len(prompts))
        answers, start = [], 0
        for _ in range(self.settings.new_tokens):
            hidden, caches = self.blocks(tokens, mask, caches, start)
            start, mask = start + tokens.shape[1], None
            tokens = self.model.transformer.output_layer(hidden[-1:]).transpose(0, 1)[:, -1].argmax(-1, keepdim=True)
            answers.append(tokens)
        return torch.cat(answers, dim=1)
