"""What is measured once on a machine and kept in the user's cache, so that all runs on it decide alike."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from common.files import write_text


def kept_or_measured(name: str, key: str, measure: Callable[[], object], is_whole: Callable[[object], bool]):
    """What the file `name`.json keeps under `key`, if `is_whole` says that it can be; else measure(), kept from now on.

    Processes that start together measure once. Where nothing can be kept, each measures for itself.
    """
    file = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chatglm2-ptuning" / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=10):
            kept = read_kept(file)
            if not is_whole(kept.get(key)):
                kept[key] = measure()
                write_text(file, json.dumps(kept, indent=1))
            return kept[key]
    except (OSError, RuntimeError):  # also a home that is not known
        return measure()


def read_kept(file: Path) -> dict:
    """What is kept in `file`: {} where it is missing or damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def processor_name() -> str:
    """The processor's name, as Linux has it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
