"""Pairs of answers: a batch for the small model of the reference data, files of rows, and the flags of short runs."""

import json
import sys

import torch
from conftest import TINY

import main
from trainer import PrefixTrainer

COLOURS = ("红色", "黄色", "蓝色", "绿色", "白色", "黑色", "灰色", "粉色")


def pair_rows(count, start=0):
    """Rows of a prompt and two answers, of which the chosen one names the colour."""
    rows = []
    for number in range(start, start + count):
        colour, kind = COLOURS[number % 8], "裤裙"[number // 8 % 2]
        rest = f"这条{kind}很好看，第{number}款。"
        rows.append({"content": f"类型#{kind}*颜色#{colour}", "chosen": f"{colour}，{rest}", "rejected": rest})
    return rows


def write_pairs(file, count, start=0):
    file.write_text(json.dumps(pair_rows(count, start), ensure_ascii=False), encoding="utf-8")
    return file


TRAIN = {
    "do_train": True,
    "prompt_column": "content",
    "model_name_or_path": TINY,
    "max_source_length": 32,
    "max_target_length": 24,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "learning_rate": 5e-3,
    "report_to": "none",
    "disable_tqdm": True,
}
METHODS = {
    "prefix": {"finetuning_type": "p_tuning", "pre_seq_len": 4},
    "lora": {"finetuning_type": "lora", "lora_rank": 4},
    "int4 prefix": {"finetuning_type": "p_tuning", "pre_seq_len": 4, "quantization_bit": 4},
    "int8 lora": {"finetuning_type": "lora", "lora_rank": 4, "quantization_bit": 8},
}


def figures(folder):
    """The lines of trainer_log.jsonl without their times, and without those that say what phase begins."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    times = ("elapsed_time", "remaining_time")
    return [{name: line[name] for name in line if name not in times} for line in lines if "phase" not in line]


def run(monkeypatch, settings, **more):
    """main() in this process; the trainer that it used."""
    words = []
    for name, value in {**settings, **more}.items():
        words += [] if value is None else [f"--{name}", str(value)]
    used, begin = [], PrefixTrainer.__init__

    def begin_noted(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        used.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *words])
        patch.setattr(PrefixTrainer, "__init__", begin_noted)
        main.main()
    return used[0] if used else None


# ---- a batch for the small model: 3 pairs, (3, 2, 16), the blank one last

LENGTHS = torch.tensor([[16, 11], [7, 9], [3, 3]])
PROMPTS = torch.tensor([5, 4, 2])


def pair_batch():
    torch.manual_seed(0)
    input_ids = torch.randint(3, 60, (3, 2, 16))
    places = torch.arange(16)
    answer = (places >= PROMPTS[:, None, None]) & (places < LENGTHS[..., None])
    labels = torch.where(answer, input_ids, -100)
    labels[0, 0, 8] = -100  # an unknown token in an answer
    weight = torch.tensor([1.0, 1.0, 0.0])
    return {"input_ids": input_ids, "labels": labels, "lengths": LENGTHS, "weight": weight}
