"""Load, train and generate with a model of ChatGLM2-6B's full size, int4 and int8, and report time and memory.

    PYTHONPATH=ptuning python -m benchmarks.full_size

Writes a folder of random float16 weights in the official layout (12.5 GB, seven shards) and removes it afterwards. For
each setting a process of its own loads it, takes two prefix-tuning steps on rows of ADGEN's form and answers twice, with
the products that the programs take here (`--quantization_backend auto`): the first answer brings int4 weights into the
layout of the CPU's kernels, the second is timed, its prompt with the first token and its further tokens apart. Random
weights cost the same time and memory as trained ones; what they write is noise.

Memory is what Linux counts for the process: `peak` is VmHWM, all resident pages. Part of them, `file`, are pages of the
memory-mapped shards, which the kernel takes back whenever memory is short; `own` is the memory the program asked for
(RssAnon). The peaks of the two need not fall together. On a GPU its peak is PyTorch's max_memory_allocated.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.generation import Batch, choose
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.quantization import choose_backend, use_backend_
from chatglm2.weight_names import ROTARY_TENSOR
from checkpoint import choose_dtype, load_model, load_tokenizer, read_config
from common.environment import KEEP_MEMORY
from data.batches import collate_training
from data.encoding import encode_prediction, encode_training
from data.examples import load_examples

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "model_type": "chatglm",
    "model_family": "chatglm2",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "torch_dtype": "float16",
}
SHARD_BYTES = 2 * 10**9  # largest shard of the official folder
PREFIX_TOKENS = 128
TRAINING_STEPS = 2


# ---- the folder


def assign_shards(sizes, limit=SHARD_BYTES):
    """{name: shard number, from 0}: tensors of {name: bytes} in order, a new shard where the next does not fit."""
    shards, number, filled = {}, 0, 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        shards[name] = number
        filled += size
    return shards


def full_size_shapes():
    """{name: shape} of the checkpoint's tensors, in the order of the official shards."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG, pre_seq_len=None))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes | {ROTARY_TENSOR: torch.Size([CONFIG["kv_channels"] // 4])}


def shard_map(shapes):
    """{name: file name} as in the official pytorch_model.bin.index.json."""
    shards = assign_shards({name: 2 * shape.numel() for name, shape in shapes.items() if name != ROTARY_TENSOR})
    shards[ROTARY_TENSOR] = 0
    count = max(shards.values()) + 1
    return {name: f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin" for name, number in shards.items()}


@functools.cache
def random_block():
    """Random numbers that every tensor is filled with: to draw 6 billion takes minutes."""
    return (torch.randn(2**24 + 1) * 0.02).half()  # an odd length, so that rows of a tensor differ


def random_tensor(name, shape):
    if "layernorm" in name:
        return torch.ones(shape, dtype=torch.float16)
    tensor = torch.empty(shape, dtype=torch.float16)
    for block in tensor.view(-1).split(len(random_block())):
        block.copy_(random_block()[: len(block)])
    return tensor


def write_folder(folder, tokenizer_folder):
    """Write config, tokenizer, shards and index. Returns the bytes of the shards."""
    shapes = full_size_shapes()
    files = shard_map(shapes)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_folder, name), folder / name)
    for file in sorted(set(files.values())):
        torch.save({name: random_tensor(name, shapes[name]) for name in shapes if files[name] == file}, folder / file)
    size = sum((folder / file).stat().st_size for file in set(files.values()))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))
    return size


# ---- one measurement, in a process of its own


