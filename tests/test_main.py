"""main.py from end to end on the model and the rows that ship with the project."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE, TINY
from support.runs import PREDICT_SETTINGS, TRAIN_SETTINGS, flags, losses, predictions, run

import trainer

CHECKPOINT_FILES = {  # the official file set, the sidecar, and the checksums of all
    "checksums.json",
    "config.json",
    "generation_config.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "rng_state.pth",
    "scheduler.pt",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
    "ptuning.json",
    "signature.safetensors",
}


def run_program(settings, **more):
    """The same as a program of its own: the finished process with its output."""
    settings = {name: value for name, value in {**settings, **more}.items() if value is not None}
    command = [sys.executable, str(ROOT / "ptuning" / "main.py"), *flags(settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of 5 steps with checkpoints 3 and 5, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_program(TRAIN_SETTINGS, output_dir=folder, report_to=None, plot_loss=None)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# ---- training


def test_checkpoints_hold_the_official_files_and_the_last_step_is_saved(trained):
    folder, _ = trained
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    for step in (3, 5):
        assert {path.name for path in (folder / f"checkpoint-{step}").iterdir()} == CHECKPOINT_FILES


def test_a_run_leaves_results_state_plot_and_logs(trained):
    folder, _ = trained
    train = json.loads((folder / "train_results.json").read_text())
    assert {"train_loss", "train_runtime", "train_samples", "train_samples_per_second", "epoch"} <= set(train)
    assert json.loads((folder / "all_results.json").read_text()) == train
    assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "runs").rglob("events.out.tfevents.*"))
    assert len(losses(folder)) == 5


def test_the_preflight_says_what_will_be_trained(trained):
    _, output = trained
    assert "60 rows read, 0 skipped" in output
    assert "4 rows x 2 accumulated x 1 processes = 8 rows a step; 5 steps = 0.67 epochs of 60 rows" in output
    assert "Trainable: 4,096 of" in output
    assert "⟦" in output and "⟧" in output
    assert "float32 on cpu" in output


def test_the_sidecar_holds_what_config_json_lacks(trained):
    sidecar = json.loads((trained[0] / "checkpoint-5" / "ptuning.json").read_text())
    assert sidecar["base_model"] == str(TINY)
    assert (sidecar["prompt_column"], sidecar["response_column"]) == ("content", "summary")
    assert (sidecar["max_source_length"], sidecar["max_target_length"]) == (64, 32)


def test_only_the_prefix_is_written_and_it_changed(trained):
    tensors = [
        torch.load(trained[0] / f"checkpoint-{step}" / "pytorch_model.bin", weights_only=True) for step in (3, 5)
    ]
    assert all(set(t) == {"transformer.prefix_encoder.embedding.weight"} for t in tensors)
    assert not torch.equal(*(next(iter(t.values())) for t in tensors))


def test_an_interrupted_run_resumes_bit_for_bit(trained, monkeypatch, tmp_path):
    folder, _ = trained
    (tmp_path / "run").mkdir()
    (folder / "checkpoint-3").rename(tmp_path / "run" / "checkpoint-3")
    try:
        run(monkeypatch, TRAIN_SETTINGS, output_dir=tmp_path / "run", resume_from_checkpoint="True")
        assert losses(tmp_path / "run") == losses(folder)
        resumed, whole = (
            torch.load(path / "checkpoint-5" / "pytorch_model.bin", weights_only=True)
            for path in (tmp_path / "run", folder)
        )
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    finally:
        (tmp_path / "run" / "checkpoint-3").rename(folder / "checkpoint-3")


def test_a_run_resumes_bit_for_bit_in_its_second_epoch(monkeypatch, tmp_path, capsys):
    settings = {**TRAIN_SETTINGS, "max_train_samples": 24, "max_steps": 6, "save_steps": 4}
    run(monkeypatch, settings, output_dir=tmp_path / "whole")
    assert "Gradient checkpointing: off, because" in capsys.readouterr().out
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "resumed" / "checkpoint-4")
    run(monkeypatch, settings, output_dir=tmp_path / "resumed", resume_from_checkpoint="True")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


def test_gradient_checkpointing_changes_no_loss(trained, monkeypatch, tmp_path):
    run(monkeypatch, TRAIN_SETTINGS, gradient_checkpointing="true", output_dir=tmp_path)
    assert losses(tmp_path) == losses(trained[0])


def test_a_new_run_can_start_from_a_trained_prefix(trained, monkeypatch, tmp_path, capsys):
    settings = {**TRAIN_SETTINGS, "pre_seq_len": None, "max_steps": 1}
    run(monkeypatch, settings, output_dir=tmp_path, ptuning_checkpoint=trained[0] / "checkpoint-5")
    assert "Prefix of 8 tokens, without projection, from" in capsys.readouterr().out
    assert losses(tmp_path)[0] < losses(trained[0])[0]


def test_dev_loss_is_measured_at_the_start_and_at_every_save(monkeypatch, tmp_path):
    dev = {"validation_file": SAMPLE / "dev.json", "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    run(monkeypatch, {**TRAIN_SETTINGS, **dev}, max_eval_samples=10, output_dir=tmp_path)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 3, 5]
    assert not (tmp_path / "eval_results.json").exists()


def test_the_dev_loss_does_not_depend_on_the_batch_size(monkeypatch, tmp_path):
    dev_losses = []
    for batch_size in (1, 4):
        dev = {
            "validation_file": SAMPLE / "dev.json",
            "eval_strategy": "steps",
            "per_device_eval_batch_size": batch_size,
        }
        folder = tmp_path / str(batch_size)
        run(monkeypatch, {**TRAIN_SETTINGS, **dev}, max_eval_samples=7, max_steps=1, eval_steps=1, output_dir=folder)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        dev_losses += [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(dev_losses) == 2
    assert dev_losses[0] == pytest.approx(dev_losses[1], rel=1e-5)


def test_dev_rows_are_answered_and_scored_beside_the_dev_loss_when_asked(monkeypatch, tmp_path):
    dev = {"validation_file": SAMPLE / "dev.json", "eval_strategy": "steps", "eval_steps": 3, "max_eval_samples": 3}
    run(monkeypatch, {**TRAIN_SETTINGS, **dev}, output_dir=tmp_path / "without")
    run(monkeypatch, {**TRAIN_SETTINGS, **dev}, eval_with_generate=True, output_dir=tmp_path / "with")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    history = json.loads((tmp_path / "with" / "trainer_state.json").read_text())["log_history"]
    scored = [entry for entry in history if "eval_bleu-4" in entry]
    assert [entry["step"] for entry in scored] == [3, 5]
    # the last ones are what evaluating the last checkpoint gives
    settings = {**PREDICT_SETTINGS, "do_predict": None, "test_file": None, "do_eval": True, "max_eval_samples": 3}
    settings |= {"validation_file": SAMPLE / "dev.json", "max_target_length": 32}
    run(monkeypatch, settings, ptuning_checkpoint=tmp_path / "with" / "checkpoint-5", output_dir=tmp_path)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    names = [f"eval_{name}" for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l")]
    assert [scored[-1][name] for name in names] == [results[name] for name in names]


def test_loss_does_not_depend_on_how_a_step_is_cut_into_micro_batches(monkeypatch, tmp_path):
    curves = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        settings = {**TRAIN_SETTINGS, "per_device_train_batch_size": batch_size, "prefix_dropout": 0}
        folder = tmp_path / str(batch_size)
        run(monkeypatch, settings, gradient_accumulation_steps=accumulation, output_dir=folder)
        curves.append(losses(folder))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("flag", ["fp16", "fp16_full_eval"])
def test_float16_flags_on_a_cpu_train_in_float32_and_say_so(flag, trained, monkeypatch, tmp_path, capsys):
    run(monkeypatch, {**TRAIN_SETTINGS, flag: True}, output_dir=tmp_path)
    assert "float32 on cpu (float16 is slow on a CPU; --bf16 halves the memory)" in capsys.readouterr().out
    assert losses(tmp_path) == losses(trained[0])


def test_bf16_on_a_cpu_trains_a_float32_prefix_over_bfloat16_weights(trained, monkeypatch, tmp_path, capsys):
    run(monkeypatch, {**TRAIN_SETTINGS, "bf16": True}, output_dir=tmp_path)
    assert "Weights: bfloat16 on cpu (--bf16" in capsys.readouterr().out
    assert losses(tmp_path) != losses(trained[0])
    assert losses(tmp_path) == pytest.approx(losses(trained[0]), rel=0.02)
    prefix = torch.load(tmp_path / "checkpoint-5" / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in prefix.values()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_trains_and_its_checkpoint_remembers_the_bits(bits, monkeypatch, tmp_path):
    run(monkeypatch, TRAIN_SETTINGS, quantization_bit=bits, output_dir=tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    config = json.loads((tmp_path / "run" / "checkpoint-5" / "config.json").read_text())
    assert config["quantization_bit"] == bits


def test_prefix_projection_trains_and_is_read_back(monkeypatch, tmp_path):
    run(monkeypatch, TRAIN_SETTINGS, prefix_projection=True, output_dir=tmp_path)
    run(monkeypatch, PREDICT_SETTINGS, ptuning_checkpoint=tmp_path / "checkpoint-5", output_dir=tmp_path)
    assert (tmp_path / "predict_results.json").is_file()


def test_wandb_writes_real_offline_files_into_the_run(trained):
    # The run of the fixture had WANDB_MODE=disabled from conftest; this one has the default.
    folder = trained[0] / "with-wandb"
    settings = {**TRAIN_SETTINGS, "report_to": "wandb", "max_steps": 1, "output_dir": folder}
    command = [sys.executable, str(ROOT / "ptuning" / "main.py"), *flags(settings)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**environment, "HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    files = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


# ---- predicting


@pytest.fixture(scope="module")
def predicted(trained, tmp_path_factory):
    """Output folder of predicting with the trained checkpoint, without repeating any flag it remembers."""
    folder = tmp_path_factory.mktemp("predicted")
    settings = {**PREDICT_SETTINGS, "do_sample": "false", "ptuning_checkpoint": trained[0] / "checkpoint-5"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, settings, output_dir=folder)
    return folder


def test_predictions_are_one_json_object_a_line_with_the_row_they_answer(predicted):
    lines = predictions(predicted)
    assert [set(line) for line in lines] == [{"labels", "predict", "row", "prompt"}] * 10
    assert [line["row"] for line in lines] == list(range(1, 11))
    first = json.loads((SAMPLE / "dev.json").read_text("utf-8").splitlines()[0])
    assert first["summary"].startswith(lines[0]["labels"])


def test_predict_results_carry_the_official_keys(predicted):
    results = json.loads((predicted / "predict_results.json").read_text())
    official = "bleu-4 rouge-1 rouge-2 rouge-l runtime samples samples_per_second steps_per_second".split()
    assert {f"predict_{name}" for name in official} <= set(results)
    assert results["predict_samples"] == 10
    assert json.loads((predicted / "all_results.json").read_text()) == results


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_greedy_predictions_are_the_same_at_any_batch_size(batch_size, predicted, trained, monkeypatch, tmp_path):
    settings = {**PREDICT_SETTINGS, "do_sample": "false", "per_device_eval_batch_size": batch_size}
    run(monkeypatch, settings, ptuning_checkpoint=trained[0] / "checkpoint-5", output_dir=tmp_path)
    assert predictions(tmp_path) == predictions(predicted)


def test_without_a_batch_size_prediction_takes_as_many_rows_as_fit(predicted, trained, monkeypatch, tmp_path):
    sizes = []
    answer_prompts = trainer.answer_prompts
    monkeypatch.setattr(
        trainer,
        "answer_prompts",
        lambda *a, batch_size, **k: sizes.append(batch_size) or answer_prompts(*a, batch_size=batch_size, **k),
    )
    settings = {**PREDICT_SETTINGS, "do_sample": "false", "ptuning_checkpoint": trained[0] / "checkpoint-5"}
    for name, batch_size in (("given", 4), ("automatic", None)):
        run(monkeypatch, settings, per_device_eval_batch_size=batch_size, output_dir=tmp_path / name)
        assert predictions(tmp_path / name) == predictions(predicted)
    assert sizes == [4, 64]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_an_error(trained, monkeypatch, tmp_path):
    settings = {**PREDICT_SETTINGS, "ptuning_checkpoint": trained[0] / "checkpoint-5", "output_dir": tmp_path}
    with pytest.raises(ValueError, match=r"Row 1: the prompt has \d+ tokens.*--generation_max_length"):
        run(monkeypatch, settings, generation_max_length=20)


def test_the_official_limit_counts_prompt_and_answer(trained, monkeypatch, tmp_path):
    # max_source + max_target + 1 tokens in all, for each row as if it were alone in its batch
    settings = {**PREDICT_SETTINGS, "do_sample": "false", "max_source_length": 40, "max_target_length": 4}
    run(monkeypatch, settings, ptuning_checkpoint=trained[0] / "checkpoint-5", output_dir=tmp_path)
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    rows = [json.loads(line) for line in (SAMPLE / "dev.json").read_text("utf-8").splitlines()[:10]]
    for row, line in zip(rows, predictions(tmp_path), strict=True):
        prompt_length = min(40, len(tokenizer.encode(tokenizer.build_prompt(row["content"]))))
        assert len(tokenizer.encode(line["predict"], add_special_tokens=False)) <= 45 - prompt_length + 1


def test_sampling_follows_the_seed(trained, monkeypatch, tmp_path):
    texts = []
    for run_number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(run_number)
        checkpoint = trained[0] / "checkpoint-5"
        run(monkeypatch, PREDICT_SETTINGS, seed=seed, ptuning_checkpoint=checkpoint, output_dir=folder)
        texts.append(predictions(folder))
    assert texts[0] == texts[1] != texts[2]


def test_all_checkpoints_of_a_run_give_one_table_of_what_each_gives_alone(trained, monkeypatch, tmp_path, capsys):
    settings = {**PREDICT_SETTINGS, "max_predict_samples": 4}  # sampling: each starts with the same random numbers
    for step in (3, 5):
        checkpoint = trained[0] / f"checkpoint-{step}"
        run(monkeypatch, settings, ptuning_checkpoint=checkpoint, output_dir=tmp_path / f"alone-{step}")
    capsys.readouterr()
    run(monkeypatch, settings, ptuning_checkpoint=trained[0] / "all", output_dir=tmp_path)
    folder = tmp_path / "all_checkpoints"
    assert folder.joinpath("scores.png").read_bytes().startswith(b"\x89PNG")
    head, *lines = (folder / "table.txt").read_text().splitlines()
    assert "\n".join([head, *lines]) in capsys.readouterr().out
    for step, line in zip((3, 5), lines, strict=True):
        assert predictions(folder / f"checkpoint-{step}") == predictions(tmp_path / f"alone-{step}")
        results = json.loads((tmp_path / f"alone-{step}" / "predict_results.json").read_text())
        assert line.split() == [f"checkpoint-{step}", *(f"{results[name]:.4f}" for name in head.split())]
    assert set(head.split()) == {f"predict_{name}" for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4")}


def test_training_cannot_start_from_all_checkpoints(trained, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="a run starts from one checkpoint"):
        run(monkeypatch, TRAIN_SETTINGS, ptuning_checkpoint=trained[0] / "all", output_dir=tmp_path / "run")


def test_do_eval_generates_and_scores_the_validation_file(trained, monkeypatch, tmp_path):
    settings = {**PREDICT_SETTINGS, "do_predict": None, "test_file": None, "do_eval": True, "max_eval_samples": 4}
    settings["validation_file"] = SAMPLE / "dev.json"
    run(monkeypatch, settings, ptuning_checkpoint=trained[0] / "checkpoint-5", output_dir=tmp_path)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_bleu-4", "eval_rouge-1", "eval_rouge-l", "eval_samples"} <= set(results)
    assert not (tmp_path / "generated_predictions.txt").exists()


def test_the_untuned_model_can_be_evaluated_for_comparison(monkeypatch, tmp_path):
    columns = {"prompt_column": "content", "response_column": "summary", "model_name_or_path": TINY}
    run(monkeypatch, {**PREDICT_SETTINGS, **columns}, output_dir=tmp_path, num_beams=2, do_sample="false")
    assert len(predictions(tmp_path)) == 10


def test_dialogues_of_messages_train_and_are_predicted_with_the_columns_of_the_checkpoint(
    monkeypatch, tmp_path, capsys
):
    turns = [{"role": role, "content": "你好"} for role in ("user", "assistant")]
    rows = [{"messages": turns * number} for number in range(1, 9)]
    file = tmp_path / "dialogues.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {**TRAIN_SETTINGS, "train_file": file, "max_steps": 1, "messages_column": "messages"}
    run(monkeypatch, settings, output_dir=tmp_path / "run")
    output = capsys.readouterr().out
    assert "--messages_column holds whole dialogues; the other column flags are not read." in output
    assert "of the prompts lose their oldest turns at 64 tokens" in output
    predict = {**PREDICT_SETTINGS, "test_file": file, "ptuning_checkpoint": tmp_path / "run" / "checkpoint-1"}
    run(monkeypatch, predict, output_dir=tmp_path / "again")
    lines = (tmp_path / "again" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["labels"] for line in lines] == ["你好"] * 8
    assert "of them lose their oldest turns at --max_source_length 64." in capsys.readouterr().out


def test_rows_without_a_prompt_are_skipped_and_rows_without_a_response_not_scored(
    trained, monkeypatch, tmp_path, capsys
):
    rows = [json.loads(line) for line in (SAMPLE / "dev.json").read_text("utf-8").splitlines()[:4]]
    rows[1]["content"] = ""
    rows[2]["summary"] = ""
    file = tmp_path / "test.json"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    checkpoint = trained[0] / "checkpoint-5"
    run(monkeypatch, PREDICT_SETTINGS, test_file=file, ptuning_checkpoint=checkpoint, output_dir=tmp_path)
    assert [line["row"] for line in predictions(tmp_path)] == [1, 3, 4]
    output = capsys.readouterr().out
    assert "3 rows, 1 skipped" in output
    assert "1 rows have no response" in output


def test_predictions_are_on_disk_before_they_are_scored(trained, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("scoring failed")

    monkeypatch.setattr("evaluation.prediction.score_all", fail)
    with pytest.raises(RuntimeError, match="scoring failed"):
        run(monkeypatch, PREDICT_SETTINGS, ptuning_checkpoint=trained[0] / "checkpoint-5", output_dir=tmp_path)
    assert len(predictions(tmp_path)) == 10


# ---- what a user can get wrong


def rows_file(tmp_path, text, name="rows.json"):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return file


BAD_DATA = {
    "missing file": (None, r"none\.json does not exist"),
    "empty file": ("", "is empty"),
    "not JSON": ('{"content": "a", "summary": "b"}\n{"content": ', "line 2 is not JSON"),
    "no such column": ('{"contents": "a", "summary": "b"}', "did you mean --prompt_column contents"),
    "wrong type": ('{"content": 5, "summary": "b"}', "row 1.*a number"),
    "no text": (b"\x80\x81\xfe\xff\x00\x01\x02" * 9, "no text"),
    "every row empty": ('{"content": "", "summary": "b"}', "nothing to use"),
}


@pytest.mark.parametrize(("text", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_one_error_and_nothing_is_written(text, message, monkeypatch, tmp_path):
    file = tmp_path / "none.json" if text is None else rows_file(tmp_path, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(monkeypatch, TRAIN_SETTINGS, train_file=file, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_history_that_is_no_list_of_pairs_is_an_error(monkeypatch, tmp_path):
    file = rows_file(tmp_path, '{"content": "a", "summary": "b", "history": "c"}')
    with pytest.raises(ValueError, match="must be a list of"):
        run(monkeypatch, TRAIN_SETTINGS, train_file=file, history_column="history", output_dir=tmp_path / "run")


BAD_FLAGS = {
    "prompt too short": ({"max_source_length": 5}, "--max_source_length 5 cannot hold"),
    "no prefix length": ({"pre_seq_len": None}, "--do_train needs --pre_seq_len"),
    "no model": ({"model_name_or_path": None}, "--model_name_or_path is missing"),
    "no prompt column": ({"prompt_column": None}, "--prompt_column is missing"),
    "no such model": ({"model_name_or_path": "/nowhere"}, "there is no such folder"),
    "no such checkpoint": ({"ptuning_checkpoint": "/nowhere"}, "no pytorch_model.bin"),
    "nothing to resume": ({"resume_from_checkpoint": "/nowhere"}, "no complete checkpoint"),
    "nothing to resume, newest": ({"resume_from_checkpoint": "True"}, "no complete checkpoint"),
    "16 bits": ({"quantization_bit": 16}, "makes no sense"),
    "3 bits": ({"quantization_bit": 3}, "Give 4 or 8"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_a_bad_flag_is_one_error_and_nothing_is_written(settings, message, monkeypatch, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(monkeypatch, {**TRAIN_SETTINGS, **settings}, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_example_longer_than_the_model_was_made_for_is_an_error(monkeypatch, tmp_path):
    file = rows_file(tmp_path, json.dumps({"content": "白色" * 2000, "summary": "b"}))
    with pytest.raises(ValueError, match=r"made for \d+ .*--max_source_length 5000"):
        run(monkeypatch, TRAIN_SETTINGS, train_file=file, max_source_length=5000, output_dir=tmp_path / "run")


def test_flags_that_contradict_the_checkpoint_name_both_values(trained, monkeypatch, tmp_path):
    for name, value, found in (("pre_seq_len", 64, 8), ("prefix_projection", "true", False)):
        with pytest.raises(ValueError, match=rf"--{name} \S+ contradicts .*trained with {found}"):
            settings = {**PREDICT_SETTINGS, name: value}
            run(monkeypatch, settings, ptuning_checkpoint=trained[0] / "checkpoint-5", output_dir=tmp_path)


def test_a_random_prefix_is_never_evaluated(monkeypatch, tmp_path):
    columns = {"prompt_column": "content", "response_column": "summary", "model_name_or_path": TINY}
    with pytest.raises(ValueError, match="random prefix"):
        run(monkeypatch, {**PREDICT_SETTINGS, **columns}, pre_seq_len=8, output_dir=tmp_path)


def test_a_checkpoint_given_as_model_is_explained(trained, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="only a trained prefix.*--ptuning_checkpoint"):
        run(monkeypatch, TRAIN_SETTINGS, model_name_or_path=trained[0] / "checkpoint-5", output_dir=tmp_path / "run")


def test_a_run_is_not_overwritten_by_accident(trained, monkeypatch):
    with pytest.raises(ValueError, match="already has checkpoint-5.*--overwrite_output_dir"):
        run(monkeypatch, TRAIN_SETTINGS, output_dir=trained[0])


def test_resuming_a_run_of_the_official_scripts_points_to_its_prefix(shared, monkeypatch, tmp_path):
    checkpoint = shared / "golden" / "official-checkpoint"
    with pytest.raises(ValueError, match="Start a new run from its prefix: --ptuning_checkpoint"):
        run(monkeypatch, TRAIN_SETTINGS, resume_from_checkpoint=checkpoint, output_dir=tmp_path / "run")


def test_resuming_from_the_last_checkpoint_starts_afresh_where_there_is_none(monkeypatch, tmp_path, capsys):
    run(monkeypatch, TRAIN_SETTINGS, resume_from_checkpoint="last", max_steps=1, output_dir=tmp_path)
    assert "has no checkpoint yet, starting afresh" in capsys.readouterr().out


def test_the_program_exits_with_2_and_one_message_without_a_traceback(tmp_path):
    done = run_program(TRAIN_SETTINGS, train_file="none.json", output_dir=tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.json does not exist")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 4
    assert not (tmp_path / "run").exists()
