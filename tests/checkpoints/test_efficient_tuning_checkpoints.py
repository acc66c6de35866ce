"""Checkpoints that ChatGLM-Efficient-Tuning wrote in 2023: they evaluate, answer and train on here.

Its layout: adapter_config.json and adapter_model.bin of PEFT 0.4, or the tensors that trained in pytorch_model.bin beside
a config.json; finetuning_args.json; training_args.bin, which is JSON; the end of a run in the run's own folder.
"""

import json

import pytest
import torch
from conftest import TINY, relative_difference
from support.finetuned import TRAIN, run

from checkpoint import load_model, read_config
from checkpoints.run_folder import find_checkpoints
from checkpoints.weight_files import read_tensors
from tuning.methods import METHODS, prepare_model
from tuning.session import open_base, resolve_session

FLAGS = {
    "lora_alpha": 32.0,
    "lora_dropout": 0.1,
    "lora_rank": 8,
    "lora_target": ["query_key_value"],
    "name_module_trainable": "mlp",
    "num_layer_trainable": 2,
    "pre_seq_len": 8,
    "prefix_projection": False,
}
ADAPTER = {
    "base_model_name_or_path": "/home/someone/chatglm2-6b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 32.0,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "revision": None,
    "target_modules": ["query_key_value"],
    "task_type": "CAUSAL_LM",
}


def model_of(method):
    """The small model as `method` trains it, what trains at random."""
    shape = {"pre_seq_len": 8} if method == "p_tuning" else {"pre_seq_len": None}
    model = load_model(TINY, config=read_config(TINY, **shape))
    prepare_model(model, method, do_train=True, **({"num_layer_trainable": 2} if method == "freeze" else {}))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_checkpoint(model, method, folder):
    """`model` as ChatGLM-Efficient-Tuning wrote it into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    if method == "lora":
        trained = {"base_model.model." + name.replace(".default", ""): tensor for name, tensor in trained.items()}
        torch.save(trained, folder / "adapter_model.bin")
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    else:
        torch.save(trained, folder / "pytorch_model.bin")
        config = json.loads((TINY / "config.json").read_text())
        prefix = {"pre_seq_len": 8, "prefix_projection": False} if method == "p_tuning" else {}
        (folder / "config.json").write_text(json.dumps({**config, **prefix, "transformers_version": "4.30.2"}))
        (folder / "modeling_chatglm.py").write_text("raise SystemExit('run')")
        (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (folder / "finetuning_args.json").write_text(json.dumps({"finetuning_type": method, **FLAGS}))
    (folder / "training_args.bin").write_text(json.dumps({"learning_rate": 5e-05}))


@pytest.fixture(scope="module", params=["lora", "freeze", "p_tuning"])
def trained(request, tmp_path_factory):
    """(way, its model, the folder of a run whose checkpoint-2 is older than its end)."""
    model, folder = model_of(request.param), tmp_path_factory.mktemp(request.param) / "path_to_sft_checkpoint"
    write_checkpoint(model_of(request.param), request.param, folder / "checkpoint-2")
    for file in (folder / "checkpoint-2").glob("*model.bin"):
        torch.save({name: 0 * tensor for name, tensor in read_tensors(file)}, file)
    write_checkpoint(model, request.param, folder)
    return request.param, model, folder


def logits(model):
    return model(input_ids=torch.arange(100, 140)[None]).logits[0].detach()


def opened(checkpoint, **flags):
    session = resolve_session({"model_name_or_path": str(TINY), **flags}, find_checkpoints(checkpoint)[0])
    config = open_base(session, **session.prefix_shape)
    model = load_model(session.folder, config=config)
    session.prepare(model)
    return session, model.eval()


def test_the_end_of_its_run_answers_as_it_did(trained):
    method, model, folder = trained
    session, loaded = opened(folder)
    assert session.method is METHODS[method] and session.checkpoint == folder
    assert relative_difference(logits(loaded), logits(model)) < 1e-5
    assert relative_difference(logits(loaded), logits(opened(folder / "checkpoint-2")[1])) > 1e-3


def test_its_checkpoint_evaluates_in_a_run(trained, monkeypatch, tmp_path):
    method, _, folder = trained
    settings = {**TRAIN, "do_train": None, "max_steps": None, "test_file": TRAIN["train_file"], "do_predict": True}
    settings.update(train_file=None, max_predict_samples=2, finetuning_type=method, max_target_length=8)
    run(monkeypatch, settings, checkpoint_dir=folder, output_dir=tmp_path)
    assert len((tmp_path / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_its_checkpoint_trains_on(trained, monkeypatch, tmp_path):
    method, _, folder = trained
    settings = {**TRAIN, "finetuning_type": method, "max_steps": 1, "learning_rate": 1e-6, "save_steps": 1}
    trainer = run(monkeypatch, settings, checkpoint_dir=folder, output_dir=tmp_path, prefix_dropout=0)
    trains = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in model_of(method).named_parameters() if parameter.requires_grad}
    assert relative_difference(logits(opened(tmp_path)[1]), logits(opened(folder)[1])) < 0.01
    if method == "freeze":
        sidecar = json.loads((tmp_path / "checkpoint-1" / "ptuning.json").read_text())
        assert (sidecar["num_layer_trainable"], sidecar["name_module_trainable"]) == (2, "mlp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetuning_type": "magic"}, "finetuning_args.json: finetuning_type is 'magic', expected p_tuning"),
        ({"finetuning_type": "freeze", "num_layer_trainable": "3"}, "finetuning_args.json: .* no settings of freeze"),
        ({"finetuning_type": "freeze", "name_module_trainable": []}, "finetuning_args.json: .* no settings of freeze"),
    ],
)
def test_a_damaged_file_of_its_flags_is_named(settings, message, tmp_path):
    write_checkpoint(model_of("freeze"), "freeze", tmp_path)
    (tmp_path / "finetuning_args.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_its_folder_of_all_weights_is_its_own_base_model(tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "finetuning_args.json").write_text(json.dumps({"finetuning_type": "full", **FLAGS}))
    session, model = opened(tmp_path)
    assert (session.method.name, session.base) == ("full", str(tmp_path))
    assert torch.equal(logits(model), logits(load_model(TINY)))
