"""Token ids and labels: equal to the official features, cut at the limits, computed once."""

import json
import os
import subprocess
import sys

import numpy
import pytest
from conftest import ROOT, SHARED
from support.rows import (  # noqa: F401, fixtures
    ADGEN,
    LONG_DIALOGUE,
    MIXED,
    ROWS,
    TURNS,
    encode_file,
    own_cache,
    skip_without,
    tokenizer,
    tokenizer_folder,
    write,
)

from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from data import encoding
from data.batches import collate_prediction
from data.encoding import encode_prediction, encode_training
from data.examples import load_examples

GOLDEN = SHARED / "golden"


@pytest.fixture(scope="module")
def real_tokenizer():
    skip_without(SHARED / "chatglm2-tokenizer")
    return ChatGLMTokenizer.from_pretrained(SHARED / "chatglm2-tokenizer")


# ---- equal to the official scripts


@pytest.mark.parametrize("case", ["public_mqa", "public_projection"])
def test_training_features_equal_the_official_ones_without_their_padding(case, real_tokenizer):
    skip_without(GOLDEN / f"forward.{case}.npz")
    settings = json.loads((GOLDEN / f"forward.{case}.json").read_text())
    official = numpy.load(GOLDEN / f"forward.{case}.npz")
    examples, _ = load_examples(ADGEN / "dev.json", "content", "summary")
    encoded = encode_training(
        examples.select(settings["rows"]),
        real_tokenizer,
        max_source_length=settings["max_source_length"],
        max_target_length=settings["max_target_length"],
    )
    assert len(encoded) == len(official["input_ids"])
    for feature, input_ids, labels in zip(encoded, official["input_ids"], official["labels"], strict=True):
        length = len(feature["input_ids"])
        assert feature["input_ids"] == input_ids[:length].tolist()
        assert feature["labels"] == labels[:length].tolist()
        assert not input_ids[length:].any()
        assert (labels[length:] == -100).all()


