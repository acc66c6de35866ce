"""The page's estimate of memory is that of the programs, though it reads no weights."""

import pytest
from conftest import TINY

from board.estimate import memory_of
from checkpoint import load_model, read_config
from training.memory import estimate_peak_bytes

NUMBERS = {"rows": 4, "source": 20, "target": 11}
BATCH = {"batch_size": 4, "length": 32}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("trains", [True, False])
def test_the_estimate_without_weights_is_that_of_the_loaded_model(bits, trains):
    model = load_model(TINY, config=read_config(TINY, pre_seq_len=8), quantization_bit=bits)
    model.requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(trains)
    expected = estimate_peak_bytes(model, **BATCH, num_supervised=12 if trains else 0)
    how = {"method": "p_tuning", "family": None, "prefix": 8, "bits": bits, "trains": trains}
    assert memory_of(model=str(TINY), **how, **NUMBERS) == {"parts": expected, "device": "cpu"}


def test_an_adapter_trains_fewer_numbers_than_all_weights():
    how = {"model": str(TINY), "family": None, "prefix": None, "bits": None, "trains": True, **NUMBERS}
    adapter, everything = (sum(memory_of(method=name, **how)["parts"].values()) for name in ("lora", "full"))
    assert adapter < everything
