"""Bad input of every kind: each ends within seconds, in one message that names the culprit, and damages nothing.

The tables say what is wrong, how it is made, and what the message must contain. Programs run as forks of a process
that has everything imported (forked.py); a few start as a user starts them. What fuzz.py found is at the ends of the
tables.
"""

import codecs
import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE, TINY
from forked import Forks
from safetensors.torch import load_file, save_file

from checkpoints.run_folder import CHECKSUM_FILE

TRAIN = {
    "do_train": True,
    "prompt_column": "content",
    "response_column": "summary",
    "model_name_or_path": TINY,
    "pre_seq_len": 4,
    "max_source_length": 32,
    "max_target_length": 16,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
PREDICT = {"do_predict": True, "max_target_length": 8, "disable_tqdm": True}
ROW = {"content": "类型#裙", "summary": "好看的裙子。"}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path_factory.mktemp("cache")))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def trained(forks, tmp_path_factory):
    """A run with checkpoint-1 and checkpoint-2. It must succeed, or every refusal below would mean nothing."""
    here = tmp_path_factory.mktemp("trained")
    words = flags(TRAIN, train_file=SAMPLE / "train.json", max_train_samples=8, output_dir=here / "run")
    done = forks.run("main.py", words, cwd=here)
    assert done.returncode == 0, done.stderr
    return here / "run"


@pytest.fixture
def here(tmp_path):
    """A folder with good data in it, for the input and output of one case."""
    (tmp_path / "train.json").write_text(LINE * 4, encoding="utf-8")
    return tmp_path


def flags(settings, **more):
    words = []
    for name, value in {**settings, **more}.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def train_flags(here, **more):
    return flags(TRAIN, **{"train_file": here / "train.json", "output_dir": here / "output", **more})


def predict_flags(here, **more):
    return flags(PREDICT, **{"test_file": here / "train.json", "output_dir": here / "output", **more})


def snapshot(folder):
    """Everything below a folder: kind, permissions, size and content."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name == ".lock":  # says which process used the run's folder last
            continue
        status = path.lstat()
        content = None
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (status.st_mode, status.st_size if stat.S_ISREG(status.st_mode) else None, content)
    return found


def assert_refused(done, says):
    """One message that contains each of `says`, under 10 lines, status 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1, done.stderr
    assert done.stderr.count("\n") < 10 and len(done.stderr) < 2500, done.stderr
    for part in [says] if isinstance(says, str) else says:
        assert part in done.stderr, done.stderr


def refuse(forks, here, words, says, program="main.py", **how):
    """Run a program and check that it refuses, leaving `here` and the small model as they were."""
    before = snapshot(here), snapshot(TINY)
    done = forks.run(program, words, cwd=here, **how)
    assert_refused(done, says)
    assert (snapshot(here), snapshot(TINY)) == before


def table(cases):
    """A table as parameters: the first of each entry is what is wrong and becomes the test's name."""
    return pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in cases])


# ---------------------------------------------------------------------- data files


def rows(*values, **row):
    """JSON lines: a good one, then those given."""
    return LINE + "".join(json.dumps(value) + "\n" for value in [*values, *([{**ROW, **row}] if row else [])])


