"""A Chromium that visits the page."""

import contextlib
import re
import shutil

import pytest
from conftest import ROOT

from support.over_http import wait_for

with contextlib.suppress(ImportError):  # the fixture `browser` says so
    from playwright.sync_api import expect, sync_playwright  # isort: skip
    from axe_playwright_python.sync_playwright import Axe

ARTIFACTS = ROOT / "tests" / "artifacts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


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

    def open_page(locale="en-US", color_scheme="light", size=(1280, 800), address=None, **more):
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(locale=locale, color_scheme=color_scheme, viewport=viewport, **more)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.goto(address or url)
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
    finished(page)
    return last_answer(page)


def answer_begins(page):
    """Wait for the answer's own first words; those shown while it waits are fewer than four Chinese characters."""
    expect(page.locator("#left .bot.message").last).to_contain_text(re.compile("[\u4e00-\u9fff]{4}"))


def finished(page):
    """Wait until the answers have ended and are shown."""
    answers = page.locator("#left .bot.message")
    expect(page.locator("#status")).to_contain_text(re.compile("ended|自然结束|达到最大"))
    expect(page.locator("#submit")).to_be_visible()
    # Markdown is rendered a moment later.
    expect(answers.last).to_contain_text(re.compile(r"[^\s\u200b]"))


def last_answer(page, side="left"):
    return page.locator(f"#{side} .bot.message").last.inner_text().strip("\u200b\n ")


def make_greedy(page):
    open_drawer(page)
    numbers = page.locator("#settings input[type=number]")
    for index, value in ((0, "24"), (2, "0")):
        numbers.nth(index).fill(value)
        numbers.nth(index).press("Tab")
    open_drawer(page)  # and close it again


def open_drawer(page):
    page.click(".sidebar .toggle-button")


def choose_mode(page, mode):
    page.check(f"#mode input[value={mode}]")


def screenshot(page, name):
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def faults(page):
    """What axe-core finds once nothing fades in or out any more: [(how grave, rule, the first element)]."""
    page.wait_for_function(
        "!document.getAnimations().some(each => each.playState === 'running' && each.effect.getComputedTiming().endTime < 1000)"
    )
    found = Axe().run(page).response["violations"]
    return [(each["impact"], each["id"], each["nodes"][0]["html"]) for each in found]


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
