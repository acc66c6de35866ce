"""Whole runs of --stage rm and dpo: what a checkpoint holds, resuming, evaluation, scores, what is refused."""

import json
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SAMPLE
from support.pairs import METHODS, TRAIN, figures, pair_rows, run, write_pairs
from support.resuming import flip_bit
from support.runs import flags

import preference
from arguments import parse_flags
from checkpoints.weight_files import read_tensors
from first_look import look_at_demo, look_at_run
from serving.page_kept import FeedbackFile
from serving.page_kept import preference as preference_of
from training.results import describe_end
from tuning.swapping import trained_weights

COMPARED = ("loss", "margin", "accuracy", "eval_loss", "eval_margin", "eval_accuracy")
STAGES = [("rm", method) for method in METHODS] + [("dpo", "prefix"), ("dpo", "lora"), ("dpo", "int4 prefix")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags that name a file of training pairs and one of dev pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    dev = write_pairs(folder / "dev.json", 6, start=40)
    return {"train_file": write_pairs(folder / "train.json", 40), "validation_file": dev}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, files):
    """{(stage, method): (folder of a run of 4 steps with checkpoints 2 and 4, its trainer)}"""
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        for stage, method in STAGES:
            folder = tmp_path_factory.mktemp(f"{stage}-{method}".replace(" ", "-"))
            settings = {**TRAIN, **files, **METHODS[method], "logging_steps": 3}
            done[stage, method] = folder, run(patch, settings, stage=stage, output_dir=folder)
    return done


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def states(trainer):
    weights = {**trained_weights(trainer.model), **dict(trainer.model.named_parameters())}
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


@pytest.mark.parametrize("case", STAGES, ids="-".join)
def test_a_checkpoint_holds_all_that_trained_under_checksums(runs, case):
    checkpoint = runs[case][0] / "checkpoint-4"
    beside = "value_head.bin" if case[0] == "rm" else "reference.bin"
    assert beside in read(checkpoint / "checksums.json")
    assert read(checkpoint / "ptuning.json")["stage"] == case[0]
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 3e6  # no base model


@pytest.mark.parametrize("case", STAGES, ids="-".join)
def test_a_resumed_run_ends_as_the_uninterrupted_one(runs, files, monkeypatch, tmp_path, case):
    stage, method = case
    folder, trainer = runs[case]
    settings = {**TRAIN, **files, **METHODS[method], "logging_steps": 3, "stage": stage}
    resumed = run(monkeypatch, settings, output_dir=tmp_path, resume_from_checkpoint=folder / "checkpoint-2")
    for name, weight in states(trainer).items():
        assert torch.equal(weight, states(resumed)[name]), name
    after = [line for line in figures(folder) if line["current_steps"] > 2]
    assert figures(tmp_path) == after and any("accuracy" in line for line in after)
    if stage == "dpo":
        reference = dict(read_tensors(folder / "checkpoint-2" / "reference.bin"))
        assert all(torch.equal(value, reference[name]) for name, value in resumed.objective.reference.values.items())


@pytest.mark.parametrize("case", [("rm", "prefix"), ("rm", "int8 lora"), ("dpo", "lora")], ids="-".join)
def test_evaluation_of_a_checkpoint_gives_the_figures_of_training(runs, files, monkeypatch, tmp_path, case):
    stage, method = case
    settings = {"stage": stage, "do_eval": True, "validation_file": files["validation_file"], "disable_tqdm": True}
    run(monkeypatch, settings, ptuning_checkpoint=runs[case][0] / "checkpoint-4", output_dir=tmp_path)
    logged, found = figures(runs[case][0])[-1], read(tmp_path / "eval_results.json")
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5), name


