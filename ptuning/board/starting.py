"""Processes of the page: started in a session of their own, found again by what is on disk, and stopped as Ctrl-C would.

The page holds no run: a process writes to a file, its id and the time of its start are in web.json, and so a page that
was started anew, or another one, knows it as well. An id alone is not enough, because the system gives it to another
process later.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from board.commands import Command, script_variables
from board.files import PROJECT
from common.failure import printable
from common.files import read_json, write_json
from common.values import is_count

KINDS = ("train", "evaluate", "export")
CHECK_SECONDS = 300
MOST_PRINTED_BYTES = 2**16
MOST_AT_ONCE = 4  # processes that the page starts
LOCK_FILE = ".lock"  # of training/resume.py: which process writes to a run's folder
BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


def record_file(folder: Path, kind: str) -> Path:
    """Where a process of a run is remembered."""
    return folder / ("web.json" if kind == "train" else f"web-{kind}.json")


def log_file(folder: Path, kind: str) -> Path:
    """Where a process of a run writes what it prints."""
    return record_file(folder, kind).with_suffix(".log")


def read_record(folder: Path, kind: str = "train") -> dict:
    """What is remembered of a run's process; {} where there is none, or it is no record."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = read_json(record_file(folder, kind))
        if isinstance(record.get("command"), str) and isinstance(record.get("variables", {}), dict):
            return record
    return {}


# ---- which process


def started_at(pid: int) -> int:
    """When a process was started, in the system's ticks since it was booted; 0 where it does not run."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])


def boot_id() -> str:
    """A text that changes when the system is booted anew, with which the ticks begin again."""
    with contextlib.suppress(OSError):
        return BOOT_FILE.read_text(encoding="ascii").strip()
    return ""


def is_alive(record: dict) -> bool:
    """True where the very process that a record remembers still runs."""
    pid = record.get("pid")
    if not is_count(pid, 1) or record.get("boot") != boot_id():
        return False
    return started_at(pid) == record.get("started_ticks") != 0


def writing_process(folder: Path) -> int:
    """The id of the process that writes to a run's folder, by its lock; 0 where none does.

    The lock itself is not tried, which could turn a run away that begins just now. A process that was started after the
    lock was written is another one that got the same id.
    """
    lock = folder / LOCK_FILE
    try:
        with open(lock, encoding="utf-8", errors="replace") as file:
            found = re.match(rf"process (\d{{1,9}}) on {re.escape(os.uname().nodename)}, ", file.read(300))
            written = os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0
    pid = int(found[1]) if found else 0
    ticks = started_at(pid) if pid else 0
    if not ticks:
        return 0
    begun = boot_time() + ticks / os.sysconf("SC_CLK_TCK")
    holds = any(os.path.realpath(link) == os.path.realpath(lock) for link in open_files(pid))
    return pid if begun <= written + 2 and holds else 0


def boot_time():
    """When the system was booted, in seconds since 1970."""
    found = re.search(r"^btime (\d+)", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) if found else 0


def open_files(pid):
    """The files that a process of this user holds open."""
    with contextlib.suppress(OSError):
        return [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    return []


# ---- starting and stopping


def environment_for(command: Command) -> dict[str, str]:
    """What a process gets: the page's environment without what would change the command unseen, and its variables."""
    hidden = script_variables()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith(("PTUNING_", "GRADIO_"))
    }
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return {**kept, **command.variables}


def argv_of(command: Command) -> list[str]:
    """The words that start a command, with the Python that runs this page."""
    program, *more = command.program
    return [sys.executable if program == "python" else program, *more, *command.words]


def begin(command: Command, printed, **how) -> subprocess.Popen:
    """The process of a command, in a session of its own; what it prints goes to `printed`. OSError."""
    return subprocess.Popen(
        argv_of(command),
        cwd=PROJECT,
        env=environment_for(command),
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **how,
    )


