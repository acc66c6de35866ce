"""Int8 and int4 linear layers: the official scheme, the frozen layer, and the swap into a model."""

import copy
import json
import runpy

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SAMPLE, relative_difference, synthetic_model
from support.integer_layers import both_bits, layer_pair, random_weight
from support.runs import TRAIN_SETTINGS, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from chatglm2 import quantization
from chatglm2.bits import check_quantization_bit
from chatglm2.quantization import (
    QUANTIZED_MODULES,
    QuantizedLinear,
    dequantize_weight,
    is_quantized_weight,
    pack_int4,
    prepare_quantized_,
    quantize_model_,
    quantize_weight,
    unpack_int4,
)


def adversarial_weight(dtype):
    """Rows of zeros, with a huge outlier, a negative extreme, ties, a constant, small numbers, both extremes."""
    weight = random_weight(7, 16)
    weight[0] = 0
    weight[1, 5] = 60000
    weight[2] = weight[2].abs()
    weight[2, 3] = -3
    weight[3] = torch.arange(-8, 8) / 2 + 0.25
    weight[4] = -0.7
    weight[5] *= 0.1
    weight[6, 0], weight[6, 15] = -1, 1
    return weight.to(dtype)


def scheme_in_numpy(weight, bits):
    """The official scheme restated: unpacked integers and scale, computed in the weight's dtype."""
    largest = weight.dtype.type(2 ** (bits - 1) - 1)
    scale = numpy.abs(weight).max(axis=1) / largest
    quotient = numpy.divide(weight, scale[:, None], out=numpy.zeros_like(weight), where=scale[:, None] != 0)
    return numpy.round(quotient).astype(numpy.int8), scale


# ---- the scheme


def test_every_pair_of_nibbles_packs_into_its_byte_and_back():
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(pairs)
    expected = [((even & 15) << 4 | (odd & 15)) for even, odd in pairs.tolist()]
    assert packed.view(torch.uint8).flatten().tolist() == expected
    assert torch.equal(unpack_int4(packed), pairs)


def test_columns_keep_their_order_when_unpacked():
    row = torch.tensor([[1, -2, 3, -4, 7, -7]], dtype=torch.int8)
    assert [byte & 0xFF for byte in pack_int4(row)[0].tolist()] == [0x1E, 0x3C, 0x79]
    assert torch.equal(unpack_int4(pack_int4(row)), row)


