"""Data: equal to the official features, and one clear message for everything a file can have wrong."""

import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import sentencepiece
from conftest import ROOT

from chatglm2.conversation import conversation
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from data import encoding
from data.batches import BLANK_ROW, EvenBatches, RowOrder, WithBlankRow, collate_prediction, collate_training
from data.description import describe_training
from data.encoding import encode_prediction, encode_training
from data.examples import load_examples
from data.rows import read_rows

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "golden"
ADGEN = SHARED / "AdvertiseGen"
ROWS = [{"content": "类型#裤*风格#简约", "summary": "简约的裤子。"}, {"content": "类型#裙", "summary": "好看的裙子 "}]
TURNS = [["你好", "你好！"], ["今天天气？", "很好"]]


def skip_without(path):
    if not path.exists():
        pytest.skip(f"reference data of the official scripts is not here: {path}")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of `datasets` that starts empty and that nobody else reads."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets-cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def real_tokenizer():
    skip_without(SHARED / "chatglm2-tokenizer")
    return ChatGLMTokenizer.from_pretrained(SHARED / "chatglm2-tokenizer")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-tokenizer")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"问题{i}：今天是第{i}天。The answer is {i}, ok? [Round]\n答" for i in range(200)]),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return ChatGLMTokenizer.from_pretrained(tokenizer_folder)


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    """Writes rows (as JSON lines), text or bytes to a file and returns its path."""

    def write_file(content, name="train.json"):
        if isinstance(content, list):
            content = as_lines(content)
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return write_file


# ---- equal to the official scripts


@pytest.mark.parametrize("case", ["public_mqa", "public_projection"])
def test_training_features_equal_the_official_ones_without_their_padding(case, real_tokenizer):
    skip_without(GOLDEN / f"forward.{case}.npz")
    settings = json.loads((GOLDEN / f"forward.{case}.json").read_text())
    official = numpy.load(GOLDEN / f"forward.{case}.npz")
    examples, _ = load_examples(ADGEN / "dev.json", "content", "summary")
    encoded = encode_training(
        examples.select(settings["rows"]),
        real_tokenizer,
        max_source_length=settings["max_source_length"],
        max_target_length=settings["max_target_length"],
    )
    assert len(encoded) == len(official["input_ids"])
    for feature, input_ids, labels in zip(encoded, official["input_ids"], official["labels"], strict=True):
        length = len(feature["input_ids"])
        assert feature["input_ids"] == input_ids[:length].tolist()
        assert feature["labels"] == labels[:length].tolist()
        assert not input_ids[length:].any()
        assert (labels[length:] == -100).all()


