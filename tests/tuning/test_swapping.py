"""What takes turns on one base: prefixes, adapters, neither; what was there is there again."""

import pytest
import torch
from conftest import TINY
from support.pairs import METHODS

from alignment.reward import load_reward_model
from alignment.value_head import ValueHead, save_value_head
from checkpoint import load_model, read_config
from tuning.methods import load_trained, prepare_model, save_trained
from tuning.swapping import BASE, load_beside, start_of, swapped, trained_weights

INPUT_IDS = torch.arange(3, 67).view(2, 32)


@torch.no_grad()
def logits(model):
    return model(INPUT_IDS).logits


def opened(method, seed=0, **settings):
    """A model that trains in a way of METHODS, moved away from its start."""
    flags = {**METHODS[method], **settings}
    bits, pre_seq_len = flags.pop("quantization_bit", None), flags.get("pre_seq_len")
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=pre_seq_len), quantization_bit=bits)
    prepare_model(model, flags.pop("finetuning_type", "p_tuning"), do_train=True, **flags)
    move(model, seed)
    return model.eval()


def move(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in trained_weights(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.05)


def saved(model, method, folder, fingerprint=None):
    sidecar = {"finetuning_type": METHODS[method].get("finetuning_type", "p_tuning"), "base_model": str(TINY)}
    sidecar |= {"base_fingerprint": fingerprint or model.fingerprint, "stage": "rm"}
    save_trained(model, folder, sidecar)
    head = ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(head.weight)
    save_value_head(head, folder)
    return head


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_stays_what_it_was_while_the_policy_trains_on(method):
    model = opened(method)
    before, start = logits(model), start_of(model)
    move(model, 1)
    trained = logits(model)
    gradients = {name: torch.ones_like(weight) for name, weight in trained_weights(model).items()}
    for name, weight in trained_weights(model).items():
        weight.grad = gradients[name]
    with swapped(model, start):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained) and not torch.equal(trained, before)
    assert all(weight.grad is gradients[name] for name, weight in trained_weights(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_the_base_alone_answers_as_if_nothing_were_there(method):
    model = opened(method)
    base = load_model(TINY, quantization_bit=METHODS[method].get("quantization_bit"))
    with swapped(model, BASE):
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("method", ["prefix", "lora"])
@pytest.mark.parametrize("other", ["prefix", "lora"])
def test_a_reward_model_scores_beside_a_policy_of_any_kind(method, other, tmp_path):
    reward = opened(other, seed=5, **({"lora_rank": 2, "lora_target": "dense"} if other == "lora" else {}))
    head = saved(reward, other, tmp_path)
    model = opened(method)
    before, trains, weights = logits(model), trained_weights(model), sum(1 for _ in model.transformer.parameters())
    beside = load_reward_model(model, str(tmp_path))
    assert torch.equal(logits(model), before)
    assert trained_weights(model).keys() == trains.keys()
    with swapped(model, beside.adaptation):
        torch.testing.assert_close(logits(model), logits(reward), rtol=1e-5, atol=1e-5)
    lengths = torch.tensor([32, 20])
    with torch.no_grad():
        hidden = reward.transformer(INPUT_IDS).last_hidden_state
        torch.testing.assert_close(
            beside.score(model, INPUT_IDS, lengths), head(hidden[torch.arange(2), lengths - 1]), rtol=1e-4, atol=1e-4
        )
    added = sum(1 for _ in model.transformer.parameters()) - weights
    assert added == (8 if other == "lora" else 0)  # the base is there once
    folder = tmp_path / "policy"
    save_trained(
        model, folder, {"finetuning_type": METHODS[method].get("finetuning_type", "p_tuning"), "base_model": "x"}
    )
    again = opened(method, seed=7)
    load_trained(again, folder, METHODS[method].get("finetuning_type", "p_tuning"))
    assert torch.equal(logits(again), before)


def test_what_was_there_is_there_again_after_an_error():
    model = opened("lora")
    before, start = logits(model), start_of(model)
    move(model, 1)
    with pytest.raises(KeyError), swapped(model, start):
        raise KeyError
    assert not torch.equal(logits(model), before)
    with swapped(model, start):
        assert torch.equal(logits(model), before)


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    model = opened("prefix")
    saved(model, "prefix", tmp_path, fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match="trained on another base model .*0123456789abcdef"):
        load_beside(model, tmp_path)
