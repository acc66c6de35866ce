"""Bad data files, of JSON and CSV, and paths to none: each is refused in one message."""

import codecs
import gzip
import json
import os

from conftest import TINY
from support.damage import deep
from support.refusals import COLUMNS, LINE, ROW, here, predict_flags, refuse, table, train_flags  # noqa: F401, fixtures


def rows(*values, **row):
    """JSON lines: a good one, then those given."""
    return LINE + "".join(json.dumps(value) + "\n" for value in [*values, *([{**ROW, **row}] if row else [])])


HISTORY = {"history_column": "history"}
EMPTY = json.dumps({"content": "", "summary": ""}) + "\n"
# What is wrong, content of train.json (None: there is none), what the message says[, flags].
DATA = [
    ("no such file", None, "train.json does not exist"),
    ("empty", "", "train.json is empty"),
    ("white space only", " \n\t\r\n", "train.json is empty"),
    ("random bytes", bytes(range(256)) * 9, ("train.json line 2, byte 128", "no text in UTF-8")),
    ("a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0", ("train.json line 1, byte 0", "is this the right file?")),
    ("a gzip file", gzip.compress(LINE.encode() * 99), ("train.json", "is this the right file?")),
    ("NUL bytes only", b"\0" * 4096, ("train.json line 1, byte 0", "no text")),
    ("a NUL byte inside", LINE + LINE.replace("裙", "\0"), ("train.json line 2", "no text")),
    ("a broken line", LINE + '{"content": "say "hi"", "summary": "b"}\n', ("train.json line 2 is not JSON", "column")),
    ("cut in the last line", (LINE * 3)[:-20], "train.json line 3 is not JSON"),
    ("a single-quoted line", LINE + str(ROW) + "\n", "train.json line 2 is not JSON"),
    ("a trailing comma", LINE + LINE.replace("}", ",}"), "train.json line 2 is not JSON"),
    ("two objects on a line", LINE + LINE.strip() + LINE, ("train.json line 2 is not JSON", "Extra data")),
    (
        "an object over several lines",
        json.dumps(ROW, indent=1),
        ("line 1 is not JSON", "one whole JSON object per line"),
    ),
    ("a web page", "<!DOCTYPE html>\n<html>404</html>", ("train.json line 1 is not JSON", "<!DOCTYPE html>")),
    ("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid 1\n", ("line 1 is not JSON", "git-lfs")),
    ("CSV under the name of JSON", "content,summary\na,b\n", "train.json line 1 is not JSON"),
    ("a broken array", f"[\n{LINE.strip()},\n{{'a' 1}}\n]", "train.json line 3 breaks the JSON array"),
    ("a cut array", f"[{LINE.strip()},", "train.json line 1 breaks the JSON array"),
    ("text behind an array", f"[{LINE.strip()}]\n[]", ("train.json line 2 breaks the JSON array", "Extra data")),
    ("an empty array", "[]", "train.json holds no rows"),
    ("an array of numbers", "[1, 2]", "train.json row 1 is a number (1), not a JSON object"),
    ("an array of arrays", '[["a", "b"]]', "train.json row 1 is a list, not a JSON object"),
    ("lines that are lists", rows(["a", "b"]), "train.json line 2 is a list"),
    ("lines that are text", rows("a"), "train.json line 2 is text ('a')"),
    ("a line that is null", rows(None), "train.json line 2 is nothing (null)"),
    ("a line that is NaN", LINE + "NaN\n", "train.json line 2 is a number (nan)"),
    ("rows below a key", json.dumps({"data": [ROW]}), ("row 1 has no column 'content'", "columns are: data")),
    ("wrong column", json.dumps({"question": "a", "summary": "b"}), ("row 1 has no column 'content'", "question")),
    ("misspelt column", rows({"contents": "a", "summary": "b"}), ("row 2 has no", "--prompt_column contents?")),
    ("column in capitals", rows({"Content": "a", "summary": "b"}), ("row 2 has no", "--prompt_column Content?")),
    ("no response column", rows({"content": "a"}), "train.json row 2 has no column 'summary'"),
    ("an empty object", rows({}), ("train.json row 2 has no column 'content'", "columns are: none")),
    ("a number as prompt", rows(content=5), ("row 2: column 'content'", "a number (5), expected text")),
    ("NaN as prompt", rows(content=float("nan")), ("row 2: column 'content'", "a number (nan)")),
    ("a truth value as response", rows(summary=True), ("row 2: column 'summary'", "a truth value (true)")),
    ("a list as response", rows(summary=["a"]), ("row 2: column 'summary'", "a list, expected text")),
    ("an object as prompt", rows(content={"a": 1}), ("row 2: column 'content'", "an object, expected text")),
    ("half a character in a prompt", rows(content="\ud83d"), ("row 2: column 'content'", "half a character (\\ud83d)")),
    ("half a character in a response", rows(summary="a\udc00"), ("row 2: column 'summary'", "half a character")),
    ("half a character in a history", rows(history=[["\ud83d", ""]]), ("row 2: column 'history'", "half"), HISTORY),
    ("all rows empty", EMPTY * 3, ("train.json holds nothing to use: all 3 rows", "--prompt_column")),
    ("all responses empty", rows(summary=" ")[len(LINE) :], "train.json holds nothing to use"),
    ("all prompts null", rows(content=None)[len(LINE) :], "train.json holds nothing to use"),
    ("the rows asked for are empty", EMPTY + LINE, "nothing to use: all 1 rows", {"max_train_samples": 1}),
    ("no history column", LINE, ("row 1 has no column 'history'", "--history_column"), HISTORY),
    ("a history of text", rows(history="你好"), ("row 2: column 'history'", "but is text"), HISTORY),
    ("a flat history", rows(history=["问", "答"]), ("row 2: column 'history'", "item 1 is text"), HISTORY),
    ("a history of triples", rows(history=[["a", "b", "c"]]), ("row 2: column 'history'", "a list of 3"), HISTORY),
    ("a history of objects", rows(history=[{"role": "user"}]), ("row 2: column 'history'", "an object"), HISTORY),
    ("null in a history", rows(history=[["a", None]]), ("row 2: column 'history'", "nothing (null)"), HISTORY),
    ("a history that is false", rows(history=False), ("row 2: column 'history'", "a truth value"), HISTORY),
    ("UTF-16 with an odd byte", codecs.BOM_UTF16_LE + LINE.encode("utf-16-le") + b"x", "train.json starts with the"),
    ("a UTF-8 mark before UTF-16", codecs.BOM_UTF8 + LINE.encode("utf-16-le"), ("train.json", "UTF-8")),
    ("a UTF-32 mark only before UTF-8", codecs.BOM_UTF32_LE + LINE.encode(), "mark of UTF-32 but is not UTF-32"),
    ("files with marks joined", (codecs.BOM_UTF8 + LINE.encode()) * 2, ("train.json line 2 is not JSON", "BOM")),
    (
        "a stray byte in UTF-8",
        LINE.encode() * 9 + b'{"content": "\xff"}\n',
        ("line 10, byte", "not UTF-8, though the rest"),
    ),
    ("lines of two encodings", LINE.encode() * 9 + LINE.encode("gbk"), ("line 10, byte", "repair that line")),
    ("a line of 20 MB that is not JSON", "x" * 20_000_000, "train.json line 1 is not JSON"),
    ("lists 100,000 deep in an array", "[" + deep(100_000) + "]", ("train.json", "nested")),
    ("objects 100,000 deep in a row", LINE + deep(100_000, '{"a":', "}"), ("train.json line 2", "nested")),
    ("a number of 5,000 digits", LINE + '{"content": ' + "9" * 5000 + "}\n", ("train.json line 2", "digits")),
    ("a number of 5,000 digits in an array", '[{"content": ' + "9" * 5000 + "}]", ("train.json", "digits")),
]


