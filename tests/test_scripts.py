"""train.sh and evaluate.sh as a user runs them, and main.py under torchrun with several processes."""

import json
import os
import re
import shlex

import pytest
from conftest import ROOT, SAMPLE, TINY
from support.command_lines import EVALUATE, TRAIN
from support.runs import predictions
from support.shell import bash

pytestmark = pytest.mark.slow


def torchrun(processes, words):
    return f"torchrun --standalone --nnodes=1 --nproc-per-node={processes} {shlex.join(map(str, words))}"


def test_train_and_evaluate_on_the_tiny_model_learn(tmp_path):
    # The defaults of MODEL=tiny, in a run of the test's own; evaluate.sh takes its best checkpoint.
    run = os.path.relpath(tmp_path, ROOT / "output")  # CHECKPOINT is a name in output/
    done = bash("bash train.sh --logging_steps 50", MODEL="tiny", CHECKPOINT=run)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    dev_losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert dev_losses[200] <= 0.75 * dev_losses[0]
    assert os.readlink(tmp_path / "best") == f"checkpoint-{min(dev_losses, key=dev_losses.get)}"

    tuned = bash(f"bash evaluate.sh --output_dir {tmp_path}/tuned", MODEL="tiny", CHECKPOINT=run)
    assert tuned.returncode == 0, tuned.stderr[-3000:]
    assert f"/{os.readlink(tmp_path / 'best')}.\n" in tuned.stdout
    untuned = bash(
        f"python ptuning/main.py --do_predict --test_file {SAMPLE}/dev.json --prompt_column content "
        f"--response_column summary --model_name_or_path {TINY} --max_source_length 64 --max_target_length 64 "
        f"--per_device_eval_batch_size 60 --output_dir {tmp_path}/untuned"
    )
    assert untuned.returncode == 0, untuned.stderr[-3000:]
    results = [
        json.loads((tmp_path / name / "predict_results.json").read_text())["predict_bleu-4"]
        for name in ("tuned", "untuned")
    ]
    assert results[0] >= 2 * results[1]


@pytest.mark.parametrize("scripts", [("train.sh", "evaluate.sh"), ("finetune.sh", "evaluate_finetune.sh")])
def test_the_scripts_defaults_find_each_others_run(scripts):
    # evaluate.sh looks where train.sh wrote: the two name the run by the same rule.
    names = [re.search(r"CHECKPOINT:-(.+)} #", (ROOT / script).read_text())[1] for script in scripts]
    assert names[0] == names[1]


@pytest.mark.parametrize(("method", "file"), [("full", "pytorch_model.bin"), ("lora", "adapter_model.safetensors")])
def test_finetune_and_its_evaluation_work_on_the_tiny_model(method, file, tmp_path):
    variables = {"MODEL": "tiny", "FINETUNING_TYPE": method, "CHECKPOINT": os.path.relpath(tmp_path, ROOT / "output")}
    short = {"MAX_STEPS": 2, "SAVE_STEPS": 2, "DEV_ROWS": 8}
    done = bash("bash finetune.sh --max_train_samples 64 --report_to none", **variables, **short)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "checkpoint-2" / file).is_file()
    done = bash("bash evaluate_finetune.sh --max_predict_samples 4", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(predictions(tmp_path)) == 4


def test_an_unknown_engine_is_named():
    done = bash("bash finetune.sh", MODEL="tiny", ENGINE="zero4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: ENGINE=zero4: expected fsdp, deepspeed, zero3, or nothing.\n"


STEPS = {"3000": "/checkpoint-3000", "best": "/best", "last": "/last", "all": "/all", "": ""}


@pytest.mark.parametrize(("step", "place"), STEPS.items())
def test_step_is_a_number_or_a_word_or_left_to_the_program(step, place):
    done = bash("source ptuning/common.sh; checkpoint_of_step", STEP=step, CHECKPOINT="run")
    assert done.stdout == f"output/run{place}\n"


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh", "train_chat.sh"])
def test_without_a_model_the_script_says_where_to_get_one(script):
    done = bash(f"bash {script}")
    assert done.returncode == 2
    for hint in ("THUDM/chatglm2-6b", "HF_ENDPOINT", "modelscope", "./chatglm2-6b", "MODEL=tiny bash train.sh"):
        assert hint in done.stderr


def test_without_data_the_script_says_where_to_get_it():
    done = bash("bash train.sh", MODEL=TINY, DATA="nowhere")
    assert done.returncode == 2
    for hint in ("nowhere/train.json does not exist", "AdvertiseGen/download.sh", "MODEL=tiny bash train.sh"):
        assert hint in done.stderr


def test_a_mistake_under_torchrun_ends_in_one_message_and_status_2(tmp_path):
    done = bash(f"bash train.sh --output_dir {tmp_path}/run --prompt_column contents", MODEL="tiny")
    assert done.returncode == 2
    assert "did you mean --prompt_column content?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


BAD_MACHINES = {
    "no rank": ({"NNODES": 2, "MASTER_ADDR": "10.0.0.1"}, "NNODES=2 needs NODE_RANK"),
    "rank too high": ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "10.0.0.1"}, "it counts from 0 to 1"),
    "no address": ({"NNODES": 2, "NODE_RANK": 0}, "NNODES=2 needs MASTER_ADDR"),
    "no number of machines": ({"NNODES": "two"}, "NNODES=two: expected a whole number, at least 1"),
    "no process": ({"NUM_GPUS": 0}, "NUM_GPUS=0: expected a whole number, at least 1"),
}


