"""What the scripts say: their help, near misses of variables, runs that are not there, the words that were typed."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE, TINY
from support.runs import PREDICT_SETTINGS, TRAIN_SETTINGS, predictions, run
from support.shell import bash
from support.terminal import run_in_terminal

from common.script_words import in_words_typed, next_commands
from data.rows import read_rows

PROGRAM = (
    "import os, sys\nprint(*sys.argv[1:])\nprint(os.environ.get('PTUNING_EVALUATE'), os.environ.get('PTUNING_TALK'))\n"
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the scripts' folder with a main.py and a web_demo.py that print their words and the next commands."""
    shutil.copytree(ROOT / "ptuning", tmp_path / "ptuning", ignore=shutil.ignore_patterns("__pycache__", "*.bin"))
    for script in ROOT.glob("*.sh"):
        shutil.copy(script, tmp_path)
    for name in ("main.py", "web_demo.py"):
        (tmp_path / "ptuning" / name).write_text(PROGRAM)
    (tmp_path / "AdvertiseGen").symlink_to(ROOT / "AdvertiseGen")
    for step in (100, 200):
        (tmp_path / "output" / "mine" / f"checkpoint-{step}").mkdir(parents=True)
    return tmp_path


def starts(folder, command, **variables):
    """The finished process of a command there, on one process."""
    return bash(command, cwd=folder, NUM_GPUS=1, **variables)


