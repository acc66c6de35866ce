"""Answers that are JSON, at the API: always of their schema, whatever the model would rather say."""

import importlib.util
import json

import pytest
import torch
from conftest import TINY
from support.api_server import client, port  # noqa: F401, fixtures
from support.chat_server import QUERIES, SlowServer, finish, open_server
from support.over_http import call, wait_for

from serving.answers import Sampling
from serving.json_mode import Format, check_schema

pytest.importorskip("llguidance", reason="pip install -r tests/requirements.txt")

USER = [{"role": "user", "content": QUERIES[0]}]
SCHEMA = {
    "type": "object",
    "properties": {
        "颜色": {"enum": ["红", "绿 色", 'a"b']},
        "件": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 20},
            "minItems": 1,
            "maxItems": 3,
        },
        "名": {"type": "string", "maxLength": 5},
    },
    "required": ["颜色", "件", "名"],
    "additionalProperties": False,
}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "clothes", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server():
    server = open_server("--model_name_or_path", TINY, server_class=SlowServer)
    yield server
    server.close()


def chat(client, response_format=SCHEMA_FORMAT, **fields):
    fields = {"temperature": 1.5, "top_p": 1, "max_tokens": 200, **fields}
    return client.chat.completions.create(model="base", messages=USER, response_format=response_format, **fields)


def check(text):
    """It is of SCHEMA."""
    found = json.loads(text)
    assert list(found) == ["颜色", "件", "名"] and found["颜色"] in ("红", "绿 色", 'a"b')
    assert 1 <= len(found["件"]) <= 3 and all(type(each) is int and 1 <= each <= 20 for each in found["件"])
    assert len(found["名"]) <= 5


def test_answers_are_of_their_schema(client):
    choices = chat(client, n=8, seed=1).choices
    assert {choice.finish_reason for choice in choices} == {"stop"}
    for choice in choices:
        check(choice.message.content)
    assert len({choice.message.content for choice in choices}) > 1


def test_an_object_of_any_kind_begins_with_its_bracket(client):
    for choice in chat(client, {"type": "json_object"}, n=4, seed=1, max_tokens=60).choices:
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_no_end_and_no_special_token_comes_into_an_answer(client, server, monkeypatch):
    special = torch.tensor([*server.tokenizer.all_special_ids, server.model.config.eos_token_id])
    feed = server._feed
    monkeypatch.setattr(server, "_feed", lambda *inputs: feed(*inputs).index_fill(1, special, 50.0))
    choice = chat(client, temperature=0).choices[0]
    check(choice.message.content)
    assert choice.finish_reason == "stop"  # the end comes as soon as it may


def test_an_answer_beside_it_is_left_alone(client, server):
    plain = finish(server, QUERIES[0])
    server.delay = 0.01
    held = server.submit(server.encode(QUERIES[0]), sampling=Sampling(200, seed=1, schema=json.dumps(SCHEMA)))
    assert finish(server, QUERIES[0]).text == plain.text
    server.delay = 0
    wait_for(lambda: held.finish_reason)
    check(held.text)


def test_a_stream_has_the_text_of_the_whole(client):
    whole = chat(client, seed=3).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, seed=3, stream=True)]
    assert "".join(pieces) == whole and len(pieces) > 5


def test_log_probabilities_stay_those_of_the_model(client, server):
    token_ids = server.encode(QUERIES[0])
    with torch.inference_mode():
        logits = server.model(input_ids=torch.tensor([token_ids])).logits[0, -1, : len(server.tokenizer)]
    [entry] = chat(client, temperature=0, max_tokens=1, logprobs=True).choices[0].logprobs.content
    bracket = server.tokenizer.convert_tokens_to_ids(entry.token)
    assert entry.token[0] == "{"
    assert entry.logprob == pytest.approx(logits.float().log_softmax(-1)[bracket].item(), abs=1e-5)


def nested(depth):
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {}


@pytest.mark.parametrize(
    "schema, problem",
    [
        ({"type": "robot"}, "response_format: the schema cannot be used"),
        ({"$ref": "http://127.0.0.1:9/a.json"}, "response_format: the schema cannot be used"),
        ({"type": "string", "pattern": "("}, "response_format: the schema cannot be used"),
        (
            {"allOf": [{"type": "string", "pattern": "[ab]*" + "ab" * each} for each in range(20)]},
            "it takes more than 2 s to read",
        ),
        (nested(150), "response_format: the schema cannot be used"),
        ({"const": "a" * 70_000}, "response_format: the schema has 70,013 characters, more than 65,536"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(port, schema, problem):
    body = {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert status == 400 and problem in answer["error"]["message"], answer
    assert "\n" not in answer["error"]["message"]


def test_an_answer_whose_schema_asks_too_much_on_the_way_fails(port, monkeypatch):
    monkeypatch.setattr(Format, "problem", lambda self: "more" if self.matcher.compute_ff_tokens() == [] else None)
    body = {"messages": USER, "response_format": SCHEMA_FORMAT}
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["message"]) == (500, "The answer's schema asks too much: more")


def test_the_package_that_is_missing_is_named(port, monkeypatch):
    check_schema.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, answer = call(port, "POST", "/v1/chat/completions", {"messages": USER, "response_format": SCHEMA_FORMAT})
    assert status == 400 and "pip install llguidance" in answer["error"]["message"]
