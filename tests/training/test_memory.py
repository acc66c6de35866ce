"""What a model weighs, and the estimate printed after loading."""

import pytest
import torch
from conftest import synthetic_model
from support.runs import TRAIN_SETTINGS, flags, losses, run

from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.quantization import QuantizedLinear, quantize_model_
from common import failure
from training.memory import (
    MOST_ROWS,
    count_weights,
    estimate_peak_bytes,
    free_bytes,
    memory_table,
    needs_checkpointing,
    rows_that_fit,
)
from tuning.methods import prepare_model

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


def test_gradient_checkpointing_is_for_batches_that_do_not_fit(monkeypatch):
    model = frozen_model()
    parts = estimate_peak_bytes(model, **BATCH)
    needed = sum(size for name, size in parts.items() if name not in ("weights", "Python and libraries"))
    for free, on in ((2 * needed, False), (needed, True)):
        monkeypatch.setattr("training.memory.free_bytes", lambda device, free=free: free)
        decided, text = needs_checkpointing(model, **BATCH)
        assert decided == on
        assert text.startswith(f"Gradient checkpointing: {'on' if on else 'off'}, because")
        assert "--gradient_checkpointing true|false decides otherwise" in text


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
        monkeypatch.setattr("training.memory.free_bytes", lambda device, rows=rows: int(2 * rows * (two - one)) + 1)
        assert rows_that_fit(model, 16) == expected


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.5)


# ---- when it does not fit

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.89 GiB. See documentation for"


@pytest.fixture
def room_for(monkeypatch):
    """Makes training batches of more rows than it is called with run out of memory in forward or in backward."""
    honest = ChatGLMForConditionalGeneration.forward

    def limit(rows, where="forward"):
        def forward(self, input_ids=None, **kwargs):
            full = self.training and len(input_ids) > rows
            if full and where == "forward":
                raise torch.OutOfMemoryError(FULL)
            output = honest(self, input_ids, **kwargs)
            if full:  # after the gradient of the prefix has been added up, which must then be taken back
                weight = self.transformer.prefix_encoder.embedding.weight
                handle = weight.register_post_accumulate_grad_hook(lambda _: (handle.remove(), fail()))
            return output

        monkeypatch.setattr(ChatGLMForConditionalGeneration, "forward", forward)

    def fail():
        raise torch.OutOfMemoryError(FULL)

    return limit


PLENTY = {**TRAIN_SETTINGS, "prefix_dropout": 0, "max_steps": 4, "save_steps": 4}


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_does_not_fit_is_halved_and_the_steps_stay_the_same(
    where, room_for, monkeypatch, tmp_path, capsys
):
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    run(monkeypatch, PLENTY, **small, output_dir=tmp_path / "small")
    room_for(2, where)
    large = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "auto_find_batch_size": True}
    capsys.readouterr()
    run(monkeypatch, PLENTY, **large, output_dir=tmp_path / "large")
    assert losses(tmp_path / "large") == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    output = capsys.readouterr().out
    assert "Out of memory with 8 rows x" in output and "at step 1: from now on 4 at a time" in output
    assert output.count("Out of memory with") == 3  # 16, both batches merged, 8 and 4; 2 do, and nothing is tried again
    prefixes = [
        torch.load(tmp_path / name / "checkpoint-4" / "pytorch_model.bin", weights_only=True)
        for name in ("small", "large")
    ]
    for name in prefixes[0]:
        assert torch.allclose(prefixes[0][name], prefixes[1][name], atol=1e-4)


def test_a_batch_that_is_never_cut_small_enough_ends_in_the_message(room_for, monkeypatch, tmp_path):
    room_for(0)
    with pytest.raises(torch.OutOfMemoryError, match="Out of memory on cpu, at a training batch of 1 rows x"):
        run(monkeypatch, PLENTY, auto_find_batch_size=True, output_dir=tmp_path)


def test_out_of_memory_is_one_message_with_batch_dtype_and_what_to_lower(room_for, monkeypatch, tmp_path):
    room_for(3)
    with pytest.raises(torch.OutOfMemoryError) as full:
        run(monkeypatch, PLENTY, quantization_bit=8, output_dir=tmp_path)
    message, status = failure.describe(full.value)
    assert status == 2 and len(message.splitlines()) < 8
    for part in (
        "a training batch of 4 rows x ",
        "int8 weights, float32 activations",
        "Tried to allocate 20.00 MiB",
        "--per_device_train_batch_size 4, with --gradient_accumulation_steps 2 raised",
        "--auto_find_batch_size",
        "--max_target_length",
        "--quantization_bit 4 and --gradient_checkpointing true",
    ):
        assert part in message, part


def test_out_of_memory_elsewhere_keeps_the_figures_of_torch():
    message, status = failure.describe(torch.OutOfMemoryError(FULL))
    assert status == 2
    assert message == f"{FULL.partition(' See')[0]} Lower the batch size or the lengths."


@pytest.mark.slow
def test_a_process_may_halve_its_batches_alone(ranks, monkeypatch, tmp_path):
    # Process 0 has room for one row, process 1 for all of its four; both stay in step.
    little_room = (
        "import os, torch\n"
        "from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration as Model\n"
        "honest = Model.forward\n"
        "def forward(self, input_ids=None, **kwargs):\n"
        "    if self.training and os.environ['RANK'] == '0' and len(input_ids) > 1:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return honest(self, input_ids, **kwargs)\n"
        "Model.forward = forward\n"
    )
    settings = {**PLENTY, "max_steps": 2, "gradient_accumulation_steps": 1}
    words = flags({**settings, "auto_find_batch_size": True, "output_dir": tmp_path / "two"})
    statuses, output = ranks.run(words, little_room, processes=2)
    assert statuses == [0, 0], output[-3000:]
    assert output.count("Out of memory with") == 2
    run(monkeypatch, settings, per_device_train_batch_size=8, output_dir=tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
