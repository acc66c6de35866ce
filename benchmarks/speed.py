"""Training, prediction, data and start, side by side with the official recipe, with PEFT, and with what is possible.

    PYTHONPATH=ptuning python -m benchmarks.speed --size small          (6b needs a GPU; tiny takes a minute)

Contenders, each a process of its own with random weights of the same sizes, that takes the same rows:

- `ours`: model, loss, order of rows, batches and prediction of this project, with malloc as launch.py sets it.
- `official`: with --official FOLDER and --official_python PYTHON the official scripts themselves, in their own
  environment (FOLDER holds ptuning/main.py and the model's Python files); see official_scripts.py. Without them the
  "official recipe, restated": rows padded to source + target + 1 tokens, gradient checkpointing, float32 logits of every
  position, KV groups copied to all heads, a mask for every row, rotary table of seq_length anew in each forward, cache
  grown by concatenation. It is generous: it runs in this environment, and generates without generate()'s overhead.
- `peft`: transformers' GlmForCausalLM with PEFT's PrefixTuningConfig, as one would write it today: rows padded to the
  longest of the batch, no checkpointing, generate(). Needs `pip install peft`.

Prediction is measured twice for ours: in batches like the others', and in the batches that it takes on its own.
They take turns, and the figures are medians of --repeats turns. A turn is one pass over --rows rows in training, and
--new_tokens tokens for each of --prompts prompts of one length in prediction.

The floor. Training: `minimal_operations` at the rate of a large product. Decoding: reading every weight once per step,
and keys and values, at the rate of a copy. Both rates are measured between the turns.

Memory is the peak while training, beyond what is resident before the first step: on a CPU of the process (VmHWM), on a
GPU of PyTorch's allocator.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # small: every width of the 6b divided by eight
    "6b": {
        "num_layers": 28,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "num_attention_heads": 32,
    },
    "small": {
        "num_layers": 6,
        "hidden_size": 512,
        "ffn_hidden_size": 1712,
        "kv_channels": 64,
        "num_attention_heads": 8,
    },
    "tiny": {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 428, "kv_channels": 32, "num_attention_heads": 4},
}
COMMON = {
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
}
MAX_SOURCE, MAX_TARGET = 64, 128
LEARNING_RATE = 2e-2
GROWTH_TOKENS = (128, 256, 512, 1024, 2048)
METRIC_ROWS, PREPROCESSING_ROWS = 400, 5000


# ---- rows and what must be computed for them


def find_data():
    """(tokenizer folder, training file): ADGEN and the real vocabulary where they are at hand, else the sample's."""
    shared = ROOT.parent / "shared"
    files = (ROOT / "AdvertiseGen" / "train.json", shared / "AdvertiseGen" / "train.json")
    file = next((file for file in files if file.is_file()), ROOT / "AdvertiseGen" / "sample" / "train.json")
    tokenizer = shared / "chatglm2-tokenizer"
    return (tokenizer if tokenizer.is_dir() else ROOT / "ptuning" / "tiny"), file


def read_examples(count):
    """(tokenizer, the first rows of the training file as read from it)."""
    from checkpoint import load_tokenizer
    from configuration_chatglm import ChatGLMConfig
    from data import load_examples

    folder, file = find_data()
    tokenizer = load_tokenizer(folder, ChatGLMConfig(**COMMON, **SIZES["tiny"]))
    return tokenizer, load_examples(str(file), "content", "summary", max_samples=count)[0]


def read_data(settings):
    """{"rows": encoded training rows, "prompts": token ids of prompts of one length}."""
    from data import encode_prediction, encode_training

    tokenizer, examples = read_examples(max(2000, settings.rows))
    lengths = {"max_source_length": MAX_SOURCE, "max_target_length": MAX_TARGET}
    encoded = encode_training(examples.select(range(settings.rows)), tokenizer, **lengths)
    prompts = encode_prediction(examples, tokenizer, **lengths)["input_ids"][:]
    by_length = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    return {
        "rows": [{name: encoded[index][name] for name in ("input_ids", "labels")} for index in range(settings.rows)],
        "prompts": max(by_length.values(), key=len)[: settings.prompts],
    }


def supervised_count(row):
    return sum(label != -100 for label in row["labels"])


