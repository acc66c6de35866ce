"""What the scripts tell a program of the variables that started it, so that it can speak in the user's words.

Answers to nothing in the official scripts. common.sh sets the environment variables that are read here; without them,
as where a program is started by hand, the words are flags.
"""

import difflib
import os
import re
import shlex
from pathlib import Path

from common.quoting import as_typed

SURELY_MEANT = 0.85  # likeness of two names, from 0 to 1: BATCHSIZE and BATCH_SIZE have 0.95, DATE and DATA 0.75


def next_commands(output_dir: Path | str) -> dict[str, str]:
    """{"evaluate" and "talk": command} for the run in `output_dir`, as the script that trained it says; {} by hand."""
    checkpoint = f"CHECKPOINT={as_typed(os.path.relpath(output_dir, 'output'))}"
    found = {name: os.environ.get(f"PTUNING_{name.upper()}") for name in ("evaluate", "talk")}
    return {name: command.replace("CHECKPOINT=?", checkpoint) for name, command in found.items() if command}


def in_words_typed(text: str) -> str:
    """A message with the script's variables in place of flags that the script has written: MAX_STEPS=5.

    PTUNING_FLAGS holds words such as max_steps=MAX_STEPS=5.
    """
    for word in shlex.split(os.environ.get("PTUNING_FLAGS", "")):
        flag, variable, value = (*word.split("=", 2), "")[:3]
        if value:
            text = re.sub(rf"--{flag}[ =]{re.escape(value)}(?![\w/-])", lambda _: f"{variable}={as_typed(value)}", text)  # noqa: B023
        text = re.sub(rf"(did you mean )--{flag} ", rf"\1{variable}=", text)
        text = re.sub(rf"--{flag}(?!\w)", variable, text)
    return text


def near_misses() -> list[str]:
    """A warning for each variable of the environment that is nearly called as one of the script's."""
    known = os.environ.get("PTUNING_VARIABLES", "").split()
    script, lines = os.environ.get("PTUNING_SCRIPT", "the script"), []
    for name in sorted(os.environ.keys() - set(known)):
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=SURELY_MEANT)
        if near:
            lines.append(f"warning: {name}={as_typed(os.environ[name])} changes nothing; {script} reads {near[0]}.")
    return lines
