"""The rows that --dev_ratio holds out: kept beside what is trained on the others, and evaluated from there."""

import json

import pytest
from conftest import SAMPLE
from support.runs import PREDICT_SETTINGS, TRAIN_SETTINGS, run

from data.held_out import FOLDER, write_held_out
from data.rows import read_rows

ADVERTS = [{"content": f"类型#裙*货号#{number}", "summary": "好看的裙子。"} for number in range(20)]
TALK = [{"问": f"你好{number}", "更多": "早", "答": "你好！"} for number in range(10)]
INFO = {
    "adverts": {"file_name": "adverts.json", "columns": {"prompt": "content", "response": "summary"}},
    "talk": {"file_name": "talk.json", "columns": {"prompt": "问", "query": "更多", "response": "答"}},
}


@pytest.fixture
def data_sets(tmp_path):
    for name, rows in (("adverts", ADVERTS), ("talk", TALK)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has scored the rows that it held out."""
    folder = tmp_path_factory.mktemp("run")
    settings = {**TRAIN_SETTINGS, "max_steps": 1, "dev_ratio": 0.1, "do_eval": True, "do_sample": False}
    with pytest.MonkeyPatch.context() as patch:
        run(patch, settings, output_dir=folder)
    return folder


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_rows_are_those_of_the_training_file_that_did_not_train(trained):
    kept = read_rows(trained / FOLDER / "dev.json")
    assert len(kept) == 6 and read(trained / "all_results.json")["train_samples"] == 54
    rows = read_rows(SAMPLE / "train.json")[: TRAIN_SETTINGS["max_train_samples"]]
    places = [rows.index(row) for row in kept]
    assert places == sorted(set(places))


def test_a_later_evaluation_of_them_gives_the_scores_of_the_run(trained, monkeypatch):
    settings = {**PREDICT_SETTINGS, "test_file": trained / FOLDER / "dev.json", "do_sample": False}
    settings.update(ptuning_checkpoint=trained, max_predict_samples=None, max_target_length=None)
    run(monkeypatch, settings, output_dir=trained / "later")
    first, later = read(trained / "eval_results.json"), read(trained / "later" / "predict_results.json")
    assert later["predict_samples"] == first["eval_samples"] == 6
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
        assert later[f"predict_{name}"] == first[f"eval_{name}"]


def test_a_run_that_is_started_by_hand_says_how_to_evaluate_on_them(data_sets, monkeypatch, capsys):
    settings = {**TRAIN_SETTINGS, "train_file": None, "prompt_column": None, "response_column": None, "max_steps": 1}
    mixture = {"dataset": "talk,adverts", "dataset_dir": data_sets, "dev_ratio": 0.2}
    run(monkeypatch, settings, **mixture, output_dir=data_sets / "run")
    held_out = data_sets / "run" / FOLDER
    assert f"--do_predict --dataset talk,adverts --dataset_dir {held_out} --ptuning" in capsys.readouterr().out
    later = {**PREDICT_SETTINGS, "test_file": None, "dataset": "talk,adverts", "dataset_dir": held_out}
    run(monkeypatch, later, ptuning_checkpoint=data_sets / "run", output_dir=data_sets / "later")
    lines = (data_sets / "later" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    rows = {name: read_rows(held_out / file) for name, file in (("talk", "1.json"), ("adverts", "2.json"))}
    prompts = [f"{row['问']}\n{row['更多']}" for row in rows["talk"]] + [row["content"] for row in rows["adverts"]]
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    assert {name: len(each) for name, each in rows.items()} == {"talk": 2, "adverts": 4}
    assert all(row in TALK for row in rows["talk"]) and all(row in ADVERTS for row in rows["adverts"])


def held_out_of(file, *numbers):
    return {"": {"path": file, "prompt_column": "content", "rows": list(numbers)}}


def test_what_an_earlier_run_in_the_folder_held_out_goes_and_nothing_else(tmp_path):
    write_held_out(tmp_path, held_out_of(SAMPLE / "dev.json", 2, 5))
    assert read_rows(tmp_path / FOLDER / "dev.json") == [read_rows(SAMPLE / "dev.json")[place] for place in (1, 4)]
    (tmp_path / FOLDER / "notes.txt").write_text("mine")
    write_held_out(tmp_path, {})
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["notes.txt"]


def test_a_row_keeps_columns_that_nothing_reads_whatever_they_hold(tmp_path):
    row = {"content": "你好", "id": 7, "odd": "\ud800", "none": None, "list": [{"a": "早"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    write_held_out(tmp_path, held_out_of(tmp_path / "rows.json", 1))
    assert read_rows(tmp_path / FOLDER / "dev.json") == [row]


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path):
    said = []
    (tmp_path / FOLDER).write_text("a file in its place")
    write_held_out(tmp_path, held_out_of(SAMPLE / "dev.json", 2), said.append)
    assert len(said) == 1 and FOLDER in said[0] and "goes on without it" in said[0]
