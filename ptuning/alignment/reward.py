"""Rewards: the value of an answer's last token, and the loss of a reward model on pairs of answers.

Answers to `PairwiseTrainerForChatGLM` of ChatGLM-Efficient-Tuning. The loss is that of Bradley and Terry as in Ouyang et
al., "Training language models to follow instructions", 2022: -log sigmoid(chosen - rejected). Shapes: N rows, S tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from alignment.value_head import ValueHead, fill_value_head, read_value_head, save_value_head
from chatglm2.loss import Packing
from checkpoint import fingerprint_of
from checkpoints.sidecar import read_sidecar
from common.files import write_text
from training.stages import FIGURES
from tuning.methods import find_trained
from tuning.swapping import Adaptation, load_beside, swapped

SCORES_FILE = "generated_predictions.jsonl"  # ChatGLM-Efficient-Tuning's name


def score(model, head, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The values, float32 (N,), of the last tokens of right-padded rows (N, S) of `lengths` tokens, at least 1.

    Only what comes up to the last tokens is computed, and no logits.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    packing = Packing.of_targets(torch.where(places < lengths[:, None], 0, -100))
    with head.reading(model):
        hidden_states = model.transformer(input_ids, use_cache=False, packing=packing).last_hidden_state
    ends = lengths.cumsum(0) - 1  # among the packed tokens, which are those of one row after the other
    return head(hidden_states.index_select(0, ends))


def pairwise_losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The loss of each pair of values (B,)."""
    return -F.logsigmoid(chosen - rejected)


class RewardObjective:
    """What a reward model is trained for, as PairTrainer wants it: {"loss": (B,), …} of a batch of pairs."""

    figures = FIGURES["rm"]

    def __init__(self, head):
        self.head = head

    def __call__(self, model, batch) -> dict[str, torch.Tensor]:
        chosen, rejected = self.rewards(model, batch).unbind(1)
        margin = (chosen - rejected).detach()
        return {"loss": pairwise_losses(chosen, rejected), "accuracy": (margin > 0).float(), "margin": margin}

    def rewards(self, model, batch) -> torch.Tensor:
        """float32 (B, 2) of chosen and rejected answers."""
        rows, lengths = batch["input_ids"].flatten(0, 1), batch["lengths"].flatten()
        return score(model, self.head, rows, lengths).unflatten(0, (-1, 2))

    def save(self, folder):
        save_value_head(self.head, folder)

    def load(self, folder):
        fill_value_head(self.head, folder)

    def remember(self) -> dict:
        """{name: value} for a checkpoint's sidecar."""
        return {"stage": "rm", **({"value_head_before_norm": True} if self.head.before_norm else {})}


def write_scores(trainer, dataset, collate) -> None:
    """Score the rows of encode_pairs; write a line of JSON for each, and what they come to."""
    scores = trainer.score_rows(dataset, collate)
    if not trainer.args.should_save:
        return
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    places = dataset.select_columns([name for name in ("dataset", "row") if name in dataset.column_names])
    lines = []
    for (chosen, rejected), place in zip(scores, places, strict=True):
        found = {"score": chosen} if rejected is None else {"chosen": chosen, "rejected": rejected}
        lines.append(json.dumps({**found, **place}, ensure_ascii=False) + "\n")
    write_text(output_dir / SCORES_FILE, "".join(lines))
    margins = [chosen - rejected for chosen, rejected in scores if rejected is not None]
    metrics = {"predict_samples": len(scores)}
    if margins:
        metrics["predict_accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        metrics["predict_margin"] = sum(margins) / len(margins)
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    trainer.say(f"The rewards of {len(scores)} rows are in {output_dir / SCORES_FILE}.")


# ---- beside a policy


@dataclass(frozen=True)
class RewardModel:
    """A prefix or adapter and a value head, to score what a policy on the same base has answered."""

    adaptation: Adaptation
    head: ValueHead

    @torch.no_grad()
    def score(self, model, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The rewards, float32 (N,), of right-padded rows (N, S), prompt and answer with its end, of `lengths` tokens."""
        with swapped(model, self.adaptation):
            return score(model, self.head, input_ids, lengths)


def find_reward_model(text: str) -> Path:
    """The checkpoint folder that --reward_model means. FileNotFoundError where there is none."""
    if not Path(text).is_dir():
        raise FileNotFoundError(f"--reward_model {text}: there is no such folder. Train one with --stage rm.")
    return find_trained(text)[0][-1]


def check_reward_base(text: str, session) -> None:
    """ValueError where a reward model was trained on another base than that of a run's session, before it is loaded."""
    checkpoint = find_reward_model(text)
    saved = read_sidecar(checkpoint)
    if (trained_on := saved.get("base_fingerprint")) and trained_on != fingerprint_of(session.folder):
        raise ValueError(
            f"--reward_model {checkpoint} was trained on {saved.get('base_model')}, and this run's base model is "
            f"{session.base}, with other weights. Policy and reward model share one base in memory: give a reward model that "
            "was trained on this one."
        )


def load_reward_model(model, text: str, merged: list = ()) -> RewardModel:
    """The reward model of a checkpoint or run, beside what `model` trains; `merged` as of load_beside.

    FileNotFoundError and ValueError for a folder without a value head, damaged, or of another base.
    """
    checkpoint = find_reward_model(text)
    head = read_value_head(checkpoint, model.config.hidden_size).to(model.device).requires_grad_(False)
    return RewardModel(load_beside(model, checkpoint, merged=merged), head)
