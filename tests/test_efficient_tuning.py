"""ChatGLM-Efficient-Tuning's users arrive: the commands of its README, with only the program's path changed."""

import json
import shlex

import pytest
from conftest import TINY
from support.finetuned import TRAIN as FINETUNING
from support.finetuned import run as run_here

import api_demo
import cli_demo
import export_model
import web_demo
from arguments import parse_flags

MODEL = "--model_name_or_path path_to_your_chatglm_model"
RATES = (
    "--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 --save_steps 1000 "
    "--learning_rate {} --num_train_epochs {} --plot_loss"
)
TUNED = f"{MODEL} --finetuning_type lora --checkpoint_dir path_to_checkpoint"
TRAIN = (
    f"--stage sft {MODEL} --do_train --dataset alpaca_gpt4_en --finetuning_type lora "
    f"--output_dir path_to_sft_checkpoint --per_device_train_batch_size 4 {RATES.format('5e-5', '3.0')} --fp16"
)
REWARD = (
    f"--stage rm {MODEL} --do_train --dataset comparison_gpt4_en --finetuning_type lora --resume_lora_training False "
    "--checkpoint_dir path_to_sft_checkpoint --output_dir path_to_rm_checkpoint --per_device_train_batch_size 4 "
    f"{RATES.format('1e-5', '1.0')} --fp16"
)
PPO = (
    f"--stage ppo {MODEL} --do_train --dataset alpaca_gpt4_en --finetuning_type lora --resume_lora_training False "
    "--checkpoint_dir path_to_sft_checkpoint --reward_model path_to_rm_checkpoint --output_dir path_to_ppo_checkpoint "
    f"--per_device_train_batch_size 2 {RATES.format('1e-5', '1.0')}"
)
EVALUATE = (
    f"--stage sft {MODEL} --do_eval --dataset alpaca_gpt4_en --finetuning_type lora --checkpoint_dir path_to_checkpoint "
    "--output_dir path_to_eval_result --per_device_eval_batch_size 8 --max_samples 50 --predict_with_generate"
)
PREDICT = (
    f"--stage sft {MODEL} --do_predict --dataset alpaca_gpt4_en --finetuning_type lora "
    "--checkpoint_dir path_to_checkpoint --output_dir path_to_predict_result --per_device_eval_batch_size 8 "
    "--max_samples 100 --predict_with_generate"
)
# The scripts in its examples/, where they give other flags than the README.
DEV_SET = TRAIN.replace("--fp16", "").replace("--save_steps 1000", "--save_steps 100") + (
    " --overwrite_cache --dataset_dir ../data --per_device_eval_batch_size 4 --evaluation_strategy steps "
    "--save_strategy steps --eval_steps 100 --dev_ratio 0.01 --load_best_model_at_end"
)
ADVERTS = f"{TRAIN} --lora_rank 32 --ddp_find_unused_parameters False --source_prefix 你现在是一名销售员。"


@pytest.mark.parametrize(
    "line", [TRAIN, REWARD, PPO, EVALUATE, PREDICT, DEV_SET, ADVERTS, f"{TRAIN} --quantization_bit 4"]
)
def test_a_command_for_train_bash_is_one_for_main(line):
    words = shlex.split(line)
    model_args, data_args, given, notes = parse_flags(words)
    flags = {
        name: words[words.index(f"--{name}") + 1] for name in ("stage", "dataset", "output_dir", "finetuning_type")
    }
    found = {**vars(model_args), **vars(data_args), **given}
    assert flags == {name: found[name] for name in flags}
    assert [note for note in notes if not note.startswith("--stage")] == []


@pytest.mark.parametrize("program", [api_demo, cli_demo, web_demo])
@pytest.mark.parametrize("line", [TUNED, "--checkpoint_dir path_to_checkpoint"])
def test_a_command_for_its_demos_is_one_for_ours(program, line):
    args = program.parse_arguments(shlex.split(line))
    assert (args.ptuning_checkpoint, args.notes, args.sampling) == ("path_to_checkpoint", [], {})


