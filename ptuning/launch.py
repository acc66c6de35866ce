"""torchrun, for train.sh, train_chat.sh and evaluate.sh: one process for each GPU, one message when one of them dies.

    python ptuning/launch.py --nproc-per-node=8 ptuning/main.py --do_train …

The words are torchrun's and so is the work. It differs in how a failure ends: torchrun prints a page of traceback of
its own below the message of the process that failed, and its exit status is always 1. Here the status is that of the
process, and only a death without words, such as that of a killed process, is put into words.

    python ptuning/launch.py ptuning/main.py --do_train …

Without words of torchrun's the program is one process, which needs no torchrun: it starts seconds sooner.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta

import psutil

from common.environment import before_joining, before_launch, before_torchrun
from common.failure import catch_signals, printable
from common.processes import keep_to_loopback, network_interface, warn_of_port

# What to do about a process that a signal ended, and that could therefore say nothing itself.
REMEDIES = {
    signal.SIGKILL: "The system does that when memory runs out (the end of `dmesg` tells): use fewer processes or a "
    "smaller batch.",
    signal.SIGBUS: "A file that was being read became shorter, or /dev/shm is full (df -h /dev/shm).",
    signal.SIGXCPU: "Its processor time is limited (ulimit -t).",
    **dict.fromkeys(
        (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS),
        "A library crashed in it: check that torch fits the GPU driver, then report it.",
    ),
}
FAILED = "a machine has failed"  # key in the store that the machines share


def describe_death(rank, exitcode):
    """One sentence for a process that ended without a message of its own, or None where it had one."""
    # main.py or Python itself has said why
    if exitcode in (1, 2) or exitcode - 128 in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        return None
    if exitcode > 0:
        return f"process {rank} ended with status {exitcode} and without a message."
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"process {rank} was ended by signal {-exitcode}."
    remedy = REMEDIES.get(number, "Somebody, or another program, has sent it that signal.")
    return f"process {rank} was ended by {number.name}. {remedy}"


def is_heard(name):
    """False for a signal that is ignored here: nohup ignores SIGHUP, a script's background job is deaf to Ctrl-C."""
    number = getattr(signal, name.strip(), None)
    return number is None or signal.getsignal(number) != signal.SIG_IGN


def run_alone(words):
    """Run a program as one process; the exit status."""
    arrived, process = [], None

    def hand_on(number, frame):
        arrived.append(number)
        if process:
            process.send_signal(number)

    catch_signals(hand_on)
    process = subprocess.Popen([sys.executable, *words])
    for number in arrived:  # before there was a process
        process.send_signal(number)
    status = process.wait()
    if -status in arrived:  # before the program could catch it, which says this
        print(f"Stopped by {signal.Signals(-status).name}.", file=sys.stderr)
    elif status and (message := describe_death(0, status)):
        print(f"error: {message}", file=sys.stderr)
    return status if status >= 0 else 128 - status


# ---- several machines


def connect(arguments):
    """Connect to the store that torchrun of machine 0 keeps for all; waits for it."""
    from torch.distributed import TCPStore

    patience = timedelta(minutes=15)  # torchrun's
    return TCPStore(arguments.master_addr, arguments.master_port, is_master=False, timeout=patience)


def keeps_store(arguments):
    """True where torchrun keeps its store at the address in its words; for another rendezvous it chooses the place."""
    return arguments.rdzv_backend == "static" and not arguments.rdzv_endpoint


def follow_other_machines(arguments, told):
    """In a thread: end this machine's processes and this program within seconds when another machine fails.

    torchrun leaves that to the processes; but they may wait for the lost ones for half an hour. `told` is set before.
    """
    try:
        store = connect(arguments)
        while not store.check([FAILED]):
            time.sleep(1)
        culprit = store.get(FAILED).decode(errors="replace")
        if not re.fullmatch(r"machine \d{1,6}", culprit):  # whoever reaches the port can write there
            culprit = "another machine"
    except RuntimeError:
        culprit = "machine 0"
        time.sleep(3)  # it may have ended as all do
    processes = psutil.Process().children()
    if not processes or culprit == f"machine {arguments.node_rank}":
        return
    told.set()
    print(f"error: {printable(culprit)} has failed; its own messages tell why.", file=sys.stderr, flush=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, processes = psutil.wait_procs(processes, timeout=5)
    os._exit(1)  # torchrun would wait for the machine that is lost


def prepare_several_machines(arguments, told):
    """Choose gloo's network, say who may reach the port, and watch the other machines in a thread."""
    arguments.master_port = arguments.master_port or 29500  # torchrun's
    # Gloo takes the interface that this machine's own name resolves to, which often is no other machine's business.
    interface = network_interface(arguments.master_addr)
    if interface:
        before_joining(interface, everywhere=True)
    if arguments.node_rank == 0:
        print(warn_of_port(arguments.master_port), flush=True)
    if keeps_store(arguments):
        threading.Thread(target=follow_other_machines, args=(arguments, told), daemon=True).start()


# ---- one machine


def run_on_this_machine(arguments):
    """Run torchrun so that neither it nor its processes listen where another machine could reach them."""
    from torch.distributed.run import run

    from common.local_rendezvous import use_local_rendezvous

    keep_to_loopback()
    with tempfile.TemporaryDirectory(prefix="ptuning-run-", ignore_cleanup_errors=True) as folder:  # this user's only
        use_local_rendezvous(arguments, folder)
        run(arguments)


def main(words):
    """Run torchrun with these words; the exit status."""
    if not words:
        print("error: Nothing to start. Give a program: python ptuning/launch.py ptuning/main.py …", file=sys.stderr)
        return 2
    before_launch()
    if not words[0].startswith("-"):
        return run_alone(words)
    catch_signals(lambda number, frame: sys.exit(128 + number))  # until torchrun does
    try:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run
    except ImportError as error:
        print(f"error: torch is not installed here ({error}). Run: pip install -r requirements.txt", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)  # torchrun's own; the processes are programs of their own
    before_torchrun()
    arguments = parse_args(words)
    arguments.signals_to_handle = ",".join(filter(is_heard, arguments.signals_to_handle.split(",")))
    several_machines = arguments.nnodes not in ("1", "1:1")
    told = threading.Event()  # that another machine has failed
    try:
        if several_machines:
            prepare_several_machines(arguments, told)
            run(arguments)
        else:
            run_on_this_machine(arguments)
    except ChildFailedError as error:
        if told.is_set():  # by what the thread has just done
            return 1
        if several_machines and arguments.node_rank > 0 and keeps_store(arguments):  # of machine 0 the others see it
            with contextlib.suppress(RuntimeError):
                connect(arguments).set(FAILED, f"machine {arguments.node_rank}")
        rank, failure = error.get_first_failure()
        message = describe_death(rank, failure.exitcode)
        if message:
            print(f"error: {message}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except (RuntimeError, ValueError, OSError) as error:  # before any process was started
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: torchrun could not start the processes: {printable(reason)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
