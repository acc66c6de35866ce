"""Text of others, in data, settings, names and answers: a terminal gets its control characters as escapes only."""

import json
import re
import shutil

import pytest
from conftest import SAMPLE, TINY
from support.refusals import PREDICT, TRAIN, flags

import compare
from common.failure import printable

EVIL = "\x1b[2J\x9b31m\u202e\x07"  # clears the screen, colours, hides what stood there, turns the order
SHOWN = r"\x1b[2J\x9b31m\u202e\x07"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def run(forks, tmp_path_factory):
    """(a folder with a base model, a run and its data, all with evil names and text; what training printed)."""
    here = tmp_path_factory.mktemp("evil")
    shutil.copytree(TINY, here / f"tiny{EVIL}")
    rows = [{"content": f"裙\r{EVIL}\t\n二", "summary": f"好{EVIL}"}] * 8
    (here / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**TRAIN, "model_name_or_path": here / f"tiny{EVIL}", "output_dir": here / f"run{EVIL}"}
    done = forks.run("main.py", flags(settings, train_file=here / "train.json"), cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
    return here, done


def assert_plain(done, *says):
    """A program that ended well, and printed each of `says` and no control character."""
    assert done.returncode == 0, done.stderr[-3000:]
    for text in (done.stdout, done.stderr):
        assert not CONTROL.search(text), ascii(text)
    for part in says:
        assert part in done.stdout + done.stderr, done.stdout + done.stderr


def test_printable_keeps_text_and_escapes_what_steers_a_terminal():
    assert printable(EVIL) == SHOWN and printable("a\rb") == r"a\rb"
    assert printable("裙子\t一\n二 é 👩\u200d👩 \u200f") == "裙子\t一\n二 é 👩\u200d👩 \u200f"
    assert printable("\ud83d\x00\x7f\u2066") == r"\ud83d\x00\x7f\u2066"
    assert printable(printable(EVIL)) == SHOWN


def test_training_shows_the_first_example_and_its_names_as_escapes(run):
    _, done = run
    assert_plain(done, f"裙\\r{SHOWN}\t\n二", f"好{SHOWN}", f"tiny{SHOWN}", f"run{SHOWN}")


def copy_without_checksums(here, target, **sidecar):
    checkpoint = target / f"run{EVIL}" / "checkpoint-1"
    shutil.copytree(here / f"run{EVIL}" / "checkpoint-1", checkpoint)
    (checkpoint / "checksums.json").unlink()
    file = checkpoint / "ptuning.json"
    saved = json.loads(file.read_text())
    training = {**saved["training"], "train_file": f"old{EVIL}"}
    file.write_text(json.dumps({**saved, "training": training, **sidecar}))
    return checkpoint


def test_what_differs_from_the_run_that_is_continued_is_shown_as_escapes(run, forks, tmp_path):
    here, _ = run
    checkpoint = copy_without_checksums(here, tmp_path)
    settings = {**TRAIN, "model_name_or_path": here / f"tiny{EVIL}", "output_dir": checkpoint.parent}
    words = flags(settings, train_file=here / "train.json", resume_from_checkpoint=checkpoint)
    assert_plain(forks.run("main.py", words, cwd=tmp_path), f"train_file old{SHOWN} -> ")


def test_a_warning_is_shown_as_escapes(run, forks, tmp_path):
    here, _ = run
    checkpoint = copy_without_checksums(here, tmp_path, base_fingerprint=f"f{EVIL}")
    words = flags(PREDICT, ptuning_checkpoint=checkpoint, test_file=SAMPLE / "dev.json", max_predict_samples=1)
    words += flags({"output_dir": tmp_path / "out"})
    assert_plain(forks.run("main.py", words, cwd=tmp_path), f"fingerprint f{SHOWN}")


def test_runs_are_compared_under_names_of_escapes(run, forks, tmp_path):
    here, _ = run
    other = tmp_path / f"other{EVIL}"
    shutil.copytree(here / f"run{EVIL}", other, symlinks=True)
    (other / "generated_predictions.txt").write_text(json.dumps({"labels": "x", "predict": f"a{EVIL}\n\tb"}) + "\n")
    done = forks.run("compare.py", [here / f"run{EVIL}", other, "--output_dir", tmp_path / "out"], cwd=tmp_path)
    assert_plain(done, f"run{SHOWN}", f"other{SHOWN}")
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert not CONTROL.search(page) and f"other{SHOWN}" in page and f"a{SHOWN}\n\tb" in page
    lengths = {len(line) for line in done.stdout.splitlines() if line.startswith("|")}
    assert len(lengths) == 1  # the table is still one


def test_an_export_names_its_source_in_escapes(run, forks, tmp_path):
    here, _ = run
    words = ["--ptuning_checkpoint", here / f"run{EVIL}", "--output_dir", tmp_path / f"out{EVIL}"]
    assert_plain(forks.run("export_model.py", words, cwd=tmp_path), f"tiny{SHOWN}", f"out{SHOWN}")


def test_the_terminal_names_what_it_loads_in_escapes(run, forks, tmp_path):
    here, _ = run
    words = ["--ptuning_checkpoint", here / f"run{EVIL}", "--max_length", 4, "--temperature", 0]
    assert_plain(forks.run("cli_demo.py", words, cwd=tmp_path, stdin="你好\n"), f"tiny{SHOWN}", f"run{SHOWN}")


def test_the_traceback_of_debug_is_shown_as_escapes(forks, tmp_path):
    done = forks.run("compare.py", [f"none{EVIL}", "--debug"], cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr and f"none{SHOWN}" in done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)


def test_names_that_differ_in_their_escapes_only_are_told_apart():
    names = compare.short_names(["a/x\x1b", "b/x\\x1b"])
    assert len(set(names)) == 2 and not any(CONTROL.search(name) for name in names)