@both_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make_weight", [lambda dtype: random_weight(64, 128, dtype=dtype), adversarial_weight])
def test_integers_and_scales_equal_the_official_scheme(make_weight, dtype, bits):
    weight = make_weight(dtype)
    quantized, scale = quantize_weight(weight, bits)
    expected_integers, expected_scale = scheme_in_numpy(weight.numpy(), bits)
    integers = unpack_int4(quantized) if bits == 4 else quantized
    numpy.testing.assert_array_equal(integers.numpy(), expected_integers)
    numpy.testing.assert_array_equal(scale.numpy(), expected_scale)
    assert quantized.dtype == torch.int8 and quantized.shape == (weight.shape[0], weight.shape[1] * bits // 8)
    assert scale.dtype == dtype


@both_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_of_zeros_stays_zero(dtype, bits):
    quantized, scale = quantize_weight(torch.zeros(2, 4, dtype=dtype), bits)
    assert quantized.count_nonzero() == 0 and scale.count_nonzero() == 0
    assert torch.equal(dequantize_weight(quantized, scale, bits, dtype), torch.zeros(2, 4, dtype=dtype))


@both_bits
def test_weights_too_small_for_their_scale_become_zero(bits):
    weight = torch.full((1, 4), 2.0**-24, dtype=torch.float16)  # the smallest number; a seventh of it rounds to 0
    assert dequantize_weight(*quantize_weight(weight, bits), bits, torch.float16).count_nonzero() == 0


@both_bits
def test_dequantized_weights_are_at_most_half_a_step_away(bits):
    weight = torch.cat([random_weight(64, 16), adversarial_weight(torch.float32)])
    quantized, scale = quantize_weight(weight, bits)
    error = (dequantize_weight(quantized, scale, bits, torch.float32) - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all()


@both_bits
@pytest.mark.parametrize("dtype, smallest", [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**-13)])
def test_the_largest_weight_of_a_row_keeps_its_sign_in_half_precision(dtype, smallest, bits):
    largest = torch.linspace(smallest, 2 * smallest, 1025).to(dtype)[:, None]
    weight = torch.cat([largest, -largest], dim=1)
    restored = dequantize_weight(*quantize_weight(weight, bits), bits, torch.float32)
    assert relative_difference(restored, weight.float()) < 0.05  # the scale itself is rounded; a lost sign is 2


@both_bits
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_refused(value, bits):
    weight = random_weight(4, 4)
    weight[2, 1] = value
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantize_weight(weight, bits)


def test_int4_refuses_an_odd_number_of_columns():
    with pytest.raises(ValueError, match="even number of columns.*has 5"):
        quantize_weight(random_weight(4, 5), 4)
    with pytest.raises(ValueError, match="even number of columns.*has 5"):
        QuantizedLinear(5, 4, bits=4)
    assert quantize_weight(random_weight(4, 5), 8)[0].shape == (4, 5)


# ---- the layer


@both_bits
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_elements", [quantization.CPU_BLOCK_ELEMENTS, 32 * 7])
def test_output_and_input_gradient_equal_the_dequantized_layer(block_elements, bias, bits, monkeypatch):
    monkeypatch.setattr(quantization, "CPU_BLOCK_ELEMENTS", block_elements)  # all 48 rows at once; 7 at a time
    layer, linear = layer_pair(bits, bias)
    input = torch.randn(2, 5, 32, requires_grad=True)
    upstream = torch.randn(2, 5, 48)
    output, expected = layer(input), linear(input)
    (gradient,) = torch.autograd.grad(output, input, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, input, upstream)
    assert relative_difference(output.detach(), expected.detach()) < 1e-5
    assert relative_difference(gradient, expected_gradient) < 1e-5


@both_bits
def test_a_gradient_of_many_rows_takes_larger_blocks_up_to_a_bound(bits, monkeypatch):
    monkeypatch.setattr(quantization, "CPU_BLOCK_ROWS", 2)
    monkeypatch.setattr(quantization, "CPU_BLOCK_ELEMENTS", 32 * 2)
    monkeypatch.setattr(quantization, "CPU_LARGE_BLOCK", 32 * 16)
    blocks, dequantize = [], quantization._dequantized_blocks

    def counting(*args):
        for rows, block in dequantize(*args):
            blocks.append(len(block))
            yield rows, block

    layer, linear = layer_pair(bits, bias=False)
    input = torch.randn(40, 32, requires_grad=True)
    for rows, sizes in ((1, [2] * 24), (5, [5] * 9 + [3]), (40, [16] * 3)):
        output = layer(input[:rows])
        blocks.clear()
        monkeypatch.setattr(quantization, "_dequantized_blocks", counting)
        (gradient,) = torch.autograd.grad(output.sum(), input)
        monkeypatch.setattr(quantization, "_dequantized_blocks", dequantize)
        (expected,) = torch.autograd.grad(linear(input[:rows]).sum(), input)
        assert blocks == sizes and relative_difference(gradient, expected) < 1e-5


@both_bits
def test_input_gradient_equals_finite_differences(bits):
    layer, _ = layer_pair(bits, bias=True, rows=6, columns=4)
    assert torch.autograd.gradcheck(layer, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


@both_bits
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("instructions", [False, True])  # of the CPU, for bfloat16
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_activations_give_half_precision_results(
    dtype, tolerance, instructions, bias, bits, monkeypatch
):
    monkeypatch.setattr(quantization, "CPU_BLOCK_ELEMENTS", 32 * 7)
    monkeypatch.setattr(quantization, "MULTIPLIES_BFLOAT16", instructions)
    layer, linear = layer_pair(bits, bias)
    input = torch.randn(2, 5, 32).to(dtype).requires_grad_()
    float_input = input.detach().float().requires_grad_()
    output, expected = layer(input), linear(float_input)
    upstream = torch.randn(2, 5, 48).to(dtype)
    output.backward(upstream)
    expected.backward(upstream.float())
    assert output.dtype == input.grad.dtype == dtype
    assert relative_difference(output.detach(), expected.detach()) < tolerance
    assert relative_difference(input.grad, float_input.grad) < tolerance


@both_bits
def test_autocast_computes_in_its_dtype_and_returns_a_gradient_in_the_input_dtype(bits):
    layer, linear = layer_pair(bits, bias=True)
    input = torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and input.grad.dtype == torch.float32
    assert relative_difference(output.detach(), linear(input).detach()) < 1e-2


MATRIX_PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.addmm_,
    torch.ops.mkldnn._linear_pointwise,
)


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products that are run under it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in MATRIX_PRODUCTS
        return function(*args, **(kwargs or {}))


@both_bits
def test_backward_costs_one_matrix_product_and_no_more(bits):
    layer, linear = layer_pair(bits, bias=False)
    counts = []
    for module in (layer, linear):
        with MatrixProducts() as products:
            module(torch.randn(5, 32, requires_grad=True)).sum().backward()
        counts.append(products.count)
    assert counts == [2, 3]  # the float layer also multiplies out its weight gradient


@both_bits
def test_nothing_but_the_integers_and_scales_is_kept_for_backward(bits):
    layer, _ = layer_pair(bits, bias=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, 32, requires_grad=True))
    buffers = {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} == buffers


