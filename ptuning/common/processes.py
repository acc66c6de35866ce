"""How the processes of one run find and reach each other, so that nobody else can.

torch listens on every network interface and asks nobody for a password, on a single machine too. torchrun unpickles
what comes to its port: whoever reaches it runs code as the user who trains. So on one machine everything keeps to the
loopback interface, and main.py's processes find each other through a file that nobody else may read (launch.py). On
several machines the ports are needed, and it is said who may reach them.
"""

import os
import socket
from datetime import timedelta

import psutil

from common.environment import LAUNCHED, STORE, before_joining

LOOPBACK = "127.0.0.1"


def network_interface(address: str) -> str | None:
    """Name of the network interface that leads to `address`, IPv4, or None; it may be an address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return None
        own_address = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own_address in [each.address for each in found]), None)


def keep_to_loopback() -> None:
    """Let gloo and NCCL of this process and its children listen on this machine only, whatever the user's settings."""
    interface = network_interface(LOOPBACK)
    if interface:
        before_joining(interface)


def listen_on_loopback(port, timeout=timedelta(minutes=30)):
    """torch's store of keys, open to this machine only; `port` 0 is any. OSError where the port is taken."""
    from torch.distributed import TCPStore

    with socket.create_server((LOOPBACK, port), backlog=1024) as server:
        port = server.getsockname()[1]
        return TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            master_listen_fd=server.detach(),  # its own socket would listen everywhere
            timeout=timeout,
            wait_for_workers=False,
        )


def on_one_machine():
    """True where all processes of this run are on this machine, as far as the launcher's variables say it."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is None:  # of a launcher that is not torchrun
        return os.environ.get("MASTER_ADDR") in (LOOPBACK, "localhost", "::1")
    return local == os.environ.get("WORLD_SIZE")


def open_store(timeout):
    """The store in which the processes of one machine find each other; None where the launcher keeps one for them."""
    from torch.distributed import FileStore, TCPStore

    if STORE in os.environ:
        return FileStore(os.environ[STORE])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] != "0":
        return TCPStore(LOOPBACK, port, is_master=False, timeout=timeout)
    try:
        return listen_on_loopback(port, timeout)
    except OSError as error:
        raise OSError(f"MASTER_PORT={port} of this machine cannot be used ({error}). Give another.") from error


def join_processes(*, cpu: bool, backend: str | None, timeout: int) -> list[str]:
    """Join the other processes that a launcher has started, if it has; what is to be said about its ports, in a list.

    Everything that the processes do together waits at most `timeout` seconds. transformers would join them too, but
    on a CPU without that limit. `backend` is gloo, nccl, …; None is the device's own.
    """
    from accelerate import PartialState
    from torch.distributed import DistStoreError

    settings = {"timeout": timedelta(seconds=timeout)}
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if launched and on_one_machine():
        keep_to_loopback()
        store = open_store(settings["timeout"])
        if store is not None:
            settings.update(store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    try:
        PartialState(cpu=cpu, backend=backend, **settings)
    except RuntimeError as error:
        if "timeout" not in str(error).lower():
            raise
        raise DistStoreError(f"timeout: not every process has come within {timeout} seconds") from error
    return describe_ports()


def describe_ports():
    """A list with one line on the ports of a launcher that is not launch.py, where others may reach them."""
    if LAUNCHED in os.environ or "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    if on_one_machine():
        return [
            "Warning: torchrun listens on every network interface here, and whoever reaches its port can run code as "
            "you. Write `python ptuning/launch.py` in its place: it takes the same words and listens on this machine "
            "only."
        ]
    return [warn_of_port(os.environ.get("MASTER_PORT"))]


def warn_of_port(port: int | str | None) -> str:
    """The line about the port of several machines."""
    return (
        f"Warning: whoever reaches port {port} of machine 0 (MASTER_PORT) can run code as you. Let only the machines of "
        "this run reach it."
    )


def check_port(name: str, port: int) -> None:
    """ValueError where nothing can listen on an address, before minutes go into loading a model."""
    try:
        family, _, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Nothing can listen on {name}:{port} ({reason}). If another program has that port, choose another one, "
            f"such as {port + 1}."
        ) from error
