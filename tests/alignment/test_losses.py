"""The losses of pairs against their formulas, spelled out row by row, and against the model's plain forward."""

import pytest
import torch
from conftest import relative_difference, synthetic_model
from support.pairs import LENGTHS, pair_batch

from alignment.dpo import PreferenceObjective, answer_log_probs, dpo_losses
from alignment.reward import RewardObjective, pairwise_losses, score
from alignment.value_head import ValueHead
from tuning.swapping import start_of

BATCH = pair_batch()
ROWS = [(pair, answer) for pair in range(2) for answer in range(2)]  # without the blank pair


@pytest.fixture(params=[True, False], ids=["training", "eval"])
def model(request):
    return synthetic_model().train(request.param)


@pytest.fixture
def head():
    torch.manual_seed(1)
    head = ValueHead(synthetic_model().config.hidden_size)
    torch.nn.init.normal_(head.weight)
    return head


def hidden_states(model, pair, answer):
    """(tokens, H) of one row alone, without its padding."""
    return model.transformer(BATCH["input_ids"][pair, answer, : LENGTHS[pair, answer]][None]).last_hidden_state[0]


def plain_value(model, head, pair, answer):
    last = hidden_states(model, pair, answer)[-1]
    return (last * head.weight).sum() / head.scale + head.bias[0]


def plain_log_prob(model, pair, answer):
    logits = model.transformer.output_layer(hidden_states(model, pair, answer)).float()
    total = 0.0
    for place in range(1, LENGTHS[pair, answer]):
        if (label := BATCH["labels"][pair, answer, place]) != -100:
            total = total + logits[place - 1].log_softmax(0)[label]
    return total


def gradients(model, loss, *more):
    model.zero_grad()
    return torch.autograd.grad(loss, [model.transformer.prefix_encoder.embedding.weight, *more])


def mean_loss(objective, model):
    return (objective(model, BATCH)["loss"] * BATCH["weight"]).sum() / 2


def test_the_loss_of_a_reward_model_and_its_gradients_are_those_of_the_formula(model, head):
    values = torch.stack([plain_value(model, head, *row) for row in ROWS]).view(2, 2)
    plain = -torch.log(1 / (1 + torch.exp(-(values[:, 0] - values[:, 1])))).mean()
    loss = mean_loss(RewardObjective(head), model)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    wanted = gradients(model, plain, head.weight)
    found = gradients(model, loss, head.weight)
    for gradient, expected in zip(found, wanted, strict=True):
        assert relative_difference(gradient, expected) < 1e-6


def test_the_loss_of_dpo_and_its_gradient_are_those_of_the_formula(model):
    reference = torch.randn(3, 2) - 40
    log_probs = torch.stack([plain_log_prob(model, *row) for row in ROWS]).view(2, 2)
    margin = 0.3 * ((log_probs[:, 0] - reference[:2, 0]) - (log_probs[:, 1] - reference[:2, 1]))
    probability = 1 / (1 + torch.exp(-margin))
    plain = -(0.9 * torch.log(probability) + 0.1 * torch.log(1 - probability)).mean()
    objective = PreferenceObjective(None, beta=0.3, smoothing=0.1)
    found = objective(model, {**BATCH, "reference": reference})
    loss = (found["loss"] * BATCH["weight"]).sum() / 2
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert relative_difference(*gradients(model, loss), *gradients(model, plain)) < 1e-6
    torch.testing.assert_close(found["margin"][:2], margin, rtol=1e-5, atol=1e-5)


def test_the_log_probability_of_an_answer_is_the_loss_of_its_tokens(model):
    ids, labels = BATCH["input_ids"].flatten(0, 1), BATCH["labels"].flatten(0, 1)
    found = answer_log_probs(model, ids, labels)
    for row in range(4):
        nats = model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=1).loss
        assert found[row].item() == pytest.approx(-nats.item(), rel=1e-5)


def test_padding_and_other_rows_change_no_reward(model, head):
    ids, lengths = BATCH["input_ids"].flatten(0, 1), LENGTHS.flatten()
    together = score(model, head, ids, lengths)
    alone = [score(model, head, ids[row : row + 1, : lengths[row]], lengths[row : row + 1])[0] for row in range(6)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_a_head_in_front_of_the_last_norm_reads_what_comes_into_it(model, head):
    seen = []
    norm = model.transformer.encoder.final_layernorm
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    hidden_states(model, 0, 1)
    hook.remove()
    head.before_norm = True
    value = score(model, head, BATCH["input_ids"][0, 1:], LENGTHS[0, 1:])
    torch.testing.assert_close(value[0], head(seen[0][0, -1])[0], rtol=1e-5, atol=1e-5)
    assert model.transformer.encoder.final_layernorm is norm


def test_the_first_loss_of_dpo_is_exactly_log_2():
    model = synthetic_model().train()
    objective = PreferenceObjective(start_of(model), beta=0.1)
    found = objective(model, BATCH)
    assert found["loss"].tolist() == [torch.tensor(2.0).log().item()] * 3
    assert found["margin"].tolist() == [0.0] * 3


def test_losses_of_large_margins_are_finite():
    margin = torch.tensor([1e4, -1e4])
    assert pairwise_losses(margin, torch.zeros(2)).tolist() == [0.0, 1e4]
    pairs = torch.stack((margin, torch.zeros(2)), dim=1)
    losses, rewards = dpo_losses(pairs, torch.zeros(2, 2), beta=1.0, smoothing=0.0)
    assert losses.tolist() == [0.0, 1e4] and torch.equal(rewards, pairs)
