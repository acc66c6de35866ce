"""The page in a real browser: streaming, stopping, switching prefixes, hostile text, several visitors; its limits."""

import contextlib
import gc
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_serving import QUERIES, SlowServer, finish, make_run, open_server

import web_demo
from serving.server import BASE

with contextlib.suppress(ImportError):  # the fixture `browser` says so
    from playwright.sync_api import expect, sync_playwright

ARTIFACTS = Path(__file__).parent / "artifacts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HOSTILE = (
    "<img src=x onerror=\"document.title='pwned'\"> <script>document.title='pwned'</script> <b>bold</b>\n\n"
    "[link](javascript:document.title='pwned') ![image](http://192.0.2.1/x.png) <iframe src=http://192.0.2.1></iframe>\n"
    "$$\\href{javascript:document.title='pwned'}{x}$$ &lt;i&gt; <custom>x</custom>\n\n"
    '- item\n```\n<u>in code</u>\n```\n[a]: x "\n```\n"\n<s>after</s>'
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value, f"not within {seconds} s"
    return value


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    server = open_server("--ptuning_checkpoint", run, "--concurrency", 8, server_class=SlowServer)
    yield server
    server.close()


@pytest.fixture(scope="module")
def url(server):
    port = free_port()
    blocks = web_demo.launch(server, server_port=port, block=False)
    yield f"http://127.0.0.1:{port}"
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium fonts-noto-cjk")
    pytest.importorskip("playwright.sync_api", reason="pip install -r tests/requirements.txt")
    expect.set_options(timeout=60_000)
    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, headless=True, args=CHROMIUM_FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, url, server):
    """Opens the page as a new visitor; afterwards the server is as it was."""
    contexts = []

    def open_page(locale="en-US", color_scheme="light"):
        context = browser.new_context(
            locale=locale, color_scheme=color_scheme, viewport={"width": 1200, "height": 1000}
        )
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#message textarea")
        expect(page.locator("#status")).to_contain_text("tiny")
        return page

    yield open_page
    server.delay, server.endless, server.script = 0.0, False, None
    for context in contexts:
        context.close()
    wait_for(lambda: server.load() == (0, 0))


def send(page, text):
    page.fill("#message textarea", text)
    page.click("#submit")


def ask(page, text):
    """Send a message and return the finished answer."""
    answers = page.locator("#left .bot.message")
    before = answers.count()
    send(page, text)
    expect(answers).to_have_count(before + 1)
    expect(page.locator("#status")).to_contain_text(re.compile("ended|自然结束|达到最大"))
    expect(page.locator("#submit")).to_be_enabled()
    # Markdown is rendered a moment later.
    expect(answers.last).to_contain_text(re.compile(r"[^\s\u200b]"))
    return last_answer(page)


def last_answer(page, side="left"):
    return page.locator(f"#{side} .bot.message").last.inner_text().strip("\u200b\n ")


def make_greedy(page):
    page.click("#settings button")
    numbers = page.locator("#settings input[type=number]")
    for index, value in ((0, "24"), (2, "0")):
        numbers.nth(index).fill(value)
        numbers.nth(index).press("Tab")


def choose_mode(page, mode):
    page.check(f"#mode input[value={mode}]")


def screenshot(page, name):
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


@pytest.mark.slow
def test_tokens_arrive_before_the_answer_ends_and_stop_ends_it(visit, server):
    server.endless, server.delay = True, 0.05
    page = visit()
    send(page, QUERIES[0])
    expect(page.locator("#left .bot.message")).to_contain_text(re.compile(".{4}", re.DOTALL))
    first = last_answer(page)
    expect(page.locator("#left .bot.message")).to_contain_text(re.compile(f".{{{len(first) + 4}}}", re.DOTALL))
    assert page.is_enabled("#stop") and page.is_disabled("#submit") and page.is_disabled("#mode input[value=base]")
    page.click("#stop")
    expect(page.locator("#stop")).to_be_disabled()
    stopped = last_answer(page)
    assert len(stopped) > len(first)
    assert re.search(
        r"tiny · checkpoint-30 \(prefix of 6\) · float32 · cpu · \d+ tokens, [\d.]+ tokens/s · stopped",
        page.inner_text("#status"),
    )
    assert server.load() == (0, 0)
    time.sleep(0.3)
    assert last_answer(page) == stopped
    page.click("#clear")
    expect(page.locator("#left .message")).to_have_count(0)


@pytest.mark.slow
def test_enter_sends_and_shift_enter_starts_a_new_line(visit, server):
    page = visit()
    box = page.locator("#message textarea")
    box.press_sequentially("类型#裙")
    box.press("Shift+Enter")
    box.press_sequentially("颜色#白")
    assert box.input_value() == "类型#裙\n颜色#白" and page.locator("#left .message").count() == 0
    box.press("Enter")
    expect(page.locator("#left .bot.message")).to_have_count(1)
    assert page.locator("#left .user.message").inner_text().split() == ["类型#裙", "颜色#白"]
    assert box.input_value() == ""


