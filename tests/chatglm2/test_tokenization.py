"""The tokenizer: equal to the official ids, prompts and files, on the real and on a small vocabulary."""

import copy
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from conftest import SHARED

from chatglm2 import tokenization_chatglm
from chatglm2.tokenization_chatglm import ChatGLMTokenizer

REAL_FOLDER = SHARED / "chatglm2-tokenizer"
GOLDEN = SHARED / "golden" / "tokenizer.public.json"
OFFICIAL_CHECKPOINT = SHARED / "golden" / "official-checkpoint"


def skip_without(path):
    if not path.exists():
        pytest.skip(f"reference data of the official scripts is not here: {path}")


@pytest.fixture(scope="module")
def real_tokenizer():
    skip_without(REAL_FOLDER)
    return ChatGLMTokenizer.from_pretrained(REAL_FOLDER)


@pytest.fixture(scope="module")
def golden():
    skip_without(GOLDEN)
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def train_sentencepiece(file, **options):
    model = io.BytesIO()
    lines = [f"问题{i}：今天是第{i * 7}天，天气很好。sop The answer is {i}." for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **{"vocab_size": 120, **options}
    )
    file.write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A small unigram vocabulary without byte fallback: here unknown characters do become <unk>."""
    folder = tmp_path_factory.mktemp("small-tokenizer")
    train_sentencepiece(folder / "tokenizer.model", hard_vocab_limit=False)
    return folder


@pytest.fixture(scope="module")
def small_tokenizer(small_folder):
    return ChatGLMTokenizer.from_pretrained(small_folder)


# ---- equal to the official tokenizer


def test_ids_equal_the_official_ids_with_and_without_special_tokens(real_tokenizer, golden):
    for case in golden["cases"]:
        assert real_tokenizer.encode(case["text"]) == case["ids"]
        assert real_tokenizer(case["text"])["input_ids"] == case["ids"]
        assert real_tokenizer.encode(case["text"], add_special_tokens=False) == case["ids_no_special"]


def test_bulk_encoding_gives_the_official_ids(real_tokenizer, golden):
    texts = [case["text"] for case in golden["cases"]]
    assert real_tokenizer.encode_batch(texts) == [case["ids_no_special"] for case in golden["cases"]]


def test_decoding_equals_the_official_text(real_tokenizer, golden):
    for case in golden["cases"]:
        assert real_tokenizer.decode(case["ids"]) == case["decoded"]
        assert real_tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip"]
    all_ids = [case["ids"] for case in golden["cases"]]
    assert real_tokenizer.batch_decode(all_ids) == [case["decoded"] for case in golden["cases"]]


def test_prompts_equal_the_official_prompts(real_tokenizer, golden):
    for case in golden["prompts"]:
        prompt = real_tokenizer.build_prompt(case["query"], case["history"])
        assert prompt == case["prompt"]
        assert real_tokenizer.encode(prompt) == case["ids"]


def test_left_padded_batch_equals_the_official_batch(real_tokenizer, golden):
    batch = golden["batch"]
    encoded = real_tokenizer(
        batch["texts"], max_length=batch["max_length"], truncation=True, padding=True, return_tensors="pt"
    )
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert encoded[name].tolist() == batch[name], name


def test_special_ids_and_size_equal_the_official_ones(real_tokenizer, golden):
    special = golden["special"]
    assert real_tokenizer.pad_token_id == special["pad"]
    assert real_tokenizer.eos_token_id == special["eos"]
    assert real_tokenizer.prefix_tokens == [special["gMASK"], special["sop"]]
    assert real_tokenizer.vocab_size == len(real_tokenizer) == special["vocab_size"]
    assert [real_tokenizer.get_command(name) for name in tokenization_chatglm.SPECIAL_TOKENS] == list(
        range(64789, 64794)
    )


def test_saved_files_equal_the_official_files_byte_for_byte(real_tokenizer, tmp_path):
    skip_without(OFFICIAL_CHECKPOINT)
    real_tokenizer.save_pretrained(tmp_path)
    names = ["special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path)) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (OFFICIAL_CHECKPOINT / name).read_bytes(), name


def test_an_official_checkpoint_folder_loads(real_tokenizer):
    skip_without(OFFICIAL_CHECKPOINT)
    loaded = ChatGLMTokenizer.from_pretrained(OFFICIAL_CHECKPOINT)
    assert loaded.encode("你好，世界") == real_tokenizer.encode("你好，世界")


# ---- any vocabulary


def test_special_tokens_follow_the_last_piece_of_any_vocabulary(small_tokenizer):
    pieces = small_tokenizer.sp_model.get_piece_size()
    assert small_tokenizer.vocab_size == len(small_tokenizer) == pieces + 5
    assert small_tokenizer.prefix_tokens == [pieces + 1, pieces + 3]
    assert sorted(small_tokenizer.get_vocab().values()) == list(range(pieces + 5))


@pytest.mark.parametrize("text", ["[gMASK]", "sop", "eop [MASK]", "</s>", "<unk>", "<s> a", "[sMASK]问题"])
def test_text_that_looks_like_a_special_token_stays_text(text, small_tokenizer, request):
    tokenizers = [small_tokenizer]
    if REAL_FOLDER.exists():
        tokenizers.append(request.getfixturevalue("real_tokenizer"))
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode_batch([text])[0]
        assert max(ids) < tokenizer.sp_model.get_piece_size()
        assert tokenizer.eos_token_id not in ids


def test_ids_without_text_decode_to_nothing(small_tokenizer):
    ids = small_tokenizer.encode("今天天气很好", add_special_tokens=False)
    size = small_tokenizer.vocab_size
    silent = [-100, -1, 0, small_tokenizer.bos_token_id, small_tokenizer.eos_token_id, size - 5, size - 1, size, 10**9]
    assert small_tokenizer.decode(silent) == ""
    spread = [index for text_id in ids for index in (text_id, *silent)]
    assert small_tokenizer.decode(silent + spread) == small_tokenizer.decode(ids) == "今天天气很好"


def test_decode_takes_one_id_a_list_a_nested_list_or_a_tensor(small_tokenizer):
    torch = pytest.importorskip("torch")
    ids = small_tokenizer.encode("很好")
    assert small_tokenizer.decode(torch.tensor(ids)) == "很好"
    assert small_tokenizer.decode([ids, ids]) == ["很好", "很好"]
    assert "".join(small_tokenizer.decode(index) for index in ids) == "很好"


def test_special_tokens_decode_to_their_names_where_they_are_asked_for(small_tokenizer):
    size = small_tokenizer.sp_model.get_piece_size()
    assert small_tokenizer.decode(small_tokenizer.eos_token_id, skip_special_tokens=False) == "</s>"
    assert small_tokenizer.decode(small_tokenizer.bos_token_id) == small_tokenizer.bos_token  # a harness asks for it
    ids = [*small_tokenizer.encode("很好"), small_tokenizer.eos_token_id, -100, size + 5]
    assert small_tokenizer.decode(ids, skip_special_tokens=False) == "[gMASK]sop很好</s>"
    assert small_tokenizer.batch_decode([ids], skip_special_tokens=False) == ["[gMASK]sop很好</s>"]
    assert {small_tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, None)} == {"很好"}
    assert small_tokenizer.convert_ids_to_tokens([size + 1, size + 3], skip_special_tokens=True) == []


def test_the_end_token_as_text_cuts_no_generation(small_tokenizer):
    # As evaluation harnesses look for the end of an answer: by its text, which must not be found everywhere.
    stop = small_tokenizer.decode(small_tokenizer.eos_token_id, skip_special_tokens=False)
    answer = small_tokenizer.decode(small_tokenizer.encode("今天天气很好"), skip_special_tokens=True)
    assert stop and answer.split(stop)[0] == answer


def test_added_tokens_decode_and_survive_saving(small_folder, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(small_folder)
    assert (
        tokenizer.add_tokens(["<工具>", "很"]) + tokenizer.add_special_tokens({"extra_special_tokens": ["<完>"]}) >= 2
    )
    ids = tokenizer.encode("今天<工具>天气<完>", add_special_tokens=False)
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, ChatGLMTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert reader.encode("今天<工具>天气<完>", add_special_tokens=False) == ids
        assert reader.decode(ids) == "今天<工具>天气<完>"
        assert reader.decode(ids, skip_special_tokens=True) == "今天<工具>天气"
        assert len(reader) == len(tokenizer) > reader.vocab_size


@pytest.mark.parametrize(
    "index, token", [("9999", {"content": "<新>"}), ("x", {"content": "<新>"}), ("9999", {"a": 1})]
)
def test_added_tokens_that_no_one_can_have_saved_are_refused(index, token, small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "folder")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {index: token}}))
    with pytest.raises(ValueError, match="added_tokens_decoder"):
        ChatGLMTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
def test_a_named_token_can_be_set(name, small_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(small_folder)
    setattr(tokenizer, name, "[sMASK]")
    assert getattr(tokenizer, name) == "[sMASK]"
    assert getattr(tokenizer, f"{name}_id") == tokenizer.get_command("[sMASK]")
    setattr(tokenizer, f"{name}_id", tokenizer.get_command("eop"))
    assert getattr(tokenizer, name) == "eop"
    assert tokenizer.tokenize("[sMASK]") != ["[sMASK]"]
    with pytest.raises(ValueError, match=f"{name} is '<neu>'.*add_tokens"):
        setattr(tokenizer, name, "<neu>")


def test_a_named_token_that_is_new_is_added_and_then_set(small_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(small_folder)
    length = len(tokenizer)
    given = {"pad_token": "[PAD]", "bos_token": "[sMASK]", "extra_special_tokens": ["<完>"]}
    assert tokenizer.add_special_tokens(given) == 2
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.bos_token) == ("[PAD]", length, "[sMASK]")
    assert tokenizer(["很好", "今天天气很好"], padding=True)["input_ids"][0][0] == length
    assert tokenizer.tokenize("[sMASK]") != ["[sMASK]"]  # its name is text, as before


def test_where_tokens_stand_in_a_text_is_refused_as_by_other_python_tokenizers(small_tokenizer):
    with pytest.raises(NotImplementedError, match="return_offsets_mapping"):
        small_tokenizer("今天", return_offsets_mapping=True)


def test_a_chosen_padding_token_pads(small_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(small_folder)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["很好", "今天天气很好"], padding=True)["input_ids"][0][0] == tokenizer.eos_token_id


# ---- chat


def dialogues(count):
    """Messages that end with a user's: of any roles in any order, with empty texts and texts of braces and blank lines."""
    draw = random.Random(0)
    texts = ["你好", "", "{{ messages }}", "a\n\n[Round 9]\n\n问：b", " 空格 ", "{% if %}", "</s>[gMASK]", "很好。"]
    for _ in range(count):
        roles = draw.choices(["system", "user", "assistant"], k=draw.randrange(9))
        yield [{"role": role, "content": draw.choice(texts)} for role in [*roles, "user"]]


