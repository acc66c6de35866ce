"""Rows of data, files of them, and a small tokenizer."""

import io
import json

import pytest
import sentencepiece
from conftest import SHARED

from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from data.encoding import encode_training
from data.examples import load_examples

ADGEN = SHARED / "AdvertiseGen"
ROWS = [{"content": "类型#裤*风格#简约", "summary": "简约的裤子。"}, {"content": "类型#裙", "summary": "好看的裙子 "}]
TURNS = [["你好", "你好！"], ["今天天气？", "很好"]]


def skip_without(path):
    if not path.exists():
        pytest.skip(f"reference data of the official scripts is not here: {path}")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of `datasets` that starts empty and that nobody else reads."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets-cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-tokenizer")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"问题{i}：今天是第{i}天。The answer is {i}, ok? [Round]\n答" for i in range(200)]),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return ChatGLMTokenizer.from_pretrained(tokenizer_folder)


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    """Writes rows (as JSON lines), text or bytes to a file and returns its path."""

    def write_file(content, name="train.json"):
        if isinstance(content, list):
            content = as_lines(content)
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return write_file


MIXED = [
    {"content": "", "summary": "b"},
    {"content": "c", "summary": "d"},
    {"content": "e", "summary": None},
    {"content": "f", "summary": " "},
    {"content": "g", "summary": "h"},
]


LONG_DIALOGUE = {"content": "那明天呢", "summary": "好", "history": [[f"第{i}天？", "很好" * 5] for i in range(8)]}


def encode_file(path, tokenizer, **settings):
    examples, _ = load_examples(path, "content", "summary")
    return encode_training(examples, tokenizer, **{"max_source_length": 64, "max_target_length": 64, **settings})
