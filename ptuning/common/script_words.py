"""What the scripts tell a program of the variables that started it, so that it can speak in the user's words.

Answers to nothing in the official scripts. common.sh sets the environment variables that are read here; without them,
as where a program is started by hand, the words are flags.
"""

import os
import re
from pathlib import Path

from common.quoting import as_typed


def next_commands(output_dir: Path | str) -> dict[str, str]:
    """{"evaluate" and "talk": command} for the run in `output_dir`, as the script that trained it says; {} by hand."""
    checkpoint = f"CHECKPOINT={as_typed(os.path.relpath(output_dir, 'output'))}"
    found = {name: os.environ.get(f"PTUNING_{name.upper()}") for name in ("evaluate", "talk")}
    return {name: command.replace("CHECKPOINT=?", checkpoint) for name, command in found.items() if command}


def in_words_typed(text: str) -> str:
    """A message with the script's variables in place of flags that the script has written: MAX_STEPS=5.

    A line of PTUNING_FLAGS is such as max_steps=MAX_STEPS=5.
    """
    for line in os.environ.get("PTUNING_FLAGS", "").splitlines():
        flag, variable, value = (*line.split("=", 2), "", "")[:3]
        if value:
            text = re.sub(
                rf"--{flag}[ =]{re.escape(value)}(?![\w/-])", f"{variable}={value}".replace("\\", r"\\"), text
            )
        text = re.sub(rf"(did you mean )--{flag} ", rf"\1{variable}=", text)
        text = re.sub(rf"--{flag}(?!\w)", variable, text)
    return text