@pytest.mark.slow
def test_the_prefix_can_be_switched_off_and_on_and_another_checkpoint_chosen(visit, server):
    page = visit()
    make_greedy(page)
    answers = {}
    for mode in ("tuned", "base", "tuned"):
        page.click("#clear")
        expect(page.locator("#left .message")).to_have_count(0)
        choose_mode(page, mode)
        answers.setdefault(mode, []).append(ask(page, QUERIES[0]))
    assert answers["tuned"][0] == answers["tuned"][1] != answers["base"][0]
    assert answers["tuned"][0] == finish(server, QUERIES[0]).text
    assert answers["base"][0] == finish(server, QUERIES[0], model=BASE).text
    page.click("#clear")
    page.click("#checkpoint input")
    page.get_by_role("option", name="checkpoint-10").click()
    expect(page.locator("#status")).to_contain_text("checkpoint-10")
    assert ask(page, QUERIES[0]) == finish(server, QUERIES[0], model="checkpoint-10").text != answers["tuned"][0]


@pytest.mark.slow
def test_tuned_and_base_answer_side_by_side_from_the_same_history(visit, server):
    page = visit()
    make_greedy(page)
    first = ask(page, QUERIES[2])
    choose_mode(page, "both")
    page.wait_for_selector("#right .bot.message")
    assert last_answer(page, "right") == first
    tuned = ask(page, QUERIES[0])
    history = [(QUERIES[2], first)]
    assert tuned == finish(server, QUERIES[0], history).text
    assert last_answer(page, "right") == finish(server, QUERIES[0], history, model=BASE).text != tuned
    assert "checkpoint-30" in page.inner_text("#status") and "no prefix" in page.inner_text("#status")
    screenshot(page, "side-by-side")
    choose_mode(page, "tuned")
    page.wait_for_selector("#right", state="hidden")


@pytest.mark.slow
def test_retry_asks_again_and_undo_returns_the_question(visit):
    page = visit()
    make_greedy(page)
    first = ask(page, QUERIES[0])
    ask(page, QUERIES[1])
    page.click("#undo")
    expect(page.locator("#left .bot.message")).to_have_count(1)
    assert page.input_value("#message textarea") == QUERIES[1]
    page.click("#retry")
    expect(page.locator("#status")).to_contain_text("tokens/s")
    expect(page.locator("#stop")).to_be_disabled()
    assert page.locator("#left .bot.message").count() == 1 and last_answer(page) == first


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["user", "model"])
def test_hostile_text_is_shown_and_never_run(visit, server, writer):
    server.script = HOSTILE if writer == "model" else "好"
    page = visit()
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    ask(page, HOSTILE if writer == "user" else "你好")
    bubble = page.locator("#left .message.bot" if writer == "model" else "#left .message.user").last
    shown = bubble.inner_text()
    for piece in ("<img src=x onerror=", "<script>document.title='pwned'</script>", "<b>bold</b>", "![image](http"):
        assert piece in shown
    for piece in ("<iframe src", "&lt;i&gt;", "<custom>x</custom>", "<u>in code</u>", "<s>after</s>"):
        assert piece in shown
    for tag in ("img", "script", "iframe", "b", "i", "u", "s", "custom", "[href^=javascript]", "[onerror]"):
        assert bubble.locator(tag).count() == 0, tag
    for link in bubble.locator("a").all():
        link.click()
    assert page.title() == "ChatGLM2 P-Tuning"
    assert not [address for address in requested if "127.0.0.1" not in address]
    screenshot(page, f"hostile-{writer}")


@pytest.mark.slow
def test_markdown_code_and_formulas_of_an_answer_are_rendered(visit, server):
    server.script = "**粗体** 和 `vector<int>`\n\n$$a<b$$\n\n```html\n<b>代码</b>\n```\n\n- 一\n- 二\n\n\\(x_1*y_2\\)"
    page = visit()
    ask(page, "你好")
    bubble = page.locator("#left .message.bot")
    assert bubble.locator("strong").inner_text() == "粗体"
    assert bubble.locator("p code").inner_text() == "vector<int>"
    assert bubble.locator("pre code").inner_text().strip() == "<b>代码</b>"
    assert bubble.locator(".katex").count() == 2 and bubble.locator("li").count() == 2
    assert bubble.locator("annotation").all_text_contents() == ["a<b", "x_1*y_2"]
    screenshot(page, "markdown")


