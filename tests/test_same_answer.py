"""One greedy answer, four programs: evaluate.sh, the terminal, the page and the API."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE
from test_api_demo import call, serve
from test_main import predictions
from test_scripts import bash
from test_serving import make_run, open_server
from test_web_demo import ask_over_http, free_port

import api_demo
import web_demo


@pytest.mark.slow
def test_evaluate_terminal_page_and_api_give_the_same_greedy_answers(tmp_path):
    rows = [json.loads(line) for line in (SAMPLE / "dev.json").read_text("utf-8").splitlines()[:4]]
    (tmp_path / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = make_run(tmp_path / "run") / "checkpoint-30"

    # Its limit counts prompt and answer; this is enough for every answer to end by itself.
    words = f"--ptuning_checkpoint {checkpoint} --output_dir {tmp_path} --do_sample false"
    done = bash(f"bash evaluate.sh {words}", MODEL="tiny", DATA=tmp_path, MAX_TARGET_LENGTH=600)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [line["predict"] for line in predictions(tmp_path)]
    assert all(expected)

    piped = subprocess.run(
        [sys.executable, "ptuning/cli_demo.py", "--ptuning_checkpoint", checkpoint, "--temperature", "0"],
        input="".join(row["content"] + "\n" for row in rows),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert piped.stdout.splitlines() == [text.replace("\n", "\\n") for text in expected], piped.stderr[-2000:]

    server = open_server("--ptuning_checkpoint", checkpoint)
    api_port, end_api = serve(api_demo.create_app(server))
    page_port = free_port()
    page = web_demo.launch(server, server_port=page_port, block=False)
    try:
        for number, row in enumerate(rows):
            body = {"messages": [{"role": "user", "content": row["content"]}], "temperature": 0}
            status, answer = call(api_port, "POST", "/v1/chat/completions", body)
            assert (status, answer["choices"][0]["message"]["content"]) == (200, expected[number])
            told = ask_over_http(f"http://127.0.0.1:{page_port}", f"visitor{number}", row["content"], max_length=900)
            shown = told[-1]["output"]["data"][1][1]["content"][0]["text"]
            assert shown == web_demo.as_markdown(expected[number])
    finally:
        page.close(verbose=False)
        end_api()
        server.close()
