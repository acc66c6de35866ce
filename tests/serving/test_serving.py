"""The chat server: equal to chat(), together or alone, with any prefix, from a kept cache, at its limits."""

import json
import shutil
import threading
import time

import pytest
import torch
from conftest import TINY
from support.chat_server import GREEDY, QUERIES, SlowServer, finish, make_run, open_server, remember

from chatglm2.chat import TRAINING_DATE
from checkpoint import load_model, load_prefix, load_tokenizer, read_config, save_prefix
from data.encoding import encode_prediction
from data.examples import load_examples
from serving.page_events import Page
from serving.page_words import TEXTS
from serving.server import BASE, Answer, Busy, Sampling, hold_back
from tuning.methods import prepare_model, save_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def server(run):
    server = open_server("--ptuning_checkpoint", run, "--concurrency", 4, "--max_queue", 8, server_class=SlowServer)
    yield server
    server.close()


def chat(run, name, query, history=()):
    """What the model's own chat() answers, with the prefix in its prefix encoder."""
    if name == BASE:
        model = load_model(TINY)
    else:
        tensors = torch.load(run / name / "pytorch_model.bin")
        length = tensors["transformer.prefix_encoder.embedding.weight"].shape[0]
        model = load_model(TINY, config=read_config(TINY, pre_seq_len=length))
        load_prefix(model, run / name)
    tokenizer = load_tokenizer(TINY, model.config)
    return model.chat(tokenizer, query, list(history), do_sample=False, max_new_tokens=24)[0]


@pytest.mark.parametrize("name", [BASE, "checkpoint-10", "checkpoint-30"])
def test_a_greedy_answer_is_the_one_chat_gives(server, run, name):
    history = [("你好", "你好！")]
    for query in QUERIES:
        assert finish(server, query, history, model=name).text == chat(run, name, query, history)


@pytest.mark.parametrize("words, dtype", [(["--bf16"], torch.bfloat16), (["--bf16", "false"], torch.float32)])
def test_weights_are_in_bfloat16_where_that_is_asked_for(run, words, dtype):
    server = open_server("--ptuning_checkpoint", run, *words)
    try:
        assert server.model.transformer.output_layer.weight.dtype == dtype
        assert finish(server, QUERIES[0], model="checkpoint-10").text
    finally:
        server.close()


def encoded_for_prediction(tokenizer, folder, source_prefix, query, history):
    """Token ids of the prompt as evaluation makes them from a data file."""
    (folder / "rows.json").write_text(json.dumps({"q": query, "a": "x", "h": [list(turn) for turn in history]}))
    examples, _ = load_examples(folder / "rows.json", "q", "a", "h")
    lengths = {"max_source_length": 2000, "max_target_length": 8}
    return encode_prediction(examples, tokenizer, source_prefix=source_prefix, **lengths)[0]["input_ids"]


@pytest.mark.parametrize("history", [[], [("你好", "你好！"), ("再见", "再见！")]])
def test_a_prompt_begins_with_the_source_prefix_its_checkpoint_was_trained_with(history, tmp_path):
    run = make_run(tmp_path / "run")
    remember(run / "checkpoint-10", source_prefix="广告：")
    remember(run / "checkpoint-20", source_prefix=" 写一句\n")
    server = open_server("--ptuning_checkpoint", run / "checkpoint-20")
    texts = {"checkpoint-10": "广告：", "checkpoint-20": " 写一句\n", "checkpoint-30": "", BASE: "", None: " 写一句\n"}
    try:
        for model, text in texts.items():
            expected = encoded_for_prediction(server.tokenizer, tmp_path, text, QUERIES[0], history)
            assert server.encode(QUERIES[0], history, model) == expected, model
            assert server.fit(QUERIES[0], history, 8, model) == (expected, 0), model
        long = [("你好", "好" * 300)] * 8
        token_ids, dropped = server.fit(QUERIES[0], long, 8, "checkpoint-10")
        assert dropped and server.tokenizer.decode(token_ids).startswith("广告：[Round 1]")
    finally:
        server.close()


