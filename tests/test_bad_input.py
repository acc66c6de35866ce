"""Bad environments and variables of scripts, and how many bad inputs there are in all.

The tables are in the files test_bad_*.py of the rooms. They say what is wrong, how it is made, and what the message
must contain. Programs run as forks of a process that has everything imported (support/forked.py); a few start as a
user starts them. What support/fuzz.py found is at the ends of the tables.
"""

import ast
import os
import re
import subprocess

import pytest
from conftest import ROOT
from support.refusals import assert_refused, here, refuse, table, train_flags, trained  # noqa: F401, fixtures

# ---------------------------------------------------------------------- environments

WANDB = {"report_to": "wandb"}
# What is wrong, variables, what the message says[, flags].
ENVIRONMENTS = [
    (
        "a WANDB_MODE that does not exist",
        {"WANDB_MODE": "sometimes"},
        "WANDB_MODE=sometimes: expected one of online",
        WANDB,
    ),
    (
        "wandb online without an account",
        {"WANDB_MODE": "online", "HOME": "/nowhere"},
        "WANDB_MODE=online needs an",
        WANDB,
    ),
    (
        "TensorBoard into a file",
        {"TENSORBOARD_LOGGING_DIR": "train.json"},
        "train.json is a file",
        {"report_to": "tensorboard"},
    ),
    ("processes without an address", {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ("processes that are not counted", {"RANK": "0", "WORLD_SIZE": "two"}, "'two'"),
]


@table(ENVIRONMENTS)
def test_an_environment_is_refused(case, forks, here):
    environment, says, *more = case
    refuse(forks, here, train_flags(here, **(more[0] if more else {})), says, environment=environment)


def test_an_output_folder_that_may_not_be_written_is_refused(forks, trained, here):
    (here / "locked").mkdir()
    (here / "locked").chmod(0o500)
    words = train_flags(here, output_dir=here / "locked" / "run")
    refuse(forks, here, words, ("locked/run: Permission denied", "ls -l"), as_root=False)


# As a user starts them: the command, what it is given, what the message says.
PROCESSES = [
    ("an empty batch", "bash train.sh", {"BATCH_SIZE": "0"}, "BATCH_SIZE=0: expected"),
    ("processes of text", "bash train.sh", {"NUM_GPUS": "some"}, "NUM_GPUS=some"),
    ("a run that is not there", "bash evaluate.sh", {"CHECKPOINT": "no-such-run", "STEP": "99"}, "there is no run output/no-such-run"),
    ("a port of text", "python ptuning/web_demo.py --model_name_or_path ptuning/tiny --server_port http", {}, "--server_port"),
    ("a hub that does not answer", "python ptuning/main.py --do_predict --test_file AdvertiseGen/sample/dev.json "
     "--prompt_column content --response_column summary --model_name_or_path THUDM/chatglm2-6b --output_dir {output}",
     {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "HF_ENDPOINT"),
    ("a cache below a file", "python ptuning/main.py --do_predict --test_file AdvertiseGen/sample/dev.json "
     "--prompt_column content --response_column summary --model_name_or_path ptuning/tiny --output_dir {output}",
     {"HF_DATASETS_CACHE": "README.md/cache"}, "README.md"),
]  # fmt: skip


@pytest.mark.slow
@table(PROCESSES)
def test_a_program_is_refused_as_a_user_starts_it(case, tmp_path):
    command, variables, says = case
    environment = {**os.environ, "MODEL": "tiny", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub"), **variables}
    words = command.format(output=tmp_path / "output").split()
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert_refused(done, says)
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------------- how many


def entries_of_tables(file):
    """How many entries the tables of a test file have together: lists with a name that @table is given."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lists = {node.targets[0].id: node.value for node in tree.body if isinstance(getattr(node, "value", 0), ast.List)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "table"]
    return sum(len(lists[call.args[0].id].elts) for call in calls if isinstance(call.args[0], ast.Name))


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/reliability_zh.md"])
def test_there_are_as_many_bad_inputs_as_the_documentation_says(page):
    files = (ROOT / "tests").rglob("test_bad_*.py")
    said = re.search(r"(\d+) (bad inputs|种错误输入)", (ROOT / page).read_text(encoding="utf-8"))
    assert sum(map(entries_of_tables, files)) >= int(said[1]) >= 120
