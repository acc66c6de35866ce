"""Settings of the page become one command, and a stranger's text never becomes another one."""

import gzip
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE

from board.commands import (
    EMPTY,
    PRESETS,
    Command,
    checked_settings,
    evaluation_command,
    export_command,
    extra_words,
    load_settings,
    script_variables,
    training_command,
)
from board.files import MAX_TEXT, Roots, columns_of, guessed, keep_upload, link_rows, place_file, run_name
from data.dataset_info import read_dataset_info

ROOTS = Roots([ROOT])


@pytest.fixture
def rows(tmp_path):
    """A file of rows with columns of its own, in an allowed folder; the roots that allow it."""
    file = tmp_path / "my rows.jsonl"
    file.write_text("".join(json.dumps({"问": f"q{n}", "答": f"a{n}"}, ensure_ascii=False) + "\n" for n in range(30)))
    return file, Roots([ROOT, tmp_path])


def source(file, **columns):
    return {"path": str(file), "prompt": "问", "response": "答", "history": "", "messages": "", "share": "", **columns}


def test_a_preset_becomes_the_command_that_the_readme_shows():
    name, command = training_command({**EMPTY, **PRESETS["tiny"], "data": str(SAMPLE), "name": "mine"}, ROOTS)
    assert name == "mine"
    assert command.text == (
        "MODEL=tiny DATA=AdvertiseGen/sample MAX_STEPS=200 BATCH_SIZE=16 ACCUMULATION=1 LR=2e-2 PRE_SEQ_LEN=32 "
        "MAX_SOURCE_LENGTH=64 MAX_TARGET_LENGTH=64 SAVE_STEPS=100 NUM_GPUS=1 QUANTIZATION_BIT= CHECKPOINT=mine bash train.sh"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_programs_own_checks(preset):
    assert training_command({**EMPTY, **PRESETS[preset], "data": str(SAMPLE)}, ROOTS)[1].variables["CHECKPOINT"]


def test_rows_with_other_columns_are_linked_and_named(rows, tmp_path):
    file, roots = rows
    _, command = training_command({**EMPTY, "sources": [source(file)], "dev_ratio": "0.1"}, roots, tmp_path)
    folder = command.variables["DATA"]
    assert os.path.samefile(f"{folder}/train.jsonl", file)
    assert {name: command.variables[name] for name in ("PROMPT_COLUMN", "RESPONSE_COLUMN", "DEV_RATIO")} == {
        "PROMPT_COLUMN": "问",
        "RESPONSE_COLUMN": "答",
        "DEV_RATIO": "0.1",
    }
    assert link_rows([{k: v for k, v in source(file).items() if k != "share"}], None, tmp_path).samefile(folder)


def test_a_folder_keeps_its_place_and_names_its_columns(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "dev.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "other.jsonl").write_text('{"q": "a", "a": "b"}\n')
    roots, row = Roots([ROOT, tmp_path]), source(tmp_path / "train.jsonl", prompt="q", response="a")
    chosen = {**EMPTY, "data": str(tmp_path), "sources": [row], "dev": str(tmp_path / "dev.jsonl")}
    variables = training_command(chosen, roots, tmp_path)[1].variables
    assert (variables["DATA"], variables["PROMPT_COLUMN"], variables["RESPONSE_COLUMN"]) == (str(tmp_path), "q", "a")
    other = {**chosen, "dev": str(tmp_path / "other.jsonl")}  # a dev file that the folder does not hold under that name
    folder = training_command(other, roots, tmp_path)[1].variables["DATA"]
    assert os.path.samefile(f"{folder}/dev.jsonl", tmp_path / "other.jsonl")


def test_a_run_to_start_from_may_be_called_by_its_name(tmp_path):
    (tmp_path / "mine").mkdir()
    settings = {**EMPTY, "data": str(SAMPLE), "start": "mine"}
    _, command = training_command(settings, Roots([ROOT, tmp_path]), tmp_path)
    assert command.words == ["--ptuning_checkpoint", str(tmp_path / "mine")]


def test_several_files_are_mixed_with_their_shares(rows, tmp_path):
    file, roots = rows
    sources = [source(file, share="0.7"), source(file, prompt="答", response="问", share="0.3")]
    _, command = training_command({**EMPTY, "sources": sources, "dev_ratio": "0.1"}, roots, tmp_path)
    assert command.words[:2] == ["--dataset", "a,b"] and command.words[-2:] == ["--mix_ratios", "0.7,0.3"]
    described = json.loads((tmp_path / command.words[3] / "dataset_info.json").read_text())
    assert described["b"] == {"file_name": "b.jsonl", "columns": {"prompt": "答", "response": "问"}}
    found, _ = read_dataset_info(tmp_path / command.words[3], "a,b")  # as the run reads them
    assert [Path(each["path"]).read_bytes() for each in found.values()] == [file.read_bytes()] * 2


def test_a_file_that_is_mixed_in_follows_its_source_on_another_disk_too(rows, tmp_path, monkeypatch):
    file, place = rows[0], tmp_path / "a.jsonl"

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    place.symlink_to(file)  # which would lead out of its folder
    for link in (os.link, refuse):
        monkeypatch.setattr("board.files.os.link", link)
        for text in ("one", "another"):
            file.unlink()
            file.write_text(text)
            place_file(place, file)
            place_file(place, file)  # nothing to do
            assert place.read_text() == text and not place.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", file.name]


@pytest.mark.parametrize(
    ("settings", "program", "variables"),
    [
        ({"method": "lora"}, "finetune.sh", {"FINETUNING_TYPE": "lora"}),
        ({"stage": "dpo"}, "train_preference.sh", {"STAGE": "dpo", "FINETUNING_TYPE": "p_tuning"}),
        ({"epochs": "2"}, "train.sh", {"MAX_STEPS": "-1"}),
    ],
)
def test_method_and_stage_choose_the_script(settings, program, variables):
    _, command = training_command({**EMPTY, "data": str(SAMPLE), **settings}, ROOTS)
    assert command.program == ["bash", program] and variables.items() <= command.variables.items()


def test_settings_come_back_from_their_file(tmp_path):
    settings = checked_settings({"model": "tiny", "lr": "1e-3", "extra": "seed = 7"})
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert load_settings(tmp_path / "settings.json") == settings


def test_nothing_that_the_scripts_read_comes_in_unseen():
    assert {"MODEL", "LR", "CHECKPOINT", "with_prefix", "checkpoint_flag", "STAGE"} <= script_variables()


def test_columns_are_offered_and_guessed(rows):
    columns, first, count = columns_of(rows[0])
    assert (columns, count, first[0]) == (["问", "答"], 30, {"问": "q0", "答": "a0"})
    assert guessed(["instruction", "output"]) == {
        "prompt": "instruction",
        "response": "output",
        "history": "",
        "messages": "",
    }


def test_a_file_that_unpacks_to_a_great_deal_is_not_read(tmp_path):
    with gzip.open(tmp_path / "bomb.json.gz", "wb", compresslevel=1) as file:
        for _ in range(65):
            file.write(bytes(2**20))
    assert columns_of(tmp_path / "bomb.json.gz") == ([], [], None)
    (tmp_path / "half.csv.gz").write_bytes((tmp_path / "bomb.json.gz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="no whole gzip file"):
        columns_of(tmp_path / "half.csv.gz")


# ---- what a stranger sends

HOSTILE = [
    ({"model": "$(touch pwned)"}, "there is no such folder"),
    ({"model": "../../../etc"}, "leads out of the folders"),
    ({"model": "/etc"}, "leads out of the folders"),
    ({"model": "--help"}, "there is no such folder"),
    ({"model": "a\nb"}, "line break"),
    ({"model": "x" * (MAX_TEXT + 1)}, "at most 500"),
    ({"model": ["tiny"]}, "a text or a number"),
    ({"name": "../evil"}, "The name of the run"),
    ({"name": "-rf"}, "The name of the run"),
    ({"name": "a b; rm -rf /"}, "The name of the run"),
    ({"name": ".lock"}, "The name of the run"),
    ({"name": "_uploads"}, "The name of the run"),
    ({"data": "~root"}, "leads out of the folders"),
    ({"data": "output/../../x"}, "leads out of the folders"),
    ({"lr": "1e-3 --output_dir /tmp"}, "learning_rate"),
    ({"steps": "$(id)"}, "max_steps"),
    ({"steps": "--do_predict"}, "max_steps"),
    ({"gpus": "99999"}, "GPUs"),
    ({"gpus": "٣"}, "GPUs"),
    ({"family": "chatglm9"}, "family 'chatglm9': expected one of"),
    ({"model": "a/.."}, "config.json is missing"),
    ({"start": "--debug"}, "no run and no checkpoint"),
    ({"start": "$(id)"}, "no run and no checkpoint"),
    ({"start": "/etc"}, "leads out of the folders"),
    ({"dev": "no-such.json"}, "dev file no-such.json does not exist"),
    ({"dev": "/etc/passwd"}, "leads out of the folders"),
    ({"data": "", "dev": "AdvertiseGen/sample/dev.json"}, "A dev file alone"),
    ({"bits": "16"}, "bits '16': expected one of 8, 4"),
    ({"method": "rm -rf"}, "method 'rm -rf': expected one of"),
    ({"stage": "'; drop"}, "stage .*: expected one of"),
    ({"extra": "output_dir = /tmp/x"}, "field of its own"),
    ({"extra": "nosuch = 1"}, "none of main.py's"),
    ({"extra": "deepspeed = /etc/passwd"}, "leads out of the folders"),
    ({"extra": "cache_dir = ../../x"}, "leads out of the folders"),
    ({"extra": "seed = --debug"}, "seed"),
    ({"extra": "seed = 1\n" * 61}, "at most 60"),
    ({"sources": "x"}, "a list"),
    ({"sources": [{"path": "/etc/passwd"}]}, "leads out of the folders"),
    ({"sources": [{"path": "AdvertiseGen/sample/train.json", "prompt": "--help"}]}, "begins with -"),
    ({"sources": [{"path": "x"}] * 9}, "at most 8"),
    ({"evil": "1"}, "does not know"),
]


@pytest.mark.parametrize(("settings", "message"), HOSTILE, ids=[str(one)[:40] for one, _ in HOSTILE])
def test_what_cannot_be_meant_is_refused_with_a_message(settings, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training_command({**EMPTY, "data": "" if "sources" in settings else str(SAMPLE), **settings}, ROOTS, tmp_path)


def test_a_link_out_of_the_allowed_folders_is_followed_before_it_is_judged(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out of the folders"):
        Roots([tmp_path / "inside"]).checked(str(tmp_path / "inside" / "link"), "The file")


def test_quotes_and_dollars_in_a_value_stay_one_word():
    value = 'it\'s $(id) `id` "x" ; rm'
    words = extra_words(f"source_prefix = {value}\nrun_name = --debug\nlabel_names = a b", ROOTS)
    assert words == ["--source_prefix", value, "--run_name=--debug", "--label_names", "a", "b"]
    assert Command(["bash", "train.sh"], {"LR": value}, ["--source_prefix", value]).text.count("'\"'\"'s $(id)") == 2


def test_an_evaluation_and_an_export_name_the_run_and_its_checkpoint(tmp_path):
    run = tmp_path / "mine"
    (run / "checkpoint-3").mkdir(parents=True)
    command = evaluation_command(run, "3", str(SAMPLE), "8", {"MODEL": "tiny"}, ROOTS)
    assert command.text == (
        "MODEL=tiny CHECKPOINT=mine STEP=3 QUANTIZATION_BIT= DATA=AdvertiseGen/sample bash evaluate.sh "
        "--max_predict_samples 8"
    )
    other = evaluation_command(run, "3", str(SAMPLE), "8", {}, ROOTS, ("问", "答", None, "对话"))
    assert (other.variables["PROMPT_COLUMN"], other.variables["RESPONSE_COLUMN"]) == ("问", "答")
    assert other.words == ["--messages_column", "对话", "--max_predict_samples", "8"]
    with pytest.raises(ValueError, match="begins with -"):
        evaluation_command(run, "3", "", "", {}, ROOTS, ("--help", "", "", ""))
    words = export_command(run, "3", "", tmp_path / "out").words
    assert words == ["--ptuning_checkpoint", f"{run}/checkpoint-3", "--output_dir", f"{tmp_path}/out"]
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export_command(tmp_path / "new", "", "", tmp_path / "out")
    for step in ("../x", "4", "$(id)", "best; id"):
        with pytest.raises(ValueError):
            export_command(run, step, "", tmp_path / "out")
    with pytest.raises(ValueError, match="a step, best, last or all"):
        evaluation_command(run, "--help", "", "", {}, ROOTS)


@pytest.mark.parametrize("kept", ["dev.json", "dataset_info.json"])
def test_an_evaluation_takes_the_rows_that_a_run_has_held_out_wherever_it_was_started(kept, tmp_path):
    held_out = tmp_path / "mine" / "held_out"
    held_out.mkdir(parents=True)
    (held_out / kept).write_text('{"a": {}}')
    for variables in ({}, {"DATA": "AdvertiseGen/sample", "DEV_RATIO": "0.05"}):
        command = evaluation_command(tmp_path / "mine", "", "", "", variables, Roots([tmp_path]))
        assert command.variables["DATA"] == str(held_out)


def test_held_out_rows_that_lead_elsewhere_are_refused(tmp_path):
    for folder in ("inside/mine", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "outside" / "dev.json").write_text("{}")
    (tmp_path / "inside" / "mine" / "held_out").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out of the folders"):
        evaluation_command(tmp_path / "inside" / "mine", "", "", "", {}, Roots([tmp_path / "inside"]))


@pytest.mark.parametrize("name", ["../../x.json", "a/b/..\\c.json", "<img src=x>.csv", "-x.jsonl", ".hidden.json"])
def test_an_upload_keeps_its_name_made_harmless(name, tmp_path):
    file = tmp_path / "incoming"
    file.write_text("{}")
    kept = keep_upload(file, name, tmp_path)
    assert kept.parent.parent == tmp_path / "_uploads" and kept.is_file()
    assert not set(kept.name) & set("/\\<> ") and kept.name[0] not in "-."
    assert run_name("运行-1") == "运行-1"


def test_an_upload_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "incoming"
    file.write_text("x")
    with pytest.raises(ValueError, match="expected a name that ends in"):
        keep_upload(file, "x.sh", tmp_path)
