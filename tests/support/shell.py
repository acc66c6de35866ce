"""The scripts, in bash."""

import os
import subprocess

from conftest import ROOT


def bash(command, timeout=600, cwd=ROOT, **environment):
    environment = {**os.environ, "WANDB_MODE": "disabled", **{key: str(value) for key, value in environment.items()}}
    for name in ("MODEL", "DATA", "OMP_NUM_THREADS"):
        if name not in environment:
            environment.pop(name, None)
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment
    )
