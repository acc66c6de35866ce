"""How a program ends when something is wrong: one message after `error:`, and an exit status.

The official scripts end in Python's traceback. Here what a user can cause (ValueError, OSError, a package that is
not installed) is one message and status 2. Anything else is a mistake of the program or of a library: one message,
status 1, and the traceback in a file of its own. `--debug`, or PTUNING_TRACEBACK=1, shows the traceback of either.
"""

import contextlib
import errno
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

MAX_LINES = 8  # of a message; those of libraries can be very long
MAX_COLUMNS = 500
# What to do about what the system refuses.
REMEDIES = {
    errno.EACCES: "Look with ls -l who may read or write there.",
    errno.EPERM: "Look with ls -l who may read or write there.",
    errno.EROFS: "Nothing can be written there; choose another folder.",
    errno.ENOSPC: "The disk is full (df -h): free some space or choose another folder.",
    errno.EDQUOT: "Your quota is used up: free some space or choose another folder.",
    errno.ENOTDIR: "A part of that path is a file, not a folder; choose another path.",
    errno.EEXIST: "A file is in the way; move it, or choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
}


def refuse(message):
    """What an argparse parser calls instead of printing a page of usage."""
    raise ValueError(f"{message[0].upper()}{message[1:]}. See python {sys.argv[0]} --help.")


def describe(error):
    """(message, exit status) for an exception; no traceback in it."""
    if isinstance(error, ImportError):
        return f"A package is missing or broken: {error}. Run: pip install -r requirements.txt", 2
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "This machine has not enough memory for that. Lower the batch size or the lengths.", 2
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}. {REMEDIES[error.errno]}", 2
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__, 2
    return f"{type(error).__name__}: {error}\nThis was not foreseen, please report it. {save_traceback()}", 1


def save_traceback():
    """Write the traceback of the exception at hand to a file that stays, and say where."""
    try:
        handle, file = tempfile.mkstemp(prefix="ptuning-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as opened:
            traceback.print_exc(file=opened)
    except OSError:
        return "Run it again with --debug for the traceback."
    return f"The traceback is in {file}; --debug shows it here."


def shorten(message):
    """At most MAX_LINES lines of MAX_COLUMNS characters."""
    lines = message.strip().splitlines()
    lines = lines[: MAX_LINES - 1] + ["…"] if len(lines) > MAX_LINES else lines
    return "\n".join(line if len(line) <= MAX_COLUMNS else line[:MAX_COLUMNS] + "…" for line in lines)


def flush():
    """Write out what was printed; nothing more can be done for a reader who has gone."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def exit_with(error):
    """Print one message and exit, also where every rank has met the same error. Called where `error` is handled."""
    if os.environ.get("PTUNING_TRACEBACK") or "--debug" in sys.argv:
        traceback.print_exc()
    message, status = describe(error)
    rank = int(os.environ.get("RANK", 0))
    status_file = os.environ.get("PTUNING_STATUS_FILE")  # set by train.sh and evaluate.sh, see common.sh
    if rank:
        time.sleep(3)  # rank 0 goes first; by then torchrun has ended this process, or the status is known
        if status_file and Path(status_file).read_text():
            os._exit(0)
    flush()
    print(f"error: {f'[rank {rank}] ' if rank else ''}{shorten(message)}", file=sys.stderr, flush=True)
    if status_file:
        Path(status_file).write_text(str(status))
    os._exit(0 if status_file and status == 2 else status)  # without waiting for other ranks


def run(main, *arguments):
    """main(*arguments) as a program: errors end it as this file says, Ctrl-C with status 130."""
    # Text that the terminal's encoding lacks (GBK has no ⟦) is shown as an escape instead of ending the program.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(*arguments)
    except KeyboardInterrupt:
        flush()
        print("Interrupted.", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as error:
        exit_with(error)
