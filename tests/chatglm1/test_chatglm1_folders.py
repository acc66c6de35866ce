"""Folders of the first ChatGLM-6B: read and written under the official names, in float and as integers."""

import json

import pytest
import torch
from conftest import ROOT, relative_difference
from support.pairs import write_pairs
from support.runs import TRAIN_SETTINGS, flags, run
from support.small_chatglm1 import FOLDER_CONFIG, write_folder

from arguments import parse_flags
from chatglm2.quantization import dequantize_weight, quantize_weight
from checkpoint import fingerprint_of, load_model, load_prefix, load_tokenizer, read_config, save_model, save_prefix
from checkpoints.weight_files import read_tensors
from first_look import look_at_run

SHAPES = json.loads((ROOT / "tests" / "chatglm1.json").read_text())["model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "model")


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(["你好，再见"], return_tensors="pt")).logits


def test_a_folder_is_read_by_its_content_and_written_under_the_official_names(folder, tmp_path):
    config = read_config(folder)
    assert config.model_family == "chatglm1" and config.seq_length == 512
    tokenizer = load_tokenizer(folder, config)
    model = load_model(folder)
    assert model.fingerprint == fingerprint_of(folder)
    save_model(model, tmp_path)
    official = [name for name, _ in read_tensors(folder / "pytorch_model.bin")]
    assert sorted(name for name, _ in read_tensors(tmp_path / "pytorch_model.bin")) == sorted(official)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written.get(name) for name in FOLDER_CONFIG} == FOLDER_CONFIG
    assert torch.equal(logits_of(load_model(tmp_path), load_tokenizer(tmp_path, config)), logits_of(model, tokenizer))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_integers_gives_the_logits_of_the_model_quantized_as_it_is_read(folder, tmp_path, bits):
    model = load_model(folder, quantization_bit=bits, quantization_backend="torch")
    tokenizer = load_tokenizer(folder, model.config)
    save_model(model, tmp_path)
    tensors = dict(read_tensors(tmp_path / "pytorch_model.bin"))
    assert tensors["transformer.layers.1.mlp.dense_4h_to_h.weight"].shape == (64, 160 * bits // 8)
    assert tensors["transformer.layers.1.mlp.dense_4h_to_h.weight_scale"].shape == (64,)
    written = load_model(tmp_path, quantization_backend="torch")
    assert written.config.quantization_bit == bits
    assert torch.equal(logits_of(written, tokenizer), logits_of(model, tokenizer))


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_that_are_stored_as_integers_are_read_as_the_floats_that_they_stand_for(folder, tmp_path, bits):
    model = load_model(folder, quantization_bit=bits, quantization_backend="torch")
    save_model(model, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    tensors = dict(read_tensors(file))
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        tensors[name], tensors[name + "_scale"] = quantize_weight(tensors[name], bits)
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_embeddings": True}))
    read = load_model(tmp_path, quantization_backend="torch")
    for name, own in (
        ("lm_head.weight", read.get_output_embeddings()),
        ("transformer.word_embeddings.weight", read.get_input_embeddings()),
    ):
        expected = dequantize_weight(tensors[name], tensors[name + "_scale"], bits, torch.float32)
        assert torch.equal(own.weight, expected)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_has_the_official_names_and_shapes_and_comes_back(folder, tmp_path, projection):
    config = read_config(folder, pre_seq_len=5, prefix_projection=projection)
    model = load_model(folder, config=config)
    save_prefix(model, tmp_path)
    tensors = dict(read_tensors(tmp_path / "pytorch_model.bin"))
    official = SHAPES["projection" if projection else "prefix"]["shapes"]
    official = {name: shape for name, shape in official.items() if "prefix_encoder" in name}
    width = {2 * 3 * 64: 2 * 2 * 64}  # of three layers there, of two here
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: [width.get(size, size) for size in shape] for name, shape in official.items()
    }
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["inner_hidden_size"] == 160 and settings["pre_seq_len"] == 5 and "rmsnorm" not in settings
    other = load_model(folder, config=config)
    load_prefix(other, tmp_path)
    tokenizer = load_tokenizer(folder, config)
    assert relative_difference(logits_of(other, tokenizer), logits_of(model, tokenizer)) == 0


def test_one_position_a_token_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**FOLDER_CONFIG, "position_encoding_2d": False}))
    with pytest.raises(ValueError, match="two positions a token"):
        read_config(folder)


@pytest.mark.parametrize(
    "flag", [{"precision": "official"}, {"train_on_history": True}], ids=lambda flag: next(iter(flag))
)
def test_what_this_model_is_without_is_refused_before_torch_and_by_the_session(folder, flag, monkeypatch, tmp_path):
    wanted = f"--{next(iter(flag))}.* cannot be used with ChatGLM-6B"
    settings = {**TRAIN_SETTINGS, "model_name_or_path": folder, "output_dir": tmp_path / "run", **flag}
    given = parse_flags([str(word) for word in flags(settings)])
    with pytest.raises(ValueError, match=wanted):
        look_at_run(*given[:2], settings, [])
    with pytest.raises(ValueError, match=wanted):
        run(monkeypatch, settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_every_stage_trains_it(folder, stage, monkeypatch, tmp_path):
    rows = {"train_file": write_pairs(tmp_path / "train.json", 8), "response_column": "chosen"}
    settings = {
        **TRAIN_SETTINGS,
        "model_name_or_path": folder,
        **rows,
        "max_steps": 1,
        "save_steps": 1,
        "pre_seq_len": 4,
    }
    settings |= {"max_target_length": 8, "gradient_accumulation_steps": 1}
    if stage == "ppo":
        run(monkeypatch, settings, stage="rm", output_dir=tmp_path / "rm")
        settings["reward_model"] = tmp_path / "rm"
    run(monkeypatch, settings, stage=stage, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-1" / "pytorch_model.bin").is_file()
