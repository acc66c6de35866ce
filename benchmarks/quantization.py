"""Time and bytes of one quantized layer, per backend, at ChatGLM2-6B's shapes, on a CPU or a GPU.

    PYTHONPATH=ptuning python -m benchmarks.quantization     (as a module: a script would import itself for ptuning's)

Compared with the float layer, and with the official algorithm restated in plain torch: dequantize the whole weight and
multiply; in backward dequantize again, multiply, and multiply out a weight gradient that nobody uses. All are frozen
weights with a gradient for the input.

Times are medians; the variants take turns, so that a busy moment of the machine does not fall on one of them. `of floor`
is the share that the time could at best shrink to: the larger of the bytes (weight, scale, input, output) at the copy
bandwidth, and the arithmetic at the speed of a large square product, both measured in the same run. On a GPU the calls
are replayed from a CUDA graph (no launch costs), and go through copies of the weight that together exceed its cache.
"""

import argparse
import copy
import gc
import platform
import statistics
import time

import torch
from torch import nn

from chatglm2.matmul import multiply
from chatglm2.quantization import BACKENDS, QuantizedLinear, choose_backend, dequantize_weight, use_backend_

LAYERS = {  # name: (out, in)
    "query_key_value": (4608, 4096),
    "dense": (4096, 4096),
    "dense_h_to_4h": (27392, 4096),
    "dense_4h_to_h": (4096, 13696),
}
CACHE_BYTES = 256 * 2**20  # more than any GPU's cache
BIG_FLOP = 1e11  # a product of this size is timed once on a CPU

reasons = {}  # why a backend is not in the table; a dictionary keeps each once and in order


class OfficialProduct(torch.autograd.Function):
    """What the official W8A16Linear computes, and what it keeps for backward."""

    @staticmethod
    def forward(ctx, input, weight, scale, bits):
        ctx.bits = bits
        rows = input.reshape(-1, input.shape[-1])
        ctx.save_for_backward(rows, weight, scale)
        return rows.mm(dequantize_weight(weight, scale, bits, input.dtype).t()).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        rows, weight, scale = ctx.saved_tensors
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_rows.mm(dequantize_weight(weight, scale, ctx.bits, grad_output.dtype))
        grad_rows.t().mm(rows)  # the weight gradient
        return grad_input.view(*grad_output.shape[:-1], -1), None, None, None


class OfficialLinear(QuantizedLinear):
    def forward(self, input):
        return OfficialProduct.apply(input, self.weight, self.weight_scale, self.bits)


def make_variants(out_features, in_features, device, dtype):
    """{name: list of equal layers} on the device."""
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        linear.weight.normal_(std=0.02)
    variants = {str(dtype).removeprefix("torch."): linear}
    for bits in (4, 8):
        layer = QuantizedLinear.from_linear(linear, bits)
        for name in BACKENDS[1:]:
            try:
                backend = choose_backend(name, device, bits, dtype)
            except ValueError as error:
                reasons[str(error)] = None
                continue
            variant = QuantizedLinear(in_features, out_features, bits, device="meta")
            variant.load_state_dict(layer.state_dict(), assign=True)
            use_backend_(variant, backend)
            variants[f"int{bits} {name}"] = variant
        official = OfficialLinear(in_features, out_features, bits, device="meta")
        official.load_state_dict(layer.state_dict(), assign=True)
        variants[f"int{bits} official"] = official
    return {name: copies(layer, device) for name, layer in variants.items()}


def copies(layer, device):
    """The layer on the device; on a GPU several times, so that together they exceed its cache."""
    count = 1 if device.type == "cpu" else -(-CACHE_BYTES // layer.weight.nbytes)
    return [copy.deepcopy(layer).to(device) for _ in range(count)]


# ---- timing


def seconds(calls, device):
    """Mean time of one of `calls`, all of them run once."""
    if device.type == "cpu":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / len(calls)


def graphed(calls, device):
    """[one replay of a CUDA graph of all calls] and their number; the calls themselves on a CPU."""
    if device.type == "cpu":
        calls[0]()  # warm up
        return calls, 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [graph.replay], len(calls)


def measure_floor(device, dtype):
    """(bytes per second of a copy, read and written; floating-point operations per second of a square product).

    The product's rate is the better of torch's own and of what the frozen layers use.
    """
    size, side = (2**28, 8192) if device.type == "cuda" else (2**25, 1536)
    source = torch.empty(size, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device, dtype=dtype)
    transfer, _ = graphed([lambda: target.copy_(source)], device)
    calls = (lambda: square @ square, lambda: multiply(square, square))
    products = [graphed([call], device)[0] for call in calls]
    copy_time = min(seconds(transfer, device) for _ in range(7))
    product_time = min(seconds(product, device) for product in products for _ in range(7))
    return 2 * source.nbytes / copy_time, 2 * side**3 / product_time


def make_calls(layers, rows, in_features, out_features, device, dtype, backward):
    input = torch.randn(rows, in_features, device=device, dtype=dtype, requires_grad=backward)
    upstream = torch.randn(rows, out_features, device=device, dtype=dtype)

    def forward_only(layer):
        with torch.no_grad():
            layer(input)

    def forward_and_backward(layer):
        torch.autograd.grad(layer(input), input, upstream)

    return [lambda layer=layer: (forward_and_backward if backward else forward_only)(layer) for layer in layers]


def compare(variants, rows, shape, device, dtype, repeats, floor, backward):
    """Lines of the table: one for each variant."""
    out_features, in_features = shape
    if device.type == "cpu" and 2 * rows * out_features * in_features > BIG_FLOP:
        repeats = 1
    prepared = {}
    for name, layers in variants.items():
        prepared[name] = graphed(make_calls(layers, rows, in_features, out_features, device, dtype, backward), device)
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (calls, count) in prepared.items():
            times[name].append(seconds(calls, device) / count)
    reference = statistics.median(times[next(iter(times))])
    lines = []
    for name, layers in variants.items():
        median = statistics.median(times[name])
        weight_bytes = sum(tensor.nbytes for tensor in layers[0].state_dict().values())
        moved = weight_bytes + rows * (in_features + out_features) * torch.empty(0, dtype=dtype).element_size()
        passes = 2 if backward else 1
        best = passes * max(moved / floor[0], 2 * rows * out_features * in_features / floor[1])
        lines.append(
            f"| {name} | {weight_bytes / 1e6:.1f} | {1000 * median:.3f} | {reference / median:.2f}x | {best / median:.0%} |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    floor = measure_floor(device, dtype)
    print(f"torch {torch.__version__}, {where}; copy {floor[0] / 1e9:.1f} GB/s, {dtype} {floor[1] / 1e9:.0f} GFLOP/s\n")
    for layer_name in args.layers:
        shape = LAYERS[layer_name]
        variants = make_variants(*shape, device, dtype)
        for rows in args.rows:
            for backward in (False, True) if rows > 8 else (False,):  # few rows: decoding, nothing to train
                what = "forward + backward" if backward else "forward"
                print(f"{layer_name} {shape[0]} x {shape[1]}, {rows} rows, {what}\n")
                print("| weights | MB | ms | speed | of floor |\n|---|---|---|---|---|")
                lines = compare(variants, rows, shape, device, dtype, args.repeats, floor, backward)
                print("\n".join(lines) + "\n", flush=True)
        del variants
        gc.collect()
    for reason in reasons:
        print(f"Left out: {reason}")


if __name__ == "__main__":
    main()