@both_bits
def test_gradient_checkpointing_changes_no_gradient(bits):
    layer, _ = layer_pair(bits, bias=True)
    second = QuantizedLinear.from_linear(nn.Linear(48, 32), bits)
    input = torch.randn(5, 32, requires_grad=True)

    def block(hidden):
        return second(F.silu(layer(hidden)))

    (expected,) = torch.autograd.grad(block(input).square().sum(), input)
    (gradient,) = torch.autograd.grad(checkpoint(block, input, use_reentrant=False).square().sum(), input)
    assert torch.equal(gradient, expected)


@both_bits
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_output_without_gradients_is_the_same(mode, bits):
    layer, _ = layer_pair(bits, bias=True)
    input = torch.randn(5, 32, requires_grad=True)
    with mode():
        output = layer(input)
    assert not output.requires_grad
    assert torch.equal(output, layer(input).detach())


@both_bits
def test_weights_are_buffers_that_no_optimizer_can_reach(bits):
    layer, _ = layer_pair(bits, bias=True)
    layer.requires_grad_(True)
    assert list(layer.parameters()) == []
    assert set(dict(layer.named_buffers())) == {"weight", "weight_scale", "bias"}
    layer(torch.randn(5, 32, requires_grad=True)).sum().backward()
    assert all(buffer.grad is None for buffer in layer.buffers())


@both_bits
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_has_the_official_names_and_survives_a_round_trip(bias, bits, tmp_path):
    layer, _ = layer_pair(bits, bias)
    torch.save(layer.state_dict(), tmp_path / "layer.bin")
    saved = torch.load(tmp_path / "layer.bin", weights_only=True)
    assert set(saved) == {"weight", "weight_scale"} | ({"bias"} if bias else set())
    assert saved["weight"].dtype == torch.int8 and saved["weight"].shape == (48, 32 * bits // 8)
    restored = QuantizedLinear(32, 48, bits, bias=bias, device="meta")
    restored.load_state_dict(saved, assign=True)
    input = torch.randn(5, 32)
    assert torch.equal(restored(input), layer(input))


@pytest.mark.parametrize("assign", [False, True])
def test_float_weights_are_not_loaded_into_a_quantized_layer(assign):
    layer, linear = layer_pair(8, bias=False)
    state = {"weight": linear.weight.detach(), "weight_scale": layer.weight_scale}
    with pytest.raises(ValueError, match="weight is torch.float32.*int8"):
        layer.load_state_dict(state, assign=assign)


# ---- the model


def test_only_the_four_linear_layers_of_every_block_are_quantized():
    model = synthetic_model()
    names_before = set(model.state_dict())
    quantize_model_(model, 4)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantized == {
        f"transformer.encoder.layers.{number}.{name}"
        for number in range(model.config.num_layers)
        for name in QUANTIZED_MODULES
    }
    assert set(model.state_dict()) - names_before == {f"{name}.weight_scale" for name in quantized}
    assert names_before <= set(model.state_dict())


def test_names_of_quantized_weights_are_those_of_the_swapped_layers():
    model = synthetic_model()
    names = {name for name in model.state_dict() if is_quantized_weight(name)}
    quantize_model_(model, 8)
    assert names == {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8}
    assert not is_quantized_weight("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight_scale")
    assert not is_quantized_weight("transformer.encoder.layers.0.self_attention.query_key_value.bias")


def dequantized(model):
    """The float model that a quantized one stands for."""
    reference = synthetic_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("weight_scale")}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state[f"{name}.weight"] = dequantize_weight(module.weight, module.weight_scale, module.bits, torch.float32)
    reference.load_state_dict(state)
    return reference


def loss_and_prefix_gradient(model, input_ids):
    loss = model(input_ids=input_ids, labels=input_ids).loss
    prefix_encoder = model.transformer.prefix_encoder
    return loss.item(), torch.autograd.grad(loss, prefix_encoder.embedding.weight)[0]


@both_bits
def test_loss_and_prefix_gradient_equal_the_dequantized_model(bits):
    model = synthetic_model()
    quantize_model_(model, bits)
    input_ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(bits))
    loss, gradient = loss_and_prefix_gradient(model, input_ids)
    expected_loss, expected_gradient = loss_and_prefix_gradient(dequantized(model), input_ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_difference(gradient, expected_gradient) < 1e-5


@both_bits
def test_a_prepared_model_filled_tensor_by_tensor_equals_one_quantized_as_a_whole(bits):
    float_model = synthetic_model()
    whole = copy.deepcopy(float_model)
    quantize_model_(whole, bits)
    with torch.device("meta"):
        streamed = type(float_model)(float_model.config)
    prepare_quantized_(streamed, bits)
    assert all(buffer.is_meta for name, buffer in streamed.named_buffers() if name.endswith("weight_scale"))
    state = {}
    for name, tensor in float_model.state_dict().items():
        if is_quantized_weight(name):
            state[name], state[name + "_scale"] = quantize_weight(tensor, bits)
        else:
            state[name] = tensor
    streamed.load_state_dict(state, assign=True)
    expected = whole.state_dict()
    assert streamed.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed.state_dict().items())


