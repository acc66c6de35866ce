"""transformers' own tests of tokenizers, on the tokenizer of the small model."""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

from conftest import TINY
from support.peers import Whole, suite

from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from pretrained import register_auto_classes

common = suite("transformers", "test_tokenization_common")

register_auto_classes()


class TestTokenizer(Whole, common.TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = ChatGLMTokenizer
    from_pretrained_id = str(TINY)
    test_sentencepiece = True

    @classmethod
    def setUpClass(cls):
        # The suite's sample text is not in the source distribution.
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(common, "get_tests_dir", lambda: folder):
            (Path(folder) / "fixtures").mkdir()
            (Path(folder) / "fixtures" / "sample_text.txt").write_text(common.input_string, encoding="utf-8")
            super().setUpClass()

    def get_clean_sequence(self, tokenizer, with_prefix_space=False, **lengths):
        """The suite looks for English words among the pieces, and this vocabulary is Chinese."""
        text = "今天天气很好 我们一起去公园散步"
        return text, tokenizer.encode(text, add_special_tokens=False)
