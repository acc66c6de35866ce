"""Raw prompts at the API: OpenAI's layout, and log-probabilities beside those of one pass through the model."""

import pytest
import torch
from conftest import TINY
from support.api_server import client, port  # noqa: F401, fixtures
from support.chat_server import SlowServer, make_run, open_server
from support.over_http import call, wait_for

from checkpoint import load_model, load_prefix, read_config

MODEL = "checkpoint-20"
TEXT = "类型#裙*颜色#白色，这件"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    server = open_server("--ptuning_checkpoint", run / MODEL, server_class=SlowServer)
    yield server
    server.close()


@pytest.fixture(scope="module")
def tuned(server):
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=4))
    load_prefix(model, server.checkpoints()[MODEL])
    return model


@torch.inference_mode()
def rows_of(server, model, token_ids):
    """Log-probabilities (S, V) at every token but the first, by one pass through the model with the prefix in it."""
    return model(input_ids=torch.tensor([token_ids])).logits[0, :-1, : len(server.tokenizer)].float().log_softmax(-1)


def greedy(server, model, token_ids, count):
    """Ids that follow, the likeliest each time."""
    token_ids = list(token_ids)
    for _ in range(count):
        token_ids.append(rows_of(server, model, [*token_ids, 0])[-1].argmax().item())
    return token_ids


def complete(client, prompt=TEXT, **fields):
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 8, **fields})