@pytest.mark.parametrize("swap", [quantize_model_, prepare_quantized_])
def test_a_quantized_model_is_not_quantized_twice(swap):
    model = synthetic_model()
    quantize_model_(model, 8)
    with pytest.raises(ValueError, match="layer 0 self_attention.query_key_value has int8 weights already"):
        swap(model, 8)


def test_a_model_with_odd_columns_is_refused_for_int4_before_its_weights_are_read():
    with torch.device("meta"):
        model = nn.Module()
        model.transformer = nn.Module()
        model.transformer.encoder = nn.Module()
        block = nn.Module()
        block.self_attention, block.mlp = nn.Module(), nn.Module()
        block.self_attention.query_key_value, block.self_attention.dense = nn.Linear(8, 12), nn.Linear(8, 8)
        block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h = nn.Linear(8, 18), nn.Linear(9, 8)
        model.transformer.encoder.layers = nn.ModuleList([block])
    with pytest.raises(ValueError, match="layer 0 mlp.dense_4h_to_h: int4 .* has 9"):
        prepare_quantized_(model, 4)


# ---- what the user asks for


@pytest.mark.parametrize(
    "bits, already, expected",
    [(None, None, 0), (None, 0, 0), (4, None, 4), (8, 0, 8), (4, 4, 4), (8, 8, 8), (None, 4, 4), (None, 8, 8)],
)
def test_supported_bits_are_accepted_and_the_folder_decides_without_a_flag(bits, already, expected):
    assert check_quantization_bit(bits, already) == expected


@pytest.mark.parametrize("bits", [-4, 0, 1, 2, 3, 5, 7])
def test_unsupported_bits_are_refused_with_what_is_supported(bits):
    with pytest.raises(ValueError, match=f"--quantization_bit {bits} is not supported. Give 4 or 8"):
        check_quantization_bit(bits, 0)


@pytest.mark.parametrize("bits", [16, 32])
def test_sixteen_and_thirty_two_bits_are_refused_with_the_reason(bits):
    with pytest.raises(ValueError, match=f"--quantization_bit {bits} makes no sense.*Leave the flag out"):
        check_quantization_bit(bits)


@pytest.mark.parametrize("bits, already", [(4, 8), (8, 4)])
def test_another_width_than_the_folder_has_is_refused_naming_both(bits, already):
    with pytest.raises(ValueError, match=f"--quantization_bit {bits} was given.*int{already} already"):
        check_quantization_bit(bits, already)


def test_a_folder_of_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match="config.json of the base model has quantization_bit 3"):
        check_quantization_bit(None, 3)


# ---- the benchmark's folder


def test_the_full_size_folder_has_the_official_names_sizes_and_shards(shared):
    official = json.loads((shared / "golden/weight_names.json").read_text())
    full_size = runpy.run_path(str(ROOT / "benchmarks/full_size.py"))
    shapes = full_size["full_size_shapes"]()
    assert full_size["shard_map"](shapes) == official["weight_map"]
    assert 2 * sum(shape.numel() for shape in shapes.values()) == official["total_size"]


# ---- training

AS_TRAIN_SH = {
    **TRAIN_SETTINGS,
    **{"max_train_samples": None, "max_target_length": 64, "pre_seq_len": 32, "max_steps": 60, "save_steps": 100},
    **{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 60},
    **{"validation_file": SAMPLE / "dev.json", "eval_strategy": "steps", "eval_steps": 100, "eval_on_start": True},
}


def dev_losses(folder, **more):
    """Dev loss at the start and the end of what `MODEL=tiny MAX_STEPS=60 bash train.sh` trains."""
    with pytest.MonkeyPatch.context() as patch:
        run(patch, AS_TRAIN_SH, output_dir=folder, **more)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return losses[0], losses[-1]


@pytest.mark.slow
def test_a_quantized_model_trains_to_within_3_percent_of_the_float_models_dev_loss(tmp_path):
    start, expected = dev_losses(tmp_path / "float")
    assert expected < 0.75 * start
    for bits in (4, 8):
        _, loss = dev_losses(tmp_path / str(bits), quantization_bit=bits)
        assert loss == pytest.approx(expected, rel=0.03)
