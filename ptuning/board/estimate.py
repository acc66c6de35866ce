"""The memory that a run or a chat would take, before it starts: the programs' own estimate, for a model without storage.

The page loads no torch and takes no GPU: memory_of runs in a process of its own (`ask`), which ends with its answer.
"""

import contextlib
import json
import subprocess
import sys

import psutil

from board.files import PROJECT

SECONDS = 120
QUESTION = (
    "import json, sys; from board.estimate import memory_of; print(json.dumps(memory_of(**json.load(sys.stdin))))"
)


def ask(**question) -> dict:
    """What memory_of answers, computed in a process of its own. ValueError with its last line where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", QUESTION],
        cwd=PROJECT / "ptuning",
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason"]
        raise ValueError(f"The memory could not be estimated: {lines[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(
    *,
    model: str,
    family: str | None,
    method: str,
    bits: int | None,
    prefix: int | None,
    rows: int,
    source: int,
    target: int,
    trains: bool,
) -> dict:
    """{"parts": {name: bytes}, "device": "cuda" or "cpu"} of a folder's model, for `rows` rows of `source` + `target` tokens.

    `family` is as --model_family, None for what the folder tells.
    """
    import torch

    from chatglm2.bits import check_quantization_bit
    from chatglm2.quantization import QuantizedLinear
    from checkpoint import choose_dtype, family_of, read_config
    from checkpoints.ways import RULES
    from training.memory import estimate_peak_bytes
    from tuning.methods import METHODS

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = read_config(model, family, pre_seq_len=prefix if RULES[method].needs_prefix else None)
    config.quantization_bit = check_quantization_bit(bits, config.quantization_bit)
    dtype = choose_dtype(place)[0]
    with torch.device("meta"):
        built = family_of(config).model_class(config)
        for name, module in built.named_modules():
            if isinstance(module, QuantizedLinear):
                module.weight_scale = module.weight_scale.to(config.dtype or dtype)  # that of the files, as load_model
            elif "prefix_encoder" not in name:
                for weight in module.parameters(recurse=False):
                    weight.data = weight.to(dtype)
        built.requires_grad_(False)
        if trains and built.transformer.prefix_encoder is not None:
            built.transformer.prefix_encoder.requires_grad_(True)
        elif trains:
            way = METHODS[method]
            way.prepare(built, [], way.complete({}), do_train=True)
    built.__class__ = type("Unbuilt", (built.__class__,), {"device": place})  # where it would be
    length = -(-(source + target + 1) // 8) * 8
    batch = {"batch_size": rows, "length": length, "num_supervised": target + 1 if trains else 0}
    return {"parts": estimate_peak_bytes(built, **batch), "device": place.type}


def held_by(pids: set[int], device: str) -> int:
    """The bytes that processes hold: of their GPUs, as nvidia-smi tells, or resident."""
    if device == "cuda":
        lines = asked_of_driver("--query-compute-apps=pid,used_memory")
        pairs = [line.replace(" ", "").split(",") for line in lines]
        found = [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2 and all(map(str.isdecimal, pair))]
        return 2**20 * sum(size for pid, size in found if pid in pids)
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


def with_children(pids) -> set[int]:
    """Processes and all that they have started."""
    found = set(pids)
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return found


def asked_of_driver(query: str) -> list[str]:
    """The lines that nvidia-smi answers, none without a GPU."""
    try:
        words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        return done.stdout.splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        return []


def free_memory() -> dict[str, int]:
    """{"cuda": free bytes of the emptiest GPU, where nvidia-smi finds one; "cpu": free bytes of the machine}."""
    free = {"cpu": psutil.virtual_memory().available}
    found = [int(line) for line in asked_of_driver("--query-gpu=memory.free") if line.strip().isdecimal()]
    return {**free, "cuda": max(found) * 2**20} if found else free