@pytest.mark.parametrize("method", ["lora", "freeze", "full"])
def test_tuned_weights_are_asked_with_their_source_prefix_too(method, tmp_path):
    model = load_model(TINY)
    checkpoint = tmp_path / "checkpoint-10"
    prepare_model(model, method, do_train=True)
    save_trained(model, checkpoint, {"base_model": str(TINY), "finetuning_type": method, "source_prefix": "广告："})
    load_tokenizer(TINY, model.config).save_pretrained(checkpoint)
    server = open_server("--ptuning_checkpoint", checkpoint)
    try:
        assert server.encode("你好") == encoded_for_prediction(server.tokenizer, tmp_path, "广告：", "你好", [])
    finally:
        server.close()


def test_answers_with_different_prefixes_computed_together_equal_those_computed_alone(server):
    wanted = [(query, name) for query in QUERIES for name in server.models()]
    alone = [finish(server, query, model=name).response_ids for query, name in wanted]
    server.delay = 0.01  # so that they overlap
    most = [0]

    def watch(answer):
        most[0] = max(most[0], server.load()[0])
        if answer.finish_reason:
            ended.release()

    ended = threading.Semaphore(0)
    answers = []
    for query, name in wanted:
        while sum(server.load()) >= 10:
            time.sleep(0.01)
        answers.append(server.submit(server.encode(query), model=name, sampling=GREEDY, notify=watch))
    for _ in wanted:
        assert ended.acquire(timeout=60)
    assert most[0] == 4
    assert [answer.response_ids for answer in answers] == alone


def test_the_prefixes_change_the_answers(server):
    answers = {finish(server, QUERIES[0], model=name).text for name in server.models()}
    assert len(answers) == 4


def test_a_conversation_is_continued_from_its_cache_with_the_same_answers(server):
    history, last_prompt = [], 0
    for query in QUERIES:
        fresh = finish(server, query, history)
        kept = finish(server, query, history, session="a")
        assert kept.response_ids == fresh.response_ids
        assert kept.reused_tokens >= last_prompt - 1
        last_prompt = len(kept.token_ids)
        history.append((query, kept.text))


def test_an_edited_history_shares_only_what_it_has_in_common(server):
    finish(server, QUERIES[1], [(QUERIES[0], "好。")], session="a")
    edited = [(QUERIES[0], "不好。")]
    answer = finish(server, QUERIES[1], edited, session="a")
    assert 0 < answer.reused_tokens < len(server.encode(QUERIES[0])) + 2
    assert answer.response_ids == finish(server, QUERIES[1], edited).response_ids


def test_another_prefix_does_not_see_the_cache(server):
    finish(server, QUERIES[0], session="a", model="checkpoint-10")
    answer = finish(server, QUERIES[0], session="a", model="checkpoint-20")
    assert answer.reused_tokens == 0
    assert answer.response_ids == finish(server, QUERIES[0], model="checkpoint-20").response_ids


def test_kept_caches_are_bounded_and_the_one_idle_longest_goes_first(server):
    server.max_sessions = 2
    for session in ("a", "b", "a", "c"):
        finish(server, QUERIES[0], session=session)
    assert finish(server, QUERIES[0], session="a").reused_tokens > 0
    assert finish(server, QUERIES[0], session="b").reused_tokens == 0
    assert len(server._kept_caches) == 2
    server.forget("a")
    assert "a" not in server._kept_caches


def test_a_seed_gives_the_same_sampled_answer_alone_and_in_company(server):
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95, seed=7)
    alone = finish(server, QUERIES[0], sampling=sampling).response_ids
    server.delay = 0.01
    company = [server.submit(server.encode(query), sampling=GREEDY) for query in QUERIES[1:]]
    assert finish(server, QUERIES[0], sampling=sampling).response_ids == alone
    assert len(company) == 3
    other = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95, seed=8)
    assert finish(server, QUERIES[0], sampling=other).response_ids != alone


def test_the_end_of_an_answer_says_why(server):
    assert finish(server, QUERIES[0], sampling=Sampling(max_new_tokens=3, temperature=0)).finish_reason == "length"
    whole = finish(server, QUERIES[0], model=BASE, sampling=Sampling(max_new_tokens=200, temperature=0))
    assert whole.finish_reason == "stop"
    stop = whole.text[4:6]
    cut = finish(server, QUERIES[0], model=BASE, sampling=Sampling(temperature=0, stop=(stop,)))
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_a_cancelled_answer_leaves_its_place_to_the_next(server):
    server.endless, server.delay = True, 0.01
    running = [server.submit(server.encode(QUERIES[0])) for _ in range(4)]
    waiting = [server.submit(server.encode(QUERIES[0])) for _ in range(8)]
    with pytest.raises(Busy, match="4 places are taken and 8 requests wait"):
        server.submit(server.encode(QUERIES[0]))
    for answer in running + waiting:
        answer.cancel()
    deadline = time.monotonic() + 60
    while server.load() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.load() == (0, 0)
    assert {answer.finish_reason for answer in running + waiting} == {"cancelled"}
    server.endless = False
    assert finish(server, QUERIES[0]).text


