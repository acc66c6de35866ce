"""Several data sets: dataset_info.json, the rows that ratios draw, dev rows held out, and a run on all of it."""

import hashlib
import json
import shlex

import pytest
from conftest import SAMPLE, TINY
from datasets import Dataset
from support.runs import PREDICT_SETTINGS, TRAIN_SETTINGS, run

from arguments import parse_flags
from data.dataset_info import read_dataset_info
from data.examples import load_examples
from data.mixture import draw_shares, hold_out, join, number_rows, shown_rows


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of `datasets` that starts empty and that nobody else reads."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
        yield


ADVERTS = [{"content": f"类型#裙*货号#{number}", "summary": "好看的裙子。"} for number in range(60)]
TALK = [{"instruction": f"你好{number}", "input": "早" * (number % 2), "output": "你好！"} for number in range(20)]
INFO = {
    "adverts": {"file_name": "adverts.json", "columns": {"prompt": "content", "response": "summary", "query": None}},
    "talk": {"file_name": "talk.json"},
}


@pytest.fixture
def folder(tmp_path):
    """A dataset_dir of two data sets, 60 and 20 rows."""
    (tmp_path / "adverts.json").write_text(json.dumps(ADVERTS), encoding="utf-8")
    (tmp_path / "talk.json").write_text(json.dumps(TALK), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    return tmp_path


def describe(folder, **entries):
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")


def load(folder, name):
    return load_examples(**read_dataset_info(folder, name)[0][name])[0]


# ---- dataset_info.json


def test_columns_of_an_entry_are_those_of_its_rows(folder):
    assert load(folder, "adverts")[7] == {
        "prompt": "类型#裙*货号#7",
        "response": "好看的裙子。",
        "history": [],
        "row": 8,
    }


def test_an_entry_without_columns_has_those_of_alpaca_and_the_query_follows_the_prompt(folder):
    assert load(folder, "talk")["prompt"][:2] == ["你好0", "你好1\n早"]
    assert load(folder, "talk")["response"][0] == "你好！"


def test_alpaca_rows_need_no_input(folder):
    (folder / "talk.json").write_text(json.dumps([{"instruction": "你好", "output": "嗨"}]), encoding="utf-8")
    assert load(folder, "talk")["prompt"][:] == ["你好"]


def test_history_and_messages_may_be_columns_of_an_entry(folder):
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    rows = [{"q": "u", "a": "a", "h": [["u", "a"]], "m": turns}]
    (folder / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "q", "response": "a", "history": "h"}
    describe(
        folder,
        pairs={"file_name": "chat.json", "columns": columns},
        whole={"file_name": "chat.json", "columns": {"messages": "m"}},
    )
    expected = {"prompt": "u", "response": "a", "history": [["u", "a"]], "row": 1}
    assert load(folder, "pairs")[0] == load(folder, "whole")[0] == expected


def test_a_matching_checksum_is_silent_and_another_one_is_said(folder):
    sha1 = hashlib.sha1((folder / "talk.json").read_bytes()).hexdigest()
    describe(folder, talk={"file_name": "talk.json", "file_sha1": sha1})
    assert read_dataset_info(folder, "talk")[1] == []
    describe(folder, talk={"file_name": "talk.json", "file_sha1": "0" * 40})
    (note,) = read_dataset_info(folder, "talk")[1]
    assert f"its SHA-1 is {sha1}, expected {'0' * 40}" in note


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("talk.json", r"'talk' in \S+dataset_info.json is text .*expected an object with file_name"),
        ({}, "'talk' in .* has no file: give the file's name"),
        ({"script_url": "a"}, "is made by a program, script_url 'a', and none of a data set is run here"),
        ({"file_name": "talk.json", "columns": ["a"]}, "\"columns\" of 'talk' in .* is a list"),
        ({"file_name": "talk.json", "columns": {"system": "s"}}, "'system'; expected names of columns for prompt, que"),
        ({"file_name": "talk.json", "columns": {"prompt": 3}}, r"a number \(3\) for 'prompt'"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(entry, message, folder):
    describe(folder, talk=entry)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_dataset_info(folder, "talk")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("adverts,tolk", "does not describe 'tolk', only adverts, talk; did you mean talk?"),
        ("talk, talk", "names 'talk' twice"),
        (" ,", "names no data set"),
    ],
)
def test_unknown_and_repeated_names_are_refused(names, message, folder):
    with pytest.raises(ValueError, match=message):
        read_dataset_info(folder, names)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gb18030"])
