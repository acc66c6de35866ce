"""The API: OpenAI's own client against it, the official request, many clients at once, and requests gone wrong."""

import gc
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY
from support.api_server import client, port  # noqa: F401, fixtures
from support.chat_server import GREEDY, QUERIES, SlowServer, finish, make_run, open_server
from support.over_http import call, free_port, serve, wait_for

import api_demo
from serving.server import BASE

USER = [{"role": "user", "content": QUERIES[0]}]
GREEDY_FIELDS = {"temperature": 0, "max_tokens": GREEDY.max_new_tokens}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    server = open_server("--ptuning_checkpoint", run, server_class=SlowServer)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def usual_speed(server):
    yield
    server.delay, server.endless, server.script = 0.0, False, None
    wait_for(lambda: server.load() == (0, 0))


def complete(port, **fields):
    return call(port, "POST", "/v1/chat/completions", {"messages": USER, **GREEDY_FIELDS, **fields})


# ---- OpenAI's client


def test_the_openai_client_gets_a_whole_answer(client, server):
    expected = finish(server, QUERIES[0])
    completion = client.chat.completions.create(model="checkpoint-30", messages=USER, **GREEDY_FIELDS)
    assert completion.object == "chat.completion" and completion.id.startswith("chatcmpl-")
    assert abs(completion.created - time.time()) < 60 and completion.model == "checkpoint-30"
    [choice] = completion.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected.token_ids), len(expected.response_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_openai_client_gets_a_stream_in_pieces(client, server):
    server.delay = 0.01
    stream = client.chat.completions.create(
        model="checkpoint-30", messages=USER, stream=True, stream_options={"include_usage": True}, **GREEDY_FIELDS
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    expected = finish(server, QUERIES[0])
    assert "".join(pieces) == expected.text and len(pieces) > 5
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(expected.response_ids)


def test_a_stream_without_usage_ends_with_done(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"messages": USER, "stream": True, **GREEDY_FIELDS})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    assert response.getheader("content-type").startswith("text/event-stream")
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and all(event.startswith("data: ") for event in events)
    assert "usage" not in text


def test_models_are_the_base_model_and_every_checkpoint(client, server):
    names = [model.id for model in client.models.list().data]
    assert names == ["checkpoint-30", "checkpoint-10", "checkpoint-20", BASE]
    answers = set()
    for name in names:
        completion = client.chat.completions.create(model=name, messages=USER, **GREEDY_FIELDS)
        assert completion.choices[0].message.content == finish(server, QUERIES[0], model=name).text
        answers.add(completion.choices[0].message.content)
    assert len(answers) == 4
    assert client.models.retrieve("checkpoint-10").id == "checkpoint-10"


def test_an_unknown_model_is_the_clients_not_found_error(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="there are checkpoint-10, checkpoint-20, checkpoint-30, base"):
        client.chat.completions.create(model="gpt-4", messages=USER)


def test_messages_are_read_in_order(client, server):
    messages = [
        {"role": "system", "content": "简短回答。"},
        {"role": "user", "content": QUERIES[2]},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": [{"type": "text", "text": "第一。"}, {"type": "text", "text": "第二。"}]},
        {"role": "user", "content": QUERIES[0]},
    ]
    completion = client.chat.completions.create(model="checkpoint-30", messages=messages, **GREEDY_FIELDS)
    expected = finish(server, f"第一。第二。\n{QUERIES[0]}", [(f"简短回答。\n{QUERIES[2]}", "你好！")])
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens == len(expected.token_ids)


def test_stop_seed_and_n_are_honoured(client, server):
    whole = finish(server, QUERIES[0]).text
    answer = client.chat.completions.create(model="checkpoint-30", messages=USER, stop=[whole[3:5]], **GREEDY_FIELDS)
    assert answer.choices[0].message.content == whole[: whole.index(whole[3:5])]
    assert answer.choices[0].finish_reason == "stop"
    sampled = {"model": "checkpoint-30", "messages": USER, "max_tokens": 16, "temperature": 1.5, "n": 3}
    first, second, other = (
        [choice.message.content for choice in client.chat.completions.create(seed=seed, **sampled).choices]
        for seed in (1, 1, 100)
    )
    assert first == second != other
    assert len(set(first)) == 3
    assert finish(server, QUERIES[0], sampling=api_demo.Sampling(16, 0.8, 1.5, 1)).text == first[0]


def test_several_answers_are_streamed_by_index(client):
    stream = client.chat.completions.create(
        model="checkpoint-30", messages=USER, max_tokens=8, temperature=1.5, seed=1, n=3, stream=True
    )
    texts, ends = ["", "", ""], 0
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        ends += chunk.choices[0].finish_reason is not None
    whole = client.chat.completions.create(
        model="checkpoint-30", messages=USER, max_tokens=8, temperature=1.5, seed=1, n=3
    )
    assert texts == [choice.message.content for choice in whole.choices] and ends == 3


def test_the_length_limit_is_reported(client):
    completion = client.chat.completions.create(model=BASE, messages=USER, max_tokens=2, temperature=0)
    assert completion.choices[0].finish_reason == "length" and completion.usage.completion_tokens == 2


# ---- the official request


def test_the_official_request_gets_the_official_answer(port, server):
    history = [["你好", "你好！"]]
    status, answer = call(port, "POST", "/", {"prompt": QUERIES[0], "history": history, "temperature": 0})
    expected = finish(server, QUERIES[0], [("你好", "你好！")], sampling=api_demo.Sampling(temperature=0)).text
    assert status == 200 and answer["response"] == expected
    assert answer["history"] == [*history, [QUERIES[0], expected]] and answer["status"] == 200
    time.strptime(answer["time"], "%Y-%m-%d %H:%M:%S")


def test_the_official_max_length_counts_the_prompt(port, server):
    length = len(server.encode(QUERIES[0]))
    status, answer = call(port, "POST", "/", {"prompt": QUERIES[0], "max_length": length + 3, "temperature": 0})
    expected = finish(server, QUERIES[0], sampling=api_demo.Sampling(3, temperature=0)).text
    assert (status, answer["response"]) == (200, expected)
    status, answer = call(port, "POST", "/", {"prompt": QUERIES[0], "max_length": length})
    assert status == 400 and f"The prompt has {length} tokens, and max_length is {length}" in answer["error"]["message"]


def test_health_names_the_prefix_and_its_checksum(port, server):
    import hashlib

    status, health = call(port, "GET", "/health")
    file = server.checkpoints()["checkpoint-30"] / "pytorch_model.bin"
    assert status == 200 and health["status"] == "ok" and health["pre_seq_len"] == 6
    assert (health["prefix_file"], health["prefix_sha256"]) == (
        str(file),
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    assert call(port, "GET", "/docs")[0] == 200


# ---- many clients


def test_32_clients_at_once_get_their_own_answers_computed_together(port, server):
    prompts = [f"编号{number}*{QUERIES[number % 4]}" for number in range(32)]
    alone = [finish(server, prompt).text for prompt in prompts]
    most = [0]
    step = server._step

    def watched():
        most[0] = max(most[0], len(server._running))
        step()

    server._step = watched
    try:
        with ThreadPoolExecutor(32) as clients:
            answers = list(
                clients.map(lambda prompt: complete(port, messages=[{"role": "user", "content": prompt}]), prompts)
            )
    finally:
        del server._step
    assert [status for status, _ in answers] == [200] * 32
    assert [answer["choices"][0]["message"]["content"] for _, answer in answers] == alone
    assert most[0] == server.max_batch


@pytest.mark.slow
def test_memory_is_flat_over_300_requests(port, server):
    import resource

    def ask(number):
        return complete(port, messages=[{"role": "user", "content": f"编号{number}"}], max_tokens=8)[0]

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # isinstance loads lazy modules

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(ask, range(60))) == {200}
        before, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert set(clients.map(ask, range(300))) == {200}
    assert tensors() <= before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # KiB


def test_clients_that_go_away_free_their_places(port, server):
    server.endless, server.delay = True, 0.01
    for stream in (True, False):
        connections = []
        for _ in range(12):  # more than there are places, so some leave the queue
            connection = http.client.HTTPConnection("127.0.0.1", port)
            body = json.dumps({"messages": USER, "stream": stream, "max_tokens": 1000})
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            connections.append(connection)
        wait_for(lambda: server.load() == (8, 4))
        for connection in connections:
            connection.sock.close()
        wait_for(lambda: server.load() == (0, 0))


def test_a_full_queue_is_answered_with_429_and_health_still_answers(port, server, monkeypatch):
    monkeypatch.setattr(server, "max_queue", 2)
    server.endless, server.delay = True, 0.02
    answers = [server.submit(server.encode(QUERIES[0])) for _ in range(10)]
    status, body = complete(port)
    assert status == 429 and body["error"]["code"] == "rate_limit_exceeded"
    wait_for(lambda: call(port, "GET", "/health")[1]["waiting"] == 2)  # the other eight have been started
    for answer in answers:
        answer.cancel()


def test_generation_does_not_block_other_requests(port, server):
    server.endless, server.delay = True, 0.5  # a token takes half a second
    answer = server.submit(server.encode(QUERIES[0]))
    health = [call(port, "GET", "/health")[0] for _ in range(20)]
    assert health == [200] * 20 and len(answer.response_ids) < 20
    answer.cancel()


# ---- requests gone wrong


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"{", "JSON"),
        (b"", "Field required"),
        (b"[]", "dictionary"),
        ({}, "messages: Field required"),
        ({"messages": []}, "messages"),
        ({"messages": "你好"}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "The last message is of role 'assistant'"),
        ({"messages": USER, "temperature": "hot"}, "temperature"),
        ({"messages": USER, "temperature": -1}, "temperature"),
        ({"messages": USER, "temperature": float("nan")}, "temperature"),
        ({"messages": USER, "top_p": 1.5}, "top_p"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_tokens": True}, "max_tokens"),
        ({"messages": USER, "n": 9}, "n"),
        ({"messages": USER, "seed": 2**64}, "seed"),
        ({"messages": USER, "stop": [""]}, "stop"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "好" * 5000}]}, "this model takes 1024 for prompt and answer"),
        (
            {"messages": [{"role": "user", "content": "你"}, {"role": "assistant", "content": "好"}] * 10_000 + USER},
            "1024",
        ),
    ],
)
def test_a_request_gone_wrong_is_answered_with_400_and_its_reason(port, body, problem):
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert status == 400 and problem in answer["error"]["message"], answer
    assert call(port, "GET", "/health")[0] == 200


