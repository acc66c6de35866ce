"""The page where each question decides who answers, in a real browser."""

import pytest
from support.browser import (  # noqa: F401, fixtures
    ask,
    browser,
    choose_mode,
    faults,
    finished,
    last_answer,
    make_greedy,
    screenshot,
    visit,
)
from support.chat_server import QUERIES, SlowServer, finish, make_run, open_server, sign
from support.page import url  # noqa: F401, fixture

from serving.server import BASE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), (6,))
    sign(run / "checkpoint-10")
    server = open_server("--ptuning_checkpoint", run, server_class=SlowServer)
    yield server
    server.close()


def test_a_click_asks_the_other_one_and_the_phone_has_room_for_it(visit, server):
    page = visit(size=(360, 740))
    make_greedy(page)
    choose_mode(page, "auto")
    other = page.locator("#other")
    assert ask(page, QUERIES[2]) == finish(server, QUERIES[2], model=BASE).text
    assert "base model, no prefix" in page.inner_text("#status") and "% sure" in page.inner_text("#status")
    other.wait_for(state="visible")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for phone in (page, visit("zh-CN", size=(360, 740))):
        places = phone.locator("#mode label").evaluate_all("labels => labels.map(each => each.getBoundingClientRect())")
        assert len(places) == 4 and all(place["left"] >= 0 and place["right"] <= 360 for place in places)
        screenshot(phone, "auto")
    other.click()
    expected = finish(server, QUERIES[2], model="checkpoint-10").text
    page.wait_for_function(
        "text => document.querySelector('#left .bot.message')?.innerText.includes(text)", arg=expected[:8]
    )
    finished(page)
    assert last_answer(page) == expected and page.locator("#left .bot.message").count() == 1
    choose_mode(page, "base")
    other.wait_for(state="hidden")
