"""Runs of every tuning method."""

import sys

from conftest import SAMPLE, TINY

import main

TRAIN = {
    "do_train": True,
    "train_file": SAMPLE / "train.json",
    "prompt_column": "content",
    "response_column": "summary",
    "model_name_or_path": TINY,
    "max_train_samples": 40,
    "max_source_length": 64,
    "max_target_length": 32,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "disable_tqdm": True,
    "plot_loss": False,  # which takes as long as five steps; None leaves the flag out, and the plot is drawn
}
METHODS = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "num_layer_trainable": 2},
    "lora": {"finetuning_type": "lora", "lora_target": "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"},
    "int4 lora": {"finetuning_type": "lora", "quantization_bit": 4},
}


def run(monkeypatch, settings, **more):
    """main() in this process; the trainer it used."""
    words = []
    for name, value in {**settings, **more}.items():
        words += [] if value is None else [f"--{name}", str(value)]
    used = []

    class Trainer(main.GeneralTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            used.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *words])
        patch.setattr(main, "GeneralTrainer", Trainer)
        main.main()
    return used[0]
