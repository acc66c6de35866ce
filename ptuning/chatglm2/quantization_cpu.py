"""A few rows times int8 or int4 weights on a CPU, by torch's own kernels: `--quantization_backend packed`.

No official file answers to this one: there every product dequantizes the whole weight first. These kernels read the
integers alone, 1 or ½ byte a weight, so that a token costs what reading them costs. They take the input in bfloat16 and
sum in float32. Here they get scales of 1: the integers are exact in bfloat16, and the float32 product is scaled
afterwards. Input and product are rounded to bfloat16 once each, which is a relative error of 0.0017 together.

The int8 kernel takes the official layout. The int4 kernel wants another one, of the same size, made by `pack`:

    official      (out, in/2)  int8   two columns of a row in a byte, two's complement, the even one in the high nibble
    packed        (out, in/2)  uint8  blocks of BLOCK rows lie one after the other as (in, BLOCK/2); a byte holds a
                                      column of two rows, row i in the low nibble, row BLOCK/2 + i in the high one,
                                      each plus 8

The dtype tells the two layouts apart. A range of whole blocks of rows is a packed weight too.

More rows are multiplied in their own dtype. Up to SOME_ROWS of them a processor core unpacks a few blocks and
multiplies them itself, so that no weight moves from core to core: on machines whose cores do not share a cache, such as
many rented ones, handing 2 MB over takes twice as long as multiplying them.
"""

from functools import cache

import torch
from torch import Tensor

from chatglm2.matmul import MULTIPLIES_BFLOAT16

CAPABILITY = torch.backends.cpu.get_cpu_capability()
BLOCK = {"AVX512": 64, "AVX2": 32}.get(CAPABILITY, 0)  # rows; 0 where the layout of torch's kernel is not known
GROUPS = (256, 128, 64, 32)  # columns that share a scale in the int4 kernel: fewer scales, fewer bytes
FEW_ROWS = 32  # more of them take longer than dequantizing the weight once and multiplying in float32
SOME_ROWS = 256  # more of them are quicker in one large product, whoever unpacks
BLOCKS_AT_ONCE = 4  # 1 MB of integers of the 6B's layers, 4 MB in float32


def is_packed(weight: Tensor) -> bool:
    """True for an int4 weight in the kernel's layout."""
    return weight.dtype == torch.uint8


def fits(out_features: int, in_features: int, bits: int) -> bool:
    """True for a weight (out, in) that the kernels take: for int4 whole blocks of rows and groups of columns."""
    return bits == 8 or (BLOCK > 0 and out_features % BLOCK == 0 and in_features % GROUPS[-1] == 0)


def pack(weight: Tensor) -> Tensor:
    """int8 (out, in // 2) in the official layout -> uint8 (out, in // 2) in the kernel's."""
    rows, width = weight.shape
    blocks = (
        weight.view(torch.uint8).view(-1, BLOCK, width).transpose(1, 2).contiguous()
    )  # (out / BLOCK, in / 2, BLOCK)
    left, right = blocks.chunk(2, dim=2)
    even, odd = (left >> 4) | (right & 0xF0), (left & 0x0F) | (right << 4)
    return torch.stack((even, odd), dim=2).bitwise_xor_(0x88).view(rows, width)  # two's complement plus 8, both halves


def unpack(packed: Tensor) -> Tensor:
    """The integers of a packed weight: int8 (out / BLOCK, BLOCK, in), a view whose rows of a block lie side by side."""
    blocks = packed.view(-1, packed.shape[1] * 2, BLOCK // 2)
    integers = torch.cat((blocks & 0x0F, blocks >> 4), dim=2).view(torch.int8).sub_(8)
    return integers.transpose(1, 2)


@cache
def ones(*shape: int) -> Tensor:
    """Scales that change nothing, bfloat16, one tensor for all weights of a shape."""
    with torch.inference_mode(False):
        return torch.ones(shape, dtype=torch.bfloat16)


@cache
def scales_and_zeros(in_features: int, out_features: int) -> tuple[int, Tensor]:
    """The group size of the int4 kernel for a weight (out, in), and (groups, out, 2): scales of 1, zeros of 0."""
    group = next(group for group in GROUPS if in_features % group == 0)
    with torch.inference_mode(False):
        numbers = torch.zeros(in_features // group, out_features, 2, dtype=torch.bfloat16)
        numbers[..., 0] = 1
    return group, numbers


def multiply_few_rows(input: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """input (rows, in) times an int8 weight or a packed int4 one, (out, in), transposed: (rows, out), input's dtype."""
    rows = input.to(torch.bfloat16).contiguous()
    if bits == 8:
        product = torch._weight_int8pack_mm(rows, weight, ones(len(weight)))
    else:
        group, numbers = scales_and_zeros(input.shape[1], len(weight))
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group, numbers)
    return product.to(input.dtype).mul_(scale)


def takes_some_rows(input: Tensor, weight: Tensor) -> bool:
    """True where `multiply_some_rows` multiplies input (…, in) by a weight, in either layout."""
    dtypes = (torch.float32, torch.bfloat16) if MULTIPLIES_BFLOAT16 else (torch.float32,)
    return is_packed(weight) and input.dtype in dtypes and 0 < input.numel() <= SOME_ROWS * input.shape[-1]


def multiply_some_rows(input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """input (rows, in) times a packed int4 weight (out, in), transposed: (rows, out), all in the input's dtype.

    The integers are exact in either dtype; the product is rounded to it, and again when it is scaled. Every operation
    below divides its blocks among the cores in the same way.
    """
    rows, in_features = input.shape
    half = BLOCK // 2
    blocks = weight.view(-1, in_features, half)
    integers = torch.empty(BLOCKS_AT_ONCE, 2, in_features, half, dtype=torch.uint8)
    floats = torch.empty(integers.shape, dtype=input.dtype)
    product = torch.empty(len(blocks), 2, rows, half, dtype=input.dtype)
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        part, result = (all_blocks[start : start + BLOCKS_AT_ONCE] for all_blocks in (blocks, product))
        unpacked, converted = integers[: len(part)], floats[: len(part)]
        torch.bitwise_and(part, 0x0F, out=unpacked[:, 0])
        torch.bitwise_right_shift(part, 4, out=unpacked[:, 1])
        converted.copy_(unpacked.view(torch.int8).sub_(8))
        torch.bmm(input.expand(2 * len(part), -1, -1), converted.flatten(0, 1), out=result.flatten(0, 1))
    return product.permute(2, 0, 1, 3).reshape(rows, -1).mul_(scale)
