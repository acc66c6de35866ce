"""Write general.json and general_dev.json into AdvertiseGen/sample/: what the small model can do before it is tuned.

    cd ptuning && python -m tiny.make_general        # rebuilds both files byte for byte

Answers to no official file: rows to mix into the advertising rows, so that a tuned prefix does not answer everything
with advertising. They are drawn from the grammar of make_tiny.py's pretraining text, with draws of their own. Bare
attributes are left out: to those the sample teaches another answer.
"""

import json
import random
from pathlib import Path

from tiny.make_sample import SAMPLE_FOLDER, draw_row, sample_rows, write_rows
from tiny.make_tiny import LIST_REQUESTS, in_style

SEED = 11
TRAIN_ROWS, DEV_ROWS = 1200, 120
STYLES = ("list", "title", "notation", "question", "talk", "talk", "count")
LISTS_ASKED_FOR = tuple(request for request in LIST_REQUESTS if request != "{}")


def general_rows() -> list[dict]:
    """Rows of prompt, response and history, none of them twice and none about a product of the sample."""
    rng, rows, seen = random.Random(SEED), [], set()
    contents = {row["content"] for row in sample_rows()}
    while len(rows) < TRAIN_ROWS + DEV_ROWS:
        product, advert = draw_row(rng)
        if product.content() in contents:
            continue
        history, query, answer = in_style(rng.choice(STYLES), rng, product, advert, LISTS_ASKED_FOR)
        row = {"prompt": query, "response": answer, "history": [list(turn) for turn in history]}
        line = json.dumps(row, ensure_ascii=False)
        if line not in seen:
            seen.add(line)
            rows.append(row)
    return rows


def main(folder: Path = SAMPLE_FOLDER) -> None:
    rows = general_rows()
    write_rows(folder / "general.json", rows[:TRAIN_ROWS])
    write_rows(folder / "general_dev.json", rows[TRAIN_ROWS:])


if __name__ == "__main__":
    main()
