"""The first ChatGLM-6B: the transformer of chatglm2/ with other positions, another view of the prompt and other blocks.

Answers to the official `modeling_chatglm.py` of ChatGLM-6B. Numbers are the same; names of parameters are those of
chatglm2/, and weight_names.py has the official ones. A row reads

    prompt … [gMASK] <sop> answer … <eop>

- The prompt, `[gMASK]` included, is its context: all tokens of the row see all of it, the others what stands before them.
- A token has two positions, each of which turns one half of a head: its place in the context and 0, or behind the
  context that of `[gMASK]` and a count from 1.
- The norms are LayerNorm, the MLP is GELU; a residual is what its norm has returned, times √(2 · 28).

The prefix stands before the context, without a position, seen by all.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from chatglm1.configuration_chatglm import ChatGLMConfig
from chatglm2 import modeling_chatglm as chatglm2
from chatglm2.gradients import OwnGradient, is_transformed
from chatglm2.matmul import Linear
from chatglm2.modeling_chatglm import rotary_frequencies

# Marks that the model's answer to Chinese text has in their narrow form, and what is shown beside a Chinese character.
MARKS = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
# √(2 L) of the 28 layers of ChatGLM-6B; the official code takes it with any number of layers.
RESIDUAL_FACTOR = 56**0.5
CHINESE = ("\u4e00", "\u9fff")


def rotary_cos_sin(position_ids, config, dtype):
    """Cosines and sines for both positions `position_ids` (B, 2, S): two tensors (B, 1, S, 2, D/4) of `dtype`.

    As officially the frequencies are numbers of float16, and in half precision so are the angles: the published weights
    have learned with these.
    """
    frequencies = rotary_frequencies(config.kv_channels, position_ids.device).half().float()
    angles = position_ids.transpose(1, 2)[:, None, :, :, None].float() * frequencies
    if dtype != torch.float32:
        angles = angles.half().float()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """x (B, N, S, D) with each half of a head turned: channel i of its first quarter together with i of its second."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, N, S, 2, D/4) each
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


class Rotary(OwnGradient):
    """`rotate`, whose gradient is the rotation back: keeps nothing of x."""

    by_torch = staticmethod(rotate)

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return rotate(gradient, cos, -sin), None, None


class SelfAttention(chatglm2.SelfAttention):
    rotation = Rotary


class MLP(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.ffn_hidden_size, bias=True)
        self.dense_4h_to_h = Linear(config.ffn_hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden_states):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class GLMBlock(chatglm2.GLMBlock):
    attention_class, mlp_class = SelfAttention, MLP

    def residual_add(self, hidden_states, normed, update):
        return normed * RESIDUAL_FACTOR + update


def two_positions(ordinals, contexts, marks):
    """Both positions (B, 2, S) of the tokens with these `ordinals` (1 or B, S), counted from 0 in each row.

    `contexts` (B, 1) are the tokens of a row's context, `marks` (B, 1) the ordinal of its `[gMASK]`.
    """
    ordinals, contexts, marks = torch.broadcast_tensors(ordinals, contexts, marks)
    behind = ordinals - contexts
    return torch.stack((torch.where(behind < 0, ordinals, marks), (behind + 1).clamp(min=0)), dim=1)


