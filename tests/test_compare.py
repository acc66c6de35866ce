"""What a run writes for others to read, trainer_log.jsonl, and compare.py, which puts runs side by side."""

import base64
import html.parser
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, SAMPLE
from support.browser import browser, faults, screenshot  # noqa: F401, fixture
from support.runs import TRAIN_SETTINGS, run
from support.terminal import run_in_terminal, screen

import compare
from training.run_log import RunLog

# ---- trainer_log.jsonl

LOG_KEYS = [
    "current_steps",
    "total_steps",
    "loss",
    "eval_loss",
    "learning_rate",
    "epoch",
    "percentage",
    "elapsed_time",
    "remaining_time",
]


def read_log(folder):
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_logs_every_loss_as_it_goes_on(monkeypatch, tmp_path):
    dev = {"validation_file": SAMPLE / "dev.json", "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    run(monkeypatch, {**TRAIN_SETTINGS, **dev}, max_eval_samples=4, output_dir=tmp_path, plot_loss=False)
    entries = [entry for entry in read_log(tmp_path) if "phase" not in entry]
    assert all(list(entry) == LOG_KEYS for entry in entries)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "eval_loss"):
        logged = [(entry["current_steps"], entry[key]) for entry in entries if entry[key] is not None]
        assert logged == [(entry["step"], entry[key]) for entry in history if key in entry]
        assert len(logged) >= 3
    assert {entry["total_steps"] for entry in entries} == {5}
    assert [entry["percentage"] for entry in entries if entry["loss"]] == [20, 40, 60, 80, 100]
    assert entries[-1]["remaining_time"] == "0:00:00" and entries[0]["remaining_time"] is None
    assert not (tmp_path / "training_loss.png").exists()
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["trainable_parameters"] == 4096 < results["total_parameters"]
    assert 0.1 < results["train_peak_memory_gb"] < 30


def log_run(folder, first_step, events, main_process=True):
    """RunLog on a run that starts at `first_step` and logs (step, logs)."""
    state = SimpleNamespace(global_step=first_step, max_steps=20, epoch=0.5, is_world_process_zero=main_process)
    log = RunLog()
    log.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
    for state.global_step, logs in events:
        log.on_log(None, state, None, logs=logs)


def test_a_resumed_run_continues_the_log_without_lines_that_are_logged_again(tmp_path):
    losses = [(step, {"loss": step / 10, "learning_rate": 0.1}) for step in range(1, 9)]
    log_run(tmp_path, 0, [(0, {"eval_loss": 2.0}), *losses[:6], (6, {"eval_loss": 1.0})])
    with open(tmp_path / "trainer_log.jsonl", "a") as file:
        file.write('{"current_steps": 7, "lo')  # killed in the middle of a line
    log_run(tmp_path, 4, [(4, {"eval_loss": 1.5}), *losses[4:], (8, {"train_loss": 0.5})])
    entries = read_log(tmp_path)
    assert [(entry["current_steps"], entry["loss"], entry["eval_loss"]) for entry in entries] == [
        (0, None, 2.0),
        *((step, step / 10, None) for step in range(1, 5)),
        (4, None, 1.5),
        *((step, step / 10, None) for step in range(5, 9)),
    ]
    log_run(tmp_path, 4, [(4, {"eval_loss": 1.5})])  # the same once more: the dev loss of step 4 is there already
    assert [entry["current_steps"] for entry in read_log(tmp_path)] == [0, 1, 2, 3, 4, 4]


def test_a_new_run_and_another_process_leave_no_old_lines(tmp_path):
    log_run(tmp_path, 0, [(1, {"loss": 1.0})])
    log_run(tmp_path, 0, [(1, {"loss": 3.0})], main_process=False)
    assert [entry["loss"] for entry in read_log(tmp_path)] == [1.0]
    log_run(tmp_path, 0, [(2, {"loss": 2.0})])
    assert [entry["loss"] for entry in read_log(tmp_path)] == [2.0]


def test_the_remaining_time_is_that_of_the_steps_since_the_start(tmp_path, monkeypatch):
    times = iter([100.0, 160.0])
    monkeypatch.setattr("trainer.time.monotonic", lambda: next(times))
    log_run(tmp_path, 10, [(12, {"loss": 1.0})])  # 30 s a step, 8 steps to go
    assert [(entry["elapsed_time"], entry["remaining_time"]) for entry in read_log(tmp_path)] == [
        ("0:01:00", "0:04:00")
    ]


# ---- comparing runs

