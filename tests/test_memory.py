"""What a model weighs, and the estimate printed after loading."""

import pytest
import torch
from conftest import synthetic_model

from finetuning import prepare_model
from memory import MOST_ROWS, count_weights, estimate_peak_bytes, free_bytes, memory_table, rows_that_fit
from quantization import QuantizedLinear, quantize_model_

BATCH = {"batch_size": 2, "length": 16, "num_supervised": 8}


def frozen_model(bits=None):
    model = synthetic_model().requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)
    if bits:
        quantize_model_(model, bits)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_is_counted_once_with_the_bytes_it_takes(bits):
    plain, quantized = count_weights(frozen_model()), count_weights(frozen_model(bits))
    linears = [module for module in frozen_model(bits).modules() if isinstance(module, QuantizedLinear)]
    numbers = sum(linear.in_features * linear.out_features for linear in linears)
    scales = sum(linear.out_features for linear in linears)
    assert quantized[f"int{bits}"] == (numbers, numbers * bits // 8 + 4 * scales)
    assert quantized["float32"] == (plain["float32"][0] - numbers, plain["float32"][1] - 4 * numbers)
    assert plain["float32"][1] == 4 * plain["float32"][0]
    assert quantized["trained"] == plain["trained"]


def test_the_trained_prefix_takes_16_bytes_a_number_in_training_and_4_otherwise():
    model = frozen_model()
    numbers = sum(parameter.numel() for parameter in model.transformer.prefix_encoder.parameters())
    assert estimate_peak_bytes(model, **BATCH)["trained"] == 16 * numbers
    assert estimate_peak_bytes(model, **{**BATCH, "num_supervised": 0})["trained"] == 4 * numbers


def saved_bytes(model, batch_size, length):
    """Bytes that autograd keeps between forward and backward, without the model's own weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    input_ids = torch.zeros(batch_size, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states = model.transformer(input_ids, use_cache=False).last_hidden_state
    assert hidden_states.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("bits", [None, 4])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(bits):
    model = frozen_model(bits)
    length = 64
    parts = estimate_peak_bytes(model, batch_size=2, length=length, num_supervised=8)
    assert parts["activations"] == pytest.approx(saved_bytes(model, 2, length), rel=0.25)


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_the_estimate_of_activations_is_near_what_the_other_methods_keep(method):
    model = synthetic_model(pre_seq_len=None)
    prepare_model(model, method, do_train=True, num_layer_trainable=2, lora_dropout=0)
    length = 64
    parts = estimate_peak_bytes(model, batch_size=2, length=length, num_supervised=8)
    assert parts["activations"] == pytest.approx(saved_bytes(model, 2, length), rel=0.3)


def test_gradient_checkpointing_lowers_the_estimate():
    model = frozen_model()
    without, with_it = (estimate_peak_bytes(model, **BATCH, checkpointing=value) for value in (False, True))
    assert with_it["activations"] < without["activations"]


def test_the_table_names_kinds_bits_batch_and_the_total():
    text = memory_table(frozen_model(4), **BATCH)
    assert [line.split()[0] for line in text.splitlines()] == ["weights", "float32", "int4", "trained", "Estimated"]
    assert "training on 2 rows x 16 tokens" in text
    assert "generating for 2 rows x 16 tokens" in memory_table(frozen_model(4), **{**BATCH, "num_supervised": 0})


def test_as_many_rows_are_generated_for_as_half_of_the_free_memory_holds(monkeypatch):
    model = frozen_model()
    one, two = (
        sum(estimate_peak_bytes(model, batch_size=rows, length=16, num_supervised=0).values()) for rows in (1, 2)
    )
    for rows, expected in ((0.5, 1), (1, 1), (3, 2), (9, 8), (10**6, MOST_ROWS["cpu"])):
        monkeypatch.setattr("memory.free_bytes", lambda device, rows=rows: int(2 * rows * (two - one)) + 1)
        assert rows_that_fit(model, 16) == expected


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.5)
