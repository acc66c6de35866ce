"""The memory that a loaded model takes, alone or with a batch.

Answers to nothing in the official scripts; their users learn it from an out-of-memory error.

The estimate, with the shape legend of modeling_chatglm.py, e bytes per number of an activation, U supervised tokens:

    weights       as stored, integers, scales and floats
    trained       16 bytes a number: weight, gradient and AdamW's two averages, all float32; on a GPU 2 more for
                  autocast's copy where weights of the model itself train
    activations   a layer keeps for backward, per token: e (4 H + 2 F) (the inputs of its two norms, query and context;
                  gate and value), and e 2 G D (1 + P / S) for the keys and values. A layer whose weights all train
                  keeps e (4 H + F) more, the inputs of its products above all; one with a trained part e (H + F), one
                  with an adapter 2 e H. Layers below the first that trains keep nothing. With gradient checkpointing
                  e H per token, and all of the above for one layer.
    generation    instead of activations, keys and values of all layers: e 2 G D L (P + S) per row
    graphs        generation on a GPU only: its CUDA graphs at their most, and the logits they write, e V bytes a row
    work          the largest of: the logits (generation: (12 + e) V bytes a row; training: 8 V for each of `loss_rows`
                  tokens, 10 V where they are converted), what backward holds in the middle of an MLP, e 6 F per token,
                  and on a GPU one dequantized layer, e 2 F H
    process       on a CPU only: Python and the libraries, PROCESS_BYTES
"""

import contextlib
import os
import resource

import psutil
import torch
from torch import nn

from chatglm2.generation import MOST_GRAPHS
from chatglm2.loss import loss_rows
from chatglm2.quantization import QuantizedLinear
from common.messages import dtype_name, in_words
from common.ranks import gather
from data.splits import longest_example
from training.stages import answers_per_row
from tuning.rules import engine_of

PROCESS_BYTES = 535_000_000  # resident after the imports and the data of a run of main.py, of torch's CPU build
# Of a layer in a CUDA graph: a dozen kernels, for each of which a driver keeps some kB. Not measured yet.
GRAPH_LAYER_BYTES = 100_000
MOST_ROWS = {"cpu": 64, "cuda": 256}  # generated for at once, where no batch size is given


def peak_memory_gb(device) -> float:
    """The most memory this process has held so far: a GPU's tensors, or on a CPU all that was resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def count_weights(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{kind: (numbers, bytes)} of the model; kinds are "int4", "float32" and so on, and "trained" for what has gradients."""
    counts = {}

    def add(kind, numbers, size):
        before = counts.get(kind, (0, 0))
        counts[kind] = before[0] + numbers, before[1] + size

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size = module.weight.nbytes + module.weight_scale.nbytes
            add(f"int{module.bits}", module.in_features * module.out_features, size)
            if module.bias is not None:
                add(dtype_name(module.bias.dtype), module.bias.numel(), module.bias.nbytes)
        for parameter in module.parameters(recurse=False):
            kind = "trained" if parameter.requires_grad else dtype_name(parameter.dtype)
            add(kind, parameter.numel(), parameter.nbytes)
    return counts


