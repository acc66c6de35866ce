"""The prompt decides who answers: a prefix, an adapter, one of several, or the base; equal to what each gives alone."""

import json
from types import SimpleNamespace

import pytest
from conftest import TINY
from support.api_server import client, port  # noqa: F401, fixtures
from support.chat_server import GREEDY, QUERIES, finish, make_adapter, make_run, open_server, remember, sign
from support.over_http import call, wait_for

import cli_demo
from first_look import look_at_demo
from serving.auto import AUTO, Prompt, decide
from serving.page_events import Page, first_mode, modes_of
from serving.page_kept import empty
from serving.server import BASE

PREFIX = "checkpoint-20"
ADVERTS = QUERIES[:2]
OTHERS = ["你好", "请从38数到43"]
COUNTING = [f"请从{start}数到{start + length}" for start in range(1, 60) for length in (3, 5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), (4, 6))
    sign(run / PREFIX)
    return run


@pytest.fixture(scope="module")
def server(run):
    server = open_server("--ptuning_checkpoint", run / PREFIX)
    yield server
    server.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("lora") / "checkpoint-5")


def finish_together(server, *asked):
    """The answers to prompts, (query, history, more of submit()) each, that run at the same time."""
    answers = []
    for query, history, how in asked:
        prompt = server.encode(query, history, how.get("model", AUTO))
        answers.append(server.submit(prompt, **{"model": AUTO, "sampling": GREEDY, **how}))
    wait_for(lambda: all(answer.finish_reason for answer in answers))
    assert [answer.error for answer in answers] == [None] * len(answers)
    return answers


def test_the_prefix_answers_what_its_training_prompts_are_like_and_the_base_all_else(server):
    for query in [*ADVERTS, *OTHERS]:
        for history in ([], [(ADVERTS[0], "这款裙子")], [("你好", "你好！")]):
            [answer] = finish_together(server, (query, history, {}))
            chosen = PREFIX if query in ADVERTS else BASE
            assert answer.model == answer.decision.model == chosen
            assert (answer.decision.distance <= 1) == (chosen == PREFIX) and 0 < answer.decision.sure < 1
            assert answer.response_ids == finish(server, query, history, model=chosen).response_ids


def test_two_conversations_at_once_never_mix(server):
    turns = {"one": [ADVERTS[0], OTHERS[0], ADVERTS[1]], "two": [OTHERS[1], ADVERTS[1], OTHERS[0]]}
    histories = {name: [] for name in turns}
    for number in range(3):
        asked = {name: (turns[name][number], list(histories[name])) for name in turns}
        answers = finish_together(server, *((*each, {"session": name}) for name, each in asked.items()))
        for name, answer in zip(turns, answers, strict=True):
            alone = finish(server, *asked[name], model=answer.model)
            assert (answer.text, answer.response_ids) == (alone.text, alone.response_ids)
            histories[name].append((turns[name][number], answer.text))
    assert answers[0].model == PREFIX and answers[1].model == BASE


def test_an_adapter_takes_part_in_its_own_rows_of_a_batch_only(adapter):
    server = open_server("--ptuning_checkpoint", adapter, "--auto")
    alone = {name: [finish(server, query, model=name) for query in ADVERTS] for name in (BASE, "checkpoint-5")}
    together = finish_together(server, *((query, [], {"model": name}) for name in alone for query in ADVERTS))
    merged, untouched = open_server("--ptuning_checkpoint", adapter), open_server("--model_name_or_path", TINY)
    apart = [finish(each, query) for each in (untouched, merged) for query in ADVERTS]
    chosen = finish_together(server, *((query, [], {}) for query in [*ADVERTS, *OTHERS]))
    for opened in (server, merged, untouched):
        opened.close()
    expected = [answer.response_ids for answer in [*alone[BASE], *alone["checkpoint-5"]]]
    assert [answer.response_ids for answer in together] == [answer.response_ids for answer in apart] == expected
    assert alone[BASE][0].response_ids != alone["checkpoint-5"][0].response_ids
    assert [answer.model for answer in chosen] == ["checkpoint-5"] * 2 + [BASE] * 2


def test_of_several_prefixes_the_nearest_answers(run, tmp_path):
    titles = make_run(tmp_path / "counts", (5,)) / "checkpoint-10"
    sign(titles, COUNTING)
    server = open_server("--ptuning_checkpoint", f"{run / PREFIX},{titles}")
    assert server.models() == [run.name, "counts", BASE] and server.default == run.name
    assert [server.prefix_length(name) for name in server.models()] == [6, 5, 0]
    for query, chosen in ((ADVERTS[0], run.name), (COUNTING[7], "counts"), ("你好", BASE)):
        [answer] = finish_together(server, (query, [], {}))
        assert answer.model == chosen
        assert answer.response_ids == finish(server, query, model=chosen).response_ids
    server.close()