def minimal_operations(sizes, rows, prefix_length):
    """Floating-point operations that prefix tuning of a frozen model cannot do without, for one pass over the rows.

    A product of (m, k) and (k, n) counts 2 m k n. The tokens of a row are those up to the last that predicts a label.
    Forward and the gradient of the input of every linear layer, but for the first projection, below which nothing
    trains; attention's two products over the keys that a query sees, and their four gradients; the output layer,
    forward and backward, for supervised positions. Norms, softmax and the like are not counted.
    """
    hidden, layers = sizes["hidden_size"], sizes["num_layers"]
    width = sizes["num_attention_heads"] * sizes["kv_channels"]
    mixed = width + 2 * COMMON["multi_query_group_num"] * sizes["kv_channels"]
    linear = hidden * mixed + width * hidden + 3 * hidden * sizes["ffn_hidden_size"]
    operations = 0
    for row in rows:
        tokens, supervised = len(row["input_ids"]) - 1, supervised_count(row)
        pairs = tokens * prefix_length + tokens * (tokens + 1) // 2
        operations += 4 * tokens * linear * layers - 2 * tokens * hidden * mixed
        operations += 3 * 4 * pairs * width * layers
        operations += 4 * supervised * hidden * COMMON["padded_vocab_size"]
    return operations


def decode_bytes(sizes, prefix_length, prompt_length, new_tokens, num_rows, element):
    """Bytes that decoding reads, over all steps: the weights once a step, and keys and values of every row."""
    hidden, group_width = sizes["hidden_size"], 2 * COMMON["multi_query_group_num"] * sizes["kv_channels"]
    width = sizes["num_attention_heads"] * sizes["kv_channels"]
    block = hidden * (width + group_width) + width * hidden + 3 * hidden * sizes["ffn_hidden_size"]
    weights = block * sizes["num_layers"] + hidden * COMMON["padded_vocab_size"]
    slots = sum(prefix_length + prompt_length + step for step in range(new_tokens))
    return element * (weights * new_tokens + slots * group_width * sizes["num_layers"] * num_rows)


# ---- contenders: each makes training steps and answers from rows and prompts


class Contender:
    """What the others have in common: an optimizer, a pass over the rows, figures of time and memory."""

    def __init__(self, settings):
        import torch

        torch.manual_seed(0)
        self.settings, self.sizes = settings, SIZES[settings.size]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.data = read_data(settings)
        self.build()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=self.fused)

    fused = True

    def chatglm(self):
        import torch

        from configuration_chatglm import ChatGLMConfig
        from modeling_chatglm import ChatGLMForConditionalGeneration
        from quantization import quantize_model_

        config = ChatGLMConfig(**COMMON, **self.sizes, pre_seq_len=self.settings.pre_seq_len)
        with torch.device(self.device):
            torch.set_default_dtype(self.dtype)
            model = ChatGLMForConditionalGeneration(config)
            torch.set_default_dtype(torch.float32)
        model.requires_grad_(False).transformer.prefix_encoder.float().requires_grad_(True)
        if self.settings.quantization_bit:
            quantize_model_(model, self.settings.quantization_bit)
        return model

    def batches(self, rows, size=None):
        size = size or self.settings.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def train(self, rows):
        """One step for each batch of the rows."""
        import torch

        self.model.train()
        for batch in self.batches(rows):
            self.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def answer(self, batch_size=None):
        import torch

        self.model.eval()
        with torch.inference_mode():
            for prompts in self.batches(self.data["prompts"], batch_size):
                answers = self.generate(prompts)
                assert all(len(answer) == self.settings.new_tokens for answer in answers)


class Ours(Contender):
    def build(self):
        """With weights as load_model() leaves those of a float16 folder."""
        from torch import nn

        from products import Linear, convert

        self.model = self.chatglm()
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.weight = nn.Parameter(convert(module.weight.half(), self.dtype), requires_grad=False)

    def batches(self, rows, size=None):
        from data import RowOrder

        if isinstance(rows[0], dict) and self.settings.group_by_length:
            lengths = [len(row["input_ids"]) for row in rows]
            rows = [
                rows[i] for i in RowOrder(lengths, batch_size=self.settings.batch_size, batches_per_step=1, window=50)
            ]
        return super().batches(rows, size)

    def loss(self, batch):
        from data import collate_training

        batch = collate_training([{**row, "row": 1} for row in batch], pad_token_id=0)
        return self.model(**{name: batch[name].to(self.device) for name in ("input_ids", "labels")}).loss

    def generate(self, prompts):
        from generation import answer_prompts

        self.model.config.eos_token_id = -1  # every answer runs to its full length
        return answer_prompts(
            self.model,
            prompts,
            len(prompts[0]) + self.settings.new_tokens,
            num_known=self.model.config.padded_vocab_size,
            batch_size=len(prompts),
            rows=list(range(len(prompts))),
        )

    def automatic_batch_size(self):
        """What prediction takes where no --per_device_eval_batch_size is given."""
        from memory import rows_that_fit

        return rows_that_fit(self.model, len(self.data["prompts"][0]) + self.settings.new_tokens)


