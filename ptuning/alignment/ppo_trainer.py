"""The trainer of PPO: each step answers prompts with the policy, has the answers judged, and learns from them.

Source: Ziegler et al. 2019; the order of things is that of ChatGLM-Efficient-Tuning's ppo. A step of the trainer is one
round of answers, those to the prompts of every accumulated batch and every process; `epochs` optimizer steps are made
with them. Saving, resuming, logging and signals are those of every other run.
"""

import contextlib
import time

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import speed_metrics

from alignment.dpo import load_reference, save_reference
from alignment.ppo import (
    PPO,
    estimate_advantages,
    moments,
    next_kl_coef,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)
from alignment.reward import RewardModel
from alignment.rollouts import Tokens, join_answers, prompts_of, read_tokens
from alignment.trainer import ObjectiveTrainer
from alignment.value_head import ValueHead, fill_value_head, save_value_head
from chatglm2.generation import answer_prompts
from common.ranks import gather
from training.memory import rows_that_fit
from training.stages import FIGURES
from tuning.swapping import Adaptation, swapped

# What is summed of answers: their number, that of their tokens, and what the log shows the mean of.
SUMS = ("answers", "tokens", "reward", "kl", "entropy", "clipped")


class PolicyObjective:
    """What a policy trains for: the reward model's word, at a price for leaving the reference."""

    figures = (*FIGURES["ppo"], "kl_coef", "clip_fraction")

    def __init__(self, head: ValueHead, reference: Adaptation, reward_model: RewardModel, ppo: PPO):
        self.head, self.reference, self.reward_model, self.ppo = head, reference, reward_model, ppo

    def judge(self, model, batch, head=None):
        """(Tokens of the policy, log-probabilities of the reference (B, A), rewards (B,)) of a batch of join_answers.

        With gradients wanted the policy's come from the forward pass of training, whose kernels may be others.
        """
        inputs = {name: batch[name] for name in ("input_ids", "labels", "mask")}
        policy = read_tokens(model, **inputs, value_head=head, with_entropy=True)
        policy = Tokens(*(tensor if tensor is None else tensor.detach() for tensor in policy))
        with torch.no_grad(), swapped(model, self.reference):
            reference = read_tokens(model, **inputs).log_probs
        return policy, reference, self.reward_model.score(model, batch["input_ids"], batch["lengths"])

    def losses(self, model, input_ids, labels, mask, old_log_probs, old_values, advantages, returns):
        """(loss of every token, 0 off the mask, and True where the policy's is clipped), (B, A)."""
        tokens = read_tokens(model, input_ids, labels, mask, self.head)
        losses, clipped = policy_losses(tokens.log_probs, old_log_probs, advantages, self.ppo.clip_ratio)
        of_values = value_losses(tokens.values, old_values, returns, self.ppo.clip_value)
        return (losses + self.ppo.value_coef * of_values).masked_fill(~mask, 0), clipped & mask

    def remember(self) -> dict:
        """{name: value} for a checkpoint's sidecar."""
        return {"stage": "ppo"}

    def save(self, folder):
        save_value_head(self.head, folder)
        save_reference(self.reference, folder)

    def load(self, folder):
        load_reference(self.reference, folder, "ppo")
        fill_value_head(self.head, folder)