def test_a_body_over_one_mebibyte_is_refused(port):
    status, _ = complete(port, messages=[{"role": "user", "content": "a" * 2**20}])
    assert status == 413
    with socket.create_connection(("127.0.0.1", port)) as chunked:  # of unannounced length
        chunked.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunked.sendall((b"10000\r\n" + b"a" * 0x10000 + b"\r\n") * 17 + b"0\r\n\r\n")
        assert b"413" in chunked.recv(100)
    assert call(port, "GET", "/health")[0] == 200


def test_a_failing_model_is_a_500_and_the_next_request_works(port, server, monkeypatch):
    def fail(*inputs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server, "_feed", fail)
        status, answer = complete(port)
        assert (status, answer["error"]["message"]) == (500, "out of memory")
    assert complete(port)[0] == 200


def test_a_key_is_asked_for_where_one_is_set(server):
    port, end = serve(api_demo.create_app(server, api_key="秘密"))
    try:
        for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/", "POST")):
            assert call(port, method, path, {"prompt": "a"} if method == "POST" else None)[0] == 401
        assert call(port, "GET", "/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert call(port, "GET", "/health")[0] == 200
    finally:
        end()
    port, end = serve(api_demo.create_app(server, api_key="secret"))
    try:
        assert call(port, "GET", "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
    finally:
        end()


@pytest.mark.parametrize("key", ["", " ", "two words", "秘密", "a\n"])
def test_a_key_that_no_client_could_send_or_that_locks_nothing_is_refused(key):
    with pytest.raises(ValueError, match="--api_key: expected a key of visible ASCII characters"):
        api_demo.parse_arguments(["--model_name_or_path", str(TINY), "--api_key", key])


@pytest.mark.parametrize("origin", ["", "a.example", "http://a.example/", "http://a.example/page", "localhost:3000"])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ValueError, match="--cors_origin .*: expected what browsers call a page's origin"):
        api_demo.parse_arguments(["--model_name_or_path", str(TINY), "--cors_origin", origin])


def test_other_origins_may_ask_only_where_that_was_said(port, server):
    def allowed(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/health", headers={"Origin": "http://a.example"})
        return connection.getresponse().getheader("access-control-allow-origin")

    assert allowed(port) is None
    other, end = serve(api_demo.create_app(server, cors_origins=["http://a.example"]))
    try:
        assert allowed(other) == "http://a.example"
    finally:
        end()


def test_the_program_listens_on_this_machine_only_unless_told():
    words = ["--model_name_or_path", str(TINY)]
    args = api_demo.parse_arguments(words)
    assert (args.server_name, args.server_port, args.api_key, args.cors_origin) == ("127.0.0.1", 8000, None, [])
    told = {"--api_key": "sk-1", "--cors_origin": "http://[::1]:3000"}
    args = api_demo.parse_arguments([*words, *(word for pair in told.items() for word in pair)])
    assert (args.api_key, args.cors_origin) == ("sk-1", ["http://[::1]:3000"])


@pytest.mark.slow
def test_no_request_that_the_documentation_allows_or_forbids_breaks_the_api(server):
    schemathesis = pytest.importorskip("schemathesis", reason="pip install -r tests/requirements.txt")
    from hypothesis import HealthCheck, given, settings

    server.script = "好"
    schema = schemathesis.openapi.from_asgi("/openapi.json", api_demo.create_app(server))
    seen = set()
    for operation in (result.ok() for result in schema.get_all_operations()):
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.body:  # without one there is nothing to get wrong
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
            )
            def check(case):
                response = case.call()
                seen.add((case.method, case.path, response.status_code))
                case.validate_response(
                    response,
                    checks=[
                        schemathesis.checks.not_a_server_error,
                        schemathesis.checks.response_schema_conformance,
                        schemathesis.checks.status_code_conformance,
                    ],
                )

            check()
    for asked in ("/v1/chat/completions", "/v1/completions", "/"):
        assert {status for _, path, status in seen if path == asked} >= {200, 400}


# ---- one client and the others


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(port, server, monkeypatch):
    monkeypatch.setattr(server.tokenizer, "sp_model", None)  # any use of it would fail
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": " " * 1_000_000}]}),
        ("/", {"prompt": " " * 1_000_000}),
        ("/", {"prompt": "a", "history": [["a", " " * 1_000_000]]}),
    ):
        status, answer = call(port, "POST", path, body)
        assert status == 400 and "characters; this model takes 1024 tokens" in answer["error"]["message"]


