"""The training page in a real browser: a run from its rows to its export, closed, reloaded, killed and found again."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess

import pytest
from support.browser import browser, faults, screenshot  # noqa: F401, fixture
from support.over_http import call, wait_for
from support.training_page import other_rows, training_page  # noqa: F401, fixture

from board.commands import EMPTY, PRESETS
from board.starting import started_at
from board.words import TEXTS

with contextlib.suppress(ImportError):  # the fixture `browser` says so
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
    """What axe-core finds of the grave kinds."""
    return [fault for fault in faults(page) if fault[0] in ("serious", "critical")]


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


def start_run(page, name, **settings):
    """Start a run of the small model with these settings, as a visitor does."""
    choose_tab(page, "settings")
    if not page.locator("#extra").is_visible():
        page.click("#more button >> nth=0")
    numbers = {"steps": "9000", "batch": "4", "prefix": "8", "save": "5000"}
    for field, value in {**numbers, "name": name, **settings}.items():
        fill(page, field, value)
    expect(page.locator("#command textarea")).to_have_value(re.compile(f"CHECKPOINT={name} "))
    choose_tab(page, "run")
    page.click("#button-begin")
    expect(page.locator("#run-said")).to_contain_text(f"Started {name}")


QUICK = "logging_steps = 2\nmax_eval_samples = 4\ngeneral_file = none"


@pytest.mark.slow
def test_a_run_that_is_killed_is_told_within_five_seconds_and_why(visit, training_page):
    page = visit()
    start_run(page, "victim", extra=QUICK)
    wait_for(lambda: step_shown(page) > 2)
    first = training_page.record("victim")["pid"]
    os.killpg(first, signal.SIGKILL)  # nobody is left to say a word
    expect(page.locator("#card")).to_contain_text("Killed", timeout=5000)
    expect(page.locator("#card .advice")).to_contain_text("dmesg")
    page.click("#button-begin")
    wait_for(lambda: training_page.record("victim").get("pid") not in (None, first))
    trains = re.compile(r"(\d+) \S+ +\S*python\S* ptuning/main.py ")
    found = wait_for(lambda: trains.search("\n".join(processes_of(training_page.record("victim")["pid"]))))
    os.kill(int(found[1]), signal.SIGKILL)  # as the system does when memory runs out
    expect(page.locator("#card")).to_contain_text("was ended by SIGKILL", timeout=5000)
    expect(page.locator("#card .advice")).to_contain_text("memory ran out")
    assert not processes_of(training_page.record("victim")["pid"])


def processes_of(session):
    """ "pid words" of each process of a session that is alive."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if "Z" not in line.split()[1]]


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_every_tab_is_readable_for_everybody(visit, training_page, locale):
    folder = training_page.output / f"seen-{locale}"
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
    page = visit(locale)
    expect(page.locator("#strip, #card").first).to_be_attached()
    for name in TABS:
        choose_tab(page, name)
        if name == "data":
            page.click("#button-look")
            expect(page.locator("#found table")).to_be_visible()
            page.click("#button-use")
        if name == "settings":
            page.click("#more button >> nth=0")
            (training_page.project / "evil.json").write_text('{"evil": 1}')
            with page.expect_file_chooser() as chooser:
                page.click("#load")
            chooser.value.set_files(training_page.project / "evil.json")
            expect(page.locator("#load-said [role=alert]")).to_contain_text("evil")
        if name == "run":
            expect(page.locator("#plot-loss svg")).to_be_visible()
            assert page.locator("#card b b").count() == 0
        if name == "evaluate":
            expect(page.locator("#evaluated table")).to_contain_text("onerror")
        for width, height in ((390, 844), (1280, 800)):
            page.set_viewport_size({"width": width, "height": height})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
            for look in ("dark", "light"):
                page.click("#theme")
                expect(page.locator("body")).to_have_class(
                    re.compile("dark") if look == "dark" else re.compile("^(?!.*dark)")
                )
                screenshot(page, f"train-{locale[:2]}-{width}-{look}-{name}")
                assert grave_faults(page) == [], (name, width, look)


