"""The loss of a policy and its value head, and its gradients, against the formulas spelled out token by token."""

import pytest
import torch
from conftest import relative_difference, synthetic_model

from alignment.ppo import PPO
from alignment.ppo_trainer import PolicyObjective, PPOProgress
from alignment.reward import RewardModel
from alignment.rollouts import Tokens, join_answers
from alignment.value_head import ValueHead
from tuning.swapping import BASE, start_of

PROMPTS, ANSWERS = [[5, 6, 7], [8], [], [9, 10, 11]], [[20, 21], [22, 23, 24, 25], [], [26]]
BATCH = join_answers(PROMPTS, ANSWERS, [1, 2, 0, 3], pad_token_id=0)
PLACES = [(row, place) for row, answer in enumerate(ANSWERS) for place in range(len(answer))]
FIGURES = PPO(clip_ratio=0.2, clip_value=0.1, value_coef=0.3)


def drawn(seed):
    return torch.randn(BATCH["mask"].shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    model = synthetic_model().train()
    torch.manual_seed(0)
    model.value_head = ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(model.value_head.weight)
    return model


@pytest.fixture
def objective(model):
    return PolicyObjective(model.value_head, start_of(model), RewardModel(BASE, model.value_head), FIGURES)


def token_by_token(model):
    """{(row, place): (log-probability, value)} of the tokens of answers, each row alone, by all logits."""
    found = {}
    for row, place in PLACES:
        ids = torch.tensor([PROMPTS[row] + ANSWERS[row][:place]])
        hidden = model.transformer(ids, use_cache=False).last_hidden_state[0, -1]
        odds = (model.transformer.output_layer.weight @ hidden).log_softmax(0)
        value = (hidden * model.value_head.weight).sum() / model.value_head.scale + model.value_head.bias[0]
        found[row, place] = odds[ANSWERS[row][place]], value
    return found


def test_the_loss_and_its_gradients_are_those_of_the_formulas(model, objective):
    tokens = token_by_token(model)
    old_log_probs, old_values, advantages, returns = drawn(1) / 4, drawn(2) / 4, drawn(3), drawn(4)
    for (row, place), (log_prob, value) in tokens.items():
        old_log_probs[row, place] += log_prob.item()
        old_values[row, place] += value.item()
    total = 0
    for (row, place), (log_prob, value) in tokens.items():
        at = row, place
        ratio = (log_prob - old_log_probs[at]).exp()
        free, clipped = ratio * advantages[at], ratio.clamp(0.8, 1.2) * advantages[at]
        near = old_values[at] + (value - old_values[at]).clamp(-0.1, 0.1)
        worse = max((value - returns[at]) ** 2, (near - returns[at]) ** 2)
        total = total - min(free, clipped) + 0.3 * worse / 2
    inputs = {name: BATCH[name] for name in ("input_ids", "labels", "mask")}
    losses, clipped = objective.losses(
        model,
        **inputs,
        **{"old_log_probs": old_log_probs, "old_values": old_values, "advantages": advantages, "returns": returns},
    )
    assert losses.sum().item() == pytest.approx(total.item(), rel=1e-5)
    assert 0 < clipped.sum() < len(PLACES) and not clipped[~BATCH["mask"]].any()
    weights = [model.transformer.prefix_encoder.embedding.weight, *model.value_head.parameters()]
    pairs = zip(*(torch.autograd.grad(loss, weights) for loss in (losses.sum(), total)), strict=True)
    assert all(relative_difference(found, expected) < 1e-5 for found, expected in pairs)


def test_a_policy_that_has_not_moved_is_its_reference_and_has_a_ratio_of_1(model, objective):
    policy, reference, rewards = objective.judge(model, BATCH, model.value_head)
    assert torch.equal(policy.log_probs, reference)
    assert not policy.log_probs.requires_grad and rewards.shape == (4,)
    inputs = {name: BATCH[name] for name in ("input_ids", "labels", "mask")}
    losses, clipped = objective.losses(
        model,
        **inputs,
        old_log_probs=policy.log_probs,
        old_values=policy.values,
        advantages=drawn(3),
        returns=policy.values,
    )
    assert torch.equal(losses, -drawn(3).masked_fill(~BATCH["mask"], 0)) and not clipped.any()


def test_the_log_shows_means_over_answers_and_tokens_and_a_blank_row_counts_for_nothing():
    progress, mask = PPOProgress(PPO()), BATCH["mask"]
    policy = Tokens(torch.full(mask.shape, -1.0), None, torch.full(mask.shape, 0.5))
    progress.saw(policy, torch.full(mask.shape, -3.0), torch.tensor([1.0, 2.0, 100.0, 6.0]), mask)
    progress.end_step()
    found = progress.figures()
    assert found == {
        "reward": 3.0,
        "kl": 2 * 7 / 3,
        "entropy": 0.5,
        "answer_length": 7 / 3,
        "clip_fraction": 0.0,
        "kl_coef": pytest.approx(0.2 * (1 - 0.2 * 3 / 10000)),
    }
    assert progress.figures()["reward"] == 0
