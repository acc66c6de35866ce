"""Products with frozen weights, by the fastest kernel at hand.

No official file answers to this one: there, every product is torch's `F.linear`. On a GPU that is the library's best
and it stays. On an x86 CPU, float32, `F.linear` goes to MKL. oneDNN, which torch brings along too, takes half the time on
an AMD EPYC, and less or more on an Intel Xeon: matmul_choice.py measures both and decides for each kind of product.

The time depends on how the weight lies in memory, too: of a weight with more outputs than inputs it reads the columns
faster than the rows, see `convert`. For (8, 512) x (512, 65024) that is 3.0 against 4.5 ms, and what training asks for
takes up to a tenth less as well, forward and backward.

oneDNN compiles a kernel of about 1 MB for each new number of rows, and batches differ in every step. Rows are therefore
filled up to a few round numbers, see `round_rows`; callers that can choose how many rows they compute ask it first.
"""

import contextlib
import mmap

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from chatglm2.gradients import is_transformed
from chatglm2.matmul_choice import mkl_is_faster, onednn

# Without AVX (on ARM, say) torch's own choice is as good.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")

# Without these instructions a product in bfloat16 takes longer than in float32, and not half the time.
MULTIPLIES_BFLOAT16 = any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16", "bf16")))


def round_rows(count):
    """`count` rounded up: to 8 from 8 on, to 64 from 64 on."""
    step = 64 if count > 64 else 8 if count > 8 else 1
    return -(-count // step) * step


def onednn_runs(device, dtype):
    """True where products of tensors of such a device and dtype may go to oneDNN: float32 on an x86 CPU."""
    if not ONEDNN or torch.compiler.is_compiling() or is_transformed():  # they know no gradient of oneDNN's operation
        return False
    return device.type == "cpu" and dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def onednn_multiplies(x, weight):
    """True where `multiply` may use oneDNN for x (…, in) and weight (out, in)."""
    return x.dtype == weight.dtype and weight.is_cpu and x.numel() > 0 and onednn_runs(x.device, x.dtype)


def multiply(x, weight, bias=None):
    """x (…, in) times the transposed weight (out, in), plus bias (out,): (…, out). Without a gradient."""
    if not onednn_multiplies(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if mkl_is_faster(count, weight):
        return F.linear(x, weight, bias)
    if missing := round_rows(count) - count:
        rows = F.pad(rows, (0, 0, 0, missing))
    # A few rows: the weight's rows are multiplied by them, not they by the weight; that reads it faster.
    if 8 <= len(rows) <= 32 and bias is None and weight.is_contiguous():
        product = onednn(weight, rows).t()
    else:
        product = onednn(rows, weight, bias)
    return product[:count].unflatten(0, x.shape[:-1])


def convert(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight (out, in) in `dtype`; where that takes memory of its own, in the memory `multiply` reads fastest.

    The shape stays (out, in), but in float32 the longer side lies contiguous, and all of it in huge pages where the
    system gives them: a step of decoding reads all weights once, and with pages of 4 kB waits for their addresses. A
    weight that has the dtype is left where it is, which may be a mapped file that processes share.
    """
    if weight.dtype == dtype or not weight.is_cpu:
        return weight.to(dtype)
    outputs, inputs = weight.shape
    by_columns = outputs > inputs and onednn_runs(weight.device, dtype)
    memory = mmap.mmap(-1, weight.numel() * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    converted = torch.frombuffer(memory, dtype=dtype)
    converted = converted.view(inputs, outputs).t() if by_columns else converted.view(outputs, inputs)
    for start in range(0, outputs, 1024):  # turned a part at a time, because that takes memory, and is quicker
        part = weight[start : start + 1024]
        converted[start : start + 1024] = part.t().contiguous().t() if by_columns else part
    return converted


class FrozenProduct(torch.autograd.Function):
    """`multiply` with a gradient for x only: dx = dy W."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        product = multiply(x, weight, bias)
        return product.new_empty(0).set_(product)  # no view: adapters add to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return multiply(gradient, weight.t()), None, None


class Linear(nn.Linear):
    """nn.Linear, through `multiply` while its weight does not train."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return multiply(x, self.weight, self.bias)
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trains or not onednn_multiplies(x, self.weight):
            return super().forward(x)  # whose gradient leaves out what does not train
        return FrozenProduct.apply(x, self.weight, self.bias)
