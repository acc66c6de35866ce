"""A data file -> rows.

Answers to `load_dataset` of the official `main.py`. It differs in that a file may be JSON lines, a JSON array or CSV in
UTF-8, UTF-16, UTF-32 or GB18030, and that every defect is one error that names file and line.
"""

import csv
import gzip
import io
import json
import os
import zlib
from pathlib import Path

from common.messages import cut_short
from common.text import DuplicateKey, decode_text, parse_json

SMALL_FILE = 4 << 20  # bytes; read in a tenth of a second
LARGEST_COUNTED = 1 << 30  # bytes; their lines are counted in half a second


def kind_of_value(value) -> str:
    """The type of a JSON value in words, with the value where it is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"text ({cut_short(value, 20)!r})"
    return {list: "a list", dict: "an object"}[type(value)]


def _duplicate_key(name: str, row: int, line: int, error: DuplicateKey) -> ValueError:
    return ValueError(
        f"{name} row {row} (line {line}) has the key {cut_short(error.key)!r} twice in one object, of which only one could "
        "be read; rename or remove one"
    )


def _parse_json_lines(text: str, name: str) -> list[dict]:
    rows = []
    # Not splitlines(): JSON text may hold line separators other than \n, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, unique_keys=True)
        except DuplicateKey as error:
            raise _duplicate_key(name, len(rows) + 1, number, error) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} line {number} is not JSON ({error.msg}, column {error.colno}): {cut_short(line)}\n"
                "Expected one whole JSON object per line, or one JSON array of objects."
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{name} line {number} is {kind_of_value(row)}, not a JSON object: {cut_short(line)}\n"
                'Expected lines such as {"content": "...", "summary": "..."}.'
            )
        rows.append(row)
    return rows


def _parse_json_array(text: str, name: str) -> list[dict]:
    try:
        rows = parse_json(text, unique_keys=True)
    except DuplicateKey as error:
        raise _duplicate_key(name, error.element, error.lineno, error) from None
    except json.JSONDecodeError as error:
        # An array may be one line of megabytes: show what surrounds the error instead of the line's start.
        around = " ".join(text[max(0, error.pos - 30) : error.pos + 30].split())
        raise ValueError(
            f"{name} line {error.lineno} breaks the JSON array ({error.msg}, column {error.colno}) near: {around}\n"
            "Repair it there, or write one JSON object per line."
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{name} row {number} is {kind_of_value(row)}, not a JSON object; expected an array of objects"
            )
    return rows


def _parse_csv(text: str, name: str) -> list[dict]:
    lines = list(io.StringIO(text, newline=""))  # as the reader counts them
    reader = csv.reader(lines, strict=True)
    header, rows = None, []
    start = 1  # line of the file at which the next row starts; a quoted cell may span several
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                twice = next((column for column in header if header.count(column) > 1), None)
                if twice is not None:
                    raise ValueError(f"{name}: its header names the column {twice!r} twice; rename or remove one")
            elif cells:
                if len(cells) != len(header):
                    extra = cells[len(header) :]
                    detail = f"; the first cell too many is {cut_short(extra[0])!r}" if extra else ""
                    raise ValueError(
                        f"{name} row {len(rows) + 1} (line {start}) has {len(cells)} cells but the header names "
                        f"{len(header)} columns{detail}\nPut cells that contain commas or line ends in double quotes."
                    )
                rows.append(dict(zip(header, cells, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name} row {len(rows) + 1} (line {start}) is not CSV ({error}): {cut_short(lines[start - 1])}\n"
            'A double quote inside a quoted cell is written twice: "".'
        ) from None
    return rows


def check_data_file(path: Path) -> None:
    """ValueError or FileNotFoundError for a path that is no regular file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a data file in it, such as {path / 'train.json'}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; copy what it gives into one and name that")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (looked for {path.absolute()}); check the data file's name")


def files_of(path: Path) -> list[Path]:
    """The files that a path means: itself, or of `folder/*` every file in that folder, hidden ones left out, by name."""
    if path.name != "*" or path.exists() or not path.parent.is_dir():
        return [path]
    return sorted(file for file in path.parent.iterdir() if file.is_file() and not file.name.startswith("."))


def read_data(path: Path) -> bytes:
    """All bytes of what files_of gives. Raises as check_data_file."""
    files = files_of(path)
    for file in files:
        check_data_file(file)
    return b"".join(file.read_bytes() for file in files)


def unzip(data: bytes, path: Path) -> bytes:
    """What a .gz file holds. ValueError for one that is damaged or none."""
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); copy it again, or name the unpacked file") from None


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines, JSON-array or (by its suffix) CSV file, also behind gzip (.gz), in order, as dicts.

    Of `folder/*` those of its files.

    FileNotFoundError or ValueError, each naming the file and where it has one the line, for a file that is missing,
    a folder, empty, not text, or not in one of these formats.
    """
    return [row for file in files_of(Path(path)) for row in _rows_of_file(file)]


def _rows_of_file(path):
    data, inner = read_data(path), path
    if path.suffix.lower() == ".gz":
        data, inner = unzip(data, path), path.with_suffix("")
    text = decode_text(data, str(path))
    if not text.strip():
        raise ValueError(f"{path} is empty; expected JSON lines, a JSON array or CSV")
    if inner.suffix.lower() == ".csv":
        rows = _parse_csv(text, str(path))
    elif text.lstrip().startswith("["):
        rows = _parse_json_array(text, str(path))
    else:
        rows = _parse_json_lines(text, str(path))
    if not rows:
        raise ValueError(f"{path} holds no rows; expected at least one example")
    return rows


def glance(path: str | os.PathLike) -> tuple[dict | None, int | None]:
    """(the first row of a data file, its number of rows), None for what takes long to know. Raises as read_rows.

    A small file is read. Of a large one with JSON lines in UTF-8 the first is read, and the others are counted.
    """
    path = Path(path)
    check_data_file(path)
    size = path.stat().st_size
    if size <= SMALL_FILE:
        rows = read_rows(path)
        return rows[0], len(rows)
    with open(path, "rb") as file:
        try:
            row = parse_json(file.readline(SMALL_FILE).decode("utf-8-sig"), unique_keys=True)
        except ValueError:  # another format or encoding, or a fault: said when all of it is read
            return None, None
        if not isinstance(row, dict) or size > LARGEST_COUNTED:
            return row if isinstance(row, dict) else None, None
        return row, 1 + sum(not line.isspace() for line in file)
