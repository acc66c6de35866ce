"""Read prompts without answering them: the last hidden states, many rows at once."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

TOKENS_AT_ONCE = 2048  # fed together: bounds the memory of their activations


@torch.no_grad()
def hidden_states(model: nn.Module, prompts: list[list[int]]) -> Iterator[tuple[int, Tensor]]:
    """(index, what the output layer would be given of all its tokens (S, H)) of each prompt (token ids), in no order.

    The model computes as it is, with its prefix or without.
    """
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # equal lengths side by side
    while waiting:
        rows = max(1, TOKENS_AT_ONCE // len(prompts[waiting[-1]]))
        batch, waiting = waiting[-rows:], waiting[:-rows]
        token_ids = torch.zeros(len(batch), max(len(prompts[index]) for index in batch), dtype=torch.int64)
        for row, index in enumerate(batch):  # padded on the right, where causal attention does not look
            token_ids[row, : len(prompts[index])] = torch.tensor(prompts[index])
        hidden = model.transformer(token_ids.to(model.device), use_cache=False, return_dict=True).last_hidden_state
        for row, index in enumerate(batch):
            yield index, hidden[row, : len(prompts[index])]
