"""Backends of the integer layers: chosen, refused, and held against the reference."""

import importlib.util
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, relative_difference
from support.integer_layers import both_bits, layer_pair, random_weight

from chatglm2 import quantization, quantization_cpm
from chatglm2.quantization import (
    BACKENDS,
    PACKED,
    TORCH,
    Backend,
    choose_backend,
    dequantize_weight,
    quantize_weight,
    try_backend,
    use_backend_,
)
from common.slowness import slow_because


def counting_backend(calls, few_rows):
    """A backend that computes as the reference does and notes which of its functions ran."""

    def dequantize(weight, scale, bits, dtype):
        calls.append("dequantize")
        return dequantize_weight(weight, scale, bits, dtype)

    def multiply_few_rows(input, weight, scale, bits):
        calls.append(tuple(input.shape))
        return F.linear(input, dequantize_weight(weight, scale, bits, input.dtype))

    return Backend("counting", dequantize, few_rows, multiply_few_rows)


@both_bits
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "few_rows, expected_calls", [(0, ["dequantize"] * 2), (9, ["dequantize"] * 2), (10, [(10, 32), "dequantize"])]
)
def test_a_backend_computes_output_and_input_gradient_of_the_layer(few_rows, expected_calls, bias, bits):
    layer, linear = layer_pair(bits, bias)
    calls = []
    use_backend_(layer, counting_backend(calls, few_rows))
    input = torch.randn(2, 5, 32, requires_grad=True)
    upstream = torch.randn(2, 5, 48)
    output, expected = layer(input), linear(input)
    (gradient,) = torch.autograd.grad(output, input, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, input, upstream)
    assert calls == expected_calls
    assert relative_difference(output.detach(), expected.detach()) < 1e-5
    assert relative_difference(gradient, expected_gradient) < 1e-5


def test_an_input_without_rows_gives_an_output_without_rows():
    layer, _ = layer_pair(4, bias=True)
    for backend in (TORCH, counting_backend([], few_rows=4)):
        use_backend_(layer, backend)
        assert layer(torch.randn(2, 0, 32)).shape == (2, 0, 48)


@pytest.mark.parametrize("faster, expected", [(True, PACKED), (False, TORCH)])
def test_on_a_cpu_what_is_faster_there_is_chosen_without_a_warning(faster, expected, monkeypatch):
    monkeypatch.setattr(quantization, "packed_is_faster", lambda *arguments: faster)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", "cpu", 8, torch.float32) is expected
        assert choose_backend("torch", "cpu", 8, torch.float32) is TORCH


@pytest.mark.parametrize("name", ["triton", "cpm_kernels"])
def test_a_backend_for_gpus_is_refused_on_a_cpu_and_its_library_is_not_imported(name):
    with pytest.raises(ValueError, match=f"--quantization_backend {name} needs a CUDA device.*the cpu. Leave the flag"):
        choose_backend(name, "cpu", 4, torch.float32)


def test_importing_the_module_imports_no_library_for_gpus():
    program = "import sys, chatglm2.quantization; print({'triton', 'cpm_kernels', 'pkg_resources'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "ptuning")
    assert done.stdout == "set()\n", done.stderr


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"bitsandbytes is not known. Give one of {', '.join(BACKENDS)}"):
        choose_backend("bitsandbytes", "cpu", 4, torch.float32)


def no_module(*args):
    raise ImportError("No module named 'triton'")


def test_triton_that_fails_leaves_one_warning_with_the_reason_and_plain_torch(monkeypatch):
    monkeypatch.setattr(quantization, "load_triton", no_module)
    with pytest.warns(UserWarning, match="Triton does not work here .ImportError: No module named 'triton'") as caught:
        assert choose_backend("auto", "cuda", 4, torch.float16) is TORCH
    assert len(caught) == 1 and str(caught[0].message) in slow_because()["slow_because"]


def test_triton_asked_for_by_name_that_fails_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(quantization, "load_triton", no_module)
    with pytest.raises(ValueError, match="triton does not work here .ImportError: No module .* Leave the flag out"):
        choose_backend("triton", "cuda", 4, torch.float16)


def test_the_clock_decides_up_to_how_many_rows_the_fused_product_is_used(monkeypatch):
    monkeypatch.setattr(quantization, "load_triton", lambda: counting_backend([], few_rows=64))
    monkeypatch.setattr(quantization, "try_backend", lambda *_: None)
    monkeypatch.setattr(quantization, "most_rows", lambda *_: 16)
    assert choose_backend("auto", "cuda", 4, torch.float16).few_rows == 16


def test_cpm_kernels_is_refused_for_int8():
    with pytest.raises(ValueError, match="cpm_kernels is for int4 weights only, and these are int8"):
        choose_backend("cpm_kernels", "cuda", 8, torch.float16)


@both_bits
@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_backend_with_wrong_results_fails_its_trial(factor, bits):
    try_backend(TORCH, "cpu", bits, torch.bfloat16)
    wrong_weight = Backend("wrong", lambda *args: factor * dequantize_weight(*args))
    wrong_product = counting_backend([], 16)._replace(
        multiply_few_rows=lambda input, *args: factor * F.linear(input, dequantize_weight(*args, input.dtype))
    )
    for backend in (wrong_weight, wrong_product):
        with pytest.raises(RuntimeError, match="results on a 40 x 96 weight are off by"):
            try_backend(backend, "cpu", bits, torch.float32)


@pytest.mark.parametrize(
    "missing, remedy", [("cpm_kernels", "pip install cpm_kernels"), ("pkg_resources", 'pip install "setuptools<81"')]
)
def test_what_cpm_kernels_lacks_is_named_with_its_remedy(missing, remedy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else True)
    with pytest.raises(ValueError, match="cpm_kernels does not work here") as caught:
        choose_backend("cpm_kernels", "cuda", 4, torch.float16)
    assert remedy in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cpm_kernels_is_never_imported_without_a_cuda_device():
    with pytest.raises(ValueError, match="there is no CUDA device"):
        choose_backend("cpm_kernels", "cuda", 4, torch.float16)
    assert "cpm_kernels" not in sys.modules


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas, NVIDIA's assembler, is not on the PATH")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", quantization_cpm.STORES)
def test_the_extraction_kernel_assembles(dtype, architecture, tmp_path):
    (tmp_path / "kernel.ptx").write_text(quantization_cpm.extraction_ptx(dtype))
    command = ["ptxas", f"-arch={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "is not defined for option 'gpu-name'" in done.stderr:
        pytest.skip(f"this ptxas does not know {architecture}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", quantization_cpm.STORES)
def test_the_extraction_kernel_gives_the_reference_weight(dtype):
    try:
        quantization_cpm.import_cpm_kernels()
    except RuntimeError as error:
        pytest.skip(str(error))
    quantized, scale = quantize_weight(random_weight(300, 1030).cuda(), 4)
    weight = quantization_cpm.dequantize_int4(quantized, scale, 4, dtype)
    assert torch.equal(weight, dequantize_weight(quantized, scale, 4, dtype))
