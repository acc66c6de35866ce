"""PPO on answers: what their tokens earned, what they were worth, and the losses of policy and value head.

Sources: Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) for the reward, a score of the whole answer less a price
for leaving the reference, and for the controller of that price; Schulman et al. 2016 (https://arxiv.org/abs/1506.02438)
for the advantages; Schulman et al. 2017 (https://arxiv.org/abs/1707.06347) for clipping. The figures of PPO are those
with which ChatGLM-Efficient-Tuning called TRL.

Everything here is a function of tensors. Shapes: B answers, A tokens of the longest, U tokens of answers, H hidden,
V padded vocabulary. `mask` (B, A) is True where an answer has a token; what stands elsewhere counts for nothing, and
results are 0 there. An answer's tokens come first in its row.
"""

from dataclasses import dataclass

import torch

from chatglm2.loss import loss_rows

LEAST_VARIANCE = 1e-8  # of advantages, below which they are not scaled up


@dataclass(frozen=True)
class PPO:
    """The figures of PPO."""

    epochs: int = 1  # optimizer steps with the answers of a round
    kl_coef: float = 0.2  # price of a nat by which a token leaves the reference, at first
    kl_target: float = 6.0  # nats of an answer that the price is steered to
    kl_horizon: int = 10000  # answers within which it is steered
    gamma: float = 1.0  # what a reward is worth one token earlier
    lam: float = 0.95  # 0: the value head's word for what follows; 1: what did follow
    clip_ratio: float = 0.2  # by which a token's probability may change before its gradient ends
    clip_value: float = 0.2  # by which its value may
    value_coef: float = 0.1  # of the value head's loss in the sum


# ---- tokens


@torch.no_grad()
def token_entropies(hidden_states, output_layer):
    """Entropy, float32 (U,), of what the model would draw a token from after hidden states (U, H), a few at a time."""
    entropies = []
    for part in hidden_states.split(loss_rows(hidden_states.device.type)):
        log_odds = output_layer(part).float().log_softmax(-1)
        entropies.append(-(log_odds.exp() * log_odds).sum(-1))
    return torch.cat(entropies)


def in_rows(values, mask):
    """values (U,), row after row, as (B, A)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


# ---- rewards and advantages


def token_rewards(log_probs, reference_log_probs, scores, mask, kl_coef):
    """Reward of every token (B, A): the price of leaving the reference, and at the last one the score (B,), too."""
    rewards = -kl_coef * (log_probs - reference_log_probs)
    last = mask.sum(1, keepdim=True) - 1  # a blank row has none
    at_last = torch.arange(mask.shape[1], device=mask.device) == last
    return (rewards + at_last * scores[:, None]).masked_fill(~mask, 0)


def estimate_advantages(rewards, values, mask, *, gamma, lam):
    """(advantages, returns), both (B, A), of rewards and the value head's `values` (B, A).

    With errors d_t = r_t + gamma v_t+1 - v_t the advantage is the sum of (gamma lam)^k d_t+k; nothing follows the last
    token of an answer. A return is advantage plus value.
    """
    values = values.masked_fill(~mask, 0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    errors = (rewards + gamma * following - values).masked_fill(~mask, 0)
    advantages, carried = torch.zeros_like(errors), torch.zeros_like(errors[:, 0])
    for place in reversed(range(errors.shape[1])):
        carried = errors[:, place] + gamma * lam * carried  # still 0 behind an answer
        advantages[:, place] = carried
    return advantages, (advantages + values).masked_fill(~mask, 0)


def moments(values, mask):
    """float64 (3,): number, sum and sum of squares of the values on the mask. Those of several batches add up."""
    chosen = values[mask].double()
    return torch.stack(
        (torch.tensor(len(chosen), dtype=torch.float64, device=values.device), chosen.sum(), chosen.square().sum())
    )


def whiten(values, mask, moments):
    """values (B, A) less the mean that the `moments` have, over their standard deviation."""
    number, total, squares = moments
    mean = total / number
    variance = (squares - number * mean.square()).clamp(min=0) / (number - 1).clamp(min=1)
    return ((values - mean) * torch.rsqrt(variance + LEAST_VARIANCE)).to(values.dtype).masked_fill(~mask, 0)


# ---- losses


def policy_losses(log_probs, old_log_probs, advantages, clip_ratio):
    """(loss of every token, True where its gradient is clipped away), of tensors of one shape.

    The loss is the larger one of -ratio advantage and -clipped ratio advantage: nothing is gained by leaving the policy
    that answered by more than `clip_ratio`.
    """
    ratio = (log_probs - old_log_probs).exp()
    free, clipped = -ratio * advantages, -ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages
    return torch.maximum(free, clipped), clipped > free


def value_losses(values, old_values, returns, clip_value):
    """Loss of every token's value, half a square: the larger one of the value's and the clipped value's."""
    clipped = torch.clamp(values, old_values - clip_value, old_values + clip_value)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def next_kl_coef(kl_coef, kl, num_answers, ppo):
    """The price of a nat after `num_answers` answers that left the reference by `kl` nats each, on average."""
    error = min(max(kl / ppo.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_answers / ppo.kl_horizon)
