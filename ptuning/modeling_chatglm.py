"""ChatGLM2: the transformer, the language-model head and its loss, hooks for generate(), chat.

Answers to the official `modeling_chatglm.py`. Parameter names and numbers are the same; it differs in
that tensors are batch-first inside, attention goes through `scaled_dot_product_attention` without
expanding the KV groups, the cache is a transformers `Cache`, and with labels the vocabulary-wide
logits are computed for supervised positions only.

Shapes: B batch, S query tokens, P prefix tokens, T = P + past + S keys, L layers, H hidden (4096),
N query heads (32), G KV groups (2), R = N / G, D head channels (128), F feed-forward (13696),
V padded vocabulary (65024). The figures are ChatGLM2-6B's.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from configuration_chatglm import ChatGLMConfig
from prefix_encoder import PrefixEncoder
from tokenization_chatglm import ChatGLMTokenizer

ROPE_BASE = 10000
TRAINING_DATE = "[[训练时间]]"  # written by the official model where its training date belongs
TOP_K = 50  # the official code samples through generate(), whose default this was in transformers 4


def rotary_cos_sin(position_ids, head_channels, dtype):
    """Cosines and sines for `position_ids` (B, S): two tensors (B, 1, S, D/4) of `dtype`.

    ChatGLM2 rotates only the first half of a head, so D/2 channels make D/4 pairs.
    """
    rotary_channels = head_channels // 2
    exponents = torch.arange(0, rotary_channels, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[:, None, :, None].float() * ROPE_BASE ** (-exponents / rotary_channels)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x, cos, sin):
    """Rotate interleaved pairs (0, 1), (2, 3), … in the first half of the channels of x (B, heads, S, D)."""
    rotated, passed = x.chunk(2, dim=-1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, passed), dim=-1)


def attend_mask(query_length, key_length, first_slot, padding_mask, device):
    """Which keys a query may see: bool, (1 or B, 1, S, T), or None where every query sees every key.

    Query i sits in slot `first_slot` + i of the cache and sees all slots up to its own. `padding_mask`
    (B, at most T; True for real tokens, the prefix included) hides left padding.
    """
    mask = None
    if query_length > 1 or first_slot + query_length < key_length:
        slots = torch.arange(key_length, device=device)
        queries = torch.arange(first_slot, first_slot + query_length, device=device)
        mask = (slots[None, :] <= queries[:, None])[None, None]
    if padding_mask is not None:
        padding_mask = F.pad(padding_mask, (0, key_length - padding_mask.shape[1]))[:, None, None, :]
        mask = padding_mask if mask is None else mask & padding_mask
    return mask


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32, returned in the dtype of its weight."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        normed = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 (`rmsnorm: false`), returned in the dtype of its weight."""

    def forward(self, hidden_states):
        normed = F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(self.weight.dtype)


def make_norm(config):
    return (RMSNorm if config.rmsnorm else LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


class SelfAttention(nn.Module):
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
        self.query_key_value = nn.Linear(
            config.hidden_size, qkv_width, bias=config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def split_heads(self, mixed):
        """The projection (B, S, ·) as query (B, N, S, D), key and value (B, G, S, D)."""
        batch_size, query_length, _ = mixed.shape
        if self.multi_query:  # all queries, then all keys, then all values
            mixed = mixed.view(batch_size, query_length, -1, self.head_channels).transpose(1, 2)
            return mixed.split((self.num_heads, self.num_groups, self.num_groups), dim=1)
        # query, key and value side by side within each head
        mixed = mixed.view(batch_size, query_length, self.num_heads, 3 * self.head_channels)
        return mixed.transpose(1, 2).chunk(3, dim=-1)

    def forward(self, hidden_states, mask, cos, sin, prefix, past_key_values):
        batch_size, query_length, _ = hidden_states.shape
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if prefix is not None:  # not rotated: the prefix has no positions
            key, value = torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)

        # The R query heads of a group share their keys, so they are laid end to end as R * S queries of
        # one head: the KV groups need no expansion, and any attention kernel takes the shape.
        repeats = self.num_heads // self.num_groups
        query = query.reshape(batch_size, self.num_groups, repeats * query_length, self.head_channels)
        if mask is not None:
            mask = mask.repeat(1, 1, repeats, 1)
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )  # (B, G, R * S, D)
        context = context.view(batch_size, self.num_heads, query_length, self.head_channels)
        return self.dense(context.transpose(1, 2).flatten(2))  # (B, S, H)


