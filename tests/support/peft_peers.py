"""PEFT's own tests of decoders, on small ChatGLM2 models in folders."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from pretrained import register_auto_classes
from support.peers import suite

PREFIXES = {
    "chatglm-plain": {},
    "chatglm-prefix": {"pre_seq_len": 3},
    "chatglm-projection": {"pre_seq_len": 3, "prefix_projection": True},
}


@functools.cache
def folder_of(name):
    """The folder of a small model; every model that the suite names on the hub is the plain one."""
    if Path(name).is_dir():
        return name
    folder = Path(tempfile.mkdtemp()) / name
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(tokenizer),
        hidden_size=32,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        seq_length=512,
        add_qkv_bias=True,
        bos_token_id=1,
        prefix_dropout=0.0,
        **PREFIXES.get(name, {}),
    )
    torch.manual_seed(0)
    ChatGLMForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class FromFolder:
    """AutoModelForCausalLM, for which the suite's names are folders here."""

    @staticmethod
    def from_pretrained(name, *arguments, **settings):
        return AutoModelForCausalLM.from_pretrained(folder_of(str(name)), *arguments, **settings)


def decoder_tests(*names, only=None):
    """The suite's test class, for models of these names; with `only`, tests of other names are left out."""
    register_auto_classes()
    decoders = suite("peft", "test_decoder_models", copy=f"_{len(names)}")
    # In place, because the parameters of the suite's tests are these lists.
    decoders.PEFT_DECODER_MODELS_TO_TEST[:] = decoders.SMALL_GRID_MODELS[:] = names

    class Decoders(decoders.TestDecoderModels):
        transformers_class = FromFolder

        @pytest.fixture(autouse=True)
        def names_are_folders(self, monkeypatch):
            load = AutoTokenizer.from_pretrained
            monkeypatch.setattr(
                AutoTokenizer, "from_pretrained", lambda name, **settings: load(folder_of(name), **settings)
            )
            monkeypatch.setattr(decoders, "AutoModelForCausalLM", FromFolder)

    for name in dir(Decoders):
        if only and name.startswith("test_") and name not in only:
            setattr(Decoders, name, None)
    return Decoders
