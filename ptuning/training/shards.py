"""Checkpoints whose optimizer is divided over processes by FSDP or DeepSpeed.

Answers to nothing in the official scripts, which leave that to DeepSpeed.
"""

import contextlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from checkpoints.run_folder import hidden
from common.claims import MOST_INDEX_BYTES, check_size, check_torch_file
from common.messages import first_line

SHARD_FOLDERS = ("optimizer_*", "global_step*")  # what FSDP and DeepSpeed write instead
SHARD_CLASSES = {  # in the shards of an optimizer, beside tensors and plain values
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


def count_writers(checkpoint: Path | str) -> int:
    """How many processes wrote a checkpoint: each has left its random state."""
    return len(list(Path(checkpoint).glob("rng_state*.pth")))


class ShardIndex(pickle.Unpickler):
    """Reads FSDP's .metadata, which names the shards of every tensor, and calls nothing that has no place in one."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in SHARD_CLASSES and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return super().find_class(module, name)


@contextlib.contextmanager
def refusing_unreadable(file, start: str):
    """Around reading a file of a checkpoint: ValueError where it fails; a new run can `start` from what that says."""
    try:
        yield
    except Exception as error:  # bytes at random make torch and pickle raise anything
        raise ValueError(
            f"{file} cannot be read ({first_line(error)}), so that run cannot be continued. Give an earlier checkpoint, "
            f"or start a new run from {start}"
        ) from error


def check_shards(checkpoint):
    """ValueError where a shard of FSDP or DeepSpeed is damaged, or names what no optimizer has.

    Both unpickle without asking, and a pickle can name any function to be called.
    """
    for file in sorted([*Path(checkpoint).glob("global_step*/*.pt"), *Path(checkpoint).glob("optimizer_*/.metadata")]):
        with refusing_unreadable(file, f"the weights alone: --model_name_or_path {checkpoint}"):
            if file.suffix != ".pt":
                check_size(file, MOST_INDEX_BYTES)
                with open(file, "rb") as opened:
                    ShardIndex(opened).load()
                continue
            check_torch_file(file)
            if unknown := set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - SHARD_CLASSES:
                raise pickle.UnpicklingError(f"it names {', '.join(sorted(unknown))}, which could run code")


def divide_anew(checkpoint: Path | str, output_dir: Path | str) -> str:
    """Bring a DeepSpeed checkpoint into the format of which any number of processes can take their parts.

    Returns a folder in `output_dir` to resume from, with links to the checkpoint's other files. ValueError with
    DeepSpeed's reason where it cannot.
    """
    checkpoint = Path(checkpoint).resolve()
    folder = hidden(Path(output_dir) / checkpoint.name, "divided")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (shards,) = checkpoint.glob("global_step*")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", shards, "--output_folder", folder / shards.name]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(
            f"DeepSpeed cannot divide {checkpoint} for another number of processes ({reason}). "
            f"Resume with {count_writers(checkpoint)}."
        )
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    return str(folder)