def estimate_peak_bytes(
    model: nn.Module, *, batch_size: int, length: int, num_supervised: int, checkpointing: bool = False
) -> dict[str, int]:
    """The parts of the estimate by name, in bytes, for `batch_size` rows of `length` tokens (S, without the prefix).

    `num_supervised` tokens a row have labels; 0 stands for generation.
    """
    config, counts = model.config, count_weights(model)
    hidden, feed_forward = config.hidden_size, config.ffn_hidden_size
    element = model.transformer.encoder.layers[0].input_layernorm.weight.element_size()
    prefix_length = config.pre_seq_len or 0
    tokens = batch_size * length
    keys_values = 2 * config.num_key_value_heads * config.kv_channels * element * batch_size * (prefix_length + length)
    layer = tokens * element * (4 * hidden + 2 * feed_forward) + keys_values
    own = sum(  # numbers of the model itself that train, not a prefix's, an adapter's or a value head's
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in ("prefix_encoder", "lora_", "value_head"))
    )
    num_layers = config.num_layers - first_trained_layer(model)
    if own and model.get_input_embeddings().weight.requires_grad:
        layer += tokens * element * (4 * hidden + feed_forward)
    elif own:
        layer += tokens * element * (hidden + feed_forward)
    elif prefix_length == 0:
        layer += tokens * element * 2 * hidden
    if not num_supervised:
        kept = {"keys and values": keys_values * config.num_layers}
    elif checkpointing:
        kept = {"activations": layer + tokens * element * hidden * config.num_layers}
    else:
        kept = {"activations": layer * num_layers}
    on_cpu = model.device.type == "cpu"
    if num_supervised:
        rows = min(loss_rows(model.device.type), batch_size * num_supervised)
        work = max((8 if element == 4 else 10) * config.padded_vocab_size * rows, element * 6 * feed_forward * tokens)
    else:
        work = (12 + element) * config.padded_vocab_size * batch_size
    graphs = 0
    if not (on_cpu or num_supervised):
        graphs = MOST_GRAPHS * config.num_layers * GRAPH_LAYER_BYTES + element * config.padded_vocab_size * batch_size
    dequantized = 0 if on_cpu else 2 * feed_forward * hidden * element
    trained, trained_bytes = counts.get("trained", (0, 0))
    return {
        "weights": sum(size for _, size in counts.values()) - trained_bytes,
        "trained": 16 * trained + (0 if on_cpu else 2 * own) if num_supervised else trained_bytes,
        **kept,
        **({"graphs": graphs} if graphs else {}),
        "logits and work": max(work, dequantized),
        **({"Python and libraries": PROCESS_BYTES} if on_cpu else {}),
    }