def test_closing_the_stream_cancels(server):
    server.endless = True
    stream = server.stream(server.encode(QUERIES[0]))
    answer = next(stream)
    stream.close()
    assert answer.cancelled


@pytest.mark.parametrize("where", ["_feed", "_step", "_remove"])
def test_an_error_of_the_model_ends_the_answer_and_not_the_server(server, monkeypatch, where):
    def fail(*inputs):
        raise RuntimeError("out of memory\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(server, where, fail)
        answer = finish(server, QUERIES[0])
    assert (answer.finish_reason, answer.error) == ("error", "out of memory")
    assert server.load() == (0, 0)
    assert finish(server, QUERIES[0]).finish_reason in ("stop", "length")


def test_text_grows_and_never_shows_half_a_character_or_half_a_placeholder(server):
    server.delay = 0.002
    texts = [answer.text for answer in server.stream(server.encode(QUERIES[0]), sampling=GREEDY)]
    assert len(set(texts)) > 5
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert hold_back("在[[训练", (TRAINING_DATE,)) == "在"
    assert hold_back("ab</", ("</s>", "c")) == "ab"
    assert hold_back("ab", ()) == "ab"


def test_the_oldest_turns_make_room_for_the_question(server):
    seq_length = server.model.config.seq_length
    history = [(f"第{number}个问题", "好" * 40) for number in range(100)]
    token_ids, dropped = server.fit(QUERIES[0], history, 100)
    assert 0 < dropped < 100
    assert len(token_ids) <= seq_length - 100
    assert token_ids == server.encode(QUERIES[0], history[dropped:])
    assert server.fit(QUERIES[0], history[-3:], 100)[1] == 0
    with pytest.raises(ValueError, match=rf"has \d+ tokens; this model takes {seq_length}"):
        server.fit("好" * 3000, [], 100)


def test_a_history_of_ten_thousand_turns_is_cut_without_encoding_it_all(server, monkeypatch):
    encoded = []
    build_prompt = server.tokenizer.build_prompt
    monkeypatch.setattr(
        server.tokenizer,
        "build_prompt",
        lambda query, history=(): encoded.append(len(history)) or build_prompt(query, history),
    )
    token_ids, dropped = server.fit("你好", [("你好", "你好")] * 10_000, 100)
    assert len(token_ids) < server.model.config.seq_length and dropped > 9_800
    assert max(encoded) < 200


def test_an_unknown_model_or_a_prefix_of_another_model_is_refused_by_name(server, run):
    with pytest.raises(ValueError, match="no model 'checkpoint-7'; there are checkpoint-10, checkpoint-20"):
        server.submit([1], model="checkpoint-7")
    with pytest.raises(ValueError, match="no model '../checkpoint-10'"):
        server.submit([1], model="../checkpoint-10")


def test_a_checkpoint_that_training_writes_later_can_be_asked_for(run, tmp_path):
    folder = make_run(tmp_path, lengths=(4,))
    server = open_server("--ptuning_checkpoint", folder / "checkpoint-10")
    try:
        assert server.models() == ["checkpoint-10", BASE]
        make_run(folder, lengths=(4, 5))
        assert server.models() == ["checkpoint-10", "checkpoint-20", BASE]
        assert server.facts("checkpoint-20")["pre_seq_len"] == 5
    finally:
        server.close()


def test_only_the_worker_computes_on_the_models_device(run):
    """A prefix that another thread moves to a GPU breaks a CUDA graph that is being recorded."""
    server = open_server("--ptuning_checkpoint", run)
    touched = []
    device = server.model.device
    watched = property(lambda model: touched.append(threading.current_thread()) or device)
    server.model.__class__ = type("Watched", (type(server.model),), {"device": watched})
    try:
        assert server.prefix("checkpoint-10") and not touched
        assert finish(server, QUERIES[0], model="checkpoint-10").response_ids
        assert {thread.name for thread in touched} == {"chat-server"}
    finally:
        server.close()


def test_swapping_in_a_known_prefix_reads_nothing(server, monkeypatch):
    server.prefix("checkpoint-20")
    monkeypatch.setattr(server, "_read_prefix", None)
    assert len(server.prefix("checkpoint-20")) == server.model.config.num_layers


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bits_of_the_checkpoint_are_used_unless_the_flag_says_otherwise(tmp_path, bits):
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=3), quantization_bit=bits)
    save_prefix(model, tmp_path / "checkpoint-1", {"base_model": str(TINY)})
    for words, expected in ((["--ptuning_checkpoint", tmp_path], bits), (["--model_name_or_path", TINY], 0)):
        server = open_server(*words)
        assert server.model.config.quantization_bit == expected
        assert finish(server, QUERIES[0]).response_ids
        server.close()


