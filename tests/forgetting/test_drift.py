"""The drift of a tuned model from its base, held against a plain restatement and against answers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from support.pairs import METHODS

from checkpoint import load_model, read_config
from forgetting.answers import answers_of
from forgetting.drift import Drift, compare_logits
from tuning.methods import prepare_model
from tuning.swapping import BASE, swapped, trained_weights

KNOWN = 2000  # tokens that may be chosen
PROMPTS = [[64790, 64792, 30, 31, 32], [9, 8, 7], [5] * 12, [100, 200, 300, 400], list(range(40, 60))]
PROMPTS = [[token % 2048 for token in prompt] for prompt in PROMPTS]


def opened(method, moved=0.02):
    """A model that trains in a way of METHODS, moved away from its start."""
    flags = {**METHODS[method]}
    bits, pre_seq_len = flags.pop("quantization_bit", None), flags.get("pre_seq_len")
    torch.manual_seed(0)
    model = load_model(
        TINY, config=read_config(TINY, pre_seq_len=pre_seq_len), quantization_bit=bits, quantization_backend="torch"
    )
    prepare_model(model, flags.pop("finetuning_type"), do_train=True, **flags)
    with torch.no_grad():
        for weight in trained_weights(model).values():
            weight.add_(torch.randn_like(weight), alpha=moved)
    return model.train()


def base_answers(model):
    with swapped(model, BASE):
        return answers_of(model, PROMPTS, 8, KNOWN)


def drift_of(model, **share):
    return Drift(model, PROMPTS, base_answers(model), num_known=KNOWN, pad_token_id=0, **share)


@pytest.mark.parametrize("method", METHODS)
def test_the_drift_is_the_mean_kl_of_the_tokens_of_the_bases_answers(method):
    model = opened(method)
    answers = base_answers(model)
    found = drift_of(model).measure()
    assert model.training
    model.eval()
    nats = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):  # each row alone, all logits, torch's own KL
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            tuned = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            with swapped(model, BASE):
                base = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nats += F.kl_div(tuned, base, log_target=True, reduction="none").sum(-1).tolist()
    assert found["drift"] == pytest.approx(sum(nats) / len(nats), rel=1e-4) and found["drift"] > 0


@pytest.mark.parametrize("moved", [0.002, 0.02, 0.3])
def test_an_answer_counts_as_the_same_exactly_where_the_tuned_model_gives_it(moved):
    model = opened("lora", moved)
    pairs = zip(base_answers(model), answers_of(model, PROMPTS, 8, KNOWN), strict=True)
    expected = sum(base == tuned for base, tuned in pairs) / len(PROMPTS)
    assert drift_of(model).measure()["same_answers"] == expected


def test_a_new_adapter_has_not_moved_its_base():
    assert drift_of(opened("lora", moved=0)).measure() == {"drift": 0.0, "same_answers": 1.0}


def test_measuring_changes_neither_weights_nor_random_numbers():
    model = opened("prefix")
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    drift, state = drift_of(model), torch.random.get_rng_state()
    assert drift.measure() == drift.measure()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


def test_the_shares_of_several_processes_make_up_the_whole(monkeypatch):
    model = opened("prefix")
    whole = drift_of(model).measure()
    shares = []
    monkeypatch.setattr("forgetting.drift.gather", lambda sums: shares.append(sums) or [sums])
    for process in range(2):
        drift_of(model, process=process, processes=2).measure()
    nats, tokens, same, rows = (sum(parts) for parts in zip(*shares, strict=True))
    assert nats / tokens == pytest.approx(whole["drift"], rel=1e-5) and same / rows == whole["same_answers"]


def test_tokens_that_are_never_chosen_do_not_make_an_answer_another_one():
    base = torch.tensor([[1.0, 2.0, 0.0, 5.0]])
    tuned = torch.tensor([[1.0, 2.0, 9.0, 0.0]])
    assert compare_logits(base, tuned, num_known=2)[1].tolist() == [True]
    assert compare_logits(base, tuned, num_known=4)[1].tolist() == [False]
