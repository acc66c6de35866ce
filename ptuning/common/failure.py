"""How a program ends when something is wrong: one message after `error:`, and an exit status.

The official scripts end in Python's traceback. Here what a user can cause (ValueError, OSError, a package that is
not installed) is one message and status 2. Anything else is a mistake of the program or of a library: one message,
status 1, and the traceback in a file of its own. `--debug`, or PTUNING_TRACEBACK=1, shows the traceback of either.
"""

import contextlib
import ctypes
import errno
import functools
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from itertools import pairwise

from common.environment import LAUNCHED
from common.messages import first_line
from common.script_words import in_words_typed

MAX_LINES = 8  # of a message; those of libraries can be very long
MAX_COLUMNS = 500
# What steers a terminal: C0 and C1 without line end and tab, what turns the order of text, and halves of characters.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What to do about what the system refuses.
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Look with ls -l who may read or write there."),
    errno.EROFS: "Nothing can be written there; choose another folder.",
    errno.ENOSPC: "The disk is full (df -h): free some space or choose another folder.",
    errno.EDQUOT: "Your quota is used up: free some space or choose another folder.",
    errno.ENOTDIR: "A part of that path is a file, not a folder; choose another path.",
    errno.EEXIST: "A file is in the way; move it, or choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
}


class WrongFlags(ValueError):
    """A mistake in flags; its two arguments are what is wrong, and where the flags are listed."""

    def __str__(self):
        return " ".join(self.args)


def refuse(message: str) -> None:
    """Raise WrongFlags with a message of argparse, which would print a page of usage: set as a parser's `error`."""
    raise WrongFlags(f"{message[0].upper()}{message[1:]}.", f"See python {sys.argv[0]} --help.")


# How libraries that are no Python say that the system gives them no memory, or no addresses.
NO_MEMORY = (
    *("DefaultCPUAllocator", "failed to map segment", "annot allocate memory", "can't start new thread"),
    *("std::bad_alloc", "unable to mmap"),
)


def lacks_memory(error):
    """True where the system has refused memory to this program, or a package could not be loaded for want of it."""
    said = not isinstance(error, ValueError) and any(text in str(error) for text in NO_MEMORY)
    return isinstance(error, MemoryError) or said


def describe(error):
    """(message, exit status) for an exception; no traceback in it."""
    if is_lost_connection(error):  # none of the process at hand, so without its traceback
        said = str(error).strip().splitlines()[0]
        late = re.search("time(d )?out", said, re.IGNORECASE)
        what = "does not answer, and --ddp_timeout has passed" if late else "is gone"
        return f"Another process {what}; the messages of its machine tell why. Seen here: {said}", 1
    if lacks_memory(error):
        detail = f" ({error})" if str(error) else ""
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        remedy = "Lower the batch size or the lengths, or take a smaller model, such as --quantization_bit 4 or --bf16 makes."
        if limit != resource.RLIM_INFINITY:
            remedy = f"The shell allows {limit / 1e9:.1f} GB of addresses; lift that limit: ulimit -v unlimited."
        return f"This machine has not enough memory{detail}. {remedy}", 2
    loop = re.match("Symlink loop from (.*)", str(error)) if isinstance(error, RuntimeError) else None  # pathlib's
    if loop or (isinstance(error, OSError) and error.errno == errno.ELOOP):
        place = loop[1].strip("'\"") if loop else error.filename
        return f"{place}: a symbolic link there leads back to itself. Look with ls -l, and choose another path.", 2
    if isinstance(error, ImportError):
        return f"A package is missing or broken: {error}. Run: pip install -r requirements.txt", 2
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        message = str(error)
        if not message.startswith("Out of memory"):  # not that of training/memory.py, which knows the batch
            message = f"{message.partition(' See documentation')[0]} Lower the batch size or the lengths."
        return message, 2
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}. {REMEDIES[error.errno]}", 2
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__, 2
    return f"{type(error).__name__}: {error}\nThis was not foreseen, please report it. {save_traceback(error)}", 1


def reason_of(error: BaseException) -> str:
    """One sentence that says what the system refused and what to do, or what else an exception says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}. {REMEDIES.get(error.errno, '')}".strip()
    return f"{first_line(error).rstrip('.')}."


@contextlib.contextmanager
def going_on_without(what, say):
    """Around the writing of something that no run depends on: an OSError is said, and the program goes on."""
    try:
        yield
    except OSError as error:
        say(f"{what} could not be written: {reason_of(error)} The program goes on without it.")


def save_traceback(error):
    """Write the traceback of an exception to a file that stays, and say where."""
    try:
        handle, file = tempfile.mkstemp(prefix="ptuning-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8") as opened:
            opened.write(printable("".join(traceback.format_exception(error))))
    except OSError:
        return "Run it again with --debug for the traceback."
    return f"The traceback is in {file}; --debug shows it here."


def wants_traceback():
    """True where PTUNING_TRACEBACK or --debug asks for it; --debug with a value is transformers'."""
    return bool(os.environ.get("PTUNING_TRACEBACK")) or any(
        word == "--debug" and following.startswith("--") for word, following in pairwise([*sys.argv, "--"])
    )