def test_a_command_for_its_export_is_one_for_ours(tmp_path):
    args = export_model.parse_arguments(
        shlex.split(TUNED.replace("path_to_checkpoint", "lora")) + ["--output_dir", str(tmp_path / "new")]
    )
    assert (args.ptuning_checkpoint, args.finetuning_type, args.notes) == ("lora", "lora", [])


def test_its_commands_train_evaluate_predict_answer_and_export_one_after_the_other(forks, tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"介绍{number}号裙子", "input": "", "output": "好看的裙子。"} for number in range(20)]
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    pairs = [{**row, "output": ["好看的裙子。", f"{number}"]} for number, row in enumerate(rows)]
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    info = {"alpaca_gpt4_en": {"file_name": "rows.json"}, "comparison_gpt4_en": {"file_name": "pairs.json"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")

    def run(program, line, more=""):
        line = line.replace("path_to_your_chatglm_model", str(TINY)).replace(
            "path_to_checkpoint", "path_to_sft_checkpoint"
        )
        done = forks.run(program, shlex.split(f"{line} {more}"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    short = "--max_target_length 8 --max_samples 3"
    assert "its old defaults hold: --max_source_length 512" in run("main.py", TRAIN, "--report_to none")
    run("main.py", REWARD, "--report_to none")
    assert list((tmp_path / "path_to_rm_checkpoint").glob("checkpoint-*/value_head.bin"))
    run("main.py", PPO, "--report_to none --max_target_length 8 --max_source_length 32 --max_steps 1")
    assert list((tmp_path / "path_to_ppo_checkpoint").glob("checkpoint-1/reference.bin"))
    run("main.py", EVALUATE, short)
    run("main.py", PREDICT, short)
    run("export_model.py", f"{TUNED} --output_dir path_to_export")
    assert "eval_bleu-4" in json.loads((tmp_path / "path_to_eval_result" / "all_results.json").read_text())
    predictions = tmp_path / "path_to_predict_result" / "generated_predictions.txt"
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == 3
    assert (tmp_path / "path_to_export" / "config.json").is_file()


def test_the_best_adapter_is_loaded_at_the_end_where_dev_rows_are_held_out(monkeypatch, tmp_path, capsys):
    settings = {**FINETUNING, "stage": "sft", "finetuning_type": "lora", "load_best_model_at_end": True}
    run_here(monkeypatch, settings, dev_ratio=0.1, save_steps=2, output_dir=tmp_path)
    output = capsys.readouterr().out
    assert "--load_best_model_at_end needs a dev loss, so --eval_strategy steps: one at every save." in output
    assert f"The best checkpoint has been loaded: {(tmp_path / 'best').resolve()}" in output


# ---- every flag of its parsers

ITS_OWN = """--dataset a --dataset_dir data --split train --overwrite_cache True --preprocessing_num_workers 2
--max_source_length 512 --max_target_length 512 --max_samples 9 --eval_num_beams 2 --ignore_pad_token_for_loss True
--source_prefix 你好 --dev_ratio 0.1 --finetuning_type lora --lora_rank 8 --lora_alpha 32.0 --lora_dropout 0.1
--lora_target query_key_value,dense --stage sft --model_name_or_path m --config_name c --tokenizer_name t --cache_dir d
--use_fast_tokenizer True --model_revision main --use_auth_token False --quantization_bit 4 --quantization_type nf4
--double_quantization True --compute_dtype float16 --checkpoint_dir a,b --resume_lora_training True
--plot_loss True --use_v2 True --prompt_column p --response_column r"""
SAMPLING = """--do_sample false --temperature 0.5 --top_p 0.6 --top_k 50 --num_beams 1 --max_length 99 --max_new_tokens 77
--repetition_penalty 1.0"""
SILENT = {"config_name", "tokenizer_name", "use_fast_tokenizer", "use_auth_token", "use_v2", "quantization_type"}
SILENT |= {"double_quantization", "compute_dtype"}


def test_every_flag_of_its_training_is_accepted_and_what_has_no_effect_is_said():
    model_args, data_args, _, notes = parse_flags(shlex.split(f"--do_train --output_dir o {ITS_OWN}"))
    assert (data_args.num_beams, data_args.source_prefix, model_args.cache_dir) == (2, "你好", "d")
    assert {note.split()[0][2:] for note in notes} == SILENT
    assert "--quantization_type is accepted and has no effect: integer weights are ChatGLM2's own int4" in " ".join(
        notes
    )


@pytest.mark.parametrize("program", [api_demo, cli_demo, web_demo])
def test_every_flag_of_its_demos_is_accepted_and_sampling_is_as_asked(program):
    args = program.parse_arguments(shlex.split(f"{ITS_OWN} {SAMPLING}"))
    assert args.sampling == {"max_new_tokens": 77, "top_p": 0.6, "temperature": 0.0}
    assert (args.source_prefix, args.cache_dir, args.model_revision) == ("你好", "d", "main")
    assert any(note.startswith("--lora_rank is accepted and has no effect here") for note in args.notes)


def test_every_flag_of_its_export_is_accepted():
    words = shlex.split(f"{ITS_OWN} {SAMPLING} --fp16 --per_device_train_batch_size 4 --output_dir new-folder")
    assert len(export_model.parse_arguments(words).notes) > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--top_k 20", "--top_k 20: a token is chosen from the 50 likeliest"),
        ("--num_beams 4", "--num_beams 4: an answer is written token by token; --do_predict"),
        ("--repetition_penalty 1.2", "--repetition_penalty 1.2: repetition is not penalized"),
        ("--lora_rankk 4", "Unknown flag --lora_rankk"),
        ("--finetuning_type magic", "--finetuning_type"),
    ],
)
def test_what_a_demo_cannot_do_as_asked_is_refused(words, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        cli_demo.parse_arguments(shlex.split(f"--model_name_or_path m {words}"))


@pytest.mark.parametrize("words", ["--top_p 0.7 --temperature 0.5", "--do_sample false", "--num_beams 4"])
def test_what_predictions_are_sampled_with_is_named_where_ppo_does_not_read_it(words):
    notes = " ".join(parse_flags(shlex.split(f"{PPO} {words}"))[3])
    flags = [word for word in words.split() if word.startswith("--")]
    assert f"{', '.join(flags)} is not read: --stage ppo draws every token as likely as the model says." in notes


# ---- files of flags


def test_a_yaml_file_gives_what_the_json_file_gives(tmp_path):
    settings = {
        "stage": "sft",
        "do_train": True,
        "dataset": "广告",
        "output_dir": "o",
        "learning_rate": 2e-2,
        "seed": None,
    }
    settings |= {"model_name_or_path": "m", "report_to": ["none"], "lr_scheduler_kwargs": {"a": 1}}
    text = "# 注释\nstage: sft\ndo_train: yes\ndataset: 广告\noutput_dir: o\nlearning_rate: 2e-2\nseed:\nmodel_name_or_path: m\n"
    (tmp_path / "s.yaml").write_text(text + "report_to:\n- none\nlr_scheduler_kwargs: {a: 1}\n", encoding="gb18030")
    (tmp_path / "s.json").write_text(json.dumps(settings))
    assert parse_flags([str(tmp_path / "s.yaml")]) == parse_flags([str(tmp_path / "s.json")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "s.yaml line 2 is not valid YAML: the key 'a' stands twice"),
        ("a: &x [1]\nb: *x", "line 2 is not valid YAML: an alias"),
        ("a: [", "line 1 is not valid YAML: expected the node content"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("[" * 5000, "nested too deep"),
        ("- a", "must hold one object of flags and values, not a list"),
        ("", "must hold one object"),
    ],
)
def test_a_wrong_yaml_file_is_refused(text, message, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_flags([str(tmp_path / "s.yaml")])