def test_prediction_batch_equals_the_official_one(real_tokenizer):
    skip_without(GOLDEN / "forward.public_mqa.json")
    settings = json.loads((GOLDEN / "forward.public_mqa.json").read_text())
    examples, _ = load_examples(ADGEN / "dev.json", "content", "summary")
    encoded = encode_prediction(
        examples.select(settings["rows"]),
        real_tokenizer,
        max_source_length=settings["max_source_length"],
        max_target_length=64,
    )
    batch = collate_prediction(list(encoded), pad_token_id=real_tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == settings["generate"]["input_ids"]
    padding = [row.count(0) for row in settings["generate"]["input_ids"]]
    length = batch["input_ids"].shape[1]
    assert batch["attention_mask"].tolist() == [[0] * pad + [1] * (length - pad) for pad in padding]
    assert batch["position_ids"].tolist() == [[0] * pad + [*range(length - pad)] for pad in padding]


# ---- token ids and labels


def encode_one(tokenizer, write, row, history_column=None, **settings):
    examples, _ = load_examples(write([row]), "content", "summary", history_column)
    return encode_training(examples, tokenizer, **{"max_source_length": 64, "max_target_length": 64, **settings})[0]


def test_prompt_tokens_do_not_contribute_to_loss(tokenizer, write):
    feature = encode_one(tokenizer, write, ROWS[0])
    prompt = tokenizer.encode(tokenizer.build_prompt(ROWS[0]["content"]))
    answer = tokenizer.encode(ROWS[0]["summary"], add_special_tokens=False) + [tokenizer.eos_token_id]
    assert feature["input_ids"] == prompt + answer
    assert feature["labels"] == [-100] * len(prompt) + answer


def test_without_ignoring_the_pad_token_it_labels_the_prompt(tokenizer, write):
    feature = encode_one(tokenizer, write, ROWS[0], ignore_pad_token_for_loss=False)
    masked = encode_one(tokenizer, write, ROWS[0])
    assert feature["labels"] == [tokenizer.pad_token_id if label == -100 else label for label in masked["labels"]]


def test_history_and_source_prefix_stand_in_the_prompt(tokenizer, write):
    row = {"content": "然后呢", "summary": "好", "history": TURNS}
    feature = encode_one(tokenizer, write, row, "history", source_prefix="请答：", max_source_length=999)
    prompt = "请答：" + tokenizer.build_prompt("然后呢", TURNS)
    assert "[Round 3]" in prompt
    assert feature["input_ids"][: feature["source_length"]] == tokenizer.encode(prompt)


@pytest.mark.parametrize("turns", [TURNS, [["a <n>", "嗨” "], ["b", "c\n"], ["d", ""]]])
def test_with_train_on_history_every_answer_and_its_end_is_learned(turns, tokenizer, write):
    row = {"content": "然后呢", "summary": "好", "history": turns}
    how = {"source_prefix": "请答：", "max_source_length": 999}
    plain, whole = (encode_one(tokenizer, write, row, "history", train_on_history=on, **how) for on in (False, True))
    assert whole["input_ids"] == plain["input_ids"]
    start = plain["source_length"]
    assert whole["labels"][start:] == plain["labels"][start:]
    learned, answer = [], []
    for token, label in zip(whole["input_ids"][:start], whole["labels"][:start], strict=True):
        if label == token:
            answer.append(token)
        elif label == tokenizer.eos_token_id:  # the answer has ended where the prompt goes on
            learned.append(tokenizer.decode(answer).strip())
            answer = []
        else:
            assert label == -100 and not answer
    assert learned == [text.strip() for _, text in turns if text]


def test_with_train_on_history_turns_that_are_left_out_have_no_labels(tokenizer, write):
    how = {"max_source_length": 120, "train_on_history": True}
    feature = encode_one(tokenizer, write, LONG_DIALOGUE, "history", **how)
    assert 0 < feature["dropped_turns"] < 8
    ends = feature["labels"].count(tokenizer.eos_token_id)
    assert ends == 8 - feature["dropped_turns"] + 1


@pytest.mark.parametrize("kept", [8, 7, 3, 0])
def test_dialogue_that_is_too_long_loses_its_oldest_turns_only(kept, tokenizer, write):
    history = LONG_DIALOGUE["history"][8 - kept :]
    prompt = tokenizer.encode(tokenizer.build_prompt("那明天呢", history))
    for limit in (len(prompt), len(prompt) + 5):  # a turn has more than 5 tokens
        feature = encode_one(tokenizer, write, LONG_DIALOGUE, "history", max_source_length=limit)
        assert feature["input_ids"][: len(prompt)] == prompt
        assert feature["labels"].count(-100) == len(prompt)
        assert feature["dropped_turns"] == 8 - kept
        assert feature["source_length"] == len(
            tokenizer.encode(tokenizer.build_prompt("那明天呢", LONG_DIALOGUE["history"]))
        )


def test_question_of_a_dialogue_that_is_too_long_alone_keeps_the_answer_marker(tokenizer, write):
    row = {"content": "今天" * 40, "summary": "好", "history": TURNS}
    feature = encode_one(tokenizer, write, row, "history", max_source_length=60, source_prefix="请答：")
    length = feature["labels"].count(-100)
    text = tokenizer.decode(feature["input_ids"][:length])
    assert 60 - 3 <= length <= 60
    assert text.startswith("请答：[Round 1]\n\n问：今天今天") and text.endswith("天\n\n答：")
    assert feature["dropped_turns"] == 2


def test_question_without_a_history_is_cut_at_its_end_as_in_the_official_script(tokenizer, write):
    row = {"content": "今天" * 40, "summary": "好", "history": []}
    feature = encode_one(tokenizer, write, row, "history", max_source_length=60)
    assert feature["input_ids"][:60] == tokenizer.encode(tokenizer.build_prompt(row["content"]))[:60]
    assert feature["dropped_turns"] == 0


def test_prediction_cuts_a_dialogue_as_training_does(tokenizer, write):
    examples, _ = load_examples(write([LONG_DIALOGUE]), "content", "summary", "history")
    lengths = {"max_source_length": 80, "max_target_length": 8}
    trained, predicted = (encode(examples, tokenizer, **lengths)[0] for encode in (encode_training, encode_prediction))
    assert predicted["input_ids"] == trained["input_ids"][: trained["labels"].count(-100)]
    assert predicted["dropped_turns"] == trained["dropped_turns"] > 0


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_cut_at_the_limit_keeps_lengths_masks_and_the_end_token(offset, tokenizer, write):
    full = encode_one(tokenizer, write, {"content": "今天" * 20, "summary": "答" * 30}, max_source_length=999)
    source_limit, target_limit = full["source_length"] + offset, full["target_length"] + offset
    feature = encode_one(
        tokenizer,
        write,
        {"content": "今天" * 20, "summary": "答" * 30},
        max_source_length=source_limit,
        max_target_length=target_limit,
    )
    sources, targets = min(full["source_length"], source_limit), min(full["target_length"], target_limit)
    assert len(feature["input_ids"]) == len(feature["labels"]) == sources + targets + 1
    assert feature["input_ids"][:sources] == full["input_ids"][:sources]
    assert feature["input_ids"][-1] == feature["labels"][-1] == tokenizer.eos_token_id
    assert feature["labels"].count(-100) == sources
    assert (feature["source_length"], feature["target_length"]) == (full["source_length"], full["target_length"])


def test_prediction_features_hold_the_prompt_the_cut_reference_and_the_row(tokenizer, write):
    examples, _ = load_examples(write(MIXED), "content", "summary", keep_unlabelled=True)
    encoded = encode_prediction(examples, tokenizer, max_source_length=64, max_target_length=3)
    assert encoded["row"][:] == [2, 3, 4, 5]
    assert encoded[0]["input_ids"] == tokenizer.encode(tokenizer.build_prompt("c"))
    assert encoded[0]["labels"] == tokenizer.encode("d")[:3]
    assert encoded[1]["labels"] == tokenizer.prefix_tokens


def test_source_length_below_the_fixed_part_is_refused_with_the_minimum(tokenizer, write):
    examples, _ = load_examples(write(ROWS), "content", "summary")
    minimum = len(tokenizer.encode("前缀" + tokenizer.build_prompt("")))
    settings = {"source_prefix": "前缀", "max_target_length": 8}
    for encode in (encode_training, encode_prediction):
        with pytest.raises(ValueError, match=rf"--max_source_length {minimum - 1} .*at least {minimum} "):
            encode(examples, tokenizer, max_source_length=minimum - 1, **settings)
        assert len(encode(examples, tokenizer, max_source_length=minimum, **settings)) == 2


def test_target_length_of_nothing_is_refused(tokenizer, write):
    examples, _ = load_examples(write(ROWS), "content", "summary")
    with pytest.raises(ValueError, match="--max_target_length 0"):
        encode_training(examples, tokenizer, max_source_length=64, max_target_length=0)


# ---- cache and workers


def test_features_are_computed_once_and_again_when_asked(tokenizer, write, monkeypatch):
    calls = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: calls.append(texts) or encode_batch(texts))
    path = write([{"content": "once", "summary": "only"}])
    encode_file(path, tokenizer)
    first = len(calls)
    calls.clear()
    encode_file(path, tokenizer)
    assert len(calls) == 1 < first  # only the check of the lengths
    calls.clear()
    encode_file(path, tokenizer, overwrite_cache=True)
    assert len(calls) == first


