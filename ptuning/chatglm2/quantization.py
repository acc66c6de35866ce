"""Frozen linear layers with int8 or int4 weights: quantize, swap in, run forward and backward.

Answers to the official `quantization.py`. Same scheme and same names, so that the published int4 / int8 folders load:

    scale  (out,)            = max |w| over the row / (2^(bits-1) - 1), in the weights' own dtype
    weight (out, in)    int8 = round(w / scale)
    weight (out, in/2)  int8   for 4 bits: two columns in a byte, the even one in the high nibble, the odd one in
                               the low, both two's complement

What differs: plain torch ops that run on any device are the reference, and faster kernels for CUDA devices, compiled for
the GPU at hand, are tried once and checked against it (`choose_backend`); weights are buffers, so no
optimizer and no `requires_grad_` can reach them; backward computes the gradient of the input only (the official code
also multiplies out a weight gradient and drops it); a quotient that rounds past the largest integer is clamped, where
the official code lets it wrap and the row's largest weight changes its sign (in bf16 one int8 row in six; in fp16 only
rows whose weights are all below 0.001).

Memory and time: on a CPU the float weight never exists as a whole. It is dequantized block by block into one buffer of
4 to 14 MB, which stays in the cache between the conversion and the product: much faster than a full-size temporary, whose
fresh pages must be mapped on every call. Backward dequantizes again, so nothing but the integers is kept for it. On
other devices the weight is dequantized in one piece: fewer, larger kernels, and one buffer that PyTorch's allocator
hands to layer after layer. With Triton, and on a CPU where no gradient is wanted, few rows of input are multiplied
without dequantizing at all.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chatglm2 import quantization_cpu
from chatglm2.gradients import OwnGradient, is_transformed
from chatglm2.matmul import MULTIPLIES_BFLOAT16, multiply
from chatglm2.matmul_choice import shortest_seconds
from common.slowness import runs_slower

# In every block of transformer.encoder.layers. Norms, biases, embedding, prefix and output layer stay float.
QUANTIZED_MODULES = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
QUANTIZED_WEIGHT_NAME = re.compile(
    r"transformer\.encoder\.layers\.\d+\.(" + "|".join(map(re.escape, QUANTIZED_MODULES)) + r")\.weight"
)
CPU_BLOCK_ELEMENTS = 2**20  # weights dequantized at a time on a CPU: 4 MB in float32
TRIAL_SHAPE = (1024, 1024)  # of the weight that decides whether `packed` is faster
PACKED_ROWS = 256  # of a weight packed at a time: that takes memory
CPU_BLOCK_ROWS = 256  # but no fewer rows: backward adds to the whole gradient of the input for each block,
CPU_LARGE_BLOCK = 2**23  # and therefore takes blocks of that gradient's size, up to this one


def is_quantized_weight(name: str) -> bool:
    """True for the state-dict name of a weight that gets quantized; its scale is `name + "_scale"`."""
    return QUANTIZED_WEIGHT_NAME.fullmatch(name) is not None


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Float (out, in) -> int8 (out, in), for 4 bits packed (out, in // 2), and scale (out,) in the weight's dtype.

    On the weight's own device. Give the weight in the checkpoint's dtype, before any cast: only then are the integers
    the official ones, and a scale rounded to bf16 shifts its whole row by up to 0.4%.
    Rows of zeros get scale 0 and integers 0, as official in effect (there 0 / 0 is NaN, which the cast to int8 happens
    to turn into 0). Raises ValueError for infinite or NaN weights, and for an odd `in` with 4 bits.
    """
    packed_columns(weight.shape[1], bits)
    largest = 2 ** (bits - 1) - 1
    lowest_weight, highest_weight = torch.aminmax(weight, dim=1)
    scale = torch.maximum(lowest_weight.abs(), highest_weight.abs()) / largest
    if not torch.isfinite(scale).all():
        raise ValueError(
            "the weight holds infinite or NaN values and cannot be quantized. Check the base model's files."
        )
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    quantized = (weight / divisor[:, None]).round_().clamp_(-largest, largest).to(torch.int8).contiguous()
    return (pack_int4(quantized) if bits == 4 else quantized), scale


