"""What several test files share: the reference data's place, the weight formula, the small configuration."""

import gc
import json
import os
import signal
import zlib
from collections import Counter
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch counts the cores: the workers share them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch

pytest.register_assert_rewrite("support")

# A script's background job, nohup, cron and some CI systems start us deaf to some signals, and so would be every
# program that a test starts.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TINY = ROOT / "ptuning" / "tiny"
SAMPLE = ROOT / "AdvertiseGen" / "sample"
SYNTHETIC = json.loads((Path(__file__).parent / "forward.synthetic.json").read_text())

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("PTUNING_MATMUL", "onednn")  # a busy machine measures one thing now and another then
if not torch.cuda.is_available():  # Triton runs in its interpreter then, if nothing has imported it before this is said
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    from support.peers import MARKERS

    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


def pytest_collection_modifyitems(config, items):
    """Order the tests. Of other people's, those of the table EXPECTED must fail, and no others."""
    from support.peers import expect_failures

    if others := [item for item in items if item.path.parent.name == "peers"]:
        expect_failures(others, complete=not any("::" in str(word) for word in config.args))
    # The files with the most slow tests come first, so that no worker has a long one left when the others have ended.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish(session):
    """Leave the modules and tests that are loaded now out of garbage collections: every run of main.py in this process
    asks for one, which else takes a second to look at them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_slow_yet(monkeypatch):
    """A test sees no reason for slowness that another one gave."""
    monkeypatch.setattr("common.slowness.reasons", {})


@pytest.fixture(scope="session")
def shared():
    """The folder of reference data that lies beside a developer's checkout; not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference data is not here: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Runs of main.py with one or several processes, which start in no time."""
    from support.ranks import Ranks

    ranks = Ranks(tmp_path_factory.mktemp("ranks") / "log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts of any program, which take no time, with a cache of rows of their own."""
    from support.forked import Forks

    forks = Forks(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path_factory.mktemp("cache")))
    yield forks
    forks.close()


def formula_weights(state_dict, scale=0.02, bias_scale=0.01):
    """The weights of the reference runs: normal numbers seeded by the CRC of each parameter's name."""
    weights = {}
    for name, tensor in state_dict.items():
        x = numpy.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape, dtype=numpy.float32)
        if "layernorm" in name:
            x = 1 + 0.1 * x
        elif name == "transformer.prefix_encoder.embedding.weight":
            x = 0.5 * x
        elif "prefix_encoder" in name:
            x = 0.02 * x
        else:
            x = (bias_scale if name.endswith("bias") else scale) * x
        weights[name] = torch.from_numpy(numpy.asarray(x, dtype=numpy.float32))
    return weights


def formula_model(config, scale=0.02, bias_scale=0.01, config_class=None, **overrides):
    """A model of `config` (dict of an official config.json) with formula weights, prefix dropout off, eval mode."""
    from chatglm2.configuration_chatglm import ChatGLMConfig
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration

    config = (config_class or ChatGLMConfig)(**{**config, "prefix_dropout": 0.0, **overrides})
    model = ChatGLMForConditionalGeneration(config)
    model.load_state_dict(formula_weights(model.state_dict(), scale, bias_scale))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prefix_encoder" in name)
    return model.eval()


OFFICIAL_FIELDS = {"add_qkv_bias": True, "multi_query_attention": True, "rmsnorm": True, "post_layer_norm": True}


def synthetic_model(**overrides):
    """The reference case that is carried in forward.synthetic.json."""
    return formula_model({**OFFICIAL_FIELDS, **SYNTHETIC["config"]}, scale=0.2, bias_scale=0.1, **overrides)


def relative_difference(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return ((actual - expected).norm() / expected.norm()).item()
