"""dataset_info.json: data sets by name.

Answers to the file of that name in ChatGLM-Efficient-Tuning, and in its successor LLaMA-Factory. It differs in that no
program of a data set is run, and a changed file is used and said.
"""

import difflib
import hashlib
import os
from pathlib import Path

from common.claims import MOST_JSON_BYTES, check_size, path_inside
from common.quoting import as_typed
from common.text import load_json
from data.examples import COLUMNS
from data.hub import fetch_rows
from data.rows import files_of, kind_of_value, read_data, read_rows

DATASET_INFO_FILE = "dataset_info.json"
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}  # of an entry that names none
FORMS = {"alpaca": ALPACA_COLUMNS, "sharegpt": {"messages": "conversations"}}  # {formatting: columns}
PAIR_COLUMNS = ("chosen", "rejected")  # of two answers to one prompt
KEYS = ("file_name file_sha1 columns formatting tags ranking stage hf_hub_url ms_hub_url script_url subset").split()
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system",),
}


def read_dataset_info(folder: str | os.PathLike, names: str, split: str = "train") -> tuple[dict[str, dict], list[str]]:
    """({name: arguments of load_examples}, lines for the user) of data sets, `names` separated by commas.

    An entry with pairs of answers gives those of load_pairs. Rows of a hub are of the `split`.

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
        sources[name], note = _described_source(Path(folder), info[name], f"{name!r} in {info_file}", split)
        notes += note
    if not sources:
        described = ", ".join(map(as_typed, info)) or "none"
        raise ValueError(f"--dataset {names!r} names no data set; {info_file} describes {described}")
    return sources, notes


def _described_source(folder, entry, place, split):
    """(arguments of load_examples or load_pairs, lines for the user) of one entry of a dataset_info.json."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {kind_of_value(entry)}; expected an object with file_name")
    form = entry.get("formatting") or "alpaca"
    if form not in FORMS:
        raise ValueError(f'"formatting" of {place} is {kind_of_value(form)}; expected {" or ".join(FORMS)}')
    columns = _checked_columns(entry.get("columns") or FORMS[form], place)
    notes = [f"{place} has {key!r}, which is not read here." for key in entry if key not in KEYS]
    if hub := _hub_of(entry):
        name, subset = entry[hub], entry.get("subset")
        if not isinstance(name, str) or not isinstance(subset, str | None):
            raise ValueError(f"{hub} and subset of {place} must be text, such as owner/name")
        path = fetch_rows(hub, name, split, subset, place)
    else:
        path, more = _described_file(folder, entry, place, split)
        notes += more
    _check_tags(entry.get("tags"), place)
    source = {"path": path, "place": place}
    source.update((f"{name}_column", columns.get(name) or None) for name in COLUMNS)
    source.update((f"{name}_column", columns[name]) for name in PAIR_COLUMNS if columns.get(name))
    if columns is ALPACA_COLUMNS:
        rows = read_rows(path)  # the second line of an instruction is left out by many files
        if not any(ALPACA_COLUMNS["query"] in row for row in rows):
            source["query_column"] = None
    return source, notes


def _hub_of(entry):
    """The key of the hub that a data set is fetched from, None for one in files. As in LLaMA-Factory the environment
    variable USE_MODELSCOPE_HUB=1 chooses, where an entry names both.
    """
    hubs = [hub for hub in ("hf_hub_url", "ms_hub_url") if entry.get(hub)]
    return hubs and (hubs[-1] if os.environ.get("USE_MODELSCOPE_HUB") in ("1", "true", "True") else hubs[0])


def _checked_columns(columns, place):
    """The "columns" of an entry. ValueError for others than {a name of ours: a name in the rows}."""
    if not isinstance(columns, dict):
        raise ValueError(
            f'"columns" of {place} is {kind_of_value(columns)}; expected an object such as {ALPACA_COLUMNS}'
        )
    known = (*COLUMNS, *PAIR_COLUMNS)
    for key, column in columns.items():
        if key not in known or not isinstance(column, str | None):
            found = f"{key!r}" if key not in known else f"{kind_of_value(column)} for {key!r}"
            raise ValueError(f'"columns" of {place} has {found}; expected names of columns for {", ".join(known)}')
    return columns


def _check_tags(tags, place):
    """ValueError for tags, LLaMA-Factory's words for parts of a dialogue, that dialogues here do not have."""
    for key, word in (tags if isinstance(tags, dict) else {}).items():
        if key in TAGS and word not in TAGS[key]:
            raise ValueError(
                f'"tags" of {place} has {kind_of_value(word)} for {key!r}; dialogues have {" or ".join(TAGS[key])} here: '
                "rename it in the rows"
            )


def _described_file(folder, entry, place, split):
    """(the file of an entry, or folder/* for a folder of files, lines for the user)."""
    file_name = entry.get("file_name")
    if entry.get("script_url"):
        raise ValueError(
            f"{place} is made by a program, script_url {entry['script_url']!r}, and none of a data set is run here: let it "
            "write its rows to a file once (see docs/data.md), and name that as file_name"
        )
    if not isinstance(file_name, str):
        raise ValueError(f"{place} has no file: give the file's name as file_name, or hf_hub_url or ms_hub_url")
    if split != "train":
        raise ValueError(
            f"--split {split}: {place} is a file, and a data file has one split, train. Describe the other rows as a data "
            "set of their own, and name it in --dataset."
        )
    path, wanted = path_inside(folder, file_name, f"file_name of {place}"), entry.get("file_sha1")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, the file of {place}; correct file_name, or put the file there")
    if path.is_dir():
        files = files_of(path / "*")
        for file in files:
            path_inside(folder, str(Path(file_name, file.name)), f"file_name of {place}")
        if not files:
            raise ValueError(f"{path} is empty, the folder of {place}; put files of rows into it")
        return path / "*", [f"{path} is a folder: its file_sha1 is not compared."] if wanted else []
    if wanted:
        found = hashlib.sha1(read_data(path)).hexdigest()
        if found != str(wanted).lower():
            return path, [
                f"{path} is not the file that {place} describes: its SHA-1 is {found}, expected {wanted}. "
                "It is used as it is; correct file_sha1 if you changed the file."
            ]
    return path, []
