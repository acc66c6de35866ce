"""Triton kernels for what lies between the products of a layer on a GPU, each one launch instead of several.

No official file answers to this one: there, each operation is a kernel of torch's. All compute in float32 and round
once. `kernels.py` is the door: it imports this file where there is a GPU, tries each kernel against plain torch, and
holds the references.

Bytes decide their time: swiglu reads 4 F and writes 2 F bytes a token in half precision, which torch does in two passes
with 4 F more between them; a rotation reads and writes a token's queries and keys once instead of five times; add_norm
reads two rows and writes two. A step of decoding has few bytes, and there the number of launches decides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SWIGLU_COLUMNS = 1024
ROTATE_HEADS = 8
KEYS = 32  # that a program of attend_step takes at a time; 64 do not fit into the registers of every GPU
MOST_SPLITS = 64  # of a row's keys among programs
NORM = {"num_warps": 8}  # of a row of some thousand numbers
ONE_HEAD = {"num_warps": 1}
ATTEND = {"num_warps": 4, "num_stages": 2}
COMBINE = {"num_warps": 2}


# ---- SwiGLU


@triton.jit
def _swiglu_kernel(gate_value_pointer, output_pointer, num_columns, BLOCK: tl.constexpr):
    """silu(gate) * value: one row, BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate_pointer = gate_value_pointer + 2 * row * num_columns + columns
    gate = tl.load(gate_pointer, mask=inside, other=0).to(tl.float32)
    value = tl.load(gate_pointer + num_columns, mask=inside, other=0).to(tl.float32)
    tl.store(output_pointer + row * num_columns + columns, gate * tl.sigmoid(gate) * value, mask=inside)


