"""Rows of two answers: every form that is read, what is left out, what is refused by file, row and column."""

import pytest
from support.rows import own_cache, tokenizer, tokenizer_folder, write  # noqa: F401, fixtures

from data.batches import WithBlankRow, collate_pairs
from data.encoding import encode_training
from data.examples import load_examples
from data.preferences import encode_pairs, load_pairs, look_at_pairs

COLUMNS = {"prompt_column": "q", "response_column": "a"}
GOOD = {"q": "问题", "chosen": "好的答", "rejected": "坏"}
LENGTHS = {"max_source_length": 64, "max_target_length": 64}

FORMS = {
    "two columns": GOOD,
    "what the page keeps": {**GOOD, "history": []},
    "a list": {"q": "问题", "a": ["好的答", "坏"]},
    "messages": {
        "q": "问题",
        "chosen": {"role": "assistant", "content": "好的答"},
        "rejected": [{"from": "gpt", "value": "坏"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_two_answers_gives_the_same_pair(write, form):
    dataset, skipped = load_pairs(write([FORMS[form]]), **COLUMNS)
    assert skipped == 0
    assert dataset[0] == {**{"prompt": "问题", "history": [], "row": 1}, "chosen": "好的答", "rejected": "坏"}


def test_a_dialogue_in_front_of_two_answers_is_history_and_question(write):
    turns = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    dataset, _ = load_pairs(write([{"m": turns, "chosen": "好", "rejected": "坏"}]), messages_column="m")
    assert (dataset[0]["prompt"], dataset[0]["history"]) == ("三", [["一", "二"]])


def test_empty_and_equal_answers_are_left_out_and_counted(write):
    rows = [
        GOOD,
        {**GOOD, "rejected": ""},
        {**GOOD, "rejected": "好的答"},
        {**GOOD, "q": " "},
        {**GOOD, "chosen": None},
        {**GOOD, "rejected": " 好的答\n"},
    ]
    said = []
    dataset, skipped = load_pairs(write(rows), **COLUMNS, say=said.append)
    assert dataset["row"][:] == [1] and skipped == 5
    assert len(said) == 1 and said[0].endswith("train.json: 2 pairs of two equal answers are left out, row 3, 6.")


def test_of_a_ranking_of_more_answers_the_first_two_are_read_and_it_is_said(write):
    rows = [
        GOOD,
        {"q": "问", "a": ["一", "二", "三", "四"]},
        {"q": "问", "a": ["一", "二"]},
        {"q": "问", "a": ["一", "二", ""]},
    ]
    said = []
    dataset, skipped = load_pairs(write(rows), **COLUMNS, say=said.append)
    assert skipped == 0 and [(row["chosen"], row["rejected"]) for row in dataset][1:] == [("一", "二")] * 3
    assert len(said) == 1 and said[0].endswith(
        "train.json: 2 rows have more than two answers, row 2, 4. The first two are read, as in ChatGLM-Efficient-Tuning."
    )


REFUSALS = {
    "no answers": ({"q": "问", "b": "答"}, "row 1 has no two answers: expected columns 'chosen' and 'rejected'"),
    "one text": ({"q": "问", "a": "答"}, "row 1 has no two answers"),
    "one of two": ({"q": "问", "chosen": "答"}, "row 1 has a 'chosen' answer, but no 'rejected' one"),
    "a number": ({**GOOD, "rejected": 3}, r"column 'rejected' \(the worse answer\) holds a number \(3\), expected"),
    "one in a list": ({"q": "问", "a": ["一"]}, r"column 'a' \(--response_column\) holds a list of 1"),
    "a list of numbers": ({"q": "问", "a": ["一", 2]}, r"column 'a\[1\]' .* holds a number \(2\)"),
    "the wrong role": ({**GOOD, "chosen": {"role": "user", "content": "x"}}, "a message of role 'user'"),
    "no prompt": ({"chosen": "一", "rejected": "二"}, "row 1 has no column 'q'"),
    "half a character": ({**GOOD, "chosen": "\ud83d"}, "half a character"),
    "only equal ones": ({**GOOD, "rejected": "好的答"}, "holds no pair .* of its 1 rows 1 have two equal answers"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_faulty_row_is_one_clear_line(write, case):
    import json

    row, message = REFUSALS[case]
    file = write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        load_pairs(file, **COLUMNS)
    if case != "only equal ones":  # the others are told before torch is loaded
        with pytest.raises(ValueError, match=message):
            look_at_pairs(file, {"prompt": "q", "response": "a", "query": None, "history": None, "messages": None})


def test_a_pair_is_encoded_as_two_training_rows(write, tokenizer):
    rows = [GOOD, {**GOOD, "q": "问题二", "history": [["一", "二"]]}]
    columns = {**COLUMNS, "history_column": "history"}
    encoded = encode_pairs(load_pairs(write(rows), **columns)[0], tokenizer, **LENGTHS)
    for name, column in (("", "chosen"), ("rejected_", "rejected")):
        examples, _ = load_examples(write(rows), **{**columns, "response_column": column})
        alone = encode_training(examples, tokenizer, **LENGTHS)
        for part in ("input_ids", "labels"):
            assert encoded[name + part][:] == alone[part][:]


def test_pairs_that_are_equal_once_they_are_cut_are_left_out(write, tokenizer):
    pairs, _ = load_pairs(write([GOOD, {**GOOD, "rejected": "好的答案"}]), **COLUMNS)
    said = []
    encoded = encode_pairs(pairs, tokenizer, max_source_length=64, max_target_length=4, say=said.append)
    assert encoded["row"][:] == [1]
    assert said == ["1 of 2 pairs are equal once their answers are cut to --max_target_length 4, and are left out."]
    with pytest.raises(ValueError, match="All 1 pairs are equal once"):
        encode_pairs(pairs.select([1]), tokenizer, max_source_length=64, max_target_length=4)


def test_a_row_with_one_answer_is_kept_to_be_scored_only(write, tokenizer):
    file = write([GOOD, {"q": "问", "a": "答"}])
    pairs, _ = load_pairs(file, keep_unlabelled=True, **COLUMNS)
    encoded = encode_pairs(pairs, tokenizer, **LENGTHS)
    assert encoded["rejected_input_ids"][1] == [] and len(encoded["input_ids"][1]) > 3


def test_a_batch_pads_both_answers_and_marks_blank_rows(write, tokenizer):
    encoded = encode_pairs(load_pairs(write([GOOD]), **COLUMNS)[0], tokenizer, **LENGTHS)
    rows = WithBlankRow(encoded)
    batch = collate_pairs([rows[0], rows[1]], pad_token_id=0)
    chosen, rejected = encoded[0]["input_ids"], encoded[0]["rejected_input_ids"]
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[:2] == (2, 2)
    assert batch["lengths"].tolist() == [[len(chosen), len(rejected)], [1, 1]]
    assert batch["weight"].tolist() == [1.0, 0.0] and batch["row"].tolist() == [1, 0]
    assert batch["input_ids"][0, 1, : len(rejected)].tolist() == rejected
    assert (batch["labels"][0, 1, len(rejected) :] == -100).all() and (batch["labels"][1] == -100).all()
