"""torchrun, for train.sh, train_chat.sh and evaluate.sh: one process for each GPU, one message when one of them dies.

    python ptuning/launch.py --standalone --nproc-per-node=8 ptuning/main.py --do_train …

The words are torchrun's and so is the work. It differs in how a failure ends: torchrun prints a page of traceback of
its own below the message of the process that failed, and its exit status is always 1. Here the status is that of the
process, and only a death without words, such as that of a killed process, is put into words.

    python ptuning/launch.py ptuning/main.py --do_train …

Without words of torchrun's the program is one process, which needs no torchrun: it starts seconds sooner.
"""

import logging
import os
import signal
import subprocess
import sys

from failure import catch_signals

# What to do about a process that a signal ended, and that could therefore say nothing itself.
REMEDIES = {
    signal.SIGKILL: "The system does that when memory runs out (the end of `dmesg` tells): use fewer processes or a "
    "smaller batch.",
    signal.SIGBUS: "A file that was being read became shorter, or /dev/shm is full (df -h /dev/shm).",
}
# How main.py ends when a signal stops it.
STOPPED = [128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]
CRASHED = "A library crashed in it: check that torch fits the GPU driver, then report it."


def describe_death(rank, exitcode):
    """One sentence for a process that ended without a message of its own, or None where it had one."""
    if exitcode in (1, 2) or exitcode in STOPPED:  # main.py or Python itself has said why
        return None
    if exitcode > 0:
        return f"process {rank} ended with status {exitcode} and without a message."
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"process {rank} was ended by signal {-exitcode}."
    return f"process {rank} was ended by {number.name}. {REMEDIES.get(number, CRASHED)}"


def run_alone(words):
    """Run a program as one process; the exit status."""
    process = subprocess.Popen([sys.executable, *words])
    catch_signals(lambda number, frame: process.send_signal(number))
    status = process.wait()
    message = describe_death(0, status) if status else None
    if message:
        print(f"error: {message}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def main(words):
    """Run torchrun with these words; the exit status."""
    if not words[0].startswith("-"):
        return run_alone(words)
    try:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run
    except ImportError as error:
        print(f"error: torch is not installed here ({error}). Run: pip install -r requirements.txt", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)  # torchrun's own; the processes are programs of their own
    # Seconds that the processes have to finish a step and save it after Ctrl-C or SIGTERM.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    try:
        run(parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = describe_death(rank, failure.exitcode)
        if message:
            print(f"error: {message}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except (RuntimeError, ValueError, OSError) as error:  # before any process was started
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: torchrun could not start the processes: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