def test_prediction_batch_equals_the_official_one(real_tokenizer):
    skip_without(GOLDEN / "forward.public_mqa.json")
    settings = json.loads((GOLDEN / "forward.public_mqa.json").read_text())
    examples, _ = load_examples(ADGEN / "dev.json", "content", "summary")
    encoded = encode_prediction(
        examples.select(settings["rows"]),
        real_tokenizer,
        max_source_length=settings["max_source_length"],
        max_target_length=64,
    )
    batch = collate_prediction(list(encoded), pad_token_id=real_tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == settings["generate"]["input_ids"]
    padding = [row.count(0) for row in settings["generate"]["input_ids"]]
    length = batch["input_ids"].shape[1]
    assert batch["attention_mask"].tolist() == [[0] * pad + [1] * (length - pad) for pad in padding]
    assert batch["position_ids"].tolist() == [[0] * pad + [*range(length - pad)] for pad in padding]


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


# ---- rows that are used and rows that are skipped


MIXED = [
    {"content": "", "summary": "b"},
    {"content": "c", "summary": "d"},
    {"content": "e", "summary": None},
    {"content": "f", "summary": " "},
    {"content": "g", "summary": "h"},
]


def test_training_skips_and_counts_rows_without_prompt_or_response(write):
    examples, skipped = load_examples(write(MIXED), "content", "summary")
    assert (examples["row"][:], examples["prompt"][:], skipped) == ([2, 5], ["c", "g"], 3)


def test_prediction_keeps_rows_without_a_response(write):
    examples, skipped = load_examples(write(MIXED), "content", "summary", keep_unlabelled=True)
    assert (examples["row"][:], examples["response"][:], skipped) == ([2, 3, 4, 5], ["d", "", " ", "h"], 1)


def test_prediction_needs_no_response_column(write):
    examples, _ = load_examples(write([{"content": "c"}]), "content", None, keep_unlabelled=True)
    assert examples[0] == {"prompt": "c", "response": "", "history": [], "row": 1}


def test_max_samples_takes_the_first_rows_of_the_file_before_skipping(write):
    examples, skipped = load_examples(write(MIXED), "content", "summary", max_samples=3)
    assert (examples["row"][:], skipped) == ([2], 2)
    assert len(load_examples(write(MIXED), "content", "summary", max_samples=99)[0]) == 2


def test_history_is_kept_and_may_be_absent_from_a_row(write):
    rows = [{**ROWS[0], "history": TURNS}, {**ROWS[1], "history": None}, ROWS[1], {**ROWS[1], "history": []}]
    examples, _ = load_examples(write(rows), "content", "summary", "history")
    assert examples["history"][:] == [TURNS, [], [], []]


def as_messages(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def test_messages_are_the_same_row_as_prompt_response_and_history(write):
    examples, _ = load_examples(
        write([{"messages": as_messages("你好", "你好！", "今天天气？", "很好", "那明天呢", "也好")}]),
        None,
        None,
        messages_column="messages",
    )
    assert examples[0] == {"prompt": "那明天呢", "response": "也好", "history": TURNS, "row": 1}


def test_system_message_stands_before_the_first_question(write):
    rows = [
        {"messages": as_messages("问", "答", "再问", "再答", system="简短")},
        {"messages": as_messages("问", "答", system="简短")},
    ]
    examples, _ = load_examples(write(rows), None, None, messages_column="messages")
    assert (examples["prompt"][:], examples["history"][:]) == (["再问", "简短\n问"], [[["简短\n问", "答"]], []])


def test_dialogue_without_turns_or_with_an_empty_answer_is_skipped(write):
    dialogues = [[], None, as_messages("问", " "), as_messages("问", "答")]
    examples, skipped = load_examples(
        write([{"messages": messages} for messages in dialogues]), None, None, messages_column="messages"
    )
    assert (examples["row"][:], skipped) == ([4], 3)


def test_prediction_answers_a_dialogue_that_ends_with_the_question(write):
    rows = [{"messages": as_messages("问", "答", "再问")}, {"messages": as_messages("问", "答")}]
    examples, _ = load_examples(write(rows), None, None, messages_column="messages", keep_unlabelled=True)
    assert (examples["prompt"][:], examples["response"][:]) == (["再问", "问"], ["", "答"])
    assert examples["history"][:] == [[["问", "答"]], []]


def test_opening_answers_and_messages_of_one_side_in_a_row_are_joined():
    messages = [("assistant", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    assert conversation(messages) == ("e", [("", "a\nb"), ("c", "d")])


def test_an_edited_file_is_read_again_even_with_the_same_time_and_size(write):
    path = write([{"content": "a", "summary": "b"}])
    stamp = path.stat().st_mtime_ns
    load_examples(path, "content", "summary")
    write([{"content": "c", "summary": "d"}])
    os.utime(path, ns=(stamp, stamp))
    assert load_examples(path, "content", "summary")[0][0]["prompt"] == "c"


# ---- token ids and labels


def encode_one(tokenizer, write, row, history_column=None, **settings):
    examples, _ = load_examples(write([row]), "content", "summary", history_column)
    return encode_training(examples, tokenizer, **{"max_source_length": 64, "max_target_length": 64, **settings})[0]


def test_prompt_tokens_do_not_contribute_to_loss(tokenizer, write):
    feature = encode_one(tokenizer, write, ROWS[0])
    prompt = tokenizer.encode(tokenizer.build_prompt(ROWS[0]["content"]))
    answer = tokenizer.encode(ROWS[0]["summary"], add_special_tokens=False) + [tokenizer.eos_token_id]
    assert feature["input_ids"] == prompt + answer
    assert feature["labels"] == [-100] * len(prompt) + answer


def test_without_ignoring_the_pad_token_it_labels_the_prompt(tokenizer, write):
    feature = encode_one(tokenizer, write, ROWS[0], ignore_pad_token_for_loss=False)
    masked = encode_one(tokenizer, write, ROWS[0])
    assert feature["labels"] == [tokenizer.pad_token_id if label == -100 else label for label in masked["labels"]]


def test_history_and_source_prefix_stand_in_the_prompt(tokenizer, write):
    row = {"content": "然后呢", "summary": "好", "history": TURNS}
    feature = encode_one(tokenizer, write, row, "history", source_prefix="请答：", max_source_length=999)
    prompt = "请答：" + tokenizer.build_prompt("然后呢", TURNS)
    assert "[Round 3]" in prompt
    assert feature["input_ids"][: feature["source_length"]] == tokenizer.encode(prompt)


LONG_DIALOGUE = {"content": "那明天呢", "summary": "好", "history": [[f"第{i}天？", "很好" * 5] for i in range(8)]}


@pytest.mark.parametrize("kept", [8, 7, 3, 0])
def test_dialogue_that_is_too_long_loses_its_oldest_turns_only(kept, tokenizer, write):
    history = LONG_DIALOGUE["history"][8 - kept :]
    prompt = tokenizer.encode(tokenizer.build_prompt("那明天呢", history))
    for limit in (len(prompt), len(prompt) + 5):  # a turn has more than 5 tokens
        feature = encode_one(tokenizer, write, LONG_DIALOGUE, "history", max_source_length=limit)
        assert feature["input_ids"][: len(prompt)] == prompt
        assert feature["labels"].count(-100) == len(prompt)
        assert feature["dropped_turns"] == 8 - kept
        assert feature["source_length"] == len(
            tokenizer.encode(tokenizer.build_prompt("那明天呢", LONG_DIALOGUE["history"]))
        )


def test_question_of_a_dialogue_that_is_too_long_alone_keeps_the_answer_marker(tokenizer, write):
    row = {"content": "今天" * 40, "summary": "好", "history": TURNS}
    feature = encode_one(tokenizer, write, row, "history", max_source_length=60, source_prefix="请答：")
    length = feature["labels"].count(-100)
    text = tokenizer.decode(feature["input_ids"][:length])
    assert 60 - 3 <= length <= 60
    assert text.startswith("请答：[Round 1]\n\n问：今天今天") and text.endswith("天\n\n答：")
    assert feature["dropped_turns"] == 2


def test_question_without_a_history_is_cut_at_its_end_as_in_the_official_script(tokenizer, write):
    row = {"content": "今天" * 40, "summary": "好", "history": []}
    feature = encode_one(tokenizer, write, row, "history", max_source_length=60)
    assert feature["input_ids"][:60] == tokenizer.encode(tokenizer.build_prompt(row["content"]))[:60]
    assert feature["dropped_turns"] == 0


def test_prediction_cuts_a_dialogue_as_training_does(tokenizer, write):
    examples, _ = load_examples(write([LONG_DIALOGUE]), "content", "summary", "history")
    lengths = {"max_source_length": 80, "max_target_length": 8}
    trained, predicted = (encode(examples, tokenizer, **lengths)[0] for encode in (encode_training, encode_prediction))
    assert predicted["input_ids"] == trained["input_ids"][: trained["labels"].count(-100)]
    assert predicted["dropped_turns"] == trained["dropped_turns"] > 0


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_cut_at_the_limit_keeps_lengths_masks_and_the_end_token(offset, tokenizer, write):
    full = encode_one(tokenizer, write, {"content": "今天" * 20, "summary": "答" * 30}, max_source_length=999)
    source_limit, target_limit = full["source_length"] + offset, full["target_length"] + offset
    feature = encode_one(
        tokenizer,
        write,
        {"content": "今天" * 20, "summary": "答" * 30},
        max_source_length=source_limit,
        max_target_length=target_limit,
    )
    sources, targets = min(full["source_length"], source_limit), min(full["target_length"], target_limit)
    assert len(feature["input_ids"]) == len(feature["labels"]) == sources + targets + 1
    assert feature["input_ids"][:sources] == full["input_ids"][:sources]
    assert feature["input_ids"][-1] == feature["labels"][-1] == tokenizer.eos_token_id
    assert feature["labels"].count(-100) == sources
    assert (feature["source_length"], feature["target_length"]) == (full["source_length"], full["target_length"])


def test_prediction_features_hold_the_prompt_the_cut_reference_and_the_row(tokenizer, write):
    examples, _ = load_examples(write(MIXED), "content", "summary", keep_unlabelled=True)
    encoded = encode_prediction(examples, tokenizer, max_source_length=64, max_target_length=3)
    assert encoded["row"][:] == [2, 3, 4, 5]
    assert encoded[0]["input_ids"] == tokenizer.encode(tokenizer.build_prompt("c"))
    assert encoded[0]["labels"] == tokenizer.encode("d")[:3]
    assert encoded[1]["labels"] == tokenizer.prefix_tokens


def test_source_length_below_the_fixed_part_is_refused_with_the_minimum(tokenizer, write):
    examples, _ = load_examples(write(ROWS), "content", "summary")
    minimum = len(tokenizer.encode("前缀" + tokenizer.build_prompt("")))
    settings = {"source_prefix": "前缀", "max_target_length": 8}
    for encode in (encode_training, encode_prediction):
        with pytest.raises(ValueError, match=rf"--max_source_length {minimum - 1} .*at least {minimum} "):
            encode(examples, tokenizer, max_source_length=minimum - 1, **settings)
        assert len(encode(examples, tokenizer, max_source_length=minimum, **settings)) == 2


def test_target_length_of_nothing_is_refused(tokenizer, write):
    examples, _ = load_examples(write(ROWS), "content", "summary")
    with pytest.raises(ValueError, match="--max_target_length 0"):
        encode_training(examples, tokenizer, max_source_length=64, max_target_length=0)


# ---- cache and workers


def encode_file(path, tokenizer, **settings):
    examples, _ = load_examples(path, "content", "summary")
    return encode_training(examples, tokenizer, **{"max_source_length": 64, "max_target_length": 64, **settings})


def test_features_are_computed_once_and_again_when_asked(tokenizer, write, monkeypatch):
    calls = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: calls.append(texts) or encode_batch(texts))
    path = write([{"content": "once", "summary": "only"}])
    encode_file(path, tokenizer)
    first = len(calls)
    calls.clear()
    encode_file(path, tokenizer)
    assert len(calls) == 1 < first  # only the check of the lengths
    calls.clear()
    encode_file(path, tokenizer, overwrite_cache=True)
    assert len(calls) == first


def test_cached_features_change_with_settings_vocabulary_and_code(tokenizer, tmp_path, write, monkeypatch):
    path = write(ROWS)
    base = encode_file(path, tokenizer)._fingerprint
    assert encode_file(path, tokenizer, num_workers=2)._fingerprint == base
    others = {
        encode_file(path, tokenizer, max_source_length=63)._fingerprint,
        encode_file(path, tokenizer, max_target_length=63)._fingerprint,
        encode_file(path, tokenizer, source_prefix="a")._fingerprint,
        encode_file(path, tokenizer, ignore_pad_token_for_loss=False)._fingerprint,
    }
    monkeypatch.setattr(tokenizer, "model_sha256", "another vocabulary")
    others.add(encode_file(path, tokenizer)._fingerprint)
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "code_sha256", lambda: "other code")
    others.add(encode_file(path, tokenizer)._fingerprint)
    assert len(others | {base}) == 7


def test_ranks_that_start_together_share_one_cache(tokenizer_folder, tokenizer, tmp_path, write, monkeypatch):
    path = write([{"content": f"问题{i}", "summary": f"答{i}"} for i in range(50)])
    code = (
        "import sys; from data import encoding, examples; from chatglm2.tokenization_chatglm import ChatGLMTokenizer\n"
        "rows, _ = examples.load_examples(sys.argv[1], 'content', 'summary')\n"
        "tokenizer = ChatGLMTokenizer.from_pretrained(sys.argv[2])\n"
        "encoded = encoding.encode_training(rows, tokenizer, max_source_length=64, max_target_length=64)\n"
        "print(encoded._fingerprint, len(encoded), encoded[7]['labels'])"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(tokenizer_folder)],
            cwd=ROOT / "ptuning",
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    here = encode_file(path, tokenizer)
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].split(maxsplit=2)[1:] == ["50", str(here[7]["labels"]) + "\n"]


def test_many_workers_on_a_larger_file_give_the_same_features(tokenizer, write, monkeypatch):
    monkeypatch.setattr(encoding, "ROWS_PER_WORKER", 20)
    monkeypatch.setattr(encoding.os, "cpu_count", lambda: 2)
    path = write([{"content": f"问题{i}", "summary": f"答{i}" * (i % 7 + 1)} for i in range(60)])
    alone = encode_file(path, tokenizer)[:]
    together = encode_file(path, tokenizer, num_workers=10, overwrite_cache=True)
    assert together[:] == alone


# ---- batches


def feature(length, first=1):
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "source_length": 1, "row": 7}