class Peft(Contender):
    def build(self):
        from peft import PrefixTuningConfig, get_peft_model
        from transformers import GlmConfig, GlmForCausalLM

        config = GlmConfig(
            vocab_size=COMMON["padded_vocab_size"],
            hidden_size=self.sizes["hidden_size"],
            intermediate_size=self.sizes["ffn_hidden_size"],
            num_hidden_layers=self.sizes["num_layers"],
            num_attention_heads=self.sizes["num_attention_heads"],
            num_key_value_heads=COMMON["multi_query_group_num"],
            head_dim=self.sizes["kv_channels"],
            rms_norm_eps=COMMON["layernorm_epsilon"],
            pad_token_id=0,
            eos_token_id=None,
        )
        model = GlmForCausalLM(config).to(self.device, self.dtype)
        model.generation_config.eos_token_id = None
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.settings.pre_seq_len)
        self.model = get_peft_model(model, prefix)

    def loss(self, batch):
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def padded(name, value):
            return pad_sequence([torch.tensor(row[name]) for row in batch], True, value).to(self.device)

        input_ids, labels = padded("input_ids", 0), padded("labels", -100)
        mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in batch], True, 0)
        return self.model(input_ids=input_ids, attention_mask=mask.to(self.device), labels=labels).loss

    def generate(self, prompts):
        import torch

        input_ids = torch.tensor(prompts, device=self.device)
        answers = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=self.settings.new_tokens,
            do_sample=False,
        )
        return answers[:, input_ids.shape[1] :]


