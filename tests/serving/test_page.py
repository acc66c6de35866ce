"""The page's comforts in a real browser: keys, copies, reloads, layout, errors, accessibility, a path behind a proxy."""

import contextlib
import json

import pytest
from support.browser import (  # noqa: F401, fixtures
    answer_begins,
    ask,
    browser,
    choose_mode,
    faults,
    finished,
    last_answer,
    make_greedy,
    open_drawer,
    screenshot,
    send,
    visit,
)
from support.chat_server import QUERIES, finish
from support.over_http import free_port, proxy, serve
from support.page import request, server, url  # noqa: F401, fixtures

import web_demo
from api_demo import create_app
from data.examples import COLUMNS as DATA_COLUMNS
from data.examples import look_at_file
from serving.page_kept import FeedbackFile
from serving.page_words import TEXTS

with contextlib.suppress(ImportError):  # the fixture `browser` says so
    from playwright.sync_api import expect

pytestmark = pytest.mark.slow
ENGLISH, CHINESE = TEXTS["en"], TEXTS["zh-CN"]
MARKED = "# *a* `b` <i>\n  c"
CLIPBOARD = ["clipboard-read", "clipboard-write"]


@contextlib.contextmanager
def opened(server, **how):
    """The page of a server once more, with other settings; yields its gr.Blocks."""
    blocks = web_demo.launch(server, **{"server_port": free_port(), "block": False, **how})
    try:
        yield blocks
    finally:
        blocks.close(verbose=False)


def box(page):
    return page.locator("#message textarea")


# ---- comforts


def test_an_edited_message_is_asked_anew_and_what_followed_is_gone(visit, server):
    page = visit()
    make_greedy(page)
    ask(page, QUERIES[0])
    ask(page, QUERIES[2])
    page.locator("#left button[aria-label=Edit]").first.click()
    field = page.locator(".edit-textarea")
    expect(field).to_have_value(QUERIES[0])
    field.fill(QUERIES[1])
    page.click("#left button[aria-label=Submit]")
    expect(page.locator("#left .bot.message")).to_have_count(1)
    finished(page)
    assert last_answer(page) == finish(server, QUERIES[1]).text


def test_a_copy_is_the_text_as_it_was_written(visit, server):
    server.script = MARKED
    page = visit(permissions=CLIPBOARD)
    ask(page, "类型#裙*颜色#白*  1_2_")
    for role, text in (("bot", MARKED), ("user", "类型#裙*颜色#白*  1_2_")):
        page.click(f"#left .message-row.{role}-row + .message-buttons button >> nth=0")
        page.wait_for_function("text => navigator.clipboard.readText().then(found => found === text)", arg=text)


def test_keys_stop_and_recall_and_the_focus_returns(visit, server):
    page = visit()
    for query in QUERIES[:2]:
        ask(page, query)
    expect(box(page)).to_be_focused()
    for key, text in (("ArrowUp", QUERIES[1]), ("ArrowUp", QUERIES[0]), ("ArrowUp", QUERIES[0])):
        box(page).press(key)
        assert box(page).input_value() == text
    server.endless, server.delay = True, 0.05
    box(page).press("Enter")
    page.wait_for_selector("#stop")
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text(ENGLISH["end_cancelled"])
    expect(box(page)).to_be_focused()


def test_conversation_mode_and_theme_survive_a_reload(visit, server):
    page = visit()
    choose_mode(page, "both")
    page.wait_for_selector("#right")
    first = ask(page, MARKED)
    beside = last_answer(page, "right")
    page.click("#theme")
    box(page).fill(QUERIES[0])
    page.reload()
    expect(box(page)).to_have_value(QUERIES[0])
    expect(page.locator("#left .bot.message")).to_have_text(first)
    expect(page.locator("#right .bot.message")).to_have_text(beside)
    expect(page.locator("body.dark")).to_have_count(1)
    assert page.is_checked("#mode input[value=both]")
    page.click("#clear")
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    page.wait_for_selector("#left .example")
    assert page.locator(".message").count() == 0


def test_a_saved_conversation_is_a_row_that_trains(visit, tmp_path):
    page = visit()
    said = [(query, ask(page, query)) for query in QUERIES[:2]]
    open_drawer(page)
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    columns = {**dict.fromkeys(DATA_COLUMNS), "messages": "messages", "query": "query"}
    assert look_at_file(file, columns, keep_unlabelled=False) == 1
    turns = [turn["content"] for turn in json.loads(file.read_text("utf-8"))["messages"]]
    assert turns == [text for turn in said for text in turn]


