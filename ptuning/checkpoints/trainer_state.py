"""What a checkpoint says of its run's progress, trainer_state.json, checked before anything is computed from it.

Answers to the library's TrainerState, which takes any value of any type, and refuses a key that it does not know, such
as a newer transformers writes. Needs no torch.
"""

import contextlib
import math
from dataclasses import fields
from pathlib import Path

from common.messages import short_json
from common.text import parse_json
from common.values import LARGEST, is_count, is_number


def is_history(value) -> bool:
    """True for a log: a list of objects, with a step and a number wherever there is a loss."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and all(is_number(entry[key]) and is_count(entry.get("step")) for key in ("loss", "eval_loss") if key in entry)
        for entry in value
    )


def or_none(fits):
    return lambda value: value is None or fits(value)


A_COUNT = "a whole number, at least 0"
# Key -> (what its value must be, in words). Every key but global_step may be missing.
KINDS = {
    **dict.fromkeys(("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen"), (is_count, A_COUNT)),
    "train_batch_size": (or_none(lambda value: is_count(value, 1)), "a whole number, at least 1"),
    "epoch": (lambda value: is_number(value) and 0 <= value < LARGEST, "a number from 0 on"),
    "total_flos": (lambda value: is_number(value) and 0 <= value < math.inf, "a number from 0 on"),
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps"),
        (lambda value: is_number(value) and 0 < value < LARGEST, "a number above 0"),
    ),
    "best_metric": (or_none(is_number), "a number"),
    "best_global_step": (or_none(is_count), A_COUNT),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), (or_none(lambda value: isinstance(value, str)), "text")),
    "trial_params": (or_none(lambda value: isinstance(value, dict)), "an object"),
    "stateful_callbacks": (
        or_none(
            lambda value: isinstance(value, dict) and all(isinstance(state, dict | list) for state in value.values())
        ),
        "an object",
    ),
    "log_history": (or_none(is_history), "a list of logged losses, each with its step"),
}


def check_state(state: dict, file: Path | str) -> dict:
    """`state` itself, once every known key has a value of its kind. ValueError names `file`, key and value."""
    for name, (fits, expected) in KINDS.items():
        if name in state or name == "global_step":
            value = state.get(name)
            if not fits(value):
                raise ValueError(f"{file}: {name} is {short_json(value)}, expected {expected}.")
    if 0 < (state.get("max_steps") or 0) < state["global_step"]:
        raise ValueError(
            f"{file}: global_step is {state['global_step']}, beyond the run's last step (max_steps {state['max_steps']})."
        )
    return state


@contextlib.contextmanager
def reading_known_keys():
    """While the Trainer resumes: keys of trainer_state.json that this version of transformers lacks are passed over."""
    from transformers import TrainerState  # here, as compare.py needs no torch

    def load_from_json(file):
        state = parse_json(Path(file).read_text(encoding="utf-8"))
        return TrainerState(
            **{name: state[name] for name in state.keys() & {field.name for field in fields(TrainerState)}}
        )

    own = TrainerState.__dict__["load_from_json"]
    TrainerState.load_from_json = staticmethod(load_from_json)
    try:
        yield
    finally:
        TrainerState.load_from_json = own