def test_checkpoints_of_one_run_are_called_as_their_folders(run):
    server = open_server("--ptuning_checkpoint", f"{run / 'checkpoint-10'}, {run / PREFIX}")
    server.close()
    assert server.models() == ["checkpoint-10", PREFIX, BASE] and server.default == "checkpoint-10"
    with pytest.raises(ValueError, match="cannot be told apart"):
        open_server("--ptuning_checkpoint", f"{run / PREFIX},{run / PREFIX}")


def test_each_model_is_asked_with_the_text_before_its_own_prompts(run, tmp_path):
    named = make_run(tmp_path, (4,)) / "checkpoint-10"
    remember(sign(named), source_prefix="广告：")
    server = open_server("--ptuning_checkpoint", named)
    prompts = [server.fit(query, [], 24, AUTO)[0] for query in (ADVERTS[0], OTHERS[0])]
    answers = [server.submit(prompt, model=AUTO, sampling=GREEDY) for prompt in prompts]
    wait_for(lambda: all(answer.finish_reason for answer in answers))
    expected = [server.encode(ADVERTS[0], model="checkpoint-10"), server.encode(OTHERS[0], model=BASE)]
    server.close()
    assert [answer.token_ids for answer in answers] == expected and expected[0] != prompts[0]


# ---- over HTTP


def ask(port, query, **fields):
    body = {"messages": [{"role": "user", "content": query}], "temperature": 0, "max_tokens": 24, "model": AUTO}
    return call(port, "POST", "/v1/chat/completions", {**body, **fields})


def test_the_api_says_who_answers_and_how_sure_that_is(port, server):
    for query, chosen in ((ADVERTS[0], PREFIX), (OTHERS[0], BASE)):
        status, body = ask(port, query, n=2)
        assert status == 200 and body["model"] == AUTO
        for choice in body["choices"]:
            assert choice["auto"]["model"] == chosen and 0 < choice["auto"]["sure"] < 1
            assert choice["message"]["content"] == finish(server, query, model=chosen).text
    assert "auto" not in ask(port, ADVERTS[0], model=PREFIX)[1]["choices"][0]
    listed = [each["id"] for each in call(port, "GET", "/v1/models")[1]["data"]]
    assert listed == [PREFIX, "checkpoint-10", BASE, AUTO]
    assert call(port, "GET", "/v1/models/auto")[0] == 200


def test_a_stream_ends_with_who_has_answered(client):
    asked = {"model": AUTO, "messages": [{"role": "user", "content": OTHERS[0]}], "temperature": 0, "max_tokens": 24}
    *_, last = client.chat.completions.create(**asked, stream=True)
    assert last.choices[0].auto["model"] == BASE and last.choices[0].finish_reason


def test_raw_text_is_decided_upon_and_scored_by_whoever_answers(port):
    fields = {"prompt": "你好", "echo": True, "logprobs": 0, "max_tokens": 4, "temperature": 0}
    by_auto, by_base = (call(port, "POST", "/v1/completions", {**fields, "model": name})[1] for name in (AUTO, BASE))
    assert by_auto["choices"][0].pop("auto")["model"] == BASE
    assert by_auto["choices"] == by_base["choices"]


