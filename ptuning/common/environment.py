"""Every environment variable that the programs set, one function for each moment at which they do.

Answers to nothing in the official scripts, whose users set them by hand. A library reads some of these variables once,
when it is imported, and a child process gets those that are there when it starts. A value that the user has set stays,
except where a docstring here says otherwise.
"""

import os

LAUNCHED = "PTUNING_LAUNCHED"  # in what launch.py starts
STORE = "PTUNING_STORE"  # a file through which the processes of one machine find each other
# For glibc's malloc: keep what a step frees for the next one, up to 1 GiB. By default it goes back to the system, which
# hands it out again as pages of 4 kB filled with zeros: on a CPU a tenth of a training step (50,000 pages, see
# benchmarks/RESULTS.md). Larger pieces than 32 MiB go back in any case.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}

# ---- before the libraries load


def before_launch() -> None:
    """Set what every process has that launch.py starts. glibc reads its two variables when a process starts."""
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    os.environ[LAUNCHED] = "1"
    os.environ.pop(STORE, None)  # of a run that has started this one


def before_torchrun() -> None:
    """Give the processes 120 seconds after Ctrl-C or SIGTERM to finish a step and save it."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")


def set_by_flags(tensorboard_folder: str | None = None, traceback: bool | None = None) -> None:
    """Pass on --logging_dir and --debug, whose values count more than the user's variables; None leaves a variable."""
    if tensorboard_folder is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = tensorboard_folder
    if traceback is not None:
        os.environ["PTUNING_TRACEBACK"] = "1" if traceback else ""


def before_wandb(output_dir: str, logged_in: bool) -> None:
    """Let wandb write into the run's folder, and offline where no account is set, so that it asks nobody for one."""
    os.environ.setdefault("WANDB_DIR", output_dir)
    os.environ.setdefault("WANDB_PROJECT", "chatglm2-ptuning")
    if "WANDB_MODE" not in os.environ and not logged_in:
        os.environ["WANDB_MODE"] = "offline"
        os.environ.setdefault("WANDB_SILENT", "true")  # nobody asked for its page of text


def pinned_matmul() -> str:
    """The library that the user's PTUNING_MATMUL names for products on a CPU, "" for what is faster. ValueError else."""
    name = os.environ.get("PTUNING_MATMUL", "")
    if name not in ("", "mkl", "onednn"):
        raise ValueError(f"PTUNING_MATMUL={name}: expected mkl or onednn. Leave it out for what is faster here.")
    return name


# ---- when processes are joined


def before_joining(interface: str, everywhere: bool = False) -> None:
    """Choose the network interface of a run's processes, by its name.

    With `everywhere`, for a run on several machines, gloo prefers it unless the user's setting says otherwise. Else
    gloo and NCCL of this process and its children use no other, whatever the user's settings.
    """
    if everywhere:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        return
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # =: of this very name; NCCL takes a beginning otherwise


def before_round(store_file: str) -> None:
    """Tell the processes that torchrun starts next the file through which they find each other."""
    os.environ[STORE] = store_file


# ---- before a server listens


def before_serving() -> str:
    """The addresses whose X-Forwarded-For is believed, as FORWARDED_ALLOW_IPS says; none without it.

    uvicorn, which believes this machine without that variable, reads it too.
    """
    return os.environ.setdefault("FORWARDED_ALLOW_IPS", "")


def before_page() -> list[str]:
    """Keep proxies out of connections to this machine: gradio asks its own page once. Names of the proxies found.

    This machine's names are added to the user's list of exceptions.
    """
    from urllib.request import getproxies_environment

    proxies = [f"{kind}_proxy" for kind in ("http", "https", "all") if kind in getproxies_environment()]
    for name in ("no_proxy", "NO_PROXY") if proxies else ():
        hosts = os.environ.get(name, "")
        os.environ[name] = ",".join(filter(None, (hosts, "localhost,127.0.0.1")))
    return proxies


def before_uploads(folder: str) -> None:
    """Let gradio put what browsers send into a folder beside the place where it is kept: moving it there copies nothing."""
    os.environ["GRADIO_TEMP_DIR"] = folder
