"""A run's folder: checkpoints that are written completely or not at all.

Answers to nothing in the official scripts, which leave half a checkpoint where they are stopped while they write it.

A checkpoint is written as .checkpoint-N.partial, gets checksums.json, goes to the disk, and is then renamed to
checkpoint-N. One of that name that is there already is .checkpoint-N.replaced for the moment between two renames;
one that is deleted becomes .checkpoint-N.deleted first. None of the three is ever taken for a checkpoint.
"""

import contextlib
import itertools
import math
import shutil
from pathlib import Path

from checkpoints.file_names import (
    FINETUNING_FILE,
    INDEX_FILES,
    REFERENCE_FILE,
    SIGNATURE_FILE,
    TENSORS_FILE,
    VALUE_HEAD_FILE,
    weight_files,
)
from checkpoints.sidecar import SIDECAR_FILE
from checkpoints.trainer_state import check_state
from checkpoints.ways import ADAPTER_FILES
from common.claims import path_inside
from common.files import STATE_FILE, file_sha256, flush_to_disk, read_json, write_json
from common.messages import first_line
from common.values import is_count

CHECKSUM_FILE = "checksums.json"  # size and sha256 of every other file; written last
BEST_LINK = "best"  # in a run's folder: a link to the checkpoint with the lowest dev loss


def checkpoint_name(step: int | str) -> str:
    """What the checkpoint of a step is called in its run's folder."""
    return f"checkpoint-{step}"


def list_checkpoints(run_folder: Path | str) -> dict[str, Path]:
    """The checkpoints of a run that hold weights, by step: {"checkpoint-1000": path, …}."""
    found = {path.name: path for path in checkpoint_folders(run_folder) if (path / trained_file(path)).is_file()}
    return dict(sorted(found.items(), key=lambda item: step_of(item[1])))


def trained_file(checkpoint):
    """Name of the file that tells what a checkpoint holds: an adapter, the index of shards, or all of it."""
    names = (*ADAPTER_FILES, INDEX_FILES[1])
    return next((name for name in names if (Path(checkpoint) / name).is_file()), TENSORS_FILE)


def trained_files(checkpoint: Path | str) -> list[str]:
    """Names of all files with trained weights in a checkpoint folder."""
    name = trained_file(checkpoint)
    if name != INDEX_FILES[1]:
        return [name]
    return [name, *(file.name for file in weight_files(checkpoint))]


