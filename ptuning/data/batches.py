"""Encoded rows -> batches of tensors.

Answers to the data collators of the official `main.py`. It differs in that rows are padded to the longest of their
batch instead of to max_source + max_target + 1, and that the rows of a step are grouped by length.
"""

from itertools import islice

from data.encoding import IGNORED_LABEL, any_supervised
from data.mixture import shown_rows

# ---- rows -> the order in which they are read


class RowOrder:
    """The rows of an epoch in random order, those of a step then grouped by length; a sampler for a DataLoader.

    `batches_per_step` batches of `batch_size` rows, those of all processes and accumulated ones, make a step. It gets
    the rows that plain random sampling with this seed gives it, so its gradient is the same; but rows of one batch are
    of like length, and so are the batches that `num_processes` processes compute at the same time. With `window` > 1
    rows are grouped within so many steps, which then differ in length; the batches of a window come in random order.

    `epoch()` is asked at the start of every pass. Every process must read the same order and keep every
    `num_processes`-th batch.
    """

    def __init__(self, lengths, *, batch_size, batches_per_step, num_processes=1, seed=0, epoch=lambda: 0, window=1):
        self.lengths = lengths
        self.together = batch_size * num_processes
        self.rows_per_window = batch_size * batches_per_step * window
        self.seed = seed
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        import torch

        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.rows_per_window):
            rows = sorted(order[start : start + self.rows_per_window], key=self.lengths.__getitem__)
            groups = [rows[first : first + self.together] for first in range(0, len(rows), self.together)]
            whole = len(rows) // self.together  # an incomplete group stays last, or batches would straddle groups
            for group in [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(groups))]:
                yield from groups[group]


# ---- features -> batches


def _pad(sequences: list[list[int]], value: int, length: int, left: bool = False):
    """int64 tensor (B, length)."""
    import torch

    padding = [[value] * (length - len(sequence)) for sequence in sequences]
    pairs = zip(padding, sequences, strict=True) if left else zip(sequences, padding, strict=True)
    return torch.tensor([first + second for first, second in pairs], dtype=torch.int64)


def collate_training(
    features: list[dict],
    *,
    pad_token_id: int,
    label_pad_id: int = IGNORED_LABEL,
    multiple_of: int = 8,
    min_length: int = 0,
) -> dict:
    """`input_ids` and `labels`, int64 (B, S), padded on the right; S is the longest row, rounded up. `row` (B,).

    S is a multiple of `multiple_of` and at least `min_length`.

    There is no attention mask: under causal attention no token sees the padding to its right. Nothing is supervised
    in a blank row, see WithBlankRow.
    Raises ValueError naming the rows where none has a supervised token: their mean loss would be 0 / 0.
    """
    import torch

    rows = [feature["row"] for feature in features]
    blank = torch.tensor([row == BLANK_ROW["row"] for row in rows])
    if not blank.all() and not any(any_supervised(feature["labels"]) for feature in features):
        raise ValueError(f"row {shown_rows(rows)}: a batch without a single supervised token, nothing to learn from")
    longest = max(len(feature["input_ids"]) for feature in features)
    length = max(min_length, -(-longest // multiple_of) * multiple_of)
    labels = _pad([feature["labels"] for feature in features], label_pad_id, length)
    return {
        "input_ids": _pad([feature["input_ids"] for feature in features], pad_token_id, length),
        "labels": labels.masked_fill(blank[:, None], IGNORED_LABEL),
        "row": torch.tensor(rows, dtype=torch.int64),  # for messages; the trainer takes it out
    }


def collate_pairs(features: list[dict], *, pad_token_id: int, multiple_of: int = 8) -> dict:
    """`input_ids` and `labels`, int64 (B, 2, S), of chosen and rejected answers, padded on the right as collate_training
    pads; `lengths` (B, 2) in tokens, `weight` float32 (B,), 0 of a blank row, and `row` (B,).

    `reference` float32 (B, 2) where the rows have it.
    """
    import torch

    rejected = "rejected_input_ids"  # a blank row has none
    ids = [ids for row in features for ids in (row["input_ids"], row.get(rejected, row["input_ids"]))]
    labels = [ids for row in features for ids in (row["labels"], row.get("rejected_labels", row["labels"]))]
    length = -(-max(map(len, ids)) // multiple_of) * multiple_of
    batch = {
        "input_ids": _pad(ids, pad_token_id, length).unflatten(0, (-1, 2)),
        "labels": _pad(labels, IGNORED_LABEL, length).unflatten(0, (-1, 2)),
        "lengths": torch.tensor(list(map(len, ids))).unflatten(0, (-1, 2)),
        "weight": torch.tensor([float(row["row"] != BLANK_ROW["row"]) for row in features]),
        "row": torch.tensor([row["row"] for row in features], dtype=torch.int64),
    }
    if any("reference" in row for row in features):
        batch["reference"] = torch.tensor([row.get("reference", (0.0, 0.0)) for row in features])
    return batch


# Stands for no row of the file: one token that is neither learned nor counted.
BLANK_ROW = {"input_ids": [0], "labels": [IGNORED_LABEL], "row": 0}


class WithBlankRow:
    """A dataset that has a blank row behind its last one, at index len(), and does not count it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return BLANK_ROW if index == len(self) else self.dataset[index]


class EvenBatches:
    """The batches of `batch_sampler`, filled up with blank rows to equally many full ones for every process.

    Otherwise accelerate fills them up with rows from the start of the epoch, which would count twice.
    With `merged` > 1 a batch holds so many of those that the flags describe; each process gets the rows in it that it
    would get in batches of their own, and the last ones of an epoch are shorter instead of blank.
    """

    def __init__(self, batch_sampler, num_processes: int, blank: int, merged: int = 1):
        self.batch_sampler, self.num_processes, self.blank, self.merged = batch_sampler, num_processes, blank, merged
        self.sampler, self.batch_size, self.drop_last = batch_sampler.sampler, batch_sampler.batch_size, False

    def __len__(self):
        return -(-len(self.batch_sampler) // self.num_processes) * self.num_processes

    def __iter__(self):
        batches, rows = iter(self.batch_sampler), self.batch_size // self.merged
        while together := [row for batch in islice(batches, self.num_processes) for row in batch]:
            together += [self.blank] * (-len(together) % (rows * self.num_processes))
            given = [together[start : start + rows] for start in range(0, len(together), rows)]
            for process in range(self.num_processes):
                yield [row for batch in given[process :: self.num_processes] for row in batch]


def collate_prediction(features: list[dict], *, pad_token_id: int) -> dict:
    """`input_ids`, `attention_mask`, `position_ids`, int64 (B, S), padded on the left, and `labels` on the right.

    Position ids count from 0 at the first token and are 0 at padding; labels are padded with -100.
    """
    prompts = [feature["input_ids"] for feature in features]
    labels = [feature["labels"] for feature in features]
    length = max(map(len, prompts))
    return {
        "input_ids": _pad(prompts, pad_token_id, length, left=True),
        "attention_mask": _pad([[1] * len(prompt) for prompt in prompts], 0, length, left=True),
        "position_ids": _pad([list(range(len(prompt))) for prompt in prompts], 0, length, left=True),
        "labels": _pad(labels, IGNORED_LABEL, max(map(len, labels))),
    }
