"""The training page in a real browser: a run from its rows to its export, closed, reloaded, killed and found again."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

import pytest
from support.browser import browser, screenshot  # noqa: F401, fixture
from support.over_http import wait_for
from support.training_page import other_rows, training_page  # noqa: F401, fixture

from board.starting import boot_id, started_at
from board.words import TEXTS

with contextlib.suppress(ImportError):  # the fixture `browser` says so
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect

ENGLISH = TEXTS["en"]
TABS = ("model", "data", "settings", "run", "evaluate", "chat", "export")


@pytest.fixture
def visit(browser, training_page):
    """Opens the page as a new visitor."""
    contexts = []

    def open_page(locale="en-US", color_scheme="light", size=(1280, 800), **more):
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(locale=locale, color_scheme=color_scheme, viewport=viewport, **more)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.goto(training_page.url)
        # The program's own answer to the fields: from now on every event has its handler.
        expect(page.locator("#command textarea")).to_have_value(re.compile("bash train.sh"))
        return page

    yield open_page
    for context in contexts:
        context.close()


def choose_tab(page, name):
    page.get_by_role("tab").nth(TABS.index(name)).click()
    expect(page.locator(f"#tab-{name}")).to_be_visible()


def fill(page, name, value):
    box = page.locator(f"#{name} textarea, #{name} input").first
    box.fill(value)
    box.press("Tab")


def step_shown(page):
    found = re.search(r"step (\d+) of", page.inner_text("#card"))
    return int(found[1]) if found else 0


def grave_faults(page):
    """What axe-core finds of the grave kinds: [(rule, the first element)]."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"][:300]) for each in found if each["impact"] in ("serious", "critical")]


@pytest.mark.slow
def test_a_run_is_chosen_started_watched_stopped_continued_evaluated_talked_to_and_exported(visit, training_page):
    rows = other_rows(training_page.project)
    page = visit()
    choose_tab(page, "data")
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(rows)
    expect(page.locator("#found")).to_contain_text("120 rows")
    expect(page.locator("#prompt input")).to_have_value("问题")  # guessed
    page.click("#button-use")
    expect(page.locator("#command textarea")).to_have_value(re.compile("PROMPT_COLUMN=问题 RESPONSE_COLUMN=回答"))
    choose_tab(page, "settings")
    page.click("#more button >> nth=0")
    for name, value in {"steps": "9000", "batch": "4", "prefix": "8", "save": "5000", "name": "mine"}.items():
        fill(page, name, value)
    fill(page, "extra", "logging_steps = 2\nmax_eval_samples = 4")
    expect(page.locator("#command textarea")).to_have_value(
        re.compile("CHECKPOINT=mine bash train.sh .*--logging_steps 2")
    )
    command = page.input_value("#command textarea")
    choose_tab(page, "run")
    page.click("#button-begin")
    expect(page.locator("#run-said")).to_contain_text("Started mine")
    assert training_page.record("mine")["command"] == command

    other = visit()  # a second browser, of somebody who has chosen nothing
    wait_for(lambda: step_shown(page) > 2 or "ailed" in page.inner_text("#card"))
    choose_tab(other, "run")
    expect(other.locator("#card")).to_contain_text("mine")
    expect(other.locator("#plot-loss svg")).to_be_visible()
    first = step_shown(page)
    page.reload()
    expect(page.locator("#strip")).to_contain_text("mine")  # on the first tab, too
    wait_for(lambda: step_shown(other) > first)
    other.close()
    browser_kept = page.context
    page.close()

    page = browser_kept.new_page()
    page.goto(training_page.url)
    expect(page.locator("#command textarea")).to_have_value(command)
    choose_tab(page, "run")
    page.click("#button-stop")
    expect(page.locator("#card")).to_contain_text(ENGLISH["state_stopped"])
    expect(page.locator("#card")).to_contain_text("is complete")
    stopped = step_shown(page)
    assert 0 < stopped < 9000
    choose_tab(page, "settings")
    fill(page, "steps", str(stopped + 20))
    choose_tab(page, "run")
    page.click("#button-begin")
    expect(page.locator("#run-said")).to_contain_text("is there already")
    page.check("#choice input[value=continue]")
    page.click("#button-begin")
    expect(page.locator("#run-said")).to_contain_text("Started mine")
    training_page.kill()
    assert started_at(training_page.record("mine")["pid"])
    training_page.restart()
    page = visit()
    choose_tab(page, "run")
    expect(page.locator("#card")).to_contain_text(ENGLISH["state_finished"])
    assert step_shown(page) == stopped + 20
    screenshot(page, "train-run")

    choose_tab(page, "evaluate")
    fill(page, "rows", "3")
    fill(page, "eval-data", str(rows))
    page.click("#button-evaluate")
    expect(page.locator("#evaluated table").nth(1)).to_contain_text("类型#")
    expect(page.locator("#evaluated")).to_contain_text("predict_bleu-4")
    screenshot(page, "train-evaluate")

    choose_tab(page, "export")
    page.click("#button-export")
    link = page.locator("#exported a", has_text="pytorch_model.bin")
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    assert download.value.path().stat().st_size > 1000

    choose_tab(page, "chat")
    page.click("#button-open_chat")
    chat = page.frame_locator("#chat iframe")
    chat.locator("#message textarea").fill("类型#裙")
    chat.locator("#submit").click()
    expect(chat.locator("#left .bot.message").last).to_contain_text(re.compile("[\u4e00-\u9fff]{4}"))
    screenshot(page, "train-chat")
    processes = chats_of(training_page)
    assert len(processes) == 1
    choose_tab(page, "model")  # left: its process ends, and so its memory is free
    wait_for(lambda: not started_at(processes[0]))


