"""ChatGLM3's chat methods: the official history of messages, its ends of an answer, and its calls of tools."""

import pytest
import torch
from support.chatglm3 import write_tiny3

from chatglm3.conversation import read_call
from checkpoint import generation_config, load_model, load_tokenizer, read_config

QUESTION = "你好"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny3(tmp_path_factory.mktemp("tiny3"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, read_config(folder))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, config=read_config(folder, pre_seq_len=4))


def test_chat_gives_the_official_history(model, tokenizer):
    given = [{"role": "system", "content": "s"}]
    response, history = model.chat(tokenizer, QUESTION, given, do_sample=False, max_length=60)
    assert given == [{"role": "system", "content": "s"}]
    assert [message["role"] for message in history] == ["system", "user", "assistant"]
    assert history[1] == {"role": "user", "content": QUESTION} and "metadata" in history[2]
    assert response == history[2]["content"] or history[2]["metadata"]


def test_pairs_are_a_history_too(model, tokenizer):
    response, history = model.chat(tokenizer, QUESTION, [("问", "答")], do_sample=False, max_length=60)
    assert history == [("问", "答"), (QUESTION, response)]


def test_streaming_ends_with_what_chat_gives(model, tokenizer):
    whole, _ = model.chat(tokenizer, QUESTION, role="observation", do_sample=False, max_length=60)
    *_, (last, history) = model.stream_chat(tokenizer, QUESTION, role="observation", do_sample=False, max_length=60)
    assert last == whole and history[0] == {"role": "observation", "content": QUESTION}


def test_the_cache_of_one_turn_goes_on_with_the_next_question_alone(model, tokenizer):
    first = dict(do_sample=False, max_length=60)
    *_, (_, history, cache) = model.stream_chat(tokenizer, QUESTION, return_past_key_values=True, **first)
    fed = model.build_stream_inputs(tokenizer, "再见", history)["input_ids"][0].tolist()
    assert fed == [*tokenizer.build_single_message("user", "", "再见"), tokenizer.get_command("<|assistant|>")]
    assert list(model.stream_chat(tokenizer, "再见", history, past_key_values=cache, do_sample=False, max_length=120))


@pytest.mark.parametrize("name", ["<|user|>", "<|observation|>", "</s>"])
def test_an_answer_ends_where_a_user_or_an_observation_would_begin(name, model, tokenizer):
    end = tokenizer.eos_token_id if name == "</s>" else tokenizer.get_command(name)
    settings = generation_config(tokenizer, model.config, max_new_tokens=8)
    assert end in settings.eos_token_id

    def choose_end(batch_id, ids):
        return [end]

    inputs = model.build_inputs(tokenizer, QUESTION)
    output = model.generate(**inputs, generation_config=settings, prefix_allowed_tokens_fn=choose_end)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 1


CALL = "get_weather\n```python\ntool_call(city='北京', days=3)\n```"


def test_a_call_of_a_tool_is_read_and_not_run(model, tmp_path):
    history = [{"role": "system", "content": "", "tools": []}, {"role": "user", "content": QUESTION}]
    content, after = model.process_response(CALL, history)
    assert content == {"name": "get_weather", "parameters": {"city": "北京", "days": 3}}
    assert after[-1]["metadata"] == "get_weather" and len(history) == 2
    evil = f"```python\ntool_call(x=open({str(tmp_path / 'made')!r}, 'w'))\n```"
    assert read_call(evil) is None and not (tmp_path / "made").exists()
    assert model.process_response("w\n" + evil, history)[0] == {"name": "w", "content": evil}


def test_the_official_process_response_splits_several_messages(model):
    content, history = model.process_response("想一想\n<|assistant|>\n 好的", [{"role": "user", "content": "q"}])
    assert content == "好的" and [each["metadata"] for each in history[1:]] == ["想一想", ""]


def test_another_template_gives_the_rounds_of_chatglm2(folder, model):
    rounds = load_tokenizer(folder, read_config(folder), prompt_template="chatglm2")
    text = rounds.decode(model.build_inputs(rounds, QUESTION)["input_ids"][0])
    assert text == "[Round 1]\n\n问：你好\n\n答：" and not rounds.stop_ids
    raw = load_tokenizer(folder, read_config(folder), prompt_template="none")
    assert torch.equal(model.build_inputs(raw, QUESTION)["input_ids"][0], torch.tensor(raw.encode(QUESTION)))