def printable(text: str) -> str:
    """Text of others with what steers a terminal as escapes, such as \\x1b; line ends and tabs stay."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


@functools.cache
def print_escapes(stream):
    """From now on show whatever is printed to `stream` as `printable` does."""
    write = stream.write
    stream.write = lambda text: write(printable(text))


class PrintableRecord(logging.LogRecord):
    """A line of a log, as `printable` shows it."""

    def getMessage(self):
        return printable(super().getMessage())


@functools.cache
def warn_in_escapes():
    """From now on show warnings and log lines as `printable` does.

    What else libraries write to stderr, such as progress bars, holds no text of others and needs its \\r.
    """
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *words, **named: printable(formatted(*words, **named))
    logging.setLogRecordFactory(PrintableRecord)


def shorten(message):
    """At most MAX_LINES lines of MAX_COLUMNS characters; control characters of quoted input as escapes."""
    lines = printable(message).strip().split("\n")
    lines = lines[: MAX_LINES - 1] + ["…"] if len(lines) > MAX_LINES else lines
    return "\n".join(line if len(line) <= MAX_COLUMNS else line[:MAX_COLUMNS] + "…" for line in lines)


def flush():
    """Write out what was printed; nothing more can be done for a reader who has gone."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()


signal_at_hand = 0  # that this process has been told to stop by, and is about to


def is_lost_connection(error):
    """True for an error by which a process learns that another one has died."""
    distributed = any(cls.__name__ == "DistError" for cls in type(error).__mro__)  # torch need not be loaded here
    return distributed or (isinstance(error, RuntimeError) and "gloo" in str(error))


def wait_for_others(error):
    """Let the process go first that has to say why; torchrun ends this one meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if is_lost_connection(error):
        if signal_at_hand:  # torchrun is stopping what is left of the job
            os._exit(128 + signal_at_hand)
        time.sleep(5)
    elif os.environ.get("RANK", "0") != "0":  # every process may have met the same error
        time.sleep(3)


last_words = []  # functions of the message with which a program ends, called before it is printed


def speak_last_words(message):
    """Let a run log why it ends. Whatever goes wrong with that is less than what the message says."""
    while last_words:
        with contextlib.suppress(Exception):
            last_words.pop()(message)


def end_with(kind, error, trace):
    """The end of a program by an exception: its message on stderr and its status, see describe(); a sys.excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        speak_last_words("Interrupted.")
        flush()
        print("Interrupted.", file=sys.__stderr__, flush=True)
        os._exit(130)
    wait_for_others(error)
    sys.stderr = sys.__stderr__  # torch.distributed calls sys.excepthook with another one, which is never shown
    if wants_traceback():
        print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    message, status = describe(error)
    message = in_words_typed(message)
    speak_last_words(f"error: {message.splitlines()[0]}")
    rank = os.environ.get("RANK", "0")
    flush()
    with contextlib.suppress(OSError):  # a log on a full disk
        print(f"error: {f'[rank {rank}] ' if rank != '0' else ''}{shorten(message)}", file=sys.stderr, flush=True)
    os._exit(status)  # without waiting for other processes, and without tearing the process group down


def leave(status: int, message: str) -> None:
    """End at once, with a message that is no error. For signal handlers too, which may have interrupted a print."""
    speak_last_words(message)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with contextlib.suppress(RuntimeError):
            flush()
        with contextlib.suppress(OSError):  # a log on a full disk
            os.write(2, f"{printable(message)}\n".encode())
    os._exit(status)


def catch_signals(handler) -> dict:
    """Give SIGINT, SIGTERM and SIGHUP to `handler`, except those the parent (nohup) ignores. Returns the old ones."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}


def end_with_launcher() -> None:
    """Let SIGTERM come when the process that launched this one dies, also by kill -9: nobody else would end it.

    Training then saves and ends. A program that was started by hand outlives its shell as ever.
    """
    if LAUNCHED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def leave_on_signal(number: int, frame) -> None:
    """End the program on a signal, outside of training, where there is nothing to save; a signal handler."""
    leave(128 + number, f"Stopped by {signal.Signals(number).name}.")


def run(main, *arguments):
    """main(*arguments) as a program: errors end it as this file says, Ctrl-C with status 130."""
    # Text that the terminal's encoding lacks (GBK has no ⟦) is shown as an escape instead of ending the program.
    sys.stdout.reconfigure(errors="backslashreplace")
    print_escapes(sys.stdout)
    warn_in_escapes()
    sys.excepthook = end_with  # for what happens after this call, such as imports that fail
    try:
        main(*arguments)
    except (Exception, KeyboardInterrupt) as error:  # not left to the hook: torch.distributed puts its own before it
        end_with(type(error), error, None)
