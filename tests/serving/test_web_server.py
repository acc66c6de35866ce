"""The page without a browser, and its program: sessions, passwords, limits, Markdown."""

import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from support.chat_server import QUERIES, finish, open_server
from support.over_http import free_port, wait_for
from support.page import ask_over_http, request, server, url  # noqa: F401, fixtures

import web_demo
from serving.markdown import as_markdown, literally
from serving.page_words import TEXTS

# ---- without a browser


@pytest.mark.slow
def test_sixteen_sessions_at_once_get_their_own_answers(url, server):
    prompts = [f"编号{number}*{QUERIES[number % 4]}" for number in range(16)]
    alone = [finish(server, prompt).text for prompt in prompts]
    with ThreadPoolExecutor(16) as visitors:
        told = list(visitors.map(ask_over_http, [url] * 16, [f"visitor{number}" for number in range(16)], prompts))
    for number, messages in enumerate(told):
        assert messages[-1]["success"]
        question, answer = messages[-1]["output"]["data"][1]
        assert f"编号{number}&#42;" in question["content"][0]["text"]
        assert answer["content"][0]["text"] == as_markdown(alone[number])


@pytest.mark.slow
def test_memory_is_flat_over_many_visitors(url):
    def resident_megabytes():
        gc.collect()
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

    def visit_all(name, count):
        with ThreadPoolExecutor(8) as visitors:
            sessions = [f"{name}{number}" for number in range(count)]
            list(visitors.map(ask_over_http, [url] * count, sessions, [QUERIES[0]] * count))

    visit_all("first", 60)
    before = resident_megabytes()
    visit_all("later", 240)
    assert resident_megabytes() - before < 50


@pytest.mark.slow
def test_without_a_checkpoint_the_page_is_one_of_the_base_model():
    server = open_server("--model_name_or_path", TINY)
    blocks = web_demo.launch(server, server_port=free_port(), block=False)
    try:
        url = blocks.local_url.rstrip("/")
        config = json.loads(request(url, "GET", "/config")[1])
        visible = {part["props"].get("elem_id"): part["props"].get("visible") for part in config["components"]}
        assert visible["mode"] is visible["checkpoint"] is False
        told = ask_over_http(url, "visitor", QUERIES[0], "base", None)
        shown = told[-1]["output"]["data"][1][-1]["content"][0]["text"]
        assert shown == as_markdown(finish(server, QUERIES[0]).text)
    finally:
        blocks.close(verbose=False)
        server.close()


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", f"/gradio_api/file={ROOT}/requirements.txt"),
        ("GET", "/gradio_api/proxy=http://192.0.2.1/"),
        ("POST", "/gradio_api/call/respond"),
        ("POST", "/gradio_api/run/respond"),
        ("GET", "/monitoring"),
    ],
)
def test_files_uploads_and_calls_by_name_are_not_there(url, method, path):
    assert request(url, method, path)[0] == 404


def test_a_body_over_one_mebibyte_is_refused_and_the_page_lives_on(url):
    status, _ = request(url, "POST", "/gradio_api/queue/join", b"x" * (2**20 + 1))
    assert status == 413
    assert request(url, "GET", "/")[0] == 200


def test_half_a_character_is_refused_and_the_page_lives_on(url):
    headers = {"content-type": "application/json"}
    status, answer = request(url, "POST", "/gradio_api/run/predict", b'{"data": ["\\ud800"]}', headers)
    assert status == 400 and b"half a surrogate pair" in answer
    assert request(url, "GET", "/config")[0] == 200


def test_the_page_asks_nothing_of_other_hosts(url):
    page = request(url, "GET", "/")[1].decode()
    loaded = re.findall(r"<(?:script|link|iframe|img)[^>]*?(?:src|href)=\"(https?://[^\"]+)", page)
    assert [address for address in loaded if "127.0.0.1" not in address] == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a < b & c", "a < b & c"),
        ("<b>", "&lt;b>"),
        ("</b><!--", "&lt;/b>&lt;!--"),
        ("&lt;", "&amp;lt;"),
        ("![x](y)", "!&#91;x](y)"),
        ("`<b>`", "<code>&#60;b&#62;</code>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n&lt;b>"),
        ("- x\n  ```\n  <b>\n  ```", "- x\n  ```\n  &lt;b>\n  ```"),
        ("```mermaid\ngraph\n```", "```text\ngraph\n```"),
        ("$$a<b$$", "$$a&lt;b$$"),
        ("$$\n```\n$$\n<b>\n```", "$$\n```\n$$\n&lt;b>\n```"),
    ],
)
def test_markup_is_escaped_outside_code_blocks(text, shown):
    assert as_markdown(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "\\(" * 100_000,
        "\\[" * 100_000,
        "$$" * 100_000 + "$",
        " ".join("`" * length for length in range(1, 1500)),
        "`a" * 50_000,
        "```\n" * 50_000,
        "~~~ a\n" * 50_000,
        "&a" * 100_000,
        "> " * 100_000,
        "- " * 100_000,
        "*a _b " * 50_000,
        "1. *a\n" * 50_000,
        " " * 200_000 + "a",
        "-" * 200_000 + "x",
        ">" + " -" * 100_000 + "x",
        " \t" * 100_000 + "|x",
        "|-" * 100_000,
        "\ue000" * 100_000,
    ],
    ids=lambda text: text[:6],
)
def test_an_answer_is_prepared_in_linear_time(text):
    started = time.monotonic()
    shown = as_markdown(text)
    assert time.monotonic() - started < 15  # where it is quadratic: many minutes
    assert len(shown) < 12 * len(text) + 100


