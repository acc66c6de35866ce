"""What a folder says never chooses code: no setting of a config.json, tokenizer or adapter reaches a loader."""

import json
import shutil
import socket

import pytest
import torch
from conftest import TINY
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig
from transformers.integrations import hub_kernels

import checkpoint
from chatglm2 import modeling_chatglm, tokenization_chatglm
from chatglm2.configuration_chatglm import ChatGLMConfig
from pretrained import register_auto_classes
from tuning import lora

register_auto_classes()

REPOSITORY = "owner/evil-kernel"
HOSTILE = {
    "_attn_implementation": REPOSITORY,
    "attn_implementation": REPOSITORY,
    "_attn_implementation_internal": REPOSITORY,
    "_experts_implementation": REPOSITORY,
    "experts_implementation": REPOSITORY,
    "_experts_implementation_internal": REPOSITORY,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fusion_config": {"patch_embeddings": True},
    "kernel_config": {"RMSNorm": f"{REPOSITORY}:RMSNorm"},
    "use_kernels": True,
    "per_layer_config": {"0": {"hidden_size": 64}},
    "distributed_config": {"tp_plan": "auto"},
    "transformers_weights": "../../elsewhere.safetensors",
    "custom_pipelines": {"text": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}},
    "custom_generate": REPOSITORY,
    "generation_config": {"custom_generate": REPOSITORY, "cache_implementation": "paged"},
    "tokenizer_class": "LlamaTokenizer",
    "model_name": REPOSITORY,
    "base_model_tp_plan": {"layers": "colwise"},
    "sub_configs": {"text_config": {"model_type": "llama"}},
    "to_dict": "not a method",
    "auto_map": {name: f"{REPOSITORY}--evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")},
}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch):
    """Whoever looks for a kernel or opens a connection fails the test, with a message that no code here swallows."""

    class Fetched(BaseException):
        pass

    def fetch(*args, **kwargs):
        raise Fetched(f"something was fetched: {args} {kwargs}")

    monkeypatch.setattr(socket.socket, "connect", fetch)
    monkeypatch.setattr(socket, "getaddrinfo", fetch)
    for name in ("get_kernel", "load_and_register_attn_kernel"):
        monkeypatch.setattr(hub_kernels, name, fetch)
    import transformers.dynamic_module_utils
    import transformers.modeling_utils

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    monkeypatch.setattr(transformers.dynamic_module_utils, "get_cached_module_file", fetch)


@pytest.fixture
def folder(tmp_path):
    """The tiny model, whose files name foreign code wherever a library would look for it."""
    folder = shutil.copytree(TINY, tmp_path / "folder", ignore=shutil.ignore_patterns("*.py"))
    add_settings(folder / "config.json", HOSTILE)
    tokenizer = {
        "auto_map": {"AutoTokenizer": [f"{REPOSITORY}--evil.Evil", None]},
        "fast_tokenizer_files": ["../../elsewhere.json"],
        "init_inputs": ["/etc/hostname"],
        "vocab_file": "/etc/hostname",
        "tokenizer_file": "/etc/hostname",
        "processor_class": REPOSITORY,
        "_load_sentencepiece": "not a method",
    }
    add_settings(folder / "tokenizer_config.json", tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": REPOSITORY, "eos_token_id": 2}))
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "evil.py"):
        (folder / name).write_text("raise SystemExit('code of the folder was run')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('code of the folder was run')")
    return folder


def add_settings(file, settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture(scope="module")
def logits():
    return checkpoint.load_model(TINY)(torch.arange(20)[None]).logits


@pytest.mark.parametrize("name", HOSTILE)
def test_no_setting_that_chooses_code_becomes_one_of_the_configuration(name):
    config = ChatGLMConfig(**{name: HOSTILE[name]})
    assert vars(config).get(name) == vars(ChatGLMConfig()).get(name)
    assert config._attn_implementation is None and config._experts_implementation is None


def test_load_model_fetches_nothing_that_the_folder_names(folder, logits):
    assert torch.equal(checkpoint.load_model(folder)(torch.arange(20)[None]).logits, logits)


def test_a_model_of_a_foreign_configuration_fetches_nothing():
    small = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "kv_channels": 8, "num_attention_heads": 2}
    small |= {"padded_vocab_size": 64}
    modeling_chatglm.ChatGLMForConditionalGeneration(ChatGLMConfig(**{**HOSTILE, **small}))


