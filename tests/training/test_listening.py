"""Where the processes of a run listen: on one machine nowhere that another machine can reach."""

import contextlib
import ipaddress
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SAMPLE, TINY

from common.processes import STORE, keep_to_loopback, network_interface

pytestmark = pytest.mark.slow

LAUNCH = [sys.executable, str(ROOT / "ptuning" / "launch.py")]
FLAGS = (
    f"--do_train --train_file {SAMPLE}/train.json --validation_file {SAMPLE}/dev.json --max_eval_samples 8 "
    "--prompt_column content --response_column summary --eval_strategy steps --max_target_length 16 --max_steps 3 "
    "--preprocessing_num_workers 2 --dataloader_num_workers 1 --logging_steps 1 --disable_tqdm true --report_to all"
).split()
MAIN = [str(ROOT / "ptuning" / "main.py"), *FLAGS, "--model_name_or_path", TINY, "--pre_seq_len", "8"]
WARNING = "Warning: torchrun listens on every network interface here, and whoever reaches its port can run code as you."


def started(launcher, command):
    """The descendants of a process that run another `command`: for a moment a child is still a copy of it."""
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if process.cmdline() != command:
                yield process


def listening_sockets(processes):
    """{(address, port)} at which some processes listen now, over TCP or UDP."""
    found = set()
    for process in processes:
        try:
            for connection in process.net_connections(kind="inet"):
                waits = connection.type == socket.SOCK_DGRAM and not connection.raddr
                if waits or connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr[:2])
        except psutil.Error:  # it has ended meanwhile
            pass
    return found


def outside(places):
    """Those of `places` that are not of this machine only."""
    return [place for place in places if not ipaddress.ip_address(place[0].partition("%")[0]).is_loopback]


class Watched:
    """A run to its end: status, output, and everywhere that the launcher, or its descendants, ever listened."""

    def __init__(self, command, folder, **variables):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
        with open(folder / "output.txt", "w+") as output:
            running = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=output, cwd=ROOT, env={**environment, **variables}
            )
            launcher = psutil.Process(running.pid)
            own_command = launcher.cmdline()
            self.of_launcher, self.of_descendants = set(), set()
            until = time.monotonic() + 400
            while running.poll() is None:
                assert time.monotonic() < until
                self.of_launcher |= listening_sockets([launcher])
                self.of_descendants |= listening_sockets(started(launcher, own_command))
                time.sleep(0.05)
            output.seek(0)
            self.status, self.output = running.returncode, output.read()


def test_on_one_machine_nothing_listens_outside_loopback(tmp_path):
    words = ["--standalone", "--nproc-per-node=3", *MAIN, "--output_dir", tmp_path / "run"]
    run = Watched([*LAUNCH, *words], tmp_path)
    assert run.status == 0, run.output[-3000:]
    assert run.of_launcher and run.of_descendants
    assert outside(run.of_launcher | run.of_descendants) == []
    assert "Warning: " not in run.output


def test_train_sh_listens_on_loopback_whatever_the_users_variables_say(tmp_path):
    interfaces = [name for _, name in socket.if_nameindex() if psutil.net_if_addrs().get(name)]
    foreign = next((name for name in interfaces if name != network_interface("127.0.0.1")), "eth0")
    variables = {"MODEL": "tiny", "NUM_GPUS": "2", "BATCH_SIZE": "8", "SAVE_STEPS": "3"}
    variables |= {"GLOO_SOCKET_IFNAME": foreign, "NCCL_SOCKET_IFNAME": foreign, "MASTER_ADDR": socket.gethostname()}
    words = ["--max_steps", "3", "--output_dir", tmp_path / "run"]
    run = Watched(["bash", "train.sh", *words], tmp_path, **variables)
    assert run.status == 0, run.output[-3000:]
    assert run.of_launcher and outside(run.of_launcher | run.of_descendants) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--nproc-per-node=2"],
        ["--nnodes=1:1", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=29511"],
        ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=0.0.0.0"],
    ],
    ids=["no words on the meeting", "an address", "a meeting of torchrun's"],
)
def test_a_program_of_any_kind_finds_its_group_on_loopback(words, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time, torch.distributed as distributed\n"
        "distributed.init_process_group('gloo')\n"
        "distributed.barrier()\n"
        "time.sleep(1)\n"
        "rank, number = distributed.get_rank(), distributed.get_world_size()\n"
        "os.write(1, f'rank {rank} of {number}\\n'.encode())\n"  # in one piece: both write to one file
    )
    run = Watched([*LAUNCH, *words, program], tmp_path)
    assert run.status == 0 and sorted(run.output.splitlines()) == ["rank 0 of 2", "rank 1 of 2"], run.output
    assert run.of_launcher and run.of_descendants
    assert outside(run.of_launcher | run.of_descendants) == []


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--standalone", "--nproc-per-node=2"],
        "accelerate launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no".split(),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_under_a_foreign_launcher_our_processes_keep_to_loopback_and_warn_once_of_its_port(launcher, tmp_path):
    run = Watched([*launcher, *MAIN, "--output_dir", tmp_path / "run"], tmp_path)
    assert run.status == 0, run.output[-3000:]
    assert outside(run.of_launcher), "it is safe now: the warning can go"
    assert run.of_descendants and outside(run.of_descendants) == []
    assert run.output.count("Warning: ") == run.output.count(WARNING) == 1


def test_without_any_launcher_the_first_process_keeps_to_loopback(tmp_path):
    # As DeepSpeed's launcher starts processes: an address and numbers, no store.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    starter = tmp_path / "start.py"
    starter.write_text(
        "import os, subprocess, sys\n"
        "common = {**os.environ, 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_PORT': sys.argv[1]}\n"
        "ranks = [{**common, 'RANK': rank, 'LOCAL_RANK': rank} for rank in '01']\n"
        "started = [subprocess.Popen([sys.executable, *sys.argv[2:]], env=rank) for rank in ranks]\n"
        "sys.exit(max(process.wait() for process in started))\n"
    )
    command = [sys.executable, starter, port, *MAIN, "--output_dir", tmp_path / "run"]
    run = Watched(command, tmp_path, MASTER_ADDR=socket.gethostname())
    assert run.status == 0, run.output[-3000:]
    assert ("127.0.0.1", port) in run.of_descendants
    assert outside(run.of_descendants) == []


def test_a_port_that_is_taken_is_one_message(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        run = Watched(
            [sys.executable, *MAIN, "--output_dir", tmp_path / "run"], tmp_path, **variables, MASTER_PORT=str(port)
        )
    assert run.status == 2
    assert f"error: MASTER_PORT={port} of this machine cannot be used" in run.output and "Traceback" not in run.output


# ---- the private folder


PROGRAM = f"""
import os, signal, sys, time
folder = os.path.dirname(os.environ[{STORE!r}])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print(folder, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_private_folder_is_the_users_alone_and_gone_at_the_end(number, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [*LAUNCH, "--nproc-per-node=1", program, "1" if number is None else "100"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    folder = Path(running.stdout.readline().strip())
    mode = folder.stat()
    assert (stat.S_IMODE(mode.st_mode), mode.st_uid) == (0o700, os.getuid())
    if number is not None:
        running.send_signal(number)
    running.communicate(timeout=100)
    assert running.returncode == (0 if number is None else 128 + number)
    assert not folder.exists()


def test_nccl_is_given_the_very_name_of_the_loopback_interface(monkeypatch):
    # NCCL is not here to be asked: its own rule is that "lo" may also be lowpan0, and "=lo" is lo only.
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    keep_to_loopback()
    name = network_interface("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (name, f"={name}")
