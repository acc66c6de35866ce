"""One greedy answer at every door: evaluate.sh, the terminal, the page, both APIs, and the exported load.py."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, SAMPLE
from support.chat_server import finish, make_run, open_server, remember
from support.over_http import call, free_port, serve
from support.page import ask_over_http
from support.runs import predictions
from support.shell import bash

import api_demo
import cli_demo
import export_model
import web_demo
from serving.markdown import as_markdown
from serving.page_kept import empty
from serving.server import Sampling

GREEDY = Sampling(max_new_tokens=900, temperature=0)


@pytest.fixture(scope="module", params=["", "广告：\n"], ids=["no source prefix", "a source prefix"])
def asked(request, tmp_path_factory):
    """A checkpoint; questions, the last of them with a history; and what evaluate.sh answers."""
    here = tmp_path_factory.mktemp("same")
    checkpoint = make_run(here / "run") / "checkpoint-30"
    if request.param:
        remember(checkpoint, source_prefix=request.param)
    server = open_server("--ptuning_checkpoint", checkpoint)
    questions = [json.loads(line)["content"] for line in (SAMPLE / "dev.json").read_text("utf-8").splitlines()[:4]]
    history = [(questions[0], finish(server, questions[0], sampling=GREEDY).text)]
    rows = [{"content": question, "summary": "x"} for question in [*questions, export_model.PROBE]]
    rows.append({"content": questions[1], "summary": "x", "history": history})
    (here / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    words = f"--ptuning_checkpoint {checkpoint} --output_dir {here} --do_sample false --history_column history"
    # The limit counts prompt and answer; this is enough for every answer to end by itself.
    limits = {"MAX_SOURCE_LENGTH": 800, "MAX_TARGET_LENGTH": 600}
    done = bash(f"bash evaluate.sh {words}", MODEL="tiny", DATA=here, **limits)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [line["predict"] for line in predictions(here)]
    assert all(answers) and answers[0] == history[0][1]
    *alone, after = zip([row["content"] for row in rows], answers, strict=True)
    yield SimpleNamespace(checkpoint=checkpoint, server=server, alone=alone, history=history, after=after)
    server.close()


@pytest.fixture(scope="module")
def api(asked):
    port, end = serve(api_demo.create_app(asked.server))
    yield port
    end()


@pytest.fixture(scope="module")
def page(asked):
    port = free_port()
    page = web_demo.launch(asked.server, server_port=port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


def through_pipe(asked, request):
    """The terminal program, whose pipe knows no history."""
    words = [sys.executable, "ptuning/cli_demo.py", "--ptuning_checkpoint", asked.checkpoint, "--temperature", "0"]
    prompts = "".join(question + "\n" for question, _ in asked.alone)
    done = subprocess.run(words, input=prompts, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [answer.replace("\n", "\\n") for _, answer in asked.alone]


def through_terminal(asked, request):
    for history, (question, answer) in conversations(asked):
        terminal = cli_demo.Terminal(asked.server, GREEDY)
        terminal.history = list(history)
        terminal.answer(question)
        assert terminal.history[-1] == (question, answer)


def through_openai_api(asked, request):
    port = request.getfixturevalue("api")
    for history, (question, answer) in conversations(asked):
        messages = []
        for asking, answering in history:
            messages += [{"role": "user", "content": asking}, {"role": "assistant", "content": answering}]
        body = {"messages": [*messages, {"role": "user", "content": question}], "temperature": 0}
        status, found = call(port, "POST", "/v1/chat/completions", body)
        assert (status, found["choices"][0]["message"]["content"]) == (200, answer)


def through_official_api(asked, request):
    port = request.getfixturevalue("api")
    for history, (question, answer) in conversations(asked):
        body = {"prompt": question, "history": history, "max_length": 1500, "temperature": 0}
        status, found = call(port, "POST", "/", body)
        assert (status, found["response"]) == (200, answer)


def through_page(asked, request):
    url = request.getfixturevalue("page")
    for number, (history, (question, answer)) in enumerate(conversations(asked)):
        kept = {**empty(), "tuned": [list(turn) for turn in history]}
        told = ask_over_http(url, f"visitor{number}", question, max_length=900, kept=kept)
        assert told[-1]["output"]["data"][1][-1]["content"][0]["text"] == as_markdown(answer)


def through_load_py(asked, request):
    """The exported program, which asks one question."""
    folder = request.getfixturevalue("tmp_path") / "out"
    export_model.main(["--ptuning_checkpoint", str(asked.checkpoint), "--output_dir", str(folder)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning"), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(folder / "load.py")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert dict(asked.alone)[export_model.PROBE] == done.stdout.removesuffix("\n"), done.stderr[-2000:]


def conversations(asked):
    """(history, (question, answer of evaluate.sh)) of each."""
    return [*(([], turn) for turn in asked.alone), (asked.history, asked.after)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "door",
    [
        through_pipe,
        through_terminal,
        through_openai_api,
        through_official_api,
        through_page,
        through_load_py,
    ],
)
def test_a_greedy_answer_is_the_one_that_evaluation_gives(door, asked, request):
    door(asked, request)