def point_to_best(run_folder: Path | str, step: int | None) -> str:
    """Make `best` in a run's folder a relative link to the checkpoint of `step`; None, or a step without one: no link.

    Replaced in one move: whoever reads it meets the old one or the new one. A folder of that name, as a copy with
    `cp -rL` makes of the link, is renamed. Returns a line that says so, or "".
    """
    link = Path(run_folder) / BEST_LINK
    target, said = checkpoint_name(step), ""
    if link.is_dir() and not link.is_symlink():
        aside = next(path for number in itertools.count(1) if not (path := link.with_name(f"best-{number}")).exists())
        link.rename(aside)
        said = f"{link} is a folder, where this run keeps a link to its best checkpoint: it is now called {aside.name}."
    if not (link.parent / target).is_dir():
        link.unlink(missing_ok=True)
        return said
    new = link.with_name(f".{BEST_LINK}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
    return said


def names_in(text: Path | str) -> list[Path | str]:
    """What `--ptuning_checkpoint` names: one place, or several with commas."""
    if "," not in str(text) or Path(text).exists():
        return [text]
    return [name.strip() for name in text.split(",") if name.strip()]


def find_checkpoints(path: Path | str, verified: bool = True) -> tuple[list[Path], list[str]]:
    """(the checkpoint folders that `--ptuning_checkpoint` means, what is wrong with others that were passed over).

    A checkpoint's folder is itself. A run's folder means its best checkpoint, or the last valid one where no best is
    known; `run/best` and `run/last` mean these, `run/all` every valid one, by step. Only the last gives several.
    Raises FileNotFoundError, with what the run has, where there is none such. Not `verified`: one of the run's, with
    none of its bytes read.
    """
    path = Path(path)
    run, wanted = path, None
    if (path / FINETUNING_FILE).is_file() and (path / trained_file(path)).is_file():
        return [path], []  # ChatGLM-Efficient-Tuning puts what its run ended with beside the checkpoints
    if path.name in ("last", "all") and (path / trained_file(path)).is_file():
        return [path], []  # a checkpoint that the user has called so
    if path.name in ("best", "last", "all") and not list_checkpoints(path):
        run, wanted = path.parent, path.name
    best = run / BEST_LINK
    if wanted in (None, "best") and (best / trained_file(best)).is_file():
        return [run / (run / BEST_LINK).resolve().name], []
    found = list_checkpoints(run)
    if wanted == "best" and found:
        raise FileNotFoundError(
            f"--ptuning_checkpoint {path}: no best checkpoint is known, for want of a dev loss in training. {run} has "
            f"{', '.join(found)}; {run}/last and {run}/all name the last and all."
        )
    if found and not verified:
        return list(found.values())[-1:], []
    if wanted == "all":
        faults = {folder: fault_in(folder, whole=False) for folder in found.values()}
        valid, damaged = [folder for folder in faults if not faults[folder]], list(filter(None, faults.values()))
    else:
        newest, damaged = newest_checkpoint(run, whole=False)
        valid = [newest] if newest else []
    if valid:
        return valid, damaged
    if wanted is None:
        return [path], []
    raise FileNotFoundError(" ".join([f"--ptuning_checkpoint {path}: {run} has no complete checkpoint.", *damaged]))


# What is said where a checkpoint lacks a file; {asked} is how the user named the checkpoint.
LACKS = {
    TENSORS_FILE: "--ptuning_checkpoint {asked}: there is no {file} in it. {beside}",
    VALUE_HEAD_FILE: "{flag} {asked} is no reward model: there is no {file} in it. Train one with --stage rm.",
    REFERENCE_FILE: "{asked} has no {file}, so --stage {stage} has not written it. Without --stage it is evaluated as one "
    "that was tuned on answers.",
    SIGNATURE_FILE: "{asked} has no {file}, which says what its training prompts look like, so it cannot be chosen "
    "automatically. Ask for it by its name, or make the file of its training rows: python ptuning/sign.py "
    "--ptuning_checkpoint {asked} --train_file …",
}


def check_holds(checkpoint: Path | str, file: str, asked: str | None = None, **words) -> Path:
    """The file of that name in a checkpoint's folder. FileNotFoundError in the words of LACKS where it is not there.

    `asked` is what the checkpoint is called instead of its folder, where a stranger may read it.
    """
    place = Path(checkpoint) / file
    if not place.is_file():
        said = {"asked": asked or checkpoint, "file": file, "beside": beside(Path(checkpoint)), **words}
        raise FileNotFoundError(LACKS[file].format(**said))
    return place


def beside(checkpoint):
    """One sentence on the checkpoints, or else the runs, that are where a checkpoint was looked for."""
    parent = checkpoint if checkpoint.is_dir() else checkpoint.parent
    others = list_checkpoints(parent)
    runs = sorted({found.parent.parent.name for found in parent.glob(f"*/checkpoint-*/{TENSORS_FILE}")})
    found = ", ".join(others) or ("the runs " + ", ".join(runs) if runs else "")
    return f"{parent} has {found}." if found else "Give a folder that training wrote."


def dev_loss_of(checkpoint: Path | str) -> float | None:
    """The dev loss that training measured when it saved the checkpoint, or None."""
    file = Path(checkpoint) / STATE_FILE
    if not file.is_file():
        return None
    state = check_state(read_json(file), file)
    losses = {entry["step"]: entry["eval_loss"] for entry in state.get("log_history") or [] if "eval_loss" in entry}
    return losses.get(state["global_step"])


# ---- written completely or not at all


def stage_checkpoint(folder: Path | str) -> Path:
    """An empty folder to write a checkpoint into; publish_checkpoint makes it `folder`."""
    staging = hidden(folder, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


@contextlib.contextmanager
def nothing_half_written(folder):
    """Around stage_checkpoint and publish_checkpoint: a failed write leaves nothing behind and says what there is."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        staging = hidden(folder, "partial")
        reason, free = describe_write_error(error, staging)
        shutil.rmtree(staging, ignore_errors=True)
        newest, _ = newest_checkpoint(staging.parent)
        raise OSError(
            f"{folder} could not be written ({reason}{free}). Nothing half written is left. "
            + (f"The newest complete checkpoint is {newest.name}" if newest else "There is no complete checkpoint yet")
            + ". Make room, or let the folder be written to, then run the same command with "
            "--resume_from_checkpoint last."
        ) from error


def describe_write_error(error, folder):
    """(the system's reason, the free space in words) for a write that failed in `folder`."""
    free = ""
    try:
        free = f", {shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
        if not isinstance(error, OSError):  # torch.save does not tell: ask again
            with open(folder / "probe", "wb") as probe:
                probe.write(bytes(1 << 20))
    except OSError as found:
        error = found
    return getattr(error, "strerror", None) or first_line(error), free


def publish_checkpoint(staging: Path, folder: Path | str) -> None:
    """Make a staged checkpoint `folder`, once all of it is on the disk. One of that name stays until then."""
    folder = Path(folder)
    checksums = {}
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        flush_to_disk(file)
        checksums[file.relative_to(staging).as_posix()] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(staging / CHECKSUM_FILE, checksums)
    flush_to_disk(staging / CHECKSUM_FILE)
    flush_to_disk(staging)
    replaced = hidden(folder, "replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    staging.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clear_leftovers(run_folder: Path | str) -> None:
    """Remove what a killed run left half written or half deleted. Not while a run is writing there."""
    for leftover in Path(run_folder).glob(".checkpoint-*"):
        name, _, kind = leftover.name[1:].partition(".")
        if kind == "replaced" and not leftover.with_name(name).exists():
            leftover.rename(leftover.with_name(name))
        elif kind in ("partial", "replaced", "deleted", "divided"):
            shutil.rmtree(leftover, ignore_errors=True)


def rotate_checkpoints(run_folder: Path | str, limit: int, newest: Path | str, best: Path | str | None = None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never `newest` or the best (`best`, or the link so named)."""
    kept = {Path(path).resolve() for path in (newest, best, Path(run_folder) / BEST_LINK) if path}
    folders = checkpoints_by_age(run_folder)
    surplus = len(folders) - limit
    for folder in [folder for folder in folders if folder.resolve() not in kept][: max(0, surplus)]:
        deleted = hidden(folder, "deleted")
        folder.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def verify_checkpoint(folder: Path | str, files: list[str] | None = None) -> None:
    """ValueError naming file and fault unless a checkpoint, or only `files` of it, is as it was written.

    Without checksums.json (official checkpoints, and those of earlier versions) it is taken as complete if it has
    `files`; by default the prefix, and a trainer_state.json that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    checksums = folder / CHECKSUM_FILE
    if checksums.is_file():
        try:
            expected = {name: (entry["size"], entry["sha256"]) for name, entry in read_json(checksums).items()}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder} is damaged: {CHECKSUM_FILE} cannot be read.") from error
        for name in expected if files is None else expected.keys() & set(files):
            size, sha256 = expected[name]
            file = path_inside(folder, name, checksums)
            if not file.is_file():
                raise ValueError(f"{folder} is damaged: {name} is missing.")
            if file.stat().st_size != size:
                found = file.stat().st_size
                raise ValueError(f"{folder} is damaged: {name} has {found} bytes, but {size} were written.")
            if file_sha256(file) != sha256:
                raise ValueError(f"{folder} is damaged: {name} is not what was written (its sha256 differs).")
        return
    for name in (trained_file(folder), STATE_FILE) if files is None else files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing.")
    if files is None:
        try:
            read_json(folder / STATE_FILE)
        except ValueError as error:
            raise ValueError(f"{folder} is incomplete: {STATE_FILE} cannot be read.") from error


def newest_checkpoint(run_folder: Path | str, whole: bool = True) -> tuple[Path | None, list[str]]:
    """(the checkpoint of a run that was written last, what is wrong with each newer one); None where none is valid.

    Valid means that verify_checkpoint finds nothing, or nothing in the trained weights if not `whole`. Steps do not
    tell the newest: checkpoints of an earlier, longer run may lie in the same folder.
    """
    damaged = []
    for folder in reversed(checkpoints_by_age(run_folder)):
        fault = fault_in(folder, whole)
        if not fault:
            return folder, damaged
        damaged.append(fault)
    return None, damaged


def fault_in(folder, whole):
    """What verify_checkpoint finds wrong with a checkpoint, or with its trained weights if not `whole`; "" for nothing."""
    try:
        verify_checkpoint(folder, None if whole else trained_files(folder))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def checkpoint_folders(run_folder: Path | str) -> list[Path]:
    """The checkpoint-N folders of a run, complete or not, in no order."""
    folders = Path(run_folder).glob("checkpoint-*")
    return [folder for folder in folders if folder.name.removeprefix("checkpoint-").isdecimal() and folder.is_dir()]


def checkpoints_by_age(run_folder):
    """The checkpoint folders of a run in the order in which they were written; last those that cannot tell."""
    return sorted(checkpoint_folders(run_folder), key=lambda folder: (save_number(folder), step_of(folder)))


def step_of(folder: Path) -> int:
    """The step of a folder that is named checkpoint-<step>."""
    return int(folder.name.removeprefix("checkpoint-"))


def save_number(folder):
    """How many checkpoints the run folder had seen when this one was written; 0 in older ones, infinity if unknown."""
    try:
        verify_checkpoint(folder, [SIDECAR_FILE])
        number = read_json(folder / SIDECAR_FILE)["training"]["save_number"]
    except ValueError:
        number = None
    except (OSError, KeyError, TypeError):
        return 0
    if is_count(number):
        return number
    return math.inf if (folder / CHECKSUM_FILE).is_file() else 0


def next_save_number(run_folder: Path | str) -> int:
    """The number, from 1 on, of the next checkpoint that a run folder gets: one more than its newest has."""
    numbers = [save_number(folder) for folder in checkpoint_folders(run_folder)]
    return 1 + max((number for number in numbers if number < math.inf), default=0)


def hidden(folder: Path | str, kind: str) -> Path:
    """.<name of the folder>.<kind> beside a folder; no checkpoint is looked for under such a name."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.{kind}")
