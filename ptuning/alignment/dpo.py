"""Direct preference optimization: Rafailov et al., "Your Language Model is Secretly a Reward Model", 2023.

    reward   = beta (log p(answer | prompt) - log p_reference(answer | prompt)), of the whole answer with its end
    loss     = -(1 - smoothing) log sigmoid(m) - smoothing log sigmoid(-m), with m = reward of chosen - of rejected

The reference is the same frozen base with the prefix or adapter that the run has started from: swapping.py puts it in
and takes it out. Smoothing is that of Mitchell, "A note on DPO with noisy preferences", 2023. Nothing is dropped in
either, or the loss of the first step would not be log 2.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from chatglm2.loss import Packing, next_tokens, row_log_probs
from checkpoints.file_names import REFERENCE_FILE
from checkpoints.run_folder import check_holds, verify_checkpoint
from checkpoints.weight_files import read_tensors
from common.ranks import gather
from training.stages import FIGURES
from tuning.swapping import fill_values, swapped


def answer_log_probs(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability, float32 (N,), of the labelled tokens of each right-padded row (N, S)."""
    targets = next_tokens(labels)
    packing = Packing.of_targets(targets)
    hidden_states = model.transformer(input_ids, use_cache=False, packing=packing).last_hidden_state
    return row_log_probs(hidden_states, targets, model.transformer.output_layer, packing)


@torch.no_grad()
def reference_log_probs(model, reference, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The answer_log_probs of the model with the adaptation `reference`; by the same kernels, so that none differ."""
    with swapped(model, reference):
        return answer_log_probs(model, input_ids, labels)


def dpo_losses(policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0):
    """(losses (B,), rewards (B, 2)) of the log-probabilities (B, 2) of chosen and rejected answers."""
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards


class PreferenceObjective:
    """What DPO trains for, as PairTrainer wants it: {"loss": (B,), …} of a batch of pairs.

    The batch's own `reference` log-probabilities (B, 2) count where it has them.
    """

    figures = FIGURES["dpo"]

    def __init__(self, reference, beta: float, smoothing: float = 0.0):
        self.reference, self.beta, self.smoothing = reference, beta, smoothing

    def __call__(self, model, batch) -> dict[str, torch.Tensor]:
        rows, labels = batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1)
        reference = batch.get("reference")
        if reference is None:
            reference = reference_log_probs(model, self.reference, rows, labels).unflatten(0, (-1, 2))
        policy = answer_log_probs(model, rows, labels).unflatten(0, (-1, 2))
        losses, rewards = dpo_losses(policy, reference, self.beta, self.smoothing)
        chosen, rejected = rewards.detach().unbind(1)
        margin = chosen - rejected
        return {
            "loss": losses,
            "accuracy": (margin > 0).float(),
            "margin": margin,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }

    def remember(self) -> dict:
        """{name: value} for a checkpoint's sidecar."""
        return {"stage": "dpo"}

    def save(self, folder):
        save_reference(self.reference, folder)

    def load(self, folder):
        load_reference(self.reference, folder, "dpo")


def save_reference(reference, folder):
    """Write the values of a reference into the folder of a checkpoint."""
    torch.save({name: value.cpu() for name, value in reference.values.items()}, Path(folder) / REFERENCE_FILE)


def load_reference(reference, folder, stage):
    """Fill a reference from a checkpoint of `stage`. FileNotFoundError and ValueError where it has none that fits."""
    file = check_holds(folder, REFERENCE_FILE, stage=stage)
    verify_checkpoint(folder, [REFERENCE_FILE])
    try:
        fill_values(reference, dict(read_tensors(file)))
    except ValueError as error:
        raise ValueError(f"{file} does not fit this run: {error}.") from error


def with_reference(dataset, model, reference, collate, args):
    """The rows of encode_pairs with a column `reference`: the log-probabilities of both answers, found by all processes."""
    order = sorted(range(len(dataset)), key=dataset["length"][:].__getitem__)[args.process_index :: args.world_size]
    found = []
    for start in range(0, len(order), args.per_device_eval_batch_size):
        rows = order[start : start + args.per_device_eval_batch_size]
        batch = collate([dataset[row] for row in rows])
        ids, labels = (batch[name].flatten(0, 1).to(model.device) for name in ("input_ids", "labels"))
        pairs = reference_log_probs(model, reference, ids, labels).unflatten(0, (-1, 2)).tolist()
        found += zip(rows, pairs, strict=True)
    found = dict(pair for part in gather(found) for pair in part)
    return dataset.add_column("reference", [found[row] for row in range(len(dataset))])
