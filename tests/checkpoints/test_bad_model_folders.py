"""Damaged and foreign folders of base models: each is refused in one message."""

import json
import shutil

import torch
from conftest import TINY
from safetensors.torch import save_file
from support.damage import (
    SHARD,
    SHARD_2,
    change,
    config,
    cut,
    deep,
    edit_weights,
    flip,
    make_folder,
    no_permission,
    pickle_payload,
    remove,
    torch_payload,
    write,
)
from support.refusals import here, refuse, table, train_flags  # noqa: F401, fixtures


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


INDEX = "pytorch_model.bin.index.json"
NORM = "transformer.encoder.layers.0.input_layernorm.weight"
TINY_CONFIG = json.loads((TINY / "config.json").read_text())


def redirect(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../etc/passwd")
    (folder / INDEX).write_text(json.dumps(index))


def index_of(weight_map):
    return write(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


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
    ("a rope of text", config(rope_ratio="50"), ("config.json", "rope_ratio is '50'")),
    ("a rope that is cut", config(original_rope=False), ("config.json", "original_rope=False")),
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
