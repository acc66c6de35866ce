"""Batches, and the order of the rows."""

import random

import pytest
from conftest import TINY
from support.rows import own_cache, write  # noqa: F401, fixtures

from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from data.batches import BLANK_ROW, EvenBatches, RowOrder, WithBlankRow, collate_prediction, collate_training
from data.encoding import encode_training
from data.examples import load_examples

# ---- batches


def feature(length, first=1):
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "source_length": 1, "row": 7}


def test_training_batch_is_padded_on_the_right_to_a_multiple_of_8():
    import torch

    batch = collate_training([feature(3), feature(9)], pad_token_id=0)
    assert list(batch) == ["input_ids", "labels", "row"]
    assert batch["row"].tolist() == [7, 7]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [0] * 13
    assert batch["labels"][0].tolist() == [-100, 2, 3] + [-100] * 13
    assert collate_training([feature(8)], pad_token_id=0)["input_ids"].shape == (1, 8)


def test_a_batch_without_a_supervised_token_is_refused_by_row_number():
    empty = {**feature(3), "labels": [5, -100, -100], "row": 12}  # the first label is predicted from nothing
    assert collate_training([empty, feature(3)], pad_token_id=0)["row"].tolist() == [12, 7]
    with pytest.raises(ValueError, match="row 12, 40: a batch without a single supervised token"):
        collate_training([{**empty, "row": 40}, empty], pad_token_id=0)


def test_several_processes_get_equally_many_full_batches_without_repeating_a_row():
    from torch.utils.data import BatchSampler

    rows = [{**feature(3), "row": number} for number in range(1, 11)]
    dataset = WithBlankRow(rows)
    batches = EvenBatches(BatchSampler(range(len(dataset)), batch_size=4, drop_last=False), 4, blank=len(dataset))
    assert list(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 10], [10, 10, 10, 10]]
    assert len(batches) == 4
    numbers = [dataset[index]["row"] for batch in batches for index in batch]
    assert numbers == [*range(1, 11), 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("merged", [2, 4])
@pytest.mark.parametrize("num_rows", [40, 48, 65])  # of steps of 32: a last step of 8 rows, of 16, of 1
@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_computes_the_same_rows_whether_or_not_batches_are_merged(processes, num_rows, merged):
    from torch.utils.data import BatchSampler

    def batches(size, merged):
        return list(EvenBatches(BatchSampler(range(num_rows), size, drop_last=False), processes, num_rows, merged))

    alone, together = batches(2, 1), batches(2 * merged, merged)
    for process in range(processes):
        assert sum(together[process::processes], []) == sum(alone[process::processes], [])
    assert len(together) % processes == 0 and all(len(batch) <= 2 * merged for batch in together)


@pytest.mark.parametrize("label_pad_id", [-100, 0])
def test_nothing_is_supervised_in_a_blank_row(label_pad_id):
    batch = collate_training([feature(3), BLANK_ROW], pad_token_id=0, label_pad_id=label_pad_id)
    assert batch["labels"][0].tolist() == [-100, 2, 3] + [label_pad_id] * 5
    assert batch["labels"][1].tolist() == [-100] * 8
    assert batch["row"].tolist() == [7, 0]
    blank = collate_training([BLANK_ROW, BLANK_ROW], pad_token_id=0, label_pad_id=label_pad_id)
    assert (blank["labels"] == -100).all() and blank["input_ids"].shape == (2, 8)


def test_a_row_whose_every_token_is_ignored_is_refused_before_training(write):
    # The pad token is the unknown token, never learned; in a model whose end is that token too a row may have no other.
    class Tokenizer(ChatGLMTokenizer):
        pad_token_id = eos_token_id = 0

        def encode_batch(self, texts):
            return [[0] if text == "?" else [5] for text in texts]

    tokenizer = Tokenizer(str(TINY / "tokenizer.model"))
    rows = [{"content": "a", "summary": "b"}, {"content": "a", "summary": "?"}]
    examples, _ = load_examples(write(rows), "content", "summary")
    with pytest.raises(ValueError, match="row 2 has nothing to learn"):
        encode_training(examples, tokenizer, max_source_length=64, max_target_length=64)


def test_padding_labels_can_be_other_than_ignored():
    batch = collate_training([feature(3)], pad_token_id=0, label_pad_id=0)
    assert batch["labels"][0].tolist() == [-100, 2, 3, 0, 0, 0, 0, 0]


def test_prediction_batch_is_padded_on_the_left_and_its_labels_on_the_right():
    batch = collate_prediction([feature(2), feature(4)], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 2, 3, 4]]


# ---- the order of the rows

LENGTHS = [random.Random(row).randrange(20, 193) for row in range(103)]


def chunks(sequence, size):
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


@pytest.mark.parametrize("window", [1, 3])
def test_an_epoch_reads_every_row_once_in_an_order_of_seed_and_epoch(window):
    settings = {"batch_size": 4, "batches_per_step": 4, "window": window}
    orders = {
        (seed, epoch): list(RowOrder(LENGTHS, **settings, seed=seed, epoch=lambda epoch=epoch: epoch))
        for seed, epoch in ((1, 0), (1, 1), (5, 0))
    }
    assert all(sorted(order) == list(range(103)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 3
    assert list(RowOrder(LENGTHS, **settings, seed=1)) == orders[1, 0]


def test_a_step_gets_the_rows_of_plain_random_sampling():
    import torch

    plain = torch.randperm(103, generator=torch.Generator().manual_seed(7 + 2)).tolist()
    grouped = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=4, seed=7, epoch=lambda: 2))
    assert [set(step) for step in chunks(grouped, 16)] == [set(step) for step in chunks(plain, 16)]
    assert list(RowOrder([9] * 103, batch_size=1, batches_per_step=1, seed=7, epoch=lambda: 2)) == plain


def test_rows_of_one_batch_are_of_like_length():
    for step in chunks(list(RowOrder(LENGTHS, batch_size=4, batches_per_step=4)), 16)[:-1]:
        batches = sorted(sorted(LENGTHS[row] for row in batch) for batch in chunks(step, 4))
        assert all(shorter[-1] <= longer[0] for shorter, longer in zip(batches, batches[1:], strict=False))


def test_two_processes_and_one_that_accumulates_make_steps_of_the_same_rows():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    alone = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=4))
    together = RowOrder(LENGTHS, batch_size=4, batches_per_step=4, num_processes=2)
    shards = [list(BatchSamplerShard(BatchSampler(together, 4, False), 2, process)) for process in range(2)]
    for step, rows in enumerate(chunks(alone, 16)[:-1]):
        batches = [shard[2 * step : 2 * step + 2] for shard in shards]
        assert sorted(rows) == sorted(row for shard in batches for batch in shard for row in batch)
        for first, second in zip(*batches, strict=True):  # computed at the same time
            others = set(rows) - set(first) - set(second)
            longest, shortest = (pick(LENGTHS[row] for row in first + second) for pick in (max, min))
            assert all(LENGTHS[row] <= shortest or LENGTHS[row] >= longest for row in others)


def test_a_window_of_steps_pads_less_and_mixes_short_and_long_steps():
    def padded(order):
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in chunks(order, 4))

    step = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=1))
    window = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=1, window=25))
    assert padded(window) < 1.06 * sum(LENGTHS) < padded(step)
    means = [sum(LENGTHS[row] for row in batch) for batch in chunks(window, 4)[:25]]
    assert means != sorted(means)