def test_training_batch_is_padded_on_the_right_to_a_multiple_of_8():
    import torch

    batch = collate_training([feature(3), feature(9)], pad_token_id=0)
    assert list(batch) == ["input_ids", "labels", "row"]
    assert batch["row"].tolist() == [7, 7]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [0] * 13
    assert batch["labels"][0].tolist() == [-100, 2, 3] + [-100] * 13
    assert collate_training([feature(8)], pad_token_id=0)["input_ids"].shape == (1, 8)


def test_a_batch_without_a_supervised_token_is_refused_by_row_number():
    empty = {**feature(3), "labels": [5, -100, -100], "row": 12}  # the first label is predicted from nothing
    assert collate_training([empty, feature(3)], pad_token_id=0)["row"].tolist() == [12, 7]
    with pytest.raises(ValueError, match="row 12, 40: a batch without a single supervised token"):
        collate_training([{**empty, "row": 40}, empty], pad_token_id=0)


def test_several_processes_get_equally_many_full_batches_without_repeating_a_row():
    from torch.utils.data import BatchSampler

    rows = [{**feature(3), "row": number} for number in range(1, 11)]
    dataset = WithBlankRow(rows)
    batches = EvenBatches(BatchSampler(range(len(dataset)), batch_size=4, drop_last=False), 4, blank=len(dataset))
    assert list(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 10], [10, 10, 10, 10]]
    assert len(batches) == 4
    numbers = [dataset[index]["row"] for batch in batches for index in batch]
    assert numbers == [*range(1, 11), 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("label_pad_id", [-100, 0])
def test_nothing_is_supervised_in_a_blank_row(label_pad_id):
    batch = collate_training([feature(3), BLANK_ROW], pad_token_id=0, label_pad_id=label_pad_id)
    assert batch["labels"][0].tolist() == [-100, 2, 3] + [label_pad_id] * 5
    assert batch["labels"][1].tolist() == [-100] * 8
    assert batch["row"].tolist() == [7, 0]
    blank = collate_training([BLANK_ROW, BLANK_ROW], pad_token_id=0, label_pad_id=label_pad_id)
    assert (blank["labels"] == -100).all() and blank["input_ids"].shape == (2, 8)


def test_a_row_whose_every_token_is_ignored_is_refused_before_training(write):
    # The pad token is the unknown token, never learned; in a model whose end is that token too a row may have no other.
    tokenizer = SimpleNamespace(
        pad_token_id=0,
        eos_token_id=0,
        prefix_tokens=[1, 2],
        model_sha256="none",
        build_prompt=lambda prompt, history=None: prompt,
        encode_batch=lambda texts: [[0] if text == "?" else [5] for text in texts],
    )
    rows = [{"content": "a", "summary": "b"}, {"content": "a", "summary": "?"}]
    examples, _ = load_examples(write(rows), "content", "summary")
    with pytest.raises(ValueError, match="row 2 has nothing to learn"):
        encode_training(examples, tokenizer, max_source_length=64, max_target_length=64)


def test_padding_labels_can_be_other_than_ignored():
    batch = collate_training([feature(3)], pad_token_id=0, label_pad_id=0)
    assert batch["labels"][0].tolist() == [-100, 2, 3, 0, 0, 0, 0, 0]


def test_prediction_batch_is_padded_on_the_left_and_its_labels_on_the_right():
    batch = collate_prediction([feature(2), feature(4)], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 2, 3, 4]]


