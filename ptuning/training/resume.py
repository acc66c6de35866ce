"""Where a run continues: the checkpoint to go on from, held against the run that is to go on.

Has no counterpart in the official scripts, whose `--resume_from_checkpoint` takes the folder with the highest number,
complete or not. checkpoints/run_folder.py writes the folders and checks them; trainer.py puts step, optimizer, schedule
and random numbers into them.
"""

import contextlib
import fcntl
import os
import random
import socket
import time
from pathlib import Path

import numpy
import torch
from transformers.trainer_pt_utils import safe_globals

from checkpoints.run_folder import (
    CHECKSUM_FILE,
    checkpoint_folders,
    clear_leftovers,
    newest_checkpoint,
    step_of,
    verify_checkpoint,
)
from checkpoints.trainer_state import check_state
from common.claims import ZIP_MARK, check_torch_file
from common.files import STATE_FILE, read_json
from common.messages import first_line
from common.ranks import on_first_rank
from data.encoding import digest
from data.held_out import write_held_out
from training.schedule import rows_of_whole_step
from training.shards import SHARD_FOLDERS, check_shards, refusing_unreadable

RESUME_FILES = ("optimizer.pt", "scheduler.pt")  # what --save_only_model leaves out
SHAPED_LIKE_WEIGHTS = {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"}  # in an optimizer's state


# ---- one run per output folder

locks = {}  # folder -> open file; the system releases a lock when the process ends, however it ends


def lock_run(folder: Path | str) -> None:
    """Make `folder` this process's own and remove what a killed run left in it. ValueError while another has it."""
    folder = Path(folder).resolve()
    if folder in locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "it does not say which"
        file.close()
        raise ValueError(
            f"Another run is writing to {folder} ({owner}). Wait for it, stop it, or give another --output_dir."
        ) from None
    except OSError:
        pass  # a disk that knows no locks
    with contextlib.suppress(OSError):  # for the message above only
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    locks[folder] = file
    clear_leftovers(folder)


def release_run(folder: Path | str) -> None:
    """Give up the lock, in a program that goes on after a run."""
    if file := locks.pop(Path(folder).resolve(), None):
        file.close()


# ---- where to continue


def find_resume_checkpoint(
    wanted: str | bool | None, output_dir: Path | str, overwrite: bool = False
) -> tuple[str | None, list[str]]:
    """(checkpoint folder to continue from or None to start afresh, lines for the user).

    `wanted` is --resume_from_checkpoint: None, True, "last" or a folder. Raises FileNotFoundError and ValueError
    where it is not clear what is meant, or the checkpoint is damaged.
    """
    output_dir = Path(output_dir)
    kind = str(wanted).lower()
    if kind in ("none", "false"):
        existing = sorted(checkpoint_folders(output_dir), key=step_of)
        if existing and not overwrite:
            raise ValueError(
                f"{output_dir} already has {existing[-1].name}. Give --resume_from_checkpoint True to continue that "
                "run, --overwrite_output_dir to write over it, or another --output_dir."
            )
        names = ", ".join(folder.name for folder in existing)
        return None, [f"{output_dir} has {names} of an earlier run; this one starts afresh."] if existing else []
    lines = []
    if kind in ("true", "last"):
        folder, damaged = newest_checkpoint(output_dir)
        if folder is None and damaged:
            raise ValueError(
                f"--resume_from_checkpoint {wanted}: {' '.join(damaged)} No other checkpoint is there. To start afresh "
                "give another --output_dir."
            )
        lines = [f"{problem} It is left aside for {folder.name}, the newest complete one." for problem in damaged]
        if folder is None and kind == "last":
            return None, [f"--resume_from_checkpoint last: {output_dir} has no checkpoint yet, starting afresh."]
    else:
        folder = next((path for path in (Path(wanted), output_dir / wanted) if path.is_dir()), Path(wanted))
    if folder is None or not any((folder / name).is_file() for name in (STATE_FILE, CHECKSUM_FILE)):
        raise FileNotFoundError(
            f"--resume_from_checkpoint {wanted}: no complete checkpoint (with trainer_state.json) at "
            f"{folder or output_dir}. To start a new run from a trained prefix use --ptuning_checkpoint."
        )
    if kind not in ("true", "last"):  # newest_checkpoint has read every byte of those already
        try:
            verify_checkpoint(folder)
        except ValueError as error:
            raise ValueError(f"--resume_from_checkpoint {wanted}: {error} Give an earlier one, or `last`.") from error
    state = check_state(read_json(folder / STATE_FILE), folder / STATE_FILE)
    if state.get("train_batch_size") is None:  # transformers 4.30 did not write it, and today's cannot do without
        raise ValueError(
            f"--resume_from_checkpoint {folder} was written by the official scripts of 2023; its optimizer cannot "
            f"be continued. Start a new run from its prefix: --ptuning_checkpoint {folder}"
        )
    shards = any(path.is_dir() for name in SHARD_FOLDERS for path in folder.glob(name))
    check_shards(folder)
    missing = [] if shards else [name for name in RESUME_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--resume_from_checkpoint {folder} has no {' and no '.join(missing)}, so it cannot be continued. Start a "
            f"new run from its prefix: --ptuning_checkpoint {folder}"
        )
    start = f"its prefix: --ptuning_checkpoint {folder}"
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        with refusing_unreadable(file, start):
            check_torch_file(file)
    files = [folder / name for name in RESUME_FILES if (folder / name).is_file()]
    for file in sorted(folder.glob("rng_state*.pth")) + files:
        with refusing_unreadable(file, start), safe_globals(), open(file, "rb") as opened:  # only values, no code
            is_zip = opened.read(4) == ZIP_MARK  # then no tensor is read yet, which may be many GB
            torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    lines.append(f"Resuming from {folder} at step {state['global_step']}: prefix, optimizer, schedule and data order.")
    return str(folder), lines


def prepare_run(model_args, training_args, say):
    """The checkpoint folder to continue from, or None for a new run; refuses a folder that another run is using."""
    output_dir = training_args.output_dir
    if Path(output_dir).is_dir():  # one that is not there yet is made when there is something to put in it
        on_first_rank(lock_run, output_dir)
    wanted = training_args.resume_from_checkpoint
    resume_from, lines = on_first_rank(find_resume_checkpoint, wanted, output_dir, training_args.overwrite_output_dir)
    for line in lines:
        say(line)
    if resume_from:
        if model_args.ptuning_checkpoint:
            say(f"--ptuning_checkpoint {model_args.ptuning_checkpoint} is not read: the run has gone on from there.")
        model_args.ptuning_checkpoint = resume_from  # its settings hold, as those of any given prefix
        training_args.eval_on_start = False  # done when the run started
    return resume_from


# What of a run decides how it goes on, and what happens where a resumed run has another value.
COMPARED = {
    "processes": "random numbers go on from those of process 0",
    "per_device_train_batch_size": "",
    "gradient_accumulation_steps": "",
    "rows_per_step": "the position in the data is counted in steps of the new size",
    "optim": "",
    "lr_scheduler_type": "the schedule is that of the new type from here on",
    "learning_rate": "not used: the checkpoint's goes on",
    "max_steps": "the schedule is that of the new length from here on",
    "num_train_epochs": "the schedule is that of the new length from here on",
    "seed": "the order of the data changes",
    "quantization_bit": "the frozen model is another one",
    "train_file": "",
    "train_rows": "the rows, or how they are cut, have changed",
    "keep_base": "",
    "keep_base_rows": "other general rows come into a step",
    "general_file": "other general rows come into a step",
}
OF_KEEPING = ("keep_base", "keep_base_rows", "general_file")  # remembered where a run keeps its base's answers only


def training_record(training_args, train_file: str | None, train_rows: str, quantization_bit: int | None) -> dict:
    """What the checkpoints of a run remember for the run that continues it: {name: value}, as in COMPARED.

    `train_rows` is a digest of the data.
    """
    record = {
        "processes": training_args.world_size,
        "rows_per_step": rows_of_whole_step(training_args),
        "quantization_bit": quantization_bit or 0,
        "train_file": str(train_file),
        "train_rows": train_rows,
    }
    rows, accumulated = training_args.given_batches
    record |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    left = {*record, *(() if training_args.keep_base else OF_KEEPING)}
    others = {name: getattr(training_args, name) for name in COMPARED if name not in left}
    return record | {name: getattr(value, "value", value) for name, value in others.items()}  # without enumerations


def begin_run(training_args, data_args, data, quantization_bit: int | None, say) -> dict:
    """Make the run's folder this process's own, as lock_run, and write the rows there that it holds out.

    The training_record of a run on `data`, the Splits of data/splits.py; `say` is told what could not be written.
    """
    on_first_rank(lock_run, training_args.output_dir)
    on_first_rank(write_held_out, training_args.output_dir, data.held_out, say)
    files = data_args.dataset or data_args.train_file
    return training_record(training_args, files, digest(data.train), quantization_bit)


def describe_differences(before: dict, now: dict) -> str:
    """One line that names what differs between two training_records and what comes of it; empty if nothing does."""
    changed = []
    for name, consequence in COMPARED.items():
        if name in before and before[name] != now.get(name):
            shown = "" if name == "train_rows" else f" {str(before[name])[:200]} -> {now.get(name, 'none')}"
            changed.append(f"{name}{shown}{f' ({consequence})' if consequence else ''}")
    return f"Not as in the checkpoint's run: {'; '.join(changed)}." if changed else ""


# ---- random numbers


def random_state(device: torch.device) -> dict:
    """The state of every random number generator of this process, in transformers' form."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def random_state_file(process: int, processes: int) -> str:
    """Name of the file with the state of a process (from 0), one of `processes`; the library's names."""
    return "rng_state.pth" if processes == 1 else f"rng_state_{process}.pth"


@contextlib.contextmanager
def fitting(file: Path | str, hint: str = ""):
    """Around taking over what `file` of a checkpoint holds: ValueError where it is nothing that fits this run."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # values of any type make torch raise anything
        raise ValueError(
            f"{file} does not fit this run ({type(error).__name__}: {first_line(error)}), so that run cannot be continued. "
            f"{hint}Give an earlier checkpoint, or start a new run from its prefix: --ptuning_checkpoint "
            f"{Path(file).parent}"
        ) from error


def check_optimizer(saved: dict, optimizer: torch.optim.Optimizer, name: str) -> None:
    """ValueError where the state `saved` is that of another optimizer than this run's, --optim `name`.

    torch takes any state of as many tensors, and fails in the first step or computes something else.
    """
    found = {key for group in saved["param_groups"] for key in group}
    known = {key for group in optimizer.param_groups for key in group} | {"initial_lr"}
    if strange := sorted(found - known):
        raise ValueError(
            f"another optimizer's, which has {', '.join(strange)}; --optim {name} has "
            f"{', '.join(sorted(known - {'params', 'initial_lr'}))}"
        )
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for group, fresh in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for key in group.keys() & fresh.keys() - {"params"}:
            left_open = group[key] is None and key in ("foreach", "fused")  # a choice of kernels
            if not left_open and not is_like(group[key], fresh[key]):
                raise ValueError(f"{key} is {type(group[key]).__name__}, expected a value like {fresh[key]}")
    for number, state in saved["state"].items():
        if torch.as_tensor(state.get("step", 0)).numel() != 1:
            raise ValueError(f"step of weight {number} is no number")
        for key in state.keys() & SHAPED_LIKE_WEIGHTS:
            if tuple(state[key].shape) != tuple(weights[number].shape):
                shapes = f"{tuple(state[key].shape)}, expected {tuple(weights[number].shape)}"
                raise ValueError(f"{key} of weight {number} is {shapes}")


def is_like(value, fresh):
    """True where a setting of a saved optimizer has the form of `fresh`, which a new optimizer has."""
    if isinstance(value, torch.Tensor):  # a learning rate that a graph reads
        return value.numel() == 1 and isinstance(fresh, float | torch.Tensor)
    if isinstance(fresh, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(fresh) and all(map(is_like, value, fresh))
    if fresh is None:
        return value is None or isinstance(value, int | float)
    if isinstance(fresh, int | float | torch.Tensor):
        return isinstance(value, int | float)
    return isinstance(value, type(fresh))


def check_schedule(saved: dict, num_groups: int) -> None:
    """ValueError where the state `saved` of a learning rate schedule is none that can be continued."""
    steps = [saved.get("last_epoch", 0), saved.get("_step_count", 0)]
    rates = [saved.get(name, [0.0] * num_groups) for name in ("_last_lr", "base_lrs")]
    if not all(isinstance(step, int) for step in steps):
        raise ValueError("its last_epoch or _step_count is no whole number")
    if not all(is_like(found, [0.0] * num_groups) for found in rates):
        raise ValueError(f"its _last_lr or base_lrs are not {num_groups} numbers")


def read_process_states(checkpoint: Path | str) -> list[dict]:
    """The states that the processes of a run saved of themselves, in order of rank; an empty list where none did."""
    files = [Path(checkpoint, "rng_state.pth")]
    if not files[0].is_file():
        files = [Path(checkpoint, f"rng_state_{process}.pth") for process in range(len(os.listdir(checkpoint)))]
    with safe_globals():  # numpy's arrays
        return [torch.load(file, weights_only=True) for file in files if file.is_file()]


def restore_random_state(state: dict, device: torch.device) -> None:
    """Set every random number generator of this process to what random_state() has returned."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    cuda = state.get("cuda")
    if device.type == "cuda" and cuda is not None:
        if isinstance(cuda, list):  # transformers' own, of all devices of the machine
            cuda = cuda[min(device.index or 0, len(cuda) - 1)]
        torch.cuda.set_rng_state(cuda, device)