def test_a_raw_prompt_has_no_chat_around_it(client, server, tuned):
    token_ids = server.tokenizer.encode(TEXT)
    expected = server.tokenizer.decode(greedy(server, tuned, token_ids, 8))
    completion = complete(client)
    [choice] = completion.choices
    assert completion.object == "text_completion" and completion.id.startswith("cmpl-")
    assert TEXT + choice.text == expected and choice.finish_reason == "length" and choice.logprobs is None
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(token_ids), 8, len(token_ids) + 8)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echo_is_scored_as_by_one_pass_through_the_model(client, server, tuned, max_tokens):
    completion = complete(client, echo=True, logprobs=2, max_tokens=max_tokens)
    [choice] = completion.choices
    token_ids = greedy(server, tuned, server.tokenizer.encode(TEXT), max_tokens)
    rows = rows_of(server, tuned, token_ids)
    found = choice.logprobs
    assert completion.usage.completion_tokens == max_tokens
    assert choice.text == server.tokenizer.decode(token_ids) and choice.text.startswith(TEXT)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.tokens[:2] == ["[gMASK]", "sop"] and "".join(found.tokens[2:]) == f" {choice.text}"
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    expected = rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    for row, value, top in zip(rows, found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert sorted({*top.values(), value}) == sorted(top.values())  # the token itself is among them
        assert sorted(top.values())[-2:] == pytest.approx(row.topk(2).values.tolist()[::-1], abs=1e-5)


def test_the_base_model_scores_without_a_prefix(client, server):
    choice = client.completions.create(model="base", prompt=TEXT, echo=True, logprobs=0, max_tokens=0).choices[0]
    token_ids = server.tokenizer.encode(TEXT)
    expected = rows_of(server, load_model(TINY), token_ids).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [1] * (len(token_ids) - 1)


def test_a_long_prompt_is_scored_in_pieces(client, server, tuned):
    token_ids = (server.tokenizer.encode(TEXT) * 40)[:300]
    found = complete(client, token_ids, echo=True, logprobs=1, max_tokens=0).choices[0].logprobs.token_logprobs
    expected = rows_of(server, tuned, token_ids).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()
    assert len(found) == 300 and found[1:] == pytest.approx(expected, abs=1e-5)


def test_many_prompts_are_answered_in_their_order(client, server):
    texts = [TEXT, "你好", "类型#上衣"]
    ids = [server.tokenizer.encode(text) for text in texts]
    alone = [complete(client, text, echo=True, logprobs=1).choices[0] for text in texts]
    for prompts in (texts, ids):
        completion = complete(client, prompts, echo=True, logprobs=1)
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        assert [choice.text for choice in completion.choices] == [choice.text for choice in alone]
        for choice, other in zip(completion.choices, alone, strict=True):
            assert choice.logprobs.token_logprobs[1:] == pytest.approx(other.logprobs.token_logprobs[1:], abs=1e-5)
        assert completion.usage.prompt_tokens == sum(map(len, ids))
    sampled = complete(client, texts, n=2, seed=1, temperature=1.5)
    assert len(sampled.choices) == 6 and sampled.usage.prompt_tokens == sum(map(len, ids))
    assert sampled.choices[2].text == complete(client, texts[1], seed=1, temperature=1.5).choices[0].text


def test_token_ids_are_taken_as_they_are(client, server, tuned):
    token_ids = server.tokenizer.encode(TEXT, add_special_tokens=False)
    choice = complete(client, token_ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    rows = rows_of(server, tuned, greedy(server, tuned, token_ids, 1))
    assert len(choice.logprobs.tokens) == len(token_ids) + 1 and choice.text.startswith(TEXT)
    assert choice.logprobs.token_logprobs[1] == pytest.approx(rows[0, token_ids[1]].item(), abs=1e-5)


@pytest.mark.parametrize("text", [TEXT, "a 𠮷 b\n", " é", "x[gMASK]"])
def test_offsets_say_where_each_token_begins(client, text):
    found = complete(client, text, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    ends = [*found.text_offset[1:], len(text)]
    pieces = [text[start:end] for start, end in zip(found.text_offset, ends, strict=True)]
    assert "".join(pieces) == text and pieces[:2] == ["", ""]
    for token, piece in zip(found.tokens[3:], pieces[3:], strict=True):
        assert token == piece or token.startswith("bytes:")


def test_offsets_count_the_prompt_where_it_is_not_given(client):
    echoed, alone = (complete(client, echo=echo, logprobs=1).choices[0] for echo in (True, False))
    assert echoed.text == TEXT + alone.text
    assert echoed.logprobs.text_offset[-8:] == alone.logprobs.text_offset
    assert alone.logprobs.text_offset[0] == len(TEXT) and alone.logprobs.tokens == echoed.logprobs.tokens[-8:]


def test_the_end_of_the_text_is_a_token_with_a_log_probability(client, server, monkeypatch):
    """A harness drops the last one of max_tokens=1, whatever was generated."""
    eos = server.model.config.eos_token_id
    feed = server._feed

    def end_soon(*inputs):
        logits = feed(*inputs)
        return logits.index_fill(1, torch.tensor([eos]), 100.0) if len(logits) == 1 else logits

    monkeypatch.setattr(server, "_feed", end_soon)
    completion = complete(client, echo=True, logprobs=1, max_tokens=1)
    [choice] = completion.choices
    assert choice.text == TEXT and choice.finish_reason == "stop" and completion.usage.completion_tokens == 0
    assert len(choice.logprobs.tokens) == completion.usage.prompt_tokens + 1
    assert choice.logprobs.tokens[-1] == "</s>" and choice.logprobs.token_logprobs[-1] == pytest.approx(0, abs=1e-5)
    assert choice.logprobs.text_offset[-1] == len(TEXT)


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 1}, {"logprobs": 2, "n": 2}])
def test_a_stream_has_the_pieces_of_the_whole(client, server, fields):
    whole = complete(client, [TEXT, "你好"], **fields)
    chunks = list(complete(client, [TEXT, "你好"], stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    for choice in whole.choices:
        pieces = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [each for piece in pieces if piece.logprobs for each in getattr(piece.logprobs, name)]
            expected = getattr(choice.logprobs, name) if choice.logprobs else []
            assert [each if name == "tokens" else pytest.approx(each, abs=1e-5) for each in expected] == joined


def test_a_stop_text_ends_it_and_a_space_is_kept(client, server, monkeypatch):
    whole = complete(client).choices[0].text
    stopped = complete(client, stop=whole[2:4]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[2:4])], "stop")
    space = server.tokenizer.convert_tokens_to_ids("▁")
    feed = server._feed
    monkeypatch.setattr(server, "_feed", lambda *inputs: feed(*inputs).index_fill(1, torch.tensor([space]), 100.0))
    assert complete(client, max_tokens=2).choices[0].text == "  "


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({}, "prompt: Field required"),
        ({"prompt": []}, "prompt: expected a text, a list of token ids"),
        ({"prompt": [[]]}, "prompt: expected a text, a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt: expected a text, a list of token ids"),
        ({"prompt": [-1]}, "prompt: expected a text, a list of token ids"),
        ({"prompt": [True]}, "prompt: expected a text, a list of token ids"),
        ({"prompt": ["a"] * 33}, "a list of up to 32 texts"),
        ({"prompt": [10**6]}, "The prompt has the token id 1000000; this model's are from 0 to"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of: expected 1"),
        ({"prompt": "a", "suffix": "b"}, "suffix: expected nothing"),
    ],
)
def test_what_is_no_raw_prompt_is_refused(port, fields, problem):
    status, answer = call(port, "POST", "/v1/completions", fields)
    assert status == 400 and problem in answer["error"]["message"], answer


@pytest.mark.parametrize("prompt", ["好" * 5000, " " * 1_000_000, [5] * 2000, ["a", "好" * 5000]])
def test_a_raw_prompt_that_is_too_long_is_known_by_its_code(port, server, prompt):
    status, answer = call(port, "POST", "/v1/completions", {"prompt": prompt})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), answer
    wait_for(lambda: server.load() == (0, 0))  # nothing goes on for the prompts before it
