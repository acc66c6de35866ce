"""export_model.py: what it writes loads strictly, gives the same logits, and has the official names."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from support.finetuned import METHODS, TRAIN
from support.finetuned import run as train

import export_model
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from checkpoint import (
    load_model,
    load_prefix,
    load_tokenizer,
    read_config,
    read_prefix_settings,
    save_model,
    save_prefix,
)
from checkpoints.file_names import weight_files
from checkpoints.weight_files import read_tensors


def export(output_dir, *words, model=TINY):
    export_model.main(["--model_name_or_path", str(model), "--output_dir", str(output_dir), *words])
    return output_dir


def tensors_of(folder):
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file)}


def assert_same_weights(folder, expected):
    found = tensors_of(folder)
    found.pop("transformer.rotary_pos_emb.inv_freq")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


# ---- a folder of weights


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ((), ["model.safetensors"]),
        (("--format", "bin"), ["pytorch_model.bin"]),
        (("--max_shard_size", "1MB"), [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]),
        (
            ("--format", "bin", "--max_shard_size", "1MB"),
            [f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3)],
        ),
    ],
)
def test_every_format_holds_the_same_weights(words, files, tmp_path, capsys):
    folder = export(tmp_path / "out", *words)
    assert [file.name for file in weight_files(folder)] == files
    assert_same_weights(folder, tensors_of(TINY))
    assert "largest difference 0." in capsys.readouterr().out
    assert all(file.stat().st_size < 1_100_000 for file in weight_files(folder) if len(files) > 1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    assert (folder / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()


def test_the_index_counts_the_bytes_and_places_every_weight(tmp_path):
    folder = export(tmp_path / "out", "--max_shard_size", "1MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = tensors_of(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {
        file: {name for name, place in index["weight_map"].items() if place == file}
        for file in index["weight_map"].values()
    } == {file.name: {name for name, _ in read_tensors(file)} for file in weight_files(folder)}


@pytest.mark.parametrize("bits", [4, 8])
def test_an_integer_folder_is_the_model_quantized_on_the_fly_and_needs_no_flag(bits, tmp_path):
    folder = export(tmp_path / "out", "--quantization_bit", str(bits))
    on_the_fly = load_model(TINY, dtype=torch.float16, quantization_bit=bits)
    assert_same_weights(folder, dict(on_the_fly.state_dict()))
    assert load_model(folder).config.quantization_bit == bits
    assert json.loads((folder / "config.json").read_text())["quantization_bit"] == bits
    again = export(tmp_path / "again", model=folder)
    assert_same_weights(again, dict(on_the_fly.state_dict()))


def test_an_integer_folder_is_not_quantized_to_another_width(tmp_path):
    folder = export(tmp_path / "out", "--quantization_bit", "4")
    with pytest.raises(ValueError, match="weights are int4 already"):
        export(tmp_path / "int8", "--quantization_bit", "8", model=folder)


def test_names_and_shards_are_those_of_the_6b(shared, tmp_path):
    golden = json.loads((shared / "golden" / "weight_names.json").read_text())["weight_map"]
    settings = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    small = ChatGLMConfig(**{**settings, "num_layers": 28, "hidden_size": 16, "ffn_hidden_size": 16, "kv_channels": 4})
    model = ChatGLMForConditionalGeneration(small)
    model.base_folder = TINY
    save_model(model, tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"].keys() == golden.keys()


def test_the_stored_rotary_frequencies_are_those_of_the_official_model(shared, tmp_path):
    folder = export(tmp_path / "out", model=shared / "chatglm2-mini")
    name = "transformer.rotary_pos_emb.inv_freq"
    assert torch.equal(tensors_of(folder)[name], tensors_of(shared / "chatglm2-mini")[name])


def test_official_code_is_copied_and_never_run(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for file in TINY.glob("*.json"):
        (source / file.name).write_bytes(file.read_bytes())
    for file in [*weight_files(TINY), TINY / "tokenizer.model"]:
        (source / file.name).symlink_to(file)
    for name in ("modeling_chatglm.py", "setup.py"):
        (source / name).write_text("raise SystemExit('was run')")
    folder = export(tmp_path / "out", model=source)
    assert (folder / "modeling_chatglm.py").read_text() == "raise SystemExit('was run')"
    assert not (folder / "setup.py").exists()
    assert "The official code also needs" not in capsys.readouterr().out


def test_an_export_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    logits = iter([torch.zeros(2, 3), torch.ones(2, 3)])
    monkeypatch.setattr(export_model, "probe", lambda model, tokenizer: next(logits))
    with pytest.raises(ValueError, match="gives other logits than the model it was made from"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_signal_leaves_nothing_half_written(tmp_path):
    code = (
        "import os, runpy, signal, sys, checkpoint\n"
        "save = checkpoint.save_model\n"
        "def stop(*words, **named):\n"
        "    save(*words, **named)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "checkpoint.save_model = stop\n"
        f"sys.argv = ['export_model.py', '--model_name_or_path', {str(TINY)!r}, '--output_dir', {str(tmp_path / 'out')!r}]\n"
        "runpy.run_path('ptuning/export_model.py', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning")}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_number_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, "probe", lambda model, tokenizer: torch.full((2, 3), float("nan")))
    with pytest.raises(ValueError, match="largest difference nan"):
        export(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "m"], "--output_dir is missing"),
        (["--output_dir", "new"], "--model_name_or_path is missing"),
        (["--output_dir", str(TINY), "--model_name_or_path", "m"], "exists already and is not empty"),
        (["--output_dir", "new", "--model_name_or_path", "m", "--quantization_bit", "5"], "5 is not supported"),
        (["--output_dir", "new", "--ptuning_checkpoint", "c"], "c: there is no"),
        (
            ["--output_dir", "new", "--model_name_or_path", str(TINY), "--max_shard_size", "2"],
            "expected a size such as",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export_model.main(words)
    assert not (tmp_path / "new").exists()


# ---- what was tuned, merged


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: checkpoint of a run of 2 steps}"""
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        for method, flags in METHODS.items():
            folder = tmp_path_factory.mktemp(method.replace(" ", "-"))
            train(patch, {**TRAIN, "learning_rate": 1e-2, "max_steps": 2}, output_dir=folder, **flags)
            done[method] = folder / "checkpoint-2"
    return done


