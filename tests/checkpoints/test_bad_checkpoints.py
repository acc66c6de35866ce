"""Damaged and foreign checkpoints and adapters: each is refused in one message."""

import shutil

import pytest
import torch
from conftest import SAMPLE, TINY
from safetensors.torch import load_file, save_file
from support.damage import (
    PREFIX,
    SHARD,
    SHARD_2,
    change,
    config,
    copy_run,
    cut,
    deep,
    edit_json,
    edit_weights,
    flip,
    make_folder,
    no_permission,
    pickle_payload,
    remove,
    torch_payload,
    write,
)
from support.refusals import COLUMNS, TRAIN, flags, here, predict_flags, refuse, table, trained  # noqa: F401, fixtures

KEY = "transformer.prefix_encoder.embedding.weight"


def replace_by_base(folder):
    shutil.rmtree(folder)
    shutil.copytree(TINY, folder)


def single_base(folder):
    """A full model in one file, where a prefix is expected."""
    tensors = torch.load(TINY / SHARD, weights_only=True) | torch.load(TINY / SHARD_2, weights_only=True)
    torch.save(tensors, folder / PREFIX)


# What is wrong, how a copy of checkpoint-2 is damaged, what the message says.
CHECKPOINTS = [
    ("no such folder", shutil.rmtree, ("--ptuning_checkpoint", "checkpoint-2", "checkpoint-1")),
    ("no weights", remove(PREFIX), (f"there is no {PREFIX} in it",)),
    ("a truncated file", cut(PREFIX, 2000), f"{PREFIX} cannot be read as model weights"),
    ("a file short of one byte", cut(PREFIX, -1), f"{PREFIX} cannot be read as model weights"),
    ("an empty file", write(PREFIX, b""), f"{PREFIX} cannot be read as model weights"),
    ("text", write(PREFIX, "hello"), f"{PREFIX} cannot be read as model weights"),
    ("a folder as file", make_folder(PREFIX), PREFIX),
    ("a file that may not be read", no_permission(PREFIX), (PREFIX, "Permission denied")),
    ("a bit flipped in the pickle", flip(PREFIX, 100), PREFIX),
    ("a torch file that would run code", torch_payload(PREFIX), (PREFIX, "never loaded")),
    ("a plain pickle that would run code", pickle_payload(PREFIX), (PREFIX, "never loaded")),
    ("a base model's folder", replace_by_base, ("--ptuning_checkpoint", f"there is no {PREFIX}")),
    ("a whole model", single_base, (PREFIX, "holds no prefix")),
    ("a prefix of another size", edit_weights(PREFIX, change(KEY, lambda t: t[:, :7].clone())), "does not fit this base"),
    ("a prefix without rows", edit_weights(PREFIX, change(KEY, lambda t: t[:0].clone())), (PREFIX, "(0, ")),
    ("a prefix of one dimension", edit_weights(PREFIX, change(KEY, lambda t: t[0].clone())), "does not fit this base"),
    ("a prefix that is one number", edit_weights(PREFIX, change(KEY, lambda t: t[0, 0].clone())), PREFIX),
    ("a prefix of integers", edit_weights(PREFIX, change(KEY, torch.Tensor.int)), (PREFIX, "int32")),
    ("a prefix of NaN", edit_weights(PREFIX, change(KEY, lambda t: t * float("nan"))), (PREFIX, "nan")),
    ("a prefix with more tensors", edit_weights(PREFIX, lambda t: t.update({KEY[:-6] + "bias": t[KEY][0].clone()})),
     "does not fit this base"),
    ("a prefix with half a projection", edit_weights(PREFIX, lambda t: t.update(
        {KEY.replace("embedding", "trans.0"): torch.zeros(2, 2)})), "checkpoint-2"),
    ("a broken config.json", write("config.json", "{"), "config.json is not valid JSON"),
    ("a config.json of a list", write("config.json", "[]"), "config.json holds a list"),
    ("bits as text in config.json", config(quantization_bit="four"), ("config.json", "quantization_bit")),
    ("bits of no kind in config.json", config(quantization_bit=3), ("config.json", "quantization_bit")),
    ("a broken sidecar", write("ptuning.json", "{]"), "ptuning.json is not valid JSON"),
    ("a sidecar of a list", write("ptuning.json", "[]"), "ptuning.json holds a list"),
    ("a sidecar nested too deep", write("ptuning.json", deep(100_000, '{"a":', "}")), ("ptuning.json", "nested")),
    ("a length as text", lambda f: edit_json(f / "ptuning.json", max_source_length="long"), ("ptuning.json", "max_source")),
    ("a length below 0", lambda f: edit_json(f / "ptuning.json", max_target_length=-8), ("ptuning.json", "max_target")),
    ("a column of numbers", lambda f: edit_json(f / "ptuning.json", prompt_column=3), ("ptuning.json", "prompt_column")),
    ("a base model of numbers", lambda f: edit_json(f / "ptuning.json", base_model=[1]), ("ptuning.json", "base_model")),
    ("a base model that has moved", lambda f: edit_json(f / "ptuning.json", base_model="/gone/chatglm2-6b"),
     "/gone/chatglm2-6b"),
    ("a source prefix of numbers", lambda f: edit_json(f / "ptuning.json", source_prefix=3), ("ptuning.json", "source_prefix")),
]  # fmt: skip