# ---- before anything starts


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh", "web_demo.sh", "finetune.sh"])
def test_sh_is_told_to_be_bash(script):
    done = subprocess.run(["dash", ROOT / script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: use bash: bash {ROOT / script}\n"


def test_help_of_a_script_lists_the_flags_and_then_the_variables_with_their_defaults(folder):
    done = starts(folder, "bash finetune.sh --help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("--help\n")  # main.py's words
    lines = re.sub(" +", " ", done.stdout).splitlines()
    assert " MAX_STEPS optimizer steps [5000]" in lines and " DEV_ROWS first rows" in re.sub(" +", " ", done.stdout)
    assert sum(line.startswith(" LR ") for line in lines) == 2 and any(
        line.endswith("[1e-3 with lora]") for line in lines
    )


MISSES = {"BATCHSIZE": "BATCH_SIZE", "NUM_GPU": "NUM_GPUS", "model": "MODEL", "STEPS": None, "DATE": None}


@pytest.mark.parametrize(("name", "meant"), MISSES.items())
def test_a_variable_that_is_nearly_one_of_the_script_is_warned_of(name, meant, folder):
    done = starts(folder, "bash train.sh", MODEL="tiny", **{name: "4\x1b"})
    said = f"warning: {name}=$'4\\E' changes nothing: train.sh reads {meant}.\n"
    assert done.returncode == 0 and done.stderr == (said if meant else "")


@pytest.mark.parametrize("script", ["evaluate.sh", "web_demo.sh", "evaluate_finetune.sh"])
def test_a_run_that_is_not_there_is_said_with_those_that_are(script, folder):
    done = starts(folder, f"bash {script}", MODEL="tiny", CHECKPOINT="nosuch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: there is no run output/nosuch; runs there are: mine.\n"
        f"  Name one of them:  CHECKPOINT=mine bash {script}\n"
    )


def test_a_step_that_is_not_there_is_said_with_those_that_are(folder):
    done = starts(folder, "bash evaluate.sh", MODEL="tiny", CHECKPOINT="mine", STEP=7)
    assert done.returncode == 2
    assert done.stderr == "error: STEP=7: output/mine has no checkpoint of that step; its steps are: 100 200.\n"


def test_a_checkpoint_that_a_flag_names_needs_no_run(folder):
    done = starts(folder, "bash evaluate.sh --ptuning_checkpoint /old/run", MODEL="tiny", CHECKPOINT="nosuch")
    assert done.returncode == 0, done.stderr


# ---- own data


def words_of(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0].split()


def value_of(words, flag):
    return words[words.index(flag) + 1] if flag in words else None


def test_columns_are_variables_and_evaluation_takes_them_and_the_lengths_from_the_checkpoint(folder):
    own = {"MODEL": "tiny", "PROMPT_COLUMN": "q", "RESPONSE_COLUMN": "a", "HISTORY_COLUMN": "h"}
    words = words_of(starts(folder, "bash train.sh", **own))
    assert [value_of(words, f"--{name}_column") for name in ("prompt", "response", "history")] == ["q", "a", "h"]
    asked = ("--prompt_column", "--response_column", "--max_source_length", "--max_target_length")
    official = [
        value_of(words_of(starts(folder, "bash evaluate.sh", MODEL="tiny", CHECKPOINT="mine")), f) for f in asked
    ]
    assert official == ["content", "summary", "64", "64"]  # a checkpoint of the official scripts remembers nothing
    (folder / "output" / "mine" / "checkpoint-200" / "ptuning.json").write_text("{}")
    words = words_of(starts(folder, "bash evaluate.sh", MODEL="tiny", CHECKPOINT="mine"))
    assert [value_of(words, flag) for flag in asked] == [None] * 4
    words = words_of(starts(folder, "bash evaluate.sh", CHECKPOINT="mine", **own, MAX_TARGET_LENGTH=9))
    assert [value_of(words, flag) for flag in asked] == ["q", "a", None, "9"]


def test_data_may_have_other_formats(folder):
    data = folder / "data-of-mine"
    data.mkdir()
    for name in ("train.csv.gz", "dev.jsonl"):
        (data / name).write_bytes(b"")
    words = words_of(starts(folder, "bash train.sh", MODEL="tiny", DATA="data-of-mine"))
    assert value_of(words, "--train_file") == "data-of-mine/train.csv.gz"
    assert value_of(words, "--validation_file") == "data-of-mine/dev.jsonl"


def test_without_a_dev_file_a_share_of_the_training_rows_is_offered(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "train.json").write_bytes(b"")
    done = starts(folder, "bash train.sh", MODEL="tiny", DATA="mine")
    assert done.returncode == 2
    assert done.stderr.startswith("error: mine/dev.json does not exist (DATA=mine), nor dev.jsonl, dev.csv")
    assert done.stderr.endswith("  Hold out a part of the training rows instead:  DEV_RATIO=0.05 bash train.sh\n")
    words = words_of(starts(folder, "bash train.sh", MODEL="tiny", DATA="mine", DEV_RATIO="0.05"))
    assert value_of(words, "--dev_ratio") == "0.05" and "--validation_file" not in words


def held_out(folder, **files):
    """The folder of rows that the run `mine` has held out."""
    place = folder / "output" / "mine" / "held_out"
    place.mkdir()
    for name, value in files.items():
        (place / f"{name}.json").write_text(json.dumps(value, indent=2))
    return {"MODEL": "tiny", "CHECKPOINT": "mine"}


@pytest.mark.parametrize("script", ["evaluate.sh", "evaluate_finetune.sh"])
def test_rows_that_a_run_has_held_out_are_evaluated_where_they_are_asked_for_and_where_there_are_no_others(
    script, folder
):
    of_run, rows = held_out(folder, dev=[]), "output/mine/held_out/dev.json"
    (folder / "mine").mkdir()
    files = [
        value_of(words_of(starts(folder, f"bash {script}", **of_run, **more)), "--test_file")
        for more in ({}, {"DEV_RATIO": "0.05"}, {"DATA": "mine"}, {"DATA": "mine", "DEV_RATIO": "0.05"})
    ]
    assert files == ["AdvertiseGen/sample/dev.json", rows, rows, rows]
    words = words_of(starts(folder, f"bash {script}", **of_run, DEV_RATIO="0.05"))
    assert "--dev_ratio" not in words and value_of(words, "--validation_file") == rows
    done = starts(folder, f"bash {script} --ptuning_checkpoint other", **of_run, DATA="mine")
    assert done.stderr.startswith("error: mine/dev.json does not exist (DATA=mine)")  # not those of `mine`
    done = starts(folder, f"bash {script} --ptuning_checkpoint=other", **of_run, DEV_RATIO="0.05")
    assert done.returncode == 2 and "name the rows of its run:  DATA=RUN/held_out" in done.stderr


@pytest.mark.parametrize(
    "asked", [{"DEV_RATIO": "0.05"}, {"DATA": "output/mine/held_out"}, {"DATA": "nowhere"}], ids=str
)
def test_rows_held_out_of_several_data_sets_are_evaluated_by_their_names(asked, folder):
    info = {"b": {"file_name": "1.json", "columns": {"prompt": "x"}}, "a": {"file_name": "2.json"}}
    of_run = held_out(folder, dataset_info=info)
    words = words_of(starts(folder, "bash evaluate.sh", **of_run, **asked))
    assert (value_of(words, "--dataset"), value_of(words, "--dataset_dir")) == ("b,a", "output/mine/held_out")
    assert "--test_file" not in words and "--validation_file" not in words


def test_a_run_that_has_kept_no_rows_is_named_where_they_are_asked_for(folder):
    done = starts(folder, "bash evaluate.sh", MODEL="tiny", CHECKPOINT="mine", DEV_RATIO="0.05")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: DEV_RATIO=0.05: there is no output/mine/held_out, where a run keeps the rows")
    assert done.stderr.endswith(
        "  Leave DEV_RATIO out, and name a folder with dev.json:  DATA=FOLDER bash evaluate.sh\n"
    )
    done = starts(folder, "bash evaluate.sh", MODEL="tiny", CHECKPOINT="nosuch", DEV_RATIO="0.05")
    assert done.stderr.startswith("error: there is no run output/nosuch")


def test_the_command_behind_a_training_with_rows_held_out_evaluates_these(folder):
    done = starts(folder, "bash train.sh", MODEL="tiny", DATA="AdvertiseGen/sample", DEV_RATIO="0.05")
    assert done.stdout.splitlines()[1].startswith("DEV_RATIO=0.05 MODEL=tiny CHECKPOINT=? bash evaluate.sh MODEL=")


@pytest.mark.parametrize(("name", "text"), [("a.csv.gz", "q,a\n1,2\n"), ("a.jsonl.gz", '{"q": "1", "a": "2"}\n')])
def test_a_file_behind_gzip_is_read_as_what_is_in_it(name, text, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert read_rows(tmp_path / name) == [{"q": "1", "a": "2"}]


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"x" * 99)[:-9]], ids=["no gzip", "cut"])
def test_a_damaged_gzip_file_is_named(data, tmp_path):
    (tmp_path / "a.json.gz").write_bytes(data)
    with pytest.raises(ValueError, match="a.json.gz is no whole gzip file"):
        read_rows(tmp_path / "a.json.gz")


# ---- words that were typed


MESSAGES = {
    "--max_steps 0: expected at least 1": "MAX_STEPS=0: expected at least 1",
    "--max_steps 01 and --max_steps_more": "MAX_STEPS 01 and --max_steps_more",
    "did you mean --prompt_column 'a b'?": "did you mean PROMPT_COLUMN='a b'?",
    "Lower --max_steps.": "Lower MAX_STEPS.",
    "--seed 1": "--seed 1",
}


@pytest.mark.parametrize(("message", "shown"), MESSAGES.items())
def test_a_message_names_the_variable_that_set_a_flag(message, shown, monkeypatch):
    monkeypatch.setenv("PTUNING_FLAGS", "max_steps=MAX_STEPS=0\nprompt_column=PROMPT_COLUMN=a\\1=b\n")
    assert in_words_typed(message) == shown


def test_a_flag_that_was_typed_stays_a_flag():
    variables = {"MODEL": "tiny", "NUM_GPUS": 1}
    assert bash("bash train.sh", MAX_STEPS=0, **variables).stderr.startswith("error: MAX_STEPS=0: expected")
    assert bash("bash train.sh --max_steps 0", **variables).stderr.startswith("error: --max_steps 0: expected")


def test_a_variable_that_a_script_gives_in_some_ways_of_tuning_only_is_named_too():
    said = bash("bash train.sh", PRE_SEQ_LEN=0, MODEL="tiny", NUM_GPUS=1).stderr
    assert said.startswith("error: PRE_SEQ_LEN=0: expected at least 1 virtual token")
    said = bash("bash train.sh --finetuning_type lora", MODEL="tiny", NUM_GPUS=1).stderr
    assert said.startswith("error: PRE_SEQ_LEN=32 belongs to --finetuning_type p_tuning") and "finetune.sh" in said


def test_a_checkpoint_of_another_base_names_both_before_any_weight_is_read(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 28}))
    (tmp_path / "ptuning.json").write_text(json.dumps({"base_model": "THUDM/chatglm2-6b"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    words = [sys.executable, "ptuning/cli_demo.py", "--ptuning_checkpoint", tmp_path, "--model_name_or_path", TINY]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    said = f"was trained on THUDM/chatglm2-6b (num_layers 28). The base model here is {TINY} (num_layers 4)."
    assert done.stderr.startswith(f"error: {tmp_path} {said}")


# ---- what to do next

NEXT = {
    "the small model": ("train.sh", {"MODEL": "tiny"}, "MODEL=tiny CHECKPOINT=run", "", "evaluate.sh"),
    "other weights, other data": (
        "train.sh",
        {"MODEL": "./a b", "QUANTIZATION_BIT": "8", "DATA": "AdvertiseGen/sample"},
        "MODEL=./a\\ b CHECKPOINT=run QUANTIZATION_BIT=8",
        " DATA=AdvertiseGen/sample",
        "evaluate.sh",
    ),
    "finetuning": ("finetune.sh", {"MODEL": "tiny"}, "MODEL=tiny CHECKPOINT=run", "", "evaluate_finetune.sh"),
}


@pytest.mark.parametrize(("script", "variables", "both", "data", "evaluation"), NEXT.values(), ids=NEXT.keys())
def test_the_next_commands_have_the_variables_of_the_run(
    script, variables, both, data, evaluation, folder, monkeypatch
):
    done = starts(folder, f"bash {script}", **variables)
    assert done.stdout.splitlines()[1] == (
        f"{both.replace('=run', '=?')}{data} bash {evaluation} {both.replace('=run', '=?')} bash web_demo.sh"
    )
    monkeypatch.setenv("PTUNING_EVALUATE", "MODEL=tiny CHECKPOINT=? bash evaluate.sh")
    assert next_commands("output/my run") == {"evaluate": "MODEL=tiny CHECKPOINT='my run' bash evaluate.sh"}


@pytest.mark.slow
def test_the_end_of_both_scripts_says_what_to_do_and_where_the_answers_are(tmp_path):
    checkpoint = os.path.relpath(tmp_path, ROOT / "output")
    variables = {"MODEL": "tiny", "CHECKPOINT": checkpoint, "NUM_GPUS": "1"}
    short = {"MAX_STEPS": "2", "SAVE_STEPS": "2", "DEV_ROWS": "4", "MAX_TARGET_LENGTH": "20"}
    status, written = run_in_terminal(["bash", "train.sh", "--report_to", "none"], **variables, **short)
    assert status == 0, written[-3000:]
    answers, end = written.split("Drawing training_loss.png …")[1].split("Best and last checkpoint: ")
    assert answers.strip().startswith("General prompts, answered by base and tuned model; also in output/")
    end = end.strip().splitlines()
    assert end[0].startswith(f"output/{checkpoint}/checkpoint-2 (dev loss")
    assert end.pop(2).startswith("Forgetting: drift ")
    assert end[1:] == [
        f"Picture of the losses: output/{checkpoint}/training_loss.png",
        f"Evaluate it: MODEL=tiny CHECKPOINT={checkpoint} bash evaluate.sh",
        f"Talk to it: MODEL=tiny CHECKPOINT={checkpoint} bash web_demo.sh",
    ]
    done = bash(f"{end[2].removeprefix('Evaluate it: ')} --max_predict_samples 3 --do_sample false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\r" not in done.stdout + done.stderr and "\nScoring 3 answers …\n" in done.stdout
    named, *texts = done.stdout.split("\nThe answers are in ")[1].splitlines()
    assert named == f"output/{checkpoint}/generated_predictions.txt, one JSON object a line. The first two:"
    first = predictions(tmp_path)[0]
    assert texts[:2] == [f"  prompt     {first['prompt']}", f"  reference  {first['labels']}"] and len(texts) == 6
    settings = json.loads((tmp_path / "checkpoint-2" / "ptuning.json").read_text())
    assert settings["max_target_length"] == 20  # and so have the references, two special tokens included
    assert all(len(line["labels"]) <= 40 for line in predictions(tmp_path))


def test_predictions_carry_the_prompt_behind_the_official_keys(tmp_path, monkeypatch, capsys):
    settings = {**PREDICT_SETTINGS, **{name: TRAIN_SETTINGS[name] for name in ("prompt_column", "response_column")}}
    run(monkeypatch, settings, model_name_or_path=TINY, output_dir=tmp_path, max_predict_samples=2)
    rows = read_rows(SAMPLE / "dev.json")
    found = predictions(tmp_path)
    assert [list(line) for line in found] == [["labels", "predict", "prompt", "row"]] * 2
    assert [line["prompt"] for line in found] == [row["content"] for row in rows[:2]]
    assert "  prompt     " + rows[1]["content"] in capsys.readouterr().out