def export_tuned(output_dir, checkpoint, *words):
    export_model.main(["--ptuning_checkpoint", str(checkpoint), "--output_dir", str(output_dir), *words])
    return tensors_of(output_dir)


def lora_change(checkpoint):
    """{name of a weight: what its adapter adds to it}, float32."""
    tensors = dict(read_tensors(checkpoint / "adapter_model.safetensors"))
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    changes = {}
    for name, down in tensors.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            changes[weight] = tensors[name.replace("lora_A", "lora_B")] @ down * config["lora_alpha"] / config["r"]
    return changes


@pytest.mark.parametrize("method", ["lora", "int4 lora"])
def test_a_merged_adapter_is_added_to_its_weights_and_to_no_other(method, runs, tmp_path, capsys):
    exported = export_tuned(tmp_path / "out", runs[method])
    changes = lora_change(runs[method])
    for name, tensor in tensors_of(TINY).items():
        if name in changes:
            assert changes[name].count_nonzero()
            assert torch.equal(exported[name], (tensor.float() + changes[name]).half()), name
        else:
            assert torch.equal(exported[name], tensor), name
    output = capsys.readouterr().out
    assert "from those with the adapter beside the weights, by the rounding of float16." in output
    assert ("It was trained on int4 weights" in output) == (method == "int4 lora")


def test_several_adapters_are_merged_in_order(runs, tmp_path):
    exported = export_tuned(tmp_path / "out", f"{runs['lora']},{runs['int4 lora']}")
    first, second = lora_change(runs["lora"]), lora_change(runs["int4 lora"])
    base = tensors_of(TINY)
    assert second.keys() < first.keys()
    for name in first:
        expected = (base[name].float() + first[name]).half()
        if name in second:
            expected = (expected.float() + second[name]).half()
        assert torch.equal(exported[name], expected), name


def test_a_merged_adapter_can_be_quantized(runs, tmp_path):
    export_tuned(tmp_path / "merged", runs["lora"])
    exported = export_tuned(tmp_path / "int4", runs["lora"], "--quantization_bit", "4")
    quantized = load_model(tmp_path / "merged", dtype=torch.float16, quantization_bit=4).state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in quantized.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "merged"]