HOSTILE = [
    *(
        "'; touch pwned; '",
        "$(touch pwned)",
        "`touch pwned`",
        "a\nMODEL=$(touch pwned)",
        "--help",
        "--output_dir=/tmp/x",
    ),
    *("../../../../etc/passwd", "/etc/passwd", "~root/.ssh", "a\0b", "x" * 50_000, "\u202egpj.exe", "\x1b[2J"),
    *("<script>alert(1)</script>", "{0.__class__}%s%n{{7*7}}", "file:///etc/passwd", "a/b/../../../..", "-", "\ud800"),
    *("٣", "NaN", "1e999", None, True, -1, [], {}, ["x"] * 1000, [[[[[]]]]], {"path": "/etc/passwd"}),
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
]


@pytest.mark.slow
def test_what_a_stranger_sends_past_the_browser_starts_nothing_and_makes_no_other_command(training_page):
    port, output = training_page.port, training_page.output
    config = call(port, "GET", "/config")[1]
    events = {each["api_name"]: each for each in config["dependencies"]}
    fields = {**EMPTY, **PRESETS["tiny"], "name": "hostile", "data": "AdvertiseGen/sample"}
    before = {file for file in output.rglob("*") if "_uploads" not in file.parts}

    def ask(event, values):
        body = {"fn_index": events[event]["id"], "data": values, "session_hash": "stranger"}
        return call(port, "POST", "/gradio_api/run/predict", body)

    assert call(port, "POST", "/gradio_api/call/refresh", {"data": list(fields.values())})[0] == 404
    plain = ask("refresh", list(fields.values()))[1]["data"][0]
    names = {word.partition("=")[0] for word in plain.split()} | {"DEV_RATIO", "with_prefix"}
    commands = set()
    for name in fields:
        for value in HOSTILE:
            status, answer = ask("refresh", list({**fields, name: value}.values()))
            text = answer["data"][0] if status == 200 else ""
            commands.update([text] if isinstance(text, str) else [])
            if not text and name in ("model", "name", "lr", "extra"):  # refused: nor does Start take it
                ask("start", [None, *{**fields, name: value}.values()])
    for command in commands - {""}:
        words = shlex.split(re.sub(r"\$'(.*?)'", r"'\1'", command))
        assert words[words.index("bash") :][:2] == ["bash", "train.sh"], command
        assert {word.partition("=")[0] for word in words[: words.index("bash")]} <= names
    for event in (
        "look_at_rows",
        "look_at_model",
        "flag_help",
        "stop",
        "continue",
        "adopt",
        "export",
        "evaluate",
        "compare",
    ):
        for value in HOSTILE if event in events else []:
            ask(event, [value] * len(events[event]["inputs"]))
    assert {file for file in output.rglob("*") if "_uploads" not in file.parts} == before
    assert not list(training_page.project.rglob("pwned")) and training_page.answers()
    assert ask("refresh", list(fields.values()))[1]["data"][0] == plain


def can_mount():
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_full_disk_is_told_in_words_with_what_to_do(visit, training_page):
    if not can_mount():
        pytest.skip("a disk of a given size needs a mount, which this system does not allow")
    training_page.kill()
    disk = training_page.output / "small-disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=700k tmpfs {disk} && exec "$@"'
    training_page.restart(before=["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount, "bash"])
    page = visit()
    start_run(page, "small-disk", steps="20", save="2", extra=f"{QUICK}\nreport_to = none")
    card = page.locator("#card")
    expect(card).to_contain_text(ENGLISH["state_failed"])
    expect(card).to_contain_text(re.compile(r"checkpoint-\d+ could not be written \(No space left on device"))
    expect(card.locator(".advice")).to_contain_text("make room, then --resume_from_checkpoint last")
    assert page.locator("#button-continue").is_visible()  # a checkpoint before is whole
    screenshot(page, "train-full-disk")
