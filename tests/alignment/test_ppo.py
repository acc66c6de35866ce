"""PPO's figures beside loops that are written from the papers, number by number."""

import math

import pytest
import torch

from alignment.ppo import (
    PPO,
    estimate_advantages,
    in_rows,
    moments,
    next_kl_coef,
    policy_losses,
    token_entropies,
    token_rewards,
    value_losses,
    whiten,
)

LENGTHS = (5, 1, 3, 7)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOG_PROBS, REFERENCE, VALUES = numbers(4, 7, seed=1), numbers(4, 7, seed=2), numbers(4, 7, seed=3)
SCORES = numbers(4, seed=4)


def rewards_by_hand(row, kl_coef):
    """Ziegler et al., equation 2: R(x, y) = r(x, y) - beta log(pi / rho), the logarithm token by token."""
    rewards = [-kl_coef * float(LOG_PROBS[row, place] - REFERENCE[row, place]) for place in range(LENGTHS[row])]
    rewards[-1] += float(SCORES[row])
    return rewards


def advantages_by_hand(rewards, values, gamma, lam):
    """Schulman et al. 2016, equation 16, each advantage a sum of its own."""
    length = len(rewards)
    values = [*values, 0.0]
    errors = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * errors[t + k] for k in range(length - t)) for t in range(length)]


def test_the_reward_is_the_price_of_leaving_the_reference_and_at_the_last_token_the_score():
    rewards = token_rewards(LOG_PROBS, REFERENCE, SCORES, MASK, kl_coef=0.3)
    for row, length in enumerate(LENGTHS):
        assert rewards[row, :length].tolist() == pytest.approx(rewards_by_hand(row, 0.3), abs=1e-12)
    assert not rewards[~MASK].any()


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_equal_the_sums_of_the_paper_for_answers_of_every_length(gamma, lam):
    rewards = token_rewards(LOG_PROBS, REFERENCE, SCORES, MASK, kl_coef=0.2)
    advantages, returns = estimate_advantages(rewards, VALUES, MASK, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        values = VALUES[row, :length].tolist()
        by_hand = advantages_by_hand(rewards_by_hand(row, 0.2), values, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(by_hand, abs=1e-6)
        expected = [advantage + value for advantage, value in zip(by_hand, values, strict=True)]
        assert returns[row, :length].tolist() == pytest.approx(expected, abs=1e-6)
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_what_stands_behind_an_answer_changes_nothing():
    rewards = token_rewards(LOG_PROBS, REFERENCE, SCORES, MASK, kl_coef=0.2)
    noise = numbers(4, 7, seed=9).masked_fill(MASK, 0) * 1e6
    again = token_rewards(LOG_PROBS + noise, REFERENCE, SCORES, MASK, kl_coef=0.2)
    assert torch.equal(rewards, again)
    settings = {"gamma": 1.0, "lam": 0.95}
    plain = estimate_advantages(rewards, VALUES, MASK, **settings)
    noisy = estimate_advantages(rewards + noise, VALUES + noise, MASK, **settings)
    assert all(map(torch.equal, plain, noisy))


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens_of_all_batches():
    halves = [(VALUES[rows], MASK[rows]) for rows in (slice(2), slice(2, 4))]
    together = sum(moments(*half) for half in halves)
    white = torch.cat([whiten(*half, together) for half in halves])
    chosen = VALUES[MASK]
    expected = (VALUES - chosen.mean()) / chosen.std()
    torch.testing.assert_close(white[MASK], expected[MASK], atol=1e-6, rtol=1e-6)
    assert not white[~MASK].any()


def test_a_single_token_is_whitened_to_0():
    value, mask = torch.full((1, 1), 3.0), torch.ones(1, 1, dtype=torch.bool)
    assert whiten(value, mask, moments(value, mask)).item() == 0


def policy_loss_by_hand(new, old, advantage, clip):
    ratio = math.exp(new - old)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def test_the_policy_loss_is_the_clipped_objective_of_the_paper():
    new, advantages = LOG_PROBS + numbers(4, 7, seed=5) / 3, numbers(4, 7, seed=6)
    losses, clipped = policy_losses(new, LOG_PROBS, advantages, 0.2)
    pairs = zip(new.flatten(), LOG_PROBS.flatten(), advantages.flatten(), strict=True)
    assert losses.flatten().tolist() == pytest.approx([policy_loss_by_hand(*map(float, pair), 0.2) for pair in pairs])
    assert 0 < clipped.sum() < clipped.numel()


def test_a_clipped_token_has_no_gradient_and_every_other_that_of_its_ratio():
    new = (LOG_PROBS + numbers(4, 7, seed=5) / 3).requires_grad_()
    advantages = numbers(4, 7, seed=6)
    losses, clipped = policy_losses(new, LOG_PROBS, advantages, 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    expected = -(new - LOG_PROBS).exp() * advantages
    torch.testing.assert_close(gradient, expected.masked_fill(clipped, 0).detach())


def test_the_policy_that_answered_has_a_ratio_of_1_and_the_gradient_of_plain_policy_gradients():
    new, advantages = LOG_PROBS.clone().requires_grad_(), numbers(4, 7, seed=6)
    losses, clipped = policy_losses(new, LOG_PROBS, advantages, 0.2)
    assert torch.equal(losses, -advantages) and not clipped.any()
    assert torch.equal(torch.autograd.grad(losses.sum(), new)[0], -advantages)


def test_the_value_loss_is_the_larger_one_of_the_free_and_the_clipped_value():
    new, returns = VALUES + numbers(4, 7, seed=7) / 3, numbers(4, 7, seed=8)
    losses = value_losses(new, VALUES, returns, 0.2)
    for value, old, target, loss in zip(*(x.flatten().tolist() for x in (new, VALUES, returns, losses)), strict=True):
        clipped = min(max(value, old - 0.2), old + 0.2)
        assert loss == pytest.approx(max((value - target) ** 2, (clipped - target) ** 2) / 2)


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1.00008), (60.0, 1.00016), (0.0, 0.99984)])
def test_the_price_of_a_nat_is_steered_to_the_target(kl, factor):
    # Ziegler et al., equation 4: e = clip(KL / target - 1, -0.2, 0.2), and the price times 1 + e answers / horizon.
    assert next_kl_coef(0.2, kl, 8, PPO()) == pytest.approx(0.2 * factor, rel=1e-12)


def test_entropies_are_those_of_all_logits_at_once(monkeypatch):
    monkeypatch.setattr("alignment.ppo.loss_rows", lambda device: 4)
    hidden, weight = numbers(11, 6, seed=1).requires_grad_(), numbers(30, 6, seed=2)
    entropies = token_entropies(hidden, lambda states: states @ weight.T)
    plain = (hidden @ weight.T).softmax(-1)
    torch.testing.assert_close(entropies.double(), -(plain * plain.log()).sum(-1).detach(), atol=1e-6, rtol=1e-5)
    assert not entropies.requires_grad


def test_numbers_of_tokens_go_to_the_rows_of_their_answers():
    rows = in_rows(torch.arange(float(MASK.sum())), MASK)
    assert rows[MASK].tolist() == list(range(sum(LENGTHS))) and not rows[~MASK].any()
    assert rows[2].tolist() == [6, 7, 8, 0, 0, 0, 0]
