"""AdvertiseGen/sample/ and ptuning/tiny/: the rows and the model that ship with the project."""

import json
import random

import pytest
import torch
from conftest import SAMPLE, TINY

from data.dataset_info import read_dataset_info
from data.examples import load_examples
from tiny import make_general
from tiny.make_sample import CONFLICTS, KINDS, MAX_CHARACTERS, MIN_CHARACTERS, POOLS, main, sample_rows
from tiny.make_tiny import documents, encode_document


def read_rows(name):
    with open(SAMPLE / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def train():
    return read_rows("train.json")


@pytest.fixture(scope="module")
def dev():
    return read_rows("dev.json")


def test_the_generator_rebuilds_both_files_byte_for_byte(tmp_path):
    main(tmp_path)
    for name in ("train.json", "dev.json"):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes()


def test_there_are_enough_rows_of_adgens_columns(train, dev):
    assert len(train) >= 2000 and len(dev) >= 200
    assert all(list(row) == ["content", "summary"] for row in train + dev)


def test_no_row_occurs_twice_within_or_across_the_files(train, dev):
    rows = train + dev
    assert len({row["content"] for row in rows}) == len(rows)
    assert len({row["summary"] for row in rows}) == len(rows)


def test_content_has_adgens_notation(train, dev):
    for row in train + dev:
        pairs = [pair.split("#") for pair in row["content"].split("*")]
        assert all(len(pair) == 2 and all(pair) for pair in pairs), row
        assert pairs[0][0] == "类型" and len(pairs) >= 3, row


def test_every_attribute_is_put_into_words(train, dev):
    for row in train + dev:
        (_, kind), *attributes = [pair.split("#") for pair in row["content"].split("*")]
        missing = [value for _, value in attributes if value not in row["summary"]]
        assert not missing, row
        assert any(noun in row["summary"] for noun in (*KINDS[kind].nouns, *KINDS[kind].forms)), row


def test_summaries_have_the_length_of_one_or_two_sentences(train, dev):
    assert all(MIN_CHARACTERS <= len(row["summary"]) <= MAX_CHARACTERS for row in train + dev)


def test_every_conflict_names_words_of_the_grammar():
    words = {*KINDS, *POOLS, *(form for kind in KINDS.values() for form in kind.forms)}
    words |= {value for pool in POOLS.values() for value in pool.values}
    assert all(left | right <= words for left, right in CONFLICTS)


# ---- general rows, for mixing


@pytest.fixture(scope="module")
def general():
    return read_rows("general.json"), read_rows("general_dev.json")


def test_the_generator_rebuilds_the_general_rows_byte_for_byte(tmp_path):
    make_general.main(tmp_path)
    for name in ("general.json", "general_dev.json"):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes()


def test_no_general_row_occurs_twice_or_asks_for_an_advert(general, train, dev):
    rows = general[0] + general[1]
    assert (len(general[0]), len(general[1])) == (1200, 120)
    assert len({json.dumps(row) for row in rows}) == len(rows)
    contents = {row["content"] for row in train + dev}
    assert not any(row["prompt"] in contents or "广告" in row["prompt"] for row in rows)
    assert any(row["history"] for row in rows)


def test_every_data_set_of_the_sample_can_be_named():
    sources, notes = read_dataset_info(SAMPLE, "adverts,adverts_dev,general,general_dev")
    rows = {name: len(load_examples(**source)[0]) for name, source in sources.items()}
    assert rows == {"adverts": 2400, "adverts_dev": 240, "general": 1200, "general_dev": 120} and not notes


# ---- the tiny model


@pytest.fixture(scope="module")
def tokenizer():
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(str(TINY))


@pytest.fixture(scope="module")
def model():
    from checkpoint import load_model

    return load_model(str(TINY), dtype=torch.float32)


def test_pretraining_text_holds_no_content_and_no_summary_of_the_sample():
    rows = sample_rows()
    held_out = {row["content"] for row in rows} | {row["summary"] for row in rows}
    source = documents(random.Random(0))
    for _ in range(3000):
        history, query, answer = next(source)
        texts = [text for turn in history for text in turn] + [query or "", answer]
        assert not held_out.intersection(texts)


def test_pretraining_supervises_the_answer_and_the_end_only(tokenizer):
    input_ids, labels = encode_document(tokenizer, ([], "你好", "你好。"))
    answer = tokenizer.encode("你好。", add_special_tokens=False)
    assert input_ids[:2] == tokenizer.prefix_tokens
    assert labels == [-100] * (len(input_ids) - len(answer) - 1) + answer + [tokenizer.eos_token_id]


def test_the_folder_is_official_in_form_and_small():
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    index = json.loads((TINY / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
    assert config["torch_dtype"] == "float16" and config["multi_query_group_num"] == 2
    shards = {name: torch.load(TINY / name, weights_only=True) for name in set(index["weight_map"].values())}
    assert len(shards) == 2
    assert {key: name for name, shard in shards.items() for key in shard} == index["weight_map"]
    assert all(tensor.dtype == torch.float16 for shard in shards.values() for tensor in shard.values())
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 8_000_000


def test_the_vocabulary_has_chatglm2s_special_ids(tokenizer):
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("\n", add_special_tokens=False)[-1] == 13  # newline is a byte, as in the 6B
    assert tokenizer.vocab_size <= config["padded_vocab_size"] < tokenizer.vocab_size + 128


def test_the_vocabulary_keeps_any_text(tokenizer):
    for text in ("你好，世界", "ChatGLM2-6B: 3 + 4 = 7?", "龘 emoji 😀\n\t 　end", "[gMASK]</s>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sample_rows_fit_the_lengths_the_scripts_use(tokenizer, train, dev):
    prompts = [tokenizer.build_prompt(row["content"]) for row in train + dev]
    assert max(map(len, tokenizer.encode_batch(prompts))) + 2 <= 64
    # The end of sequence is added after a response is cut.
    assert max(map(len, tokenizer.encode_batch([row["summary"] for row in train + dev]))) <= 64


def test_untuned_the_model_lists_attributes_and_writes_copy_only_when_asked(model, tokenizer):
    content = "类型#裙*颜色#白色*材质#纯棉*裙型#连衣裙"
    answer, _ = model.chat(tokenizer, content, do_sample=False, max_length=128)
    assert answer == "类型是裙，颜色是白色，材质是纯棉，裙型是连衣裙。"
    advert, _ = model.chat(tokenizer, f"请为下面的商品写一段广告：{content}", do_sample=False, max_length=128)
    assert MIN_CHARACTERS <= len(advert) <= MAX_CHARACTERS and advert != answer
    assert all(word in advert for word in ("白色", "纯棉", "连衣裙"))
