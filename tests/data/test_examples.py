"""Rows that are used and rows that are skipped; messages, histories, rows without a response."""

import os

from support.rows import MIXED, ROWS, TURNS, own_cache, write  # noqa: F401, fixtures

from chatglm2.conversation import conversation
from data.examples import load_examples


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
