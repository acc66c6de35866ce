"""Loading base models, and prefix checkpoints in both directions."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import OFFICIAL_FIELDS, ROOT, SYNTHETIC, TINY, synthetic_model
from safetensors.torch import save_file

from chatglm2.quantization import quantize_model_
from checkpoint import (
    generation_config,
    load_model,
    load_prefix,
    load_tokenizer,
    read_config,
    read_prefix_settings,
    resolve_folder,
    save_prefix,
)
from checkpoints.sidecar import read_sidecar

CONFIG = {"model_type": "chatglm", "model_family": "chatglm2", "torch_dtype": "float16"}
CONFIG |= {**OFFICIAL_FIELDS, **SYNTHETIC["config"]}
INPUT_IDS = torch.tensor(SYNTHETIC["input_ids"])


@pytest.fixture
def base():
    return synthetic_model(pre_seq_len=None)


def write_folder(folder, weights, layout="sharded bin"):
    """A base model folder as the hub serves it; `layout` is one of the four that there are."""
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, "pre_seq_len": None, "auto_map": {"AutoModel": "modeling_chatglm.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    kind = "bin" if "bin" in layout else "safetensors"
    stem = "pytorch_model" if kind == "bin" else "model"
    names = sorted(weights)
    shards = {f"{stem}.{kind}": names}
    if "sharded" in layout:
        half = len(names) // 2
        shards = {
            f"{stem}-00001-of-00002.{kind}": names[:half],
            f"{stem}-00002-of-00002.{kind}": names[half:],
        }
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, part in shards.items():
        tensors = {name: weights[name].contiguous() for name in part}
        torch.save(tensors, folder / file) if kind == "bin" else save_file(tensors, folder / file)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    return write_folder(tmp_path / "base", base.state_dict())


# ---- the base model


@pytest.mark.parametrize("layout", ["sharded bin", "single bin", "sharded safetensors", "single safetensors"])
def test_every_official_layout_loads_with_equal_logits(layout, base, tmp_path):
    folder = write_folder(tmp_path / "base", base.state_dict(), layout)
    assert torch.equal(load_model(folder)(INPUT_IDS).logits, base(INPUT_IDS).logits)


def test_half_precision_weights_are_converted_to_the_target_dtype(base, tmp_path):
    folder = write_folder(tmp_path / "base", {name: tensor.half() for name, tensor in base.state_dict().items()})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_model(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_weights_of_the_same_dtype_are_mapped_from_the_file_not_copied(folder):
    model = load_model(folder)
    address = model.transformer.embedding.word_embeddings.weight.data_ptr()
    mapped = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            mapped[address] = line.split(maxsplit=5)[-1]
    assert mapped[address].startswith(str(folder / "pytorch_model-0000"))


def test_a_loaded_model_is_frozen_except_for_its_float32_prefix(folder):
    config = read_config(folder, pre_seq_len=4)
    model = load_model(folder, config=config, dtype=torch.bfloat16)
    trainable = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"transformer.prefix_encoder.embedding.weight": torch.float32}
    assert not model.training
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_fresh_prefix_follows_the_seed(folder):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = load_model(folder, config=read_config(folder, pre_seq_len=4))
        weights.append(model.transformer.prefix_encoder.embedding.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_stored_rotary_frequencies_are_accepted_and_not_needed(base, tmp_path):
    weights = {**base.state_dict(), "transformer.rotary_pos_emb.inv_freq": torch.ones(1)}
    load_model(write_folder(tmp_path / "base", weights))


def drop(weights):
    del weights["transformer.encoder.final_layernorm.weight"]


def add(weights):
    weights["transformer.encoder.layers.9.self_attention.dense.weight"] = torch.ones(2)


def reshape(weights):
    weights["transformer.output_layer.weight"] = torch.ones(7, 7)


def integers(weights):
    name = "transformer.output_layer.weight"
    weights[name] = weights[name].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "missing: transformer.encoder.final_layernorm.weight"),
        (add, "unexpected: transformer.encoder.layers.9"),
        (reshape, r"output_layer.weight is torch.float32 \(7, 7\)"),
        (integers, "output_layer.weight is torch.int8"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(damage, message, base, tmp_path):
    weights = dict(base.state_dict())
    damage(weights)
    with pytest.raises(ValueError, match=message):
        load_model(write_folder(tmp_path / "base", weights))


def test_a_missing_shard_is_named(folder):
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="lacks pytorch_model-00002-of-00002.bin"):
        load_model(folder)


@pytest.mark.parametrize("layout", ["single bin", "single safetensors"])
def test_a_truncated_file_is_named(layout, base, tmp_path):
    folder = write_folder(tmp_path / "base", base.state_dict(), layout)
    file = next(file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
        load_model(folder)


def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    with open(folder / "pytorch_model-00001-of-00002.bin", "wb") as file:
        pickle.dump({"transformer.output_layer.weight": Payload()}, file)
    with pytest.raises(ValueError, match="never loaded"):
        load_model(folder)
    assert not (tmp_path / "executed").exists()


def test_python_files_in_the_folder_are_never_run(folder, tmp_path):
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py", "configuration_chatglm.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    load_model(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_while_loading_equals_quantizing_the_loaded_model(bits, base, folder):
    quantize_model_(base, bits)
    loaded = load_model(folder, quantization_bit=bits)
    assert torch.equal(loaded(INPUT_IDS).logits, base(INPUT_IDS).logits)
    assert loaded.config.quantization_bit == bits


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_integer_weights_loads_directly_and_is_not_quantized_twice(bits, base, tmp_path):
    quantize_model_(base, bits)
    folder = write_folder(tmp_path / "base", base.state_dict())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    for asked in (None, bits):
        assert torch.equal(load_model(folder, quantization_bit=asked)(INPUT_IDS).logits, base(INPUT_IDS).logits)
    with pytest.raises(ValueError, match="not quantized twice"):
        load_model(folder, quantization_bit=12 - bits)


# ---- which folder


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"_name_or_path": "THUDM/chatglm3-6b"}, "ChatGLM3"),
        ({"_name_or_path": "THUDM/glm-4-9b-chat"}, "GLM-4"),
        ({"padded_vocab_size": 151552}, "GLM-4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_model_is_refused_by_name(settings, family, folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "pre_seq_len": None, **settings}))
    with pytest.raises(ValueError, match=family):
        read_config(folder)


def test_chatglm3_is_recognised_by_its_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/chatglm3-6b"}')
    with pytest.raises(ValueError, match="ChatGLM3"):
        read_config(folder)


ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"64796": {"content": "<|user|>", "special": True}}}),
        ("tokenizer_config.json", {"additional_special_tokens": ROLES}),
        ("tokenizer_config.json", {"chat_template": "{{ '<|user|>' + message }}"}),
        ("special_tokens_map.json", {"additional_special_tokens": ROLES}),
        ("added_tokens.json", {"<|user|>": 64796}),
        ("tokenization_chatglm.py", f"role_special_tokens = {ROLES}"),
    ],
)
def test_a_folder_whose_tokens_contradict_its_configuration_is_asked_about(file, content, folder):
    # In JSON as some libraries write it, "<" is an escape.
    text = content if isinstance(content, str) else json.dumps(content).replace("<", "\\u003c")
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"could be ChatGLM2 or ChatGLM3; .*<.user.> is in its {file}"):
        read_config(folder)


@pytest.mark.parametrize("name", ["chatglm3", "glm-4", "from-chatglm3-6b-to-2"])
def test_the_name_of_a_folder_decides_nothing(name, folder):
    renamed = folder.rename(folder.with_name(name))
    settings = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps({**settings, "_name_or_path": f"/{name}/chatglm2-6b"}))
    (renamed / "tokenizer_config.json").write_text(json.dumps({"name_or_path": f"/{name}/chatglm2-6b"}))
    assert read_config(renamed).model_type == "chatglm"


def test_a_prefix_checkpoint_given_as_base_model_is_explained(tmp_path):
    save_prefix(synthetic_model(), tmp_path / "checkpoint-3000")
    with pytest.raises(ValueError, match=r"only a trained prefix .*--ptuning_checkpoint .*checkpoint-3000"):
        read_config(tmp_path / "checkpoint-3000")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "output/a/b", "missing"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_folder(name)


def test_a_hub_id_that_cannot_be_fetched_names_the_other_ways():
    with pytest.raises(FileNotFoundError, match="HF_ENDPOINT.*ModelScope"):
        resolve_folder("nobody/no-such-model")


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download asks for: one model, its list of files, and the files."""

    folder = None

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        content, headers = b"", {}
        if self.path.startswith("/api/models/THUDM/chatglm2-6b/tree/"):
            files = [file for file in self.folder.iterdir() if file.is_file()]
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            content = json.dumps(entries).encode()
            headers["Content-Type"] = "application/json"
        elif self.path.startswith("/api/models/THUDM/chatglm2-6b"):
            siblings = [{"rfilename": file.name} for file in self.folder.iterdir()]
            content = json.dumps({"id": "THUDM/chatglm2-6b", "sha": "1" * 40, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif (file := self.folder / self.path.split("/")[-1]).is_file():
            content = file.read_bytes()
            headers |= {"ETag": f'"{file.name}"', "X-Repo-Commit": "1" * 40}
        self.send_response(200 if content else 404)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_a_hub_id_is_downloaded_from_hf_endpoint_without_its_code(folder, tmp_path):
    (folder / "modeling_chatglm.py").write_text("raise SystemExit")
    shutil.copy(TINY / "tokenizer.model", folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    program = (
        "from checkpoint import load_model, resolve_folder; folder = resolve_folder('THUDM/chatglm2-6b'); "
        "load_model(folder); print(*sorted(file.name for file in folder.iterdir()))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT / "ptuning",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(file.name for file in folder.iterdir() if file.suffix != ".py")


def test_broken_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        read_config(folder)


def test_a_folder_without_weights_says_what_is_expected(folder):
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights.*pytorch_model.bin"):
        load_model(folder)


# ---- the prefix


def test_the_prefix_file_holds_the_official_names_in_float32_only(tmp_path):
    save_prefix(synthetic_model(prefix_projection=True), tmp_path)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(tensors) == {
        "transformer.prefix_encoder.embedding.weight",
        "transformer.prefix_encoder.trans.0.weight",
        "transformer.prefix_encoder.trans.0.bias",
        "transformer.prefix_encoder.trans.2.weight",
        "transformer.prefix_encoder.trans.2.bias",
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_official_way_of_loading_reads_our_checkpoint(tmp_path):
    # As the official main.py: strip the name, load into an encoder of torch modules under the official names.
    model = synthetic_model(prefix_projection=True)
    save_prefix(model, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    width = settings["num_layers"] * settings["kv_channels"] * settings["multi_query_group_num"] * 2
    hidden = settings["hidden_size"]
    official = torch.nn.Module()
    official.embedding = torch.nn.Embedding(settings["pre_seq_len"], width)
    official.trans = torch.nn.Sequential(
        torch.nn.Linear(width, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, width)
    )
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    official.load_state_dict({name[len("transformer.prefix_encoder.") :]: value for name, value in tensors.items()})
    tokens = torch.arange(settings["pre_seq_len"]).unsqueeze(0)
    prefix = official.trans(official.embedding(tokens)).view(1, settings["pre_seq_len"], -1, 2, 8)
    prefix = prefix.permute([2, 1, 0, 3, 4]).split(2)  # the official (2, P, B, G, D) of each layer
    for (key, value), layer in zip(model.transformer.prefix_encoder(1, torch.float32), prefix, strict=True):
        assert torch.allclose(key, layer[0].permute(1, 2, 0, 3))
        assert torch.allclose(value, layer[1].permute(1, 2, 0, 3))


def test_config_of_a_checkpoint_says_what_the_official_one_says(tmp_path, shared):
    save_prefix(synthetic_model(), tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    official = json.loads((shared / "golden" / "official-checkpoint" / "config.json").read_text())
    assert set(official) - set(ours) <= {"_name_or_path", "auto_map", "vocab_size"}
    assert ours["pre_seq_len"] == 6
    assert ours["quantization_bit"] == 0
    assert ours["use_cache"] is True


def test_settings_come_from_the_weights_even_without_config_and_sidecar(tmp_path):
    save_prefix(synthetic_model(prefix_projection=True), tmp_path)
    (tmp_path / "config.json").unlink()
    settings = read_prefix_settings(tmp_path)
    assert settings == {"pre_seq_len": 6, "prefix_projection": True}


def test_the_sidecar_is_read_back(tmp_path):
    save_prefix(synthetic_model(), tmp_path, {"base_model": "THUDM/chatglm2-6b", "prompt_column": "问题"})
    settings = read_prefix_settings(tmp_path)
    assert settings["base_model"] == "THUDM/chatglm2-6b"
    assert settings["prompt_column"] == "问题"
    assert settings["quantization_bit"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model": {"a": 1}}, 'base_model is {"a": 1}, expected text'),
        ({"model_family": ["chatglm2"]}, r'model_family is \["chatglm2"\], expected text'),
        ({"source_prefix": "\ud800"}, "source_prefix is .*, expected text"),
    ],
)
def test_a_sidecar_of_a_wrong_kind_is_refused_wherever_it_is_read(settings, message, tmp_path):
    (tmp_path / "ptuning.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"ptuning.json: {message}. Repair or delete that file"):
        read_sidecar(tmp_path)


def test_a_saved_prefix_loads_bit_for_bit(tmp_path):
    model = synthetic_model()
    save_prefix(model, tmp_path)
    other = synthetic_model()
    torch.nn.init.zeros_(other.transformer.prefix_encoder.embedding.weight)
    load_prefix(other, tmp_path)
    assert torch.equal(other(INPUT_IDS).logits, model(INPUT_IDS).logits)


@pytest.mark.parametrize("fields", [{"pre_seq_len": 5}, {"prefix_projection": True}, {"num_layers": 3}], ids=str)
def test_a_prefix_of_another_shape_is_refused(fields, tmp_path):
    save_prefix(synthetic_model(), tmp_path)
    with pytest.raises(ValueError, match="does not fit this base model"):
        load_prefix(synthetic_model(**fields), tmp_path)


def test_a_missing_checkpoint_lists_those_beside_it(tmp_path):
    save_prefix(synthetic_model(), tmp_path / "checkpoint-1000")
    with pytest.raises(FileNotFoundError, match="has checkpoint-1000"):
        read_prefix_settings(tmp_path / "checkpoint-3000")


def test_a_full_model_is_not_taken_for_a_prefix(base, tmp_path):
    write_folder(tmp_path / "base", base.state_dict(), "single bin")
    with pytest.raises(ValueError, match="holds no prefix"):
        read_prefix_settings(tmp_path / "base")


def test_a_prefix_of_another_base_model_of_the_same_shape_is_warned_of(base, tmp_path):
    folder = write_folder(tmp_path / "base", base.state_dict())
    other = {name: tensor + 1 for name, tensor in base.state_dict().items()}
    other_folder = write_folder(tmp_path / "other", other)
    config = {"pre_seq_len": 6, "prefix_dropout": 0.0}
    model = load_model(folder, config=read_config(folder, **config))
    save_prefix(model, tmp_path / "checkpoint", {"base_fingerprint": model.fingerprint})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_prefix(
            load_model(folder, config=read_config(folder, **config), quantization_bit=8), tmp_path / "checkpoint"
        )
    with pytest.warns(UserWarning, match="trained on another base model"):
        load_prefix(load_model(other_folder, config=read_config(other_folder, **config)), tmp_path / "checkpoint")


# ---- the real tokenizer and the official checkpoint


def test_a_tokenizer_that_ends_answers_with_another_id_is_refused(folder):
    shutil.copy(TINY / "tokenizer.model", folder)
    config = read_config(folder, padded_vocab_size=2048, eos_token_id=5)
    with pytest.raises(ValueError, match="end with id 2 in tokenizer.model, but with eos_token_id 5"):
        load_tokenizer(folder, config)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder, shared):
    shutil.copy(shared / "chatglm2-tokenizer" / "tokenizer.model", folder)
    with pytest.raises(ValueError, match="64794 tokens.*padded_vocab_size 320"):
        load_tokenizer(folder, read_config(folder))


def test_ids_without_a_token_are_never_generated(shared):
    config = read_config(shared / "chatglm2-mini")
    settings = generation_config(load_tokenizer(shared / "chatglm2-mini", config), config)
    assert settings.suppress_tokens == list(range(64794, 65024))


def test_the_official_checkpoint_predicts_the_official_tokens(shared):
    reference = json.loads((shared / "golden" / "mini-run.json").read_text())
    checkpoint = shared / "golden" / "official-checkpoint"
    settings = read_prefix_settings(checkpoint)
    config = read_config(shared / "chatglm2-mini", pre_seq_len=settings["pre_seq_len"])
    model = load_model(shared / "chatglm2-mini", config=config)
    load_prefix(model, checkpoint)
    tokenizer = load_tokenizer(checkpoint, config)
    rows = (shared / "AdvertiseGen" / "dev.json").read_text(encoding="utf-8").splitlines()
    for row in reference["rows"][:8]:
        prompt = tokenizer.build_prompt(json.loads(rows[row])["content"])
        ids = tokenizer(prompt, truncation=True, max_length=64, return_tensors="pt")
        output = model.generate(**ids, generation_config=generation_config(tokenizer, config, max_length=129))
        answer = output[0, ids["input_ids"].shape[1] :].tolist()
        expected = [token for token in reference["token_ids"][row] if token not in (0, 2)]
        assert [token for token in answer if token not in (0, 2)] == expected
