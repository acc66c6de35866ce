"""Triton kernels for int8 and int4 weights on a GPU: a product for few rows, and dequantization for many.

Answers to the CUDA kernels inside the official `quantization.py`; those are precompiled and stop at compute capability
8.6, these are compiled for the GPU at hand. `quantization.py` imports this file once a CUDA device is to be used, and
holds the scheme and the plain torch path that these results are tested against.

What bounds the time, for a weight of N x K at 4 bits (ChatGLM2-6B's largest: N = 27392, K = 4096):
- few rows (decoding): reading the weight, N K / 2 bytes = 56 MB. `multiply_few_rows` reads each byte once and writes
  N results a row; nothing of the size of the float weight ever exists. A bfloat16 weight takes 224 MB. Each program
  takes 64 rows of the weight, so that the inputs, 2 M K bytes, are read N / 64 times, out of the cache.
- many rows (training, prompts): the arithmetic. `dequantize` reads the 56 MB and writes 224 MB once, and the library's
  matrix product does the rest. PyTorch's allocator hands every call the same block of memory again, so that the
  buffer costs one float weight in all, not one per layer.
"""

import functools
import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from chatglm2.kernels import MARGIN, seconds, trial_key
from common.machine_cache import kept_or_measured

FEW_ROWS = 64  # rows of input that the fused product takes at most; most_rows() decides by the clock


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
    partial_pointer,  # float32 (splits, tiles, BLOCK_INPUTS, BLOCK_ROWS)
    counters_pointer,  # int32 (tiles,), zeros before and behind
    num_inputs,  # M, at most BLOCK_INPUTS
    num_rows,  # N
    num_bytes,  # B
    split_bytes,  # of a row, for one program: a multiple of BLOCK_BYTES
    num_splits,
    BITS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """BLOCK_ROWS rows of the weight against all inputs: output = (input x integers) x scale, summed in float32.

    Where there are fewer tiles than multiprocessors, several programs share the bytes of a tile's rows. The one that is
    finished last adds their sums up, always in the same order, so that results do not differ from run to run.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    weight_rows = weight_pointer + rows.to(tl.int64)[None, :] * num_bytes
    num_columns = num_bytes * 8 // BITS
    BLOCK_COLUMNS: tl.constexpr = BLOCK_BYTES * 8 // BITS
    input_rows = input_pointer + inputs[:, None] * num_columns
    total = tl.zeros((BLOCK_INPUTS, BLOCK_ROWS), dtype=tl.float32)
    first = split * split_bytes
    for start in range(first, tl.minimum(first + split_bytes, num_bytes), BLOCK_BYTES):
        byte = start + tl.arange(0, BLOCK_BYTES)[:, None]
        packed = tl.load(weight_rows + byte, mask=(byte < num_bytes) & (rows < num_rows)[None, :], other=0)
        column = start * 8 // BITS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        in_range = (column < num_columns) & (inputs < num_inputs)[:, None]
        values = tl.load(input_rows + column, mask=in_range, other=0)  # (BLOCK_INPUTS, BLOCK_COLUMNS)
        if BITS == 8:
            integers = packed.to(tl.float32).to(values.dtype)
            total = tl.dot(values, integers, total, input_precision="ieee")
        else:
            even, odd = _unpack_int4(packed)
            even_values, odd_values = tl.split(tl.reshape(values, (BLOCK_INPUTS, BLOCK_BYTES, 2)))
            total = tl.dot(even_values, even.to(values.dtype), total, input_precision="ieee")
            total = tl.dot(odd_values, odd.to(values.dtype), total, input_precision="ieee")
    finished_before = num_splits - 1
    if num_splits > 1:
        cells = inputs[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        cells += tile * BLOCK_INPUTS * BLOCK_ROWS
        split_cells = tl.num_programs(0) * BLOCK_INPUTS * BLOCK_ROWS
        tl.store(partial_pointer + split * split_cells + cells, total)
        tl.debug_barrier()  # all threads have stored before one of them counts
        finished_before = tl.atomic_add(counters_pointer + tile, 1, sem="acq_rel")
        if finished_before == num_splits - 1:
            total = tl.zeros((BLOCK_INPUTS, BLOCK_ROWS), dtype=tl.float32)
            for other in range(num_splits):  # past the cache of this multiprocessor, which knows nothing of the others
                total += tl.load(partial_pointer + other * split_cells + cells, cache_modifier=".cg")
            tl.store(counters_pointer + tile, 0)
    if finished_before == num_splits - 1:
        scale = tl.load(scale_pointer + rows, mask=rows < num_rows, other=0).to(tl.float32)
        in_range = (inputs < num_inputs)[:, None] & (rows < num_rows)[None, :]
        tl.store(output_pointer + inputs[:, None] * num_rows + rows[None, :], total * scale[None, :], mask=in_range)


DEQUANTIZE = ({"BLOCK_ROWS": 8, "BLOCK_BYTES": 256}, {"num_warps": 4})
TILES = (16, 32, 64)  # rows of input in a tile of the fused product, up to FEW_ROWS
TILE_ROWS = 64  # of the weight: each program reads all inputs, from the cache at best
MOST_SPLITS = 8


def multiply_tile(num_inputs, dtype, capability):
    """(tile, options) of the fused product on a GPU: what fits its registers and its shared memory.

    Without tensor cores, which a GPU has for half precision from compute capability 8.0 on as Triton compiles, numbers
    are multiplied one by one out of registers, and a larger tile would spill.
    """
    tensor_cores = dtype != torch.float32 and capability >= (8, 0)
    inputs = next(inputs for inputs in TILES if num_inputs <= inputs)
    tile = {"BLOCK_INPUTS": inputs, "BLOCK_ROWS": TILE_ROWS, "BLOCK_BYTES": 64 if tensor_cores else 16}
    return tile, {"num_warps": 4, "num_stages": 4 if tensor_cores else 2}


def launches(dtype, capability):
    """Each kernel with its constants and options, for whoever compiles it without a GPU."""
    for bits in (4, 8):
        yield _dequantize_kernel, {"BITS": bits, **DEQUANTIZE[0]}, DEQUANTIZE[1]
        for inputs in TILES:
            tile, options = multiply_tile(inputs, dtype, capability)
            yield _few_rows_kernel, {"BITS": bits, **tile}, options


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`quantization.dequantize_weight` as one kernel: float (out, in), rounded to `dtype` once."""
    num_rows, num_bytes = weight.shape
    output = torch.empty(num_rows, num_bytes * 8 // bits, dtype=dtype, device=weight.device)
    tile, options = DEQUANTIZE
    grid = (triton.cdiv(num_rows, tile["BLOCK_ROWS"]), triton.cdiv(num_bytes, tile["BLOCK_BYTES"]))
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        _dequantize_kernel[grid](weight.contiguous(), scale, output, num_rows, num_bytes, BITS=bits, **tile, **options)
    return output


@functools.cache
def of_device(device: torch.device) -> tuple[tuple[int, int], int, Tensor]:
    """(compute capability, multiprocessors, zeros that the programs of a tile count with) of a GPU."""
    capability, processors = (9, 0), 4  # in Triton's interpreter, on a CPU
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return capability, processors, torch.zeros(2 * processors, dtype=torch.int32, device=device)


def multiply_few_rows(input: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """input (M, in) x dequantized weight (out, in) transposed -> (M, out) in the input's dtype; M up to FEW_ROWS."""
    num_inputs, (num_rows, num_bytes) = input.shape[0], weight.shape
    assert num_inputs <= FEW_ROWS and input.shape[1] == num_bytes * 8 // bits
    capability, processors, counters = of_device(weight.device)
    tile, options = multiply_tile(num_inputs, input.dtype, capability)
    tiles = triton.cdiv(num_rows, TILE_ROWS)
    wanted = max(1, min(2 * processors // tiles, MOST_SPLITS))
    split_bytes = triton.cdiv(triton.cdiv(num_bytes, wanted), tile["BLOCK_BYTES"]) * tile["BLOCK_BYTES"]
    splits = triton.cdiv(num_bytes, split_bytes)
    output = input.new_empty(num_inputs, num_rows)
    cells = splits * tiles * tile["BLOCK_INPUTS"] * TILE_ROWS if splits > 1 else 1
    partial = input.new_empty(cells, dtype=torch.float32)
    with torch.cuda.device_of(weight):
        _few_rows_kernel[(tiles, splits)](
            input.contiguous(),
            weight.contiguous(),
            scale,
            output,
            partial,
            counters,
            num_inputs,
            num_rows,
            num_bytes,
            split_bytes,
            splits,
            BITS=bits,
            **tile,
            **options,
        )
    return output


@functools.cache
def most_rows(device: torch.device, bits: int, dtype: torch.dtype) -> int:
    """The most rows that multiply_few_rows takes no longer for than dequantizing and torch's product, by the clock.

    0 where it never pays, as without tensor cores. Measured once on a machine, for two layers of ChatGLM2-6B.
    """
    key = f"int{bits}, {trial_key(sys.modules[__name__], device, dtype)}"
    return kept_or_measured(
        "most_rows", key, lambda: measure_rows(device, bits, dtype), lambda kept: kept in (0, *TILES)
    )


def measure_rows(device, bits, dtype):
    found = 0
    layers = []
    for out_features, in_features in ((4608, 4096), (4096, 13696)):
        weight = torch.randint(-128, 128, (out_features, in_features * bits // 8), device=device, dtype=torch.int8)
        layers.append((weight, torch.full((out_features,), 0.01, device=device, dtype=dtype)))
    for rows in TILES:
        fused = plain = 0.0
        for weight, scale in layers:
            input = torch.ones(rows, weight.shape[1] * 8 // bits, device=device, dtype=dtype)
            fused += seconds(multiply_few_rows, (input, weight, scale, bits))
            plain += seconds(
                lambda *of_layer: F.linear(of_layer[0], dequantize(*of_layer[1:])), (input, weight, scale, bits, dtype)
            )
        if fused > MARGIN * plain:
            break
        found = rows
    return found