@pytest.mark.slow
def test_a_reload_or_a_closed_page_frees_its_place(visit, server):
    server.endless, server.delay = True, 0.05
    page = visit()
    send(page, QUERIES[0])
    expect(page.locator("#left .bot.message")).to_contain_text(re.compile(".{4}", re.DOTALL))
    page.reload()
    page.wait_for_selector("#message textarea")
    wait_for(lambda: server.load() == (0, 0))
    assert page.locator("#left .bot.message").count() == 0
    send(page, QUERIES[0])
    expect(page.locator("#left .bot.message")).to_contain_text(re.compile(".{4}", re.DOTALL))
    page.close()
    wait_for(lambda: server.load() == (0, 0))


@pytest.mark.slow
def test_two_visitors_at_once_see_their_own_conversation_only(visit, server):
    server.delay = 0.02
    pages = [visit(), visit()]
    for number, page in enumerate(pages):
        make_greedy(page)
        send(page, f"编号{number}号*{QUERIES[number]}")
    for number, page in enumerate(pages):
        expect(page.locator("#status")).to_contain_text("ended")
        text = page.inner_text("#left")
        assert f"编号{number}号" in text and f"编号{1 - number}号" not in text
        assert last_answer(page) == finish(server, f"编号{number}号*{QUERIES[number]}").text


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale, scheme", [("zh-CN", "light"), ("zh-TW", "dark"), ("en-US", "light"), ("en-US", "dark")]
)
def test_the_page_speaks_the_browsers_language_and_is_readable_in_both_themes(visit, locale, scheme):
    page = visit(locale, scheme)
    ask(page, web_demo.EXAMPLES[1])
    screenshot(page, f"page-{locale}-{scheme}")
    words = web_demo.TEXTS["zh-CN" if locale.startswith("zh") else "en"]
    text = page.inner_text("body")
    for key in ("title", "mode", "tuned", "checkpoint", "message", "submit", "stop", "retry", "clear", "settings"):
        assert words[key] in text
    assert re.search("自然结束|达到最大长度" if locale.startswith("zh") else "ended", page.inner_text("#status"))
    for element in ("#left .bot.message p", "#left .user.message p", "#status", "#message textarea"):
        assert contrast(page, element) >= 4.5, element


def contrast(page, selector):
    """Contrast ratio of an element's text with what lies behind it (WCAG 2: 4.5 is readable)."""
    colors = page.locator(selector).first.evaluate(
        """element => {
            const numbers = color => color.match(/[\\d.]+/g).map(Number);
            let behind = element, background = [0, 0, 0, 0];
            while (behind && (background[3] ?? 1) < 0.9) {
                background = numbers(getComputedStyle(behind).backgroundColor);
                behind = behind.parentElement;
            }
            return [numbers(getComputedStyle(element).color), background];
        }"""
    )

    def luminance(rgb):
        parts = [value / 255 / 12.92 if value <= 10.3 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted(map(luminance, colors), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# ---- without a browser


def ask_over_http(url, session, prompt, mode="tuned", checkpoint="checkpoint-30", max_length=24):
    """Send a message as the page does; the messages that the page is sent back."""
    handlers = json.loads(request(url, "GET", "/config")[1])["dependencies"]
    respond = next(handler["id"] for handler in handlers if handler["api_name"] == "respond")
    data = [prompt, None, mode, checkpoint, max_length, 0.8, 0]
    body = json.dumps({"data": data, "fn_index": respond, "session_hash": session}).encode()
    headers = {"content-type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/gradio_api/queue/join", body, headers), timeout=60).read()
    messages = []
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                messages.append(json.loads(line.removeprefix(b"data:")))
                if messages[-1]["msg"] in ("process_completed", "unexpected_error"):
                    return messages
    raise AssertionError("the stream ended without an answer")


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
        assert answer["content"][0]["text"] == web_demo.as_markdown(alone[number])


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
        assert shown == web_demo.as_markdown(finish(server, QUERIES[0]).text)
    finally:
        blocks.close(verbose=False)
        server.close()


def request(url, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", f"/gradio_api/file={ROOT}/requirements.txt"),
        ("GET", "/gradio_api/proxy=http://192.0.2.1/"),
        ("POST", "/gradio_api/call/respond"),
        ("POST", "/gradio_api/run/respond"),
        ("GET", "/gradio_api/info"),
        ("GET", "/monitoring"),
    ],
)
def test_files_uploads_and_calls_by_name_are_not_there(url, method, path):
    assert request(url, method, path)[0] == 404


def test_a_body_over_one_mebibyte_is_refused_and_the_page_lives_on(url):
    status, _ = request(url, "POST", "/gradio_api/queue/join", b"x" * (2**20 + 1))
    assert status == 413
    assert request(url, "GET", "/")[0] == 200


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
    assert web_demo.as_markdown(text) == shown


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
    shown = web_demo.as_markdown(text)
    assert time.monotonic() - started < 15  # where it is quadratic: many minutes
    assert len(shown) < 12 * len(text) + 100