def test_the_description_may_be_in_any_encoding_of_data_files(encoding, folder):
    (folder / "dataset_info.json").write_text('{"广告": {"file_name": "talk.json"}}', encoding=encoding)
    assert list(read_dataset_info(folder, "广告")[0]) == ["广告"]


def test_a_name_that_is_described_twice_is_refused(folder):
    text = '{"talk": {"file_name": "talk.json"},\n"b": {}, "talk": {"file_name": "adverts.json"}}'
    (folder / "dataset_info.json").write_text(text)
    with pytest.raises(ValueError, match="dataset_info.json line 1 begins an object that has the key 'talk' twice"):
        read_dataset_info(folder, "talk")


def test_missing_files_are_refused_by_path(folder):
    (folder / "talk.json").unlink()
    with pytest.raises(FileNotFoundError, match="talk.json does not exist, the file of 'talk' in"):
        read_dataset_info(folder, "talk")
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="dataset_info.json does not exist; it describes"):
        read_dataset_info(folder, "talk")


def test_a_bad_row_is_named_by_file_row_and_entry(folder):
    (folder / "talk.json").write_text(json.dumps([*TALK, {"instruction": 3, "output": "a"}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"talk.json row 21: column 'instruction' \(\"prompt\" of 'talk' in .*number"):
        load(folder, "talk")
    describe(folder, talk={"file_name": "talk.json", "columns": {"prompt": "instructions", "response": "output"}})
    with pytest.raises(
        ValueError, match="has no column 'instructions'.*is 'instruction' meant by \"prompt\" of 'talk'"
    ):
        load(folder, "talk")


# ---- which rows are drawn


def numbers(count, start=0):
    return Dataset.from_dict({"number": list(range(start, start + count))})


@pytest.mark.parametrize(
    ("sizes", "ratios", "expected"),
    [
        ((60, 20), None, (60, 20)),
        ((60, 20), [0.7, 0.3], (47, 20)),
        ((60, 20), [7, 3], (47, 20)),
        ((60, 20), [0.9, 0.1], (60, 7)),
        ((10, 10, 10), [2, 1, 1], (10, 5, 5)),
        ((10, 5000), [0.001, 0.999], (5, 5000)),
        ((3, 1000), [0.999, 0.001], (3, 1)),
    ],
)
def test_ratios_are_shares_of_the_mixed_rows(sizes, ratios, expected):
    drawn = draw_shares({str(size) + str(i): numbers(size) for i, size in enumerate(sizes)}, ratios, seed=1)
    assert tuple(map(len, drawn.values())) == expected
    assert all(part["number"][:] == sorted(set(part["number"][:])) for part in drawn.values())


def test_rows_are_drawn_by_seed():
    parts = {"a": numbers(50), "b": numbers(10)}
    first, same, other = (draw_shares(parts, [1, 1], seed)["a"]["number"][:] for seed in (1, 1, 2))
    assert first == same != other
    assert first != list(range(10))


def test_dev_rows_and_training_rows_are_all_rows_once():
    rest, dev = hold_out(numbers(100), 0.1, seed=3)
    assert sorted(rest["number"][:] + dev["number"][:]) == list(range(100))
    assert len(dev) == 10 and dev["number"][:] != list(range(10))
    assert hold_out(numbers(100), 0.1, seed=3)[1]["number"][:] == dev["number"][:]
    assert hold_out(numbers(100), 0.1, seed=4)[1]["number"][:] != dev["number"][:]


@pytest.mark.parametrize(("size", "share", "expected"), [(2, 0.01, 1), (3, 0.99, 2), (1, 0.5, 0)])
def test_a_small_data_set_keeps_a_training_row(size, share, expected):
    rest, dev = hold_out(numbers(size), share, seed=3)
    assert (len(rest), len(dev)) == (size - expected, expected)


def test_joined_rows_stand_in_the_order_of_the_data_sets():
    assert join([numbers(2), numbers(2, start=7)])["number"][:] == [0, 1, 7, 8]


def test_rows_of_several_data_sets_are_told_apart_in_messages():
    rows = [Dataset.from_dict({"row": [3, 17], "input_ids": [[1], [2]]}) for _ in range(2)]
    mixed = join(number_rows(part, position) for position, part in enumerate(rows, start=1))
    assert shown_rows(mixed["row"][:]) == "3 of data set 1, 17 of data set 1, 3 of data set 2, 17 of data set 2"
    assert shown_rows([40, 3, *range(100, 140)], limit=3) == "3, 40, 100 and 39 more"


# ---- flags


TRAIN_LINE = "--do_train --model_name_or_path m --pre_seq_len 8 --output_dir o "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset a,b --mix_ratios 0.7", "has 1 numbers for 2 data sets"),
        ("--dataset a,b --mix_ratios 0.7,0", "--mix_ratios 0.7,0: expected a positive number for each"),
        ("--dataset a,b --mix_ratios 0.7,x", "--mix_ratios 0.7,x: expected a positive number"),
        ("--train_file t --mix_ratios 0.7,0.3", "mixes data sets: name them with --dataset"),
        ("--dataset a --dev_ratio 1", "--dev_ratio 1.0: expected a share from 0 up to 1"),
        ("--dataset a --dev_ratio 0.1 --validation_file v", "both name dev rows"),
        ("--train_file t --split validation", "--split validation is of data sets of a hub"),
        ("--dataset a --max_samples 0", "--max_samples 0: expected at least 1"),
        ("", "--do_train needs --train_file"),
        ("--dataset a --do_predict", "--do_predict needs --test_file"),
        ("--dataset a --eval_strategy steps", "needs --validation_file or --dev_ratio"),
        ("--train_file t --dev_ratio 0.1", "--prompt_column is missing"),
        ("--dataset a --do_predict --test_file t", "--prompt_column is missing"),
    ],
)
def test_flags_of_data_sets_that_contradict_each_other_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(shlex.split(TRAIN_LINE + line))


