"""The door to the fused kernels of a GPU: which of them run, decided by a trial on the GPU itself.

No official file answers to this one. `kernels_triton.py` holds the kernels; here each stands beside its reference in
plain torch. Before the first use on a GPU each is held against it, in results and in time, at ChatGLM2-6B's shapes. One
that fails, or takes longer, is left out, and the model computes that operation by torch's own kernels. What was found is
kept in the user's cache, for this GPU, dtype, versions and kernels. Where there is no GPU nothing of Triton is imported.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from chatglm2.gradients import is_transformed
from common.files import file_sha256
from common.machine_cache import kept_or_measured, processor_name
from common.slowness import runs_slower

TOLERANCE = 0.02  # of the norm of a result; bfloat16 rounds by up to 0.004, and torch rounds in between
MARGIN = 1.1  # a kernel may take so much of torch's time: a tie decides the same in each run
TRIAL_CALLS = 20


class Kernels(NamedTuple):
    """A kernel for each operation, None where torch's own kernels are to do it. See kernels_triton.py."""

    swiglu: Callable | None = None
    swiglu_backward: Callable | None = None
    rotate: Callable | None = None
    add_norm: Callable | None = None
    add_norm_backward: Callable | None = None
    rotate_into_cache: Callable | None = None
    attend_step: Callable | None = None


NONE = Kernels()


def kernels_for(x: torch.Tensor) -> Kernels:
    """The kernels for tensors such as x."""
    return chosen(x.device, x.dtype) if x.is_cuda and not is_transformed() else NONE


@functools.cache
def chosen(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels that pass their trial on a GPU, tried once on a machine."""
    try:
        from chatglm2 import kernels_triton
    except ImportError as error:
        runs_slower(f"Without Triton ({error}) each operation is a kernel of its own.")
        return NONE

    def is_whole(found):  # with kernels that failed it is not: a full GPU may have been the reason
        return isinstance(found, list) and len(found) == 2 and set(found[0]) <= set(Kernels._fields) and not found[1]

    key = trial_key(kernels_triton, device, dtype)
    taken, left_out = kept_or_measured("kernels", key, lambda: try_all(kernels_triton, device, dtype), is_whole)
    if left_out:
        runs_slower(f"Left to torch, because their Triton kernels do not work here: {'; '.join(left_out)}.")
    if not {"rotate_into_cache", "attend_step"} <= set(taken):  # a step takes both
        taken = [name for name in taken if name not in ("rotate_into_cache", "attend_step")]
    return Kernels(**{name: getattr(kernels_triton, name) for name in taken})


def trial_key(module, device: torch.device, dtype: torch.dtype) -> str:
    """What the result of a trial of the kernels in `module` holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    versions = f"torch {torch.__version__}, triton {module.triton.__version__}"
    return f"{name}, {dtype}, {versions}, {Path(module.__file__).name} {file_sha256(module.__file__)[:12]}"


@torch.no_grad()
def try_all(module, device, dtype) -> list[list[str]]:
    """[operations whose kernels are right and fast enough, why others do not work]."""
    taken, left_out = [], []
    with torch.autocast("cuda", enabled=False):
        for name, (arguments, reference) in trials(device, dtype).items():
            kernel = getattr(module, name)
            try:
                check(kernel(*arguments), reference(*arguments))
                if seconds(kernel, arguments) <= MARGIN * seconds(reference, arguments):
                    taken.append(name)
            except Exception as error:  # Triton's compiler and the driver raise what they like
                left_out.append(f"{name}: {type(error).__name__}: {(str(error).strip() or 'no message')[:200]}")
    return [taken, left_out]


def check(results, expected):
    """RuntimeError where results differ from what is expected by more than rounding."""
    results, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (results, expected))
    for result, wanted in zip(results, expected, strict=True):
        error = ((result.float() - wanted.float()).norm() / wanted.float().norm()).item()
        if not error < TOLERANCE:  # NaN, too
            raise RuntimeError(f"its results are off by {error:.0%}")


def seconds(function, arguments):
    """Of one call, on a GPU: the least of three means, so that a busy moment does not count."""
    means = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(TRIAL_CALLS):
            function(*arguments)
        end.record()
        end.synchronize()
        means.append(start.elapsed_time(end) / 1000 / TRIAL_CALLS)
    return min(means)


