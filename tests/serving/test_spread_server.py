"""--device_map auto: what was tuned answers from two pretended GPUs as from one device, and every program takes the flag."""

import json

import pytest
from conftest import SAMPLE
from support.chat_server import QUERIES, finish, make_adapter, make_run, open_server, sign
from support.pretended_gpu import PretendedGPU, ThreadOnGPUs, halves
from support.runs import PREDICT_SETTINGS, predictions
from support.runs import run as run_main

import export_model
from common.files import file_sha256
from serving.auto import AUTO
from serving.server import BASE, ChatServer, Sampling

SHORT = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture
def two_gpus(monkeypatch):
    """`auto` means two pretended GPUs; the servers' threads see them, too."""
    work = ChatServer._work

    def work_on_gpus(server):
        with ThreadOnGPUs():
            work(server)

    monkeypatch.setattr(ChatServer, "_work", work_on_gpus)
    with PretendedGPU(monkeypatch):
        monkeypatch.setattr("checkpoint.choose_device", lambda: halves(4, "cuda:1"))
        yield


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), (4, 6))
    for name in ("checkpoint-10", "checkpoint-20"):
        sign(run / name)
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("lora") / "checkpoint-5")


def told(words, models):
    """What a server of these words answers, asked of each of `models`; and what it says of its devices."""
    server = open_server(*words)
    try:
        answers = [finish(server, QUERIES[0], model=model, sampling=SHORT) for model in models]
        assert [answer.error for answer in answers] == [None] * len(models)
        return [(answer.model, answer.response_ids) for answer in answers], server.facts(models[0])["device"]
    finally:
        server.close()


def test_prefixes_auto_and_the_base_answer_alike(prefixes, request):
    words = ["--ptuning_checkpoint", f"{prefixes / 'checkpoint-10'},{prefixes / 'checkpoint-20'}"]
    models = ["checkpoint-10", "checkpoint-20", BASE, AUTO]
    expected, _ = told(words, models)
    request.getfixturevalue("two_gpus")
    assert told([*words, "--device_map", "auto"], models) == (expected, "cuda:0, cuda:1")


def test_an_adapter_that_each_prompt_may_choose_answers_alike(adapter, request):
    words = ["--ptuning_checkpoint", adapter, "--auto"]
    models = ["checkpoint-5", BASE, AUTO]
    expected, _ = told(words, models)
    request.getfixturevalue("two_gpus")
    assert told([*words, "--device_map", "auto"], models) == (expected, "cuda:0, cuda:1")


def test_evaluation_scores_and_answers_alike(prefixes, tmp_path, monkeypatch, request, capsys):
    settings = {
        **PREDICT_SETTINGS,
        "do_eval": True,
        "validation_file": SAMPLE / "dev.json",
        "max_eval_samples": 3,
        "max_predict_samples": 2,
        "max_target_length": 8,
        "prompt_column": "content",
        "response_column": "summary",
        "ptuning_checkpoint": prefixes / "checkpoint-10",
    }
    run_main(monkeypatch, settings, output_dir=tmp_path / "one")
    request.getfixturevalue("two_gpus")
    run_main(monkeypatch, settings, output_dir=tmp_path / "two", device_map="auto")
    assert "Layers 0 to 1 on cuda:0, 2 to 3 on cuda:1." in capsys.readouterr().out
    assert predictions(tmp_path / "two") == predictions(tmp_path / "one")
    scores = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert scores[1]["predict_rouge-l"] == scores[0]["predict_rouge-l"]


def test_an_export_writes_the_same_weights(adapter, tmp_path, request):
    words = ["--ptuning_checkpoint", str(adapter), "--quantization_bit", "8", "--output_dir"]
    export_model.main([*words, str(tmp_path / "one")])
    request.getfixturevalue("two_gpus")
    export_model.main([*words, str(tmp_path / "two"), "--device_map", "auto"])
    assert file_sha256(tmp_path / "two" / "model.safetensors") == file_sha256(tmp_path / "one" / "model.safetensors")
