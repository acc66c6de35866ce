"""What fields of OpenAI's requests do, or are refused for: roles, tools, formats, probabilities; and raw prompts."""

import pytest
import torch
from conftest import TINY
from support.api_server import client, port  # noqa: F401, fixtures
from support.chat_server import GREEDY, QUERIES, SlowServer, finish, make_run, open_server
from support.over_http import call

import api_demo
from checkpoint import load_model, load_prefix, load_tokenizer, read_config
from serving.probabilities import token_bytes

MODEL = "checkpoint-20"
USER = [{"role": "user", "content": QUERIES[0]}]
GREEDY_FIELDS = {"temperature": 0, "max_tokens": GREEDY.max_new_tokens}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), lengths=(4, 4, 6))
    server = open_server("--ptuning_checkpoint", run / MODEL, server_class=SlowServer)
    yield server
    server.close()


def chat(client, messages=USER, **fields):
    return client.chat.completions.create(model=MODEL, messages=messages, **{**GREEDY_FIELDS, **fields})


# ---- roles, tools and formats


@pytest.mark.parametrize("nothing", [{"content": None}, {}])
def test_a_replayed_history_with_tools_is_read(client, server, nothing):
    messages = [
        {"role": "developer", "content": "简短回答。"},
        {"role": "user", "content": QUERIES[2]},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": QUERIES[0]},
        {"role": "assistant", "tool_calls": [TOOL_CALL], **nothing},
        {"role": "tool", "tool_call_id": "c1", "content": "晴"},
    ]
    expected = finish(server, f"{QUERIES[0]}\n晴", [(f"简短回答。\n{QUERIES[2]}", "你好！")])
    completion = chat(client, messages)
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens == len(expected.token_ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
    ],
)
def test_fields_that_ask_for_what_is_done_anyway_are_taken(client, server, fields):
    assert chat(client, **fields).choices[0].message.content == finish(server, QUERIES[0]).text


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: found null"),
        ({"messages": [{"role": "tool"}]}, "messages.0.content: found null"),
        ({"messages": [*USER, {"role": "assistant", "content": None}]}, "The last message is of role 'assistant'"),
        ({"tool_choice": "required"}, "tool_choice: expected 'auto' or 'none'"),
        ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice: expected 'auto' or 'none'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"function_call": {"name": "a"}}, "function_call: expected 'auto' or 'none'"),
        ({"tools": TOOLS}, "tools: expected nothing"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "describe them in a system message"),
        ({"functions": [TOOLS[0]["function"]]}, "functions: expected nothing"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: expected 0"),
        ({"presence_penalty": -1}, "presence_penalty: expected 0"),
        ({"logit_bias": {"5": 10}}, "logit_bias: expected nothing"),
        ({"modalities": ["text", "audio"]}, "modalities: expected ['text']"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio: expected ['text']"),
        ({"web_search_options": {}}, "web_search_options: expected nothing"),
        ({"response_format": {"type": "xml"}}, "response_format: expected {'type': 'text'}"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format: expected {'type': 'text'}"),
    ],
)
def test_what_cannot_be_honoured_is_refused(port, fields, problem):
    status, answer = call(port, "POST", "/v1/chat/completions", {"messages": USER, **fields})
    assert status == 400 and problem in answer["error"]["message"], answer


# ---- probabilities


def expected_logprobs(server, token_ids, response_ids):
    """Log-probabilities (S, V) at the answer's tokens, by one pass through the model with the prefix in it."""
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=4))
    load_prefix(model, server.checkpoints()[MODEL])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids + response_ids])).logits[0]
    return logits[len(token_ids) - 1 : -1, : len(server.tokenizer)].float().log_softmax(-1)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 1}])
def test_log_probabilities_are_those_of_the_model(client, server, sampling):
    completion = chat(client, logprobs=True, top_logprobs=3, **sampling, max_tokens=12)
    plain = chat(client, **sampling, max_tokens=12)
    [choice] = completion.choices
    assert choice.message.content == plain.choices[0].message.content and plain.choices[0].logprobs is None
    entries = choice.logprobs.content
    assert len(entries) == completion.usage.completion_tokens
    settings = api_demo.Sampling(12, 0.8, sampling["temperature"], sampling.get("seed"))
    answer = finish(server, QUERIES[0], sampling=settings)
    expected = expected_logprobs(server, answer.token_ids, answer.response_ids)
    for entry, token_id, row in zip(entries, answer.response_ids, expected, strict=True):
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert len({top.token for top in entry.top_logprobs}) == 3
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().strip() == answer.text


def test_streamed_log_probabilities_are_those_of_the_whole_answer(client):
    whole = chat(client, logprobs=True, max_tokens=12).choices[0].logprobs.content
    chunks = [chunk.choices[0] for chunk in chat(client, logprobs=True, max_tokens=12, stream=True)]
    assert [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content] == whole
    assert all(entry.top_logprobs == [] for entry in whole)


def test_top_logprobs_alone_ask_for_log_probabilities(client):
    [entry] = chat(client, top_logprobs=2, max_tokens=1).choices[0].logprobs.content
    assert len(entry.top_logprobs) == 2


def test_a_byte_of_a_character_is_given_as_a_byte(server):
    tokenizer = server.tokenizer
    token_ids = tokenizer.encode("𠮷", add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token_id) for token_id in token_ids).decode().strip() == "𠮷"


# ---- added tokens


def test_an_added_token_may_be_chosen(server, monkeypatch):
    tokenizer = load_tokenizer(TINY, server.model.config)
    tokenizer.add_tokens(["<新>"])
    monkeypatch.setattr(server, "tokenizer", tokenizer)
    likely = torch.zeros(1, server.model.config.padded_vocab_size)
    likely[0, len(tokenizer) - 1] = 1
    assert server._feed(lambda: likely).argmax(-1).tolist() == [len(tokenizer) - 1]


# ---- what clients look for beside the answer


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "好" * 5000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "好" * 50_000}]}),
        ("/v1/chat/completions", {"messages": USER * 5000}),
        ("/", {"prompt": "好" * 5000}),
        ("/", {"prompt": QUERIES[0], "max_length": 5}),
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_its_code(port, path, body):
    status, answer = call(port, "POST", path, body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_a_list_of_too_many_stops_is_no_matter_of_the_context(port):
    status, answer = call(port, "POST", "/v1/chat/completions", {"messages": USER, "stop": ["a"] * 17})
    assert (status, answer["error"]["code"]) == (400, None) and "this model takes" not in answer["error"]["message"]


def test_the_model_that_answers_by_default_is_the_first(client, server):
    assert [model.id for model in client.models.list().data] == [MODEL, "checkpoint-10", "checkpoint-30", "base"]
    assert client.models.list().data[0].id == server.default


def test_every_answer_has_a_request_id_of_its_own(client, port):
    import openai

    ids = {chat(client, max_tokens=1)._request_id for _ in range(2)}
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4", messages=USER)
    with pytest.raises(openai.APIStatusError) as too_large:
        chat(client, [{"role": "user", "content": "a" * 2**20}])
    stream = client.chat.completions.with_raw_response.create(model=MODEL, messages=USER, stream=True, max_tokens=1)
    ids |= {refused.value.request_id, too_large.value.request_id, stream.headers["x-request-id"]}
    assert None not in ids and len(ids) == 5
