"""transformers' own tests of models and of generate(), on a small ChatGLM2: without prefix, with one, with projection."""

import unittest
from unittest import mock

import pytest
import torch
from support.peers import Whole, has, suite
from transformers import StaticCache

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel

common = suite("transformers", "test_modeling_common")
generation = suite("transformers", "generation.test_utils")


class Tester:
    """What the suite asks of a model's tester: a configuration and a batch."""

    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 3, 7, 2, 4, 32
    is_training = True

    def __init__(self, **prefix):
        self.prefix = prefix
        self.key_length = self.seq_length + prefix.get("pre_seq_len", 0)

    def get_config(self):
        return ChatGLMConfig(
            num_layers=self.num_hidden_layers,
            padded_vocab_size=99,
            hidden_size=self.hidden_size,
            ffn_hidden_size=37,
            kv_channels=8,
            num_attention_heads=self.num_attention_heads,
            multi_query_attention=True,
            multi_query_group_num=2,
            seq_length=512,
            add_qkv_bias=True,
            bos_token_id=1,
            **self.prefix,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], 99)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class Models(Whole, common.ModelTesterMixin, generation.GenerationTesterMixin):
    all_model_classes = (ChatGLMModel, ChatGLMForConditionalGeneration)
    prefix = {}

    def setUp(self):
        self.model_tester = Tester(**self.prefix)
        # As the library's own models are listed, so that no loss is asked of the one without a head.
        listed = mock.patch.dict(common.MODEL_MAPPING_NAMES, {"chatglm": "ChatGLMModel"})
        listed.start()
        self.addCleanup(listed.stop)


class TestPlain(Models, unittest.TestCase):
    pass


class TestPrefix(Models, unittest.TestCase):
    """The prefix is among the keys of every query and in the cache."""

    length = 3
    prefix = {"pre_seq_len": length, "prefix_dropout": 0.0}

    def _check_attentions_for_generate(self, batch_size, attentions, **lengths):
        if not isinstance(lengths["decoder_past_key_values"], StaticCache):
            attentions = tuple(tuple(layer[..., self.length :] for layer in step) for step in attentions)
        super()._check_attentions_for_generate(batch_size, attentions, **lengths)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length + self.length, config)


class TestProjection(TestPrefix):
    prefix = {**TestPrefix.prefix, "prefix_projection": True}


def test_the_tests_of_generate_are_here():
    if not has("transformers", "generation/test_utils.py"):
        pytest.skip("transformers' source distribution lacks tests/generation/test_utils.py, its repository has it")
    assert hasattr(TestPlain, "test_greedy_generate")
