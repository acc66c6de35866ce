"""What a GPU does in one step: rates of the layers' products, attention by kernel, profiles of training and decoding.

    PYTHONPATH=ptuning python -m benchmarks.gpu_steps rates --out FOLDER
    PYTHONPATH=ptuning python -m benchmarks.gpu_steps steps --out FOLDER
    PYTHONPATH=ptuning python -m benchmarks.gpu_steps drift --out FOLDER
    PYTHONPATH=ptuning python -m benchmarks.gpu_steps preference --out FOLDER

One 6B of random weights, in bf16 and then in int4. Each figure goes to FOLDER/rates.json, steps.json, drift.json or
preference.json as soon as it is there, and is printed. `drift` is what measuring and keeping what is forgotten costs
beside a step of 16 rows, `preference` what a step on --pairs pairs takes beside one on as many answers; that of ppo is
without writing its answers, which `steps` measures. `--size tiny` and a CPU do for a dry run.
"""

import argparse
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from benchmarks.contenders.base import COMMON, SIZES, find_data
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from alignment.dpo import PreferenceObjective, reference_log_probs
from alignment.ppo import PPO
from alignment.ppo_trainer import PolicyObjective
from alignment.reward import RewardModel, RewardObjective
from alignment.value_head import ValueHead
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.generation import Batch, graph_slots
from chatglm2.kernels import kernels_for
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.quantization import choose_backend, quantize_model_, use_backend_
from common.slowness import slow_because
from data.general import MEASURED
from forgetting.answers import answers_of
from forgetting.drift import Drift
from forgetting.trainer import MEASURED_TOKENS
from tuning.swapping import BASE, adaptation_of, start_of, swapped

PREFIX = 128
ROW = 130  # tokens, as ADGEN's on average; the later half is supervised
PROMPT = 40
REPEATS = 5
CALLS = 10  # of a product at a time
PROFILED = 25  # kernels in a table


class Results:
    """Figures that are printed and written at once: what is there when the time is up is not lost."""

    def __init__(self, file, **about):
        self.file, self.figures = file, []
        self.about = about
        file.parent.mkdir(parents=True, exist_ok=True)
        print(json.dumps(about), flush=True)

    def add(self, **figure):
        self.figures.append(figure)
        print(
            " ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in figure.items()
            ),
            flush=True,
        )
        self.file.write_text(json.dumps({**self.about, **slow_because(), "figures": self.figures}, indent=1) + "\n")


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work, device):
    """Seconds of one call of work()."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def median_time(work, device):
    work()
    return statistics.median(timed(work, device) for _ in range(REPEATS))


def time_and_peak(work, device):
    """(median seconds of a call, peak GB of the GPU in them, 0 without one)"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_time(work, device)
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


# ---- rates


def multiply_often(x, weight):
    for _ in range(CALLS):
        torch.nn.functional.linear(x, weight)


def measure_products(results, sizes, device, dtype):
    """Each layer's product, F.linear, at rows from one to a large batch's."""
    hidden, feed_forward = sizes["hidden_size"], sizes["ffn_hidden_size"]
    width = sizes["num_attention_heads"] * sizes["kv_channels"]
    mixed = width + 2 * COMMON["multi_query_group_num"] * sizes["kv_channels"]
    shapes = {
        "query_key_value": (mixed, hidden),
        "dense": (hidden, width),
        "dense_h_to_4h": (2 * feed_forward, hidden),
        "dense_4h_to_h": (hidden, feed_forward),
    }
    for name, (outputs, inputs) in shapes.items():
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        for rows in (1, 8, 16, 64, 256, 1024, 1040, 1088, 2080, 4160):
            x = torch.randn(rows, inputs, device=device, dtype=dtype)
            seconds = median_time(partial(multiply_often, x, weight), device) / CALLS
            results.add(
                layer=name,
                rows=rows,
                ms=1000 * seconds,
                tflops=2 * rows * outputs * inputs / seconds / 1e12,
                gb_a_second=weight.nbytes / seconds / 1e9,
            )


