"""The cache of rows that were read or encoded once, used only while it is whole.

Answers to nothing in the official scripts, which a damaged cache blocks until the user finds and removes it. Every
entry is a folder of its own in the cache, with a list of its files and their checksums. A power cut or a full disk
leaves files that are empty, cut or full of zeros, and `datasets` looks at none of that.
"""

import hashlib
import json
import shutil
from pathlib import Path

from common.failure import going_on_without
from common.files import file_sha256, write_text
from common.messages import silent

FOLDER = "chatglm2-ptuning"  # in the cache of datasets
LIST_FILE = "files.json"  # of an entry, written last


def folder_of(key: str) -> Path:
    """Where the entry that `key` names is."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE, FOLDER, hashlib.sha256(key.encode()).hexdigest()[:32])


def cached(key: str, build, *, what: str, overwrite: bool = False, say=silent):
    """build(folder): a dataset that `datasets` keeps in that folder, or finds there; `key` names the entry.

    A damaged entry is removed and built again, which `say` gets one line about; `what` says what that does. An
    unfinished one, or any with `overwrite`, is built again without a word. One process at a time builds.
    """
    from filelock import FileLock

    folder = folder_of(key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        finished, damage = inspect_entry(folder)
        if damage:
            say(f"The cache {folder} is damaged ({damage}): {what} again.")
        if finished and not damage and not overwrite:
            return build(folder)
        remove_entry(folder)
        folder.mkdir()
        dataset = build(folder)
        write_text(folder / LIST_FILE, json.dumps(checksums_of(folder)))
    return dataset


def checksums_of(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files that `datasets` has written into a folder."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".arrow", ".json") and file.name != LIST_FILE and file.is_file():
            found[file.relative_to(folder).as_posix()] = file_sha256(file)
    return found


def inspect_entry(folder: Path) -> tuple[bool, str]:
    """(whether the entry was finished, what is damaged in it or "")."""
    try:
        expected = json.loads((folder / LIST_FILE).read_bytes())
        if not isinstance(expected, dict):
            raise ValueError
    except FileNotFoundError:
        return False, ""
    except (ValueError, NotADirectoryError, IsADirectoryError):
        return True, f"{LIST_FILE} cannot be read"
    found = checksums_of(folder)
    for name, checksum in expected.items():
        if name not in found:
            return True, f"{Path(name).name} is missing"
        if found[name] != checksum:
            return True, f"{Path(name).name} is not as it was written"
    return True, ""


def remove_entry(folder: Path) -> None:
    """Remove an entry; of a link only the link."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


# ---- values

VALUE_FILE = "value.json"  # of an entry that keep() has written


def find_kept(key: str, say=silent):
    """The value that keep() was given under `key`, None where there is none that is whole."""
    folder = folder_of(key)
    finished, damage = inspect_entry(folder)
    if damage:
        say(f"The cache {folder} is damaged ({damage}): it is made again.")
    return json.loads((folder / VALUE_FILE).read_bytes()) if finished and not damage else None


def keep(key: str, value, say=silent) -> None:
    """Keep a value of JSON under `key` for later runs. A disk that is full is said, and no error."""
    from filelock import FileLock

    folder = folder_of(key)
    with going_on_without(folder, say):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            remove_entry(folder)
            folder.mkdir()
            write_text(folder / VALUE_FILE, json.dumps(value))
            write_text(folder / LIST_FILE, json.dumps(checksums_of(folder)))