# ---- the order of the rows

LENGTHS = [random.Random(row).randrange(20, 193) for row in range(103)]


def chunks(sequence, size):
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


@pytest.mark.parametrize("window", [1, 3])
def test_an_epoch_reads_every_row_once_in_an_order_of_seed_and_epoch(window):
    settings = {"batch_size": 4, "batches_per_step": 4, "window": window}
    orders = {
        (seed, epoch): list(RowOrder(LENGTHS, **settings, seed=seed, epoch=lambda epoch=epoch: epoch))
        for seed, epoch in ((1, 0), (1, 1), (5, 0))
    }
    assert all(sorted(order) == list(range(103)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 3
    assert list(RowOrder(LENGTHS, **settings, seed=1)) == orders[1, 0]


def test_a_step_gets_the_rows_of_plain_random_sampling():
    import torch

    plain = torch.randperm(103, generator=torch.Generator().manual_seed(7 + 2)).tolist()
    grouped = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=4, seed=7, epoch=lambda: 2))
    assert [set(step) for step in chunks(grouped, 16)] == [set(step) for step in chunks(plain, 16)]
    assert list(RowOrder([9] * 103, batch_size=1, batches_per_step=1, seed=7, epoch=lambda: 2)) == plain


def test_rows_of_one_batch_are_of_like_length():
    for step in chunks(list(RowOrder(LENGTHS, batch_size=4, batches_per_step=4)), 16)[:-1]:
        batches = sorted(sorted(LENGTHS[row] for row in batch) for batch in chunks(step, 4))
        assert all(shorter[-1] <= longer[0] for shorter, longer in zip(batches, batches[1:], strict=False))


