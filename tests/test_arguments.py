"""The command line: the flags of 2023, the scripts' command lines, mistakes."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from support.command_lines import EVALUATE, MINIMAL, NAMED, TRAIN
from transformers import Seq2SeqTrainingArguments

from arguments import parse_arguments, parse_flags
from common.flags import library_flags
from common.flags_of_2023 import translate_flags
from training.arguments import read_settings_of, use_one_device


def parse(line):
    return parse_arguments(shlex.split(line))


def test_the_official_training_command_line_means_what_it_meant():
    model_args, data_args, training_args, notes = parse(TRAIN)
    assert (model_args.pre_seq_len, model_args.quantization_bit, model_args.prefix_projection) == (128, 4, None)
    assert (data_args.prompt_column, data_args.max_source_length, data_args.max_target_length) == ("content", 64, 128)
    assert data_args.overwrite_cache and data_args.ignore_pad_token_for_loss
    assert training_args.overwrite_output_dir and training_args.predict_with_generate and training_args.do_train
    assert (training_args.max_steps, training_args.save_steps, training_args.logging_steps) == (3000, 1000, 10)
    assert (training_args.learning_rate, training_args.gradient_accumulation_steps) == (2e-2, 16)
    assert notes == []


def test_the_official_evaluation_command_line_means_what_it_meant():
    model_args, data_args, training_args, notes = parse(EVALUATE)
    assert training_args.do_predict and not training_args.do_train
    assert model_args.ptuning_checkpoint.endswith("checkpoint-3000")
    assert (data_args.do_sample, data_args.top_p, data_args.temperature) == (True, 0.7, 0.95)
    assert notes == []


def test_defaults_of_the_optimizer_are_the_official_ones():
    training_args = parse(MINIMAL)[2]
    assert training_args.weight_decay == 0.0
    assert (training_args.adam_beta1, training_args.adam_beta2, training_args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert training_args.max_grad_norm == 1.0
    assert training_args.lr_scheduler_type == "linear"
    assert training_args.warmup_steps == 0
    assert training_args.seed == 42


def test_nan_losses_are_not_filtered_out_of_the_log():
    assert parse(MINIMAL)[2].logging_nan_inf_filter is False


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        ("--evaluation_strategy steps --validation_file d.json", "eval_strategy", "steps"),
        ("--no_cuda", "use_cpu", True),
        ("--warmup_ratio 0.1", "warmup_steps", 0.1),
        ("--group_by_length", "train_sampling_strategy", "group_by_length"),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--no-cuda", "use_cpu", True),
    ],
)
def test_a_renamed_flag_is_mapped(old, name, value):
    assert getattr(parse(f"{MINIMAL} {old}")[2], name) == value


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("", None),
        ("--gradient_checkpointing auto", None),
        ("--gradient_checkpointing true", True),
        ("--gradient_checkpointing False", False),
        ("--activation_checkpointing", True),
    ],
)
def test_gradient_checkpointing_is_left_open_unless_the_user_decides(flag, value):
    assert parse(f"{MINIMAL} {flag}")[2].gradient_checkpointing is value


@pytest.mark.parametrize(
    "old",
    [
        "--use_fast_tokenizer true",
        "--use_auth_token",
        "--lang zh",
        "--save_safetensors false",
        "--half_precision_backend auto",
        "--pad_to_max_length",
    ],
)
def test_a_flag_without_effect_is_accepted_and_said(old):
    notes = parse(f"{MINIMAL} {old}")[3]
    assert len(notes) == 1
    assert notes[0].startswith(old.split()[0]) and "no effect" in notes[0]


@pytest.mark.parametrize(
    ("words", "traceback", "options"),
    [
        ("--debug", "1", []),
        ("--debug true", "1", []),
        ("--debug false", "", []),
        ("--debug underflow_overflow", None, ["underflow_overflow"]),
    ],
)
def test_debug_without_a_value_shows_tracebacks_and_with_one_is_that_of_transformers(
    words, traceback, options, monkeypatch
):
    monkeypatch.setenv("PTUNING_TRACEBACK", "")  # so that what parse() sets is taken back
    monkeypatch.delenv("PTUNING_TRACEBACK")
    training_args = parse(f"{MINIMAL} {words} --seed 3")[2]
    assert [option.value for option in training_args.debug] == options
    assert os.environ.get("PTUNING_TRACEBACK") == traceback


def test_of_a_flag_given_twice_the_last_counts_and_it_is_said():
    _, _, training_args, notes = parse(f"{MINIMAL} --max_steps 5 --max_steps 7")
    assert training_args.max_steps == 7
    assert "--max_steps is given more than once" in notes[0] and "7" in notes[0]


def test_prefix_projection_is_a_switch_as_in_2023():
    assert parse(f"{MINIMAL} --prefix_projection")[0].prefix_projection is True
    assert parse(f"{MINIMAL} --prefix_projection false --seed 1")[0].prefix_projection is False
    assert parse(MINIMAL)[0].prefix_projection is None


def test_a_json_file_gives_the_same_arguments_as_the_command_line(tmp_path):
    settings = {
        "do_train": True,
        "train_file": "t.json",
        "output_dir": "output/run",
        "model_name_or_path": "THUDM/chatglm2-6b",
        "prompt_column": "content",
        "response_column": "summary",
        "learning_rate": 0.02,
        "pre_seq_len": 16,
        "overwrite_output_dir": False,
        "history_column": None,
        "evaluation_strategy": "no",
    }
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    model_args, data_args, training_args, _ = parse_arguments([str(file)])
    assert (model_args.pre_seq_len, training_args.learning_rate) == (16, 0.02)
    assert data_args.history_column is None
    assert training_args.overwrite_output_dir is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{MINIMAL} --lerning_rate 1", r"Unknown flag --lerning_rate. Did you mean --learning_rate\?"),
        (f"{MINIMAL} --max_steps many", "--max_steps.*invalid int value: 'many'"),
        (f"{MINIMAL} --zzz", "Unknown flag --zzz"),
        ("do_train --x", "Stray word 'do_train'"),
        ("--do_train --train_file t.json", "--output_dir is missing"),
        ("--output_dir o", "Nothing to do"),
        ("--do_train --output_dir o", "--do_train needs --train_file"),
        ("--do_predict --output_dir o", "--do_predict needs --test_file"),
        ("--do_eval --output_dir o", "--do_eval needs --validation_file"),
        (f"{MINIMAL} --eval_strategy steps", "--eval_strategy steps needs --validation_file"),
        (f"{MINIMAL} --pre_seq_len 0", "--pre_seq_len 0: expected at least 1"),
        (f"{MINIMAL} --prefix_dropout 1.5", "--prefix_dropout 1.5"),
        (f"{MINIMAL} --per_device_train_batch_size 99999999999999999999", "batch_size 9+: expected at most 4294967295"),
        (f"{MINIMAL} --source_prefix \udcd0", "--source_prefix is not text in UTF-8. Set the terminal"),
        (f"{MINIMAL} --save_total_limit 4294967296", "--save_total_limit 4294967296: expected at most 4294967295"),
        (f"{MINIMAL} --max_source_length 0", "--max_source_length 0"),
        (f"{MINIMAL} --max_train_samples 0", "--max_train_samples 0"),
        (f"{MINIMAL} --top_p 0", "--top_p 0"),
        (f"{MINIMAL} --temperature 0", "--do_sample false is greedy"),
        (f"{MINIMAL} --fp16 maybe", "--fp16: expected true or false, not 'maybe'"),
        (f"{MINIMAL} --lr_scheduler_type linaer", "--lr_scheduler_type: invalid choice: 'linaer'.*linear"),
        (f"{MINIMAL} --quantize_output_layer", "--quantize_output_layer is for answers"),
        *(
            (
                f"{MINIMAL} --device_map auto --stage {stage}",
                "--device_map auto spreads a model for answers; .* --quantization_bit 4, or .*--fsdp",
            )
            for stage in ("sft", "rm", "dpo", "ppo")
        ),
        (
            f"--do_predict --test_file t.json --output_dir o --device_map auto --stage rm {NAMED}",
            "--device_map auto is for answers and dev losses",
        ),
        (f"{MINIMAL} --device_map sequential", "--device_map: invalid choice: 'sequential'.*auto"),
        (f"{MINIMAL} --quantization_backend cuda", "--quantization_backend: invalid choice: 'cuda'.*triton"),
        (f"--do_train --train_file t.json --output_dir o {NAMED}", "--do_train needs --pre_seq_len"),
        (f"--do_predict --test_file t.json --output_dir o --pre_seq_len 8 {NAMED}", "with a random prefix"),
        ("--do_predict --test_file t.json --output_dir o", "--model_name_or_path is missing"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(line, message):
    with pytest.raises(ValueError, match=message):
        parse(line)


def test_a_flag_that_needs_another_package_names_it(monkeypatch):
    def refuse(**settings):
        raise ImportError("Using --optim lomo requires lomo-optim")

    monkeypatch.setattr("training.arguments.PrefixTrainingArguments", refuse)
    with pytest.raises(ValueError, match="needs a package that is not installed: .* requires lomo-optim"):
        parse(MINIMAL)


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_settings_file_may_be_in_any_encoding_of_data_files(encoding, tmp_path):
    words = MINIMAL.split()[1:]
    given = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    settings = {"do_train": True, "source_prefix": "写广告：", **given}
    (tmp_path / "settings.json").write_text(json.dumps(settings, ensure_ascii=False), encoding=encoding)
    assert parse_flags([str(tmp_path / "settings.json")])[1].source_prefix == "写广告："


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("accelerator_config", {"split_batches": True, "写广告": 1}),
        ("fsdp_config", {"写广告": 1}),
        ("deepspeed", {"写广告": 1}),
    ],
)
def test_a_file_that_a_flag_names_may_be_in_any_encoding_of_data_files(flag, settings, encoding, tmp_path):
    file = tmp_path / "flag.json"
    file.write_text(json.dumps(settings, ensure_ascii=False), encoding=encoding)
    assert read_settings_of(flag, str(file)) == settings


def test_a_key_that_stands_twice_in_a_file_that_a_flag_names_is_refused(tmp_path):
    file = tmp_path / "flag.json"
    file.write_text('{"fp16": {\n"enabled": true, "enabled": false}}')
    minimal = MINIMAL.replace("--pre_seq_len 128", "--finetuning_type full")
    for flag in ("--accelerator_config", "--deepspeed", "--fsdp full_shard --fsdp_config"):
        with pytest.raises(ValueError, match="flag.json line 1 begins an object that has the key 'enabled' twice"):
            parse(f"{minimal} {flag} {file}")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_settings_file_is_named(text, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"settings\.json"):
        parse_arguments([str(file)])


def test_a_missing_settings_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        parse_arguments(["none.json"])


def test_a_dev_loss_during_training_does_not_turn_on_the_generation_at_the_end():
    assert parse(f"{MINIMAL} --eval_strategy steps --validation_file d.json")[2].do_eval is False


@pytest.mark.parametrize(("devices", "said"), [("7", True), ("-1", False), ("", False)])
def test_gpus_that_are_not_there_are_said(devices, said, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert any(f"CUDA_VISIBLE_DEVICES={devices}" in note for note in parse(MINIMAL)[3]) == said


def test_one_process_uses_one_of_several_gpus_and_says_how_to_use_all():
    training_args = parse(MINIMAL)[2]
    training_args._n_gpu = 4
    assert "python ptuning/launch.py --nproc-per-node=4 ptuning/main.py" in use_one_device(training_args)[0]
    assert training_args.n_gpu == 1
    assert use_one_device(training_args) == []


def test_more_processes_than_gpus_are_one_message(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(
        ValueError, match=r"no GPU for process 3 .*: 2 can be used \(CUDA_VISIBLE_DEVICES=4,5\). Give NUM_GPUS=2"
    ):
        parse(MINIMAL)


def test_a_flag_that_transformers_still_has_is_left_alone():
    assert translate_flags(["--adafactor", "true"], {"adafactor"}) == (["--adafactor", "true"], [])


def test_the_flags_read_from_the_source_of_transformers_are_its_own():
    flags = library_flags()
    declared = {entry.name: entry for entry in dataclasses.fields(Seq2SeqTrainingArguments) if entry.init}
    assert flags.keys() == declared.keys()
    for name in flags.keys() - {"optim"}:  # whose default is computed
        if declared[name].default is not dataclasses.MISSING:
            assert flags[name].default == declared[name].default, name
    assert {"steps", "epoch", "no"} == set(flags["eval_strategy"].choices)


def test_only_the_flags_that_were_given_are_passed_to_transformers():
    given = parse_flags(shlex.split(f"{MINIMAL} --fp16 --no_dataloader_pin_memory --report_to wandb tensorboard"))[2]
    assert given == {
        "do_train": True,
        "output_dir": "output/run",
        "fp16": True,
        "dataloader_pin_memory": False,
        "report_to": ["wandb", "tensorboard"],
    }


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("main.py --help", 0, "--pre_seq_len"),
        ("main.py --do_train --output_dir o", 2, "--do_train needs --train_file"),
        (f"main.py {MINIMAL} --max_steps many", 2, "invalid int value"),
        ("cli_demo.py --help", 0, "--temperature"),
        ("api_demo.py --help", 0, "--api_key"),
        ("web_demo.py --help", 0, "--server_port"),
        ("web_demo.py --auth nobody", 2, "user:password"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_the_libraries(words, status, text):
    program, *flags = shlex.split(words)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "ptuning" / program), *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "arguments" in imported
    assert not imported & {"torch", "transformers", "gradio", "fastapi", "numpy"}


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_an_engine_that_only_accelerates_file_names_is_refused(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(ValueError, match=f"accelerate is configured for {engine}, which a flag decides here"):
        parse(MINIMAL)


def test_one_process_is_said_where_accelerate_was_asked_for_more(monkeypatch):
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "accelerate launch --cpu starts one process" in parse(MINIMAL)[3][0]