@table(DATA)
def test_a_data_file_is_refused(case, forks, here):
    content, says, *more = case
    file = here / "train.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(forks, here, train_flags(here, **(more[0] if more else {})), says)


# What is wrong, content of rows.csv, what the message says[, flags].
CSV = [
    ("header only", "content,summary\n", "rows.csv holds no rows"),
    ("too many cells", "content,summary\na,b\nc,d,e\n", ("rows.csv row 2 (line 3) has 3 cells", "'e'")),
    ("an open quote", 'content,summary\na,b\n"c,d\n', "rows.csv row 2 (line 3) is not CSV"),
    ("a quote inside a cell", 'content,summary\n"a"b,c\n', "rows.csv row 1 (line 2) is not CSV"),
    ("semicolons", "content;summary\na;b\n", ("row 1 has no column 'content'", "content;summary")),
    ("no such column", "question,summary\na,b\n", ("row 1 has no column 'content'", "question, summary")),
    ("a history in a cell", 'content,summary,history\na,b,"[]"\n', ("column 'history'", "is text ('[]')"), HISTORY),
    ("a column named twice", "content,content,summary\na,b,c\n", ("rows.csv", "'content'", "twice")),
    (
        "a cell of 200,000 characters",
        f"content,summary\n{'a' * 200_000},b\n",
        ("rows.csv row 1 (line 2)", "field limit"),
    ),
    ("too few cells", "content,summary\na,b\nc\n", ("rows.csv row 2 (line 3) has 1 cell", "2 columns")),
    ("JSON under the name of CSV", LINE * 2, ("rows.csv", "column 'content'")),
    ("NUL bytes", "content,summary\na\0,b\n", "rows.csv line 2, byte"),
]


