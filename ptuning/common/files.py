"""Files of a run: read with a clear error, written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

from common.claims import MOST_JSON_BYTES, MOST_LOG_BYTES, check_size
from common.text import parse_json

# In the folder of a run; the first also in each checkpoint.
STATE_FILE = "trainer_state.json"  # the Trainer's: step, log
RESULTS_FILE = "all_results.json"
ANSWERS_FILE = "generated_predictions.txt"
LOG_FILE = "trainer_log.jsonl"  # a line for each loss and phase, as a run goes on


def read_json(file: Path | str, damaged="Copy or download it again.", other="") -> dict:
    """The JSON object in `file`, of bounded size. FileNotFoundError and ValueError name the file.

    `damaged` is said of what is no JSON, `other` of JSON that is no object.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; is {file.parent} the folder you meant?")
    check_size(file, MOST_LOG_BYTES if file.name == STATE_FILE else MOST_JSON_BYTES)
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). {damaged}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {other or f'a {type(value).__name__}, expected an object of settings.'}")
    return value


def write_bytes(file: Path | str, data: bytes) -> None:
    """Write a file completely or not at all: what it held before stays until the new content is there.

    OSError names the file, which the system does not where a disk is full.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(file: Path | str, text: str) -> None:
    """Write a text in UTF-8, completely or not at all. OSError names the file."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file: Path | str, value) -> None:
    """Write a value as JSON in UTF-8, its keys in order, completely or not at all."""
    write_text(file, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def flush_to_disk(path: Path | str) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network disks answer for a folder
            raise
    finally:
        os.close(handle)


def file_sha256(file: Path | str) -> str:
    """SHA-256 of a file's content, in hexadecimal; a MiB at a time. hashlib.file_digest is newer than Python 3.10."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
