"""The memory that a run or a chat would take, before it starts: the programs' own estimate, for a model without storage.

Answers to nothing in the official scripts. The page loads no torch and takes no GPU: memory_of runs in a process of its
own (`ask`), which ends with its answer.
"""

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
    *, model: str, method: str, bits: int | None, prefix: int | None, rows: int, source: int, target: int, trains: bool
) -> dict:
    """{"parts": {name: bytes}, "device": "cuda" or "cpu"} of a folder's model, for `rows` rows of `source` + `target` tokens."""
    import torch

    from chatglm2.bits import check_quantization_bit
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.quantization import QuantizedLinear
    from checkpoint import choose_dtype, read_config
    from training.memory import estimate_peak_bytes
    from tuning.methods import METHODS

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    class Unbuilt(ChatGLMForConditionalGeneration):
        """A model whose weights have shapes only, that says where it would be."""

        device = place

    config = read_config(model, pre_seq_len=prefix if method == "p_tuning" else None)
    config.quantization_bit = check_quantization_bit(bits, config.quantization_bit)
    dtype = choose_dtype(place)[0]
    with torch.device("meta"):
        built = ChatGLMForConditionalGeneration(config)
        for part in (built.transformer.embedding, built.transformer.encoder, built.transformer.output_layer):
            for module in part.modules():
                for weight in [] if isinstance(module, QuantizedLinear) else module.parameters(recurse=False):
                    weight.data = weight.to(dtype)
        built.requires_grad_(False)
        if trains and built.transformer.prefix_encoder is not None:
            built.transformer.prefix_encoder.requires_grad_(True)
        elif trains:
            way = METHODS[method]
            way.prepare(built, [], way.complete({}), do_train=True)
    built.__class__ = Unbuilt
    length = -(-(source + target + 1) // 8) * 8
    batch = {"batch_size": rows, "length": length, "num_supervised": target + 1 if trains else 0}
    return {"parts": estimate_peak_bytes(built, **batch), "device": place.type}


def free_memory() -> dict[str, int]:
    """{"cuda": free bytes of the emptiest GPU, where nvidia-smi finds one; "cpu": free bytes of the machine}."""
    free = {"cpu": psutil.virtual_memory().available}
    try:
        words = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        found = [int(line) for line in done.stdout.split() if line.isdecimal()]
        if done.returncode == 0 and found:
            free["cuda"] = max(found) * 2**20
    except (OSError, subprocess.TimeoutExpired):
        pass
    return free