def test_rows_are_scored_one_by_one(runs, monkeypatch, tmp_path):
    rows = pair_rows(5, start=60)
    rows += [{"content": rows[0]["content"], "summary": rows[0]["chosen"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {"stage": "rm", "do_predict": True, "test_file": tmp_path / "rows.json", "response_column": "summary"}
    checkpoint = runs["rm", "prefix"][0] / "checkpoint-4"
    run(monkeypatch, settings, ptuning_checkpoint=checkpoint, output_dir=tmp_path, per_device_eval_batch_size=4)
    lines = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[5]["score"] == pytest.approx(lines[0]["chosen"], abs=1e-5)
    margins = [line["chosen"] - line["rejected"] for line in lines[:5]]
    results = read(tmp_path / "predict_results.json")
    assert results["predict_margin"] == pytest.approx(sum(margins) / 5)
    assert results["predict_accuracy"] == sum(margin > 0 for margin in margins) / 5


def test_the_first_loss_of_a_run_of_dpo_is_log_2_cached_or_not(files, monkeypatch, tmp_path):
    settings = {**TRAIN, **files, **METHODS["prefix"], "stage": "dpo", "logging_steps": 1, "eval_strategy": "no"}
    found = {}
    for cache in (False, True):
        run(monkeypatch, settings, output_dir=tmp_path / str(cache), dpo_cache=cache)
        found[cache] = [line["loss"] for line in figures(tmp_path / str(cache))]
    assert found[False][0] == pytest.approx(math.log(2), rel=1e-7)
    assert found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_what_visitors_of_the_page_preferred_trains_as_it_is(stage, monkeypatch, tmp_path):
    file, kept = FeedbackFile(tmp_path / "train.jsonl"), {"earlier": {}}
    for row in pair_rows(6):
        turns = {"tuned": [[row["content"], row["chosen"]]], "base": [[row["content"], row["rejected"]]]}
        file.append(preference_of({**kept, **turns}, "both", "tuned", 0, True))
    columns = {"prompt_column": "prompt", "history_column": "history", "eval_strategy": "no"}
    settings = {**TRAIN, **METHODS["prefix"], **columns, "train_file": tmp_path / "train.jsonl", "max_steps": 1}
    trainer = run(monkeypatch, settings, stage=stage, output_dir=tmp_path / "run")
    assert len(trainer.train_dataset) == 6 and trainer.state.global_step == 1


def test_a_step_is_the_same_in_one_batch_and_in_accumulated_ones(files, monkeypatch, tmp_path):
    settings = {**TRAIN, **files, **METHODS["prefix"], "stage": "rm", "prefix_dropout": 0, "max_train_samples": 30}
    found = []
    for rows, accumulated in ((8, 1), (2, 4)):
        folder = tmp_path / str(rows)
        batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        run(monkeypatch, settings, output_dir=folder, auto_find_batch_size=accumulated == 1, **batches)
        found.append([line[name] for line in figures(folder) for name in ("loss", "margin") if line["loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_dpo_has_trained_answers_as_any_checkpoint_does(runs, monkeypatch, tmp_path):
    settings = {
        "do_predict": True,
        "test_file": SAMPLE / "dev.json",
        "response_column": "summary",
        "disable_tqdm": True,
    }
    settings |= {"max_predict_samples": 3, "max_target_length": 8, "output_dir": tmp_path}
    run(monkeypatch, settings, ptuning_checkpoint=runs["dpo", "lora"][0])
    assert len((tmp_path / "generated_predictions.txt").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_two_processes_train_evaluate_and_score_as_one(files, monkeypatch, tmp_path, stage):
    settings = {**TRAIN, **files, **METHODS["prefix"], "stage": stage, "prefix_dropout": 0, "logging_steps": 1}
    settings |= {"max_train_samples": 13, "do_eval": True}  # the last step of an epoch has 5 pairs
    settings |= {"dpo_cache": True} if stage == "dpo" else {"do_predict": True, "test_file": files["validation_file"]}
    run(monkeypatch, settings, output_dir=tmp_path / "one")
    words = flags({**settings, "per_device_train_batch_size": 2, "output_dir": tmp_path / "two"})
    launch = [ROOT / "ptuning" / "launch.py", "--standalone", "--nproc-per-node=2", ROOT / "ptuning" / "main.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *words], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        lines = [line[name] for line in figures(folder) for name in line if name in COMPARED and line[name] is not None]
        results = read(folder / "eval_results.json")
        lines += [results[name] for name in COMPARED if name in results]
        if stage == "rm":
            scores = (folder / "generated_predictions.jsonl").read_text().splitlines()
            lines += [json.loads(line)[name] for line in scores for name in ("chosen", "rejected")]
        found.append(lines)
    assert len(found[0]) > 20
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)


def test_the_end_of_a_reward_model_says_how_to_score_and_names_no_demo():
    state = SimpleNamespace(global_step=4, best_global_step=4, log_history=[])
    for stage, talks in (("rm", False), ("dpo", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.results.describe_checkpoints", lambda *_: "Best.")
            text = describe_end(state, SimpleNamespace(output_dir="run", plot_loss=False, stage=stage), "dev.json")
        assert ("--stage rm --do_predict" in text, "web_demo.py" in text) == (not talks, talks)


# ---- refusals

REFUSALS = {
    "a flag of another stage": ({"stage": "rm", "dpo_beta": 0.2}, "--dpo_beta 0.2 belongs to --stage dpo"),
    "beta without a stage": ({"dpo_beta": 0.2}, "--dpo_beta 0.2 belongs to --stage dpo"),
    "full": ({"stage": "rm", "pre_seq_len": None, "finetuning_type": "full"}, "--finetuning_type full is neither"),
    "no reward model": ({"stage": "ppo"}, "--stage ppo needs --reward_model"),
    "smoothing of answers": ({"stage": "dpo", "label_smoothing_factor": 0.1}, "--dpo_label_smoothing is that of dpo"),
    "all pairs the wrong way": ({"stage": "dpo", "dpo_label_smoothing": 0.5}, "from 0 up to, but not, 0.5"),
    "answers in training": (
        {"stage": "rm", "eval_with_generate": True},
        "--eval_with_generate True is for --stage sft",
    ),
    "the official recipe": ({"stage": "rm", "precision": "official"}, "--precision official is for --stage sft"),
    "a random head": ({"stage": "rm", "do_train": None, "do_eval": True}, "give --ptuning_checkpoint"),
    "answers of dpo": ({"stage": "dpo", "do_predict": True, "test_file": "x.json"}, "--do_predict with --stage dpo"),
    "no prefix": ({"stage": "rm", "pre_seq_len": None}, "--do_train needs --pre_seq_len"),
    "an unknown stage": ({"stage": "rlhf"}, "stage"),
    "no such metric": ({"stage": "dpo", "metric_for_best_model": "bleu-4"}, "expected loss or accuracy or margin"),
}


def refuse_to_load(*args, **kwargs):
    raise AssertionError("the model is read")


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_before_the_model_is_read(monkeypatch, files, tmp_path, case):
    wrong, message = REFUSALS[case]
    monkeypatch.setattr(preference, "load_model", refuse_to_load)
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, {**TRAIN, **files, **METHODS["prefix"], "output_dir": tmp_path, **wrong})


def test_a_run_goes_on_in_its_own_stage_only(runs, files, monkeypatch, tmp_path):
    checkpoint = runs["rm", "prefix"][0] / "checkpoint-2"
    settings = {**TRAIN, **files, **METHODS["prefix"], "output_dir": tmp_path, "resume_from_checkpoint": checkpoint}
    with pytest.raises(ValueError, match="written with --stage rm, and this run is --stage dpo"):
        run(monkeypatch, settings, stage="dpo")
    with pytest.raises(ValueError, match="written with --stage rm, and this run is --stage sft"):
        run(monkeypatch, settings, response_column="chosen", eval_strategy="no")


def test_a_checkpoint_that_is_no_reward_model_scores_nothing(runs, files, monkeypatch, tmp_path):
    settings = {"stage": "rm", "do_eval": True, "validation_file": files["validation_file"], "output_dir": tmp_path}
    with pytest.raises(FileNotFoundError, match="is no reward model: there is no value_head.bin"):
        run(monkeypatch, settings, ptuning_checkpoint=runs["dpo", "prefix"][0] / "checkpoint-4")
    settings["stage"] = "dpo"
    with pytest.raises(FileNotFoundError, match="no reference.bin, so --stage dpo has not written it. Without --stage"):
        run(monkeypatch, settings, ptuning_checkpoint=runs["rm", "prefix"][0] / "checkpoint-4")


def test_a_damaged_head_is_refused(runs, files, monkeypatch, tmp_path):
    checkpoint = shutil.copytree(runs["rm", "prefix"][0] / "checkpoint-4", tmp_path / "checkpoint-4")
    flip_bit(checkpoint / "value_head.bin")
    settings = {"stage": "rm", "do_eval": True, "validation_file": files["validation_file"], "output_dir": tmp_path}
    with pytest.raises(ValueError, match=r"is damaged: value_head\.bin is not what was written"):
        run(monkeypatch, settings, ptuning_checkpoint=checkpoint)


def test_what_needs_no_torch_is_told_before_it_is_loaded(runs, files, tmp_path):
    folder = runs["dpo", "prefix"][0]
    words = flags({**TRAIN, **files, **METHODS["prefix"], "output_dir": tmp_path, "stage": "ppo"})
    for reward_model, message in ((folder, "is no reward model"), (tmp_path / "none", "there is no such folder")):
        with pytest.raises(FileNotFoundError, match=message):
            look_at_run(*parse_flags([*words, "--reward_model", str(reward_model)]))
    evaluation = {"stage": "rm", "do_eval": True, "ptuning_checkpoint": folder, "output_dir": tmp_path}
    other = {**evaluation, "stage": "dpo", "ptuning_checkpoint": runs["rm", "prefix"][0]}
    with pytest.raises(FileNotFoundError, match="so --stage dpo has not written it. Without --stage it is evaluated"):
        look_at_run(*parse_flags(flags({**other, "validation_file": files["validation_file"]})))
    with pytest.raises(FileNotFoundError, match="is no reward model"):
        look_at_run(*parse_flags(flags({**evaluation, "validation_file": files["validation_file"]})))
    bad = tmp_path / "bad.json"
    bad.write_text('[{"content": "a", "chosen": ["b"], "rejected": 1}]')
    words = flags({**TRAIN, **files, **METHODS["lora"], "train_file": bad, "output_dir": tmp_path, "stage": "dpo"})
    with pytest.raises(ValueError, match="bad.json row 1: column 'chosen'"):
        look_at_run(*parse_flags(words))


def test_a_demo_does_not_answer_with_a_reward_model(runs):
    args = Namespace(ptuning_checkpoint=str(runs["rm", "lora"][0]), pre_seq_len=None, model_name_or_path=None)
    with pytest.raises(ValueError, match="checkpoint-4 is a reward model: it scores answers, and gives none"):
        look_at_demo(args)
