"""Whole runs of --stage ppo: the first ratio, what trains, resuming, evaluation, processes, what is refused."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from support.pairs import METHODS, TRAIN, figures, run, write_pairs

import alignment.ppo_trainer
import preference
from checkpoints.weight_files import read_tensors
from tuning.swapping import trained_weights

PPO = {**TRAIN, "stage": "ppo", "ppo_epochs": 2, "logging_steps": 3, "max_target_length": 8, "max_eval_samples": 3}
# The policy's way of tuning: that of its reward model.
KINDS = {"prefix": "lora", "lora": "lora", "int4 prefix": "prefix", "int8 lora": "prefix"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags that name files of rows; the answers in them are not read."""
    folder = tmp_path_factory.mktemp("prompts")
    dev = write_pairs(folder / "dev.json", 6, start=40)
    return {"train_file": write_pairs(folder / "train.json", 30), "validation_file": dev}


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, files):
    """{way of tuning: the folder of a run of rm}"""
    folders = {kind: tmp_path_factory.mktemp(f"rm-{kind}") for kind in ("prefix", "lora")}
    with pytest.MonkeyPatch.context() as patch:
        for kind, folder in folders.items():
            settings = {**TRAIN, **files, **METHODS[kind], "stage": "rm", "max_steps": 2, "eval_strategy": "no"}
            run(patch, settings, output_dir=folder)
    return folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory, files, reward_models):
    """{way of tuning: (folder of a run of 4 steps with checkpoints 2 and 4, its trainer, its ratios of each pass)}"""
    done = {}
    for kind, reward in KINDS.items():
        folder, passes, losses = (
            tmp_path_factory.mktemp(f"ppo-{kind}".replace(" ", "-")),
            [],
            alignment.ppo_trainer.policy_losses,
        )

        def noted(log_probs, old_log_probs, *more, passes=passes, losses=losses):
            passes.append((log_probs - old_log_probs).exp().detach())
            return losses(log_probs, old_log_probs, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(alignment.ppo_trainer, "policy_losses", noted)
            settings = {**PPO, **files, **METHODS[kind], "reward_model": reward_models[reward], "output_dir": folder}
            done[kind] = folder, run(patch, settings), passes
    return done


def weights_of(trainer):
    return {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_exactly_1_in_the_first_pass_of_a_step_and_not_in_the_second(runs, kind):
    passes = runs[kind][2]
    assert len(passes) == 8  # 4 steps of 2; the accumulated batches are computed at once
    assert all((ratio == 1).all() for ratio in passes[0::2])
    assert not any((ratio == 1).all() for ratio in passes[1::2])


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_or_adapter_and_value_head_train_and_reference_and_reward_model_do_not(runs, reward_models, kind):
    folder, trainer, _ = runs[kind]
    checkpoint = folder / "checkpoint-4"
    reference = dict(read_tensors(checkpoint / "reference.bin"))
    begun = dict(read_tensors(folder / "checkpoint-2" / "reference.bin"))
    trained = trained_weights(trainer.model)
    assert trained.keys() == reference.keys() and weights_of(trainer).keys() == {
        *trained,
        "value_head.weight",
        "value_head.bias",
    }
    assert all(torch.equal(tensor, begun[name]) for name, tensor in reference.items())
    assert not any(torch.equal(weight, reference[name]) for name, weight in trained.items())
    reward = next((reward_models[KINDS[kind]]).glob("checkpoint-2"))
    head, started = (dict(read_tensors(place / "value_head.bin")) for place in (checkpoint, reward))
    assert not torch.equal(head["summary.weight"], started["summary.weight"])
    kept = trainer.objective.reward_model.head
    assert torch.equal(kept.weight, preference.read_value_head(reward, len(kept.weight)).weight)
    assert {"value_head.bin", "reference.bin"} <= json.loads((checkpoint / "checksums.json").read_text()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(runs, files, reward_models, monkeypatch, tmp_path, kind):
    folder, trainer, _ = runs[kind]
    settings = {**PPO, **files, **METHODS[kind], "reward_model": reward_models[KINDS[kind]], "output_dir": tmp_path}
    resumed = run(monkeypatch, settings, resume_from_checkpoint=folder / "checkpoint-2")
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    after = [line for line in figures(folder) if line["current_steps"] > 2]
    assert figures(tmp_path) == after
    assert resumed.seen.kl_coef == trainer.seen.kl_coef != 0.2


def test_the_log_has_the_figures_of_ppo_and_the_best_checkpoint_is_that_of_the_highest_reward(runs):
    folder, trainer, _ = runs["lora"]
    steps = [line for line in figures(folder) if line["loss"] is not None]
    dev = [line for line in figures(folder) if line["loss"] is None]
    names = {"reward", "kl", "entropy", "answer_length", "kl_coef", "clip_fraction"}
    assert all(names <= line.keys() for line in steps) and len(dev) == 3
    assert all(
        0 < line["answer_length"] <= 9 and 0 <= line["clip_fraction"] < 1 and line["entropy"] > 0 for line in steps
    )
    best = max((line for line in dev if line["current_steps"] in (2, 4)), key=lambda line: line["eval_reward"])
    assert trainer.state.best_global_step == best["current_steps"]


def test_evaluation_of_a_checkpoint_gives_the_figures_of_training(runs, files, reward_models, monkeypatch, tmp_path):
    settings = {"stage": "ppo", "do_eval": True, "validation_file": files["validation_file"], "disable_tqdm": True}
    settings |= {"max_eval_samples": 3, "reward_model": reward_models["lora"], "output_dir": tmp_path}
    run(monkeypatch, settings, ptuning_checkpoint=runs["lora"][0] / "checkpoint-4")
    found, logged = json.loads((tmp_path / "eval_results.json").read_text()), figures(runs["lora"][0])[-1]
    for name in ("eval_reward", "eval_kl", "eval_answer_length"):
        assert found[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def test_a_step_is_the_same_in_one_batch_and_in_accumulated_ones(files, reward_models, monkeypatch, tmp_path):
    settings = {
        **PPO,
        **files,
        **METHODS["lora"],
        "reward_model": reward_models["lora"],
        "logging_steps": 1,
        "max_steps": 2,
    }
    monkeypatch.setattr("preference.settle_batch", lambda *arguments: None)  # which would compute them at once
    found = []
    for rows, accumulated in ((8, 1), (3, 3)):
        batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        settings |= {"max_train_samples": 8, "eval_strategy": "no", "output_dir": tmp_path / str(rows)}
        run(monkeypatch, settings, **batches)
        lines = figures(tmp_path / str(rows))
        found.append([line[name] for line in lines for name in ("loss", "reward", "kl", "clip_fraction")])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


# ---- refusals

REFUSALS = {
    "no reward model": ({"reward_model": None}, "--stage ppo needs --reward_model"),
    "no such folder": ({"reward_model": "nowhere"}, "--reward_model .*nowhere: there is no such folder"),
    "answers": ({"do_predict": True, "test_file": "x.json"}, "--do_predict with --stage ppo"),
    "a rising loss": ({"early_stopping": True}, "--early_stopping ends a run whose loss rises"),
    "no pass": ({"ppo_epochs": 0}, "--ppo_epochs 0: expected at least 1"),
    "another stage": ({"stage": "rm", "reward_model": None}, "--ppo_epochs 2 belongs to --stage ppo"),
    "a metric of rm": ({"metric_for_best_model": "accuracy"}, "expected loss or reward or kl"),
}


def refuse_to_load(*args, **kwargs):
    raise AssertionError("the model is read")


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_before_the_model_is_read(reward_models, files, monkeypatch, tmp_path, case):
    flags, message = REFUSALS[case]
    monkeypatch.setattr(preference, "load_model", refuse_to_load)
    settings = {**PPO, **files, **METHODS["lora"], "reward_model": reward_models["lora"], "output_dir": tmp_path}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(monkeypatch, {**settings, **flags})


def test_a_reward_model_of_another_base_is_refused_with_both_names(reward_models, files, monkeypatch, tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    for weights in other.glob("*.bin"):
        torch.save({name: tensor * 2 for name, tensor in read_tensors(weights)}, other / "written")
        (other / "written").replace(weights)
    monkeypatch.setattr(preference, "load_model", refuse_to_load)
    settings = {
        **PPO,
        **files,
        **METHODS["lora"],
        "reward_model": reward_models["lora"],
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(
        ValueError, match="was trained on .*tiny, and this run's base model is .*other, with other weights"
    ):
        run(monkeypatch, settings, model_name_or_path=other)


def test_a_checkpoint_without_a_head_is_no_reward_model(runs, files, monkeypatch, tmp_path):
    checkpoint = shutil.copytree(runs["lora"][0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / "value_head.bin").unlink()
    settings = {**PPO, **files, **METHODS["lora"], "reward_model": checkpoint, "output_dir": tmp_path / "run"}
    with pytest.raises((ValueError, FileNotFoundError), match=r"value_head\.bin"):
        run(monkeypatch, settings)