def test_thumbs_write_what_is_preferred_over_what(visit, server, tmp_path):
    file = tmp_path / "preferences.jsonl"
    with opened(server, feedback=FeedbackFile(file)) as blocks:
        page = visit(address=blocks.local_url)
        first = ask(page, QUERIES[0])
        page.click("#left button[aria-label=Like]")
        expect(page.locator("#status")).to_have_text(ENGLISH["nothing_to_compare"])
        server.script = "好"
        page.click("#left button[aria-label=Retry]")
        expect(page.locator("#left .bot.message")).to_have_text("好")
        expect(page.locator("#submit")).to_be_visible()
        page.click("#left button[aria-label=Dislike]")
        expect(page.locator("#status")).to_have_text(ENGLISH["saved"])
        server.script = "坏"
        choose_mode(page, "both")
        expect(page.locator("#right .bot.message")).to_have_text("坏")
        expect(page.locator("#submit")).to_be_visible()
        page.click("#right button[aria-label=Dislike]")
        assert faults(page) == []
        expect(page.locator("#status")).to_have_text(ENGLISH["saved"])
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    asked = {"prompt": QUERIES[0], "history": []}
    assert rows == [{**asked, "chosen": first, "rejected": "好"}, {**asked, "chosen": "好", "rejected": "坏"}]


def test_a_question_that_waits_says_how_many_are_before_it(visit, server):
    server.endless, server.delay = True, 0.05
    others = [server.submit([5], client=f"client {number}") for number in range(10)]
    try:
        page = visit()
        send(page, QUERIES[0])
        expect(page.locator("#left .bot.message")).to_contain_text(ENGLISH["ahead"].format(ahead=2))
        screenshot(page, "waiting")
    finally:
        for answer in others:
            answer.cancel()


# ---- errors


def test_an_error_is_red_announced_and_in_the_readers_language(visit, server):
    page = visit("zh-CN")
    text = "啊" * 3 * server.model.config.seq_length
    send(page, text)
    alert = page.locator("#status [role=alert]")
    expect(alert).to_have_text(CHINESE["too_long"].format(limit=f"{server.model.config.seq_length:,}"))
    assert alert.evaluate("element => getComputedStyle(element).color") == "rgb(185, 28, 28)"
    assert box(page).input_value() == text


def test_what_the_server_does_not_take_stays_in_the_box(visit):
    page = visit()
    send(page, "a" * 2**20)
    expect(page.locator("#status [role=alert]")).to_have_text(ENGLISH["refused"])
    assert len(box(page).input_value()) == 2**20 and page.is_visible("#left .example >> nth=0")


def test_a_server_that_went_keeps_the_conversation_and_is_taken_up_again(visit, url, server):
    behind = int(url.rpartition(":")[2])
    with proxy(behind, "") as (port, _):
        page = visit("zh-CN", address=f"http://127.0.0.1:{port}")
        first = ask(page, QUERIES[0])
        server.endless, server.delay = True, 0.05
        send(page, QUERIES[1])
        expect(page.locator("#left .bot.message")).to_have_count(2)
    expect(page.locator(".toast-body.error[role=alert]")).to_contain_text(CHINESE["lost"])
    expect(page.locator("#left .bot.message").first).to_have_text(first)
    assert faults(page) == []
    screenshot(page, "server-gone")
    with proxy(behind, "", port):
        expect(page.locator(".toast-body.error")).to_have_count(0)
        expect(page.locator("#left .bot.message")).to_have_text(first)
        expect(box(page)).to_have_value(QUERIES[1])


def test_a_fault_of_ours_is_said_and_gives_the_buttons_back(visit, server, monkeypatch):
    page = visit()
    with monkeypatch.context() as broken:
        broken.setattr(server, "submit", lambda *_, **__: 1 / 0)
        send(page, QUERIES[0])
        expect(page.locator("#status [role=alert]")).to_contain_text("ZeroDivisionError")
        expect(page.locator("#submit")).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden()
        expect(box(page)).to_have_value(QUERIES[0])
    page.locator("#submit").click()
    finished(page)


# ---- what it looks like


VISITORS = [
    ("en-US", "light", (1280, 800)),
    ("zh-CN", "dark", (1280, 800)),
    ("zh-CN", "light", (390, 844)),
    ("en-US", "dark", (360, 740)),
]


