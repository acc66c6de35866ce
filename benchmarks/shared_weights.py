"""How much memory several processes on one machine need for one model: they read the same memory-mapped files.

    PYTHONPATH=ptuning python -m benchmarks.shared_weights

Writes a folder of random weights in the official layout, starts processes that load it at the same time and then read
every weight, and adds up their proportional set sizes (Pss of /proc/<pid>/smaps_rollup: a page that n processes share
counts 1/n in each). What they have before loading, the libraries, is subtracted.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.weight_names import ROTARY_TENSOR
from checkpoint import load_model
from checkpoints.weight_files import read_tensors, weight_files

ROOT = Path(__file__).resolve().parents[1]
CONFIG = json.loads((ROOT / "ptuning" / "tiny" / "config.json").read_text())
SIZE = {"hidden_size": 512, "ffn_hidden_size": 1368, "num_layers": 16, "padded_vocab_size": 65024}


def write_folder(folder, dtype, **size):
    """Write config and weights, random and in one file of the official name. Returns the bytes of the weights."""
    settings = {**CONFIG, "num_attention_heads": 8, "kv_channels": 64, **size, "torch_dtype": str(dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**settings, pre_seq_len=None))
    weights = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in model.state_dict().items()}
    weights[ROTARY_TENSOR] = torch.ones(settings["kv_channels"] // 4, dtype=dtype)
    torch.save(weights, folder / "pytorch_model.bin")
    return (folder / "pytorch_model.bin").stat().st_size


# ---- what each process does: say it is ready, wait for a line, load, say so, wait for a line


def work(folder, way):
    print("ready", flush=True)
    sys.stdin.readline()
    if way == "load":
        model = load_model(folder)
        read = sum(float(parameter.detach().sum()) for parameter in model.parameters())
    else:  # as a process that loads to a GPU does on the host: one tensor after the other is copied away
        read = 0.0
        for file in weight_files(folder):
            for _, tensor in read_tensors(file):
                read += float(tensor.clone().sum())
    print("loaded", read, flush=True)
    sys.stdin.readline()


# ---- measuring


def proportional_bytes(processes):
    """Sum of the proportional set sizes of the processes."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def measure(folder, num_processes, way="load", watch_peak=True):
    """(bytes after loading, bytes at the peak) of so many processes together, without what they had before.

    Watching the peak slows the loading: the system walks through all pages for each look.
    """
    command = [sys.executable, "-m", "benchmarks.shared_weights", "--work", str(folder), "--way", way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning")}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(num_processes)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        before = peak = proportional_bytes(processes)
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            while not has_loaded(process):
                peak = max(peak, proportional_bytes(processes)) if watch_peak else peak
        after = proportional_bytes(processes)
        return after - before, max(peak, after) - before
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def has_loaded(process):
    """Whether a process has said so; waits 20 ms for it."""
    ready, _, _ = select.select([process.stdout], [], [], 0.02)
    return bool(ready) and process.stdout.readline().startswith("loaded")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help="what the processes are called with")
    parser.add_argument("--way", default="load")
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.way)
    print(time.strftime("%d %B %Y"), "MB, sums over all processes; n copies would be n times the file")
    print("| weights in the file | loaded | file | processes | after loading | peak |\n|---|---|---|---|---|---|")
    for dtype, way, goal in (
        (torch.float32, "load", "float32 on a CPU"),
        (torch.float16, "load", "float32 on a CPU"),
        (torch.float16, "copy", "to a device, tensor by tensor"),
    ):
        folder = Path(tempfile.mkdtemp())
        try:
            size = write_folder(folder, dtype, **SIZE)
            for num_processes in (1, 2, 4):
                after, peak = measure(folder, num_processes, way)
                figures = f"{size / 1e6:,.0f} | {num_processes} | {after / 1e6:,.0f} | {peak / 1e6:,.0f}"
                print(f"| {str(dtype)[6:]} | {goal} | {figures} |", flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