def num_splits(pairs: int, slots: int, device: torch.device) -> int:
    """Programs that share the keys of one row and group in attend_step: a power of two.

    So many that all multiprocessors have work, and each a few blocks of keys at least, where a cache has `slots`.
    """
    from chatglm2.kernels_triton import KEYS, MOST_SPLITS

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(2 * processors // pairs, slots // (2 * KEYS), MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


# ---- the references


def swiglu(gate_value):
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def swiglu_backward(gradient, gate_value):
    gate, value = gate_value.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(gradient * value, gate)
    return torch.cat((grad_gate, F.silu(gate).mul_(gradient)), dim=-1)


def rotate(x, cos, sin, back=False):
    """A copy of x (B, heads, S, D) with the pairs (0, 1), (2, 3), … of the first half of its channels rotated."""
    result = x.clone(memory_format=torch.contiguous_format)
    pairs = result[..., : x.shape[-1] // 2].unflatten(-1, (-1, 2))  # (B, heads, S, D/4, 2)
    sin = -sin if back else sin
    if x.dtype == torch.float32:  # as complex numbers, in one pass
        torch.view_as_complex(pairs).mul_(torch.complex(cos, sin))
        return result
    even, odd = pairs.unbind(-1)
    turned = even * cos - odd * sin, odd * cos + even * sin
    pairs[..., 0], pairs[..., 1] = turned
    return result


def add_norm(x, update, weight, eps):
    total = x + update
    wide = total.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return total, (wide * scale * weight.float()).to(x.dtype), scale.flatten()


def add_norm_backward(grad_total, grad_normed, total, scale, weight):
    scale = scale.view(*total.shape[:-1], 1)
    normed, gradient = total.float() * scale, grad_normed.float() * weight.float()
    along = (gradient * normed).mean(-1, keepdim=True)
    return (grad_total.float() + scale * (gradient - normed * along)).to(total.dtype)


def rotate_into_cache(mixed, cos, sin, keys, values, slots):
    num_groups, channels = keys.shape[1], keys.shape[3]
    heads = mixed.view(len(mixed), -1, 1, channels)
    num_queries = heads.shape[1] - 2 * num_groups
    query, key = rotate(heads[:, :-num_groups], cos, sin).split((num_queries, num_groups), dim=1)
    rows = torch.arange(len(mixed), device=mixed.device)
    keys[rows, :, slots], values[rows, :, slots] = key[:, :, 0], heads[:, -num_groups:, 0]
    return query[:, :, 0]


def attend_step(query, keys, values, slots, splits):
    batch_size, num_queries, channels = query.shape
    folded = query.view(batch_size, keys.shape[1], -1, channels)
    seen = torch.arange(keys.shape[2], device=query.device) <= slots[:, None]
    numbers = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]
    context = F.scaled_dot_product_attention(folded, keys[:batch_size], values[:batch_size], numbers)
    return context.reshape(batch_size, num_queries * channels)


def trials(device, dtype):
    """{operation: (arguments, reference)} at ChatGLM2-6B's shapes: 512 tokens of training, 8 rows of decoding."""

    def draw(*shape):
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    generator = torch.Generator(device).manual_seed(0)
    gate_value, hidden, update, weight = draw(512, 27392), draw(512, 4096), draw(512, 4096), draw(4096)
    heads = draw(4, 128, 36 * 128).view(4, 128, 36, 128).transpose(1, 2)[:, :34]
    angles = torch.arange(128, device=device)[:, None] * torch.logspace(0, -3, 32, device=device)
    cos, sin = (x.to(dtype).view(1, 1, 128, 32) for x in (angles.cos(), angles.sin()))
    of_rows = [x[:, :, :8].reshape(8, 1, 1, 32) for x in (cos, sin)]
    keys, values = draw(2, 8, 2, 513, 128)
    slots = torch.arange(8, device=device) * 60 + 7
    scale = hidden.float().square().mean(-1).rsqrt()
    splits = num_splits(16, 512, device)
    return {
        "swiglu": ((gate_value,), swiglu),
        "swiglu_backward": ((gate_value[:, :13696].contiguous(), gate_value), swiglu_backward),
        "rotate": ((heads, cos, sin), rotate),
        "add_norm": ((hidden, update, weight, 1e-5), add_norm),
        "add_norm_backward": ((update, hidden, hidden, scale, weight), add_norm_backward),
        "rotate_into_cache": ((draw(8, 36 * 128), *of_rows, keys, values, slots), rotate_into_cache),
        "attend_step": ((draw(8, 32, 128), keys, values, slots, splits), attend_step),
    }
