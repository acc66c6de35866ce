"""Training, evaluation, the API and the export with a tiny ChatGLM3, and with raw prompts as CodeGeeX2 has them."""

import json
import re

import pytest
from conftest import TINY
from support.chatglm3 import write_tiny3
from support.runs import PREDICT_SETTINGS, TRAIN_SETTINGS, losses, predictions, run

import export_model
from checkpoint import load_model, load_prefix, load_tokenizer, read_config
from families import find_family
from serving.api_bodies import Message, said
from serving.server import ChatServer, Sampling

CHAT = [
    {"role": "system", "content": "你是助手。", "tools": [{"name": "weather"}]},
    {"role": "user", "content": "天气？"},
    {"role": "assistant", "metadata": "weather", "content": "```python\ntool_call(city='北京')\n```"},
    {"role": "observation", "content": "晴"},
    {"role": "assistant", "content": "北京晴。"},
]


@pytest.fixture(scope="module")
def tiny3(tmp_path_factory):
    return write_tiny3(tmp_path_factory.mktemp("base") / "tiny3")


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chat.json"
    file.write_text("\n".join(json.dumps({"messages": CHAT}, ensure_ascii=False) for _ in range(8)), encoding="utf-8")
    return file


CHAT_FLAGS = {"prompt_column": None, "response_column": None, "messages_column": "messages"}


