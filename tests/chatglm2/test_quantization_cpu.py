"""Few rows through torch's packed kernels on a CPU: equal to dequantizing, and only where no gradient is wanted."""

import pytest
import torch
from conftest import TINY, relative_difference, synthetic_model
from support.integer_layers import both_bits

from chatglm2 import quantization, quantization_cpu
from chatglm2.quantization import (
    PACKED,
    TORCH,
    QuantizedLinear,
    choose_backend,
    dequantize_weight,
    pack_for_cpu,
    pack_int4,
    quantize_model_,
    quantize_weight,
    use_backend_,
)
from checkpoint import load_model

needs_packed = pytest.mark.skipif(not quantization_cpu.BLOCK, reason="needs a CPU with AVX2 or AVX-512")
SHAPES = [(64, 32), (128, 96), (320, 416), (64, 512)]


def layer_of(bits, shape, backend):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=True)
    layer = QuantizedLinear.from_linear(linear, bits)
    use_backend_(layer, backend)
    return layer.eval()


@needs_packed
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_int4_weights_stand_for_the_same_floats(shape):
    weight, scale = quantize_weight(torch.randn(shape), 4)
    packed = pack_for_cpu(weight, 4)
    assert packed.shape == weight.shape and packed.dtype == torch.uint8
    expected = dequantize_weight(weight, scale, 4, torch.float32)
    assert torch.equal(dequantize_weight(packed, scale, 4, torch.float32), expected)


@needs_packed
def test_a_last_block_of_fewer_rows_is_as_dense_as_the_others(monkeypatch):
    monkeypatch.setattr(quantization, "CPU_BLOCK_ROWS", 128)
    monkeypatch.setattr(quantization, "CPU_BLOCK_ELEMENTS", 0)
    weight, scale = quantize_weight(torch.randn(192, 96), 4)
    expected = dequantize_weight(weight, scale, 4, torch.float32)
    packed, sizes = pack_for_cpu(weight, 4), []
    for rows, block in quantization._dequantized_blocks(packed, scale, 4, torch.float32):
        sizes.append(len(block))
        assert block.t().is_contiguous() and torch.equal(block, expected[rows])
    assert sizes == [128, 64]


@needs_packed
@pytest.mark.parametrize("shape", [*SHAPES, (64 * 6, 64)])
@pytest.mark.parametrize("rows", [1, 33, quantization_cpu.SOME_ROWS])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_some_rows_times_a_packed_weight_are_as_exact_as_their_dtype(shape, rows, dtype, most):
    weight, scale = quantize_weight(torch.randn(shape), 4)
    input = torch.randn(rows, shape[1]).to(dtype)
    product = quantization_cpu.multiply_some_rows(input, pack_for_cpu(weight, 4), scale)
    expected = input.double() @ dequantize_weight(weight, scale, 4, torch.float64).T
    assert product.dtype == dtype and relative_difference(product, expected.float()) < most


@pytest.mark.parametrize(
    "dtype, instructions, taken",
    [
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, True, False),
    ],
)
def test_some_rows_are_multiplied_in_a_dtype_that_the_processor_has(dtype, instructions, taken, monkeypatch):
    monkeypatch.setattr(quantization_cpu, "MULTIPLIES_BFLOAT16", instructions)
    weight = torch.zeros(64, 16, dtype=torch.uint8)
    assert quantization_cpu.takes_some_rows(torch.zeros(2, 32, dtype=dtype), weight) == taken


@needs_packed
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_that_of_torchs_own_packing(shape):
    integers = torch.randint(-7, 8, shape, dtype=torch.int8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 1)
    assert torch.equal(quantization_cpu.pack(pack_int4(integers)), theirs)


@needs_packed
@both_bits
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 32])
@pytest.mark.parametrize("dtype, roundings", [(torch.float32, 1), (torch.bfloat16, 3)])  # product, and scale and bias
def test_the_product_differs_by_the_rounding_to_bfloat16_alone(shape, bits, rows, dtype, roundings):
    exact, layer = (layer_of(bits, shape, backend).to(dtype) for backend in (TORCH, PACKED))
    input = torch.randn(1, rows, shape[1]).to(torch.bfloat16).to(dtype)  # nothing is lost on the way in
    with torch.no_grad():
        result, expected = layer(input), exact.float()(input.float())
    assert result.dtype == dtype and result.shape == (1, rows, shape[0])
    assert relative_difference(result.float(), expected) < roundings * 2**-9


