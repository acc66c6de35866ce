"""Which library multiplies in float32 on this CPU, oneDNN or torch's own (MKL): decided by the clock, once a machine.

Neither is right for everything. An AMD EPYC takes half the time with oneDNN throughout. An Intel Xeon takes two thirds
of it with MKL for 8 rows, three quarters with oneDNN for 64. So each kind of product is measured: few, some or many
rows, by a weight whose rows or whose columns lie contiguous (backward has the other one of the two). That takes about
150 ms. The result is kept in the user's cache, for this processor, number of threads and version of torch, so that all
runs of a machine compute alike. PTUNING_MATMUL=mkl or onednn says it without measuring; --debug shows it.
"""

import time
from functools import cache, partial

import torch
import torch.nn.functional as F

from common.environment import pinned_matmul
from common.machine_cache import kept_or_measured, processor_name

LIBRARIES = ("onednn", "mkl")
ROWS = (8, 64, 512)  # few up to the first, some up to the second, many beyond; and so many are measured
SHAPE = (3424, 512)  # of the weight: a layer of benchmarks.speed --size small
REPEATS = 4
MARGIN = 0.9  # of oneDNN's time that MKL must stay below: a near tie is no reason


def onednn(rows, weight, bias=None):
    """rows (count, in) times the transposed weight (out, in), by oneDNN: (count, out)."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def mkl_is_faster(count: int, weight: torch.Tensor) -> bool:
    """True where MKL multiplies `count` rows by weight (out, in) faster than oneDNN."""
    kind = 0 if count <= ROWS[0] else 1 if count <= ROWS[1] else 2
    return decisions(torch.get_num_threads())[kind + len(ROWS) * (not weight.is_contiguous())] == "mkl"


@cache
def decisions(threads: int) -> list[str]:
    """The library for each of ROWS with contiguous rows of the weight, then for each with contiguous columns."""
    kinds = 2 * len(ROWS)
    if pinned := pinned_matmul():
        return [pinned] * kinds
    key = f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads, torch {torch.__version__}"
    return kept_or_measured(
        "matmul",
        key,
        measure,
        lambda found: isinstance(found, list) and len(found) == kinds and all(name in LIBRARIES for name in found),
    )


def decision_table() -> str:
    """Text: the library that multiplies each kind of product on this CPU in float32, a line for each number of rows."""
    found = decisions(torch.get_num_threads())
    names = (f"up to {ROWS[0]} rows", f"up to {ROWS[1]} rows", "more rows")
    lines = [f"  {'float32 products':<18}{'rows contiguous':>17}{'columns contiguous':>20}"]
    for kind, name in enumerate(names):
        lines.append(f"  {name:<18}{found[kind]:>17}{found[kind + len(ROWS)]:>20}")
    return "\n".join(lines)


def shortest_seconds(products, repeats: int, clock=time.perf_counter) -> list[float]:
    """The shortest time of each of `products`, functions without arguments, which take turns: a busy moment hits all."""
    shortest = [float("inf")] * len(products)
    for _ in range(repeats):
        for index, product in enumerate(products):
            start = clock()
            product()
            shortest[index] = min(shortest[index], clock() - start)
    return shortest


@torch.inference_mode()
def measure(clock=time.perf_counter) -> list[str]:
    """Multiply by both libraries; the one that takes less time, for each kind."""
    found = []
    weight = torch.ones(SHAPE)
    for laid in (weight, weight.t().contiguous().t()):
        for count in ROWS:
            rows = torch.ones(count, SHAPE[1])
            products = [partial(product, rows, laid) for product in (onednn, F.linear)]
            by_onednn, by_mkl = shortest_seconds(products, REPEATS, clock)
            found.append("mkl" if by_mkl < MARGIN * by_onednn else "onednn")
    return found
