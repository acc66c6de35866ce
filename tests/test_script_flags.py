"""The flags that each script gives to its program: by default, with variables in front, and after edits of the file."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAM = """import json, os, sys
print(json.dumps({"words": sys.argv[1:], "threads": os.environ.get("OMP_NUM_THREADS")}))
"""
DATA_FOLDERS = ("AdvertiseGen", "AdvertiseGen/sample", "data", "my rows")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A copy of the scripts, with programs that print their words, data files that nothing reads, and the runs named here."""
    folder = tmp_path_factory.mktemp("the project")
    shutil.copytree(ROOT / "ptuning", folder / "ptuning", ignore=shutil.ignore_patterns("__pycache__", "*.bin"))
    for file in ROOT.glob("*.sh"):
        shutil.copy(file, folder)
    for name in ("main.py", "web_demo.py", "train_web.py"):
        (folder / "ptuning" / name).write_text(PROGRAM)
    for name in DATA_FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in ("train.json", "dev.json"):
            (folder / name / file).write_text("")
    for run in re.findall(r"output/[\w./-]+", Path(__file__).read_text("utf-8")):
        (folder / run).mkdir(parents=True, exist_ok=True)
    return folder


def run(command, cwd, variables):
    environment = {"PATH": os.environ["PATH"], "NUM_GPUS": "1", **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def started(scripts, script, variables, words=(), folder=None):
    """What the program printed: its words and its number of threads."""
    done = run(["bash", str(folder / script) if folder else script, *words], "/" if folder else scripts, variables)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def by_flag(words):
    """{flag: its values}; no flag stands twice, so that their order means nothing."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            assert word not in flags
            flags[word] = []
        else:
            flags[list(flags)[-1]].append(word)
    return flags


# Recorded from the scripts when each of them still held its whole command.
TRAIN = """
--do_train --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json --eval_strategy steps
--eval_steps 1000 --eval_on_start --max_eval_samples 200 --preprocessing_num_workers 10 --prompt_column content
--response_column summary --model_name_or_path hub/glm --output_dir output/adgen-glm-pt-128-2e-2 --overwrite_output_dir
--max_source_length 64 --max_target_length 128 --per_device_train_batch_size 1 --per_device_eval_batch_size 8
--gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
--learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4 --general_file ptuning/forgetting/general.jsonl
"""
TRAIN_CHAT = """
--do_train --train_file data/train.json --validation_file data/dev.json --eval_strategy steps --eval_steps 1000
--eval_on_start --max_eval_samples 200 --preprocessing_num_workers 10 --prompt_column prompt --response_column response
--history_column history --model_name_or_path hub/glm --output_dir output/chat-glm-pt-128-1e-2 --overwrite_output_dir
--max_source_length 256 --max_target_length 256 --per_device_train_batch_size 1 --per_device_eval_batch_size 8
--gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
--learning_rate 1e-2 --pre_seq_len 128 --quantization_bit 4 --general_file ptuning/forgetting/general.jsonl
"""
FINETUNE = """
--do_train --finetuning_type full --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json
--eval_strategy steps --eval_steps 1000 --eval_on_start --max_eval_samples 200 --preprocessing_num_workers 10
--prompt_column content --response_column summary --model_name_or_path hub/glm --output_dir output/adgen-glm-full-1e-4
--overwrite_output_dir --max_source_length 64 --max_target_length 64 --per_device_train_batch_size 4
--per_device_eval_batch_size 8 --gradient_accumulation_steps 1 --predict_with_generate --max_steps 5000
--logging_steps 10 --save_steps 1000 --learning_rate 1e-4 --general_file ptuning/forgetting/general.jsonl
"""
TRAIN_PREFERENCE = """
--stage dpo --finetuning_type p_tuning --do_train --train_file data/train.json --validation_file data/dev.json
--eval_strategy steps --eval_steps 500 --eval_on_start --max_eval_samples 200 --preprocessing_num_workers 10
--prompt_column prompt --response_column response --history_column history --model_name_or_path hub/glm
--output_dir output/dpo-glm-p_tuning-5e-3 --overwrite_output_dir --max_source_length 256 --max_target_length 256
--per_device_train_batch_size 1 --per_device_eval_batch_size 8 --gradient_accumulation_steps 16
--predict_with_generate --max_steps 1000 --logging_steps 10 --save_steps 500 --learning_rate 5e-3 --pre_seq_len 128
--quantization_bit 4
"""
EVALUATE = """
--do_predict --validation_file AdvertiseGen/dev.json --test_file AdvertiseGen/dev.json --prompt_column content
--response_column summary --model_name_or_path hub/glm --ptuning_checkpoint output/adgen-glm-pt-128-2e-2
--output_dir output/adgen-glm-pt-128-2e-2 --overwrite_output_dir --max_source_length 64 --max_target_length 64
--predict_with_generate --quantization_bit 4
"""
EVALUATE_FINETUNE = """
--do_predict --validation_file AdvertiseGen/dev.json --test_file AdvertiseGen/dev.json --prompt_column content
--response_column summary --model_name_or_path hub/glm --checkpoint_dir output/adgen-glm-full-1e-4
--output_dir output/adgen-glm-full-1e-4 --overwrite_output_dir --max_source_length 256 --max_target_length 256
--predict_with_generate
"""
WEB_DEMO = """
--model_name_or_path hub/glm --ptuning_checkpoint output/adgen-glm-pt-128-2e-2 --server_name 0.0.0.0 --server_port 7860
--quantization_bit 4
"""
DEFAULTS = {
    "train.sh": TRAIN,
    "train_chat.sh": TRAIN_CHAT,
    "train_preference.sh": TRAIN_PREFERENCE,
    "finetune.sh": FINETUNE,
    "evaluate.sh": EVALUATE,
    "evaluate_finetune.sh": EVALUATE_FINETUNE,
    "web_demo.sh": WEB_DEMO,
    "train_web.sh": "--server_name 127.0.0.1 --server_port 7870",
}
SMALL_DATA = "--train_file AdvertiseGen/sample/train.json --validation_file AdvertiseGen/sample/dev.json"
SMALL_TRAINING = f"""{SMALL_DATA} --eval_steps 100 --max_eval_samples 240 --model_name_or_path ptuning/tiny
--max_target_length 64 --per_device_train_batch_size 16 --per_device_eval_batch_size 60 --gradient_accumulation_steps 1
--max_steps 200 --save_steps 100 --general_file AdvertiseGen/sample/general.json"""
SMALL_EVALUATION = """--validation_file AdvertiseGen/sample/dev.json --test_file AdvertiseGen/sample/dev.json
--model_name_or_path ptuning/tiny --max_source_length 64 --max_target_length 64 --per_device_eval_batch_size 60"""
RUN, CHAT_RUN, FULL_RUN = "output/adgen-tiny-pt-32-2e-2", "output/chat-tiny-pt-32-2e-2", "output/adgen-tiny-full-1e-4"
MINE = "--train_file 'my rows/train.json' --validation_file 'my rows/dev.json'"
# script, variables in front of it, what differs from DEFAULTS, flags that are not there
CASES = [
    ("train.sh", {}, "", ""),
    ("train_chat.sh", {}, "", ""),
    ("finetune.sh", {}, "", ""),
    ("evaluate.sh", {}, "", ""),
    ("evaluate_finetune.sh", {}, "", ""),
    ("web_demo.sh", {}, "", ""),
    ("train_web.sh", {}, "", ""),
    ("train_web.sh", {"PORT": "80"}, "--server_port 80", ""),
    ("train.sh", {"MODEL": "tiny"}, f"{SMALL_TRAINING} --output_dir {RUN} --pre_seq_len 32", "quantization_bit"),
    (
        "train_chat.sh",
        {"MODEL": "tiny"},
        f"{SMALL_TRAINING} --output_dir {CHAT_RUN} --pre_seq_len 32 --max_source_length 64 --learning_rate 2e-2",
        "quantization_bit",
    ),
    ("finetune.sh", {"MODEL": "tiny"}, f"{SMALL_TRAINING} --output_dir {FULL_RUN}", ""),
    (
        "evaluate.sh",
        {"MODEL": "tiny"},
        f"{SMALL_EVALUATION} --ptuning_checkpoint {RUN} --output_dir {RUN}",
        "quantization_bit",
    ),
    (
        "evaluate_finetune.sh",
        {"MODEL": "tiny"},
        f"{SMALL_EVALUATION} --checkpoint_dir {FULL_RUN} --output_dir {FULL_RUN}",
        "",
    ),
    (
        "web_demo.sh",
        {"MODEL": "tiny"},
        f"--model_name_or_path ptuning/tiny --ptuning_checkpoint {RUN}",
        "quantization_bit",
    ),
    # one variable after the other
    ("train.sh", {"DATA": "my rows"}, MINE, ""),
    ("train_chat.sh", {"DATA": "my rows"}, MINE, ""),
    ("finetune.sh", {"DATA": "my rows"}, MINE, ""),
    ("train_chat.sh", {"MODEL": "tiny", "DATA": "my rows", "LR": "1"}, f"{SMALL_TRAINING.replace(SMALL_DATA, MINE)} --pre_seq_len 32 "
     "--max_source_length 64 --learning_rate 1 --output_dir output/chat-tiny-pt-32-1", "quantization_bit"),
    ("train_chat.sh", {"LR": "5e-3", "PRE_SEQ_LEN": "64"},
     "--learning_rate 5e-3 --pre_seq_len 64 --output_dir output/chat-glm-pt-64-5e-3", ""),
    ("train_chat.sh", {"CHECKPOINT": "run", "MAX_STEPS": "7", "SAVE_STEPS": "3", "BATCH_SIZE": "2", "ACCUMULATION": "5"},
     "--output_dir output/run --max_steps 7 --save_steps 3 --eval_steps 3 --per_device_train_batch_size 2 "
     "--gradient_accumulation_steps 5", ""),
    ("train_chat.sh", {"MAX_SOURCE_LENGTH": "9", "MAX_TARGET_LENGTH": "8", "DEV_ROWS": "6", "EVAL_BATCH_SIZE": "5"},
     "--max_source_length 9 --max_target_length 8 --max_eval_samples 6 --per_device_eval_batch_size 5", ""),
    ("finetune.sh", {"MAX_STEPS": "7", "SAVE_STEPS": "3", "BATCH_SIZE": "2", "ACCUMULATION": "5", "LR": "1"},
     "--output_dir output/adgen-glm-full-1 --max_steps 7 --save_steps 3 --eval_steps 3 --per_device_train_batch_size 2 "
     "--gradient_accumulation_steps 5 --learning_rate 1", ""),
    ("train.sh", {"BATCH_SIZE": "auto"},
     "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --auto_find_batch_size", ""),
    ("finetune.sh", {"BATCH_SIZE": "auto", "ACCUMULATION": "9"},
     "--per_device_train_batch_size 9 --gradient_accumulation_steps 1 --auto_find_batch_size", ""),
    ("finetune.sh", {"BATCH_SIZE": "auto"},
     "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --auto_find_batch_size", ""),
    ("finetune.sh", {"FINETUNING_TYPE": "lora"},
     "--finetuning_type lora --learning_rate 1e-3 --output_dir output/adgen-glm-lora-1e-3", ""),
    ("finetune.sh", {"FINETUNING_TYPE": "lora", "QUANTIZATION_BIT": "4", "CHECKPOINT": "a b"},
     "--finetuning_type lora --learning_rate 1e-3 --output_dir 'output/a b' --quantization_bit 4", ""),
    ("finetune.sh", {"FINETUNING_TYPE": "freeze"}, "--finetuning_type freeze --output_dir output/adgen-glm-freeze-1e-4", ""),
    ("finetune.sh", {"ENGINE": "fsdp"}, "--fsdp 'full_shard auto_wrap'", ""),
    ("finetune.sh", {"ENGINE": "deepspeed"}, "--deepspeed ptuning/deepspeed.json", ""),
    ("finetune.sh", {"ENGINE": "zero3"}, "--deepspeed ptuning/deepspeed_zero3.json", ""),
    ("evaluate.sh", {"STEP": "2000", "LR": "1"},
     "--ptuning_checkpoint output/adgen-glm-pt-128-1/checkpoint-2000 --output_dir output/adgen-glm-pt-128-1", ""),
    ("evaluate_finetune.sh", {"STEP": "all", "CHECKPOINT": "run", "EVAL_BATCH_SIZE": "3"},
     "--checkpoint_dir output/run/all --output_dir output/run --per_device_eval_batch_size 3", ""),
    ("evaluate_finetune.sh", {"FINETUNING_TYPE": "lora", "STEP": "best"},
     "--checkpoint_dir output/adgen-glm-lora-1e-3/best --output_dir output/adgen-glm-lora-1e-3", ""),
    ("evaluate_finetune.sh", {"DATA": "my rows", "MAX_SOURCE_LENGTH": "9", "MAX_TARGET_LENGTH": "8"},
     "--validation_file 'my rows/dev.json' --test_file 'my rows/dev.json' --max_source_length 9 --max_target_length 8", ""),
    ("web_demo.sh", {"HOST": "127.0.0.1", "PORT": "80", "STEP": "best"},
     "--server_name 127.0.0.1 --server_port 80 --ptuning_checkpoint output/adgen-glm-pt-128-2e-2/best", ""),
    ("train_preference.sh", {}, "", ""),
    ("train_preference.sh", {"STAGE": "rm", "START": "output/a", "FINETUNING_TYPE": "lora"},
     "--stage rm --finetuning_type lora --ptuning_checkpoint output/a --learning_rate 1e-4 "
     "--output_dir output/rm-glm-lora-1e-4", "pre_seq_len"),
    # empty: the default, or no flag where the script says so
    ("train.sh", {"QUANTIZATION_BIT": "", "EVAL_BATCH_SIZE": "", "PRE_SEQ_LEN": ""}, "", "quantization_bit"),
    ("train_chat.sh", {"QUANTIZATION_BIT": "", "EVAL_BATCH_SIZE": "", "LR": ""}, "", "quantization_bit"),
    ("finetune.sh", {"EVAL_BATCH_SIZE": "", "LR": "", "ENGINE": "", "CHECKPOINT": ""}, "", ""),
    ("evaluate.sh", {"QUANTIZATION_BIT": "", "EVAL_BATCH_SIZE": "", "STEP": ""}, "", "quantization_bit"),
    ("evaluate_finetune.sh", {"EVAL_BATCH_SIZE": "", "STEP": "", "MAX_SOURCE_LENGTH": ""}, "", ""),
    # variables of another script mean nothing
    ("train.sh", {"FINETUNING_TYPE": "lora", "ENGINE": "fsdp", "STEP": "5"}, "", ""),
    ("train_chat.sh", {"FINETUNING_TYPE": "lora", "ENGINE": "fsdp", "STEP": "5"}, "", ""),
    ("finetune.sh", {"PRE_SEQ_LEN": "16", "STEP": "5"}, "", ""),
    ("evaluate.sh", {"FINETUNING_TYPE": "lora", "NNODES": "2"}, "", ""),
    ("evaluate_finetune.sh", {"PRE_SEQ_LEN": "16", "QUANTIZATION_BIT": "8", "NNODES": "2"}, "", ""),
]  # fmt: skip


def expected_flags(script, changed="", absent=""):
    flags = {**by_flag(shlex.split(DEFAULTS[script])), **by_flag(shlex.split(changed))}
    return {flag: values for flag, values in flags.items() if flag[2:] not in absent.split()}


@pytest.mark.parametrize(("script", "variables", "changed", "absent"), CASES)
def test_variables_become_the_flags_that_they_became_before(script, variables, changed, absent, scripts):
    words = started(scripts, script, {"MODEL": "hub/glm", **variables})["words"]
    assert by_flag(words) == expected_flags(script, changed, absent)


@pytest.mark.parametrize("script", DEFAULTS)
def test_further_words_reach_the_program_last_and_as_they_are(script, scripts):
    further = ["--seed", "1", "--learning_rate", "1", "--source_prefix", "“a”  b", "", "$HOME *"]
    words = started(scripts, script, {"MODEL": "hub/glm"}, further)["words"]
    assert by_flag(words[: -len(further)]) == expected_flags(script)
    assert words[-len(further) :] == further


@pytest.mark.parametrize("words", [["--device_map", "auto"], ["--device_map=auto"]], ids=str)
def test_a_model_that_is_spread_over_the_gpus_is_evaluated_by_one_process(words, scripts):
    said = started(scripts, "evaluate.sh", {"MODEL": "hub/glm", "NUM_GPUS": "4"}, words)
    assert said["words"][-len(words) :] == words and said["threads"] is None


@pytest.mark.parametrize("script", DEFAULTS)
def test_a_script_may_be_started_from_another_folder(script, scripts):
    words = started(scripts, script, {"MODEL": "hub/glm"}, folder=scripts)["words"]
    assert by_flag(words) == expected_flags(script)


@pytest.mark.parametrize("script", [script for script in DEFAULTS if script != "train_web.sh"])  # which has no model
def test_only_the_small_model_keeps_to_one_thread(script, scripts):
    assert started(scripts, script, {"MODEL": "tiny"})["threads"] == "1"
    assert started(scripts, script, {"MODEL": "tiny", "OMP_NUM_THREADS": "3"})["threads"] == "3"
    assert started(scripts, script, {"MODEL": "hub/glm"})["threads"] is None


SMALL = {script: flags for script, variables, flags, _ in CASES if variables == {"MODEL": "tiny"}}


def with_edit(text, line):
    """A script's text with the variable's line replaced, or added where the script leaves it to another."""
    name = line.split("=")[0]
    edited, count = re.subn(rf"^{name}=.*$", lambda match: line, text, count=1, flags=re.MULTILINE)
    return edited if count else re.sub(r"^MODEL=", lambda match: f"{line}\nMODEL=", text, count=1, flags=re.MULTILINE)


# script, line of a variable as a user writes it into the script, what differs from DEFAULTS, flags that are not there
EDITS = [
    ("train.sh", "LR=1", "--learning_rate 1 --output_dir output/adgen-glm-pt-128-1", ""),
    ("train_chat.sh", "LR=1", "--learning_rate 1 --output_dir output/chat-glm-pt-128-1", ""),
    ("train_chat.sh", "EVAL_BATCH_SIZE=3", "--per_device_eval_batch_size 3", ""),
    ("train_chat.sh", "QUANTIZATION_BIT=", "", "quantization_bit"),
    ("train_chat.sh", "DATA='my rows'", MINE, ""),
    ("train_chat.sh", "CHECKPOINT=run", "--output_dir output/run", ""),
    ("train_chat.sh", "MAX_STEPS=7", "--max_steps 7", ""),
    ("train_chat.sh", "MODEL=tiny", SMALL["train_chat.sh"], "quantization_bit"),
    ("finetune.sh", "MAX_STEPS=${MAX_STEPS:-7}", "--max_steps 7", ""),
    ("finetune.sh", "SAVE_STEPS=7", "--save_steps 7 --eval_steps 7", ""),
    ("finetune.sh", "ENGINE=zero3", "--deepspeed ptuning/deepspeed_zero3.json", ""),
    ("finetune.sh", "MODEL=tiny", SMALL["finetune.sh"], ""),
    ("evaluate.sh", "STEP=best", "--ptuning_checkpoint output/adgen-glm-pt-128-2e-2/best", ""),
    ("evaluate_finetune.sh", "STEP=best", "--checkpoint_dir output/adgen-glm-full-1e-4/best", ""),
    ("evaluate_finetune.sh", "EVAL_BATCH_SIZE=3", "--per_device_eval_batch_size 3", ""),
    ("evaluate_finetune.sh", "MAX_TARGET_LENGTH=3", "--max_target_length 3", ""),
    ("web_demo.sh", "PORT=80", "--server_port 80", ""),
]


@pytest.mark.parametrize(("script", "line", "changed", "absent"), EDITS)
def test_a_variable_may_be_changed_in_the_script(script, line, changed, absent, scripts):
    file = scripts / script
    text = file.read_text("utf-8")
    file.write_text(with_edit(text, line), "utf-8")
    try:
        words = started(scripts, script, {"MODEL": "hub/glm"})["words"]
    finally:
        file.write_text(text, "utf-8")
    assert by_flag(words) == expected_flags(script, changed, absent)


MISTAKES = {
    "no model": ({}, "error: MODEL is not set. Which model?\n"),
    "no data": ({"MODEL": "hub/glm", "DATA": "nowhere"}, "error: nowhere/"),
    "no model and no such engine": ({"ENGINE": "zero4"}, "error: MODEL is not set. Which model?\n"),
    "no data and no such engine": ({"MODEL": "hub/glm", "DATA": "nowhere", "ENGINE": "zero4"}, "error: nowhere/"),
    "no process": ({"MODEL": "hub/glm", "NUM_GPUS": "0"}, "error: NUM_GPUS=0: expected"),
}


@pytest.mark.parametrize("script", [script for script in DEFAULTS if script not in ("web_demo.sh", "train_web.sh")])
@pytest.mark.parametrize(("variables", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_the_first_mistake_is_said_once(variables, message, script, scripts):
    done = run(["bash", script], scripts, variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("error: ") == 1


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_a_command_that_ends_too_early_stops_whichever_line_ends_it(script, scripts):
    file = scripts / script
    text = file.read_text("utf-8")
    command = [line for line in text.splitlines() if line.endswith(" \\")]
    try:
        for line in command:
            file.write_text(text.replace(f"\n{line}\n", f"\n{line.removesuffix(' ' + chr(92))}\n"), "utf-8")
            done = run(["bash", script], scripts, {"MODEL": "hub/glm"})
            assert (done.returncode, done.stdout) == (2, ""), line
            assert "this line is not part of the command, which has ended above it" in done.stderr
    finally:
        file.write_text(text, "utf-8")