class MLP(nn.Module):
    """SwiGLU: gate and value come out of one projection to 2F channels."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states):
        gate, value = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * value)


class GLMBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_index):
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.dropout = config.hidden_dropout
        self.input_layernorm = make_norm(config)
        self.self_attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def residual_add(self, hidden_states, normed, update):
        residual = normed if self.residual_after_norm else hidden_states
        return residual + F.dropout(update, self.dropout, self.training)

    def forward(self, hidden_states, mask, cos, sin, prefix, past_key_values=None):
        normed = self.input_layernorm(hidden_states)
        update = self.self_attention(normed, mask, cos, sin, prefix, past_key_values)
        hidden_states = self.residual_add(hidden_states, normed, update)
        normed = self.post_attention_layernorm(hidden_states)
        return self.residual_add(hidden_states, normed, self.mlp(normed))


class GLMTransformer(nn.Module):
    """The blocks and, with `post_layer_norm`, the final norm."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = make_norm(config) if config.post_layer_norm else None

    def forward(self, hidden_states, mask, cos, sin, prefixes, past_key_values):
        for layer, prefix in zip(self.layers, prefixes, strict=True):
            hidden_states = layer(hidden_states, mask, cos, sin, prefix, past_key_values=past_key_values)
        return hidden_states if self.final_layernorm is None else self.final_layernorm(hidden_states)


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fp32_residual_connection = config.fp32_residual_connection
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        embeddings = self.word_embeddings(input_ids)
        return embeddings.float() if self.fp32_residual_connection else embeddings


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["prefix_encoder"]
    # The official checkpoints store the rotary frequencies; here they are computed from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PrefixEncoder):  # visited after its children
            module.reset_parameters()


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Token ids (B, S) -> final hidden states (B, S, H)."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config)
        # Lies here and not beside the transformer, because the official parameter names say so.
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.prefix_encoder = PrefixEncoder(config) if config.pre_seq_len else None
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
        **kwargs,
    ):
        """Run the blocks.

        `input_ids` (B, S) int64; `attention_mask` (B, past + S), 1 for real tokens, never with the prefix in
        it, None where nothing is padded or padding is on the right; `position_ids` (B, S) int64, by default
        counted from 0 after the prefix; `past_key_values` a transformers `Cache`, which holds the prefix in
        its first P slots. Returns `last_hidden_state` (B, S, H) and the cache.

        Raises ValueError for more tokens than the configuration's `seq_length`.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, query_length, _ = hidden_states.shape
        if query_length > self.config.seq_length:
            raise ValueError(
                f"{query_length} tokens in one sequence, but the model was made for {self.config.seq_length} "
                "(seq_length of its config.json). Shorten the input."
            )

        # The prefix enters once per sequence: in front of an empty cache, or at every call without one.
        prefix_length = 0 if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len
        past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        prefixes = [None] * self.config.num_layers
        first_slot = past_length  # slot of the first query token among the keys
        if prefix_length and past_length == 0:
            prefixes = self.prefix_encoder(batch_size, self.dtype_of_blocks)
            first_slot = prefix_length
        key_length = first_slot + query_length
        if past_key_values is not None and past_key_values.is_compileable:  # a static cache is all there at once
            key_length = past_key_values.get_mask_sizes(query_length, 0)[0]

        if position_ids is None:
            start = first_slot - prefix_length
            position_ids = torch.arange(start, start + query_length, device=hidden_states.device)[None]
        cos, sin = rotary_cos_sin(position_ids, self.config.kv_channels, self.dtype_of_blocks)
        padding_mask = None
        if attention_mask is not None:
            padding_mask = F.pad(attention_mask.bool(), (prefix_length, 0), value=True)
        mask = attend_mask(query_length, key_length, first_slot, padding_mask, hidden_states.device)

        hidden_states = self.encoder(hidden_states, mask, cos, sin, prefixes, past_key_values)
        output = BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    @property
    def dtype_of_blocks(self):
        """The dtype activations have between the norms and the projections."""
        return self.encoder.layers[0].input_layernorm.weight.dtype


def supervised_loss(hidden_states, labels, output_layer, num_items_in_batch=None):
    """Mean cross-entropy, float32, of predicting labels (B, S) from the hidden states one place before.

    Positions labelled -100 cost nothing: the (V, H) output layer is applied to the others only. With
    `num_items_in_batch` the sum is divided by it instead of by the number of supervised positions
    here, so that the parts of an accumulated or distributed step add up to one mean.
    """
    targets = labels[:, 1:]
    supervised = targets != -100
    logits = output_layer(hidden_states[:, :-1][supervised]).float()  # (supervised tokens, V)
    targets = targets[supervised]
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def unknown_token_ids(tokenizer, config):
    """Ids of the padded vocabulary that the tokenizer has no token for, None where there are none."""
    return list(range(tokenizer.vocab_size, config.padded_vocab_size)) or None


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM2 with its language-model head, its prefix encoder, and the official chat methods."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.transformer.output_layer

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
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits and, with labels, the loss.

        Arguments as in ChatGLMModel; `labels` (B, S) int64, aligned with `input_ids` (the shift by one
        happens here), -100 where not supervised; `logits_to_keep` last positions to compute logits for,
        0 for all. Returns CausalLMOutputWithPast with `loss` float32 (), `logits` float32 (B, S, V).
        While training with labels, `logits` is None: nothing needs them and they are the largest tensor.
        """
        output = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        hidden_states = output.last_hidden_state
        output_layer = self.transformer.output_layer
        loss = logits = None
        if labels is not None:
            loss = supervised_loss(hidden_states, labels, output_layer, num_items_in_batch)
        if not (self.training and labels is not None):
            logits = output_layer(hidden_states[:, -logits_to_keep:]).float()
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)
        return output.to_tuple() if return_dict is False else output

    # generate(): the prefix takes slots in the cache that generate() does not know of.

    @property
    def prefix_length(self):
        prefix_encoder = self.transformer.prefix_encoder
        return 0 if prefix_encoder is None else prefix_encoder.pre_seq_len

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + self.prefix_length
        )

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, is_first_iteration=False, **kwargs
    ):
        # A continued cache counts the prefix among the tokens that need not be fed again.
        continued = past_key_values is not None and int(past_key_values.get_seq_length()) > 0
        if is_first_iteration and next_sequence_length is not None and continued:
            next_sequence_length += self.prefix_length
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        return attention_mask  # the 2D mask: forward adds the prefix and the causal part

    # Chat: the official signatures, defaults and returns.

    def process_response(self, response):
        return response.strip().replace(TRAINING_DATE, "2023年")

    def limit_length(self, max_length):
        """`max_length` (prompt and answer), cut to what the model was made for."""
        return min(max_length, self.config.seq_length)

    @torch.inference_mode()
    def chat(
        self,
        tokenizer,
        query,
        history=None,
        max_length=8192,
        num_beams=1,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        **kwargs,
    ):
        """Answer `query`: (response, history with the new turn). `max_length` counts prompt and answer."""
        history = history or []
        inputs = tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt").to(self.device)
        sampling = {"top_p": top_p, "temperature": temperature, "top_k": TOP_K} if do_sample else {}
        output = self.generate(
            **inputs,
            max_length=self.limit_length(max_length),
            num_beams=num_beams,
            do_sample=do_sample,
            logits_processor=logits_processor,
            suppress_tokens=unknown_token_ids(tokenizer, self.config),
            **sampling,
            **kwargs,
        )
        response = self.process_response(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist()))
        return response, [*history, (query, response)]

    @torch.inference_mode()
    def stream_chat(
        self,
        tokenizer,
        query,
        history=None,
        past_key_values=None,
        max_length=8192,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        return_past_key_values=False,
        **kwargs,
    ):
        """Yield the growing answer: (response, history) or (response, history, past_key_values).

        With `return_past_key_values` the cache that comes back holds the whole conversation; given as
        `past_key_values` with the returned history, the next turn feeds its question only. A text that ends
        in half a character is held back until the character is whole.
        """
        history = history or []
        if past_key_values is not None and history:
            # The cache lacks only the blank line that ends the last answer, and the new turn.
            turn = "\n\n" + tokenizer.build_turn(query, len(history) + 1)
            token_ids = tokenizer.encode(turn, add_special_tokens=False)
            if tokenizer.convert_ids_to_tokens(token_ids[0]) == "▁":  # SentencePiece's mark for a new text
                token_ids = token_ids[1:]
        else:
            token_ids = tokenizer.encode(tokenizer.build_prompt(query, history))
        processors = LogitsProcessorList(logits_processor or [])
        if unknown := unknown_token_ids(tokenizer, self.config):
            processors.append(SuppressTokensLogitsProcessor(unknown, device=self.device))
        if do_sample:
            processors.append(TemperatureLogitsWarper(float(temperature)))
            processors.append(TopKLogitsWarper(TOP_K))
            processors.append(TopPLogitsWarper(float(top_p)))

        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        input_ids = torch.tensor([token_ids], device=self.device)
        response_ids = []
        for token_id in self.stream_tokens(input_ids, past_key_values, processors, max_length, do_sample, **kwargs):
            response_ids.append(token_id)
            response = tokenizer.decode(response_ids)
            if not response or response.endswith("\ufffd"):
                continue
            response = self.process_response(response)
            result = response, [*history, (query, response)]
            yield (*result, past_key_values) if return_past_key_values else result

    def stream_tokens(self, input_ids, past_key_values, processors, max_length, do_sample, max_new_tokens=None):
        """Yield the ids that follow `input_ids` (1, S) and what the cache holds, up to the end of sequence.

        `max_length` counts the tokens in the cache (not the prefix), the input and the answer.
        """
        past_length = max(0, int(past_key_values.get_seq_length()) - self.prefix_length)
        room = self.limit_length(max_length) - past_length - input_ids.shape[1]
        if room < 1:
            raise ValueError(
                f"The conversation has {past_length + input_ids.shape[1]} tokens, which leaves no room for an answer "
                f"within max_length {self.limit_length(max_length)}. Raise max_length or shorten the history."
            )
        if max_new_tokens is not None:
            room = min(room, max_new_tokens)
        next_ids = input_ids
        for _ in range(room):
            output = self(next_ids, past_key_values=past_key_values, use_cache=True, logits_to_keep=1)
            scores = processors(input_ids, output.logits[:, -1])
            next_ids = scores.softmax(-1).multinomial(1) if do_sample else scores.argmax(-1, keepdim=True)  # (1, 1)
            if next_ids.item() == self.config.eos_token_id:
                return
            input_ids = torch.cat((input_ids, next_ids), dim=1)
            yield next_ids.item()


AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)
