"""What benchmarks.speed shows: the machine, the tables in Markdown, the plots."""

import datetime
import platform
from pathlib import Path

from benchmarks.contenders import BFLOAT16, only_answers, titles
from benchmarks.contenders.base import (
    ROOT,
    SIZES,
    decode_bytes,
    find_data,
    long_row,
    minimal_operations,
    supervised_count,
)


def describe_machine(device):
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16"
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.machine()}, {threads} threads, torch {torch.__version__}, float32"


# ---- the tables


def line(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def print_head(*cells):
    print(line(*cells))
    print("|---" * len(cells) + "|")


def setting_line(settings, figures):
    """Date, machine, sizes and the machine's rates."""
    rows, prompts = figures["rows"], figures["prompts"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    return (
        f"{datetime.date.today()}, {settings.machine}. Model `{settings.size}`, prefix {settings.pre_seq_len}, batch "
        f"{settings.batch_size}, {len(rows)} rows of {find_data()[1].parent.name} with {tokens / len(rows):.0f} tokens, "
        f"{sum(map(supervised_count, rows)) / len(rows):.0f} of them supervised; {len(prompts)} prompts of "
        f"{len(prompts[0])} tokens, {settings.new_tokens} new ones each; medians of {settings.repeats} turns. Product "
        f"{figures['product_rate'] / 1e9:,.0f} GFLOP/s, copy {figures['copy_rate'] / 1e9:.1f} GB/s."
    )


def print_training(settings, figures):
    """Training of every contender, and the floor: the operations at the rate of a large product."""
    rows, title = figures["rows"], titles(settings)
    tokens = sum(len(row["input_ids"]) for row in rows)
    operations = minimal_operations(SIZES[settings.size], rows, settings.pre_seq_len)
    floor = operations / figures["product_rate"]
    ours, our_memory = figures["train"]["ours"], figures["memory"]["ours"]
    print_head("", "training samples/s", "tokens/s", "ours is", "of the product's rate", "extra memory", "ours needs")
    for name, seconds in figures["train"].items():
        memory = figures["memory"][name]
        print(
            line(
                title[name],
                f"{len(rows) / seconds:.2f}",
                f"{tokens / seconds:,.0f}",
                f"{seconds / ours:.2f}x",
                f"{operations / seconds / figures['product_rate']:.0%}",
                f"{memory / 1e6:,.0f} MB",
                f"{our_memory / memory:.2f}x",
            )
        )
    print(line("floor", f"{len(rows) / floor:.2f}", f"{tokens / floor:,.0f}", f"{floor / ours:.2f}x", "100%", "", ""))


def print_prediction(settings, figures):
    """Prediction of every contender, that of ours a second time in the batches that it takes on its own."""
    prompts, title = figures["prompts"], titles(settings)

    def bytes_read(name):
        element = 2 if settings.device == "cuda" or name == BFLOAT16 else 4
        sizes = {"automatic": figures["automatic_batch_size"]}
        size = 1 if only_answers(name) else sizes.get(name, settings.batch_size)
        steps, num_rows = -(-len(prompts) // size), min(size, len(prompts))
        return steps * decode_bytes(
            SIZES[settings.size], settings.pre_seq_len, len(prompts[0]), settings.new_tokens, num_rows, element
        )

    print_head("", "answers/s", "new tokens/s", "ours is", "of the copy's rate")
    for name, seconds in figures["answer"].items():
        print(
            line(
                title[name],
                f"{len(prompts) / seconds:.2f}",
                f"{len(prompts) * settings.new_tokens / seconds:,.0f}",
                f"{seconds / figures['answer']['ours']:.2f}x",
                f"{bytes_read(name) / seconds / figures['copy_rate']:.0%}",
            )
        )


def print_rest(figures):
    """Data, metrics, start."""
    print_head("", "ours", "official recipe, restated", "ratio")
    for part, unit in (("preprocessing", "rows/s"), ("metrics", "rows/s")):
        both = figures[part]
        ratio = both["ours"] / both["official"]
        print(line(f"{part}, {unit}", f"{both['ours']:,.0f}", f"{both['official']:,.0f}", f"{ratio:.1f}x"))
    print(line("main.py --help", f"{figures['help']:.2f} s", "", ""))
    print(line("first step of the tiny model, from the command", f"{figures['first_step']:.1f} s", "", ""))


def print_growth(settings, figures):
    """Time and memory over the tokens of a row; every figure is of two rows."""
    print_head("tokens a row", "ms a row", "µs a token", "MFLOP a token", "extra MB a row", "KB a token")
    for count, growth in figures["growth"].items():
        seconds, extra = growth["seconds"] / 2, growth["extra_bytes"] / 2
        operations = minimal_operations(SIZES[settings.size], [long_row(count)], settings.pre_seq_len)
        print(
            line(
                f"{count:,}", f"{seconds * 1e3:,.0f}", f"{seconds / count * 1e6:,.0f}",
                f"{operations / count / 1e6:,.0f}", f"{extra / 1e6:,.0f}", f"{extra / count / 1e3:,.0f}",
            )
        )  # fmt: skip


def report(settings, figures):
    """The tables, in Markdown."""
    print(f"\n{setting_line(settings, figures)}\n")
    print_training(settings, figures)
    print()
    print_prediction(settings, figures)
    print()
    if "preprocessing" in figures:
        print_rest(figures)
        print()
    if settings.growth:
        print_growth(settings, figures)


# ---- the plots


def plot(settings, figures):
    """benchmarks/speed.png: rates relative to ours; benchmarks/growth.png: time and memory over tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    title = titles(settings)
    panels = {"training, samples/s": "train", "prediction, answers/s": "answer", "extra memory in training": "memory"}
    for axes, (heading, part) in zip(figure.subplots(1, 3, width_ratios=(3, 4, 3)), panels.items(), strict=True):
        official = figures[part]["official"]
        names = list(figures[part])
        values = [
            figures[part][name] / official if part == "memory" else official / figures[part][name] for name in names
        ]
        labels = [
            title[name].replace(", ", ",\n").replace(" + ", "\n+ ").replace(" batch", "\nbatch") for name in names
        ]
        bars = axes.bar(labels, values)
        axes.bar_label(bars, [f"{value:.2f}x" for value in values])
        axes.set_title(heading, fontsize=10)
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(y=0.15)
    figure.savefig(ROOT / "benchmarks" / "speed.png", dpi=110)
    if not settings.growth:
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    counts = list(figures["growth"])
    for axes, name, unit, scale in zip(
        figure.subplots(1, 2), ("seconds", "extra_bytes"), ("s a row", "extra MB a row"), (0.5, 0.5e-6), strict=True
    ):
        axes.plot(counts, [figures["growth"][count][name] * scale for count in counts], marker="o")
        axes.set(xlabel="tokens a row, half of them supervised", ylabel=unit, xlim=0, ylim=0)
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "benchmarks" / "growth.png", dpi=110)
