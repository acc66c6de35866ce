"""Triton kernels as machine code for GPUs that are not here, and what it says of them.

As a program, `machine_code.py MODULE DTYPE CAPABILITY …` prints a line of JSON for each of MODULE.launches(): its name, registers, bytes of stack (a spill), bytes of shared memory, and whether it uses the tensor cores.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT

# What a program may have of it, in bytes, by compute capability.
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
TYPES = {  # of arguments that have their own, whatever the activations have
    "weight_pointer": {"quantization_triton": "*i8"},
    "scale_pointer": {"quantization_triton": "*fp16", "kernels_triton": "*fp32"},
    "slots_pointer": "*i64",
    "counters_pointer": "*i32",
    **dict.fromkeys(("partial_pointer", "highest_pointer", "sum_pointer", "context_pointer"), "*fp32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
}


def type_of(name, module, dtype):
    kind = TYPES.get(name, "*" + dtype if name.endswith("_pointer") else "i32")
    return kind if isinstance(kind, str) else kind.get(module, "*" + dtype)


def compile_all(module, dtype, capability):
    """{"name", "registers", "stack", "shared", "tensor cores"} of each of a module's launches()."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    launches = importlib.import_module(f"chatglm2.{module}").launches
    for kernel, constants, options in launches(kind, divmod(capability, 10)):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else type_of(name, module, dtype) for name in names}
        # At the 6B's shapes; Triton sees it at the launch.
        divisible = [
            index for index, name in enumerate(names) if re.search("_pointer|_stride|num_columns|_bytes", name)
        ]
        source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in divisible})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        found.append(
            {
                "name": f"{kernel.fn.__name__} {constants}",
                "registers": numbers["REG"],
                "stack": numbers["STACK"] + numbers["LOCAL"],
                "shared": compiled.metadata.shared,
                "tensor cores": "mma" in compiled.asm["ptx"],
            }
        )
    return found


def machine_code(module, dtype, capability, cache):
    """compile_all() in a process of its own: in this one Triton interprets. `cache` is a folder."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT / 'ptuning'}:{ROOT / 'tests'}"}
    environment["TRITON_INTERPRET"] = "0"
    command = [sys.executable, __file__, module, dtype, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    print(json.dumps(compile_all(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
