"""--general_file in whole runs: what it writes, and what it leaves as it was."""

import json

import pytest
import torch
from conftest import ROOT, SAMPLE
from support.finetuned import TRAIN, run

from arguments import parse_flags
from checkpoints.sidecar import read_sidecar
from data.general import divide, look_at_general
from data.rows import read_rows
from first_look import look_at_run
from forgetting.page import page_of

SHORT = {**TRAIN, "max_train_samples": 24, "pre_seq_len": 4, "eval_strategy": "steps", "max_eval_samples": 4}
SHORT |= {"validation_file": SAMPLE / "dev.json"}
GENERAL = SAMPLE / "general_dev.json"


def history_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_run_is_the_same_number_for_number_whether_it_is_measured_or_not(tmp_path, monkeypatch, capsys):
    run(monkeypatch, SHORT, output_dir=tmp_path / "plain")
    run(monkeypatch, SHORT, output_dir=tmp_path / "measured", general_file=GENERAL)
    said = capsys.readouterr().out
    folders = plain, measured = tmp_path / "plain", tmp_path / "measured"
    for name in ("pytorch_model.bin", "optimizer.pt"):
        assert len({(folder / "checkpoint-4" / name).read_bytes() for folder in folders}) == 1
    states = [torch.load(folder / "checkpoint-4" / "rng_state.pth", weights_only=False) for folder in folders]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"]) and states[0]["python"] == states[1]["python"]
    figures = [[entry for entry in history_of(folder) if "loss" in entry] for folder in folders]
    assert figures[0] == figures[1]
    assert set(json.loads((measured / "train_results.json").read_text())) - set(
        json.loads((plain / "train_results.json").read_text())
    ) == {"drift", "same_answers"}
    assert read_sidecar(measured / "checkpoint-4").keys() - read_sidecar(plain / "checkpoint-4").keys() == {
        "drift",
        "same_answers",
    }
    # at the start and at every save; what is shown is what is logged
    drifts = {entry["step"]: entry for entry in history_of(measured) if "drift" in entry}
    assert list(drifts) == [0, 2, 4] and not any("drift" in entry for entry in history_of(plain))
    assert read_sidecar(measured / "checkpoint-2")["drift"] == drifts[2]["drift"]
    lines = [json.loads(line) for line in (measured / "trainer_log.jsonl").read_text().splitlines()]
    logged = {line["current_steps"]: line["same_answers"] for line in lines if "drift" in line}
    assert logged == {step: entry["same_answers"] for step, entry in drifts.items()}
    assert f"\nForgetting: drift {drifts[4]['drift']:.3f}." in said
    assert f"also in {measured}/forgetting.html:\n  prompt  " in said
    assert (measured / "forgetting.html").read_text().count("<tr>") == 7
    assert not (plain / "forgetting.html").exists()


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_run_that_changes_the_bases_weights_says_that_it_measures_nothing(method, tmp_path, monkeypatch, capsys):
    trainer = run(
        monkeypatch,
        SHORT,
        output_dir=tmp_path,
        general_file=GENERAL,
        pre_seq_len=None,
        finetuning_type=method,
        max_steps=1,
    )
    assert "What is forgotten is not measured: --finetuning_type " + method in capsys.readouterr().out
    assert trainer.general is None


def test_half_of_the_rows_are_measured_and_a_fixed_number_at_most():
    assert divide(5, most=64) == ([0, 2, 4], [1, 3])
    measured, kept = divide(1200, most=64)
    assert len(measured) == 64 and len(kept) == 1136 and not set(measured) & set(kept)
    assert divide(1) == ([0], [])


def test_our_own_prompts_are_many_and_none_is_there_twice():
    rows = read_rows(ROOT / "ptuning" / "forgetting" / "general.jsonl")
    assert len(rows) >= 120 and len({json.dumps(row) for row in rows}) == len(rows)
    assert {len(row["history"]) for row in rows} == {0, 1, 2} and max(len(row["prompt"]) for row in rows) > 400
    assert {row["prompt"].isascii() for row in rows} == {True, False}


COMMAND = "--do_train --train_file t.json --output_dir o --pre_seq_len 8 --model_name_or_path m --prompt_column a --response_column b"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--keep_base 1", "--keep_base 1 needs --general_file"),
        ("--keep_base -1 --general_file g", "--keep_base -1.0: expected at least 0"),
        ("--keep_base nan --general_file g", "--keep_base nan: expected at least 0"),
        (
            "--keep_base 1 --general_file g --keep_base_rows 0",
            "--keep_base_rows 0.0: expected a number above 0, at most 8",
        ),
        ("--keep_base 1 --general_file g --precision official", "--precision official and --keep_base contradict"),
        ("--stage dpo --finetuning_type p_tuning --general_file g", "--general_file g is for --stage sft"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(more, said):
    with pytest.raises(ValueError) as error:
        parse_flags([*COMMAND.split(), *more.split()])
    assert said in str(error.value)


def test_a_base_whose_weights_change_cannot_be_kept():
    command = COMMAND.replace("--pre_seq_len 8", "--finetuning_type full --keep_base 1 --general_file g")
    with pytest.raises(ValueError, match="--finetuning_type full changes the base's own weights"):
        parse_flags(command.split())


@pytest.mark.parametrize("word", ["none", "None", ""])
def test_the_word_none_turns_the_measuring_off(word):
    assert "general_file" not in parse_flags([*COMMAND.split(), "--general_file", word])[2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "你好"},
            "general.json has no column 'content' or 'prompt' or 'messages'; its columns are: question",
        ),
        ({"prompt": 3}, "general.json row 1: column 'prompt'"),
        (None, "general.json does not exist"),
    ],
)
def test_a_file_without_prompts_is_refused_before_torch_is_loaded(row, said, tmp_path):
    file = tmp_path / "general.json"
    if row:
        file.write_text(json.dumps([row]))
    words = ["--do_train", "--train_file", str(SAMPLE / "train.json"), "--prompt_column", "content"]
    words += ["--response_column", "summary", "--pre_seq_len", "4", "--output_dir", str(tmp_path / "o")]
    words += ["--model_name_or_path", str(ROOT / "ptuning/tiny"), "--general_file", str(file)]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        look_at_run(*parse_flags(words))
    assert said in str(error.value)


def test_rows_without_answers_and_with_dialogues_are_read(tmp_path):
    file = tmp_path / "general.json"
    _, data_args, _, _ = parse_flags(COMMAND.split())
    file.write_text(json.dumps([{"prompt": "你好"}, {"prompt": "谢谢"}]))
    assert look_at_general(file, data_args) == 2
    file.write_text(json.dumps([{"messages": [{"role": "user", "content": "你好"}]}]))
    assert look_at_general(file, data_args) == 1


def test_no_text_of_a_prompt_or_an_answer_becomes_html():
    page = page_of([{"prompt": "<script>", "base": "a & b", "tuned": '"><img src=x>\x1b[31m'}], "drift <1>")
    assert "<script" not in page and "<img" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and "default-src 'none'" in page