def test_emphasis_is_left_out_where_finding_its_end_would_take_the_page_too_long():
    assert as_markdown("*a _b " * 100) == "*a _b " * 100
    assert as_markdown("*a [b " * 5000) == "&#42;a &#91;b " * 5000
    paragraphs = "**a** _b_ [c](d) " * 20 + "\n\n"
    assert as_markdown(paragraphs * 50) == paragraphs * 50  # of a usual length, however many
    items = "1. **a**: b\n2. **c**: d\n" * 400
    assert as_markdown(items) == items
    looked_at = sum(len(block) * block.count("*") for block in as_markdown("*a\n" * 1900).split("\n\n"))
    assert looked_at <= 2_000_000


def test_nesting_is_bounded_and_what_is_deeper_is_shown_as_written():
    assert as_markdown("> " * 16 + "*a*") == "> " * 16 + "*a*"
    assert as_markdown("> " * 17 + "*a*") == "> " * 16 + "&#62; &#42;a&#42;"
    assert as_markdown("- > 1. " * 2000).count("&#62;") > 1990
    assert as_markdown(" " * 42 + "- a") == " " * 40 + "\u00a0\u00a0- a"


def test_a_table_is_left_out_where_its_rows_times_its_columns_are_too_many():
    table = "|a|b|\n|-|-|\n" + "|c|d|\n" * 100
    assert as_markdown(table) == table
    wide = "|a" * 500 + "\n" + "|-" * 500 + "\n" + "|\n" * 1000
    assert "|" not in as_markdown(wide)


def test_formulas_and_coloured_code_are_bounded():
    assert as_markdown("\\(a_1*b\\)") == "\\(a&#95;1&#42;b\\)"  # decoded before it becomes a formula
    long = as_markdown("$$" + "x" * 6000 + "$$ $$y$$")
    assert long.startswith("<code>&#36;&#36;xx") and long.count("$$") == 0
    block = "```python\n" + "a = 1 " * 1000 + "\n```\n"
    assert as_markdown(block * 2) == block + block.replace("python", "text")


@pytest.mark.parametrize("before", ["", "```python\n", "~~~~\n"])
def test_what_follows_very_many_lines_is_shown_as_plain_text(before):
    shown = as_markdown(before + "a\n" * 5000 + "*b*\n~~~\n<i>")
    assert shown.endswith("\n*b*\n~~~\n<i>\n~~~~")
    assert shown.count("a\n") == 5000
    fence = before.strip("\n").removesuffix("python")
    assert f"a\n{fence}\n\n~~~~\n\na" in shown  # a block that is open is closed first


def test_a_question_is_shown_to_the_letter():
    assert literally("a*b\n  <c>") == "a&#42;b\n\u00a0\u00a0&#60;c&#62;"


def test_both_languages_have_the_same_texts():
    english, chinese = TEXTS["en"], TEXTS["zh-CN"]
    assert english.keys() == chinese.keys()
    for key in english:
        assert re.findall(r"{\w+", english[key]) == re.findall(r"{\w+", chinese[key])


# ---- the program


