"""Rows without a response: answered, and not scored; a prompt is never the reference of its own answer."""

import json

import pytest
from conftest import SAMPLE, TINY
from support.runs import PREDICT_SETTINGS, run

from evaluation import prediction

PROMPTS = [json.loads(line)["content"] for line in (SAMPLE / "dev.json").read_text(encoding="utf-8").splitlines()[:3]]
SETTINGS = {
    **PREDICT_SETTINGS,
    "finetuning_type": "none",
    "model_name_or_path": TINY,
    "prompt_column": "content",
    "response_column": "summary",
    "max_source_length": 64,
    "max_predict_samples": None,
}


@pytest.fixture
def folder(tmp_path):
    rows = [{"content": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "test.csv").write_text("content\n" + "\n".join(PROMPTS), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "test.json has no column 'summary': its rows are answered, and not scored; its columns are: content, id."),
        ({"response_column": None}, "test.json: without --response_column its rows are answered, and not scored."),
        ({"test_file": "test.csv"}, "test.csv has no column 'summary': its rows are answered, and not scored"),
    ],
)
def test_rows_without_a_response_column_are_answered_and_not_scored(flags, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run(monkeypatch, SETTINGS, output_dir="run", **{"test_file": "test.json", **flags})
    assert capsys.readouterr().out.count(said) == 1
    answers = [json.loads(line) for line in (folder / "run" / "generated_predictions.txt").read_text().splitlines()]
    assert [(answer["labels"], answer["row"]) for answer in answers] == [("", 1), ("", 2), ("", 3)]
    assert all(isinstance(answer["predict"], str) for answer in answers)
    results = json.loads((folder / "run" / "predict_results.json").read_text())
    assert results["predict_samples"] == 3 and not any("bleu" in name or "rouge" in name for name in results)


def test_rows_that_lack_the_response_beside_others_are_answered_and_only_the_others_scored(folder, monkeypatch, capsys):
    rows = [{"content": PROMPTS[0], "summary": "好看的裙子。"}, {"content": PROMPTS[1]}]
    (folder / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    scored = []
    monkeypatch.setattr(prediction, "score_all", lambda *columns: scored.append(columns) or {})
    run(monkeypatch, SETTINGS, test_file=folder / "test.json", output_dir=folder / "run")
    assert "1 rows have no response to compare with; they are not scored." in capsys.readouterr().out
    assert [labels for _, labels in scored] == [("好看的裙子。",)]


def test_an_evaluation_needs_the_response_column(folder, monkeypatch):
    evaluate = {"do_predict": None, "do_eval": True, "test_file": None, "validation_file": folder / "test.json"}
    with pytest.raises(ValueError, match="test.json row 1 has no column 'summary'; .*name one of them with --response"):
        run(monkeypatch, {**SETTINGS, **evaluate}, output_dir=folder / "run")
    with pytest.raises(ValueError, match="--response_column is missing"):
        run(monkeypatch, {**SETTINGS, **evaluate}, output_dir=folder / "run", response_column=None)


@pytest.mark.parametrize("split", ["predict", "eval"])
def test_answers_are_never_scored_against_their_own_prompts(split, folder, monkeypatch):
    file = {"predict": "test_file", "eval": "validation_file"}[split]
    flags = {"do_predict": None, "test_file": None, f"do_{split}": True, file: folder / "test.json"}
    with pytest.raises(ValueError, match="--prompt_column and --response_column are one column, 'content'"):
        run(monkeypatch, {**SETTINGS, **flags}, output_dir=folder / "run", response_column="content")
    columns = {"prompt": "content", "response": "content"}
    (folder / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "test.json", "columns": columns}}))
    named = {**flags, file: None, "dataset": "a", "dataset_dir": folder, "prompt_column": None, "response_column": None}
    with pytest.raises(ValueError, match="\"prompt\" and \"response\" of 'a' in .* are one column, 'content'"):
        run(monkeypatch, {**SETTINGS, **named}, output_dir=folder / "run")
    assert not (folder / "run").exists()