def test_an_adapter_is_not_merged_into_integer_weights(runs, tmp_path):
    base = export(tmp_path / "int4", "--quantization_bit", "4")
    with pytest.raises(ValueError, match="holds int4 weights, into which nothing can be merged"):
        export_tuned(tmp_path / "out", runs["int4 lora"], "--model_name_or_path", str(base))


def test_layers_that_freeze_trained_replace_those_of_the_base(runs, tmp_path):
    exported = export_tuned(tmp_path / "out", runs["freeze"])
    trained = dict(read_tensors(runs["freeze"] / "pytorch_model.bin"))
    assert len(trained) == 4
    for name, tensor in {**tensors_of(TINY), **trained}.items():
        assert torch.equal(exported[name], tensor.half()), name


def test_a_full_checkpoint_is_exported_as_it_is(runs, tmp_path):
    exported = export_tuned(tmp_path / "out", runs["full"].parent)  # the run's folder: its last checkpoint
    saved = tensors_of(runs["full"])
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)
    assert not torch.equal(*(each["transformer.output_layer.weight"].float() for each in (saved, tensors_of(TINY))))


# ---- a prefix


@pytest.fixture(params=[True, False], ids=["projection", "no projection"])
def checkpoint(request, tmp_path):
    """A checkpoint of 6 virtual tokens with a random prefix, and the model that it belongs to."""
    torch.manual_seed(0)
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=6, prefix_projection=request.param))
    save_prefix(model, tmp_path / "checkpoint-1", {"base_model": str(TINY), "prompt_column": "content"})
    return tmp_path / "checkpoint-1", model


def test_a_prefix_is_written_as_its_keys_and_values_and_gives_the_same_logits(checkpoint, tmp_path, capsys):
    folder, trained = checkpoint
    export_model.main(["--ptuning_checkpoint", str(folder), "--output_dir", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert "(tokens, layers, key and value, groups, channels) = (6, 4, 2, 2, 32)" in output
    assert "A prefix cannot be merged into weights" in output
    settings = read_prefix_settings(tmp_path / "out")
    assert (settings["pre_seq_len"], settings["prefix_projection"]) == (6, False)
    assert (settings["base_model"], settings["prompt_column"]) == (str(TINY), "content")
    assert settings["base_fingerprint"] == trained.fingerprint
    assert json.loads((tmp_path / "out" / "config.json").read_text())["prefix_projection"] is False
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=6))
    load_prefix(model, tmp_path / "out")
    tokenizer = load_tokenizer(TINY, model.config)
    assert torch.equal(export_model.probe(model, tokenizer), export_model.probe(trained, tokenizer))
    keys_and_values = torch.stack([torch.cat(pair) for pair in trained.transformer.prefix_encoder(1, torch.float32)])
    stored = model.transformer.prefix_encoder.embedding.weight.view(6, 4, 2, 2, 32)  # P, L, key and value, G, D
    assert torch.equal(stored.permute(1, 2, 3, 0, 4), keys_and_values)


@pytest.mark.slow
def test_the_ten_lines_beside_a_prefix_load_it_and_answer(checkpoint, tmp_path):
    folder, trained = checkpoint
    export_model.main(["--ptuning_checkpoint", str(folder), "--output_dir", str(tmp_path / "out")])
    file = tmp_path / "out" / "load.py"
    assert len(list(filter(None, file.read_text(encoding="utf-8").splitlines()))) == 10
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, timeout=120)
    tokenizer = load_tokenizer(TINY, trained.config)
    assert done.stdout == trained.chat(tokenizer, export_model.PROBE, max_length=256, do_sample=False)[0] + "\n", (
        done.stderr
    )


def test_a_prefix_has_one_format(checkpoint, tmp_path):
    words = ["--ptuning_checkpoint", str(checkpoint[0]), "--output_dir", str(tmp_path / "out")]
    for more in (["--quantization_bit", "4"], ["--format", "bin"]):
        with pytest.raises(ValueError, match="A prefix is always written as pytorch_model.bin in float32"):
            export_model.main([*words, *more])


def test_a_prefix_that_does_not_know_its_base_needs_the_flag(checkpoint, tmp_path):
    folder, _ = checkpoint
    (folder / "ptuning.json").unlink()
    words = ["--ptuning_checkpoint", str(folder), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="does not say its base model; give --model_name_or_path"):
        export_model.main(words)
    export_model.main([*words, "--model_name_or_path", str(TINY)])
    assert read_prefix_settings(tmp_path / "out")["base_model"] == str(TINY)
