"""Whole runs of main.py on the model and the rows that ship with the project."""

import json
import sys
from pathlib import Path

from conftest import SAMPLE, TINY

import main

TRAIN_SETTINGS = {
    "do_train": True,
    "train_file": SAMPLE / "train.json",
    "prompt_column": "content",
    "response_column": "summary",
    "model_name_or_path": TINY,
    "max_train_samples": 60,
    "max_source_length": 64,
    "max_target_length": 32,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "save_steps": 3,
    "logging_steps": 1,
    "learning_rate": 2e-2,
    "pre_seq_len": 8,
    "report_to": "none",
    "disable_tqdm": True,
    "plot_loss": False,  # which takes as long as five steps; None leaves the flag out, and the plot is drawn
}
PREDICT_SETTINGS = {
    "do_predict": True,
    "test_file": SAMPLE / "dev.json",
    "max_predict_samples": 10,
    "max_target_length": 16,
    "per_device_eval_batch_size": 4,
    "predict_with_generate": True,
    "disable_tqdm": True,
}


def flags(settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return words


def run(monkeypatch, settings, **more):
    """main() in this process, with the flags of `settings`; a value of None leaves a flag out."""
    settings = {name: value for name, value in {**settings, **more}.items() if value is not None}
    monkeypatch.setattr(sys, "argv", ["main.py", *flags(settings)])
    main.main()


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def predictions(folder):
    return [json.loads(line) for line in (folder / "generated_predictions.txt").read_text("utf-8").splitlines()]
