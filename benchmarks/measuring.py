"""How benchmarks.speed measures: each contender in a process of its own, in turns, and the rates of the machine beside.

Commands go into a contender's process as lines, figures come out as lines of JSON.
"""

import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contenders import OURS, make_contender, only_answers, taking_part
from benchmarks.contenders.base import (
    COMMON,
    MAX_SOURCE,
    MAX_TARGET,
    ROOT,
    SIZES,
    find_data,
    long_row,
    read_data,
    read_examples,
)

GROWTH_TOKENS = (128, 256, 512, 1024, 2048)
METRIC_ROWS, PREPROCESSING_ROWS = 400, 5000


# ---- memory


def resident_bytes(name):
    """VmRSS or VmHWM of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def memory_in_use(device):
    import torch

    return torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes("VmRSS")


@contextlib.contextmanager
def peak_memory(device, before, figures):
    """Adds `extra_bytes`: the block's peak beyond `before`."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(AttributeError):  # a libc without it
            ctypes.CDLL(None).malloc_trim(0)  # what is kept of earlier steps
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    yield
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM")
    figures["extra_bytes"] = peak - before


# ---- a contender's process, from inside and seen from the parent


def work(settings):
    """Obey the parent: train, memory, answer, growth <tokens>."""
    import torch

    contender = make_contender("ours" if settings.worker in OURS else settings.worker, settings)

    def timed(action, *args):
        started = time.perf_counter()
        action(*args)
        if contender.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rows = contender.data["rows"]
    before = memory_in_use(contender.device)  # the first step is still to come
    print("{}", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        figures = {}
        if command == "memory":
            longest = sorted(rows, key=lambda row: len(row["input_ids"]))[-settings.batch_size :]
            with peak_memory(contender.device, before, figures):
                timed(contender.train, longest)
        elif command == "train":
            figures["seconds"] = timed(contender.train, rows)
        elif command == "answer":
            figures["seconds"] = timed(contender.answer)
        elif command == "answer_automatic":
            figures["batch_size"] = contender.automatic_batch_size()
            figures["seconds"] = timed(contender.answer, figures["batch_size"])
        elif command == "growth":
            batch = [long_row(int(words[0]))] * 2
            contender.train(batch)
            with peak_memory(contender.device, before, figures):
                figures["seconds"] = statistics.median(timed(contender.train, batch) for _ in range(3))
        print(json.dumps(figures), flush=True)


class Worker:
    """A contender's process, seen from the parent."""

    def __init__(self, command, environment=None):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self.receive()

    def receive(self):
        for line in self.process.stdout:
            if line.startswith('{"') or line == "{}\n":
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")

    def ask(self, command):
        print(command, file=self.process.stdin, flush=True)
        return self.receive()

    def close(self):
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


# ---- data, metrics, start


def preprocessing_rates(settings):
    """{contender: rows per second} of text to padded ids and labels, the cache of encoded rows left aside."""
    from data.encoding import encode_training

    tokenizer, examples = read_examples(PREPROCESSING_ROWS)

    def official(batch):
        features = {"input_ids": [], "labels": []}
        for query, answer in zip(batch["prompt"], batch["response"], strict=True):
            prompt = tokenizer.build_prompt(query, None)
            a = tokenizer.encode(text=prompt, add_special_tokens=True, truncation=True, max_length=MAX_SOURCE)
            b = tokenizer.encode(text=answer, add_special_tokens=False, truncation=True, max_length=MAX_TARGET)
            input_ids = a + b + [tokenizer.eos_token_id]
            labels = [tokenizer.pad_token_id] * len(a) + b + [tokenizer.eos_token_id]
            padding = [tokenizer.pad_token_id] * (MAX_SOURCE + MAX_TARGET + 1 - len(input_ids))
            labels = [label if label != tokenizer.pad_token_id else -100 for label in labels + padding]
            features["input_ids"].append(input_ids + padding)
            features["labels"].append(labels)
        return features

    runs = {
        "ours": lambda: encode_training(
            examples, tokenizer, max_source_length=MAX_SOURCE, max_target_length=MAX_TARGET, overwrite_cache=True
        ),
        "official": lambda: examples.map(
            official, batched=True, remove_columns=examples.column_names, load_from_cache_file=False
        ),
    }
    return alternate(runs, len(examples), settings.repeats)


def metric_rates(settings):
    """{contender: rows per second} of BLEU-4 and ROUGE, for responses of ADGEN scored against each other."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    from evaluation.metrics import score_all

    labels = read_examples(METRIC_ROWS)[1]["response"][:]
    predictions = labels[1:] + labels[:1]

    def official():
        for prediction, label in zip(predictions, labels, strict=True):
            rouge = Rouge()
            rouge.get_scores(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(label)))
            sentence_bleu([list(label)], list(prediction), smoothing_function=SmoothingFunction().method3)

    list(jieba.cut("词典"))  # load the dictionary before the clock starts
    return alternate(
        {"ours": lambda: score_all(predictions, labels), "official": official}, len(labels), settings.repeats
    )


def alternate(runs, count, repeats):
    """{name: count per second}, medians of runs that take turns."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: count / statistics.median(times) for name, times in seconds.items()}


FIRST_STEP = re.compile(r"step 1/\d+ .*\bloss ")  # as ShownProgress of training/progress.py writes it


def start_seconds():
    """(seconds of main.py --help, seconds from the command to the loss of the first step of the tiny model)."""
    main = [sys.executable, str(ROOT / "ptuning" / "main.py")]
    help_times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([*main, "--help"], stdout=subprocess.DEVNULL, check=True)
        help_times.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        sample = ROOT / "AdvertiseGen" / "sample" / "train.json"
        flags = {
            "do_train": True, "train_file": sample, "prompt_column": "content", "response_column": "summary",
            "model_name_or_path": ROOT / "ptuning" / "tiny", "output_dir": folder, "pre_seq_len": 32, "max_steps": 1,
            "per_device_train_batch_size": 16, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "overwrite_cache": True,
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*main, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        first_step = next(time.perf_counter() - started for line in process.stdout if FIRST_STEP.match(line))
        process.stdout.read()
        process.wait()
    return statistics.median(help_times), first_step


# ---- the whole comparison


def official_words(settings):
    folder, file = find_data()
    sizes = {**COMMON, **SIZES[settings.size]}
    return [settings.official, str(folder), str(file), json.dumps({**vars(settings), "sizes": sizes})]


def start_workers(settings):
    """{name: Worker}, ready for commands."""
    from common.environment import KEEP_MEMORY

    words = [word for word in sys.argv[1:] if not word.startswith("--worker")]
    command = [sys.executable, "-m", "benchmarks.speed", *words, "--worker"]
    workers = {}
    for name in taking_part(settings):
        if name == "official" and settings.official:
            official = Path(__file__).with_name("official_scripts.py")
            workers[name] = Worker([settings.official_python, str(official), *official_words(settings)])
        else:
            workers[name] = Worker([*command, name], {**os.environ, **KEEP_MEMORY} if name in OURS else None)
    return workers


def alternate_workers(workers, repeats):
    """Figures of `train` and `answer`, seconds a turn by name, and the machine's rates between the turns."""
    import torch
    from benchmarks.quantization import measure_floor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures, rates = {}, []
    for part in ("train", "answer"):
        takers = {name: worker for name, worker in workers.items() if part == "answer" or not only_answers(name)}
        seconds = {name: [] for name in takers}
        for turn in range(repeats + 1):
            rates.append(measure_floor(device, dtype))
            for name, worker in takers.items():
                took = worker.ask(part)["seconds"]
                if turn:  # the first turn warms up
                    seconds[name].append(took)
            if part == "answer":
                answered = workers["ours"].ask("answer_automatic")
                figures["automatic_batch_size"] = answered["batch_size"]
                if turn:
                    seconds.setdefault("automatic", []).append(answered["seconds"])
        figures[part] = {name: statistics.median(times) for name, times in seconds.items()}
    figures["copy_rate"], figures["product_rate"] = map(statistics.median, zip(*rates, strict=True))
    return figures


def measure_growth(worker, repeats):
    """{tokens: seconds and extra_bytes of two rows of so many tokens}."""
    turns = [{tokens: worker.ask(f"growth {tokens}") for tokens in GROWTH_TOKENS} for _ in range(repeats)]
    for tokens, first in turns[0].items():  # the memory of the first turn: later ones keep kernels of longer rows
        first["seconds"] = statistics.median(turn[tokens]["seconds"] for turn in turns)
    return turns[0]


def measure(settings):
    """Everything, as a dictionary of figures."""
    workers = start_workers(settings)
    figures = {
        "memory": {
            name: worker.ask("memory")["extra_bytes"] for name, worker in workers.items() if not only_answers(name)
        }
    }
    figures.update(alternate_workers(workers, settings.repeats))
    if settings.growth:
        figures["growth"] = measure_growth(workers["ours"], settings.repeats)
    for worker in workers.values():
        worker.close()
    data = read_data(settings)
    figures["rows"], figures["prompts"] = data["rows"], data["prompts"]
    if not settings.quantization_bit:
        figures["preprocessing"] = preprocessing_rates(settings)
        figures["metrics"] = metric_rates(settings)
        figures["help"], figures["first_step"] = start_seconds()
    return figures