def chats_of(training_page):
    """The ids of the chats that the page's program has started."""
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(training_page.process.pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in children.stdout.splitlines() if "web_demo.py" in line]


@pytest.mark.slow
def test_a_run_that_is_killed_is_told_within_five_seconds(visit, training_page):
    folder = training_page.output / "victim"
    folder.mkdir()
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    entry = {"current_steps": 4, "total_steps": 10, "loss": 1.5, "phase": "training"}
    record = {
        "command": "bash train.sh",
        "pid": process.pid,
        "started_ticks": started_at(process.pid),
        "boot": boot_id(),
    }
    (folder / "web.json").write_text(json.dumps({**record, "time": time.time() - 60}))
    (folder / "trainer_log.jsonl").write_text(json.dumps(entry) + "\n")
    page = visit()
    choose_tab(page, "run")
    expect(page.locator("#strip")).to_contain_text("victim")
    os.killpg(process.pid, signal.SIGKILL)
    expect(page.locator("#card")).to_contain_text("Killed", timeout=5000)
    expect(page.locator("#card")).to_contain_text(ENGLISH["to_do"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locale", "scheme", "size"),
    [("en-US", "dark", (390, 844)), ("zh-CN", "light", (1280, 800))],
    ids=["phone", "desktop"],
)
def test_every_tab_is_readable_for_everybody(visit, training_page, locale, scheme, size):
    folder = training_page.output / f"seen-{size[0]}"
    folder.mkdir()
    steps = range(0, 100, 10)
    lines = [
        {"current_steps": s, "total_steps": 100, "loss": 3 - s / 50, "learning_rate": 0.02 - s / 5000} for s in steps
    ]
    lines.append({**lines[-1], "loss": None, "eval_loss": 1.4})
    lines.append(
        {**lines[-1], "phase": "end", "reason": "error: Training stopped at step 90: the loss is nan, <b>x</b>"}
    )
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"prompt": "<img src=x onerror=alert(1)>", "labels": "b" * 300, "predict": "c"}
    (folder / "generated_predictions.txt").write_text(json.dumps(row) + "\n")
    page = visit(locale, scheme, size)
    expect(page.locator("#strip, #card").first).to_be_attached()
    for name in TABS:
        choose_tab(page, name)
        if name == "data":
            page.click("#button-look")
            expect(page.locator("#found table")).to_be_visible()
            page.click("#button-use")
        if name == "run":
            expect(page.locator("#plot-loss svg")).to_be_visible()
            assert page.locator("#card b b").count() == 0
        if name == "evaluate":
            expect(page.locator("#evaluated table")).to_contain_text("onerror")
        screenshot(page, f"train-{size[0]}-{name}")
        assert grave_faults(page) == [], name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