@pytest.mark.parametrize(
    "locale, scheme, size", VISITORS, ids=lambda value: value[0] if isinstance(value, tuple) else value
)
def test_every_state_fits_its_window_and_keeps_nobody_out(visit, server, locale, scheme, size):
    page = visit(locale, scheme, size)
    words = CHINESE if locale == "zh-CN" else ENGLISH

    def look(state):
        screenshot(page, f"{state}-{locale}-{scheme}-{size[0]}")
        assert faults(page) == [], state
        assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [*size]
        for part in ("#title", "#message textarea"):
            found = page.locator(part).bounding_box()
            assert found["y"] >= 0 and found["y"] + found["height"] <= size[1], (state, part)
        assert page.locator("h1").inner_text() == words["title"]

    look("empty")
    server.endless, server.delay = True, 0.05
    example = page.locator("#left .example").first
    text = example.inner_text()
    example.click()
    expect(page.locator("#left .user.message")).to_contain_text(text)
    answer_begins(page)
    look("answering")
    page.click("#stop")
    expect(page.locator("#submit")).to_be_visible()
    server.endless, server.delay = False, 0.0
    ask(page, QUERIES[1])
    choose_mode(page, "both")
    expect(page.locator("#right .bot.message")).to_have_count(2)
    expect(page.locator("#submit")).to_be_visible()
    look("both")
    label, first = (page.locator(f"#left {part}").first.bounding_box() for part in (".wrapper > label", ".bubble-wrap"))
    assert label["y"] + label["height"] <= first["y"] + 1  # it covers no line of the first message
    page.locator("#left .user-row + .message-buttons button >> nth=1").click()
    page.wait_for_selector(".edit-textarea")
    look("editing")
    send(page, "啊" * 3 * server.model.config.seq_length)
    page.wait_for_selector("#status [role=alert]")
    look("error")
    box(page).fill("")
    open_drawer(page)
    page.wait_for_function("drawer => drawer.getBoundingClientRect().x === 0", arg=page.query_selector(".sidebar"))
    look("settings")
    assert page.evaluate(  # nothing lies on the drawer
        """drawer => [...document.querySelectorAll("#chats button")].every((button) => {
            const { x, y, width, height } = button.getBoundingClientRect();
            const top = document.elementFromPoint(x + width / 2, y + height / 2);
            return !top || x + width / 2 > drawer.getBoundingClientRect().right || drawer.contains(top);
        })""",
        page.query_selector(".sidebar"),
    )
    if size[0] > 768:  # it stands beside the conversation, and on a phone before it
        drawer, chat = (page.locator(part).bounding_box() for part in (".sidebar", "#page"))
        assert drawer["x"] + drawer["width"] <= chat["x"]


# ---- elsewhere


def test_the_page_works_under_a_path_of_a_proxy(visit, server, monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/demo")
    with opened(server) as blocks, proxy(blocks.server_port, "/demo") as (port, asked):
        page = visit(address=f"http://127.0.0.1:{port}/demo/")
        server.script = "好"
        assert ask(page, QUERIES[0]) == "好"
        assert len(asked) > 10 and {path for path in asked if not path.startswith("/demo/")} <= {"/favicon.ico"}
        for path in ("/gradio_api/upload", "/demo/gradio_api/upload", "/demo/gradio_api/file=/etc/passwd"):
            assert request(f"http://127.0.0.1:{blocks.server_port}", "POST", path)[0] == 404


def test_the_apis_documentation_is_read_without_internet(browser, server):
    port, end = serve(create_app(server))
    page = browser.new_page()
    try:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        assert "/docs" in page.goto(f"http://127.0.0.1:{port}/").text()
        page.goto(f"http://127.0.0.1:{port}/docs")
        assert page.locator("h2", has_text="POST /v1/chat/completions").count() == 1
        assert faults(page) == []
        screenshot(page, "api-docs")
        page.click("text=openapi.json")
        assert page.url.endswith("/openapi.json")
        assert [address for address in asked if f"//127.0.0.1:{port}/" not in address] == []
    finally:
        page.close()
        end()


def test_programs_ask_through_gradio_client(url, server):
    from gradio_client import Client

    server.script = "好"
    try:
        client = Client(url, verbose=False)
        assert client.predict(QUERIES[0], api_name="/chat") == "好"
        assert client.predict(QUERIES[0], [["你好", "好"]], api_name="/chat") == "好"
        with pytest.raises(Exception, match="a history such as"):
            client.predict(QUERIES[0], [["你好"]], api_name="/chat")
        assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/chat"]
    finally:
        server.script = None