def test_the_chat_template_writes_the_prompt_of_build_prompt(small_tokenizer):
    for messages in dialogues(200):
        prompt = small_tokenizer.build_prompt(messages[-1]["content"], messages[:-1])
        assert small_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt
        ids = small_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == small_tokenizer.encode(prompt)


def test_an_answer_in_the_chat_template_follows_its_prompt(small_tokenizer):
    for messages in dialogues(50):
        prompt = small_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        whole = [*messages, {"role": "assistant", "content": "好的"}]
        assert small_tokenizer.apply_chat_template(whole, tokenize=False) == prompt + "好的"


@pytest.mark.parametrize("role", ["tool", "assistant"])
def test_the_chat_template_refuses_what_build_prompt_refuses(role, small_tokenizer):
    with pytest.raises(Exception, match=role):
        messages = [{"role": "user", "content": "你好"}, {"role": role, "content": "好"}]
        small_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    "given",
    [{"tools": [{"name": "a"}]}, {"documents": [{"text": "a"}]}, {"return_assistant_tokens_mask": True}],
    ids=str,
)
def test_what_the_chat_template_has_no_place_for_is_refused_by_name(given, small_tokenizer):
    with pytest.raises(ValueError, match=next(iter(given))):
        small_tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], return_dict=True, **given)