@triton.jit
def _swiglu_backward_kernel(gradient_pointer, gate_value_pointer, output_pointer, num_columns, BLOCK: tl.constexpr):
    """The gradients of gate and value beside each other, as gate and value are."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate_offset = 2 * row * num_columns + columns
    gradient = tl.load(gradient_pointer + row * num_columns + columns, mask=inside, other=0).to(tl.float32)
    gate = tl.load(gate_value_pointer + gate_offset, mask=inside, other=0).to(tl.float32)
    value = tl.load(gate_value_pointer + gate_offset + num_columns, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = gradient * value * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(output_pointer + gate_offset, grad_gate, mask=inside)
    tl.store(output_pointer + gate_offset + num_columns, gradient * gate * sigmoid, mask=inside)


def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value (…, F) of (…, 2F)."""
    gate_value = gate_value.contiguous()
    num_columns = gate_value.shape[-1] // 2
    output = gate_value.new_empty(*gate_value.shape[:-1], num_columns)
    grid = (output.numel() // num_columns, triton.cdiv(num_columns, SWIGLU_COLUMNS))
    with torch.cuda.device_of(gate_value):  # Triton launches on the current device
        _swiglu_kernel[grid](gate_value, output, num_columns, BLOCK=SWIGLU_COLUMNS)
    return output


def swiglu_backward(gradient: Tensor, gate_value: Tensor) -> Tensor:
    """The gradient (…, 2F) of gate and value, of the gradient (…, F) of swiglu."""
    gradient, gate_value = gradient.contiguous(), gate_value.contiguous()
    num_columns = gradient.shape[-1]
    output = torch.empty_like(gate_value)
    grid = (gradient.numel() // num_columns, triton.cdiv(num_columns, SWIGLU_COLUMNS))
    with torch.cuda.device_of(gradient):
        _swiglu_backward_kernel[grid](gradient, gate_value, output, num_columns, BLOCK=SWIGLU_COLUMNS)
    return output


# ---- rotary positions


@triton.jit
def _turned(x_pointers, channels, angle_offset, cos_pointer, sin_pointer, inside, BACK: tl.constexpr, D: tl.constexpr):
    """float32: x with the pairs (0, 1), (2, 3), … of the first D/2 channels turned, or turned back."""
    x = tl.load(x_pointers, mask=inside, other=0).to(tl.float32)
    # The other channel of the pair: its line is in the cache already.
    other = tl.load(x_pointers + 1 - 2 * (channels % 2), mask=inside & (channels < D // 2), other=0).to(tl.float32)
    turns = channels < D // 2
    cos = tl.load(cos_pointer + angle_offset + channels // 2, mask=turns, other=1).to(tl.float32)
    sin = tl.load(sin_pointer + angle_offset + channels // 2, mask=turns, other=0).to(tl.float32)
    sign = 2.0 * (channels % 2) - 1
    if BACK:
        sign = -sign
    return x * cos + sign * other * sin


@triton.jit
def _rotate_kernel(
    x_pointer,  # (B, heads, S, D), the last contiguous
    cos_pointer,  # (B or 1, S, D/4)
    sin_pointer,
    output_pointer,  # (B, S, heads, D)
    num_heads,
    length,  # S
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    angle_batch_stride,  # 0 where all rows have the same positions
    BACK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    channels = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (channels < D)
    x_pointers = x_pointer + row * x_batch_stride + place * x_token_stride + heads * x_head_stride + channels
    angle_offset = row * angle_batch_stride + place * (D // 4)
    turned = _turned(x_pointers, channels, angle_offset, cos_pointer, sin_pointer, inside, BACK, D)
    tl.store(output_pointer + (token * num_heads + heads) * D + channels, turned, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x (B, heads, S, D) turned by the angles (B or 1, 1, S, D/4), or back; in memory (B, S, heads, D).

    The memory is that which attention's output will have: laid out so, it needs no copy before the next product.
    """
    batch_size, num_heads, length, channels = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    output = x.new_empty(batch_size, length, num_heads, channels)
    with torch.cuda.device_of(x):
        _rotate_kernel[(batch_size * length, triton.cdiv(num_heads, ROTATE_HEADS))](
            x,
            cos,
            sin,
            output,
            num_heads,
            length,
            *x.stride()[:3],
            0 if cos.shape[0] == 1 else cos.stride(0),
            BACK=back,
            D=channels,
            BLOCK_HEADS=ROTATE_HEADS,
            BLOCK_D=triton.next_power_of_2(channels),
        )
    return output.transpose(1, 2)


# ---- residual and norm


@triton.jit
def _add_norm_kernel(
    x_pointer,
    update_pointer,
    weight_pointer,
    total_pointer,
    normed_pointer,
    scale_pointer,
    num_columns,
    eps,
    BLOCK: tl.constexpr,
):
    """One row: total = x + update, and its RMS norm."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    places = row * num_columns + columns
    x = tl.load(x_pointer + places, mask=inside, other=0).to(tl.float32)
    update = tl.load(update_pointer + places, mask=inside, other=0).to(tl.float32)
    total = (x + update).to(total_pointer.dtype.element_ty)
    tl.store(total_pointer + places, total, mask=inside)
    wide = total.to(tl.float32)  # the norm is that of the rounded sum, which later layers read
    scale = 1 / tl.sqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
    tl.store(scale_pointer + row, scale)
    weight = tl.load(weight_pointer + columns, mask=inside, other=0).to(tl.float32)
    tl.store(normed_pointer + places, wide * scale * weight, mask=inside)


@triton.jit
def _add_norm_backward_kernel(
    grad_total_pointer,
    grad_normed_pointer,
    total_pointer,
    scale_pointer,
    weight_pointer,
    output_pointer,
    num_columns,
    BLOCK: tl.constexpr,
):
    """One row of the gradient that x and update share."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    places = row * num_columns + columns
    scale = tl.load(scale_pointer + row)
    weight = tl.load(weight_pointer + columns, mask=inside, other=0).to(tl.float32)
    gradient = tl.load(grad_normed_pointer + places, mask=inside, other=0).to(tl.float32) * weight
    normed = tl.load(total_pointer + places, mask=inside, other=0).to(tl.float32) * scale
    along = tl.sum(gradient * normed, axis=0) / num_columns
    grad_total = tl.load(grad_total_pointer + places, mask=inside, other=0).to(tl.float32)
    tl.store(output_pointer + places, grad_total + scale * (gradient - normed * along), mask=inside)


def add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + update (…, H), its RMS norm (…, H), and what the norm multiplied by, float32 (rows,)."""
    x, update = x.contiguous(), update.contiguous()
    num_columns = x.shape[-1]
    total, normed = torch.empty_like(x), torch.empty_like(x)
    scale = x.new_empty(x.numel() // num_columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _add_norm_kernel[(len(scale),)](
            x,
            update,
            weight,
            total,
            normed,
            scale,
            num_columns,
            eps,
            BLOCK=triton.next_power_of_2(num_columns),
            **NORM,
        )
    return total, normed, scale


def add_norm_backward(grad_total: Tensor, grad_normed: Tensor, total: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """The gradient (…, H) of x, and of update, of the gradients of both results of add_norm."""
    grad_total, grad_normed = grad_total.contiguous(), grad_normed.contiguous()
    num_columns = total.shape[-1]
    output = torch.empty_like(total)
    with torch.cuda.device_of(total):
        _add_norm_backward_kernel[(len(scale),)](
            grad_total,
            grad_normed,
            total,
            scale,
            weight,
            output,
            num_columns,
            BLOCK=triton.next_power_of_2(num_columns),
            **NORM,
        )
    return output


# ---- a step of decoding


@triton.jit
def _rotate_into_cache_kernel(
    mixed_pointer,  # (B, (N + 2 G) D): all queries, then all keys, then all values
    cos_pointer,  # (B, D/4)
    sin_pointer,
    slots_pointer,  # int64 (B,)
    query_pointer,  # (B, N, D)
    keys_pointer,  # (rows, G, slots, D)
    values_pointer,
    row_stride,  # of keys and values
    group_stride,
    num_queries,  # N
    num_groups,  # G
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one row: a query, a key or a value."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = num_queries + 2 * num_groups
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    x_pointers = mixed_pointer + (row * num_heads + head) * D + channels
    slot = tl.load(slots_pointer + row)
    if head < num_queries + num_groups:
        x = _turned(x_pointers, channels, row * (D // 4), cos_pointer, sin_pointer, inside, False, D)
        if head < num_queries:
            tl.store(query_pointer + (row * num_queries + head) * D + channels, x, mask=inside)
        else:
            place = row * row_stride + (head - num_queries) * group_stride + slot * D
            tl.store(keys_pointer + place + channels, x, mask=inside)
    else:
        value = tl.load(x_pointers, mask=inside, other=0)
        place = row * row_stride + (head - num_queries - num_groups) * group_stride + slot * D
        tl.store(values_pointer + place + channels, value, mask=inside)


def rotate_into_cache(mixed, cos, sin, keys, values, slots):
    """Queries (B, N, D), turned, of mixed (B, (N + 2 G) D); its turned keys and its values go to `slots` (B,).

    The angles are (B, 1, 1, D/4); keys and values (at least B, G, slots, D), each slot contiguous.
    """
    batch_size, num_groups, channels = mixed.shape[0], keys.shape[1], keys.shape[3]
    num_queries = mixed.shape[1] // channels - 2 * num_groups
    query = mixed.new_empty(batch_size, num_queries, channels)
    assert keys.stride() == values.stride() and keys.stride(2) == channels and keys.stride(3) == 1
    with torch.cuda.device_of(mixed):
        _rotate_into_cache_kernel[(batch_size, num_queries + 2 * num_groups)](
            mixed.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            slots,
            query,
            keys,
            values,
            *keys.stride()[:2],
            num_queries,
            num_groups,
            D=channels,
            BLOCK_D=triton.next_power_of_2(channels),
            **ONE_HEAD,
        )
    return query


@triton.jit
def _attend_kernel(
    query_pointer,  # (B, N, D)
    keys_pointer,  # (rows, G, slots, D)
    values_pointer,
    slots_pointer,  # int64 (B,): of each row's newest key
    context_pointer,  # float32 (B, G, SPLITS, R, D)
    highest_pointer,  # float32 (B, G, SPLITS, R)
    sum_pointer,  # float32 (B, G, SPLITS, R)
    row_stride,
    group_stride,
    num_groups,
    idle_slot,  # a row whose newest key is here is not in use, and sees one key
    scale,
    R: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The R queries of a group against one of SPLITS equal parts of a row's keys, softmax in one pass over them."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = pair // num_groups, pair % num_groups
    repeats, channels, places = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_KEYS)
    slot = tl.load(slots_pointer + row)
    length = tl.where(slot == idle_slot, 1, slot + 1)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    first = split * part
    last = tl.minimum(first + part, length)
    of_heads = (repeats < R)[:, None] & (channels < D)[None, :]
    query_place = (pair * R + repeats)[:, None] * D + channels[None, :]
    query = tl.load(query_pointer + query_place, mask=of_heads, other=0)
    cache_place = row * row_stride + group * group_stride
    highest = tl.full((BLOCK_R,), -1e30, dtype=tl.float32)  # no infinity, whose difference would be no number
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    context = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(first, last, BLOCK_KEYS):
        keys = start + places
        seen = keys < last
        inside = seen[:, None] & (channels < D)[None, :]
        place = cache_place + keys[:, None] * D + channels[None, :]
        key = tl.load(keys_pointer + place, mask=inside, other=0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrunk = tl.exp(highest - higher)
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0)
        total = total * shrunk + tl.sum(weights, axis=1)
        value = tl.load(values_pointer + place, mask=inside, other=0)
        context = context * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = higher
    place = (pair * SPLITS + split) * R + repeats
    tl.store(highest_pointer + place, highest, mask=repeats < R)
    tl.store(sum_pointer + place, total, mask=repeats < R)
    tl.store(context_pointer + place[:, None] * D + channels[None, :], context, mask=of_heads)


@triton.jit
def _combine_kernel(
    context_pointer,
    highest_pointer,
    sum_pointer,
    output_pointer,  # (B, N, D)
    R: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query: the contexts of its SPLITS parts, weighted by their share of the softmax."""
    pair, repeat = tl.program_id(0).to(tl.int64), tl.program_id(1)
    splits, channels = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    places = (pair * SPLITS + splits) * R + repeat
    highest = tl.load(highest_pointer + places)
    share = tl.exp(highest - tl.max(highest, axis=0))
    total = tl.sum(share * tl.load(sum_pointer + places), axis=0)
    inside = (channels < D)[None, :]
    contexts = tl.load(context_pointer + places[:, None] * D + channels[None, :], mask=inside, other=0)
    context = tl.sum(contexts * share[:, None], axis=0) / total
    tl.store(output_pointer + (pair * R + repeat) * D + channels, context, mask=channels < D)


def attend_step(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, splits: int) -> Tensor:
    """Attention of query (B, N, D) to the keys of its row up to slot `slots` (B,): (B, N D).

    Keys and values are (at least B, G, slots, D). The last slot belongs to no row: a row that is there is not in use.
    `splits`, a power of two, programs share the keys of a row and group.
    """
    batch_size, num_queries, channels = query.shape
    num_groups = keys.shape[1]
    repeats = num_queries // num_groups
    pairs = batch_size * num_groups
    context = query.new_empty(pairs, splits, repeats, channels, dtype=torch.float32)
    highest, total = context.new_empty(2, pairs, splits, repeats)
    output = query.new_empty(batch_size, num_queries * channels)
    block = triton.next_power_of_2(channels)
    assert keys.stride() == values.stride() and keys.stride(2) == channels and keys.stride(3) == 1
    with torch.cuda.device_of(query):
        _attend_kernel[(pairs, splits)](
            query,
            keys,
            values,
            slots,
            context,
            highest,
            total,
            *keys.stride()[:2],
            num_groups,
            keys.shape[2] - 1,
            channels**-0.5,
            R=repeats,
            D=channels,
            SPLITS=splits,
            BLOCK_R=max(16, triton.next_power_of_2(repeats)),
            BLOCK_D=max(16, block),
            BLOCK_KEYS=KEYS,
            **ATTEND,
        )
        _combine_kernel[(pairs, repeats)](
            context, highest, total, output, R=repeats, D=channels, SPLITS=splits, BLOCK_D=block, **COMBINE
        )
    return output


def launches(dtype, capability):
    """Each kernel with the constants and options of ChatGLM2-6B, for whoever compiles it without a GPU."""
    return (
        (_swiglu_kernel, {"BLOCK": SWIGLU_COLUMNS}, {}),
        (_swiglu_backward_kernel, {"BLOCK": SWIGLU_COLUMNS}, {}),
        (_rotate_kernel, {"BACK": True, "D": 128, "BLOCK_HEADS": ROTATE_HEADS, "BLOCK_D": 128}, {}),
        (_add_norm_kernel, {"BLOCK": 4096}, NORM),
        (_add_norm_backward_kernel, {"BLOCK": 4096}, NORM),
        (_rotate_into_cache_kernel, {"D": 128, "BLOCK_D": 128}, ONE_HEAD),
        (_attend_kernel, {"R": 16, "D": 128, "SPLITS": 8, "BLOCK_R": 16, "BLOCK_D": 128, "BLOCK_KEYS": KEYS}, ATTEND),
        (_combine_kernel, {"R": 16, "D": 128, "SPLITS": MOST_SPLITS, "BLOCK_D": 128}, COMBINE),
    )