def first_trained_layer(model: nn.Module) -> int:
    """Index of the first layer that backward passes through: 0 unless only weights of later layers train."""
    if model.transformer.prefix_encoder is not None or model.get_input_embeddings().weight.requires_grad:
        return 0
    for number, layer in enumerate(model.transformer.encoder.layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return number
    return 0


def memory_table(model: nn.Module, **batch) -> str:
    """Text: numbers, bits and memory of each kind of weights, and the estimate for the batch, whose arguments are
    those of `estimate_peak_bytes`."""
    bits = {"trained": 32, "float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
    lines = [f"  {'weights':<12}{'parameters':>15}{'bits':>6}{'memory':>12}"]
    for kind, (numbers, size) in count_weights(model).items():
        lines.append(f"  {kind:<12}{numbers:>15,}{bits.get(kind, ''):>6}{in_words(size):>12}")
    parts = estimate_peak_bytes(model, **batch)
    listed = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items())
    purpose = "training on" if batch["num_supervised"] else "generating for"
    lines.append(
        f"Estimated peak memory, {purpose} {batch['batch_size']} rows x {batch['length']} tokens: "
        f"{in_words(sum(parts.values()))} ({listed})."
    )
    return "\n".join(lines)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on a device; of a machine's own, which its processes share, its part."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def added_bytes(model: nn.Module, **batch) -> int:
    """What a batch takes of a model that is in memory already; the arguments are those of `estimate_peak_bytes`."""
    parts = estimate_peak_bytes(model, **batch)
    return sum(size for name, size in parts.items() if name not in ("weights", "Python and libraries"))


def needs_checkpointing(model: nn.Module, **batch) -> tuple[bool, str]:
    """(True where a step without gradient checkpointing takes more than nine tenths of the free memory, a line on it).

    `batch` are the arguments of `estimate_peak_bytes`. The model is in memory already."""
    needed = added_bytes(model, **{**batch, "checkpointing": False})
    free = free_bytes(model.device)
    too_much = needed > 0.9 * free
    return too_much, (
        f"Gradient checkpointing: {'on' if too_much else 'off'}, because a step without it takes about "
        f"{in_words(needed)} and {in_words(free)} are free (--gradient_checkpointing true|false decides otherwise)."
    )


def largest_batch(model: nn.Module, train_data, data_args, training_args) -> dict:
    """What memory_table must know of the largest batch of training or, without `train_data`, of prediction."""
    if train_data is not None:
        length = longest_example(train_data, data_args)
        rows, supervised = training_args.per_device_train_batch_size, min(length, data_args.max_target_length + 1)
        supervised = length if data_args.train_on_history and answers_per_row(training_args) == 1 else supervised
        rows = min(rows, len(train_data)) if training_args.world_size == 1 else rows
        return {
            "batch_size": rows * answers_per_row(training_args),
            "length": -(-length // 8) * 8,  # as collate_training pads
            "num_supervised": 1 if getattr(training_args, "stage", "sft") == "rm" else supervised,
            "checkpointing": bool(training_args.gradient_checkpointing),
        }
    length = data_args.max_source_length + data_args.max_target_length + 1
    if (data_args.num_beams or 1) > 1:
        batch_size = training_args.per_device_eval_batch_size * data_args.num_beams
    else:
        batch_size = training_args.prediction_batch_size or rows_that_fit(model, length)
    return {"batch_size": batch_size, "length": length, "num_supervised": 0}


def decide_checkpointing(model: nn.Module, batch: dict, training_args, say):
    """Turn gradient checkpointing on or off where no flag does, in `batch` too, and `say` why."""
    settings = getattr(training_args, "activation_checkpointing_kwargs", None)  # its name in transformers 5.23
    if not (settings or training_args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        model.enable_input_require_grads = lambda: None  # backward would run on below all that trains
    if training_args.gradient_checkpointing is not None or not batch["num_supervised"]:
        return
    if engine_of(training_args):  # the model is not where it will train
        checkpointing = training_args.device.type == "cuda"
    else:
        checkpointing, decision = needs_checkpointing(model, **batch)
        say(decision)
    batch["checkpointing"] = checkpointing
    training_args.gradient_checkpointing = training_args.activation_checkpointing = checkpointing


def merge_batches(model: nn.Module, batch: dict, training_args, say):
    """Let accumulated batches be computed together where half of the free memory holds them, and `say` so.

    `batch` and `training_args` are changed. A step keeps its rows, which process computes them, what each loses of the
    prefix, and its mean over all supervised tokens: its numbers are the same but for rounding. So it is unless an
    adapter has dropout, which it draws for a batch as a whole. Where the estimate was too low, the trainer cuts them in
    two again.
    """
    rows, accumulated = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    answers = answers_per_row(training_args)
    adapter_drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if not batch["num_supervised"] or engine_of(training_args) or adapter_drops:
        return
    if training_args.precision == "official" or training_args.dataloader_drop_last:
        return
    free = min(gather(free_bytes(model.device)))
    for merged in range(accumulated, 1, -1):
        together = {**batch, "batch_size": rows * merged * answers}
        if accumulated % merged == 0 and (needed := added_bytes(model, **together)) <= free // 2:
            batch.update(together)
            training_args.per_device_train_batch_size, training_args.merged_batches = rows * merged, merged
            training_args.gradient_accumulation_steps = accumulated // merged
            if model.transformer.prefix_encoder is not None:
                model.transformer.prefix_encoder.rows_at_once = rows * answers
            say(
                f"{merged} accumulated batches are computed at once, {rows * merged} rows, because they take about "
                f"{in_words(needed)} and {in_words(free)} are free. A step is the same."
            )
            return


def cut_batch(model: nn.Module, batch: dict, training_args, say):
    """With --auto_find_batch_size, let a batch be computed in as many parts as memory asks for, and `say` so.

    `batch` and `training_args` are changed: else the first steps would find out, one failure after the other.
    """
    rows, parts = batch["batch_size"], 1
    if not (training_args.auto_find_batch_size and batch["num_supervised"]) or engine_of(training_args):
        return
    free = free_bytes(model.device)
    checkpointing = bool(training_args.gradient_checkpointing)
    while (
        parts < rows
        and added_bytes(model, **{**batch, "batch_size": -(-rows // parts), "checkpointing": checkpointing})
        > 0.9 * free
    ):
        parts *= 2
    batch["batch_size"], training_args.first_parts = -(-rows // parts), parts
    if parts > 1:
        say(
            f"{-(-rows // parts)} of a batch's {rows} rows are computed at a time, because {in_words(free)} are free. A "
            "step keeps its rows."
        )


def settle_batch(model: nn.Module, batch: dict, training_args, say):
    """Decide what no flag does of a training batch, by the memory it takes: checkpointing, and how many are merged."""
    cut_batch(model, batch, training_args, say)
    decide_checkpointing(model, batch, training_args, say)
    merge_batches(model, batch, training_args, say)


def rows_that_fit(model: nn.Module, length: int) -> int:
    """How many rows of `length` tokens, prompt and answer together, to generate for at once: a power of two.

    They may take half of the free memory. Beyond MOST_ROWS a step takes longer and a row is answered no sooner.
    """
    sizes = [
        sum(estimate_peak_bytes(model, batch_size=rows, length=length, num_supervised=0).values()) for rows in (1, 2)
    ]
    devices = model.devices  # they share the cache
    room = len(devices) * min(map(free_bytes, devices)) // 2 // max(1, sizes[1] - sizes[0])
    return min(1 << max(0, room.bit_length() - 1), MOST_ROWS[model.device.type])


# ---- when it does not fit


@contextlib.contextmanager
def explaining_out_of_memory(model: nn.Module, args, shape: tuple[int, int], training: bool):
    """Says inside the block, instead of torch's own words for a full GPU, what of the run did not fit.

    `shape` (rows, tokens) is that of the batch, `args` the flags of training.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = describe_out_of_memory(model, args, shape, training, str(error))
        raise torch.OutOfMemoryError(message) from None


def describe_out_of_memory(model, args, shape, training, reason):
    """The batch, the dtype, the memory there is, and the flags that would lower what is needed."""
    rows, tokens = shape
    device, dtype = model.device, dtype_name(model.transformer.dtype_of_blocks)
    bits = model.config.quantization_bit
    weights = f"int{bits} weights, {dtype} activations" if bits else f"{dtype} weights and activations"
    lines = [
        f"Out of memory on {device}, at {'a training batch' if training else 'an evaluation batch'} of {rows} rows x "
        f"{tokens} tokens, {weights}."
    ]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        lines.append(
            f"  memory: {total / 1e9:.2f} GB in all, {free / 1e9:.2f} free, {allocated / 1e9:.2f} allocated by this "
            f"process (peak {peak / 1e9:.2f}); nvidia-smi shows who has the rest"
        )
    else:
        lines.append(f"  {reason.strip().splitlines()[0][:200]}")
    lower = []
    if training and rows > 1:
        given_rows, accumulated = args.given_batches
        lower.append(
            f"--per_device_train_batch_size {given_rows}, with --gradient_accumulation_steps {accumulated} raised by the "
            "same factor (--auto_find_batch_size does both)"
        )
    elif not training and rows > 1:
        lower.append(f"--per_device_eval_batch_size {args.per_device_eval_batch_size}")
    lower.append("--max_source_length and --max_target_length")
    also = [] if bits == 4 else ["--quantization_bit 4"]
    if training and not args.gradient_checkpointing:
        also.append("--gradient_checkpointing true")
    lines.append(f"  lower {'; or '.join(lower)}{'; or use ' + ' and '.join(also) if also else ''}")
    return "\n".join(lines)