def test_few_texts_are_tokenized_at_once_and_health_answers_meanwhile(port, server, monkeypatch):
    entered, go_on, inside = threading.Semaphore(0), threading.Event(), []
    encode = server.encode

    def encode_slowly(*arguments, **more):
        inside.append(1)
        entered.release()
        go_on.wait(60)
        inside.pop()
        return encode(*arguments, **more)

    monkeypatch.setattr(server, "encode", encode_slowly)
    with ThreadPoolExecutor(21) as clients:  # 20 are less than the share of one of two clients
        asked = [clients.submit(complete, port) for _ in range(20)]
        try:
            assert entered.acquire(timeout=60)
            assert call(port, "GET", "/health")[0] == 200
            assert len(inside) == 1  # all of them are one client
            other = clients.submit(complete_from, "127.0.0.2", port)
            assert entered.acquire(timeout=60)
            assert len(inside) == 2
        finally:
            go_on.set()
        assert {request.result()[0] for request in asked} == {200} and other.result() == 200


def complete_from(address, port):
    """Status of a completion that is asked for from another address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(address, 0))
    body = json.dumps({"messages": USER, **GREEDY_FIELDS})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    return connection.getresponse().status


def test_a_second_address_is_answered_while_the_first_has_all_it_may_have(port, server):
    server.endless, server.delay = True, 0.01
    client = "127.0.0.1"
    greedy = [server.submit(server.encode(QUERIES[0]), client=client) for _ in range(36)]
    status, body = complete(port)
    assert status == 429 and "its share is 36 of 72" in body["error"]["message"]
    assert complete_from("127.0.0.2", port) == 200
    assert not any(answer.finish_reason for answer in greedy)
    for answer in greedy:
        answer.cancel()


@pytest.mark.parametrize(
    "model, body",
    [
        ("ChatRequest", {"messages": [1] * 1000}),
        ("ChatRequest", {"messages": [{"role": "user", "content": [1] * 1000}]}),
        ("OfficialRequest", {"prompt": "a", "history": [1] * 1000}),
        ("OfficialRequest", {"prompt": "a", "history": [[1, 2]] * 1000}),
    ],
)
def test_a_long_list_of_mistakes_is_not_read_to_its_end(model, body):
    with pytest.raises(ValueError) as refused:
        getattr(api_demo, model).model_validate(body)
    assert refused.value.error_count() <= 3


def test_messages_of_one_side_in_a_row_are_joined_in_linear_time():
    from chatglm2.conversation import conversation

    started = time.monotonic()
    messages = [("user", "a"), *[("assistant", "b" * 50)] * 200_000, ("user", "c")]
    question, history = conversation(messages)
    assert time.monotonic() - started < 20  # joined one by one: a terabyte is copied
    assert question == "c" and len(history) == 1 and len(history[0][1]) == 200_000 * 51 - 1


@pytest.mark.parametrize("forwarded", [False, True])
def test_wrong_keys_are_slowed_down_whatever_address_the_client_claims(server, monkeypatch, forwarded):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1" if forwarded else "")
    port, end = serve(api_demo.create_app(server, api_key="secret"))

    def status(key, claimed):
        return call(port, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}", "X-Forwarded-For": claimed})

    try:
        statuses = [status(f"guess{number}", f"192.0.2.{number}")[0] for number in range(20)]
        assert statuses == [401] * 20 if forwarded else statuses[:5] == [401] * 5 and set(statuses[5:]) == {429}
        locked, answer = status("secret", "192.0.2.99")
        assert locked == (200 if forwarded else 429)
        assert forwarded or "Too many wrong API keys" in answer["error"]["message"]
        assert call(port, "GET", "/v1/models")[0] == 401  # without a key nothing is guessed
        assert call(port, "GET", "/health")[0] == 200
    finally:
        end()


def test_the_right_key_is_never_slowed_down(server):
    port, end = serve(api_demo.create_app(server, api_key="secret"))
    try:
        statuses = {call(port, "GET", "/v1/models", headers={"Authorization": "Bearer secret"})[0] for _ in range(30)}
        assert statuses == {200}
    finally:
        end()


# ---- paths


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_json_is_read_whatever_its_content_type_says(port, server, kind):
    body = json.dumps({"prompt": QUERIES[0], "temperature": 0}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/", body, {"content-type": kind} if kind else {})
    response = connection.getresponse()
    assert response.status == 200 and json.loads(response.read())["response"]


def test_a_page_of_another_origin_cannot_send_json_as_plain_text(port):
    headers = {"content-type": "text/plain", "Origin": "http://a.example"}
    status, answer = call(port, "POST", "/", {"prompt": "a"}, headers)
    assert status == 400 and "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize(
    "method, path", [("GET", "/v1/nothing"), ("POST", "/v1/embeddings"), ("GET", "/v1/chat/completions"), ("PUT", "/")]
)
def test_an_unknown_path_is_said_to_be_one_with_those_there_are(port, method, path):
    status, answer = call(port, method, path, {} if method == "POST" else None)
    error = answer["error"]
    assert status in (404, 405) and error["type"] == "invalid_request_error" and error["code"] == "unknown_url"
    assert f"There is no {method} {path} here" in error["message"]
    for there in ("POST /v1/chat/completions", "GET /v1/models", "POST /", "GET /health"):
        assert there in error["message"]


def test_an_unknown_model_is_still_said_to_be_one(port):
    status, answer = call(port, "GET", "/v1/models/gpt-4")
    assert status == 404 and answer["error"]["code"] == "model_not_found"


def test_the_root_says_where_everything_is(port):
    status, answer = call(port, "GET", "/")
    assert status == 200 and answer["model"] == "checkpoint-30" and answer["docs"] == "/docs"
    assert any(line.startswith("POST /v1/chat/completions: Answer a conversation") for line in answer["paths"])


def test_the_documentation_needs_no_other_host_and_no_script(port):
    status, page = call(port, "GET", "/docs")
    assert status == 200
    for piece in ("POST /v1/chat/completions", "max_tokens", "Longest answer, in tokens.", "GET /health"):
        assert piece in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and "//" not in page


def test_the_garbage_collector_passes_over_what_was_loaded_before_requests_come(monkeypatch):
    spared = []
    monkeypatch.setattr(api_demo.uvicorn, "run", lambda *_, **__: spared.append(gc.get_freeze_count()))
    gc.unfreeze()
    try:
        api_demo.main(["--model_name_or_path", str(TINY), "--server_port", str(free_port())])
    finally:
        gc.freeze()  # as conftest.py has left it
    assert spared[0] > 100_000  # torch and transformers alone have more
