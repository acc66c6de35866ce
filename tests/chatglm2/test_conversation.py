"""A history is pairs, or messages of role and content; anything else is refused in words, at every entrance."""

import pytest
import torch
from conftest import TINY

from chatglm2.conversation import continued, conversation, read_history
from checkpoint import load_model, load_tokenizer, read_config
from serving.server import ChatServer

PAIRS = [("你好", "你好！"), ("天气", "晴。")]
MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "天气"},
    {"role": "assistant", "content": "晴。"},
]
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, read_config(TINY))


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


def test_pairs_stay_as_they_are():
    assert read_history("问", PAIRS) == ("问", PAIRS)
    assert read_history("问", [list(pair) for pair in PAIRS]) == ("问", PAIRS)
    assert read_history("问", None) == read_history("问", []) == ("问", [])


def test_messages_mean_the_same_pairs():
    assert read_history("问", MESSAGES) == ("问", PAIRS)


def test_messages_are_read_as_the_api_reads_them():
    messages = [{"role": "system", "content": "简短"}, *MESSAGES, {"role": "user", "content": "还有"}]
    said = [(message["role"], message["content"]) for message in messages]
    assert read_history("问", messages) == conversation([*said, ("user", "问")])
    assert read_history("问", messages) == ("还有\n问", [("简短\n你好", "你好！"), ("天气", "晴。")])


def test_a_history_is_continued_in_its_own_form():
    assert continued(None, "问", "答") == [("问", "答")]
    assert continued(PAIRS, "问", "答") == [*PAIRS, ("问", "答")]
    assert continued(MESSAGES, "问", "答")[4:] == [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]


WRONG = [
    ("你好", r"history is '你好', expected a list of \(question, answer\) pairs"),
    (["你好", "你好！"], r"history, turn 1: found '你好', expected a list of \(question, answer\) pairs"),
    ([("你好", "你好！"), ("天气",)], r"history, turn 2: found \('天气',\), expected"),
    ([("你好", "你好！", "再见")], r"history, turn 1: found .*, expected a list"),
    ([("你好", None)], r"history, turn 1: found \('你好', None\), expected"),
    ([("你好", 3)], r"history, turn 1: found \('你好', 3\), expected"),
    ([("ab", "cd"), "ab"], r"history, turn 2: found 'ab', expected"),  # two characters are no pair
    ({"role": "user", "content": "你好"}, r"history is \{'role'.*expected a list"),
    ([{"role": "user"}], "turn 1: expected an object of role and content, found an object of role"),
    ([*MESSAGES, ("你好", "你好！")], r"turn 5: expected an object of role and content, found \('你好'"),
    ([{"role": "tool", "content": "你好"}], "turn 1: the role is 'tool', expected 'system' or 'user' or 'assistant'"),
    ([{"role": "user", "content": [1]}], r"turn 1: the content is \[1\], expected text"),
]
ENTRANCES = {
    "build_prompt": lambda model, tokenizer, history: tokenizer.build_prompt("问", history),
    "fit_prompt": lambda model, tokenizer, history: tokenizer.fit_prompt("问", history, 100),
    "build_inputs": lambda model, tokenizer, history: model.build_inputs(tokenizer, "问", history),
    "build_stream_inputs": lambda model, tokenizer, history: model.build_stream_inputs(tokenizer, "问", history),
    "chat": lambda model, tokenizer, history: model.chat(tokenizer, "问", history),
    "stream_chat": lambda model, tokenizer, history: list(model.stream_chat(tokenizer, "问", history)),
    "server": lambda model, tokenizer, history: ChatServer.encode(server(model, tokenizer), "问", history),
    "server, fitted": lambda model, tokenizer, history: ChatServer.fit(server(model, tokenizer), "问", history, 8),
}


def server(model, tokenizer):
    """What a ChatServer needs to make a prompt, without its thread."""
    made = ChatServer.__new__(ChatServer)
    made.model, made.tokenizer, made.default = model, tokenizer, "base"
    made._prefixes, made._source_prefixes = {"base": []}, {"base": ""}
    made.given_source_prefix = None
    return made


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("history", "message"), WRONG, ids=[repr(history)[:40] for history, _ in WRONG])
def test_any_other_history_is_refused_with_the_same_words_everywhere(entrance, history, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        ENTRANCES[entrance](model, tokenizer, history)


@pytest.mark.parametrize("entrance", ["build_prompt", "fit_prompt", "build_inputs", "build_stream_inputs", "server"])
def test_messages_give_the_prompt_of_the_pairs_everywhere(entrance, model, tokenizer):
    from_pairs, from_messages = (ENTRANCES[entrance](model, tokenizer, history) for history in (PAIRS, MESSAGES))
    if hasattr(from_pairs, "keys"):
        assert all(torch.equal(from_pairs[name], from_messages[name]) for name in from_pairs)
    else:
        assert from_pairs == from_messages


def test_a_chat_with_messages_answers_and_goes_on_with_messages(model, tokenizer):
    expected, pairs = model.chat(tokenizer, "问", PAIRS, **GREEDY)
    response, messages = model.chat(tokenizer, "问", MESSAGES, **GREEDY)
    *_, (streamed, streamed_messages) = model.stream_chat(tokenizer, "问", MESSAGES, **GREEDY)
    assert response == streamed == expected
    assert messages == streamed_messages == continued(MESSAGES, "问", expected)
    assert model.chat(tokenizer, "再问", messages, **GREEDY)[0] == model.chat(tokenizer, "再问", pairs, **GREEDY)[0]


@pytest.mark.parametrize("query", [None, ["问", "再问"], 3])
def test_a_question_that_is_no_text_is_refused(query, model, tokenizer):
    with pytest.raises(ValueError, match="The question is .*expected one text"):
        model.chat(tokenizer, query)