def test_cached_features_change_with_settings_vocabulary_and_code(tokenizer, tmp_path, write, monkeypatch):
    path = write(ROWS)
    base = encode_file(path, tokenizer)._fingerprint
    assert encode_file(path, tokenizer, num_workers=2)._fingerprint == base
    others = {
        encode_file(path, tokenizer, max_source_length=63)._fingerprint,
        encode_file(path, tokenizer, max_target_length=63)._fingerprint,
        encode_file(path, tokenizer, source_prefix="a")._fingerprint,
        encode_file(path, tokenizer, ignore_pad_token_for_loss=False)._fingerprint,
    }
    monkeypatch.setattr(tokenizer, "model_sha256", "another vocabulary")
    others.add(encode_file(path, tokenizer)._fingerprint)
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "code_sha256", lambda: "other code")
    others.add(encode_file(path, tokenizer)._fingerprint)
    assert len(others | {base}) == 7


def test_ranks_that_start_together_share_one_cache(tokenizer_folder, tokenizer, tmp_path, write, monkeypatch):
    path = write([{"content": f"问题{i}", "summary": f"答{i}"} for i in range(50)])
    code = (
        "import sys; from data import encoding, examples; from chatglm2.tokenization_chatglm import ChatGLMTokenizer\n"
        "rows, _ = examples.load_examples(sys.argv[1], 'content', 'summary')\n"
        "tokenizer = ChatGLMTokenizer.from_pretrained(sys.argv[2])\n"
        "encoded = encoding.encode_training(rows, tokenizer, max_source_length=64, max_target_length=64)\n"
        "print(encoded._fingerprint, len(encoded), encoded[7]['labels'])"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(tokenizer_folder)],
            cwd=ROOT / "ptuning",
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    here = encode_file(path, tokenizer)
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].split(maxsplit=2)[1:] == ["50", str(here[7]["labels"]) + "\n"]


def test_many_workers_on_a_larger_file_give_the_same_features(tokenizer, write, monkeypatch):
    monkeypatch.setattr(encoding, "ROWS_PER_WORKER", 20)
    monkeypatch.setattr(encoding.os, "cpu_count", lambda: 2)
    path = write([{"content": f"问题{i}", "summary": f"答{i}" * (i % 7 + 1)} for i in range(60)])
    alone = encode_file(path, tokenizer)[:]
    together = encode_file(path, tokenizer, num_workers=10, overwrite_cache=True)
    assert together[:] == alone