@pytest.mark.parametrize(("variables", "message"), BAD_MACHINES.values(), ids=BAD_MACHINES.keys())
def test_variables_of_several_machines_that_make_no_sense_are_one_message(variables, message):
    done = bash("bash train.sh", MODEL="tiny", **variables)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0,1,2", 3), ("GPU-1a2b,GPU-3c4d", 2), ("", 1), ("-1", 1)],
    ids=["0,1,2", "names", "none", "-1"],
)
def test_processes_are_as_many_as_the_visible_gpus(visible, count):
    done = bash("source ptuning/common.sh && count_gpus", CUDA_VISIBLE_DEVICES=visible)
    assert done.stdout == f"{count}\n"


def test_train_chat_trains_on_histories(tmp_path):
    rows = [
        {"prompt": "再短一点", "response": "好的。", "history": [["写一句话", "白色的杯子很好看。"]]},
        {"prompt": "你好", "response": "你好！", "history": []},
    ]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    done = bash(f"bash train_chat.sh --max_steps 2 --output_dir {tmp_path}/run", MODEL="tiny", DATA=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[Round 2]" in done.stdout


def replaced(line, **values):
    """An official command line with some flags' values replaced."""
    words = shlex.split(line)
    for name, value in values.items():
        words[words.index(f"--{name}") + 1] = str(value)
    return words


OFFICIAL = {"processes": 1, "bits": (4, 4), "train": {}, "inside": False, "predictions": ""}
RUNS = {
    "official scripts, from the project root": OFFICIAL,
    "official scripts, from inside ptuning/": {**OFFICIAL, "inside": True},
    "a user's run on several GPUs": {
        "processes": 2,
        "bits": (8, 4),
        "train": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        "inside": False,
        "predictions": "evaluate_output",
    },
}


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS.keys())
def test_the_command_lines_of_2023_run(case, tmp_path):
    program, folder = ("main.py", ROOT / "ptuning") if case["inside"] else ("ptuning/main.py", ROOT)
    settings = {"model_name_or_path": TINY, "validation_file": SAMPLE / "dev.json"}
    train = {**settings, "train_file": SAMPLE / "train.json", "output_dir": tmp_path, "max_steps": 1, **case["train"]}
    words = replaced(TRAIN, quantization_bit=case["bits"][0], **train)
    done = bash(torchrun(case["processes"], [program, *words, "--max_train_samples", 40]), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    evaluate = {
        **settings,
        "test_file": SAMPLE / "dev.json",
        "output_dir": tmp_path / case["predictions"],
        "ptuning_checkpoint": tmp_path / "checkpoint-1",
    }
    words = replaced(EVALUATE, quantization_bit=case["bits"][1], **evaluate)
    done = bash(torchrun(case["processes"], [program, *words, "--max_predict_samples", 3]), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(predictions(tmp_path / case["predictions"])) == 3