def dequantize_weight(
    quantized: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The float weight (out, in) that `quantize_weight`'s result stands for, rounded to `dtype` once.

    Written to `out`, a tensor of that shape and dtype, if given. An int4 weight may be in the layout of
    quantization_cpu.py; its columns lie contiguous then, as they do there.
    """
    if quantization_cpu.is_packed(quantized):
        integers = quantization_cpu.unpack(quantized)
        weight = torch.empty(integers.shape[2], len(quantized), dtype=dtype).t() if out is None else out
        weight.unflatten(0, integers.shape[:2]).copy_(integers)
        weight.t().mul_(scale)  # as it lies in memory, which is 20 times as fast where the scale has another dtype
        return weight
    integers = unpack_int4(quantized) if bits == 4 else quantized
    weight = integers.to(dtype) if out is None else out.copy_(integers)  # exact: integers up to 127 fit every dtype
    return weight.mul_(scale[:, None])


def packed_columns(in_features: int, bits: int) -> int:
    """Columns of the int8 tensor that holds `in_features` weights a row. ValueError for an odd number with 4 bits."""
    if bits == 4 and in_features % 2:
        raise ValueError(
            f"int4 packs two columns in one byte and needs an even number of columns, but the weight has "
            f"{in_features}. Use --quantization_bit 8, or leave the flag out."
        )
    return in_features * bits // 8


def pack_int4(quantized: Tensor) -> Tensor:
    """int8 (out, in) with values -8 to 7 -> int8 (out, in // 2). The columns are even in number."""
    return (quantized[:, 0::2] << 4) | (quantized[:, 1::2] & 0x0F)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 (out, in // 2) -> int8 (out, in) with values -8 to 7: `pack_int4` undone.

    Works on the sign-extended byte in 16 bits, whose two bytes (little endian) are to hold the even column, then the
    odd one: half the memory traffic of unpacking both into tensors of their own and interleaving them.
    """
    wide = packed.to(torch.int16)
    odd_column = (wide << 12) >> 4  # sign-extended in the upper byte, zeros in the lower
    even_column = (wide >> 4).bitwise_and_(0xFF)
    return odd_column.bitwise_or_(even_column).view(torch.int8)


# ---- backends


class Backend(NamedTuple):
    """How a layer computes: `dequantize(weight, scale, bits, dtype)` returns the float weight (out, in).

    Up to `few_rows` rows of input, `multiply_few_rows(input, weight, scale, bits)` returns the product (rows, out).
    With `for_inference` it rounds its input, and runs only where no gradient is wanted.
    """

    name: str
    dequantize: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
    few_rows: int = 0
    multiply_few_rows: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None
    for_inference: bool = False


BACKENDS = ("auto", "triton", "cpm_kernels", "packed", "torch")
TORCH = Backend("torch", dequantize_weight)
PACKED = Backend(
    "packed", dequantize_weight, quantization_cpu.FEW_ROWS, quantization_cpu.multiply_few_rows, for_inference=True
)


def load_triton() -> Backend:
    from chatglm2.quantization_triton import FEW_ROWS, dequantize, multiply_few_rows  # only where there is a GPU

    return Backend("triton", dequantize, FEW_ROWS, multiply_few_rows)


def most_rows(device: torch.device, bits: int, dtype: torch.dtype) -> int:
    """Of input, up to which Triton's product is the faster one on a GPU."""
    from chatglm2 import quantization_triton

    return quantization_triton.most_rows(device, bits, dtype)


def load_cpm_kernels() -> Backend:
    from chatglm2.quantization_cpm import dequantize_int4, import_cpm_kernels

    import_cpm_kernels()
    return Backend("cpm_kernels", dequantize_int4)


def choose_backend(name: str, device: torch.device | str, bits: int, dtype: torch.dtype) -> Backend:
    """The backend that `--quantization_backend name` means for weights of `bits` and activations of `dtype`.

    auto is triton on a CUDA device, or torch with one warning where that fails a trial; on a CPU it is packed where
    that is faster in a trial; else torch. Raises ValueError for an unknown name, and for a backend asked for by name
    that does not work here.
    """
    if name not in BACKENDS:
        raise ValueError(f"--quantization_backend {name} is not known. Give one of {', '.join(BACKENDS)}.")
    kind = torch.device(device).type
    if name == "auto" and kind != "cuda":
        name = "packed" if kind == "cpu" and packed_is_faster(bits, dtype) else "torch"
    if name == "torch":
        return TORCH
    needed, described = ("cpu", "a CPU") if name == "packed" else ("cuda", "a CUDA device")
    if kind != needed:
        raise ValueError(
            f"--quantization_backend {name} needs {described}, but the model goes to the {kind}. "
            "Leave the flag out, or give torch."
        )
    if name == "cpm_kernels" and bits != 4:
        raise ValueError(
            f"--quantization_backend cpm_kernels is for int4 weights only, and these are int{bits}. "
            "Leave the flag out, or give triton or torch."
        )
    try:
        backend = PACKED if name == "packed" else load_cpm_kernels() if name == "cpm_kernels" else load_triton()
        try_backend(backend, device, bits, dtype)
        if backend.few_rows and not backend.for_inference:
            backend = backend._replace(few_rows=most_rows(torch.device(device), bits, dtype))
    except Exception as error:  # compilers, drivers and missing libraries raise what they like
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
        if name != "auto":
            raise ValueError(
                f"--quantization_backend {name} does not work here ({reason}). Leave the flag out, or give torch."
            ) from error
        runs_slower(f"Triton does not work here ({reason}); int{bits} layers run on plain torch ops, which is slower.")
        return TORCH
    return backend


def try_backend(backend: Backend, device: torch.device | str, bits: int, dtype: torch.dtype) -> None:
    """Run a backend on a small weight and, on a GPU, one of the 6B's; RuntimeError where it differs from the reference."""
    generator = torch.Generator().manual_seed(0)
    small = (64, 96) if backend.for_inference else (40, 96)
    shapes = [small] if torch.device(device).type == "cpu" else [small, (4608, 4096)]
    for out_features, in_features in shapes:
        weight = torch.randn(out_features, in_features, generator=generator).to(device, dtype)
        quantized, scale = quantize_weight(weight, bits)
        expected = dequantize_weight(quantized, scale, bits, dtype).float()
        results = [(backend.dequantize(quantized, scale, bits, dtype), expected)]
        if backend.multiply_few_rows is not None:
            if backend.for_inference:
                quantized = pack_for_cpu(quantized, bits)
            for rows in (3, backend.few_rows):
                input = torch.randn(rows, in_features, generator=generator).to(device, dtype)
                results.append((backend.multiply_few_rows(input, quantized, scale, bits), input.float() @ expected.T))
        for result, reference in results:
            error = ((result.float() - reference).norm() / reference.norm()).item()
            if not error < 0.02:  # NaN, too; bfloat16 rounds by up to 0.004
                raise RuntimeError(f"its results on a {out_features} x {in_features} weight are off by {error:.0%}")


def pack_for_cpu(quantized: Tensor, bits: int) -> Tensor:
    """The integers of `quantize_weight`, (out, in) or (out, in // 2), in the layout of quantization_cpu.py."""
    if bits == 8 or quantization_cpu.is_packed(quantized):
        return quantized
    return torch.cat([quantization_cpu.pack(part) for part in quantized.split(PACKED_ROWS)])


@cache
def packed_is_faster(bits: int, dtype: torch.dtype) -> bool:
    """True where the backend `packed` takes less time for one row than dequantizing: about 20 ms, once a process."""
    out_features, in_features = TRIAL_SHAPE
    if not quantization_cpu.fits(out_features, in_features, bits):
        return False
    weight = torch.ones(out_features, in_features * bits // 8, dtype=torch.int8)
    packed, scale = pack_for_cpu(weight, bits), torch.ones(out_features, dtype=dtype)
    row = torch.ones(1, in_features, dtype=dtype)

    products = (
        lambda: PACKED.multiply_few_rows(row, packed, scale, bits),
        lambda: F.linear(row, dequantize_weight(weight, scale, bits, dtype)),
    )
    try:
        by_packed, by_torch = shortest_seconds(products, repeats=3)
    except RuntimeError:  # no such kernel for this processor
        return False
    return by_packed < by_torch


def use_backend_(model: nn.Module, backend: Backend, bits: int | None = None) -> None:
    """Let every quantized layer of the model, or those of `bits`, compute with `backend`."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and bits in (None, module.bits):
            module.backend = backend


# ---- the layer


def _in_blocks(weight: Tensor, backend: Backend) -> bool:
    """True where the weight is dequantized a few rows at a time: only plain torch ops on a CPU gain by it."""
    return backend.dequantize is dequantize_weight and weight.device.type == "cpu"


def _dequantized_blocks(
    weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, elements: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of output rows and their float weights, a few MB at a time, all in one buffer that the next overwrites.

    `elements` are the weights wanted at a time; CPU_BLOCK_ELEMENTS and CPU_LARGE_BLOCK are their bounds.
    """
    num_rows, in_features = weight.shape[0], weight.shape[1] * 8 // bits
    elements = min(max(elements, CPU_BLOCK_ELEMENTS), CPU_LARGE_BLOCK)
    step = min(num_rows, max(CPU_BLOCK_ROWS, elements // in_features))
    packed = quantization_cpu.is_packed(weight)  # in whole blocks, whose columns lie contiguous
    if packed:
        step = max(step - step % quantization_cpu.BLOCK, quantization_cpu.BLOCK)
    buffer = torch.empty(step * in_features, dtype=dtype)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        count = rows.stop - start
        block = buffer[: count * in_features]  # without gaps, for which oneDNN has only a slow reference
        block = block.view(in_features, count).t() if packed else block.view(count, in_features)
        yield rows, dequantize_weight(weight[rows], scale[rows], bits, dtype, out=block)


def _by_rows(product: Callable[..., Tensor], input: Tensor, *weight) -> Tensor:
    """product(rows (N, in), *weight) of input (..., in), in its shape: (..., out)."""
    return product(input.reshape(-1, input.shape[-1]), *weight).view(*input.shape[:-1], -1)


class _FrozenQuantizedProduct(OwnGradient):
    """input (..., in) x dequantized weight (out, in) transposed -> (..., out), with a gradient for the input only."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, scale: Tensor, bits: int, backend: Backend) -> Tensor:
        ctx.save_for_backward(weight, scale)  # references to the buffers, no copies
        ctx.bits, ctx.backend = bits, backend
        if 0 < input.numel() <= backend.few_rows * input.shape[-1] and not backend.for_inference:
            return _by_rows(backend.multiply_few_rows, input, weight, scale, bits)
        if not _in_blocks(weight, backend):
            return F.linear(input, backend.dequantize(weight, scale, bits, input.dtype))
        if quantization_cpu.takes_some_rows(input, weight):
            return _by_rows(quantization_cpu.multiply_some_rows, input, weight, scale)
        outputs = [multiply(input, block) for _, block in _dequantized_blocks(weight, scale, bits, input.dtype)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        if not _in_blocks(weight, ctx.backend):
            grad_input = grad_output @ ctx.backend.dequantize(weight, scale, ctx.bits, grad_output.dtype)
            return grad_input, None, None, None, None
        # The blocks are added in float32: half precision would round at every one. On a CPU without instructions for it
        # a product in half precision (the weight not transposed) takes some 10 to 100 times as long.
        in_features = weight.shape[1] * 8 // ctx.bits
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        dtype = grad_output.dtype if grad_output.dtype == torch.bfloat16 and MULTIPLIES_BFLOAT16 else wide
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype)
        grad_input = grad_rows.new_zeros(grad_rows.shape[0], in_features, dtype=wide)
        for rows, block in _dequantized_blocks(weight, scale, ctx.bits, dtype, grad_input.numel()):
            grad_input += multiply(grad_rows[:, rows], block.t())
        grad_input = grad_input.to(grad_output.dtype).view(*grad_output.shape[:-1], in_features)
        return grad_input, None, None, None, None

    @staticmethod
    def by_torch(input, weight, scale, bits, backend):
        return F.linear(input, dequantize_weight(weight, scale, bits, input.dtype))


class QuantizedLinear(nn.Module):
    """`nn.Linear` with frozen int8 or int4 weights. Input (..., in) float32 / bf16 / fp16, output (..., out) alike.

    Buffers, under the official state-dict names: `weight` int8, `weight_scale` (out,) and, with `bias`, `bias` (out,),
    the two latter in `dtype`. It starts empty: fill it with `load_state_dict`, or from a float layer with
    `from_linear`. Raises ValueError for an odd `in_features` with 4 bits.
    """

    backend = TORCH  # see use_backend_

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        columns = packed_columns(in_features, bits)
        self.register_buffer("weight", torch.empty(out_features, columns, device=device, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, device=device, dtype=dtype))
        self.register_buffer("bias", torch.empty(out_features, device=device, dtype=dtype) if bias else None)

    @classmethod
    def empty_like(cls, linear: nn.Linear, bits: int, device: torch.device | str | None = None) -> "QuantizedLinear":
        """An unfilled layer of the shape and dtype of `linear`."""
        return cls(
            linear.in_features,
            linear.out_features,
            bits,
            bias=linear.bias is not None,
            device=device,
            dtype=linear.weight.dtype,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> "QuantizedLinear":
        """`linear` quantized, on its device."""
        layer = cls.empty_like(linear, bits, device="meta")
        layer.weight, layer.weight_scale = quantize_weight(linear.weight.detach(), bits)
        if linear.bias is not None:
            layer.bias = linear.bias.detach()
        return layer

    def forward(self, input: Tensor) -> Tensor:
        # Autocast does not look inside the function below, so its cast is made here, as nn.Linear's would be.
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self._is_for_inference(input):
            if self.bits == 4 and not quantization_cpu.is_packed(self.weight):
                with torch.inference_mode(False):  # else a later backward could not use the weight
                    self.weight = pack_for_cpu(self.weight, self.bits)
            output = _by_rows(self.backend.multiply_few_rows, input, self.weight, self.weight_scale, self.bits)
        else:
            output = _FrozenQuantizedProduct.apply(input, self.weight, self.weight_scale, self.bits, self.backend)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _is_for_inference(self, input: Tensor) -> bool:
        """True where the packed kernel multiplies `input`."""
        if is_transformed():
            return False
        few_rows = 0 < input.numel() <= self.backend.few_rows * self.in_features
        if not (few_rows and self.backend.for_inference) or self.training or torch.is_grad_enabled():
            return False  # in training, checkpointing may run a pass without a gradient that is repeated with one
        return quantization_cpu.fits(self.out_features, self.in_features, self.bits)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if quantization_cpu.is_packed(self.weight):
            integers = quantization_cpu.unpack(self.weight).reshape(self.out_features, self.in_features)
            destination[prefix + "weight"] = pack_int4(integers)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if quantization_cpu.is_packed(self.weight):
            self.weight = self.weight.view(torch.int8)  # to be filled in the official layout
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:  # copied into int8, floats would all become 0
            raise ValueError(
                f"{prefix}weight is {weight.dtype} in the checkpoint, but this model was built for int{self.bits} "
                "weights. Quantize the tensor first (quantize_weight), or build the model without quantization_bit."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"


# ---- the swap


def _swap_linears_(model: nn.Module, replacement: Callable[[nn.Linear], QuantizedLinear]) -> None:
    for number, layer in enumerate(model.transformer.encoder.layers):
        for path in QUANTIZED_MODULES:
            parent_path, name = path.split(".")
            parent = layer.get_submodule(parent_path)
            linear = getattr(parent, name)
            if not isinstance(linear, nn.Linear | QuantizedLinear):
                raise ValueError(
                    f"layer {number} {path} is a {type(linear).__name__}, not the float layer that can be quantized. Merge "
                    "a LoRA adapter first: python ptuning/export_model.py."
                )
            if isinstance(linear, QuantizedLinear):
                raise ValueError(
                    f"layer {number} {path} has int{linear.bits} weights already, and a quantized model is not "
                    "quantized twice. Leave --quantization_bit out, or load the float model."
                )
            try:
                setattr(parent, name, replacement(linear).train(linear.training))
            except ValueError as error:
                raise ValueError(f"layer {number} {path}: {error}") from error


def quantize_model_(model: nn.Module, bits: int) -> None:
    """Quantize the linear layers of every block of a loaded float model in place, one at a time.

    Raises ValueError, with the layer's name, where a layer is quantized already or cannot be.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize: bits is {bits!r}, expected 4 or 8, or 0 for float weights.")
    _swap_linears_(model, lambda linear: QuantizedLinear.from_linear(linear, bits))


def prepare_quantized_(model: nn.Module, bits: int) -> None:
    """Put empty `QuantizedLinear` layers on the meta device in place of the linear layers of every block.

    Whoever reads the checkpoint puts the buffers in place, from a published int folder as they are, or from a float
    checkpoint by `quantize_weight` of each tensor that `is_quantized_weight`, as it is read. Raises ValueError, before
    any weight is read, for shapes that cannot be quantized.
    """
    _swap_linears_(model, lambda linear: QuantizedLinear.empty_like(linear, bits, device="meta"))


def prepare_output_layer_(model: nn.Module) -> None:
    """Put an empty int8 layer on the meta device in place of the output layer.

    It is the largest weight that a token reads: 65,024 x 4,096 numbers, of 1.06 GB in float32, where the blocks of the
    6B in int4 have 2.9 GB. There is no official scheme for it; this is the scheme of the blocks.
    """
    model.transformer.output_layer = QuantizedLinear.empty_like(model.transformer.output_layer, 8, device="meta")