@torch.no_grad()
@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_automodel_fetches_and_runs_nothing_that_the_folder_names(folder, logits, trust_remote_code):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    assert type(model) is modeling_chatglm.ChatGLMForConditionalGeneration
    assert torch.equal(model(torch.arange(20)[None]).logits, logits)
    assert model.generation_config.to_dict().get("custom_generate") is None
    assert model.generate.__func__ is type(model).generate


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_autoconfig_runs_nothing_that_the_folder_names(folder, trust_remote_code):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert type(config) is ChatGLMConfig and config._attn_implementation is None


def test_the_tokenizer_reads_no_file_and_no_class_that_its_folder_names(folder):
    expected = checkpoint.load_tokenizer(TINY, checkpoint.read_config(TINY))
    found = checkpoint.load_tokenizer(folder, checkpoint.read_config(folder))
    assert type(found) is tokenization_chatglm.ChatGLMTokenizer
    assert found.vocab_file == str(folder / "tokenizer.model")
    assert found.encode("裙子很好看") == expected.encode("裙子很好看")


def test_autotokenizer_reads_no_file_and_no_class_that_its_folder_names(folder):
    found = AutoTokenizer.from_pretrained(folder)
    assert type(found) is tokenization_chatglm.ChatGLMTokenizer
    assert found.vocab_file == str(folder / "tokenizer.model")


def test_a_saved_configuration_keeps_auto_map_as_data_and_names_no_other_code(folder, tmp_path):
    config = checkpoint.read_config(folder)
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == HOSTILE["auto_map"]
    assert config.auto_map == {}
    assert not saved.keys() & (HOSTILE.keys() - {"auto_map"})


@pytest.mark.parametrize("save", ["prefix", "whole model"])
def test_what_training_saves_names_no_code_of_the_base_folder_but_auto_map(save, folder, tmp_path):
    model = checkpoint.load_model(folder, config=checkpoint.read_config(folder, pre_seq_len=4))
    (tmp_path / "saved").mkdir()
    if save == "prefix":
        checkpoint.save_prefix(model, tmp_path / "saved")
    else:
        checkpoint.save_model(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == HOSTILE["auto_map"]
    assert not saved.keys() & (HOSTILE.keys() - {"auto_map"})


def adapter_folder(tmp_path, **settings):
    from peft import LoraConfig

    model = checkpoint.load_model(TINY)
    lora.add_adapter(model, LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    model.peft_config = {"default": LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")}
    lora.save_adapter(model, tmp_path / "adapter", "THUDM/chatglm2-6b")
    add_settings(tmp_path / "adapter" / "adapter_config.json", settings)
    return tmp_path / "adapter"


HOSTILE_ADAPTER = {
    "megatron_core": "antigravity",
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "antigravity"},
    "base_model_name_or_path": REPOSITORY,
    "revision": "main",
    "_custom_modules": {"Linear": "Evil"},
    "peft_version": "99",
}


def test_an_adapter_hands_peft_nothing_that_chooses_code(tmp_path):
    config, tensors = lora.read_adapter(adapter_folder(tmp_path, **HOSTILE_ADAPTER))
    from peft import LoraConfig

    assert config.to_dict() == {**LoraConfig(r=2, target_modules={"query_key_value"}).to_dict(), **config.to_dict()}
    plain = LoraConfig()
    for name in HOSTILE_ADAPTER:
        assert getattr(config, name, None) == getattr(plain, name, None), name
    lora.add_adapter(checkpoint.load_model(TINY), config, tensors, tmp_path)


def test_an_adapter_that_needs_megatron_is_refused_by_the_settings_name(tmp_path):
    folder = adapter_folder(tmp_path, megatron_config={"hidden_size": 1}, megatron_core="antigravity")
    with pytest.raises(ValueError, match=r"adapter_config\.json: megatron_config is \{'hidden_size': 1\}"):
        lora.read_adapter(folder)


def test_a_generation_configuration_is_never_read_from_a_folder(folder, monkeypatch):
    monkeypatch.setattr(GenerationConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was read"))
    AutoModel.from_pretrained(folder)
