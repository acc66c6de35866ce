"""Answers that the policy gives to prompts, as batches to train on, and what a model says of each of their tokens.

Shapes: B rows, S tokens of prompt and answer, A tokens of the longest answer, U tokens of all answers, H hidden. Rows
are padded on the right, as in training: the numbers from which PPO's ratios are made come from one forward pass of one
shape and dtype, with dropout off, so that the first ratio is exactly 1.
"""

from typing import NamedTuple

import torch

from alignment.ppo import in_rows, token_entropies
from chatglm2.loss import Packing, next_tokens, supervised_states
from data.batches import BLANK_ROW, collate_training
from data.encoding import IGNORED_LABEL


def collate_prompts(features: list[dict], *, pad_token_id: int) -> dict:
    """`input_ids` (B, S) int64 of prompts, padded on the right, `length` (B,) of each, `row` (B,); a blank row's are 0."""
    blank = [feature["row"] == BLANK_ROW["row"] for feature in features]
    prompts = [[] if is_blank else feature["input_ids"] for feature, is_blank in zip(features, blank, strict=True)]
    longest = max(1, *map(len, prompts))
    return {
        "input_ids": torch.tensor([prompt + [pad_token_id] * (longest - len(prompt)) for prompt in prompts]),
        "length": torch.tensor([len(prompt) for prompt in prompts]),
        "row": torch.tensor([feature["row"] for feature in features]),
    }


def prompts_of(batch: dict) -> list[list[int]]:
    """Token ids of the prompts of a batch of collate_prompts; [] for a blank row."""
    return [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), batch["length"].tolist(), strict=True)]


def join_answers(prompts, answers, rows, *, pad_token_id: int) -> dict:
    """`input_ids` and `labels` (B, S) of prompts with their answers, `row` and `lengths` (B,), `mask` (B, A).

    The labels are the answers' tokens, where the mask is True. A blank row, of number 0, is one token.
    """
    features = [
        {"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer, "row": row}
        if row
        else BLANK_ROW
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]
    batch = collate_training(features, pad_token_id=pad_token_id)
    lengths = torch.tensor([max(1, len(prompt + answer)) for prompt, answer in zip(prompts, answers, strict=True)])
    of_answers = torch.tensor([len(answer) for answer in answers])
    mask = torch.arange(max(1, int(of_answers.max()))) < of_answers[:, None]
    return {**batch, "lengths": lengths, "mask": mask}


class Tokens(NamedTuple):
    """What a model says of the tokens of answers, float32 (B, A) each, 0 where `mask` is False."""

    log_probs: torch.Tensor
    values: torch.Tensor | None  # of the place before each token, by the value head; None without one
    entropies: torch.Tensor | None  # of what each token was drawn from, without a gradient; where asked for


def read_tokens(model, input_ids, labels, mask, value_head=None, with_entropy=False) -> Tokens:
    """The Tokens of a batch that join_answers has made, or of a part of its rows. The model is in training mode."""
    targets = next_tokens(labels)
    packing = Packing.of_targets(targets)
    output = model.transformer(input_ids, packing=packing, use_cache=False, return_dict=True)
    hidden_states, targets = supervised_states(output.last_hidden_state, targets, packing)
    log_probs = -model.transformer.output_layer(hidden_states, targets, each=True)
    values = None if value_head is None else in_rows(value_head(hidden_states), mask)
    entropies = in_rows(token_entropies(hidden_states, model.transformer.output_layer), mask) if with_entropy else None
    return Tokens(in_rows(log_probs, mask), values, entropies)
