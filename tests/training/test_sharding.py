"""Full finetuning with weights and optimizer divided over two processes, which talk through gloo on a CPU.

accelerate divides with FSDP on GPUs only, so the program below tells it that these CPUs are some other accelerator.
DeepSpeed runs on a CPU as it is, where it is installed (not by requirements.txt: it needs the installed torch to build):
    pip install --no-build-isolation deepspeed && python -m pytest tests/training/test_sharding.py
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE, TINY, relative_difference

from checkpoint import load_model

pytestmark = pytest.mark.slow

PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "ptuning")!r})
from accelerate import PartialState
from accelerate.utils import DistributedType
honest = PartialState.__init__
def pretend(self, *args, **kwargs):
    honest(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and "--fsdp" in sys.argv:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_SDAA
PartialState.__init__ = pretend
if "--deepspeed" in sys.argv:  # its kernel for sums in shared memory takes minutes to compile; gloo does the same
    import deepspeed
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the package's own name of it is torch itself
sys.argv[0] = {str(ROOT / "ptuning" / "main.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ENGINES = {
    "fsdp": ["--fsdp", "full_shard auto_wrap"],
    "zero2": ["--deepspeed", ROOT / "ptuning" / "deepspeed.json"],
    "zero3": ["--deepspeed", ROOT / "ptuning" / "deepspeed_zero3.json"],
}
LAST, RESUMED = "checkpoint-4", "checkpoint-2"


def train(folder, processes, engine, *words, program=PROGRAM):
    """4 steps of 4 rows, checkpoints 2 and 4, dev loss at both; the finished program."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(program)
    settings = [
        *("--do_train", "--train_file", SAMPLE / "train.json", "--validation_file", SAMPLE / "dev.json"),
        *("--prompt_column", "content", "--response_column", "summary", "--model_name_or_path", TINY),
        *("--max_train_samples", 40, "--max_eval_samples", 8, "--eval_strategy", "steps", "--eval_steps", 2),
        *("--max_source_length", 64, "--max_target_length", 32, "--per_device_eval_batch_size", 4),
        *("--per_device_train_batch_size", 4 // processes, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1),
        *("--learning_rate", 1e-3, "--finetuning_type", "full", "--report_to", "none", "--disable_tqdm", "true"),
        *("--output_dir", folder / "run", *ENGINES.get(engine, []), *words),
    ]
    command = [sys.executable, ROOT / "ptuning" / "launch.py", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [str(word) for word in (*command, folder / "program.py", *settings)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )


def trained(folder, processes, engine, *words):
    done = train(folder, processes, engine, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "run"


def losses(run):
    """[(step, training loss or dev loss)]"""
    log = json.loads((run / LAST / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in log]


def weights(checkpoint):
    return load_model(checkpoint).state_dict()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("single"), 1, None)


@pytest.fixture(scope="module", params=ENGINES)
def sharded(request, tmp_path_factory):
    """(engine, run on two processes)"""
    if request.param != "fsdp" and not importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed: pip install --no-build-isolation deepspeed")
    return request.param, trained(tmp_path_factory.mktemp(request.param), 2, request.param)


def test_an_engine_gives_the_losses_and_weights_of_one_process(single, sharded):
    _, run = sharded
    assert len(losses(run)) == 6
    for (step, loss), (expected_step, expected) in zip(losses(run), losses(single), strict=True):
        assert step == expected_step and loss == pytest.approx(expected, rel=1e-5)
    ours = weights(run / LAST)
    assert all(relative_difference(ours[name], tensor) < 1e-3 for name, tensor in weights(single / LAST).items())


def test_the_gradient_is_clipped_alike(single, sharded):
    _, run = sharded
    norms = [
        [
            entry["grad_norm"]
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "grad_norm" in entry
        ]
        for folder in (run, single)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[0]) > 1  # max_grad_norm


@pytest.mark.parametrize("processes", [2, 1])
def test_a_resumed_run_ends_as_the_uninterrupted_one_on_any_number_of_processes(sharded, tmp_path, processes):
    engine, run = sharded
    resumed = trained(tmp_path, processes, engine, "--resume_from_checkpoint", run / RESUMED)
    expected, actual = weights(run / LAST), weights(resumed / LAST)
    for name, tensor in expected.items():
        if processes == 2:
            assert torch.equal(actual[name], tensor), name
        else:
            assert relative_difference(actual[name], tensor) < 1e-4, name
    assert sorted(path.name for path in resumed.iterdir() if path.name.startswith(".")) == [".lock"]


def test_an_optimizer_is_resumed_the_way_it_was_written(sharded, tmp_path):
    engine, run = sharded
    done = train(tmp_path, 1, None, "--resume_from_checkpoint", run / RESUMED)
    name = "fsdp" if engine == "fsdp" else "deepspeed"
    assert done.returncode == 2
    assert f"was written with --{name}, and its optimizer is continued the same way only." in done.stderr


def test_fsdp_is_refused_where_accelerate_would_train_whole_copies(tmp_path):
    done = train(tmp_path, 2, "fsdp", program=PROGRAM.replace("MULTI_SDAA", "MULTI_CPU"))
    assert done.returncode == 2
    assert "--fsdp shards on GPUs only" in done.stderr
    assert not (tmp_path / "run").exists()