@table(CHECKPOINTS)
def test_a_checkpoint_is_refused(case, forks, trained, here):
    damage, says = case
    copy_run(trained, here / "run")
    damage(here / "run" / "checkpoint-2")
    words = predict_flags(here, ptuning_checkpoint=here / "run" / "checkpoint-2")
    refuse(forks, here, words, says, as_root=False)
    assert not (here / "executed").exists()


def test_a_good_checkpoint_is_taken(forks, trained, here):
    words = predict_flags(here, ptuning_checkpoint=trained / "checkpoint-2")
    assert forks.run("main.py", words, cwd=here).returncode == 0


def test_the_demos_refuse_a_checkpoint_that_would_run_code(forks, trained, here):
    copy_run(trained / "checkpoint-2", here / "checkpoint-2")
    torch_payload(PREFIX)(here / "checkpoint-2")
    refuse(forks, here, ["--ptuning_checkpoint", "checkpoint-2"], (PREFIX, "never loaded"), program="cli_demo.py")


@table(
    [
        ("another length", {"pre_seq_len": 5}, ("--pre_seq_len 5 contradicts", "4")),
        ("a projection", {"prefix_projection": True}, "--prefix_projection True contradicts"),
        ("the checkpoint as base model", {"ptuning_checkpoint": None, "model_name_or_path": "run/checkpoint-2",
         **COLUMNS}, ("holds only a trained prefix", "--ptuning_checkpoint")),
    ]
)  # fmt: skip
def test_flags_that_contradict_a_checkpoint_are_refused(case, forks, trained, here):
    more, says = case
    copy_run(trained, here / "run")
    refuse(forks, here, predict_flags(here, **{"ptuning_checkpoint": "run/checkpoint-2", **more}), says)


ADAPTER, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def adapter(**changes):
    return lambda folder: edit_json(folder / ADAPTER_SETTINGS, **changes)


def edit_adapter(edit):
    def damage(folder):
        tensors = load_file(folder / ADAPTER)
        save_file({name: edit(tensor).contiguous() for name, tensor in tensors.items()}, folder / ADAPTER)

    return damage


# What is wrong, how a copy of a LoRA checkpoint is damaged, what the message says.
ADAPTERS = [
    ("no weights", remove(ADAPTER), "adapter is incomplete"),
    ("truncated weights", cut(ADAPTER, 900), f"{ADAPTER} cannot be read as model weights"),
    ("weights of NaN", edit_adapter(lambda tensor: tensor * float("nan")), (ADAPTER, "nan")),
    ("weights of another size", edit_adapter(lambda tensor: tensor[:, :3]), "does not fit this base model"),
    ("weights of integers", edit_adapter(torch.Tensor.int), (ADAPTER, "int32")),
    ("broken settings", write(ADAPTER_SETTINGS, "{"), f"{ADAPTER_SETTINGS} is not valid JSON"),
    ("settings that are a list", write(ADAPTER_SETTINGS, "[]"), f"{ADAPTER_SETTINGS} holds a list"),
    ("another kind of adapter", adapter(peft_type="PROMPT_TUNING"), (ADAPTER_SETTINGS, "PROMPT_TUNING", "only LoRA")),
    ("an unknown kind of adapter", adapter(peft_type="MAGIC"), (ADAPTER_SETTINGS, "MAGIC")),
    ("a rank of text", adapter(r="eight"), (ADAPTER_SETTINGS, "r is 'eight'")),
    ("a rank of 0", adapter(r=0), (ADAPTER_SETTINGS, "r is 0")),
    ("another rank", adapter(r=3), "does not fit this base model"),
    ("an alpha of text", adapter(lora_alpha="a lot"), (ADAPTER_SETTINGS, "lora_alpha is 'a lot'")),
    ("a dropout of 7", adapter(lora_dropout=7), (ADAPTER_SETTINGS, "lora_dropout is 7")),
    ("layers that are not there", adapter(target_modules=["q_proj"]), "q_proj"),
    ("a setting of PEFT that is none", adapter(alora_invocation_tokens=[7]), ("PEFT cannot use the adapter", "aLoRA")),
    ("a table of ranks that is null", adapter(rank_pattern=None), "PEFT cannot use the adapter"),
    ("layers that are a number", adapter(target_modules=7), (ADAPTER_SETTINGS, "target_modules is 7")),
]


@pytest.fixture(scope="module")
def trained_adapter(forks, tmp_path_factory):
    """A LoRA checkpoint, as PEFT alone would leave it: no checksums."""
    here = tmp_path_factory.mktemp("adapter")
    lora = {"finetuning_type": "lora", "pre_seq_len": None, "max_train_samples": 8, "max_steps": 1}
    words = flags({**TRAIN, **lora}, train_file=SAMPLE / "train.json", output_dir=here / "run")
    done = forks.run("main.py", words, cwd=here)
    assert done.returncode == 0, done.stderr
    copy_run(here / "run" / "checkpoint-1", here / "adapter")
    return here / "adapter"


@table(ADAPTERS)
def test_an_adapter_is_refused(case, forks, trained_adapter, here):
    damage, says = case
    copy_run(trained_adapter, here / "adapter")
    damage(here / "adapter")
    words = predict_flags(here, ptuning_checkpoint=here / "adapter", model_name_or_path=TINY, **COLUMNS)
    refuse(forks, here, words, says)


def test_a_good_adapter_is_taken(forks, trained_adapter, here):
    words = predict_flags(here, ptuning_checkpoint=trained_adapter)
    assert forks.run("main.py", words, cwd=here).returncode == 0