def test_a_command_line_of_chatglm_efficient_tuning_is_understood():
    line = "--dataset a,b --dataset_dir d --split train --max_samples 9 --dev_ratio 0.1 --evaluation_strategy steps"
    _, data_args, _, notes = parse_flags(shlex.split(TRAIN_LINE + line))
    assert (data_args.dataset, data_args.dataset_dir, data_args.max_samples) == ("a,b", "d", 9)
    assert (data_args.split, data_args.dev_ratio, notes) == ("train", 0.1, [])


def test_files_that_a_data_set_replaces_are_named():
    notes = parse_flags(shlex.split(TRAIN_LINE + "--train_file t.json --dataset a --mix_ratios 1"))[3]
    assert notes == ["--train_file t.json is not read: --dataset counts."]
    line = "--do_predict --test_file t.json --dataset a --model_name_or_path m --output_dir o"
    assert parse_flags(shlex.split(line))[3] == ["--test_file t.json is not read: --dataset counts."]


# ---- --check_data


@pytest.fixture
def weightless(tmp_path):
    """A base model's folder without its weights."""
    model = tmp_path / "weightless"
    model.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (model / name).write_bytes((TINY / name).read_bytes())
    return model


CHECK = {"check_data": True, "max_source_length": 64, "max_target_length": 64}


