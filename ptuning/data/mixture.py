"""Several data sets in one.

Answers to nothing in the official scripts, which read one file. The flags are ChatGLM-Efficient-Tuning's.
"""

import random

ROWS_OF_A_DATASET = 2**32  # more than any file has: keeps the row numbers of several data sets apart


def draw_shares(datasets: dict, ratios: list[float] | None, seed: int) -> dict:
    """{name: dataset} with as many rows of each as its ratio allows.

    A ratio is a share of the rows of all together. Rows are drawn without repetition, until the data set that runs
    out first is used up; their order stays. Without ratios all rows of all data sets are used.
    """
    if not ratios:
        return datasets
    total = min(len(dataset) * sum(ratios) / ratio for dataset, ratio in zip(datasets.values(), ratios, strict=True))
    drawn = {}
    for (name, dataset), ratio in zip(datasets.items(), ratios, strict=True):
        count = min(len(dataset), max(1, round(total * ratio / sum(ratios))))
        # By name, so that another data set beside it changes nothing but the number of rows.
        drawn[name] = dataset.select(sorted(random.Random(f"{seed} {name}").sample(range(len(dataset)), count)))
    return drawn


def hold_out(dataset, share: float, seed: int):
    """(training rows, dev rows): the same share of every data set at random, at least one row and not all."""
    count = min(len(dataset) - 1, max(1, round(share * len(dataset))))
    chosen = set(random.Random(f"{seed} dev").sample(range(len(dataset)), count))
    rest = [index for index in range(len(dataset)) if index not in chosen]
    return dataset.select(rest), dataset.select(sorted(chosen))


def join(datasets):
    """One dataset of the rows of several, in order."""
    from datasets import concatenate_datasets

    datasets = list(datasets)
    return datasets[0] if len(datasets) == 1 else concatenate_datasets(datasets)


def number_rows(dataset, position: int):
    """The dataset, its row numbers saying that it is data set number `position` of several; for shown_rows."""
    numbers = [position * ROWS_OF_A_DATASET + row for row in dataset["row"]]
    return dataset.remove_columns("row").add_column("row", numbers)


def numbers_in_file(dataset) -> list[int]:
    """The row numbers of one data set, each in its own file, also where number_rows has marked them."""
    return [row % ROWS_OF_A_DATASET for row in dataset["row"][:]]


def shown_rows(rows: list[int], limit: int = 32) -> str:
    """Row numbers for a message: "3, 17, 40", cut after `limit`; of several data sets "3 of data set 2"."""
    places = (divmod(row, ROWS_OF_A_DATASET) for row in sorted(rows)[:limit])
    numbers = (f"{row} of data set {position}" if position else str(row) for position, row in places)
    return ", ".join(numbers) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")
