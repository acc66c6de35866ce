"""Triton kernels for int8 and int4 weights on a GPU: a product for few rows, and dequantization for many.

Answers to the CUDA kernels inside the official `quantization.py`; those are precompiled and stop at compute capability
8.6, these are compiled for the GPU at hand. `quantization.py` imports this file once a CUDA device is to be used, and
holds the scheme and the plain torch path that these results are tested against.

What bounds the time, for a weight of N x K at 4 bits (ChatGLM2-6B's largest: N = 27392, K = 4096):
- few rows (decoding): reading the weight, N K / 2 bytes = 56 MB. `multiply_few_rows` reads each byte once and writes
  N results a row; nothing of the size of the float weight ever exists. A bfloat16 weight takes 224 MB.
- many rows (training, prompts): the arithmetic. `dequantize` reads the 56 MB and writes 224 MB once, and the library's
  matrix product does the rest. PyTorch's allocator hands every call the same block of memory again, so that the
  buffer costs one float weight in all, not one per layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 16  # rows of input up to which the fused product is used: one tile of the tensor cores


@triton.jit
def _unpack_int4(packed):
    """int8 (..., B) -> float32 even columns (high nibbles) and odd columns (low nibbles), each (..., B)."""
    return (packed >> 4).to(tl.float32), ((packed << 4) >> 4).to(tl.float32)


@triton.jit
def _dequantize_kernel(
    weight_pointer,  # int8 (N, B)
    scale_pointer,  # float (N,)
    output_pointer,  # float (N, K)
    num_rows,  # N
    num_bytes,  # B: bytes of a row, K / 2 for 4 bits and K for 8
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """One tile of BLOCK_ROWS x BLOCK_BYTES bytes: output = integers x scale, rounded once from float32."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    in_range = (rows < num_rows)[:, None] & (columns < num_bytes)[None, :]
    offsets = rows.to(tl.int64)[:, None] * num_bytes + columns[None, :]
    packed = tl.load(weight_pointer + offsets, mask=in_range, other=0)
    scale = tl.load(scale_pointer + rows, mask=rows < num_rows, other=0).to(tl.float32)[:, None]
    if BITS == 8:
        tl.store(output_pointer + offsets, packed.to(tl.float32) * scale, mask=in_range)
    else:
        even, odd = _unpack_int4(packed)
        # Side by side again, so that neighbouring threads write neighbouring columns.
        block = tl.reshape(tl.join(even * scale, odd * scale), (BLOCK_ROWS, 2 * BLOCK_BYTES))
        columns = tl.program_id(1) * 2 * BLOCK_BYTES + tl.arange(0, 2 * BLOCK_BYTES)
        in_range = (rows < num_rows)[:, None] & (columns < 2 * num_bytes)[None, :]
        offsets = rows.to(tl.int64)[:, None] * (2 * num_bytes) + columns[None, :]
        tl.store(output_pointer + offsets, block, mask=in_range)


@triton.jit
def _few_rows_kernel(
    input_pointer,  # float (M, K)
    weight_pointer,  # int8 (N, B)
    scale_pointer,  # float (N,)
    output_pointer,  # float (M, N)
    num_inputs,  # M, at most BLOCK_INPUTS
    num_rows,  # N
    num_bytes,  # B
    BITS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """BLOCK_ROWS rows of the weight against all inputs: output = (input x integers) x scale, summed in float32.

    A row is short (2 KB for K = 4096), and a tile of BLOCK_INPUTS x BLOCK_ROWS results occupies one warp. So GROUPS
    warps take neighbouring pieces of the same rows, as a batch of GROUPS products, and their sums are added at the
    end: enough bytes are on their way at any time, and nothing is exchanged between programs.
    """
    group = tl.arange(0, GROUPS)[:, None, None]
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    weight_rows = weight_pointer + rows.to(tl.int64)[None, None, :] * num_bytes
    num_columns = num_bytes * 8 // BITS
    BLOCK_COLUMNS: tl.constexpr = BLOCK_BYTES * 8 // BITS
    input_rows = input_pointer + inputs[None, :, None] * num_columns
    total = tl.zeros((GROUPS, BLOCK_INPUTS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, num_bytes, GROUPS * BLOCK_BYTES):
        byte = start + group * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :, None]
        in_range = (byte < num_bytes) & (rows < num_rows)[None, None, :]
        packed = tl.load(weight_rows + byte, mask=in_range, other=0)  # (GROUPS, BLOCK_BYTES, BLOCK_ROWS)
        column = start * 8 // BITS + group * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
        in_range = (column < num_columns) & (inputs < num_inputs)[None, :, None]
        values = tl.load(input_rows + column, mask=in_range, other=0)  # (GROUPS, BLOCK_INPUTS, BLOCK_COLUMNS)
        if BITS == 8:
            integers = packed.to(tl.float32).to(values.dtype)
            total = tl.dot(values, integers, total, input_precision="ieee")
        else:
            even, odd = _unpack_int4(packed)
            pairs = tl.reshape(values, (GROUPS, BLOCK_INPUTS, BLOCK_BYTES, 2))
            even_values, odd_values = tl.split(pairs)
            total = tl.dot(even_values, even.to(values.dtype), total, input_precision="ieee")
            total = tl.dot(odd_values, odd.to(values.dtype), total, input_precision="ieee")
    scale = tl.load(scale_pointer + rows, mask=rows < num_rows, other=0).to(tl.float32)
    result = tl.sum(total, axis=0) * scale[None, :]
    in_range = (inputs < num_inputs)[:, None] & (rows < num_rows)[None, :]
    tl.store(output_pointer + inputs[:, None] * num_rows + rows[None, :], result, mask=in_range)


# Each kernel's tile, and how many warps work on it; `num_stages` tiles of the weight are on their way at a time.
DEQUANTIZE = ({"BLOCK_ROWS": 8, "BLOCK_BYTES": 256}, {"num_warps": 4})
MULTIPLY = (
    {"BLOCK_INPUTS": FEW_ROWS, "BLOCK_ROWS": 16, "BLOCK_BYTES": 64, "GROUPS": 4},
    {"num_warps": 4, "num_stages": 4},
)
LAUNCHES = ((_dequantize_kernel, *DEQUANTIZE), (_few_rows_kernel, *MULTIPLY))


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`quantization.dequantize_weight` as one kernel: float (out, in), rounded to `dtype` once."""
    num_rows, num_bytes = weight.shape
    output = torch.empty(num_rows, num_bytes * 8 // bits, dtype=dtype, device=weight.device)
    tile, options = DEQUANTIZE
    grid = (triton.cdiv(num_rows, tile["BLOCK_ROWS"]), triton.cdiv(num_bytes, tile["BLOCK_BYTES"]))
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        _dequantize_kernel[grid](weight.contiguous(), scale, output, num_rows, num_bytes, BITS=bits, **tile, **options)
    return output


def multiply_few_rows(input: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """input (M, in) x dequantized weight (out, in) transposed -> (M, out) in the input's dtype; M up to FEW_ROWS."""
    num_inputs, (num_rows, num_bytes) = input.shape[0], weight.shape
    assert num_inputs <= FEW_ROWS and input.shape[1] == num_bytes * 8 // bits
    output = torch.empty(num_inputs, num_rows, dtype=input.dtype, device=input.device)
    tile, options = MULTIPLY
    with torch.cuda.device_of(weight):
        _few_rows_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
            input.contiguous(),
            weight.contiguous(),
            scale,
            output,
            num_inputs,
            num_rows,
            num_bytes,
            BITS=bits,
            **tile,
            **options,
        )
    return output
