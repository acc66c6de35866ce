"""How likely a model takes given texts to be: many at once, right padding that changes nothing, each input read once.

Answers to `model(**inputs, return_last_logit=True)` of the official evaluation, which reads one token of each row.
"""

import torch
from torch import nn

from chatglm2.reading import hidden_states

SCORED_AT_ONCE = 128  # tokens: bounds the memory of their logits, 33 MB of ChatGLM2 in float32


@torch.no_grad()
def log_likelihoods(model: nn.Module, pairs: list, num_known: int, progress=None) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, True where every token is the likeliest) of each (context, continuation), both token ids.

    Neither may be empty. Probabilities are over the first `num_known` tokens of the vocabulary, in float32. Pairs that
    differ in their last token only are computed as one. `progress()` is called for each input that has been read.
    """
    readers = {}  # an input -> (place of a pair, its context's length, its continuation)
    for place, (context, continuation) in enumerate(pairs):
        assert context and continuation
        fed = (*context, *continuation[:-1])
        readers.setdefault(fed, []).append((place, len(context), continuation))
    found = [None] * len(pairs)
    inputs = list(readers)
    for index, hidden in hidden_states(model, [list(fed) for fed in inputs]):
        for place, start, continuation in readers[inputs[index]]:
            found[place] = score(model, hidden[start - 1 :], continuation, num_known)
        if progress:
            progress()
    return found


def score(model, hidden, continuation, num_known):
    """(log-likelihood, all likeliest) of a continuation whose tokens follow those of `hidden` (S, H)."""
    total, likeliest = 0.0, True
    for start in range(0, len(continuation), SCORED_AT_ONCE):
        logits = model.transformer.output_layer(hidden[start : start + SCORED_AT_ONCE])[:, :num_known].float()
        following = torch.tensor(continuation[start : start + SCORED_AT_ONCE], device=logits.device)
        total += logits.log_softmax(-1).gather(1, following[:, None]).double().sum().item()
        likeliest = likeliest and bool((logits.argmax(-1) == following).all())
    return total, likeliest


@torch.no_grad()
def next_logits(model: nn.Module, prompts: list[list[int]], token_ids: list[int]) -> torch.Tensor:
    """Logits (N, len(token_ids)) float32 of these tokens behind each prompt, on the CPU."""
    rows = [None] * len(prompts)
    for index, hidden in hidden_states(model, prompts):
        rows[index] = model.transformer.output_layer(hidden[-1:])[0, token_ids].float().cpu()
    return torch.stack(rows)
