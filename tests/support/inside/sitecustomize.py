"""Runs inside the processes of tests/training/test_distributed.py, which put this folder on PYTHONPATH.

RECORD=folder: each process works in a folder of its own there, `rank-N`, so that what it writes to a relative path is
seen, and writes the numbers of the rows it trains on to `rows-N.json`, one list for each optimizer step.
BREAK=python code: run by every process before its third step; it knows its RANK.
"""

import builtins
import json
import os
from pathlib import Path

RANK = os.environ.get("RANK", "0")  # one process alone has none
import_module = builtins.__import__


def watched_import(name, *args, **kwargs):
    module = import_module(name, *args, **kwargs)
    if name == "trainer" and hasattr(module, "PrefixTrainer"):
        builtins.__import__ = import_module
        watch(module.PrefixTrainer)
    return module


def watch(trainer_class):
    if "RECORD" in os.environ:
        folder = Path(os.environ["RECORD"], f"rank-{RANK}")
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    training_step = trainer_class.training_step
    steps = {}

    def watched_step(self, model, inputs, *args, **kwargs):
        step = self.state.global_step
        if step == 2 and "BREAK" in os.environ:
            exec(os.environ["BREAK"])
        steps.setdefault(step, []).extend(row for row in inputs["row"].tolist() if row)
        loss = training_step(self, model, inputs, *args, **kwargs)
        if "RECORD" in os.environ:
            Path(os.environ["RECORD"], f"rows-{RANK}.json").write_text(json.dumps(list(steps.values())))
        return loss

    trainer_class.training_step = watched_step


builtins.__import__ = watched_import