def web_demo_sh(*words, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("MODEL", "CHECKPOINT", "STEP", "PORT")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return subprocess.Popen(
        ["bash", "web_demo.sh", *map(str, words)],
        cwd=ROOT,
        env={**clean, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_script_opens_the_page_and_says_how_to_restrict_it(server):
    port = free_port()
    process = web_demo_sh("--ptuning_checkpoint", server.run_folder, MODEL="tiny", PORT=port)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url), seconds=60)
        assert request(url, "GET", "/")[0] == 200
    finally:
        process.terminate()
    output = process.communicate(timeout=20)[0]
    assert f"Open http://127.0.0.1:{port}" in output
    assert output.count("--auth user:password") == 1


def answers(url):
    try:
        return request(url, "GET", "/")[0]
    except OSError:
        return None


@pytest.mark.slow
def test_a_password_is_asked_for(server):
    port = free_port()
    blocks = web_demo.launch(server, server_port=port, auth=("admin", "secret"), block=False)
    try:
        url = f"http://127.0.0.1:{port}"
        assert request(url, "GET", "/config")[0] == 401
        assert request(url, "POST", "/gradio_api/queue/join", "{}")[0] == 401
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert request(url, "POST", "/login", "username=admin&password=secret", form)[0] == 200
        assert request(url, "POST", "/login", "username=admin&password=guess", form)[0] == 400
    finally:
        blocks.close(verbose=False)


@pytest.mark.slow
def test_passwords_cannot_be_tried_on_and_on(server):
    port = free_port()
    blocks = web_demo.launch(server, server_port=port, auth=("admin", "secret"), block=False)
    try:
        url = f"http://127.0.0.1:{port}"

        def log_in(password, number):
            form = {
                "content-type": "application/x-www-form-urlencoded",
                "x-forwarded-for": f"192.0.2.{number}",  # which anybody may claim
            }
            path = ("/login", "/login/")[number % 2]
            return request(url, "POST", path, f"username=user{number % 3}&password={password}", form)[0]

        assert [log_in("guess", number) for number in range(5)] == [400] * 5
        assert [log_in("guess", number) for number in range(20)] == [429] * 20
        assert log_in("secret", 30) == 429
        assert request(url, "GET", "/config")[0] == 401
    finally:
        blocks.close(verbose=False)


@pytest.mark.slow
def test_the_page_bounds_connections_as_the_api_does(server):
    from serving.limits import END_SECONDS, Protocol

    blocks = web_demo.launch(server, server_port=free_port(), block=False)
    try:
        assert issubclass(blocks.server.config.http_protocol_class, Protocol)
        assert blocks.server.config.timeout_graceful_shutdown == END_SECONDS
        address = blocks.local_url.rstrip("/").removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=60) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
            assert any(isinstance(each, Protocol) for each in blocks.server.server_state.connections)
    finally:
        blocks.close(verbose=False)


def test_a_taken_port_and_a_missing_checkpoint_are_said_in_one_line(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--model_name_or_path", str(TINY), "--server_port", str(port)]
        with pytest.raises(ValueError, match=f"listen on 127.0.0.1:{port} .* such as {port + 1}"):
            web_demo.main(words)
    words = ["--ptuning_checkpoint", str(server.run_folder / "checkpoint-7"), "--server_port", str(free_port())]
    with pytest.raises(FileNotFoundError, match="has checkpoint-10, checkpoint-20, checkpoint-30"):
        web_demo.main(words)


@pytest.mark.slow
def test_without_a_model_or_a_run_the_script_ends_with_one_message(tmp_path):
    output = web_demo_sh(HOST="127.0.0.1", PORT=free_port()).communicate(timeout=60)[0]
    assert "error: MODEL is not set" in output
    process = web_demo_sh(MODEL="tiny", CHECKPOINT="no-such-run", HOST="127.0.0.1", PORT=free_port())
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "error: there is no run output/no-such-run" in output and "Traceback" not in output


def test_the_script_looks_where_train_sh_wrote():
    rule = r"CHECKPOINT:-(.+)}"
    names = [re.search(rule, (ROOT / script).read_text())[1] for script in ("train.sh", "web_demo.sh")]
    assert names[0] == names[1]


@pytest.mark.parametrize("auth", ["admin", "admin:", ":secret"])
def test_a_password_without_a_user_or_the_reverse_is_refused(auth):
    with pytest.raises(ValueError, match="user:password"):
        web_demo.parse_arguments(["--auth", auth])


def test_a_file_for_preferences_needs_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(ValueError, match="--feedback .* expected a file in a folder that is there"):
            web_demo.parse_arguments(["--feedback", str(path)])


def test_the_words_of_2023_are_accepted():
    words = f"--model_name_or_path {TINY} --ptuning_checkpoint output/x/checkpoint-3000 --pre_seq_len 128".split()
    assert web_demo.parse_arguments(words).pre_seq_len == 128


def test_the_sliders_start_at_the_official_values_within_what_the_model_takes(url, server):
    config = json.loads(request(url, "GET", "/config")[1])
    sliders = [part["props"] for part in config["components"] if part["type"] == "slider"]
    longest = server.model.config.seq_length
    assert [(slider["minimum"], slider["value"], slider["maximum"]) for slider in sliders] == [
        (1, min(8192, longest), longest),
        (0.01, 0.8, 1),
        (0, 0.95, 2),
    ]
