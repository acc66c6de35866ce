"""Where a relative path leads when a shell script has changed the folder before it started the program."""

import os
from pathlib import Path

CALLED_FROM = "PTUNING_CALLED_FROM"  # the folder in which the user started train.sh; set by common.sh
READ = (  # flags that name a file or folder to read
    "model_name_or_path ptuning_checkpoint reward_model general_file train_file validation_file test_file dataset_dir "
    "resume_from_checkpoint deepspeed fsdp_config accelerator_config"
).split()


def seen_from_caller(path):
    """`path` itself, or what it is in the folder of the user where only that exists."""
    folder = os.environ.get(CALLED_FROM)
    try:
        if not folder or not isinstance(path, str) or not path or Path(path).exists():
            return path
        theirs = Path(folder, path)
        return str(theirs) if theirs.exists() else path
    except (OSError, ValueError, RuntimeError):  # no path at all: whoever reads it says so
        return path