HISTORY = [
    {"step": 0, "eval_loss": 2.0},
    {"step": 10, "loss": 1.5},
    {"step": 10, "eval_loss": 1.25},
    {"step": 20, "loss": 1.0},
    {"step": 20, "eval_loss": 1.5},
    {"step": 20, "train_loss": 1.1},
]


def write_run(folder, bleu=None, answers=(), history=HISTORY, **results):
    folder.mkdir(parents=True)
    if history:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if bleu is not None:
        results["predict_bleu-4"] = bleu
    if results:
        (folder / "all_results.json").write_text(json.dumps(results))
    if answers:
        lines = [json.dumps({"labels": f"label {row}", "predict": text, "row": row}) + "\n" for row, text in answers]
        (folder / "generated_predictions.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def run_compare(tmp_path, *words):
    compare.main([*map(str, words), "--output_dir", str(tmp_path / "out")])
    return (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_for_each_run_and_a_column_for_each_known_figure(tmp_path, capsys):
    write_run(tmp_path / "a", 8.104, train_samples_per_second=48.94, trainable_parameters=5, total_parameters=1000)
    write_run(tmp_path / "b", 7, history=None)
    run_compare(tmp_path, tmp_path / "a", tmp_path / "b")
    head, _, first, second, *_ = capsys.readouterr().out.splitlines()
    titles = ["run", "steps", "training loss", "dev loss, start", "dev loss, best", "dev loss, end", "BLEU-4"]
    assert cells(head) == [*titles, "trained", "samples/s"]
    assert cells(first) == ["a", "20", "1.0000", "2.0000", "1.2500", "1.5000", "8.10", "0.500%", "48.9"]
    assert cells(second) == ["b", "-", "-", "-", "-", "-", "7.00", "-", "-"]
    assert len({len(line) for line in (head, first, second)}) == 1


def test_predictions_inside_a_run_show_its_losses(tmp_path, capsys):
    write_run(tmp_path / "a", train_samples_per_second=3.0)
    write_run(tmp_path / "a" / "dev", 9, history=None)
    run_compare(tmp_path, tmp_path / "a" / "dev")
    head, _, line, *_ = capsys.readouterr().out.splitlines()
    assert (
        dict(zip(cells(head), cells(line), strict=True)).items()
        >= {
            "run": "dev",
            "dev loss, best": "1.2500",
            "BLEU-4": "9.00",
            "samples/s": "3.0",
        }.items()
    )


ROW = "row and prompt 序号和输入"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each table cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def test_the_heading_counts_the_runs_in_both_languages(tmp_path):
    runs = [write_run(tmp_path / name, 8) for name in ("a", "b")]
    assert '<h1>2 runs side by side <span lang="zh">2 次训练的对比</span></h1>' in run_compare(tmp_path, *runs)
    assert '<h1>1 run <span lang="zh">1 次训练</span></h1>' in run_compare(tmp_path, runs[0])


def test_the_page_shows_answers_to_the_same_rows_side_by_side(tmp_path):
    write_run(tmp_path / "a", 8, answers=[(1, "a one"), (2, "a two"), (3, "")])
    write_run(tmp_path / "b", 8, answers=[(3, "b three"), (2, "b two")])
    page = Page(run_compare(tmp_path, tmp_path / "a", tmp_path / "b"))
    start = page.cells.index(ROW)
    assert page.cells[start:] == [
        *(ROW, "reference 参考回答", "a", "b"),
        *("2", "label 2", "a two", "b two"),
        *("3", "label 3", "(nothing)", "b three"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scheme, size", [("light", (1280, 800)), ("dark", (390, 844))])
def test_the_page_keeps_its_first_column_in_sight_follows_the_theme_and_keeps_nobody_out(
    browser, tmp_path, scheme, size
):
    for name, bleu in (("adgen-tiny-pt-32", 8), ("adgen-tiny-lora-8", 9)):
        folder = write_run(tmp_path / name, bleu, answers=[(1, "这条裙子，面料很舒适。" * 6), (2, "")])
        edit_rows(folder / "generated_predictions.txt", prompt="类型#裙*颜色#白色")
    run_compare(tmp_path, tmp_path / "adgen-tiny-pt-32", tmp_path / "adgen-tiny-lora-8")
    context = browser.new_context(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    page.goto((tmp_path / "out" / "comparison.html").as_uri())
    screenshot(page, f"compare-{scheme}-{size[0]}")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    for table in (".figures", ".answers"):
        page.locator(table).evaluate("table => table.parentElement.scrollLeft = 10000")
        first = page.locator(f"{table} tr:nth-child(2) td").first.bounding_box()
        assert 0 <= first["x"] < size[0] / 4, table
    assert "类型#裙*颜色#白色" in page.locator(".answers tr:nth-child(2) td").first.inner_text()
    background = page.evaluate("getComputedStyle(document.querySelector('td')).backgroundColor")
    assert (min(map(int, re.findall(r"\d+", background)[:3])) > 200) == (scheme == "light")
    assert {"Losses", "曲线"} <= set(page.locator("h2").first.inner_text().split())
    context.close()


def edit_rows(file, **more):
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    file.write_text("".join(json.dumps({**row, **more}) + "\n" for row in rows), encoding="utf-8")


def test_sample_rows_are_spread_over_all(tmp_path):
    write_run(tmp_path / "a", answers=[(row, "x") for row in range(1, 101)])
    page = Page(run_compare(tmp_path, tmp_path / "a", "--rows", "4"))
    assert page.cells[page.cells.index(ROW) + 3 :: 3] == ["1", "26", "51", "76"]
    assert ROW not in Page(run_compare(tmp_path, tmp_path / "a", "--rows", "0")).cells


def test_text_of_runs_is_shown_and_never_interpreted_and_nothing_is_loaded(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'"
    write_run(tmp_path / "a<b>&", 8, answers=[(1, evil)])
    text = run_compare(tmp_path, tmp_path / "a<b>&")
    page = Page(text)
    assert evil in page.cells and "a<b>&" in page.cells
    kinds = "html head meta title style body main h1 h2 div table tr th td b img p small span".split()
    assert {tag for tag, _ in page.tags} <= set(kinds)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    addresses = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert base64.b64decode(addresses[0].split(",")[1]) == (tmp_path / "out" / "comparison.png").read_bytes()


def test_the_best_figures_stand_out(tmp_path):
    for name, bleu in (("a", 8.0), ("b", 9.0), ("c", 9.0)):
        write_run(tmp_path / name, bleu, history=None)
    text = run_compare(tmp_path, *(tmp_path / name for name in "abc"))
    assert text.count("<b>9.00</b>") == 2 and "<b>8.00" not in text
    assert not (tmp_path / "out" / "comparison.png").exists()


def remember(folder, base="base", rows="rows"):
    """Write what a run's checkpoint remembers of its base model and its training rows."""
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    (checkpoint / "ptuning.json").write_text(json.dumps({"base_fingerprint": base, "training": {"train_rows": rows}}))


def test_a_figure_stands_out_among_runs_on_one_base_and_the_same_rows_only(tmp_path):
    for name, bleu, base, answers in (
        ("a", 1, "x", [1]),
        ("b", 2, "x", [1]),
        ("c", 3, "y", [1]),
        ("d", 4, "x", [1, 2]),
    ):
        write_run(tmp_path / name, bleu, answers=[(row, "text") for row in answers])
        remember(tmp_path / name, base, rows=name)
    text = run_compare(tmp_path, *(tmp_path / name for name in "abcd"))
    assert text.count("<b>") == 1 and "<b>2.00</b>" in text
    assert "Bold: the best among the runs on one base model and the same rows." in text
    assert "Bold" not in run_compare(tmp_path, tmp_path / "a")


def test_the_page_shows_the_prompt_beside_the_answers_and_escapes_it(tmp_path):
    write_run(tmp_path / "a", 8)
    line = {"labels": "l", "predict": "p", "prompt": "<b>q", "row": 5}
    (tmp_path / "a" / "generated_predictions.txt").write_text(json.dumps(line))
    text = run_compare(tmp_path, tmp_path / "a")
    page = Page(text)
    assert page.cells[page.cells.index(ROW) + 3 :] == ["5<b>q", "l", "p"] and "<b>q" not in text


def test_the_table_fits_a_terminal(tmp_path):
    for name in "abcde":
        write_run(tmp_path / f"a-run-with-a-name-of-{name}", 8, train_samples_per_second=48.9)
    words = [sys.executable, "ptuning/compare.py", *(str(path) for path in sorted(tmp_path.iterdir()))]
    status, written = run_in_terminal([*words, "--output_dir", str(tmp_path / "out")])
    lines = [line for line in screen(written) if line.startswith("|")]
    assert status == 0 and max(map(len, lines)) <= 110
    assert [cells(line)[0] for line in lines[:3]] == ["run", "-" * 17, "steps"]
    assert (
        cells(lines[0])[1] == "a-run-with-a-name-of-a" and len(lines) == 2 * 9
    )  # two parts: the runs do not fit beside


def test_a_name_too_wide_for_the_terminal_is_cut_in_the_middle():
    shown = compare.text_table(["steps", "training loss"], {"a" * 50 + "b" * 50: ["1", "2"]}, columns=60)
    assert max(map(len, shown.splitlines())) <= 60 and "aaa…bbb" in shown


def test_runs_on_different_rows_are_told(tmp_path, capsys):
    write_run(tmp_path / "a", 8, answers=[(1, "x"), (2, "y")])
    write_run(tmp_path / "b", 8, answers=[(1, "x")])
    run_compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "The runs answered different rows (a 2, b 1); their scores are not comparable." in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, capsys):
    for parent in ("x", "y"):
        write_run(tmp_path / parent / "run", 8)
    run_compare(tmp_path, tmp_path / "x" / "run", tmp_path / "y" / "run")
    lines = capsys.readouterr().out.splitlines()
    assert [cells(line)[0] for line in lines[2:4]] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Which runs"),
        (["absent"], "absent is no folder. Give folders that main.py wrote"),
        (["."], "has none of trainer_state.json, all_results.json and generated_predictions.txt"),
        (["a", "a"], "The same run is named twice"),
        (["a", "--rows", "-1"], "--rows -1: expected 0 or more"),
        (["broken"], "broken/trainer_state.json is not valid JSON"),
        (["no-texts"], "generated_predictions.txt line 1 lacks the texts `labels` and `predict`"),
    ],
)
def test_what_is_no_run_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 8)
    write_run(tmp_path / "broken", 8)
    (tmp_path / "broken" / "trainer_state.json").write_text('{"log_history": [')
    write_run(tmp_path / "no-texts", 8)
    (tmp_path / "no-texts" / "generated_predictions.txt").write_text('{"predict": 3}\n')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare.main(words)


def test_comparing_needs_neither_torch_nor_transformers():
    code = "import sys, compare; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "ptuning", capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- files that no run has written


STATE, ANSWER = "trainer_state.json", "generated_predictions.txt"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (STATE, '{"log_history": 5}', "log_history is 5, expected a list"),
        (STATE, '{"log_history": {"a": 1}}', 'log_history is {"a": 1}, expected a list'),
        (STATE, '{"log_history": [5]}', "log_history is [5], expected a list"),
        (STATE, '{"log_history": [{"loss": "1", "step": 1}]}', "expected a list"),
        (STATE, '{"log_history": [{"loss": 1.0, "step": 1%s}]}' % ("0" * 400), "expected a list"),
        (STATE, '{"log_history": [{"loss": 1.0, "step": 1%s}]}' % ("0" * 5000), "thousands of digits"),
        (STATE, '{"log_history": [{"loss": 1%s, "step": 1}]}' % ("0" * 400), "expected a list"),
        (STATE, '{"log_history": [{"loss": 1.0, "step": NaN}]}', "expected a list"),
        (STATE, '{"log_history": [{"loss": 1.0, "step": true}]}', "expected a list"),
        (STATE, "[" * 100_000, "nested too deep"),
        (STATE, "[]", "holds no JSON object"),
        (STATE, "\xff", "not valid JSON"),
        ("all_results.json", "[1]", "holds no JSON object"),
        (ANSWER, '{"labels": "a", "predict": "b", "row": [1]}', "line 1: row is [1], expected its number"),
        (ANSWER, '{"labels": "a", "predict": "b", "row": 1%s}' % ("0" * 400), "expected its number"),
        (ANSWER, '{"labels": "a", "predict": 5}', "lacks the texts"),
    ],
)
def test_a_malformed_file_of_a_run_is_one_message(file, text, message, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as refused:
        compare.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    assert message in str(refused.value) and str(tmp_path / "run" / file) in str(refused.value)


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-1e308", "1e308", '"x"', "null", "[1]", "true", "1" + "0" * 400]
)
def test_a_figure_of_any_kind_is_shown_or_left_out(number, tmp_path):
    (tmp_path / "run").mkdir()
    names = ["predict_bleu-4", "trainable_parameters", "total_parameters", "train_peak_memory_gb", "predict_samples"]
    results = ", ".join(f'"{name}": {number}' for name in names)
    (tmp_path / "run" / "all_results.json").write_text(f"{{{results}}}")
    if number in ("NaN", "Infinity", "-1e308", "1e308"):
        state = f'{{"log_history": [{{"loss": {number}, "step": 1}}, {{"eval_loss": {number}, "step": 1}}]}}'
        (tmp_path / "run" / "trainer_state.json").write_text(state)
    compare.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "comparison.html").is_file()