def test_a_text_in_parts_is_one_text(small_tokenizer):
    parts = [{"type": "text", "text": "今天"}, {"type": "text", "text": "天气"}]
    for content in (parts, "今天天气"):
        messages = [{"role": "user", "content": content}]
        text = small_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == small_tokenizer.build_prompt("今天天气")
        assert small_tokenizer.apply_chat_template([messages], add_generation_prompt=True, tokenize=False) == [text]
        assert small_tokenizer.build_prompt("好", messages) == small_tokenizer.build_prompt("今天天气\n好")


@pytest.mark.parametrize("content", [[{"type": "image", "url": "a"}], 5, ["a"]])
def test_a_message_that_is_no_text_is_refused(content, small_tokenizer):
    messages = [{"role": "user", "content": content}]
    with pytest.raises(ValueError, match="content is .*, expected text"):
        small_tokenizer.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ValueError, match="content is .*, expected text"):
        small_tokenizer.build_prompt("好", messages)


def test_a_chat_template_of_the_users_own_gets_all_that_is_given(small_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(
        small_folder, chat_template="{{ tools[0].name }}{{ messages[0].content[0].type }}"
    )
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    assert tokenizer.apply_chat_template(messages, tools=[{"name": "a"}], tokenize=False) == "aimage"


def test_a_chat_template_of_the_users_own_is_kept(small_folder, tmp_path):
    ChatGLMTokenizer.from_pretrained(small_folder, chat_template="{{ messages[0].content }}").save_pretrained(tmp_path)
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


def test_names_of_special_tokens_convert_to_their_ids_and_back(small_tokenizer):
    for name in tokenization_chatglm.SPECIAL_TOKENS:
        index = small_tokenizer.convert_tokens_to_ids(name)
        # "sop" may be an ordinary piece of this vocabulary; then text wins and get_command gives the token.
        if index >= small_tokenizer.sp_model.get_piece_size():
            assert small_tokenizer.convert_ids_to_tokens(index) == name
    assert small_tokenizer.convert_tokens_to_ids("[gMASK]") == small_tokenizer.prefix_tokens[0]
    assert small_tokenizer.convert_tokens_to_ids(small_tokenizer.eos_token) == small_tokenizer.eos_token_id


def test_unknown_command_is_refused_with_the_names_there_are(small_tokenizer):
    with pytest.raises(ValueError, match=r"'\[CLS\]' is not a special token.*\[gMASK\]"):
        small_tokenizer.get_command("[CLS]")


def test_right_padding_can_be_asked_for(small_tokenizer):
    encoded = small_tokenizer(["今天", "今天天气很好"], padding=True, padding_side="right")
    short, length = encoded["attention_mask"][0], sum(encoded["attention_mask"][0])
    assert short == [1] * length + [0] * (len(short) - length)
    assert encoded["position_ids"][0] == [*range(length)] + [0] * (len(short) - length)


def test_padding_goes_up_to_a_multiple(small_tokenizer):
    encoded = small_tokenizer(["今天", "今天天气很好"], padding=True, pad_to_multiple_of=8)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert {len(row) % 8 for row in encoded[name]} == {0}, name


def test_truncation_keeps_the_two_special_tokens(small_tokenizer):
    ids = small_tokenizer.encode("今天天气很好", max_length=4, truncation=True)
    assert ids == small_tokenizer.encode("今天天气很好")[:4]
    assert ids[:2] == small_tokenizer.prefix_tokens


def test_special_tokens_mask_marks_the_special_tokens(small_tokenizer):
    encoded = small_tokenizer("很好", return_special_tokens_mask=True)
    assert encoded["special_tokens_mask"] == [1, 1] + [0] * (len(encoded["input_ids"]) - 2)


# ---- files, processes, transformers' own entry points


def test_saved_and_reloaded_tokenizer_is_the_same(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path / "first")
    reloaded = ChatGLMTokenizer.from_pretrained(tmp_path / "first")
    reloaded.save_pretrained(tmp_path / "second")
    text = "问题7：[gMASK] 今天\n☃"
    assert reloaded.encode(text) == small_tokenizer.encode(text)
    assert reloaded.get_vocab() == small_tokenizer.get_vocab()
    for name in os.listdir(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_special_tokens_named_in_a_configuration_file_do_not_cut_text(small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "folder")
    config = {
        "tokenizer_class": "ChatGLMTokenizer",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "additional_special_tokens": ["[gMASK]"],
        "added_tokens_decoder": {"121": {"content": "[gMASK]", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = ChatGLMTokenizer.from_pretrained(folder)
    plain = ChatGLMTokenizer.from_pretrained(small_folder)
    assert loaded.encode("今天</s>[gMASK]") == plain.encode("今天</s>[gMASK]")
    assert len(loaded) == len(plain)


def test_pickle_holds_the_path_and_not_the_vocabulary(small_tokenizer, small_folder):
    pickled = pickle.dumps(small_tokenizer)
    assert len(pickled) < (small_folder / "tokenizer.model").stat().st_size / 2
    assert pickle.loads(pickled).encode("今天") == small_tokenizer.encode("今天")
    assert copy.deepcopy(small_tokenizer).encode("今天") == small_tokenizer.encode("今天")


def test_pickle_differs_when_the_vocabulary_at_the_same_path_differs(small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "folder")
    before = pickle.dumps(ChatGLMTokenizer.from_pretrained(folder))
    train_sentencepiece(folder / "tokenizer.model", vocab_size=90)
    assert pickle.dumps(ChatGLMTokenizer.from_pretrained(folder)) != before


def test_folder_without_vocabulary_is_refused_by_the_missing_files_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model does not exist.*copy tokenizer\.model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 1000])
def test_corrupt_vocabulary_is_refused_by_name_and_size(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model \({len(content):,} bytes\) is not a SentencePiece"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_vocabulary_without_end_of_sequence_is_refused(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model", eos_id=-1)
    with pytest.raises(ValueError, match="no <unk> or no </s>"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_auto_tokenizer_uses_this_class_and_runs_no_code_of_the_folder(small_folder, tmp_path):
    # In a process of its own: registering changes transformers for good.
    folder = shutil.copytree(small_folder, tmp_path / "folder")
    ChatGLMTokenizer.from_pretrained(small_folder).save_pretrained(folder)
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit('code of the folder was run')")
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "model_family": "chatglm2"}))
    code = (
        "import sys; from transformers import AutoTokenizer, PretrainedConfig\n"
        "from chatglm2.tokenization_chatglm import ChatGLMTokenizer\n"
        "class Config(PretrainedConfig): model_type = 'chatglm'\n"
        "from transformers import AutoConfig; AutoConfig.register('chatglm', Config)\n"
        "AutoTokenizer.register(Config, tokenizer_class=ChatGLMTokenizer)\n"
        "print(type(AutoTokenizer.from_pretrained(sys.argv[1])) is ChatGLMTokenizer)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(tokenization_chatglm.__file__).parents[1],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.stdout.strip() == "True", run.stderr
