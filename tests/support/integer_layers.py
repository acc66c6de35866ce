"""Integer layers and their parameters."""

import pytest
import torch
from torch import nn

from chatglm2.quantization import QuantizedLinear, dequantize_weight

both_bits = pytest.mark.parametrize("bits", [4, 8])


def random_weight(rows, columns, seed=0, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def layer_pair(bits, bias, rows=48, columns=32):
    """A quantized layer and the float32 layer that its integers stand for."""
    torch.manual_seed(bits)
    linear = nn.Linear(columns, rows, bias=bias)
    layer = QuantizedLinear.from_linear(linear, bits)
    with torch.no_grad():
        linear.weight.copy_(dequantize_weight(layer.weight, layer.weight_scale, bits, torch.float32))
    return layer, linear