def test_a_run_folder_stands_for_its_last_checkpoint_and_the_sidecar_names_the_model(server):
    assert server.default == "checkpoint-30"
    assert server.facts("checkpoint-30") == {
        "base_model": "tiny",
        "model": "checkpoint-30",
        "pre_seq_len": 6,
        "weights": "float32",
        "device": str(server.model.device),
    }


def test_the_status_tells_the_drift_that_a_checkpoint_remembers(server, tmp_path):
    checkpoint = tmp_path / "checkpoint-30"
    shutil.copytree(server.checkpoints()["checkpoint-30"], checkpoint)
    sidecar = json.loads((checkpoint / "ptuning.json").read_text())
    (checkpoint / "ptuning.json").write_text(json.dumps({**sidecar, "drift": 0.4079}))
    with_drift = open_server("--ptuning_checkpoint", checkpoint)
    line = Page(with_drift).describe(with_drift.default, TEXTS["en"])
    with_drift.close()
    assert line == "tiny · checkpoint-30 (prefix of 6) · drift 0.41 · float32 · cpu"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", TINY, "--pre_seq_len", "4"], "--pre_seq_len 4 needs --ptuning_checkpoint"),
        (["--ptuning_checkpoint", "RUN", "--pre_seq_len", "128"], "contradicts .*checkpoint-30, .* with 6"),
        (["--model_name_or_path", TINY, "--concurrency", "0"], "--concurrency 0: expected at least 1"),
        (["--ptuning_checkpoint", "RUN/checkpoint-7"], "has checkpoint-10, checkpoint-20, checkpoint-30"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(run, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_server(*[str(word).replace("RUN", str(run)) for word in words])


def test_sampling_refuses_values_that_would_break_it():
    for settings in ({"top_p": 1.1}, {"temperature": -1}, {"max_new_tokens": 0}, {"top_p": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Sampling(**settings)


def test_the_answer_counts_its_speed():
    answer = Answer([1], BASE, GREEDY)
    assert answer.tokens_per_second == 0
    answer.response_ids, answer.seconds = [1, 2, 3], 1.5
    assert answer.tokens_per_second == 2


# ---- many clients


def test_a_text_with_more_characters_than_could_fit_is_refused_before_it_is_tokenized(server, monkeypatch):
    monkeypatch.setattr(server.tokenizer, "sp_model", None)  # any use of it would fail
    longest = 16 * server.model.config.seq_length
    for ask in (lambda: server.encode(" " * (longest + 1)), lambda: server.fit(" " * (longest + 1), [], 100)):
        with pytest.raises(ValueError, match=r"has 16,385 characters; this model takes 1024 tokens"):
            ask()
    with pytest.raises(ValueError, match="characters"):
        server.encode("a", [("a", "b" * 4000)] * 5)


def test_turns_that_are_too_old_to_fit_are_left_out_before_they_are_tokenized(server, monkeypatch):
    encoded = []
    encode_batch = server.tokenizer.encode_batch
    monkeypatch.setattr(
        server.tokenizer, "encode_batch", lambda texts: encoded.extend(map(len, texts)) or encode_batch(texts)
    )
    history = [("好" * 5000, "好" * 5000) for _ in range(90)] + [("你好", "你好！")]
    token_ids, dropped = server.fit(QUERIES[0], history, 100)
    assert dropped == 90 and token_ids == server.encode(QUERIES[0], history[90:])
    assert max(encoded) < 17 * server.model.config.seq_length


def test_a_client_without_a_place_does_not_wait_for_one_that_has_them_all(server):
    alone = {query: finish(server, query).response_ids for query in QUERIES}
    server.endless, server.delay = True, 0.01
    running = [server.submit(server.encode(QUERIES[0]), client="greedy") for _ in range(4)]
    wait_until(lambda: all(len(answer.response_ids) > 2 for answer in running))
    answers = [server.submit(server.encode(query), client="modest", sampling=GREEDY) for query in QUERIES[:2]]
    wait_until(lambda: all(answer.finish_reason for answer in answers))
    assert not any(answer.finish_reason for answer in running)
    assert [answer.finish_reason for answer in answers] == ["length"] * 2
    for answer in running:
        answer.cancel()
    wait_until(lambda: server.load() == (0, 0))
    server.endless = False
    assert finish(server, QUERIES[0]).response_ids == alone[QUERIES[0]]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=7)])
def test_an_answer_that_was_paused_for_another_client_is_the_one_it_would_have_been(server, monkeypatch, sampling):
    alone = [finish(server, query, model="checkpoint-30", sampling=sampling).response_ids for query in QUERIES]
    paused = []
    resume = server._resume
    monkeypatch.setattr(server, "_resume", lambda answer: paused.append(answer) or resume(answer))
    server.delay = 0.02
    running = [server.submit(server.encode(query), client="a", sampling=sampling) for query in QUERIES]
    wait_until(lambda: all(answer.response_ids for answer in running))
    for client in ("b", "c"):
        server.submit(server.encode(QUERIES[2]), client=client, sampling=Sampling(max_new_tokens=3))
    wait_until(lambda: all(answer.finish_reason for answer in running))
    assert paused and [answer.response_ids for answer in running] == alone


def test_one_client_may_not_fill_the_queue(server):
    server.endless, server.delay = True, 0.01
    answers = [server.submit(server.encode(QUERIES[0]), client="greedy") for _ in range(6)]
    with pytest.raises(Busy, match="This client has 6 requests here, and its share is 6 of 12"):
        server.submit(server.encode(QUERIES[0]), client="greedy")
    with pytest.raises(Busy, match="its share"), server.preparing("greedy"):
        pass
    answers += [server.submit(server.encode(QUERIES[0]), client="modest") for _ in range(4)]
    for answer in answers:
        answer.cancel()
    wait_until(lambda: server.load() == (0, 0))
    assert not server._held
    server.endless = False
    assert finish(server, QUERIES[0], client="greedy").text


def test_facts_of_a_known_prefix_do_not_wait_for_another_one_that_is_being_read(server, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def read_slowly(checkpoint, settings):
        reading.set()
        assert go_on.wait(60)
        return []

    server.facts("checkpoint-30")
    monkeypatch.setattr(server, "_read_prefix", read_slowly)
    reader = threading.Thread(target=server.prefix, args=["checkpoint-10"])
    reader.start()
    assert reading.wait(60)
    asker = threading.Thread(target=server.facts, args=["checkpoint-30"], daemon=True)
    asker.start()
    asker.join(20)
    waited = asker.is_alive()
    go_on.set()
    reader.join(60)
    assert not waited


def test_closing_gives_what_is_on_its_way_the_time_it_is_told(run):
    server = open_server("--ptuning_checkpoint", run, server_class=SlowServer)
    server.delay = 0.01
    answer = server.submit(server.encode(QUERIES[0]), sampling=GREEDY)
    server.close(60)
    assert answer.finish_reason in ("stop", "length")
    with pytest.raises(Busy, match="shutting down"):
        server.submit(server.encode(QUERIES[0]))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition(), f"not within {seconds} s"


def test_more_turns_than_any_prompt_has_room_for_are_refused_before_they_are_tokenized(server, monkeypatch):
    seq_length = server.model.config.seq_length
    monkeypatch.setattr(server.tokenizer, "encode", lambda text: pytest.fail("it was tokenized"))
    with pytest.raises(ValueError, match=rf"The history has {seq_length:,} turns; .* Shorten the history"):
        server.encode("问", [("", "")] * seq_length)


def test_turns_without_text_are_dropped_too_where_a_prompt_has_no_room_for_them(server):
    history = [("", "")] * 100_000
    token_ids, dropped = server.fit("问", history, 8)
    assert len(token_ids) < server.model.config.seq_length
    assert dropped > len(history) - server.model.config.seq_length // 8
