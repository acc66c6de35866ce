"""train.sh and main.py with several processes on a CPU, which talk through gloo. On GPUs the same code talks
through NCCL; that cannot be seen here."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from conftest import ROOT, SAMPLE, TINY
from support.over_http import free_port
from support.runs import losses, predictions
from support.shell import bash

from checkpoint import load_model, read_config
from common.processes import STORE

pytestmark = pytest.mark.slow

INSIDE = ROOT / "tests" / "support" / "inside"  # records rows, or breaks a process
# 4 steps of 16 rows, from 42 rows: an epoch ends in the middle of a batch. Then 10 dev rows and 7 answers.
WORDS = (
    "--prefix_dropout 0 --max_train_samples 42 --logging_steps 1 --preprocessing_num_workers 1 --disable_tqdm true "
    f"--report_to none --output_dir run --do_predict --test_file {SAMPLE}/dev.json --max_predict_samples 7 "
    "--do_sample false"
)
VARIABLES = {
    "MODEL": TINY,
    "DATA": SAMPLE,
    "PRE_SEQ_LEN": 8,
    "MAX_STEPS": 4,
    "SAVE_STEPS": 4,
    "DEV_ROWS": 10,
    "EVAL_BATCH_SIZE": 4,
    "MAX_TARGET_LENGTH": 16,
    "QUANTIZATION_BIT": "",
    "OMP_NUM_THREADS": 1,
    "PYTHONPATH": INSIDE,
}


def cut(processes):
    """A step of 16 rows on so many processes."""
    return {"NUM_GPUS": processes, "BATCH_SIZE": 8 // processes, "ACCUMULATION": 2}


class Run:
    """What a run left: `folder` has rank-N/ and rows-N.json of every process, `output` is what it printed."""

    def __init__(self, folder, processes, output):
        self.folder, self.processes, self.output = folder, processes, output
        self.run_folder = folder / "rank-0" / "run"
        shares = [json.loads((folder / f"rows-{rank}.json").read_text()) for rank in range(processes)]
        self.rows = [sorted(sum(step, [])) for step in zip(*shares, strict=True)]

    def read(self, name):
        return json.loads((self.run_folder / name).read_text())


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def many(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("many"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1)


def train(folder, processes):
    done = bash(f"bash train.sh {WORDS}", **VARIABLES, **cut(processes), RECORD=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder, processes, done.stdout)


def test_every_step_sees_the_rows_that_one_process_sees(one, many):
    assert len(one.rows) == 4 and all(len(set(rows)) == len(rows) for rows in one.rows)
    assert many.rows == one.rows


def test_the_loss_is_that_of_one_process(one, many):
    assert f"x {many.processes} processes = 16 rows a step" in many.output
    assert f"2 accumulated batches are computed at once, {16 // many.processes} rows" in many.output
    assert len(losses(one.run_folder)) == 4
    assert losses(many.run_folder) == pytest.approx(losses(one.run_folder), rel=1e-4)


def test_the_speed_counts_the_rows_of_all_processes_and_no_blank_ones(one, many):
    for run in (one, many):
        results = run.read("train_results.json")
        fed = results["train_samples_per_second"] * results["train_runtime"]
        assert fed == pytest.approx(sum(map(len, run.rows)), rel=1e-3) and sum(map(len, run.rows)) == 58
        assert results["epoch"] == pytest.approx(4 / 3, rel=0.05)


def test_the_dev_loss_is_that_of_one_process(one, many):
    curves = [
        [entry["eval_loss"] for entry in run.read("trainer_state.json")["log_history"] if "eval_loss" in entry]
        for run in (one, many)
    ]
    assert len(curves[0]) == 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_only_the_first_process_writes_and_talks(many):
    written = [
        sorted(path.name for path in (many.folder / f"rank-{rank}").rglob("*")) for rank in range(1, many.processes)
    ]
    assert written == [[]] * (many.processes - 1)
    assert many.output.count("rows read") == many.output.count("predict_bleu-4") == 1


def test_predictions_are_those_of_one_process_in_the_order_of_the_file(one, many):
    assert [line["row"] for line in predictions(one.run_folder)] == [1, 2, 3, 4, 5, 6, 7]
    assert predictions(many.run_folder) == predictions(one.run_folder)


def test_metrics_are_those_of_one_process(one, many):
    def scores(run):
        times = ("_runtime", "_per_second")
        return {key: value for key, value in run.read("predict_results.json").items() if not key.endswith(times)}

    assert scores(one)["predict_samples"] == 7 and "predict_bleu-4" in scores(one)
    assert scores(many) == scores(one)


# ---- two machines


def namespaces_allowed():
    """Whether this system lets us make a network namespace; the answer costs one."""
    name = f"ptuning-probe-{os.getpid()}"
    try:
        allowed = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
        return allowed and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


NETWORK = "two network namespaces" if namespaces_allowed() else "two agents on loopback"


@contextlib.contextmanager
def network():
    """(what to put before a command of machine 0, of machine 1, address and port of machine 0)."""
    if NETWORK == "two agents on loopback":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield "", "", "127.0.0.1", port
        return
    names = [f"ptuning-{os.getpid()}-{machine}" for machine in (0, 1)]
    ends = [f"pt{os.getpid()}-{machine}" for machine in (0, 1)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        words = f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"
        subprocess.run(words.split(), check=True)
        for machine in (0, 1):
            for words in (
                f"addr add 10.77.0.{machine + 1}/24 dev {ends[machine]}",
                f"link set {ends[machine]} up",
                "link set lo up",
            ):
                subprocess.run(["ip", "-n", names[machine], *words.split()], check=True)
        yield f"ip netns exec {names[0]}", f"ip netns exec {names[1]}", "10.77.0.1", 29500
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def train_on_two_machines(folder, **more):
    """[(exit status, output) of machine 0, of machine 1], with one process each."""
    with network() as (*prefixes, address, port), contextlib.ExitStack() as stack:
        variables = {**os.environ, "WANDB_MODE": "disabled", **VARIABLES, **cut(2), "NUM_GPUS": 1, "RECORD": folder}
        variables |= {"NNODES": 2, "MASTER_ADDR": address, "MASTER_PORT": port, **more}
        machines = [
            stack.enter_context(
                subprocess.Popen(
                    ["timeout", "300", *prefix.split(), "bash", "train.sh", *WORDS.split()],
                    cwd=ROOT,
                    env={key: str(value) for key, value in {**variables, "NODE_RANK": machine}.items()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for machine, prefix in enumerate(prefixes)
        ]
        with ThreadPoolExecutor() as pool:
            outputs = list(pool.map(lambda machine: machine.communicate()[0], machines))
        return [(machine.returncode, output) for machine, output in zip(machines, outputs, strict=True)]


@pytest.mark.parametrize("network", [NETWORK])
def test_two_machines_train_like_one_process_and_the_first_writes(network, one, tmp_path):
    (status, output), (other_status, other_output) = train_on_two_machines(tmp_path)
    assert (status, other_status) == (0, 0), output[-3000:] + other_output[-3000:]
    assert output.count("Warning: whoever reaches port") == (output + other_output).count("Warning: ") == 1
    both = Run(tmp_path, 2, output)
    assert both.rows == one.rows
    assert losses(both.run_folder) == pytest.approx(losses(one.run_folder), rel=1e-4)
    assert predictions(both.run_folder) == predictions(one.run_folder)
    assert not list((tmp_path / "rank-1").iterdir())


# The one that is left waits, and notices nothing by itself.
HALF_DEAD = "if RANK == '{}': os._exit(7)\nelse: import time; time.sleep(1000)"


@pytest.mark.parametrize("network", [NETWORK])
@pytest.mark.parametrize("dead", [0, 1])
def test_a_machine_that_fails_ends_the_others(network, dead, tmp_path):
    machines = train_on_two_machines(tmp_path, BREAK=HALF_DEAD.format(dead))
    (status, output), (other_status, other_output) = machines[dead], machines[1 - dead]
    assert (status, other_status) == (7, 1), output[-3000:] + other_output[-3000:]
    assert f"error: process {dead} ended with status 7 and without a message." in output
    assert f"error: machine {dead} has failed; its own messages tell why." in other_output


# ---- a process that dies


def broken(command, code, **more):
    """(exit status, output lines from the first error on) of a run whose process 1 runs `code` before step 3."""
    environment = {**VARIABLES, **cut(2), "MAX_STEPS": 100_000, "BREAK": f"if RANK == '1': {code}", **more}
    done = bash(f"timeout 300 {command} 2>&1", **environment)  # far less than 100,000 steps take
    match = re.search(r"^error: .*", done.stdout, re.DOTALL | re.MULTILINE)
    assert match and "Traceback" not in done.stdout[: match.start()], done.stdout[-3000:]
    return done.returncode, match[0].splitlines()


DEATHS = {
    "an exception": ("raise RuntimeError('broken wire')", 1, "error: [rank 1] RuntimeError: broken wire"),
    "killed": ("os.kill(os.getpid(), 9)", 137, "error: process 1 was ended by SIGKILL. The system does that when"),
    "gone": ("os._exit(7)", 7, "error: process 1 ended with status 7 and without a message."),
}


@pytest.mark.parametrize(("code", "status", "message"), DEATHS.values(), ids=DEATHS.keys())
def test_a_process_that_dies_ends_the_job_with_its_own_error(code, status, message, tmp_path):
    returncode, lines = broken(f"bash train.sh {WORDS}", code, RECORD=tmp_path)
    assert returncode == status
    assert lines[0].startswith(message)
    assert len(lines) <= 2


def test_a_process_that_hangs_ends_the_job_after_ddp_timeout(tmp_path):
    began = time.monotonic()
    status, lines = broken(
        f"bash train.sh {WORDS} --ddp_timeout 25", "import time; time.sleep(100_000)", RECORD=tmp_path
    )
    assert status == 1
    assert lines[0].startswith("error: Another process does not answer, and --ddp_timeout has passed; ")
    assert time.monotonic() - began < 280  # half an hour without it; `broken` would have ended it at 300


def test_a_process_that_never_comes_is_waited_for_no_longer_than_ddp_timeout(tmp_path):
    # Joining is said by the process that waits: of two, only this one is started.
    words = f"--do_predict --test_file {SAMPLE}/dev.json --prompt_column content --response_column summary"
    words += f" --model_name_or_path {TINY} --output_dir {tmp_path} --ddp_timeout 5"
    for store in (None, str(tmp_path / "store")):
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        done = bash(f"python ptuning/main.py {words}", **variables, **({STORE: store} if store else {}), timeout=200)
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert said.startswith("error: Another process does not answer, and --ddp_timeout has passed; "), said
        assert said.endswith("Seen here: timeout: not every process has come within 5 seconds")


def test_accelerate_launch_gives_the_losses_of_torchrun(tmp_path):
    settings = f"--do_train --train_file {SAMPLE}/train.json --prompt_column content --response_column summary "
    settings += f"--model_name_or_path {TINY} --finetuning_type lora --max_steps 3 --per_device_train_batch_size 4 "
    settings += f"--max_train_samples 42 --logging_steps 1 --disable_tqdm true --report_to none --output_dir {tmp_path}"
    launchers = {
        "torchrun": "torchrun --standalone --nproc-per-node=2",
        "accelerate": "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision bf16 "
        f"--dynamo_backend no --main_process_port {free_port()}",
    }
    for name, launcher in launchers.items():
        done = bash(f"{launcher} ptuning/main.py {settings}/{name}", OMP_NUM_THREADS=1)
        assert done.returncode == 0 and "x 2 processes = 8 rows a step" in done.stdout, done.stderr[-3000:]
    assert len(losses(tmp_path / "torchrun")) == 3
    assert losses(tmp_path / "accelerate") == losses(tmp_path / "torchrun")


def test_under_plain_torchrun_the_error_of_the_process_that_died_comes_first(tmp_path):
    settings = f"--do_train --train_file {SAMPLE}/train.json --prompt_column content --response_column summary"
    settings += f" --model_name_or_path {TINY} --pre_seq_len 8 --max_steps 100000 --max_target_length 16"
    command = f"torchrun --standalone --nproc-per-node=2 ptuning/main.py {settings} {WORDS}"
    returncode, lines = broken(command, "raise RuntimeError('broken wire')", RECORD=tmp_path)
    assert returncode == 1
    assert lines[0] == "error: [rank 1] RuntimeError: broken wire"
    assert not any("Another process is gone" in line for line in lines)


@pytest.mark.parametrize("words", [[], ["--standalone", "--nproc-per-node=2"]], ids=["1 process", "2 processes"])
def test_processes_whose_launcher_is_killed_save_and_end(words, tmp_path):
    settings = f"--do_train --train_file {SAMPLE}/train.json --prompt_column content --response_column summary"
    settings += f" --model_name_or_path {TINY} --pre_seq_len 8 --max_steps 100000 --max_target_length 16"
    settings += f" --logging_steps 1 --report_to none --save_steps 100000 --output_dir {tmp_path}/run"
    command = [sys.executable, ROOT / "ptuning" / "launch.py", *words, ROOT / "ptuning" / "main.py", *settings.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(tmp_path / "output.txt", "w+") as output:
        launcher = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
        until = time.monotonic() + 120
        try:
            while "  loss " not in (printed := (tmp_path / "output.txt").read_text()):
                assert time.monotonic() < until and launcher.poll() is None, printed[-2000:]
                time.sleep(0.2)
            processes = psutil.Process(launcher.pid).children(recursive=True)
        finally:
            launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert processes and not alive
    assert list((tmp_path / "run").glob("checkpoint-*/pytorch_model.bin"))


# ---- what processes share, and what they send each other


def test_four_processes_hold_one_copy_of_weights_that_need_no_conversion(tmp_path):
    from benchmarks.shared_weights import measure, write_folder

    size = write_folder(
        tmp_path, torch.float32, hidden_size=256, ffn_hidden_size=684, num_layers=8, padded_vocab_size=65024
    )
    after, _ = measure(tmp_path, 4, watch_peak=False)
    assert 0.9 * size < after < 1.3 * size


def test_processes_send_each_other_the_gradient_of_the_prefix_and_nothing_else(tmp_path):
    from trainer import PrefixTrainer
    from training.arguments import PrefixTrainingArguments

    model = load_model(TINY, config=read_config(TINY, pre_seq_len=8)).train()
    PrefixTrainer(model=model, args=PrefixTrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        sent = []

        def count(state, bucket):
            sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, count)
        ids = torch.arange(16)[None]
        parallel(input_ids=ids, labels=ids).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    prefix = model.transformer.prefix_encoder.embedding.weight
    assert sum(sent) == prefix.numel() * 4
    assert parallel.modules_buffers == []
