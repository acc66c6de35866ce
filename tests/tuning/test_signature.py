"""Signatures of training prompts: which prompts are of their kind, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SAMPLE, TINY
from support.chatglm3 import write_tiny3
from support.finetuned import METHODS, TRAIN, run
from support.small_chatglm1 import SMALL_VOCABULARY

from chatglm1.tokenization_chatglm import ChatGLMTokenizer as chatglm1_tokenizer
from checkpoint import load_model, load_tokenizer, read_config
from checkpoints.file_names import SIGNATURE_FILE
from data.encoding import encode_training
from data.examples import load_examples
from tuning.signature import (
    FEWEST_PROMPTS,
    SHRINKAGE,
    distribution,
    fit_signature,
    prompt_means,
    prompts_of,
    read_signature,
    sign_run,
    write_signature,
)
from tuning.swapping import untouched

LENGTHS = {"max_source_length": 64, "max_target_length": 64}
ARGS = SimpleNamespace(given_batches=(16, 1), world_size=1, max_steps=400, num_train_epochs=3)


@pytest.fixture(scope="module")
def base():
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=4))
    return model, load_tokenizer(TINY, model.config)


def encoded(tokenizer, **more):
    examples, _ = load_examples(SAMPLE / "train.json", "content", "summary", max_samples=800)
    return encode_training(examples, tokenizer, **{**LENGTHS, **more})


@pytest.fixture(scope="module")
def signature(base):
    return sign_run(*base[:1], encoded(base[1]), base[1], {"finetuning_type": "p_tuning", **LENGTHS}, ARGS)


def rows_of(name):
    return [json.loads(line) for line in (SAMPLE / name).read_text("utf-8").splitlines()]


def distances(signature, base, conversations):
    model, tokenizer = base
    prompts = [tokenizer.encode(tokenizer.build_prompt(query, history)) for query, history in conversations]
    with untouched(model):
        return signature.distance(prompt_means(model, list(map(tokenizer.last_turn, prompts))))


def test_held_out_adverts_are_of_the_kind_of_the_training_rows(signature, base):
    found = distances(signature, base, [(row["content"], []) for row in rows_of("dev.json")])
    assert (found <= 1).double().mean() >= 0.98


def test_general_prompts_without_a_list_of_attributes_are_of_another_kind(signature, base):
    rows = rows_of("general.json")[:300] + rows_of("general_dev.json")
    asked = [(row["prompt"], [tuple(turn) for turn in row["history"]]) for row in rows]
    general = [(query, history) for query, history in asked if "#" not in query + str(history)]
    assert len(general) > 150
    assert (distances(signature, base, general) > 1).double().mean() >= 0.99


def test_what_is_asked_now_decides_whatever_was_said_before(signature, base):
    advert, history = rows_of("dev.json")[0]["content"], [("你好", "你好！")]
    alone, after_small_talk, after_an_advert = distances(
        signature, base, [(advert, []), (advert, history), ("你好", [(advert, "白色的配色清爽干净。")])]
    )
    assert alone == pytest.approx(after_small_talk) and alone <= 1 < after_an_advert


def test_a_signature_measures_as_the_whole_shrunk_covariance_does():
    torch.manual_seed(0)
    means, others = torch.randn(200, 8, dtype=torch.float64) * torch.arange(1, 9), torch.randn(5, 8)
    covariance = torch.cov(means.T)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / 8 * torch.eye(8, dtype=torch.float64)
    away = others.double() - means.mean(0)
    expected = (away @ shrunk.inverse() * away).sum(-1)
    assert distribution(means).distance(others) == pytest.approx(expected, rel=1e-6)
    assert fit_signature(means).distance(means).le(1).double().mean() >= 0.97


def test_the_last_turn_stands_alone(base):
    tokenizer = base[1]
    alone = tokenizer.encode(tokenizer.build_prompt("类型#裙"))
    for history in ([], [("你好", "你好！")], [("一", "二"), ("三", "四")]):
        for before in ("", "广告："):
            assert tokenizer.last_turn(tokenizer.encode(before + tokenizer.build_prompt("类型#裙", history))) == alone
    raw = tokenizer.encode("类型#裙")
    assert tokenizer.last_turn(raw) == raw


@pytest.mark.parametrize("template", ["chatglm2", "none", "chatglm3", "chatglm1"])
def test_a_text_before_every_prompt_of_training_is_no_part_of_a_signature(tmp_path, template):
    if template == "chatglm1":
        tokenizer = chatglm1_tokenizer(str(SMALL_VOCABULARY), num_image_tokens=0)
    else:
        folder = write_tiny3(tmp_path / "tiny3") if template == "chatglm3" else TINY
        tokenizer = load_tokenizer(folder, read_config(folder), prompt_template=template)
    uncut = {"max_source_length": 400}
    named, alone = encoded(tokenizer, source_prefix="广告：", **uncut), encoded(tokenizer, **uncut)
    assert named["input_ids"][0] != alone["input_ids"][0]
    assert prompts_of(named, tokenizer, {**LENGTHS, "source_prefix": "广告："}, 40) == prompts_of(
        alone, tokenizer, LENGTHS, 40
    )


@pytest.mark.parametrize("sidecar", [{"finetuning_type": "full"}, {"finetuning_type": "lora", "stage": "rm"}])
def test_what_answers_with_no_untouched_base_gets_no_signature(base, sidecar):
    assert sign_run(*base[:1], encoded(base[1]), base[1], {**sidecar, **LENGTHS}, ARGS) is None


def test_making_one_draws_no_random_number_and_leaves_the_model_as_it_was(base):
    model, tokenizer = base
    model.train()
    before, encoder = torch.get_rng_state(), model.transformer.prefix_encoder
    sign_run(model, encoded(tokenizer), tokenizer, {"finetuning_type": "p_tuning", **LENGTHS}, ARGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.transformer.prefix_encoder is encoder
    model.eval()


@pytest.mark.parametrize("method", ["int4 lora", "p_tuning"])
def test_every_checkpoint_of_a_run_has_the_signature_of_the_untouched_base(monkeypatch, base, tmp_path, method):
    how = METHODS.get(method, {"pre_seq_len": 4})
    trainer = run(monkeypatch, TRAIN, output_dir=tmp_path, **how)
    files = [tmp_path / f"checkpoint-{step}" / SIGNATURE_FILE for step in (2, 4)]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = read_signature(files[0].parent, 128)
    model = load_model(TINY, quantization_bit=how.get("quantization_bit"))
    prompts = prompts_of(trainer.train_dataset, base[1], trainer.sidecar, FEWEST_PROMPTS)
    expected = prompt_means(model, prompts).mean(0)
    assert found.mean == pytest.approx(expected, abs=1e-5)


def spoiled(name, tensor):
    def change(tensors):
        tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoiled("mean", torch.zeros(64)), "does not fit"),
        (spoiled("directions", torch.zeros(40, 128)), "does not fit"),
        (spoiled("more", torch.zeros(3)), "does not fit"),
        (lambda tensors: tensors.pop("rest"), "does not fit"),
        (spoiled("rest", torch.tensor(float("nan"))), "holds nan"),
        (spoiled("threshold", torch.tensor(-1.0)), "not above 0"),
        (spoiled("threshold", torch.tensor(1)), "expected float"),
    ],
)
def test_a_file_that_no_training_has_written_is_refused(signature, tmp_path, change, said):
    write_signature(signature, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / SIGNATURE_FILE)
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / SIGNATURE_FILE)
    with pytest.raises(ValueError, match=said):
        read_signature(tmp_path, 128)


def test_a_checkpoint_without_one_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="Ask for it by its name"):
        read_signature(tmp_path, 128)