class MemoryWatch(threading.Thread):
    """Samples this process's resident memory; `peaks` in bytes: `own` (RssAnon), `file` (RssFile), `peak` (VmHWM)."""

    FIELDS = {"RssAnon": "own", "RssFile": "file", "VmHWM": "peak"}

    def __init__(self, seconds=0.02):
        super().__init__(daemon=True)
        self.seconds = seconds
        self.peaks = dict.fromkeys(self.FIELDS.values(), 0)

    def sample(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            field, _, value = line.partition(":")
            if field in self.FIELDS:
                name = self.FIELDS[field]
                self.peaks[name] = max(self.peaks[name], int(value.split()[0]) * 1024)

    def run(self):
        while True:
            self.sample()
            time.sleep(self.seconds)

    def restart(self):
        """The peaks so far; `own` and `file` start anew, `peak` is of the whole process."""
        self.sample()
        peaks = self.peaks.copy()
        self.peaks.update(own=0, file=0)
        return peaks


def measure(folder, data_file, bits, num_rows, new_tokens, bf16):
    """Times in seconds and memory in bytes of one setting, as a dict."""
    watch = MemoryWatch()
    watch.start()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = dict(max_source_length=64, max_target_length=128)
    config = read_config(folder, pre_seq_len=PREFIX_TOKENS)
    tokenizer = load_tokenizer(folder, config)
    dataset, _ = load_examples(data_file, "content", "summary", max_samples=num_rows * TRAINING_STEPS)
    train = encode_training(dataset, tokenizer, **settings)
    prompts = encode_prediction(dataset, tokenizer, **settings)
    result = {"bits": bits or "float", "device": device.type, "start": watch.restart()}

    started = time.monotonic()
    dtype, _ = choose_dtype(device, bf16=bf16)
    model = load_model(folder, config=config, dtype=dtype, device=device, quantization_bit=bits)
    result.update(dtype=str(dtype).removeprefix("torch."), load_seconds=time.monotonic() - started)
    result["load"] = watch.restart()
    result["weight_bytes"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    model.train()
    if device.type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prefix = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(prefix, lr=2e-2)
    collate = functools.partial(collate_training, pad_token_id=tokenizer.pad_token_id)
    result.update(step_seconds=[], losses=[])
    for step in range(TRAINING_STEPS):
        batch = collate([train[step * num_rows + row] for row in range(num_rows)])
        batch.pop("row")
        result["batch_shape"] = list(batch["input_ids"].shape)
        started = time.monotonic()
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result["losses"].append(loss.item())  # waits for the device
        result["step_seconds"].append(time.monotonic() - started)
    result["train"] = watch.restart()

    model.eval()
    if bits:
        backend = choose_backend("auto", device, bits, dtype)
        use_backend_(model, backend)
        result["backend"] = backend.name
    prompt = prompts[0]["input_ids"]
    result["prompt_tokens"] = len(prompt)
    for _ in range(2):
        result["prompt_seconds"], further = timed(next_tokens(model, [prompt], new_tokens + 1))
    result["token_seconds"] = statistics.median(further)
    result["generate"] = watch.restart()
    if device.type == "cuda":
        result["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def next_tokens(model, prompts, count):
    """Yield `count` times the token ids that follow each of `prompts` (token ids), greedily, with the model's prefix."""
    encoder = model.transformer.prefix_encoder
    with torch.inference_mode():
        prefix = [] if encoder is None else encoder(1, model.transformer.dtype_of_blocks)
    zeros = [0.0] * len(prompts)
    batch = Batch(model, len(prompts), model.prefix_length + len(prompts[0]) + count - 1)
    yield (chosen := choose(batch.admit(prompts, prefix), zeros, zeros, zeros))
    for _ in range(count - 1):
        yield (chosen := choose(batch.step(chosen), zeros, zeros, zeros))


def timed(tokens):
    """(seconds until the first of `tokens` is there, [seconds that each further one takes])."""
    seconds = [time.perf_counter()]
    for _ in tokens:
        seconds.append(time.perf_counter())
    first, *further = (end - start for start, end in itertools.pairwise(seconds))
    return first, further


# ---- the table


def table(results):
    """Markdown: one row a setting."""
    head = [
        "weights",
        "device",
        "weights, GB",
        "load, s",
        "own memory, GB",
        "peak, GB",
        "step, s",
        "prompt, s",
        "s per token",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        own = max(result[phase]["own"] for phase in ("load", "train", "generate"))
        cells = [
            (f"int{result['bits']}, " if isinstance(result["bits"], int) else "") + result["dtype"],
            result["device"]
            + (f" (GPU peak {result['gpu_peak_bytes'] / 1e9:.2f} GB)" if "gpu_peak_bytes" in result else ""),
            f"{result['weight_bytes'] / 1e9:.2f}",
            f"{result['load_seconds']:.0f}",
            f"{own / 1e9:.2f}",
            f"{result['generate']['peak'] / 1e9:.2f}",
            ", ".join(f"{seconds:.1f}" for seconds in result["step_seconds"]),
            f"{result['prompt_seconds']:.1f}",
            f"{result['token_seconds']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=ROOT / "AdvertiseGen/sample/train.json", help="ADGEN-like rows")
    parser.add_argument("--tokenizer", default=ROOT / "ptuning/tiny", help="folder with tokenizer.model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], help="0: float weights")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 in place of float32 on a CPU, too")
    parser.add_argument("--rows", type=int, default=1, help="rows in a training batch")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens of an answer after the first")
    parser.add_argument("--workdir", help="where the 12.5 GB go for a while [the system's temporary folder]")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the folder, in the process that measures one setting
    args = parser.parse_args()
    if args.measure:
        how = args.bits[0] or None, args.rows, args.new_tokens, args.bf16
        print(json.dumps(measure(args.measure, args.data, *how)))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="chatglm2-6b-", dir=args.workdir) as folder:
        started = time.monotonic()
        size = write_folder(Path(folder), args.tokenizer)
        print(f"Wrote {size / 1e9:.2f} GB of random weights in {time.monotonic() - started:.0f} s.", flush=True)
        for bits in args.bits:
            command = [sys.executable, "-m", "benchmarks.full_size", "--measure", folder, "--bits", str(bits)]
            command += ["--data", str(Path(args.data).resolve())]
            command += ["--rows", str(args.rows), "--new_tokens", str(args.new_tokens)]
            command += ["--bf16"] * args.bf16
            environment = {**os.environ, **KEEP_MEMORY}  # as the scripts
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