def test_two_processes_and_one_that_accumulates_make_steps_of_the_same_rows():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    alone = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=4))
    together = RowOrder(LENGTHS, batch_size=4, batches_per_step=4, num_processes=2)
    shards = [list(BatchSamplerShard(BatchSampler(together, 4, False), 2, process)) for process in range(2)]
    for step, rows in enumerate(chunks(alone, 16)[:-1]):
        batches = [shard[2 * step : 2 * step + 2] for shard in shards]
        assert sorted(rows) == sorted(row for shard in batches for batch in shard for row in batch)
        for first, second in zip(*batches, strict=True):  # computed at the same time
            others = set(rows) - set(first) - set(second)
            longest, shortest = (pick(LENGTHS[row] for row in first + second) for pick in (max, min))
            assert all(LENGTHS[row] <= shortest or LENGTHS[row] >= longest for row in others)


def test_a_window_of_steps_pads_less_and_mixes_short_and_long_steps():
    def padded(order):
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in chunks(order, 4))

    step = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=1))
    window = list(RowOrder(LENGTHS, batch_size=4, batches_per_step=1, window=25))
    assert padded(window) < 1.06 * sum(LENGTHS) < padded(step)
    means = [sum(LENGTHS[row] for row in batch) for batch in chunks(window, 4)[:25]]
    assert means != sorted(means)