def test_emphasis_is_left_out_where_finding_its_end_would_take_the_page_too_long():
    assert web_demo.as_markdown("*a _b " * 100) == "*a _b " * 100
    assert web_demo.as_markdown("*a [b " * 5000) == "&#42;a &#91;b " * 5000
    paragraphs = "**a** _b_ [c](d) " * 20 + "\n\n"
    assert web_demo.as_markdown(paragraphs * 50) == paragraphs * 50  # of a usual length, however many
    items = "1. **a**: b\n2. **c**: d\n" * 400
    assert web_demo.as_markdown(items) == items
    looked_at = sum(len(block) * block.count("*") for block in web_demo.as_markdown("*a\n" * 1900).split("\n\n"))
    assert looked_at <= 2_000_000


def test_nesting_is_bounded_and_what_is_deeper_is_shown_as_written():
    assert web_demo.as_markdown("> " * 16 + "*a*") == "> " * 16 + "*a*"
    assert web_demo.as_markdown("> " * 17 + "*a*") == "> " * 16 + "&#62; &#42;a&#42;"
    assert web_demo.as_markdown("- > 1. " * 2000).count("&#62;") > 1990
    assert web_demo.as_markdown(" " * 42 + "- a") == " " * 40 + "\u00a0\u00a0- a"


def test_a_table_is_left_out_where_its_rows_times_its_columns_are_too_many():
    table = "|a|b|\n|-|-|\n" + "|c|d|\n" * 100
    assert web_demo.as_markdown(table) == table
    wide = "|a" * 500 + "\n" + "|-" * 500 + "\n" + "|\n" * 1000
    assert "|" not in web_demo.as_markdown(wide)


def test_formulas_and_coloured_code_are_bounded():
    assert web_demo.as_markdown("\\(a_1*b\\)") == "\\(a&#95;1&#42;b\\)"  # decoded before it becomes a formula
    long = web_demo.as_markdown("$$" + "x" * 6000 + "$$ $$y$$")
    assert long.startswith("<code>&#36;&#36;xx") and long.count("$$") == 0
    block = "```python\n" + "a = 1 " * 1000 + "\n```\n"
    assert web_demo.as_markdown(block * 2) == block + block.replace("python", "text")


@pytest.mark.parametrize("before", ["", "```python\n", "~~~~\n"])
def test_what_follows_very_many_lines_is_shown_as_plain_text(before):
    shown = web_demo.as_markdown(before + "a\n" * 5000 + "*b*\n~~~\n<i>")
    assert shown.endswith("\n*b*\n~~~\n<i>\n~~~~")
    assert shown.count("a\n") == 5000
    fence = before.strip("\n").removesuffix("python")
    assert f"a\n{fence}\n\n~~~~\n\na" in shown  # a block that is open is closed first


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["> " * 2000 + "a", "*a _b " * 5000, "[" * 8000, "~a " * 10_000, "\\" * 30_000, "a\n" * 15_000,
     "$$" + "*a _b " * 5000 + "$$", "```html\n" + "<a " * 8000, "|a" * 500 + "\n" + "|-" * 500 + "\n" + "|\n" * 2000],
    ids=["quotations", "emphasis", "brackets", "strikes", "backslashes", "lines", "formula", "code", "table"],
)  # fmt: skip
def test_the_page_answers_its_reader_whatever_the_model_writes(visit, server, text):
    server.script = text
    page = visit()
    page.evaluate(
        """() => { window.longest = 0; let last = performance.now(); setInterval(() => {
            const now = performance.now(); window.longest = Math.max(window.longest, now - last); last = now; }, 10) }"""
    )
    ask(page, "你好")
    page.wait_for_timeout(500)
    assert page.evaluate("window.longest") < 8000  # milliseconds in which no click was looked at; most take 50


def test_a_question_is_shown_to_the_letter():
    assert web_demo.literally("a*b\n  <c>") == "a&#42;b\n\u00a0\u00a0&#60;c&#62;"


def test_both_languages_have_the_same_texts():
    english, chinese = web_demo.TEXTS["en"], web_demo.TEXTS["zh-CN"]
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
        assert blocks.server.config.http_protocol_class is Protocol
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
    assert "error: --ptuning_checkpoint output/no-such-run: there is no" in output and "Traceback" not in output


def test_the_script_looks_where_train_sh_wrote():
    rule = r"CHECKPOINT:-(.+)}"
    names = [re.search(rule, (ROOT / script).read_text())[1] for script in ("train.sh", "web_demo.sh")]
    assert names[0] == names[1]


@pytest.mark.parametrize("auth", ["admin", "admin:", ":secret"])
def test_a_password_without_a_user_or_the_reverse_is_refused(auth):
    with pytest.raises(ValueError, match="user:password"):
        web_demo.parse_arguments(["--auth", auth])


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