@needs_packed
@both_bits
def test_a_gradient_or_many_rows_take_the_exact_product_also_from_packed_weights(bits):
    exact, layer = (layer_of(bits, (128, 96), backend) for backend in (TORCH, PACKED))
    with torch.inference_mode():
        layer(torch.randn(1, 96))
    assert quantization_cpu.is_packed(layer.weight) == (bits == 4)
    results = []
    for rows in (2, quantization_cpu.FEW_ROWS + 1):
        input = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows), requires_grad=True)
        for module in (exact, layer):
            output = module(input)
            results.append((output, *torch.autograd.grad(output.square().sum(), input)))
    for expected, result in (results[:2], results[2:]):
        for one, other in zip(expected, result, strict=True):
            assert relative_difference(other.detach(), one.detach()) < 1e-6
    with torch.no_grad():
        many = torch.randn(quantization_cpu.FEW_ROWS + 1, 96)
        assert relative_difference(layer(many), exact(many)) < 1e-6


@needs_packed
@both_bits
def test_in_training_a_pass_without_a_gradient_is_exact_too(bits):
    exact, layer = (layer_of(bits, (128, 96), backend).train() for backend in (TORCH, PACKED))
    rows = torch.randn(2, 96)
    with torch.no_grad():
        assert torch.equal(layer(rows), exact(rows))


def test_a_model_quantized_in_place_stays_in_its_mode():
    for training in (False, True):
        model = synthetic_model().train(training)
        quantize_model_(model, 4)
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert layers and all(layer.training == training for layer in layers)


@needs_packed
def test_a_state_dict_holds_the_official_layout_whatever_is_in_memory():
    exact, layer = (layer_of(4, (128, 96), backend) for backend in (TORCH, PACKED))
    expected = exact.state_dict()
    with torch.no_grad():
        layer(torch.randn(1, 96))
    assert quantization_cpu.is_packed(layer.weight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in layer.state_dict().items())
    other = layer_of(4, (128, 96), PACKED)
    with torch.no_grad():
        other(torch.randn(1, 96))
    torch.nn.init.zeros_(other.bias)
    other.load_state_dict(expected)
    many = torch.randn(40, 96)
    assert torch.equal(other(many), exact(many))


@needs_packed
def test_a_weight_the_int4_kernel_does_not_take_is_dequantized():
    exact, layer = (layer_of(4, (48, 96), backend) for backend in (TORCH, PACKED))
    row = torch.randn(1, 96)
    with torch.no_grad():
        assert torch.equal(layer(row), exact(row))
    assert not quantization_cpu.is_packed(layer.weight)


def test_the_packed_kernels_are_refused_where_they_do_not_work(monkeypatch):
    with pytest.raises(ValueError, match="packed needs a CPU, but the model goes to the cuda"):
        choose_backend("packed", "cuda", 4, torch.bfloat16)

    def fails(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("chatglm2.quantization.PACKED", PACKED._replace(multiply_few_rows=fails))
    with pytest.raises(ValueError, match=r"packed does not work here \(RuntimeError: no such kernel\)"):
        choose_backend("packed", "cpu", 8, torch.float32)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_output_layer_is_int8_where_that_is_asked_for(bits):
    plain = load_model(TINY, quantization_bit=bits)
    asked = load_model(TINY, quantization_bit=bits, quantize_output_layer=True)
    weight, scale = quantize_weight(load_model(TINY, dtype=torch.float16).transformer.output_layer.weight, 8)
    assert torch.equal(asked.transformer.output_layer.weight, weight)
    assert torch.equal(asked.transformer.output_layer.weight_scale, scale)
    count = sum(isinstance(module, QuantizedLinear) for module in plain.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in asked.modules()) == count + 1
    token_ids = torch.randint(1, 60, (2, 9))
    with torch.no_grad():
        logits, expected = asked(token_ids).logits, plain(token_ids).logits
    assert 0 < (logits - expected).norm() / expected.norm() < 0.02
