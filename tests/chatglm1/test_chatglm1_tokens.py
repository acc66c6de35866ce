"""The tokenizer of the first ChatGLM-6B: equal to the official one on a small vocabulary and, where it is, the real one."""

import json
import os

import pytest
from conftest import ROOT
from support.small_chatglm1 import SMALL_VOCABULARY, TEXTS

from chatglm1.tokenization_chatglm import ChatGLMTokenizer
from data.encoding import _encode_prediction_batch, _encode_training_batch

FIGURES = json.loads((ROOT / "tests" / "chatglm1.json").read_text())
REAL = os.environ.get("CHATGLM1_VOCABULARY", "")


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer(str(SMALL_VOCABULARY), num_image_tokens=0)


@pytest.mark.parametrize(
    "name, vocabulary, settings",
    [
        ("small", SMALL_VOCABULARY, {"num_image_tokens": 0}),
        ("images", SMALL_VOCABULARY, {}),
        ("tokens", REAL, {"num_image_tokens": 0}),
    ],
)
def test_ids_and_texts_are_the_official_ones(name, vocabulary, settings):
    if not vocabulary:
        pytest.skip("the vocabulary of ChatGLM-6B is not here (CHATGLM1_VOCABULARY=…/ice_text.model)")
    tokenizer = ChatGLMTokenizer(str(vocabulary), **settings)
    assert tokenizer(TEXTS)["input_ids"] == FIGURES[name]["ids"]
    assert [tokenizer.encode(text) for text in TEXTS] == FIGURES[name]["ids"]
    assert tokenizer.batch_decode(FIGURES[name]["ids"]) == FIGURES[name]["decoded"]


def test_a_prompt_is_the_question_alone_or_rounds_from_0(tokenizer):
    assert tokenizer.build_prompt("再见") == "再见"
    prompt = tokenizer.build_prompt("再见", [("你好", "你好！"), ("天气", "晴")])
    assert prompt == "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：天气\n答：晴\n[Round 2]\n问：再见\n答："


def test_the_last_turn_is_the_question_alone(tokenizer):
    alone = tokenizer.encode(tokenizer.build_prompt("再见"))
    for history in ([], [("你好", "你好！")]):
        assert tokenizer.last_turn(tokenizer.encode(tokenizer.build_prompt("再见", history))) == alone


def test_the_chat_template_writes_the_same_prompts(tokenizer):
    messages = [{"role": "user", "content": "再见"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "再见"
    history = [("你好", "你好！"), ("天气", "晴")]
    said = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    text = tokenizer.apply_chat_template([*said, *messages], tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.build_prompt("再见", history)


def test_text_that_looks_like_a_special_token_is_text(tokenizer):
    ids = tokenizer.encode("[gMASK]<sop><eop><pad>", add_special_tokens=False)
    assert not {*tokenizer.suffix_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id} & {*ids}


def test_training_learns_the_start_of_the_answer_and_keeps_the_official_lengths(tokenizer):
    examples = {"prompt": ["你好" * 20, "你"], "history": [[], []], "response": ["好" * 30, "再见"], "row": [0, 1]}
    features = _encode_training_batch(examples, tokenizer, "", 8, 10, True)
    prompt, answer = (tokenizer.encode(text * 40, add_special_tokens=False) for text in ("你好", "好"))
    ends = tokenizer.suffix_tokens
    target = [ends[1], *answer[:8], tokenizer.eos_token_id]
    assert features["input_ids"][0] == [*prompt[:7], ends[0], *target]
    assert features["labels"][0] == [-100] * 8 + target
    assert features["input_ids"][1][-1] == tokenizer.eos_token_id


def test_a_prompt_to_answer_is_cut_before_its_end(tokenizer):
    examples = {"prompt": ["你好" * 20], "history": [[]], "response": ["好" * 30], "row": [0]}
    features = _encode_prediction_batch(examples, tokenizer, "", 8, 10)
    text = tokenizer.encode("你好" * 20, add_special_tokens=False)
    assert features["input_ids"] == [[*text[:6], *tokenizer.suffix_tokens]]
    assert len(features["labels"][0]) == 10


def test_padding_stands_on_the_left_with_positions_of_0(tokenizer):
    rows = tokenizer(["你", "你好，再见"], padding=True)
    missing = rows["attention_mask"][0].count(0)
    assert missing and rows["input_ids"][0][:missing] == [tokenizer.pad_token_id] * missing
    assert rows["position_ids"][0][:missing] == [0] * missing


def test_a_saved_tokenizer_is_read_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_vocabulary_without_the_special_tokens_is_refused():
    with pytest.raises(ValueError, match="has no \\[MASK\\]"):
        ChatGLMTokenizer(str(ROOT / "ptuning" / "tiny" / "tokenizer.model"), num_image_tokens=0)
