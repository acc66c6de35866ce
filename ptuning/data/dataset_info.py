"""dataset_info.json: data sets by name.

Answers to the file of that name in ChatGLM-Efficient-Tuning. It differs in that nothing is fetched from the hub, and a
changed file is used and said.
"""

import difflib
import hashlib
import os
from pathlib import Path

from common.claims import MOST_JSON_BYTES, check_size, path_inside
from common.quoting import as_typed
from common.text import load_json
from data.examples import COLUMNS
from data.rows import kind_of_value, read_data, read_rows

DATASET_INFO_FILE = "dataset_info.json"
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}  # of an entry that names none


def read_dataset_info(folder: str | os.PathLike, names: str) -> tuple[dict[str, dict], list[str]]:
    """({name: arguments of load_examples}, lines for the user) of data sets, `names` separated by commas.

    They are described in `dataset_info.json` in the folder, as ChatGLM-Efficient-Tuning has it. ValueError or
    FileNotFoundError for what that file lacks, or has wrong.
    """
    info_file = path_inside(folder, DATASET_INFO_FILE, "--dataset_dir")
    if not info_file.is_file():
        raise FileNotFoundError(
            f"{info_file} does not exist; it describes the data sets that --dataset may name, see docs/data.md"
        )
    check_size(info_file, MOST_JSON_BYTES)
    info = load_json(read_data(info_file), str(info_file))
    if not isinstance(info, dict):
        raise ValueError(
            f"{info_file} is {kind_of_value(info)}; expected an object that describes each data set by its name"
        )
    sources, notes = {}, []
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name in sources:
            raise ValueError(f"--dataset {names} names {name!r} twice")
        if name not in info:
            near = difflib.get_close_matches(name, list(info), n=1)
            hint = f"; did you mean {as_typed(near[0])}?" if near else ""
            described = ", ".join(map(as_typed, info)) or "nothing"
            raise ValueError(f"{info_file} does not describe {name!r}, only {described}{hint}")
        sources[name], note = _described_source(Path(folder), info[name], f"{name!r} in {info_file}")
        notes += note
    if not sources:
        described = ", ".join(map(as_typed, info)) or "none"
        raise ValueError(f"--dataset {names!r} names no data set; {info_file} describes {described}")
    return sources, notes


def _described_source(folder, entry, place):
    """(arguments of load_examples, lines for the user) of one entry of a dataset_info.json."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {kind_of_value(entry)}; expected an object with file_name")
    file_name, columns = entry.get("file_name"), entry.get("columns") or ALPACA_COLUMNS
    if not isinstance(file_name, str):
        online = next((key for key in ("hf_hub_url", "script_url") if key in entry), None)
        reason = f"is fetched by {online}, which is not done here: download it and" if online else "has no file:"
        raise ValueError(f"{place} {reason} give the file's name as file_name")
    if not isinstance(columns, dict):
        raise ValueError(
            f'"columns" of {place} is {kind_of_value(columns)}; expected an object such as {ALPACA_COLUMNS}'
        )
    for key, column in columns.items():
        if key not in COLUMNS or not isinstance(column, str | None):
            found = f"{key!r}" if key not in COLUMNS else f"{kind_of_value(column)} for {key!r}"
            raise ValueError(f'"columns" of {place} has {found}; expected names of columns for {", ".join(COLUMNS)}')
    path, notes = path_inside(folder, file_name, f"file_name of {place}"), []
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, the file of {place}; correct file_name, or put the file there")
    if wanted := entry.get("file_sha1"):
        found = hashlib.sha1(read_data(path)).hexdigest()
        if found != str(wanted).lower():
            notes.append(
                f"{path} is not the file that {place} describes: its SHA-1 is {found}, expected {wanted}. "
                "It is used as it is; correct file_sha1 if you changed the file."
            )
    source = {"path": path, "place": place}
    source.update((f"{name}_column", columns.get(name) or None) for name in COLUMNS)
    if not source["messages_column"] and columns is ALPACA_COLUMNS:
        rows = read_rows(path)  # the second line of an instruction is left out by many files
        if not any(ALPACA_COLUMNS["query"] in row for row in rows):
            source["query_column"] = None
    return source, notes
