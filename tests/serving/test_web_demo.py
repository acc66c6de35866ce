"""The page in a real browser: streaming, stopping, switching prefixes, hostile text, several visitors."""

import contextlib
import re
import time

import pytest
from support.browser import (  # noqa: F401, fixtures
    answer_begins,
    ask,
    browser,
    choose_mode,
    contrast,
    last_answer,
    make_greedy,
    open_drawer,
    screenshot,
    send,
    visit,
)
from support.chat_server import QUERIES, finish
from support.over_http import wait_for
from support.page import server, url  # noqa: F401, fixtures

from serving.page_examples import EXAMPLES
from serving.page_words import TEXTS
from serving.server import BASE

with contextlib.suppress(ImportError):  # the fixture `browser` says so
    from playwright.sync_api import expect

HOSTILE = (
    "<img src=x onerror=\"document.title='pwned'\"> <script>document.title='pwned'</script> <b>bold</b>\n\n"
    "[link](javascript:document.title='pwned') ![image](http://192.0.2.1/x.png) <iframe src=http://192.0.2.1></iframe>\n"
    "$$\\href{javascript:document.title='pwned'}{x}$$ &lt;i&gt; <custom>x</custom>\n\n"
    '- item\n```\n<u>in code</u>\n```\n[a]: x "\n```\n"\n<s>after</s>'
)


@pytest.mark.slow
def test_tokens_arrive_before_the_answer_ends_and_stop_ends_it(visit, server):
    server.endless, server.delay = True, 0.05
    page = visit()
    send(page, QUERIES[0])
    answer_begins(page)
    first = last_answer(page)
    expect(page.locator("#left .bot.message")).to_contain_text(re.compile(f".{{{len(first) + 4}}}", re.DOTALL))
    assert page.is_visible("#stop") and page.is_hidden("#submit") and page.is_disabled("#mode input[value=base]")
    page.click("#stop")
    expect(page.locator("#stop")).to_be_hidden()
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
        if answers:  # else nothing shows when it is done, and it may empty the box late
            page.click("#clear")
            expect(page.locator("#left .message")).to_have_count(0)
        choose_mode(page, mode)
        answers.setdefault(mode, []).append(ask(page, QUERIES[0]))
    assert answers["tuned"][0] == answers["tuned"][1] != answers["base"][0]
    assert answers["tuned"][0] == finish(server, QUERIES[0]).text
    assert answers["base"][0] == finish(server, QUERIES[0], model=BASE).text
    page.click("#clear")
    open_drawer(page)
    page.click("#checkpoint input")
    page.get_by_role("option", name="checkpoint-10").click()
    expect(page.locator("#status")).to_contain_text("checkpoint-10")
    open_drawer(page)
    assert ask(page, QUERIES[0]) == finish(server, QUERIES[0], model="checkpoint-10").text != answers["tuned"][0]


@pytest.mark.slow
def test_the_base_model_answers_the_turns_it_joins_for_itself(visit, server):
    page = visit()
    make_greedy(page)
    first = ask(page, QUERIES[2])
    own = finish(server, QUERIES[2], model=BASE).text
    assert own != first
    choose_mode(page, "both")
    expect(page.locator("#right .bot.message")).to_have_text(own)
    expect(page.locator("#submit")).to_be_visible()
    tuned = ask(page, QUERIES[0])
    assert tuned == finish(server, QUERIES[0], [(QUERIES[2], first)]).text
    assert last_answer(page, "right") == finish(server, QUERIES[0], [(QUERIES[2], own)], model=BASE).text
    assert "checkpoint-30" in page.inner_text("#status") and "no prefix" in page.inner_text("#status")
    screenshot(page, "side-by-side")
    choose_mode(page, "base")
    page.wait_for_selector("#right", state="hidden")
    expect(page.locator("#left .bot.message").first).to_have_text(own)
    choose_mode(page, "tuned")
    expect(page.locator("#left .bot.message").first).to_have_text(first)


@pytest.mark.slow
def test_retry_asks_again_and_undo_returns_the_question(visit):
    page = visit()
    make_greedy(page)
    first = ask(page, QUERIES[0])
    ask(page, QUERIES[1])
    page.click("#left button[aria-label=Undo]")
    expect(page.locator("#left .bot.message")).to_have_count(1)
    assert page.input_value("#message textarea") == QUERIES[1]
    page.click("#left button[aria-label=Retry]")
    expect(page.locator("#status")).to_contain_text("tokens/s")
    expect(page.locator("#stop")).to_be_hidden()
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
    answer_begins(page)
    page.reload()
    page.wait_for_selector("#message textarea")
    wait_for(lambda: server.load() == (0, 0))
    assert page.locator("#left .bot.message").count() == 0
    expect(page.locator("#message textarea")).to_have_value(QUERIES[0])  # asked, but not answered to the end
    send(page, QUERIES[0])
    answer_begins(page)
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
@pytest.mark.parametrize("locale, scheme", [("zh-TW", "dark"), ("en-US", "light")])
def test_the_page_speaks_the_browsers_language_and_is_readable_in_both_themes(visit, locale, scheme):
    page = visit(locale, scheme)
    ask(page, EXAMPLES[1])
    screenshot(page, f"page-{locale}-{scheme}")
    words = TEXTS["zh-CN" if locale.startswith("zh") else "en"]
    text = page.inner_text("body")
    for key in ("title", "tuned", "both", "checkpoint", "submit", "clear", "theme", "export"):
        assert words[key] in text
    assert page.locator(".sidebar .toggle-button").get_attribute("aria-label") == words["settings"]
    assert re.search("自然结束|达到最大长度" if locale.startswith("zh") else "ended", page.inner_text("#status"))
    for element in ("#left .bot.message p", "#left .user.message p", "#status", "#message textarea"):
        assert contrast(page, element) >= 4.5, element


# ---- without a browser


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
