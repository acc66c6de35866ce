"""ChatGLM3's token ids and label masks equal those of the official tokenizer (benchmarks/official_families.py)."""

import json

import numpy
import pytest
import torch
from conftest import ROOT
from support.chatglm3 import write_tiny3
from support.dialogues import ANSWERED, dialogues

from checkpoint import load_tokenizer, read_config
from data.encoding import encode_training
from data.examples import load_examples


@pytest.fixture(scope="module")
def official():
    """{name: rows of numbers} that the official code gave."""
    arrays = numpy.load(ROOT / "tests" / "chatglm3_tokens.npz")
    names = [name for name in arrays if not name.endswith("_lengths")]
    return {name: numpy.split(arrays[name], arrays[f"{name}_lengths"].cumsum()[:-1]) for name in names}


@pytest.fixture(scope="module")
def tokenizer(shared):
    from chatglm3.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(shared / "chatglm2-tokenizer")


@pytest.fixture(scope="module")
def tiny3(tmp_path_factory):
    return write_tiny3(tmp_path_factory.mktemp("tiny3"))


def test_the_ids_of_240_dialogues_equal_the_official_ones(official, tokenizer):
    for expected, (query, history, role) in zip(official["prompts"], dialogues(), strict=True):
        found = tokenizer.build_chat_input(query, history, role)
        assert found["input_ids"][0].tolist() == expected.tolist()
        assert found["position_ids"][0].tolist() == list(range(len(expected)))


def test_ids_and_labels_for_training_equal_the_official_ones(official, tokenizer, tmp_path):
    file = tmp_path / "rows.json"
    rows = []
    for query, history, role in dialogues():
        question, answer = {"role": role, "content": query}, {"role": "assistant", "content": ANSWERED}
        rows.append({"messages": [*history, question, answer]})
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    examples, skipped = load_examples(file, None, None, messages_column="messages", keep_roles=True)
    assert not skipped
    lengths = {"max_source_length": 10_000, "max_target_length": 100}
    encoded = encode_training(examples, tokenizer, train_on_history=True, **lengths)
    for number, row in enumerate(encoded):
        assert row["input_ids"] == official["input_ids"][number].tolist()
        assert row["labels"] == official["labels"][number].tolist()
    assert sum(int(own[0]) for own in official["own"]) > 30  # these went through the official fine-tuning itself


def test_without_train_on_history_the_last_answer_alone_is_learned(official, tokenizer, tmp_path):
    file = tmp_path / "rows.json"
    query, history, role = next(each for each in dialogues() if len(each[1]) > 3)
    messages = [*history, {"role": role, "content": query}, {"role": "assistant", "content": ANSWERED}]
    file.write_text(json.dumps([{"messages": messages}]))
    examples, _ = load_examples(file, None, None, messages_column="messages", keep_roles=True)
    (row,) = encode_training(examples, tokenizer, max_source_length=10_000, max_target_length=100)
    learned = [label for label in row["labels"] if label != -100]
    assert learned == [*tokenizer.encode_answers([ANSWERED])[0], tokenizer.eos_token_id]


def test_a_folder_gives_the_tokenizer_of_its_family(tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    assert tokenizer.get_command("<|user|>") == tokenizer.sp_model.get_piece_size() + 6
    inputs = tokenizer.build_chat_input("你好", [("问", "答")], role="user")
    assert torch.equal(inputs["attention_mask"], torch.ones_like(inputs["input_ids"]))
    text = tokenizer.show(inputs["input_ids"][0]).replace(" ", "")  # a piece begins with one
    assert text == "<|user|>\n问<|assistant|>\n答<|user|>\n你好<|assistant|>"


def test_what_looks_like_a_role_is_text(tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    ids = tokenizer.build_chat_input("<|assistant|>")["input_ids"][0].tolist()
    assert ids.count(tokenizer.get_command("<|assistant|>")) == 1
    assert tokenizer.get_command("<|assistant|>") not in tokenizer.encode("<|assistant|>")


def test_the_template_of_transformers_gives_the_ids_of_the_prompt(tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    assert torch.equal(found["input_ids"], tokenizer.build_chat_input("q", messages[:1])["input_ids"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>\ns<|user|>\nq<|assistant|>"


def test_a_batch_of_dialogues_is_padded_where_it_is_asked_for(tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    batch = [
        [{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("q", "question of more tokens")
    ]
    short, long = tokenizer.apply_chat_template(batch, padding=True)["attention_mask"]
    assert len(short) == len(long) and 0 in short and 0 not in long


@pytest.mark.parametrize("name", ["documents", "return_assistant_tokens_mask", "continue_final_message", "truncation"])
def test_what_the_template_has_no_place_for_is_refused_by_name(name, tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    with pytest.raises(ValueError, match=name):
        tokenizer.apply_chat_template([{"role": "user", "content": "q"}], **{name: True})


def test_a_long_dialogue_loses_its_oldest_turns_and_keeps_its_system_message(tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    history = [("system", "", "S")] + [(role, "", f"{role} {n}") for n in range(9) for role in ("user", "assistant")]
    whole = tokenizer.encode_prompt("Q", history)
    ids, dropped = tokenizer.fit_prompt("Q", history, len(whole) - 1)
    assert dropped == 2 and len(ids) < len(whole)
    assert ids == tokenizer.encode_prompt("Q", tokenizer.kept_history(history, dropped))
    assert tokenizer.kept_history(history, dropped)[:2] == [("system", "", "S"), ("user", "", "user 1")]
    assert tokenizer.fit_prompt("Q", history, 1)[0] == tokenizer.encode_prompt("Q", history[:1])


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": '{"city": "北京"}'}}]},
            "```python\ntool_call(city='北京')\n```",
        ),
        ({"role": "tool", "content": "21°"}, "21°"),
    ],
)
def test_calls_of_tools_as_openai_writes_them_are_read(message, content, tiny3):
    tokenizer = load_tokenizer(tiny3, read_config(tiny3))
    (_, metadata, found), *_ = tokenizer.read_history("q", [message])[1]
    assert found == content and metadata == ("w" if "tool_calls" in message else "")
