"""What the prompts of a run look like to the untouched base model, so that a server can tell which ones are of their kind.

Answers to nothing in the official scripts, whose prefix answers every prompt in the style of its training rows.

A prompt is the mean of the base's last hidden states over its last turn alone, as if nothing had been said before: what is
asked now decides, after small talk too, and without a history the prefill of the prompt computes these states anyway. A
signature is a normal distribution of these means over the training prompts:

    covariance   9/10 of the measured one and a tenth of its mean variance in every direction
    directions   the MOST_DIRECTIONS of largest variance; in all others the variance is their mean
    distance     the squared Mahalanobis distance, divided by the threshold: up to 1 a prompt is of this kind
    threshold    the 99th percentile over the training prompts, each measured by a distribution made without it

For ChatGLM2-6B that is 0.5 MB. On the small model and the sample, 99% of held-out adverts are at most 1 away, and no prompt
without an attribute list is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from chatglm2.reading import hidden_states
from checkpoints.file_names import SIGNATURE_FILE
from checkpoints.run_folder import check_holds, verify_checkpoint
from checkpoints.ways import has_signature
from checkpoints.weight_files import check_trained, read_tensors
from common.files import write_bytes
from tuning.swapping import untouched

MOST_PROMPTS = 512  # that a signature is made of
FEWEST_PROMPTS = 20  # of fewer no percentile can be told
ROWS_A_PROMPT = 16  # rows that a run trains on for each prompt that is measured: at most 1% of its time
MOST_DIRECTIONS = 32
SHRINKAGE = 0.1
PERCENTILE = 0.99
FOLDS = 5
NAMES = ("mean", "directions", "variances", "rest", "threshold")  # of the tensors in the file


@dataclass(frozen=True)
class Signature:
    """A distribution of prompts; every tensor is float64, on the CPU."""

    mean: Tensor  # (H,)
    directions: Tensor  # (K, H), of length 1
    variances: Tensor  # (K,)
    rest: Tensor  # (), of every other direction
    threshold: Tensor  # ()

    def distance(self, means: Tensor) -> Tensor:
        """How far prompts (N, H) are from those of training: (N,), at most 1 where they are of their kind."""
        away = means.to("cpu", torch.float64) - self.mean
        parts = away @ self.directions.T  # (N, K)
        others = (away.square().sum(-1) - parts.square().sum(-1)).clamp(min=0)
        return ((parts.square() / self.variances).sum(-1) + others / self.rest) / self.threshold


# ---- made


def fit_signature(means: Tensor) -> Signature:
    """The signature of training prompts (N, H). ValueError for fewer than FEWEST_PROMPTS."""
    if len(means) < FEWEST_PROMPTS:
        raise ValueError(f"{len(means)} prompts, expected at least {FEWEST_PROMPTS}.")
    means = means.double().cpu()
    fold = torch.arange(len(means)) % FOLDS
    held_out = [distribution(means[fold != each]).distance(means[fold == each]) for each in range(FOLDS)]
    return distribution(means, torch.cat(held_out).quantile(PERCENTILE))


def distribution(means, threshold=None):
    """A Signature of prompts (N, H); distances are as they are where no threshold is given."""
    mean = means.mean(0)
    away = means - mean
    # Of few prompts: the products of each two have the same variances as those of each two of the H numbers.
    squares, vectors = torch.linalg.eigh(away @ away.T)
    kept = min(MOST_DIRECTIONS, *away.shape)
    squares, vectors = squares.clamp(min=0).flip(0)[:kept], vectors.flip(1)[:, :kept]
    directions = nn.functional.normalize(vectors.T @ away, dim=-1)
    total = away.square().sum() / (len(means) - 1)
    variances = squares / (len(means) - 1)
    everywhere = SHRINKAGE * total / len(mean) + torch.finfo(torch.float32).tiny
    rest = (total - variances.sum()).clamp(min=0) / max(1, len(mean) - kept)
    scaled = [(1 - SHRINKAGE) * part + everywhere for part in (variances, rest)]
    return Signature(mean, directions, *scaled, torch.ones((), dtype=torch.float64) if threshold is None else threshold)


def prompt_means(model: nn.Module, prompts: list[list[int]]) -> Tensor:
    """The mean (N, H) of the last hidden states of each prompt (token ids), by a model as it is."""
    means = {index: hidden.float().mean(0).cpu() for index, hidden in hidden_states(model, prompts)}
    return torch.stack([means[index] for index in range(len(prompts))])


def prompts_of(dataset, tokenizer, sidecar: dict, most: int) -> list[list[int]]:
    """The last turns (token ids) of at most so many rows of an encoded training set, spread over all of it.

    Each is as the base is asked: alone, and without the text that the run has put before every prompt, by its sidecar.
    """
    if not {"labels", "target_length"} <= set(dataset.column_names):
        return []
    rows = dataset.select(range(0, len(dataset), max(1, -(-len(dataset) // most))))
    _, longest = tokenizer.training_limits(0, sidecar["max_target_length"])
    before = sidecar.get("source_prefix") or ""
    answers = [min(length, longest) + 1 for length in rows["target_length"][:]]
    prompts = zip(rows["input_ids"][:], answers, strict=True)
    return [tokenizer.last_turn(list(ids[:-answer]), before) for ids, answer in prompts]


def sign_run(model: nn.Module, dataset, tokenizer, sidecar: dict, args) -> Signature | None:
    """The signature of a run's training prompts, before its first step; None where a server could not use one.

    `args` say how many rows the run trains on.
    """
    batch_size, batches_per_step = args.given_batches
    rows_of_step = batch_size * batches_per_step * args.world_size
    rows_of_run = rows_of_step * args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * len(dataset))
    most = min(MOST_PROMPTS, max(FEWEST_PROMPTS, rows_of_run // ROWS_A_PROMPT))
    return sign_prompts(model, dataset, tokenizer, sidecar, most)


def sign_prompts(model: nn.Module, dataset, tokenizer, sidecar: dict, most: int = MOST_PROMPTS) -> Signature | None:
    """The signature of at most so many prompts of an encoded training set; None where a server could not use one.

    It draws no random number and leaves the model as it is.
    """
    signed = has_signature(sidecar.get("finetuning_type", "none"), sidecar.get("stage"))
    prompts = prompts_of(dataset, tokenizer, sidecar, most) if signed else []
    if len(prompts) < FEWEST_PROMPTS:
        return None
    with untouched(model):
        return fit_signature(prompt_means(model, prompts))


# ---- kept


def write_signature(signature: Signature | None, checkpoint: Path | str) -> None:
    """Write a signature beside a checkpoint's weights, if there is one."""
    if signature is not None:
        tensors = {name: getattr(signature, name).float().contiguous() for name in NAMES}
        write_bytes(Path(checkpoint) / SIGNATURE_FILE, safetensors.torch.save(tensors))


def read_signature(checkpoint: Path | str, hidden_size: int) -> Signature:
    """The signature beside a checkpoint's weights.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of a model of another hidden size.
    """
    file = check_holds(checkpoint, SIGNATURE_FILE)
    verify_checkpoint(checkpoint, [SIGNATURE_FILE])
    tensors = dict(read_tensors(file))
    kept = tensors["directions"].shape[0] if "directions" in tensors and tensors["directions"].ndim == 2 else 0
    shapes = dict(zip(NAMES, [(hidden_size,), (kept, hidden_size), (kept,), (), ()], strict=True))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes or kept > MOST_DIRECTIONS:
        raise ValueError(
            f"{file} does not fit this base model: found {found}, expected {shapes} of at most {MOST_DIRECTIONS} "
            "directions. It was made with another base model, or the file is damaged."
        )
    for name, tensor in tensors.items():
        check_trained(tensor.reshape(-1), name, file)
    signature = Signature(**{name: tensor.double() for name, tensor in tensors.items()})
    if min(signature.variances.min(), signature.rest, signature.threshold) <= 0:
        raise ValueError(f"{file}: a variance or the threshold is not above 0. Copy the checkpoint again.")
    return signature
