"""The ChatGLM2 model: token ids -> hidden states -> logits or the loss.

Answers to the official `modeling_chatglm.py`. Parameter names and numbers are the same; it differs in
that tensors are batch-first inside, attention (attention.py) expands neither mask nor KV groups
where the kernel allows it, and the cache is a transformers `Cache`. While training, nothing is computed for
right padding except inside attention, the vocabulary-wide logits exist for supervised positions only and
for a few of them at a time, and less is kept for backward; see `Packing`, `SupervisedLoss`, `SwiGLU`, `Rotary`.

Shapes: B batch, S query tokens, P prefix tokens, T = P + past + S keys, L layers, H hidden (4096),
N query heads (32), G KV groups (2), R = N / G, D head channels (128), F feed-forward (13696),
V padded vocabulary (65024), U supervised tokens. The figures are ChatGLM2-6B's.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chatglm2.attention import DecodeStep, attend, attend_showing, make_mask, mask_numbers
from chatglm2.chat import ChatMethods
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.gradients import OwnGradient, is_transformed
from chatglm2.kernels import kernels_for, rotate, swiglu, swiglu_backward
from chatglm2.loss import OutputLayer, Packing, next_tokens, supervised_loss
from chatglm2.matmul import Linear
from chatglm2.norms import AddNorm, RMSNorm, make_norm
from chatglm2.prefix_encoder import PrefixEncoder
from chatglm2.prefix_generation import PrefixGeneration
from chatglm2.quantization import choose_backend, prepare_quantized_, quantize_model_, use_backend_

ROPE_BASE = 10000


def rotary_frequencies(head_channels: int, device=None, base=ROPE_BASE) -> torch.Tensor:
    """Radians per position of every pair of channels (D/4), float32."""
    rotary_channels = head_channels // 2
    return base ** (-torch.arange(0, rotary_channels, 2, device=device, dtype=torch.float32) / rotary_channels)


def rotary_cos_sin(position_ids, config, dtype):
    """Cosines and sines for `position_ids` (B, S): two tensors (B, 1, S, D/4) of `dtype`.

    ChatGLM2 rotates only the first half of a head, so D/2 channels make D/4 pairs.
    """
    frequencies = rotary_frequencies(config.kv_channels, position_ids.device, ROPE_BASE * config.rope_base_factor)
    angles = position_ids[:, None, :, None].float() / config.rope_position_divisor * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Rotary(OwnGradient):
    """`rotate`, whose gradient is the rotation back: keeps nothing of x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (kernels_for(x).rotate or rotate)(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return (kernels_for(gradient).rotate or rotate)(gradient, cos, sin, back=True), None, None

    @staticmethod
    def by_torch(x, cos, sin):
        rotated, kept = x.chunk(2, dim=-1)
        even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return torch.cat((turned.flatten(-2), kept), dim=-1)


class SelfAttention(nn.Module):
    rotation = Rotary

    def __init__(self, config, layer_index):
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.head_channels = config.kv_channels
        self.multi_query = config.multi_query_attention
        self.dropout = config.attention_dropout
        width = self.num_heads * self.head_channels
        qkv_width = width + 2 * self.num_groups * self.head_channels
        self.query_key_value = Linear(config.hidden_size, qkv_width, bias=config.add_bias_linear or config.add_qkv_bias)
        self.dense = Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def split_heads(self, mixed):
        """The projection (B, S, ·) as queries and keys (B, N + G, S, D), which are rotated, and values (B, G, S, D)."""
        batch_size, query_length, _ = mixed.shape
        if self.multi_query:  # all queries, then all keys, then all values
            mixed = mixed.view(batch_size, query_length, -1, self.head_channels).transpose(1, 2)
            return mixed.split((self.num_heads + self.num_groups, self.num_groups), dim=1)
        # query, key and value side by side within each head
        mixed = mixed.view(batch_size, query_length, self.num_heads, 3 * self.head_channels)
        query, key, value = mixed.transpose(1, 2).chunk(3, dim=-1)
        return torch.cat((query, key), dim=1), value

    def forward(self, hidden_states, mask, cos, sin, prefix_key, prefix_value, past_key_values, packing, attentions):
        mixed = self.query_key_value(hidden_states)
        if isinstance(mask, DecodeStep):
            return self.dense(mask.attend(mixed, cos, sin, self.layer_index))
        query_key, value = self.split_heads(mixed if packing is None else packing.unpack(mixed))
        query, key = self.rotation.apply(query_key, cos, sin).split((self.num_heads, self.num_groups), dim=1)
        if prefix_key is not None:  # not rotated: the prefix has no positions
            key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        dropout = self.dropout if self.training else 0.0
        if attentions is None:
            context = attend(query, key, value, mask, dropout)
        else:
            context, shown = attend_showing(query, key, value, mask, dropout)
            attentions.append(shown)
        context = context.transpose(1, 2).flatten(2)  # (B, S, N * D)
        return self.dense(context if packing is None else packing.pack(context))


class SwiGLU(OwnGradient):
    """silu(gate) * value of (…, 2F), computed again for backward: keeps 2F numbers a token instead of 3F."""

    @staticmethod
    def forward(ctx, gate_value):
        ctx.save_for_backward(gate_value)
        return (kernels_for(gate_value).swiglu or swiglu)(gate_value)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (gate_value,) = ctx.saved_tensors
        return (kernels_for(gradient).swiglu_backward or swiglu_backward)(gradient, gate_value)

    @staticmethod
    def by_torch(gate_value):
        gate, value = gate_value.chunk(2, dim=-1)
        return F.silu(gate) * value


class MLP(nn.Module):
    """SwiGLU: gate and value come out of one projection to 2F channels."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states):
        return self.dense_4h_to_h(SwiGLU.apply(self.dense_h_to_4h(hidden_states)))


class GLMBlock(GradientCheckpointingLayer):
    attention_class, mlp_class = SelfAttention, MLP

    def __init__(self, config, layer_index):
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.dropout = config.hidden_dropout
        self.input_layernorm = make_norm(config)
        self.self_attention = self.attention_class(config, layer_index)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = self.mlp_class(config)

    def residual_add(self, hidden_states, normed, update):
        residual = normed if self.residual_after_norm else hidden_states
        return residual + F.dropout(update, self.dropout, self.training)

    def fuses(self, hidden_states, update):
        """True where AddNorm takes the place of the first residual_add() and the norm behind it."""
        norm, kernels = self.post_attention_layernorm, kernels_for(hidden_states)
        return (
            kernels.add_norm is not None
            and kernels.add_norm_backward is not None
            and isinstance(norm, RMSNorm)
            and not (self.residual_after_norm or norm.weight.requires_grad or (self.dropout and self.training))
            and hidden_states.dtype == update.dtype == norm.weight.dtype
            and norm.weight.device == hidden_states.device  # else offloaded: it is there while its own module computes
        )

    # The prefix is two arguments, because a re-entrant checkpoint sees only tensors that are arguments themselves.
    def forward(
        self,
        hidden_states,
        mask,
        cos,
        sin,
        prefix_key,
        prefix_value,
        packing=None,
        attentions=None,
        past_key_values=None,
    ):
        normed = self.input_layernorm(hidden_states)
        update = self.self_attention(
            normed, mask, cos, sin, prefix_key, prefix_value, past_key_values, packing, attentions=attentions
        )
        norm = self.post_attention_layernorm
        if self.fuses(hidden_states, update):
            hidden_states, normed = AddNorm.apply(hidden_states, update, norm.weight, norm.eps)
        else:
            hidden_states = self.residual_add(hidden_states, normed, update)
            normed = norm(hidden_states)
        return self.residual_add(hidden_states, normed, self.mlp(normed))


class GLMTransformer(nn.Module):
    """The blocks and, with `post_layer_norm`, the final norm."""

    def __init__(self, config, block_class=GLMBlock):
        super().__init__()
        self.layers = nn.ModuleList(block_class(config, index) for index in range(config.num_layers))
        self.final_layernorm = make_norm(config) if config.post_layer_norm else None

    def forward(
        self, hidden_states, mask, cos, sin, prefixes, past_key_values, packing=None, inner_states=None, attentions=None
    ):
        """The last hidden states of as many layers as there are `prefixes`. Those of every layer are appended to `inner_states`, the probabilities to `attentions`."""
        for layer, prefix in zip(self.layers[: len(prefixes)], prefixes, strict=True):
            if inner_states is not None:
                inner_states.append(hidden_states)
            hidden_states = layer(
                hidden_states, mask, cos, sin, *prefix, packing, attentions=attentions, past_key_values=past_key_values
            )
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        if inner_states is not None:
            inner_states.append(hidden_states)
        return hidden_states


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fp32_residual_connection = config.fp32_residual_connection
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        embeddings = self.word_embeddings(input_ids)
        return embeddings.float() if self.fp32_residual_connection else embeddings


def check_positions(position_ids, attention_mask):
    """ValueError where rows do not hold one text each, from its first token on: every token sees all before it."""
    if position_ids.dim() != 2:
        return  # both positions of a ChatGLM-6B, whose caller knows what a token sees
    counted = position_ids.diff(dim=1) == 1
    if attention_mask is None:
        right = counted.all() and not position_ids[:, 0].any()
    else:
        right = (counted | ~(attention_mask[:, 1:] & attention_mask[:, :-1]).bool()).all()
    if not right:
        raise ValueError(
            "position_ids do not count the tokens of each row from 0, as where several texts share a row, or a row is "
            "shared by processes (padding-free batches, context or sequence parallelism). Give one whole text a row."
        )


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _supports_sdpa = True
    # The official checkpoints store the rotary frequencies; here they are computed from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PrefixEncoder):  # visited after its children
            module.reset_parameters()

    def enable_input_require_grads(self):
        """Let gradients reach the embeddings, for adapters; nothing while a prefix trains, which enters every block.

        Gradient checkpointing asks for this, and it would run backward on below the first prefix.
        """
        if not any(weight.requires_grad for name, weight in self.named_parameters() if "prefix_encoder" in name):
            super().enable_input_require_grads()

    def get_encoder(self, modality=None):
        return self  # the stack of that name is no encoder that generate() could run first


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Token ids (B, S) -> final hidden states (B, S, H)."""

    block_class = GLMBlock
    rotary_cos_sin = staticmethod(rotary_cos_sin)

    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config, self.block_class)
        # Lies here and not beside the transformer, because the official parameter names say so.
        self.output_layer = OutputLayer(config.hidden_size, config.padded_vocab_size, bias=False)
        self.prefix_encoder = None
        if config.pre_seq_len:  # as official: the prefix alone trains
            self.requires_grad_(False)
            self.prefix_encoder = PrefixEncoder(config)
            self._keep_in_fp32_modules_strict = ["prefix_encoder"]
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value):
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
        packing=None,
        step=None,
        **kwargs,
    ):
        """Run the blocks.

        `input_ids` (B, S) int64; `attention_mask` (B, past + S), 1 for real tokens, never with the prefix in
        it, None where nothing is padded or padding is on the right; `position_ids` (B, S) int64, by default
        counted from 0 after the prefix; `past_key_values` a transformers `Cache`, which holds the prefix in
        its first P slots. Returns `last_hidden_state` (B, S, H) and the cache; with a `packing` of right-padded
        rows, `last_hidden_state` (tokens, H) of its tokens. A `step` of decoding attends by itself. Where asked for,
        `hidden_states` are those before each block and the last, `attentions` the probabilities (B, N, S, T), for which
        attention is computed plainly.

        Raises ValueError for no rows, no tokens and more tokens than the configuration's `seq_length`, for masks that
        are not (B, past + S), and while training for positions that do not count one text a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"Give input_ids or inputs_embeds, found {'none' if input_ids is None else 'both'}.")
        if isinstance(past_key_values, tuple | list):  # as in the official code
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, expected a Cache of transformers such as "
                "DynamicCache(), which forward() gives back."
            )
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        attentions = [] if (config.output_attentions if output_attentions is None else output_attentions) else None
        inner_states = (
            [] if (config.output_hidden_states if output_hidden_states is None else output_hidden_states) else None
        )
        if past_key_values is not None and self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "A cache stays empty while gradient checkpointing computes the blocks again. Call model.eval() before "
                "generate(), or give it use_cache=False."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        (batch_size, query_length), device = inputs.shape[:2], inputs.device
        if not is_transformed() and 0 in (batch_size, query_length):
            raise ValueError(
                f"The input_ids have the shape ({batch_size}, {query_length}), expected a row and a token at least. "
                "Leave empty batches out."
            )
        if query_length > self.config.seq_length:
            raise ValueError(
                f"{query_length} tokens in one sequence, but the model was made for {self.config.seq_length} "
                "(seq_length of its config.json). Shorten the input."
            )

        # The prefix enters once per sequence: in front of an empty cache, or at every call without one.
        prefix_length = 0 if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(past_length, torch.Tensor):  # of a static cache
            past_length = int(past_length)
        prefixes = [(None, None)] * self.config.num_layers
        first_slot = past_length  # slot of the first query token among the keys
        if prefix_length and past_length == 0:
            prefixes = self.prefix_encoder(batch_size, self.dtype_of_blocks)[: self.config.num_layers]
            first_slot = prefix_length
        key_length = first_slot + query_length
        if past_key_values is not None and past_key_values.is_compileable:  # a static cache is all there at once
            key_length = past_key_values.get_mask_sizes(query_length, 0)[0]

        if self.training and position_ids is not None and past_length == 0 and not is_transformed():
            check_positions(position_ids, attention_mask)
        position_ids, contexts = self.locate(
            inputs, attention_mask, position_ids, past_key_values, first_slot - prefix_length
        )
        cos, sin = self.rotary_cos_sin(position_ids, self.config, self.dtype_of_blocks)
        padding_mask = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask has {attention_mask.dim()} dimensions, expected the two of (rows, tokens), with 1 for "
                    "tokens and 0 for padding: what a token sees is decided here."
                )
            missing = first_slot + query_length - attention_mask.shape[1]
            if missing != prefix_length and (missing or not past_length):  # PEFT's prefix takes the place of this one
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns, expected "
                    f"{first_slot - prefix_length + query_length}: one for each token that is fed or in the cache, none for "
                    "the prefix."
                )
            padding_mask = F.pad(attention_mask.bool(), (missing, 0), value=True)
        repeats = self.config.num_attention_heads // self.config.num_key_value_heads
        dropout = self.config.attention_dropout if self.training else 0.0
        shape = query_length, key_length, first_slot, padding_mask, repeats
        contexts = None if contexts is None else contexts + first_slot
        if step is not None:
            mask = step
        elif attentions is None:
            mask = make_mask(*shape, dropout, self.dtype_of_blocks, device, contexts)  # once for all layers
        else:
            mask = mask_numbers(*shape, self.dtype_of_blocks, device, contexts)

        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if packing is not None:
            hidden_states = packing.pack(hidden_states)
        hidden_states = self.encoder(
            hidden_states, mask, cos, sin, prefixes, past_key_values, packing, inner_states, attentions
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=inner_states and tuple(inner_states),
            attentions=attentions and tuple(attentions),
        )
        return output if return_dict else output.to_tuple()

    def locate(self, inputs, attention_mask, position_ids, past_key_values, past_tokens):
        """(position ids, the first of the tokens fed that all see, (B,), or None) of `inputs` behind `past_tokens`."""
        if position_ids is None:
            position_ids = torch.arange(past_tokens, past_tokens + inputs.shape[1], device=inputs.device)[None]
        return position_ids, None

    @property
    def dtype_of_blocks(self):
        """The dtype activations have between the norms and the projections."""
        return self.encoder.layers[0].input_layernorm.weight.dtype


class ChatGLMForConditionalGeneration(ChatMethods, PrefixGeneration, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM2 with its language-model head, its prefix encoder, and the official chat methods (chat.py)."""

    model_class = ChatGLMModel
    family = "chatglm2"  # of a configuration that names none; one that is saved says it
    # A function of the model, input ids, labels, num_items_in_batch and what else a batch holds: its loss is then the one
    # of training, and what it computes with is its own business.
    own_loss = None
    # Of a model that is spread over several devices: where its inputs go, and where each layer computes.
    first_device, layer_devices = None, ()

    def __init__(self, config, empty_init=True, device=None):
        """The official constructor: integer layers where `quantization_bit` asks for them; only a prefix trains.

        `device` is where the weights are made. They are random numbers whatever `empty_init` says.
        """
        config.model_family = config.model_family or self.family
        super().__init__(config)
        # The Trainer smooths labels that are shifted in the classes listed here only.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("chatglm", "ChatGLMForConditionalGeneration")
        with torch.device(device) if device is not None else contextlib.nullcontext():
            self.transformer = self.model_class(config)
        if config.quantization_bit:
            unfilled = self.device.type == "meta"
            (prepare_quantized_ if unfilled else quantize_model_)(self, config.quantization_bit)
        self.post_init()

    def quantize(self, bits, empty_init=False, device=None):
        """Quantize the linear layers in place to 4 or 8 bits, as official; the model itself.

        0 changes nothing, and neither does the width that the weights have already. `device` is where the model goes
        first; the integers are made of its weights, whatever `empty_init` says.
        """
        already = self.config.quantization_bit
        if device is not None:
            self.to(device)
        if bits in (0, None) or bits == already:
            return self
        quantize_model_(self, bits)
        self.config.quantization_bit = bits
        use_backend_(self, choose_backend("auto", self.device, bits, self.transformer.dtype_of_blocks))
        return self

    @property
    def device(self):
        """Where the model takes its inputs."""
        return self.first_device or super().device

    @property
    def devices(self):
        """The devices that the layers compute on, each once."""
        return list(dict.fromkeys(self.layer_devices)) or [self.device]

    def get_output_embeddings(self):
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings):
        if type(new_embeddings) is torch.nn.Linear:  # as resize_token_embeddings makes it
            new_embeddings.__class__ = OutputLayer
        self.transformer.output_layer = new_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits and, with labels, the loss.

        Arguments as in ChatGLMModel; `labels` (B, S) int64, aligned with `input_ids` (the shift by one
        happens here), -100 where not supervised; `shift_labels` replace them, and are shifted already;
        `logits_to_keep` last positions to compute logits for, 0 for all, or their indices. Returns CausalLMOutputWithPast with `loss` float32 (), `logits` float32 (B, S, V).
        While training with labels, `logits` is None: nothing needs them and they are the largest tensor.
        """
        if self.own_loss is not None and self.training and labels is not None:
            return CausalLMOutputWithPast(loss=self.own_loss(self, input_ids, labels, num_items_in_batch, **kwargs))
        # No parameter: the Trainer waits in vain for every label that the signature names.
        shift_labels = kwargs.pop("shift_labels", None)
        targets = next_tokens(labels) if shift_labels is None and labels is not None else shift_labels
        only_loss = self.training and targets is not None
        unchecked = not self.transformer.training and not is_transformed()  # it looks at them itself while it trains
        if unchecked and targets is not None and position_ids is not None and past_key_values is None:
            check_positions(position_ids, attention_mask)
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        whole = use_cache or output_attentions or output_hidden_states or attention_mask is not None
        packing = Packing.of_targets(targets) if only_loss and not (whole or is_transformed()) else None
        output = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            True,
            output_attentions,
            output_hidden_states,
            packing,
            **kwargs,
        )
        hidden_states = output.last_hidden_state
        output_layer = self.transformer.output_layer
        loss = logits = None
        if targets is not None:
            targets = targets.to(hidden_states.device)
            loss = supervised_loss(hidden_states, targets, output_layer, num_items_in_batch, packing)
        if not only_loss:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = output_layer(hidden_states[:, kept]).float()
        output = CausalLMOutputWithPast(loss, logits, output.past_key_values, output.hidden_states, output.attentions)
        return output if return_dict else output.to_tuple()