def deep(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


HISTORY = {"history_column": "history"}
EMPTY = json.dumps({"content": "", "summary": ""}) + "\n"
# What is wrong, content of train.json (None: there is none), what the message says[, flags].
DATA = [
    ("no such file", None, "train.json does not exist"),
    ("empty", "", "train.json is empty"),
    ("white space only", " \n\t\r\n", "train.json is empty"),
    ("random bytes", bytes(range(256)) * 9, ("train.json line 2, byte 128", "no text in UTF-8")),
    ("a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0", ("train.json line 1, byte 0", "is this the right file?")),
    ("a gzip file", gzip.compress(LINE.encode() * 99), ("train.json", "is this the right file?")),
    ("NUL bytes only", b"\0" * 4096, ("train.json line 1, byte 0", "no text")),
    ("a NUL byte inside", LINE + LINE.replace("裙", "\0"), ("train.json line 2", "no text")),
    ("a broken line", LINE + '{"content": "say "hi"", "summary": "b"}\n', ("train.json line 2 is not JSON", "column")),
    ("cut in the last line", (LINE * 3)[:-20], "train.json line 3 is not JSON"),
    ("a single-quoted line", LINE + str(ROW) + "\n", "train.json line 2 is not JSON"),
    ("a trailing comma", LINE + LINE.replace("}", ",}"), "train.json line 2 is not JSON"),
    ("two objects on a line", LINE + LINE.strip() + LINE, ("train.json line 2 is not JSON", "Extra data")),
    (
        "an object over several lines",
        json.dumps(ROW, indent=1),
        ("line 1 is not JSON", "one whole JSON object per line"),
    ),
    ("a web page", "<!DOCTYPE html>\n<html>404</html>", ("train.json line 1 is not JSON", "<!DOCTYPE html>")),
    ("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid 1\n", ("line 1 is not JSON", "git-lfs")),
    ("CSV under the name of JSON", "content,summary\na,b\n", "train.json line 1 is not JSON"),
    ("a broken array", f"[\n{LINE.strip()},\n{{'a' 1}}\n]", "train.json line 3 breaks the JSON array"),
    ("a cut array", f"[{LINE.strip()},", "train.json line 1 breaks the JSON array"),
    ("text behind an array", f"[{LINE.strip()}]\n[]", ("train.json line 2 breaks the JSON array", "Extra data")),
    ("an empty array", "[]", "train.json holds no rows"),
    ("an array of numbers", "[1, 2]", "train.json row 1 is a number (1), not a JSON object"),
    ("an array of arrays", '[["a", "b"]]', "train.json row 1 is a list, not a JSON object"),
    ("lines that are lists", rows(["a", "b"]), "train.json line 2 is a list"),
    ("lines that are text", rows("a"), "train.json line 2 is text ('a')"),
    ("a line that is null", rows(None), "train.json line 2 is nothing (null)"),
    ("a line that is NaN", LINE + "NaN\n", "train.json line 2 is a number (nan)"),
    ("rows below a key", json.dumps({"data": [ROW]}), ("row 1 has no column 'content'", "columns are: data")),
    ("wrong column", json.dumps({"question": "a", "summary": "b"}), ("row 1 has no column 'content'", "question")),
    ("misspelt column", rows({"contents": "a", "summary": "b"}), ("row 2 has no", "--prompt_column contents?")),
    ("column in capitals", rows({"Content": "a", "summary": "b"}), ("row 2 has no", "--prompt_column Content?")),
    ("no response column", rows({"content": "a"}), "train.json row 2 has no column 'summary'"),
    ("an empty object", rows({}), ("train.json row 2 has no column 'content'", "columns are: none")),
    ("a number as prompt", rows(content=5), ("row 2: column 'content'", "a number (5), expected text")),
    ("NaN as prompt", rows(content=float("nan")), ("row 2: column 'content'", "a number (nan)")),
    ("a truth value as response", rows(summary=True), ("row 2: column 'summary'", "a truth value (true)")),
    ("a list as response", rows(summary=["a"]), ("row 2: column 'summary'", "a list, expected text")),
    ("an object as prompt", rows(content={"a": 1}), ("row 2: column 'content'", "an object, expected text")),
    ("half a character in a prompt", rows(content="\ud83d"), ("row 2: column 'content'", "half a character (\\ud83d)")),
    ("half a character in a response", rows(summary="a\udc00"), ("row 2: column 'summary'", "half a character")),
    ("half a character in a history", rows(history=[["\ud83d", ""]]), ("row 2: column 'history'", "half"), HISTORY),
    ("all rows empty", EMPTY * 3, ("train.json holds nothing to use: all 3 rows", "--prompt_column")),
    ("all responses empty", rows(summary=" ")[len(LINE) :], "train.json holds nothing to use"),
    ("all prompts null", rows(content=None)[len(LINE) :], "train.json holds nothing to use"),
    ("the rows asked for are empty", EMPTY + LINE, "nothing to use: all 1 rows", {"max_train_samples": 1}),
    ("no history column", LINE, ("row 1 has no column 'history'", "--history_column"), HISTORY),
    ("a history of text", rows(history="你好"), ("row 2: column 'history'", "but is text"), HISTORY),
    ("a flat history", rows(history=["问", "答"]), ("row 2: column 'history'", "item 1 is text"), HISTORY),
    ("a history of triples", rows(history=[["a", "b", "c"]]), ("row 2: column 'history'", "a list of 3"), HISTORY),
    ("a history of objects", rows(history=[{"role": "user"}]), ("row 2: column 'history'", "an object"), HISTORY),
    ("null in a history", rows(history=[["a", None]]), ("row 2: column 'history'", "nothing (null)"), HISTORY),
    ("a history that is false", rows(history=False), ("row 2: column 'history'", "a truth value"), HISTORY),
    ("UTF-16 with an odd byte", codecs.BOM_UTF16_LE + LINE.encode("utf-16-le") + b"x", "train.json starts with the"),
    ("a UTF-8 mark before UTF-16", codecs.BOM_UTF8 + LINE.encode("utf-16-le"), ("train.json", "UTF-8")),
    ("a UTF-32 mark only before UTF-8", codecs.BOM_UTF32_LE + LINE.encode(), "mark of UTF-32 but is not UTF-32"),
    ("files with marks joined", (codecs.BOM_UTF8 + LINE.encode()) * 2, ("train.json line 2 is not JSON", "BOM")),
    (
        "a stray byte in UTF-8",
        LINE.encode() * 9 + b'{"content": "\xff"}\n',
        ("line 10, byte", "not UTF-8, though the rest"),
    ),
    ("lines of two encodings", LINE.encode() * 9 + LINE.encode("gbk"), ("line 10, byte", "repair that line")),
    ("a line of 20 MB that is not JSON", "x" * 20_000_000, "train.json line 1 is not JSON"),
    ("lists 100,000 deep in an array", "[" + deep(100_000) + "]", ("train.json", "nested")),
    ("objects 100,000 deep in a row", LINE + deep(100_000, '{"a":', "}"), ("train.json line 2", "nested")),
    ("a number of 5,000 digits", LINE + '{"content": ' + "9" * 5000 + "}\n", ("train.json line 2", "digits")),
    ("a number of 5,000 digits in an array", '[{"content": ' + "9" * 5000 + "}]", ("train.json", "digits")),
]


@table(DATA)
def test_a_data_file_is_refused(case, forks, here):
    content, says, *more = case
    file = here / "train.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(forks, here, train_flags(here, **(more[0] if more else {})), says)


# What is wrong, content of rows.csv, what the message says[, flags].
CSV = [
    ("header only", "content,summary\n", "rows.csv holds no rows"),
    ("too many cells", "content,summary\na,b\nc,d,e\n", ("rows.csv row 2 (line 3) has 3 cells", "'e'")),
    ("an open quote", 'content,summary\na,b\n"c,d\n', "rows.csv row 2 (line 3) is not CSV"),
    ("a quote inside a cell", 'content,summary\n"a"b,c\n', "rows.csv row 1 (line 2) is not CSV"),
    ("semicolons", "content;summary\na;b\n", ("row 1 has no column 'content'", "content;summary")),
    ("no such column", "question,summary\na,b\n", ("row 1 has no column 'content'", "question, summary")),
    ("a history in a cell", 'content,summary,history\na,b,"[]"\n', ("column 'history'", "is text ('[]')"), HISTORY),
    ("a column named twice", "content,content,summary\na,b,c\n", ("rows.csv", "'content'", "twice")),
    (
        "a cell of 200,000 characters",
        f"content,summary\n{'a' * 200_000},b\n",
        ("rows.csv row 1 (line 2)", "field limit"),
    ),
    ("too few cells", "content,summary\na,b\nc\n", ("rows.csv row 2 (line 3) has 1 cell", "2 columns")),
    ("JSON under the name of CSV", LINE * 2, ("rows.csv", "column 'content'")),
    ("NUL bytes", "content,summary\na\0,b\n", "rows.csv line 2, byte"),
]


@table(CSV)
def test_a_csv_file_is_refused(case, forks, here):
    content, says, *more = case
    (here / "rows.csv").write_text(content, encoding="utf-8")
    refuse(forks, here, train_flags(here, train_file=here / "rows.csv", **(more[0] if more else {})), says)


def folder_of_data(here):
    (here / "data").mkdir()
    (here / "data" / "train.json").write_text(LINE)


def link_to_nowhere(here):
    (here / "data").symlink_to(here / "absent")


def link_to_itself(here):
    (here / "data").symlink_to(here / "data")


def unreadable(here):
    (here / "data").write_text(LINE)
    (here / "data").chmod(0)


def unreadable_folder(here):
    (here / "folder").mkdir()
    (here / "folder" / "train.json").write_text(LINE)
    (here / "folder").chmod(0)


# What is wrong, how it is made, the path that is given, what the message says.
PATHS = [
    ("a folder", folder_of_data, "data", ("data is a folder", "data/train.json")),
    ("a link to nowhere", link_to_nowhere, "data", "data does not exist"),
    ("a link to itself", link_to_itself, "data", "data"),
    ("a file that may not be read", unreadable, "data", ("data: Permission denied", "ls -l")),
    ("a file in a folder that may not be entered", unreadable_folder, "folder/train.json", "Permission denied"),
    ("a pipe", lambda here: os.mkfifo(here / "data"), "data", ("data is no regular file", "copy")),
    ("a device", lambda here: None, "/dev/null", "/dev/null is no regular file"),
    ("a name too long", lambda here: None, "x" * 300, "File name too long"),
    ("a file taken for a folder", lambda here: None, "train.json/rows", "train.json/rows does not exist"),
    ("an empty name", lambda here: None, "", "--do_train needs --train_file"),
]


@table(PATHS)
def test_the_path_of_a_data_file_is_refused(case, forks, here):
    make, path, says = case
    make(here)
    try:
        refuse(forks, here, train_flags(here, train_file=path), says, as_root=False)
    finally:
        if (here / "folder").exists():
            (here / "folder").chmod(0o700)


def test_the_other_data_files_are_checked_too(forks, here):
    (here / "dev.json").write_text("{\n")
    dev = {"validation_file": here / "dev.json", "eval_strategy": "steps"}
    refuse(forks, here, train_flags(here, **dev), "dev.json line 1 is not JSON")
    words = predict_flags(here, test_file=here / "dev.json", model_name_or_path=TINY, **COLUMNS)
    refuse(forks, here, words, "dev.json line 1 is not JSON")


# ---------------------------------------------------------------------- flags

COLUMNS = {"prompt_column": "content", "response_column": "summary"}
# What is wrong with the words behind a good command line for training, and what the message says.
FLAGS = [
    ("unknown", "--zzzz 1", "Unknown flag --zzzz"),
    ("misspelt", "--lerning_rate 1", "Did you mean --learning_rate?"),
    ("a Chinese dash", "——seed 1", "——seed"),
    ("one dash", "-seed 1", "-seed"),
    ("no value", "--max_steps", ("--max_steps", "expected one argument")),
    ("two values", "--max_steps 1 2", ("2",)),
    ("text for a number", "--max_steps many", ("--max_steps", "'many'")),
    ("a fraction of a step", "--max_steps 1.5", ("--max_steps", "'1.5'")),
    ("a decimal comma", "--learning_rate 0,02", ("--learning_rate", "'0,02'")),
    ("neither true nor false", "--do_sample perhaps", ("--do_sample", "perhaps")),
    ("no such strategy", "--eval_strategy never", ("--eval_strategy", "never")),
    ("no such save strategy", "--save_strategy sometimes", ("--save_strategy", "sometimes")),
    ("no such optimizer", "--optim adam_x", ("--optim", "adam_x")),
    ("no such schedule", "--lr_scheduler_type wavy", ("--lr_scheduler_type", "wavy")),
    ("no such logger", "--report_to paper", ("--report_to", "paper")),
    ("no such backend", "--quantization_backend cuda", ("--quantization_backend", "cuda")),
    ("no such debug option", "--debug loudly", ("loudly",)),
    ("bits of no kind", "--quantization_bit 5", "--quantization_bit 5"),
    ("bits of a float", "--quantization_bit 16", "--quantization_bit 16"),
    ("negative bits", "--quantization_bit -4", "--quantization_bit -4"),
    ("an empty prefix", "--pre_seq_len 0", "--pre_seq_len 0"),
    ("a negative prefix", "--pre_seq_len -128", "--pre_seq_len -128"),
    ("a huge prefix", "--pre_seq_len 1000000000", "--pre_seq_len 1000000000"),
    ("dropout 1", "--prefix_dropout 1", "--prefix_dropout 1.0"),
    ("dropout nan", "--prefix_dropout nan", "--prefix_dropout nan"),
    ("no source length", "--max_source_length 0", "--max_source_length 0"),
    ("a source length below the template", "--max_source_length 3", ("--max_source_length 3", "fixed part")),
    ("a negative target length", "--max_target_length -1", "--max_target_length -1"),
    ("no target length in evaluation", "--val_max_target_length 0", "--val_max_target_length 0"),
    ("no rows", "--max_train_samples 0", "--max_train_samples 0"),
    ("minus one row", "--max_eval_samples -1", "--max_eval_samples -1"),
    ("minus one worker", "--preprocessing_num_workers -1", "--preprocessing_num_workers -1"),
    ("minus one loader", "--dataloader_num_workers -1", "--dataloader_num_workers -1"),
    ("an empty batch", "--per_device_train_batch_size 0", "--per_device_train_batch_size 0"),
    ("a negative batch", "--per_device_train_batch_size -4", "--per_device_train_batch_size -4"),
    ("an empty batch in evaluation", "--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0"),
    ("no accumulation", "--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0"),
    ("a negative rate", "--learning_rate -0.02", "--learning_rate -0.02"),
    ("a rate of nan", "--learning_rate nan", "--learning_rate nan"),
    ("an infinite rate", "--learning_rate inf", "--learning_rate inf"),
    ("a rate that moves nothing", "--learning_rate 0", "--learning_rate 0"),
    ("steps below -1", "--max_steps -5", "--max_steps -5"),
    ("no epochs", "--max_steps -1 --num_train_epochs 0", "--num_train_epochs 0"),
    ("negative epochs", "--max_steps -1 --num_train_epochs -3", "--num_train_epochs -3"),
    ("nan epochs", "--max_steps -1 --num_train_epochs nan", "--num_train_epochs nan"),
    ("a save every 0 steps", "--save_steps 0", "--save_steps 0"),
    ("a save every -1 steps", "--save_steps -1", "--save_steps -1"),
    ("a line every 0 steps", "--logging_steps 0", "--logging_steps 0"),
    ("a dev loss every 0 steps", "--eval_strategy steps --validation_file {train} --eval_steps 0", "--eval_steps 0"),
    ("negative warmup", "--warmup_steps -3", "--warmup_steps -3"),
    ("a warmup of nan", "--warmup_steps nan", "--warmup_steps nan"),
    ("a negative decay", "--weight_decay -1", "--weight_decay -1"),
    ("a decay of nan", "--weight_decay nan", "--weight_decay nan"),
    ("clipping at nan", "--max_grad_norm nan", "--max_grad_norm nan"),
    ("clipping below 0", "--max_grad_norm -1", "--max_grad_norm -1"),
    ("a beta of 1.5", "--adam_beta1 1.5", "--adam_beta1 1.5"),
    ("a beta of nan", "--adam_beta2 nan", "--adam_beta2 nan"),
    ("a negative epsilon", "--adam_epsilon -1", "--adam_epsilon -1"),
    ("smoothing above 1", "--label_smoothing_factor 2", "--label_smoothing_factor 2"),
    ("a negative seed", "--seed -1", "--seed -1"),
    ("a seed beyond 32 bits", "--seed 5000000000", "--seed 5000000000"),
    ("no top_p", "--top_p 0", "--top_p 0"),
    ("a top_p of nan", "--top_p nan", "--top_p nan"),
    ("temperature 0 while sampling", "--temperature 0", "--do_sample false is greedy"),
    ("a temperature of nan", "--temperature nan", "--temperature nan"),
    ("an infinite temperature", "--temperature inf", "--temperature inf"),
    ("no beams", "--num_beams 0", "--num_beams 0"),
    ("no generated length", "--generation_max_length -3", "--generation_max_length -3"),
    ("two precisions", "--fp16 --bf16", ("fp16", "bf16")),
    ("a missing DeepSpeed file", "--deepspeed nowhere.json", ("deepspeed",)),
    ("a key twice", '--lr_scheduler_kwargs {{"a":1,"a":2}}', ("--lr_scheduler_kwargs", "the key 'a' stands twice")),
    ("schedule arguments that are no JSON", "--lr_scheduler_kwargs {{", ("--lr_scheduler_kwargs",)),
    ("schedule arguments that are a list", "--lr_scheduler_kwargs [1]", "--lr_scheduler_kwargs [1] is no JSON object"),
    ("a logger that is not installed", "--report_to comet_ml", "--report_to comet_ml"),
    ("no steps", "--max_steps 0", "--max_steps 0"),
    (
        "checkpointing arguments that are no JSON",
        "--gradient_checkpointing_kwargs {{",
        "--gradient_checkpointing_kwargs",
    ),
    ("a missing accelerator file", "--accelerator_config nowhere.json", "nowhere.json"),
    ("the best model without a dev loss", "--load_best_model_at_end", "--load_best_model_at_end"),
    ("no such method", "--finetuning_type magic", ("--finetuning_type", "magic")),
    ("a rank without LoRA", "--lora_rank 4", ("--lora_rank 4", "--finetuning_type lora")),
    ("a rank of 0", "--finetuning_type lora --lora_rank 0", "--lora_rank 0"),
    ("a dev loss without a file", "--eval_strategy steps", "--eval_strategy steps needs --validation_file"),
    ("metrics without a file", "--do_eval", "--do_eval needs --validation_file"),
    ("predictions without a file", "--do_predict", "--do_predict needs --test_file"),
    ("training without a prefix", "--pre_seq_len", ("--pre_seq_len", "expected one argument")),
    ("no model", "--model_name_or_path none-such", "--model_name_or_path none-such: there is no such folder"),
    ("an empty model", "--model_name_or_path= ", "--model_name_or_path is missing"),
    ("a file as model", "--model_name_or_path {train}", "train.json is a file; give the folder"),
    ("an empty folder as model", "--model_name_or_path .", "config.json is missing"),
    ("a hub model while offline", "--model_name_or_path THUDM/chatglm2-6b", ("THUDM/chatglm2-6b", "HF_ENDPOINT")),
    ("a hub model of no name", "--model_name_or_path a/b%c", ("--model_name_or_path a/b%c",)),
    ("no checkpoint to start from", "--ptuning_checkpoint nowhere", "--ptuning_checkpoint nowhere"),
    ("no checkpoint to resume from", "--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere"),
    ("nothing to resume", "--resume_from_checkpoint True", ("--resume_from_checkpoint True", "output")),
    ("the output is a file", "--output_dir {train}", "train.json"),
    ("the output is below a file", "--output_dir {train}/run", "train.json/run"),
    ("the output's name is too long", "--output_dir {long}", "File name too long"),
    ("no output", "--output_dir= ", "--output_dir is missing"),
    ("the logs go to a file", "--report_to tensorboard --logging_dir {train}", "train.json"),
]


@table(FLAGS)
def test_flags_are_refused(case, forks, here):
    words, says = case
    more = [word.format(train=here / "train.json", long="x" * 300) for word in words.split(" ")]
    more = [word for word in more if word] if "= " not in words else more[:1]
    refuse(forks, here, [*train_flags(here), *more], says)


# What is wrong with a whole command line, and what the message says.
COMMANDS = [
    ("nothing at all", "", "--output_dir is missing"),
    ("nothing to do", "--output_dir output", "Nothing to do"),
    ("no file to train on", "--do_train --output_dir output", "--do_train needs --train_file"),
    ("a word without a flag", "train --output_dir output", "Stray word 'train'"),
    ("no columns", "--do_train --train_file train.json --output_dir o --pre_seq_len 4 --model_name_or_path {tiny}",
     "--prompt_column is missing"),
    ("no response column", "--do_train --train_file train.json --output_dir o --pre_seq_len 4 --prompt_column content "
     "--model_name_or_path {tiny}", "--response_column is missing"),
    ("no prefix length", "--do_train --train_file train.json --output_dir o --model_name_or_path {tiny} "
     "--prompt_column content --response_column summary", "--do_train needs --pre_seq_len"),
    ("a prefix length without a prefix", "--do_predict --test_file train.json --output_dir o --pre_seq_len 4 "
     "--prompt_column content --response_column summary --model_name_or_path {tiny}", "random prefix"),
    ("no model", "--do_predict --test_file train.json --output_dir o --prompt_column content --response_column summary",
     "--model_name_or_path is missing"),
    ("an unknown layer for LoRA", "--do_train --train_file train.json --output_dir o --model_name_or_path {tiny} "
     "--prompt_column content --response_column summary --finetuning_type lora --lora_target q_proj",
     "--lora_target q_proj: expected some of"),
    ("no file of flags", "settings.json", "settings.json: there is no such file"),
]  # fmt: skip


@table(COMMANDS)
def test_a_command_line_is_refused(case, forks, here):
    words, says = case
    refuse(forks, here, words.format(tiny=TINY).split(), says)


GOOD_SETTINGS = {**TRAIN, "model_name_or_path": str(TINY), "train_file": "train.json", "output_dir": "output"}
# What is wrong with a file of flags, its content (a dictionary changes a good one), and what the message says.
SETTINGS = [
    ("empty", "", "settings.json is not valid JSON"),
    ("broken", '{"do_train": true,}', "settings.json is not valid JSON"),
    ("a list", "[]", "settings.json must hold one object"),
    ("not text", b'{"a": "\0"}', "settings.json line 1, byte 7 (0x00) is no text"),
    ("a flag twice", '{"seed": 1,\n"seed": 2}', "settings.json line 1 begins an object that has the key 'seed' twice"),
    ("a nested key twice", '{"lr_scheduler_kwargs":\n{"a": 1, "a": 2}}', ("settings.json line 2", "the key 'a' twice")),
    ("nested 100,000 deep", deep(100_000, '{"a":', "}"), ("settings.json", "nested")),
    ("a number of 5,000 digits", '{"seed": ' + "9" * 5000 + "}", ("settings.json", "digits")),
    ("an unknown flag", {"lerning_rate": 1}, "Did you mean --learning_rate?"),
    ("text for a number", {"max_steps": "many"}, ("--max_steps", "'many'")),
    ("a list for a number", {"max_steps": [1, 2]}, "2"),
    ("an object for a number", {"max_steps": {"a": 1}}, "--max_steps"),
    ("NaN for a rate", {"learning_rate": float("nan")}, "--learning_rate nan"),
    ("true for a number", {"max_steps": True}, ("--max_steps", "'True'")),
    ("a NUL in a name", {"train_file": "a\0b"}, "a\\x00b does not exist"),
    ("half a character in a name", {"train_file": "a\ud83d"}, "a\\ud83d does not exist"),
]


@table(SETTINGS)
def test_a_file_of_flags_is_refused(case, forks, here):
    content, says = case
    if isinstance(content, dict):
        content = json.dumps({**GOOD_SETTINGS, **content})
    (here / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(forks, here, ["settings.json"], says)


def test_a_file_of_flags_that_may_not_be_read_is_refused(forks, here):
    (here / "settings.json").write_text(json.dumps(GOOD_SETTINGS))
    (here / "settings.json").chmod(0)
    refuse(forks, here, ["settings.json"], "settings.json: Permission denied", as_root=False)


def test_flags_behind_a_file_of_flags_are_refused(forks, here):
    (here / "settings.json").write_text(json.dumps(GOOD_SETTINGS))
    refuse(forks, here, ["settings.json", "--seed", "1"], ("settings.json", "stands alone"))


def test_a_good_file_of_flags_is_taken(forks, here):
    (here / "settings.json").write_text(json.dumps(GOOD_SETTINGS))
    assert forks.run("main.py", ["settings.json"], cwd=here).returncode == 0


# ---------------------------------------------------------------------- base models


def edit_json(file, **changes):
    """Change keys of a JSON file; a value of ... removes one."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.update(changes)
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def cut(name, size):
    """Leave `size` bytes of a file, or all but -`size`."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(name, position):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def no_permission(name):
    return lambda folder: (folder / name).chmod(0)


def edit_weights(file, edit):
    """Rewrite a torch file with `edit(tensors)` done to it."""

    def damage(folder):
        tensors = torch.load(folder / file, weights_only=True)
        edit(tensors)
        torch.save(tensors, folder / file)

    return damage


def as_safetensors(edit):
    """One model.safetensors in place of the .bin files, with `edit(bytes)` as its content."""

    def damage(folder):
        tensors = {}
        for name in (SHARD, SHARD_2):
            tensors.update(torch.load(folder / name, weights_only=True))
            (folder / name).unlink()
        (folder / INDEX).unlink()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(edit(content))

    return damage


class Payload:
    """Unpickled, it would create a file called `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def torch_payload(name):
    return lambda folder: torch.save({"transformer.x": Payload()}, folder / name)


def pickle_payload(name, protocol=2):
    return write(name, pickle.dumps({"transformer.x": Payload()}, protocol))


SHARD, SHARD_2 = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
INDEX = "pytorch_model.bin.index.json"
NORM = "transformer.encoder.layers.0.input_layernorm.weight"
TINY_CONFIG = json.loads((TINY / "config.json").read_text())


def change(name, make):
    """An edit of weights: the tensor `name` becomes make(tensor)."""

    def edit(tensors):
        tensors[name] = make(tensors[name])

    return edit


def redirect(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../etc/passwd")
    (folder / INDEX).write_text(json.dumps(index))


def index_of(weight_map):
    return write(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


# What is wrong, how a copy of the small model is damaged, what the message says.
MODELS = [
    ("no config.json", remove("config.json"), "config.json is missing"),
    ("an empty config.json", write("config.json", ""), "config.json is not valid JSON"),
    ("a cut config.json", cut("config.json", 300), "config.json is not valid JSON"),
    ("a config.json of a list", write("config.json", "[1]"), "config.json holds a list"),
    ("a config.json in GBK", write("config.json", '{"a": "裙子"}'.encode("gbk")), "config.json is not valid JSON"),
    ("a config.json nested too deep", write("config.json", deep(100_000, '{"a":', "}")), ("config.json", "nested")),
    ("a config.json with 5,000 digits", write("config.json", '{"a": ' + "9" * 5000 + "}"), ("config.json", "digits")),
    ("a config.json that may not be read", no_permission("config.json"), "config.json: Permission denied"),
    ("a folder as config.json", make_folder("config.json"), "config.json"),
    ("a config.json of LLaMA", config(model_type="llama"), "model of type 'llama'"),
    ("a config.json of no model", write("config.json", "{}"), "model of type None"),
    ("ChatGLM3", config(_name_or_path="THUDM/chatglm3-6b"), "ChatGLM3"),
    ("ChatGLM-6B", config(position_encoding_2d=True, inner_hidden_size=64), "ChatGLM-6B (the first generation)"),
    ("GLM-4", config(padded_vocab_size=151552), "GLM-4"),
    ("text for a number of layers", config(num_layers="many"), ("config.json", "num_layers is 'many'")),
    ("a list for a number of layers", config(num_layers=[2]), ("config.json", "num_layers is [2]")),
    ("no layers", config(num_layers=0), ("config.json", "num_layers is 0")),
    ("10^9 layers", config(num_layers=10**9), ("config.json", "num_layers")),
    ("a hidden size of 10^12", config(hidden_size=10**12), ("config.json", "hidden_size")),
    ("a vocabulary of text", config(padded_vocab_size="65024"), ("config.json", "padded_vocab_size is '65024'")),
    ("a fraction for a size", config(hidden_size=64.5), ("config.json", "hidden_size is 64.5")),
    ("heads that do not divide", config(multi_query_group_num=3), ("config.json", "multi_query_group_num 3")),
    ("no hidden size", config(hidden_size=...), ("word_embeddings.weight", "config.json asks for")),
    ("one layer too many", config(num_layers=TINY_CONFIG["num_layers"] + 1), ("missing", "config.json")),
    ("one layer too few", config(num_layers=TINY_CONFIG["num_layers"] - 1), ("unexpected", "config.json")),
    ("another vocabulary", config(padded_vocab_size=320), "padded_vocab_size 320"),
    ("dropout as text", config(attention_dropout="a lot"), ("config.json", "attention_dropout")),
    ("dropout of 7", config(hidden_dropout=7), ("config.json", "hidden_dropout is 7")),
    ("an epsilon as text", config(layernorm_epsilon="small"), ("config.json", "layernorm_epsilon")),
    ("an epsilon of NaN", config(layernorm_epsilon=float("nan")), ("config.json", "layernorm_epsilon")),
    ("a stretched rope", config(rope_ratio=50), ("config.json", "rope_ratio=50")),
    ("bits of no kind", config(quantization_bit=3), ("config.json", "quantization_bit is 3")),
    ("a list for a dtype", config(torch_dtype=[]), ("config.json", "torch_dtype is []")),
    ("a dtype by another name", config(torch_dtype="half16"), ("config.json", "half16")),
    ("bits as text", config(quantization_bit="four"), ("config.json", "quantization_bit")),
    ("an end id of text", config(eos_token_id="</s>"), ("config.json", "eos_token_id")),
    ("an end id of another model", config(eos_token_id=7), "eos_token_id 7"),
    ("a padding id of text", config(pad_token_id="<unk>"), ("config.json", "pad_token_id")),
    ("a padding id beyond the vocabulary", config(pad_token_id=10**6), ("config.json", "pad_token_id")),
    ("a dtype that does not exist", config(torch_dtype="float17"), ("config.json", "float17")),
    ("rope settings as text", config(rope_scaling="a lot"), ("config.json", "rope_scaling=a lot")),
    ("labels as text", config(id2label="x"), ("config.json",)),
    ("no weights", remove(SHARD, SHARD_2, INDEX), "holds no weights"),
    ("no index", remove(INDEX), "holds no weights"),
    ("a missing shard", remove(SHARD_2), f"lacks {SHARD_2} (1 of 2"),
    ("a truncated shard", cut(SHARD, 500_000), f"{SHARD} cannot be read as model weights"),
    ("a shard short of one byte", cut(SHARD_2, -1), f"{SHARD_2} cannot be read as model weights"),
    ("an empty shard", write(SHARD, b""), f"{SHARD} cannot be read as model weights"),
    ("a Git LFS pointer as shard", write(SHARD, "version https://git-lfs.github.com/spec/v1\noid 1\n"), SHARD),
    ("a web page as shard", write(SHARD, "<!DOCTYPE html><html>404</html>"), f"{SHARD} cannot be read"),
    ("a shard that may not be read", no_permission(SHARD), (SHARD, "Permission denied")),
    ("a shard of a list", lambda folder: torch.save([1], folder / SHARD), (SHARD, "dictionary of tensors")),
    ("a shard of numbers", lambda folder: torch.save({"a": 1}, folder / SHARD), (SHARD, "dictionary of tensors")),
    ("a shard of sparse tensors", edit_weights(SHARD, change(NORM, torch.Tensor.to_sparse)), (SHARD, NORM)),
    ("a shard with a tensor of another shape", edit_weights(SHARD, change(NORM, lambda t: t[:5])), (SHARD, NORM, "(5,)")),
    ("a shard with a tensor of integers", edit_weights(SHARD, change(NORM, torch.Tensor.int)), (SHARD, NORM, "int32")),
    ("a shard with a tensor of complex numbers", edit_weights(SHARD, change(NORM, lambda t: t.to(torch.complex64))),
     (SHARD, NORM, "complex64")),
    ("a shard with a NaN", edit_weights(SHARD, change(NORM, lambda t: t * float("nan"))), (SHARD, NORM, "nan")),
    ("a shard with an infinity", edit_weights(SHARD, change(NORM, lambda t: t / 0)), (SHARD, NORM, "inf")),
    ("a shard without a tensor", edit_weights(SHARD, lambda tensors: tensors.pop(NORM)), ("missing", NORM)),
    ("a shard with a tensor too many", edit_weights(SHARD, lambda tensors: tensors.update(extra=torch.zeros(1))),
     ("unexpected", "extra")),
    ("a shard with a name of a number", edit_weights(SHARD, lambda tensors: tensors.update({7: torch.zeros(1)})),
     (SHARD, "dictionary of tensors")),
    ("a shard that would run code", torch_payload(SHARD), (SHARD, "never loaded")),
    ("a plain pickle that would run code", pickle_payload(SHARD), (SHARD, "never loaded")),
    ("a pickle of protocol 4 that would run code", pickle_payload(SHARD, 4), SHARD),
    ("a broken index", write(INDEX, "{"), f"{INDEX} is not valid JSON"),
    ("an index without a map", write(INDEX, "{}"), f"{INDEX} has no weight_map"),
    ("an index of numbers", index_of({"a": 1}), INDEX),
    ("an index that names a folder outside", redirect, INDEX),
    ("an index that names tensors of no file", index_of({"a": "b.bin", NORM: SHARD}), "b.bin"),
    ("no tokenizer", remove("tokenizer.model"), "tokenizer.model does not exist"),
    ("an empty tokenizer", write("tokenizer.model", b""), ("tokenizer.model (0 bytes)", "not a SentencePiece model")),
    ("a truncated tokenizer", cut("tokenizer.model", 9_000), "tokenizer.model"),
    ("a tokenizer of text", write("tokenizer.model", "version https://git-lfs"), "not a SentencePiece model"),
    ("a tokenizer that may not be read", no_permission("tokenizer.model"), "tokenizer.model: Permission denied"),
    ("a broken tokenizer_config.json", write("tokenizer_config.json", "{"), "tokenizer_config.json is not valid JSON"),
    ("a tokenizer_config.json of a list", write("tokenizer_config.json", "[]"), "tokenizer_config.json holds a list"),
    ("safetensors cut in the data", as_safetensors(lambda content: content[:-1000]), "model.safetensors cannot be read"),
    ("safetensors cut in the header", as_safetensors(lambda content: content[:100]), "model.safetensors cannot be read"),
    ("safetensors with a huge header", as_safetensors(lambda content: b"\xff" * 7 + b"\0" + content[8:]),
     "model.safetensors cannot be read"),
    ("safetensors with a broken header", as_safetensors(lambda content: content[:8] + b"}" + content[9:]),
     "model.safetensors cannot be read"),
    ("empty safetensors", as_safetensors(lambda content: b""), "model.safetensors cannot be read"),
    ("a piece that is no UTF-8", flip("tokenizer.model", 4), "tokenizer.model or tokenizer_config.json is damaged"),
]  # fmt: skip


@table(MODELS)
def test_a_model_folder_is_refused(case, forks, here):
    damage, says = case
    folder = here / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.sh"))
    damage(folder)
    refuse(forks, here, train_flags(here, model_name_or_path=folder), says, as_root=False)
    assert not (here / "executed").exists()


# ---------------------------------------------------------------------- checkpoints

PREFIX = "pytorch_model.bin"
KEY = "transformer.prefix_encoder.embedding.weight"


def replace_by_base(folder):
    shutil.rmtree(folder)
    shutil.copytree(TINY, folder)


def single_base(folder):
    """A full model in one file, where a prefix is expected."""
    tensors = torch.load(TINY / SHARD, weights_only=True) | torch.load(TINY / SHARD_2, weights_only=True)
    torch.save(tensors, folder / PREFIX)


# What is wrong, how a copy of checkpoint-2 is damaged, what the message says.
CHECKPOINTS = [
    ("no such folder", shutil.rmtree, ("--ptuning_checkpoint", "checkpoint-2", "checkpoint-1")),
    ("no weights", remove(PREFIX), (f"there is no {PREFIX} in it",)),
    ("a truncated file", cut(PREFIX, 2000), f"{PREFIX} cannot be read as model weights"),
    ("a file short of one byte", cut(PREFIX, -1), f"{PREFIX} cannot be read as model weights"),
    ("an empty file", write(PREFIX, b""), f"{PREFIX} cannot be read as model weights"),
    ("text", write(PREFIX, "hello"), f"{PREFIX} cannot be read as model weights"),
    ("a folder as file", make_folder(PREFIX), PREFIX),
    ("a file that may not be read", no_permission(PREFIX), (PREFIX, "Permission denied")),
    ("a bit flipped in the pickle", flip(PREFIX, 100), PREFIX),
    ("a torch file that would run code", torch_payload(PREFIX), (PREFIX, "never loaded")),
    ("a plain pickle that would run code", pickle_payload(PREFIX), (PREFIX, "never loaded")),
    ("a base model's folder", replace_by_base, ("--ptuning_checkpoint", f"there is no {PREFIX}")),
    ("a whole model", single_base, (PREFIX, "holds no prefix")),
    ("a prefix of another size", edit_weights(PREFIX, change(KEY, lambda t: t[:, :7].clone())), "does not fit this base"),
    ("a prefix without rows", edit_weights(PREFIX, change(KEY, lambda t: t[:0].clone())), (PREFIX, "(0, ")),
    ("a prefix of one dimension", edit_weights(PREFIX, change(KEY, lambda t: t[0].clone())), "does not fit this base"),
    ("a prefix that is one number", edit_weights(PREFIX, change(KEY, lambda t: t[0, 0].clone())), PREFIX),
    ("a prefix of integers", edit_weights(PREFIX, change(KEY, torch.Tensor.int)), (PREFIX, "int32")),
    ("a prefix of NaN", edit_weights(PREFIX, change(KEY, lambda t: t * float("nan"))), (PREFIX, "nan")),
    ("a prefix with more tensors", edit_weights(PREFIX, lambda t: t.update({KEY[:-6] + "bias": t[KEY][0].clone()})),
     "does not fit this base"),
    ("a prefix with half a projection", edit_weights(PREFIX, lambda t: t.update(
        {KEY.replace("embedding", "trans.0"): torch.zeros(2, 2)})), "checkpoint-2"),
    ("a broken config.json", write("config.json", "{"), "config.json is not valid JSON"),
    ("a config.json of a list", write("config.json", "[]"), "config.json holds a list"),
    ("bits as text in config.json", config(quantization_bit="four"), ("config.json", "quantization_bit")),
    ("bits of no kind in config.json", config(quantization_bit=3), ("config.json", "quantization_bit")),
    ("a broken sidecar", write("ptuning.json", "{]"), "ptuning.json is not valid JSON"),
    ("a sidecar of a list", write("ptuning.json", "[]"), "ptuning.json holds a list"),
    ("a sidecar nested too deep", write("ptuning.json", deep(100_000, '{"a":', "}")), ("ptuning.json", "nested")),
    ("a length as text", lambda f: edit_json(f / "ptuning.json", max_source_length="long"), ("ptuning.json", "max_source")),
    ("a length below 0", lambda f: edit_json(f / "ptuning.json", max_target_length=-8), ("ptuning.json", "max_target")),
    ("a column of numbers", lambda f: edit_json(f / "ptuning.json", prompt_column=3), ("ptuning.json", "prompt_column")),
    ("a base model of numbers", lambda f: edit_json(f / "ptuning.json", base_model=[1]), ("ptuning.json", "base_model")),
    ("a base model that has moved", lambda f: edit_json(f / "ptuning.json", base_model="/gone/chatglm2-6b"),
     "/gone/chatglm2-6b"),
    ("a source prefix of numbers", lambda f: edit_json(f / "ptuning.json", source_prefix=3), ("ptuning.json", "source_prefix")),
]  # fmt: skip


def copy_run(trained, folder):
    """A run without the checksums, as the official scripts leave one: every reader is on its own."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(CHECKSUM_FILE, ".lock"))


@table(CHECKPOINTS)
def test_a_checkpoint_is_refused(case, forks, trained, here):
    damage, says = case
    copy_run(trained, here / "run")
    damage(here / "run" / "checkpoint-2")
    words = predict_flags(here, ptuning_checkpoint=here / "run" / "checkpoint-2")
    refuse(forks, here, words, says, as_root=False)
    assert not (here / "executed").exists()


def test_a_good_checkpoint_is_taken(forks, trained, here):
    words = predict_flags(here, ptuning_checkpoint=trained / "checkpoint-2")
    assert forks.run("main.py", words, cwd=here).returncode == 0


def test_the_demos_refuse_a_checkpoint_that_would_run_code(forks, trained, here):
    copy_run(trained / "checkpoint-2", here / "checkpoint-2")
    torch_payload(PREFIX)(here / "checkpoint-2")
    refuse(forks, here, ["--ptuning_checkpoint", "checkpoint-2"], (PREFIX, "never loaded"), program="cli_demo.py")


@table(
    [
        ("another length", {"pre_seq_len": 5}, ("--pre_seq_len 5 contradicts", "4")),
        ("a projection", {"prefix_projection": True}, "--prefix_projection True contradicts"),
        ("the checkpoint as base model", {"ptuning_checkpoint": None, "model_name_or_path": "run/checkpoint-2",
         **COLUMNS}, ("holds only a trained prefix", "--ptuning_checkpoint")),
    ]
)  # fmt: skip
def test_flags_that_contradict_a_checkpoint_are_refused(case, forks, trained, here):
    more, says = case
    copy_run(trained, here / "run")
    refuse(forks, here, predict_flags(here, **{"ptuning_checkpoint": "run/checkpoint-2", **more}), says)


ADAPTER, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def adapter(**changes):
    return lambda folder: edit_json(folder / ADAPTER_SETTINGS, **changes)


def edit_adapter(edit):
    def damage(folder):
        tensors = load_file(folder / ADAPTER)
        save_file({name: edit(tensor).contiguous() for name, tensor in tensors.items()}, folder / ADAPTER)

    return damage


# What is wrong, how a copy of a LoRA checkpoint is damaged, what the message says.
ADAPTERS = [
    ("no weights", remove(ADAPTER), "adapter is incomplete"),
    ("truncated weights", cut(ADAPTER, 900), f"{ADAPTER} cannot be read as model weights"),
    ("weights of NaN", edit_adapter(lambda tensor: tensor * float("nan")), (ADAPTER, "nan")),
    ("weights of another size", edit_adapter(lambda tensor: tensor[:, :3]), "does not fit this base model"),
    ("weights of integers", edit_adapter(torch.Tensor.int), (ADAPTER, "int32")),
    ("broken settings", write(ADAPTER_SETTINGS, "{"), f"{ADAPTER_SETTINGS} is not valid JSON"),
    ("settings that are a list", write(ADAPTER_SETTINGS, "[]"), f"{ADAPTER_SETTINGS} holds a list"),
    ("another kind of adapter", adapter(peft_type="PROMPT_TUNING"), (ADAPTER_SETTINGS, "PROMPT_TUNING", "only LoRA")),
    ("an unknown kind of adapter", adapter(peft_type="MAGIC"), (ADAPTER_SETTINGS, "MAGIC")),
    ("a rank of text", adapter(r="eight"), (ADAPTER_SETTINGS, "r is 'eight'")),
    ("a rank of 0", adapter(r=0), (ADAPTER_SETTINGS, "r is 0")),
    ("another rank", adapter(r=3), "does not fit this base model"),
    ("an alpha of text", adapter(lora_alpha="a lot"), (ADAPTER_SETTINGS, "lora_alpha is 'a lot'")),
    ("a dropout of 7", adapter(lora_dropout=7), (ADAPTER_SETTINGS, "lora_dropout is 7")),
    ("layers that are not there", adapter(target_modules=["q_proj"]), "q_proj"),
    ("a setting of PEFT that is none", adapter(alora_invocation_tokens=[7]), ("PEFT cannot use the adapter", "aLoRA")),
    ("a table of ranks that is null", adapter(rank_pattern=None), "PEFT cannot use the adapter"),
    ("layers that are a number", adapter(target_modules=7), (ADAPTER_SETTINGS, "target_modules is 7")),
]


@pytest.fixture(scope="module")
def trained_adapter(forks, tmp_path_factory):
    """A LoRA checkpoint, as PEFT alone would leave it: no checksums."""
    here = tmp_path_factory.mktemp("adapter")
    lora = {"finetuning_type": "lora", "pre_seq_len": None, "max_train_samples": 8, "max_steps": 1}
    words = flags({**TRAIN, **lora}, train_file=SAMPLE / "train.json", output_dir=here / "run")
    done = forks.run("main.py", words, cwd=here)
    assert done.returncode == 0, done.stderr
    copy_run(here / "run" / "checkpoint-1", here / "adapter")
    return here / "adapter"


@table(ADAPTERS)
def test_an_adapter_is_refused(case, forks, trained_adapter, here):
    damage, says = case
    copy_run(trained_adapter, here / "adapter")
    damage(here / "adapter")
    words = predict_flags(here, ptuning_checkpoint=here / "adapter", model_name_or_path=TINY, **COLUMNS)
    refuse(forks, here, words, says)


def test_a_good_adapter_is_taken(forks, trained_adapter, here):
    words = predict_flags(here, ptuning_checkpoint=trained_adapter)
    assert forks.run("main.py", words, cwd=here).returncode == 0


# What is wrong, how a run is damaged before it is continued, what the message says.
RESUMES = [
    ("the run is there and nothing is said", None, {}, "already has checkpoint-2"),
    ("a broken state", write("trainer_state.json", "{"), {"resume_from_checkpoint": "run/checkpoint-2"},
     "trainer_state.json"),
    ("an official checkpoint", lambda f: edit_json(f / "trainer_state.json", train_batch_size=...),
     {"resume_from_checkpoint": "run/checkpoint-2"}, "official scripts of 2023"),
    ("no state", remove("trainer_state.json"), {"resume_from_checkpoint": "run/checkpoint-2"}, "checkpoint-2"),
    ("a state without a step", lambda f: edit_json(f / "trainer_state.json", global_step=...),
     {"resume_from_checkpoint": "run/checkpoint-2"}, "trainer_state.json"),
    ("a state of text", lambda f: edit_json(f / "trainer_state.json", global_step="two"),
     {"resume_from_checkpoint": "run/checkpoint-2"}, "trainer_state.json"),
    ("no weights", remove(PREFIX), {"resume_from_checkpoint": "run/checkpoint-2"}, "checkpoint-2"),
    ("weights that would run code", torch_payload(PREFIX), {"resume_from_checkpoint": "run/checkpoint-2"}, PREFIX),
    ("an optimizer that would run code", torch_payload("optimizer.pt"), {"resume_from_checkpoint": "run/checkpoint-2"},
     "optimizer.pt"),
    ("a cut optimizer", cut("optimizer.pt", 900), {"resume_from_checkpoint": "run/checkpoint-2"}, "optimizer.pt"),
    ("a cut scheduler", cut("scheduler.pt", 400), {"resume_from_checkpoint": "run/checkpoint-2"}, "scheduler.pt"),
    ("a cut random state", cut("rng_state.pth", 400), {"resume_from_checkpoint": "run/checkpoint-2"}, "rng_state.pth"),
    ("another prefix length", None, {"resume_from_checkpoint": "run/checkpoint-2", "pre_seq_len": 5}, "checkpoint-2"),
]  # fmt: skip


@table(RESUMES)
def test_a_run_is_not_continued(case, forks, trained, here):
    damage, more, says = case
    copy_run(trained, here / "run")
    if damage:
        damage(here / "run" / "checkpoint-2")
    refuse(forks, here, train_flags(here, output_dir="run", max_steps=4, **more), says)
    assert not (here / "executed").exists()


# ---------------------------------------------------------------------- pages, ports, terminals

# What is wrong, the program, its words, what the message says.
DEMOS = [
    ("an unknown flag", "web_demo.py", "--portt 1", "Unknown flag --portt"),
    ("a misspelt flag", "api_demo.py", "--server_prt 1", "Did you mean --server_port?"),
    ("a stray word", "cli_demo.py", "{tiny}", "Unknown word"),
    ("a flag without its value", "web_demo.py", "--server_port", "Argument --server_port: expected one argument"),
    ("no model", "cli_demo.py", "", "--model_name_or_path is missing"),
    ("no model", "api_demo.py", "--server_port {free}", "--model_name_or_path is missing"),
    ("a model that is not there", "web_demo.py", "--server_port {free} --model_name_or_path ./none", "./none"),
    (
        "a port in use",
        "web_demo.py",
        "--model_name_or_path {tiny} --server_port {busy}",
        "{busy} (Address already in use)",
    ),
    (
        "a port in use",
        "api_demo.py",
        "--model_name_or_path {tiny} --server_port {busy}",
        "{busy} (Address already in use)",
    ),
    ("a port of text", "web_demo.py", "--model_name_or_path {tiny} --server_port http", ("--server_port", "'http'")),
    ("a negative port", "api_demo.py", "--model_name_or_path {tiny} --server_port -1", "--server_port -1"),
    ("a port beyond 65535", "web_demo.py", "--model_name_or_path {tiny} --server_port 70000", "--server_port 70000"),
    ("port 0", "api_demo.py", "--model_name_or_path {tiny} --server_port 0", "--server_port 0"),
    (
        "an address of another machine",
        "web_demo.py",
        "--model_name_or_path {tiny} --server_name 192.0.2.1",
        "192.0.2.1",
    ),
    (
        "an address that is none",
        "api_demo.py",
        "--model_name_or_path {tiny} --server_name no.such.invalid",
        "no.such.inv",
    ),
    ("a password without a user", "web_demo.py", "--auth secret", "user:password"),
    (
        "no answers at once",
        "api_demo.py",
        "--server_port {free} --model_name_or_path {tiny} --concurrency 0",
        "--concurrency 0",
    ),
    ("no queue", "web_demo.py", "--server_port {free} --model_name_or_path {tiny} --max_queue -1", "--max_queue -1"),
    ("bits of no kind", "cli_demo.py", "--model_name_or_path {tiny} --quantization_bit 3", "--quantization_bit 3"),
    ("a negative length", "cli_demo.py", "--model_name_or_path {tiny} --max_length -1", "--max_length -1"),
    ("a top_p of 7", "cli_demo.py", "--model_name_or_path {tiny} --top_p 7", "--top_p 7"),
    ("a temperature of nan", "cli_demo.py", "--model_name_or_path {tiny} --temperature nan", "--temperature nan"),
    ("a seed of text", "cli_demo.py", "--model_name_or_path {tiny} --seed x", "--seed"),
    ("a seed beyond 64 bits", "cli_demo.py", "--model_name_or_path {tiny} --seed 99999999999999999999", "--seed"),
    (
        "a length without a prefix",
        "cli_demo.py",
        "--model_name_or_path {tiny} --pre_seq_len 4",
        "--pre_seq_len 4 needs",
    ),
    ("another length", "cli_demo.py", "--ptuning_checkpoint {run} --pre_seq_len 9", "--pre_seq_len 9 contradicts"),
    ("a run without checkpoints", "web_demo.py", "--server_port {free} --ptuning_checkpoint {here}", "{here}"),
    ("a checkpoint that is a file", "cli_demo.py", "--ptuning_checkpoint {here}/train.json", "train.json"),
]


@pytest.fixture
def busy():
    """A port that something listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@table(DEMOS)
def test_a_demo_refuses_to_start(case, forks, trained, here, busy):
    program, words, says = case
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    places = {"tiny": TINY, "run": trained, "here": here, "free": free, "busy": busy}
    says = says.format(**places) if isinstance(says, str) else says
    refuse(forks, here, words.format(**places).split(), says, program=program)


def test_a_line_too_long_in_a_pipe_is_refused_by_its_number(forks, here):
    words = ["--model_name_or_path", TINY, "--max_length", "2", "--temperature", "0"]
    done = forks.run("cli_demo.py", words, cwd=here, stdin="你好\n" + "好" * 9000 + "\n")
    assert done.returncode == 2
    assert "error: Line 2: The prompt has" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------- environments

WANDB = {"report_to": "wandb"}
# What is wrong, variables, what the message says[, flags].
ENVIRONMENTS = [
    (
        "a WANDB_MODE that does not exist",
        {"WANDB_MODE": "sometimes"},
        "WANDB_MODE=sometimes: expected one of online",
        WANDB,
    ),
    (
        "wandb online without an account",
        {"WANDB_MODE": "online", "HOME": "/nowhere"},
        "WANDB_MODE=online needs an",
        WANDB,
    ),
    (
        "TensorBoard into a file",
        {"TENSORBOARD_LOGGING_DIR": "train.json"},
        "train.json is a file",
        {"report_to": "tensorboard"},
    ),
    ("processes without an address", {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ("processes that are not counted", {"RANK": "0", "WORLD_SIZE": "two"}, "'two'"),
]


@table(ENVIRONMENTS)
def test_an_environment_is_refused(case, forks, here):
    environment, says, *more = case
    refuse(forks, here, train_flags(here, **(more[0] if more else {})), says, environment=environment)


def test_an_output_folder_that_may_not_be_written_is_refused(forks, trained, here):
    (here / "locked").mkdir()
    (here / "locked").chmod(0o500)
    words = train_flags(here, output_dir=here / "locked" / "run")
    refuse(forks, here, words, ("locked/run: Permission denied", "ls -l"), as_root=False)


# As a user starts them: the command, what it is given, what the message says.
PROCESSES = [
    ("an empty batch", "bash train.sh", {"BATCH_SIZE": "0"}, "--per_device_train_batch_size 0"),
    ("processes of text", "bash train.sh", {"NUM_GPUS": "some"}, "NUM_GPUS=some"),
    ("a run that is not there", "bash evaluate.sh", {"CHECKPOINT": "no-such-run", "STEP": "99"}, "no-such-run/checkpoint-99"),
    ("a port of text", "bash web_demo.sh", {"PORT": "http"}, "--server_port"),
    ("a hub that does not answer", "python ptuning/main.py --do_predict --test_file AdvertiseGen/sample/dev.json "
     "--prompt_column content --response_column summary --model_name_or_path THUDM/chatglm2-6b --output_dir {output}",
     {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "HF_ENDPOINT"),
    ("a cache below a file", "python ptuning/main.py --do_predict --test_file AdvertiseGen/sample/dev.json "
     "--prompt_column content --response_column summary --model_name_or_path ptuning/tiny --output_dir {output}",
     {"HF_DATASETS_CACHE": "README.md/cache"}, "README.md"),
]  # fmt: skip


@pytest.mark.slow
@table(PROCESSES)
def test_a_program_is_refused_as_a_user_starts_it(case, tmp_path):
    command, variables, says = case
    environment = {**os.environ, "MODEL": "tiny", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub"), **variables}
    words = command.format(output=tmp_path / "output").split()
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert_refused(done, says)
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------------- how many


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/reliability_zh.md"])
def test_there_are_as_many_bad_inputs_as_the_documentation_says(page):
    tables = (DATA, CSV, PATHS, FLAGS, COMMANDS, SETTINGS, MODELS, CHECKPOINTS, RESUMES, DEMOS)
    tables += (ADAPTERS, ENVIRONMENTS, PROCESSES)
    said = re.search(r"(\d+) (bad inputs|种错误输入)", (ROOT / page).read_text(encoding="utf-8"))
    assert sum(map(len, tables)) >= int(said[1]) >= 120
