"""Answers as batches to train on, and what a model says of their tokens: equal to whole logits, row by row."""

import pytest
import torch
from conftest import synthetic_model

from alignment.rollouts import collate_prompts, join_answers, prompts_of, read_tokens

PROMPTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13]]
ANSWERS = [[20, 21], [22, 23, 24, 25, 26], [], [27]]
ROWS = [3, 1, 0, 2]


@pytest.fixture(scope="module")
def model():
    return synthetic_model().train()


@pytest.fixture
def batch():
    return join_answers(PROMPTS, ANSWERS, ROWS, pad_token_id=0)


def head(hidden_states):
    return hidden_states.sum(-1)


def read(model, batch, **how):
    return read_tokens(model, batch["input_ids"], batch["labels"], batch["mask"], **how)


def test_a_batch_of_prompts_gives_them_back_and_nothing_for_a_blank_row():
    features = [{"input_ids": prompt or [0], "row": row} for prompt, row in zip(PROMPTS, ROWS, strict=True)]
    batch = collate_prompts(features, pad_token_id=0)
    assert prompts_of(batch) == PROMPTS
    assert batch["row"].tolist() == ROWS


def test_answers_are_labelled_and_prompts_are_not(batch):
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 8)
    assert batch["labels"][1].tolist() == [-100, 22, 23, 24, 25, 26, -100, -100]
    assert batch["input_ids"][1].tolist() == [8, 22, 23, 24, 25, 26, 0, 0]
    assert batch["mask"].sum(1).tolist() == [2, 5, 0, 1]
    assert batch["lengths"].tolist() == [5, 6, 1, 6]


def test_what_is_read_of_a_token_is_that_of_its_row_alone_by_all_logits(model, batch):
    tokens = read(model, batch, value_head=head, with_entropy=True)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        if not answer:
            continue
        ids = torch.tensor([prompt + answer])
        hidden = model.transformer(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        odds = model.transformer.output_layer(hidden).log_softmax(-1)
        expected = odds[range(len(answer)), answer], head(hidden), -(odds.exp() * odds).sum(-1)
        for found, wanted in zip(tokens, expected, strict=True):
            torch.testing.assert_close(found[row, : len(answer)], wanted, rtol=1e-5, atol=1e-5)
            assert not found[row, len(answer) :].any()


def test_a_part_of_the_rows_reads_as_the_whole_batch(model, batch):
    whole = read(model, batch, value_head=head)
    part = read(model, {name: tensor[2:] for name, tensor in batch.items()}, value_head=head)
    torch.testing.assert_close(part.log_probs, whole.log_probs[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.values, whole.values[2:], rtol=1e-5, atol=1e-5)


def test_a_batch_of_blank_rows_has_no_tokens(model):
    tokens = read(model, join_answers([[], []], [[], []], [0, 0], pad_token_id=0), value_head=head, with_entropy=True)
    assert not any(found.any() for found in tokens)