class Official(Contender):
    """The official recipe, restated: its operations on our parameters, sequence first as there."""

    fused = False  # transformers 4.30's own AdamW, one parameter after another

    def build(self):
        self.model = self.chatglm()
        if self.settings.quantization_bit:
            from benchmarks.quantization import OfficialLinear

            from quantization import QuantizedLinear

            for module in self.model.modules():
                if isinstance(module, QuantizedLinear):
                    module.__class__ = OfficialLinear

    def rotary_table(self):
        import torch

        channels = self.sizes["kv_channels"] // 2
        theta = 1.0 / 10000 ** (torch.arange(0, channels, 2, dtype=torch.float32, device=self.device) / channels)
        angles = torch.outer(torch.arange(COMMON["seq_length"], dtype=torch.float32, device=self.device), theta)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).to(self.dtype)

    def rotate(self, x, table):
        import torch

        length, batch_size, heads, channels = x.shape
        turned, passed = x[..., : channels // 2], x[..., channels // 2 :]
        pairs = turned.reshape(length, batch_size, heads, channels // 4, 2)
        cos, sin = (table[:length].view(length, -1, 1, channels // 4, 2)[..., part] for part in (0, 1))
        turned = torch.stack(
            (pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin), dim=-1
        )
        return torch.cat((turned.flatten(3), passed), dim=-1)

    def norm(self, layer, x):
        import torch

        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (layer.weight * (x * torch.rsqrt(variance + layer.eps))).to(x.dtype)

    def block(self, layer, hidden, mask, table, cache):
        import torch
        import torch.nn.functional as F

        heads, groups = self.sizes["num_attention_heads"], COMMON["multi_query_group_num"]
        channels = self.sizes["kv_channels"]
        attention = layer.self_attention
        mixed = attention.query_key_value(self.norm(layer.input_layernorm, hidden))
        query, key, value = mixed.split((heads * channels, groups * channels, groups * channels), dim=-1)
        query, key, value = (x.view(*x.shape[:2], -1, channels) for x in (query, key, value))
        query, key = self.rotate(query, table), self.rotate(key, table)
        key, value = torch.cat((cache[0], key)), torch.cat((cache[1], value))
        cache = (key, value)
        key, value = (
            x.unsqueeze(-2).expand(-1, -1, -1, heads // groups, -1).contiguous().view(*x.shape[:2], heads, channels)
            for x in (key, value)
        )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, None if mask is None else ~mask)
        context = context.permute(2, 0, 1, 3).reshape(hidden.shape[0], hidden.shape[1], heads * channels)
        hidden = hidden + F.dropout(attention.dense(context), 0.0, layer.training)
        gate, value = layer.mlp.dense_h_to_4h(self.norm(layer.post_attention_layernorm, hidden)).chunk(2, dim=-1)
        update = layer.mlp.dense_4h_to_h(F.silu(gate) * value)
        return hidden + F.dropout(update, 0.0, layer.training), cache

    def prompt(self, batch_size):
        """The prefix of every layer, (2, P, B, G, D)."""
        import torch

        encoder = self.model.transformer.prefix_encoder
        tokens = torch.arange(encoder.pre_seq_len, device=self.device)[None].expand(batch_size, -1)
        prefix = encoder.embedding(tokens).to(self.dtype).view(batch_size, encoder.pre_seq_len, *encoder.shape)
        return torch.nn.functional.dropout(prefix, 0.1, encoder.training).permute(2, 1, 0, 3, 4).split(2)

    def mask(self, batch_size, length):
        import torch

        causal = torch.ones(batch_size, length, length, device=self.device).tril_()
        seen = torch.ones(batch_size, length, self.settings.pre_seq_len, device=self.device)
        return (torch.cat((seen, causal), dim=-1) < 0.5).unsqueeze_(1)

    def blocks(self, input_ids, mask, caches, start=0):
        from torch.utils.checkpoint import checkpoint

        training = self.model.training
        hidden = self.model.transformer.embedding(input_ids).transpose(0, 1).contiguous()
        hidden.requires_grad_(training)  # enable_input_require_grads
        table = self.rotary_table()[None, start : start + input_ids.shape[1]].transpose(0, 1).contiguous()
        grown = []
        for layer, cache in zip(self.model.transformer.encoder.layers, caches, strict=True):
            if training:
                hidden, _ = checkpoint(self.block, layer, hidden, mask, table, cache, use_reentrant=True)
            else:
                hidden, cache = self.block(layer, hidden, mask, table, cache)
                grown.append(cache)
        return self.norm(self.model.transformer.encoder.final_layernorm, hidden), grown

    def loss(self, batch):
        import torch

        length = MAX_SOURCE + MAX_TARGET + 1
        rows = [(row["input_ids"], row["labels"], length - len(row["input_ids"])) for row in batch]
        input_ids = torch.tensor([ids + [0] * padding for ids, _, padding in rows], device=self.device)
        labels = torch.tensor([labels + [-100] * padding for _, labels, padding in rows], device=self.device)
        mask = self.mask(len(batch), length)
        hidden, _ = self.blocks(input_ids, mask, self.prompt(len(batch)))
        logits = self.model.transformer.output_layer(hidden).transpose(0, 1).contiguous().to(torch.float32)
        shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        loss = torch.nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1))
        logits.to(hidden.dtype)  # returned, though nothing reads it
        return loss.to(hidden.dtype)

    def generate(self, prompts):
        import torch

        tokens = torch.tensor(prompts, device=self.device)
        mask, caches = self.mask(*tokens.shape), self.prompt(len(prompts))
        answers, start = [], 0
        for _ in range(self.settings.new_tokens):
            hidden, caches = self.blocks(tokens, mask, caches, start)
            start, mask = start + tokens.shape[1], None
            tokens = self.model.transformer.output_layer(hidden[-1:]).transpose(0, 1)[:, -1].argmax(-1, keepdim=True)
            answers.append(tokens)
        return torch.cat(answers, dim=1)


CONTENDERS = {"ours": Ours, "official": Official, "peft": Peft}
NAMES = {
    "ours": "ours",
    "automatic": "ours, automatic batch size",
    "official": "official recipe, restated",
    "peft": "GlmForCausalLM + PEFT",
    "float": "ours, float",
}


# ---- a contender's process: commands come in as lines, figures go out as lines of JSON


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


def long_row(tokens):
    """A row of so many tokens, the later half supervised."""
    ids = [100 + index % 1000 for index in range(tokens + 1)]
    return {"input_ids": ids, "labels": [-100] * (tokens // 2 + 1) + ids[tokens // 2 + 1 :]}


def work(settings):
    """Obey the parent: train, memory, answer, growth <tokens>."""
    import torch

    contender = CONTENDERS["ours" if settings.worker == "float" else settings.worker](settings)

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
    from data import encode_training

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

    from metrics import score_all

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
        first_step = next((time.perf_counter() - started for line in process.stdout if "'loss'" in line), None)
        process.stdout.read()
        process.wait()
    return statistics.median(help_times), first_step


# ---- the whole comparison


def measure(settings):
    """Everything, as a dictionary of figures."""
    import torch
    from benchmarks.quantization import measure_floor

    from launch import KEEP_MEMORY

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    words = [word for word in sys.argv[1:] if not word.startswith("--worker")]
    command = [sys.executable, "-m", "benchmarks.speed", *words, "--worker"]
    names = ["ours", "official", "peft"] if not settings.quantization_bit else ["ours", "official", "float"]
    workers = {}
    for name in names:
        if name == "official" and settings.official:
            official = Path(__file__).with_name("official_scripts.py")
            NAMES["official"] = "official scripts"
            workers[name] = Worker([settings.official_python, str(official), *official_words(settings)])
        else:
            workers[name] = Worker([*command, name], {**os.environ, **KEEP_MEMORY} if name == "ours" else None)
    figures = {"memory": {name: worker.ask("memory")["extra_bytes"] for name, worker in workers.items()}}
    rates = []
    for part in ("train", "answer"):
        seconds = {name: [] for name in workers}
        for turn in range(settings.repeats + 1):
            rates.append(measure_floor(device, dtype))
            for name, worker in workers.items():
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
    if settings.growth:
        turns = [
            {tokens: workers["ours"].ask(f"growth {tokens}") for tokens in GROWTH_TOKENS}
            for _ in range(settings.repeats)
        ]
        for tokens, first in turns[0].items():  # the memory of the first turn: later ones keep kernels of longer rows
            first["seconds"] = statistics.median(turn[tokens]["seconds"] for turn in turns)
        figures["growth"] = turns[0]
    for worker in workers.values():
        worker.close()
    data = read_data(settings)
    figures["rows"], figures["prompts"] = data["rows"], data["prompts"]
    if not settings.quantization_bit:
        figures["preprocessing"] = preprocessing_rates(settings)
        figures["metrics"] = metric_rates(settings)
        figures["help"], figures["first_step"] = start_seconds()
    return figures


def official_words(settings):
    folder, file = find_data()
    sizes = {**COMMON, **SIZES[settings.size]}
    return [settings.official, str(folder), str(file), json.dumps({**vars(settings), "sizes": sizes})]


def report(settings, figures):
    """The tables, in Markdown."""
    rows, prompts, sizes = figures["rows"], figures["prompts"], SIZES[settings.size]
    element = 2 if settings.device == "cuda" else 4
    tokens = sum(len(row["input_ids"]) for row in rows)
    operations = minimal_operations(sizes, rows, settings.pre_seq_len)

    def bytes_read(name):
        size = figures["automatic_batch_size"] if name == "automatic" else settings.batch_size
        steps, num_rows = -(-len(prompts) // size), min(size, len(prompts))
        return steps * decode_bytes(
            sizes, settings.pre_seq_len, len(prompts[0]), settings.new_tokens, num_rows, element
        )

    ours = {part: figures[part]["ours"] for part in ("train", "answer", "memory")}

    def line(*cells):
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    print(
        f"\n{datetime.date.today()}, {settings.machine}. Model `{settings.size}`, prefix {settings.pre_seq_len}, batch "
        f"{settings.batch_size}, {len(rows)} rows of {find_data()[1].parent.name} with {tokens / len(rows):.0f} tokens, "
        f"{sum(map(supervised_count, rows)) / len(rows):.0f} of them supervised; {len(prompts)} prompts of "
        f"{len(prompts[0])} tokens, {settings.new_tokens} new ones each; medians of {settings.repeats} turns. Product "
        f"{figures['product_rate'] / 1e9:,.0f} GFLOP/s, copy {figures['copy_rate'] / 1e9:.1f} GB/s.\n"
    )
    print(line("", "training samples/s", "tokens/s", "ours is", "of the product's rate", "extra memory", "ours needs"))
    print("|---" * 7 + "|")
    for name, seconds in figures["train"].items():
        print(
            line(
                NAMES[name],
                f"{len(rows) / seconds:.2f}",
                f"{tokens / seconds:,.0f}",
                f"{seconds / ours['train']:.2f}x",
                f"{operations / seconds / figures['product_rate']:.0%}",
                f"{figures['memory'][name] / 1e6:,.0f} MB",
                f"{ours['memory'] / figures['memory'][name]:.2f}x",
            )
        )
    floor = operations / figures["product_rate"]
    print(
        line(
            "floor",
            f"{len(rows) / floor:.2f}",
            f"{tokens / floor:,.0f}",
            f"{floor / ours['train']:.2f}x",
            "100%",
            "",
            "",
        )
    )
    print()
    print(line("", "answers/s", "new tokens/s", "ours is", "of the copy's rate"))
    print("|---" * 5 + "|")
    for name, seconds in figures["answer"].items():
        print(
            line(
                NAMES[name],
                f"{len(prompts) / seconds:.2f}",
                f"{len(prompts) * settings.new_tokens / seconds:,.0f}",
                f"{seconds / ours['answer']:.2f}x",
                f"{bytes_read(name) / seconds / figures['copy_rate']:.0%}",
            )
        )
    print()
    if "preprocessing" in figures:
        print(line("", "ours", "official recipe, restated", "ratio"))
        print("|---" * 4 + "|")
        for part, unit in (("preprocessing", "rows/s"), ("metrics", "rows/s")):
            both = figures[part]
            ratio = both["ours"] / both["official"]
            print(line(f"{part}, {unit}", f"{both['ours']:,.0f}", f"{both['official']:,.0f}", f"{ratio:.1f}x"))
        print(line("main.py --help", f"{figures['help']:.2f} s", "", ""))
        print(line("first step of the tiny model, from the command", f"{figures['first_step']:.1f} s", "", ""))
        print()
    if settings.growth:
        print(line("tokens a row", "ms a row", "µs a token", "MFLOP a token", "extra MB a row", "KB a token"))
        print("|---" * 6 + "|")
        for count, growth in figures["growth"].items():
            seconds, extra = growth["seconds"] / 2, growth["extra_bytes"] / 2
            operations = minimal_operations(sizes, [long_row(count)], settings.pre_seq_len)
            print(
                line(
                    f"{count:,}", f"{seconds * 1e3:,.0f}", f"{seconds / count * 1e6:,.0f}",
                    f"{operations / count / 1e6:,.0f}", f"{extra / 1e6:,.0f}", f"{extra / count / 1e3:,.0f}",
                )
            )  # fmt: skip


def plot(settings, figures):
    """benchmarks/speed.png: rates relative to ours; benchmarks/growth.png: time and memory over tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"training, samples/s": "train", "prediction, answers/s": "answer", "extra memory in training": "memory"}
    for axes, (title, part) in zip(figure.subplots(1, 3, width_ratios=(3, 4, 3)), panels.items(), strict=True):
        official = figures[part]["official"]
        names = list(figures[part])
        values = [
            figures[part][name] / official if part == "memory" else official / figures[part][name] for name in names
        ]
        labels = [
            NAMES[name].replace(", ", ",\n").replace(" + ", "\n+ ").replace(" batch", "\nbatch") for name in names
        ]
        bars = axes.bar(labels, values)
        axes.bar_label(bars, [f"{value:.2f}x" for value in values])
        axes.set_title(title, fontsize=10)
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


def describe_machine(device):
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16"
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.machine()}, {threads} threads, torch {torch.__version__}, float32"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, default=32, help="rows of a training turn")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a prediction turn")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quantization_bit", type=int, choices=(4, 8), default=0, help="ours and official; beside ours in float"
    )
    parser.add_argument(
        "--group_by_length", action="store_true", help="ours with --train_sampling_strategy group_by_length"
    )
    parser.add_argument("--official", help="folder with the official ptuning/main.py and the model's Python files")
    parser.add_argument("--official_python", help="the Python of its environment (transformers 4.30.2)")
    parser.add_argument("--no_growth", dest="growth", action="store_false", help="leave the longer rows out")
    parser.add_argument("--worker", choices=(*CONTENDERS, "float"), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker == "float":
        settings.quantization_bit = 0
    if settings.worker:
        return work(settings)
    import torch

    if bool(settings.official) != bool(settings.official_python):
        parser.error("--official and --official_python belong together")
    settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.machine = describe_machine(settings.device)
    print("    " + "PYTHONPATH=ptuning python -m benchmarks.speed " + " ".join(sys.argv[1:]))
    figures = measure(settings)
    report(settings, figures)
    plot(settings, figures)


if __name__ == "__main__":
    main()
