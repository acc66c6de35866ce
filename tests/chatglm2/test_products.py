"""Products with frozen weights: equal to torch's own, whatever kernel computes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chatglm2 import matmul as products
from chatglm2.matmul import Linear, convert, multiply, round_rows

IN, OUT = 48, 80


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def kernel(request, monkeypatch):
    if request.param and not products.ONEDNN:
        pytest.skip("this processor has no AVX, where torch's own product stays")
    monkeypatch.setattr(products, "ONEDNN", request.param)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 24, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_equals_that_in_double_precision(kernel, rows, with_bias):
    x, weight, bias = numbers(rows, IN), numbers(OUT, IN, seed=1), numbers(OUT, seed=2) if with_bias else None
    torch.testing.assert_close(multiply(x, weight, bias), expected(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 20, 100])
def test_a_transposed_weight_is_multiplied_too(kernel, rows):
    x, weight = numbers(rows, OUT), numbers(OUT, IN, seed=1)
    torch.testing.assert_close(multiply(x, weight.t()), expected(x, weight.t()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [numbers(3, 5, IN), numbers(5, 3, IN).transpose(0, 1), numbers(0, IN), numbers(2, 0, IN)])
def test_a_product_keeps_the_shape_of_its_rows(kernel, x):
    weight = numbers(OUT, IN, seed=1)
    assert multiply(x, weight).shape == (*x.shape[:-1], OUT)
    torch.testing.assert_close(multiply(x, weight), expected(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_multiplied_as_torch_does(kernel, dtype):
    x, weight = numbers(9, IN).to(dtype), numbers(OUT, IN, seed=1).to(dtype)
    assert torch.equal(multiply(x, weight), F.linear(x, weight))


# ---- the memory of a weight


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (IN, IN), (2100, IN)])
def test_a_converted_weight_has_the_same_shape_and_numbers(kernel, shape):
    weight = numbers(*shape).half()
    converted = convert(weight, torch.float32)
    assert converted.dtype == torch.float32 and torch.equal(converted, weight.float())


def test_the_longer_side_of_a_converted_weight_lies_contiguous(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", True)
    assert convert(numbers(OUT, IN).half(), torch.float32).stride() == (1, OUT)
    assert convert(numbers(IN, OUT).half(), torch.float32).stride() == (OUT, 1)


def test_a_weight_in_bfloat16_keeps_its_rows_contiguous(kernel):
    weight = numbers(OUT, IN).half()
    converted = convert(weight, torch.bfloat16)
    assert converted.stride() == (IN, 1) and torch.equal(converted, weight.bfloat16())


def test_a_weight_that_has_the_dtype_is_left_where_it_is(kernel):
    weight = numbers(OUT, IN)
    assert convert(weight, torch.float32).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("missing", ["MADV_HUGEPAGE", "madvise"])
def test_a_weight_is_converted_where_there_are_no_huge_pages(monkeypatch, missing):
    if missing == "madvise":  # a kernel built without them refuses the advice

        class Memory(products.mmap.mmap):
            def madvise(self, *advice):
                raise OSError(22, "Invalid argument")

        monkeypatch.setattr(products.mmap, "mmap", Memory)
    else:
        monkeypatch.delattr(products.mmap, missing)
    weight = numbers(OUT, IN).half()
    assert torch.equal(convert(weight, torch.float32), weight.float())


# ---- the layer


def layers(with_bias):
    """A torch layer and ours of the same numbers."""
    torch.manual_seed(0)
    theirs, ours = nn.Linear(IN, OUT, with_bias), Linear(IN, OUT, with_bias)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_layer_passes_the_gradient_on_and_keeps_none(kernel, with_bias):
    gradients = []
    for layer in layers(with_bias):
        layer.requires_grad_(False)
        x = numbers(3, 7, IN).requires_grad_()
        (layer(x) * numbers(3, 7, OUT, seed=1)).sum().backward()
        gradients.append(x.grad)
        assert layer.weight.grad is None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_a_layer_that_trains_gets_its_gradient(kernel):
    theirs, ours = layers(True)
    for layer in (theirs, ours):
        (layer(numbers(9, IN)) * numbers(9, OUT, seed=1)).sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.bias.grad, theirs.bias.grad)


def test_a_layer_whose_bias_alone_trains_gets_its_gradient(kernel):
    _, layer = layers(True)
    layer.weight.requires_grad_(False)
    layer(numbers(9, IN)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 9.0))


@pytest.mark.parametrize(
    ("count", "rounded"), [(0, 0), (1, 1), (7, 7), (8, 8), (9, 16), (64, 64), (65, 128), (129, 192)]
)
def test_numbers_of_rows_are_rounded_up(count, rounded):
    assert round_rows(count) == rounded


def test_batches_of_any_size_take_a_few_kernels_only(monkeypatch):
    if not products.ONEDNN:
        pytest.skip("this processor has no AVX, where torch's own product stays")
    shapes, pointwise = set(), torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_linear_pointwise",
        lambda x, w, *rest: (shapes.add((x.shape, w.shape)), pointwise(x, w, *rest))[1],
    )
    for rows in range(1, 1025):
        multiply(numbers(rows, 4), numbers(6, 4))
    assert len(shapes) == 8 + 7 + 15
