"""Files of every format and encoding, and one clear message for everything one can have wrong."""

import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from support.rows import ADGEN, ROWS, as_lines, own_cache, skip_without, write  # noqa: F401, fixtures

from data.examples import load_examples
from data.rows import read_rows

# ---- equal to the official scripts


def test_gb18030_file_gives_the_rows_of_the_utf8_file():
    skip_without(ADGEN / "train.gb18030.json")
    assert read_rows(ADGEN / "train.gb18030.json") == read_rows(ADGEN / "train.json")


# ---- formats and encodings


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", as_lines(ROWS)),
        ("lines.jsonl", as_lines(ROWS)),
        ("no-final-newline.json", as_lines(ROWS).rstrip("\n")),
        ("blank-lines.json", "\n" + as_lines(ROWS).replace("\n", "\n\n")),
        ("windows-line-ends.json", as_lines(ROWS).replace("\n", "\r\n")),
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, ensure_ascii=False, indent=4)),
        ("table.csv", 'content,summary\n类型#裤*风格#简约,简约的裤子。\n类型#裙,"好看的裙子 "\n'),
        ("TABLE.CSV", 'content,summary\r\n类型#裤*风格#简约,简约的裤子。\r\n类型#裙,"好看的裙子 "\r\n'),
    ],
)
def test_every_format_gives_the_same_rows(name, content, write):
    assert read_rows(write(content, name)) == ROWS


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "gbk", "gb18030", "gb2312"],
)
@pytest.mark.parametrize("name", ["train.json", "train.csv"])
def test_every_encoding_gives_the_same_rows(encoding, name, write):
    text = (
        as_lines(ROWS)
        if name == "train.json"
        else "content,summary\n类型#裤*风格#简约,简约的裤子。\n类型#裙,好看的裙子 \n"
    )
    assert read_rows(write(text.encode(encoding), name)) == ROWS


def test_traditional_chinese_in_big5_is_recognised(write):
    rows = [{"content": "設計", "summary": "這個產品設計簡約，適合日常穿著，顏色鮮豔，價格實惠，歡迎選購。"}] * 3
    assert read_rows(write(as_lines(rows).encode("big5"))) == rows


def test_unicode_line_separators_inside_text_do_not_end_a_row(write):
    rows = [{"content": "a\u2028b\x85c", "summary": "d"}]
    assert read_rows(write(rows)) == rows


def test_csv_cells_may_hold_commas_quotes_and_line_ends(write):
    rows = read_rows(write('content,summary\n"a, ""b""\nc",d\n', "train.csv"))
    assert rows == [{"content": 'a, "b"\nc', "summary": "d"}]


# ---- bad input: one clear message each


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "a.json is empty; expected JSON lines, a JSON array or CSV"),
        ("a.json", " \n\n", "a.json is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.csv", "content,summary\n", "a.csv holds no rows"),
        ("a.json", '{"a": "b"}\n{"a": "say "hi""}\n', 'a.json line 2 is not JSON .*column 13.*: {"a": "say "hi""}'),
        ("a.json", '{"a": "b"}\n\nnonsense' + "x" * 99, "a.json line 3 is not JSON .*: nonsensex{52}…\n"),
        ("a.json", json.dumps(ROWS[0], indent=2), "a.json line 1 is not JSON .*one whole JSON object per line"),
        ("a.json", '{"a": "b"}\n["a"]\n', r'a.json line 2 is a list, not a JSON object: \["a"\]'),
        ("a.json", '"text"\n', "a.json line 1 is text .'text'., not a JSON object"),
        ("a.json", '[\n {"a": "b"},\n {"a" "b"}\n]', 'a.json line 3 breaks the JSON array .*near: .*{"a" "b"}'),
        ("a.json", '[{"a": "b"}, 3]', r"a.json row 2 is a number \(3\), not a JSON object"),
        ("a.csv", "a,b\n1,2\n3,4,five\n", "a.csv row 2 .line 3. has 3 cells but the header names 2 .*'five'"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', r'a.csv row 2 \(line 3\) is not CSV \(.*\): "3,4'),
        ("a.json", random.Random(0).randbytes(3000), r"a.json line \d+, byte \d+ \(0x..\) is no text in UTF-8"),
        ("a.json", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0", r"a.json line 1, byte 0 \(0x89\) is no text"),
        ("a.json", as_lines(ROWS * 3).encode()[:-4] + b"\xff\n", r"a.json line 6, byte 386 .* not UTF-8, though"),
        ("a.json", b"\xff\xfe{", "a.json starts with the byte-order mark of UTF-16 but is not UTF-16"),
    ],
)
def test_unreadable_file_is_refused_by_name_and_place(name, content, message, write):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_rows(write(content, name))


TURN = '{"role": "user", "content": "a"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": "b"}\n\n{"a": "b", "c": "d", "a": "b"}', "a.json row 2 (line 3) has the key 'a' twice"),
        ("a.jsonl", '{"a": "b", "\\u0061": null}', "a.jsonl row 1 (line 1) has the key 'a' twice"),
        ("a.json", '[{"a": 1},\n{"b": {}},\n {\n"c": 1, "c": 2}]', "a.json row 3 (line 3) has the key 'c' twice"),
        (
            "a.json",
            f'[{{"m": []}}, {{"m":\n[{TURN},\n{{"role": "assistant", "content": "b", "content": ""}}]}}]',
            "a.json row 2 (line 3) has the key 'content' twice",
        ),
        ("a.json", '{"a": {"b": {"\u200b": 1, "\u200b": 2}}}', r"a.json row 1 (line 1) has the key '\u200b' twice"),
        ("a.json", '{"a": ' + "[" * 500 + '{"b": 1, "b": 2}' + "]" * 500 + "}", "row 1 (line 1) has the key 'b' twice"),
    ],
    ids=["line", "escaped", "array", "message", "invisible", "deep"],
)
def test_a_key_that_stands_twice_in_a_row_is_refused_with_both(name, content, message, write):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rows(write(content, name))


