"""The rows that --dev_ratio holds out, kept in a run's folder: what trained on the others is evaluated on exactly these.

Answers to nothing in the official scripts, whose dev rows are a file. evaluate.sh and the training page look here, too.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from common.failure import going_on_without
from common.files import read_json, write_text
from common.messages import silent
from common.values import is_text
from data.dataset_info import DATASET_INFO_FILE, PAIR_COLUMNS
from data.examples import COLUMNS
from data.rows import read_rows

FOLDER = "held_out"  # in a run's folder; takes the place of DATA
ROWS_FILE = "dev.json"  # of one file of rows; data sets have files of their own, and a dataset_info.json


def write_held_out(run_folder: Path | str, held_out: dict, say=silent) -> None:
    """Write rows as they stand in their files, in place of what an earlier run in the folder has held out.

    `held_out` is {name of a data set, or "": arguments of load_examples, and `rows`, numbers from 1}. A disk that is full
    is said, and no error. Raises as read_rows.
    """
    folder = Path(run_folder) / FOLDER
    with going_on_without(folder, say):
        remove_held_out(folder)
        if held_out:
            folder.mkdir(exist_ok=True)
        entries = {}
        for position, (name, source) in enumerate(held_out.items(), start=1):
            file = folder / (f"{position}.json" if name else ROWS_FILE)
            rows = read_rows(source["path"])
            write_text(file, "".join(line_of(rows[number - 1]) for number in source["rows"]))
            columns = {column: source.get(f"{column}_column") for column in (*COLUMNS, *PAIR_COLUMNS)}
            entries[name] = {"file_name": file.name, "columns": {key: value for key, value in columns.items() if value}}
        if any(entries):
            write_text(folder / DATASET_INFO_FILE, json.dumps(entries, ensure_ascii=False, indent=2) + "\n")


def remove_held_out(folder):
    """Remove what makes a folder one of held-out rows; what somebody else has put there stays."""
    if folder.is_dir():
        for name in (ROWS_FILE, DATASET_INFO_FILE):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def line_of(row):
    """A row as a line of JSON, in escapes where a text has half of a character that only escapes can hold."""
    line = json.dumps(row, ensure_ascii=False)
    return f"{line if is_text(line) else json.dumps(row)}\n"


def words_for_held_out(run_folder: Path | str) -> list[str]:
    """The flags of main.py that name these rows for --do_predict; [] where the run has kept none."""
    folder = Path(run_folder) / FOLDER
    if (folder / ROWS_FILE).is_file():
        return ["--test_file", str(folder / ROWS_FILE)]
    if (folder / DATASET_INFO_FILE).is_file():
        return ["--dataset", ",".join(read_json(folder / DATASET_INFO_FILE)), "--dataset_dir", str(folder)]
    return []