class PPOProgress(TrainerCallback, ExportableState):
    """What answers have come to since the last line of the log, and the price of a nat; trainer_state.json has both."""

    def __init__(self, ppo: PPO):
        self.ppo, self.kl_coef = ppo, ppo.kl_coef
        self.sums, self.step = dict.fromkeys(SUMS, 0.0), dict.fromkeys(SUMS, 0.0)

    def saw(self, policy: Tokens, reference_log_probs, rewards, mask):
        """Take note of a batch of answers, of which PolicyObjective.judge has said so much."""
        answered = mask.any(1)
        self.step["answers"] += int(answered.sum())
        self.step["tokens"] += int(mask.sum())
        self.step["reward"] += float(rewards[answered].sum())
        self.step["kl"] += float((policy.log_probs - reference_log_probs)[mask].sum())
        self.step["entropy"] += float(policy.entropies[mask].sum())

    def end_step(self):
        """Add what all processes have noted to the sums; the price of a nat is then that of the next step."""
        step = {name: sum(part[name] for part in gather(self.step)) for name in SUMS}
        self.step = dict.fromkeys(SUMS, 0.0)
        self.sums = {name: self.sums[name] + step[name] for name in SUMS}
        answers = max(step["answers"], 1)
        self.kl_coef = next_kl_coef(self.kl_coef, step["kl"] / answers, answers, self.ppo)

    def figures(self) -> dict[str, float]:
        """The means since they were asked for last."""
        sums, self.sums = self.sums, dict.fromkeys(SUMS, 0.0)
        answers, tokens = max(sums["answers"], 1), max(sums["tokens"], 1)
        return {
            "reward": sums["reward"] / answers,
            "kl": sums["kl"] / answers,
            "entropy": sums["entropy"] / tokens,
            "answer_length": sums["tokens"] / answers,
            "kl_coef": self.kl_coef,
            "clip_fraction": sums["clipped"] / tokens,
        }

    def state(self):
        return {"args": {}, "attributes": {"kl_coef": self.kl_coef, "sums": self.sums}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved:
            attributes = saved["attributes"]
            self.kl_coef = float(attributes["kl_coef"])
            self.sums = {name: float(attributes["sums"][name]) for name in SUMS}

    def on_step_end(self, args, state, control, **kwargs):
        self.end_step()


class PPOTrainer(ObjectiveTrainer):
    """Trains a policy and its value head on prompts, whose batches collate_prompts makes, by a PolicyObjective.

    `generation_config` holds `max_length`, the tokens of prompt and answer together, and `max_new_tokens`, those of an
    answer. Dropout must be off.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ppo = self.objective.ppo
        self.seen = PPOProgress(self.ppo)
        self.add_callback(self.seen)

    # ---- a round: answers, and what is to be learned of them

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """(the step's batches for the last pass over them, the tokens of all answers of all processes).

        Here prompts are read and answered, and the passes before the last one made.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        seed = f"{self.args.seed} {self.state.global_step}"  # so that a resumed run draws what it would have drawn
        batches = [self._learned_from(batch) for batch in self._answered(batches, seed)]
        together = sum(gather(sum(moments(batch["advantages"], batch["mask"]) for batch in batches).cpu()))
        for batch in batches:
            batch["advantages"] = whiten(batch["advantages"], batch["mask"], together.to(device))
        num_tokens = max(1, int(together[0]))
        for _ in range(self.ppo.epochs - 1):
            self._pass_over(batches, num_tokens)
        return batches, num_tokens

    def _answered(self, batches, seed):
        """Batches of join_answers: each prompt of those of `batches` with what the policy draws, from all tokens."""
        prompts = [prompts_of(batch) for batch in batches]
        rows = [batch["row"].tolist() for batch in batches]
        asked = [pair for pair in zip(sum(prompts, []), sum(rows, []), strict=True) if pair[0]]
        model, limits = self.accelerator.unwrap_model(self.model), self.generation_config
        was_training = model.training
        model.eval()
        answers = iter(
            answer_prompts(
                model,
                [prompt for prompt, _ in asked],
                limits.max_length,
                max_answer=limits.max_new_tokens,
                num_known=len(self.processing_class),
                ends=self.processing_class.stop_ids,
                batch_size=self.args.prediction_batch_size or rows_that_fit(model, limits.max_length),
                rows=[row for _, row in asked],
                seed=seed,
                top_p=None,
            )
        )
        model.train(was_training)
        pad_token_id = self.processing_class.pad_token_id
        for batch, numbers in zip(prompts, rows, strict=True):
            answered = [next(answers) if prompt else [] for prompt in batch]
            yield self._prepare_inputs(join_answers(batch, answered, numbers, pad_token_id=pad_token_id))

    def _learned_from(self, batch):
        """The batch with what a pass over it reads; its advantages are not yet whitened."""
        model = self.accelerator.unwrap_model(self.model).train()
        with self.accelerator.autocast():
            policy, reference, scores = self.objective.judge(model, batch, self.objective.head)
        self.seen.saw(policy, reference, scores, batch["mask"])
        rewards = token_rewards(policy.log_probs, reference, scores, batch["mask"], self.seen.kl_coef)
        advantages, returns = estimate_advantages(
            rewards, policy.values, batch["mask"], gamma=self.ppo.gamma, lam=self.ppo.lam
        )
        kept = {name: batch[name] for name in ("input_ids", "labels", "row", "mask")}
        old = {"old_log_probs": policy.log_probs, "old_values": policy.values}
        return {**kept, **old, "advantages": advantages, "returns": returns}

    # ---- passes over a round

    def loss_of_batch(self, model, input_ids, labels, num_items_in_batch, **batch):
        """The part that a batch has of its step's loss, the mean over all tokens of answers."""
        losses, clipped = self.objective.losses(model, input_ids, labels, **batch)
        self.seen.step["clipped"] += float(clipped.sum()) / self.ppo.epochs
        return losses.sum() / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, dict(inputs), num_items_in_batch)  # which takes things out

    def _pass_over(self, batches, num_tokens):
        """One optimizer step with the batches of a round."""
        model, rows_fed = self.model_wrapped, self.rows_fed
        self.accelerator.gradient_state._set_sync_gradients(True)
        for batch in batches:
            with contextlib.nullcontext() if batch is batches[-1] else self.accelerator.no_sync(model):
                self.training_step(model, batch, num_tokens)
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(model, grad_norm=norm)
        self.optimizer.step()
        model.zero_grad()
        self.rows_fed = rows_fed  # a row counts once a round

    def log(self, logs, start_time=None):
        super().log({**logs, **self.seen.figures()} if "loss" in logs else logs, start_time)

    # ---- dev rows

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The figures of answers to the dev prompts, which are drawn with the same random numbers every time."""
        started, dataset = time.time(), self.eval_dataset if eval_dataset is None else eval_dataset
        rows = [dataset[index] for index in range(self.args.process_index, len(dataset), self.args.world_size)]
        size = self.args.per_device_eval_batch_size
        batches = [self.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        model, seen = self.accelerator.unwrap_model(self.model), PPOProgress(self.ppo)
        was_training = model.training
        for batch in self._answered(batches, self.args.seed) if batches else ():
            with self.accelerator.autocast():
                seen.saw(*self.objective.judge(model.eval(), batch), batch["mask"])
        model.train(was_training)
        seen.end_step()
        figures = seen.figures()
        metrics = {f"{metric_key_prefix}_{name}": figures[name] for name in FIGURES["ppo"]}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(dataset))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
