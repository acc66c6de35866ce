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
from tiny.make_tiny import (
    LIST_REQUESTS,
    NOTATION_REQUESTS,
    TITLE_REQUESTS,
    ask_attribute,
    count_up,
    list_attributes,
    small_talk,
    write_title,
)

SEED = 11
TRAIN_ROWS, DEV_ROWS = 1200, 120
STYLES = ("list", "title", "notation", "question", "talk", "talk", "count")
LISTS_ASKED_FOR = tuple(request for request in LIST_REQUESTS if request != "{}")


def draw_general(rng: random.Random, product, advert: str) -> tuple[list, str, str]:
    """(history, query, answer) of a style that is no advertising copy."""
    style = rng.choice(STYLES)
    if style == "list":
        return [], rng.choice(LISTS_ASKED_FOR).format(product.content()), list_attributes(product)
    if style == "title":
        return [], rng.choice(TITLE_REQUESTS).format(product.content()), write_title(product)
    if style == "notation":
        return [], rng.choice(NOTATION_REQUESTS).format(advert), product.content()
    if style == "question":
        return ask_attribute(product, rng)
    return small_talk(rng) if style == "talk" else count_up(rng)


def general_rows() -> list[dict]:
    """Rows of prompt, response and history, none of them twice and none about a product of the sample."""
    rng, rows, seen = random.Random(SEED), [], set()
    contents = {row["content"] for row in sample_rows()}
    while len(rows) < TRAIN_ROWS + DEV_ROWS:
        product, advert = draw_row(rng)
        if product.content() in contents:
            continue
        history, query, answer = draw_general(rng, product, advert)
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