# ---- what the user sees


def test_description_counts_rows_and_cut_texts_and_marks_what_is_learned(tokenizer, write):
    rows = [{"content": "今天", "summary": "答" * size} for size in (3, 3, 3, 30)] + [{"content": "", "summary": ""}]
    examples, skipped = load_examples(write(rows), "content", "summary")
    encoded = encode_training(examples, tokenizer, max_source_length=64, max_target_length=10)
    text = describe_training(encoded, tokenizer, skipped=skipped, max_source_length=64, max_target_length=10)
    assert "5 rows read, 1 skipped (empty prompt or response), 4 used" in text
    assert "25% of the responses lose their end at 10 tokens; raise --max_target_length" in text
    assert "of the prompts" not in text
    assert text.endswith("[gMASK] sop [Round 1]\n\n问：今天\n\n答：⟦答答答 </s>⟧")
    response = next(line for line in text.splitlines() if line.strip().startswith("response"))
    assert response.split()[-2:] == ["10", "25.0%"]


def test_description_says_how_many_dialogues_lose_their_oldest_turns(tokenizer, write):
    examples, skipped = load_examples(write([LONG_DIALOGUE, ROWS[0]]), "content", "summary", "history")
    lengths = {"max_source_length": 80, "max_target_length": 64}
    text = describe_training(encode_training(examples, tokenizer, **lengths), tokenizer, skipped=skipped, **lengths)
    assert "50% of the prompts lose their oldest turns at 80 tokens; raise --max_source_length to keep them." in text
    assert "lose their end" not in text
    assert text.endswith("问：那明天呢\n\n答：⟦好 </s>⟧")


def test_importing_the_module_leaves_the_slow_libraries_alone():
    code = "import sys, data.splits; print([name for name in ('datasets', 'torch', 'pandas') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "ptuning", capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