def test_a_checkpoint_without_a_signature_says_so_where_auto_is_asked_for(run):
    server = open_server("--ptuning_checkpoint", run / "checkpoint-10")
    with pytest.raises(FileNotFoundError, match="^checkpoint-10 has no signature.safetensors.*Ask for it by its name"):
        server.submit(server.encode("你好", model=AUTO), model=AUTO)
    assert not server.offers_auto()
    server.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model_name_or_path {tiny}", "--auto needs --ptuning_checkpoint"),
        (
            "--ptuning_checkpoint {run}/checkpoint-10",
            r"has no signature.safetensors.*python ptuning/sign.py --ptuning_checkpoint .*10 ",
        ),
        ("--ptuning_checkpoint {run}/checkpoint-10,{run}/checkpoint-20", "checkpoint-10 has no signature.safetensors"),
        ("--ptuning_checkpoint {whole}", "nothing is left to answer other prompts"),
    ],
)
def test_auto_that_cannot_be_is_refused_before_a_model_is_read(run, tmp_path, words, said):
    (tmp_path / "ptuning.json").write_text(json.dumps({"finetuning_type": "full"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    words = words.format(tiny=TINY, run=run, whole=tmp_path).split()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        look_at_demo(cli_demo.parse_arguments(["--auto", *words]))


def test_each_of_several_prefixes_is_looked_at_before_a_model_is_read(run, tmp_path):
    rewards = make_run(tmp_path, (4,)) / "checkpoint-10"
    remember(rewards, stage="rm")
    with pytest.raises(ValueError, match="checkpoint-10 is a reward model"):
        look_at_demo(cli_demo.parse_arguments(["--ptuning_checkpoint", f"{rewards},{run / PREFIX}"]))


# ---- in a terminal


def test_the_terminal_lets_questions_decide_and_asks_the_other_one(server, capsys):
    terminal = cli_demo.Terminal(server, GREEDY)
    assert terminal.command("prefix auto") == f"Each question decides: {PREFIX} or {BASE}."
    by_base = terminal.answer(OTHERS[0])
    assert by_base.startswith(f"[{BASE}, chosen by the question, ") and "% sure" in by_base
    assert terminal.command("other").startswith(f"[{PREFIX} · ") and len(terminal.history) == 1
    assert terminal.history[0] == (OTHERS[0], finish(server, OTHERS[0], model=PREFIX).text)
    assert terminal.command("other").startswith(f"[{BASE} · ")
    assert terminal.history[0] == (OTHERS[0], finish(server, OTHERS[0], model=BASE).text)
    assert terminal.answer(ADVERTS[0]).startswith(f"[{PREFIX}, chosen by the question, ")


def test_the_terminal_switches_between_several_prefixes(run):
    server = open_server("--ptuning_checkpoint", f"{run / 'checkpoint-10'},{run / PREFIX}")
    terminal = cli_demo.Terminal(server, GREEDY)
    server.close()
    assert terminal.command(f"prefix {PREFIX}") == f"Answering: {PREFIX}, 6 virtual tokens."
    assert "checkpoint-10 has no signature" in terminal.command("prefix auto") and terminal.model == PREFIX
    assert terminal.command("other").startswith("There is no other one")


# ---- on the page


def converse(page, steps):
    """What the browser keeps, and the last status, after each step (a handler and what stands before `kept`)."""
    request = SimpleNamespace(session_hash="page", client=SimpleNamespace(host="127.0.0.1"), headers={})
    kept, found = empty(), []
    for handler, *before in steps:
        for update in handler(request, *before, kept, AUTO, PREFIX, 24, 0.8, 0):
            status, kept = update[3], update[4] if isinstance(update[4], dict) and "auto" in update[4] else kept
        found.append((kept, status))
    return found


def test_the_page_says_who_answers_and_a_click_asks_the_other_one(server):
    page = Page(server)
    (first, said), (second, _), (third, _) = converse(page, [(page.respond, OTHERS[0]), (page.other,), (page.other,)])
    by_prefix, by_base = (finish(server, OTHERS[0], model=name).text for name in (PREFIX, BASE))
    assert first["auto"] == third["auto"] == [[OTHERS[0], by_base]] and second["auto"] == [[OTHERS[0], by_prefix]]
    assert (first["other"], second["other"], third["other"]) == (PREFIX, BASE, PREFIX)
    assert second["earlier"] == {"auto": by_base}  # a thumb compares the two
    assert "chosen by the question" in said and "base model, no prefix" in said


def test_the_page_offers_auto_where_it_can_choose(server, run):
    without = open_server("--ptuning_checkpoint", run / "checkpoint-10")
    decides = open_server("--ptuning_checkpoint", run / PREFIX, "--auto")
    modes = [modes_of(each) for each in (without, server)], first_mode(server), first_mode(decides)
    without.close()
    decides.close()
    assert modes == ([["tuned", "base", "both"], ["tuned", "base", "both", "auto"]], "tuned", "auto")


# ---- decisions


class Far:
    """A signature that measures one distance."""

    def __init__(self, distance):
        self.distance = lambda means: means.sum(-1) * 0 + distance


@pytest.mark.parametrize(
    ("distances", "model", "sure"),
    [
        ({"a": 0.5}, "a", 0.5),
        ({"a": 2.0}, BASE, 0.5),
        ({"a": 0.8, "b": 0.4}, "b", 0.5),
        ({"a": 4.0, "b": 2.0}, BASE, 0.5),
        ({"a": float("nan")}, BASE, 0.0),
        ({"a": float("inf")}, BASE, 0.0),
    ],
)
def test_the_nearest_one_within_its_threshold_answers_else_the_base(distances, model, sure):
    import torch

    decision = decide({name: Far(value) for name, value in distances.items()}, torch.zeros(3), BASE)
    assert (decision.model, decision.sure) == (model, pytest.approx(sure))


def test_a_prompt_is_the_base_models_and_knows_the_others():
    prompt = Prompt([1, 2], ["a"], {"a": [3, 1, 2]})
    assert prompt == [1, 2] and prompt.among == ("a",) and prompt.others["a"] == [3, 1, 2]