class Starter:
    """Starts processes, a few at once, and takes note of how they end where they do before the page does."""

    def __init__(self, output: Path):
        self.output = output
        self.children = []  # [(subprocess.Popen, folder, kind)]: nobody else can ask how they ended
        self.lock = threading.Lock()

    def start(self, folder: Path, kind: str, command: Command) -> dict:
        """Start a command for the run in `folder`, and return its record. ValueError where that cannot be, OSError."""
        with self.lock:
            self.reap()
            if is_alive(read_record(folder, kind)) or (kind == "train" and writing_process(folder)):
                raise ValueError(f"{folder.name} is running already. Stop it first, or choose another name.")
            running = sum(is_alive(read_record(place, each)) for place in runs_in(self.output) for each in KINDS)
            if running >= MOST_AT_ONCE:
                raise ValueError(
                    f"{running} processes of this page are running, and {MOST_AT_ONCE} may. Wait for one, or stop it."
                )
            folder.mkdir(parents=True, exist_ok=True)
            record = {
                "kind": kind,
                "command": command.text,
                "program": command.program,
                "variables": command.variables,
                "words": command.words,
                "time": time.time(),
            }
            write_json(record_file(folder, kind), record)  # on a full disk nothing is started
            with open(log_file(folder, kind), "ab") as log:
                record["log_from"] = log.tell()
                log.write(f"$ {command.text}\n".encode())
                log.flush()
                process = begin(command, log)
            record |= {"pid": process.pid, "started_ticks": started_at(process.pid), "boot": boot_id()}
            try:
                write_json(record_file(folder, kind), record)
            except OSError:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
                raise
            self.children.append((process, folder, kind))
            return record

    def reap(self):
        """Ask the children that have ended for their status, and write it to their records."""
        for child in list(self.children):
            process, folder, kind = child
            if process.poll() is not None:
                self.children.remove(child)
                record = read_record(folder, kind)
                if record.get("pid") == process.pid:
                    with contextlib.suppress(OSError):
                        write_json(record_file(folder, kind), {**record, "status": process.returncode})

    def adopt(self, folder: Path) -> dict:
        """Remember the process that was started elsewhere and writes to a run's folder. ValueError where there is none."""
        pid = writing_process(folder)
        if not pid:
            raise ValueError(f"No process of this user on this machine writes to {folder.name}.")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        record = {
            "kind": "train",
            "command": Command(words).text,
            "program": words,
            "variables": {},
            "words": [],
            "time": time.time(),
            "adopted": True,
            "pid": pid,
            "started_ticks": started_at(pid),
            "boot": boot_id(),
        }
        write_json(record_file(folder, "train"), record)
        return record


def output_of(command: Command) -> str:
    """All that a short command prints, without what steers a terminal. ValueError where it takes too long."""
    process = begin(command, subprocess.PIPE)
    try:
        printed, _ = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise ValueError(
            f"That took more than {CHECK_SECONDS} seconds, and was ended: type it in a terminal."
        ) from None
    return printable(printed[-MOST_PRINTED_BYTES:].decode("utf-8", errors="replace"))


def stop(folder: Path, kind: str) -> None:
    """Tell a process to end as Ctrl-C does: training finishes its step and saves. ValueError where it does not run.

    The whole session gets the signal, so that no process stays behind on a GPU; of an adopted run its own process, whose
    session is that of somebody's terminal. SIGTERM, because a page in the background may be deaf to SIGINT, and its
    children then are.
    """
    record = read_record(folder, kind)
    if not is_alive(record):
        raise ValueError(f"{folder.name} is not running.")
    if record.get("adopted"):
        os.kill(record["pid"], signal.SIGTERM)
    else:
        os.killpg(record["pid"], signal.SIGTERM)


def runs_in(output: Path) -> list[Path]:
    """The folders of runs in output/, the newest first. Links are not followed."""
    try:
        entries = [entry for entry in os.scandir(output) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    entries = [entry for entry in entries if entry.name[0] not in "._"]
    return [Path(entry.path) for entry in sorted(entries, key=lambda entry: -entry.stat().st_mtime)]
