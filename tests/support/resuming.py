"""Folders that look like checkpoints, and the flags of a run that is stopped and continued."""

import torch
from conftest import SAMPLE, TINY

from checkpoints.run_folder import publish_checkpoint, stage_checkpoint
from common.files import write_json
from training import resume


def write_checkpoint(run, step, number, text="", publish=publish_checkpoint):
    """A small complete checkpoint; `number` says which one of its run it is."""
    staging = stage_checkpoint(run / f"checkpoint-{step}")
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.ones(2, 3)}, staging / "pytorch_model.bin")
    write_json(staging / "ptuning.json", {"training": {"save_number": number}, "text": text})
    write_json(staging / "trainer_state.json", {"global_step": step, "train_batch_size": 4})
    for name in resume.RESUME_FILES:
        torch.save({"noise": torch.rand(100)}, staging / name)
    publish(staging, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def names(run):
    return sorted(path.name for path in run.iterdir())


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


RUN = {
    "do_train": True,
    "train_file": SAMPLE / "train.json",
    "prompt_column": "content",
    "response_column": "summary",
    "model_name_or_path": TINY,
    "max_train_samples": 18,  # 5 steps an epoch, the last of one batch
    "max_source_length": 32,
    "max_target_length": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 12,
    "save_steps": 4,
    "logging_steps": 3,
    "learning_rate": 2e-2,
    "pre_seq_len": 8,
    "report_to": "none",
    "disable_tqdm": True,
}