def measure_attention(results, sizes, device, dtype):
    """torch's kernels on a masked decode step and on a prompt without a prefix: the first call and the tenth."""
    heads, channels, groups = sizes["num_attention_heads"], sizes["kv_channels"], COMMON["multi_query_group_num"]
    masked = torch.zeros(8, 1, heads // groups, 384, device=device, dtype=dtype)
    cases = {
        "decode, 8 rows, masked": ((8, groups, heads // groups), (8, groups, 384), {"attn_mask": masked}),
        "prompt of 256, causal": ((1, heads, 256), (1, heads, 256), {"is_causal": True}),
    }
    kernels = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    for case, (of_query, of_key, settings) in cases.items():
        query, key, value = (
            torch.randn(*shape, channels, device=device, dtype=dtype, requires_grad=True)
            for shape in (of_query, of_key, of_key)
        )

        def both(query=query, key=key, value=value, settings=settings):
            context = torch.nn.functional.scaled_dot_product_attention(query, key, value, **settings)
            context.sum().backward()

        for name in kernels:
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    calls = [timed(both, device) for _ in range(10)]
            except RuntimeError as error:
                results.add(attention=case, kernel=name, refused=str(error).splitlines()[0][:100])
                continue
            results.add(attention=case, kernel=name, first_ms=1000 * calls[0], tenth_ms=1000 * calls[-1])


# ---- steps


def make_model(size, bits, device, dtype):
    """A model of random weights, as it is after loading."""
    config = ChatGLMConfig(**COMMON, **SIZES[size], pre_seq_len=PREFIX)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = ChatGLMForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).transformer.prefix_encoder.float().requires_grad_(True)
    if bits:
        quantize_model_(model, bits)
        use_backend_(model, choose_backend("auto", device, bits, dtype))
    return model


def random_rows(shape, device):
    """(input_ids, labels) of a shape, ROW tokens a row."""
    input_ids = torch.randint(100, 1000, (*shape, ROW), device=device)
    labels = input_ids.clone()
    labels[..., : ROW // 2] = -100
    return input_ids, labels


def optimizing(model, loss, weights=()):
    """A function that makes one step down the gradient of loss(), with the prefix and other weights."""
    optimizer = torch.optim.AdamW([*model.transformer.prefix_encoder.parameters(), *weights], lr=1e-3, fused=True)

    def step():
        model.train()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_step(model, rows, device):
    """A function that makes one step on `rows` rows."""
    input_ids, labels = random_rows([rows], device)
    return optimizing(model, lambda: model(input_ids=input_ids, labels=labels).loss)


def decoding_step(model, rows, device, graphs):
    """(a function that feeds one token to each of `rows` rows, the batch)"""
    model.eval()
    batch = Batch(model, rows, PREFIX + PROMPT + 100)
    if not graphs:
        batch.graphs = None
    with torch.inference_mode():
        prefix = model.transformer.prefix_encoder(1, model.transformer.dtype_of_blocks)
    batch.admit([list(range(100, 100 + PROMPT))] * rows, prefix)
    return lambda: batch.step([5] * rows), batch


def show_profile(results, step, name, folder, device):
    """Where the time of a step goes: a table beside the results, and how many kernels it launches."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        wait(device)
    by = f"self_{device.type}_time_total" if device.type == "cpu" else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=PROFILED, max_name_column_width=90)
    (folder / f"profile-{name}.txt").write_text(table + "\n")
    kernels = sum(event.device_type.name == "CUDA" for event in profiler.events())
    results.add(profile=name, kernels=kernels)


def measure_steps(results, args, device, dtype):
    for bits in args.bits:
        model = make_model(args.size, bits, device, dtype)
        weights = f"int{bits}" if bits else str(dtype).removeprefix("torch.")
        taken = kernels_for(torch.empty(0, device=device, dtype=dtype))._asdict()
        results.add(weights=weights, fused_kernels=[name for name, kernel in taken.items() if kernel])
        for rows in args.train_rows:
            step = training_step(model, rows, device)
            seconds, peak = time_and_peak(step, device)
            results.add(
                weights=weights, train_rows=rows, ms=1000 * seconds, tokens_a_second=rows * ROW / seconds, peak_gb=peak
            )
            show_profile(results, step, f"{weights}-train-{rows}", results.file.parent, device)
        for rows in args.decode_rows:
            for graphs in (False, True) if device.type == "cuda" else (False,):
                step, batch = decoding_step(model, rows, device, graphs)
                free = torch.cuda.mem_get_info()[0] if graphs else 0
                first = timed(step, device)  # with graphs: records one
                figure = {"first_ms": 1000 * first}
                if graphs:
                    size = graph_slots(max(batch.lengths))
                    figure |= {"graph_slots": size, "graph_mb": (free - torch.cuda.mem_get_info()[0]) / 1e6}
                seconds = median_time(step, device)
                results.add(weights=weights, decode_rows=rows, graphs=graphs, ms=1000 * seconds, **figure)
                if graphs or device.type == "cpu":
                    show_profile(results, step, f"{weights}-decode-{rows}", results.file.parent, device)
                del step, batch
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_forgetting(results, args, device, dtype):
    """The base's answers, the drift and a step's general rows, beside a training step of the scripts' 16 rows."""
    prompts = [list(range(100 + number, 100 + number + PROMPT)) for number in range(MEASURED)]
    for bits in args.bits:
        model = make_model(args.size, bits, device, dtype)
        weights = f"int{bits}" if bits else str(dtype).removeprefix("torch.")
        step, keep = training_step(model, 16, device), training_step(model, 8, device)
        step_seconds, keep_seconds = median_time(step, device), median_time(keep, device)

        def answer(model=model):
            with swapped(model, BASE):
                return answers_of(model, prompts, MEASURED_TOKENS, 64794)

        answer_seconds = timed(answer, device)
        answers = [list(range(5, 5 + MEASURED_TOKENS)) for _ in prompts]  # random weights may end theirs at once
        drift = Drift(model, prompts, answers, num_known=64794, pad_token_id=0)
        first, later = timed(drift.measure, device), median_time(drift.measure, device)
        run = 3000 * step_seconds  # of train.sh, which measures at the start and at three saves
        results.add(
            weights=weights,
            step_ms=1000 * step_seconds,
            keep_rows_8_ms=1000 * keep_seconds,
            answers_s=answer_seconds,
            first_s=first,
            later_s=later,
            share_of_a_run=(answer_seconds + first + 3 * later) / run,
        )
        del model, drift, step, keep
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def preference_steps(model, pairs, device):
    """{stage: a function that makes one step} on so many pairs, for sft and ppo on as many answers."""
    head = ValueHead(model.config.hidden_size).to(device)
    reference, ppo = start_of(model), PPO()
    input_ids, labels = random_rows([pairs, 2], device)
    rows = {"input_ids": input_ids.flatten(0, 1), "labels": labels.flatten(0, 1)}
    lengths = torch.full((pairs, 2), ROW, device=device)
    batch = {"input_ids": input_ids, "labels": labels, "lengths": lengths}
    cached = {**batch, "reference": reference_log_probs(model, reference, **rows).unflatten(0, (-1, 2))}
    rewards, preferences = RewardObjective(head), PreferenceObjective(reference, beta=0.1)
    policy = PolicyObjective(head, reference, RewardModel(adaptation_of(model), head), ppo)
    answers = {"input_ids": input_ids[:, 0], "labels": labels[:, 0], "lengths": lengths[:, 0]}
    answers["mask"] = torch.ones(pairs, ROW - ROW // 2, dtype=torch.bool, device=device)

    def pass_over_answers():
        said, _, _ = policy.judge(model, answers, head)
        read = {name: answers[name] for name in ("input_ids", "labels", "mask")}
        advantages = torch.ones_like(said.values)
        losses, _ = policy.losses(
            model,
            **read,
            old_log_probs=said.log_probs,
            old_values=said.values,
            advantages=advantages,
            returns=said.values + 1,
        )
        return losses.mean()

    return {
        "sft": training_step(model, pairs, device),
        "rm": optimizing(model, lambda: rewards(model, batch)["loss"].mean(), head.parameters()),
        "dpo": optimizing(model, lambda: preferences(model, batch)["loss"].mean()),
        "dpo --dpo_cache": optimizing(model, lambda: preferences(model, cached)["loss"].mean()),
        "ppo": optimizing(model, pass_over_answers, head.parameters()),
    }


def measure_preferences(results, args, device, dtype):
    """Time and memory of a step of each stage, beside tuning on as many answers."""
    for bits in args.bits:
        model = make_model(args.size, bits, device, dtype)
        weights = f"int{bits}" if bits else str(dtype).removeprefix("torch.")
        beside = None
        for stage, step in preference_steps(model, args.pairs, device).items():
            seconds, peak = time_and_peak(step, device)
            beside = beside or peak
            results.add(
                weights=weights,
                stage=stage,
                ms=1000 * seconds,
                samples_a_second=args.pairs / seconds,
                peak_gb=peak,
                beside_sft=peak / beside if beside else 0.0,
            )
        del model, step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "steps", "drift", "preference"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--size", choices=SIZES, default="6b")
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 4], choices=(0, 4, 8))
    parser.add_argument("--train_rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--decode_rows", type=int, nargs="+", default=[1, 8, 64, 256])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    tokenizer, rows = find_data()
    results = Results(
        args.out / f"{args.what}.json",
        torch=torch.__version__,
        device=name,
        size=args.size,
        dtype=str(dtype),
        tokenizer=str(tokenizer),
        rows=str(rows),
    )
    torch.manual_seed(0)
    if args.what == "rates":
        measure_products(results, SIZES[args.size], device, dtype)
        measure_attention(results, SIZES[args.size], device, dtype)
    elif args.what == "drift":
        measure_forgetting(results, args, device, dtype)
    elif args.what == "preference":
        measure_preferences(results, args, device, dtype)
    else:
        measure_steps(results, args, device, dtype)


if __name__ == "__main__":
    main()