def test_checking_data_describes_every_file_and_reads_no_weights(folder, weightless, monkeypatch, capsys):
    settings = {**CHECK, "dataset": "adverts,talk", "dataset_dir": folder, "mix_ratios": "0.7,0.3"}
    settings.update(validation_file=SAMPLE / "dev.json", prompt_column="content", response_column="summary")
    run(monkeypatch, settings, model_name_or_path=weightless, max_eval_samples=7)
    output = capsys.readouterr().out
    assert "train: data set adverts\n60 rows read" in output and "train: data set talk\n20 rows read" in output
    assert "问：你好0\n\n答：⟦你好！ </s>⟧" in output
    assert "train: adverts 47 of 60 rows (70.1%), talk 20 of 20 rows (29.9%)." in output
    assert f"eval: {SAMPLE / 'dev.json'}\n7 rows read" in output
    assert "Nothing is wrong with these files." in output


def test_checking_the_data_of_a_whole_training_command_writes_nothing(weightless, monkeypatch, tmp_path, capsys):
    settings = {**TRAIN_SETTINGS, **CHECK, "model_name_or_path": weightless}
    run(monkeypatch, settings, output_dir=tmp_path / "run")
    assert "60 rows read" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_checking_data_finds_what_training_would_refuse(folder, weightless, monkeypatch):
    (folder / "talk.json").write_text(json.dumps([*TALK, {"instruction": 3, "output": "a"}]), encoding="utf-8")
    settings = {**CHECK, "model_name_or_path": weightless, "dataset_dir": folder}
    with pytest.raises(ValueError, match="talk.json row 21: column 'instruction'"):
        run(monkeypatch, settings, dataset="adverts,talk")


def test_checking_no_data_is_refused():
    with pytest.raises(ValueError, match="--check_data has nothing to read: give --train_file"):
        parse_flags(["--check_data", "--model_name_or_path", "m"])


# ---- runs


def test_a_run_on_mixed_data_sets_says_their_shares_and_has_dev_rows(folder, monkeypatch, capsys):
    settings = {**TRAIN_SETTINGS, "train_file": None, "prompt_column": None, "response_column": None}
    settings.update(max_train_samples=None, max_steps=1, eval_strategy="steps", eval_steps=1)
    mixture = {"dataset": "adverts,talk", "dataset_dir": folder, "mix_ratios": "0.7,0.3", "dev_ratio": 0.1}
    run(monkeypatch, settings, **mixture, output_dir=folder / "run")
    output = capsys.readouterr().out
    assert "train: adverts 47 of 60 rows (70.1%), talk 20 of 20 rows (29.9%)." in output
    assert "train: 60 rows, divided by --dev_ratio 0.1." in output and "eval: 7 rows, divided" in output
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)


def test_predictions_on_data_sets_name_data_set_and_row(folder, monkeypatch):
    settings = {**PREDICT_SETTINGS, "test_file": None, "max_predict_samples": None, "model_name_or_path": TINY}
    settings.update(max_source_length=64, do_sample=False, max_samples=2, val_max_target_length=8)
    run(monkeypatch, settings, dataset="talk,adverts", dataset_dir=folder, output_dir=folder / "run")
    lines = (folder / "run" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    places = [(line["dataset"], line["row"]) for line in map(json.loads, lines)]
    assert places == [("talk", 1), ("talk", 2), ("adverts", 1), ("adverts", 2)]


def test_dev_rows_of_a_file_are_the_same_in_a_later_evaluation(monkeypatch, tmp_path, capsys):
    settings = {**TRAIN_SETTINGS, "max_steps": 1, "dev_ratio": 0.1, "do_eval": True, "do_sample": False}
    run(monkeypatch, settings, output_dir=tmp_path / "run")
    later = {"do_eval": True, "train_file": SAMPLE / "train.json", "max_train_samples": 60, "dev_ratio": 0.1}
    later.update(do_sample=False, ptuning_checkpoint=tmp_path / "run" / "checkpoint-1", disable_tqdm=True)
    run(monkeypatch, later, output_dir=tmp_path / "later")
    first, second = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("run", "later"))
    assert first["eval_samples"] == second["eval_samples"] == 6
    assert first["eval_rouge-1"] == second["eval_rouge-1"]
