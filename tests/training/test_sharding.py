"""Full finetuning with weights and optimizer divided over two processes, which talk through gloo on a CPU.

accelerate divides with FSDP on GPUs only, so the code below tells it that these CPUs are some other accelerator.
DeepSpeed runs on a CPU as it is, where it is installed (not by requirements.txt: it needs the installed torch to build):
    pip install --no-build-isolation deepspeed && python -m pytest tests/training/test_sharding.py
"""

import importlib.util
import json

import pytest
import torch
from conftest import ROOT, SAMPLE, TINY, relative_difference
from support.ranks import Ranks

from checkpoint import load_model

pytestmark = pytest.mark.slow

# accelerate takes these CPUs for some other accelerator.
PRETEND = """
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
honest = PartialState.__init__
def pretend(self, *args, **kwargs):
    honest(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and "--fsdp" in sys.argv:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_SDAA
PartialState.__init__ = pretend
if "--deepspeed" in sys.argv:  # its kernel for sums in shared memory takes minutes to compile; gloo does the same
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the package's own name of it is torch itself
"""
ENGINES = {
    "fsdp": ["--fsdp", "full_shard auto_wrap"],
    "zero2": ["--deepspeed", ROOT / "ptuning" / "deepspeed.json"],
    "zero3": ["--deepspeed", ROOT / "ptuning" / "deepspeed_zero3.json"],
}
LAST, RESUMED = "checkpoint-4", "checkpoint-2"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    modules = ["deepspeed"] if importlib.util.find_spec("deepspeed") else []
    ranks = Ranks(tmp_path_factory.mktemp("logs") / "log", *modules, DS_ACCELERATOR="cpu")
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def train(ranks):
    """4 steps of 4 rows, checkpoints 2 and 4, dev loss at both: (exit statuses, output)."""

    def train(folder, processes, engine, *words, before=PRETEND):
        settings = [
            *("--do_train", "--train_file", SAMPLE / "train.json", "--validation_file", SAMPLE / "dev.json"),
            *("--prompt_column", "content", "--response_column", "summary", "--model_name_or_path", TINY),
            *("--max_train_samples", 40, "--max_eval_samples", 8, "--eval_strategy", "steps", "--eval_steps", 2),
            *("--max_source_length", 64, "--max_target_length", 32, "--per_device_eval_batch_size", 4),
            *("--per_device_train_batch_size", 4 // processes, "--max_steps", 4, "--save_steps", 2),
            *("--logging_steps", 1, "--learning_rate", 1e-3, "--finetuning_type", "full", "--report_to", "none"),
            *("--disable_tqdm", "true", "--output_dir", folder / "run", *ENGINES.get(engine, []), *words),
        ]
        return ranks.run(settings, before, processes, launched=True)

    return train


@pytest.fixture(scope="module")
def trained(train):
    """The folder of such a run, which must end well."""

    def trained(folder, processes, engine, *words):
        statuses, output = train(folder, processes, engine, *words)
        assert statuses == [0] * processes, output[-3000:]
        return folder / "run"

    return trained


def losses(run):
    """[(step, training loss or dev loss)]"""
    log = json.loads((run / LAST / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in log]


def weights(checkpoint):
    return load_model(checkpoint).state_dict()


@pytest.fixture(scope="module")
def single(trained, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("single"), 1, None)


@pytest.fixture(scope="module", params=ENGINES)
def sharded(request, trained, tmp_path_factory):
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
def test_a_resumed_run_ends_as_the_uninterrupted_one_on_any_number_of_processes(sharded, trained, tmp_path, processes):
    engine, run = sharded
    resumed = trained(tmp_path, processes, engine, "--resume_from_checkpoint", run / RESUMED)
    expected, actual = weights(run / LAST), weights(resumed / LAST)
    for name, tensor in expected.items():
        if processes == 2:
            assert torch.equal(actual[name], tensor), name
        else:
            assert relative_difference(actual[name], tensor) < 1e-4, name
    assert sorted(path.name for path in resumed.iterdir() if path.name.startswith(".")) == [".lock"]


def test_an_optimizer_is_resumed_the_way_it_was_written(sharded, train, tmp_path):
    engine, run = sharded
    statuses, output = train(tmp_path, 1, None, "--resume_from_checkpoint", run / RESUMED)
    name = "fsdp" if engine == "fsdp" else "deepspeed"
    assert statuses == [2]
    assert f"was written with --{name}, and its optimizer is continued the same way only." in output


def test_fsdp_is_refused_where_accelerate_would_train_whole_copies(train, tmp_path):
    statuses, output = train(tmp_path, 2, "fsdp", before="")
    assert 2 in statuses and set(statuses) <= {1, 2}  # 1: of one that sees the other gone before it says the same
    assert "--fsdp shards on GPUs only" in output
    assert not (tmp_path / "run").exists()