@pytest.fixture(scope="module")
def trained(tiny3, chat_file, tmp_path_factory):
    """A run on dialogues with tools, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    settings = {**TRAIN_SETTINGS, **CHAT_FLAGS, "train_file": chat_file, "max_train_samples": None}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(
            monkeypatch,
            settings,
            model_name_or_path=tiny3,
            train_on_history=True,
            max_source_length=256,
            max_steps=3,
            output_dir=folder,
        )
    return folder


def test_dialogues_with_tools_are_learned_and_remembered(trained):
    assert losses(trained)[-1] < losses(trained)[0]
    sidecar = json.loads((trained / "checkpoint-3" / "ptuning.json").read_text())
    assert (sidecar["model_family"], sidecar["prompt_template"]) == ("chatglm3", "chatglm3")
    assert json.loads((trained / "checkpoint-3" / "config.json").read_text())["model_family"] == "chatglm3"


def test_predictions_read_everything_from_the_checkpoint(trained, chat_file, monkeypatch, tmp_path):
    settings = {**PREDICT_SETTINGS, "test_file": chat_file, "max_predict_samples": 2}
    run(monkeypatch, settings, ptuning_checkpoint=trained, output_dir=tmp_path)
    (first, *_) = predictions(tmp_path)
    assert first["labels"].replace(" ", "") == "北京晴。" and first["prompt"] == "晴"


def test_check_data_shows_the_roles(tiny3, chat_file, monkeypatch, capsys, tmp_path):
    settings = {**TRAIN_SETTINGS, **CHAT_FLAGS, "train_file": chat_file, "max_source_length": 256}
    run(monkeypatch, settings, model_name_or_path=tiny3, check_data=True, train_on_history=True, output_dir=tmp_path)
    shown = re.sub(r"\s", "", capsys.readouterr().out)
    assert "[gMASK]sop<|system|>你是助手。" in shown
    assert (
        "<|assistant|>⟦weather```pythontool_call(city='北京')```<|observation|>⟧晴<|assistant|>⟦北京晴。</s>⟧" in shown
    )


def test_a_checkpoint_of_one_family_on_another_is_refused_with_both_names(trained, monkeypatch, tmp_path):
    settings = {**PREDICT_SETTINGS, "ptuning_checkpoint": trained, "prompt_column": "content"}
    with pytest.raises(ValueError, match="checkpoint-3 was trained on ChatGLM3, and the base model .* is ChatGLM2"):
        run(monkeypatch, settings, model_name_or_path=TINY, response_column="summary", output_dir=tmp_path)


def test_the_server_ends_an_answer_where_a_user_would_begin(tiny3, trained):
    config = read_config(tiny3, pre_seq_len=None)
    tokenizer, model = load_tokenizer(tiny3, config), load_model(tiny3, config=config)
    user = tokenizer.get_command("<|user|>")
    model.transformer.output_layer.weight[user] = 100 * model.transformer.output_layer.weight.mean(0)
    server = ChatServer(model, tokenizer, {"checkpoint-3": trained / "checkpoint-3"}, default="checkpoint-3")
    try:
        messages = [
            Message(role="user", content="天气？"),
            Message(role="assistant", tool_calls=[{"function": {"name": "weather", "arguments": '{"city": "北京"}'}}]),
            Message(role="tool", content="晴"),
        ]
        question, history, role = tokenizer.conversation(said(messages, tokenizer.keeps_roles))
        token_ids = server.encode(question, history, role=role)
        text = tokenizer.show(token_ids).replace(" ", "")
        assert text.endswith("<|observation|>\n晴<|assistant|>")
        assert "<|assistant|>weather\n```python\ntool_call(city='北京')\n```<|observation|>" in text
        *_, answer = server.stream(token_ids, sampling=Sampling(max_new_tokens=200, temperature=0))
        assert user not in answer.response_ids
        fitted, dropped = server.fit("问", [["a", "b"]] * 400, 16)
        assert dropped % 2 == 0 and dropped and len(fitted) < config.seq_length
    finally:
        server.close()


def test_an_exported_prefix_and_model_say_their_family(tiny3, trained, tmp_path, monkeypatch):
    export_model.main(["--ptuning_checkpoint", str(trained), "--output_dir", str(tmp_path / "prefix")])
    assert "prompt_template='chatglm3'" in (tmp_path / "prefix" / "load.py").read_text()
    words = ["--model_name_or_path", str(tiny3), "--quantization_bit", "4", "--output_dir", str(tmp_path / "int4")]
    export_model.main(words)
    config = read_config(tmp_path / "int4", pre_seq_len=8)
    assert config.model_family == "chatglm3" and config.quantization_bit == 4
    model = load_model(tmp_path / "int4", config=config)
    load_prefix(model, tmp_path / "prefix")
    tokenizer = load_tokenizer(tmp_path / "int4", config)
    assert model.chat(tokenizer, "天气？", do_sample=False, max_length=100)[1][0]["role"] == "user"


@pytest.mark.parametrize("way", ["lora", "full", "freeze"])
def test_every_way_of_tuning_remembers_the_family(way, tiny3, monkeypatch, tmp_path):
    settings = {**TRAIN_SETTINGS, "pre_seq_len": None, "finetuning_type": way, "max_steps": 1, "save_steps": 1}
    run(monkeypatch, settings, model_name_or_path=tiny3, max_train_samples=8, output_dir=tmp_path)
    assert json.loads((tmp_path / "checkpoint-1" / "ptuning.json").read_text())["model_family"] == "chatglm3"
    if way == "full":  # it is a base model itself
        assert read_config(tmp_path / "checkpoint-1").model_family == "chatglm3"


# ---- CodeGeeX2 and raw prompts


def test_raw_prompts_are_learned_as_they_are(monkeypatch, tmp_path):
    base = write_tiny3(tmp_path / "geex", _name_or_path="THUDM/codegeex2-6b", pad_token_id=0, interleaved_qkv=False)
    (base / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "THUDM/codegeex2-6b"}))
    file = tmp_path / "code.json"
    rows = [{"prompt": "# language: Python\n# add\n", "code": "def add(a, b):\n    return a + b\n"}] * 8
    file.write_text(json.dumps(rows))
    settings = {**TRAIN_SETTINGS, "train_file": file, "max_train_samples": None, "max_steps": 2, "save_steps": 2}
    run(
        monkeypatch,
        settings,
        model_name_or_path=base,
        prompt_column="prompt",
        response_column="code",
        output_dir=tmp_path / "run",
    )
    sidecar = json.loads((tmp_path / "run" / "checkpoint-2" / "ptuning.json").read_text())
    assert (sidecar["model_family"], sidecar["prompt_template"]) == ("codegeex2", "none")
    tokenizer = load_tokenizer(base, read_config(base))
    assert tokenizer.encode_prompt("# a\n") == tokenizer.encode("# a\n")


def test_a_template_that_the_tokens_cannot_write_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="prompt_template chatglm3: the prompts of ChatGLM2 can be chatglm2 or none"):
        run(monkeypatch, TRAIN_SETTINGS, prompt_template="chatglm3", output_dir=tmp_path)


# ---- which family a folder is


def family_of_files(tmp_path, settings, **tokens):
    for name, text in tokens.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(text))
    return find_family({"model_type": "chatglm", **settings}, tmp_path).name


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16}, "chatglm2"),
        ({"_name_or_path": "THUDM/chatglm3-6b-128k", "rope_ratio": 500}, "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm3-6b-base"}, "chatglm3-base"),
        ({"_name_or_path": "/models/mine", "rotary_percent": 0.5}, "codegeex2"),
        ({"model_family": "chatglm3"}, "chatglm3"),
    ],
)
def test_a_family_is_told_by_its_files(settings, name, tmp_path):
    assert family_of_files(tmp_path, settings) == name


def test_roles_among_the_tokens_tell_chatglm3(tmp_path):
    tokens = {"added_tokens_decoder": {"64796": {"content": "<|user|>"}}}
    assert family_of_files(tmp_path, {}, tokenizer_config=tokens) == "chatglm3"


@pytest.mark.parametrize("settings", [{}, {"rope_ratio": 50}, {"_name_or_path": "mine"}])
def test_a_folder_without_a_sign_is_asked_about(settings, tmp_path):
    with pytest.raises(ValueError, match="could be ChatGLM2 or ChatGLM3. Say which it is: --model_family"):
        family_of_files(tmp_path, settings)
    settings = {"model_type": "chatglm", **settings}
    assert find_family(settings, tmp_path, asked="chatglm3").name == "chatglm3"
    assert find_family(settings, tmp_path, remembered="chatglm3").name == "chatglm3"


def test_a_family_that_the_files_exclude_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="model_family chatglm3 contradicts .* holds ChatGLM2: its files name chatglm2"
    ):
        find_family({"model_type": "chatglm", "_name_or_path": "chatglm2-6b"}, tmp_path, asked="chatglm3")


def test_rope_ratio_of_a_folder_is_read_as_its_family_reads_it(tmp_path):
    config = read_config(write_tiny3(tmp_path / "tiny3", rope_ratio=50))
    assert (config.rope_base_factor, config.rope_position_divisor) == (50, 1)
    assert type(config)(**config.to_dict()).rope_base_factor == 50
