"""The Triton kernels against the torch reference: on a GPU where there is one, else in Triton's interpreter on a CPU."""

import pytest
import torch
from conftest import relative_difference
from support.machine_code import SHARED_MEMORY, machine_code
from torch import nn

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
triton = pytest.importorskip("triton", reason="triton is not installed (torch's build for CPUs comes without it)")

from chatglm2 import quantization_triton  # noqa: E402
from chatglm2.quantization import (  # noqa: E402
    QuantizedLinear,
    dequantize_weight,
    load_triton,
    quantize_weight,
    try_backend,
    use_backend_,
)

runs_loops = pytest.mark.skipif(
    not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason="the interpreter of Triton before 3.7 runs no loops with NumPy 2.4 and later",
)
both_bits = pytest.mark.parametrize("bits", [4, 8])
# The interpreter keeps bfloat16 as raw bits, cuts where a GPU rounds, and multiplies the bits as integers.
products_dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def quantized_weight(rows, columns, bits, scale_dtype=torch.float16):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    return quantize_weight(weight.to(DEVICE, scale_dtype), bits)


# ---- dequantize


@both_bits
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 2), (8, 512), (37, 1030)])
def test_the_dequantized_weight_is_the_references(rows, columns, dtype, scale_dtype, bits):
    quantized, scale = quantized_weight(rows, columns, bits, scale_dtype)
    weight = quantization_triton.dequantize(quantized, scale, bits, dtype)
    expected = dequantize_weight(quantized, scale, bits, dtype)
    assert weight.dtype == dtype
    if dtype == torch.bfloat16 and not ON_GPU:
        torch.testing.assert_close(weight, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(weight, expected)


def test_every_byte_of_int4_is_unpacked_into_its_columns():
    packed = torch.arange(-128, 128, device=DEVICE).to(torch.int8)[None]
    scale = torch.ones(1, device=DEVICE)
    weight = quantization_triton.dequantize(packed, scale, 4, torch.float32)
    assert torch.equal(weight, dequantize_weight(packed, scale, 4, torch.float32))


def test_an_odd_number_of_int8_columns_is_dequantized():
    quantized, scale = quantized_weight(5, 33, 8)
    weight = quantization_triton.dequantize(quantized, scale, 8, torch.float32)
    assert torch.equal(weight, dequantize_weight(quantized, scale, 8, torch.float32))


# ---- few rows


@runs_loops
@both_bits
@pytest.mark.parametrize("dtype", products_dtypes)
@pytest.mark.parametrize("inputs", [1, 17, quantization_triton.FEW_ROWS])
@pytest.mark.parametrize("rows, columns", [(16, 64), (97, 130), (48, 1200)])  # the last by several programs a tile
def test_the_product_of_few_rows_is_the_references(rows, columns, inputs, dtype, bits):
    quantized, scale = quantized_weight(rows, columns, bits)
    input = torch.randn(inputs, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    output = quantization_triton.multiply_few_rows(input, quantized, scale, bits)
    expected = input.double() @ dequantize_weight(quantized, scale, bits, torch.float64).T
    assert output.dtype == dtype and output.shape == (inputs, rows)
    assert relative_difference(output.cpu(), expected.cpu()) < TOLERANCE[dtype]


@runs_loops
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_programs_that_share_a_tile_give_the_same_result_and_leave_their_counters_at_zero(splits, monkeypatch):
    monkeypatch.setattr(quantization_triton, "MOST_SPLITS", splits)
    quantized, scale = quantized_weight(70, 1030, 4)
    input = torch.randn(5, 1030, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = input.double() @ dequantize_weight(quantized, scale, 4, torch.float64).T
    for _ in range(2):
        output = quantization_triton.multiply_few_rows(input, quantized, scale, 4)
        assert relative_difference(output.cpu(), expected.cpu()) < 1e-6
        assert not quantization_triton.of_device(quantized.device)[2].any()


@pytest.mark.parametrize("slower_from, most", [(16, 0), (32, 16), (64, 32), (65, 64)])
def test_the_fused_product_is_used_for_as_many_rows_as_it_is_faster(slower_from, most, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def seconds(function, arguments):
        fused, rows = function is quantization_triton.multiply_few_rows, len(arguments[0])
        return 2.0 if fused and rows >= slower_from else 1.0

    monkeypatch.setattr(quantization_triton, "seconds", seconds)
    assert quantization_triton.most_rows.__wrapped__(torch.device("cpu"), 4, torch.float16) == most
    monkeypatch.setattr(quantization_triton, "measure_rows", None)  # the next process reads it
    assert quantization_triton.most_rows.__wrapped__(torch.device("cpu"), 4, torch.float16) == most


# ---- the layer


@runs_loops
@both_bits
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [(1, 4), (13, 5)], ids=["few rows", "many rows"])
def test_output_and_input_gradient_of_the_layer_equal_the_dequantized_layers(inputs, bias, bits):
    torch.manual_seed(bits)
    linear = nn.Linear(96, 40, bias=bias, device=DEVICE)
    layer = QuantizedLinear.from_linear(linear, bits)
    with torch.no_grad():
        linear.weight.copy_(dequantize_weight(layer.weight, layer.weight_scale, bits, torch.float32))
    use_backend_(layer, load_triton())
    input = torch.randn(*inputs, 96, device=DEVICE, requires_grad=True)
    upstream = torch.randn(*inputs, 40, device=DEVICE)
    output, expected = layer(input), linear(input)
    (gradient,) = torch.autograd.grad(output, input, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, input, upstream)
    assert relative_difference(output.detach().cpu(), expected.detach().cpu()) < 1e-5
    assert relative_difference(gradient.cpu(), expected_gradient.cpu()) < 1e-5


@runs_loops
@both_bits
@pytest.mark.parametrize("dtype", products_dtypes)
def test_the_backend_passes_its_trial(dtype, bits):
    try_backend(load_triton(), DEVICE, bits, dtype)


# ---- machine code


@pytest.mark.slow
@pytest.mark.parametrize("capability, dtype", [(75, "fp16"), (80, "bf16"), (86, "fp32"), (89, "fp16"), (90, "bf16")])
def test_the_kernels_compile_for_gpus_that_are_not_here_without_spills(capability, dtype, tmp_path):
    for kernel in machine_code("quantization_triton", dtype, capability, tmp_path):
        assert kernel["stack"] == 0 and kernel["shared"] <= SHARED_MEMORY[capability], kernel
        if "few_rows" in kernel["name"] and capability >= 80 and dtype != "fp32":
            assert kernel["tensor cores"], kernel
