"""Other people's clients against the running API, and an evaluation harness also on the model itself."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from support.api_server import port  # noqa: F401, fixture
from support.chat_server import GREEDY, QUERIES, finish, make_run, open_server

from checkpoint import load_model, load_prefix, load_tokenizer, read_config
from pretrained import register_auto_classes

pytestmark = pytest.mark.clients

MODEL = "checkpoint-20"
ABSENT = "pip install -r tests/requirements.txt"
TEXT = "类型#裙*颜色#"
LLAMA_INDEX = ROOT / ".peers" / "llama-index"  # .ci/run puts it there: it needs an older openai than the one here


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = open_server("--ptuning_checkpoint", make_run(tmp_path_factory.mktemp("run")) / MODEL)
    yield server
    server.close()


@pytest.fixture
def url(port):
    return f"http://127.0.0.1:{port}/v1"


# ---- langchain


@pytest.fixture
def langchain(url):
    library = pytest.importorskip("langchain_openai", reason=ABSENT)
    how = {"base_url": url, "api_key": "none", "model": MODEL, "temperature": 0, "max_tokens": GREEDY.max_new_tokens}
    return library.ChatOpenAI(**how), library.OpenAI(**how)


def test_langchain_answers_streams_and_goes_on(langchain, server):
    chat, text = langchain
    answer = finish(server, QUERIES[0])
    said = chat.invoke(QUERIES[0])
    assert said.content == answer.text and said.usage_metadata["output_tokens"] == len(answer.response_ids)
    assert "".join(chunk.content for chunk in chat.stream(QUERIES[0])) == answer.text
    assert [each.content for each in chat.batch(QUERIES)] == [finish(server, query).text for query in QUERIES]
    assert text.invoke(TEXT) == "".join(text.stream(TEXT)) != ""


def test_langchain_gets_the_structure_it_asks_for(langchain):
    pytest.importorskip("llguidance", reason=ABSENT)
    shirt = {
        "title": "shirt",
        "type": "object",
        "properties": {"colour": {"enum": ["红", "白"]}, "number": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["colour", "number"],
        "additionalProperties": False,
    }
    found = (
        langchain[0]
        .model_copy(update={"max_tokens": 200})
        .with_structured_output(shirt, method="json_schema")
        .invoke(QUERIES[1])
    )
    assert found.keys() == {"colour", "number"} and found["colour"] in ("红", "白") and 1 <= found["number"] <= 9


# ---- litellm


@pytest.fixture
def litellm(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices
    return pytest.importorskip("litellm", reason=ABSENT), {"api_base": url, "api_key": "none", "temperature": 0}


def test_litellm_answers_streams_and_goes_on(litellm, server):
    library, how = litellm
    answer = finish(server, QUERIES[0])
    asked = {"model": f"openai/{MODEL}", "messages": [{"role": "user", "content": QUERIES[0]}], "max_tokens": 24, **how}
    assert library.completion(**asked).choices[0].message.content == answer.text
    pieces = [chunk.choices[0].delta.content or "" for chunk in library.completion(**asked, stream=True)]
    assert "".join(pieces) == answer.text
    raw = {"model": f"text-completion-openai/{MODEL}", "prompt": TEXT, "max_tokens": 8, **how}
    assert library.text_completion(**raw).choices[0].text
    with pytest.raises(library.exceptions.ContextWindowExceededError):
        library.completion(**{**asked, "messages": [{"role": "user", "content": "好" * 5000}]})


# ---- llama-index

ASK = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, model, query, text = sys.argv[1:]
how = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 24, "context_window": 1024}
chat, raw = (OpenAILike(is_chat_model=is_chat, **how) for is_chat in (True, False))
messages = [ChatMessage(role="user", content=query)]
print(json.dumps({
    "chat": chat.chat(messages).message.content,
    "stream": [each.delta for each in chat.stream_chat(messages)],
    "raw": raw.complete(text).text,
    "raw stream": [each.delta for each in raw.stream_complete(text)],
}))
"""


def test_llama_index_answers_streams_and_goes_on(url, server):
    if not LLAMA_INDEX.is_dir():
        pytest.skip(f"llama-index is not here: {LLAMA_INDEX} (.ci/run fetches it)")
    asked = subprocess.run(
        [sys.executable, "-c", ASK, url, MODEL, QUERIES[0], TEXT],
        env={**os.environ, "PYTHONPATH": str(LLAMA_INDEX)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout.splitlines()[-1])
    assert found["chat"] == "".join(found["stream"]) == finish(server, QUERIES[0]).text
    assert found["raw"] == "".join(found["raw stream"]) != ""


# ---- lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks():
    """A task of scores and one of texts, on three rows."""
    task = pytest.importorskip("lm_eval.api.task", reason=ABSENT)
    from datasets import Dataset

    rows = [
        {"question": question, "choices": ["白色", "黑色，显瘦"], "answer": 0}
        for question in (TEXT, "这件衣服是", "颜色：")
    ]
    common = {
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
    }
    scores = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    texts = {"output_type": "generate_until", "doc_to_target": "白", "metric_list": [{"metric": "exact_match"}]}
    texts["generation_kwargs"] = {"until": ["。"], "max_gen_toks": 8, "do_sample": False}
    scores["metric_list"] = [{"metric": "acc"}]
    return lambda: {
        name: task.ConfigurableTask(config={"task": name, **common, **how})
        for name, how in (("scores", scores), ("texts", texts))
    }


def evaluate(lm, tasks):
    """What a model gives for every row of the two tasks."""
    from lm_eval.evaluator import evaluate

    samples = evaluate(lm=lm, task_dict=tasks(), bootstrap_iters=0)["samples"]
    rows = {name: sorted(samples[name], key=lambda row: row["doc_id"]) for name in samples}
    scores = [choice[0] for row in rows["scores"] for choice in row["resps"]]
    return scores, [row["resps"][0][0].strip() for row in rows["texts"]]


def test_an_evaluation_harness_scores_the_api_and_the_model_alike(url, server, tasks):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    register_auto_classes()
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=4))
    load_prefix(model, server.checkpoints()[MODEL])
    tokenizer = load_tokenizer(TINY, model.config)
    how = {"tokenizer_backend": "huggingface", "tokenizer": str(TINY), "max_length": 512, "batch_size": 2}
    over_http = LocalCompletionsAPI(base_url=f"{url}/completions", model=MODEL, add_bos_token=True, **how)
    scores, texts = evaluate(over_http, tasks)
    itself, same_texts = evaluate(
        HFLM(pretrained=model.eval(), tokenizer=tokenizer, add_bos_token=True, batch_size=2), tasks
    )
    assert texts == same_texts and all(texts)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in itself]
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in itself], abs=1e-4)

    prompt, whole = tokenizer.encode(TEXT), tokenizer.encode(f"{TEXT} 白色")
    with torch.inference_mode():
        rows = model(input_ids=torch.tensor([whole])).logits[0, :, : len(tokenizer)].float().log_softmax(-1)
    expected = sum(rows[place - 1, whole[place]].item() for place in range(len(prompt), len(whole)))
    assert scores[0][0] == pytest.approx(expected, abs=1e-4)