def test_keys_may_be_those_of_another_row_or_another_object(write):
    rows = [{"a": {"a": [{"a": 1}, {"a": 2}]}}, {"a": 3}]
    assert read_rows(write(rows)) == read_rows(write(json.dumps(rows), "b.json")) == rows


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json does not exist"):
        load_examples(tmp_path / "absent.json", "content", "summary")


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; name a data file in it"):
        load_examples(tmp_path, "content", "summary")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"contents": "a", "summary": "b"},
            {},
            "train.json row 2 has no column 'content'; .*: contents, summary; did you mean --prompt_column contents",
        ),
        ({"content": "a", "target": "b"}, {}, "row 2 has no column 'summary'; .*name one of them with --response_col"),
        ({"content": 3.5, "summary": "b"}, {}, r"row 2: column 'content' .*holds a number \(3.5\), expected text"),
        ({"content": True, "summary": "b"}, {}, r"row 2: column 'content' .*holds a truth value \(true\)"),
        ({"content": "a", "summary": ["b"]}, {}, "row 2: column 'summary' .*holds a list, expected text"),
        ({"content": "a", "summary": {"b": 1}}, {}, "row 2: column 'summary' .*holds an object"),
        ({"content": "a\ud83d", "summary": "b"}, {}, r"row 2: column 'content' holds half a character \(\\ud83d\)"),
        ({"history": "text"}, {"history_column": "history"}, r"row 2: column 'history' .*list of .* but is text"),
        ({"history": ["q", "a"]}, {"history_column": "history"}, "row 2: .*item 1 is text"),
        ({"history": [["q", "a"], ["q"]]}, {"history_column": "history"}, "row 2: .*item 2 is a list of 1"),
        ({"history": [["q", None]]}, {"history_column": "history"}, r"row 2: .*item 1 contains nothing \(null\)"),
        ({"history": [{"q": "a"}]}, {"history_column": "history"}, "row 2: .*item 1 is an object"),
        (
            {},
            {"history_column": "histroy"},
            "train.json row 1 has no column 'histroy'.*did you mean --history_column history",
        ),
        (
            {},
            {"prompt_column": None},
            r"--prompt_column is not set; the columns of \S+train.json are: content, summary, history",
        ),
    ],
)
def test_bad_row_is_refused_by_number_and_column(row, columns, message, write):
    base = {"content": "a", "summary": "b", "history": []}
    row = row if "summary" in row or "content" in row else {**base, **row}
    path = write("".join(json.dumps(each) + "\n" for each in (base, row)))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_examples(path, **{"prompt_column": "content", "response_column": "summary", **columns})


USER, ASSISTANT, SYSTEM = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", r"train.json row 2: column 'messages' \(--messages_column\) must be a list .* but is text"),
        ([USER, "text"], r"row 2: .*, turn 2: expected an object of role and content, found text"),
        ([{"from": "user"}], "turn 1: expected an object of role and content, found an object of from"),
        ([{"role": "human", "content": "a"}], "turn 1: the role is 'human', expected 'system' or 'user' here"),
        ([USER, USER, ASSISTANT], "turn 2: the role is 'user', expected 'assistant' here"),
        ([SYSTEM, ASSISTANT], "turn 2: the role is 'assistant', expected 'user' here"),
        ([USER, ASSISTANT, SYSTEM], "turn 3: the role is 'system', expected 'user' here"),
        ([USER, {"role": "assistant", "content": None}], r"turn 2: the content is nothing \(null\), expected text"),
        (
            [USER, {"role": "assistant", "content": "\ud83d"}],
            r"row 2, turn 2: column 'messages' holds half a character",
        ),
        ([USER, ASSISTANT, USER], "turn 3: a dialogue ends with the answer to learn, .* ends with 'user'"),
    ],
)
def test_bad_dialogue_is_refused_by_row_and_turn(messages, message, write):
    path = write("".join(json.dumps({"messages": each}) + "\n" for each in ([USER, ASSISTANT], messages)))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_examples(path, None, None, messages_column="messages")


def test_missing_messages_column_is_refused_with_the_nearest(write):
    with pytest.raises(ValueError, match="row 1 has no column 'message'.*did you mean --messages_column messages"):
        load_examples(write([{"messages": [USER, ASSISTANT]}]), None, None, messages_column="message")


@pytest.mark.parametrize("keep_unlabelled", [False, True])
def test_file_of_empty_rows_only_is_refused(keep_unlabelled, write):
    path = write([{"content": "", "summary": "b"}, {"content": None, "summary": "b"}])
    with pytest.raises(ValueError, match="nothing to use: all 2 rows"):
        load_examples(path, "content", "summary", keep_unlabelled=keep_unlabelled)


def test_a_refused_file_leaves_nothing_in_the_cache(write, own_cache):
    before = sorted(own_cache.rglob("*"))
    with pytest.raises(ValueError):
        load_examples(write([{"content": "", "summary": ""}]), "content", "summary")
    left = [path for path in own_cache.rglob("*") if path not in before and path.is_file()]
    assert [path for path in left if path.suffix != ".lock"] == []


def test_no_samples_are_refused(write):
    with pytest.raises(ValueError, match="0 samples of .*train.json"):
        load_examples(write(ROWS), "content", "summary", max_samples=0)


# ---- what the user sees


def test_importing_the_module_leaves_the_slow_libraries_alone():
    code = "import sys, data.splits; print([name for name in ('datasets', 'torch', 'pandas') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "ptuning", capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
