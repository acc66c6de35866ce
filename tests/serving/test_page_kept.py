"""What the browser keeps, what a thumb means, and what an empty page offers, without a browser."""

import json

import pytest
from conftest import TINY
from support.chat_server import remember

from serving import page_kept
from serving.page_examples import EXAMPLES, LONGEST, examples_of
from serving.page_kept import MAX_ASKED_AGAIN, MAX_CHARACTERS, FeedbackFile, checked, empty, preference, to_ask


@pytest.mark.parametrize(
    "sent",
    [None, [], "x", {"tuned": "x"}, {"tuned": [["a"]], "base": []}, {"tuned": [["a", 1]], "base": []}, {"tuned": []}],
    ids=str,
)
def test_what_a_browser_sends_in_another_form_is_an_empty_conversation(sent):
    assert checked(sent) == empty()


def test_what_a_browser_sends_is_cut_to_its_bounds():
    long = ["问" * (MAX_CHARACTERS // 2), "答"]
    sent = {**empty(), "tuned": [["a", "b"], long, long], "base": [[2 * long[0], "答"]], "draft": 5, "more": 1}
    assert checked(sent) == {**empty(), "tuned": [long], "base": [[2 * long[0], "答"]]}


A, B, C = ["a", "1"], ["b", "2"], ["c", "3"]
OWN_A = ["a", "one"]


@pytest.mark.parametrize(
    "tuned, base, modes, plan",
    [
        ([A, B], [], ("tuned", "both"), {"tuned": ([A, B], []), "base": ([], ["a", "b"])}),
        ([A, B], [OWN_A], ("tuned", "both"), {"tuned": ([A, B], []), "base": ([OWN_A], ["b"])}),
        ([A, B], [C], ("tuned", "base"), {"base": ([], ["a", "b"])}),
        ([], [OWN_A], ("base", "both"), {"tuned": ([], ["a"]), "base": ([OWN_A], [])}),
        ([A], [OWN_A], ("both", "base"), {"base": ([OWN_A], [])}),
    ],
)
def test_a_model_that_joins_is_asked_only_what_it_has_not_answered(tuned, base, modes, plan):
    assert to_ask({**empty(), "tuned": tuned, "base": base}, *modes) == (plan, 0)


def test_a_model_that_joins_a_long_conversation_is_asked_its_end():
    turns = [[str(number), "x"] for number in range(MAX_ASKED_AGAIN + 3)]
    plan, left_out = to_ask({**empty(), "tuned": turns}, "tuned", "base")
    assert plan == {"base": ([], [question for question, _ in turns[3:]])} and left_out == 3


@pytest.mark.parametrize(
    "kept, judged, row",
    [
        ({"tuned": [A], "base": [OWN_A]}, ("both", "tuned", 0, True), ("a", [], "1", "one")),
        ({"tuned": [A], "base": [OWN_A]}, ("both", "base", 0, True), ("a", [], "one", "1")),
        ({"tuned": [A], "base": [OWN_A]}, ("both", "tuned", 0, False), ("a", [], "one", "1")),
        ({"tuned": [A], "base": [OWN_A]}, ("tuned", "tuned", 0, True), None),  # the other one is not seen
        ({"tuned": [A, B], "base": [OWN_A, ["b", "two"]]}, ("both", "tuned", 1, True), None),  # other histories
        ({"tuned": [A, B], "earlier": {"tuned": "two"}}, ("tuned", "tuned", 1, True), ("b", [A], "2", "two")),
        ({"tuned": [A, B], "earlier": {"tuned": "two"}}, ("tuned", "tuned", 0, True), None),
        ({"tuned": [A], "earlier": {"tuned": "1"}}, ("tuned", "tuned", 0, True), None),  # the very answer
        ({"tuned": [A]}, ("tuned", "tuned", 7, True), None),
    ],
)  # fmt: skip
def test_a_thumb_compares_two_answers_to_one_question_and_history(kept, judged, row):
    names = ("prompt", "history", "chosen", "rejected")
    assert preference({**empty(), **kept}, *judged) == (dict(zip(names, row, strict=True)) if row else None)


def test_the_preference_file_grows_by_rows_up_to_its_bound(tmp_path, monkeypatch):
    file = FeedbackFile(tmp_path / "rows.jsonl")
    assert file.append({"prompt": "一\n"}) and file.append({"prompt": "一\n"}) and file.append({"prompt": "\ud800"})
    size = file.path.stat().st_size
    monkeypatch.setattr(page_kept, "MAX_FEEDBACK_BYTES", size + 3)
    assert not file.append({"prompt": "b"}) and file.path.stat().st_size == size
    assert [json.loads(line)["prompt"] for line in file.path.read_text("utf-8").splitlines()] == ["一\n", "?"]


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([{"content": text} for text in ("甲", "甲", "长" * (LONGEST + 1), "乙", 3, "丙", "丁")], {"prompt_column": "content"}),
        ([{"m": [{"role": "user", "content": text}]} for text in "甲乙丙"] + [{"m": [3]}], {"messages_column": "m"}),
    ],
)  # fmt: skip
def test_an_empty_page_offers_questions_of_the_runs_dev_rows(tmp_path, rows, columns):
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ptuning.json").write_text("{}")
    remember(tmp_path, training={"train_file": str(tmp_path / "train.json")}, **columns)
    assert examples_of(tmp_path) == ["甲", "乙", "丙"]


@pytest.mark.parametrize("dev", ["", "not json", '{"content": 1}'])
def test_without_dev_rows_an_empty_page_offers_those_of_adgen(tmp_path, dev):
    (tmp_path / "dev.json").write_text(dev)
    (tmp_path / "ptuning.json").write_text("{}")
    remember(tmp_path, training={"train_file": str(tmp_path / "train.json")}, prompt_column="content")
    assert examples_of(tmp_path) == examples_of(None) == examples_of(TINY) == list(EXAMPLES)
