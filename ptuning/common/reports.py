"""TensorBoard and wandb: where they write, and that nobody is asked for an account.

Answers to nothing in the official scripts, whose runs stop at wandb's question for a key. Everything else is the
library's.
"""

import contextlib
import os
from pathlib import Path

from transformers.integrations import get_available_reporting_integrations

from common.environment import before_wandb

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


def prepare_reports(training_args) -> None:
    """Where TensorBoard and wandb write: the run's own folder; wandb offline unless the user has an account set.

    Raises ValueError for a --report_to that cannot be, a TensorBoard folder that is a file, and a WANDB_MODE that
    does not exist or needs an account that is not there.
    """
    if not training_args.do_train:
        training_args.report_to = []
    usable = get_available_reporting_integrations()
    for name in training_args.report_to:
        if name not in usable:
            raise ValueError(
                f"--report_to {name}: unknown, or not installed. Here there are: {', '.join(usable)}, none."
            )
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR", "")
    if "tensorboard" in training_args.report_to and Path(folder).is_file():
        raise ValueError(f"--logging_dir {folder} is a file. Name a folder, or leave the flag out.")
    netrc = Path.home() / ".netrc"
    named = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
    logged_in = "WANDB_API_KEY" in os.environ or named
    mode = os.environ.get("WANDB_MODE")
    if mode is not None and "wandb" in training_args.report_to:
        if mode not in WANDB_MODES:
            raise ValueError(f"WANDB_MODE={mode}: expected one of {', '.join(WANDB_MODES)}.")
        if mode in ("online", "run") and not logged_in:
            raise ValueError(
                f"WANDB_MODE={mode} needs an account: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline."
            )
    before_wandb(training_args.output_dir, logged_in)


def close_reports(trainer) -> None:
    """End the wandb run, which stays open otherwise."""
    if any(type(callback).__name__ == "WandbCallback" for callback in trainer.callback_handler.callbacks):
        import wandb

        with contextlib.suppress(Exception):  # a logger's service raises anything, and a log ends no run
            wandb.finish()
