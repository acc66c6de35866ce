"""P-Tuning v2: virtual tokens -> one (key, value) pair per layer and KV group.

Source: Liu et al., "P-Tuning v2", 2021 (https://arxiv.org/abs/2110.07602), and `PrefixEncoder` and
`get_prompt` of the official `modeling_chatglm.py`. Parameter names and layouts are the official ones.
It differs in that the parameters are always float32, and that full multi-head models
(`multi_query_attention: false`) get as many prefix heads as they have KV heads.
"""

import torch
from torch import nn


class PrefixEncoder(nn.Module):
    """The only trainable part. P virtual tokens, L layers, G KV groups, D channels per head.

    Without projection the embedding *is* the prefix: P rows of L * 2 * G * D numbers. With
    `prefix_projection` a two-layer Tanh MLP of width `hidden_size` reparameterizes it.
    """

    rows_at_once = None  # for which dropout is drawn; None: the batch. Batches computed together draw as if alone

    def __init__(self, config):
        super().__init__()
        self.pre_seq_len = config.pre_seq_len
        self.dropout = config.prefix_dropout
        # [key of layer 0, value of layer 0, key of layer 1, …], each (G, D)
        self.shape = (2 * config.num_layers, config.num_key_value_heads, config.kv_channels)
        width = self.shape[0] * self.shape[1] * self.shape[2]
        columns = config.prefix_columns if config.prefix_projection else width
        self.embedding = nn.Embedding(config.pre_seq_len, columns, dtype=torch.float32)
        self.trans = None
        if config.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(columns, config.hidden_size, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(config.hidden_size, width, dtype=torch.float32),
            )

    def reset_parameters(self):
        """Initialize as the official code does: torch's defaults, so the embedding is N(0, 1)."""
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                module.reset_parameters()

    def forward(self, batch_size, dtype):
        """Prefix of every layer: L pairs of key and value, each (B, G, P, D) of `dtype`.

        Dropout (training only) is drawn per row of the batch, before the cast, for `rows_at_once` of them after the
        other.
        """
        prefix = self.embedding.weight  # (P, 2L * G * D), or (P, prefix_columns) for the projection
        if prefix.is_meta:  # offloaded: it is there while its own module computes
            prefix = self.embedding(torch.arange(self.pre_seq_len))
        if self.trans is not None:
            with torch.autocast(prefix.device.type, enabled=False):  # float32 under fp16 training, too
                prefix = self.trans(prefix)
        prefix = prefix.view(self.pre_seq_len, *self.shape).permute(1, 2, 0, 3)  # (2L, G, P, D)
        prefix = prefix.unsqueeze(1)
        if self.training and self.dropout:
            prefix = prefix.expand(-1, batch_size, -1, -1, -1)
            drawn = [
                nn.functional.dropout(rows, self.dropout) for rows in prefix.split(self.rows_at_once or batch_size, 1)
            ]
            prefix = (drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=1)).to(dtype)
        else:  # the rows stay one tensor
            prefix = prefix.to(dtype).expand(-1, batch_size, -1, -1, -1)  # (2L, B, G, P, D)
        return list(zip(prefix[0::2].unbind(), prefix[1::2].unbind(), strict=True))