@table(CSV)
def test_a_csv_file_is_refused(case, forks, here):
    content, says, *more = case
    (here / "rows.csv").write_text(content, encoding="utf-8")
    refuse(forks, here, train_flags(here, train_file=here / "rows.csv", **(more[0] if more else {})), says)


def folder_of_data(here):
    (here / "data").mkdir()
    (here / "data" / "train.json").write_text(LINE)


def link_to_nowhere(here):
    (here / "data").symlink_to(here / "absent")


def link_to_itself(here):
    (here / "data").symlink_to(here / "data")


def unreadable(here):
    (here / "data").write_text(LINE)
    (here / "data").chmod(0)


def unreadable_folder(here):
    (here / "folder").mkdir()
    (here / "folder" / "train.json").write_text(LINE)
    (here / "folder").chmod(0)


# What is wrong, how it is made, the path that is given, what the message says.
PATHS = [
    ("a folder", folder_of_data, "data", ("data is a folder", "data/train.json")),
    ("a link to nowhere", link_to_nowhere, "data", "data does not exist"),
    ("a link to itself", link_to_itself, "data", "data"),
    ("a file that may not be read", unreadable, "data", ("data: Permission denied", "ls -l")),
    ("a file in a folder that may not be entered", unreadable_folder, "folder/train.json", "Permission denied"),
    ("a pipe", lambda here: os.mkfifo(here / "data"), "data", ("data is no regular file", "copy")),
    ("a device", lambda here: None, "/dev/null", "/dev/null is no regular file"),
    ("a name too long", lambda here: None, "x" * 300, "File name too long"),
    ("a file taken for a folder", lambda here: None, "train.json/rows", "train.json/rows does not exist"),
    ("an empty name", lambda here: None, "", "--do_train needs --train_file"),
]


@table(PATHS)
def test_the_path_of_a_data_file_is_refused(case, forks, here):
    make, path, says = case
    make(here)
    try:
        refuse(forks, here, train_flags(here, train_file=path), says, as_root=False)
    finally:
        if (here / "folder").exists():
            (here / "folder").chmod(0o700)


def test_the_other_data_files_are_checked_too(forks, here):
    (here / "dev.json").write_text("{\n")
    dev = {"validation_file": here / "dev.json", "eval_strategy": "steps"}
    refuse(forks, here, train_flags(here, **dev), "dev.json line 1 is not JSON")
    words = predict_flags(here, test_file=here / "dev.json", model_name_or_path=TINY, **COLUMNS)
    refuse(forks, here, words, "dev.json line 1 is not JSON")