class ChatGLMModel(chatglm2.ChatGLMModel):
    """Token ids (B, S) -> final hidden states (B, S, H)."""

    config_class = ChatGLMConfig
    block_class = GLMBlock
    rotary_cos_sin = staticmethod(rotary_cos_sin)

    def locate(self, inputs, attention_mask, position_ids, past_key_values, past_tokens):
        """Both positions of each token (B, 2, S), and the number of those fed that all see (B,).

        `position_ids` (B, S) count the tokens of each row; a row then says by its ids where its context ends, and a cache
        remembers it. They may be both positions as well; those of the context and of left padding have 0 as the second.

        Raises ValueError for rows to answer without `<sop>`, or without a `[gMASK]` or `[MASK]`.
        """
        if position_ids is None or position_ids.dim() == 2:
            position_ids = self.find_positions(inputs, attention_mask, position_ids, past_key_values, past_tokens)
        return position_ids, (position_ids[:, 1] == 0).sum(-1) if position_ids.shape[2] > 1 else None

    def find_positions(self, input_ids, attention_mask, ordinals, past_key_values, past_tokens):
        if input_ids.is_floating_point():
            raise ValueError(
                "inputs_embeds do not say where a prompt of ChatGLM-6B ends. Give input_ids, or position_ids (rows, 2, tokens)."
            )
        length = input_ids.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            ordinals = (attention_mask.long().cumsum(-1) - 1)[:, -length:]
        elif ordinals is None:
            ordinals = torch.arange(past_tokens, past_tokens + length, device=input_ids.device)[None]
        if past_tokens == 0:
            ends = self.find_context(input_ids, ordinals, past_key_values is not None)
            if past_key_values is not None:
                past_key_values.context_and_mark = ends
        else:
            ends = getattr(past_key_values, "context_and_mark", None)
            if ends is None:
                raise ValueError("This cache was not filled by ChatGLM-6B: it does not know where its prompts end.")
        positions = two_positions(ordinals.clamp(min=0), *ends)
        return positions.masked_fill((ordinals < 0)[:, None], 0)  # left padding

    def find_context(self, input_ids, ordinals, is_answered):
        """For each row the tokens of its context and the ordinal of the mark in it, (B, 1) each.

        A row that is not answered may lack them, as one that only fills up a batch: it is all context.
        """
        config = self.config
        ends, marks, others = (
            input_ids == token for token in (config.bos_token_id, config.gmask_token_id, config.mask_token_id)
        )
        marks = torch.where(marks.any(1, keepdim=True), marks, others)
        whole = ~(ends.any(1) & marks.any(1))
        if is_answered and not is_transformed() and bool(whole.any()):
            raise ValueError(
                f"A row has no [gMASK] <sop> (ids {config.gmask_token_id}, {config.bos_token_id}), behind which ChatGLM-6B "
                "answers. Let the tokenizer add them: add_special_tokens=True."
            )
        ordinals = ordinals.expand_as(input_ids)
        context, mark = (ordinals.gather(1, found.int().argmax(1, keepdim=True)) for found in (ends, marks))
        return context.masked_fill(whole[:, None], input_ids.shape[1]), mark


class ChatGLMForConditionalGeneration(chatglm2.ChatGLMForConditionalGeneration):
    """ChatGLM-6B with its language-model head, its prefix encoder, and the official chat methods."""

    config_class = ChatGLMConfig
    model_class = ChatGLMModel
    continues_caches = False  # a prompt is seen from its end, too

    def prompt_length(self, token_ids):
        """Up to `<sop>`, which a prompt ends with; all of a row without it."""
        end = self.config.bos_token_id
        return token_ids.index(end) + 1 if end in token_ids else len(token_ids)

    @staticmethod
    def place(ordinals, prompt_lengths):
        """Both positions of tokens with these `ordinals` (1 or B, S); the prompts end with `[gMASK] <sop>`."""
        return two_positions(ordinals, prompt_lengths - 1, prompt_lengths - 2)

    def process_response(self, response):
        response = super().process_response(response)
        return "".join(
            MARKS[mark] if mark in MARKS and beside_chinese(response, place) else mark
            for place, mark in enumerate(response)
        )

    def build_stream_inputs(self, tokenizer, query, history=None):
        raise ValueError(
            "stream_chat: ChatGLM-6B sees a whole prompt at once, so past_key_values of an earlier one cannot be used. "
            "Give the history alone."
        )


def beside_chinese(text, place):
    return any(
        CHINESE[0] <= neighbour <= CHINESE[1] for neighbour in (text[place - 1 : place], text[place + 1 : place + 2])
    )
